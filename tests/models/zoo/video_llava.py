"""Video-LLaVA: a CLIP tower for images and one for frames, whose class tokens the language model gets too."""

from __future__ import annotations

import inspect
from typing import Any

import tiny
import torch
from tiny import IMAGE, PATCH, SIDE, VIDEO, VISION
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
)

from zoo import Family, Image, Part, Tile, Video, batched_tiles, parts_of, spell, tokenizer, without_videos, write

EDGE = SIDE * PATCH
SIZE = dict(height=EDGE, width=EDGE)
# The name of the images' pixels changed with transformers' versions.
NAMES = inspect.signature(VideoLlavaForConditionalGeneration.forward).parameters
PIXELS = "pixel_values" if "pixel_values" in NAMES else "pixel_values_images"


def model(attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    text = LlamaConfig(**tiny.TEXT)
    config = VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=EDGE),
        text_config=text,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        **changes,
    )
    made = VideoLlavaForConditionalGeneration(config)
    made.set_attn_implementation(attention)
    made.generation_config.suppress_tokens = [IMAGE, VIDEO]
    return tiny.fill(made, seed=7).to(dtype)


def processor() -> VideoLlavaProcessor:
    settings = dict(patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    images = VideoLlavaImageProcessor(size=dict(shortest_edge=EDGE), crop_size=SIZE)
    return without_videos(VideoLlavaProcessor, images, None, tokenizer(), **settings)


def prompt(rows: list[list[Part]], padding: str = "left") -> dict[str, Any]:
    def spelled(part: Any, row: list[Part]) -> list[int]:
        return [VIDEO] * (part.frames * (SIDE**2 + 1)) if isinstance(part, Video) else [IMAGE] * SIDE**2

    process, given = CLIPImageProcessorPil(size=SIZE, crop_size=SIZE), spell(write(rows, spelled), padding)
    images, videos = parts_of(rows, Image), parts_of(rows, Video)
    if images:
        given[PIXELS] = process([x.pixels for x in images], return_tensors="pt")["pixel_values"]
    if videos:
        frames = process([frame for x in videos for frame in x.pixels], return_tensors="pt")["pixel_values"]
        given["pixel_values_videos"] = frames.unflatten(0, (len(videos), -1))
    return given


def tiles(model: Any, inputs: dict[str, Any], kind: str) -> list[list[Tile]]:
    if kind == "image":
        return [[tile] for tile in batched_tiles(len(inputs[PIXELS]), (SIDE, SIDE), protect=1)]
    videos, frames = inputs["pixel_values_videos"].shape[:2]
    every = iter(batched_tiles(videos * frames, (SIDE, SIDE), protect=1, leads=1))
    return [[next(every) for _ in range(frames)] for _ in range(videos)]


FAMILY = Family(
    name="video_llava",
    model=model,
    prompt=prompt,
    layers=lambda model: model.model.image_tower.encoder.layers[:-1],
    video_layers=lambda model: model.model.video_tower.encoder.layers[:-1],
    attention=lambda layer: layer.self_attn,
    projector=lambda model: model.model.multi_modal_projector,
    tiles=tiles,
    processor=processor,
    kinds=("image", "video"),
)
