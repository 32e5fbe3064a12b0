"""Score fusion, cumulative history, entropy-to-count and ordered top-k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._library import choose_backend
from ..._ops import LIB, Select, any_tensor
from .reference import score_select as _reference

_DTYPES = (torch.float32, torch.float64)
_MODES = frozenset(Select)


def score_select(
    attention: Tensor | None,
    relevance: Tensor | None = None,
    value_norm: Tensor | None = None,
    *,
    history: Tensor | None = None,
    entropy: Tensor | None = None,
    lengths: Tensor | None = None,
    criteria_weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    history_weight: float = 0.5,
    protect: int = 0,
    mode: Select = Select.FIXED,
    budget: int = 0,
    divisor: float = 0.0,
    entropy_exponent: float = 2.0,
    budgets: Tensor | None = None,
    block: int = 1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Update the cumulative score S and pick the tokens to keep (FlowCut, arXiv 2505.19536, section 3).

    Args:
        attention, relevance, value_norm: float32 or float64 [B, N], at least one; a missing criterion drops out.
        history: S of the layer before, aligned with these N tokens; None: S = s.
        entropy: entropy ratio h [B]; needed by the adaptive modes while ``divisor`` > 0.
        lengths: live tokens per sample [B] (int32 or int64), protected ones included; None: all N.
        criteria_weights: w of attention, relevance and value norm in s = (w_a a / sum a + w_r r / sum r) * g^w_g,
            finite, not negative; 0 leaves a criterion out, that of a missing one is ignored.
        history_weight: weight of ``history`` in S, 0..1.
        protect: leading tokens that are always kept and never scored (1 for CLS).
        mode: SCORE_ONLY, ADAPTIVE, ADAPTIVE_BATCH or FIXED.
        budget: groups of `block` tokens to end with (T), protected ones not counted.
        divisor: sqrt of the remaining layers; 0 cuts to the budget at once.
        entropy_exponent: e in the share 1 - h^e of (n - T) / divisor that the adaptive modes drop, positive and finite.
        budgets: T of each sample, int32 [B]; ``budget``, the largest of them, is then the limit that shapes follow.
        block: consecutive candidates that stay or go together, with the mean of their S: N - protect and ``lengths`` -
            protect are multiples of it, and n and T count groups.
        backend: see docs/install.md; None: ``FLOWCUT_BACKEND`` or "auto".

    Returns:
        S [B, N], 0 where not a candidate; index int64 [B, M] of kept rows, ascending, then -1, with
        M = 0, N, N or min(protect + block * budget, N) for the four modes; new lengths int32 [B], protected included.
        A sample whose candidates hold NaN or Inf has length -1 and no index (see :func:`raise_if_not_finite`).
        Definition: ``reference.py``.

    Raises:
        ValueError: arguments that do not fit, naming the argument.
        RuntimeError: an explicitly requested backend that cannot serve these tensors.
    """
    _check(attention, relevance, value_norm, history, entropy, lengths, history_weight, protect, mode, budget, divisor)
    tuned = tuned_options("score_select", criteria_weights, entropy_exponent)
    if tuned:
        given = zip((attention, relevance, value_norm), criteria_weights, strict=True)
        attention, relevance, value_norm = (x if weight else None for x, weight in given)
        if attention is None and relevance is None and value_norm is None:
            raise ValueError(f"score_select: criteria_weights={criteria_weights} leaves no criterion that is given")
    first = any_tensor(attention, relevance, value_norm)
    arguments = (attention, relevance, value_norm, history, entropy, lengths)
    options: dict[str, Any] = dict(
        history_weight=float(history_weight),
        protect=protect,
        mode=int(mode),
        budget=budget,
        divisor=float(divisor),
        **tuned,
        **group_options("score_select", first.shape[0], first.shape[1] - protect, first.device, budgets, block),
    )
    choice = choose_backend("score_select", backend, first)
    if choice == "reference":
        return _reference(*arguments, **options)
    if choice == "triton" and first.device.type == "cpu":
        return _triton(*arguments, **options)
    return torch.ops.flowcut_kernels.score_select.default(*arguments, **options)


def raise_if_not_finite(lengths: list[int], where: str) -> None:
    """ValueError for new lengths (as Python integers) that `score_select` marked with -1."""
    bad = [b for b, length in enumerate(lengths) if length < 0]
    if bad:
        raise ValueError(
            f"scores of sample(s) {bad} at {where} hold NaN or Inf: check pixel_values and the weights' dtype "
            "(float16 towers overflow easily; use bfloat16 or float32)"
        )


def tuned_options(op: str, criteria_weights: Sequence[float], entropy_exponent: float) -> dict[str, Any]:
    """The two as options of operator `op`, none where they are its defaults: passing them would take a microsecond.

    Raises:
        ValueError: unless there are three weights >= 0 and the exponent is > 0, all of them finite.
    """
    if criteria_weights == (1.0, 1.0, 1.0) and entropy_exponent == 2.0:
        return {}
    if len(criteria_weights) != 3 or not all(0 <= weight < math.inf for weight in criteria_weights):
        raise ValueError(
            f"{op}: criteria_weights={criteria_weights} must be three finite numbers >= 0 (attention, relevance, "
            "value norm)"
        )
    if not 0 < entropy_exponent < math.inf:
        raise ValueError(f"{op}: entropy_exponent={entropy_exponent} must be a finite number > 0")
    return dict(
        criteria_weights=[float(weight) for weight in criteria_weights], entropy_exponent=float(entropy_exponent)
    )


def group_options(
    op: str, batch: int, candidates: int, device: torch.device, budgets: Tensor | None, block: int
) -> dict[str, Any]:
    """`budgets` and `block` as options of operator `op`, those alone that are not its defaults.

    Raises:
        ValueError: unless block >= 1 divides `candidates` and budgets are int32 [batch] on `device`.
    """
    options: dict[str, Any] = {}
    if budgets is not None:
        if budgets.shape != (batch,) or budgets.dtype != torch.int32 or budgets.device != device:
            raise ValueError(
                f"{op}: budgets must be int32 [{batch}] on {device}, got {budgets.dtype} {tuple(budgets.shape)} on "
                f"{budgets.device}"
            )
        options["budgets"] = budgets
    if block != 1:
        if block < 1 or candidates % block:
            raise ValueError(
                f"{op}: block={block} must be at least 1 and divide the {candidates} tokens behind protect"
            )
        options["block"] = block
    return options


def _check(attention, relevance, value_norm, history, entropy, lengths, history_weight, protect, mode, budget, divisor):
    if attention is None and relevance is None and value_norm is None:
        raise ValueError("score_select: attention, relevance and value_norm are all None; give at least one")
    first = any_tensor(attention, relevance, value_norm)
    shape, dtype, device = first.shape, first.dtype, first.device
    if len(shape) != 2 or dtype not in _DTYPES:
        raise ValueError(
            f"score_select: criteria must be float32 or float64 [batch, tokens], got {dtype} {tuple(shape)}"
        )
    criteria = (("attention", attention), ("relevance", relevance), ("value_norm", value_norm), ("history", history))
    for name, x in criteria:
        if x is None or x is first:
            continue
        if x.shape != shape:
            raise ValueError(f"score_select: {name} must be [batch, tokens] = {tuple(shape)}, got {tuple(x.shape)}")
        if x.dtype != dtype or x.device != device:
            raise ValueError(
                f"score_select: {name} is {x.dtype} on {x.device}; criteria and history must all be {dtype} on {device}"
            )
    batch, tokens = shape
    for name, x in (("entropy", entropy), ("lengths", lengths)):
        if x is not None and (x.shape != (batch,) or x.device != device):
            raise ValueError(f"score_select: {name} must be [{batch}] on {device}, got {tuple(x.shape)} {x.device}")
    if lengths is not None and lengths.is_floating_point():
        raise ValueError(f"score_select: lengths must be an integer tensor, got {lengths.dtype}")
    if entropy is not None and entropy.dtype != dtype:
        raise ValueError(f"score_select: entropy is {entropy.dtype} but the criteria are {dtype}")
    if mode not in _MODES:
        raise ValueError(f"score_select: mode={mode!r} is unknown: use one of {[k.name for k in Select]}")
    if entropy is None and divisor > 0 and mode in (Select.ADAPTIVE, Select.ADAPTIVE_BATCH):
        raise ValueError("score_select: entropy is None; the adaptive modes need it while divisor > 0")
    if not 0 <= history_weight <= 1:
        raise ValueError(f"score_select: history_weight={history_weight} must lie in 0..1")
    if not 0 <= protect <= tokens:
        raise ValueError(f"score_select: protect={protect} must lie in 0..{tokens} (the number of tokens)")
    if budget < 0 or divisor < 0:
        raise ValueError(f"score_select: budget={budget} and divisor={divisor} must not be negative")


def _triton(*arguments, **options):
    from .triton import score_select

    return score_select(*arguments, **options)


LIB.impl("score_select", _reference, "CompositeExplicitAutograd")
LIB.impl("score_select", _triton, "CUDA")
