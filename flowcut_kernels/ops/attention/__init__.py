"""Attention of all queries over a span of keys; on CPUs faster than torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._library import choose_backend
from ..._ops import LIB
from .reference import attention as _reference


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_span: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale * Q K^T) V, non-causal, without an M x N tensor.

    Args:
        query: [B, H, M, D] of float32, bfloat16, float16 or (reference only) float64; any strides with a contiguous
            last dimension, as for key and value.
        key: [B, G, N, D] with H a multiple of G (GQA).
        value: [B, G, N, Dv].
        key_span: integer [B, 2], the half-open span [s, e) of live keys per sample; None: all N. Other keys may hold
            anything, and an empty span gives zeros.
        scale: logit scale; None: 1/sqrt(D).
        backend: see docs/install.md; None: ``FLOWCUT_BACKEND`` or "auto". There is a C++ form for CPUs; on other
            devices "auto" is the reference, torch's scaled_dot_product_attention.

    Returns:
        [B, M, H, Dv], contiguous, in the inputs' dtype. The C++ form accumulates in float32; with AVX512-BF16 it
        rounds the weights of bfloat16 inputs to bfloat16, as torch does. A sample's result depends neither on its
        neighbours in the batch nor on the number of threads. It is made for many queries: one float32 query per head
        is faster in torch. Differentiable: where autograd records, the reference
        runs. Definition: ``reference.py``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming the argument.
        RuntimeError: an explicitly requested backend that cannot serve these tensors.
    """
    _check(query, key, value, key_span)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    choice = choose_backend("attention", backend, key, ("cpp",))
    records = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if choice == "reference" or records:
        return _reference(query, key, value, key_span, scale=scale)
    return torch.ops.flowcut_kernels.attention.default(query, key, value, key_span, scale=scale)


def _check(query, key, value, key_span) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise ValueError(f"attention: {name} must be [batch, heads, tokens, dim], got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"attention: {name} must be floating point, got {x.dtype}; convert it")
        if x.dtype != key.dtype or x.device != key.device:
            raise ValueError(
                f"attention: {name} is {x.dtype} on {x.device} but key is {key.dtype} on {key.device}; move one"
            )
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(
                f"attention: {name} needs a contiguous last dimension, got strides {x.stride()}; "
                "call .contiguous() on it"
            )
    batch, heads, _, dim = key.shape
    if query.shape[0] != batch or query.shape[3] != dim or heads == 0 or query.shape[1] % heads:
        raise ValueError(
            f"attention: query {tuple(query.shape)} does not fit key {tuple(key.shape)}: batch and dim must be equal "
            "and query heads a multiple of key heads"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"attention: value {tuple(value.shape)} does not fit key {tuple(key.shape)}: batch, heads and tokens must "
            "be equal"
        )
    if key_span is not None and (
        tuple(key_span.shape) != (batch, 2) or key_span.is_floating_point() or key_span.device != key.device
    ):
        raise ValueError(
            f"attention: key_span must be integer [{batch}, 2] on {key.device}, got {key_span.dtype} "
            f"{tuple(key_span.shape)} on {key_span.device}"
        )


LIB.impl("attention", _reference, "CompositeExplicitAutograd")
