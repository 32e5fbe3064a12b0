"""Rows of the residual stream and of its norm, and of what travels with them, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..ops import gather_tokens


def gather_normed(
    norm: Any,
    hidden: Tensor,
    normed: Tensor,
    others: Sequence[Tensor],
    index: Tensor,
    *,
    rms_norm: type[nn.Module] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Rows `index` [B, M] of `hidden`, of ``normed = norm(hidden)`` and of the `others`.

    Rows of a plain LayerNorm, or of the family's plain `rms_norm`, are normed anew from the kept rows of `hidden`: less
    traffic than reading them. Not in training: checkpointed layers need the same bits again.
    """
    plain = not norm.training and type(norm) in (nn.LayerNorm, rms_norm) and _is_untouched(norm, hidden)
    if not plain:
        hidden, normed, *rows = gather_tokens([hidden, normed, *others], index, backend=backend)
        return hidden, normed, rows
    if type(norm) is nn.LayerNorm:
        options: dict[str, Any] = dict(norm_bias=norm.bias, eps=norm.eps)
    else:
        options = dict(rms=True, eps=norm.variance_epsilon)
    hidden, *rows, normed = gather_tokens([hidden, *others], index, norm.weight, backend=backend, **options)
    return hidden, normed, rows


def _is_untouched(norm: Any, x: Tensor) -> bool:
    """No hook or other forward, weights of the dtype of x."""
    if norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm):
        return False
    return norm.weight is not None and norm.weight.dtype == x.dtype
