"""LLaVA-1.5: CLIP read before its last layer, 64 tokens an image."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from tiny import IMAGE, PATCH, SIDE
from transformers import LlavaImageProcessorPil, LlavaProcessor

from zoo import Family, Image, Part, batched_tiles, parts_of, spell, tokenizer, write

SIZE = dict(height=SIDE * PATCH, width=SIDE * PATCH)


def model(attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    return tiny.llava(attention=attention, text=dict(num_hidden_layers=4)).to(dtype)


def processor() -> LlavaProcessor:
    images = LlavaImageProcessorPil(size=SIZE, crop_size=SIZE)
    return LlavaProcessor(
        images, tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def prompt(rows: list[list[Part]], padding: str = "left") -> dict[str, Any]:
    images = parts_of(rows, Image)
    given = spell(write(rows, lambda part, row: [IMAGE] * SIDE**2), padding)
    if images:
        given |= LlavaImageProcessorPil(size=SIZE, crop_size=SIZE)([x.pixels for x in images], return_tensors="pt")
    return given


FAMILY = Family(
    name="llava",
    model=model,
    prompt=prompt,
    layers=lambda model: model.model.vision_tower.encoder.layers[:-1],
    attention=lambda layer: layer.self_attn,
    projector=lambda model: model.model.multi_modal_projector,
    tiles=lambda model, inputs, kind: [
        [tile] for tile in batched_tiles(len(inputs["pixel_values"]), (SIDE, SIDE), protect=1)
    ],
    processor=processor,
)
