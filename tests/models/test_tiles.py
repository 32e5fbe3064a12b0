"""Images that are made of several tiles: shares of a budget, counts, places, and what a tile's neighbours do to it.

Logits against the oracle are in test_conformance.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle
from test_feature_stage import Item, pruned_by_hand
from tiny import LAYERS, PATCH, SIDE
from torch.testing import assert_close
from zoo import Image, Video, llava, llava_next, llava_onevision

import flowcut_kernels as fk
from flowcut_kernels.models._features import spread
from flowcut_kernels.policies.recycling import _constant, constant

SIZES = [(56, 56), (40, 110), (110, 40), (100, 60), (112, 112), (30, 31), (57, 200), (300, 250), (4, 900), (500, 4)]
MAKERS = {"next": llava_next, "onevision": llava_onevision}


@settings(max_examples=200, deadline=None)
@given(total=st.integers(0, 60), limits=st.lists(st.integers(0, 15), min_size=1, max_size=6))
def test_shares_of_a_budget(total, limits):
    """Dealt out one by one, the first tile first, to those that have room."""
    dealt = [0] * len(limits)
    for _ in range(min(total, sum(limits))):
        level, i = min((n, i) for i, n in enumerate(dealt) if n < limits[i])
        dealt[i] = level + 1
    assert spread(total, limits) == dealt


def inputs_of(family, *rows):
    given = family.prompt([[3, *row, 5] for row in rows])
    return {name: x.double() if x.is_floating_point() else x for name, x in given.items()}


def features_of(model, inputs, **changes):
    names = ("pixel_values", "image_sizes", "batch_num_images")
    return list(model.get_image_features(**{n: inputs[n] for n in names if n in inputs} | changes).pooler_output)


def places_of(oracle, row):
    """Kept places of each image, or video, of a row, by the oracle."""
    inputs, found = oracle.inputs(row), {}
    for kind in ("image", "video"):
        if any(isinstance(part, Image if kind == "image" else Video) for part in row):
            made = oracle.visuals(inputs, kind)
            starts = [int((made.visual == i).nonzero()[0]) for i in range(int(made.visual.max()) + 1)]
            found[kind] = [
                (made.kept & (made.visual == i)).nonzero().flatten() - start for i, start in enumerate(starts)
            ]
    return found


@pytest.mark.parametrize("aspect", ["anyres_max_9", "anyres_max_2", "anyres_max_1"])
@torch.no_grad()
def test_counts(aspect):
    """What is left is what was said before, whatever the image's size: the budget, or all places that are made."""
    for name, module in MAKERS.items():
        if name == "next" and aspect != "anyres_max_9":
            continue
        model, family = module.model(), module.FAMILY
        if name == "onevision":
            model.config.vision_aspect_ratio = aspect
        for size in SIZES:
            inputs = family.prompt([[3, Image(*size), 5]])
            (whole,) = features_of(model, inputs)
            newline = (whole == model.model.image_newline).all(1)
            for policy in (
                fk.FlowCut(2),
                fk.FlowCut(retain_ratio=0.4),
                fk.UniformTokens(50),
                fk.RandomTokens(6),
                fk.FlowCut(len(whole) - 1),
            ):
                with fk.patched(model, policy, record=True):
                    (features,) = features_of(model, inputs)
                    stage = fk.trace(model).stages[-1]
                count = min(policy.budget(len(whole)), int((~newline).sum()))
                assert (stage.name, stage.kept, len(features)) == ("features", [count], count), (size, policy)
                assert not newline[stage.indices[0]].any()
                assert features.isfinite().all()


@torch.no_grad()
def test_tiles_without_a_share():
    """Which tiles get nothing is no constant that numbers like them could have left behind."""
    inputs = llava_next.FAMILY.prompt([[3, Image(40, 110), 5]])
    _constant.cache_clear()
    constant((0, 0, 1), torch.device("cpu"))
    with fk.patched(llava_next.model(), fk.FlowCut(2)) as model:
        (features,) = features_of(model, inputs)
    assert len(features) == 2


@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_places(name):
    """The trace numbers what is left as the unpruned features follow each other."""
    family, policy = MAKERS[name].FAMILY, fk.FlowCut(20)
    model, oracle = family.model(dtype=torch.float64), Oracle(family, policy)
    rows = [[Image(*size, seed=i)] for i, size in enumerate(SIZES[:4])]
    want = [places_of(oracle, [3, *row, 5])["image"][0] for row in rows]
    with fk.patched(model, policy, record=True):
        model(**inputs_of(family, *rows))
        stage = fk.trace(model).stages[-1]
    assert stage.name == "features"
    assert [x[x >= 0].tolist() for x in stage.indices] == [x.tolist() for x in want]
    if name == "onevision":
        row = [3, Video(3), 4, Video(3, seed=1), 5]
        with fk.patched(model, policy, record=True):
            model(**inputs_of(family, row))
            stage = fk.trace(model).stages[-1]
        assert [x.tolist() for x in stage.indices] == [x.tolist() for x in places_of(oracle, row)["video"]]
        area = ((SIDE + 1) // 2) ** 2
        frames = torch.stack([(stage.indices // area == i).sum(1) for i in range(3)])
        assert frames.T.tolist() == [[7, 6, 6]] * 2  # and the newline


@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_neighbours_change_nothing(name):
    """Also not for an image of which nothing goes but padding and newlines, next to one that is cut."""
    family = MAKERS[name].FAMILY
    model = family.model(dtype=torch.float64)
    rows = [[Image(*size, seed=i)] for i, size in enumerate(SIZES[:4])]
    lengths = [len(features_of(model, inputs_of(family, row))[0]) for row in rows]
    for policy in (fk.FlowCut(30), fk.FlowCut(min(lengths) - 2), fk.FlowCut(2)):
        with fk.patched(model, policy):
            together = features_of(model, inputs_of(family, *rows))
            for row, features in zip(rows, together, strict=True):
                (alone,) = features_of(model, inputs_of(family, row))
                assert_close(features, alone, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_tiling_set_after_patching(name):
    """As many tiles in another arrangement are another layout."""
    model, edge = MAKERS[name].model(), SIDE * PATCH
    pixels = tiny.images(3, seed=3)[None]
    given = dict(pixel_values=pixels, image_sizes=torch.tensor([[40, 70]]), return_dict=True)

    def features(points):
        model.config.image_grid_pinpoints = [points]
        return model.get_image_features(**given).pooler_output[0]

    with fk.patched(model, fk.FlowCut(10)):
        found = [features(points) for points in ([edge, 2 * edge], [2 * edge, edge])]
    with fk.patched(model, fk.FlowCut(10)):
        assert torch.equal(features([2 * edge, edge]), found[1])


@torch.no_grad()
def test_released_shares():
    """Half of the budget in every view, however many there are; without views, twice the budget in the encoder."""
    family, model = llava_next.FAMILY, llava_next.model()
    rows = [[Image(40, 110)], [Image(112, 112, seed=1)]]
    with fk.patched(model, fk.FlowCut.release(16, llm_layer=1), record=True):
        model(**family.prompt([[3, *row, 5] for row in rows]))
        *_, encoder, features, llm = fk.trace(model).stages
    assert (encoder.name, encoder.kept) == ("encoder", [8] * 8)
    assert (features.kept, llm.kept) == ([24, 40], [16, 16])
    model = llava.model()
    with fk.patched(model, fk.FlowCut.release(16, llm_layer=1), record=True):
        model(**llava.FAMILY.prompt([[3, Image(), 5]]))
        assert [stage.kept for stage in fk.trace(model).stages[-2:]] == [[32], [16]]
    assert fk.FlowCut(16, view_share=0.5).encoder_budget(300, 5) == 16
    with pytest.raises(ValueError, match="view_share=0 must be None or a number above 0"):
        fk.FlowCut(16, view_share=0)


@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_recycling_behind_tiles(name):
    """The encoder leaves a surplus, which is recycled cell by cell of the image's grids."""
    module = MAKERS[name]
    family, model = module.FAMILY, module.FAMILY.model(dtype=torch.float64)
    rows = [[Image(100, 60)], [Image(112, 112, seed=1)]]
    inputs = inputs_of(family, *rows)
    with fk.patched(model, fk.FlowCut(45), record=True):
        left, stage = features_of(model, inputs), fk.trace(model).stages[-1]
    grids = family.grids(model, inputs, "image")
    with fk.patched(model, fk.FlowCut(15, recycle_cell=2.5, encoder_surplus=3), record=True):
        found, last = features_of(model, inputs), fk.trace(model).stages[-1]
    assert last.recycled.any()
    for i, grid in enumerate(grids):
        at = stage.indices[i]
        item = pruned_by_hand(Item(left[i], stage.scores[i, at], grid, places=at.tolist()), 15, 2.5)
        assert_close(found[i], item.features.to(found[i]), rtol=1e-6, atol=1e-8)
        assert last.indices[i].tolist() == at[item.kept].tolist()


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_llava_reads_several_layers(tower):
    """The hidden states of earlier layers hold the tokens that are left at the last."""
    layers, protect = [-3, 2, -2 if tower == "clip" else -1, 4], int(tower == "clip")

    def model(attention="sdpa", dtype=torch.float32):
        text = dict(num_hidden_layers=4)
        return tiny.llava(tower, attention, text=text, vision_feature_layer=layers).to(dtype)

    family = dataclasses.replace(
        llava.FAMILY,
        model=model,
        layers=lambda model: model.model.vision_tower.encoder.layers[: LAYERS - protect],
        tiles=lambda model, inputs, kind: [
            [tile] for tile in llava.batched_tiles(len(inputs["pixel_values"]), (SIDE, SIDE), protect=protect)
        ],
    )
    rows = [[3, Image(), 5, Image(seed=1), 6], [7, Image(seed=2), 8]]
    stock, inputs = model(dtype=torch.float64), {}
    for name, x in family.prompt(rows).items():
        inputs[name] = x.double() if x.is_floating_point() else x
    want = stock(**inputs).logits
    with fk.patched(stock, fk.FlowCut(64)):
        assert torch.equal(stock(**inputs).logits, want)
    for policy in (fk.FlowCut(12), fk.UniformTokens(9), fk.VFlowOpt(20, hub_threshold=1.6, recycle_cell=3.0)):
        with fk.patched(stock, policy):
            logits = stock(**inputs).logits
        for got, row in zip(logits, rows, strict=True):
            expected, _ = Oracle(family, policy)(row)
            assert_close(got[-len(expected) :], expected, rtol=1e-4, atol=5e-5)
    with pytest.raises(ValueError, match="feature_layer=-4 but model"):
        fk.patch(stock, fk.FlowCut(12, feature_layer=-4))


def test_bad_input():
    model = llava_next.model()
    inputs = llava_next.prompt([[3, Image(100, 60), 5]])
    with pytest.raises(ValueError, match="class token of CLIPVisionModel among the patches"):
        fk.patch(tiny.llava_next(vision_feature_select_strategy="full"), fk.FlowCut(9))
    with fk.patched(model, fk.FlowCut(9)):
        with pytest.raises(ValueError, match="image_sizes is missing"):
            model(**inputs | dict(image_sizes=None))
        tiles = inputs["pixel_values"][0, :2]
        with pytest.raises(ValueError, match="2 tiles came to the vision encoder"):
            model.get_image_features(tiles, inputs["image_sizes"])


@pytest.mark.parametrize("policy", [fk.FlowCut(10), fk.FlowCut(retain_ratio=0.3)], ids=str)
@torch.no_grad()
def test_schedule_for_several_tiles(policy):
    """Of what a tile has above its part of the budget the mean share of the samples' tiles stays, whatever comes."""
    model = llava_next.model()
    samples = [llava_next.prompt([[3, Image(*size, seed=i), 5]]) for i, size in enumerate(SIZES[1:4])]

    def tiles(policy, inputs):
        """Of each its tokens, what is left, and what each cut kept."""
        with fk.patched(model, policy, record=True):
            model(**inputs)
            stages = [stage for stage in fk.trace(model).stages if stage.name == "encoder"]
        kept = [[stage.kept[i] for stage in stages] for i in range(len(stages[0].kept))]
        return list(zip(stages[0].scores.isfinite().sum(1).tolist(), (cuts[-1] for cuts in kept), kept, strict=True))

    frozen = fk.calibrate(model, policy, samples)
    seen = [tile for inputs in samples for tile in tiles(policy, inputs) if tile[1] < tile[0]]
    shares = [sum((cuts[i] - end) / (n - end) for n, end, cuts in seen) / len(seen) for i in range(len(seen[0][2]))]
    assert [share for _, share in frozen.schedule] == [round(share, 4) for share in shares if share < 1]
    for n, end, cuts in tiles(frozen, llava_next.prompt([[3, Image(*SIZES[6]), 5]])):
        assert cuts == [end + round(share * (n - end)) for _, share in frozen.schedule]
    assert fk.calibrate(model, frozen, samples) == frozen == fk.FlowCut.from_json(frozen.to_json())
