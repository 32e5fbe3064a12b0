"""The definition of `gather_tokens` in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._ops import accumulate_dtype


def gather_tokens(
    inputs: Sequence[Tensor],
    index: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    rms: bool = False,
) -> list[Tensor]:
    """out_i[b, m] = inputs_i[b, index[b, m]], zeros where the index is -1.

    With `norm_weight`, one more tensor: LayerNorm (or RMSNorm: normalised, cast, then weighted, as in Llama) of the
    gathered rows of `inputs[0]` over their last dimension, zeros where the index is -1. Statistics in fp32.
    """
    batch = torch.arange(index.shape[0], device=index.device)[:, None]
    absent = index < 0
    if inputs[0].shape[1] == 0:  # nothing to read: every index is -1
        outputs = [x.new_zeros(*index.shape, *x.shape[2:]) for x in inputs]
    else:
        outputs = [
            x[batch, index.clamp_min(0)].masked_fill(absent.view(*index.shape, *[1] * (x.dim() - 2)), 0) for x in inputs
        ]
    if norm_weight is not None:
        rows = outputs[0].to(accumulate_dtype(outputs[0].dtype))
        if rms:
            normed = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
            normed = norm_weight * normed.to(outputs[0].dtype)
        else:
            weight, bias = norm_weight.to(rows.dtype), None if norm_bias is None else norm_bias.to(rows.dtype)
            normed = torch.nn.functional.layer_norm(rows, rows.shape[-1:], weight, bias, eps)
        outputs.append(normed.to(outputs[0].dtype).masked_fill(absent[..., None], 0))
    return outputs
