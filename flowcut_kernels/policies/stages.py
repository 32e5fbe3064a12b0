"""Stages in the language model: on an importance known beforehand (VFlowOpt, arXiv 2508.05211), or by attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch

from .._ops import Select
from ..ops import score_select
from .base import DecoderView, EncoderStep, Policy, Range, Selection, is_number, is_whole
from .recycling import constant


class DecoderPolicy(Policy):
    """Base of the policies that leave the vision encoder alone: what it puts out enters the language model."""

    presets: ClassVar[Mapping[int, Mapping[str, Any]]] = {}  # the budget is no average

    def encoder_budget(self, tokens: int, tiles: int = 1) -> int:
        return tokens

    def encoder_step(self, layer: int, feature_layer: int, tokens: int, budget: int) -> EncoderStep | None:
        return None


def check_stages(policy: Any, layers: int | None = None) -> None:
    """ValueError unless ``policy.recycle_cell`` and ``policy.llm_stages`` make sense, for a model of `layers` if given.

    Stages are kept as tuples.
    """
    name, cell = type(policy).__name__, policy.recycle_cell
    if cell is not None and (not is_number(cell) or cell < 1):
        raise ValueError(f"{name}: recycle_cell={cell!r} must be None or a number of tokens, at least 1")
    try:
        stages = tuple((layer, ratio) for layer, ratio in policy.llm_stages)
    except (TypeError, ValueError):
        stages = ((None, None),)
    for layer, ratio in stages:
        if not is_whole(layer) or layer < 1 or not is_number(ratio) or not 0 < ratio <= 1:
            raise ValueError(
                f"{name}: llm_stages={policy.llm_stages!r} must be (layer, ratio) pairs: a decoder layer, at least 1, "
                "and a share in (0, 1]"
            )
    if any(later[0] <= earlier[0] for earlier, later in pairwise(stages)):
        raise ValueError(f"{name}: llm_stages={policy.llm_stages!r} must name rising layers")
    object.__setattr__(policy, "llm_stages", stages)
    if layers is not None and stages and stages[-1][0] >= layers:
        raise ValueError(
            f"{name}: llm_stages={stages} names layer {stages[-1][0]}, but the language model has {layers} layers"
        )


def stage_step(policy: Any, layer: int, left: int) -> int | None:
    """What a stage before the layer after `layer` keeps of an image's tokens; None: there is no such stage."""
    ratio = dict(policy.llm_stages).get(layer + 1)
    return None if ratio is None else max(left - round(left * (1 - ratio)), min(left, 1))


def average_retention(first: float, stages: tuple[tuple[int, float], ...], layers: int) -> float:
    """Mean share of an image's tokens over `layers` decoder layers that `first` of them enter."""
    total, share, since = 0.0, first, 0
    for layer, ratio in stages:
        total += share * (layer - since)
        share, since = share * ratio, layer
    return (total + share * (layers - since)) / layers


def feasible_ratios(
    known: Sequence[float],
    later: Sequence[tuple[float, float]],
    layers_of_stages: Sequence[int],
    budget: float,
    layers: int,
) -> tuple[float, float]:
    """Lowest and highest next ratio with which the later ones can still reach an average retention of `budget`.

    Args:
        known: ratios that are chosen: what enters the language model, then of its first stages.
        later: lowest and highest value of each ratio after the next.
        layers_of_stages: layers of all stages, known and not.
        layers: of the language model.

    Returns:
        Two numbers that may lie beyond 1 or in the wrong order where no ratio will do; the same number twice for the
        last ratio.
    """

    def solved(rest: list[float]) -> float:
        """The ratio that reaches the budget where the later ones are `rest`; the average is linear in it."""

        def average(ratio: float) -> float:
            ratios = [*known, ratio, *rest]
            return average_retention(ratios[0], tuple(zip(layers_of_stages, ratios[1:], strict=True)), layers)

        return (budget - average(0.0)) / (average(1.0) - average(0.0))

    return solved([high for _, high in later]), solved([low for low, _ in later])


def ratio_space(policy: Any, budget: float) -> dict[str, Range]:
    """The published ranges of all ratios but the last, which follows from the budget."""
    if not policy.llm_stages:
        return {}
    stages: dict[str, Range] = {f"llm_stages.{i}": (0.533, 1.0) for i in range(len(policy.llm_stages) - 1)}
    return {"retain_ratio": (budget, min(1.5 * budget, 1.0))} | stages


def keep_most_important(view: DecoderView) -> Selection:
    """The `view.budgets` tokens of highest importance of every image, ties to the earlier."""
    if view.importance is None:
        raise ValueError(
            "llm_stages keep tokens by the importance that their encoding gave them, which is not known of these "
            "features: give pixel_values, or features that the patched model encoded"
        )
    importance, device = view.importance, view.importance.device
    most = importance.shape[1]
    place = torch.arange(most, device=device)
    if min(view.lengths) < most:
        importance = importance.masked_fill(place >= constant(tuple(view.lengths), device)[:, None], float("-inf"))
    width = max(view.budgets)
    index = importance.argsort(dim=1, descending=True, stable=True)[:, :width]
    lengths = constant(tuple(view.budgets), device, torch.int32)
    if min(view.budgets) < width:
        index = index.masked_fill(place[:width] >= lengths[:, None], most)
    index = index.sort(dim=1).values
    return Selection(index.masked_fill(index == most, -1), lengths, importance)


def keep_most_attended(view: DecoderView) -> Selection:
    """The `view.budgets` tokens of every image to which the prompt's last token attends most, ties to the earlier."""
    attention, budget = view.attention(), max(view.budgets)
    ragged, uneven = min(view.lengths) < attention.shape[1], min(view.budgets) < budget
    score, index, lengths = score_select(
        attention,
        lengths=constant(tuple(view.lengths), attention.device) if ragged else None,
        mode=Select.FIXED,
        budget=budget,
        budgets=constant(tuple(view.budgets), attention.device, torch.int32) if uneven else None,
        backend=view.backend,
    )
    return Selection(index, lengths, score)
