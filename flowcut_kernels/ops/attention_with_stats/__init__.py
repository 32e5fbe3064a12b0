"""Attention and, from the same launch, what an anchor token thinks of the keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._library import choose_backend
from ..._ops import LIB, Relevance, ValueNorm
from .reference import attention_with_stats as _reference

# Head dimensions beyond this would need other tiles; no vision encoder has them.
_WIDEST = 128


def attention_with_stats(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_anchor: Tensor | None = None,
    value_anchor: Tensor | None = None,
    *,
    key_span: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    protect: int = 0,
    relevance: Relevance = Relevance.COSINE,
    value_norm: ValueNorm = ValueNorm.FULL,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Full (not causal) attention of M queries over N keys, and `anchor_stats` of one anchor over the same keys.

    Args:
        query: [B, H, M, D] of float32, bfloat16, float16 or (reference only) float64, as all inputs; RoPE already
            applied if the model has any. M need not be N (kept rows only).
        key: [B, G, N, D] with H a multiple of G (GQA); any strides with a contiguous last dimension, as for the rest.
        value: [B, G, N, Dv].
        query_anchor: the anchor's query [B, H, 1, D] (class token, mean token); None: plain attention, no statistics.
        value_anchor: the anchor's value [B, G, 1, Dv]; needed with ``query_anchor`` unless ``relevance`` is NONE.
        key_span: integer [B, 2], the half-open span [s, e) of live keys per sample; None: all N. The output over an
            empty span is 0.
        cu_seqlens: integer [S + 1], the packed form: B is 1, M is N, segment s is the tokens cu_seqlens[s] to
            cu_seqlens[s + 1] and attends within itself; it ascends from 0 to N. Anchors are [S, H, 1, D] and
            [S, G, 1, Dv]. Excludes ``key_span``.
        max_seqlen: at least the length of the longest segment; a number, so that nothing waits for the device.
        scale: logit scale; None: 1/sqrt(D).
        protect, relevance, value_norm: of the statistics, see :func:`~flowcut_kernels.ops.anchor_stats`.
        backend: "reference" or "triton", see docs/install.md; None: ``FLOWCUT_BACKEND`` or "auto".

    Returns:
        output [B, M, H, Dv], contiguous, in the dtype of the inputs (as transformers' attention functions return it);
        attention [B, 1, N], relevance [B, 1, N] (or [B, 1, 0]), value norm [B, N] (or [B, 0]) and entropy ratio [B, 1]
        as `anchor_stats` gives them. Packed: S for B and max_seqlen for N, aligned with the segment's first token and 0
        after its last. Without an anchor: [B, 0, N], [B, 0, 0], [B, 0], [B, 0]. Differentiable: where autograd records,
        the reference runs. Definition: ``reference.py``.

    Raises:
        ValueError: arguments that do not fit, naming the argument.
        RuntimeError: an explicitly requested backend that cannot serve these tensors.
    """
    if query_anchor is None:
        value_anchor, relevance, value_norm = None, Relevance.NONE, ValueNorm.NONE
    _check(
        query, key, value, query_anchor, value_anchor, key_span, cu_seqlens, max_seqlen, protect, relevance, value_norm
    )
    arguments = (query, key, value, query_anchor, value_anchor, key_span, cu_seqlens)
    options: dict[str, Any] = dict(
        max_seqlen=max_seqlen,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        protect=protect,
        relevance=int(relevance),
        value_norm=int(value_norm),
    )
    forms = ("triton",) if max(query.shape[-1], value.shape[-1]) <= _WIDEST else ()
    choice = choose_backend("attention_with_stats", backend, key, forms)
    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments)
    if choice == "reference" or recorded:
        return _reference(*arguments, **options)
    if choice == "triton" and key.device.type == "cpu":
        return _triton(*arguments, **options)
    return torch.ops.flowcut_kernels.attention_with_stats.default(*arguments, **options)


def _check(
    query, key, value, query_anchor, value_anchor, key_span, cu_seqlens, max_seqlen, protect, relevance, value_norm
) -> None:
    name = "attention_with_stats"
    for argument, x, kind in (("relevance", relevance, Relevance), ("value_norm", value_norm, ValueNorm)):
        if x not in kind._value2member_map_:
            raise ValueError(f"{name}: {argument}={x!r} is unknown: use one of {[k.name for k in kind]}")
    tensors = dict(query=query, key=key, value=value, query_anchor=query_anchor, value_anchor=value_anchor)
    given = {argument: x for argument, x in tensors.items() if x is not None}
    for argument, x in given.items():
        if x.dim() != 4:
            raise ValueError(f"{name}: {argument} must be [batch, heads, tokens, dim], got shape {tuple(x.shape)}")
        if not x.is_floating_point() or x.dtype != key.dtype or x.device != key.device:
            raise ValueError(
                f"{name}: {argument} is {x.dtype} on {x.device} but key is {key.dtype} on {key.device}; all must be "
                "of one floating-point dtype on one device"
            )
    for argument, x in (("query", query), ("key", key), ("value", value)):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name}: {argument} needs a contiguous last dimension, got strides {x.stride()}")
    batch, heads, tokens, dim = key.shape
    if query.shape[0] != batch or query.shape[3] != dim or heads == 0 or query.shape[1] % heads:
        raise ValueError(
            f"{name}: query {tuple(query.shape)} does not fit key {tuple(key.shape)}: batch and dim must be equal and "
            "query heads a multiple of key heads"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"{name}: value {tuple(value.shape)} does not fit key {tuple(key.shape)}")

    images = batch
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.is_floating_point():
            raise ValueError(
                f"{name}: cu_seqlens must be integer [segments + 1], got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
            )
        if cu_seqlens.device != key.device:
            raise ValueError(f"{name}: cu_seqlens is on {cu_seqlens.device} but key is on {key.device}; move one")
        if batch != 1 or query.shape[2] != tokens:
            raise ValueError(
                f"{name}: cu_seqlens needs batch 1 and as many queries as keys, got query {tuple(query.shape)} and key "
                f"{tuple(key.shape)}"
            )
        if key_span is not None:
            raise ValueError(f"{name}: key_span and cu_seqlens exclude each other; give one")
        if max_seqlen is None or not 0 <= max_seqlen <= tokens:
            raise ValueError(
                f"{name}: max_seqlen={max_seqlen!r} must be the length of the longest segment, an int in 0..{tokens}"
            )
        images, tokens = cu_seqlens.shape[0] - 1, max_seqlen
    elif max_seqlen is not None:
        raise ValueError(f"{name}: max_seqlen={max_seqlen} belongs to the packed form; give cu_seqlens too or neither")
    if key_span is not None:
        if tuple(key_span.shape) != (batch, 2) or key_span.is_floating_point():
            raise ValueError(
                f"{name}: key_span must be integer [{batch}, 2], got {tuple(key_span.shape)} {key_span.dtype}"
            )
        if key_span.device != key.device:
            raise ValueError(f"{name}: key_span is on {key_span.device} but key is on {key.device}; move one")
    wanted = dict(query_anchor=(images, query.shape[1], 1, dim), value_anchor=(images, heads, 1, value.shape[3]))
    for argument, want in wanted.items():
        if argument in given and tuple(given[argument].shape) != want:
            raise ValueError(f"{name}: {argument} must be {want}, got {tuple(given[argument].shape)}")
    if relevance != Relevance.NONE and value_anchor is None:
        raise ValueError(f"{name}: value_anchor is None; give {wanted['value_anchor']} or relevance=Relevance.NONE")
    if not 0 <= protect <= tokens:
        raise ValueError(f"{name}: protect={protect} must lie in 0..{tokens} (the number of tokens)")


def _triton(*arguments, **options):
    from .triton import attention_with_stats

    return attention_with_stats(*arguments, **options)


LIB.impl("attention_with_stats", _reference, "CompositeExplicitAutograd")
LIB.impl("attention_with_stats", _triton, "CUDA")
