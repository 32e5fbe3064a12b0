"""Idefics3 and SmolVLM: a SigLIP tower that takes masks, pixel shuffle; tiles have text between them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
from transformers.models.idefics3 import modeling_idefics3
from transformers.models.smolvlm import modeling_smolvlm

from ..modules.encoder import PrunedEncoder
from ..policies.base import Policy
from ._bound import Replacement
from ._features import Layout
from ._shuffle import ShuffledTiles, shuffled_replacements
from ._tower import Tower, edge
from .clip import vit_parts

IDEFICS3_VIT, SMOLVLM_VIT = (
    Tower(
        model_class=model_class,
        protect=0,
        feature_layer=-1,
        parts=partial(vit_parts, eager=eager),
        pixel_mean=IMAGENET_STANDARD_MEAN,
        pixel_std=IMAGENET_STANDARD_STD,
        hands_on=False,
    )
    for model_class, eager in (
        (modeling_idefics3.Idefics3VisionTransformer, modeling_idefics3.eager_attention_forward),
        (modeling_smolvlm.SmolVLMVisionTransformer, modeling_smolvlm.eager_attention_forward),
    )
)


class Idefics3:
    """Adapter of ``Idefics3ForConditionalGeneration`` and ``SmolVLMForConditionalGeneration``.

    Budgets count per tile, each a run of placeholders: what reaches the model does not say which tiles are an image.
    The frames of a video are tiles too. Tokens that ``pixel_attention_mask`` hides go first.
    """

    def __init__(self, model_class: type, tower: Tower) -> None:
        self.model_class, self.tower = model_class, tower

    def replacements(
        self, model: Any, policy: Policy, *, record: bool, backend: str | None, compact_cache: bool
    ) -> tuple[PrunedEncoder, list[Replacement]]:
        inner, config = model.model, model.config
        patch = edge(config.vision_config.patch_size)
        kind = Idefics3Tiles(inner, config.image_token_id, config.scale_factor, patch)
        return shuffled_replacements(
            model, kind, self.tower, inner.vision_model, inner.connector.modality_projection, policy, {},
            record=record, backend=backend, compact_cache=compact_cache,
        )  # fmt: skip


class Idefics3Tiles(ShuffledTiles):
    """Tiles of each row of a batch, which is filled up with tiles of zeros."""

    def layouts(self, pixels: Tensor, arguments: dict[str, Any]) -> list[Layout]:
        if pixels.is_meta:
            raise ValueError("pixel_values on the meta device do not say which tiles are filling: give their values")
        real = (pixels != 0).flatten(2).any(-1)
        whole, mask = self.layout(pixels), arguments.get("pixel_attention_mask")
        if mask is None or bool(mask[real].all()):
            return [whole] * int(real.sum())
        seen = torch.nn.functional.max_pool2d(mask[real].float(), self.patch)
        least, most = (torch.nn.functional.max_pool2d(x, self.side).flatten(1) for x in (-seen, seen))
        if bool((-least != most).any()):
            raise ValueError(
                f"pixel_attention_mask ends inside a token, {self.side} x {self.side} patches of {self.patch} pixels: "
                "pad images to multiples of its edge, or unpatch"
            )
        live = most.sum(1).int().tolist()
        return [
            replace(whole, live=(n,), places=n, void=hidden[None], masked=True) if n < whole.tile else whole
            for n, hidden in zip(live, (most == 0).cpu(), strict=True)
        ]


IDEFICS3 = Idefics3(modeling_idefics3.Idefics3ForConditionalGeneration, IDEFICS3_VIT)
SMOLVLM = Idefics3(modeling_smolvlm.SmolVLMForConditionalGeneration, SMOLVLM_VIT)
