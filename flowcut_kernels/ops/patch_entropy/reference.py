"""The definition of `patch_entropy` in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import torch
from torch import Tensor

from ..._ops import accumulate_dtype

LEVELS = 256


def patch_entropy(pixels: Tensor, *, patch_size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """H = -sum_l p_l log2 p_l over the grey levels l of a patch (VFlowOpt, arXiv 2508.05211).

    Level = (R + G + B + 1) // 3, the rounded mean of the bytes (the byte itself of one channel); p_l is its share of
    the patch's pixels. Byte = clamp(round(x * 255 std + 255 mean), 0, 255) of a normalised pixel x, in fp32 (fp64 of
    fp64 pixels) with product and sum rounded one by one, halves to even. NaN for a patch with NaN among its pixels.
    """
    batch, channels, height, width = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    x = pixels[:, :, : rows * patch_size, : columns * patch_size]
    x = x.reshape(batch, channels, rows, patch_size, columns, patch_size).transpose(3, 4).flatten(4).flatten(2, 3)
    if x.dtype == torch.uint8:
        level = x.sum(1)
    else:
        x = x.to(accumulate_dtype(x.dtype))
        scale, offset = (x.new_tensor([255 * c for c in values])[:, None, None] for values in (std, mean))
        level = (x * scale + offset).clamp(0, 255).round().sum(1)
    broken = level.isnan()
    level = level.masked_fill(broken, 0).to(torch.int64)
    if channels == 3:
        level = (level + 1) // 3
    counts = level.new_zeros(*level.shape[:2], LEVELS).scatter_add_(2, level, torch.ones_like(level))
    entropy = torch.special.entr(counts.to(torch.float32) / patch_size**2).sum(-1) / log(2)
    return entropy.masked_fill(broken.any(-1), float("nan"))
