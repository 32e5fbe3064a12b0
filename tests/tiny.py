"""Tiny models with fixed weights whose attention is far from uniform, so that choosing tokens matters."""

from __future__ import annotations

import numpy as np
import torch
from golden_cases import SQRT3, drawn, encoder_tensor
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

LAYERS, SIDE, PATCH = 8, 8, 7
PATCHES = SIDE * SIDE
IMAGE, VIDEO, PAD, VOCAB = 90, 91, 0, 96  # token ids
GAINS = dict(qk=(1.5, 2.6), v=0.7, out=0.5, mlp=0.6, pos=0.6, cls=0.7, patch=1.0)
# The mean of all queries is short, so an encoder without a class token needs more for the same entropy.
GAINS_MEAN = GAINS | dict(qk=(4.0, 6.0))
VISION = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=LAYERS, patch_size=PATCH)
TEXT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> nn.Module:
    """Set every parameter by its name: encoders as the golden weights, the rest with logits far from uniform."""
    names = [name for name, _ in model.named_parameters()]
    gains = GAINS if any(name.endswith(("class_embedding", "cls_token")) for name in names) else GAINS_MEAN
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        parts = ("language_model", "text_model", "lm_head", "projector", "connector", "merger", "head.", "newline")
        if any(part in name for part in parts):
            if parameter.dim() == 1 and name.endswith("weight"):
                value = drawn(name, seed, shape, 0.1, 1.0)
            elif "embed_tokens" in name or "newline" in name:
                value = drawn(name, seed, shape, SQRT3)
            elif parameter.dim() == 1:
                value = drawn(name, seed, shape, 0.05)
            else:
                gain = 2.0 if "lm_head" in name or "q_proj" in name or "k_proj" in name else 1.0
                value = drawn(name, seed, shape, gain * SQRT3 / np.sqrt(shape[-1]))
        else:
            value = encoder_tensor(name, shape, seed, gains, LAYERS)
        parameter.copy_(value)
    return model.eval()


def clip_tower(attention: str = "sdpa", seed: int = 1, side: int = SIDE, **changes) -> CLIPVisionModel:
    model = CLIPVisionModel(CLIPVisionConfig(**(VISION | dict(image_size=side * PATCH) | changes)))
    model.set_attn_implementation(attention)
    return fill(model, seed)


def siglip_tower(attention: str = "sdpa", seed: int = 2, side: int = SIDE, **changes) -> SiglipVisionModel:
    model = SiglipVisionModel(SiglipVisionConfig(**(VISION | dict(image_size=side * PATCH) | changes)))
    model.set_attn_implementation(attention)
    return fill(model, seed)


TOWERS = dict(clip=clip_tower, siglip=siglip_tower)


def llava(
    tower: str = "clip",
    attention: str = "sdpa",
    seed: int = 3,
    *,
    side: int = SIDE,
    text_config: type = LlamaConfig,
    text: dict | None = None,
    **changes,
) -> LlavaForConditionalGeneration:
    """LLaVA with a GQA Llama. CLIP is read at layer -2 without its class token, SigLIP at -1 in full."""
    vision = (CLIPVisionConfig if tower == "clip" else SiglipVisionConfig)(**VISION, image_size=side * PATCH)
    settings = TEXT | dict(num_hidden_layers=2)
    facts = (
        dict(vision_feature_layer=-2)
        if tower == "clip"
        else dict(vision_feature_layer=-1, vision_feature_select_strategy="full")
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(**(settings | (text or {}))),
        image_token_index=IMAGE,
        image_seq_length=side * side,
        **(facts | changes),
    )
    model = LlavaForConditionalGeneration(config)
    model.set_attn_implementation(attention)
    model.generation_config.suppress_tokens = [IMAGE]  # trained models do not write placeholders
    return fill(model, seed)


def llava_next(attention: str = "sdpa", seed: int = 5, **changes) -> LlavaNextForConditionalGeneration:
    """LLaVA-NeXT with CLIP, read at layer -2, and a GQA Llama of four layers; up to 2 x 2 tiles."""
    size = SIDE * PATCH
    settings = dict(
        vision_config=CLIPVisionConfig(**VISION, image_size=size),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        image_grid_pinpoints=[[size, 2 * size], [2 * size, size], [2 * size, 2 * size]],
    )  # fmt: skip
    model = LlavaNextForConditionalGeneration(LlavaNextConfig(**(settings | changes)))
    model.set_attn_implementation(attention)
    model.generation_config.suppress_tokens = [IMAGE]
    return fill(model, seed)


def vipllava(attention: str = "sdpa", seed: int = 6, **changes) -> VipLlavaForConditionalGeneration:
    """VipLLaVA with CLIP, read at four layers, and a GQA Llama of four layers."""
    settings = dict(
        vision_config=CLIPVisionConfig(**VISION, image_size=SIDE * PATCH),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layers=[-2, -4, -6, 2],
    )  # fmt: skip
    model = VipLlavaForConditionalGeneration(VipLlavaConfig(**(settings | changes)))
    model.set_attn_implementation(attention)
    model.generation_config.suppress_tokens = [IMAGE]
    return fill(model, seed)


def onevision(attention: str = "sdpa", seed: int = 4, **changes) -> LlavaOnevisionForConditionalGeneration:
    """LLaVA-OneVision with SigLIP and a GQA Qwen2 of four layers; up to 2 x 3 tiles."""
    size = SIDE * PATCH
    settings = dict(
        vision_config=SiglipVisionConfig(**VISION, image_size=size),
        text_config=Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[size * h, size * w] for h in (1, 2) for w in (1, 2, 3) if h * w > 1],
        vision_feature_layer=-1,
    )  # fmt: skip
    model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**(settings | changes)))
    model.set_attn_implementation(attention)
    model.generation_config.suppress_tokens = [IMAGE, VIDEO]
    return fill(model, seed)


QWENS = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
}
START, END = 92, 93  # ids around an image or a video


def qwen(family: str, attention: str = "sdpa", seed: int = 5, **vision) -> nn.Module:
    """A Qwen-VL of six vision layers and four of a GQA decoder; patches of 4 x 4, windows of 3 x 3 tokens."""
    settings = dict(depth=6, num_heads=4, patch_size=4, temporal_patch_size=1, spatial_merge_size=2)
    if family == "qwen2_vl":
        settings |= dict(embed_dim=32, hidden_size=48, mlp_ratio=2)
    else:
        settings |= dict(hidden_size=32, out_hidden_size=48, intermediate_size=48)
    if family == "qwen2_5_vl":
        settings |= dict(window_size=24, fullatt_block_indexes=[2, 5])
    if family == "qwen3_vl":
        settings |= dict(num_position_embeddings=64, deepstack_visual_indexes=[1, 3])
    text = dict(
        hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=12, vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 2, 2]),
    )  # fmt: skip
    config, made = QWENS[family]
    model = made(
        config(
            vision_config=settings | vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO,
            vision_start_token_id=START, vision_end_token_id=END,
        )
    )  # fmt: skip
    model.set_attn_implementation(attention)
    model.generation_config.suppress_tokens = [IMAGE, VIDEO]
    fill(model, seed)
    with torch.no_grad():
        visual = model.model.visual
        visual.patch_embed.proj.weight /= visual.patch_embed.proj.weight[0, 0].numel() ** 0.5
        for block in visual.blocks:  # queries and keys
            block.attn.qkv.weight[: -block.attn.proj.in_features] *= 5
    return model


def images(count: int, seed: int = 0, side: int = SIDE) -> torch.Tensor:
    """Different pixels for every image, the same for the same seed."""
    size = side * PATCH
    return torch.stack([drawn("pixel_values", 100 * seed + i, (3, size, size), 1.8) for i in range(count)])
