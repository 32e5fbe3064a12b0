"""Gemma 3: squares of 2 x 2 patches of SigLIP averaged, image tokens that see each other, layers with windows."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from tiny import IMAGE, PAD, PATCH, SIDE, VISION, VOCAB
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

import flowcut_kernels as fk
from zoo import NO_CLASS_TOKEN, Family, Image, Part, batched_tiles, parts_of, spell, tokenizer, write
from zoo.paligemma import plain

EDGE, GRID = SIDE * PATCH, (SIDE // 2, SIDE // 2)
TOKENS = GRID[0] * GRID[1]
OPEN, CLOSE = 88, 89  # tokens around an image


def model(attention: str = "sdpa", dtype: torch.dtype = torch.float32, **text: Any) -> Any:
    # The oracle of the suite, which leaves prompts at their length, has no windows: test_gemma3.py has.
    settings = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=1, eos_token_id=2, query_pre_attn_scalar=8,
        sliding_window=512, layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**VISION, image_size=EDGE, vision_use_head=False),
        text_config=Gemma3TextConfig(**settings | text),
        image_token_index=IMAGE,
        boi_token_index=OPEN,
        eoi_token_index=CLOSE,
        mm_tokens_per_image=TOKENS,
        tie_word_embeddings=False,
    )
    made = Gemma3ForConditionalGeneration(config)
    made.set_attn_implementation(attention)
    made.generation_config.suppress_tokens = [IMAGE]
    return plain(tiny.fill(made, seed=6)).to(dtype)


def processor() -> Gemma3Processor:
    names, ids = dict(image_token="<img>", boi_token="<boi>", eoi_token="<eoi>"), dict(img=IMAGE, boi=OPEN, eoi=CLOSE)
    names |= dict(image_token_id=IMAGE, boi_token_id=OPEN, eoi_token_id=CLOSE)
    images = Gemma3ImageProcessorPil(size=dict(height=EDGE, width=EDGE))
    return Gemma3Processor(images, tokenizer(names, **ids), image_seq_length=TOKENS)


def prompt(rows: list[list[Part]], padding: str = "left") -> dict[str, Any]:
    images = parts_of(rows, Image)
    given = spell(write(rows, lambda part, row: [OPEN, *[IMAGE] * TOKENS, CLOSE]), padding)
    given["token_type_ids"] = (given["input_ids"] == IMAGE).long()
    if images:
        process = SiglipImageProcessorPil(size=dict(height=EDGE, width=EDGE))
        given |= process([x.pixels for x in images], return_tensors="pt")
    return given


FAMILY = Family(
    name="gemma3",
    model=model,
    prompt=prompt,
    layers=lambda model: model.model.vision_tower.encoder.layers,
    attention=lambda layer: layer.self_attn,
    projector=lambda model: model.model.multi_modal_projector,
    tiles=lambda model, inputs, kind: [[tile] for tile in batched_tiles(len(inputs["pixel_values"]), GRID, block=4)],
    processor=processor,
    refuses=NO_CLASS_TOKEN
    | dict.fromkeys(
        (fk.FastV, fk.PyramidDrop, fk.SparseVLM), "drops tokens inside the language model, .*Gemma3TextModel"
    ),
)
