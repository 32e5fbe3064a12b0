"""Triton form of `gather_tokens`: one launch for all tensors and the norm.

A program takes a few rows through all tensors, so that the index is read once. Bytes: every kept row in and out, once
more out for the norm; the row stays in registers between the gather and the norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton_common import ENOUGH_PROGRAMS, Launch, cdiv, next_power_of_2, steps, vector_unit

# Elements of a program's widest tile, 32 for each of 128 threads: 64 bytes of bf16, four wide loads in flight.
_TILE = 4096


@triton.jit
def _normed(x, inside, weight, bias, column, eps, WIDTH: tl.constexpr, RMS: tl.constexpr):
    """LayerNorm or RMSNorm of rows [ROWS, columns], statistics in fp32; RMSNorm rounds before it weights, as Llama."""
    row = x.to(tl.float32)
    if not RMS:
        row = tl.where(inside, row - (tl.sum(row, 1) / WIDTH)[:, None], 0.0)
    row *= tl.rsqrt(tl.sum(row * row, 1) / WIDTH + eps)[:, None]
    scale = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    if RMS:
        return row.to(x.dtype).to(tl.float32) * scale
    elif bias is None:
        return row * scale
    else:
        return row * scale + tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["index_step", "rows", "kept"])
def _gather_tokens(
    inputs, outputs, input_steps, index, index_step, weight, bias, normed, rows, kept, eps,
    WIDTHS: tl.constexpr, UNITS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """inputs and outputs are tuples of pointers, input_steps their (batch, token) strides in UNITS.

    index is [rows // kept, kept]; an adaptive cut reads the front of wider rows, index_step apart.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    written = (row < rows)[:, None]
    image = (row // kept).to(tl.int64)
    token = tl.load(index + image * index_step + row % kept, mask=row < rows, other=-1)
    present = (token >= 0)[:, None]
    row = row.to(tl.int64)[:, None]
    # All loads before the first store, which would wait for its own load: one latency, not one per tensor.
    tiles = ()
    for i in tl.static_range(len(inputs)):
        column = tl.arange(0, TILES[i])[None, :]
        source = ((image * input_steps[i][0] + token * input_steps[i][1]) * UNITS[i])[:, None]
        tile = tl.load(inputs[i] + source + column, mask=present & (column < WIDTHS[i]), other=0)
        tiles = tiles + (tile,)  # noqa: RUF005 - Triton knows no unpacking in a tuple
    for i in tl.static_range(len(inputs)):
        column = tl.arange(0, TILES[i])[None, :]
        tl.store(outputs[i] + row * WIDTHS[i] + column, tiles[i], mask=written & (column < WIDTHS[i]))
    if weight is not None:
        column = tl.arange(0, TILES[0])
        inside = (column < WIDTHS[0])[None, :]
        y = _normed(tiles[0], inside, weight, bias, column, eps, WIDTHS[0], RMS)
        y = tl.where(present, y, 0.0).to(tiles[0].dtype)
        tl.store(normed + row * WIDTHS[0] + column[None, :], y, mask=written & inside)


def _plain(x: Tensor) -> Tensor:
    """The same bytes in a dtype that Triton loads: complex numbers as pairs, bool and float8 as bytes."""
    if x.is_complex():
        return torch.view_as_real(x.resolve_conj())
    if x.dtype == torch.bool or (x.is_floating_point() and x.element_size() == 1):
        return x.view(torch.uint8)
    return x


def _with_contiguous_rows(x: Tensor) -> Tensor:
    row = x.shape[2:]
    expected = [prod(row[i + 1 :]) for i in range(len(row))]
    fits = all(n == 1 or s == e for n, s, e in zip(row, x.stride()[2:], expected, strict=True))
    return x if fits else x.contiguous()


def prepare(
    inputs: Sequence[Tensor],
    index: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    rms: bool = False,
) -> Launch:
    """The launch of :func:`gather_tokens`."""
    if index.stride(1) != 1:
        index = index.contiguous()
    outputs = [x.new_empty((*index.shape, *x.shape[2:])) for x in inputs]
    sources = [_plain(_with_contiguous_rows(x)) for x in inputs]
    targets = tuple(_plain(x) for x in outputs)
    if norm_weight is None:
        normed = None
    else:
        normed = torch.empty_like(outputs[0])
        norm_weight, norm_bias = (None if x is None else x.contiguous() for x in (norm_weight, norm_bias))

    rows = index.numel()
    scaled_steps, meta = _layout(rows, *((x.element_size(), x.shape, x.stride()) for x in sources))
    return Launch(
        _gather_tokens,
        (cdiv(rows, meta["ROWS"]),),
        (
            tuple(sources), targets, scaled_steps, index, index.stride(0), norm_weight, norm_bias, normed,
            rows, index.shape[1], eps,
        ),
        dict(meta, RMS=rms, enable_fp_fusion=True),
        index.device,
        outputs if normed is None else [*outputs, normed],
    )  # fmt: skip


@lru_cache(maxsize=256)
def _layout(
    rows: int, *sources: tuple[int, tuple[int, ...], tuple[int, ...]]
) -> tuple[tuple[tuple[int, ...], ...], dict[str, Any]]:
    """Strides in vector units, and constexpr arguments, of a launch for so many rows.

    Args:
        sources: of each input the size of an element in bytes, shape and strides.
    """
    widths = [prod(shape[2:]) for _, shape, _ in sources]
    leading = [steps(shape, strides, 2) for _, shape, strides in sources]
    units = [vector_unit(size, *pair) for (size, _, _), pair in zip(sources, leading, strict=True)]
    tiles = [next_power_of_2(width) for width in widths]
    block = min(max(_TILE // max(tiles), 1), 64)
    while block > 1 and cdiv(rows, block) < ENOUGH_PROGRAMS:
        block //= 2
    return tuple(tuple(s // u for s in pair) for pair, u in zip(leading, units, strict=True)), dict(
        WIDTHS=tuple(widths), UNITS=tuple(units), TILES=tuple(tiles), ROWS=block,
        num_warps=min(max(max(tiles) // 1024, 4), 16),
    )  # fmt: skip


def gather_tokens(*arguments, **options) -> list[Tensor]:
    """Arguments, results and definition: ``reference.py``; any dtype but a norm of float64."""
    return prepare(*arguments, **options)()
