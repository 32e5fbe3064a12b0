"""Rows of several tensors at once, with the next layer's norm if wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._library import NATIVE_DTYPES, choose_backend
from ..._ops import LIB
from .reference import gather_tokens as _reference


def gather_tokens(
    inputs: Sequence[Tensor],
    index: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    rms: bool = False,
    backend: str | None = None,
) -> list[Tensor]:
    """Gather the rows ``index`` of every input, optionally with a LayerNorm or RMSNorm of the first.

    Args:
        inputs: tensors [B, N, ...] of any dtypes on one device (hidden states, rotary tables, scores, positions);
            each row contiguous, batch and token strides free.
        index: int64 [B, M], values in -1..N-1; -1 gives a row of zeros (padding of ragged batches).
        norm_weight, norm_bias: [D] of the norm applied to the gathered rows of ``inputs[0]`` [B, N, D].
        eps: the norm's epsilon.
        rms: RMSNorm instead of LayerNorm.
        backend: see docs/install.md; None: ``FLOWCUT_BACKEND`` or "auto".

    Returns:
        One tensor [B, M, ...] per input, then the normed rows if ``norm_weight`` is given. Differentiable: where
        autograd records, the reference runs. Definition: ``reference.py``.

    Raises:
        ValueError: arguments that do not fit, naming the argument.
        RuntimeError: an explicitly requested backend that cannot serve these tensors.
    """
    inputs = list(inputs)
    _check(inputs, index, norm_weight, norm_bias, rms)
    choice = choose_backend("gather_tokens", backend, inputs[0])
    if choice == "reference" or (torch.is_grad_enabled() and _differentiable(*inputs, norm_weight, norm_bias)):
        return _reference(inputs, index, norm_weight, norm_bias, eps=eps, rms=rms)
    if choice == "triton" and index.device.type == "cpu":
        return _triton(inputs, index, norm_weight, norm_bias, eps=eps, rms=rms)
    return torch.ops.flowcut_kernels.gather_tokens.default(inputs, index, norm_weight, norm_bias, eps=eps, rms=rms)


def _check(inputs, index, norm_weight, norm_bias, rms) -> None:
    if not inputs:
        raise ValueError("gather_tokens: inputs is empty; give at least one tensor [batch, tokens, ...]")
    if index.dim() != 2 or index.dtype != torch.int64:
        raise ValueError(f"gather_tokens: index must be int64 [batch, kept], got {index.dtype} {tuple(index.shape)}")
    first, device = inputs[0], index.device
    leading = (index.shape[0], first.shape[1] if first.dim() > 1 else 0)
    for i, x in enumerate(inputs):
        if x.dim() < 2 or x.shape[:2] != leading:
            raise ValueError(
                f"gather_tokens: inputs[{i}] must be [{leading[0]}, {leading[1] or 'tokens'}, ...], "
                f"got {tuple(x.shape)}"
            )
        if x.device != device:
            raise ValueError(f"gather_tokens: inputs[{i}] is on {x.device} but index is on {device}; move one")
    if norm_bias is not None and (norm_weight is None or rms):
        raise ValueError("gather_tokens: norm_bias needs norm_weight and is not used by RMSNorm (rms=True)")
    if norm_weight is not None:
        for name, x in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
            if x is not None and (first.dim() != 3 or tuple(x.shape) != (first.shape[2],) or x.dtype != first.dtype):
                raise ValueError(
                    f"gather_tokens: {name} must be [{first.shape[-1]}] of {first.dtype} for inputs[0] of shape "
                    f"{tuple(first.shape)}, got {tuple(x.shape)} {x.dtype}"
                )
        if first.dtype not in (*NATIVE_DTYPES, torch.float64):
            raise ValueError(f"gather_tokens: inputs[0] must be floating point for a norm, got {first.dtype}")


def _differentiable(*tensors: Tensor | None) -> bool:
    return any(x is not None and x.requires_grad for x in tensors)


def _triton(*arguments, **options):
    from .triton import gather_tokens

    return gather_tokens(*arguments, **options)


LIB.impl("gather_tokens", _reference, "CompositeExplicitAutograd")
LIB.impl("gather_tokens", _triton, "CUDA")
