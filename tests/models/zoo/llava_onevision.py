"""LLaVA-OneVision: SigLIP, a base view and tiles that are stitched and unpadded, pooled frames."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from tiny import IMAGE, PATCH, SIDE, VIDEO
from transformers import LlavaOnevisionImageProcessorPil, LlavaOnevisionProcessor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from zoo import (
    NO_CLASS_TOKEN,
    Family,
    Image,
    Part,
    Tile,
    Video,
    batched_tiles,
    parts_of,
    spell,
    tokenizer,
    without_videos,
    write,
)

EDGE = SIDE * PATCH
IMAGES = LlavaOnevisionImageProcessorPil(
    size=dict(height=EDGE, width=EDGE),
    image_grid_pinpoints=[[EDGE * h, EDGE * w] for h in (1, 2) for w in (1, 2, 3) if h * w > 1],
)


def processor() -> LlavaOnevisionProcessor:
    settings = dict(num_image_tokens=SIDE**2, vision_feature_select_strategy="full")
    return without_videos(LlavaOnevisionProcessor, IMAGES, tokenizer(), None, **settings)


COUNTS = processor()


def model(attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    return tiny.onevision(attention=attention).to(dtype)


def prompt(rows: list[list[Part]], padding: str = "left") -> dict[str, Any]:
    def spelled(part: Any, row: list[Part]) -> list[int]:
        if isinstance(part, Video):
            return [VIDEO] * (part.frames * ((SIDE + 1) // 2) ** 2 + 1)
        if len(parts_of([row], Image)) > 1:
            return [IMAGE] * (SIDE**2 + 1)
        return [IMAGE] * COUNTS._get_number_of_features(part.height, part.width, EDGE, EDGE)

    given = spell(write(rows, spelled), padding)
    by_row = [images for row in rows if (images := [x.pixels for x in parts_of([row], Image)])]
    if by_row:
        given |= IMAGES(by_row, return_tensors="pt")
    videos = parts_of(rows, Video)
    if videos:
        frames = IMAGES([list(x.pixels) for x in videos], return_tensors="pt")["pixel_values"][:, 0]
        given["pixel_values_videos"] = frames.view(len(videos), -1, *frames.shape[1:])
    return given


def tiles(model: Any, inputs: dict[str, Any], kind: str) -> list[list[Tile]]:
    if kind == "video":
        videos = inputs["pixel_values_videos"]
        counts = [videos.shape[1]] * len(videos)
    else:
        points = model.config.image_grid_pinpoints
        alone = [n == 1 for n in inputs["batch_num_images"].tolist() for _ in range(n)]
        sizes = inputs["image_sizes"].tolist()
        counts = [image_size_to_num_patches(x, points, EDGE) if one else 1 for x, one in zip(sizes, alone, strict=True)]
    every = iter(batched_tiles(sum(counts), (SIDE, SIDE)))
    return [[next(every) for _ in range(count)] for count in counts]


def grids(model: Any, inputs: dict[str, Any], kind: str) -> list[list[tuple[int, int]]]:
    if kind == "video":
        return [[((SIDE + 1) // 2,) * 2] * len(group) for group in tiles(model, inputs, kind)]
    made = []
    for group, size in zip(tiles(model, inputs, kind), inputs["image_sizes"], strict=True):
        if len(group) == 1:
            made.append([(SIDE, SIDE)])
        else:
            lines = [side // EDGE for side in select_best_resolution(size.tolist(), IMAGES.image_grid_pinpoints)]
            patches, rows = COUNTS._get_unpadded_features(*size.tolist(), SIDE, SIDE, *lines)
            made.append([(SIDE, SIDE), (rows, patches // rows + 1)])
    return made


FAMILY = Family(
    name="llava_onevision",
    model=model,
    prompt=prompt,
    layers=lambda model: model.model.vision_tower.encoder.layers,
    attention=lambda layer: layer.self_attn,
    projector=lambda model: model.model.multi_modal_projector,
    tiles=tiles,
    grids=grids,
    processor=processor,
    kinds=("image", "video"),
    refuses=NO_CLASS_TOKEN,
)
