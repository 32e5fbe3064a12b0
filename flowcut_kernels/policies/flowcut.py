"""FlowCut (NeurIPS 2025, arXiv 2505.19536): information flow decides, layer by layer, what to drop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch

from .._ops import Relevance, Select, ValueNorm
from ..ops import anchor_stats_select
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
    is_whole,
)
from .recycling import constant, select_features
from .stages import check_stages, keep_most_important, ratio_space, stage_step

CRITERIA = ("attention", "relevance", "value_norm")
_RELEVANCE = {kind.name.lower(): kind for kind in Relevance}
_VALUE_NORM = {kind.name.lower(): kind for kind in ValueNorm}


@dataclass(frozen=True, kw_only=True)
class FlowCut(Policy):
    """Prune inside the vision encoder by cumulative score, as many tokens as the attention entropy allows.

    At every layer up to the one before the feature layer: s = (w_a a / sum a + w_r r / sum r) * g^w_g from the anchor's
    attention a, the relevance r of value vectors and their L1 norm g, with weights w that the paper sets to 1;
    S = history_weight * S + (1 - history_weight) * s. Every `interval` layers,
    round((N - T) / sqrt(remaining) * (1 - h^entropy_exponent)) tokens of lowest S go, h being the entropy ratio of a;
    the last cut leaves exactly the budget. The class token always stays.

    Args:
        target_tokens, retain_ratio: the budget T per image, exactly one of them (see :class:`Policy`).
        criteria: which of "attention", "relevance", "value_norm" enter the score.
        criteria_weights: w of the three, in this order: finite, not negative, that of an absent criterion is ignored. A
            weight of 0 leaves its criterion out; relevance and value norm are then not computed.
        relevance: "cosine" (default), "scaled_softmax" (as the paper writes it) or "softmax" (released code).
        value_norm: L1 norm of the "full" value vector (default) or of its "head_mean" (released code).
        cumulative: False scores each pruning layer on its own.
        history_weight: weight of the history in S, 0..1.
        interval: layers between two cuts, counted back from the last.
        entropy_exponent: of the entropy ratio in the count, positive: the larger, the more goes early.
        adaptive: False prunes the same share at every cut instead of following the entropy. Its shapes are static, and
            on a GPU scores that are not finite give NaN features instead of an error, as with a `schedule`.
        batch: "independent" images, or the "max" count of the batch for all (released code).
        anchor: "cls", "mean" (mean token), or "auto": CLS where the encoder has one.
        feature_layer: hidden_states index that is read (-2, ...); None: what the model's configuration says.
        llm_layer: decoder layer that makes the last cut, to T, by what the last instruction token thinks of the visual
            tokens (methods of LLaVA-NeXT and Qwen2-VL: 1); None: the encoder makes it.
        encoder_surplus: with ``llm_layer`` or ``recycle_cell``, tokens the encoder leaves as a multiple of T.
        view_share: with ``llm_layer``, and where an image has several views (tiles), tokens the encoder leaves of each
            view as a multiple of T, whatever their number (released code: 0.5); None: `encoder_surplus`, spread evenly
            over the views.
        recycle_cell: edge of a cell in tokens, at least 1: the encoder's surplus is not dropped, but those of a cell
            become one, weighted by S, so that T enter the language model (VFlowOpt); None: no recycling.
        llm_stages: (layer, ratio) pairs: before that decoder layer, counted from 0 and at least 1, the share `ratio`
            of an image's remaining tokens stays, by S (VFlowOpt). Neither goes with ``llm_layer``.
        positions: "keep" the positions of the prompt in the layers after a cut in the language model, or "renumber"
            them without gaps (released code).
        schedule: (layer, kept by its cut) pairs instead of the entropy rule: patches as whole numbers, the budget last,
            for images of one size; or for images and tiles of any size shares of what is above their budgets, falling
            from below 1.0 to 0.0. Shapes are then static and nothing is read back, but for windows; set by
            :func:`~flowcut_kernels.calibrate`.
    """

    criteria: tuple[str, ...] = CRITERIA
    criteria_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    relevance: Literal["cosine", "softmax", "scaled_softmax"] = "cosine"
    value_norm: Literal["full", "head_mean"] = "full"
    cumulative: bool = True
    history_weight: float = 0.5
    interval: int = 2
    entropy_exponent: float = 2.0
    adaptive: bool = True
    batch: Literal["independent", "max"] = "independent"
    anchor: Literal["auto", "cls", "mean"] = "auto"
    feature_layer: int | None = None
    llm_layer: int | None = None
    encoder_surplus: float = 2.0
    view_share: float | None = None
    recycle_cell: float | None = None
    llm_stages: tuple[tuple[int, float], ...] = ()
    positions: Literal["keep", "renumber"] = "keep"
    schedule: tuple[tuple[int, float], ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        criteria = self.criteria
        listed = isinstance(criteria, (tuple, list, set, frozenset)) and len(criteria) > 0
        if not listed or any(c not in CRITERIA for c in criteria):
            raise ValueError(f"FlowCut: criteria={criteria!r} must be a non-empty subset of {CRITERIA}")
        object.__setattr__(self, "criteria", tuple(c for c in CRITERIA if c in criteria))
        self._check_weights()
        for name, allowed in (
            ("relevance", ("cosine", "softmax", "scaled_softmax")),
            ("value_norm", ("full", "head_mean")),
            ("batch", ("independent", "max")),
            ("anchor", ("auto", "cls", "mean")),
            ("positions", ("keep", "renumber")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"FlowCut: {name}={getattr(self, name)!r} must be one of {allowed}")
        for name in ("cumulative", "adaptive"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"FlowCut: {name}={getattr(self, name)!r} must be True or False")
        weight = self.history_weight
        if not is_number(weight) or not 0 <= weight <= 1:
            raise ValueError(f"FlowCut: history_weight={weight!r} must be a number in 0..1")
        if not is_whole(self.interval) or self.interval < 1:
            raise ValueError(f"FlowCut: interval={self.interval!r} must be a whole number of layers, at least 1")
        if not is_number(self.entropy_exponent) or self.entropy_exponent <= 0:
            raise ValueError(f"FlowCut: entropy_exponent={self.entropy_exponent!r} must be a finite number above 0")
        if self.llm_layer is not None and (not is_whole(self.llm_layer) or self.llm_layer < 0):
            raise ValueError(f"FlowCut: llm_layer={self.llm_layer!r} must be None or a decoder layer, counted from 0")
        if self.view_share is not None and (not is_number(self.view_share) or self.view_share <= 0):
            raise ValueError(f"FlowCut: view_share={self.view_share!r} must be None or a number above 0")
        surplus = self.encoder_surplus
        if not is_number(surplus) or surplus < 1:
            raise ValueError(f"FlowCut: encoder_surplus={surplus!r} must be a number, at least 1")
        check_stages(self)
        if self.llm_layer is not None and self.prunes_features:
            raise ValueError(
                f"FlowCut: llm_layer={self.llm_layer} with recycle_cell={self.recycle_cell}, llm_stages="
                f"{self.llm_stages}: cut by the last instruction token (the former) or by the encoder's score"
            )
        check_feature_layer(self)
        if self.schedule is not None:
            self._check_schedule()

    def _check_weights(self) -> None:
        weights = self.criteria_weights
        listed = isinstance(weights, (tuple, list)) and len(weights) == len(CRITERIA)
        if not listed or not all(is_number(weight) and weight >= 0 for weight in weights):
            raise ValueError(
                f"FlowCut: criteria_weights={weights!r} must be three finite numbers >= 0, in the order of {CRITERIA}"
            )
        if not any(weight for name, weight in zip(CRITERIA, weights, strict=True) if name in self.criteria):
            raise ValueError(f"FlowCut: criteria_weights={weights!r} must be above 0 for one of {self.criteria}")
        object.__setattr__(self, "criteria_weights", tuple(weights))

    def _check_schedule(self) -> None:
        try:
            pairs = tuple((layer, kept) for layer, kept in self.schedule or ())
        except (TypeError, ValueError):
            pairs = ()
        steps = list(pairwise(pairs))
        shares = bool(pairs) and all(isinstance(kept, float) and 0 <= kept < 1 for _, kept in pairs)
        counts = bool(pairs) and all(is_whole(kept) and kept > 0 for _, kept in pairs)
        layers = all(is_whole(layer) and layer >= 0 for layer, _ in pairs)
        if not layers or not (counts or (shares and pairs[-1][1] == 0)):
            raise ValueError(
                f"FlowCut: schedule={self.schedule!r} must be (layer, kept) pairs of whole numbers, or of a layer and "
                "a share below 1.0, the last 0.0"
            )
        if any(later[0] <= layer or later[1] >= kept for (layer, kept), later in steps):
            raise ValueError(f"FlowCut: schedule={self.schedule!r} must name rising layers and falling counts")
        if counts and self.target_tokens is not None and pairs[-1][1] != self._left_by_encoder(self.target_tokens):
            raise ValueError(
                f"FlowCut: schedule={self.schedule!r} must end with target_tokens={self.target_tokens} (times "
                "encoder_surplus where llm_layer or recycle_cell is set): calibrate again"
            )
        object.__setattr__(self, "schedule", pairs)

    def _left_by_encoder(self, budget: int) -> int:
        last = self.llm_layer is None and self.recycle_cell is None
        return budget if last else round(self.encoder_surplus * min(budget, 2**53))  # more than any image has

    def encoder_budget(self, tokens: int, tiles: int = 1) -> int:
        budget = self.budget(tokens)
        if self.view_share is not None and self.llm_layer is not None and tiles > 1:
            return min(max(round(self.view_share * budget), 1) * tiles, tokens)
        return min(self._left_by_encoder(budget), tokens)

    def check_encoder(self, feature_layer: int, tokens: int) -> None:
        budget = self.encoder_budget(tokens)
        if self.schedule is None or budget >= tokens:
            return
        (_, first), (layer, last) = self.schedule[0], self.schedule[-1]
        if layer >= feature_layer or (not isinstance(last, float) and (first >= tokens or last != budget)):
            raise ValueError(
                f"FlowCut: schedule={self.schedule} does not fit an encoder of {tokens} patches whose layer "
                f"{feature_layer} is read, with {budget} to keep: calibrate on this model"
            )

    @classmethod
    def release(cls, target_tokens: int | None = None, retain_ratio: float | None = None, **changes: Any) -> FlowCut:
        """The same kept tokens as the authors' released code."""
        settings: dict[str, Any] = dict(
            relevance="softmax", value_norm="head_mean", batch="max", positions="renumber", view_share=0.5
        )
        return cls(target_tokens, retain_ratio, **settings | changes)

    def search_space(self, budget: float) -> dict[str, Range]:
        """Weights relative to the attention's, exponents, history, interval, and VFlowOpt's where they act."""
        space: dict[str, Range] = {"interval": (1, 6, "int")}
        if {"attention", "relevance"} <= set(self.criteria):
            space["criteria_weights.1"] = (0.1, 10.0, "log")
        if "value_norm" in self.criteria:
            space["criteria_weights.2"] = (0.1, 3.0)
        if self.cumulative:
            space["history_weight"] = (0.0, 0.95)
        if self.adaptive:
            space["entropy_exponent"] = (0.5, 8.0, "log")
        if self.recycle_cell is not None:
            space |= dict(recycle_cell=(1.5, 24.0, "log"), encoder_surplus=(1.0, 4.0))
        return space | ratio_space(self, budget)

    def encoder_step(self, layer: int, feature_layer: int, tokens: int, budget: int) -> EncoderStep | None:
        remaining = feature_layer - 1 - layer
        if remaining < 0:
            return None
        if budget >= tokens:  # others may still want the score
            wanted = self.prunes_features and (self.may_prune or self.llm_stages)
            return (
                EncoderStep(Select.SCORE_ONLY, static=True) if wanted and (self.cumulative or not remaining) else None
            )
        if self.schedule is not None:
            return self._scheduled_step(layer, tokens, budget)
        if remaining % self.interval:
            return EncoderStep(Select.SCORE_ONLY, static=not self.adaptive) if self.cumulative else None
        if remaining == 0:
            return EncoderStep(Select.FIXED, budget, static=not self.adaptive)
        if self.adaptive:
            mode = Select.ADAPTIVE_BATCH if self.batch == "max" else Select.ADAPTIVE
            return EncoderStep(mode, budget, math.sqrt(remaining))
        # The same share at every cut: after cut i of m, N * (T/N)^(i/m) tokens are left.
        cuts = (feature_layer - 1) // self.interval + 1
        done = cuts - remaining // self.interval
        kept = max(budget, round(tokens * (budget / tokens) ** (done / cuts)))
        return EncoderStep(Select.FIXED, kept, static=True)

    def _scheduled_step(self, layer: int, tokens: int, budget: int) -> EncoderStep | None:
        assert self.schedule is not None
        last = self.schedule[-1][1]
        if not isinstance(last, float) and last != budget:
            raise ValueError(
                f"FlowCut: schedule={self.schedule} does not end with the {budget} to keep of the {tokens} tokens of "
                "an image or a tile: calibrate with images like these among the samples"
            )
        kept = dict(self.schedule).get(layer)
        if kept is not None:
            count = budget + round(kept * (tokens - budget)) if isinstance(kept, float) else kept
            return EncoderStep(Select.FIXED, count, static=True)
        scores = self.cumulative and layer < self.schedule[-1][0]
        return EncoderStep(Select.SCORE_ONLY, static=True) if scores else None

    def _anchor(self, protect: int) -> str:
        return self.anchor if self.anchor != "auto" else ("cls" if protect else "mean")

    def encoder_select(self, step: EncoderStep, view: EncoderView) -> Selection:
        query, value_anchor = view.anchor(self._anchor(view.protect))
        relevance = _RELEVANCE[self.relevance] if "relevance" in self.criteria else Relevance.NONE
        score, index, lengths, entropy = anchor_stats_select(
            query,
            view.key,
            view.value,
            value_anchor if relevance else None,
            history=view.history if self.cumulative else None,
            lengths=view.lengths,
            protect=view.protect,
            attention="attention" in self.criteria,
            relevance=relevance,
            value_norm=_VALUE_NORM[self.value_norm] if "value_norm" in self.criteria else ValueNorm.NONE,
            criteria_weights=self.criteria_weights,
            history_weight=self.history_weight,
            mode=step.mode,
            budget=step.budget,
            divisor=step.divisor,
            entropy_exponent=self.entropy_exponent,
            budgets=view.budgets,
            block=view.block,
            backend=view.backend,
        )
        return Selection(index if step.prunes else None, lengths, score, entropy)

    def encoder_scoring_flops(
        self, step: EncoderStep, tokens: int, protect: int, width: int, heads: int, anchor: Callable[[str], int]
    ) -> int:
        return anchor(self._anchor(protect)) + self._statistics_flops(protect + tokens, width, width)

    @property
    def prunes_features(self) -> bool:
        return self.recycle_cell is not None or bool(self.llm_stages)

    def feature_budget(self, tokens: int) -> int:
        return self.encoder_budget(tokens) if self.recycle_cell is None else self.budget(tokens)

    def feature_select(self, view: FeatureView) -> FeatureSelection:
        assert view.budgets is not None
        return select_features(view, view.budgets, self.recycle_cell)

    @property
    def renumbers(self) -> bool:
        return self.positions == "renumber"

    def check_decoder(self, layers: int) -> None:
        check_stages(self, layers)
        if self.llm_layer is not None and self.llm_layer >= layers:
            raise ValueError(f"FlowCut: llm_layer={self.llm_layer} but the language model has {layers} layers")

    def decoder_step(self, layer: int, layers: int, tokens: int, left: int) -> int | None:
        return self.budget(tokens) if layer == self.llm_layer else stage_step(self, layer, left)

    def decoder_select(self, view: DecoderView) -> Selection:
        if self.llm_stages:
            return keep_most_important(view)
        relevance = _RELEVANCE[self.relevance] if "relevance" in self.criteria else Relevance.NONE
        if relevance == Relevance.SOFTMAX:  # the released code scales here, though not in the encoder
            relevance = Relevance.SCALED_SOFTMAX
        query, key, value, value_anchor = view.heads()
        budget = max(view.budgets)
        lengths = budgets = None
        if min(view.lengths) < key.shape[2]:
            lengths = constant(tuple(view.lengths), key.device)
        if min(view.budgets) < budget:
            budgets = constant(tuple(view.budgets), key.device, torch.int32)
        score, index, kept, entropy = anchor_stats_select(
            query,
            key,
            value,
            value_anchor if relevance else None,
            lengths=lengths,
            attention="attention" in self.criteria,
            relevance=relevance,
            value_norm=_VALUE_NORM[self.value_norm] if "value_norm" in self.criteria else ValueNorm.NONE,
            criteria_weights=self.criteria_weights,
            mode=Select.FIXED,
            budget=budget,
            budgets=budgets,
            backend=view.backend,
        )
        return Selection(index, kept, score, entropy)

    def decoder_scoring_flops(self, tokens: int, width: int, key_width: int) -> int:
        return 0 if self.llm_stages else self._statistics_flops(tokens, width, key_width)

    def _statistics_flops(self, rows: int, width: int, key_width: int) -> int:
        related = "relevance" in self.criteria and self.criteria_weights[1] > 0
        return 2 * rows * (width + key_width * related)
