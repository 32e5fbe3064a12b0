"""What a policy has before it in every layer of a patched encoder, seen through hooks that change nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._ops import Relevance, ValueNorm
from ..models import ADAPTERS
from ..models._tower import Tower
from ..modules.encoder import EncoderState, _anchor, _heads
from ..ops import anchor_stats
from ..policies import Policy

_TOWERS = {adapter.model_class: adapter for adapter in ADAPTERS if isinstance(adapter, Tower)}


@dataclass
class Layer:
    """An encoder layer and the N tokens of the first tile, in raster order; NaN where a token was gone before.

    The criteria are what :class:`~flowcut_kernels.FlowCut` scores by, in the form that the policy has them, for
    policies that look at something else too; of a token of several patches, their mean.
    """

    attention: Tensor  # float [N] of the class token, or of the mean token
    relevance: Tensor  # float [N]
    value_norm: Tensor  # float [N]
    entropy: float  # of the attention, over the logarithm of the number of tokens
    score: Tensor | None = None  # float [N] by which the policy chooses; None where it does not look


@dataclass
class Watched:
    """The layers of an encoder up to the one whose output is read."""

    layers: list[Layer] = field(default_factory=list)
    grid: tuple[int, int] = (0, 0)  # rows and columns of a tile's tokens
    tiles: int = 0


@contextmanager
def watched(model: nn.Module, policy: Policy) -> Iterator[Watched]:
    """What the next pass of `model` shows, which `policy` patched with ``record=True``.

    Raises:
        ValueError: a model that packs images of any size into one sequence (Qwen-VL).
    """
    towers = [module for module in model.modules() if type(module) in _TOWERS]
    if not towers:
        raise ValueError(
            f"{type(model).__name__} packs images of any size into one sequence, of which no grid of patches can be "
            "drawn: use a model with one tile after another, such as LLaVA"
        )
    seen = Watched()
    with ExitStack() as hooks:
        for tower in towers:
            facts: Any = _TOWERS[type(tower)]
            for number, layer in enumerate(getattr(tower.encoder, facts.layers)):
                eye = _Eye(seen, facts, policy, number)
                for hook in (
                    layer.register_forward_pre_hook(eye.before, with_kwargs=True),
                    layer.register_forward_hook(eye.after, with_kwargs=True),
                ):
                    hooks.callback(hook.remove)
        yield seen


@dataclass
class _Eye:
    """On one layer."""

    seen: Watched
    facts: Tower
    policy: Policy
    number: int
    history: Tensor | None = None

    @torch.no_grad()
    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        state: EncoderState = kwargs["pruning"]
        if self.number > state.feature_layer:
            return
        if self.number == 0:
            self.seen.layers.clear()
            self.seen.grid, self.seen.tiles = state.grid, len(state.tokens)
        hidden = args[0] if args else kwargs["hidden_states"]
        rows = hidden.shape[1] if state.lengths is None else int(state.lengths[0])
        parts: Any = self.facts.parts(module)
        normed = parts.norm1(hidden[:1, :rows])
        key, value = _heads(parts, parts.k_proj(normed)), _heads(parts, parts.v_proj(normed))
        kind = getattr(self.policy, "anchor", "auto")
        query, value_anchor = _anchor(
            parts, ("cls" if state.protect else "mean") if kind == "auto" else kind, normed, None, value, None
        )
        attention, relevance, norm, entropy = anchor_stats(
            query,
            key,
            value,
            value_anchor,
            scale=parts.attention.scale,
            protect=state.protect,
            relevance=Relevance[getattr(self.policy, "relevance", "cosine").upper()],
            value_norm=ValueNorm[getattr(self.policy, "value_norm", "full").upper()],
        )
        attention, relevance, norm = (_on_grid(x, state) for x in (attention[0], relevance[0], norm))
        self.seen.layers.append(Layer(attention, relevance, norm, float(entropy)))
        self.history = state.history

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        state: EncoderState = kwargs["pruning"]
        if self.number > state.feature_layer:
            return
        assert state.trace is not None
        cut = next((stage for stage in state.trace.stages if stage.layer == self.number), None)
        if cut is not None:  # what goes is scored as well
            self.seen.layers[-1].score = None if cut.scores is None else cut.scores[0]
        elif state.history is not None and state.history is not self.history:
            self.seen.layers[-1].score = _on_grid(state.history[:1], state)


def _on_grid(rows: Tensor, state: EncoderState) -> Tensor:
    """[N] tokens of the first tile from its rows [1, M], or more; what is not among them is NaN."""
    values = rows[0, state.protect :].unflatten(0, (-1, state.block)).mean(1)
    grid = values.new_full((math.prod(state.grid),), float("nan"))
    if state.patches is None:
        return grid.copy_(values)
    tokens = state.tokens_of(state.patches)[0]
    live = len(tokens) if state.lengths is None else (int(state.lengths[0]) - state.protect) // state.block
    return grid.index_copy_(0, tokens[:live], values[:live])
