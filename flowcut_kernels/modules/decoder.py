"""Replacement blocks of a pre-norm decoder that drop visual tokens at any layer.

As in the encoder, a layer that prunes projects K and V for all its rows, lets the policy choose, and computes queries,
attention output and MLP for the kept rows alone. Its own keys and values stay complete; the layers after it hold those
of the kept rows. The rest of transformers goes on to see the prompt's length: only the layers of the cache know that
some of them lack rows (kv_layers.py). Where a prompt keeps the columns of tokens that the encoder dropped, as its
positions follow from them (M-RoPE), a cut before the first layer drops these.

A column is a token of the conversation as the language model is given it; a row is a column that a layer still has.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from .._ops import Relevance, ValueNorm, accumulate_dtype
from ..ops import anchor_stats, gather_tokens
from ..ops.score_select import raise_if_not_finite
from ..policies.base import DecoderView, Policy, PromptView, Selection, VisualHeads
from ..policies.recycling import constant
from ..trace import Stage, Trace
from ._rows import gather_normed
from ._signature import signature_of
from .encoder import LayerParts
from .kv_layers import NEVER, PrunedRows, Rewind, compact, is_pruned, pruned_layer
from .packed_encoder import VisionEncoder

_RATERS = 32  # that are asked together


@dataclass(frozen=True)
class DecoderParts(LayerParts):
    """Where a family keeps the parts of a pre-norm decoder layer; attention with head_dim, scaling, layer_idx."""

    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # query, key, cos, sin -> query, key
    rms_norm: type[nn.Module] | None  # the family's, where its weight alone scales (Gemma's adds 1)
    q_norm: nn.Module | None = None  # of each head, before it is rotated
    k_norm: nn.Module | None = None


@dataclass
class VisualTokens:
    """Where a prompt of B samples and L columns has its I images, and afterwards what is left of it."""

    columns: Tensor  # int64 [I, n] columns of each image's tokens, -1 after the last of an image that has fewer
    lengths: list[int]  # tokens of each image
    full: list[int]  # tokens of each image before anything was pruned
    sources: list[int]  # which of the encoded images each one is: generate repeats them for beams
    samples: Tensor  # int64 [I] the sample each image belongs to
    counts: list[int]  # images of each sample
    # int64 [B, 2] columns of the last instruction token, and of the prompt's last token, which is another one where an
    # image comes last
    ends: Tensor
    tokens: np.ndarray  # bool [B, L] columns of the images' tokens
    live: np.ndarray  # bool [B, L] columns that are no padding
    prompt: int  # how many of the L columns are the prompt's; a draft of what is to be written may follow
    right: bool  # padding is on the right
    encoded: Callable[[], EncodedTokens] | None = None  # what is known of the tokens, once they are encoded
    kept: Tensor | None = None  # int64 [B, M] columns that reach the last layer, -1 for padding
    others: dict[bool, tuple[Tensor, list[int]]] = field(default_factory=dict, repr=False)  # by `gaps`

    @property
    def nowhere(self) -> int:
        """What stands for no column where columns are sorted: padding comes to lie on its side."""
        return self.live.shape[1] if self.right else -1

    @property
    def drafted(self) -> bool:
        """Whether columns follow that are not the prompt's."""
        return self.prompt < self.live.shape[1]

    def until(self, end: int) -> VisualTokens:
        """The same of the first `end` columns, which hold all images."""
        return replace(self, tokens=self.tokens[:, :end], live=self.live[:, :end], others={})

    def stays(self, gaps: bool) -> tuple[Tensor, list[int]]:
        """int64 [B, T] columns that no cut drops, `nowhere` after the last, and how many they are.

        Args:
            gaps: samples lose different numbers of tokens, so that padding has to be laid out anew and goes.
        """
        if gaps not in self.others:
            rows = [row.nonzero()[0] for row in (~self.tokens & self.live if gaps else ~self.tokens)]
            table = torch.from_numpy(table_of(rows, self.nowhere))
            self.others[gaps] = table.to(self.columns.device, non_blocking=True), [len(row) for row in rows]
        return self.others[gaps]

    def known(self) -> EncodedTokens:
        """What is known of the tokens by now."""
        return EncodedTokens() if self.encoded is None else self.encoded()


def table_of(rows: Sequence[np.ndarray], absent: int) -> np.ndarray:
    """int64 [B, n] of B rows, `absent` after the last of a shorter one."""
    table = np.full((len(rows), max(map(len, rows))), absent)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table


class EncodedTokens(NamedTuple):
    """What a policy found out about I images' tokens that enter the language model. Rows of n, filled up with 0."""

    importance: Tensor | None = None  # float32 [I, n]
    position: Tensor | None = None  # int64 [I, n] their places among all tokens of the image, ascending
    kept: list[int] | None = None  # how many of each they are; the prompt may have columns for all tokens of the image


class VisualRows(NamedTuple):
    """Where a layer's rows have the I images, for who chooses among them."""

    at: Tensor  # int64 [I, n] rows of each image's tokens, -1 after the last
    lengths: list[int]  # tokens of each image
    ends: Tensor  # int64 [B, 2] rows of the last instruction token and of the prompt's last token
    importance: Tensor | None  # float32 [I, n]
    scores: Tensor | None  # [I, n] that the cut before chose them by

    @property
    def asks(self) -> Tensor:
        """int64 [B] row of the last instruction token."""
        return self.ends[:, 0]

    @property
    def last(self) -> Tensor:
        """int64 [B] row of the prompt's last token."""
        return self.ends[:, 1]


@dataclass
class Cut:
    """What the layers after a cut see of a pass's L new columns."""

    layer: float  # that cut; one at the entrance of a layer is half a layer before it
    index: Tensor  # int64 [B, M] kept rows of the layer that cut, -1 for padding
    columns: Tensor  # int64 [B, M] the columns of these rows, -1 for padding
    order: Tensor  # the same, ascending: `nowhere` for padding
    gaps: bool  # whether there is padding of this kind
    visual: Tensor  # int64 [I, K] rows of each image's tokens after the cut, -1 after the last
    at: Tensor  # int64 [I, K] their columns, `nowhere` after the last
    lengths: list[int]  # tokens of each image after the cut
    tokens: Tensor | None  # int64 [I, K] which of the tokens that entered they are, -1 after the last; None: all
    ends: Tensor  # int64 [B, 2] rows of the last instruction token and of the prompt's last token after the cut
    flat: tuple[Tensor, Tensor] | None = None  # int64 [tokens] among B * M rows and among all features of the prompt
    rotary: tuple[Tensor, Tensor] | None = None  # cos, sin [B, M, d] of the rows, for the layers after the cut
    scores: Tensor | None = None  # [I, K] that it chose its tokens by
    merge: Callable[[Tensor], Tensor] | None = None  # rows of the images' tokens before it -> those after it


@dataclass
class DecoderState:
    """One forward pass through a pruned decoder."""

    decoder: PrunedDecoder
    embeds: Tensor  # [B, L, D] what goes in
    seen: Any  # columns before this pass: int, or a tensor where the cache is static
    visual: VisualTokens | None
    trace: Trace | None
    cuts: dict[float, Cut] = field(default_factory=dict)  # by layer
    masks: dict[tuple, Tensor] = field(default_factory=dict)
    renumbered: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict)  # cos, sin by stage
    # What layers of a stage hold in common: columns, vanished columns
    stages: dict[tuple, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.embeds.shape[1]

    @cached_property
    def layers(self) -> int:
        return len(self.decoder.layers)

    def before(self, layer: float) -> Cut | None:
        """The last cut before `layer`. (Gradient checkpointing runs layers again, the last one first.)"""
        made = [cut for cut in self.cuts if cut < layer]
        return self.cuts[max(made)] if made else None

    @cached_property
    def plan(self) -> dict[float, list[int]]:
        """Tokens of each image that a cut leaves, by layer: which layers cut follows from counts alone."""
        if self.visual is None:
            return {}
        policy, found = self.decoder.policy, {}
        before = self.before(0)
        left = self.visual.lengths if before is None else before.lengths
        both = (-0.5, policy.decoder_entry, Policy.decoder_entry), (0, policy.decoder_step, Policy.decoder_step)
        # Most policies have no rule of their own here, which would be asked once a layer.
        rules = [(offset, rule) for offset, rule, none in both if getattr(rule, "__func__", None) is not none]
        for layer in range(self.layers) if rules else ():
            for offset, decide in rules:
                at = layer + offset
                steps = [decide(layer, self.layers, *pair) for pair in zip(self.visual.full, left, strict=True)]
                if steps.count(None) < len(steps):
                    kept = [now if step is None else min(step, now) for step, now in zip(steps, left, strict=True)]
                    if kept != left:
                        found[at] = left = kept
        return found

    @cached_property
    def raters(self) -> Tensor | None:
        """Columns [I, R] that the policy asks about each image, -1 for none; None: the prompt's last ones."""
        visual = self.visual
        assert visual is not None

        def words() -> Tensor:
            text = torch.from_numpy(visual.live & ~visual.tokens).to(visual.ends.device)
            return text & (torch.arange(self.length, device=text.device) <= visual.ends[:, 1:])

        lengths = iter(visual.lengths)
        tokens = [sum(islice(lengths, count)) for count in visual.counts]
        most = max(self.length - min(n for n, count in zip(tokens, visual.counts, strict=True) if count), 1)
        with torch.no_grad():
            return self.decoder.policy.decoder_raters(
                PromptView(self.embeds, words, visual.columns, visual.samples, visual.ends[:, 1], most)
            )

    def advance_cache(self, cache: Any, layer: int, cut: Cut | None) -> PrunedRows | None:
        """The cache of `layer`, told of the rows it is about to be given; None where it holds every column.

        Before the layer runs, since its mask is made of the rows that it will find.
        """
        if cache is None:
            return None
        if cut is None:
            held = cache.layers[layer] if layer < len(cache.layers) else None
            return held if isinstance(held, PrunedRows) else None
        held = pruned_layer(cache, layer, cut.columns.device)
        held.stage += (cut.layer,)
        if held.stage not in self.stages:
            self.stages[held.stage] = self._advanced(held, cut)
        held.columns, held.vanished = self.stages[held.stage]
        held.dropped += self.length - cut.columns.shape[1]
        held.gaps |= cut.gaps
        return held

    def _advanced(self, held: PrunedRows, cut: Cut) -> tuple[Tensor, Tensor | None]:
        """Columns of a layer's rows, and those that vanished, with the rows that it is about to be given."""
        new = cut.columns + self.seen
        new = new.masked_fill(cut.columns < 0, -1) if cut.gaps else new
        columns = torch.cat([held.columns_of(held.rows()).expand(len(new), -1), new], 1)
        if not self.decoder.policy.renumbers:
            return columns, held.vanished
        vanished = torch.where(self.dropped(cut) > 0, torch.arange(self.length, device=new.device) + self.seen, NEVER)
        before = [] if held.vanished is None else [held.vanished.expand(len(new), -1)]
        return columns, torch.cat([*before, vanished], 1)

    def rotary(self, cut: Cut | None, held: PrunedRows | None, given: Any, positions: Tensor) -> Any:
        """Cosine and sine for a layer's rows; `given` for all columns."""
        if cut is not None:
            return cut.rotary
        if held is None or held.vanished is None:
            return given
        if held.stage not in self.renumbered:
            shifted = positions - (held.vanished < NEVER).sum(1, keepdim=True)
            self.renumbered[held.stage] = self.decoder.model.rotary_emb(self.embeds, position_ids=shifted)
        return self.renumbered[held.stage]

    def rotary_after(self, layer: int, cut: Cut, rotary: Any, positions: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        """Cosine and sine for the layers after the cut at `layer`; `rotary` those of its kept rows in that layer."""
        if not self.decoder.policy.renumbers:
            return rotary
        column = cut.columns.clamp_min(0)
        shifted = positions.expand(len(column), -1).gather(1, column) - self.dropped(cut).cumsum(1).gather(1, column)
        later = cache.layers[layer + 1] if cache is not None and layer + 1 < len(cache.layers) else None
        if isinstance(later, PrunedRows) and later.vanished is not None:  # in an earlier turn
            shifted = shifted - (later.vanished < NEVER).sum(1, keepdim=True)
        return self.decoder.model.rotary_emb(self.embeds, position_ids=shifted)

    def mask(
        self,
        given: Tensor | None,
        queries: Cut | None,
        keys: Cut | None,
        held: PrunedRows | None,
        count: Callable[[], int],
    ) -> Tensor | None:
        """A layer's mask, made from that of all columns.

        Args:
            given: 4-D (SDPA: bool, eager: additive), 2-D (flash attention), or None where causality is all.
            queries: the cut whose rows ask; None: all new columns.
            keys: the cut before the layer; None: its new keys are all new columns.
            held: the layer's cache, None where it has every column.
            count: keys that the queries attend to; a static cache has more than it was given.
        """
        if held is None and queries is None:
            return given
        gaps = held.gaps if held is not None else keys is not None and keys.gaps
        if given is None and queries is keys and not gaps:
            return None
        memo = (None if held is None else held.stage, None if queries is None else queries.layer, queries is keys)
        if memo not in self.masks:
            batch, device = len(self.embeds), self.embeds.device
            columns = torch.arange(count(), device=device)[None] if keys is None else keys.columns
            if held is not None:
                columns = held.columns_of(count())
            new = torch.arange(self.length, device=device)[None] if queries is None else queries.columns
            columns, new = columns.expand(batch, -1), new.expand(batch, -1)
            if given is not None and given.dim() == 4:
                made = self._selected(given, new, columns)
            else:
                made = columns >= 0 if given is None else self._padding(given, columns)
                if queries is keys and is_flash_attention_requested(self.decoder.model.config):
                    # Causal by itself. A mask shorter than a static cache's keys says how many of them count.
                    made = made[:, : self.length + self.seen - (0 if held is None else held.dropped)]
                else:
                    made = self._causal(made, new, columns)
            self.masks[memo] = made
        return self.masks[memo]

    def seen_by(self, given: Tensor | None, new: Tensor, columns: Tensor) -> Tensor:
        """bool [B, Q, K] which keys, at `columns` [B, K], queries at the new columns `new` [B, Q] attend to."""
        if given is not None and given.dim() == 4:
            made = self._selected(given, new, columns)[:, 0]
        else:
            made = columns >= 0 if given is None else self._padding(given, columns)
            made = self._causal(made, new, columns)[:, 0]
        return made if made.dtype == torch.bool else made == 0

    # Three ways to make a mask of queries at `new` columns [B, Q] and keys at `columns` [B, K], -1 for padding.

    @staticmethod
    def _selected(given: Tensor, new: Tensor, columns: Tensor) -> Tensor:
        """From the 4-D mask [B or 1, H or 1, L, columns] of the whole prompt: allowed or not, or what is added."""
        given = given.expand(len(new), -1, -1, -1)
        row = new.clamp_min(0)[:, None, :, None]
        given = given.gather(2, row.expand(-1, given.shape[1], -1, given.shape[3]))
        absent = (columns < 0) | (columns >= given.shape[3])  # a static cache has room for more than was seen
        column = columns.masked_fill(absent, 0)[:, None, None]
        given = given.gather(3, column.expand(-1, given.shape[1], given.shape[2], -1))
        lowest = False if given.dtype == torch.bool else torch.finfo(given.dtype).min
        return given.masked_fill(absent[:, None, None], lowest)

    @staticmethod
    def _padding(given: Tensor, columns: Tensor) -> Tensor:
        """From the 2-D mask [B, columns seen]: bool [B, K] keys that are no padding."""
        absent = (columns < 0) | (columns >= given.shape[1])
        return given.bool().gather(1, columns.masked_fill(absent, 0)) & ~absent

    def _causal(self, live: Tensor, new: Tensor, columns: Tensor) -> Tensor:
        """Of bool [B, K] live keys, those up to each query: bool [B, 1, Q, K], or what eager attention adds."""
        config = self.decoder.model.config
        if getattr(config, "use_bidirectional_attention", False):  # without a mask (PaliGemma's Gemma) nothing is later
            allowed = live[:, None, None].expand(-1, -1, new.shape[1], -1)
        else:
            allowed = live[:, None, None] & (columns[:, None, None] <= (new + self.seen)[:, None, :, None])
        if config._attn_implementation != "eager":
            return allowed
        lowest = torch.finfo(self.embeds.dtype).min
        return torch.zeros_like(allowed, dtype=self.embeds.dtype).masked_fill(~allowed, lowest)

    def enter(self) -> None:
        """Cut what the encoder dropped and the prompt still has columns of, before the first layer."""
        assert self.visual is not None
        known = self.visual.known()
        if known.kept is None or known.kept == self.visual.lengths:
            return
        assert known.position is not None
        chosen, most = known.position[:, : max(known.kept)], max(known.kept)
        if min(known.kept) < most:
            place = torch.arange(most, device=chosen.device)
            chosen = chosen.masked_fill(place >= constant(tuple(known.kept), place.device)[:, None], -1)
        self._drop(-0.5, known.kept, chosen, None)

    def make_cut(self, layer: float, budgets: list[int], choose: Callable[[VisualRows], Selection]) -> Cut:
        """Ask which visual tokens go on from `layer`, `budgets` of the images, and put their rows with all others'."""
        assert self.visual is not None
        before, visual, known = self.before(layer), self.visual, self.visual.known()
        tokens = None if before is None else before.tokens
        importance = known.importance
        if importance is not None and tokens is not None:
            importance = importance.gather(1, tokens.clamp_min(0))
        with torch.no_grad():
            if before is None:
                found = VisualRows(visual.columns, visual.lengths, visual.ends, importance, None)
            else:
                found = VisualRows(before.visual, before.lengths, before.ends, importance, before.scores)
            choice = choose(found)
        if choice.lengths.device.type == "cpu":
            raise_if_not_finite(choice.lengths.tolist(), f"decoder layer {math.ceil(layer)}")
        assert choice.index is not None
        # Scores that are not finite choose nothing (-1); on a GPU nobody looks, and attention carries them on.
        place = torch.arange(choice.index.shape[1], device=choice.index.device)
        chosen = torch.where(choice.index < 0, place, choice.index)
        if min(budgets) < max(budgets):
            chosen = chosen.masked_fill(place >= constant(tuple(budgets), place.device)[:, None], -1)
        cut = self._drop(layer, budgets, chosen, chosen if tokens is None else _taken(tokens, chosen))
        cut.merge = choice.merge
        cut.scores = None if choice.score is None else choice.score.gather(1, chosen.clamp_min(0))
        if self.trace is not None:
            self._record(cut, choice, known.position, tokens)
        return cut

    def _drop(self, layer: float, budgets: list[int], chosen: Tensor, tokens: Tensor | None) -> Cut:
        """The cut after `layer` that leaves of each image's tokens those `chosen`, int64 [I, K], -1 for none."""
        assert self.visual is not None
        before, visual = self.before(layer), self.visual
        at, lengths = (visual.columns, visual.lengths) if before is None else (before.at, before.lengths)
        lost, totals, first = [], [], 0  # tokens that each sample loses, and that it has then
        for count in visual.counts:
            images = slice(first, first := first + count)
            totals.append(sum(budgets[images]))
            lost.append(sum(lengths[images]) - totals[-1])
        # Every sample loses as many: no row is padding.
        gaps = len(set(lost)) > 1 or (before is not None and before.gaps)
        absent = chosen < 0 if min(budgets) < max(budgets) else None
        at = at.gather(1, chosen) if absent is None else _taken(at, chosen, visual.nowhere)
        # Rows are the columns in their order: how many there are is known without looking.
        stays, counts = visual.stays(gaps)
        if len(set(visual.counts)) == 1:
            tokens_of = at.view(len(counts), visual.counts[0] * at.shape[1])
        else:
            parts = [x.flatten() for x in at.split(visual.counts)]
            tokens_of = pad_sequence(parts, batch_first=True, padding_value=visual.nowhere)
        left = max(n + m for n, m in zip(counts, totals, strict=True))
        order = torch.cat([stays, tokens_of], 1).sort(1).values
        order = (order[:, :left] if visual.right else order[:, order.shape[1] - left :]).contiguous()
        columns = order.masked_fill(order == visual.nowhere, -1) if gaps and visual.right else order
        index = columns
        if before is not None:
            index = torch.searchsorted(before.order, order)
            index = index.masked_fill(columns < 0, -1) if gaps else index
        rows = order if visual.counts == [1] * len(order) else order[visual.samples]
        visible = torch.searchsorted(rows, at)
        self.cuts[layer] = cut = Cut(
            layer=layer,
            index=index,
            columns=columns,
            order=order,
            gaps=gaps,
            visual=visible if absent is None else visible.masked_fill(absent, -1),
            at=at,
            lengths=budgets,
            tokens=tokens,
            # Of a dropped one: the row before it.
            ends=(torch.searchsorted(order, visual.ends, right=True) - 1).clamp_min(0),
        )
        visual.kept = cut.columns
        return cut

    def dropped(self, cut: Cut) -> Tensor:
        """int64 [B, L] 1 for visual tokens that are gone after `cut`."""
        assert self.visual is not None
        # One more column, for the places that have no token.
        gone = torch.nn.functional.pad(torch.from_numpy(self.visual.tokens).to(cut.at.device).long(), (0, 1))
        gone[self.visual.samples[:, None], cut.at.where(cut.visual >= 0, self.length)] = 0
        return gone[:, :-1]

    def add_deepstack(self, hidden_states: Tensor, visual: Tensor, features: Tensor) -> Tensor:
        """`features` [n, D] of the columns that are `visual` [B, L], added to the rows that are left of them."""
        cut = self.cuts[max(self.cuts)]
        if cut.flat is None:
            assert self.visual is not None
            first = self.visual.samples[:, None]
            rows, columns = first * cut.order.shape[1] + cut.visual, first * self.length + cut.at
            if min(cut.lengths) < max(cut.lengths):
                live = [place * len(cut.at[0]) + i for place, n in enumerate(cut.lengths) for i in range(n)]
                rows, columns = (x.flatten()[constant(tuple(live), x.device)] for x in (rows, columns))
            number = visual.to(rows.device).flatten().cumsum(0) - 1
            cut.flat = rows.flatten(), number[columns.flatten()]
        rows, number = cut.flat
        added = hidden_states.flatten(0, 1).index_add(0, rows, features.to(hidden_states)[number])
        return added.view_as(hidden_states)

    def _record(self, cut: Cut, choice: Selection, position: Tensor | None, tokens: Tensor | None) -> None:
        """The cut in tokens of the original image. Of `tokens` [I, n] the policy chose (None: of all that entered)."""
        assert self.trace is not None and self.visual is not None and cut.tokens is not None
        images, full = len(cut.tokens), max(self.visual.full)
        if position is None:  # what the encoder left
            left = [stage.indices for stage in self.trace.stages if stage.name != "llm"]
            if not left:
                position = torch.arange(full, device=cut.tokens.device).expand(images, -1)
            elif max(self.visual.sources) >= len(left[-1]):
                return  # features of other images than those encoded last
            else:
                position = left[-1][self.visual.sources]
        scores = None
        if choice.score is not None:
            patch = position if tokens is None else _taken(position, tokens)
            scores = choice.score.new_full((images, full + 1), float("nan"))
            scores = scores.scatter(1, torch.where(patch < 0, full, patch), choice.score)[:, :full]
        kept = _taken(position, cut.tokens)
        lengths = torch.tensor(cut.lengths, dtype=torch.int32, device=kept.device)
        layer = math.ceil(cut.layer)
        self.trace.stages.append(Stage("llm", layer, cut.lengths, kept, lengths, scores, choice.entropy, choice.merged))


def _taken(x: Tensor, index: Tensor, absent: int = -1) -> Tensor:
    """x [I, n] at index [I, K], `absent` where the index is -1."""
    return x.gather(1, index.clamp_min(0)).masked_fill(index < 0, absent)


class PrunedDecoderLayer:
    """Replacement ``forward`` of one decoder layer."""

    def __init__(self, layer: nn.Module, parts_of: Callable[[nn.Module], DecoderParts], number: int) -> None:
        self.layer, self.parts_of, self.number = layer, parts_of, number

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        *,
        pruning: DecoderState | None = None,
        **kwargs: Any,
    ) -> Tensor:
        state, budgets = pruning, None
        if state is not None:
            before = state.before(self.number - 0.5)
            entering = state.plan.get(self.number - 0.5)
            if entering is not None or self.number - 0.5 in state.cuts:
                hidden_states, before = self._enter(
                    hidden_states, attention_mask, past_key_values, position_embeddings, state, before, entering
                )
            budgets = state.plan.get(self.number)
            held = state.advance_cache(past_key_values, self.number, before)
            position_embeddings = state.rotary(before, held, position_embeddings, position_ids)
            if budgets is None:
                new = hidden_states.shape[1]
                attention_mask = state.mask(
                    attention_mask, before, before, held, lambda: new if held is None else held.keys_with(new)
                )
        if state is None or budgets is None:
            # Positions with gaps look like packed sequences to flash attention; nothing else reads them here.
            return type(self.layer).forward(
                self.layer,
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids if state is None else None,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        hidden_states = self._attention_half(
            hidden_states, attention_mask, position_ids, past_key_values, position_embeddings, state, budgets, held,
            **kwargs,
        )  # fmt: skip
        parts = self.parts_of(self.layer)
        return hidden_states + parts.mlp(parts.norm2(hidden_states))

    def _enter(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        cache: Any,
        rotary: Any,
        state: DecoderState,
        before: Cut | None,
        budgets: list[int] | None,
    ) -> tuple[Tensor, Cut]:
        """The rows that enter the layer, where some that it is given do not, and the cut that they came through."""
        at = self.number - 0.5
        cut = state.cuts.get(at)
        rotary = rotary if before is None else before.rotary
        if cut is None:
            assert budgets is not None
            rows = _Rows(self.parts_of(self.layer), state, before, hidden_states, rotary, attention_mask, cache)
            cut = state.make_cut(at, budgets, lambda found: rows.choose(found, budgets, enters=True))
        tables = [x.expand(len(hidden_states), -1, -1) for x in rotary]
        kept, *tables = gather_tokens([hidden_states, *tables], cut.index, backend=state.decoder.backend)
        cut.rotary = tables[0], tables[1]
        if cut.merge is None:
            return kept, cut
        assert state.visual is not None
        samples, given = state.visual.samples[:, None], state.visual.columns if before is None else before.visual
        merged = cut.merge(hidden_states[samples, given.clamp_min(0)])
        # One more row, for the places that have no token.
        place = samples, torch.where(cut.visual < 0, kept.shape[1], cut.visual)
        return torch.nn.functional.pad(kept, (0, 0, 0, 1)).index_put(place, merged)[:, :-1], cut

    def _attention_half(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor,
        cache: Any,
        rotary: Any,
        state: DecoderState,
        budgets: list[int],
        held: PrunedRows | None,
        **kwargs: Any,
    ) -> Tensor:
        """Everything up to the kept rows of the residual stream after attention; the rest is gone before the MLP."""
        parts = self.parts_of(self.layer)
        rows = _Rows(parts, state, state.before(self.number), hidden_states, rotary, attention_mask, cache)
        normed, key, value = rows.normed, rows.key, rows.value
        cut = state.cuts.get(self.number)
        if cut is None:
            cut = state.make_cut(self.number, budgets, lambda found: rows.choose(found, budgets))
        tables = [x.expand(len(normed), -1, -1) for x in rotary]
        hidden_states, normed, rotary = gather_normed(
            parts.norm1, hidden_states, normed, tables, cut.index,
            rms_norm=parts.rms_norm, backend=state.decoder.backend,
        )  # fmt: skip
        cut.rotary = state.rotary_after(self.number, cut, rotary, positions, cache)
        query = _rotated(parts, _heads(parts, parts.q_proj(normed), parts.q_norm), rotary)
        if cache is not None:
            key, value = cache.update(key, value, parts.attention.layer_idx)
        mask = state.mask(attention_mask, cut, state.before(self.number), held, lambda: key.shape[2])
        return hidden_states + parts.out_proj(_attend(parts, query, key, value, mask, **kwargs).flatten(2))


@dataclass
class _Rows:
    """The M rows of a layer's input, and what a policy may ask about them."""

    parts: DecoderParts
    state: DecoderState
    before: Cut | None  # the last one that they have been through
    hidden: Tensor  # [B, M, D]
    rotary: Any
    mask: Tensor | None  # of all columns
    cache: Any

    @cached_property
    def normed(self) -> Tensor:
        return self.parts.norm1(self.hidden)

    @cached_property
    def key(self) -> Tensor:
        """[B, G, M, d], rotated."""
        return _rotated(self.parts, _heads(self.parts, self.parts.k_proj(self.normed), self.parts.k_norm), self.rotary)

    @cached_property
    def value(self) -> Tensor:
        return _heads(self.parts, self.parts.v_proj(self.normed))

    def choose(self, found: VisualRows, budgets: list[int], enters: bool = False) -> Selection:
        """What the policy says."""
        assert self.state.visual is not None
        view = DecoderView(
            layer=self.parts.attention.layer_idx,  # type: ignore[arg-type]
            full=self.state.visual.full,
            budgets=budgets,
            lengths=found.lengths,
            importance=found.importance,
            scores=found.scores,
            hidden=lambda: self.hidden[self._samples[:, None], found.at.clamp_min(0)],
            heads=lambda: self.heads(found),
            attention=lambda: self.attention(found),
            backend=self.state.decoder.backend,
        )
        policy = self.state.decoder.policy
        return policy.entry_select(view) if enters else policy.decoder_select(view)

    def heads(self, found: VisualRows) -> VisualHeads:
        """The images' keys and values, and the last instruction tokens' queries and values."""
        every = torch.arange(len(found.asks), device=found.asks.device)
        samples, at = self._samples, found.at.clamp_min(0)
        image = samples[:, None], at
        return VisualHeads(
            self._queries(found.asks).to(self.value.dtype)[samples],
            self.key.transpose(1, 2)[image].transpose(1, 2).to(self.value.dtype),
            self.value.transpose(1, 2)[image].transpose(1, 2),
            self.value[every, :, found.asks][:, :, None][samples],
        )

    def attention(self, found: VisualRows) -> Tensor:
        """Of the prompt's last token to the images' [I, n]: head mean of the softmax over all keys that it sees.

        Or the mean of an image's raters, where the policy names some.
        """
        raters = self.state.raters
        if raters is not None:
            return self._rated(found, raters)
        key, columns, gaps = self._keys()
        at, old = found.at, key.shape[2] - self.key.shape[2]
        causal = not getattr(self.state.decoder.model.config, "use_bidirectional_attention", False)
        if self.mask is None and causal and not gaps:
            place, end = at + old, found.last + old + 1
        else:  # what it does not see goes behind the rest
            asker = found.last[:, None] if self.before is None else self.before.columns.gather(1, found.last[:, None])
            seen = self.state.seen_by(self.mask, asker, columns)[:, 0]
            order = (~seen).long().argsort(dim=1, stable=True)
            key = key.gather(2, order[:, None, :, None].expand_as(key))
            place, end = (seen.cumsum(1) - 1)[self._samples[:, None], at.clamp_min(0) + old], seen.sum(1)
        attention, *_ = anchor_stats(
            self._queries(found.last),
            key,
            key,
            key_span=torch.stack([torch.zeros_like(end), end], 1),
            scale=self.parts.attention.scaling,  # type: ignore[arg-type]
            relevance=Relevance.NONE,
            value_norm=ValueNorm.NONE,
            backend=self.state.decoder.backend,
        )
        return attention[self._samples[:, None], 0, place.clamp_min(0)].masked_fill(at < 0, 0)

    def _rated(self, found: VisualRows, raters: Tensor) -> Tensor:
        """The same, mean over an image's raters [I, R]. Each sees other keys, which no span for all of them says."""
        parts, state, samples, mask = self.parts, self.state, self._samples, self.mask
        key, columns, _ = self._keys()
        assert state.visual is not None
        if state.visual.counts != [1] * len(key):
            key, columns = key[samples], columns[samples]
            mask = mask if mask is None or len(mask) == 1 else mask[samples]
        rotary = [x.expand(len(self.hidden), -1, -1) for x in self.rotary]
        at = found.at.clamp_min(0) + key.shape[2] - self.key.shape[2]
        row = raters.clamp_min(0)
        if self.before is not None:  # rows of columns
            row_of = torch.zeros((len(self.hidden), state.length + 1), dtype=torch.long, device=row.device)
            place = torch.arange(self.hidden.shape[1], device=row.device).expand(len(self.hidden), -1)
            row_of.scatter_(1, torch.where(self.before.columns < 0, state.length, self.before.columns), place)
            row = row_of.cummax(1).values[samples[:, None], row]  # of a dropped one: the row before it
        total = torch.zeros(found.at.shape, dtype=accumulate_dtype(key.dtype), device=row.device)
        keys = key.to(total.dtype).transpose(-1, -2)[:, :, None]
        for some, named in zip(row.split(_RATERS, 1), raters.split(_RATERS, 1), strict=True):
            query = _heads(parts, parts.q_proj(self.normed[samples[:, None], some]), parts.q_norm)
            query = _rotated(parts, query, [x[samples[:, None], some] for x in rotary])
            query = query.unflatten(1, (key.shape[1], -1)).to(total.dtype)
            logits = parts.attention.scaling * query @ keys
            seen = state.seen_by(mask, named, columns)[:, None, None] | (named < 0)[:, None, None, :, None]
            weight = logits.masked_fill(~seen, float("-inf")).softmax(-1).mean((1, 2))
            weight = weight.gather(2, at[:, None].expand(-1, some.shape[1], -1))
            total += weight.masked_fill((named < 0)[..., None], 0).sum(1)
        return (total / (raters >= 0).sum(1, keepdim=True)).masked_fill(found.at < 0, 0)

    @property
    def _samples(self) -> Tensor:
        assert self.state.visual is not None
        return self.state.visual.samples

    def _queries(self, rows: Tensor) -> Tensor:
        """[B, H, 1, d] of the rows [B], in float32 under autocast, as all that was rotated."""
        parts, every = self.parts, torch.arange(len(rows), device=rows.device)
        cos, sin = (x.expand(len(rows), -1, -1)[every, rows][:, None] for x in self.rotary)
        query = _heads(parts, parts.q_proj(self.normed[every, rows][:, None]), parts.q_norm)
        return _rotated(parts, query, (cos, sin))

    def _keys(self) -> tuple[Tensor, Tensor, bool]:
        """Those of earlier passes and of the rows [B, G, K, d], their columns [B, K], and whether some are padding."""
        state, number = self.state, self.parts.attention.layer_idx
        key, batch, device = self.key, len(self.key), self.key.device
        if self.before is None:
            columns, gaps = torch.arange(state.length, device=device).expand(batch, -1) + state.seen, False
        else:
            new = self.before.columns
            columns, gaps = torch.where(new < 0, new, new + state.seen), self.before.gaps
        if self.cache is None or not state.seen:
            return key, columns, gaps
        layer = self.cache.layers[number]
        held = layer if isinstance(layer, PrunedRows) else None
        rows = int(state.seen) if held is None else held.rows()
        old = torch.arange(rows, device=device)[None]
        if held is not None:  # which may have been told of the new ones
            old = held.columns_of(max(rows, held.columns.shape[1]))[:, :rows]
        key = torch.cat([layer.keys[:, :, :rows].to(key.dtype), key], 2)
        return key, torch.cat([old.expand(batch, -1), columns], 1), gaps or (held is not None and held.gaps)


def _heads(parts: DecoderParts, x: Tensor, norm: nn.Module | None = None) -> Tensor:
    module: Any = parts.attention
    x = torch.unflatten(x, -1, (-1, module.head_dim))
    return (x if norm is None else norm(x)).transpose(1, 2)


def _rotated(parts: DecoderParts, x: Tensor, rotary: Any) -> Tensor:
    """Heads turned by cosine and sine. The family's function takes queries and keys together: here without keys."""
    return parts.rotate(x, x[:, :0], *rotary)[0]


def _attend(
    parts: DecoderParts, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """Attention of a part of the rows, which flash attention's masks cannot say: SDPA takes its place."""
    module: Any = parts.attention
    name = module.config._attn_implementation
    attend = ALL_ATTENTION_FUNCTIONS.get_interface("eager" if name == "eager" else "sdpa", parts.eager)
    dropout = module.attention_dropout if module.training else 0.0
    return attend(module, query, key, value, mask, **kwargs | dict(dropout=dropout, scaling=module.scaling))[0]


def check_attention(model: Any) -> None:
    """ValueError where a language model's attention has masks that rows cannot be taken from."""
    if model.config._attn_implementation == "flex_attention":
        raise ValueError("attn_implementation='flex_attention' has masks that cannot be cut: use 'sdpa' or 'eager'")


@dataclass
class PrunedDecoder:
    """Replacement ``forward`` of a decoder: the stock loop with a state that travels through the layers."""

    model: Any  # with layers, rotary_emb, config
    policy: Policy
    encoder: VisionEncoder  # whose trace goes on here
    backend: str | None = None
    compact_cache: bool = False  # after a prompt, no layer keeps rows of tokens that did not reach the last one

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def __signature__(self) -> inspect.Signature:
        return signature_of(type(self.model).forward)

    def __call__(self, *args: Any, visual_tokens: VisualTokens | None = None, **arguments: Any) -> Any:
        if args:
            arguments |= self.__signature__.bind_partial(*args).arguments
        cache, state = arguments.get("past_key_values"), None
        if self.compact_cache and cache is not None and visual_tokens is not None and visual_tokens.drafted:
            return self._prompt_then_draft(visual_tokens, cache, arguments)
        if visual_tokens is not None or is_pruned(cache):
            check_attention(self.model)  # which may have changed since it was patched
            if arguments.get("output_attentions") or self.model.config.output_attentions:
                raise ValueError(
                    "output_attentions=True was asked of a language model whose layers drop tokens and form no "
                    "attention map: unpatch first, or look at trace(model).stages[i].scores"
                )
            embeds = arguments.get("inputs_embeds")
            seen = 0 if cache is None else cache.get_seq_length()
            arguments["pruning"] = state = DecoderState(
                decoder=self,
                embeds=self.model.get_input_embeddings()(arguments["input_ids"]) if embeds is None else embeds,
                seen=seen.clone() if isinstance(seen, Tensor) else seen,  # a static cache counts up in place
                visual=visual_tokens,
                trace=self.encoder.trace if visual_tokens is not None else None,
            )
            if state.trace is not None:  # of this pass alone
                state.trace.stages = [stage for stage in state.trace.stages if stage.name != "llm"]
            if visual_tokens is not None:
                state.enter()
            if arguments.get("visual_pos_masks") is not None:
                arguments["visual_pos_masks"] = _VisualRows(state, arguments["visual_pos_masks"])
        rewind = Rewind(cache) if visual_tokens is not None and cache is not None else None
        try:
            output = type(self.model).forward(self.model, **arguments)
        except BaseException:
            if rewind is not None:
                rewind()
            raise
        if self.compact_cache and state is not None and state.visual is not None and state.visual.kept is not None:
            values = output if isinstance(output, tuple) else output.values()
            for filled in (x for x in values if isinstance(x, Cache)):
                compact(filled, state.visual.kept, int(state.seen), state.length, self.backend)
        return output

    def _prompt_then_draft(self, visual: VisualTokens, cache: Cache, arguments: dict[str, Any]) -> Any:
        """Two passes: what is drafted sees the compacted cache, as it would if it had been written token by token."""
        at, length, seen, rewind = visual.prompt, visual.live.shape[1], int(cache.get_seq_length()), Rewind(cache)

        def mask(x: Any, first: int, last: int) -> Any:
            if isinstance(x, dict):
                return {kind: mask(each, first, last) for kind, each in x.items()}
            return x if x is None else x[:, : seen + last] if x.dim() == 2 else x[..., first:last, : seen + last]

        def part(first: int, last: int) -> dict[str, Any]:
            cut = dict(arguments, attention_mask=mask(arguments.get("attention_mask"), first, last))
            for name in ("input_ids", "position_ids", "visual_pos_masks"):
                if cut.get(name) is not None:
                    cut[name] = cut[name][..., first:last]
            if cut.get("inputs_embeds") is not None:
                cut["inputs_embeds"] = cut["inputs_embeds"][:, first:last]
            return cut

        nothing = dict.fromkeys(arguments.keys() & {"visual_pos_masks", "deepstack_visual_embeds"})
        try:
            read = self(**part(0, at), visual_tokens=visual.until(at))
            drafted = self(**part(at, length) | nothing)
        except BaseException:
            rewind()
            raise
        return type(drafted)(**{name: _joined(read[name], x) for name, x in drafted.items()})


def _joined(first: Any, second: Any) -> Any:
    """What two passes in a row returned: hidden states one behind the other, and their cache."""
    if isinstance(first, tuple):
        return tuple(map(_joined, first, second))
    return torch.cat([first, second], 1) if isinstance(first, Tensor) else second


class _VisualRows(NamedTuple):
    """What travels to `_deepstack_process` in place of the mask of visual columns."""

    state: DecoderState
    visual: Tensor  # bool [B, L]


@dataclass
class PrunedDeepstack:
    """Replacement ``_deepstack_process``: adds features of earlier encoder layers to the rows that are left."""

    model: Any

    def __call__(self, hidden_states: Tensor, visual_pos_masks: Any, visual_embeds: Tensor) -> Tensor:
        state, visual = visual_pos_masks if isinstance(visual_pos_masks, _VisualRows) else (None, visual_pos_masks)
        if state is not None and state.cuts:
            return state.add_deepstack(hidden_states, visual, visual_embeds)
        return type(self.model)._deepstack_process(self.model, hidden_states, visual, visual_embeds)
