"""Idefics3 and SmolVLM beside what every family goes through: the towers alone, masks, other scales."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from oracle import Oracle
from test_conformance import CLOSE
from tiny import PATCH, SIDE
from torch.testing import assert_close
from transformers import Idefics3VisionConfig, SmolVLMVisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer
from zoo import Image, batched_tiles, idefics3, smolvlm

import flowcut_kernels as fk

FAMILIES = pytest.mark.parametrize("family", [idefics3.FAMILY, smolvlm.FAMILY], ids=str)
TOKENS, EDGE = idefics3.TOKENS, 2 * PATCH  # of a tile; of a token
TOWERS = {Idefics3VisionTransformer: Idefics3VisionConfig, SmolVLMVisionTransformer: SmolVLMVisionConfig}


@pytest.mark.parametrize("kind", TOWERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_towers_are_siglip(kind, attention):
    """With whole images and the same weights they keep what a SigLIP tower keeps, and come to the same."""
    siglip, pixels = tiny.siglip_tower(attention, vision_use_head=False), tiny.images(3)
    model = kind(TOWERS[kind](**tiny.VISION, image_size=SIDE * PATCH)).eval()
    model.set_attn_implementation(attention)
    model.load_state_dict(siglip.state_dict())
    whole = torch.ones(3, SIDE, SIDE, dtype=torch.bool)
    with fk.patched(model, fk.FlowCut(8), record=True), fk.patched(siglip, fk.FlowCut(8), record=True):
        assert torch.equal(model(pixels, patch_attention_mask=whole)[0], siglip(pixels)[0])
        for stage, other in zip(fk.trace(model).stages, fk.trace(siglip).stages, strict=True):
            assert torch.equal(stage.indices, other.indices)
        whole[1, SIDE - 2 :] = False
        with pytest.raises(ValueError, match=r"attention_mask was passed .* only unmasked images are supported"):
            model(pixels, patch_attention_mask=whole)


def masked(family, dtype: torch.dtype = torch.float64) -> dict:
    """Two rows: three tiles, the second of which ends after 2 of 4 rows of tokens, and two, one after 3 columns."""
    pixels = tiny.images(6, seed=3).to(dtype).view(2, 3, 3, SIDE * PATCH, SIDE * PATCH)
    pixels[1, 2] = 0
    mask = torch.ones(2, 3, SIDE * PATCH, SIDE * PATCH, dtype=torch.long)
    mask[0, 1, 2 * EDGE :], mask[1, 0, :, 3 * EDGE :], mask[1, 2] = 0, 0, 0
    row = [80, *[idefics3.IMAGE] * TOKENS]
    ids = torch.tensor([[3, *row, *row, 9, *row, 5], [4] * len(row) + [7, *row, *row, 9, 6]])
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, pixel_attention_mask=mask)


def features(model, inputs: dict) -> torch.Tensor:
    output = model.model.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"]).pooler_output
    return torch.cat([x.flatten(0, -2) for x in output])


@FAMILIES
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_masks(family, attention):
    """What is hidden goes first and takes no part: the rest is as in the stock model, whatever hidden pixels are."""
    model, inputs = family.model(attention, torch.float64), masked(family)
    stock, whole = features(model, inputs), model(**inputs).logits
    seen = inputs["pixel_attention_mask"][:, :, ::EDGE, ::EDGE].flatten(0, 1)[:5].flatten(1).bool()
    assert seen.sum(1).tolist() == [16, 8, 16, 12, 16]
    with fk.patched(model, fk.FlowCut(TOKENS)):
        assert torch.equal(model(**inputs).logits, whole)
    with fk.patched(model, fk.FlowCut(TOKENS - 1), record=True):
        left = features(model, inputs).split([15, 8, 15, 12, 15])
        for i in (1, 3):
            assert_close(left[i], stock.view(5, TOKENS, -1)[i][seen[i]], **CLOSE)
        kept, length = fk.trace(model).stages[-1].kept, inputs["input_ids"].shape[1]
        assert kept == [15, 8, 15, 12, 15] and model(**inputs).logits.shape[1] == length - 5
    with fk.patched(model, fk.FlowCut(9)):  # all that is seen of the one tile there is
        one = {name: inputs[name][:1, 1:2] for name in ("pixel_values", "pixel_attention_mask")}
        assert_close(features(model, one), stock.view(5, TOKENS, -1)[1][seen[1]], **CLOSE)
    noise = inputs["pixel_values"] + 3 * (1 - inputs["pixel_attention_mask"][:, :, None]).double()
    noise[1, 2] = 0
    for policy in (fk.FlowCut(5), fk.UniformTokens(5), fk.RandomTokens(5)):
        with fk.patched(model, policy, record=True):
            want = features(model, inputs)
            for stage in fk.trace(model).stages:
                for i, tokens in enumerate(seen):
                    assert tokens[stage.indices[i, : stage.kept[i]]].all()
            assert torch.equal(features(model, inputs | dict(pixel_values=noise)), want)
    with fk.patched(model, fk.VFlowOpt(5)), pytest.raises(ValueError, match="cannot tell what is left of the images"):
        model(**inputs)
    inputs["pixel_attention_mask"][0, 1, : 2 * EDGE + PATCH] = 1
    with fk.patched(model, fk.FlowCut(5)), pytest.raises(ValueError, match="ends inside a token, 2 x 2 patches of 7"):
        model(**inputs)


@torch.no_grad()
def test_squares_of_four_by_four_patches():
    """As the small SmolVLMs have them."""

    def prompt(rows, padding="left"):
        given = smolvlm.FAMILY.prompt(rows, padding)
        ids = given["input_ids"][0]
        number = torch.cat(
            [torch.arange(n) for n in torch.unique_consecutive(ids == tiny.IMAGE, return_counts=True)[1]]
        )
        ids = ids[(ids != tiny.IMAGE) | (number < 4)][None]
        return given | dict(input_ids=ids, attention_mask=torch.ones_like(ids))

    family = replace(
        smolvlm.FAMILY,
        model=partial(smolvlm.FAMILY.model, scale_factor=4),
        prompt=prompt,
        tiles=lambda model, inputs, kind: [
            [x] for x in batched_tiles(inputs["pixel_values"].shape[1], (2, 2), block=16)
        ],
    )
    made, row, policy = family.model(dtype=torch.float64), [3, Image(35, 70), 5], fk.FlowCut(2)
    inputs = prompt([row])
    with fk.patched(made, policy):
        logits = made(**inputs | dict(pixel_values=inputs["pixel_values"].double())).logits[0]
    assert_close(logits, Oracle(family, policy)(row)[0], **CLOSE)


@FAMILIES
@torch.no_grad()
def test_pixels_are_looked_at_once(family, monkeypatch):
    """What will come of tiles is asked for twice, at a look at every pixel, and it holds for one call."""
    model, inputs = family.model(), family.prompt([[3, Image(), 4, Image(seed=1), 5]])
    with fk.patched(model, fk.FlowCut(4)):
        features = vars(model.model)["get_image_features"]
        looked, layouts = [], features.kind.layouts
        monkeypatch.setattr(features.kind, "layouts", lambda *given: looked.append(1) or layouts(*given))
        model(**inputs)
        assert looked == [1] and features.found is None
        inputs["pixel_values"][0, -1] = 0  # in place: a tile of padding now
        with pytest.raises(ValueError, match="placeholders"):
            model(**inputs)
