"""LLaVA-1.5: a CLIP or SigLIP tower, a projector, a language model; a fixed number of tokens per image."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import LlavaForConditionalGeneration

from ..modules.encoder import PrunedEncoder
from ..policies.base import Policy
from ._bound import Replacement
from ._features import Kind, Layout, equal_tiles
from ._vlm import vlm_replacements
from .clip import replace_tower


class Llava:
    """Adapter of ``LlavaForConditionalGeneration``: layers after the feature layer never run."""

    model_class = LlavaForConditionalGeneration

    def replacements(
        self, model: Any, policy: Policy, *, record: bool, backend: str | None, compact_cache: bool
    ) -> tuple[PrunedEncoder, list[Replacement]]:
        inner, config = model.model, model.config
        tower, encoder, replacements, fixed = replace_tower(model, policy, record=record, backend=backend)
        patches = tower.patches(inner.vision_tower)
        leading = tower.protect if fixed["vision_feature_select_strategy"] == "full" else 0
        kinds = [LlavaImages(inner, config.image_token_id, patches, leading)]
        replacements += vlm_replacements(
            model, kinds, policy, patches, encoder, fixed, backend=backend, compact_cache=compact_cache
        )
        return encoder, replacements


class LlavaImages(Kind):
    """Every image has the patches of the tower's grid, and with strategy "full" the class token in front."""

    modality, pixels, method = "image", "pixel_values", "get_image_features"

    def __init__(self, model: Any, token_id: int, patches: int, leading: int, side: int = 1) -> None:
        super().__init__(model, token_id)
        self.patches = self.usual = patches
        self.leading, self.side = leading, side

    def layouts(self, pixels: Tensor, arguments: dict[str, Any]) -> list[Layout]:
        return [equal_tiles(1, PrunedEncoder.grid(self.patches))] * len(pixels)
