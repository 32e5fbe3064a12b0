"""The definition of `attention_with_stats`: torch's SDPA and the definition of `anchor_stats`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..._ops import accumulate_dtype
from ..anchor_stats.reference import anchor_stats


def attention_with_stats(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_anchor: Tensor | None,
    value_anchor: Tensor | None,
    key_span: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    max_seqlen: int | None,
    scale: float,
    protect: int,
    relevance: int,
    value_norm: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o_mh = sum_{n in [s, e)} softmax_n(scale * q_mh . k_hn) v_hn (0 over an empty span), and the anchor's statistics.

    Packed segments are spread to [S, heads, max_seqlen, dim] with the spans [0, length), and the output packed again.
    Statistics: eqs. of FlowCut, arXiv 2505.19536, section 3; see `anchor_stats`.
    Shapes and dtypes as in :func:`flowcut_kernels.ops.attention_with_stats`.
    """
    packed = query.shape[2]
    if cu_seqlens is not None:
        assert max_seqlen is not None
        first, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        row = (first[:, None] + torch.arange(max_seqlen, device=key.device)).clamp_max(packed - 1)
        query, key, value = (x[0, :, row].transpose(0, 1) for x in (query, key, value))
        key_span = torch.stack((torch.zeros_like(end), end - first), 1)

    k, v, mask = key, value, None
    if key_span is not None:
        column = torch.arange(key.shape[2], device=key.device)
        live = (column >= key_span[:, :1]) & (column < key_span[:, 1:])
        k, v = (x.masked_fill(~live[:, None, :, None], 0.0) for x in (key, value))
        # Over an empty span any softmax will do: its values are 0.
        mask = (live | ~live.any(1, keepdim=True))[:, None, None]
    # A branch, not a comparison: with dynamic shapes that would be symbolic, and torch.compile wants a bool.
    gqa = dict(enable_gqa=True) if query.shape[1] != key.shape[1] else {}
    output = scaled_dot_product_attention(query, k, v, attn_mask=mask, scale=scale, **gqa).transpose(1, 2)
    if cu_seqlens is not None:
        token = torch.arange(packed, device=key.device)
        segment = torch.bucketize(token, end, right=True)
        output = output[segment, token - first[segment]][None]

    if query_anchor is None:
        new = lambda *shape: key.new_empty(shape, dtype=accumulate_dtype(key.dtype))  # noqa: E731
        batch, tokens = key.shape[0], key.shape[2]
        return output.contiguous(), new(batch, 0, tokens), new(batch, 0, 0), new(batch, 0), new(batch, 0)
    statistics = anchor_stats(
        query_anchor, key, value, value_anchor, key_span,
        scale=scale, protect=protect, relevance=relevance, value_norm=value_norm,
    )  # fmt: skip
    return output.contiguous(), *statistics
