"""The model and its processor, in transformers' own classes: a CLIP tower, a two-layer projector and a Llama decoder."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor,
                          PreTrainedTokenizerFast)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from .quiz import WORDS
from .scenes import GRID, PATCH, SIZE

WIDTH = 128
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *WORDS]
PAD, BOS, EOS, UNK, IMAGE = range(5)


def config() -> LlavaConfig:
    """Eight vision layers, of which LLaVA reads the seventh, and three language layers."""
    vision = CLIPVisionConfig(image_size=SIZE, patch_size=PATCH, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=8,
                              num_attention_heads=4, hidden_act="gelu", projection_dim=WIDTH)
    text = LlamaConfig(vocab_size=len(VOCABULARY), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=3,
                       num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024, bos_token_id=BOS, eos_token_id=EOS,
                       pad_token_id=PAD, tie_word_embeddings=False)
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=GRID * GRID,
                       vision_feature_layer=-2, vision_feature_select_strategy="default", tie_word_embeddings=False)


def build() -> LlavaForConditionalGeneration:
    """An untrained model (float32). Sine positions and query = key make attention local-ish from the start, which learns faster."""
    model = LlavaForConditionalGeneration(config())
    with torch.no_grad():
        tower = model.model.vision_tower.vision_model if hasattr(model.model.vision_tower, "vision_model") else model.model.vision_tower
        position = tower.embeddings.position_embedding.weight
        position.zero_()[1:] = sine_positions(GRID, WIDTH)
        tower.embeddings.class_embedding.normal_()
        torch.nn.init.normal_(tower.embeddings.patch_embedding.weight, std=0.1)
        for layer in tower.encoder.layers:
            layer.self_attn.q_proj.weight.copy_(layer.self_attn.k_proj.weight)
    return model


def sine_positions(side: int, width: int) -> torch.Tensor:
    """Sine and cosine codes of row and column, [side * side, width]."""
    frequency = torch.pi / side * 2 ** torch.linspace(0, 4, width // 4)
    code = torch.outer(torch.arange(side) + 0.5, frequency)
    code = torch.cat([code.sin(), code.cos()], 1)                                      # [side, width / 2]
    return torch.cat([code[:, None].expand(-1, side, -1), code[None].expand(side, -1, -1)], 2).reshape(side * side, width)


def processor() -> LlavaProcessor:
    """PIL image and text with one `<image>` -> pixel values and expanded placeholders; needs no torchvision."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                        extra_special_tokens={"image_token": "<image>"}, padding_side="left")
    images = CLIPImageProcessorPil(do_resize=True, size={"shortest_edge": SIZE}, do_center_crop=True,
                                   crop_size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(image_processor=images, tokenizer=tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
                          image_token="<image>", num_additional_image_tokens=1)


def pixels(images) -> torch.Tensor:
    """uint8 numpy [B, SIZE, SIZE, 3] -> float32 [B, 3, SIZE, SIZE], as the processor makes them."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1).contiguous()
