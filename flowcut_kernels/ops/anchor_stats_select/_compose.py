"""`anchor_stats_select` from any form of the two operators it is made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..._ops import Relevance, ValueNorm


def compose(
    stats: Callable,
    select: Callable,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    value_anchor: Tensor | None,
    history: Tensor | None,
    lengths: Tensor | None,
    *,
    scale: float,
    protect: int,
    attention: bool,
    relevance: int,
    value_norm: int,
    **selection,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Score, index, new lengths and entropy by any two forms of the operators it is made of."""
    span = None if lengths is None else torch.stack((torch.zeros_like(lengths), lengths), 1)
    weights, related, norm, entropy = stats(
        query, key, value, value_anchor, span, scale=scale, protect=protect, relevance=relevance, value_norm=value_norm
    )
    entropy = entropy[:, 0]
    score, index, new_lengths = select(
        weights[:, 0] if attention else None,
        related[:, 0] if relevance != Relevance.NONE else None,
        norm if value_norm != ValueNorm.NONE else None,
        history,
        entropy,
        lengths,
        protect=protect,
        **selection,
    )
    return score, index, new_lengths, entropy
