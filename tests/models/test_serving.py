"""Counts for serving engines are those of a patched model; masks keep exactly what they are told to."""

import random

import numpy as np
import pytest
import torch
from tiny import clip_tower, llava
from transformers import LlavaImageProcessorPil
from zoo import Family, Image, Video, families

import flowcut_kernels as fk
from flowcut_kernels.integrations.serving import retained_count, retention_mask
from flowcut_kernels.ops import Select, anchor_stats_select

POLICIES = (
    fk.FlowCut(retain_ratio=0.4),
    fk.FlowCut(target_tokens=9, recycle_cell=2),
    fk.VFlowOpt(target_tokens=5),
    fk.UniformTokens(target_tokens=6),
)


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("family", families(), ids=str)
def test_counts_are_those_of_a_patched_model(family: Family, kind: str):
    if kind not in family.kinds:
        pytest.skip("the family has none")
    model = family.model()
    shown = [Image(*size) for size in family.sizes] if kind == "image" else [Video(4), Video(4, seed=1)]
    prompts = [family.prompt([[3, part, 4]]) for part in shown]
    for policy in POLICIES:
        if type(policy) not in family.policies:
            continue
        found: list[int] = []
        for inputs in prompts:
            with fk.patched(model, policy, record=True), torch.no_grad():
                model(**inputs)
                kept = fk.trace(model).stages[-1].kept
            names = ("pixel_values", "pixel_values_images") if kind == "image" else ("pixel_values_videos",)
            shape = next(inputs[name].shape for name in names if name in inputs)  # the second one until 5.22
            sizes = inputs.get(f"{kind}_grid_thw", inputs.get("image_sizes"))
            known = dict(pixel_shape=shape) if sizes is None else dict(image_sizes=sizes)
            assert retained_count(model.config, policy, modality=kind, **known) == kept
            found += kept
        together = family.prompt([[3, *(word for part in shown for word in (part, 4))]])
        with fk.patched(model, policy, record=True), torch.no_grad():
            model(**together)
            kept = fk.trace(model).stages[-1].kept
        sizes = together.get(f"{kind}_grid_thw", together.get("image_sizes"))
        if sizes is not None:
            given = dict(batch_num_images=together.get("batch_num_images"), modality=kind)
            found = retained_count(model.config, policy, sizes, **given)
        assert found == kept


@pytest.mark.parametrize("family", families(), ids=str)
def test_sizes_in_pixels_are_enough(family: Family):
    """Of images of any form, where the processor is there to say how it cuts them."""
    model, draw, processor = family.model(), random.Random(family.name), family.processor()
    sizes = [(draw.randint(20, 160), draw.randint(20, 160)) for _ in range(6)] + [(24, 150)]
    inputs = family.prompt([[3, *(word for size in sizes for word in (Image(*size), 4))]])
    for policy in POLICIES:
        if type(policy) not in family.policies:
            continue
        with fk.patched(model, policy, record=True), torch.no_grad():
            model(**inputs)
            stage = fk.trace(model).stages[-1]
        for by in (processor, processor.image_processor):
            known = dict(processor=by, batch_num_images=inputs.get("batch_num_images"))
            found = retained_count(model.config, policy, sizes, **known)
            assert sum(found) == sum(stage.kept) and (stage.name == "encoder" or found == stage.kept)


def test_all_tokens_of_a_fixed_size_and_its_class_token():
    model = llava(vision_feature_select_strategy="full")
    assert retained_count(model.config, fk.FlowCut(retain_ratio=1.0), [(56, 56), (30, 90)]) == [65, 65]
    assert retained_count(model.config, fk.FlowCut(target_tokens=9), [(56, 56)]) == [10]


def test_sizes_that_do_not_say_how_many():
    """A count that follows from the pixels' shape, or from sizes of another kind, is asked for: never guessed."""
    found, policy = {family.name: family.model().config for family in families()}, fk.FlowCut(target_tokens=9)
    for name in ("internvl", "idefics3", "smolvlm"):
        with pytest.raises(ValueError, match="give pixel_shape"):
            retained_count(found[name], policy, [(56, 56), (30, 90)])
    with pytest.raises(ValueError, match=r"are 1 images, but pixel_shape.* has 5: give one of the two"):
        retained_count(found["internvl"], policy, [(112, 112)], pixel_shape=(5, 3, 56, 56))
    for name in ("llava_next_video", "llava_onevision", "video_llava"):
        with pytest.raises(ValueError, match=r"the videos of \w+Config have: give pixel_shape"):
            retained_count(found[name], policy, [(56, 56)], modality="video")
    with pytest.raises(ValueError, match="processor=LlavaImageProcessorPil does not say how many patches"):
        retained_count(found["internvl"], policy, [(56, 56)], processor=LlavaImageProcessorPil())
    with pytest.raises(ValueError, match=r"must be a list with \(frames, rows, columns\)"):  # a processor counts images
        retained_count(found["qwen2_vl"], policy, [(56, 56)], modality="video", processor=object())
    with pytest.raises(ValueError, match=r"columns\) of patches.* with processor=, of images \(height, width\)"):
        retained_count(found["qwen2_vl"], policy, [(56, 56)])
    with pytest.raises(ValueError, match="image_sizes is missing"):
        retained_count(found["llava_next"], policy, pixel_shape=(1, 5, 3, 56, 56))
    assert all(retained_count(config, policy, []) == [] for config in found.values())


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("internvl", dict(pixel_shape=(3, 3, 56, 56))),
        ("idefics3", dict(pixel_shape=(1, 3, 3, 56, 56))),
        ("llava_next", dict(image_sizes=[(40, 110), (56, 56)])),
        ("qwen2_5_vl", dict(image_sizes=[(1, 8, 12)])),
    ],
)
def test_default_device_of_an_engine(name, known):
    """A GPU, while it loads a model: what is counted stays on the host."""
    config = next(family for family in families() if family.name == name).model().config
    for policy in (fk.FlowCut(target_tokens=5), fk.FlowCut(target_tokens=110)):
        with torch.device("meta"):
            found = retained_count(config, policy, **known)
        assert retained_count(config, policy, **known) == found


SIZES = [(56, 100), (40, 70)]
GRIDS = [(1, 8, 12), (1, 10, 6)]


@pytest.mark.parametrize(
    "form",
    [
        torch.tensor,
        np.array,
        lambda x: [*map(torch.tensor, x)],
        lambda x: [*map(np.array, x)],
        lambda x: tuple(map(torch.Size, x)),
    ],
    ids=["tensor", "array", "rows of a tensor", "rows of an array", "tuples"],
)
def test_sizes_as_engines_hand_them_on(form):
    """A row of a processor's tensor by itself, for one, as docs/serving.md has it."""
    found, policy = {family.name: family for family in families()}, fk.FlowCut(retain_ratio=0.3)
    for name, sizes, given in (
        ("llava", SIZES, {}),
        ("llava_next", SIZES, {}),
        ("internvl", SIZES, dict(processor=found["internvl"].processor())),
        ("qwen2_5_vl", GRIDS, {}),
        ("qwen2_5_vl", SIZES, dict(processor=found["qwen2_5_vl"].processor())),
    ):
        config = found[name].model().config
        want = retained_count(config, policy, sizes, **given)
        assert retained_count(config, policy, form(sizes), **given) == want and all(type(n) is int for n in want)
    shape = (3, 3, 56, 56)
    config = found["internvl"].model().config
    assert retained_count(config, policy, pixel_shape=form([shape])[0]) == retained_count(
        config, policy, pixel_shape=shape
    )


@pytest.mark.parametrize(
    "sizes",
    [
        (56, 100),
        [(56.5, 100)],
        [(0, 100)],
        [(-3, 100)],
        [(56, 100, 3)],
        [{"height": 56, "width": 100}],
        [(56,), (4, 7)],
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl"])
def test_sizes_that_are_none(name, sizes):
    """One image's without a list around it were two images of a model whose counts are fixed."""
    family = next(family for family in families() if family.name == name)
    with pytest.raises(ValueError, match=r"image_sizes=.* must be a list with \(height, width\), of each image: whole"):
        retained_count(family.model().config, POLICIES[0], sizes, processor=family.processor())


@pytest.mark.parametrize("grids", [(1, 8, 12), [(1, 7, 12)], [(1, -8, 12)], [(1, 8.0, 12)]], ids=str)
def test_grids_that_are_none(grids):
    config = next(family for family in families() if family.name == "qwen3_vl").model().config
    with pytest.raises(ValueError, match=r"image_sizes=.* \(frames, rows, columns\) .* multiples of 2, of each image"):
        retained_count(config, POLICIES[0], grids)


@pytest.mark.parametrize(
    ("name", "modality", "shape", "words"),
    [
        ("internvl", "image", (1, 5, 3, 56, 56), "images or tiles, 3"),
        ("internvl", "image", (5, 3, 56), "images or tiles, 3"),
        ("internvl", "image", (-1, 3, 56, 56), "images or tiles, 3"),
        ("internvl", "image", (5.0, 3, 56, 56), "images or tiles, 3"),
        ("smolvlm", "image", (5, 3, 56, 56), "1, tiles, 3"),
        ("smolvlm", "image", (2, 5, 3, 56, 56), "1, tiles, 3"),
        ("video_llava", "video", (4, 3, 56, 56), "videos, frames, 3"),
    ],
)  # fmt: skip
def test_shapes_that_are_none(name, modality, shape, words):
    config = next(family for family in families() if family.name == name).model().config
    with pytest.raises(ValueError, match=rf"pixel_shape=.* must be that of the processor's pixel values, \[{words}"):
        retained_count(config, POLICIES[0], modality=modality, pixel_shape=shape)


def test_what_cannot_be_counted():
    config, policy = llava().config, fk.FlowCut(target_tokens=9)
    with pytest.raises(ValueError, match="modality='video' but this model has: image"):
        retained_count(config, policy, [(56, 56)], modality="video")
    with pytest.raises(ValueError, match="give image_sizes, or pixel_shape"):
        retained_count(config, policy)
    with pytest.raises(ValueError, match="only once they are chosen"):
        retained_count(config, fk.VFlowOpt(retain_ratio=0.5, counts="release"), [(56, 56)])
    for other in (config.to_dict(), None, llava()):
        with pytest.raises(TypeError, match=f"config is a {type(other).__name__}, but what is needed is the model's"):
            retained_count(other, policy, [(56, 56)])
    with pytest.raises(TypeError, match="vision tower alone"):
        retained_count(clip_tower().config, policy, [(56, 56)])
    with pytest.raises(TypeError, match="LlamaConfig is of no supported model; supported: CLIPVisionConfig"):
        retained_count(config.text_config, policy, [(56, 56)])


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mask(backend, dtype):
    full, kept = [7, 30, 1, 12], [3, 30, 1, 5]
    scores = torch.randn(sum(full), generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    scores[41] = scores[45] = scores[38:].max() + 1
    mask = retention_mask(scores, full, kept, backend=backend)
    for part, chosen, count in zip(scores.split(full), mask.split(full), kept, strict=True):
        best = part.argsort(descending=True, stable=True)[:count]
        assert chosen.nonzero().flatten().tolist() == sorted(best.tolist())
    assert torch.equal(retention_mask(scores, torch.tensor(full), np.array(kept), backend=backend), mask)
    assert retention_mask(scores[:0], [], [], backend=backend).shape == (0,)
    equal = retention_mask(torch.zeros(6, dtype=dtype), [4, 2], [2, 1], backend=backend)
    assert equal.tolist() == [True, True, False, False, True, False]


def test_scores_of_a_plugin():
    """As docs/serving.md outlines it: rows of a merged token share one score, and the mask keeps whole tokens."""
    blocks, side, generator = 9, 2, torch.Generator().manual_seed(2)
    score = None
    for _ in range(2):
        k, v = torch.randn(2, 1, 4, blocks * side**2, 8, generator=generator)
        means = k.mean(2, keepdim=True), v.mean(2, keepdim=True)
        score, *_ = anchor_stats_select(
            means[0], k, v, means[1], history=score, block=side**2, mode=Select.SCORE_ONLY, backend="reference"
        )
    rows = score.unflatten(1, (blocks, side**2))
    assert torch.equal(rows, rows[..., :1].expand_as(rows))
    mask = retention_mask(rows[..., 0].flatten(), [blocks], [4])
    assert rows[0, mask, 0].min() > rows[0, ~mask, 0].max() and int(mask.sum()) == 4


def test_bad_masks():
    with pytest.raises(ValueError, match=r"scores must be \[5\]"):
        retention_mask(torch.zeros(4), [2, 3], [1, 1])
    for kept in ([1], [0, 1], [1, 4]):
        with pytest.raises(ValueError, match="kept="):
            retention_mask(torch.zeros(5), [2, 3], kept)
    for counts in (([2, 3], [1.5, 2]), ([2.0, 3.0], [1, 1]), (5, 1), ([[2], [3]], [1, 1])):
        with pytest.raises(ValueError, match="lists of whole numbers"):
            retention_mask(torch.zeros(5), *counts)
    for scores in ([0.0] * 5, torch.zeros(5, dtype=torch.bfloat16)):
        with pytest.raises(TypeError, match="scores must be a float32 or float64 tensor"):
            retention_mask(scores, [2, 3], [1, 1])
    with pytest.raises(ValueError, match="NaN"):
        retention_mask(torch.tensor([1.0, float("nan"), 0.0]), [3], [1])
