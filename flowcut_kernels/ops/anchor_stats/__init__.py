"""Attention, relevance, value norm and entropy of anchor tokens in one pass over K and V."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._library import choose_backend
from ..._ops import LIB, Relevance, ValueNorm
from .reference import anchor_stats as _reference


def anchor_stats(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    value_anchor: Tensor | None = None,
    *,
    key_span: Tensor | None = None,
    scale: float | None = None,
    protect: int = 0,
    relevance: Relevance = Relevance.COSINE,
    value_norm: ValueNorm = ValueNorm.FULL,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What R anchor tokens (CLS, mean token, last text token) think of N tokens; nothing N x N is formed.

    The criteria of FlowCut, arXiv 2505.19536, section 3.

    Args:
        query: anchor queries [B, H, R, D] of float32, bfloat16, float16 or (reference only) float64, as all inputs;
            RoPE already applied if the model has any.
        key: [B, G, N, D] with H a multiple of G (GQA); any strides with a contiguous last dimension.
        value: [B, G, N, Dv], the same rules.
        value_anchor: anchor values [B, G, R, Dv]; needed unless ``relevance`` is NONE.
        key_span: integer [B, 2], the half-open span [s, e) of live keys per sample; None: all N.
        scale: logit scale; None: 1/sqrt(D).
        protect: leading tokens of the span that take part in the softmax but are not scored (1 for CLS).
        relevance: cosine, softmax (released code) or scaled softmax (paper) of value vectors, or none.
        value_norm: L1 norm of the full or of the head-mean value vector, or none.
        backend: see docs/install.md; None: ``FLOWCUT_BACKEND`` or "auto".

    Returns:
        attention [B, R, N], relevance [B, R, N] (or [B, R, 0]), value norm [B, N] (or [B, 0]), entropy ratio
        [B, R]; float32 (float64 for float64 inputs), aligned with the keys, 0 outside the scored tokens.
        K and V are read once. Definition: ``reference.py``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming the argument.
        RuntimeError: an explicitly requested backend that cannot serve these tensors.
    """
    check_arguments("anchor_stats", query, key, value, value_anchor, key_span, protect, relevance, value_norm)
    arguments = (query, key, value, value_anchor, key_span)
    options: dict[str, Any] = dict(
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        protect=protect,
        relevance=int(relevance),
        value_norm=int(value_norm),
    )
    choice = choose_backend("anchor_stats", backend, key)
    if choice == "reference":
        return _reference(*arguments, **options)
    if choice == "triton" and key.device.type == "cpu":
        return _triton(*arguments, **options)
    return torch.ops.flowcut_kernels.anchor_stats.default(*arguments, **options)


def check_arguments(op, query, key, value, value_anchor, key_span, protect, relevance, value_norm) -> None:
    """ValueError in the name of `op` unless the arguments of `anchor_stats` fit each other."""
    for name, x, kind in (("relevance", relevance, Relevance), ("value_norm", value_norm, ValueNorm)):
        if x not in kind._value2member_map_:
            raise ValueError(f"{op}: {name}={x!r} is unknown: use one of {[k.name for k in kind]}")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise ValueError(f"{op}: {name} must be [batch, heads, tokens, dim], got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{op}: {name} must be floating point, got {x.dtype}")
        if x.dtype != key.dtype or x.device != key.device:
            raise ValueError(
                f"{op}: {name} is {x.dtype} on {x.device} but key is {key.dtype} on {key.device}; move one"
            )
    batch, heads, tokens, dim = key.shape
    if query.shape[0] != batch or query.shape[3] != dim or heads == 0 or query.shape[1] % heads:
        raise ValueError(
            f"{op}: query {tuple(query.shape)} does not fit key {tuple(key.shape)}: batch and dim must be "
            "equal and query heads a multiple of key heads"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"{op}: value {tuple(value.shape)} does not fit key {tuple(key.shape)}")
    for name, x in (("key", key), ("value", value)):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{op}: {name} needs a contiguous last dimension, got strides {x.stride()}")
    if relevance != Relevance.NONE:
        want = (batch, heads, query.shape[2], value.shape[3])
        if value_anchor is None or tuple(value_anchor.shape) != want or value_anchor.dtype != value.dtype:
            got = None if value_anchor is None else (tuple(value_anchor.shape), value_anchor.dtype)
            raise ValueError(f"{op}: value_anchor must be {want} of {value.dtype} for relevance, got {got}")
    if key_span is not None and (tuple(key_span.shape) != (batch, 2) or key_span.is_floating_point()):
        raise ValueError(f"{op}: key_span must be integer [{batch}, 2], got {tuple(key_span.shape)} {key_span.dtype}")
    if not 0 <= protect <= tokens:
        raise ValueError(f"{op}: protect={protect} must lie in 0..{tokens} (the number of tokens)")


def _triton(*arguments, **options):
    from .triton import anchor_stats

    return anchor_stats(*arguments, **options)


LIB.impl("anchor_stats", _reference, "CompositeExplicitAutograd")
LIB.impl("anchor_stats", _triton, "CUDA")
