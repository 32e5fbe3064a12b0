"""Qwen2-VL, and what Qwen2.5-VL and Qwen3-VL share with it: packed frames of any size, M-RoPE."""

from __future__ import annotations

from functools import partial
from typing import Any

import tiny
import torch
from tiny import END, IMAGE, START, VIDEO
from torch import Tensor
from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil, Qwen2VLProcessor, Qwen3VLProcessor
from transformers.vision_utils import get_vision_window_index

from zoo import NO_CLASS_TOKEN, Family, Image, Part, Tile, Video, parts_of, spell, tokenizer, without_videos, write

SIDE = 2  # patches of a token's edge
PATCHES = Qwen2VLImageProcessorPil(
    patch_size=4, temporal_patch_size=1, merge_size=SIDE, size=dict(shortest_edge=256, longest_edge=4096)
)


PROCESSORS = dict(qwen2_vl=Qwen2VLProcessor, qwen2_5_vl=Qwen2_5_VLProcessor, qwen3_vl=Qwen3VLProcessor)


def model(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    return tiny.qwen(name, attention).to(dtype)


def processor(name: str) -> Any:
    ids = dict(image_pad=IMAGE, video_pad=VIDEO, vision_start=START, vision_end=END)
    words = tokenizer(**{f"|{word}|": i for word, i in ids.items()})
    return without_videos(PROCESSORS[name], PATCHES, words, None)


def prompt(name: str, rows: list[list[Part]], padding: str = "left") -> dict[str, Any]:
    def patches(frames: list) -> tuple[Tensor, list[int]]:
        """[n, C], and the frames, rows and columns of these patches."""
        made = PATCHES(frames, return_tensors="pt")
        return made["pixel_values"], [len(frames), *made["image_grid_thw"][0, 1:].tolist()]

    def spelled(part: Any, row: list[Part]) -> list[int]:
        isvideo = isinstance(part, Video)
        count, height, width = patches(list(part.pixels) if isvideo else [part.pixels])[1]
        frame = [VIDEO if isvideo else IMAGE] * (height * width // SIDE**2)
        if isvideo and name == "qwen3_vl":  # every frame with its time
            return [i for time in range(count) for i in (40 + time, START, *frame, END)]
        return [START, *frame * count, END]

    given = spell(write(rows, spelled), padding)
    ids = given["input_ids"]
    given["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    for kind, pixels, grid, frames in (
        (Image, "pixel_values", "image_grid_thw", lambda part: [part.pixels]),
        (Video, "pixel_values_videos", "video_grid_thw", lambda part: list(part.pixels)),
    ):
        made = [patches(frames(part)) for part in parts_of(rows, kind)]
        if made:
            given |= {pixels: torch.cat([x for x, _ in made]), grid: torch.tensor([grid for _, grid in made])}
    return given


def tiles(model: Any, inputs: dict[str, Any], kind: str) -> list[list[Tile]]:
    grids, visual = inputs[f"{kind}_grid_thw"], model.model.visual
    place = torch.arange(int(grids.prod(1).sum()) // SIDE**2)
    if hasattr(visual, "window_size"):
        order, _ = get_vision_window_index(grids, SIDE, visual.window_size, visual.patch_size)
        place = order.argsort()
    groups, first = [], 0
    for count, height, width in grids.tolist():
        grid, groups = (height // SIDE, width // SIDE), [*groups, []]
        for _ in range(count):
            tokens = place[first : (first := first + grid[0] * grid[1])]
            rows = tokens[:, None] * SIDE**2 + torch.arange(SIDE**2)
            groups[-1].append(Tile(grid, rows, tokens, torch.arange(0)))
    return groups


def positions(model: Any, inputs: dict[str, Any]) -> Tensor:
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    return model.model.get_rope_index(**{name: inputs[name] for name in names if name in inputs})[0]


def family(name: str) -> Family:
    return Family(
        name=name,
        model=partial(model, name),
        prompt=partial(prompt, name),
        layers=lambda model: model.model.visual.blocks,
        attention=lambda block: block.attn,
        projector=lambda model: model.model.visual.merger,
        tiles=tiles,
        processor=partial(processor, name),
        kinds=("image", "video"),
        refuses=NO_CLASS_TOKEN,
        positions=positions,
    )


FAMILY = family("qwen2_vl")
