"""Projected features of a patched VLM: a policy may choose among them once more, before the language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..modules.encoder import PrunedEncoder
from ..policies.base import FeatureSelection, FeatureView, Policy
from ..trace import Stage
from ._bound import Bound, named

_ENCODED = "_flowcut_encoded"  # attribute of what get_image_features returns


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
    kept: list[int]  # features of each that enter the language model
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


class PrunedFeatures(Bound):
    """Replacement ``get_image_features`` (or of videos): what a policy leaves of them.

    It refuses another feature layer than the one that pruning ends before.
    """

    def __init__(
        self,
        model: Any,
        method: str,
        policy: Policy,
        encoder: PrunedEncoder,
        full: Callable[[dict[str, Any]], list[int]],
        tiles: Callable[[dict[str, Any]], int],
        items: Callable[[Any, dict[str, Any], Tensor, Tensor | None], list[Item]],
        fixed: dict[str, Any],
        backend: str | None,
    ) -> None:
        super().__init__(model)
        self.method, self.policy, self.encoder = method, policy, encoder
        self.full = full  # tokens of each visual before any pruning, from a prompt's arguments; without leading ones
        self.tiles = tiles  # images that the encoder is given, from the same
        self.items, self.fixed, self.backend = items, fixed, backend
        self.encoded: Encoded | None = None  # of the last call
        self._ahead: tuple[Tensor, Any] | None = None  # pixels and their features, made before they are asked for

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = named(self, args, kwargs)
        for name, value in self.fixed.items():
            given = arguments.get(name)
            given = getattr(self.model.config, name) if given is None else given
            if given != value:
                raise ValueError(
                    f"{name}={given!r} but the model was patched for {value!r}: unpatch, set it in model.config, "
                    "patch again"
                )
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] is self._pixels(arguments):
            return ahead[1]
        as_tuple = arguments.get("return_dict") is False
        output = self.original(**arguments | dict(return_dict=True))
        full = self.full(arguments)
        self.encoded = Encoded(full, [self.policy.feature_budget(n) or n for n in full])
        if self.policy.prunes_features and self.encoder.importance is not None:
            self._choose(arguments, output, self.encoder.importance, self.encoder.position)
        setattr(output, _ENCODED, self.encoded)
        return output.to_tuple() if as_tuple else output

    def ahead(self, pixels: Tensor, **arguments: Any) -> Any:
        """The features, kept for the next call with the same pixels: how many they are is not known before."""
        output = self(pixels, **arguments, return_dict=True)
        self._ahead = pixels, output
        return output

    @staticmethod
    def _pixels(arguments: dict[str, Any]) -> Any:
        return next((arguments[x] for x in ("pixel_values", "pixel_values_videos") if x in arguments), None)

    def _choose(self, arguments: dict[str, Any], output: Any, importance: Tensor, position: Tensor | None) -> None:
        items = self.items(output.pooler_output, arguments, importance, position)
        budgets = [self.policy.feature_budget(item.full) for item in items]
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
        rows, positions, weights = [], [], []
        for item, part in zip(items, _parts(choice.lengths), strict=True):
            chosen = choice.index[part]
            front = choice.features.new_empty(0, choice.features.shape[1]) if item.leading is None else item.leading
            behind = choice.features.new_empty(0, choice.features.shape[1]) if item.trailing is None else item.trailing
            rows.append(torch.cat([front, choice.features[part], behind]))
            last = torch.arange(item.full - item.behind, item.full, device=chosen.device)
            positions.append(torch.cat([places[chosen], last]))
            weights.append(torch.cat([view.importance[chosen], view.importance.new_ones(item.behind)]))
        whole = isinstance(output.pooler_output, Tensor)
        output.pooler_output = torch.stack(rows) if whole else rows
        self.encoded = Encoded(
            [item.full for item in items],
            [len(x) for x in positions],
            importance=pad_sequence(weights, batch_first=True),
            position=pad_sequence(positions, batch_first=True),
        )
        if self.encoder.trace is not None and known != lengths:
            self._record(items, view, places, positions, choice.recycled, choice.lengths)

    def _record(
        self, items: list[Item], view: FeatureView, places: Tensor, positions: list[Tensor], recycled: Tensor,
        lengths: list[int],
    ) -> None:  # fmt: skip
        assert self.encoder.trace is not None
        scores = view.importance.new_full((len(items), max(item.full for item in items)), float("nan"))
        for row, part in enumerate(_parts(view.lengths)):
            scores[row, places[part]] = view.importance[part]
        for row, item in enumerate(items):
            scores[row, item.full - item.behind : item.full] = 1 if item.behind else scores[row, item.full : item.full]
        marks = [
            torch.cat([recycled[part], recycled.new_zeros(item.behind)])
            for item, part in zip(items, _parts(lengths), strict=True)
        ]
        kept = [len(x) for x in positions]
        self.encoder.trace.stages.append(
            Stage(
                "features", -1, kept, pad_sequence(positions, batch_first=True, padding_value=-1),
                torch.tensor(kept, dtype=torch.int32, device=scores.device), scores, None,
                recycled=pad_sequence(marks, batch_first=True),
            )
        )  # fmt: skip


@dataclass
class Kind:
    """A kind of visual: images or videos."""

    token_id: int
    modality: str  # "image" | "video"
    pixels: str  # the argument that brings them
    policy: Policy
    features: PrunedFeatures
    usual: int | None = None  # the same for features that were encoded elsewhere; None: what they are
    leading: int = 0  # features of each that are no patches and are never dropped

    def visuals(self, arguments: dict[str, Any]) -> list[Visuals]:
        """What of this kind comes with a prompt: raw pixels, or features encoded beforehand."""
        output = (arguments.get("mm_encoder_outputs") or {}).get(self.modality)
        if output is not None:
            known, kept = getattr(output, _ENCODED, None), [len(x) for x in output.pooler_output]
            full = kept if self.usual is None else [self.usual + self.leading] * len(kept)
            if known is not None:
                full = [n + self.leading for n in known.full]
            return [Visuals(self.token_id, full, kept, self.leading, lambda: 0, lambda: known)]
        pixels = arguments.get(self.pixels)
        if pixels is None:
            return []
        whole = self.features.full(arguments)
        budgets = [self.policy.feature_budget(n) for n in whole]
        kept = [n + self.leading for n in budgets if n is not None]
        if len(kept) < len(whole):
            names = list(self.features.__signature__.parameters)
            others = {name: arguments[name] for name in names[1:] if name in arguments}
            self.features.ahead(pixels, **others)
            assert self.features.encoded is not None
            kept = [n + self.leading for n in self.features.encoded.kept]
        full = [n + self.leading for n in whole]
        features = self.features
        return [
            Visuals(
                self.token_id, full, kept, self.leading, lambda: features.tiles(arguments), lambda: features.encoded
            )
        ]


def _parts(lengths: list[int]) -> list[slice]:
    """Slices of consecutive pieces."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [slice(end - n, end) for end, n in zip(ends, lengths, strict=True)]
