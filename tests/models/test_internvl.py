"""InternVL beside what every family goes through: the tower alone, other configurations, tiles of several images."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from oracle import Oracle
from test_conformance import CLOSE, GREEDY, STEPS, likelihood
from tiny import PATCH, SIDE
from torch.testing import assert_close
from transformers import InternVLForConditionalGeneration, InternVLVisionConfig, InternVLVisionModel, Qwen3Config
from zoo import Image
from zoo.internvl import FAMILY, IMAGE, TOKENS, model

import flowcut_kernels as fk

ONE, THREE, SEVEN = (Image(*size, seed=i) for i, size in enumerate(FAMILY.sizes))  # by their tiles
ROWS = [[3, ONE, 4, THREE, 6], [7, 5], [SEVEN, 8]]
NORMED = dict(use_qk_norm=True, norm_type="rms_norm", attention_bias=True)


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
@pytest.mark.parametrize("facts", [{}, NORMED], ids=str)
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


VARIANTS = {
    "an earlier layer": replace(
        FAMILY,
        model=partial(model, vision_feature_layer=-2),
        layers=lambda model: model.model.vision_tower.encoder.layer[:-1],
    ),
    "normed queries, no final norm, Qwen3": replace(
        FAMILY,
        model=partial(
            model,
            vision=NORMED | dict(use_mean_pooling=True),
            text_config=Qwen3Config(
                hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, head_dim=8,
                num_key_value_heads=2, vocab_size=tiny.VOCAB, pad_token_id=tiny.PAD, bos_token_id=1, eos_token_id=2,
            ),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("policy", [fk.FlowCut(9, llm_layer=1), fk.VFlowOpt(14)], ids=["flowcut", "vflowopt"])
@torch.no_grad()
def test_other_configurations(name, policy):
    family = VARIANTS[name]
    made, inputs = family.model(dtype=torch.float64), family.prompt([[3, THREE, 5]])
    with fk.patched(made, policy):
        logits = made(**inputs | dict(pixel_values=inputs["pixel_values"].double())).logits[0]
    assert_close(logits, Oracle(family, policy)([3, THREE, 5])[0], **CLOSE)


@pytest.mark.parametrize("policy", [fk.FlowCut(retain_ratio=0.2), fk.FlowCut(retain_ratio=0.1, llm_layer=1)], ids=str)
@torch.no_grad()
def test_beams_of_images_that_keep_different_numbers(policy):
    """And steps without a cache, where a pruned prompt comes again and again."""
    made, oracle, inputs = FAMILY.model(dtype=torch.float64), Oracle(FAMILY, policy), FAMILY.prompt(ROWS)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with fk.patched(made, policy):
        out = made.generate(**inputs, **GREEDY | dict(use_cache=False))
        if "mm_encoder_outputs" in inspect.signature(InternVLForConditionalGeneration.forward).parameters:
            beams = made.generate(**inputs, **GREEDY, num_beams=2, output_scores=True)
            for ids, score, row in zip(beams.sequences, beams.sequences_scores, ROWS, strict=True):
                assert_close(score.double(), likelihood(oracle, row, ids[-STEPS:]), **CLOSE)
    for i, row in enumerate(ROWS):
        want = oracle(row, out.sequences[i, -STEPS:])[0][-STEPS - 1 : -1]
        assert_close(torch.stack([step[i] for step in out.logits]).double(), want, **CLOSE)


@torch.no_grad()
def test_budget_of_an_image_is_spread_over_its_tiles():
    made, inputs = FAMILY.model(), FAMILY.prompt(ROWS)
    with fk.patched(made, fk.FlowCut(10), record=True):
        made(**inputs)
        encoder, features = fk.trace(made).stages[-2:]
        assert encoder.kept == [10, 4, 3, 3, 2, 2, 2, 1, 1, 1, 1] and features.kept == [10, 10, 10]
        for image, tiles in enumerate(([0], [1, 2, 3], range(4, 11))):
            found = [n * TOKENS + encoder.indices[t, : encoder.kept[t]] for n, t in enumerate(tiles)]
            assert torch.equal(torch.cat(found), features.indices[image])
        # Without a prompt nobody knows which tiles are an image.
        assert made.get_image_features(inputs["pixel_values"]).pooler_output.shape == (11, 10, 32)


@torch.no_grad()
def test_prompts_that_are_pruned_already():
    """Of one image, or of several of one tile; where tiles could be anybody's there is an error."""
    made, policy = FAMILY.model(), fk.FlowCut(10)
    with fk.patched(made, policy):
        for row in ([3, SEVEN, 5], [3, ONE, 5, replace(ONE, seed=9)]):
            inputs = FAMILY.prompt([row])
            want, ids = made(**inputs).logits, inputs["input_ids"][0]
            number = torch.cat([torch.arange(n) for n in torch.unique_consecutive(ids == IMAGE, return_counts=True)[1]])
            short = ids[(ids != IMAGE) | (number < 10)][None]
            assert torch.equal(made(input_ids=short, pixel_values=inputs["pixel_values"]).logits, want)
        inputs = FAMILY.prompt(ROWS[:1])
        ids = inputs["input_ids"][0]
        short = torch.tensor([3, *[IMAGE] * 10, 4, *[IMAGE] * 10, 6])[None]
        with pytest.raises(ValueError, match=r"input_ids hold \[20\] image placeholders per row for 4 image"):
            made(input_ids=short, pixel_values=inputs["pixel_values"])


def test_refusals():
    made = FAMILY.model()
    with pytest.raises(ValueError, match=r"VisionZip .* squares of 2 x 2 patches"):
        fk.patch(made, fk.VisionZip(8))
    made.config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="'full': pixel shuffle takes the patches of one layer, without the class"):
        fk.patch(made, fk.FlowCut(8))
