"""Triton form of `recycle_tokens`: one launch over cells and blocks of columns, members in the order of one sort.

Bytes: every member's row once, and once per block of columns its number and importance.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton_common import Launch, cdiv, contiguous_rows, next_power_of_2, steps, vector_unit

# A program's tile: 8 KiB of as many rows, four wide loads in flight for each of 128 threads.
_TILE_BYTES, _COLUMNS = 8192, 256
# Members looked at together for a cell's weights and position.
_MEMBERS = 128


@triton.jit
def _weight(importance, n, live, equal):
    """max(I, 0) of members n where NaN stays, 1 in a cell that has none; 0 where not live."""
    x = tl.load(importance + n, mask=live, other=0.0)
    x = tl.where(x < 0, 0.0, x)
    return tl.where(live, tl.where(equal, 1.0, x), 0.0)


@triton.jit(do_not_specialize=["token_step"])
def _recycle_tokens(
    tokens, token_step, importance, members, starts, merged, position,
    DIM: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """The members of cell c, ascending, are members[starts[c]:starts[c + 1]]; token_step is in UNITs."""
    cell = tl.program_id(0).to(tl.int64)
    first = tl.load(starts + cell)
    count = (tl.load(starts + cell + 1) - first).to(tl.int32)
    members += first

    weights = tl.zeros([MEMBERS], tl.float32)
    highest = tl.full([MEMBERS], float("-inf"), tl.float32)
    best = tl.full([MEMBERS], -1, tl.int64)
    for start in range(0, count, MEMBERS):
        m = start + tl.arange(0, MEMBERS)
        n = tl.load(members + m, mask=m < count, other=0)
        weights += _weight(importance, n, m < count, False)
        rank = tl.load(importance + n, mask=m < count, other=0.0)
        rank = tl.where(rank == rank, rank, float("inf"))
        better = (m < count) & ((best < 0) | (rank > highest))
        highest, best = tl.where(better, rank, highest), tl.where(better, n, best)
    total = tl.sum(weights, 0)
    equal = total == 0

    if tl.program_id(1) == 0:
        at_peak = (best >= 0) & (highest == tl.max(highest, 0))
        lowest = tl.min(tl.where(at_peak, best, 0x7FFFFFFFFFFFFFFF), 0)
        tl.store(position + cell, tl.where(count > 0, lowest, -1))

    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, count, ROWS, num_stages=3):
        m = start + tl.arange(0, ROWS)
        n = tl.load(members + m, mask=m < count, other=0)
        row = tokens + (n * token_step * UNIT)[:, None]
        x = tl.load(row + column[None, :], mask=(m < count)[:, None] & (column < DIM)[None, :], other=0.0)
        sums += _weight(importance, n, m < count, equal)[:, None] * x.to(tl.float32)
    result = tl.div_rn(tl.sum(sums, 0), tl.where(equal, tl.maximum(count, 1).to(tl.float32), total))
    tl.store(merged + cell * DIM + column, result.to(merged.dtype.element_ty), mask=column < DIM)


def prepare(tokens: Tensor, importance: Tensor, cell: Tensor, *, cells: int) -> Launch:
    """The launch of :func:`recycle_tokens`."""
    tokens, importance = contiguous_rows(tokens), importance.contiguous()
    dim = tokens.shape[1]
    # Ids that are out of range lie before the first cell's members or after the last one's.
    ordered, members = cell.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(cells + 1, device=cell.device))
    merged, position = tokens.new_empty((cells, dim)), cell.new_empty((cells,))
    (step,) = steps(tokens.shape, tokens.stride(), 1)
    unit = vector_unit(tokens.element_size(), step)
    columns = min(next_power_of_2(max(dim, 1)), _COLUMNS)
    return Launch(
        _recycle_tokens,
        (cells, max(cdiv(dim, columns), 1)),  # a block of no columns still writes positions
        (tokens, step // unit, importance, members, starts, merged, position),
        dict(
            DIM=dim, UNIT=unit, ROWS=_TILE_BYTES // (_COLUMNS * tokens.element_size()), COLUMNS=columns,
            MEMBERS=_MEMBERS, num_warps=4, enable_fp_fusion=True,
        ),
        tokens.device,
        [merged, position],
    )  # fmt: skip


def recycle_tokens(*arguments, **options) -> tuple[Tensor, Tensor]:
    """Arguments, results and definition: ``reference.py``; any dtype but float64."""
    merged, position = prepare(*arguments, **options)()
    return merged, position
