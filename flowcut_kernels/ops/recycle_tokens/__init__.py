"""Pruned tokens merged by the cell of the grid they lie in."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._library import NATIVE_DTYPES, choose_backend
from ..._ops import LIB
from .grid import grid_cells as grid_cells
from .reference import recycle_tokens as _reference


def recycle_tokens(
    tokens: Tensor, importance: Tensor, cell: Tensor, *, cells: int, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Merge the tokens of each cell, weighted by their importance (VFlowOpt, arXiv 2508.05211).

    Args:
        tokens: float32, bfloat16, float16 or float64 [T, D], of any number of grids of any sizes.
        importance: float32 (or float64 with float64 tokens) [T]; negative weighs as 0, and where all of a cell's do
            its members weigh the same.
        cell: int64 [T], values in -1..cells-1 (see :func:`grid_cells`); a token with -1 is not merged.
        cells: number of cells.
        backend: see docs/install.md; None: ``FLOWCUT_BACKEND`` or "auto".

    Returns:
        merged [cells, D] of the tokens' dtype, accumulated in float32 (float64 of float64) and rounded once; position
        int64 [cells], each cell's member of the highest importance, the lowest of equals. Zeros and -1 for a cell
        without members. NaN stays in the cell it lies in, where NaN importance ranks highest.
        Differentiable: where autograd records, the reference runs. Definition: ``reference.py``.

    Raises:
        ValueError: arguments that do not fit, naming the argument; for CPU tensors ids out of range too. On other
            devices, where looking would mean waiting, such tokens are not merged.
        RuntimeError: an explicitly requested backend that cannot serve these tensors.
    """
    _check(tokens, importance, cell, cells)
    choice = choose_backend("recycle_tokens", backend, tokens)
    if choice == "reference" or (torch.is_grad_enabled() and (tokens.requires_grad or importance.requires_grad)):
        return _reference(tokens, importance, cell, cells=cells)
    if choice == "triton" and tokens.device.type == "cpu":
        return _triton(tokens, importance, cell, cells=cells)
    return torch.ops.flowcut_kernels.recycle_tokens.default(tokens, importance, cell, cells=cells)


def _check(tokens, importance, cell, cells) -> None:
    if tokens.dim() != 2 or tokens.dtype not in (*NATIVE_DTYPES, torch.float64):
        raise ValueError(
            f"recycle_tokens: tokens must be floating point [tokens, dim], got {tokens.dtype} {tuple(tokens.shape)}"
        )
    exact = torch.float64 if tokens.dtype == importance.dtype == torch.float64 else torch.float32
    for name, x, dtype in (("importance", importance, exact), ("cell", cell, torch.int64)):
        if x.shape != tokens.shape[:1] or x.dtype != dtype or x.device != tokens.device:
            raise ValueError(
                f"recycle_tokens: {name} must be {dtype} [{tokens.shape[0]}] on {tokens.device}, "
                f"got {x.dtype} {tuple(x.shape)} on {x.device}"
            )
    if not isinstance(cells, int) or cells < 0:
        raise ValueError(f"recycle_tokens: cells={cells!r} must be a whole number, not negative")
    if cell.device.type == "cpu" and not torch.compiler.is_compiling() and len(cell):
        least, most = (x.item() for x in cell.aminmax())
        if least < -1 or most >= cells:
            raise ValueError(f"recycle_tokens: cell has values {least}..{most}, which must lie in -1..{cells - 1}")


def _triton(*arguments, **options):
    from .triton import recycle_tokens

    return recycle_tokens(*arguments, **options)


LIB.impl("recycle_tokens", _reference, "CompositeExplicitAutograd")
LIB.impl("recycle_tokens", _triton, "CUDA")
