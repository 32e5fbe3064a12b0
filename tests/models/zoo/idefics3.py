"""Idefics3: SigLIP that takes masks, tiles with text between them, pixel shuffle in the connector."""

from __future__ import annotations

from functools import partial
from typing import Any

import tiny
import torch
from tiny import IMAGE, PAD, PATCH, SIDE
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    Idefics3VisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from zoo import NO_CLASS_TOKEN, Family, Image, Part, Tile, batched_tiles, parts_of, spell, tokenizer, write

EDGE = SIDE * PATCH
TOKENS = (SIDE // 2) ** 2
AROUND, BREAK, GLOBAL, CELL = 80, 81, 82, 83  # fake_token_around_image, newline, <global-img>, <row_1_col_1> and on
TILING = dict(size=dict(longest_edge=2 * EDGE), max_image_size=dict(longest_edge=EDGE))
IMAGES = Idefics3ImageProcessorPil(**TILING)


def build(
    config: type, vision: type, family: type, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes
) -> Any:
    settings = dict(
        vision_config=vision(**tiny.VISION, image_size=EDGE),
        text_config=LlamaConfig(**tiny.TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )  # fmt: skip
    made = family(config(**settings | changes))
    made.set_attn_implementation(attention)
    made.generation_config.suppress_tokens = [IMAGE]
    return tiny.fill(made, 7).to(dtype)


def words() -> PreTrainedTokenizerFast:
    names = {IMAGE: "image", AROUND: "fake_token_around_image", GLOBAL: "global-img", 79: "end_of_utterance"}
    names |= {CELL + 2 * y + x: f"row_{y + 1}_col_{x + 1}" for y in range(2) for x in range(2)}
    return tokenizer(**{name: i for i, name in names.items()})


def processor() -> Idefics3Processor:
    return Idefics3Processor(IMAGES, words(), image_seq_len=TOKENS)


def spelled(part: Image, row: list[Part]) -> list[int]:
    _, height, width = IMAGES.get_number_of_image_patches(part.height, part.width, {})
    ids: list[int] = []
    for y in range(height):
        for x in range(width):
            ids += [AROUND, CELL + y * width + x, *[IMAGE] * TOKENS]
        ids += [BREAK]
    return [*ids, *[BREAK] * (height > 0), AROUND, GLOBAL, *[IMAGE] * TOKENS, AROUND]


def prompt(rows: list[list[Part]], padding: str = "left", images: Any = IMAGES) -> dict[str, Any]:
    given = spell(write(rows, spelled), padding)
    if parts_of(rows, Image):
        by_row = [[x.pixels for x in parts_of([row], Image)] for row in rows]
        given |= images(by_row, return_tensors="pt")
    return given


def tiles(model: Any, inputs: dict[str, Any], kind: str, side: int = 2) -> list[list[Tile]]:
    """An image ends with its overview."""
    before, here = inputs["input_ids"][:, :-1], inputs["input_ids"][:, 1:]
    names = before[(here == IMAGE) & (before != IMAGE)].tolist()
    found: list[list[Tile]] = [[]]
    for name, tile in zip(names, batched_tiles(len(names), (SIDE // side, SIDE // side), block=side**2), strict=True):
        found[-1].append(tile)
        if name == GLOBAL:
            found.append([])
    return found[:-1]


FAMILY = Family(
    name="idefics3",
    model=partial(build, Idefics3Config, Idefics3VisionConfig, Idefics3ForConditionalGeneration),
    prompt=prompt,
    layers=lambda model: model.model.vision_model.encoder.layers,
    attention=lambda layer: layer.self_attn,
    projector=lambda model: model.model.connector,
    tiles=tiles,
    refuses=NO_CLASS_TOKEN,
    sizes=((56, 56), (35, 70), (80, 20)),
    processor=processor,
)
