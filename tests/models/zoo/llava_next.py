"""LLaVA-NeXT: CLIP, a base view and tiles that are stitched and unpadded, a newline behind every row."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from tiny import IMAGE, PATCH, SIDE
from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from zoo import Family, Image, Part, Tile, batched_tiles, parts_of, spell, tokenizer, write

EDGE = SIDE * PATCH
POINTS = [[EDGE, 2 * EDGE], [2 * EDGE, EDGE], [2 * EDGE, 2 * EDGE]]


def processor(points: list[list[int]] = POINTS) -> LlavaNextProcessor:
    size = dict(height=EDGE, width=EDGE)
    images = LlavaNextImageProcessorPil(size=dict(shortest_edge=EDGE), crop_size=size, image_grid_pinpoints=points)
    return LlavaNextProcessor(
        images, tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def model(attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    return tiny.llava_next(attention=attention).to(dtype)


def prompt(rows: list[list[Part]], padding: str = "left") -> dict[str, Any]:
    made, images = processor(), parts_of(rows, Image)

    def spelled(part: Image, row: list[Part]) -> list[int]:
        return [IMAGE] * (made._get_number_of_features(part.height, part.width, EDGE, EDGE) - 1)

    given = spell(write(rows, spelled), padding)
    return given | (made.image_processor([x.pixels for x in images], return_tensors="pt") if images else {})


def tiles(model: Any, inputs: dict[str, Any], kind: str) -> list[list[Tile]]:
    points = model.config.image_grid_pinpoints
    counts = [image_size_to_num_patches(size, points, EDGE) for size in inputs["image_sizes"].tolist()]
    every = iter(batched_tiles(sum(counts), (SIDE, SIDE), protect=1))
    return [[next(every) for _ in range(count)] for count in counts]


def grids(model: Any, inputs: dict[str, Any], kind: str) -> list[list[tuple[int, int]]]:
    made, counts = processor(), []
    for size in inputs["image_sizes"].tolist():
        lines = [side // EDGE for side in select_best_resolution(size, model.config.image_grid_pinpoints)]
        patches, rows = made._get_unpadded_features(*size, SIDE, SIDE, *lines)
        counts.append([(SIDE, SIDE), (rows, patches // rows + 1)])
    return counts


FAMILY = Family(
    name="llava_next",
    model=model,
    prompt=prompt,
    layers=lambda model: model.model.vision_tower.encoder.layers[:-1],
    attention=lambda layer: layer.self_attn,
    projector=lambda model: model.model.multi_modal_projector,
    tiles=tiles,
    grids=grids,
    processor=processor,
)
