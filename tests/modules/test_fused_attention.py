"""Fused attention modules: drop-ins for the stock ones, sharing everything with them."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from tiny import TOWERS, images
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionAttention

from flowcut_kernels.modules import FusedClipAttention, FusedQwen2VLVisionAttention, FusedSiglipAttention
from flowcut_kernels.ops import anchor_stats, attention_with_stats

FUSED = dict(clip=FusedClipAttention, siglip=FusedSiglipAttention)
QWEN = dict(
    qwen2_vl=(VisionAttention, Qwen2VLVisionConfig(embed_dim=64, num_heads=4)),
    qwen2_5_vl=(Qwen2_5_VLVisionAttention, Qwen2_5_VLVisionConfig(hidden_size=64, num_heads=4)),
    qwen3_vl=(Qwen3VLVisionAttention, Qwen3VLVisionConfig(hidden_size=64, num_heads=4)),
)
towers = pytest.mark.parametrize("family", TOWERS)
families = pytest.mark.parametrize("family", QWEN)


def replace(model, fused):
    """Put fused modules into every layer; returns the stock ones."""
    stock = [layer.self_attn for layer in model.encoder.layers]
    for layer in model.encoder.layers:
        layer.self_attn = fused(layer.self_attn)
    return stock


def qwen(family, lengths=(12, 1, 7)):
    """A stock module, its fused form and the arguments of a call."""
    kind, config = QWEN[family]
    config._attn_implementation = "sdpa"
    stock = kind(config).eval()
    total = sum(lengths)
    angles = torch.randn(total, 8).repeat(1, 2)
    arguments = dict(
        hidden_states=torch.randn(total, 64),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        position_embeddings=(angles.cos(), angles.sin()),
    )
    return stock, FusedQwen2VLVisionAttention(stock), arguments


@towers
@torch.no_grad()
def test_tower_is_unchanged(family):
    """Outputs, state dict, parameters; and the stock modules back again."""
    model = TOWERS[family]()
    before, state = model(images(2)), {name: x.data_ptr() for name, x in model.state_dict().items()}
    stock = replace(model, FUSED[family])
    after = model(images(2))
    torch.testing.assert_close(after.last_hidden_state, before.last_hidden_state)
    assert {name: x.data_ptr() for name, x in model.state_dict().items()} == state
    fused = model.encoder.layers[0].self_attn
    assert isinstance(fused, type(stock[0])) and fused.q_proj is stock[0].q_proj

    other = copy.deepcopy(model)
    other.encoder.layers[0].self_attn.q_proj.weight.zero_()
    assert torch.equal(model(images(2)).last_hidden_state, after.last_hidden_state)
    assert not torch.equal(other(images(2)).last_hidden_state, after.last_hidden_state)

    for layer, attention in zip(model.encoder.layers, stock, strict=True):
        layer.self_attn = attention
    assert torch.equal(model(images(2)).last_hidden_state, before.last_hidden_state)


@towers
@torch.no_grad()
def test_statistics_are_those_of_the_anchor(family):
    attention = TOWERS[family]().encoder.layers[0].self_attn
    fused = FUSED[family](attention)
    hidden = torch.randn(2, 10, 32)
    output, statistics = fused.with_stats(hidden)
    torch.testing.assert_close(output, attention(hidden)[0])
    anchor = hidden[:, :1] if family == "clip" else hidden.mean(1, keepdim=True)
    query, value_anchor, key, value = (
        projection(x).unflatten(-1, (4, 8)).transpose(1, 2)
        for projection, x in (
            (attention.q_proj, anchor), (attention.v_proj, anchor),
            (attention.k_proj, hidden), (attention.v_proj, hidden),
        )
    )  # fmt: skip
    expected = anchor_stats(query, key, value, value_anchor, protect=int(family == "clip"), backend="reference")
    for a, b in zip(statistics, expected, strict=True):
        torch.testing.assert_close(a, b)


@towers
@pytest.mark.parametrize("case", ["mask", "eager", "training", "autograd"])
def test_tower_leaves_the_rest_to_the_stock_forward(family, case, monkeypatch):
    model = TOWERS[family](attention="eager" if case == "eager" else "sdpa", attention_dropout=0.5)
    attention = model.encoder.layers[0].self_attn
    fused = FUSED[family](attention)
    hidden = torch.randn(2, 6, 32)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril() if case == "mask" else None
    attention.train(case == "training")
    fused.train(case == "training")
    monkeypatch.setattr("flowcut_kernels.modules.attention.attention_with_stats", None)
    results = []
    for module in (attention, fused):
        torch.manual_seed(1)
        with torch.set_grad_enabled(case == "autograd"):
            results.append(module(hidden, mask))
    (expected, expected_map), (output, attention_map) = results
    assert torch.equal(output, expected) and output.requires_grad == (case == "autograd")
    if case == "eager":
        assert torch.equal(attention_map, expected_map)
    else:
        assert attention_map is None


@towers
@torch.no_grad()
def test_attention_maps_are_still_captured(family):
    model = TOWERS[family](attention="eager")
    replace(model, FUSED[family])
    assert len(model(images(1), output_attentions=True).attentions) == len(model.encoder.layers)


@families
@pytest.mark.parametrize("lengths", [(20,), (12, 1, 7)], ids=str)
@torch.no_grad()
def test_packed_module_is_unchanged(family, lengths):
    stock, fused, arguments = qwen(family, lengths)
    expected = stock(**arguments)
    torch.testing.assert_close(fused(**arguments), expected)
    torch.testing.assert_close(fused(**arguments, max_seqlen=max(lengths)), expected)
    torch.testing.assert_close(copy.deepcopy(fused)(**arguments), expected)
    assert fused.qkv is stock.qkv and list(fused.state_dict()) == list(stock.state_dict())


@families
@torch.no_grad()
def test_packed_statistics(family):
    """Of a segment: those of its own mean query and mean value."""
    stock, fused, arguments = qwen(family)
    output, statistics = fused.with_stats(**arguments)
    torch.testing.assert_close(output, stock(**arguments))
    query, key, value = fused._project(arguments["hidden_states"], arguments["position_embeddings"])
    for s, (start, end) in enumerate(pairwise(arguments["cu_seqlens"].tolist())):
        one = [x[:, :, start:end] for x in (query, key, value)]
        anchors = [x.mean(2, keepdim=True) for x in (one[0], one[2])]
        for a, b in zip(statistics, attention_with_stats(*one, *anchors, backend="reference")[1:], strict=True):
            torch.testing.assert_close(a[s : s + 1, ..., : b.shape[-1]], b)


@families
def test_packed_module_trains_as_the_stock_one(family):
    stock, fused, arguments = qwen(family)
    stock(**arguments).square().sum().backward()
    expected = stock.qkv.weight.grad.clone()
    stock.zero_grad()
    fused(**arguments).square().sum().backward()
    torch.testing.assert_close(stock.qkv.weight.grad, expected)


@torch.no_grad()
def test_compiles_in_one_graph():
    clip = FusedClipAttention(TOWERS["clip"]().encoder.layers[0].self_attn)
    hidden = torch.randn(2, 6, 32)
    compile = dict(backend="eager", fullgraph=True)
    torch.testing.assert_close(torch.compile(clip, **compile)(hidden)[0], clip(hidden)[0])
    _, packed, arguments = qwen("qwen2_vl")
    torch.testing.assert_close(torch.compile(packed, **compile)(**arguments, max_seqlen=12), packed(**arguments))


def test_refuses_what_it_does_not_serve():
    attention = TOWERS["siglip"]().encoder.layers[0].self_attn
    with pytest.raises(TypeError, match=r"FusedClipAttention is made from a CLIPAttention .*, got SiglipAttention"):
        FusedClipAttention(attention)
    with pytest.raises(TypeError, match="got FusedSiglipAttention"):
        FusedSiglipAttention(FusedSiglipAttention(attention))
    attention.forward = lambda x: x
    with pytest.raises(ValueError, match="forward of its own"):
        FusedSiglipAttention(attention)
