"""How much attention each token receives: the column mean of the attention map, which is never formed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._library import choose_backend
from ..._ops import LIB, accumulate_dtype
from .reference import received_attention as _reference

# Head dimensions beyond this would need other tiles; no vision encoder has them.
_WIDEST = 128


def received_attention(
    query: Tensor,
    key: Tensor,
    *,
    lse: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean over heads and live rows of softmax(scale * Q K^T), per column; memory linear in N.

    The hubs of VFlowOpt, arXiv 2508.05211, are the tokens where it is large.

    Args:
        query: [B, H, N, D] of float32, bfloat16, float16 or (reference only) float64; RoPE already applied if the model
            has any; any strides with a contiguous last dimension.
        key: [B, G, N, D] with H a multiple of G (GQA), the same rules.
        lse: float32 (float64 for float64 inputs) [B, H, N], the natural-log row log-sum-exp of the scaled logits over
            the live keys, as a flash attention that ran before leaves it: saves the first of two passes. None: it is
            computed here.
        lengths: int32 or int64 [B], live tokens [0, lengths[b]) of each sample, as rows and as keys; None: all N.
            Other tokens may hold anything.
        scale: logit scale; None: 1/sqrt(D).
        backend: see docs/install.md; None: ``FLOWCUT_BACKEND`` or "auto". The Triton form takes D up to 128.

    Returns:
        [B, N] float32 (float64 for float64 inputs): sums to 1 over the live tokens, 0 behind them. The native forms
        give the same bits whatever the threads, the batch-mates and the content of dead tokens. Definition:
        ``reference.py``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming the argument.
        RuntimeError: an explicitly requested backend that cannot serve these tensors.
    """
    _check(query, key, lse, lengths)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    forms = ("cpp", "triton") if query.shape[-1] <= _WIDEST else ("cpp",)
    choice = choose_backend("received_attention", backend, key, forms)
    if choice == "reference":
        return _reference(query, key, lse, lengths, scale=scale)
    if choice == "triton" and key.device.type == "cpu":
        return _triton(query, key, lse, lengths, scale=scale)
    return torch.ops.flowcut_kernels.received_attention.default(query, key, lse, lengths, scale=scale)


def _check(query, key, lse, lengths) -> None:
    op = "received_attention"
    for name, x in (("query", query), ("key", key)):
        if x.dim() != 4:
            raise ValueError(f"{op}: {name} must be [batch, heads, tokens, dim], got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{op}: {name} must be floating point, got {x.dtype}; convert it")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(
                f"{op}: {name} needs a contiguous last dimension, got strides {x.stride()}; call .contiguous() on it"
            )
    if query.dtype != key.dtype or query.device != key.device:
        raise ValueError(
            f"{op}: query is {query.dtype} on {query.device} but key is {key.dtype} on {key.device}; move one"
        )
    batch, heads = key.shape[:2]
    if query.shape[0] != batch or query.shape[2:] != key.shape[2:] or heads == 0 or query.shape[1] % heads:
        raise ValueError(
            f"{op}: query {tuple(query.shape)} does not fit key {tuple(key.shape)}: batch, tokens and dim must be "
            "equal and query heads a multiple of key heads"
        )
    want = accumulate_dtype(key.dtype)
    if lse is not None and (lse.shape != query.shape[:3] or lse.dtype != want or lse.device != key.device):
        raise ValueError(
            f"{op}: lse must be {want} {tuple(query.shape[:3])} on {key.device}, got {lse.dtype} {tuple(lse.shape)} on "
            f"{lse.device}"
        )
    if lengths is not None and (
        tuple(lengths.shape) != (batch,)
        or lengths.dtype not in (torch.int32, torch.int64)
        or lengths.device != key.device
    ):
        raise ValueError(
            f"{op}: lengths must be int32 or int64 [{batch}] on {key.device}, got {lengths.dtype} "
            f"{tuple(lengths.shape)} on {lengths.device}"
        )


def _triton(*arguments, **options):
    from .triton import received_attention

    return received_attention(*arguments, **options)


LIB.impl("received_attention", _reference, "CompositeExplicitAutograd")
LIB.impl("received_attention", _triton, "CUDA")
