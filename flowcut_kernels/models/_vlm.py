"""What every VLM's patch consists of besides its vision tower's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..modules.packed_encoder import VisionEncoder
from ..policies.base import Policy
from ._bound import Replacement
from ._features import Kind, PrunedFeatures
from ._prompt import PromptShrinker, PrunedForward, PrunedGenerate
from .llm import decoder_replacements


def vlm_replacements(
    model: Any,
    kinds: Iterable[Kind],
    policy: Policy,
    tokens: int,
    encoder: VisionEncoder,
    fixed: dict[str, Any],
    *,
    backend: str | None,
    compact_cache: bool,
    first_position: int = 0,
) -> list[Replacement]:
    """Features of all `kinds` of visuals, prompts, and the language model where `policy` prunes there.

    Args:
        tokens: of an image, the most where they differ.
        fixed: settings that must not change after patching.
        first_position: of a prompt's first token, in the positions that ``forward`` takes.
    """
    features = tuple(PrunedFeatures(kind, policy, encoder, fixed, backend) for kind in kinds)
    shrinker = PromptShrinker(features)
    decoder, layers = decoder_replacements(
        model.model.language_model, policy, tokens, encoder, backend=backend, compact_cache=compact_cache,
        entrance=not all(each.kind.shrinks for each in features),
    )  # fmt: skip
    return [
        *((model.model, each.method, each) for each in features),
        (model, "forward", PrunedForward(model, shrinker, decoder, first_position)),
        (model, "generate", PrunedGenerate(model, shrinker)),
        *layers,
    ]
