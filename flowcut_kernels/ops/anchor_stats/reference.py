"""The definition of `anchor_stats` in plain torch (FlowCut, arXiv 2505.19536, eqs. of section 3; methods table)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._ops import Relevance, ValueNorm, accumulate_dtype, without_autocast


@without_autocast
def anchor_stats(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    value_anchor: Tensor | None,
    key_span: Tensor | None,
    *,
    scale: float,
    protect: int,
    relevance: int,
    value_norm: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention, relevance, value norm and entropy ratio of R anchors over N tokens.

    With keys of the span [s, e) and scored tokens T = [s + protect, e):

    - a_n = mean_h softmax_{j in [s, e)}(scale * q_h . k_hj)_n for n in T, else 0
    - cosine r_n = (1 + cos(v_a, v_n)) / 2 on the full vectors (cos = 0 for a zero vector);
      softmax r_n = mean_h softmax_{j in [s, e)}(c * v_ah . v_hj)_n with c = 1 or 1/sqrt(d); for n in T, else 0
    - g_n = sum_{h,i} |v_nhi| (full) or sum_i |mean_h v_nhi| (head mean) for n in T, else 0
    - h = -sum_{n in T} p_n ln p_n / ln |T| with p = a / sum_T a and 0 ln 0 = 0; h = 1 where |T| <= 1 or sum_T a = 0

    Shapes and dtypes as in :func:`flowcut_kernels.ops.anchor_stats`.
    """
    dtype = accumulate_dtype(key.dtype)
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    batch, q_heads, anchors, _ = q.shape
    kv_heads, tokens = k.shape[1], k.shape[2]

    column = torch.arange(tokens, device=key.device)
    if key_span is None:
        live = column.expand(batch, tokens) >= 0
        scored = (column >= protect).expand(batch, tokens)
    else:
        start, end = key_span.to(torch.int64).unbind(1)
        live = (column >= start[:, None]) & (column < end[:, None])
        scored = live & (column >= start[:, None] + protect)

    def head_mean_softmax(logits: Tensor) -> Tensor:  # [B, G, H/G, R, N] -> [B, R, N]
        logits = logits.masked_fill(~live[:, None, None, None], float("-inf"))
        # An empty span has only -inf: its softmax would be NaN, its attention is 0.
        peak = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(dtype).min) if tokens else 0.0
        weight = (logits - peak).exp()
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
        return weight.mean((1, 2)).masked_fill(~scored[:, None], 0.0)

    grouped = q.unflatten(1, (kv_heads, q_heads // kv_heads))
    # Dead keys may hold anything, NaN included: zero them before any arithmetic.
    k = k.masked_fill(~live[:, None, :, None], 0.0)
    v = v.masked_fill(~live[:, None, :, None], 0.0)
    attention = head_mean_softmax(scale * grouped @ k.transpose(-1, -2)[:, :, None])

    if relevance == Relevance.NONE:
        relevance_out = attention.new_empty(batch, anchors, 0)
    else:
        assert value_anchor is not None
        anchor = value_anchor.to(dtype)
        products = anchor @ v.transpose(-1, -2)  # [B, G, R, N]
        if relevance == Relevance.COSINE:
            tiny = torch.finfo(dtype).tiny
            v_norm = v.square().sum((1, 3)).sqrt()[:, None]
            a_norm = anchor.square().sum((1, 3)).sqrt()[:, :, None]
            cosine = products.sum(1) / a_norm.clamp_min(tiny) / v_norm.clamp_min(tiny)
            relevance_out = ((1 + cosine) / 2).masked_fill(~scored[:, None], 0.0)
        else:
            factor = value.shape[-1] ** -0.5 if relevance == Relevance.SCALED_SOFTMAX else 1.0
            relevance_out = head_mean_softmax(factor * products[:, :, None])

    if value_norm == ValueNorm.NONE:
        norm_out = attention.new_empty(batch, 0)
    else:
        norm = v.abs().sum((1, 3)) if value_norm == ValueNorm.FULL else v.mean(1).abs().sum(-1)
        norm_out = norm.masked_fill(~scored, 0.0)

    total = attention.sum(-1, keepdim=True)
    p = attention / total.clamp_min(torch.finfo(dtype).tiny)
    count = scored.sum(-1)[:, None].to(dtype)
    entropy = -torch.special.xlogy(p, p).sum(-1) / count.clamp_min(2).log()
    entropy = entropy.masked_fill((count <= 1) | (total[..., 0] == 0), 1.0)
    return attention, relevance_out, norm_out, entropy
