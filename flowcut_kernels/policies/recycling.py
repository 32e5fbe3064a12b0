"""Pruned features are not lost: those of a cell of the grid become one (VFlowOpt, arXiv 2508.05211)."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from .._ops import accumulate_dtype
from ..ops import grid_cells, recycle_tokens
from .base import FeatureSelection, FeatureView


def select_features(view: FeatureView, budgets: list[int], cell: float | None) -> FeatureSelection:
    """Leave exactly `budgets` features of every image, the recycled ones included.

    The least important tokens are pruned, and those of a cell become one at the place of the most important among them.
    A token that is the least important of its cell may then be pruned for free, so that of N tokens those up to the
    (N - budget)-th other one go. Where the cells alone outnumber the budget, the most important of them stay.

    Args:
        view: features of I images.
        budgets: features to leave of each.
        cell: edge of a cell in tokens, at least 1; None: pruned features are dropped.
    """
    lengths, device = view.lengths, view.importance.device
    image, start = images_of(tuple(lengths), device)
    surplus = constant(tuple(n - budget for n, budget in zip(lengths, budgets, strict=True)), device)
    order = _ascending(view.importance, image)
    if cell is None:
        counted = torch.ones_like(order)
    else:
        cells, count = _cells(view, cell)
        # A token is counted unless it is the first of its cell in this order.
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=device)
        first = place.new_full((count,), len(order)).scatter_reduce(0, cells, place, "amin")
        counted = (first[cells[order]] != torch.arange(len(order), device=device)).long()
    before = counted.cumsum(0) - counted
    before = before - before[start][image]  # `order` keeps the images together: place i is of image[i]
    pruned = torch.empty_like(order, dtype=torch.bool)
    pruned[order] = before < surplus[image]
    if cell is None:
        return _gathered(view, ~pruned, budgets)
    return merge(view, pruned, cell, budgets)


def merge(
    view: FeatureView, pruned: Tensor, cell: float, budgets: list[int] | None, recycled: Tensor | None = None
) -> FeatureSelection:
    """Features that are not `pruned` (bool [T]), and one of every cell that holds pruned ones.

    Args:
        recycled: bool [T] pruned tokens that may be; None: all.
        budgets: features that this leaves of each image, or more: then the least important go; None: read back.
    """
    device, tokens = pruned.device, len(pruned)
    cells, count = _cells(view, cell)
    merged, position = recycle_tokens(
        view.features,
        view.importance.to(accumulate_dtype(view.features.dtype)),
        torch.where(pruned if recycled is None else pruned & recycled, cells, -1),
        cells=count,
        backend=view.backend,
    )
    # One more place, for the cells without a pruned token.
    stands_for = torch.full((tokens + 1,), -1, device=device)
    stands_for[torch.where(position < 0, tokens, position)] = torch.arange(count, device=device)
    stands_for = stands_for[:tokens]
    kept = ~pruned | (stands_for >= 0)
    if budgets is not None and _may_exceed(view, cell, budgets):
        image, _ = images_of(tuple(view.lengths), device)
        order = _ascending(torch.where(kept, view.importance, float("-inf")), image).flip(0)
        image = image[order]
        place = torch.arange(tokens, device=device)
        first = place.new_full((len(view.lengths),), tokens).scatter_reduce(0, image, place, "amin")
        kept[order] = kept[order] & (place - first[image] < constant(tuple(budgets), device)[image])
    return _gathered(view, kept, budgets, merged, stands_for)


def means_into(rows: Tensor, into: Tensor, width: int, backend: str | None) -> tuple[Tensor, Tensor]:
    """Means [B, width, D] of the rows [B, N, D] that go `into` [B, N] a place, -1 for none; bool [B, width]: of any."""
    batch = len(rows)
    offset = width * torch.arange(batch, device=into.device)[:, None]
    cell = torch.where(into < 0, -1, into + offset).flatten()
    weight = rows.new_ones(cell.shape, dtype=accumulate_dtype(rows.dtype))
    means, member = recycle_tokens(rows.flatten(0, 1), weight, cell, cells=batch * width, backend=backend)
    return means.unflatten(0, (batch, width)), (member >= 0).view(batch, width)


def _gathered(
    view: FeatureView, kept: Tensor, budgets: list[int] | None, merged: Tensor | None = None, by: Tensor | None = None
) -> FeatureSelection:
    """The `kept` rows (bool [T]), those with a number `by` replaced by that row of `merged`."""
    if budgets is None:
        index = kept.nonzero().flatten()
        lengths = [int(part.sum()) for part in kept.split(view.lengths)]
    else:  # known without looking
        index, lengths = (~kept).long().argsort(stable=True)[: sum(budgets)], budgets
    rows, recycled = view.features[index], torch.zeros_like(index, dtype=torch.bool)
    if merged is not None and by is not None and len(merged):
        number = by[index]
        recycled = number >= 0
        rows = torch.where(recycled[:, None], merged[number.clamp_min(0)], rows)
    return FeatureSelection(rows, index, recycled, lengths)


def _ascending(importance: Tensor, image: Tensor) -> Tensor:
    """Tokens by image, then by importance; of equals the last first, as the first is the last to go."""
    order = torch.arange(len(image) - 1, -1, -1, device=image.device)
    for key in (importance, image):
        order = order[key[order].argsort(stable=True)]
    return order


def _cells(view: FeatureView, cell: float) -> tuple[Tensor, int]:
    """The cell of every token, and the number of cells."""
    device = view.importance.device
    grids = [grid for image in view.grids for grid in image]
    cells, count = grid_cells(grids, cell, device)
    cells = held(cells)
    if view.position is not None:
        sizes = [sum(rows * columns for rows, columns in image) for image in view.grids]
        before = constant(tuple(accumulate([0, *sizes[:-1]])), device)
        cells = cells[view.position + before[images_of(tuple(view.lengths), device)[0]]]
    return cells, count


def _may_exceed(view: FeatureView, cell: float, budgets: list[int]) -> bool:
    return any(grid_cells(grids, cell, "cpu")[1] > n for grids, n in zip(view.grids, budgets, strict=True))


def images_of(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The image of every token [T], and the first token of every image [I]; on the device once: a copy would wait."""
    return held(_image_of(lengths, device)), constant(tuple(accumulate([0, *lengths[:-1]])), device)


@lru_cache(maxsize=16)
def _image_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.device("cpu"):
        return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)


_captured: list[Tensor] = []


def held(x: Tensor) -> Tensor:
    """x, which a cache has: kept for ever where a CUDA graph that is being captured reads it."""
    if x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        _captured.append(x)
    return x


def constant(values: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """On the device once: a copy would wait. Not to be written to."""
    return held(_constant(values, device, dtype))


@lru_cache(maxsize=1024)  # a packed encoder asks for several at every layer, for every size of image
def _constant(values: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)
