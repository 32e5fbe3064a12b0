"""The model and its processor, in transformers' own classes: CLIP tower, two-layer projector, Llama decoder."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AttentionInterface,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from .quiz import WORDS
from .scenes import GRID, PATCH, SIZE

WIDTH, TEXT_WIDTH = 128, 96
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *WORDS]
PAD, BOS, EOS, UNK, IMAGE = range(5)


def config() -> LlavaConfig:
    """Eight vision layers, of which LLaVA reads the seventh, and twelve narrow language layers."""
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=8,
        num_attention_heads=4,
        hidden_act="gelu",
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=12,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=1024,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=False,
        initializer_range=0.06,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def build(seed: int) -> LlavaForConditionalGeneration:
    """An untrained model in float32."""
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config())


def processor() -> LlavaProcessor:
    """PIL image and text with one `<image>` -> pixel values and expanded placeholders; needs no torchvision."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    images = CLIPImageProcessorPil(
        do_resize=True,
        size={"shortest_edge": SIZE},
        do_center_crop=True,
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def pixels(images) -> torch.Tensor:
    """uint8 numpy [B, SIZE, SIZE, 3] -> float32 [B, 3, SIZE, SIZE], as the processor makes them."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1).contiguous()


def _attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Plain attention. On CPUs with bfloat16 matrix units it trains twice as fast as scaled_dot_product_attention."""
    score = torch.matmul(query * scaling, key.transpose(-1, -2))
    if attention_mask is not None:
        score = score + attention_mask.to(score.dtype)
    return torch.matmul(score.softmax(-1), value).transpose(1, 2).contiguous(), None


AttentionInterface.register("plain", _attention)
