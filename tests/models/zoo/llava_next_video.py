"""LLaVA-NeXT-Video: images of a base view and tiles, and frames pooled in squares before the projector."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from tiny import IMAGE, PAD, PATCH, SIDE, VIDEO, VISION, VOCAB
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
)
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next_video.modeling_llava_next_video import image_size_to_num_patches

from zoo import Family, Image, Part, Tile, Video, batched_tiles, parts_of, spell, write

EDGE, POOL = SIDE * PATCH, 2
SIZE = dict(height=EDGE, width=EDGE)
POINTS = [[EDGE * h, EDGE * w] for h, w in ((1, 2), (2, 1), (2, 2), (1, 3))]
IMAGES = LlavaNextImageProcessorPil(size=dict(shortest_edge=EDGE), crop_size=SIZE, image_grid_pinpoints=POINTS)
# The processor wants a video processor, which needs torchvision; its count of an image's tokens does not.
COUNTS = object.__new__(LlavaNextProcessor)
COUNTS.image_processor, COUNTS.patch_size, COUNTS.num_additional_image_tokens = IMAGES, PATCH, 0


def model(attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    text = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
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


def prompt(rows: list[list[Part]], padding: str = "left") -> dict[str, Any]:
    def spelled(part: Any, row: list[Part]) -> list[int]:
        if isinstance(part, Video):
            return [VIDEO] * (part.frames * (SIDE // POOL) ** 2)
        return [IMAGE] * COUNTS._get_number_of_features(part.height, part.width, EDGE, EDGE)

    given = spell(write(rows, spelled), padding)
    images, videos = parts_of(rows, Image), parts_of(rows, Video)
    if images:
        given |= IMAGES([x.pixels for x in images], return_tensors="pt")
    if videos:
        process = CLIPImageProcessorPil(size=SIZE, crop_size=SIZE)
        frames = process([frame for x in videos for frame in x.pixels], return_tensors="pt")["pixel_values"]
        given["pixel_values_videos"] = frames.unflatten(0, (len(videos), -1))
    return given


def tiles(model: Any, inputs: dict[str, Any], kind: str) -> list[list[Tile]]:
    if kind == "video":
        videos, frames = inputs["pixel_values_videos"].shape[:2]
        every = iter(batched_tiles(videos * frames, (SIDE // POOL, SIDE // POOL), protect=1, block=POOL**2))
        counts = [frames] * videos
    else:
        sizes, points = inputs["image_sizes"].tolist(), model.config.image_grid_pinpoints
        counts = [image_size_to_num_patches(size, points, EDGE) for size in sizes]
        every = iter(batched_tiles(sum(counts), (SIDE, SIDE), protect=1))
    return [[next(every) for _ in range(count)] for count in counts]


def grids(model: Any, inputs: dict[str, Any], kind: str) -> list[list[tuple[int, int]]]:
    if kind == "video":
        return [[tile.grid for tile in group] for group in tiles(model, inputs, kind)]
    made = []
    for size in inputs["image_sizes"].tolist():
        lines = [side // EDGE for side in select_best_resolution(size, POINTS)]
        patches, rows = COUNTS._get_unpadded_features(*size, SIDE, SIDE, *lines)
        made.append([(SIDE, SIDE), (rows, patches // rows + 1)])
    return made


FAMILY = Family(
    name="llava_next_video",
    model=model,
    prompt=prompt,
    layers=lambda model: model.model.vision_tower.encoder.layers[:-1],
    attention=lambda layer: layer.self_attn,
    projector=lambda model: model.model.multi_modal_projector,
    tiles=tiles,
    grids=grids,
    kinds=("image", "video"),
)
