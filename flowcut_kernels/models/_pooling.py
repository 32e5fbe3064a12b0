"""Pooling of the squares of patches that a pruned tower left."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..modules.encoder import EncoderPass
from ._bound import Bound
from ._features import pruned_pass


def pooled(pool: Any, rows: Tensor, known: EncoderPass) -> Tensor:
    """Tokens [B, n, D] of a pass, each by a `pool` that makes one place of a square.

    Args:
        rows: their patches [B, n * side^2, C], token by token.
    """
    assert known.left is not None
    squares = rows.reshape(-1, known.side, known.side, rows.shape[-1]).permute(0, 3, 1, 2)
    return pool(squares).flatten(1).unflatten(0, (len(known.left), known.width))


class PooledTokens(Bound):
    """Replacement ``forward`` of what pools the patches of a whole tile."""

    method = "forward"

    def __call__(self, features: Tensor) -> Tensor:
        known = pruned_pass()
        return self.original(features) if known is None else pooled(self.model.pool, features, known)
