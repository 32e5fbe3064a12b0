"""The limit of pruning: a policy's schedule followed with rows that nobody had to choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from .._ops import Select
from ..policies.base import (
    DecoderView,
    EncoderStep,
    EncoderView,
    FeatureSelection,
    FeatureView,
    Policy,
    Selection,
)
from ..trace import Stage


@dataclass(frozen=True, kw_only=True)
class FreeSelection(Policy):
    """Keep the first rows at every cut of another policy: all of its arithmetic, none of its scoring and merging.

    The layers that it scores run as under it. The same counts for every image, those of the mean image.

    Args:
        policy: that is mimicked; one that knows its counts before it chooses.
        schedule: (layer, tokens left) of its cuts in the encoder.
        device: of the model.
    """

    policy: Policy
    schedule: tuple[tuple[int, int], ...]
    device: torch.device
    feature_layer: int | None = None

    @classmethod
    def like(cls, policy: Policy, stages: Sequence[Stage], device: torch.device) -> FreeSelection:
        """With the cuts that were seen, as means over the images."""
        cuts = [stage for stage in stages if stage.name == "encoder"]
        counts = tuple((cut.layer, round(sum(cut.kept) / len(cut.kept))) for cut in cuts)
        return cls(policy.target_tokens, policy.retain_ratio, policy=policy, schedule=counts, device=device)

    def encoder_budget(self, tokens: int, tiles: int = 1) -> int:
        return self.policy.encoder_budget(tokens, tiles)

    def encoder_step(self, layer: int, feature_layer: int, tokens: int, budget: int) -> EncoderStep | None:
        step = self.policy.encoder_step(layer, feature_layer, tokens, budget)
        if step is None or not step.prunes:
            return step and EncoderStep(Select.SCORE_ONLY, static=True)
        kept = dict(self.schedule).get(layer)
        return None if kept is None else EncoderStep(Select.FIXED, kept, static=True, merges=step.merges)

    def encoder_select(self, step: EncoderStep, view: EncoderView) -> Selection:
        images, _, rows, _ = view.key.shape
        left = min(step.budget * view.block + view.protect, rows) if step.prunes else rows
        index, lengths = _rows(images, left, view.key.device)
        # Who chooses among the features is asked only where somebody scored.
        score = _nothing(images, rows, view.key.device) if self.prunes_features else None
        merge = (lambda hidden: hidden[:, :left]) if step.merges else None
        return Selection(index if step.prunes else None, lengths, score, merge=merge)

    @property
    def merges_features(self) -> bool:
        return self.policy.merges_features

    @property
    def keeps_blocks(self) -> bool:
        return self.policy.keeps_blocks

    @property
    def prunes_features(self) -> bool:
        return self.policy.prunes_features

    def feature_budget(self, tokens: int) -> int | None:
        return self.policy.feature_budget(tokens)

    def feature_select(self, view: FeatureView) -> FeatureSelection:
        assert view.budgets is not None
        index, single = _first(tuple(view.lengths), tuple(view.budgets), view.features.device)
        return FeatureSelection(view.features[index], index, single, view.budgets)

    @property
    def renumbers(self) -> bool:
        return self.policy.renumbers

    def check_decoder(self, layers: int) -> None:
        self.policy.check_decoder(layers)

    def decoder_step(self, layer: int, layers: int, tokens: int, left: int) -> int | None:
        return self.policy.decoder_step(layer, layers, tokens, left)

    def decoder_entry(self, layer: int, layers: int, tokens: int, left: int) -> int | None:
        return self.policy.decoder_entry(layer, layers, tokens, left)

    def decoder_select(self, view: DecoderView) -> Selection:
        return Selection(*_rows(len(view.budgets), max(view.budgets), self.device))

    entry_select = decoder_select


# Made once: the limit launches nothing.


@cache
def _rows(images: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first rows of every image and their number."""
    index = torch.arange(rows, device=device).repeat(images, 1)
    return index, torch.full((images,), rows, dtype=torch.int32, device=device)


@cache
def _nothing(images: int, rows: int, device: torch.device) -> Tensor:
    """A score of every row."""
    return torch.zeros((images, rows), device=device)


@cache
def _first(lengths: tuple[int, ...], budgets: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The first of every image's features, which follow each other, and that they stand for one each."""
    starts = accumulate((0, *lengths[:-1]))
    index = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, budgets, strict=True)]).to(device)
    return index, torch.zeros_like(index, dtype=torch.bool)
