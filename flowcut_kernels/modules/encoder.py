"""Replacement blocks of a pre-norm vision encoder that score tokens and drop them before they cost anything.

The blocks own no weights: they read the stock layer's. They are installed as the instance's ``forward``, so hooks on
layers, projections, norms and MLPs and captured hidden states work as before; a layer that scores calls the projections
of its attention module, not the module itself.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .._library import choose_backend, resolve_backend
from .._ops import accumulate_dtype
from ..ops import attention, gather_tokens
from ..ops.score_select import raise_if_not_finite
from ..policies.base import EncoderStep, EncoderView, Pixels, Policy, Selection
from ..policies.recycling import constant, held
from ..trace import Stage, Trace
from ._rows import gather_normed
from ._signature import signature_of

REMEMBERED = 256  # prompts' and passes' sizes, with what follows from them
Value = TypeVar("Value")


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
class EncoderPass:
    """What one pass of an encoder is to leave of its B tiles of N tokens, and afterwards what it left.

    A tile is an input of the encoder: an image, a view of one, a frame. A token is what the language model would get:
    a patch, or a square of patches that are merged later. What leaves an encoder that pruned is in the order of tokens,
    with each one's patches next to each other.
    """

    side: int = 1  # edge of a token in patches
    tokens: tuple[int, ...] | None = None  # of each tile, without void ones; None: all
    budgets: tuple[int, ...] | None = None  # tokens to leave of each tile; None: what the policy leaves of an image
    void: Tensor | None = None  # bool [B, N] tokens that the model throws away: they go before the first cut
    # Nothing may attend to those: they go before the first layer. False: no token is hidden; None: nobody looked.
    masked: bool | None = None
    pixels: Pixels | None = None  # where the policy wants them
    align: tuple[int, ...] = ()  # indices of hidden states whose rows are to be known
    leads: int = 0  # rows of a tile in front of its patches that the projector is given too
    in_order: bool = False  # the model takes the tokens tile by tile, and no dropped one has to be made up for
    # Afterwards:
    whole: int = 0  # N
    left: tuple[int, ...] | None = None  # tokens of each tile; None: all
    width: int = 0  # n: rows of a tile, in tokens, at least one
    # Of a packed encoder, whose images differ in size, lists of one tensor [n] for each.
    importance: Any = None  # [B, n] cumulative score of the tokens that are left; None: nobody scored
    find: Callable[[], Tensor] | None = None  # makes `position`, for which not everybody asks
    rows: dict[int, Tensor] = field(default_factory=dict)  # by index in `align`: int64 [B, M] its rows that are left

    @cached_property
    def position(self) -> Any:
        """int64 [B, n] the tokens that are left, -1 after the last of a tile; None: all are there."""
        return None if self.find is None else self.find()

    @cached_property
    def places(self) -> Tensor:
        """int64 [B * n] where the tokens left are among all B * N, B * N for one that is nowhere."""
        rows = len(self.position) * self.whole
        first = constant(tuple(range(0, rows, self.whole)), self.position.device)
        return torch.where(self.position < 0, rows, self.position + first[:, None]).flatten()


@dataclass
class EncoderState:
    """One forward pass through a pruned encoder."""

    policy: Policy
    feature_layer: int
    # The policy's step at each layer, for a tile of so many tokens and such a budget.
    plans: dict[tuple[int, int], tuple[EncoderStep | None, ...]]
    grid: tuple[int, int]  # of a tile's tokens
    protect: int
    backend: str
    tokens: Sequence[int]  # of each tile
    budgets: Sequence[int]  # of each tile, to end with
    prunes: bool  # any of them
    block: int = 1  # patches of a token
    numbers: bool = False  # which patch a row is has to be known
    void: Tensor | None = None  # bool [B, N] tokens that are no tile's, until the first cut
    pixels: Pixels | None = None
    # [B, M] original patch of each row (protected rows count up from -protect), once some are gone
    patches: Tensor | None = None
    lengths: Tensor | None = None  # int32 [B] live rows, None while all images have all rows
    mask: Tensor | None = None  # bool [B, M] live rows, None unless the batch is ragged
    history: Tensor | None = None  # [B, M] cumulative score
    left: list[int] | None = None  # tokens of each tile, once there was a cut
    trace: Trace | None = None
    entries: dict[int, tuple] | None = None  # with gradient checkpointing: what each layer found on entry

    def __post_init__(self) -> None:
        self.plan = next(iter(self.plans.values())) if len(self.plans) == 1 else None
        self.done = False  # every tile is down to what is to be left of it

    def enter(self, layer: int) -> None:
        """With gradient checkpointing, called by every layer: they run again in the backward pass, the last first."""
        assert self.entries is not None
        travels = ("patches", "lengths", "mask", "history", "left", "done", "void")
        if layer in self.entries:
            for name, value in zip(travels, self.entries[layer], strict=True):
                setattr(self, name, value)
            self.trace = None  # recorded the first time
        else:
            self.entries[layer] = tuple(getattr(self, name) for name in travels)

    def step(self, layer: int) -> tuple[EncoderStep | None, list[int] | None]:
        """The policy's step at `layer`, and each tile's budget for it where they differ, of which it has the largest.

        None once every tile is down to what is to be left of it.
        """
        if self.done:
            return None, None
        if self.plan is not None:
            return self.plan[layer], None
        steps = {kind: plan[layer] for kind, plan in self.plans.items()}
        made = [step for step in steps.values() if step is not None]
        cuts = [step for step in made if step.prunes]
        if not cuts:
            return (made[0] if made else None), None
        ends = {kind: kind[0] if step is None or not step.prunes else step.budget for kind, step in steps.items()}
        budgets = [ends[kind] for kind in zip(self.tokens, self.budgets, strict=True)]
        step = cuts[0]._replace(budget=max(budgets))
        return step, (budgets if min(budgets) < step.budget else None)

    def drop_void(self, hidden: Tensor) -> Tensor:
        """The rows of tokens that a tile has, before a policy cuts for the first time."""
        if self.void is None:
            return hidden
        gone = self.void.to(hidden.device).repeat_interleave(self.block, 1)
        gone = torch.nn.functional.pad(gone, (self.protect, 0))
        lengths = constant(tuple(self.protect + self.block * n for n in self.tokens), hidden.device)
        index = gone.long().argsort(dim=1, stable=True)[:, : self.protect + self.block * max(self.tokens)]
        index = index.masked_fill(torch.arange(index.shape[1], device=index.device) >= lengths[:, None], -1)
        self.void, self.lengths = None, lengths.int() if min(self.tokens) < max(self.tokens) else None
        travels = self._travels(hidden)
        hidden, *rows = gather_tokens([hidden, *travels.values()], index, backend=self.backend)
        self._arrive(travels, rows, index)
        return hidden

    @property
    def places(self) -> Callable[[], Tensor] | None:
        """What makes int64 [B, n] which token of its tile each one is; None: all are there."""
        patches = self.patches
        if patches is None:
            return None
        if self.lengths is None and patches.shape[1] == self.protect + self.block * math.prod(self.grid):
            return None
        return lambda: self.tokens_of(patches)

    def tokens_of(self, patches: Tensor) -> Tensor:
        """[B, n] tokens of rows that hold `patches`."""
        first = patches[:, self.protect :: self.block]
        return first if self.block == 1 else first // self.block

    def select(self, layer: int, step: EncoderStep, budgets: list[int] | None, view: EncoderView) -> Selection:
        """Ask the policy; check the scores; note what the trace wants.

        Costs one read-back where an adaptive step prunes. A static step costs none, so that scores that are not finite
        go unnamed there; but whatever made them so is in K or V, which every kept token attends to, and its features
        come out as NaN.
        """
        with untracked():
            choice = self.policy.encoder_select(step, view)
        self._freeze(choice)
        on_host = view.key.device.type == "cpu" and not torch.compiler.is_compiling()
        if step.static and not on_host:
            if choice.index is not None:
                ends = budgets or [step.budget] * len(self.tokens)
                self.leave([min(*pair) for pair in zip(self.left or self.tokens, ends, strict=True)])
        elif choice.index is not None or on_host:
            lengths = choice.lengths.tolist()
            raise_if_not_finite(lengths, f"encoder layer {layer}")
            if choice.index is not None:
                self.leave([(n - self.protect) // self.block for n in lengths])
                if max(lengths) < choice.index.shape[1]:
                    choice.index = choice.index[:, : max(lengths)]
        if choice.index is not None:
            assert self.left is not None
            self.lengths = choice.lengths if min(self.left) < max(self.left) else None
        if self.trace is not None:
            self._record(layer, view, choice)
        self.history = choice.score
        return choice

    # Counts that are read back end a compiled graph. Of the shapes that follow from them dynamo made code that left out
    # a cut in later calls, so that it is not to look.
    select_apart = torch.compiler.disable(select)

    def leave(self, left: list[int]) -> None:
        """So many tokens of each tile go on."""
        self.left, self.done = left, all(n <= budget for n, budget in zip(left, self.budgets, strict=True))

    def _freeze(self, choice: Selection) -> None:
        """A tile that was cut to its budget keeps its score, however long the others of the batch take."""
        if self.left is None or self.history is None or choice.score is None:
            return
        done = [n <= budget and n < full for n, budget, full in zip(self.left, self.budgets, self.tokens, strict=True)]
        if any(done):
            stays = constant(tuple(done), choice.score.device, torch.bool)[:, None]
            choice.score = torch.where(stays, self.history, choice.score)

    def gather(self, index: Tensor, hidden: Tensor, normed: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        """Rows of the residual stream and of its norm, and of the state that travels with them, in one pass."""
        travels = self._travels(hidden)
        hidden, normed, rows = gather_normed(norm, hidden, normed, list(travels.values()), index, backend=self.backend)
        self._arrive(travels, rows, index)
        return hidden, normed

    def merge(self, choice: Selection, hidden: Tensor) -> Tensor:
        """What the policy makes of a layer's output, and the state that travels with it."""
        assert choice.merge is not None and choice.index is not None
        travels = self._travels(hidden)
        rows = gather_tokens(list(travels.values()), choice.index, backend=self.backend) if travels else []
        self._arrive(travels, rows, choice.index)
        return choice.merge(hidden)

    def _travels(self, hidden: Tensor) -> dict[str, Tensor]:
        travels = {name: getattr(self, name) for name in ("patches", "history") if getattr(self, name) is not None}
        if self.lengths is not None:  # rows of padding come out as zeros: the mask
            travels["mask"] = torch.ones((1, 1), dtype=torch.bool, device=hidden.device).expand(hidden.shape[:2])
        return travels

    def _arrive(self, travels: Iterable[str], rows: list[Tensor], index: Tensor) -> None:
        self.mask = None
        for name, x in zip(travels, rows, strict=True):
            setattr(self, name, x)
        if self.patches is None and (self.numbers or self.trace is not None):  # all were there
            index = index if self.mask is None else index.masked_fill(index < 0, self.protect)
            self.patches = index - self.protect

    def _record(self, layer: int, view: EncoderView, choice: Selection) -> None:
        assert self.trace is not None
        batch, rows = view.key.shape[0], view.key.shape[2]
        if choice.entropy is not None:
            self.trace.entropy[layer] = choice.entropy
        if choice.index is None:
            return
        absent, patches = choice.index < 0, self.patches
        if patches is None:
            patches = torch.arange(-self.protect, rows - self.protect, device=absent.device).expand(batch, -1)
        kept = self.tokens_of(patches.gather(1, choice.index.clamp_min(0)).masked_fill(absent, -self.block))
        scores = None
        if choice.score is not None:
            scores = choice.score.new_full((batch, math.prod(self.grid) + 1), float("nan"))
            column = self.tokens_of(patches)
            if view.lengths is not None:  # padding rows write to a spare last column
                first = torch.arange(rows, device=column.device)[self.protect :: self.block]
                column = column.masked_fill(first >= view.lengths[:, None], scores.shape[1] - 1)
            scores = scores.scatter(1, column, choice.score[:, self.protect :: self.block])[:, :-1]
        lengths = (choice.lengths - self.protect) // self.block
        recycled = None if choice.merged is None else choice.merged[:, self.protect :: self.block]
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

    def __call__(self, hidden_states: Tensor, *mask: Tensor | None, pruning: EncoderState, **kwargs: Any) -> Tensor:
        if pruning.entries is not None:
            pruning.enter(self.number)
        step, budgets = pruning.step(self.number)
        if step is not None and step.prunes:
            hidden_states = pruning.drop_void(hidden_states)
        if step is None and pruning.mask is None:
            return type(self.layer).forward(self.layer, hidden_states, *mask, **kwargs)
        # Looked up on each call: a module that was swapped after patching (an adapter, a quantised one) counts.
        parts = self.parts_of(self.layer)
        hidden_states, choice = self._attention_half(parts, hidden_states, step, budgets, pruning, **kwargs)
        hidden_states = hidden_states + parts.mlp(parts.norm2(hidden_states))
        return hidden_states if choice is None else pruning.merge(choice, hidden_states)

    def _attention_half(
        self,
        parts: LayerParts,
        hidden_states: Tensor,
        step: EncoderStep | None,
        budgets: list[int] | None,
        pruning: EncoderState,
        **kwargs: Any,
    ) -> tuple[Tensor, Selection | None]:
        """Everything up to the residual stream after attention; what it made on the way is gone before the MLP.

        With a choice that is still to be made true, where tokens are merged after the layer.
        """
        residual, normed = hidden_states, parts.norm1(hidden_states)
        key, value = _heads(parts, parts.k_proj(normed)), _heads(parts, parts.v_proj(normed))
        key_mask, key_lengths, query, merged, known = pruning.mask, pruning.lengths, None, None, None
        scale: Any = parts.attention.scale
        if step is not None:
            if not step.prunes or step.merges:  # all queries are needed anyway; the anchor's is among them
                query = _heads(parts, parts.q_proj(normed))
            if step.lse and query is not None and key_mask is None:
                known = sdpa_with_lse(parts.attention, scale, query, key, value)
            view = EncoderView(
                key=key,
                value=value,
                query=query,
                anchor=lambda kind: _anchor(parts, kind, normed, query, value, key_mask),
                protect=pruning.protect,
                lengths=pruning.lengths,
                history=pruning.history,
                grid=pruning.grid,
                pixels=pruning.pixels,
                backend=pruning.backend,
                block=pruning.block,
                budgets=None if budgets is None else constant(tuple(budgets), key.device, torch.int32),
                places=pruning.places,
                lse=None if known is None else known[1],
            )
            select = pruning.select_apart if step.prunes and not step.static else pruning.select
            choice = select(self.number, step, budgets, view)
            if step.merges:
                merged = choice
            elif choice.index is not None and (pruning.lengths is not None or choice.index.shape[1] < normed.shape[1]):
                residual, normed = pruning.gather(choice.index, residual, normed, parts.norm1)
        if query is None:
            query = _heads(parts, parts.q_proj(normed))
        # Where everything stays, what comes out is the stock model's, bit for bit.
        if known is not None:
            mixed = known[0]
        elif step is not None and pruning.prunes and has_native_attention(parts.attention, query, pruning.backend):
            span = None if key_lengths is None else torch.stack((torch.zeros_like(key_lengths), key_lengths), 1)
            mixed = attention(query, key, value, key_span=span, scale=scale, backend=pruning.backend)
        else:
            mixed = _attend(parts, query, key, value, key_mask, **kwargs)
        return residual + parts.out_proj(mixed.flatten(2)), merged


def remember(known: dict[Any, Value], key: Hashable, value: Value) -> Value:
    """A value, among so many that are `known` from now on."""
    if len(known) >= REMEMBERED:
        known.clear()
    known[key] = value
    return value


def untracked() -> AbstractContextManager:
    """`torch.no_grad()`, or nothing where that changes nothing: it is entered at every layer that scores."""
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


def _heads(parts: LayerParts, x: Tensor) -> Tensor:
    module: Any = parts.attention
    # The function of torch: a tensor's method of that name is Python.
    return torch.unflatten(x, -1, (-1, module.head_dim)).transpose(1, 2)


def _anchor(
    parts: LayerParts, kind: str, normed: Tensor, query: Tensor | None, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    if kind == "cls":
        # A 2-D row is one launch; a strided [B, 1, D] would be a product and a bias.
        query = _heads(parts, parts.q_proj(normed[:, 0])[:, None]) if query is None else query[:, :, :1]
        return query, value[:, :, :1]
    # Projections are linear, so the mean token's query and value cost one row each.
    token = _mean_token(normed, mask)
    mean = parts.q_proj(token) if parts.linear else _mean_token(parts.q_proj(normed), mask)
    return _heads(parts, mean), _heads(parts, parts.v_proj(token))


def _attend(parts: LayerParts, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
    module: Any = parts.attention
    name = module.config._attn_implementation
    if mask is not None:
        if name == "eager":
            lowest = torch.finfo(query.dtype).min
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
        else:  # kernels without a padding mask of this form leave ragged batches to SDPA
            name = "sdpa"
        mask = mask[:, None, None]
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, parts.eager)
    dropout = parts.dropout if module.training else 0.0
    options = kwargs | dict(scaling=module.scale, dropout=dropout, is_causal=False)
    return attend(module, query, key, value, mask, **options)[0]


_LSE = dict(attn_bias=None, compute_log_sumexp=True)
# SDPA's kernels that know the row log-sum-exp, by device and number: names that torch keeps to itself, and what they
# want besides the heads.
_KERNELS: dict[tuple[str, int], tuple[str, dict[str, Any]]] = {
    ("cpu", SDPBackend.FLASH_ATTENTION.value): ("_scaled_dot_product_flash_attention_for_cpu", {}),
    ("cuda", SDPBackend.FLASH_ATTENTION.value): ("_scaled_dot_product_flash_attention", {}),
    ("cuda", SDPBackend.EFFICIENT_ATTENTION.value): ("_scaled_dot_product_efficient_attention", _LSE),
    ("cuda", SDPBackend.CUDNN_ATTENTION.value): ("_scaled_dot_product_cudnn_attention", _LSE),
}


def sdpa_with_lse(module: Any, scale: float, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | None:
    """SDPA's output [B, N, H, d], and [B, H, N] the row log-sum-exp that its kernel knows and SDPA throws away.

    None where the attention of a layer's `module` is another one, or runs as a kernel that keeps none.
    """
    heads, device = (query, key, value), query.device.type
    if device not in ("cpu", "cuda") or not _has_stock_sdpa(module) or torch.compiler.is_compiling():
        return None
    # Here SDPA would give its kernel other heads: cast, or filled up.
    if torch.is_autocast_enabled(device) or (device == "cuda" and query.shape[-1] % 8):
        return None
    choose = _private("_fused_sdp_choice", ())
    chosen = None if choose is None else _KERNELS.get((device, choose(*heads, scale=scale)))
    kernel = None if chosen is None else _private(chosen[0], tuple(chosen[1]))
    if chosen is None or kernel is None:
        return None
    output, lse, *_ = kernel(*heads, *chosen[1].values(), scale=scale)
    # The memory-efficient kernel fills rows up to 32, cuDNN has one more dimension.
    return output.transpose(1, 2).contiguous(), lse.flatten(2).narrow(2, 0, query.shape[2])


@lru_cache
def _private(name: str, others: tuple[str, ...]) -> Any:
    """torch's operator of that name, which torch may change as it likes.

    None where there is none that wants heads and `others`, takes a scale, and returns an output and its log-sum-exp, or
    one thing: then nobody leaves a log-sum-exp, and who wants it makes it.
    """
    operator = getattr(getattr(torch.ops.aten, name, None), "default", None)
    if operator is None:
        return None
    taken, made = operator._schema.arguments, [x.name.replace("_", "") for x in operator._schema.returns]
    fits = [x.name for x in taken if not x.has_default_value()] == ["query", "key", "value", *others]
    fits = fits and "scale" in [x.name for x in taken] and (len(made) == 1 or made[:2] == ["output", "logsumexp"])
    return operator if fits else None


def _has_stock_sdpa(module: Any) -> bool:
    """Whether a layer's attention is SDPA by transformers' own function, which somebody may have replaced."""
    if module.config._attn_implementation != "sdpa" or module.training:
        return False
    return ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def has_native_attention(module: Any, query: Tensor, backend: str | None) -> bool:
    """Whether the C++ attention takes the place of SDPA at a layer that scores: several times faster on a CPU."""
    if query.device.type != "cpu" or not _has_stock_sdpa(module):
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
    traced: PrunedEncoder | None = field(default=None, repr=False)  # another tower's, that has the trace of either
    asked: EncoderPass | None = field(default=None, repr=False)  # by a tower that gives its encoder no such argument
    takes_mask: bool = field(init=False, repr=False)
    remembered: dict[Hashable, dict[str, Any]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        # Here, as a compiler cannot trace how a signature is found out.
        self.takes_mask = "attention_mask" in self.__signature__.parameters

    @property
    def __signature__(self) -> inspect.Signature:
        return signature_of(type(self.encoder).forward)

    def __call__(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        *,
        encoder_pass: EncoderPass | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        if kwargs.get("output_attentions") or getattr(self.encoder.config, "output_attentions", False):
            raise ValueError(
                "output_attentions=True was asked of a patched vision encoder, whose pruning layers form no attention "
                "map: unpatch first, or look at trace(model).stages[i].scores"
            )
        encoder_pass = encoder_pass or self.asked
        batch, rows = inputs_embeds.shape[:2]
        state = self.started(encoder_pass or EncoderPass(), batch, rows - self.protect)
        hidden_states = inputs_embeds
        if state.block > 1:
            side = math.isqrt(state.block)
            hidden_states = hidden_states[:, held(_by_tokens(state.grid, side, self.protect, hidden_states.device))]
        if state.prunes:
            # SigLIP's embeddings come channels-first in memory, and sums would keep that layout through all layers.
            # Where nothing is pruned it stays: other layouts round differently.
            hidden_states = hidden_states.contiguous()
        state.numbers = encoder_pass is not None
        if attention_mask is not None and state.void is not None:  # what nothing may attend to leaves at once
            hidden_states, attention_mask = state.drop_void(hidden_states), None
        elif attention_mask is not None and (state.prunes or self.policy.prunes_features):
            if encoder_pass is None or encoder_pass.masked is not False:
                raise ValueError(
                    "attention_mask was passed to a patched vision encoder, which cannot tell what is left of the "
                    f"images that {type(self.policy).__name__} is to judge: only unmasked images are supported; drop it"
                )
            attention_mask = None  # of a graph that is captured or compiled, where transformers leaves out none
        mask = (attention_mask,) if self.takes_mask else ()
        entered = []  # patches of the rows that came to each layer
        for layer in self.layers:
            if encoder_pass is not None and encoder_pass.align:
                entered.append((state.patches, state.mask))
            hidden_states = layer(hidden_states, *mask, pruning=state, **kwargs)
        (self.traced or self).trace = state.trace
        if encoder_pass is not None:
            self._end(state, encoder_pass, entered, hidden_states)
        return BaseModelOutput(last_hidden_state=hidden_states)

    def started(self, asked: EncoderPass, batch: int, patches: int) -> EncoderState:
        """The state of a pass over `batch` tiles of so many patches."""
        key = asked.side, asked.tokens, asked.budgets, batch, patches
        known = None if torch.compiler.is_compiling() else self.remembered.get(key)
        if known is None:
            known = self._foreseen(*key)
            if not torch.compiler.is_compiling():
                remember(self.remembered, key, known)
        layers = self.layers if torch.is_grad_enabled() else ()
        checkpoints = any(getattr(layer, "gradient_checkpointing", False) for layer in layers)
        return EncoderState(
            **known,
            policy=self.policy,
            feature_layer=self.feature_layer,
            protect=self.protect,
            backend=resolve_backend(self.backend),  # once: the environment is slow to read
            void=asked.void if known["prunes"] else None,
            pixels=asked.pixels,
            trace=Trace() if self.record else None,
            entries={} if checkpoints else None,
        )

    def _foreseen(
        self, side: int, tokens: Sequence[int] | None, budgets: Sequence[int] | None, batch: int, patches: int
    ) -> dict[str, Any]:
        """Of the state of a pass what follows from its tiles' sizes."""
        grid = self._tokens(patches, side)
        tokens = tokens or [math.prod(grid)] * batch
        budgets = budgets or [self.policy.encoder_budget(n) for n in tokens]
        if len(tokens) != batch:
            raise ValueError(
                f"{batch} tiles came to the vision encoder, but what came with them speaks of {len(tokens)}: pass "
                "pixel_values and the rest as the processor gave them"
            )
        prunes = any(budget < math.prod(grid) for budget in budgets)
        if not prunes:  # patches by themselves, in the order in which the model expects them
            side, grid = 1, self.grid(patches)
            tokens = budgets = [patches] * batch
        budgets = [max(n, 1) for n in budgets]  # nothing attends to nothing
        plans = {
            kind: plan_of(self.policy, len(self.layers), self.feature_layer, *kind)
            for kind in sorted({*zip(tokens, budgets, strict=True)})
        }
        return dict(plans=plans, grid=grid, tokens=tokens, budgets=budgets, block=side**2, prunes=prunes)

    def _end(
        self,
        state: EncoderState,
        asked: EncoderPass,
        entered: list[tuple[Tensor | None, Tensor | None]],
        hidden: Tensor,
    ) -> None:
        """Note what a pass left, of whose last layer `hidden` came."""
        score = state.history
        asked.whole = math.prod(state.grid)
        if not state.prunes:
            if score is not None and asked.side > 1:
                order = _by_tokens(self._tokens(state.tokens[0], asked.side), asked.side, self.protect, score.device)
                score = score[:, held(order)]
            if score is not None:
                asked.importance = score[:, self.protect :].unflatten(1, (-1, asked.side**2)).mean(2)
            return
        asked.importance = None if score is None else score[:, self.protect :: state.block]
        patches, ends = state.patches, asked.budgets or state.budgets
        if patches is None:  # tiles of one token, of which some are nobody's
            patches = torch.arange(-self.protect, state.block, device=hidden.device).expand(len(ends), -1)
        asked.width = (patches.shape[1] - self.protect) // state.block
        asked.left = tuple(n if end else 0 for n, end in zip(state.left or state.tokens, ends, strict=True))

        def position() -> Tensor:
            found = state.tokens_of(_or_absent(patches, state.mask, -state.block))
            if min(ends) > 0:
                return found
            none = constant(tuple(n < 1 for n in ends), found.device, torch.bool)
            return found.masked_fill(none[:, None], -1)

        asked.find = position
        for index in asked.align:
            before, mask = entered[index] if index < len(entered) else (patches, state.mask)
            if before is None:  # all
                rows = patches + self.protect
            else:
                rows = torch.searchsorted(_or_absent(before, mask, torch.iinfo(torch.int64).max), patches)
            asked.rows[index] = _or_absent(rows, state.mask, -1)

    @classmethod
    def _tokens(cls, patches: int, side: int) -> tuple[int, int]:
        """Rows and columns of a tile's tokens, squares of side x side patches."""
        rows, columns = cls.grid(patches)
        if rows % side or columns % side:
            raise ValueError(f"{rows} x {columns} patches cannot be merged in squares of {side} x {side}")
        return rows // side, columns // side

    @staticmethod
    def grid(patches: int) -> tuple[int, int]:
        """Rows and columns of an image's patches."""
        side = math.isqrt(patches)
        return (side, side) if side * side == patches else (1, patches)


@lru_cache(maxsize=256)
def plan_of(
    policy: Policy, layers: int, feature_layer: int, tokens: int, budget: int
) -> tuple[EncoderStep | None, ...]:
    """The policy's step at each layer, for a tile of so many tokens of which `budget` are to be left."""
    return tuple(policy.encoder_step(layer, feature_layer, tokens, budget) for layer in range(layers))


def _or_absent(x: Tensor, live: Tensor | None, value: int) -> Tensor:
    """x [B, M], `value` in rows that are not live."""
    return x if live is None else x.masked_fill(~live, value)


@lru_cache(maxsize=16)
def _by_tokens(grid: tuple[int, int], side: int, protect: int, device: torch.device) -> Tensor:
    """int64 [rows] of a tile whose tokens, `grid` of them, are squares of side x side patches: token by token."""
    rows, columns = grid
    places = torch.arange(rows * side * columns * side, device="cpu").view(rows, side, columns, side)
    with torch.inference_mode(False):
        patches = places.transpose(1, 2).flatten() + protect
        return torch.cat([torch.arange(protect, device="cpu"), patches]).to(device)
