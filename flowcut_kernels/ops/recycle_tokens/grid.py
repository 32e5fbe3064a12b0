"""Which cell of its grid a token lies in."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import index

import torch
from torch import Tensor


def grid_cells(grids: Sequence[tuple[int, int]], cell: float, device: torch.device | str) -> tuple[Tensor, int]:
    """Cells of the tokens of `grids`, one grid's after the other's, each in raster order.

    Token (x, y) lies in cell (floor(x / cell), floor(y / cell)) of its grid, in float64. Cells are numbered in raster
    order, and on from grid to grid, which share none.

    Args:
        grids: (rows, columns) of each.
        cell: edge of a cell in tokens, at least 1; need not be whole.
        device: of the result.

    Returns:
        int64 [sum of rows * columns] for :func:`recycle_tokens`, and the number of cells. The tensor is kept for the
        next call and must not be written to.

    Raises:
        ValueError: an edge below 1, or a negative number of rows or columns.
    """
    if not isinstance(cell, (int, float)) or not cell >= 1:
        raise ValueError(f"grid_cells: cell={cell!r} must be a number of tokens, at least 1")
    try:
        sizes = tuple((index(rows), index(columns)) for rows, columns in grids)
    except (TypeError, ValueError):
        sizes = ((-1, -1),)
    if any(rows < 0 or columns < 0 for rows, columns in sizes):
        raise ValueError(f"grid_cells: grids={grids!r} must be (rows, columns) in whole tokens, none of them negative")
    return _cells(sizes, float(cell), torch.device(device))


@lru_cache(maxsize=16)
def _cells(grids: tuple[tuple[int, int], ...], cell: float, device: torch.device) -> tuple[Tensor, int]:
    """Copied to the device once: a copy would wait for it."""
    # What is kept must serve autograd too.
    with torch.inference_mode(False), torch.device("cpu"):
        parts, count = [torch.empty(0, dtype=torch.int64)], 0
        for rows, columns in grids:
            # Python divides exactly rounded; torch may multiply by the reciprocal.
            y, x = (torch.tensor([int(i / cell) for i in range(n)], dtype=torch.int64) for n in (rows, columns))
            across = int((columns - 1) / cell) + 1 if rows and columns else 0
            parts.append((count + y[:, None] * across + x).flatten())
            count += (int((rows - 1) / cell) + 1) * across if rows else 0
        return torch.cat(parts).to(device), count
