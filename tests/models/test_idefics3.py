"""Idefics3 and SmolVLM beside what every family goes through: the towers alone, masks, other scales."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial

import numpy as np
import PIL.Image
import pytest
import tiny
import torch
from oracle import Oracle
from test_conformance import CLOSE, GREEDY, STEPS, likelihood
from tiny import PATCH, SIDE
from torch.testing import assert_close
from transformers import Idefics3VisionConfig, SmolVLMVisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer
from zoo import Image, idefics3, llava, smolvlm

import flowcut_kernels as fk
from flowcut_kernels.models._features import heeding

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


@torch.no_grad()
def test_tower_compiles_as_one_graph():
    """For which transformers makes a mask even though it hides nothing."""
    config, pixels = Idefics3VisionConfig(**tiny.VISION, image_size=SIDE * PATCH), tiny.images(2)
    model = Idefics3VisionTransformer(config).eval()
    with fk.patched(model, fk.FlowCut(8, adaptive=False)):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert_close(compiled(pixels)[0], model(pixels)[0], rtol=1e-4, atol=1e-4)


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
        tiles=partial(idefics3.tiles, side=4),
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


WIDE, TALL = Image(35, 70), Image(80, 20, seed=2)  # 1 x 2 and 2 x 1 tiles, and an overview each
FRAME = [idefics3.AROUND, idefics3.GLOBAL, *[idefics3.IMAGE] * TOKENS, idefics3.AROUND]


@FAMILIES
@torch.no_grad()
def test_budget_of_an_image_is_spread_over_its_tiles(family):
    """And what is left of a tile stays behind the words that say where it lies."""
    model, inputs = family.model(), family.prompt([[3, WIDE, 4, TALL, 6], [7, 5], [Image(), 8]])
    with fk.patched(model, fk.FlowCut(10), record=True):
        model(**inputs)
        encoder, features = fk.trace(model).stages[-2:]
        assert encoder.kept == [4, 3, 3] * 2 + [2] * 5 and features.kept == [10] * 3
        for image, tiles in enumerate((range(3), range(3, 6), range(6, 11))):
            found = [n * TOKENS + encoder.indices[t, : encoder.kept[t]] for n, t in enumerate(tiles)]
            assert torch.equal(torch.cat(found), features.indices[image])
        seen: list[torch.Tensor] = []
        hook = model.model.text_model.register_forward_pre_hook(
            lambda _, args, given: seen.append(given["inputs_embeds"]), with_kwargs=True
        )
        model(**inputs)
        hook.remove()
        # Without a prompt nobody knows which tiles are an image.
        alone = features_of(model, inputs)
        assert len(alone) == 11 * 10
    words = model.get_input_embeddings().weight
    first, place = seen[0][0], idefics3.CELL
    there = [int((first == words[word]).all(1).nonzero()[0]) for word in (place, place + 1)]
    assert there[1] - there[0] == 1 + 4 + 1  # its own four and a mark


@FAMILIES
@torch.no_grad()
def test_release_gives_every_tile_its_share(family):
    """T / 2 of each in the encoder, whatever their number, and T of the image behind a layer of the language model."""
    model, inputs = family.model(), family.prompt([[3, WIDE, 4, Image(), 6]])
    with fk.patched(model, fk.FlowCut.release(8, llm_layer=1), record=True):
        model(**inputs)
        kept = {stage.name: stage.kept for stage in fk.trace(model).stages}
    assert kept == dict(encoder=[4] * 8, features=[12, 20], llm=[8, 8])


def features_of(model, inputs: dict) -> torch.Tensor:
    output = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    return torch.cat([x.flatten(0, -2) for x in output])


PLACED = {  # words -> images by their tiles
    "of several tokens each": lambda row: [x for i in row for x in ([11, i, 12] if 82 <= i <= 86 else [i])],
    "one token each": lambda row: row,
    "newlines merged": lambda row: [i for i, j in zip(row, [*row[1:], 0], strict=True) if (i, j) != (81, 81)],
}


@pytest.mark.parametrize("form", PLACED)
@torch.no_grad()
def test_images_of_a_prompt(form):
    """Whatever a tokenizer makes of the words for places; frames are images, and so is what has another form."""
    made, rows = idefics3.FAMILY.model(), [[3, WIDE, TALL, 6, *FRAME, 7, *FRAME], [Image(), 8, WIDE]]
    spelled = [PLACED[form](row) for row in idefics3.write(rows, idefics3.spelled)]
    pixels = tiny.images(16, seed=3).view(2, 8, 3, SIDE * PATCH, SIDE * PATCH)
    with fk.patched(made, fk.UniformTokens(retain_ratio=0.25), record=True):
        inputs = idefics3.spell(spelled) | dict(pixel_values=pixels)
        logits = made(**inputs).logits
        assert fk.trace(made).stages[-1].kept == [12, 12, 4, 4, 20, 12]
        ids = inputs.pop("input_ids")
        assert torch.equal(made(inputs_embeds=made.get_input_embeddings()(ids), **inputs).logits, logits)


@torch.no_grad()
def test_the_processor_itself():
    made, read = idefics3.FAMILY.model(), idefics3.processor()
    wide, tall = (PIL.Image.fromarray(image.pixels) for image in (WIDE, TALL))
    given = read(images=[[wide, tall], [tall]], text=["w3 <image> w5 <image> w6", "<image> w7"], padding=True)
    inputs = {name: torch.tensor(np.array(x)) for name, x in given.items()}
    with fk.patched(made, fk.FlowCut(9), record=True):
        made(**inputs)
        assert fk.trace(made).stages[-2].kept == [3] * 9 and fk.trace(made).stages[-1].kept == [9] * 3


@torch.no_grad()
def test_prompts_of_another_form():
    """Runs of placeholders are images, of as many tiles as they are long."""
    made, image = idefics3.FAMILY.model(), [idefics3.IMAGE] * TOKENS
    pixels = tiny.images(3, seed=3)[None]
    forms = {
        "one run": ([3, *image * 3, 5], [12]),
        "two runs": ([3, *image * 2, 5, *image, 6], [8, 4]),
        "no places": ([3, 80, *image, 80, *image, 80, *image, 80], [4, 4, 4]),
        "no mark at the end": ([3, *FRAME, *FRAME, *FRAME[:-1]], [4, 4, 4]),
        "places of their own": ([x for i in (20, 21, 22) for x in (80, i, *image, 80, 81)], [4, 4, 4]),
        "text between": ([3, *image, 5, *image, 6, 7, *image, 8], [4, 4, 4]),
    }
    with fk.patched(made, fk.UniformTokens(retain_ratio=0.25), record=True):
        for name, (row, kept) in forms.items():
            assert made(input_ids=torch.tensor([row]), pixel_values=pixels).logits.shape[1] == len(row) - 36, name
            assert fk.trace(made).stages[-1].kept == kept, name
        with pytest.raises(ValueError, match=r"input_ids hold \[13\] image placeholders per row for 3 image"):
            row = [3, 80, *image[:4], 5, *image[:9], 7]
            made(input_ids=torch.tensor([row]), pixel_values=pixels)


@pytest.mark.parametrize("policy", [fk.FlowCut(10), fk.VFlowOpt(10)], ids=["flowcut", "vflowopt"])
@torch.no_grad()
def test_prompts_that_are_pruned_already(policy):
    """As long as a token of every tile is left; features that were made before go with the whole prompt, too."""
    made, inputs = idefics3.FAMILY.model(), idefics3.FAMILY.prompt([[3, WIDE, 5]])
    ids = inputs["input_ids"][0]
    number = (ids == idefics3.IMAGE).cumsum(0) - 1  # of placeholders
    with fk.patched(made, policy, record=True):
        want = made(**inputs).logits
        (kept,) = fk.trace(made).stages[-1].indices
        left = torch.bincount(kept // TOKENS, minlength=3)
        assert left.min() > 0
        short = ids[(ids != idefics3.IMAGE) | (number % TOKENS < left[number // TOKENS])][None]
        pixels = dict(pixel_values=inputs["pixel_values"])
        assert torch.equal(made(input_ids=short, **pixels).logits, want)
        if "mm_encoder_outputs" in inspect.signature(type(made).forward).parameters:
            tiles = dict(image=made.model.get_image_features(**pixels))  # each by itself
            assert made(input_ids=ids[None], mm_encoder_outputs=tiles).logits.shape[1] == len(ids) - 3 * (TOKENS - 10)
            with heeding():
                vars(made.model)["get_image_features"].kind.heed(
                    inputs["pixel_values"], ids[None].numpy() == idefics3.IMAGE, inputs
                )
                image = dict(image=made.model.get_image_features(**pixels))
            assert torch.equal(made(input_ids=ids[None], mm_encoder_outputs=image).logits, want)


@pytest.mark.parametrize("policy", [fk.FlowCut(retain_ratio=0.1), fk.VFlowOpt(retain_ratio=0.2)], ids=str)
@torch.no_grad()
def test_beams_of_images_that_keep_different_numbers(policy):
    rows = [[3, WIDE, 4, Image(), 6], [7, 5], [TALL, 8]]
    made, oracle = idefics3.FAMILY.model(dtype=torch.float64), Oracle(idefics3.FAMILY, policy)
    inputs = idefics3.FAMILY.prompt(rows)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with fk.patched(made, policy):
        beams = made.generate(**inputs, **GREEDY, num_beams=2, output_scores=True)
    for ids, score, row in zip(beams.sequences, beams.sequences_scores, rows, strict=True):
        assert_close(score.double(), likelihood(oracle, row, ids[-STEPS:]), **CLOSE)


@pytest.mark.parametrize("family", [idefics3.FAMILY, llava.FAMILY], ids=str)
@torch.no_grad()
def test_beams_of_two_images_that_keep_half(family):
    """Which have as many placeholders as one of them whole."""
    row, policy = [3, Image(), 4, Image(seed=1), 6], fk.FlowCut(retain_ratio=0.5)
    made, oracle, inputs = family.model(dtype=torch.float64), Oracle(family, policy), family.prompt([row])
    takes = inspect.signature(type(made).forward).parameters
    if inputs["pixel_values"].dim() == 4 and "mm_encoder_outputs" not in takes:
        pytest.skip("images that are no rows: this transformers repeats each by itself, so that a beam has one twice")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with fk.patched(made, policy):
        beams = made.generate(**inputs, **GREEDY, num_beams=2, output_scores=True)
    assert_close(beams.sequences_scores[0].double(), likelihood(oracle, row, beams.sequences[0, -STEPS:]), **CLOSE)


@torch.no_grad()
def test_masks_of_an_image():
    """Tiles that end early have a smaller part in its budget, and never more than they show."""
    made, inputs = idefics3.FAMILY.model(dtype=torch.float64), idefics3.FAMILY.prompt([[3, WIDE, 5]])
    mask = torch.ones(1, 3, SIDE * PATCH, SIDE * PATCH, dtype=torch.long)
    mask[0, 1, EDGE:] = 0
    inputs |= dict(pixel_values=inputs["pixel_values"].double(), pixel_attention_mask=mask)
    for budget, kept in ((21, [9, 4, 8]), (46, [16, 4, 16])):
        with fk.patched(made, fk.FlowCut(budget), record=True):
            made(**inputs)
            (index,) = fk.trace(made).stages[-1].indices
            assert torch.bincount(index // TOKENS).tolist() == kept
            assert (index[index // TOKENS == 1] % TOKENS < 4).all()


@torch.no_grad()
def test_masked_image_that_stays_whole():
    """By itself as in the stock model; beside one that is pruned its hidden tokens can neither stay nor go."""
    made, mask = idefics3.FAMILY.model(), torch.ones(1, 4, SIDE * PATCH, SIDE * PATCH, dtype=torch.long)
    mask[0, 0, EDGE:] = 0
    pixels, row = tiny.images(4, seed=3)[None], [3, *FRAME, 4]
    alone = dict(input_ids=torch.tensor([row]), pixel_values=pixels[:, :1], pixel_attention_mask=mask[:, :1])
    beside = [*row, *idefics3.write([[WIDE]], idefics3.spelled)[0], 5]
    beside = dict(input_ids=torch.tensor([beside]), pixel_values=pixels, pixel_attention_mask=mask)
    stock = made(**alone).logits
    with fk.patched(made, fk.FlowCut(TOKENS)):
        assert torch.equal(made(**alone).logits, stock)
        with pytest.raises(ValueError, match="an image that is to be kept whole, beside images that are pruned"):
            made(**beside)


@torch.no_grad()
def test_image_of_zeros():
    """Filling elsewhere, but SmolVLM takes one tile for an image where there is no other."""
    made = smolvlm.FAMILY.model()
    with fk.patched(made, fk.FlowCut(4)):
        inputs = dict(input_ids=torch.tensor([[3, *FRAME, 5]]), pixel_values=torch.zeros(1, 2, 3, *2 * [SIDE * PATCH]))
        assert made(**inputs).logits.shape[1] == 2 + len(FRAME) - TOKENS + 4
