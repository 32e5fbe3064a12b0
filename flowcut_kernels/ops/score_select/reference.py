"""The definition of `score_select` in plain torch (FlowCut, arXiv 2505.19536, section 3: score, history, count)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._ops import Select, any_tensor


def score_select(
    attention: Tensor | None,
    relevance: Tensor | None,
    value_norm: Tensor | None,
    history: Tensor | None,
    entropy: Tensor | None,
    lengths: Tensor | None,
    *,
    history_weight: float,
    protect: int,
    mode: int,
    budget: int,
    divisor: float,
    criteria_weights: Sequence[float] = (1.0, 1.0, 1.0),
    entropy_exponent: float = 2.0,
    budgets: Tensor | None = None,
    block: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fuse the criteria, update the cumulative score, decide the count and pick the tokens in order.

    Candidates of image b are the tokens [protect, lengths_b), n_b groups of `block` in a row; T_b is budgets_b, at
    most `budget`, or `budget`:

    - s = (w_a a / sum a + w_r r / sum r) * g^w_g over the candidates, with the three weights w; criteria that are None
      drop out (the norm alone: s = g^w_g); a term whose sum is 0 contributes 0
    - S = s, or history_weight * history + (1 - history_weight) * s; then the mean of S over each group
    - count c = round_half_even((n - T) / divisor * (1 - h^e)) with the exponent e, c = n - T where divisor = 0, never
      negative; keep k = max(n - c, min(T, n)). FIXED: k = min(T, n)
    - index: 0..protect-1, then the tokens of the k groups of largest S (ties to the lower index) ascending, then -1

    A row whose candidates (or whose entropy, where it decides the count) hold NaN or Inf has new length -1 and an index
    of -1. Powers other than g^1 and h^2 are taken in float64 and rounded once: forms of this operator then agree on
    them to the bit. Shapes and dtypes as in :func:`flowcut_kernels.ops.score_select`.
    """
    first = any_tensor(attention, relevance, value_norm)
    batch, tokens = first.shape
    column = torch.arange(tokens, device=first.device)
    live = (
        torch.full((batch,), tokens, device=first.device)
        if lengths is None
        else lengths.to(torch.int64).clamp_max(tokens)
    )
    candidate = (column >= protect) & (column < live[:, None])

    def share(x: Tensor) -> Tensor:
        x = x.masked_fill(~candidate, 0.0)
        total = x.sum(-1, keepdim=True)
        return torch.where(total == 0, torch.zeros_like(x), x / total)

    given = zip((attention, relevance), criteria_weights, strict=False)
    terms = [weight * share(x) for x, weight in given if x is not None]
    score = sum(terms[1:], terms[0]) if terms else torch.ones_like(first)
    if value_norm is not None:
        score = score * (value_norm if criteria_weights[2] == 1 else _power(value_norm, criteria_weights[2]))
    if history is not None:
        score = history_weight * history + (1 - history_weight) * score
    if block > 1:
        groups = score[:, protect:].unflatten(1, ((tokens - protect) // block, block))
        score = torch.cat([score[:, :protect], (groups.sum(2, keepdim=True) / block).expand_as(groups).flatten(1)], 1)
    # Adding 0 turns -0.0 into +0.0, so that the two tie.
    score = (score + 0.0).masked_fill(~candidate, 0.0)
    finite = score.isfinite().all(-1)

    n = (live - protect).clamp_min(0) // block
    target = torch.full_like(n, budget) if budgets is None else budgets.to(n.dtype).clamp(0, budget)
    floor = torch.minimum(n, target)
    if mode == Select.SCORE_ONLY:
        new_lengths = torch.where(finite, live, -1).to(torch.int32)
        return score, first.new_empty((batch, 0), dtype=torch.int64), new_lengths
    if mode == Select.FIXED or divisor == 0:
        keep = floor
    else:
        assert entropy is not None
        finite = finite & entropy.isfinite()
        surprise = entropy.square() if entropy_exponent == 2 else _power(entropy.clamp_min(0), entropy_exponent)
        count = ((n - target) / divisor * (1 - surprise)).round().clamp_min(0).to(torch.int64)
        if mode == Select.ADAPTIVE_BATCH:
            count = count.max().expand_as(count)
        keep = torch.maximum(n - count, floor)

    # A stable descending sort sends ties to the lower index.
    ranked = score.masked_fill(~candidate, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(candidate).scatter(1, ranked, column < block * keep[:, None])
    chosen = ((chosen & candidate) | (column < protect)) & finite[:, None]

    width = min(protect + block * budget, tokens) if mode == Select.FIXED else tokens
    order = torch.where(chosen, column, tokens).sort(-1).values[:, :width]
    index = order.masked_fill(order == tokens, -1)
    new_lengths = torch.where(finite, chosen.sum(-1), -1).to(torch.int32)
    return score, index, new_lengths


def _power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent, the exponent being of x's precision too, computed in float64 and rounded once."""
    return x.double().pow(torch.full_like(x, exponent)).to(x.dtype)
