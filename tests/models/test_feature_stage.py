"""VFlowOpt in whole models against its formulas written out by hand, in fp64.

The oracle forms the attention map of the stock tower, carries importance through the stock model's own packing
as one more channel of the features, tries out how many tokens to prune, and runs the decoder of test_llm_stage.py.
"""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_llm_stage import Image, check_steps
from test_llm_stage import Oracle as Decoder
from tiny import IMAGE, PAD, PATCH, SIDE
from torch import Tensor
from torch.testing import assert_close

import flowcut_kernels as fk

VIDEO = tiny.VIDEO
SIZE = SIDE * PATCH
HUBS = dict(hub_threshold=1.6, recycle_cell=2.5)


@dataclass(frozen=True)
class Picture:
    """An image of a prompt, by height and width; more than one in a prompt are not tiled."""

    height: int = SIZE
    width: int = SIZE


@dataclass(frozen=True)
class Film:
    frames: int = 3


PROMPTS: dict[str, list[list]] = {
    "one image": [[1, Picture(100, 60), 5, 6]],
    "sizes in a batch": [[1, Picture(60, 110), 5, 6, 7], [1, 9, Picture(120, 110), 8], [Picture(50, 50), 3]],
    "several images": [[1, Picture(), 4, 5, Picture(), 6], [1, Picture(90, 50), 7]],
    "a video": [[1, Film(), 4, 5], [1, 7, Film(), 8, 9, 10]],
    "image, video or none": [[1, Film(), 4, Picture(110, 60), 6], [1, 2, 3], [5, Picture(60, 60), 7]],
}


def count_views(model, picture: Picture) -> int:
    from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

    return image_size_to_num_patches([picture.height, picture.width], model.config.image_grid_pinpoints, SIZE)


def inputs_for(model, rows: list[list], side: str = "left", dtype=torch.float64) -> dict[str, Any]:
    """What the processor makes of a prompt: placeholders as many as the stock model has features."""
    pictures = [x for row in rows for x in row if isinstance(x, Picture)]
    films = [x for row in rows for x in row if isinstance(x, Film)]
    given: dict[str, Any] = {}
    per_row = [sum(isinstance(x, Picture) for x in row) for row in rows]
    if pictures:
        views = [
            count_views(model, x) if n == 1 else 1
            for row, n in zip(rows, per_row, strict=True)
            for x in row
            if isinstance(x, Picture)
        ]
        pixels = torch.zeros(len(pictures), max(views), 3, SIZE, SIZE, dtype=dtype)
        for i, n in enumerate(views):
            pixels[i, :n] = tiny.images(n, seed=20 + i)
        given["pixel_values"] = pixels
        given["image_sizes"] = torch.tensor([[x.height, x.width] for x in pictures])
        given["batch_num_images"] = torch.tensor([n for n in per_row if n])
    if films:
        given["pixel_values_videos"] = torch.stack(
            [tiny.images(x.frames, seed=40 + i) for i, x in enumerate(films)]
        ).to(dtype)
    with torch.no_grad():
        items = iter_items(stock_items(model, given), rows)
    flat = []
    for row, found in zip(rows, items, strict=True):
        places = iter(found)
        ids: list[int] = []
        for x in row:
            ids += [x] if isinstance(x, int) else [token_of(x)] * len(next(places).features)
        flat.append(ids)
    width = max(map(len, flat))
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(flat):
        live = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[i, live], mask[i, live] = torch.tensor(row), 1
    return given | dict(input_ids=ids, attention_mask=mask)


def token_of(x: Picture | Film) -> int:
    return IMAGE if isinstance(x, Picture) else VIDEO


@dataclass
class Item:
    """One image or video as the stock model sees it, with the importance of its tokens."""

    features: Tensor
    importance: Tensor
    grids: list[tuple[int, int]]
    trailing: int = 0
    places: list[int] | None = None  # of the features in the grids, where some are gone
    kept: list[int] | None = None  # importance order is settled, tokens of the item that enter the language model


def importance_of(model, pixels: Tensor, policy: fk.VFlowOpt) -> Tensor:
    """c + alpha softmax(H) of every patch of every view [V, N]."""
    tower = copy.deepcopy(model.model.vision_tower).double()
    layers, read = tower.encoder.layers, model.config.vision_feature_layer
    attention = layers[(read if read >= 0 else len(layers) + 1 + read) - 1].self_attn
    heads = {}
    for name in ("q_proj", "k_proj"):
        getattr(attention, name).register_forward_hook(
            lambda m, a, out, name=name: heads.update({name: out.unflatten(-1, (attention.num_heads, -1))})
        )
    tower(pixels.double())
    logits = torch.einsum("vihd,vjhd->vhij", heads["q_proj"], heads["k_proj"]) * attention.scale
    maps = logits.softmax(-1).mean(1)  # [V, N, N]; transformers' own eager map is rounded to fp32
    first = maps.shape[1] - SIDE * SIDE  # behind a class token
    found = []
    for view, a in zip(pixels, maps, strict=True):
        received = a.mean(0)[first:]
        hubs = [j for j, x in enumerate(received) if x > policy.hub_threshold * received.mean()]
        hubs = [*range(first), *(first + j for j in hubs)]  # a class token is one
        c = a[hubs, first:].mean(0) if hubs else received
        if policy.entropy_weight:
            c = c + policy.entropy_weight * entropy_of(view, model).softmax(0)
        found.append(c)
    return torch.stack(found)


def bits_of(patch: np.ndarray) -> float:
    """Shannon's entropy of its levels; scikit-image's, which test_patch_entropy.py has, takes ten times as long."""
    share = np.unique(patch, return_counts=True)[1] / patch.size
    return -(share * np.log2(share)).sum()


def entropy_of(view: Tensor, model) -> Tensor:
    clip = "CLIP" in type(model.model.vision_tower).__name__
    mean = [0.48145466, 0.4578275, 0.40821073] if clip else [0.5] * 3
    std = [0.26862954, 0.26130258, 0.27577711] if clip else [0.5] * 3
    color = view.double().numpy() * np.array(std)[:, None, None] + np.array(mean)[:, None, None]
    grey = np.round(np.clip(np.round(color * 255), 0, 255).mean(0)).astype(int)
    patches = [
        bits_of(grey[y : y + PATCH, x : x + PATCH]) for y in range(0, SIZE, PATCH) for x in range(0, SIZE, PATCH)
    ]
    return torch.tensor(patches, dtype=torch.float64)


def stock_items(model, given: dict[str, Any], policy: fk.VFlowOpt | None = None) -> dict[type, list[Item]]:
    """Features of the unpatched model, by kind, with importance as one more channel of what is packed."""
    inner = model.model
    policy = policy or fk.VFlowOpt(retain_ratio=0.5)
    made: dict[type, list[Item]] = {Picture: [], Film: []}
    seen: list[Tensor] = []
    handle = inner.multi_modal_projector.register_forward_hook(lambda m, a, out: seen.append(out))
    try:
        if given.get("pixel_values") is not None:
            names = ("pixel_values", "image_sizes", "batch_num_images")
            made[Picture] = stock_images(model, {k: given[k] for k in names if k in given}, seen, policy)
        if given.get("pixel_values_videos") is not None:
            made[Film] = stock_videos(model, given["pixel_values_videos"], seen, policy)
    finally:
        handle.remove()
    return made


def stock_images(model, given: dict[str, Any], seen: list[Tensor], policy: fk.VFlowOpt) -> list[Item]:
    inner, pixels = model.model, given["pixel_values"]
    expected = inner.get_image_features(**given).pooler_output
    if pixels.dim() == 4:  # LLaVA-1.5
        weights = importance_of(model, pixels, policy)
        return [Item(x, w, [(SIDE, SIDE)]) for x, w in zip(expected, weights, strict=True)]
    alone = [n == 1 for n in given["batch_num_images"] for _ in range(n)]
    sizes = [Picture(*size) for size in given["image_sizes"].tolist()]
    views = [count_views(model, size) if one else 1 for size, one in zip(sizes, alone, strict=True)]
    weights = importance_of(model, torch.cat([p[:n] for p, n in zip(pixels, views, strict=True)]), policy)
    channels = torch.cat([seen[-1], weights[..., None].to(seen[-1].dtype)], -1)
    newline = torch.cat([inner.image_newline, torch.ones(1)])
    packed, _ = inner.pack_image_features(
        channels.split(views), given["image_sizes"], newline, model.config.vision_aspect_ratio
    )
    items = []
    for x, want, n in zip(packed, expected, views, strict=True):
        assert torch.equal(x[:, :-1], want)
        grids = [(SIDE, SIDE)]
        if n > 1:
            columns = 1 + (x[SIDE * SIDE :, :-1] == inner.image_newline).all(1).nonzero()[0].item()
            grids.append(((len(x) - SIDE * SIDE) // columns, columns))
        items.append(Item(x[:, :-1], x[:, -1].double(), grids, trailing=int(n == 1)))
    return items


def stock_videos(model, pixels: Tensor, seen: list[Tensor], policy: fk.VFlowOpt) -> list[Item]:
    inner, (videos, frames) = model.model, pixels.shape[:2]
    expected = inner.get_video_features(pixels).pooler_output
    weights = importance_of(model, pixels.flatten(0, 1), policy)
    channels = torch.cat([seen[-1], weights[..., None].to(seen[-1].dtype)], -1)
    pooled = inner.apply_pooling(channels).reshape(videos, -1, channels.shape[-1])
    side = math.ceil(SIDE / 2)
    items = []
    for x, want in zip(pooled, expected, strict=True):
        assert torch.equal(x[:, :-1], want[: len(x)])
        x = torch.cat([x, torch.cat([inner.image_newline, torch.ones(1)])[None].to(x)])
        items.append(Item(x[:, :-1], x[:, -1].double(), [(side, side)] * frames, trailing=1))
    return items


def iter_items(made: dict[type, list[Item]], rows: list[list]) -> list[list[Item]]:
    """By row of the prompt."""
    kinds = {kind: iter(items) for kind, items in made.items()}
    return [[next(kinds[type(x)]) for x in row if not isinstance(x, int)] for row in rows]


def cells_of(grids: list[tuple[int, int]], edge: float) -> list[tuple]:
    return [(g, int(y // edge), int(x // edge)) for g, (h, w) in enumerate(grids) for y in range(h) for x in range(w)]


def pruned_by_hand(item: Item, budget: int, edge: float | None) -> Item:
    """Try every number of pruned tokens until kept and recycled ones are the budget."""
    count = len(item.features) - item.trailing
    budget -= item.trailing
    weight = item.importance[:count].tolist()
    up = sorted(range(count), key=lambda i: (weight[i], -i))
    cells = cells_of(item.grids, edge or 1e-9)
    cells = cells if item.places is None else [cells[i] for i in item.places]
    for gone in range(count + 1):
        members: dict[tuple, list[int]] = {}
        for i in up[:gone] if edge else []:
            members.setdefault(cells[i], []).append(i)
        if count - gone + len(members) <= budget:
            break
    rows = {i: item.features[i] for i in up[gone:]}
    for group in members.values():
        best = max(group, key=lambda i: (weight[i], -i))
        share = torch.tensor([weight[i] for i in group], dtype=torch.float64).to(item.features).clamp_min(0)
        share = share if share.sum() > 0 else torch.ones_like(share)
        rows[best] = (share[:, None] * item.features[group]).sum(0) / share.sum()
    kept = sorted(sorted(rows, key=lambda i: (-weight[i], i))[:budget])
    last = list(range(count, count + item.trailing))
    features = torch.stack([rows[i] for i in kept] + [item.features[i] for i in last])
    return Item(features, item.importance[kept + last], item.grids, kept=kept + last)


def staged(item: Item, columns: list[int], stages: tuple) -> dict[int, list[int]]:
    """Columns that every stage leaves, by the layer before it."""
    left, cuts = list(range(len(columns))), {}
    for layer, ratio in stages:
        n = max(len(left) - round(len(left) * (1 - ratio)), 1)
        left = sorted(sorted(left, key=lambda i: (-item.importance[i].item(), i))[:n])
        cuts[layer - 1] = [columns[i] for i in left]
    return cuts


class Oracle:
    def __init__(self, model, policy: fk.VFlowOpt) -> None:
        self.model, self.policy = copy.deepcopy(model).double(), policy
        steps = tuple((layer - 1, 0) for layer, _ in policy.llm_stages)
        self.decoder = Decoder(self.model, SimpleNamespace(stages=steps, positions="keep"))
        # Rotary tables are fp32 in the model, which shows at the positions of several hundred tokens.
        self.decoder.close = dict(rtol=1e-4, atol=5e-5)

    def items(self, rows: list[list], inputs: dict[str, Any]) -> list[list[Item]]:
        given = {k: x.double() if "pixel" in k else x for k, x in inputs.items()}
        return [
            [
                pruned_by_hand(
                    item, min(self.policy.budget(len(item.features)), len(item.features)), self.policy.recycle_cell
                )
                for item in row
            ]
            for row in iter_items(stock_items(self.model, given, self.policy), rows)
        ]

    def samples(self, rows: list[list], inputs: dict[str, Any]) -> list[tuple[Tensor, list[Image]]]:
        """Embeddings of every unpadded sample, and its images with what each stage leaves of them."""
        found, table = [], self.model.get_input_embeddings().weight
        for row, items in zip(rows, self.items(rows, inputs), strict=True):
            parts: list[Tensor] = []
            images: list[Image] = []
            length, places = 0, iter(items)
            for x in row:
                if isinstance(x, int):
                    parts.append(table[[x]])
                else:
                    item = next(places)
                    columns = list(range(length, length + len(item.features)))
                    parts.append(item.features.to(table))
                    images.append(Image(columns, -1, staged(item, columns, self.policy.llm_stages)))
                length += len(parts[-1])
            found.append((torch.cat(parts), images))
        return found


POLICIES = {
    "recycling": fk.VFlowOpt(retain_ratio=0.3, **HUBS),
    "no hubs": fk.VFlowOpt(target_tokens=40, hub_threshold=60, recycle_cell=3),
    "all hubs": fk.VFlowOpt(retain_ratio=0.2, hub_threshold=0, recycle_cell=None),
    "entropy": fk.VFlowOpt(retain_ratio=0.4, entropy_weight=-0.4, **HUBS),
    "fewer than cells": fk.VFlowOpt(target_tokens=5, recycle_cell=1.5, hub_threshold=1.6),
    "more than a tile": fk.VFlowOpt(target_tokens=100, **HUBS),
    "one of a tile": fk.VFlowOpt(retain_ratio=0.02, llm_stages=((2, 0.5),), **HUBS),
    "stages": fk.VFlowOpt(retain_ratio=0.5, llm_stages=((1, 0.6), (3, 0.5)), **HUBS),
    "stages alone": fk.VFlowOpt(retain_ratio=1.0, llm_stages=((2, 0.3),), **HUBS),
}


def compare(model, policy, rows, side="left"):
    inputs, oracle = inputs_for(model, rows, side, model.dtype), Oracle(model, policy)
    with fk.patched(model, policy):
        out = model(**inputs)
    for got, sample in zip(out.logits, oracle.samples(rows, inputs), strict=True):
        want, _ = oracle.decoder(*sample)
        live = got[-len(want) :] if side == "left" else got[: len(want)]
        assert_close(live, want.to(got), **oracle.decoder.close)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prompt", PROMPTS)
@torch.no_grad()
def test_onevision(prompt, side):
    compare(tiny.onevision().double(), POLICIES["stages"], PROMPTS[prompt], side)


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_every_setting(policy):
    compare(tiny.onevision().double(), POLICIES[policy], PROMPTS["image, video or none"])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_llava(tower, policy):
    """With a class token and without."""
    model = tiny.llava(tower, text=dict(num_hidden_layers=4)).double()
    rows = [[1, Picture(), 5, Picture(), 7], [1, 9, 3], [1, 9, Picture(), 8]]
    inputs, oracle = llava_inputs(rows), Oracle(model, POLICIES[policy])
    with fk.patched(model, POLICIES[policy]):
        out = model(**inputs)
    for got, sample in zip(out.logits, oracle.samples(rows, inputs), strict=True):
        want, _ = oracle.decoder(*sample)
        assert_close(got[-len(want) :], want, **oracle.decoder.close)


def llava_inputs(rows: list[list]) -> dict[str, Any]:
    count = sum(isinstance(x, Picture) for row in rows for x in row)
    flat = [[t for x in row for t in ([x] if isinstance(x, int) else [IMAGE] * SIDE * SIDE)] for row in rows]
    width = max(map(len, flat))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in flat])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in flat])
    return dict(input_ids=ids, attention_mask=mask, pixel_values=tiny.images(count).double())


@pytest.mark.parametrize("aspect", ["anyres_max_9", "anyres_max_1"])
@torch.no_grad()
def test_resized_tiles(aspect):
    compare(tiny.onevision(vision_aspect_ratio=aspect).double(), POLICIES["stages"], PROMPTS["sizes in a batch"])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("prompt", ["sizes in a batch", "several images", "image, video or none"])
@torch.no_grad()
def test_every_step_of_generate(prompt, beams):
    model, rows, policy = tiny.onevision().double(), PROMPTS[prompt], POLICIES["stages"]
    if beams > 1 and prompt == "several images" and not takes_features(model):
        pytest.skip("transformers 5.17 hands the images of a prompt to its beams in another order")
    inputs, oracle = inputs_for(model, rows), Oracle(model, policy)
    options = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    with fk.patched(model, policy):
        out = model.generate(**inputs, **options, num_beams=beams, output_logits=True)
    assert torch.equal(out.sequences[:, :-3], inputs["input_ids"])
    samples = oracle.samples(rows, inputs)
    if beams == 1:
        check_steps(oracle.decoder, samples, out.sequences[:, -3:], out.logits)
    else:  # the first step, whose beams are all the prompt
        for b, sample in enumerate(samples):
            assert_close(out.logits[0][b * beams].double(), oracle.decoder(*sample)[0][-1], **oracle.decoder.close)


@torch.no_grad()
def test_all_tokens_is_the_stock_model():
    model, rows = tiny.onevision(), PROMPTS["image, video or none"]
    inputs = inputs_for(model, rows, dtype=torch.float32)
    want = model(**inputs).logits
    with fk.patched(model, fk.VFlowOpt(retain_ratio=1.0)):
        assert torch.equal(model(**inputs).logits, want)
    assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("policy", ["recycling", "stages"])
@torch.no_grad()
def test_trace(policy):
    """Kept and recycled tokens, numbered as the unpruned features follow each other."""
    model, rows, policy = tiny.onevision().double(), PROMPTS["sizes in a batch"], POLICIES[policy]
    inputs, oracle = inputs_for(model, rows), Oracle(model, policy)
    with fk.patched(model, policy, record=True):
        model(**inputs)
        first, *later = fk.trace(model).stages
    items = [item for row in oracle.items(rows, inputs) for item in row]
    assert (first.name, first.kept) == ("features", [len(item.kept) for item in items])
    for item, indices, recycled, scores in zip(items, first.indices, first.recycled, first.scores, strict=True):
        kept = indices[indices >= 0].tolist()
        assert kept == item.kept
        assert_close(scores[kept], item.importance, rtol=1e-5, atol=1e-6)
        assert 0 < recycled.sum() < len(kept) and not recycled[len(kept) :].any()
    assert [stage.layer for stage in later] == [layer - 1 for layer, _ in policy.llm_stages]
    for stage, (layer, _) in zip(later, policy.llm_stages, strict=True):
        for item, indices in zip(items, stage.indices, strict=True):
            left = staged(item, item.kept, policy.llm_stages)[layer - 1]
            assert indices[indices >= 0].tolist() == left


@pytest.mark.parametrize("prompt", ["sizes in a batch", "several images", "a video"])
@torch.no_grad()
def test_released_counts(prompt):
    """How many tokens are left is known afterwards; the prompt is as long as the features turn out. Images made of
    tiles are recycled, nothing else.
    """
    model, rows = tiny.onevision(), PROMPTS[prompt]
    inputs = inputs_for(model, rows, dtype=torch.float32)
    settings = dict(llm_stages=((1, 0.5), (3, 0.5)), hub_threshold=1.6, recycle_cell=3.0)
    passes = []
    model.model.vision_tower.register_forward_hook(lambda *_: passes.append(1))
    with fk.patched(model, fk.VFlowOpt.release(0.25, **settings), record=True):
        logits = model(**inputs).logits
        assert len(passes) == 1  # the features that told the counts are those that are used
        first = fk.trace(model).stages[0]
        assert logits.shape[1] < inputs["input_ids"].shape[1]
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=2)
    assert torch.equal(out[:, :-2], inputs["input_ids"])
    for row, (kept, indices) in enumerate(zip(first.kept, first.indices, strict=True)):
        item = [x for items in iter_items(stock_items(model, inputs), rows) for x in items][row]
        tokens, tiled = len(item.features) - item.trailing, len(item.grids) > 1 and prompt != "a video"
        gone = round(tokens * (1 - 0.265103)) + (int(tokens / 9) if tiled else 0)
        recycled = int(first.recycled[row].sum())
        assert kept == tokens - gone + recycled + item.trailing == (indices >= 0).sum()
        assert (recycled > 0) == tiled


@torch.no_grad()
def test_released_counts_leave_a_token():
    """Without recycling, too, where the rounded share of an image is nothing."""
    model, rows = tiny.onevision(), PROMPTS["image, video or none"]
    inputs = inputs_for(model, rows, dtype=torch.float32)
    policy = fk.VFlowOpt(retain_ratio=0.001, recycle_cell=None, counts="release")
    with fk.patched(model, policy, record=True):
        model(**inputs)
        assert fk.trace(model).stages[0].kept == [2]  # the video's newline too


def test_features_made_ahead_serve_their_call_alone():
    """No graph in `generate`; nothing of a failed call, or of pixels that have changed, in the next one."""
    model, rows = tiny.onevision(), PROMPTS["one image"]
    inputs = inputs_for(model, rows, dtype=torch.float32)
    graphs = []
    model.model.vision_tower.register_forward_hook(lambda m, a, out: graphs.append(out.last_hidden_state.requires_grad))
    with fk.patched(model, fk.VFlowOpt.release(0.25, llm_stages=(), hub_threshold=1.6, recycle_cell=3.0)):
        model.generate(**inputs, max_new_tokens=1)
        assert graphs == [False]
        with torch.inference_mode(), pytest.raises(ValueError, match="attention_mask must be"):
            model(**inputs | dict(attention_mask=inputs["attention_mask"][:, 1:]))
        inputs["pixel_values"] *= -1
        logits = model(**inputs).logits
        logits.sum().backward()
        assert torch.equal(model(**inputs | dict(pixel_values=inputs["pixel_values"].clone())).logits, logits)


@torch.no_grad()
def test_a_cut_in_the_language_model_alone():
    """Half of all visual tokens."""
    model, rows = tiny.onevision(), PROMPTS["image, video or none"]
    inputs = inputs_for(model, rows, dtype=torch.float32)
    with fk.patched(model, fk.FlowCut(retain_ratio=0.5, llm_layer=1, encoder_surplus=3), record=True):
        out = model(**inputs)
        (stage,) = fk.trace(model).stages
    full = [len(item.features) for row in iter_items(stock_items(model, inputs), rows) for item in row]
    assert sorted(stage.kept) == sorted(round(n / 2) for n in full) and any(n % 2 for n in full)
    assert out.logits.shape[1] < inputs["input_ids"].shape[1]


def takes_features(model) -> bool:
    return "mm_encoder_outputs" in inspect.signature(model.forward).parameters


@torch.no_grad()
def test_features_of_another_model_have_no_importance():
    model, rows = tiny.llava(text=dict(num_hidden_layers=4)), [[1, Picture(), 5]]
    inputs = {k: x.float() if "pixel" in k else x for k, x in llava_inputs(rows).items()}
    features = model.get_image_features(inputs["pixel_values"])
    if not takes_features(model):
        pytest.skip("transformers 5.17 has no mm_encoder_outputs")
    del inputs["pixel_values"]
    policy = fk.VFlowOpt(retain_ratio=1.0, llm_stages=((1, 0.5),))
    with fk.patched(model, policy), pytest.raises(ValueError, match="importance"):
        model(**inputs, mm_encoder_outputs={"image": features})


def test_bad_models():
    with pytest.raises(ValueError, match="names layer 4, but the language model has 4 layers"):
        fk.patch(tiny.onevision(), fk.VFlowOpt(target_tokens=9, llm_stages=((4, 0.5),)))
    with pytest.raises(ValueError, match="patch the whole model"):
        fk.patch(tiny.siglip_tower(), fk.VFlowOpt(target_tokens=9))


@torch.no_grad()
def test_autocast_leaves_the_references_in_fp32():
    policy = fk.VFlowOpt(target_tokens=9, **HUBS)
    model, inputs = tiny.llava(), llava_inputs([[1, Picture(), 5]])
    pixels, scores = inputs["pixel_values"].float(), []
    for backend in ("reference", "cpp"):
        with fk.patched(model, policy, record=True, backend=backend), torch.autocast("cpu", torch.bfloat16):
            model.get_image_features(pixels)
            scores.append(fk.trace(model).stages[0].scores)
    assert_close(*scores, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(image_sizes=None), "image_sizes is missing"),
        (dict(batch_num_images=torch.tensor([1, 2])), "batch_num_images counts 3 images but image_sizes has 2"),
    ],
    ids=["image_sizes", "batch_num_images"],
)
def test_bad_input(change, message):
    model, rows = tiny.onevision(), PROMPTS["image, video or none"]
    inputs = inputs_for(model, rows, dtype=torch.float32)
    with fk.patched(model, POLICIES["stages"]), pytest.raises(ValueError, match=message):
        model(**inputs | change)


HYBRIDS = {
    "recycling": dict(recycle_cell=2.5, encoder_surplus=3),
    "all in the encoder, stages": dict(llm_stages=((1, 0.6), (3, 0.5))),
    "both": dict(recycle_cell=3.0, adaptive=False, llm_stages=((2, 0.5),)),
    "the encoder drops nothing": dict(recycle_cell=2.5, encoder_surplus=20, llm_stages=((2, 0.5),)),
}


@pytest.mark.parametrize("setting", HYBRIDS)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_hybrid(tower, setting):
    """FlowCut's score inside the encoder, then recycling and stages by it."""
    model = tiny.llava(tower, text=dict(num_hidden_layers=4)).double()
    policy = fk.FlowCut(10, **HYBRIDS[setting])
    rows = [[1, Picture(), 5, Picture(), 7], [1, 9, Picture(), 8]]
    inputs, oracle = llava_inputs(rows), Oracle(model, policy)
    with fk.patched(model, policy, record=True):
        out = model(**inputs)
        stages = fk.trace(model).stages
    # The encoder by itself, with as many tokens as it leaves; its score is what the oracle goes on with.
    left = policy.encoder_budget(SIDE * SIDE)
    if left < SIDE * SIDE:
        alone = fk.FlowCut(left, adaptive=policy.adaptive)
        with fk.patched(model, alone, record=True):
            features = model.get_image_features(inputs["pixel_values"]).pooler_output
            (*_, last) = fk.trace(model).stages
        places, scores = last.indices, last.scores.gather(1, last.indices)
    else:
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        scores = stages[0].scores
        places = torch.arange(SIDE * SIDE).expand(len(features), -1)
    items = [
        pruned_by_hand(Item(x, s, [(SIDE, SIDE)], places=at.tolist()), 10, policy.recycle_cell)
        for x, s, at in zip(features, scores, places, strict=True)
    ]
    oracle.items = lambda *_: [items[:2], items[2:]]
    for got, sample in zip(out.logits, oracle.samples(rows, inputs), strict=True):
        want, _ = oracle.decoder(*sample)
        assert_close(got[-len(want) :], want, **oracle.decoder.close)
    if policy.recycle_cell:
        (stage,) = [stage for stage in stages if stage.name == "features"]
        assert stage.indices.tolist() == [
            [at[i] for i in item.kept] for item, at in zip(items, places.tolist(), strict=True)
        ]
        assert stage.recycled.any()


def test_an_image_that_is_soon_down_to_its_budget_keeps_its_score():
    """Attention so sharp that one of 64 tokens goes at layer 3 of some images and at layer 5 of others."""
    model, pixels = tiny.llava(), tiny.images(8)
    with torch.no_grad():
        for layer in model.model.vision_tower.encoder.layers:
            layer.self_attn.q_proj.weight.mul_(1.5)
    policy = fk.FlowCut(target_tokens=30, encoder_surplus=2.1, recycle_cell=2)
    last = set()
    with fk.patched(model, policy, record=True), torch.no_grad():
        together = model.model.get_image_features(pixels).pooler_output
        for image, features in zip(pixels, together, strict=True):
            alone = model.model.get_image_features(image[None]).pooler_output[0]
            last.add(fk.trace(model).stages[-2].layer)
            assert_close(features, alone, rtol=1e-4, atol=1e-4)
    assert last == {3, 5}
