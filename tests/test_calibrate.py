"""`calibrate`: the same policy with static shapes, and what static shapes are for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.testing import assert_close

import flowcut_kernels as fk
from flowcut_kernels.policies import recycling

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def stages(model, policy, pixels, backend=None):
    with fk.patched(model, policy, record=True, backend=backend), torch.no_grad():
        model(pixels)
        return fk.trace(model).stages


@pytest.mark.parametrize("changes", [{}, dict(interval=1), dict(batch="max"), dict(cumulative=False)], ids=str)
def test_schedule_is_the_mean_of_the_images(changes):
    tower, policy = tiny.clip_tower(), fk.FlowCut(8, **changes)
    batches = [tiny.images(3, seed=1), tiny.images(2, seed=2)]
    frozen = fk.calibrate(tower, policy, batches)
    seen = [stages(tower, policy, pixels) for pixels in batches]
    wanted = {stage.layer: [] for stage in seen[0]}
    for run in seen:
        for stage in run:
            wanted[stage.layer] += stage.kept
    assert dict(frozen.schedule) == {layer: round(sum(counts) / len(counts)) for layer, counts in wanted.items()}
    assert frozen.schedule[-1][1] == 8
    kept = [stage.kept for stage in stages(tower, frozen, batches[0])]
    assert kept == [[count] * 3 for _, count in frozen.schedule]
    assert "_flowcut_patch" not in vars(tower)


def test_an_image_that_has_the_mean_count_keeps_the_same_tokens():
    """One sample: its own schedule, hence its own tokens."""
    tower, policy, pixels = tiny.clip_tower(), fk.FlowCut(8), tiny.images(1)
    frozen = fk.calibrate(tower, policy, {"pixel_values": pixels, "input_ids": torch.zeros(1, 4)})
    for ours, free in zip(stages(tower, frozen, pixels), stages(tower, policy, pixels), strict=True):
        assert torch.equal(ours.indices, free.indices)


def test_whole_models():
    model = tiny.llava()
    frozen = fk.calibrate(model, fk.FlowCut(retain_ratio=0.25), tiny.images(2))
    assert (
        frozen.schedule[-1][1] == frozen.budget(tiny.PATCHES) and fk.calibrate(model, frozen, tiny.images(2)) == frozen
    )
    assert fk.calibrate(model, fk.FlowCut(tiny.PATCHES), tiny.images(1)).schedule is None


def test_a_cut_that_drops_nothing_is_left_out():
    """Uniform attention in the early layers: the entropy rule keeps everything there."""
    tower, pixels = tiny.clip_tower(), tiny.images(2)
    with torch.no_grad():
        for layer in tower.encoder.layers[:4]:
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.q_proj.bias.zero_()
    frozen = fk.calibrate(tower, fk.FlowCut(8), pixels)
    assert frozen.schedule[0][0] > 1 and frozen.schedule[0][1] < tiny.PATCHES
    assert stages(tower, frozen, pixels)[-1].kept == [8, 8]


@pytest.mark.parametrize("make", [tiny.clip_tower, tiny.siglip_tower], ids=["clip", "siglip"])
@pytest.mark.parametrize("choose", [lambda t: fk.calibrate(t, fk.FlowCut(8), tiny.images(2)),
                                    lambda t: fk.FlowCut(8, adaptive=False), lambda t: fk.UniformTokens(8)],
                         ids=["calibrated", "fixed shares", "uniform"])  # fmt: skip
def test_compiles_as_one_graph(make, choose):
    tower = make(num_hidden_layers=4)  # the time is that of tracing layers
    policy = choose(tower)
    with fk.patched(tower, policy), torch.no_grad():
        compiled = torch.compile(tower, fullgraph=True, backend="aot_eager")
        for seed in (3, 4):
            pixels = tiny.images(2, seed=seed)
            assert_close(compiled(pixels).last_hidden_state, tower(pixels).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_adaptive_cuts_survive_compilation():
    """Counts differ from cut to cut, which makes later calls use other code than the first: where torch traces into the
    choice (no operator for float64), a cut in the middle was left out of them."""
    tower, pixels = tiny.clip_tower().double(), tiny.images(1).double()
    with fk.patched(tower, fk.FlowCut(8)), torch.no_grad():
        want, compiled = tower(pixels)[0], torch.compile(tower, backend="eager")
        for _ in range(2):
            assert_close(compiled(pixels)[0], want)


def test_scores_that_are_not_finite_are_not_hidden():
    """In a graph nothing can be raised: the features are NaN, never a ranking of NaN."""
    tower = tiny.clip_tower()
    policy = fk.calibrate(tower, fk.FlowCut(8), tiny.images(2))
    pixels = tiny.images(2)
    pixels[1, 0, 0, 0] = float("nan")
    with fk.patched(tower, policy), torch.no_grad():
        with pytest.raises(ValueError, match=r"sample\(s\) \[1\] at encoder layer 0"):
            tower(pixels)
        hidden = torch.compile(tower, fullgraph=True, backend="aot_eager")(pixels).last_hidden_state
    assert hidden[0].isfinite().all() and hidden[1].isnan().all()


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ((), "pairs of whole numbers"),
        (((1, 2, 3),), "pairs of whole numbers"),
        (((1, 2.5), (2, 8)), "pairs of whole numbers"),
        (((2, 20), (2, 8)), "rising layers"),
        (((1, 8), (2, 20)), "rising layers"),
        (((1, 20), (2, 9)), "target_tokens=8"),
        (((1, 0.5), (2, 0.2)), "the last 0.0"),
        (((1, 1.0), (2, 0.0)), "a share below 1.0"),
        (((1, 0.5), (2, 8)), "pairs of whole numbers"),
        (((1, 0.2), (2, 0.5), (3, 0.0)), "falling"),
    ],
)
def test_bad_schedules(schedule, message):
    with pytest.raises(ValueError, match=message):
        fk.FlowCut(8, schedule=schedule)


@pytest.mark.parametrize("schedule", [((1, 20), (7, 8)), ((1, 70), (3, 8))], ids=["layer", "count"])
def test_a_schedule_of_another_model(schedule):
    tower = tiny.clip_tower()
    with pytest.raises(ValueError, match="calibrate on this model"):
        fk.patch(tower, fk.FlowCut(8, schedule=schedule))
    assert "_flowcut_patch" not in vars(tower) and "forward" not in vars(tower.encoder)


@pytest.mark.parametrize(
    ("policy", "inputs", "error", "message"),
    [
        (fk.RandomTokens(8), tiny.images(1), TypeError, "RandomTokens"),
        (fk.FlowCut(8), [], ValueError, "inputs is empty"),
        (fk.FlowCut(8), {"input_ids": torch.zeros(1, 1)}, ValueError, r"inputs\[0\] holds no pixel_values"),
        (
            fk.FlowCut(8),
            torch.zeros(1, 9, dtype=torch.int64),
            ValueError,
            r"inputs\[0\] is a torch.int64 tensor \(1, 9\)",
        ),
        (fk.FlowCut(8), dict(pixel_values=[[0.5]]), TypeError, "holds pixel_values as list; .* return_tensors='pt'"),
        (fk.FlowCut(8), [3], TypeError, r"inputs\[0\] is int"),
        (fk.FlowCut(8), None, TypeError, "inputs is NoneType; give processor output, or a list of it"),
    ],
)
def test_bad_input(policy, inputs, error, message):
    tower = tiny.clip_tower()
    with pytest.raises(error, match=message):
        fk.calibrate(tower, policy, inputs)
    assert "_flowcut_patch" not in vars(tower)


def test_constants_of_a_captured_graph_are_kept(monkeypatch):
    """It reads them where they are, when others have long pushed them out of the cache."""
    x = SimpleNamespace(device=torch.device("cuda", 0), is_cuda=True)
    for cached in ("_constant", "_image_of"):
        monkeypatch.setattr(recycling, cached, lambda *_: x)
    monkeypatch.setattr(recycling, "_captured", [])
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        assert recycling.constant((1, 2), x.device) is x and recycling._captured == [x] * capturing
    assert recycling.images_of((1, 2), x.device) == (x, x) and recycling._captured == [x] * 3


def replay(run, pixels):
    """No read-back; a replay with new images gives what a plain run gives, bit for bit."""
    run()  # warm up: compiles kernels, makes the counters
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    for _ in range(2):
        pixels.copy_(torch.randn_like(pixels))
        graph.replay()
        assert torch.equal(output, run())


@GPU
@pytest.mark.parametrize("make", [tiny.clip_tower, tiny.siglip_tower], ids=["clip", "siglip"])
def test_cuda_graph_without_synchronisation(make):
    tower, pixels = make().cuda(), tiny.images(2).cuda()
    policy = fk.calibrate(tower, fk.FlowCut(8), pixels)
    with fk.patched(tower, policy), torch.no_grad():
        replay(lambda: tower(pixels).last_hidden_state, pixels)


@GPU
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_cuda_graph_of_packed_images_whose_sizes_are_on_the_host(family):
    visual, grid = (model := tiny.qwen(family).cuda()).model.visual, torch.tensor([[1, 8, 12], [2, 8, 8]])
    pixels = torch.randn(int(grid.prod(1).sum()), visual.patch_embed.proj.weight[0].numel(), device="cuda")
    with fk.patched(model, fk.FlowCut(retain_ratio=0.3, adaptive=False)), torch.no_grad():
        replay(lambda: visual(pixels, grid).pooler_output, pixels)


@GPU
def test_adaptive_reads_back_once_per_cut():
    import warnings

    tower, pixels = tiny.clip_tower().cuda(), tiny.images(4).cuda()
    cuts = len(stages(tower, fk.FlowCut(8), pixels))
    with fk.patched(tower, fk.FlowCut(8)), torch.no_grad():
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                tower(pixels)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(w.message) for w in seen) == cuts
