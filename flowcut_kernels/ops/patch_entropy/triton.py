"""Triton form of `patch_entropy`: a program per patch. Bytes: every pixel once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton_common import Launch, next_power_of_2

# Pixels of a tile: patches of up to 32 x 32 are one.
_TILE = 1024


@triton.jit
def _byte(x, scale, offset):
    """The byte of a normalised pixel, as float32; NaN stays."""
    y = x.to(tl.float32) * scale + offset
    y = tl.where(y < 0, 0.0, y)
    y = tl.where(y > 255, 255.0, y)
    return (y + 12582912.0) - 12582912.0  # 1.5 * 2^23: the sum has no bits below 1


@triton.jit(do_not_specialize=["rows", "columns", "image_step", "channel_step", "line_step", "pixel_step"])
def _patch_entropy(
    pixels, out, image_step, channel_step, line_step, pixel_step, rows, columns, scale, offset,
    SIZE: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """scale and offset are tuples of a number per channel, empty for uint8 pixels."""
    patch = tl.program_id(0)
    image, place = (patch // (rows * columns)).to(tl.int64), patch % (rows * columns)
    pixels += image * image_step
    top, left = (place // columns).to(tl.int64) * SIZE, (place % columns).to(tl.int64) * SIZE

    counts = tl.zeros([256], tl.int32)
    broken = tl.zeros([TILE], tl.int32)
    for start in range(0, SIZE * SIZE, TILE):
        i = start + tl.arange(0, TILE)
        inside = i < SIZE * SIZE
        pixel = pixels + (top + i // SIZE) * line_step + (left + i % SIZE) * pixel_step
        if len(scale) == 0:
            level = tl.load(pixel, mask=inside, other=0).to(tl.int32)
            for _ in tl.static_range(1, CHANNELS):
                pixel += channel_step
                level += tl.load(pixel, mask=inside, other=0).to(tl.int32)
        else:
            total = _byte(tl.load(pixel, mask=inside, other=0.0), scale[0], offset[0])
            for c in tl.static_range(1, CHANNELS):
                pixel += channel_step
                total += _byte(tl.load(pixel, mask=inside, other=0.0), scale[c], offset[c])
            broken |= (total != total).to(tl.int32)
            level = tl.where(total == total, total, 0.0).to(tl.int32)
        if CHANNELS == 3:
            level = (level + 1) // 3
        counts += tl.histogram(level, 256, mask=inside)

    surprise = tl.log2(SIZE * SIZE / tl.maximum(counts, 1).to(tl.float32))
    entropy = tl.sum(counts * surprise, 0) / (SIZE * SIZE)
    tl.store(out + patch, tl.where(tl.max(broken, 0) > 0, float("nan"), entropy))


def prepare(pixels: Tensor, *, patch_size: int, mean: Sequence[float], std: Sequence[float]) -> Launch:
    """The launch of :func:`patch_entropy`."""
    batch, channels, height, width = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    out = pixels.new_empty((batch, rows * columns), dtype=torch.float32)
    tile = min(next_power_of_2(patch_size**2), _TILE)
    scale, offset = (tuple(255 * c for c in x) if pixels.is_floating_point() else () for x in (std, mean))
    return Launch(
        _patch_entropy,
        (batch * rows * columns,),
        (pixels, out, *pixels.stride(), rows, columns, scale, offset),
        # No fused multiply-add: a byte that lies near the middle of two must fall as in the definition.
        dict(
            SIZE=patch_size, CHANNELS=channels, TILE=tile, num_warps=min(max(tile // 256, 1), 4),
            enable_fp_fusion=False,
        ),
        pixels.device,
        [out],
    )  # fmt: skip


def patch_entropy(*arguments, **options) -> Tensor:
    """Arguments, result and definition: ``reference.py``; any dtype but float64."""
    return prepare(*arguments, **options)()[0]
