"""Replacement blocks of a pre-norm vision encoder that score tokens and drop them before they cost anything.

The blocks own no weights: they read the stock layer's. They are installed as the instance's ``forward``, so hooks on
layers, projections, norms and MLPs and captured hidden states work as before; a layer that scores calls the projections
of its attention module, not the module itself.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .._library import choose_backend, resolve_backend
from .._ops import accumulate_dtype
from ..ops import attention, gather_tokens
from ..ops.score_select import raise_if_not_finite
from ..policies.base import EncoderStep, EncoderView, Pixels, Policy, Selection
from ..trace import Stage, Trace
from ._rows import gather_normed


@dataclass(frozen=True)
class LayerParts:
    """Where a family keeps the parts of a pre-norm encoder layer."""

    norm1: nn.Module
    attention: nn.Module  # with head_dim, scale, config
    q_proj: Callable[[Tensor], Tensor]  # a module, or one and what the family does to its output
    k_proj: Callable[[Tensor], Tensor]
    v_proj: Callable[[Tensor], Tensor]
    out_proj: Callable[[Tensor], Tensor]  # up to what is added to the residual stream
    norm2: nn.Module
    mlp: Callable[[Tensor], Tensor]  # likewise
    eager: Callable  # the family's eager attention function
    dropout: float = field(default=0.0, kw_only=True)  # of the attention weights, in training
    linear: bool = field(default=True, kw_only=True)  # q_proj is: nothing norms its output


@dataclass
class EncoderState:
    """One forward pass through a pruned encoder."""

    policy: Policy
    feature_layer: int
    grid: tuple[int, int]
    protect: int
    backend: str | None
    pixels: Pixels | None = None
    patches: Tensor | None = None  # [B, M] original patch of each row (protected rows count up from -protect)
    lengths: Tensor | None = None  # int32 [B] live rows, None while all images have all rows
    mask: Tensor | None = None  # bool [B, M] live rows, None unless the batch is ragged
    history: Tensor | None = None  # [B, M] cumulative score
    most: int | None = None  # rows of the fullest image
    trace: Trace | None = None
    entries: dict[int, tuple] | None = None  # with gradient checkpointing: what each layer found on entry

    def enter(self, layer: int) -> None:
        """Called by every layer. Gradient checkpointing runs layers again in the backward pass, the last one first."""
        if self.entries is None:
            return
        travels = ("patches", "lengths", "mask", "history", "most")
        if layer in self.entries:
            for name, value in zip(travels, self.entries[layer], strict=True):
                setattr(self, name, value)
            self.trace = None  # recorded the first time
        else:
            self.entries[layer] = tuple(getattr(self, name) for name in travels)

    def step(self, layer: int) -> EncoderStep | None:
        """The policy's step at `layer`; None once every image is down to its budget."""
        tokens = self.grid[0] * self.grid[1]
        budget = self.policy.encoder_budget(tokens)
        step = self.policy.encoder_step(layer, self.feature_layer, tokens, budget)
        done = self.most is not None and self.most <= budget + self.protect
        return None if done else step

    def select(self, layer: int, step: EncoderStep, view: EncoderView) -> Selection:
        """Ask the policy; check the scores; note what the trace wants.

        Costs one read-back where an adaptive step prunes. A static step costs none, so that scores that are not finite
        go unnamed there; but whatever made them so is in K or V, which every kept token attends to, and its features
        come out as NaN.
        """
        with torch.no_grad():  # inside, as torch.compile does not trace the decorator of a method
            choice = self.policy.encoder_select(step, view)
        on_host = view.key.device.type == "cpu" and not torch.compiler.is_compiling()
        if step.static and not on_host:
            if choice.index is not None:
                self.most, self.lengths = choice.index.shape[1], None
        elif choice.index is not None or on_host:
            lengths = choice.lengths.tolist()
            raise_if_not_finite(lengths, f"encoder layer {layer}")
            if choice.index is not None:
                self.most = max(lengths)
                choice.index = choice.index[:, : self.most]
                ragged = min(lengths) < self.most
                self.lengths = choice.lengths if ragged else None
        if self.trace is not None:
            self._record(layer, view, choice)
        self.history = choice.score
        return choice

    def gather(self, index: Tensor, hidden: Tensor, normed: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        """Rows of the residual stream and of its norm, and of the state that travels with them, in one pass."""
        travels = self._travels(hidden)
        hidden, normed, rows = gather_normed(norm, hidden, normed, list(travels.values()), index, backend=self.backend)
        self._arrive(travels, rows)
        return hidden, normed

    def merge(self, choice: Selection, hidden: Tensor) -> Tensor:
        """What the policy makes of a layer's output, and the state that travels with it."""
        assert choice.merge is not None and choice.index is not None
        travels = self._travels(hidden)
        rows = gather_tokens(list(travels.values()), choice.index, backend=self.backend) if travels else []
        self._arrive(travels, rows)
        return choice.merge(hidden)

    def _travels(self, hidden: Tensor) -> dict[str, Tensor]:
        travels = {name: getattr(self, name) for name in ("patches", "history") if getattr(self, name) is not None}
        if self.lengths is not None:  # rows of padding come out as zeros: the mask
            travels["mask"] = torch.ones((1, 1), dtype=torch.bool, device=hidden.device).expand(hidden.shape[:2])
        return travels

    def _arrive(self, travels: Iterable[str], rows: list[Tensor]) -> None:
        self.mask = None
        for name, x in zip(travels, rows, strict=True):
            setattr(self, name, x)

    def number_patches(self, batch: int, rows: int, device: torch.device) -> None:
        """From now on it is known which patch a row is."""
        self.patches = torch.arange(-self.protect, rows - self.protect, device=device).repeat(batch, 1)

    def _record(self, layer: int, view: EncoderView, choice: Selection) -> None:
        assert self.trace is not None
        batch, rows = view.key.shape[0], view.key.shape[2]
        if self.patches is None:
            self.number_patches(batch, rows, view.key.device)
        assert self.patches is not None
        if choice.entropy is not None:
            self.trace.entropy[layer] = choice.entropy
        if choice.index is None:
            return
        absent = choice.index < 0
        kept = self.patches.gather(1, choice.index.clamp_min(0)).masked_fill(absent, -1)[:, self.protect :]
        scores = None
        if choice.score is not None:
            live = slice(self.protect, None)
            scores = choice.score.new_full((batch, self.grid[0] * self.grid[1] + 1), float("nan"))
            column = self.patches[:, live]
            if view.lengths is not None:  # padding rows write to a spare last column
                dead = torch.arange(rows, device=column.device)[live] >= view.lengths[:, None]
                column = column.masked_fill(dead, scores.shape[1] - 1)
            scores = scores.scatter(1, column, choice.score[:, live])[:, :-1]
        lengths = choice.lengths - self.protect
        recycled = None if choice.merged is None else choice.merged[:, self.protect :]
        self.trace.stages.append(
            Stage("encoder", layer, lengths.tolist(), kept, lengths, scores, choice.entropy, recycled)
        )


class PrunedEncoderLayer:
    """Replacement ``forward`` of one encoder layer.

    At a pruning layer K and V are projected for all N tokens, the tokens are chosen, and only the kept ones see the
    query projection, attention output, output projection and MLP (their queries attend to all N keys). The kept
    tokens' outputs equal those of pruning after the layer.
    """

    def __init__(self, layer: nn.Module, parts_of: Callable[[nn.Module], LayerParts], number: int) -> None:
        self.layer, self.parts_of, self.number = layer, parts_of, number

    @property
    def parts(self) -> LayerParts:
        """Looked up on each call: a module that was swapped after patching (an adapter, a quantised one) counts."""
        return self.parts_of(self.layer)

    def __call__(self, hidden_states: Tensor, *mask: None, pruning: EncoderState, **kwargs: Any) -> Tensor:
        pruning.enter(self.number)
        step = pruning.step(self.number)
        if step is None and pruning.mask is None:
            return type(self.layer).forward(self.layer, hidden_states, *mask, **kwargs)
        hidden_states, choice = self._attention_half(hidden_states, step, pruning, **kwargs)
        hidden_states = hidden_states + self.parts.mlp(self.parts.norm2(hidden_states))
        return hidden_states if choice is None else pruning.merge(choice, hidden_states)

    def _attention_half(
        self, hidden_states: Tensor, step: EncoderStep | None, pruning: EncoderState, **kwargs: Any
    ) -> tuple[Tensor, Selection | None]:
        """Everything up to the residual stream after attention; what it made on the way is gone before the MLP.

        With a choice that is still to be made true, where tokens are merged after the layer.
        """
        parts = self.parts
        residual, normed = hidden_states, parts.norm1(hidden_states)
        key, value = self._heads(parts.k_proj(normed)), self._heads(parts.v_proj(normed))
        key_mask, key_lengths, query, merged = pruning.mask, pruning.lengths, None, None
        if step is not None:
            if not step.prunes or step.merges:  # all queries are needed anyway; the anchor's is among them
                query = self._heads(parts.q_proj(normed))
            view = EncoderView(
                key=key,
                value=value,
                query=query,
                anchor=lambda kind: self._anchor(kind, normed, query, value, key_mask),
                protect=pruning.protect,
                lengths=pruning.lengths,
                history=pruning.history,
                grid=pruning.grid,
                pixels=pruning.pixels,
                backend=pruning.backend,
            )
            choice = pruning.select(self.number, step, view)
            if step.merges:
                merged = choice
            elif choice.index is not None and (pruning.lengths is not None or choice.index.shape[1] < normed.shape[1]):
                residual, normed = pruning.gather(choice.index, residual, normed, parts.norm1)
        if query is None:
            query = self._heads(parts.q_proj(normed))
        if step is not None and self._has_native_attention(query, pruning.backend):
            span = None if key_lengths is None else torch.stack((torch.zeros_like(key_lengths), key_lengths), 1)
            scale: Any = parts.attention.scale
            mixed = attention(query, key, value, key_span=span, scale=scale, backend=pruning.backend)
        else:
            mixed = self._attend(query, key, value, key_mask, **kwargs)
        return residual + parts.out_proj(mixed.flatten(2)), merged

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.parts.attention.head_dim)).transpose(1, 2)

    def _anchor(
        self, kind: str, normed: Tensor, query: Tensor | None, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if kind == "cls":
            # A 2-D row is one launch; a strided [B, 1, D] would be a product and a bias.
            query = self._heads(self.parts.q_proj(normed[:, 0])[:, None]) if query is None else query[:, :, :1]
            return query, value[:, :, :1]
        # Projections are linear, so the mean token's query and value cost one row each.
        token, parts = _mean_token(normed, mask), self.parts
        mean = parts.q_proj(token) if parts.linear else _mean_token(parts.q_proj(normed), mask)
        return self._heads(mean), self._heads(parts.v_proj(token))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
        module: Any = self.parts.attention
        name = module.config._attn_implementation
        if mask is not None:
            if name == "eager":
                lowest = torch.finfo(query.dtype).min
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
            else:  # kernels without a padding mask of this form leave ragged batches to SDPA
                name = "sdpa"
            mask = mask[:, None, None]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, self.parts.eager)
        dropout = self.parts.dropout if module.training else 0.0
        options = kwargs | dict(scaling=module.scale, dropout=dropout, is_causal=False)
        return attend(module, query, key, value, mask, **options)[0]

    def _has_native_attention(self, query: Tensor, backend: str | None) -> bool:
        """Whether the C++ attention takes the place of SDPA at a layer that scores: several times faster on a CPU."""
        module: Any = self.parts.attention
        if query.device.type != "cpu" or module.config._attn_implementation != "sdpa" or module.training:
            return False
        if ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward:  # somebody put their own in its place
            return False
        backend = resolve_backend(backend)
        return backend in ("auto", "cpp") and choose_backend("attention", backend, query, ("cpp",)) == "cpp"


def _mean_token(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean [B, 1, D] of the rows of x [B, N, D] that `mask` [B, N] says."""
    dtype = accumulate_dtype(x.dtype)
    if mask is None:
        return x.mean(1, keepdim=True, dtype=dtype).to(x.dtype)
    live = x.masked_fill(~mask[..., None], 0)
    return (live.sum(1, keepdim=True, dtype=dtype) / mask.sum(1)[:, None, None]).to(x.dtype)


class SkippedEncoderLayer:
    """Replacement ``forward`` of a layer nobody reads: its input, so that captured hidden states keep their index."""

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


@dataclass
class PrunedEncoder:
    """Replacement ``forward`` of an encoder: the stock loop with a state that travels through the layers."""

    encoder: nn.Module
    layers: nn.ModuleList
    policy: Policy
    protect: int
    feature_layer: int  # 0-based layer whose output is read
    record: bool = False
    backend: str | None = None
    trace: Trace | None = field(default=None, repr=False)
    pixels: Pixels | None = field(default=None, repr=False)  # of the pass that is running
    # Of the last pass, where the policy goes on to prune features:
    importance: Tensor | None = field(default=None, repr=False)  # [B, M] score of the patches that are left
    position: Tensor | None = field(default=None, repr=False)  # int64 [B, M] those patches; None: all

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.encoder).forward.__get__(self.encoder))

    def __call__(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        if attention_mask is not None:
            raise ValueError(
                "attention_mask was passed to a patched vision encoder; only unmasked images are supported: drop it"
            )
        if kwargs.get("output_attentions") or getattr(self.encoder.config, "output_attentions", False):
            raise ValueError(
                "output_attentions=True was asked of a patched vision encoder, whose pruning layers form no attention "
                "map: unpatch first, or look at trace(model).stages[i].scores"
            )
        state = EncoderState(
            policy=self.policy,
            feature_layer=self.feature_layer,
            grid=self.grid(inputs_embeds.shape[1] - self.protect),
            protect=self.protect,
            backend=self.backend,
            pixels=self.pixels,
            trace=Trace() if self.record else None,
            entries={} if any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers) else None,
        )
        # SigLIP's embeddings come channels-first in memory, and sums would keep that layout through all layers. Where
        # nothing is pruned it stays: other layouts round differently.
        rows = inputs_embeds.shape[1] - self.protect
        hidden_states = inputs_embeds.contiguous() if self.policy.encoder_budget(rows) < rows else inputs_embeds
        follow = self.policy.prunes_features and self.policy.encoder_budget(rows) < rows
        if follow:
            state.number_patches(len(inputs_embeds), inputs_embeds.shape[1], inputs_embeds.device)
        mask = (None,) if "attention_mask" in self.__signature__.parameters else ()
        for layer in self.layers:
            hidden_states = layer(hidden_states, *mask, pruning=state, **kwargs)
        self.trace = state.trace
        if self.policy.prunes_features:
            live = slice(self.protect, None)
            self.importance = None if state.history is None else state.history[:, live]
            self.position = None if not follow or state.patches is None else state.patches[:, live]
        return BaseModelOutput(last_hidden_state=hidden_states)

    @staticmethod
    def grid(patches: int) -> tuple[int, int]:
        """Rows and columns of an image's patches."""
        side = math.isqrt(patches)
        return (side, side) if side * side == patches else (1, patches)
