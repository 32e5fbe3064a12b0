"""PaliGemma: a SigLIP tower read at its end, a linear projector, Gemma or Gemma 2 with prefix attention."""

from __future__ import annotations

from typing import Any

from transformers import PaliGemmaForConditionalGeneration

from ..modules.encoder import PrunedEncoder
from ..policies.base import Policy
from ._bound import Replacement
from ._vlm import vlm_replacements
from .clip import SIGLIP, replace_siglip
from .llava import LlavaImages


class PaliGemma:
    """Adapter of ``PaliGemmaForConditionalGeneration``; the budget counts for each image of a prompt."""

    model_class = PaliGemmaForConditionalGeneration

    def replacements(
        self, model: Any, policy: Policy, *, record: bool, backend: str | None, compact_cache: bool
    ) -> tuple[PrunedEncoder, list[Replacement]]:
        inner = model.model
        encoder, replacements = replace_siglip(model, policy, record=record, backend=backend)
        patches = SIGLIP.patches(inner.vision_tower)
        kinds = [LlavaImages(inner, model.config.image_token_id, patches, leading=0)]
        replacements += vlm_replacements(
            model, kinds, policy, patches, encoder, {},
            backend=backend, compact_cache=compact_cache, first_position=1,
        )  # fmt: skip
        return encoder, replacements
