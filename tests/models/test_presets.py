"""Presets: what LLaVA-1.5's 32 layers see of 576 tokens under each, as stated and as it happens in a patched model."""

from __future__ import annotations

import pytest
import tiny
import torch
from zoo import spell

import flowcut_kernels as fk
from flowcut_kernels import policies

pytestmark = pytest.mark.any_transformers
LAYERS, SIDE = 32, 24
POLICIES = [getattr(policies, name) for name in policies.__all__ if name != "Policy"]
# What the published settings are called is not always what they keep.
AVERAGES = {
    fk.FastV: {192: 191.6, 128: 127.9, 64: 64.1},
    fk.SparseVLM: {192: 206.5, 128: 145.4, 64: 82.2},
    fk.PyramidDrop: {270: 270.0, 192: 191.2, 128: 127.5, 64: 64.3},
}
PRESETS = [(policy, n) for policy in POLICIES for n in policy.presets if n == 64 or policy in AVERAGES]


@pytest.fixture(scope="module")
def llava():
    """LLaVA-1.5's counts of tokens and layers."""
    return tiny.llava(side=SIDE, text=dict(num_hidden_layers=LAYERS))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
def test_averages(policy):
    """Of every policy; the arithmetic comes to the average."""
    found = {n: policy.preset(n).average_tokens(LAYERS, SIDE**2) for n in policy.presets}
    assert {n: round(x, 1) for n, x in found.items()} == AVERAGES.get(policy, {192: 192, 128: 128, 64: 64})
    for n, average in found.items():
        terms, shown = policy.preset(n).arithmetic(LAYERS, SIDE**2).split(" = ")
        assert eval(terms) == average and shown == f"{average:.1f}"


@pytest.mark.parametrize(("policy", "average"), PRESETS, ids=lambda x: getattr(x, "__name__", x))
@torch.no_grad()
def test_keys_of_every_layer(llava, policy, average):
    """As many visual keys as stated, by what the cache was given."""
    row = [1, *[tiny.IMAGE] * SIDE**2, 5, 6, 7]
    policy = policy.preset(average)
    with fk.patched(llava, policy):
        cache = llava(**spell([row]), pixel_values=tiny.images(1, side=SIDE), use_cache=True).past_key_values
    words = len(row) - SIDE**2
    assert [layer.keys.shape[2] - words for layer in cache.layers] == policy.tokens_by_layer(LAYERS, SIDE**2)


def test_published_settings():
    assert fk.PyramidDrop(retain_ratio=1 / 8).tokens_by_layer(LAYERS, SIDE**2)[::8] == [576, 288, 144, 72]
    assert fk.SparseVLM.preset(192) == fk.SparseVLM(target_tokens=110)
    assert fk.FastV.preset(64, layer=3) == fk.FastV(target_tokens=30, layer=3)
    assert fk.FlowCut.preset(64) == fk.FlowCut(target_tokens=64)


def test_unknown_presets():
    with pytest.raises(ValueError, match=r"FlowCut\.preset: average=100 must be one of 192, 128, 64; for others set"):
        fk.FlowCut.preset(100)
    with pytest.raises(ValueError, match=r"Mine\.preset: average=64 has no preset: set the fields"):
        type("Mine", (policies.stages.DecoderPolicy,), {}).preset(64)
