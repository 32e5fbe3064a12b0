"""PaliGemma: SigLIP read at its end, a linear projector, a Gemma that sees all of the prompt at once."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from tiny import IMAGE, PAD, PATCH, SIDE, VISION, VOCAB
from transformers import (
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from zoo import NO_CLASS_TOKEN, Family, Image, Part, batched_tiles, parts_of, spell, tokenizer, write

EDGE = SIDE * PATCH


def model(
    attention: str | None = "sdpa", dtype: torch.dtype = torch.float32, text_config: type = GemmaConfig, **text: Any
) -> Any:
    settings = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=1,
        head_dim=8, vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**VISION, image_size=EDGE, vision_use_head=False),
        text_config=text_config(**settings | text),
        image_token_index=IMAGE,
        vocab_size=VOCAB,
        projection_dim=32,
        hidden_size=32,
        tie_word_embeddings=False,
    )
    made = PaliGemmaForConditionalGeneration(config)
    if attention is not None:
        made.set_attn_implementation(attention)
    made.generation_config.suppress_tokens = [IMAGE]
    return plain(tiny.fill(made, seed=5)).to(dtype)


@torch.no_grad()
def plain(made: Any) -> Any:
    """A Gemma with norms and embeddings as large as others': it adds 1 to the former, and scales the latter up."""
    for name, weight in made.named_parameters():
        if "norm" in name and ("language_model" in name or "projector" in name):
            weight -= 1
        if "embed_tokens" in name:
            weight /= weight.shape[1] ** 0.5
    return made


def processor() -> PaliGemmaProcessor:
    images = SiglipImageProcessorPil(size=dict(height=EDGE, width=EDGE), image_seq_length=SIDE**2)
    return PaliGemmaProcessor(images, tokenizer(dict(bos_token="w1"), image=IMAGE))


def prompt(rows: list[list[Part]], padding: str = "left") -> dict[str, Any]:
    images = parts_of(rows, Image)
    given = spell(write(rows, lambda part, row: [IMAGE] * SIDE**2), padding)
    given["token_type_ids"] = torch.zeros_like(given["input_ids"])
    if images:
        process = SiglipImageProcessorPil(size=dict(height=EDGE, width=EDGE))
        given |= process([x.pixels for x in images], return_tensors="pt")
    return given


FAMILY = Family(
    name="paligemma",
    model=model,
    prompt=prompt,
    layers=lambda model: model.model.vision_tower.encoder.layers,
    attention=lambda layer: layer.self_attn,
    projector=lambda model: model.model.multi_modal_projector,
    tiles=lambda model, inputs, kind: [[tile] for tile in batched_tiles(len(inputs["pixel_values"]), (SIDE, SIDE))],
    processor=processor,
    refuses=NO_CLASS_TOKEN,
    written_type=1,
    skips=dict(test_conversation="a prompt is all prefix: what was written before would be a part of it"),
)
