"""LLaVA-1.5: a CLIP or SigLIP tower, a projector, a language model; a fixed number of tokens per image."""

from __future__ import annotations

from typing import Any

from transformers import LlavaForConditionalGeneration

from ..modules.encoder import PrunedEncoder
from ..policies.base import Policy
from ._prompt import FixedFeatureLayer, PromptShrinker, PrunedForward, PrunedGenerate, Replacement
from .clip import CLIP, SIGLIP
from .llm import decoder_replacements


class Llava:
    """Adapter of ``LlavaForConditionalGeneration``: layers after the feature layer never run."""

    model_class = LlavaForConditionalGeneration

    def replacements(
        self, model: Any, policy: Policy, *, record: bool, backend: str | None, compact_cache: bool
    ) -> tuple[PrunedEncoder, list[Replacement]]:
        inner, config = model.model, model.config
        tower_model = inner.vision_tower
        tower = next((t for t in (CLIP, SIGLIP) if type(tower_model) is t.model_class), None)
        if tower is None:
            raise ValueError(
                f"vision tower {type(tower_model).__name__} of {type(model).__name__} is not supported: use a model "
                f"with {CLIP.model_class.__name__} or {SIGLIP.model_class.__name__}"
            )
        index, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
        if not isinstance(index, int):
            raise ValueError(
                f"vision_feature_layer={index!r}: several feature layers at once are not supported; use one"
            )
        if strategy == "default" and tower.protect != 1:
            raise ValueError(
                f"vision_feature_select_strategy={strategy!r} drops the first token, but "
                f"{type(tower_model).__name__} has no class token: set 'full'"
            )
        wanted = getattr(policy, "feature_layer", None)
        if wanted not in (None, index):
            raise ValueError(f"feature_layer={wanted} but model.config.vision_feature_layer is {index}; leave it None")
        encoder, replacements = tower.build(tower_model, policy, index, runs_rest=False, record=record, backend=backend)
        patches = tower.patches(tower_model)
        extra = tower.protect if strategy == "full" else 0
        left = policy.encoder_budget(patches)
        shrinker = PromptShrinker(config.image_token_id, patches + extra, left + extra, leading=extra)
        decoder, more = decoder_replacements(
            inner.language_model, policy, patches, encoder, backend=backend, compact_cache=compact_cache
        )
        fixed = dict(vision_feature_layer=index, vision_feature_select_strategy=strategy)
        replacements += [
            (inner, "get_image_features", FixedFeatureLayer(inner, **fixed)),
            (model, "forward", PrunedForward(model, shrinker, decoder)),
            (model, "generate", PrunedGenerate(model, shrinker)),
            *more,
        ]
        return encoder, replacements
