"""VipLLaVA: LLaVA whose projector reads several layers of a CLIP tower at once."""

from __future__ import annotations

from typing import Any

from transformers import VipLlavaForConditionalGeneration

from ..modules.encoder import PrunedEncoder
from ..policies.base import Policy
from ._bound import Replacement
from ._vlm import vlm_replacements
from .clip import replace_tower
from .llava import LlavaImages


class VipLlava:
    """Adapter of ``VipLlavaForConditionalGeneration``; budgets count per image.

    The last of the layers that are read is what pruning ends before; of the others, the same tokens are read.
    """

    model_class = VipLlavaForConditionalGeneration

    def replacements(
        self, model: Any, policy: Policy, *, record: bool, backend: str | None, compact_cache: bool
    ) -> tuple[PrunedEncoder, list[Replacement]]:
        tower, encoder, replacements, fixed = replace_tower(model, policy, record=record, backend=backend)
        patches = tower.patches(model.model.vision_tower)
        kinds = [LlavaImages(model.model, model.config.image_token_id, patches, leading=0)]
        replacements += vlm_replacements(
            model, kinds, policy, patches, encoder, fixed, backend=backend, compact_cache=compact_cache
        )
        return encoder, replacements
