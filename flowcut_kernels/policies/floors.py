"""Sanity floors: choose tokens without looking at them, at the same point as FlowCut's last cut."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .._ops import Select
from .base import EncoderStep, EncoderView, Policy, Selection, check_feature_layer, is_whole


@dataclass(frozen=True, kw_only=True)
class _BlindPolicy(Policy):
    feature_layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_feature_layer(self)

    def encoder_step(self, layer: int, feature_layer: int, tokens: int) -> EncoderStep | None:
        budget = self.budget(tokens)
        return (
            EncoderStep(Select.FIXED, budget, static=True) if layer == feature_layer - 1 and budget < tokens else None
        )

    def encoder_select(self, step: EncoderStep, view: EncoderView) -> Selection:
        index, lengths = _chosen(self, view.grid, step.budget, view.protect, view.key.device)
        batch = view.key.shape[0]
        return Selection(index.expand(batch, -1), lengths.expand(batch))

    def _patches(self, grid: tuple[int, int], budget: int) -> Tensor:
        raise NotImplementedError


@lru_cache(maxsize=16)
def _chosen(
    policy: _BlindPolicy, grid: tuple[int, int], budget: int, protect: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rows [M] and their number [], copied to the device once: a copy would wait for it."""
    index = torch.cat([torch.arange(protect), policy._patches(grid, budget) + protect])
    return index.to(device), torch.tensor(len(index), dtype=torch.int32, device=device)


@dataclass(frozen=True, kw_only=True)
class RandomTokens(_BlindPolicy):
    """Keep a random subset of patches: a function of ``seed`` and the grid alone, the same for every image.

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

    def _patches(self, grid: tuple[int, int], budget: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(grid[0] * grid[1], generator=generator, device="cpu")[:budget].sort().values


@dataclass(frozen=True, kw_only=True)
class UniformTokens(_BlindPolicy):
    """Keep patches on a regular grid: about sqrt(T * rows / columns) rows, the budget spread evenly over them.

    Args:
        target_tokens, retain_ratio: the budget per image, exactly one of them (see :class:`Policy`).
        feature_layer: hidden_states index that is read; None: what the model's configuration says.
    """

    def _patches(self, grid: tuple[int, int], budget: int) -> Tensor:
        rows, columns = grid
        # Enough rows that none has to hold more than all its columns.
        lines = min(max(round((budget * rows / columns) ** 0.5), -(-budget // columns), 1), rows)
        chosen = []
        for i in range(lines):
            row = (2 * i + 1) * rows // (2 * lines)
            count = (i + 1) * budget // lines - i * budget // lines
            chosen += [row * columns + (2 * j + 1) * columns // (2 * count) for j in range(count)]
        return torch.tensor(chosen)
