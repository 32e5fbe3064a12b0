"""LLaVA-OneVision: SigLIP, a base view and tiles that are stitched and unpadded, pooled frames."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from tiny import IMAGE, PATCH, SIDE, VIDEO
from transformers import LlavaOnevisionImageProcessorPil, LlavaOnevisionProcessor
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

import flowcut_kernels as fk
from zoo import Family, Image, Part, Tile, Video, batched_tiles, parts_of, spell, write

EDGE = SIDE * PATCH
IMAGES = LlavaOnevisionImageProcessorPil(
    size=dict(height=EDGE, width=EDGE),
    image_grid_pinpoints=[[EDGE * h, EDGE * w] for h in (1, 2) for w in (1, 2, 3) if h * w > 1],
)


def model(attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    return tiny.onevision(attention=attention).to(dtype)


def prompt(rows: list[list[Part]], padding: str = "left") -> dict[str, Any]:
    # The processor wants a video processor, which needs torchvision; its count of an image's tokens does not.
    counts = object.__new__(LlavaOnevisionProcessor)
    counts.image_processor, counts.num_image_tokens, counts.vision_aspect_ratio = IMAGES, SIDE**2, "anyres_max_9"

    def spelled(part: Any, row: list[Part]) -> list[int]:
        if isinstance(part, Video):
            return [VIDEO] * (part.frames * ((SIDE + 1) // 2) ** 2 + 1)
        if len(parts_of([row], Image)) > 1:
            return [IMAGE] * (SIDE**2 + 1)
        return [IMAGE] * counts._get_number_of_features(part.height, part.width, EDGE, EDGE)

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


FAMILY = Family(
    name="llava_onevision",
    model=model,
    prompt=prompt,
    layers=lambda model: model.model.vision_tower.encoder.layers,
    attention=lambda layer: layer.self_attn,
    projector=lambda model: model.model.multi_modal_projector,
    tiles=tiles,
    kinds=("image", "video"),
    policies=(fk.VFlowOpt,),
)
