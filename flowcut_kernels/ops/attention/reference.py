"""The definition of `attention`: torch's scaled_dot_product_attention over a span of live keys."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attention(query: Tensor, key: Tensor, value: Tensor, key_span: Tensor | None, *, scale: float) -> Tensor:
    """out[b, m, h] = sum_{n in [s, e)} softmax_{n in [s, e)}(scale * q_bhm . k_bgn)_n v_bgn with g = h // (H / G).

    Zeros where the span is empty. Shapes and dtypes as in :func:`flowcut_kernels.ops.attention`.
    """
    mask = None
    if key_span is not None:
        column = torch.arange(key.shape[2], device=key.device)
        live = (column >= key_span[:, :1]) & (column < key_span[:, 1:])
        mask = live[:, None, None]
        # Dead keys, and the queries of an empty span, may hold anything, NaN included: zero them before any arithmetic.
        key, value = (x.masked_fill(~live[:, None, :, None], 0.0) for x in (key, value))
        query = query.masked_fill(~live.any(-1)[:, None, None, None], 0.0)
    grouped = query.shape[1] != key.shape[1]
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()
