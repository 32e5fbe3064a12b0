"""The limit of pruning inside the encoder: a schedule followed by rows that nobody had to choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .._ops import Select
from ..policies import FlowCut
from ..policies.base import EncoderStep, EncoderView, Policy, Selection
from ..trace import Stage


@dataclass(frozen=True, kw_only=True)
class FreeSelection(Policy):
    """Keep the first rows at every cut of a schedule: all the arithmetic of the policy it mimics, none of its scoring.

    The same counts for every image, those of the mean image.
    """

    schedule: tuple[tuple[int, int], ...]
    feature_layer: int | None = None

    @classmethod
    def like(cls, policy: FlowCut, stages: Sequence[Stage]) -> FreeSelection:
        """The schedule that was seen, as means over the images."""
        counts = [(stage.layer, round(sum(stage.kept) / len(stage.kept))) for stage in stages]
        return cls(policy.target_tokens, policy.retain_ratio, schedule=tuple(counts))

    def encoder_step(self, layer: int, feature_layer: int, tokens: int, budget: int) -> EncoderStep | None:
        kept = dict(self.schedule).get(layer)
        return None if kept is None else EncoderStep(Select.FIXED, kept, static=True)

    def encoder_select(self, step: EncoderStep, view: EncoderView) -> Selection:
        images, rows = len(view.key), min(step.budget * view.block + view.protect, view.key.shape[2])
        index, lengths = _rows(images, rows, view.key.device)
        return Selection(index, lengths)


@cache
def _rows(images: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first rows of every image and their number, made once: the limit launches nothing."""
    index = torch.arange(rows, device=device).repeat(images, 1)
    return index, torch.full((images,), rows, dtype=torch.int32, device=device)
