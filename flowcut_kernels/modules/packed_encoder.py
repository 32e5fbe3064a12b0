"""Replacement blocks of a packed vision encoder (Qwen-VL), which reads images and frames of any size in one sequence.

The tiles of this encoder are frames: an image is one, a video one per temporal patch. Tokens are the blocks of patches
that the merger makes one of, consecutive rows here, which are kept or dropped whole. A frame's anchor is its mean token
and statistics are over all its rows, also at layers whose attention stays within windows.

As in encoder.py a layer that prunes computes attention output, projection and MLP for the kept rows alone; their
queries attend to all rows. Queries of dropped rows are projected, as the mean query after RoPE is made of all of them.
Layers that score nothing compute what the stock block does, on what is left: its lengths are known to the host, whom
the stock block keeps waiting for them. The mergers work on that too, but what they put out has every place again, zeros
where tokens were dropped: the rest of the model sees the shapes it expects.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from .._library import resolve_backend
from .._ops import accumulate_dtype
from ..ops import attention, gather_tokens
from ..ops.score_select import raise_if_not_finite
from ..policies.base import EncoderStep, EncoderView, Pixels, Policy, Selection
from ..policies.recycling import constant
from ..trace import Stage, Trace
from ._signature import signature_of
from .encoder import PrunedEncoder, has_native_attention, plan_of, sdpa_with_lse, untracked


class cached_property:
    """That of functools without its lock (before Python 3.12), which torch.compile does not trace."""

    def __init__(self, make: Callable) -> None:
        self.make = make

    def __get__(self, owner: Any, kind: type) -> Any:
        value = vars(owner)[self.make.__name__] = self.make(owner)
        return value


class PackedParts(NamedTuple):
    """Where a family keeps the parts of a pre-norm block of a packed encoder."""

    norm1: nn.Module
    attention: nn.Module  # with qkv, proj, num_heads, scaling, attention_dropout, config
    norm2: nn.Module
    mlp: nn.Module
    eager: Callable  # the family's eager attention function
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # query, key, cos, sin -> query, key


class Frame(NamedTuple):
    """A tile of the encoder."""

    visual: int  # the image or video it is of
    grid: tuple[int, int]  # rows and columns of its tokens
    budget: int  # tokens to leave

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @classmethod
    def of(cls, grids: list[list[int]], side: int, policy: Policy) -> list[Frame]:
        """The frames of visuals of (frames, rows, columns) of patches, whose tokens are `side` patches wide and high.

        What the encoder leaves of a video is spread evenly over its frames, the first ones get the remainder.
        """
        frames = []
        for visual, (count, height, width) in enumerate(grids):
            grid = height // side, width // side
            budget = policy.encoder_budget(count * grid[0] * grid[1], count)
            frames += [cls(visual, grid, budget // count + (i < budget % count)) for i in range(count)]
        return frames


@dataclass(frozen=True)
class Segments:
    """Consecutive pieces of a packed sequence [R, ...], and the same pieces padded: [F, W, ...]."""

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def even(self) -> bool:
        return len(set(self.lengths)) == 1

    @property
    def tensor(self) -> Tensor:
        """int32 [F]."""
        return constant(self.lengths, self.device, torch.int32)

    @property
    def starts(self) -> Tensor:
        """int64 [F]."""
        return constant(tuple(accumulate((0, *self.lengths[:-1]))), self.device)

    @cached_property
    def rows(self) -> Tensor:
        """int64 [F, W] rows of the pieces; behind a piece's last any."""
        column = torch.arange(max(self.lengths), device=self.device)
        return (self.starts[:, None] + column).clamp_max(sum(self.lengths) - 1)

    @cached_property
    def places(self) -> Tensor:
        """int64 [R] of each row among the F * W padded ones."""
        count, width, total = len(self.lengths), max(self.lengths), sum(self.lengths)
        ahead = torch.arange(count, device=self.device) * width - self.starts
        lengths = constant(self.lengths, self.device)
        return torch.arange(total, device=self.device) + ahead.repeat_interleave(lengths, output_size=total)

    def pad(self, x: Tensor) -> Tensor:
        return x.view(len(self.lengths), -1, *x.shape[1:]) if self.even else x[self.rows]

    def unpad(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1) if self.even else x.flatten(0, 1)[self.places]

    def numbered(self, index: Tensor) -> Tensor:
        """Rows of the sequence that are rows `index` [F, n] of the pieces."""
        return index if len(self.lengths) == 1 else self.starts[:, None] + index

    def mean(self, x: Tensor) -> Tensor:
        """Of each piece's rows of x [R, H, d]: [F, H, 1, d]. No rows: 0."""
        dtype = accumulate_dtype(x.dtype)
        if self.even:
            mean = self.pad(x).mean(1, dtype=dtype)
        else:  # `unsafe` skips a check of the lengths that would wait for the device
            lengths = constant(self.lengths, self.device)
            mean = torch.segment_reduce(x.to(dtype), "mean", lengths=lengths, axis=0, unsafe=True).nan_to_num(0.0)
        return mean.to(x.dtype)[:, :, None]


@dataclass
class Rows:
    """What a layer is given. Not to be written to: with checkpoints, layers run again."""

    segments: Segments  # of the frames
    block: int  # rows of a token
    windows: tuple[int, ...] = ()  # rows of each window, where the encoder has some
    window: np.ndarray | None = None  # [R / block] the window of each token
    number: Tensor | None = None  # int64 [R] which rows of the encoder's input they are; None: all of them
    rotary: tuple[Tensor, Tensor] | None = None  # cos, sin [R, d]; None: all rows are there

    @cached_property
    def tokens(self) -> Tensor | None:
        """int64 [R / block] which tokens of all frames are left, in the encoder's order; None: all."""
        return None if self.number is None else self.number[:: self.block] // self.block

    @cached_property
    def by_token(self) -> Segments:
        """Tokens in place of rows."""
        return Segments(tuple(n // self.block for n in self.segments.lengths), self.segments.device)


@dataclass
class PackedState:
    """One forward pass through a packed encoder."""

    encoder: PackedEncoder
    frames: list[Frame]
    rows: Rows
    history: Tensor | None = None  # [F, W] cumulative score
    order: Tensor | None = None  # int64 [T] place of each token, in the encoder's order; None: as they come
    pixels: Pixels | None = None  # where the policy wants them
    backend: str | None = None
    trace: Trace | None = None
    # With gradient checkpointing: what each layer found on entry.
    entries: dict[int, tuple[Rows, Tensor | None]] | None = None

    @property
    def block(self) -> int:
        return self.encoder.block

    @cached_property
    def frame_starts(self) -> Tensor:
        """int64 [F, 1] first token of each frame."""
        sizes = tuple(frame.tokens for frame in self.frames)
        return Segments(sizes, self.rows.segments.device).starts[:, None]

    @cached_property
    def kinds(self) -> list[tuple[int, int]]:
        """Tokens of each frame, and how many to leave."""
        return [(frame.tokens, frame.budget) for frame in self.frames]

    @cached_property
    def plans(self) -> dict[tuple[int, int], tuple[EncoderStep | None, ...]]:
        """The policy's step at each block, by kind."""
        policy, last = self.encoder.policy, self.encoder.feature_layer
        return {kind: plan_of(policy, last + 1, last, *kind) for kind in {*self.kinds}}

    @cached_property
    def busy(self) -> frozenset[int]:
        """Blocks at which there is a step for any kind."""
        return frozenset(layer for plan in self.plans.values() for layer, step in enumerate(plan) if step is not None)

    def enter(self, layer: int) -> None:
        """With gradient checkpointing, called by every layer: they run again in the backward pass, the last first."""
        assert self.entries is not None
        if layer in self.entries:
            self.trace = None  # recorded the first time
        self.rows, self.history = self.entries.setdefault(layer, (self.rows, self.history))

    def step(self, layer: int) -> tuple[EncoderStep, list[int], list[bool]] | None:
        """The policy's step at `layer`, tokens it leaves of each frame, and frames it is a step of; None: of no frame.

        A frame that is down to its budget keeps its tokens and their score.
        """
        if layer not in self.busy:
            return None
        found = {kind: plan[layer] for kind, plan in self.plans.items()}
        left = self.rows.by_token.lengths
        steps = [
            None if now < kind[0] and now <= kind[1] else found[kind]
            for kind, now in zip(self.kinds, left, strict=True)
        ]
        given = [step for step in steps if step is not None]
        if not given:
            return None
        budgets = [
            min(step.budget, now) if step is not None and step.prunes else now
            for step, now in zip(steps, left, strict=True)
        ]
        step = next((step for step in given if step.prunes), given[0])
        step = step._replace(budget=max(budgets), static=all(x.static for x in given))
        return step, budgets, [x is not None for x in steps]

    def select(
        self,
        layer: int,
        hidden: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: Any,
        made: Any,
        lse: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Ask the policy, given heads [R, H, d] and maybe the row log-sum-exp [R, H] of frames: rows of the residual
        stream and queries that go on. `rows` is then what is left.

        Costs one read-back where an adaptive step prunes, and where the encoder has windows.
        """
        (step, budgets, active), before = made, self.rows
        segments = before.segments
        pad, device = segments.pad, key.device
        grids = [frame.grid for frame in self.frames]
        view = EncoderView(
            key=pad(key).transpose(1, 2),
            value=pad(value).transpose(1, 2),
            query=None if step.prunes else pad(query).transpose(1, 2),
            anchor=lambda _: (segments.mean(query), segments.mean(value)),
            protect=0,
            lengths=None if segments.even else segments.tensor,
            history=self.history,
            grid=grids[0],
            pixels=None if self.pixels is None else self.pixels._replace(arrange=self._arranged),
            backend=self.backend,
            block=self.block,
            budgets=constant(tuple(budgets), device, torch.int32) if len(set(budgets)) > 1 else None,
            places=None if self.order is None and before.number is None else lambda: self._places(before),
            grids=grids if len(set(grids)) > 1 else None,
            lse=None if lse is None else pad(lse).transpose(1, 2),
        )
        with untracked():
            choice = self.encoder.policy.encoder_select(step, view)
        score = choice.score
        if score is not None and self.history is not None and not all(active):
            stays = constant(tuple(active), device, torch.bool)[:, None]
            score = torch.where(stays, score, self.history)
        self.history = score
        index = choice.index
        scored = None if self.trace is None or index is None else (self.position, self.importance)
        lengths, window = self._counts(layer, step, budgets, choice)
        if index is not None and lengths != segments.lengths:
            after = Segments(lengths, device)
            kept = after.unpad(segments.numbered(index[:, : max(lengths)]))
            travels = dict(number=before.number, history=None if score is None else segments.unpad(score))
            travels = {name: x for name, x in travels.items() if x is not None}
            given = [x[None] for x in (hidden, query.flatten(1), *rotary, *travels.values())]
            hidden, flat, cos, sin, *rest = (x[0] for x in gather_tokens(given, kept[None], backend=self.backend))
            query, found = flat.view(-1, *query.shape[1:]), dict(zip(travels, rest, strict=True))
            score = found.get("history")
            self.history = None if score is None else after.pad(score)
            windows: tuple[int, ...] = ()
            if window is not None:
                windows = tuple((self.block * np.bincount(window, minlength=len(before.windows))).tolist())
            self.rows = Rows(after, self.block, windows, window, found.get("number", kept), (cos, sin))
        if self.trace is not None:
            self._record(self.trace, layer, choice.entropy, scored)
        return hidden, query

    select_apart = torch.compiler.disable(select)  # as `EncoderState.select_apart`

    def _counts(
        self, layer: int, step: EncoderStep, budgets: list[int], choice: Selection
    ) -> tuple[tuple[int, ...], np.ndarray | None]:
        """Rows of each frame after a step, and the windows of the tokens that are left; checks the scores it reads.

        Where there are windows it is the tokens that are read: counting them on a device would be a dozen launches.
        """
        rows, index, lengths, window = self.rows, choice.index, choice.lengths, self.rows.window
        if index is None or window is None:
            on_host = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
            if not on_host and (step.static or index is None):  # a frame's are known
                return tuple(self.block * budget for budget in budgets), window
            counts = lengths.tolist()
        else:
            read = torch.cat([lengths[:, None], index[:, :: self.block]], 1).cpu().numpy()
            counts, row = read[:, 0].tolist(), read[:, 1:]
            starts = list(accumulate((0, *rows.segments.lengths[:-1])))
            window = window[((row + np.array(starts)[:, None]) // self.block)[row >= 0]]
        raise_if_not_finite(counts, f"encoder layer {layer}")
        return tuple(counts), window

    def scatter(self, merged: Tensor) -> Tensor:
        """`merged` tokens [t, D] that are left, in a row of all tokens [T, D]."""
        tokens = self.rows.tokens
        if tokens is None:
            return merged
        total = sum(frame.tokens for frame in self.frames)
        return merged.new_zeros(total, merged.shape[1]).index_copy_(0, tokens, merged)

    def by_visual(self, x: Tensor) -> list[Tensor]:
        """x [t] of the tokens that are left, in the order of their places: for each image or video."""
        counts = [0] * (self.frames[-1].visual + 1)
        for frame, tokens in zip(self.frames, self.rows.by_token.lengths, strict=True):
            counts[frame.visual] += tokens
        return list(x.split(counts))

    @property
    def place(self) -> Tensor | None:
        """int64 [t] of the tokens that are left, among those of all frames; None: all, as they come."""
        if self.order is None:
            return self.rows.tokens
        return self.order if self.rows.tokens is None else self.order[self.rows.tokens]

    @property
    def position(self) -> list[Tensor] | None:
        """Places of the tokens left of each image or video, ascending; None: all are there."""
        place = self.place
        if self.rows.tokens is None or place is None:
            return None
        first: dict[int, int] = {}
        for frame, start in zip(self.frames, accumulate((0, *(f.tokens for f in self.frames[:-1]))), strict=True):
            first.setdefault(frame.visual, start)
        places = self.by_visual(place if self.order is None else place.sort().values)
        return [x - start if start else x for x, start in zip(places, first.values(), strict=True)]

    @property
    def importance(self) -> list[Tensor] | None:
        """Score of the tokens left of each image or video, in the order of their places."""
        return None if self.history is None else self.means_by_visual(self.history)

    def means_by_visual(self, rows: Tensor) -> list[Tensor]:
        """Means over the rows [F, W] of a token, of the tokens left of each image or video, in the order of places."""
        mean, place = self.rows.segments.unpad(rows).view(-1, self.block).mean(1), self.place
        return self.by_visual(mean if self.order is None or place is None else mean[place.argsort()])

    def _arranged(self, x: Tensor) -> Tensor:
        """x [R * images of a patch, 1] of the encoder's input, in the order of a view's rows."""
        x = x.view(sum(frame.tokens for frame in self.frames), self.block, -1).mean(2)
        place = self.place
        x = x if place is None else x[place]
        return self.rows.segments.pad(x.flatten())

    def _places(self, rows: Rows) -> Tensor:
        """int64 [F, n] places in their frames of the tokens among `rows`."""
        tokens = rows.tokens
        place = self.order if tokens is None else tokens if self.order is None else self.order[tokens]
        assert place is not None
        return rows.by_token.pad(place) - self.frame_starts

    def _record(self, trace: Trace, layer: int, entropy: Tensor | None, scored: Any) -> None:
        """The step in terms of images and videos; `scored` are the places and the scores of what it found."""
        visuals = torch.tensor([frame.visual for frame in self.frames], device=self.frame_starts.device)
        full = [0] * (self.frames[-1].visual + 1)
        for frame in self.frames:
            full[frame.visual] += frame.tokens
        if entropy is not None:  # a video's is the mean of its frames'
            entropy = entropy.new_zeros(len(full)).index_add(0, visuals, entropy) / visuals.bincount()
            trace.entropy[layer] = entropy
        if scored is None:
            return
        whole = [torch.arange(n, device=visuals.device) for n in full]
        places, values, scores = scored[0] or whole, scored[1], None
        if values is not None:
            scores = values[0].new_full((len(full), max(full)), float("nan"))
            for row, place, value in zip(scores, places, values, strict=True):
                row[place] = value
        kept = self.position or whole
        lengths = [len(x) for x in kept]
        indices = pad_sequence(kept, batch_first=True, padding_value=-1)
        counts = torch.tensor(lengths, dtype=torch.int32, device=visuals.device)
        trace.stages.append(Stage("encoder", layer, lengths, indices, counts, scores, entropy))


class PackedBlock:
    """Replacement ``forward`` of one block of a packed encoder."""

    def __init__(self, block: nn.Module, parts_of: Callable[[nn.Module], PackedParts], number: int, windowed: bool):
        self.block, self.parts_of, self.number, self.windowed = block, parts_of, number, windowed

    def __call__(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: Any = None,
        max_seqlen: int | None = None,
        *,
        packing: PackedState | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if packing is None:
            return type(self.block).forward(
                self.block,
                hidden_states,
                cu_seqlens=cu_seqlens,
                position_embeddings=position_embeddings,
                max_seqlen=max_seqlen,
                **kwargs,
            )
        if packing.entries is not None:
            packing.enter(self.number)
        parts, rotary = self.parts_of(self.block), packing.rows.rotary or position_embeddings
        hidden_states = self._attention_half(parts, hidden_states, rotary, packing, **kwargs)
        return hidden_states + parts.mlp(parts.norm2(hidden_states))

    def _pieces(self, rows: Rows) -> Sequence[int]:
        """Rows that attend to each other."""
        return rows.windows if self.windowed else rows.segments.lengths

    def _attention_half(
        self,
        parts: PackedParts,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        state: PackedState,
        **kwargs: Any,
    ) -> Tensor:
        """Everything up to the residual stream after attention; what it made on the way is gone before the MLP."""
        module: Any = parts.attention
        heads = torch.unflatten(module.qkv(parts.norm1(hidden_states)), -1, (3, module.num_heads, -1))
        query, key, value = heads.unbind(1)
        query, key = parts.rotate(query, key, *rotary)
        keys, made, known = self._pieces(state.rows), state.step(self.number), None
        if made is not None:
            if made[0].lse and not self.windowed:  # of a layer that keeps all rows
                known = _attend_with_lse(module, query, key, value, keys)
            lse = None if known is None else known[1]
            select = state.select_apart if made[0].prunes and not made[0].static else state.select
            hidden_states, query = select(self.number, hidden_states, query, key, value, rotary, made, lse)
        if known is not None:
            return hidden_states + module.proj(known[0].flatten(1))
        stock = made is None or state.rows.number is None  # nothing is pruned: the very sums of the stock block
        mixed = _attend(
            parts, query, key, value, self._pieces(state.rows), keys, stock=stock, backend=state.backend,
            **kwargs,
        )  # fmt: skip
        return hidden_states + module.proj(mixed.flatten(1))


def _attend(
    parts: PackedParts,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Sequence[int],
    keys: Sequence[int],
    *,
    stock: bool,
    backend: str | None,
    **kwargs: Any,
) -> Tensor:
    """Attention [R', H, d] of queries in pieces of so many `rows`, each to its own piece of `keys`.

    `stock`: piece by piece, as the stock block.
    """
    module: Any = parts.attention
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, parts.eager)
    dropout = module.attention_dropout if module.training else 0.0
    options = kwargs | dict(scaling=module.scaling, dropout=dropout, is_causal=False)
    pairs = [(n, m) for n, m in zip(rows, keys, strict=True) if m]
    if is_flash_attention_requested(module.config):
        for name, lengths in zip("qk", zip(*pairs, strict=True), strict=True):
            ends = constant(tuple(accumulate(lengths, initial=0)), query.device, torch.int32)
            options |= {f"cu_seq_lens_{name}": ends, f"max_length_{name}": max(lengths)}
        packed = (x.transpose(0, 1)[None] for x in (query, key, value))
        return attend(module, *packed, None, **options)[0][0]
    if not stock and has_native_attention(module, query, backend):
        asks, sees = (Segments(lengths, query.device) for lengths in zip(*pairs, strict=True))
        span = None if sees.even else torch.stack([torch.zeros_like(sees.tensor), sees.tensor], 1)
        padded = (x.transpose(1, 2) for x in (asks.pad(query), sees.pad(key), sees.pad(value)))
        return asks.unpad(attention(*padded, key_span=span, scale=module.scaling, backend=backend))
    if len(pairs) == 1 or (not stock and len(set(pairs)) == 1):  # one batch
        batch = (torch.unflatten(x, 0, (len(pairs), -1)).transpose(1, 2) for x in (query, key, value))
        return attend(module, *batch, None, **options)[0].flatten(0, 1)
    given = (query, rows), (key, keys), (value, keys)
    pieces = zip(*(x.transpose(0, 1)[None].split(list(n), 2) for x, n in given), strict=True)
    return torch.cat([attend(module, *piece, None, **options)[0][0] for piece in pieces if piece[0].shape[2]])


def _attend_with_lse(
    module: Any, query: Tensor, key: Tensor, value: Tensor, rows: Sequence[int]
) -> tuple[Tensor, Tensor] | None:
    """Attention [R, H, d] within pieces of so many `rows`, as of the stock block, and its row log-sum-exp [R, H].

    None where it leaves none.
    """
    pieces = zip(*(x.transpose(0, 1)[None].split(list(rows), 2) for x in (query, key, value)), strict=True)
    found = []
    for piece in pieces:
        known = sdpa_with_lse(module, module.scaling, *piece)
        if known is None:
            return None
        found.append((known[0][0], known[1][0].T))
    mixed, lse = (torch.cat(parts) for parts in zip(*found, strict=True))
    return mixed, lse


class PackedMerger:
    """Replacement ``forward`` of a merger: it works on what is kept, and what it puts out has every place."""

    def __init__(self, merger: nn.Module, encoder: PackedEncoder) -> None:
        self.merger, self.encoder = merger, encoder

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        merged = type(self.merger).forward(self.merger, *args, **kwargs)
        return merged if self.encoder.state is None else self.encoder.state.scatter(merged)


@dataclass
class PackedEncoder:
    """Replacement ``forward`` of a packed encoder: the stock one with a state that travels through the blocks."""

    encoder: Any
    policy: Policy
    block: int  # patches of a token
    feature_layer: int  # 0-based layer whose output is merged
    # encoder, grid_thw and further arguments -> order of the tokens [T] and cumulative patches of the windows
    windows: Callable[[Any, Tensor, dict[str, Any]], tuple[Tensor, Tensor]] | None = None
    # encoder, sizes and device -> further arguments of the stock forward, which would make them of the sizes
    of_sizes: Callable[[Any, list[list[int]], torch.device], dict[str, Tensor]] | None = None
    mergers: Sequence[tuple[int, nn.Module]] = ()  # and the layers whose output they merge
    pixel_mean: Sequence[float] = ()  # of the usual image processor, on a scale of 0..1
    pixel_std: Sequence[float] = ()
    record: bool = False
    backend: str | None = None
    state: PackedState | None = field(default=None, repr=False)  # of the pass that is running
    # Of the last pass:
    trace: Trace | None = field(default=None, repr=False)
    importance: list[Tensor] | None = field(default=None, repr=False)  # of the tokens left of each visual
    position: list[Tensor] | None = field(default=None, repr=False)  # int64, these tokens; None: all

    @property
    def __signature__(self) -> inspect.Signature:
        return signature_of(type(self.encoder).forward)

    @property
    def patch_shape(self) -> tuple[int, ...]:
        """Channels, images, rows and columns of a patch."""
        kernel = self.encoder.patch_embed.proj
        return (kernel.in_channels, *kernel.kernel_size)

    def __call__(self, hidden_states: Tensor, grid_thw: Tensor | list[list[int]], **kwargs: Any) -> Any:
        if kwargs.get("output_attentions") or getattr(self.encoder.config, "output_attentions", False):
            raise ValueError(
                "output_attentions=True was asked of a patched vision encoder, whose pruning layers form no attention "
                "map: unpatch first, or look at trace(model).stages[i].scores"
            )
        self.state = state = self.started(grid_thw, hidden_states.device, kwargs)
        if self.policy.wants_pixels:
            images = hidden_states.view(-1, *self.patch_shape).transpose(1, 2).flatten(0, 1)
            state.pixels = Pixels(images, self.pixel_mean, self.pixel_std, images.shape[-1])
        try:
            output = type(self.encoder).forward(self.encoder, hidden_states, grid_thw, packing=state, **kwargs)
        finally:
            self.state = None
        self.trace, self.position = state.trace, state.position
        self.importance = state.importance if self.policy.prunes_features else None
        return output

    def started(self, grid_thw: Tensor | list[list[int]], device: torch.device, kwargs: dict[str, Any]) -> PackedState:
        """The state of a pass over images or videos of (frames, rows, columns) of patches; `kwargs` of the stock
        forward are given what it would work out again.

        As a list the sizes are constants of a compiled graph.
        """
        grids = grid_thw if isinstance(grid_thw, list) else grid_thw.tolist()
        if self.of_sizes is not None:
            for name, x in self.of_sizes(self.encoder, grids, device).items():
                kwargs.setdefault(name, x)
        frames = Frame.of(grids, round(self.block**0.5), self.policy)
        rows = Rows(Segments(tuple(self.block * frame.tokens for frame in frames), device), self.block)
        blocks = self.encoder.blocks if torch.is_grad_enabled() else ()
        checkpoints = any(getattr(block, "gradient_checkpointing", False) for block in blocks)
        state = PackedState(
            self, frames, rows, backend=resolve_backend(self.backend), trace=Trace() if self.record else None,
            entries={} if checkpoints else None,
        )  # fmt: skip
        if self.windows is not None:
            order, ends = (x.cpu() for x in self.windows(self.encoder, torch.tensor(grids, device="cpu"), kwargs))
            lengths = np.diff(ends.numpy())
            window = np.arange(len(lengths)).repeat(lengths // self.block)
            state.rows = replace(rows, windows=tuple(lengths.tolist()), window=window)
            state.order = order.to(device, non_blocking=True)
            # The stock forward takes them as they are.
            kwargs |= dict(window_index=state.order, cu_window_seqlens=ends.to(device, non_blocking=True))
        return state


VisionEncoder = PrunedEncoder | PackedEncoder
