"""LLaVA-1.5: a CLIP or SigLIP tower, a projector, a language model; a fixed number of tokens per image."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import LlavaForConditionalGeneration

from ..modules.encoder import PrunedEncoder
from ..policies.base import Policy
from ._bound import Replacement
from ._features import Item, Kind, PrunedFeatures
from ._prompt import PromptShrinker, PrunedForward, PrunedGenerate
from .clip import replace_tower
from .llm import decoder_replacements


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
        side = encoder.grid(patches)

        def items(features: Any, arguments: dict[str, Any], importance: Tensor, position: Tensor | None) -> list[Item]:
            return [
                Item(x[leading:], weight, (side,), None if position is None else position[i], x[:leading])
                for i, (x, weight) in enumerate(zip(features, importance, strict=True))
            ]

        def full(arguments: dict[str, Any]) -> list[int]:
            return [patches] * len(arguments["pixel_values"])

        features = PrunedFeatures(inner, "get_image_features", policy, encoder, full, _tiles, items, fixed, backend)
        images = Kind(
            config.image_token_id,
            "image",
            "pixel_values",
            policy,
            features,
            usual=patches,
            leading=leading,
        )
        shrinker = PromptShrinker((config.image_token_id,), images.visuals)
        decoder, more = decoder_replacements(
            inner.language_model, policy, patches, encoder, backend=backend, compact_cache=compact_cache
        )
        replacements += [
            (inner, "get_image_features", features),
            (model, "forward", PrunedForward(model, shrinker, decoder)),
            (model, "generate", PrunedGenerate(model, shrinker)),
            *more,
        ]
        return encoder, replacements


def _tiles(arguments: dict[str, Any]) -> int:
    return len(arguments["pixel_values"])
