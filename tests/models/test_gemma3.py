"""What the conformance suite leaves out of Gemma 3: sliding windows, static caches, squares that do not fit."""

from __future__ import annotations

import pytest
import torch
from test_paligemma import given_only
from torch.testing import assert_close
from zoo import Image
from zoo.gemma3 import TOKENS, model, prompt

import flowcut_kernels as fk

KEEP = 5
ROWS = [[3, Image(), 5, 6], [3, Image(seed=1), 4, Image(seed=2), 7, 8], [3, 4, 9]]


def given(rows, padding="left"):
    return {name: x.double() if x.is_floating_point() else x for name, x in prompt(rows, padding).items()}


@torch.no_grad()
def pooled_by_hand(gemma, pixels, stages):
    """The kept tokens of a policy that makes one cut, before the last layer: [I, n, D]."""
    tower, projector, kept = gemma.model.vision_tower, gemma.model.multi_modal_projector, stages[-1].indices
    x = tower.embeddings(pixels)
    side, edge = projector.kernel_size, projector.patches_per_image
    patch = torch.arange(edge**2).view(edge // side, side, edge // side, side).transpose(1, 2).reshape(-1, side**2)
    for layer in tower.encoder.layers[:-1]:
        x = layer(x, None)
    x = x.gather(1, patch[kept].flatten(1)[..., None].expand(-1, -1, x.shape[2]))
    x = tower.post_layernorm(tower.encoder.layers[-1](x, None))
    x = projector.mm_soft_emb_norm(x.unflatten(1, (-1, side**2)).mean(2))
    return x @ projector.mm_input_projection_weight


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_windows_and_groups_of_the_kept_tokens(cache):
    """The stock model on a prompt of the kept tokens alone says the same at every step: windows reach as far back,
    tokens of an image see each other, and no other image's."""
    gemma, policy, inputs = model(dtype=torch.float64, sliding_window=4), fk.UniformTokens(KEEP), given(ROWS)
    settings = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    settings |= dict(cache_implementation=cache) if cache == "static" else {}
    with fk.patched(gemma, policy, record=True):
        got, logits = gemma.generate(**inputs, **settings), gemma(**inputs).logits
        stages = fk.trace(gemma).stages
    assert [stage.kept for stage in stages] == [[KEEP] * 3]
    is_kept = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    image = inputs["token_type_ids"] == 1
    is_kept[image] = torch.arange(int(image.sum())) % TOKENS < KEEP
    live = is_kept & inputs["attention_mask"].bool()
    width = int(live.sum(1).max())
    short = {name: torch.zeros(len(ROWS), width, dtype=torch.long) for name in inputs if name != "pixel_values"}
    for name, x in short.items():
        for row, (values, mask) in enumerate(zip(inputs[name], live, strict=True)):
            x[row, width - int(mask.sum()) :] = values[mask]
    short["pixel_values"] = inputs["pixel_values"]
    with given_only(gemma, pooled_by_hand(gemma, inputs["pixel_values"], stages)):
        want = gemma.generate(**short, **settings)
        assert_close(logits[short["attention_mask"] > 0], gemma(**short).logits[short["attention_mask"] > 0])
    assert torch.equal(got.sequences[:, -6:], want.sequences[:, -6:])
    assert len(got.sequences[:, -6:].unique()) > 6
    for x, y in zip(got.logits, want.logits, strict=True):
        assert_close(x, y, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_schedules_count_squares():
    gemma, inputs = model(), prompt(ROWS)
    policy = fk.calibrate(gemma, fk.FlowCut(retain_ratio=0.3), inputs)
    assert policy.schedule[-1][1] == round(0.3 * TOKENS)
    with fk.patched(gemma, policy, record=True):
        gemma(**inputs)
        assert [(stage.layer, stage.kept[0]) for stage in fk.trace(gemma).stages] == list(policy.schedule)


def test_refused():
    gemma = model()
    for policy, why in (
        (fk.FlowCut(KEEP, llm_layer=1), "Gemma3TextModel: use FlowCut or VFlowOpt without llm_layer"),
        (fk.FastV(KEEP, layer=1), r"^FastV\(target_tokens=\d+, layer=1\) drops .*: use FlowCut or VFlowOpt without"),
        (fk.VFlowOpt(KEEP, llm_stages=((1, 0.5),)), "Gemma3TextModel"),
        (fk.FlowCut(KEEP, feature_layer=-2), "feature_layer=-2"),
    ):
        with pytest.raises(ValueError, match=why):
            fk.patch(gemma, policy)
    gemma.model.multi_modal_projector.kernel_size = 3
    with pytest.raises(ValueError, match="whole squares of 3 x 3"):
        fk.patch(gemma, fk.FlowCut(KEEP))
