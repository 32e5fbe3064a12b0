"""What every VLM's patch consists of besides its vision tower's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..modules.encoder import PrunedEncoder
from ..modules.packed_encoder import VisionEncoder
from ..policies.base import Policy
from ._bound import Bound, Replacement, Turns, named
from ._features import HEEDED, Kind, PrunedFeatures, ScatteredProjector
from ._prompt import PromptShrinker, PrunedCandidates, PrunedCriteria, PrunedForward, PrunedGenerate, PrunedProcessors
from .clip import replace_tower
from .llm import decoder_replacements

MANY = 1 << 20  # more tokens than an image or a video has


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
    kinds, turns = tuple(kinds), Turns()
    decoder, layers = decoder_replacements(
        model.get_decoder(), policy, tokens, encoder, backend=backend, compact_cache=compact_cache,
        entrance=not all(kind.shrinks for kind in kinds), leads=max(kind.leads for kind in kinds),
    )  # fmt: skip
    marks = decoder is not None or encoder.record
    features = tuple(PrunedFeatures(kind, policy, encoder, fixed, backend, turns, marks) for kind in kinds)
    shrinker = PromptShrinker(features, turns)
    inner: list[Replacement] = [] if decoder is None else [(model.model, "forward", _Inner(model.model, shrinker))]
    return [
        *((model.model, each.method, each) for each in features),
        *inner,
        (model, "forward", PrunedForward(model, shrinker, decoder, first_position)),
        (model, "generate", PrunedGenerate(model, shrinker)),
        *((model, each.method, each(model)) for each in (PrunedProcessors, PrunedCriteria, PrunedCandidates)),
        *layers,
    ]


class _Inner(Bound):
    """Replacement ``forward`` of what is inside a VLM whose language model drops tokens: by itself it cannot tell that
    one which tokens are an image, nor which of them the encoder left."""

    method = "forward"

    def __init__(self, model: Any, shrinker: PromptShrinker) -> None:
        super().__init__(model)
        self.shrinker = shrinker

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if HEEDED.get() is None and self.shrinker.comes(named(self, args, kwargs)):
            raise ValueError(
                f"images came to a {type(self.model).__name__} by itself, but the policy drops tokens inside the "
                "language model, which has to know the prompt: call the patched model, not its .model"
            )
        return self.original(*args, **kwargs)


def tiled_replacements(
    model: Any, kinds: Iterable[Kind], policy: Policy, *, record: bool, backend: str | None, compact_cache: bool
) -> tuple[PrunedEncoder, list[Replacement]]:
    """All of a LLaVA-like model that puts its images together of tiles."""
    tower, encoder, replacements, fixed = replace_tower(model, policy, record=record, backend=backend)
    if fixed.get("vision_feature_select_strategy") == "full" and tower.protect:
        raise ValueError(
            f"vision_feature_select_strategy='full' leaves the class token of {tower.model_class.__name__} among the "
            "patches, of which no image can be put together: set 'default'"
        )
    projector = model.model.multi_modal_projector
    replacements.append((projector, "forward", ScatteredProjector(projector)))
    replacements += vlm_replacements(
        model, kinds, policy, MANY, encoder, fixed, backend=backend, compact_cache=compact_cache
    )
    return encoder, replacements
