"""InternVL: InternViT with a class token, tiles and a thumbnail in one run of placeholders, 2 x 2 pixel shuffle."""

from __future__ import annotations

import inspect
from typing import Any

import tiny
import torch
from tiny import IMAGE, PAD, PATCH, SIDE, VIDEO
from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    Qwen2Config,
)

from zoo import SQUARES, Family, Image, Part, Tile, batched_tiles, parts_of, spell, tokenizer, without_videos, write

EDGE = SIDE * PATCH
TOKENS = (SIDE // 2) ** 2
START, END = 80, 81
IMAGES = GotOcr2ImageProcessorPil(size=dict(height=EDGE, width=EDGE), crop_to_patches=True, max_patches=6)
VISION = tiny.VISION | dict(image_size=EDGE, use_mean_pooling=False)


def model(attention: str = "sdpa", dtype: torch.dtype = torch.float32, vision: dict | None = None, **changes) -> Any:
    settings = dict(
        vision_config=InternVLVisionConfig(**VISION | (vision or {})),
        text_config=Qwen2Config(**tiny.TEXT),
        image_token_id=IMAGE,
        image_seq_length=TOKENS,
        tie_word_embeddings=False,
    )  # fmt: skip
    made = InternVLForConditionalGeneration(InternVLConfig(**settings | changes))
    made.set_attn_implementation(attention)
    made.generation_config.suppress_tokens = [IMAGE]
    return tiny.fill(made, 6).to(dtype)


def processor() -> InternVLProcessor:
    names = dict(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<ctx>", video_token="<video>"
    )
    names |= dict(start_image_token_id=START, end_image_token_id=END, context_image_token_id=IMAGE)
    words = tokenizer(names, **{"img": START, "/img": END, "ctx": IMAGE, "video": VIDEO})
    return without_videos(InternVLProcessor, IMAGES, words, None, image_seq_length=TOKENS)


def prompt(rows: list[list[Part]], padding: str = "left") -> dict[str, Any]:
    def spelled(part: Any, row: list[Part]) -> list[int]:
        return [START, *[IMAGE] * TOKENS * IMAGES.get_number_of_image_patches(part.height, part.width, {}), END]

    given, images = spell(write(rows, spelled), padding), parts_of(rows, Image)
    if images:
        given["pixel_values"] = IMAGES([x.pixels for x in images], return_tensors="pt")["pixel_values"]
    return given


def runs(ids: torch.Tensor) -> list[int]:
    """Placeholders of each run of them, row by row."""
    found = []
    for row in ids.tolist():
        for before, here in zip([PAD, *row], row, strict=False):
            if here == IMAGE:
                found.append(found.pop() + 1 if before == IMAGE else 1)
    return found


def tiles(model: Any, inputs: dict[str, Any], kind: str) -> list[list[Tile]]:
    counts = [n // TOKENS for n in runs(inputs["input_ids"])]
    every = iter(batched_tiles(sum(counts), (SIDE // 2, SIDE // 2), protect=1, block=4))
    return [[next(every) for _ in range(count)] for count in counts]


FAMILY = Family(
    name="internvl",
    model=model,
    prompt=prompt,
    layers=lambda model: model.model.vision_tower.encoder.layer,
    attention=lambda layer: layer.attention,
    projector=lambda model: model.model.multi_modal_projector,
    tiles=tiles,
    processor=processor,
    refuses=SQUARES,
    skips={}
    if "mm_encoder_outputs" in inspect.signature(InternVLForConditionalGeneration.forward).parameters
    else dict.fromkeys(
        ("test_beams", "test_sampling"), "transformers 5.17 hands the tiles of an image to its beams in another order"
    ),
)
