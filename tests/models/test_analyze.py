"""`analyze` against the attention maps of eager attention, on every family; what it leaves behind; refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import zoo
from torch import Tensor, nn

import flowcut_kernels as fk

FAMILIES = [family for family in zoo.families() if not family.name.startswith("qwen")]
close = torch.testing.assert_close


def entropy_ratio(attention: Tensor) -> Tensor:
    p = attention / attention.sum(-1, keepdim=True)
    return -torch.special.xlogy(p, p).sum(-1) / torch.tensor(p.shape[-1], dtype=p.dtype).log()


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_equals_the_maps(family):
    """In float64, on the layers' own inputs; the maps are those that eager attention puts out in the same pass."""
    model = family.model(attention="eager", dtype=torch.float64).eval()
    inputs = family.prompt([[5, zoo.Image(seed=1), 6], [zoo.Image(seed=2), 7]])
    inputs = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    layers: list[tuple[Tensor, Tensor, Tensor]] = []  # map, mean token's attention, value norm

    def seen(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        query, key = (x(hidden).unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for x in (
            lambda x: getattr(module, "q_norm", nn.Identity())(module.q_proj(x)),
            lambda x: getattr(module, "k_norm", nn.Identity())(module.k_proj(x)),
        ))  # fmt: skip
        attention = (module.scale * query @ key.mT).softmax(-1)
        close(output[1].double(), attention, rtol=1e-5, atol=1e-6)  # eager attention has its softmax in float32
        mean = (module.scale * query.mean(2, keepdim=True) @ key.mT).softmax(-1).mean(1)[:, 0]
        layers.append((attention.mean(1), mean, module.v_proj(hidden).abs().sum(-1)))

    handles = [family.attention(x).register_forward_hook(seen, with_kwargs=True) for x in family.layers(model)]
    found = fk.analyze(model, inputs, hub_threshold=1.5)
    for handle in handles:
        handle.remove()
    assert 2 < len(layers) <= len(found.entropy) and found.grid[0] * found.grid[1] == found.inflow.shape[2]
    assert found.hubs.any() and not found.hubs.all()
    protect = 1 if found.anchor == "cls" else 0
    for i, (attention, mean, norm) in enumerate(layers):
        received = attention.mean(1)
        patches = received[:, protect:]
        inflow = (attention[:, 0] if protect else mean)[:, protect:]
        close(found.outflow[i], patches)
        close(found.inflow[i], inflow)
        close(found.entropy[i], entropy_ratio(inflow))
        close(found.value_norm[i], norm[:, protect:])
        assert torch.equal(found.hubs[i], patches > 1.5 * patches.mean(1, keepdim=True))
        if found.anchor_outflow is not None:
            close(found.anchor_outflow[i], received[:, 0])
    assert (found.anchor_outflow is None) == (protect == 0)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_packed_equals_the_maps(name):
    """The same of images in one sequence, in windows and in the order of the merger; their places by the positions."""
    family = next(family for family in zoo.families() if family.name == name)
    model = family.model(dtype=torch.float64).eval()
    inputs = family.prompt([[5, zoo.Image(112, 168, 1), 6], [zoo.Image(112, 168, 2), 7]])
    inputs = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    (height, width), layers = inputs["image_grid_thw"][0, 1:].tolist(), []
    patches, windows = height * width, []

    def seen(module, args, kwargs):
        query, key, value = module.qkv(args[0] if args else kwargs["hidden_states"]).unflatten(
            -1, (3, module.num_heads, -1)
        ).unbind(1)  # fmt: skip
        cos, sin = kwargs["position_embeddings"]
        half = cos.shape[1] // 2
        turned = [
            x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None] for x in (query, key)
        ]
        query, key = (x.transpose(0, 1) for x in turned)
        window = torch.bucketize(torch.arange(2 * patches), kwargs["cu_seqlens"][1:], right=True)
        logits = module.scaling * query @ key.mT
        attention = logits.masked_fill(window[:, None] != window, -torch.inf).softmax(-1).mean(0)
        windows.append(len(kwargs["cu_seqlens"]) - 1)
        # The slowest frequency of the line's half and that of the column's tell places apart.
        turn = torch.atan2(sin, cos)
        place = [turn[:, i].unique(return_inverse=True)[1] for i in (half - half // 2 - 1, half - 1)]
        for image in range(2):
            rows = torch.arange(2 * patches) // patches == image
            order = torch.where(rows)[0][(place[0][rows] * width + place[1][rows]).argsort()]
            mean = (module.scaling * query[:, order].mean(1, keepdim=True) @ key[:, order].mT).softmax(-1).mean(0)[0]
            layers.append((attention[:, order].sum(0) / patches, mean, value.abs().sum((1, 2))[order]))

    handles = [x.attn.register_forward_pre_hook(seen, with_kwargs=True) for x in model.model.visual.blocks]
    found = fk.analyze(model, inputs)
    for handle in handles:
        handle.remove()
    assert height < width and max(windows) > 2 * (name == "qwen2_5_vl") and min(windows) == 2
    assert found.grid == (height, width) and found.anchor == "mean" and len(layers) == 2 * len(found.entropy)
    for i, (received, inflow, norm) in enumerate(layers):
        close(found.outflow[i // 2, i % 2], received)
        close(found.inflow[i // 2, i % 2], inflow)
        close(found.entropy[i // 2, i % 2], entropy_ratio(inflow[None])[0])
        close(found.value_norm[i // 2, i % 2], norm)
    inputs = family.prompt([[zoo.Image(seed=1), zoo.Image(4 * height, 2 * width)]])
    with pytest.raises(ValueError, match="no grid in common"):
        fk.analyze(family.model(), inputs)


@pytest.mark.parametrize("kind", tiny.TOWERS)
def test_leaves_no_trace(kind, monkeypatch):
    """The same bits again, the model's own untouched, no hook left, also where the model breaks down."""
    model, pixels = tiny.TOWERS[kind](), tiny.images(2)
    with torch.no_grad():
        before = model(pixels).last_hidden_state
        state = {name: set(vars(module)) for name, module in model.named_modules()}
        first, again = fk.analyze(model, pixels), fk.analyze(model, dict(pixel_values=pixels))
        alone = fk.analyze(model, pixels[1:])
        assert torch.equal(model(pixels).last_hidden_state, before)
    for name in ("inflow", "outflow", "entropy", "value_norm", "hubs"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        close(getattr(first, name)[:, 1:], getattr(alone, name), rtol=1e-4, atol=1e-6)
    assert first.inflow.dtype == torch.float32 and not first.inflow.requires_grad

    def breaks(*args, **kwargs):
        raise ArithmeticError("on purpose")

    with monkeypatch.context() as patch, pytest.raises(ArithmeticError, match="on purpose"):
        patch.setattr(model.encoder.layers[3], "forward", breaks)
        fk.analyze(model, pixels)
    assert state == {name: set(vars(module)) for name, module in model.named_modules()}
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks_with_kwargs for module in model.modules())


def flow(inflow: list[float], outflow: list[float], norm: list[float]) -> fk.Flow:
    shape = (2, 1, len(inflow))
    inflows, outflows, norms = (torch.tensor(x).expand(shape).clone() for x in (inflow, outflow, norm))
    inflows[1] = inflows[1].flip(1)
    return fk.Flow(
        anchor="cls", grid=(1, len(inflow)), hub_threshold=2.0, inflow=inflows, outflow=outflows,
        anchor_outflow=torch.tensor([[0.2], [0.4]]), hubs=outflows > 2 * outflows.mean(2, keepdim=True),
        entropy=torch.tensor([[1.0], [0.5]]), value_norm=norms,
    )  # fmt: skip


def test_rows_by_hand():
    """One hub has half of what leaves the patches; the second layer's anchor looks the other way round."""
    rows = flow([0.4, 0.3, 0.2, 0.05], [0.1, 0.06, 0.05, 0.04], [1.0, 2.0, 3.0, 4.0]).rows()
    assert [row["hubs"] for row in rows] == [0, 0] and [row["hub_share"] for row in rows] == [0, 0]
    found = flow([0.4, 0.3, 0.2, 0.05], [0.3, 0.1, 0.08, 0.04], [1.0, 2.0, 4.0, 3.0])
    first, second = found.rows()
    assert first["hubs"] == 1 and first["hub_share"] == pytest.approx(0.3 / 0.52)
    assert first["relay"] == pytest.approx(1) and second["relay"] == pytest.approx(-1)
    assert first["criteria"] == pytest.approx(-0.8) and second["criteria"] == pytest.approx(0.8)
    assert first["previous"] is None and second["previous"] == pytest.approx(-1)
    assert [row["class_token"] for row in (first, second)] == pytest.approx([0.2, 0.4])
    lines = str(found).splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["0", "1.00", "20.0%", "1.0", "57.7%", "1.00", "-0.80", "-"]


def test_class_token_hands_on_what_is_left():
    """Columns of a map whose rows sum to 1 sum to 1 on average."""
    found = fk.analyze(tiny.clip_tower(), tiny.images(2))
    assert found.anchor_outflow is not None
    close(found.outflow.sum(2) + found.anchor_outflow, torch.ones(tiny.LAYERS, 2))
    assert str(found).count("\n") == tiny.LAYERS


def test_refusals():
    model, pixels = tiny.llava(), tiny.images(1)
    with pytest.raises(TypeError, match="Linear is not supported"):
        fk.analyze(nn.Linear(2, 2), pixels)
    with pytest.raises(ValueError, match="hub_threshold=-1"):
        fk.analyze(model, pixels, hub_threshold=-1)
    with pytest.raises(ValueError, match="no pixel_values"):
        fk.analyze(model, dict(input_ids=torch.ones(1, 4)))
    with pytest.raises(TypeError, match="inputs is list"):
        fk.analyze(model, [pixels])
    with fk.patched(model, fk.FlowCut(target_tokens=8)), pytest.raises(ValueError, match="unpatch"):
        fk.analyze(model, pixels)
    with fk.patched(model.model.vision_tower, fk.FlowCut(target_tokens=8)), pytest.raises(ValueError, match="unpatch"):
        fk.analyze(model, pixels)
    with pytest.raises(ValueError, match="training mode"):
        fk.analyze(model.train(), pixels)


def test_masked_images_are_refused():
    family = next(family for family in FAMILIES if family.name == "idefics3")
    model, inputs = family.model(), dict(family.prompt([[zoo.Image(seed=1), 6]]))
    mask = torch.ones(*inputs["pixel_values"].shape[:2], *inputs["pixel_values"].shape[3:], dtype=torch.bool)
    mask[..., mask.shape[-1] // 2 :] = False
    with pytest.raises(ValueError, match="masked"):
        fk.analyze(model, inputs | dict(pixel_attention_mask=mask))


MEMORY = """
import re, sys
import torch
from pathlib import Path
from transformers import CLIPVisionConfig, CLIPVisionModel
import flowcut_kernels as fk

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def extra(side):
    model = CLIPVisionModel(CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=1, patch_size=1, image_size=side
    )).eval()
    pixels = torch.randn(1, 3, side, side)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    before = peak()
    assert fk.analyze(model, pixels, backend=sys.argv[1]).outflow.shape == (1, 1, side * side)
    return peak() - before

torch.set_num_threads(1)
extra(16)
print(extra(48), extra(96))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory cannot be reset")
@pytest.mark.any_transformers
def test_memory_is_linear():
    """At N = 9,216 a map would be 324 MiB; four times the tokens take about four times the memory."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, "reference"], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    quarter, whole = (int(kib) for kib in run.stdout.split())
    print(f"{quarter} KiB at N=2,304, {whole} KiB at N=9,216")
    assert whole < 32 * 1024
    assert whole < 5 * quarter + 2048
