"""A layer's whole decision: `anchor_stats` of one anchor, then `score_select` of what it found."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._library import choose_backend
from ..._ops import LIB, Relevance, Select, ValueNorm, accumulate_dtype
from ..anchor_stats import check_arguments as _check_statistics
from ..score_select import group_options, tuned_options
from ._compose import compose
from .reference import anchor_stats_select as _reference

_MODES = frozenset(Select)


def anchor_stats_select(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    value_anchor: Tensor | None = None,
    *,
    history: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
    protect: int = 0,
    attention: bool = True,
    relevance: Relevance = Relevance.COSINE,
    value_norm: ValueNorm = ValueNorm.FULL,
    criteria_weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    history_weight: float = 0.5,
    mode: Select = Select.FIXED,
    budget: int = 0,
    divisor: float = 0.0,
    entropy_exponent: float = 2.0,
    budgets: Tensor | None = None,
    block: int = 1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Score N tokens by what one anchor thinks of them and pick those to keep; on a GPU a single launch.

    A layer of FlowCut, arXiv 2505.19536, section 3.

    Args:
        query, key, value, value_anchor, scale, protect, relevance, value_norm: as in
            :func:`~flowcut_kernels.ops.anchor_stats`, with one anchor; NONE drops a criterion.
        history, criteria_weights, history_weight, mode, budget, divisor, entropy_exponent, budgets, block: as in
            :func:`~flowcut_kernels.ops.score_select`.
        lengths: live tokens per sample [B] (int32 or int64), protected ones included; None: all N.
        attention: whether the anchor's attention is a criterion (its entropy is computed in any case).
        backend: see docs/install.md; None: ``FLOWCUT_BACKEND`` or "auto".

    Returns:
        Score [B, N], index [B, M] and new lengths [B] of :func:`~flowcut_kernels.ops.score_select`, and the entropy
        ratio [B] of the anchor's attention. On CUDA, ADAPTIVE_BATCH takes two launches for more than one image: its
        count needs the entropy of them all. Definition: ``reference.py``.

    Raises:
        ValueError: arguments that do not fit, naming the argument.
        RuntimeError: an explicitly requested backend that cannot serve these tensors.
    """
    _check_statistics("anchor_stats_select", query, key, value, value_anchor, None, protect, relevance, value_norm)
    tuned = tuned_options("anchor_stats_select", criteria_weights, entropy_exponent)
    if tuned:  # nobody computes a criterion of weight 0
        attention = attention and criteria_weights[0] > 0
        relevance = relevance if criteria_weights[1] else Relevance.NONE
        value_norm = value_norm if criteria_weights[2] else ValueNorm.NONE
    if not (attention or relevance or value_norm):
        raise ValueError(
            "anchor_stats_select: attention=False, relevance=NONE, value_norm=NONE or weights of 0 in "
            f"criteria_weights={criteria_weights} leave no criterion"
        )
    _check(query, key, history, lengths, history_weight, mode, budget, divisor)
    arguments = (query, key, value, value_anchor, history, lengths)
    options: dict[str, Any] = dict(
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        protect=protect,
        attention=attention,
        relevance=int(relevance),
        value_norm=int(value_norm),
        history_weight=float(history_weight),
        mode=int(mode),
        budget=budget,
        divisor=float(divisor),
        **tuned,
        **group_options("anchor_stats_select", key.shape[0], key.shape[2] - protect, key.device, budgets, block),
    )
    choice = choose_backend("anchor_stats_select", backend, key)
    if choice == "reference":
        return _reference(*arguments, **options)
    if choice == "triton" and key.device.type == "cpu":
        return _triton(*arguments, **options)
    return torch.ops.flowcut_kernels.anchor_stats_select.default(*arguments, **options)


def _check(query, key, history, lengths, history_weight, mode, budget, divisor):
    batch, tokens, device = key.shape[0], key.shape[2], key.device
    if query.shape[2] != 1:
        raise ValueError(f"anchor_stats_select: query has {query.shape[2]} anchors; the score follows exactly one")
    if history is not None and (
        history.shape != (batch, tokens) or history.device != device or history.dtype != accumulate_dtype(key.dtype)
    ):
        raise ValueError(
            f"anchor_stats_select: history must be {accumulate_dtype(key.dtype)} [{batch}, {tokens}] on {device}, got "
            f"{history.dtype} {tuple(history.shape)} on {history.device}"
        )
    if lengths is not None and (lengths.shape != (batch,) or lengths.device != device or lengths.is_floating_point()):
        raise ValueError(
            f"anchor_stats_select: lengths must be integer [{batch}] on {device}, got {lengths.dtype} "
            f"{tuple(lengths.shape)} on {lengths.device}"
        )
    if mode not in _MODES:
        raise ValueError(f"anchor_stats_select: mode={mode!r} is unknown: use one of {[k.name for k in Select]}")
    if not 0 <= history_weight <= 1:
        raise ValueError(f"anchor_stats_select: history_weight={history_weight} must lie in 0..1")
    if budget < 0 or divisor < 0:
        raise ValueError(f"anchor_stats_select: budget={budget} and divisor={divisor} must not be negative")


def _cpu(*arguments, **options):
    """The two C++ operators in a row: launches are cheap there."""
    operators = torch.ops.flowcut_kernels
    return compose(operators.anchor_stats.default, operators.score_select.default, *arguments, **options)


def _triton(*arguments, **options):
    from .triton import anchor_stats_select

    return anchor_stats_select(*arguments, **options)


LIB.impl("anchor_stats_select", _reference, "CompositeExplicitAutograd")
LIB.impl("anchor_stats_select", _cpu, "CPU")
LIB.impl("anchor_stats_select", _triton, "CUDA")
