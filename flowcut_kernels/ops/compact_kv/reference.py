"""The definition of `compact_kv` and `compact_kv_` in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._ops import accumulate_dtype


def compact_kv(
    keys: Sequence[Tensor], values: Sequence[Tensor], keep: Tensor, cos: Tensor | None = None, sin: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """out[b, g, m] = x[b, g, keep[b, m]] for every key and value tensor x, zeros where keep is -1.

    With `cos` and `sin` [B, M, R/2] of angles t, keys are turned by them: columns j and j + R/2, j < R/2, become
    k_j cos t_j - k_{j+R/2} sin t_j and k_{j+R/2} cos t_j + k_j sin t_j, in fp32. Where keys carry rotary embeddings
    R(position) in this layout (Llama, Qwen) and t = (new - old position) * frequency, R(new - old) R(old) = R(new).
    """
    present = (keep >= 0)[:, None, :, None]
    new_keys = [_gather(x, keep) for x in keys]
    if cos is not None and sin is not None:
        new_keys = [_turn(x, cos[:, None], sin[:, None]) for x in new_keys]
    return tuple(
        [_typed(_plain(x).masked_fill(~present, 0), x.dtype) for x in rows]
        for rows in (new_keys, [_gather(x, keep) for x in values])
    )  # type: ignore[return-value]


def compact_kv_(
    keys: Sequence[Tensor], values: Sequence[Tensor], keep: Tensor, cos: Tensor | None = None, sin: Tensor | None = None
) -> None:
    """The rows of :func:`compact_kv` at the front of the given tensors; all other rows stay as they are."""
    new_keys, new_values = compact_kv(keys, values, keep, cos, sin)
    for x, new in zip([*keys, *values], [*new_keys, *new_values], strict=True):
        front = _plain(x)[:, :, : keep.shape[1]]
        present = (keep >= 0)[:, None, : front.shape[2], None]
        front.copy_(torch.where(present, _plain(new)[:, :, : front.shape[2]], front))


def _plain(x: Tensor) -> Tensor:
    """Types of one byte as bytes: torch cannot index all of them."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


def _typed(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.view(dtype)  # a view of the same type would end the gradient


def _gather(x: Tensor, keep: Tensor) -> Tensor:
    batch, heads, tokens, dim = x.shape
    if tokens == 0:  # nothing to read: every row is -1
        return x.new_empty((batch, heads, keep.shape[1], dim))
    index = keep.clamp_min(0)[:, None, :, None].expand(-1, heads, -1, dim)
    return _typed(_plain(x).gather(2, index), x.dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b = x[..., : 2 * half].to(accumulate_dtype(x.dtype)).chunk(2, -1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned.to(x.dtype), x[..., 2 * half :]], -1)
