"""VisionZip in whole models against its formulas written out token by token, in fp64."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_llava import IMG, PROMPTS, inputs_for, spell
from test_llava import Oracle as Llava
from tiny import LAYERS, PATCHES
from torch import Tensor
from torch.testing import assert_close
from zoo import Image, llava_next, vipllava

import flowcut_kernels as fk

POLICIES = {
    "published": fk.VisionZip(target_tokens=16),
    "share": fk.VisionZip(retain_ratio=0.3, contextual_share=0.5),
    "many targets": fk.VisionZip(target_tokens=60, contextual_share=0.9),
    "targets alone": fk.VisionZip(target_tokens=4, contextual_share=0.75),
    "dominant alone": fk.VisionZip(target_tokens=9, contextual_share=0),
    "patches": fk.VisionZip(target_tokens=16, class_token=False),
    "patches, targets alone": fk.VisionZip(target_tokens=5, contextual_share=0.99, class_token=False),
    "one": fk.VisionZip(target_tokens=1),
    "all but one": fk.VisionZip(target_tokens=PATCHES - 1),
}


def zipped(tower, pixels: Tensor, policy: fk.VisionZip, layer: int = -2) -> tuple[list[Tensor], list[Tensor]]:
    """Of each image what `hidden_states[layer]` holds behind the class token, and the places it stands in."""
    states = tower(pixels, output_hidden_states=True).hidden_states
    before, after, block = states[layer - 1], states[layer], tower.encoder.layers[LAYERS + 1 + layer - 1]
    attention, budget = block.self_attn, policy.budget(PATCHES)
    heads, normed = attention.num_heads, block.layer_norm1(before)
    contextual = min(round(policy.contextual_share * budget), budget - policy.class_token)
    rows, places = [], []
    for x, y in zip(normed, after, strict=True):
        query = attention.q_proj(x[0]).unflatten(0, (heads, -1))
        key = attention.k_proj(x).unflatten(1, (heads, -1))
        weight = sum((key[:, h] @ query[h] / query.shape[1] ** 0.5).softmax(0) for h in range(heads))[1:]
        dominant = weight.topk(budget - contextual - policy.class_token).indices.sort().values.tolist()
        rest = [i for i in range(PATCHES) if i not in dominant]
        step = max(len(rest) // max(contextual, 1), 1)
        targets = [rest[i * step] for i in range(contextual)]
        merged = [i for i in rest if i not in targets]
        features = {i: y[1 + i] for i in dominant}
        metric = key.mean(1)[1:]
        members: dict[int, list[Tensor]] = {i: [] for i in targets}
        for i in merged if targets else []:
            likeness = [torch.cosine_similarity(metric[i], metric[t], dim=0) for t in targets]
            members[targets[int(torch.stack(likeness).argmax())]].append(y[1 + i])
        for i in targets:
            features[i] = y[1 + i] + (torch.stack(members[i]).mean(0) if members[i] else 0)
        if policy.class_token:
            features[merged[0]] = y[0]
        assert len(features) == budget
        places.append(torch.tensor(sorted(features)))
        rows.append(torch.stack([features[i] for i in sorted(features)]))
    return rows, places


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_tower(policy, attention):
    """The feature layer's output, in any company; layers after it run on what is left."""
    policy, tower, pixels = POLICIES[policy], tiny.clip_tower(attention).double(), tiny.images(3).double()
    want, places = zipped(tower, pixels, policy)
    classes = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 0]
    with fk.patched(tower, policy, record=True):
        states = tower(pixels, output_hidden_states=True).hidden_states
        (stage,) = fk.trace(tower).stages
        alone = tower(pixels[1:2], output_hidden_states=True).hidden_states[-2]
    assert [x.shape[1] - 1 for x in states] == [PATCHES] * (LAYERS - 1) + [policy.budget(PATCHES)] * 2
    assert_close(states[-2][:, 0], classes)
    assert_close(states[-2][:, 1:], torch.stack(want), rtol=1e-9, atol=1e-9)
    assert_close(alone, states[-2][1:2])
    assert torch.equal(stage.indices, torch.stack(places)) and stage.layer == LAYERS - 2
    assert (stage.recycled.sum(1) == policy.contextual(policy.budget(PATCHES)) + policy.class_token).all()


@pytest.mark.parametrize("policy", ["published", "share", "patches"])
@pytest.mark.parametrize("prompt", ["batch", "several images with text between", "one or none", "image last"])
@torch.no_grad()
def test_llava(prompt, policy):
    """Logits of prompts and what `generate` writes are those of the projected features between the words."""
    policy, model, rows = POLICIES[policy], tiny.llava().double(), PROMPTS[prompt]
    inputs = inputs_for(rows)
    inputs["pixel_values"] = inputs["pixel_values"].double()

    class ByHand(Llava):
        def features(self, pixels):
            made, _ = zipped(self.model.model.vision_tower, pixels, self.policy)
            return iter([self.model.model.multi_modal_projector(x) for x in made])

    oracle = ByHand(model, policy)
    want = oracle.logits(rows, inputs["pixel_values"])
    steps = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    written = oracle.generate(rows, inputs["pixel_values"], **steps)
    with fk.patched(model, policy):
        logits, ids = model(**inputs).logits, model.generate(**inputs, **steps)
    for got, x in zip(logits, want, strict=True):
        assert_close(got[-len(x) :], x, rtol=1e-5, atol=1e-5)  # RMSNorm is fp32 in an fp64 model
    assert torch.equal(ids[:, -4:], written)


@torch.no_grad()
def test_with_the_class_token_in_the_prompt():
    model = tiny.llava(vision_feature_layer=-3, vision_feature_select_strategy="full").double()
    with pytest.raises(ValueError, match="class_token=True, but vision_feature_select_strategy='full'"):
        fk.patch(model, POLICIES["published"])
    tower, pixels = model.model.vision_tower, tiny.images(2).double()
    want, _ = zipped(tower, pixels, POLICIES["patches"], -3)
    classes = tower(pixels, output_hidden_states=True).hidden_states[-3][:, :1]
    want = model.model.multi_modal_projector(torch.cat([classes, torch.stack(want)], 1))
    ids, mask = spell([[1, IMG, 5], [1, IMG, 6, 7]], PATCHES + 1)
    with fk.patched(model, POLICIES["patches"]):
        got = model.get_image_features(pixels).pooler_output
        model(input_ids=ids, attention_mask=mask, pixel_values=pixels)
    assert_close(torch.stack(list(got)), want, rtol=1e-5, atol=1e-5)


def next_features(size: tuple[int, int], policy: fk.VisionZip):
    """A LLaVA-NeXT, its tower's input for one image, and the image's features under the policy."""
    model = llava_next.FAMILY.model(dtype=torch.float64)
    inputs = llava_next.FAMILY.prompt([[3, Image(*size), 6]])
    pixels = inputs["pixel_values"].double()
    with fk.patched(model, policy, record=True):
        features = model.get_image_features(pixels, inputs["image_sizes"]).pooler_output[0]
        return model, pixels[0], features, fk.trace(model).stages[0]


@pytest.mark.parametrize(("size", "counts"), [((56, 112), [7, 7, 6]), ((112, 112), [4] * 5)])
@torch.no_grad()
def test_views(size, counts, monkeypatch):
    """Of a tiled image every view is an image with its part of the budget."""
    model, pixels, features, _ = next_features(size, fk.VisionZip(20, contextual_share=0.4))
    tower = model.model.vision_tower
    monkeypatch.setitem(globals(), "LAYERS", tower.config.num_hidden_layers)
    for view, count in zip(pixels, counts, strict=True):
        (rows,), _ = zipped(tower, view[None], fk.VisionZip(count, contextual_share=0.4))
        assert torch.cdist(model.model.multi_modal_projector(rows), features).min(1).values.max() < 1e-5
    assert len(features) == 20


@torch.no_grad()
def test_a_view_that_keeps_all_it_has():
    """It has neither a class token nor contextual ones; void patches do not count."""
    *_, features, stage = next_features((20, 112), fk.VisionZip(retain_ratio=0.75))
    assert stage.recycled.any(1).tolist().count(False) >= 1
    assert len(features) == sum(stage.kept)


@torch.no_grad()
def test_all_tokens_is_the_stock_model():
    model, inputs = tiny.llava(), inputs_for(PROMPTS["one image"])
    stock = model(**inputs).logits
    with fk.patched(model, fk.VisionZip(target_tokens=PATCHES)):
        assert torch.equal(model(**inputs).logits, stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision(dtype):
    """Means are accumulated in fp32 and rounded once."""
    policy, tower = POLICIES["published"], tiny.clip_tower().to(dtype)
    with fk.patched(tower, policy):
        got = tower(tiny.images(2).to(dtype), output_hidden_states=True).hidden_states[-2]
    want, _ = zipped(tower.double(), tiny.images(2).double(), policy)
    for x, y in zip(got[:, 1:].double(), want, strict=True):
        assert got.dtype == dtype and (x - y).abs().mean() < 0.02 * y.abs().max()


def test_gradients_reach_every_patch():
    tower, pixels = tiny.clip_tower().train(), tiny.images(1).requires_grad_()
    with fk.patched(tower, POLICIES["published"]):
        tower(pixels, output_hidden_states=True).hidden_states[-2].square().sum().backward()
    assert (pixels.grad.unfold(2, 7, 7).unfold(3, 7, 7).abs().amax((1, 4, 5)) > 0).all()


@torch.no_grad()
def test_scores_that_are_not_finite():
    tower = tiny.clip_tower()
    tower.encoder.layers[-2].self_attn.k_proj.weight.fill_(torch.nan)
    with fk.patched(tower, POLICIES["published"]), pytest.raises(ValueError, match="at encoder layer 6 hold NaN"):
        tower(tiny.images(1))


def test_several_feature_layers():
    with pytest.raises(ValueError, match=r"merges tokens of one layer's output, but of CLIPVisionModel the layers \("):
        fk.patch(vipllava.FAMILY.model(), POLICIES["published"])


def test_towers_without_a_class_token():
    with pytest.raises(ValueError, match="VisionZip asks for a class token, which SiglipVisionModel lacks: use"):
        fk.patch(tiny.siglip_tower(), POLICIES["published"])


def test_presets_are_the_published_ones():
    assert [fk.VisionZip.preset(n).contextual(n) for n in (192, 128, 64)] == [30, 20, 10]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fk.VisionZip(8, contextual_share=1), ValueError, r"contextual_share=1 must be a number in \[0, 1\)"),
        (lambda: fk.VisionZip(8, contextual_share="few"), ValueError, "contextual_share='few'"),
        (lambda: fk.VisionZip(8, class_token=1), TypeError, "class_token=1 must be True or False"),
        (lambda: fk.VisionZip(8, feature_layer=0.5), TypeError, "feature_layer=0.5 must be an int"),
        (lambda: fk.VisionZip.preset(100), ValueError, "average=100 must be one of 192, 128, 64"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=f"VisionZip.*{words}"):
        call()
