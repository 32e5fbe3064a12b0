"""What a policy has before it in every layer of a patched encoder, seen through hooks that change nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._ops import Relevance, ValueNorm
from ..models import _handle
from ..models._features import Kind, PrunedFeatures
from ..modules.encoder import EncoderState, PrunedEncoderLayer, _anchor, _heads
from ..modules.packed_encoder import PackedBlock, PackedState
from ..ops import anchor_stats
from ..policies import Policy


@dataclass
class Layer:
    """An encoder layer and the N tokens of each of T tiles, in raster order; NaN where a token was gone before.

    The criteria are what :class:`~flowcut_kernels.FlowCut` scores by, in the form that the policy has them, for
    policies that look at something else too; of a token of several patches, their mean.
    """

    attention: Tensor  # float [T, N] of the class token, or of the mean token
    relevance: Tensor  # float [T, N]
    value_norm: Tensor  # float [T, N]
    entropy: Tensor  # float [T] of the attention, over the logarithm of the number of tokens
    score: Tensor | None = None  # float [T, N] by which the policy chooses; None where it does not look


@dataclass
class Watched:
    """The layers of an encoder up to the one whose output is read."""

    layers: list[Layer] = field(default_factory=list)
    grid: tuple[int, int] = (0, 0)  # rows and columns of a tile's tokens
    block: int = 1  # patches of such a token
    kind: Kind | None = None  # of the model's images; None: a vision tower alone


@contextmanager
def watched(model: nn.Module, policy: Policy) -> Iterator[Watched]:
    """What the next pass of `model` over one image shows, which `policy` patched with ``record=True``."""
    seen = Watched()
    with ExitStack() as hooks:
        for module, _, new in _handle(model).replacements:
            if isinstance(new, PrunedFeatures) and new.kind.modality == "image":
                seen.kind = new.kind
            elif isinstance(new, PrunedEncoderLayer | PackedBlock):
                eye = (_Eye if isinstance(new, PrunedEncoderLayer) else _PackedEye)(seen, policy, new)
                for hook in (
                    module.register_forward_pre_hook(eye.before, with_kwargs=True),
                    module.register_forward_hook(eye.after, with_kwargs=True),
                ):
                    hooks.callback(hook.remove)
        yield seen


@dataclass
class _Eye:
    """On one layer of an encoder that is given tiles."""

    seen: Watched
    policy: Policy
    layer: Any  # its replacement
    history: Tensor | None = None

    @torch.no_grad()
    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # A copy, as what is no tile's leaves before a policy looks for the first time.
        state: EncoderState = copy.copy(kwargs["pruning"])
        if self.layer.number > state.feature_layer:
            return
        if self.layer.number == 0:
            self.seen.layers.clear()
            self.seen.grid, self.seen.block = state.grid, state.block
        hidden = args[0] if args else kwargs["hidden_states"]
        step, _ = state.step(self.layer.number)
        if step is not None and step.prunes:
            hidden = state.drop_void(hidden)
        self.history = kwargs["pruning"].history
        parts: Any = self.layer.parts_of(module)
        normed = parts.norm1(hidden)
        key, value = _heads(parts, parts.k_proj(normed)), _heads(parts, parts.v_proj(normed))
        kind = getattr(self.policy, "anchor", "auto")
        query, value_anchor = _anchor(
            parts, ("cls" if state.protect else "mean") if kind == "auto" else kind, normed, None, value, state.mask
        )
        attention, relevance, norm, entropy = self.statistics(
            query, key, value, value_anchor, state.lengths, scale=parts.attention.scale, protect=state.protect
        )
        attention, relevance, norm = (_of_tiles(x, state) for x in (attention[:, 0], relevance[:, 0], norm))
        self.seen.layers.append(Layer(attention, relevance, norm, entropy[:, 0]))

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        state: EncoderState = kwargs["pruning"]
        if self.layer.number > state.feature_layer or self.scored_by_cut(state):
            return
        if state.history is not None and state.history is not self.history:
            self.seen.layers[-1].score = _of_tiles(state.history, state)

    def scored_by_cut(self, state: EncoderState | PackedState) -> bool:
        """Whether the layer cut; what went is scored as well then."""
        assert state.trace is not None
        cut = next((stage for stage in state.trace.stages if stage.layer == self.layer.number), None)
        if cut is not None:
            self.seen.layers[-1].score = cut.scores
        return cut is not None

    def statistics(
        self, query: Tensor, key: Tensor, value: Tensor, value_anchor: Tensor, lengths: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return anchor_stats(
            query,
            key,
            value,
            value_anchor,
            key_span=None if lengths is None else torch.stack([torch.zeros_like(lengths), lengths], 1),
            relevance=Relevance[getattr(self.policy, "relevance", "cosine").upper()],
            value_norm=ValueNorm[getattr(self.policy, "value_norm", "full").upper()],
            **options,
        )


class _PackedEye(_Eye):
    """On one block of an encoder that packs images of any size; of these the first is seen, as one tile."""

    @torch.no_grad()
    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        state: PackedState = kwargs["packing"]
        if self.layer.number == 0:
            self.seen.layers.clear()
            self.seen.grid, self.seen.block = state.frames[0].grid, state.block
        rows, parts, self.history = state.rows, self.layer.parts_of(module), state.history
        normed = parts.norm1(args[0] if args else kwargs["hidden_states"])
        heads = parts.attention.qkv(normed).unflatten(-1, (3, parts.attention.num_heads, -1))
        query, key, value = heads.unbind(1)
        query, key = parts.rotate(query, key, *(rows.rotary or kwargs["position_embeddings"]))
        segments = rows.segments
        query, value_anchor = segments.mean(query), segments.mean(value)
        key, value = (segments.pad(x).transpose(1, 2) for x in (key, value))
        attention, relevance, norm, entropy = self.statistics(
            query, key, value, value_anchor, None if segments.even else segments.tensor, scale=parts.attention.scaling
        )
        attention, relevance, norm = (_of_packed(x, state) for x in (attention[:, 0], relevance[:, 0], norm))
        self.seen.layers.append(Layer(attention, relevance, norm, entropy[:1, 0]))

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        state: PackedState = kwargs["packing"]
        history = state.history
        if not self.scored_by_cut(state) and history is not None and history is not self.history:
            self.seen.layers[-1].score = _of_packed(history, state)


def _of_tiles(rows: Tensor, state: EncoderState) -> Tensor:
    """[T, N] tokens from the rows of tiles [T, M]; what is not among them is NaN."""
    values = rows[:, state.protect :].unflatten(1, (-1, state.block)).mean(2)
    if state.patches is None:
        return values
    tokens = state.tokens_of(state.patches)
    if state.lengths is not None:  # rows behind a tile's last write to a spare column
        live = (state.lengths[:, None] - state.protect) // state.block
        tokens = tokens.masked_fill(torch.arange(tokens.shape[1], device=tokens.device) >= live, math.prod(state.grid))
    whole = values.new_full((len(values), math.prod(state.grid) + 1), float("nan"))
    return whole.scatter(1, tokens, values)[:, :-1]


def _of_packed(rows: Tensor, state: PackedState) -> Tensor:
    """[1, N] tokens of the first image from the rows of all frames [F, W]; what is not among them is NaN."""
    values = state.means_by_visual(rows)[0]
    places = state.position
    if places is None:
        return values[None]
    return values.new_full((1, state.frames[0].tokens), float("nan")).index_copy_(1, places[0], values[None])
