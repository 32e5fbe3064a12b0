"""VFlowOpt (ICCV 2025, arXiv 2508.05211): importance from attention hubs, recycling, stages in the language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .._ops import Relevance, Select, ValueNorm
from ..ops import anchor_stats, grid_cells, patch_entropy, received_attention
from .base import (
    DecoderView,
    EncoderStep,
    EncoderView,
    FeatureSelection,
    FeatureView,
    Policy,
    Range,
    Selection,
    check_feature_layer,
    is_number,
)
from .recycling import merge, select_features
from .stages import check_stages, keep_most_important, ratio_space, stage_step

# Published settings for LLaVA-OneVision-7B by average retention: hub_threshold, recycle_cell, R1, R2, R3.
PRESETS = {
    0.5: (28.683048, 11.756787, 0.723320, 0.748748, 0.487),
    0.25: (34.759553, 15.580797, 0.265103, 0.983343, 0.877326),
    0.1: (39.264928, 17.386982, 0.116615, 1.0, 0.6011),
}
_STAGE_LAYERS = (9, 18)  # of the 28 layers of Qwen2-7B
_ROWS = 32  # hub rows that are scored together


@dataclass(frozen=True, kw_only=True)
class VFlowOpt(Policy):
    """Prune projected features by their importance to the encoder's hubs, recycle what goes, prune on in the LLM.

    With A the head-mean attention of the last encoder layer that runs: a patch is a hub if it receives more than
    hub_threshold times what patches receive on average, and so is a class token, whose attention is made for this.
    Importance is the attention of the hubs' mean row, or where there is no hub what a patch receives, plus
    entropy_weight * softmax(entropy of the patch). The least important tokens go before the language model, and those
    of a grid cell become one, weighted by importance. Later stages keep a share of the tokens by the same importance.

    Args:
        target_tokens, retain_ratio: tokens of an image that enter the language model, recycled ones included; exactly
            one of them (see :class:`Policy`).
        hub_threshold: t, at least 0.
        entropy_weight: alpha; 0 skips the entropy.
        recycle_cell: a, edge of a cell in tokens, at least 1; None: pruned tokens are dropped.
        llm_stages: (layer, ratio) pairs: before that decoder layer, counted from 0 and at least 1, the share `ratio`
            of an image's remaining tokens stays.
        feature_layer: hidden_states index that is read; None: what the model's configuration says.
        pixel_mean, pixel_std: of the image processor, on a scale of 0..1, for the entropy; None: those that are usual
            for the tower.
        counts: "exact" leaves the budget. "release" counts as the released code: what remains besides the recycled
            tokens is rounded, images without tiles and videos are not recycled, and how many tokens are left is known
            only afterwards, so that a prompt's features are made before it is shortened.
    """

    hub_threshold: float = 30.0
    entropy_weight: float = 0.0
    recycle_cell: float | None = 16.0
    llm_stages: tuple[tuple[int, float], ...] = ()
    feature_layer: int | None = None
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    counts: Literal["exact", "release"] = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.hub_threshold) or self.hub_threshold < 0:
            raise ValueError(f"VFlowOpt: hub_threshold={self.hub_threshold!r} must be a number, at least 0")
        if not is_number(self.entropy_weight):
            raise ValueError(f"VFlowOpt: entropy_weight={self.entropy_weight!r} must be a number")
        check_stages(self)
        check_feature_layer(self)
        if self.counts not in ("exact", "release"):
            raise ValueError(f"VFlowOpt: counts={self.counts!r} must be 'exact' or 'release'")
        if self.counts == "release" and self.target_tokens is not None:
            raise ValueError("VFlowOpt: counts='release' rounds a share: give retain_ratio instead of target_tokens")
        if (self.pixel_mean is None) != (self.pixel_std is None):
            raise ValueError("VFlowOpt: give pixel_mean and pixel_std together, or neither")
        for name in ("pixel_mean", "pixel_std"):
            values = getattr(self, name)
            if values is not None:
                if not isinstance(values, (tuple, list)) or not values or not all(is_number(x) for x in values):
                    raise ValueError(f"VFlowOpt: {name}={values!r} must be a tuple of numbers, one for each channel")
                object.__setattr__(self, name, tuple(values))
        if self.pixel_std is not None and min(self.pixel_std) <= 0:
            raise ValueError(f"VFlowOpt: pixel_std={self.pixel_std} must be positive")

    @classmethod
    def release(cls, retain_ratio: float, **changes: Any) -> VFlowOpt:
        """The published settings for an average of 0.5, 0.25 or 0.1 of the tokens, counted as the released code does.

        They were found for LLaVA-OneVision-7B and its 28 decoder layers; :func:`~flowcut_kernels.tune` finds others.
        """
        if retain_ratio not in PRESETS:
            raise ValueError(f"VFlowOpt.release: retain_ratio={retain_ratio!r} must be one of {sorted(PRESETS)}")
        threshold, cell, first, *rest = PRESETS[retain_ratio]
        settings: dict[str, Any] = dict(
            retain_ratio=first,
            hub_threshold=threshold,
            recycle_cell=cell,
            llm_stages=tuple(zip(_STAGE_LAYERS, rest, strict=True)),
            counts="release",
        )
        return cls(**(settings | changes))

    def search_space(self, budget: float) -> dict[str, Range]:
        """The published space: t, alpha, a where pruned tokens are recycled, and all ratios but the last.

        Cells start at 1.5 tokens instead of 3, for encoders of fewer patches than the published one's 27 x 27.
        """
        space: dict[str, Range] = {"hub_threshold": (0.0, 50.0), "entropy_weight": (-1.0, 1.0)}
        if self.recycle_cell is not None:
            space["recycle_cell"] = (1.5, 24.0, "log")
        return space | ratio_space(self, budget)

    def encoder_budget(self, tokens: int, tiles: int = 1) -> int:
        return tokens

    @property
    def wants_pixels(self) -> bool:
        return self.entropy_weight != 0

    @property
    def prunes_features(self) -> bool:
        return True

    def feature_budget(self, tokens: int) -> int | None:
        return None if self.counts == "release" else self.budget(tokens)

    def feature_limit(self, tokens: int, grids: Sequence[tuple[int, int]], video: bool) -> int:
        pruned, cell = self._released_count(tokens, grids, video)
        return tokens - pruned + (0 if cell is None else min(pruned, grid_cells(grids, cell, "cpu")[1]))

    def encoder_step(self, layer: int, feature_layer: int, tokens: int, budget: int) -> EncoderStep | None:
        needed = layer == feature_layer and (self.may_prune or self.llm_stages)
        return EncoderStep(Select.SCORE_ONLY, static=True, lse=True) if needed else None

    def encoder_select(self, step: EncoderStep, view: EncoderView) -> Selection:
        score = self._context(view)
        if self.entropy_weight:
            assert view.pixels is not None
            values, mean, std, size, arrange = view.pixels
            bits = patch_entropy(
                values, size, mean=self.pixel_mean or mean, std=self.pixel_std or std, backend=view.backend
            )
            bits = (_in_view(bits, view) if arrange is None else arrange(bits)).to(score.dtype)
            if view.lengths is not None:
                row = torch.arange(bits.shape[1], device=bits.device)
                bits = bits.masked_fill(row >= (view.lengths - view.protect)[:, None], float("-inf"))
            score = score + float(self.entropy_weight) * bits.softmax(-1)
        if view.block > 1:
            patches = score.unflatten(1, (-1, view.block))
            score = patches.mean(2, keepdim=True).expand_as(patches).flatten(1)
        live = view.key.shape[2] if view.lengths is None else view.lengths
        lengths = torch.where(score.isfinite().all(1), live, -1).int()
        return Selection(None, lengths, torch.nn.functional.pad(score, (view.protect, 0)))

    def _context(self, view: EncoderView) -> Tensor:
        """Attention of the hubs' mean row to every patch [B, N], or what a patch receives where there is no hub."""
        assert view.query is not None
        first = view.protect
        received = received_attention(view.query, view.key, lse=view.lse, lengths=view.lengths, backend=view.backend)[
            :, first:
        ]
        patches, span, mean = received.shape[1], None, received.mean(1, keepdim=True)
        if view.lengths is not None:  # nothing is received behind them
            span = torch.stack([torch.zeros_like(view.lengths), view.lengths], 1)
            mean = received.sum(1, keepdim=True) / (view.lengths - first).clamp_min(1)[:, None]
        floor = float(self.hub_threshold) * mean  # a tensor takes no int beyond 64 bits
        most = self._most_hubs(patches)
        if received.device.type == "cpu" and not torch.compiler.is_compiling() and received.numel():
            most = min(most, int((received > floor).sum(1).max()))
        amount, hub = received.topk(most, dim=1)
        hub, weight = hub + first, (amount > floor).to(received.dtype)
        if first:
            hub, weight = torch.nn.functional.pad(hub, (1, 0)), torch.nn.functional.pad(weight, (1, 0), value=1.0)
        if hub.shape[1] == 0:
            return received
        query = view.query.gather(2, hub[:, None, :, None].expand(-1, view.query.shape[1], -1, view.query.shape[3]))
        total = torch.zeros_like(received)
        for rows, share in zip(query.split(_ROWS, 2), weight.split(_ROWS, 1), strict=True):
            attention, *_ = anchor_stats(
                rows,
                view.key,
                view.value,
                None,
                key_span=span,
                protect=first,
                relevance=Relevance.NONE,
                value_norm=ValueNorm.NONE,
                backend=view.backend,
            )
            total += (attention[..., first:] * share[..., None]).sum(1)
        hubs = weight.sum(1, keepdim=True)
        return torch.where(hubs > 0, total / hubs.clamp_min(1), received)

    def _most_hubs(self, patches: int) -> int:
        # What n hubs receive exceeds n thresholds, but not what all patches receive: n < patches / t.
        return patches if self.hub_threshold < 1 else math.ceil(patches / self.hub_threshold) - 1

    def encoder_scoring_flops(
        self, step: EncoderStep, tokens: int, protect: int, width: int, heads: int, anchor: Callable[[str], int]
    ) -> int:
        # All queries by all keys, and those of the hubs: as many as there can be.
        rows = protect + tokens
        return 2 * width * rows * (rows + protect + self._most_hubs(tokens))

    def feature_select(self, view: FeatureView) -> FeatureSelection:
        if self.counts == "exact":
            assert view.budgets is not None
            return select_features(view, view.budgets, self.recycle_cell)
        return self._released_selection(view)

    def _released_selection(self, view: FeatureView) -> FeatureSelection:
        assert view.position is None
        pruned, recycled = [], []
        for weight, grids in zip(view.importance.split(view.lengths), view.grids, strict=True):
            count, cell = self._released_count(len(weight), grids, view.video)
            lowest = weight.argsort(stable=True)[:count]
            pruned.append(torch.zeros_like(weight, dtype=torch.bool).index_fill(0, lowest, True))
            recycled.append(torch.full_like(pruned[-1], cell is not None))
        return merge(view, torch.cat(pruned), self.recycle_cell or 1.0, None, torch.cat(recycled))

    def _released_count(self, tokens: int, grids: Sequence[tuple[int, int]], video: bool) -> tuple[int, float | None]:
        """Tokens that go, and the edge of the cells that come back; None: they do not.

        round(N (1 - R1)), and floor(N / a^2) more of images made of tiles, which alone are recycled.
        """
        assert self.retain_ratio is not None
        count = round(tokens * (1 - self.retain_ratio))
        if self.recycle_cell is None or video or len(grids) == 1:
            return min(count, tokens - 1), None  # at least one stays
        return min(count + int(tokens / self.recycle_cell**2), tokens), self.recycle_cell

    def check_decoder(self, layers: int) -> None:
        check_stages(self, layers)

    def decoder_step(self, layer: int, layers: int, tokens: int, left: int) -> int | None:
        return stage_step(self, layer, left)

    def decoder_select(self, view: DecoderView) -> Selection:
        return keep_most_important(view)


def _in_view(bits: Tensor, view: EncoderView) -> Tensor:
    """Something of every patch [B, P], row by row of the image, in the order that an encoder's patches have."""
    if view.block > 1:
        side = math.isqrt(view.block)
        rows, columns = view.grid
        bits = bits.unflatten(1, (rows, side, columns, side)).transpose(2, 3).flatten(1)
    if view.places is not None:
        tokens = bits.unflatten(1, (-1, view.block))
        bits = tokens.gather(1, view.places()[..., None].expand(-1, -1, view.block)).flatten(1)
    return bits
