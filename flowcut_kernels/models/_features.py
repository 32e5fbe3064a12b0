"""Projected features of a patched VLM: a policy may choose among them once more, before the language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..modules.packed_encoder import VisionEncoder
from ..policies.base import FeatureSelection, FeatureView, Policy
from ..trace import Stage
from ._bound import Bound, named

# Attribute of what get_image_features returns, and of its first features: accelerate's hooks make a new output of them.
_ENCODED = "_flowcut_encoded"
_RUNNING: ContextVar[bool] = ContextVar("running", default=False)  # a family's videos may be made by its images' method


class Encoded(NamedTuple):
    """What is known of I images' features beside their values; without the leading ones that are never dropped."""

    full: list[int]  # tokens of each image before anything was pruned
    kept: list[int]  # of each that enter the language model
    importance: Tensor | None = None  # float32 [I, n], filled up with 0
    position: Tensor | None = None  # int64 [I, n] their places among all tokens of the image


class Visuals(NamedTuple):
    """The images, or the videos, that come with a prompt."""

    token_id: int
    full: list[int]  # placeholders of each as the processor writes them
    kept: list[int]  # features of each that are put into the prompt
    leading: int  # features of each that are no patches (a class token) and are never dropped
    tiles: Callable[[], int]  # what the encoder is given of them, all together
    encoded: Callable[[], Encoded | None]  # what is known of them, once the features are made


@dataclass
class Item:
    """One image or video: features in the order of the prompt."""

    features: Tensor  # [n, D]
    importance: Tensor  # [n]
    grids: tuple[tuple[int, int], ...]  # rows and columns of the grids the features come from, before any pruning
    position: Tensor | None = None  # int64 [n] their places in those grids; None: all are there
    leading: Tensor | None = None  # [., D] features in front that are no patches
    trailing: Tensor | None = None  # [., D] features behind, which always stay, of importance 1
    appended: int = 0  # more of those, which the model adds later

    @property
    def full(self) -> int:
        return sum(rows * columns for rows, columns in self.grids) + self.behind

    @property
    def behind(self) -> int:
        return self.appended + (0 if self.trailing is None else len(self.trailing))


class Kind:
    """A kind of visual of a family: its images, or its videos."""

    modality: str  # "image" | "video"
    pixels: str  # the argument of ``forward`` that brings them
    method: str  # of the inner model that makes their features
    usual: int | None = None  # tokens of each where all have as many
    leading = 0  # features of each in front that are no patches and are never dropped
    shrinks = True  # prompts; False: features have every place, and dropped ones leave inside the language model

    def __init__(self, model: Any, token_id: int) -> None:
        self.model, self.token_id = model, token_id

    def tokens(self, pixels: Tensor, arguments: dict[str, Any]) -> list[int]:
        """Tokens of each before any pruning, without leading ones."""
        raise NotImplementedError

    def tiles(self, pixels: Tensor, arguments: dict[str, Any]) -> int:
        """Images that the encoder is given."""
        raise NotImplementedError

    def items(
        self, features: Sequence[Tensor], arguments: dict[str, Any], importance: Tensor, position: Tensor | None
    ) -> list[Item]:
        """The features that the model made, with the encoder's `importance` [tiles, patches] and their `position`.

        Of a packed encoder, whose images differ in size, both are lists of one tensor [tokens] for each.
        """
        raise NotImplementedError


class PrunedFeatures(Bound):
    """Replacement ``get_image_features`` (or of videos): what a policy leaves of them.

    It refuses another feature layer than the one that pruning ends before.
    """

    def __init__(
        self, kind: Kind, policy: Policy, encoder: VisionEncoder, fixed: dict[str, Any], backend: str | None
    ) -> None:
        super().__init__(kind.model)
        self.method, self.kind, self.policy, self.encoder = kind.method, kind, policy, encoder
        self.fixed, self.backend = fixed, backend
        self.encoded: Encoded | None = None  # of the last call
        self.ahead: tuple[Tensor, Any] | None = None  # pixels and their features, made before they are asked for

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = named(self, args, kwargs)
        if _RUNNING.get():
            return self.original(**arguments)
        for name, value in self.fixed.items():
            given = arguments.get(name)
            given = getattr(self.model.config, name) if given is None else given
            if given != value:
                raise ValueError(
                    f"{name}={given!r} but the model was patched for {value!r}: unpatch, set it in model.config, "
                    "patch again"
                )
        pixels = arguments[self._first]
        ahead, self.ahead = self.ahead, None
        if ahead is not None and ahead[0] is pixels:
            return ahead[1]
        as_tuple = arguments.get("return_dict") is False
        before = _RUNNING.set(True)
        try:
            output = self.original(**arguments | dict(return_dict=True))
        finally:
            _RUNNING.reset(before)
        full = self.kind.tokens(pixels, arguments)
        self.encoded = Encoded(full, [self._budget(n) or n for n in full])
        if not self.kind.shrinks and self.encoder.position is not None:
            places = list(self.encoder.position)
            self.encoded = Encoded(full, [len(x) for x in places], position=pad_sequence(places, batch_first=True))
        if self.policy.prunes_features and self.encoder.importance is not None:
            self._choose(arguments, output, self.encoder.importance, self.encoder.position)
        for holder in (output, *_first(output)):
            setattr(holder, _ENCODED, self.encoded)
        return output.to_tuple() if as_tuple else output

    @property
    def _first(self) -> str:
        """The name under which the method takes the pixels; videos' changed with transformers' versions."""
        return next(iter(self.__signature__.parameters))

    def _budget(self, tokens: int) -> int | None:
        """Features left of a visual that has `tokens`; None: known once they are chosen."""
        if self.kind.usual is None and not self.policy.prunes_features:
            return tokens  # put together of what the encoder left whole
        return self.policy.feature_budget(tokens)

    def visuals(self, arguments: dict[str, Any]) -> list[Visuals]:
        """What of this kind comes with a prompt: raw pixels, or features encoded beforehand."""
        kind, lead = self.kind, self.kind.leading
        output = (arguments.get("mm_encoder_outputs") or {}).get(kind.modality)
        if output is not None:
            known = next((getattr(x, _ENCODED) for x in (output, *_first(output)) if hasattr(x, _ENCODED)), None)
            kept = [len(x) for x in output.pooler_output]
            full = kept if kind.usual is None else [kind.usual + lead] * len(kept)
            full = full if known is None else [n + lead for n in known.full]
            return [Visuals(kind.token_id, full, kept, lead, lambda: 0, lambda: known)]
        pixels = arguments.get(kind.pixels)
        if pixels is None:
            return []
        whole = kind.tokens(pixels, arguments)
        budgets = [self._budget(n) if kind.shrinks else n for n in whole]
        left = [n for n in budgets if n is not None]
        if len(left) < len(whole):
            left = self._encode_ahead(pixels, arguments)
        return [
            Visuals(
                kind.token_id, [n + lead for n in whole], [n + lead for n in left], lead,
                lambda: kind.tiles(pixels, arguments), lambda: self.encoded,
            )
        ]  # fmt: skip

    def _encode_ahead(self, pixels: Tensor, arguments: dict[str, Any]) -> list[int]:
        """How many features are left, which is not known before they are made; they wait for the call that wants them.

        A prompt is looked at before its images are encoded, by ``generate`` and by ``forward``.
        """
        if self.ahead is None or self.ahead[0] is not pixels:
            others = {name: arguments[name] for name in self.__signature__.parameters if name in arguments}
            output = self(**others | {self._first: pixels, "return_dict": True})
            self.ahead = pixels, output
        assert self.encoded is not None
        return self.encoded.kept

    def _choose(
        self, arguments: dict[str, Any], output: Any, importance: Any, position: Any
    ) -> None:  # fmt: skip
        items = self.kind.items(output.pooler_output, arguments, importance, position)
        budgets = [self._budget(item.full) for item in items]
        known = [max(b - item.behind, 0) for b, item in zip(budgets, items, strict=True) if b is not None]
        given = [item.position for item in items if item.position is not None]
        lengths = [len(item.features) for item in items]
        view = FeatureView(
            features=torch.cat([item.features for item in items]),
            importance=torch.cat([item.importance for item in items]),
            lengths=lengths,
            grids=[item.grids for item in items],
            position=torch.cat(given) if given else None,
            budgets=known if known else None,
            backend=self.backend,
        )
        places = view.position
        if places is None:
            places = torch.cat([torch.arange(n, device=view.importance.device) for n in lengths])
        if known == lengths:
            every = torch.arange(sum(lengths), device=places.device)
            choice = FeatureSelection(view.features, every, torch.zeros_like(every, dtype=torch.bool), lengths)
        else:
            choice = self.policy.feature_select(view)
        # Pieces of an image are views, where nothing stands around them.
        rows = [_surrounded(*pair) for pair in zip(items, choice.features.split(choice.lengths), strict=True)]
        positions = list(places[choice.index].split(choice.lengths))
        weights = list(view.importance[choice.index].split(choice.lengths))
        for i, item in enumerate(items):
            if item.behind:
                last = torch.arange(item.full - item.behind, item.full, device=places.device)
                positions[i] = torch.cat([positions[i], last])
                weights[i] = torch.cat([weights[i], weights[i].new_ones(item.behind)])
        if not self.kind.shrinks:
            rows = [
                x.new_zeros(item.full, x.shape[1]).index_copy(0, at, x)
                for item, x, at in zip(items, rows, positions, strict=True)
            ]
        whole = isinstance(output.pooler_output, Tensor)
        output.pooler_output = torch.stack(rows) if whole else rows
        self.encoded = Encoded(
            [item.full for item in items],
            [len(x) for x in positions],
            importance=pad_sequence(weights, batch_first=True),
            position=pad_sequence(positions, batch_first=True),
        )
        if self.encoder.trace is not None and known != lengths:
            self._record(items, view, places, positions, choice)

    def _record(
        self, items: list[Item], view: FeatureView, places: Tensor, positions: list[Tensor], choice: FeatureSelection
    ) -> None:
        assert self.encoder.trace is not None
        scores = view.importance.new_full((len(items), max(item.full for item in items)), float("nan"))
        marks = []
        for row, (item, part, left) in enumerate(
            zip(items, _parts(view.lengths), _parts(choice.lengths), strict=True)
        ):  # fmt: skip
            scores[row, places[part]] = view.importance[part]
            scores[row, item.full - item.behind : item.full] = 1
            marks.append(torch.nn.functional.pad(choice.recycled[left], (0, item.behind)))
        kept = [len(x) for x in positions]
        self.encoder.trace.stages.append(
            Stage(
                "features", -1, kept, pad_sequence(positions, batch_first=True, padding_value=-1),
                torch.tensor(kept, dtype=torch.int32, device=scores.device), scores, None,
                recycled=pad_sequence(marks, batch_first=True),
            )
        )  # fmt: skip


def _first(output: Any) -> Sequence[Tensor]:
    """The tensor that holds the features of an output, or the first of several."""
    features = output.pooler_output
    return (features,) if isinstance(features, Tensor) else features[:1]


def _surrounded(item: Item, rows: Tensor) -> Tensor:
    """Features between those that lead and those that trail."""
    parts = [x for x in (item.leading, rows, item.trailing) if x is not None]
    return torch.cat(parts) if len(parts) > 1 else rows


def _parts(lengths: list[int]) -> list[slice]:
    """Slices of consecutive pieces."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [slice(end - n, end) for end, n in zip(ends, lengths, strict=True)]
