"""Sanity floors: one cut where FlowCut makes its last, without looking at the tokens or by the attention alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .._ops import Select
from .base import EncoderStep, EncoderView, Policy, Selection, check_feature_layer, is_whole
from .flowcut import FlowCut
from .recycling import held

_ATTENTION = FlowCut(1, criteria=("attention",), cumulative=False)  # the budget is the step's


@dataclass(frozen=True, kw_only=True)
class _OneCut(Policy):
    feature_layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_feature_layer(self)

    def encoder_step(self, layer: int, feature_layer: int, tokens: int, budget: int) -> EncoderStep | None:
        return (
            EncoderStep(Select.FIXED, budget, static=True) if layer == feature_layer - 1 and budget < tokens else None
        )


class _BlindPolicy(_OneCut):
    def encoder_select(self, step: EncoderStep, view: EncoderView) -> Selection:
        batch, device = view.key.shape[0], view.key.device
        budgets = [step.budget] * batch if view.budgets is None else view.budgets.tolist()
        grids = view.grids or [view.grid] * batch
        if view.places is None:
            index, lengths = _chosen(self, tuple(grids), tuple(budgets), view.protect, view.block, device)
            return Selection(held(index), held(lengths))
        tokens = [view.key.shape[2]] * batch if view.lengths is None else view.lengths.tolist()
        rows = []
        for grid, n, place, budget in zip(grids, tokens, view.places().cpu(), budgets, strict=True):
            place, order = place[: (n - view.protect) // view.block].sort()
            chosen = order[self._tokens(_rectangle(place, grid), min(budget, len(place)))].sort().values
            rows.append(_rows(chosen, view.protect, view.block))
        index, lengths = _padded(rows)
        return Selection(index.to(device), lengths.to(device))

    def _tokens(self, grid: tuple[int, int], budget: int) -> Tensor:
        raise NotImplementedError


def _rectangle(places: Tensor, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the part of a grid that ascending `places` [n] fill; one row where it is no rectangle."""
    if len(places) in (0, prod(grid)):
        return grid
    row, column = places // grid[1], places % grid[1]
    sides = int(row[-1] - row[0]) + 1, int(column.max() - column.min()) + 1
    return sides if prod(sides) == len(places) else (1, len(places))


def _rows(tokens: Tensor, protect: int, block: int) -> Tensor:
    """Protected rows, then those of `tokens`."""
    patches = (tokens[:, None] * block + torch.arange(block, device="cpu")).flatten()
    return torch.cat([torch.arange(protect, device="cpu"), patches + protect])


def _padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """`rows` [B, M], -1 after the last of a shorter one, and how many each are [B]."""
    index = pad_sequence(rows, batch_first=True, padding_value=-1)
    return index, torch.tensor([len(row) for row in rows], dtype=torch.int32, device="cpu")


@lru_cache(maxsize=16)
def _chosen(
    policy: _BlindPolicy,
    grids: tuple[tuple[int, int], ...],
    budgets: tuple[int, ...],
    protect: int,
    block: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Of grids whose tokens are all there, copied to the device once: a copy would wait for it."""
    kinds = [*zip(grids, budgets, strict=True)]
    with torch.inference_mode(False):  # what is kept must serve autograd too
        made = {kind: policy._tokens(kind[0], min(kind[1], prod(kind[0]))) for kind in kinds}
        index, lengths = _padded([_rows(made[kind], protect, block) for kind in kinds])
        return index.to(device), lengths.to(device)


@dataclass(frozen=True, kw_only=True)
class RandomTokens(_BlindPolicy):
    """Keep a random subset of tokens: a function of ``seed`` and the grid alone, the same for every image.

    Args:
        target_tokens, retain_ratio: the budget per image, exactly one of them (see :class:`Policy`).
        seed: of the subset; vary it to average over subsets.
        feature_layer: hidden_states index that is read; None: what the model's configuration says.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.seed):
            raise TypeError(f"RandomTokens: seed={self.seed!r} must be an int")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"RandomTokens: seed={self.seed} must be a number of 64 bits, as torch takes it")

    def _tokens(self, grid: tuple[int, int], budget: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(grid[0] * grid[1], generator=generator, device="cpu")[:budget].sort().values


@dataclass(frozen=True, kw_only=True)
class UniformTokens(_BlindPolicy):
    """Keep tokens on a regular grid: about sqrt(T * rows / columns) rows, the budget spread evenly over them.

    Args:
        target_tokens, retain_ratio: the budget per image, exactly one of them (see :class:`Policy`).
        feature_layer: hidden_states index that is read; None: what the model's configuration says.
    """

    def _tokens(self, grid: tuple[int, int], budget: int) -> Tensor:
        rows, columns = grid
        # Enough rows that none has to hold more than all its columns.
        lines = min(max(round((budget * rows / columns) ** 0.5), -(-budget // columns), 1), rows)
        chosen = []
        for i in range(lines):
            row = (2 * i + 1) * rows // (2 * lines)
            count = (i + 1) * budget // lines - i * budget // lines
            chosen += [row * columns + (2 * j + 1) * columns // (2 * count) for j in range(count)]
        return torch.tensor(chosen, dtype=torch.long, device="cpu")


@dataclass(frozen=True, kw_only=True)
class AttentionTokens(_OneCut):
    """Keep the tokens that the anchor attends to most, in one cut: FlowCut without all that it adds to attention.

    That is the class token's attention in the last layer before the feature layer, softmax over all keys, mean over
    heads, of equals the first. Where an encoder has no class token, the mean token's (see :class:`FlowCut`).

    Args:
        target_tokens, retain_ratio: the budget per image, exactly one of them (see :class:`Policy`).
        feature_layer: hidden_states index that is read; None: what the model's configuration says.
    """

    def encoder_select(self, step: EncoderStep, view: EncoderView) -> Selection:
        return _ATTENTION.encoder_select(step, view)

    def encoder_scoring_flops(
        self, step: EncoderStep, tokens: int, protect: int, width: int, heads: int, anchor: Callable[[str], int]
    ) -> int:
        return _ATTENTION.encoder_scoring_flops(step, tokens, protect, width, heads, anchor)
