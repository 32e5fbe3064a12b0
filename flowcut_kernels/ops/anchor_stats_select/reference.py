"""The definition of `anchor_stats_select`: those of `anchor_stats` and `score_select` in a row."""

from __future__ import annotations

from torch import Tensor

from ..anchor_stats.reference import anchor_stats
from ..score_select.reference import score_select
from ._compose import compose


def anchor_stats_select(*arguments, **options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes as in :func:`flowcut_kernels.ops.anchor_stats_select`."""
    return compose(anchor_stats, score_select, *arguments, **options)
