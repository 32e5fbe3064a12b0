"""The definition of `recycle_tokens` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._ops import accumulate_dtype


def recycle_tokens(tokens: Tensor, importance: Tensor, cell: Tensor, *, cells: int) -> tuple[Tensor, Tensor]:
    """merged[c] = sum_n w_n t_n / sum_n w_n over the tokens n with cell[n] = c (VFlowOpt, arXiv 2508.05211).

    w = max(I, 0), or 1 for all members of a cell whose weights sum to 0; in fp32 (fp64 of fp64 tokens), rounded once.
    position[c] is the member of the highest importance, the first of equals; NaN ranks as infinity. A cell without
    members gives zeros and -1. Tokens whose id lies outside 0..cells-1 belong to none.
    """
    dtype, count = accumulate_dtype(tokens.dtype), len(tokens)
    # Tokens of no cell go to one more, which is cut off.
    cell = torch.where((cell >= 0) & (cell < cells), cell, cells)

    def total(x: Tensor) -> Tensor:
        return x.new_zeros((cells + 1, *x.shape[1:])).index_add(0, cell, x)

    weight = importance.to(dtype).clamp_min(0)
    weight = torch.where(total(weight)[cell] == 0, 1, weight)
    divisor = total(weight)
    divisor = torch.where(divisor == 0, 1, divisor)
    merged = total(weight[:, None] * tokens.to(dtype)) / divisor[:, None]

    rank = importance.detach().nan_to_num(float("inf"), float("inf"), float("-inf"))
    highest = rank.new_full((cells + 1,), float("-inf")).scatter_reduce(0, cell, rank, "amax")
    number = torch.arange(count, device=cell.device)
    number = torch.where(rank == highest[cell], number, count)
    position = number.new_full((cells + 1,), count).scatter_reduce(0, cell, number, "amin")
    position = torch.where(position == count, -1, position)
    return merged[:cells].to(tokens.dtype), position[:cells]
