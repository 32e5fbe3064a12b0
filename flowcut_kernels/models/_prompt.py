"""Prompts of a patched VLM: the processor's placeholders shrink to the pruned count, and grow back in the output."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import accumulate, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList, StoppingCriteriaList, StopStringCriteria

from .._frames import in_one_chunk
from ..modules.decoder import EncodedTokens, PrunedDecoder, VisualTokens, table_of
from ..modules.kv_layers import check_cache, is_pruned
from ..policies.recycling import constant
from ._bound import Bound, Turns, named
from ._features import HEEDED, Encoded, PrunedFeatures, Visuals, heeding

_PROMPT = "_flowcut_prompt"  # attribute of a cache that holds a pruned prompt
_LISTS = dict(logits_processor=LogitsProcessorList, stopping_criteria=StoppingCriteriaList)  # arguments of `generate`
# The prompt as `generate` was given it, while a shorter one is in its place.
_WHOLE: ContextVar[tuple[Any, _Whole] | None] = ContextVar("whole", default=None)  # for a model
# Columns of the conversation that `generate` was given: without a cache it passes what it wrote along with them.
_PROMPT_END: ContextVar[tuple[Any, int] | None] = ContextVar("prompt_end", default=None)  # for a model


@dataclass(frozen=True, eq=False)
class Shrunk:
    """Which columns of a [B, L] prompt are left. On the host, where a prompt is looked at after one read-back: on a
    device each of the small steps would be a launch, and each question a wait. In numpy, whose steps are shorter."""

    columns: np.ndarray  # int64 [B, L'], -1 where a row is padded
    dropped: np.ndarray  # bool [B, L] placeholders that no feature fills
    pads: bool = False  # whether some row may be padded
    masked: bool = True  # whether the prompt's mask may hide some column

    @classmethod
    def whole(cls, batch: int, length: int) -> Shrunk:
        """All columns of a prompt."""
        return cls(np.arange(length)[None].repeat(batch, 0), np.zeros((batch, length), bool))

    @property
    def length(self) -> int:
        return self.dropped.shape[1]

    @property
    def kept(self) -> int:
        return self.columns.shape[1]

    @property
    def right(self) -> bool:
        """Whether a row ended in padding, of which nothing need be left."""
        return self.pads and bool((~self.dropped[:, -1] & (self.columns[:, -1] != self.length - 1)).any())

    def then(self, more: Shrunk) -> Shrunk:
        """This prompt, continued by another."""
        columns = np.where(more.columns < 0, more.columns, more.columns + self.length)
        dropped = np.concatenate([self.dropped, more.dropped], 1)
        return Shrunk(np.concatenate([self.columns, columns], 1), dropped, self.pads or more.pads)

    def take(self, x: Tensor, pad: int) -> Tensor:
        """The columns of x [B, L, ...], `pad` where a row is padded."""
        index = torch.from_numpy(self.columns).to(x.device, non_blocking=True)
        if x.dim() > 2:
            index = index.view(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:])
        return x.gather(1, index.clamp_min(0)).masked_fill(index < 0, pad) if self.pads else x.gather(1, index)

    def removed(self) -> Tensor:
        """Placeholders dropped before each column [B, L']: original minus new position."""
        return self.take(torch.from_numpy(self.dropped.cumsum(1)), 0)


@dataclass(frozen=True)
class PromptShrinker:
    """Drops the placeholders that pruned features no longer fill."""

    kinds: tuple[PrunedFeatures, ...]
    turns: Turns

    @cached_property
    def token_ids(self) -> tuple[int, ...]:
        """The placeholder of each kind of visual."""
        return tuple(features.kind.token_id for features in self.kinds)

    @property
    def shrinks(self) -> bool:
        """Whether any visual's placeholders may go."""
        return any(features.kind.shrinks for features in self.kinds)

    def comes(self, arguments: dict[str, Any]) -> bool:
        """Whether images or videos come with a prompt."""
        return any(x is not None for features in self.kinds for x in features.given(arguments))

    def visuals(self, arguments: dict[str, Any], masks: Sequence[np.ndarray]) -> list[Visuals]:
        """The images and videos that come with a prompt; bool [B, L] the placeholders of each kind."""
        return [
            visuals
            for features, mask in zip(self.kinds, masks, strict=True)
            for visuals in features.visuals(arguments, mask)
        ]

    def reading(self) -> _Reading:
        """While a prompt is at hand; what was found out, or made, for it is then forgotten."""
        return _Reading(self)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """While code of the caller's runs in the middle of `generate`: what it asks of the model is another prompt, and
        another thread may have its turn."""
        before = [(x.found, x.ahead, x.encoded, x.encoder.trace) for x in self.kinds]
        for features in self.kinds:
            features.found = features.ahead = None
        variables: tuple[ContextVar[Any], ...] = HEEDED, _PROMPT_END, _WHOLE
        tokens = [(variable, variable.set(None)) for variable in variables]
        try:
            with self.turns.aside():
                yield
        finally:
            for variable, token in tokens:
                variable.reset(token)
            for features, known in zip(self.kinds, before, strict=True):
                features.found, features.ahead, features.encoded, features.encoder.trace = known

    def shrink(self, masks: Sequence[np.ndarray], attention_mask: Tensor | None, given: list[Visuals]) -> Shrunk | None:
        """The columns to keep of a prompt, or None where nothing has to go.

        Args:
            masks: of each kind the placeholders, bool [B, L].
            attention_mask: [B, L] or None.
            given: the images or videos that come with the prompt.

        Raises:
            ValueError: a placeholder count that fits neither the full nor the pruned images.
        """
        shape, batch = masks[0].shape, len(masks[0])
        dropped, counts, lost = np.zeros(shape, bool), [0] * batch, [0] * batch
        for visuals in given:
            places = masks[self.token_ids.index(visuals.token_id)].ravel().nonzero()[0]
            rows = _counts_of_rows(places, shape)
            counts = [a + b for a, b in zip(counts, rows, strict=True)]
            if visuals.kept == visuals.full:
                continue
            # Features that generate repeats for beams come with a prompt that fits them, whatever else it might fit.
            repeated = len(visuals.kept) > len(visuals.full)
            images = None if repeated else _images_of_rows(rows, visuals.full)
            if images is None:
                if _images_of_rows(rows, visuals.kept) is not None:
                    continue
                raise ValueError(
                    f"input_ids hold {rows} image placeholders per row for {len(visuals.full)} image(s); each image "
                    f"needs {_said(visuals.full)} (the processor's output) or {_said(visuals.kept)} (already pruned), "
                    f"id {visuals.token_id}"
                )
            gone = iter([n - m for n, m in zip(visuals.full, visuals.kept, strict=True)])
            lost = [n + sum(islice(gone, count)) for n, count in zip(lost, images, strict=True)]
            for some in _surplus(visuals.full, visuals.runs()):
                dropped.reshape(-1)[places[some]] = True
            if attention_mask is not None and attention_mask.shape != shape:
                raise ValueError(f"attention_mask must be {shape} like input_ids, got {tuple(attention_mask.shape)}")
        if not any(lost):
            return None
        even = len({*lost}) == 1
        if attention_mask is None and not even:
            raise ValueError(
                f"rows hold different numbers of image placeholders ({counts}), so they are padded after pruning: pass "
                "the processor's attention_mask"
            )
        mask = None if attention_mask is None else _on_host(attention_mask)
        if even and (mask is None or (mask == 1).all()):
            columns = (~dropped).ravel().nonzero()[0].reshape(batch, -1)
            return Shrunk(columns % shape[1] if batch > 1 else columns, dropped, masked=False)
        assert mask is not None
        mask = mask != 0
        live, right = ~dropped & mask, bool(mask[:, 0].all() and not mask[:, -1].all())
        order = (dropped if right else ~dropped).argsort(1, kind="stable")
        columns = np.where(np.take_along_axis(dropped, order, 1), -1, order)
        # Padding columns that no row needs any more go too.
        used = np.take_along_axis(live, order, 1).any(0).nonzero()[0]
        columns = columns[:, : used[-1] + 1] if right else columns[:, used[0] :]
        return Shrunk(columns, dropped, pads=True)


class _Reading(heeding):
    def __init__(self, shrinker: PromptShrinker) -> None:
        self.shrinker = shrinker

    def __enter__(self) -> None:
        self.shrinker.turns.__enter__()
        super().__enter__()

    def __exit__(self, *error: object) -> None:
        for features in self.shrinker.kinds:
            features.found = features.ahead = None
        super().__exit__(*error)
        self.shrinker.turns.__exit__(*error)


def _on_host(mask: Tensor) -> np.ndarray:
    """A mask of any dtype, some of which numpy lacks: not 0 where it hides nothing."""
    mask = mask.cpu()
    return (mask if mask.dtype in (torch.int64, torch.bool) else mask.bool()).numpy()


def _counts_of_rows(places: np.ndarray, shape: tuple[int, ...]) -> list[int]:
    """How many of ascending `places` lie in each row of a [B, L] prompt."""
    batch, length = shape
    return [len(places)] if batch == 1 else np.bincount(places // length, minlength=batch).tolist()


def _images_of_rows(rows: list[int], sizes: list[int]) -> list[int] | None:
    """Images of each row of a prompt that has so many placeholders; None where the images' `sizes` do not fit them."""
    images, counts = iter(sizes), []
    for placeholders in rows:
        count = 0
        while placeholders > 0:
            size = next(images, None)
            if size is None:
                return None
            placeholders -= size
            count += 1
        if placeholders < 0:
            return None
        counts.append(count)
    return counts if next(images, None) is None else None


def _surplus(full: list[int], runs: list[list[int]]) -> Iterator[slice]:
    """Of the placeholders of images, `full` of each, those that are too many: the last ones of each of an image's
    `runs`, equally long ones that are to have so many."""
    end = 0
    for size, left in zip(full, runs, strict=True):
        for n in left:
            start, end = end, end + size // len(left)
            yield slice(start + n, end)


def _said(sizes: list[int]) -> str:
    return str(sizes[0] if len({*sizes}) == 1 else sizes)


class _PromptMethod(Bound):
    may_repeat_cache = False  # generate takes the cached conversation again, in front of the new tokens
    first_position = 0  # of a prompt's first token

    def __init__(self, model: Any, shrinker: PromptShrinker) -> None:
        super().__init__(model)
        self.shrinker = shrinker

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.shrinker.reading():
            return self.run(named(self, args, kwargs))

    def run(self, arguments: dict[str, Any]) -> Any:
        raise NotImplementedError

    def _placeholders(self, arguments: dict[str, Any]) -> list[np.ndarray] | None:
        """bool [B, L] of each kind of visual."""
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        if ids is not None:
            ids = ids.cpu().numpy()
            return [ids == token_id for token_id in self.shrinker.token_ids]
        if embeds is None:
            return None
        tokens = torch.tensor(self.shrinker.token_ids, device=embeds.device)
        words = self.model.get_input_embeddings()(tokens)
        return [*torch.stack([(embeds == word).all(-1) for word in words]).cpu().numpy()]

    @staticmethod
    def _is_one_token(arguments: dict[str, Any]) -> bool:
        """Whether the input is a single column without position ids."""
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        tokens = ids if ids is not None else embeds
        return tokens is not None and tokens.shape[1] == 1 and arguments.get("position_ids") is None

    def shrink(self, arguments: dict[str, Any]) -> tuple[Shrunk, Shrunk] | None:
        """Shrink every prompt-shaped argument in place of `arguments`.

        Returns:
            The prompt, and the whole conversation it ends (with what is in the cache before it); None where nothing
            has to go.
        """
        given, cache = self.shrinker.comes(arguments), arguments.get("past_key_values")
        mask = one_mask(arguments.get("attention_mask"))
        if not given and getattr(cache, _PROMPT, None) is None:
            return None
        if not given and mask is None and self._is_one_token(arguments):
            return None  # a decoding step, with nothing in it that counts the prompt's columns
        masks = self._placeholders(arguments)
        if masks is None:
            return None
        is_image = _either(masks)
        batch, length = is_image.shape
        seen = 0 if cache is None else int(cache.get_seq_length())
        cached, past = Shrunk.whole(batch, seen) if seen else None, _cached_prompt(cache, seen, batch)

        new, repeats = is_image, False
        if self.may_repeat_cache and seen:
            repeats = arguments.get("inputs_embeds") is not None or mask is None or mask.shape[1] == length
        if repeats:
            if past is not None and not (length > past.length and is_image[:, : past.length][past.dropped].all()):
                past = None  # the pruned conversation is repeated, not the original one
            old = past or cached
            assert old is not None
            new, masks = is_image[:, old.length :], [x[:, old.length :] for x in masks]
        new_mask = mask
        if mask is not None and mask.dim() == 2 and mask.shape[1] != new.shape[1]:
            new_mask = mask[:, -new.shape[1] :]
        visuals = self.shrinker.visuals(arguments, masks) if given else []
        piece = self.shrinker.shrink(masks, new_mask, visuals) if given else None
        if piece is None and past is None:
            return None
        if not given and past is not None and bool((new[:, 1:] & new[:, :-1]).any()):
            raise ValueError(
                f"the new part of input_ids ({new.shape[1]} of {length} columns) holds image placeholders but no image "
                f"came with it; the cache holds {past.length} columns of the prompt as it was given, pruned to {seen}: "
                "cut input_ids by the former"
            )
        drops = piece is not None
        piece = piece or Shrunk.whole(*new.shape)
        short = talk = piece
        if cached is not None:
            short, talk = cached.then(piece), (past or cached).then(piece)
        prompt = talk if repeats else piece

        if mask is not None and mask.dim() == 2 and mask.shape[1] in (talk.length, short.length):
            fits = talk if mask.shape[1] == talk.length else short
            arguments["attention_mask"] = fits.take(mask, 0) if fits.masked else mask[:, : fits.kept]
        elif mask is not None and drops:
            raise ValueError(
                f"attention_mask must be [{batch}, {talk.length}] like the conversation so far, got {tuple(mask.shape)}"
            )
        positions = arguments.get("position_ids")
        if positions is not None:
            if mask is None:
                original = repeats or bool(positions.max() - self.first_position >= seen + length)
            else:
                original = mask.shape[1] == talk.length
            removed = (talk if original else short).removed()[:, -prompt.kept :].to(positions.device)
            arguments["position_ids"] = (prompt.take(positions.expand(batch, -1), 0) - removed).clamp_min(0)
        word = self._pad_id() if prompt.pads else 0
        for name, pad in dict(input_ids=word, inputs_embeds=0, labels=-100, token_type_ids=0).items():
            if arguments.get(name) is not None:
                arguments[name] = prompt.take(arguments[name], pad)
        return prompt, talk

    def _pad_id(self) -> int:
        """A word that is no placeholder."""
        pad_id, taken = self.model.config.get_text_config().pad_token_id, self.shrinker.token_ids
        return pad_id if pad_id not in (None, *taken) else next(i for i in range(3) if i not in taken)


def _either(masks: list[np.ndarray]) -> np.ndarray:
    """bool [B, L] the placeholders of any kind."""
    return reduce(np.logical_or, masks)


def one_mask(mask: Any) -> Tensor | None:
    """An attention mask, 2-D or 4-D; models, and `generate` for static caches, prepare one by kind of layer."""
    return mask["full_attention"] if isinstance(mask, dict) else mask


def seen_by_last(mask: Tensor) -> Tensor:
    """bool [B, K]: what the last column sees by a mask [B, 1, L, K] of flags, or of what is added to a logit."""
    last = mask[:, 0, -1]
    return last if last.dtype == torch.bool else last == 0


def _cached_prompt(cache: Any, seen: int, batch: int) -> Shrunk | None:
    """The conversation whose `seen` rows of keys and values a cache holds; None where nothing was pruned from it."""
    prompt = getattr(cache, _PROMPT, None)
    if prompt is None:
        return None
    if seen < prompt.kept:  # the cache was reset
        delattr(cache, _PROMPT)
        return None
    rows = len(prompt.columns)
    if batch % rows:
        raise ValueError(
            f"input_ids hold {batch} rows but past_key_values was filled with {rows}: use one cache per batch"
        )
    columns, dropped = (x.repeat(batch // rows, 0) for x in (prompt.columns, prompt.dropped))
    prompt = Shrunk(columns, dropped, prompt.pads)
    return prompt.then(Shrunk.whole(batch, seen - prompt.kept))


class PrunedForward(_PromptMethod):
    """Replacement ``forward`` of a VLM: unchanged processor output in, outputs of the shrunk sequence out.

    A decoding loop of the caller's own may go on with masks and positions of the full prompt: the cache remembers.
    """

    method = "forward"

    def __init__(
        self, model: Any, shrinker: PromptShrinker, decoder: PrunedDecoder | None = None, first_position: int = 0
    ) -> None:
        super().__init__(model, shrinker)
        self.decoder = decoder  # where the language model prunes too
        self.first_position = first_position

    def run(self, arguments: dict[str, Any]) -> Any:
        with self.shrinker.turns.running(self.model):
            return in_one_chunk(self._run, arguments)

    def _run(self, arguments: dict[str, Any]) -> Any:
        shrunk = self.shrink(arguments) if self.shrinker.shrinks else None
        # None at a later step as well: what the cache remembers still holds.
        talk = None if shrunk is None or shrunk[0].kept == shrunk[0].length else shrunk[1]
        visual = None
        if self.decoder is not None:
            visual = self.visual_tokens(arguments, shrunk is not None and shrunk[0].right)
        if self.decoder is None and is_pruned(arguments.get("past_key_values")):
            raise ValueError(
                "past_key_values was filled under a policy that prunes in the language model, which the policy of this "
                "model does not: go on with the policy it was made with"
            )
        if isinstance(arguments.get("logits_to_keep"), Tensor) and (talk is not None or visual is not None):
            raise ValueError("logits_to_keep as a tensor indexes the unpruned prompt: pass an int, or a pruned prompt")
        output = self.original(**arguments) if visual is None else self._with_pruned_decoder(arguments, visual)
        if talk is not None:
            values = output if isinstance(output, tuple) else output.values()
            for cache in (x for x in values if hasattr(x, "get_seq_length")):
                setattr(cache, _PROMPT, talk)
        return output

    def visual_tokens(self, arguments: dict[str, Any], right: bool = False) -> VisualTokens | None:
        """The images of this pass, in a prompt that fits what the encoder leaves of them.

        Args:
            right: it was padded on the right before it was made to fit.
        """
        masks = self._placeholders(arguments) if self.shrinker.comes(arguments) else None
        if masks is None:
            return None
        given = self.shrinker.visuals(arguments, masks)
        is_image = _either(masks)
        length = is_image.shape[1]
        found = []
        for visuals in given:
            is_kind = masks[self.shrinker.token_ids.index(visuals.token_id)]
            rows = is_kind.sum(1).tolist()
            if sum(rows) != sum(visuals.kept):
                return None  # the model itself has an error for that
            counts = _images_of_rows(rows, visuals.kept)
            if counts is None:
                raise ValueError(
                    f"input_ids hold {rows} image placeholders per row, id {visuals.token_id}; each image needs "
                    f"{_said(visuals.kept)} in one row"
                )
            found.append((visuals, is_kind, counts))
        mask, labels = one_mask(arguments.get("attention_mask")), arguments.get("labels")
        cache = arguments.get("past_key_values")
        check_cache(cache)
        seen = 0 if cache is None else int(cache.get_seq_length())
        live, prompt = np.ones_like(is_image), arguments.get("input_ids")
        device = (arguments["inputs_embeds"] if prompt is None else prompt).device
        if mask is not None and mask.dim() == 2:
            if mask.shape[1] != seen + length:
                raise ValueError(f"attention_mask must be [{len(live)}, {seen + length}], got {tuple(mask.shape)}")
            live = _on_host(mask[:, -length:]) != 0
        elif mask is not None:
            live = seen_by_last(mask)[:, seen : seen + length].expand(len(live), -1).cpu().numpy()
        column = np.arange(length)
        before, own = live, length
        known, end = _PROMPT_END.get() or (None, 0)
        if known is self.model:
            if end > seen + length:
                raise ValueError(
                    "prefill_chunk_size puts the end of the prompt into another pass than an image, but the language "
                    "model drops the image's tokens knowing the whole prompt: leave it unset"
                )
            own = end - seen
            before = before & (column < own)
            if cache is not None:
                _PROMPT_END.set(None)  # later passes of this generate bring no images
        if labels is not None:  # the answer is what has labels behind the images
            images_end = np.where(is_image, column, -1).max(1, keepdims=True)
            before = before & (((labels.cpu().numpy() != -100) & (column > images_end)).cumsum(1) == 0)
        # The last instruction token: the last of the text, or where there is none the last of the images.
        asks = np.where(before & ~is_image, column, -1).max(1)
        last = np.where(before, column, -1).max(1)
        ends = np.array([np.where(asks < 0, last, asks), last]).T.clip(0)
        return VisualTokens(
            **_located(found, ends, length, device),
            live=live,
            prompt=own,
            right=right or bool(live[:, 0].all() and not live[:, -1].all()),
        )

    def _with_pruned_decoder(self, arguments: dict[str, Any], visual: VisualTokens) -> Any:
        """`forward` and, as it sees the prompt's length only, the loss over what is left of the sequence."""
        labels = arguments.pop("labels", None)
        output = self.original(visual_tokens=visual, **arguments)
        if labels is None:
            return output
        if visual.kept is not None:
            labels = labels.gather(1, visual.kept.clamp_min(0)).masked_fill(visual.kept < 0, -100)
        logits = output[0] if isinstance(output, tuple) else output.logits
        loss = self.model.loss_function(
            logits=logits,
            labels=labels,
            vocab_size=self.model.config.get_text_config().vocab_size,
            **{k: v for k, v in arguments.items() if k not in inspect.signature(type(self.model).forward).parameters},
        )
        if isinstance(output, tuple):
            return (loss, *output)
        return type(output)(loss=loss, **{name: value for name, value in output.items() if name != "loss"})


def _located(
    found: list[tuple[Visuals, np.ndarray, list[int]]], ends: np.ndarray, length: int, device: torch.device
) -> dict[str, Any]:
    """Fields of VisualTokens: the images and videos found in a prompt, by sample.

    Args:
        found: for each kind the visuals, their placeholders [B, L] and their number in each row.
        ends: [B, 2].
        length: L.
        device: of the fields.
    """
    lengths, full, samples, sources, places, known = [], [], [], [], [], []
    for visuals, is_kind, counts in found:
        lead = visuals.leading
        lengths += [n - lead for n in visuals.kept]
        source = _sources(counts, len(visuals.full))
        full += [visuals.full[i] - lead for i in source]
        sources += source
        samples += [row for row, count in enumerate(counts) for _ in range(count)]
        at, ends_at = is_kind.ravel().nonzero()[0], accumulate(visuals.kept)
        places += [at[end - n + lead : end] for n, end in zip(visuals.kept, ends_at, strict=True)]
        known.append((visuals, source))
    order = sorted(range(len(samples)), key=samples.__getitem__)

    def encoded() -> EncodedTokens:
        kept: list[int] = []
        importance: list[Tensor] = []
        position: list[Tensor] = []
        for visuals, source in known:
            whole = [n - visuals.leading for n in visuals.full]
            info = visuals.encoded() or Encoded(whole, whole)
            kept += [info.kept[i] for i in source]
            importance += [] if info.importance is None else [info.importance[i] for i in source]
            if info.position is not None:
                position += [info.position[i] for i in source]
            elif info.kept == info.full:
                position += [torch.arange(info.full[i], device=device) for i in source]

        def padded(x: list[Tensor]) -> Tensor | None:
            if len(x) != len(order):
                return None
            return x[0][None] if len(x) == 1 else pad_sequence([x[i] for i in order], batch_first=True)

        return EncodedTokens(padded(importance), padded(position), [kept[i] for i in order])

    tokens = np.zeros(len(ends) * length, bool)
    tokens[np.concatenate(places)] = True
    columns = table_of([places[i] % length for i in order], -1)
    # One copy that does not wait.
    moved = torch.from_numpy(np.concatenate([columns, ends], None)).to(device, non_blocking=True)
    return dict(
        columns=moved[: columns.size].view(columns.shape),
        ends=moved[columns.size :].view(ends.shape),
        tokens=tokens.reshape(len(ends), length),
        lengths=[lengths[i] for i in order],
        full=[full[i] for i in order],
        sources=[sources[i] for i in order],
        samples=constant(tuple(samples[i] for i in order), device),
        counts=[samples.count(row) for row in range(len(found[0][1]))],
        encoded=encoded,
    )


def _sources(counts: list[int], encoded: int) -> list[int]:
    """Which of the encoded images each of a prompt's is: for beams generate repeats the images of a row, row by row."""
    copies = max(sum(counts) // max(encoded, 1), 1)
    first = [0]
    for count in counts[::copies]:
        first.append(first[-1] + count)
    return [first[row // copies] + i for row, count in enumerate(counts) for i in range(count)]


class PrunedGenerate(_PromptMethod):
    """Replacement ``generate`` of a VLM: returned sequences start with the prompt as it was given."""

    method = "generate"
    may_repeat_cache = True

    @torch.no_grad()  # as the model's own, features that are made ahead included
    def run(self, arguments: dict[str, Any]) -> Any:
        if arguments.get("cache_implementation") == "paged":
            raise ValueError(
                "cache_implementation='paged' hands on the ids of a prompt without its images, which nobody would see: "
                "leave it unset"
            )
        prompt = arguments.pop("inputs", None)
        if prompt is not None:
            if arguments.get("input_ids") is not None:
                raise ValueError("generate: give the prompt as inputs or as input_ids, not both")
            arguments["input_ids"] = prompt
        prompt, mask, cache = (arguments.get(name) for name in ("input_ids", "attention_mask", "past_key_values"))
        self._step_aside(arguments)
        with self.shrinker.turns.running(self.model):
            shrunk = self.shrink(arguments)
        if shrunk is None:
            return self._generate(arguments)
        skip, talk = shrunk[0].kept, shrunk[1]
        longest = arguments.get("max_length")
        counts = longest and self._setting(arguments, "max_new_tokens") is None
        if counts and prompt is not None and longest <= prompt.shape[1]:
            # transformers' own error would count what is left of the prompt.
            raise ValueError(
                f"max_length={longest} counts the prompt, whose input_ids have {prompt.shape[1]} columns: increase it, "
                "or set max_new_tokens"
            )
        self._shift_lengths(arguments, shrunk[0].length - skip)
        whole = None
        if prompt is not None:
            whole = self.model, _Whole(prompt, mask, skip)
            if arguments.get("streamer") is not None:
                arguments["streamer"] = _PromptStreamer(arguments["streamer"], prompt)
        remembered = vars(cache).pop(_PROMPT, None) if cache is not None else None
        before = _WHOLE.set(whole)
        try:
            # What generate passes to forward fits the cache as it is.
            output = self._generate(arguments)
        except BaseException:
            if remembered is not None:
                setattr(cache, _PROMPT, remembered)
            raise
        finally:
            _WHOLE.reset(before)
        for used in (cache, getattr(output, "past_key_values", None)):
            if used is not None:
                setattr(used, _PROMPT, talk)
        if prompt is None:  # inputs_embeds: the sequences hold new tokens only
            return output
        if isinstance(output, Tensor):
            return _with_prompt(prompt, output[:, skip:])
        output.sequences = _with_prompt(prompt, output.sequences[:, skip:])
        return output

    def _generate(self, arguments: dict[str, Any]) -> Any:
        given = (arguments.get(name) for name in ("attention_mask", "input_ids", "inputs_embeds"))
        whole = next((x for x in given if x is not None), None)
        before = _PROMPT_END.set(None if whole is None else (self.model, whole.shape[1]))
        try:
            return self.original(**arguments)
        finally:
            _PROMPT_END.reset(before)

    def _step_aside(self, arguments: dict[str, Any]) -> None:
        """While a callback of the caller's own runs; transformers' neither call a model nor wait, and `generate` asks
        for their class."""

        def aside(callback: Any) -> Any:
            known = type(callback).__module__.startswith("transformers.")
            return callback if known else _Aside(callback, self.shrinker)

        for name in ("streamer", "prefix_allowed_tokens_fn"):
            arguments |= {name: aside(arguments[name])} if arguments.get(name) is not None else {}
        for name, kind in _LISTS.items():
            if arguments.get(name) is not None:
                arguments[name] = kind(map(aside, arguments[name]))

    def _setting(self, arguments: dict[str, Any], name: str) -> Any:
        """A generation setting, wherever it was given."""
        configs = arguments.get("generation_config"), self.model.generation_config
        values = arguments.get(name), *(getattr(config, name, None) for config in configs)
        return next((value for value in values if value is not None), None)

    def _shift_lengths(self, arguments: dict[str, Any], removed: int) -> None:
        """max_length and min_length count the prompt, so they shrink with it."""
        for name, overrides in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            value = self._setting(arguments, name)
            if not value or self._setting(arguments, overrides) is not None:
                continue
            if arguments.get("generation_config") is None or arguments.get(name) is not None:
                arguments[name] = max(value - removed, 0)
            else:
                arguments["generation_config"] = copy.copy(arguments["generation_config"])
                setattr(arguments["generation_config"], name, max(value - removed, 0))


def _with_prompt(prompt: Tensor, new: Tensor) -> Tensor:
    return torch.cat([prompt.to(new.device).repeat_interleave(len(new) // len(prompt), 0), new], 1)


class _Aside:
    """A callback of `generate` that may call the patched model, or wait for a thread that does."""

    def __init__(self, callback: Any, shrinker: PromptShrinker) -> None:
        self.callback, self.shrinker = callback, shrinker
        if hasattr(callback, "eos_token_id"):  # by which `generate` knows that rows end
            self.eos_token_id = callback.eos_token_id

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.shrinker.aside():
            return self.callback(*args, **kwargs)

    def put(self, value: Tensor) -> None:
        with self.shrinker.aside():
            self.callback.put(value)

    def end(self) -> None:
        with self.shrinker.aside():
            self.callback.end()


class _Whole:
    """The prompt as it was given, for what looks at the ids."""

    def __init__(self, ids: Tensor, mask: Tensor | None, skip: int) -> None:
        self.ids, self.mask, self.skip = ids, mask, skip
        self.seen: tuple[Tensor, Tensor] | None = None  # of a step, which all look at

    def behind(self, ids: Tensor) -> Tensor:
        """What was written, behind the whole prompt."""
        if self.seen is None or self.seen[0] is not ids:
            self.seen = ids, _with_prompt(self.ids, ids[:, self.skip :])
        return self.seen[1]


class _Shown:
    """What looks at the ids is shown them behind the prompt as it was given."""

    def __init__(self, callback: Callable, whole: _Whole) -> None:
        self.callback, self.whole = callback, whole
        if hasattr(callback, "eos_token_id"):  # by which `generate` knows that rows end
            self.eos_token_id = callback.eos_token_id

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # a list of processors looks for the names of any more
        ids, *others = args
        return self.callback(self.whole.behind(ids), *others, **kwargs)


class _Looking(Bound):
    """A method with which `generate` makes what looks at the ids."""

    @property
    def whole(self) -> _Whole | None:
        model, whole = _WHOLE.get() or (None, None)
        return whole if model is self.model else None


class PrunedProcessors(_Looking):
    """Replacement ``_get_logits_processor``: all are made for, and look at, the prompt as it was given, whose pads,
    n-grams and length are others than those of what is left of it."""

    method = "_get_logits_processor"

    def __call__(self, generation_config: Any, **known: Any) -> Any:
        whole = self.whole
        if whole is None:
            return self.original(generation_config, **known)
        config, ids, mask = copy.copy(generation_config), whole.ids, whole.mask
        for name in ("max_length", "min_length"):
            if getattr(config, name):
                setattr(config, name, getattr(config, name) + ids.shape[1] - whole.skip)
        if mask is None:
            mask = self.model._prepare_attention_mask_for_generation(ids, config, {})
        copies = max(config.num_beams, config.num_return_sequences)
        known |= dict(input_ids_seq_length=ids.shape[1], encoder_input_ids=ids)
        known["model_kwargs"] = known["model_kwargs"] | dict(attention_mask=mask.repeat_interleave(copies, 0))
        made = self.original(config, **known)
        return type(made)(_Shown(x, whole) for x in made)


class PrunedCandidates(Bound):
    """Replacement ``_get_candidate_generator``: a model that drafts is handed processors themselves, as their classes
    tell it which of its own they replace."""

    method = "_get_candidate_generator"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = named(self, args, kwargs)
        if arguments.get("assistant_model") is not None:
            given = arguments["logits_processor"]
            arguments["logits_processor"] = type(given)(x.callback if isinstance(x, _Shown) else x for x in given)
        return self.original(**arguments)


class PrunedCriteria(_Looking):
    """Replacement ``_get_stopping_criteria``: what the caller gave, and stop strings, look at the prompt as it was
    given; the others look at lengths, which count what is left of it, and at the last token."""

    method = "_get_stopping_criteria"

    def __call__(self, generation_config: Any, stopping_criteria: Any, **known: Any) -> Any:
        made, whole = self.original(generation_config, stopping_criteria, **known), self.whole
        if whole is None:
            return made
        given = {*map(id, stopping_criteria)}
        looks = [id(x) in given or isinstance(x, StopStringCriteria) for x in made]
        return type(made)(_Shown(x, whole) if look else x for x, look in zip(made, looks, strict=True))


class _PromptStreamer:
    """Hands the streamer the prompt it expects in place of the shrunk one."""

    def __init__(self, streamer: Any, prompt: Tensor) -> None:
        self.streamer = streamer
        self.prompt: Tensor | None = prompt

    def put(self, value: Tensor) -> None:
        prompt, self.prompt = self.prompt, None
        self.streamer.put(value if prompt is None else prompt.cpu())

    def end(self) -> None:
        self.streamer.end()
