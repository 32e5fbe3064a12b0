"""Models that merge squares of patches by pixel shuffle: a token is a square, and stays or goes as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.encoder import PrunedEncoder
from ..policies.base import Policy
from ._bound import Replacement
from ._features import Encoded, Kind, Layout, ScatteredProjector
from ._tower import Tower
from ._vlm import MANY, vlm_replacements


class ShuffledTiles(Kind):
    """Tiles whose tokens stand one behind another: by itself each is an image."""

    modality, pixels, method = "image", "pixel_values", "get_image_features"
    assembles = True

    def __init__(self, model: Any, token_id: int, side: int, patch: int) -> None:
        super().__init__(model, token_id)
        self.side, self.patch = side, patch

    def tokens(self, pixels: Tensor) -> int:
        """Tokens of a tile."""
        rows, columns = (size // self.patch // self.side for size in pixels.shape[-2:])
        return rows * columns

    def layout(self, pixels: Tensor, tiles: int = 1) -> Layout:
        """Of an image of so many tiles."""
        n = self.tokens(pixels)
        return Layout((PrunedEncoder.grid(n),) * tiles, n, (n,) * tiles, n * tiles)

    def split(self, features: Any, layouts: list[Layout]) -> Sequence[Tensor]:
        whole = features if isinstance(features, Tensor) else torch.cat(list(features))
        return whole.reshape(-1, whole.shape[-1]).split([layout.full for layout in layouts])

    def lengths(self, features: Any, known: Encoded | None) -> list[int]:
        found = super().lengths(features, known)
        if known is None or len({*known.kept}) > 1:
            return found
        return [n for n in known.kept[:1] for _ in range(sum(found) // n)]


def shuffled_replacements(
    model: Any,
    kind: ShuffledTiles,
    tower: Tower,
    tower_model: Any,
    projector: nn.Module,
    policy: Policy,
    fixed: dict[str, Any],
    *,
    record: bool,
    backend: str | None,
    compact_cache: bool,
) -> tuple[PrunedEncoder, list[Replacement]]:
    """All of a model whose tower is read at ``fixed["vision_feature_layer"]``, or behind its last layer."""
    if type(tower_model) is not tower.model_class:
        raise ValueError(
            f"vision tower {type(tower_model).__name__} of {type(model).__name__} is not supported: use a model with "
            f"{tower.model_class.__name__}"
        )
    index, wanted = fixed.get("vision_feature_layer", -1), getattr(policy, "feature_layer", None)
    if wanted not in (None, index):
        raise ValueError(f"feature_layer={wanted} but {type(model).__name__} reads layer {index}; leave it None")
    encoder, replacements = tower.build(
        tower_model, policy, index, runs_rest=False, record=record, backend=backend, side=kind.side
    )
    replacements.append((projector, "forward", ScatteredProjector(projector)))
    replacements += vlm_replacements(
        model, [kind], policy, MANY, encoder, fixed, backend=backend, compact_cache=compact_cache
    )
    return encoder, replacements
