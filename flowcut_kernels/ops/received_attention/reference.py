"""The definition of `received_attention` in plain torch (VFlowOpt, arXiv 2508.05211: the hubs of context relevance)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._ops import accumulate_dtype, without_autocast

_ROWS = 64


@without_autocast
def received_attention(
    query: Tensor, key: Tensor, lse: Tensor | None, lengths: Tensor | None, *, scale: float
) -> Tensor:
    """received[b, j] = mean over heads h and live rows i of softmax_{j < n}(scale * q_bhi . k_bgj)_j, g = h // (H / G).

    n = lengths[b]; with `lse` the softmax is exp(scale * q_bhi . k_bgj - lse_bhi). 0 for j >= n. In blocks of rows:
    memory is linear in N. Shapes and dtypes as in :func:`flowcut_kernels.ops.received_attention`.
    """
    dtype = accumulate_dtype(key.dtype)
    batch, heads, tokens, _ = query.shape
    count = lengths if lengths is not None else torch.full((batch,), tokens, device=key.device)
    live = torch.arange(tokens, device=key.device) < count[:, None]
    # Dead tokens may hold anything, NaN included: zero them before any arithmetic.
    q, k = (x.to(dtype).masked_fill(~live[:, None, :, None], 0.0) for x in (query, key))
    q = q.unflatten(1, (key.shape[1], -1))

    received = q.new_zeros(batch, tokens)
    for first in range(0, tokens, _ROWS):
        rows = slice(first, first + _ROWS)
        logits = scale * q[:, :, :, rows] @ k.transpose(-1, -2)[:, :, None]  # [B, G, H/G, rows, N]
        logits = logits.flatten(1, 2).masked_fill_(~live[:, None, None], float("-inf"))
        weight = logits.softmax(-1) if lse is None else (logits - lse[:, :, rows, None]).exp()
        received += weight.masked_fill(~live[:, None, rows, None], 0.0).sum((1, 2))
    return received / (heads * count.clamp(1, max(tokens, 1)))[:, None]
