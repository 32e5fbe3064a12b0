"""InternVL: the tower alone, its scaled residuals and normed queries."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import PATCH, SIDE
from torch.testing import assert_close
from transformers import InternVLVisionConfig, InternVLVisionModel

import flowcut_kernels as fk


def tower(attention: str = "sdpa", **changes) -> InternVLVisionModel:
    config = InternVLVisionConfig(**(tiny.VISION | dict(image_size=SIDE * PATCH, use_mean_pooling=False) | changes))
    model = InternVLVisionModel(config)
    model.set_attn_implementation(attention)
    return tiny.fill(model, 5)


def scores(layer, hidden: torch.Tensor, anchor: str) -> torch.Tensor:
    """(a / sum a + r / sum r) g of every patch of one image [1, 1 + n, D], behind its class token."""
    own, x = layer.attention, layer.layernorm_before(hidden)[0]
    query, key, value = own.q_norm(own.q_proj(x)), own.k_norm(own.k_proj(x)), own.v_proj(x)
    asks, like = (query[0], value[0]) if anchor == "auto" else (query.mean(0), value.mean(0))
    heads = asks.view(own.num_heads, -1), key.view(len(x), own.num_heads, -1)
    attention = torch.einsum("hd,nhd->hn", *heads).mul(own.scale).softmax(-1).mean(0)[1:]
    relevance = (1 + torch.cosine_similarity(like, value[1:], dim=-1)) / 2
    return (attention / attention.sum() + relevance / relevance.sum()) * value[1:].abs().sum(-1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("facts", [{}, dict(use_qk_norm=True, norm_type="rms_norm", attention_bias=True)], ids=str)
@pytest.mark.parametrize("anchor", ["auto", "mean"])
@torch.no_grad()
def test_tower(attention, facts, anchor):
    """Scores by hand, and what the stock layers make of each image whose rows go behind the layers of the cuts."""
    model, pixels = tower(attention, **facts).double(), tiny.images(3).double()
    with fk.patched(model, fk.FlowCut(8, anchor=anchor), record=True):
        got, stages = model(pixels).last_hidden_state, {s.layer: s for s in fk.trace(model).stages}
    assert len(stages) > 2 and any(len({*s.kept}) > 1 for s in stages.values()), "too easy"
    for i in range(3):
        hidden, live, total = model.embeddings(pixels[i : i + 1]), torch.arange(SIDE * SIDE), None
        for number, layer in enumerate(model.encoder.layer):
            score = scores(layer, hidden, anchor)
            total, hidden = score if total is None else (total + score) / 2, layer(hidden)
            if number in stages:
                assert_close(stages[number].scores[i, live], total, rtol=1e-7, atol=1e-9)
                left = stages[number].indices[i, : stages[number].kept[i]]
                rows = torch.searchsorted(live, left)
                assert torch.equal(rows, total.topk(len(left)).indices.sort().values)
                hidden, live, total = hidden[:, [0, *(1 + rows).tolist()]], left, total[rows]
        assert_close(got[i], model.layernorm(hidden)[0], rtol=1e-7, atol=1e-7)
