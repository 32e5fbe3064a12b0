"""LLaVA-NeXT-Video: images of a base view and tiles, and frames pooled in squares before the projector."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from tiny import IMAGE, PATCH, SIDE, VIDEO, VISION
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
)

from zoo import (
    SQUARES,
    Family,
    Image,
    Part,
    Tile,
    Video,
    batched_tiles,
    llava_next,
    parts_of,
    spell,
    tokenizer,
    without_videos,
    write,
)

EDGE, POOL = SIDE * PATCH, 2
SIZE = dict(height=EDGE, width=EDGE)
POINTS = [[EDGE * h, EDGE * w] for h, w in ((1, 2), (2, 1), (2, 2), (1, 3))]
IMAGES = llava_next.processor(POINTS)


def model(attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    text = LlamaConfig(**tiny.TEXT)
    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=EDGE),
        text_config=text,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=POINTS,
        **dict(spatial_pool_stride=POOL) | changes,
    )
    made = LlavaNextVideoForConditionalGeneration(config)
    made.set_attn_implementation(attention)
    made.generation_config.suppress_tokens = [IMAGE, VIDEO]
    return tiny.fill(made, seed=8).to(dtype)


def processor() -> LlavaNextVideoProcessor:
    settings = dict(patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    return without_videos(LlavaNextVideoProcessor, None, IMAGES.image_processor, tokenizer(), **settings)


def prompt(rows: list[list[Part]], padding: str = "left") -> dict[str, Any]:
    def spelled(part: Any, row: list[Part]) -> list[int]:
        if isinstance(part, Video):
            return [VIDEO] * (part.frames * (SIDE // POOL) ** 2)
        return [IMAGE] * (IMAGES._get_number_of_features(part.height, part.width, EDGE, EDGE) - 1)

    given = spell(write(rows, spelled), padding)
    images, videos = parts_of(rows, Image), parts_of(rows, Video)
    if images:
        given |= IMAGES.image_processor([x.pixels for x in images], return_tensors="pt")
    if videos:
        process = CLIPImageProcessorPil(size=SIZE, crop_size=SIZE)
        frames = process([frame for x in videos for frame in x.pixels], return_tensors="pt")["pixel_values"]
        given["pixel_values_videos"] = frames.unflatten(0, (len(videos), -1))
    return given


def tiles(model: Any, inputs: dict[str, Any], kind: str) -> list[list[Tile]]:
    if kind == "image":
        return llava_next.tiles(model, inputs, kind)
    videos, frames = inputs["pixel_values_videos"].shape[:2]
    every = iter(batched_tiles(videos * frames, (SIDE // POOL, SIDE // POOL), protect=1, block=POOL**2))
    return [[next(every) for _ in range(frames)] for _ in range(videos)]


def grids(model: Any, inputs: dict[str, Any], kind: str) -> list[list[tuple[int, int]]]:
    if kind == "video":
        return [[tile.grid for tile in group] for group in tiles(model, inputs, kind)]
    return llava_next.grids(model, inputs, kind)


FAMILY = Family(
    name="llava_next_video",
    model=model,
    prompt=prompt,
    layers=lambda model: model.model.vision_tower.encoder.layers[:-1],
    attention=lambda layer: layer.self_attn,
    projector=lambda model: model.model.multi_modal_projector,
    tiles=tiles,
    grids=grids,
    processor=processor,
    kinds=("image", "video"),
    refuses=SQUARES,
)
