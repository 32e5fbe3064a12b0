"""VisionZip (CVPR 2025, arXiv 2412.04467): what the class token attends to stays, the rest is merged by its keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .._ops import Relevance, Select, ValueNorm, accumulate_dtype
from ..ops import anchor_stats_select, gather_tokens
from .base import EncoderStep, EncoderView, Policy, Selection, check_feature_layer, is_number
from .recycling import means_into


@dataclass(frozen=True, kw_only=True)
class VisionZip(Policy):
    """Keep dominant tokens of the encoder's feature layer, and merge all others into a few contextual ones.

    With a the class token's attention in that layer, head by head over all tokens, and k the head-mean key of a token:
    of the budget T, C = round(contextual_share * T) are contextual. The other T - C are dominant: the class token and
    the patches of highest mean a, of equals the first. Of the R patches that are left, in raster order, those numbered
    0, s, 2 s, ..., (C - 1) s with s = max(R // C, 1) are targets; every other one is assigned to the target of the most
    similar k (cosine, of equals the first), and a target's output becomes output + mean output of its assigned ones.
    All tokens run through the whole encoder; the projector and the language model see T.

    Tokens go on in raster order, a contextual one in its target's place and the class token in that of the first patch
    that is merged; the published code has the contextual ones last.

    The presets are the published settings: 162 + 30, 108 + 20 and 54 + 10 dominant and contextual tokens.

    Args:
        target_tokens, retain_ratio: the budget T per image, exactly one of them (see :class:`Policy`).
        contextual_share: of the budget, at least 0 and below 1; 0 drops what is not dominant.
        class_token: whether it is one of the T. Only for models that leave it out themselves.
        feature_layer: hidden_states index that is read; None: what the model's configuration says.
    """

    contextual_share: float = 10 / 64
    class_token: bool = True
    feature_layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.contextual_share) or not 0 <= self.contextual_share < 1:
            raise ValueError(f"VisionZip: contextual_share={self.contextual_share!r} must be a number in [0, 1)")
        if not isinstance(self.class_token, bool):
            raise TypeError(f"VisionZip: class_token={self.class_token!r} must be True or False")
        check_feature_layer(self)

    @property
    def needs_class_token(self) -> bool:
        return True

    @property
    def merges_features(self) -> bool:
        return True

    @property
    def keeps_blocks(self) -> bool:
        return False

    def contextual(self, budget: int) -> int:
        """Contextual tokens among `budget`."""
        return min(round(self.contextual_share * budget), budget - self.class_token)

    def encoder_step(self, layer: int, feature_layer: int, tokens: int, budget: int) -> EncoderStep | None:
        if layer != feature_layer or budget >= tokens:
            return None
        return EncoderStep(Select.FIXED, budget, static=True, merges=True)

    def encoder_select(self, step: EncoderStep, view: EncoderView) -> Selection:
        query, _ = view.anchor("cls")
        (batch, _, rows, _), device, first = view.key.shape, view.key.device, view.protect
        most, own = self.contextual(step.budget), int(self.class_token)
        live = torch.ones((batch, rows), dtype=torch.bool, device=device)
        if view.lengths is not None:
            live = torch.arange(rows, device=device) < view.lengths[:, None]
        whole, budget, budgets = None, step.budget - most - own, None
        contextual = torch.full((batch, 1), most, device=device)
        if view.budgets is not None:  # tiles, some of which may keep all that they have
            tokens = view.budgets[:, None].long()
            whole = live.sum(1, keepdim=True) - first <= tokens
            contextual = (self.contextual_share * tokens.double()).round().long()  # half to even, as Python's
            contextual = torch.minimum(contextual, tokens - own).masked_fill(whole, 0)
            budget, budgets = step.budget, (tokens - contextual - own * (~whole).long())[:, 0].int()
        score, index, lengths, entropy = anchor_stats_select(
            query,
            view.key,
            view.value,
            lengths=view.lengths,
            protect=first,
            relevance=Relevance.NONE,
            value_norm=ValueNorm.NONE,
            mode=Select.FIXED,
            budget=budget,
            budgets=budgets,
            backend=view.backend,
        )
        # One more row, for the places of `index` that hold none.
        kept = torch.zeros((batch, rows + 1), dtype=torch.bool, device=device)
        kept = kept.scatter_(1, torch.where(index < 0, rows, index), True)[:, :rows]
        kept[:, :first] = True
        rest = live & ~kept
        number = rest.cumsum(1) - 1
        stride = (rest.sum(1, keepdim=True) // contextual.clamp_min(1)).clamp_min(1)
        target = rest & (number % stride == 0) & (number // stride < contextual)
        merged = rest & ~target
        # Targets first: at most as many as the image with the largest budget has.
        targets = (~target).long().argsort(dim=1, stable=True)[:, :most]
        kept |= target
        classes = torch.zeros_like(kept)
        if self.class_token:
            classes = merged & (merged.cumsum(1) == 1)
            classes = classes if whole is None else classes & ~whole
            kept |= classes
        width = first + step.budget
        order = (~kept).long().argsort(dim=1, stable=True)[:, :width]
        absent = ~kept.gather(1, order)
        place = kept.cumsum(1) - 1
        into = torch.full_like(place, -1)
        if most:
            nearest = self._nearest(view.key, targets, contextual)
            # A tile too small for a contextual token has no target: what it merges goes nowhere.
            into = torch.where(merged & (contextual > 0), place.gather(1, targets.gather(1, nearest)), -1)
        source = torch.where(classes.gather(1, order), 0, order)
        lengths = torch.where(lengths < 0, -1, kept.sum(1)).int()
        return Selection(
            order.masked_fill(absent, -1),
            lengths,
            score,
            entropy,
            merge=partial(_merged, source=source.masked_fill(absent, -1), into=into, backend=view.backend),
            merged=(target | classes).gather(1, order),
        )

    @staticmethod
    def _nearest(key: Tensor, targets: Tensor, count: Tensor) -> Tensor:
        """Which of the `targets` [B, C], whose first `count` [B, 1] are any, has the most similar key: [B, N]."""
        unit = normalize(key.to(accumulate_dtype(key.dtype)).mean(1), dim=-1)
        centres = unit.gather(1, targets[..., None].expand(-1, -1, unit.shape[2]))
        similar = unit @ centres.transpose(1, 2)
        absent = torch.arange(targets.shape[1], device=key.device) >= count
        return similar.masked_fill(absent[:, None], float("-inf")).argmax(-1)

    def encoder_scoring_flops(
        self, step: EncoderStep, tokens: int, protect: int, width: int, heads: int, anchor: Callable[[str], int]
    ) -> int:
        rows = protect + tokens
        return 2 * rows * (width + self.contextual(step.budget) * width // heads)


def _merged(hidden: Tensor, *, source: Tensor, into: Tensor, backend: str | None) -> Tensor:
    """Rows `source` [B, M] of hidden [B, N, D], -1 for none, plus the mean of those that go `into` [B, N] them."""
    (rows,) = gather_tokens([hidden], source, backend=backend)
    return rows + means_into(hidden, into, source.shape[1], backend)[0]
