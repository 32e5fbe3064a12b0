"""Triton form of `anchor_stats_select`: the launch of `anchor_stats`, whose last program of an image selects too."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..._ops import Select
from ..anchor_stats.triton import anchor_stats, prepare
from ..score_select.triton import score_select
from ._compose import compose


def anchor_stats_select(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    value_anchor: Tensor | None,
    history: Tensor | None,
    lengths: Tensor | None,
    *,
    mode: int,
    criteria_weights: Sequence[float] = (1.0, 1.0, 1.0),
    entropy_exponent: float = 2.0,
    **options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments, results and definition: ``reference.py``; float32, bfloat16 or float16 inputs."""
    arguments = (query, key, value, value_anchor)
    options |= dict(criteria_weights=criteria_weights, entropy_exponent=entropy_exponent)
    if mode == Select.ADAPTIVE_BATCH:
        if len(key) > 1:
            return compose(anchor_stats, score_select, *arguments, history, lengths, mode=mode, **options)
        mode = Select.ADAPTIVE  # of a single image
    statistics = {name: options.pop(name) for name in ("scale", "relevance", "value_norm", "protect")}
    selection = dict(options, history=history, lengths=lengths, mode=mode)
    *_, entropy, score, index, new_lengths = prepare(*arguments, None, **statistics, selection=selection)()
    return score, index, new_lengths, entropy[:, 0]
