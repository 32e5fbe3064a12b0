"""`cost` of every family: FLOPs as torch counts them, bytes as the cache holds them, stock and pruned."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from test_cost import COUNTED
from test_idefics3 import masked
from torch.utils.flop_counter import FlopCounterMode
from zoo import Family, Image, Video, families, gemma3, internvl, llava_next_video

import flowcut_kernels as fk
from flowcut_kernels.cost import Side

FAMILIES = {family.name: family for family in families()}
STAGES = ((1, 0.5), (2, 0.4))

FLOWCUT, FASTV = fk.FlowCut(retain_ratio=0.3, adaptive=False), fk.FastV(retain_ratio=0.3)
# No hubs but a class token: on a CPU only those that are found cost something.
VFLOWOPT = fk.VFlowOpt(retain_ratio=0.5, hub_threshold=1e9, entropy_weight=0.5, llm_stages=STAGES)
POLICIES = FLOWCUT, VFLOWOPT, FASTV
BEFORE = FLOWCUT, replace(VFLOWOPT, entropy_weight=0.0, llm_stages=())  # these leave the language model's layers alone


@torch.no_grad()
def counted(model: Any, inputs: dict[str, Any]) -> tuple[int, int, int]:
    """FLOPs of all before the language model, and of it with its head; bytes that are allocated for keys and values.

    Where a window is full, bytes of those that it holds: what they are views of ends with the next token.
    """
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    modules = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    names = {module: f"{type(model).__name__}.{name}" for name, module in model.named_modules()}
    language, head = names[model.get_decoder()], names[model.get_output_embeddings()]
    rotary = sum(flops for name, flops in modules.items() if name.startswith(f"{language}.rotary_emb"))
    prefill = modules[language] + modules[head]
    size = 0
    for layer in cache.layers:
        full = layer.keys.shape[2] == getattr(layer, "sliding_window", 0) - 1
        size += sum(x.nbytes if full else x.untyped_storage().nbytes() for x in (layer.keys, layer.values))
    return modules["Global"] - prefill, prefill - rotary, size


def predicted(side: Side) -> tuple[int, int, int]:
    return side.encoder_flops + side.projector_flops, side.prefill_flops, side.kv_bytes


def check(model: Any, inputs: dict[str, Any], *policies: fk.policies.base.Policy, compact: bool = False) -> None:
    """The stock model exactly, and pruned by every one of `policies`; windows to 2 %, as nobody knows who stays."""
    stock = counted(model, inputs)
    windows = hasattr(model.config.vision_config, "window_size")
    for policy in policies:
        cost = fk.cost(model, policy, inputs, compact_cache=compact)
        assert predicted(cost.full) == stock
        with fk.patched(model, policy, backend="reference", compact_cache=compact):
            assert fk.cost(model, policy, inputs, compact_cache=compact) == cost
            encoded, *rest = counted(model, inputs)
        expected, *others = predicted(cost.pruned)
        assert (others, expected) == (rest, pytest.approx(encoded, rel=0.02) if windows else encoded)
        assert cost.flops_saved > 0 and cost.entropy is None


def given(family: Family) -> dict[str, Any]:
    """Two images of different sizes in a batch with text alone, and a video where there are some."""
    one, other = (Image(*size, seed=i) for i, size in enumerate(family.sizes[:2]))
    rows = [[3, one, 5, 6, 7], [3, 9, other, 8], [3, 4, 5]]
    return family.prompt(rows + [[3, Video(2), 4, 6]] * ("video" in family.kinds))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=str)
def test_families(family: Family):
    check(family.model(), given(family), *(POLICIES if family.prunes_llm else BEFORE))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_cuts_behind_the_entrance_of_a_language_model(name):
    """Of which the encoder's are the first: what raters read, samples that lose more than others, compact caches."""
    model, inputs = FAMILIES[name].model(), given(FAMILIES[name])
    check(model, inputs, fk.FlowCut(retain_ratio=0.3, adaptive=False, llm_layer=1), compact=True)
    check(model, inputs, fk.PyramidDrop(5, layers=(1, 2)), fk.SparseVLM(5, layers=(0, 1), surplus=(3,)))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_adaptive_counts(name):
    """Calibrated on an image: what it costs. Otherwise an assumed entropy, whose extremes enclose the truth."""
    family, policy = FAMILIES[name], fk.FlowCut(4)
    model, inputs = family.model(), family.prompt([[3, Image(), 5, 6]])
    check(model, inputs, fk.calibrate(model, policy, inputs))
    with fk.patched(model, policy, backend="reference"):
        encoded, *rest = counted(model, inputs)
    (most, *others), (least, *_) = (predicted(fk.cost(model, policy, inputs, entropy=h).pruned) for h in (1.0, 0.0))
    assert others == rest and least < encoded < most
    assert "entropy ratio of 0.9" in str(fk.cost(model, policy, inputs))


@pytest.mark.parametrize("name", ["internvl", "idefics3", "smolvlm"])
def test_bare_towers(name):
    model, pixels = FAMILIES[name].model().model, tiny.images(2)
    tower = model.vision_tower if name == "internvl" else model.vision_model
    cost, counts = fk.cost(tower, FLOWCUT, pixels), []
    for context in (nullcontext(), fk.patched(tower, FLOWCUT, backend="reference")):
        with context, torch.no_grad(), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            tower(pixels)
        counts.append(counter.get_total_flops())
    assert counts == [cost.full.flops, cost.pruned.flops]


def test_normed_queries():
    """Whose mean is not the mean token's query: it takes all of them."""
    model = internvl.model(vision=dict(use_qk_norm=True))
    check(model, given(internvl.FAMILY), fk.FlowCut(retain_ratio=0.3, adaptive=False, anchor="mean"))


def test_masked_tokens():
    """They leave before the first layer, of tiles that are pruned at all."""
    family = FAMILIES["idefics3"]
    check(family.model(dtype=torch.float64), masked(family), fk.FlowCut(4, adaptive=False), FASTV)


def test_sliding_windows_of_a_language_model():
    """Layers that hold what later tokens see; attention counts all pairs."""
    model, inputs = gemma3.model(sliding_window=7), given(gemma3.FAMILY)
    check(model, inputs, *BEFORE)
    whole = fk.cost(gemma3.model(), FLOWCUT, inputs)
    assert fk.cost(model, FLOWCUT, inputs).full.kv_bytes < whole.full.kv_bytes


def test_two_modules_before_a_language_model():
    model = llava_next_video.model(spatial_pool_mode="conv")
    with pytest.raises(ValueError, match="LlavaNextVideoMultiModalProjector and LlavaNextVideoPooler: which"):
        fk.cost(model, FLOWCUT, given(llava_next_video.FAMILY))


def test_pixels_without_values():
    """Filling is told from tiles by its zeros."""
    family = FAMILIES["idefics3"]
    inputs = given(family)
    with pytest.raises(ValueError, match="pixel_values on the meta device"):
        fk.cost(family.model(), FLOWCUT, inputs | dict(pixel_values=inputs["pixel_values"].to("meta")))
