"""The definition of `score_select` in plain torch (FlowCut, arXiv 2505.19536, section 3: score, history, count)."""

from __future__ import annotations

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
) -> tuple[Tensor, Tensor, Tensor]:
    """Fuse the criteria, update the cumulative score, decide the count and pick the tokens in order.

    Candidates of image b are the n_b tokens [protect, lengths_b):

    - s = (a / sum a + r / sum r) * g over the candidates; criteria that are None drop out (the norm alone: s = g);
      a term whose sum is 0 contributes 0
    - S = s, or history_weight * history + (1 - history_weight) * s
    - count c = round_half_even((n - T) / divisor * (1 - h^2)), c = n - T where divisor = 0, never negative;
      keep k = max(n - c, min(T, n)). FIXED: k = min(T, n)
    - index: 0..protect-1, then the k candidates of largest S (ties to the lower index) ascending, then -1

    A row whose candidates (or whose entropy, where it decides the count) hold NaN or Inf has new length -1 and an index
    of -1. Shapes and dtypes as in :func:`flowcut_kernels.ops.score_select`.
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

    terms = [share(x) for x in (attention, relevance) if x is not None]
    score = sum(terms[1:], terms[0]) if terms else torch.ones_like(first)
    if value_norm is not None:
        score = score * value_norm
    if history is not None:
        score = history_weight * history + (1 - history_weight) * score
    # Adding 0 turns -0.0 into +0.0, so that the two tie.
    score = (score + 0.0).masked_fill(~candidate, 0.0)
    finite = score.isfinite().all(-1)

    n = (live - protect).clamp_min(0)
    floor = n.clamp_max(budget)
    if mode == Select.SCORE_ONLY:
        new_lengths = torch.where(finite, live, -1).to(torch.int32)
        return score, first.new_empty((batch, 0), dtype=torch.int64), new_lengths
    if mode == Select.FIXED or divisor == 0:
        keep = floor
    else:
        assert entropy is not None
        finite = finite & entropy.isfinite()
        count = ((n - budget) / divisor * (1 - entropy.square())).round().clamp_min(0).to(torch.int64)
        if mode == Select.ADAPTIVE_BATCH:
            count = count.max().expand_as(count)
        keep = torch.maximum(n - count, floor)

    # A stable descending sort sends ties to the lower index.
    ranked = score.masked_fill(~candidate, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(candidate).scatter(1, ranked, column < keep[:, None])
    chosen = ((chosen & candidate) | (column < protect)) & finite[:, None]

    width = min(protect + budget, tokens) if mode == Select.FIXED else tokens
    order = torch.where(chosen, column, tokens).sort(-1).values[:, :width]
    index = order.masked_fill(order == tokens, -1)
    new_lengths = torch.where(finite, chosen.sum(-1), -1).to(torch.int32)
    return score, index, new_lengths
