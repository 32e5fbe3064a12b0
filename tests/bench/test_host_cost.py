"""What patching costs the host: launches of a prefill beyond the stock model's, and waits for the device."""

from __future__ import annotations

import sys

import pytest
import tiny
import torch
from elsewhere import DEVICE, Device, There, move
from transformers import DynamicCache, LlamaConfig, StaticCache

import flowcut_kernels as fk
from flowcut_kernels._library import choose_backend, native_error
from flowcut_kernels.bench.families import FAMILIES, SHARE, prompt
from flowcut_kernels.bench.shapes import twin

# family -> launches, waits and operators, those on the host included, of a toy's prefill beyond the stock model's, at
# most. Five layers of its encoder score, each by a kernel and what makes its anchor (one to three launches; the class
# token's where a layer prunes), two or three cut, each by a kernel and a wait. Qwen-VL's stock layers wait for the
# length of each window, ours know it, and what follows from the sizes of images is worked out on the host and once.
ALLOWED: dict[str, tuple[int, int, int]] = {
    "llava-1.5-7b": (0, 4, -5),
    "vipllava-7b": (5, 4, 1),
    "llava-next-7b": (17, 5, 30),
    "llava-onevision-7b": (41, 6, 105),
    "video-llava-7b": (6, 4, 13),
    "llava-next-video-7b": (2, 4, 0),
    "internvl3-8b": (23, 5, 64),
    "qwen2-vl-7b": (-6, -15, 29),
    "qwen2.5-vl-7b": (-1, -21, 45),
    "qwen3-vl-8b": (-64, -23, -45),
    "gemma-3-4b": (31, 5, 85),
    "paligemma-3b": (31, 5, 86),
    "idefics3-8b": (32, 6, 96),
    "smolvlm2-2.2b": (32, 6, 96),
}
SLACK = 2, 0, 8  # for another version of torch or transformers


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The device has a kernel for every operator of the package, as a GPU has."""
    if native_error():
        pytest.skip(native_error())

    def chosen(op, backend, tensor, *args, **options):
        return "triton" if tensor.device == DEVICE else choose_backend(op, backend, tensor, *args, **options)

    for name, module in list(sys.modules.items()):
        if name.startswith("flowcut_kernels.") and vars(module).get("choose_backend") is choose_backend:
            monkeypatch.setattr(module, "choose_backend", chosen)


@torch.no_grad()
def test_a_wait_is_seen():
    """Of all ways to ask a device for something, and none where nothing is asked."""
    x, index = There(torch.arange(6.0)), There(torch.tensor([0, 2]))
    with Device() as device:
        x[index].add_(1)
        x.view(2, 3)[:, 1:].sum()
        torch.tensor([1, 2]).to(DEVICE, non_blocking=True)
    assert device.waits.total() == 0 and device.launches.total() == 4, (device.waits, device.launches)
    ways = [
        lambda: x.sum().item(), lambda: bool((x > 1).any()), lambda: x.tolist(), lambda: x.cpu(), lambda: x[x > 2],
        lambda: (x > 1).nonzero(), lambda: torch.tensor([1, 2], device=DEVICE), lambda: torch.tensor([1]).to(DEVICE),
        lambda: x.repeat_interleave(index.new_ones(6)), lambda: x[torch.tensor([0, 1])],
    ]  # fmt: skip
    for way in ways:
        with Device() as device:
            way()
        assert device.waits.total() == 1, device.waits


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_prefill(name):
    """By FlowCut, which scores in every layer of the encoder and reads back once a cut; the second pass counts."""
    family, counted = FAMILIES[name], {}
    stock = family.build("toy", "cpu", torch.float32)
    inputs = prompt(stock, family.shown(stock.config))
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with fk.patched(ours := twin(stock), fk.FlowCut(retain_ratio=SHARE)):
        want = ours(**inputs).logits
        there = {key: There(x) for key, x in inputs.items()}
        for way, model in (("stock", stock), ("ours", ours)):
            move(model)
            for _ in range(2):
                with Device() as counted[way]:
                    logits = model(**there).logits
    torch.testing.assert_close(logits.here, want, rtol=1e-4, atol=1e-4)
    ours, stock = counted["ours"], counted["stock"]
    counts = [(x.launches.total(), x.waits.total(), x.operators) for x in (ours, stock)]
    for what, now, before, most, more in zip(
        ("launches", "waits", "operators"), *counts, ALLOWED[name], SLACK, strict=True
    ):
        assert now - before <= most + more, (
            f"{now - before} {what} beyond stock: {ours.launches - stock.launches}, {ours.waits - stock.waits}"
        )


def second_pass(model, *arguments, **options):
    """Constants are there, and code has run."""
    for _ in range(2):
        with Device() as device:
            model(*arguments, **options)
    return device


@pytest.mark.parametrize("kind", tiny.TOWERS)
@torch.no_grad()
def test_a_static_schedule_never_waits_and_an_adaptive_one_once_a_cut(kind):
    tower, pixels = tiny.TOWERS[kind](), tiny.images(4)
    frozen = fk.calibrate(tower, fk.FlowCut(8), pixels)
    with fk.patched(tower, fk.FlowCut(8), record=True):
        tower(pixels)
        cuts = len(fk.trace(tower).stages)
    move(tower)
    for policy, allowed in ((frozen, 0), (fk.FlowCut(8, adaptive=False), 0), (fk.FlowCut(8), cuts)):
        with fk.patched(tower, policy):
            assert second_pass(tower, There(pixels)).waits.total() == allowed


@pytest.mark.parametrize("family", tiny.QWENS)
@torch.no_grad()
def test_sizes_on_the_host_keep_nobody_waiting(family):
    """Qwen-VL's encoder; where it has windows a cut asks whose tokens are left. On the device sizes are read once."""
    visual, grid = (model := tiny.qwen(family)).model.visual, torch.tensor([[1, 8, 12], [2, 8, 8]])
    pixels = torch.randn(int(grid.prod(1).sum()), visual.patch_embed.proj.weight[0].numel())
    policy = fk.FlowCut(retain_ratio=0.3, adaptive=False)
    with fk.patched(model, policy, record=True):
        visual(pixels, grid)
        cuts = len(fk.trace(model).stages)
    move(model)
    with fk.patched(model, policy):
        read = cuts * (family == "qwen2_5_vl")
        assert second_pass(visual, There(pixels), grid).waits.total() == read
        assert second_pass(visual, There(pixels), There(grid)).waits.total() == read + 1


@pytest.mark.parametrize("positions", ["keep", "repack"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_compacting_a_cache(kind, positions):
    """One launch for all layers, no wait for what `keep` holds: a graph that holds it serves any other of its size."""
    config = LlamaConfig(**tiny.TEXT)
    cache = kind(config=config, **(dict(max_cache_len=20) if kind is StaticCache else {}))
    for layer in range(config.num_hidden_layers):
        cache.update(*torch.randn(2, 2, 2, 12, 8), layer)
    wanted = [x.keys[0][:, [1, 4, 9]] for x in cache.layers]
    for layer in cache.layers:
        held = {name: x for name, x in vars(layer).items() if isinstance(x, torch.Tensor)}
        vars(layer).update({name: There(x) for name, x in held.items()})
    before = [x.keys.here.data_ptr() for x in cache.layers]
    keep, lengths = There(torch.tensor([[1, 4, 9], [0, 3, -1]])), There(torch.tensor([3, 2]))
    rotary, places = There(torch.ones(4)), There(torch.arange(12).expand(2, -1))
    with Device() as device:
        fk.compact_kv_cache(cache, keep, lengths, positions=positions, rotary=rotary, position_ids=places)
    assert not device.waits, device.waits
    assert sum(n for name, n in device.launches.items() if name.startswith("compact_kv")) == 1
    assert [layer.keys.here.data_ptr() == at for layer, at in zip(cache.layers, before, strict=True)] == [
        kind is StaticCache
    ] * len(before)
    if positions == "keep":
        assert all(torch.equal(x.keys.here[0, :, :3], y) for x, y in zip(cache.layers, wanted, strict=True))
