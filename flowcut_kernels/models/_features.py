"""Projected features of a patched VLM: a policy may choose among them once more, before the language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..modules.encoder import REMEMBERED, EncoderPass, remember
from ..modules.packed_encoder import PackedEncoder, VisionEncoder
from ..policies.base import FeatureView, Policy
from ..policies.recycling import constant, held, images_of, select_features
from ..trace import Stage, Trace
from ._bound import Bound, Places, Turns, named

Grids = tuple[tuple[int, int], ...]  # rows and columns

# Attribute of what get_image_features returns, and of its first features: accelerate's hooks make a new output of them.
_ENCODED = "_flowcut_encoded"
# What is running: a projector works on what it left, and a family's videos may be made by its images' method.
_PASS: ContextVar[EncoderPass | None] = ContextVar("encoder_pass", default=None)
# What a kind learned of a prompt, for a model, while it is at hand; None: there is none.
HEEDED: ContextVar[tuple[Any, Any] | None] = ContextVar("heeded", default=None)
_TAPS = 4  # bilinear resampling makes a token of that many at most


class heeding:
    """While a prompt is at hand. What `generate` learned of it, `forward` knows too."""

    def __enter__(self) -> None:
        self.before = HEEDED.set(HEEDED.get() or (None, None))

    def __exit__(self, *_: object) -> None:
        HEEDED.reset(self.before)


class Encoded(NamedTuple):
    """What is known of I images' features beside their values; without the leading ones that are never dropped."""

    full: list[int]  # tokens of each image before anything was pruned
    kept: list[int]  # of each that enter the language model
    importance: list[Tensor] | None = None  # float32 [n] of each image
    position: list[Tensor] | None = None  # int64 [n] their places among all tokens of the image
    tile: int | None = None  # tokens of each run of an image's placeholders; None: they are one run
    by_tile: list[list[int]] | None = None  # of each image those of `kept` that are each run's, where nobody knows more
    trace: Trace | None = None  # of the pass that made them, where it was recorded

    def runs(self) -> list[list[int]]:
        """Of each image the features that stay in each of its runs of placeholders."""
        if self.by_tile is not None:
            return self.by_tile
        if self.tile is None or self.position is None:
            return [[n] for n in self.kept]
        pairs = zip(self.full, self.position, strict=True)
        return [(at // self.tile).bincount(minlength=full // self.tile).tolist() for full, at in pairs]


class Visuals(NamedTuple):
    """The images, or the videos, that come with a prompt."""

    token_id: int
    full: list[int]  # placeholders of each as the processor writes them
    kept: list[int]  # features of each that are put into the prompt
    leading: int  # features of each that are no patches (a class token) and are never dropped
    asked: Callable[[], EncoderPass | None]  # what the encoder is to leave of them; None: they are encoded already
    encoded: Callable[[], Encoded | None]  # what is known of them, once the features are made
    runs: Callable[[], list[list[int]]]  # of `kept` those in each of a visual's runs of placeholders, equally long ones


@dataclass(frozen=True, eq=False)
class Layout:
    """An image or a video before it is encoded: tiles of N tokens each, of which the model makes grids.

    Newlines in the grids and behind them are dropped where anything is: a budget is spent on tokens of the tiles.
    A kind makes each but once, unless a mask hides some of it: what follows from layouts is remembered by them.
    """

    grids: Grids  # of what the model makes, newlines included
    tile: int  # N
    live: tuple[int, ...]  # tokens of each tile that have a part in the grids
    places: int  # tokens of the grids that are made of those
    # int64 [tiles * N] the place of each token of the tiles, `area` for one without; None: that is its number, or
    # places are resampled.
    order: Tensor | None = None
    void: Tensor | None = None  # bool [tiles, N] the other tokens of the tiles; None: there are none
    masked: bool = False  # nothing may attend to those
    behind: int = 0  # tokens after the grids: a newline
    lasting: int = 0  # of these, those that always stay, and count
    even: bool = False  # the grids (frames) get equal shares
    leads: int = 0  # tokens in front of those of each tile, class tokens, that always stay and do not count

    @cached_property
    def area(self) -> int:
        return sum(rows * columns for rows, columns in self.grids)

    @property
    def full(self) -> int:
        return self.area + self.behind

    @property
    def besides(self) -> int:
        return self.leads * len(self.live)

    @property
    def without_newlines(self) -> Grids:
        """Its grids, the last of which may have a column of newlines."""
        *before, (rows, columns) = self.grids
        newlines = 0 if self.masked else self.area - self.places
        return *before, (rows, columns - newlines // max(rows, 1))

    @property
    def resampled(self) -> bool:
        """Whether places are means of several tokens."""
        return self.places < sum(self.live)

    def tile_budgets(self, left: int) -> list[int]:
        """Tokens that the tiles keep so that so many of the visual are `left`: if resampled, any may be a place's only
        one."""
        if left == self.full:
            return [self.tile] * len(self.live)
        places = left - self.lasting
        return spread(_TAPS * places if self.resampled else places, self.live)


@lru_cache(maxsize=REMEMBERED)
def equal_tiles(count: int, grid: tuple[int, int], tile: int | None = None, **more: Any) -> Layout:
    """Of so many tiles, or frames, each of which is a `grid`: of its tokens, or of what is made of `tile` of them."""
    area = math.prod(grid)
    tile = area if tile is None else tile
    return Layout((grid,) * count, tile, (tile,) * count, area * count, **more)


class Prospect(NamedTuple):
    """What will come of a prompt's images or videos."""

    layouts: tuple[Layout, ...]
    left: list[int]  # tokens of each that the encoder leaves
    kept: list[int | None]  # features of each that enter the language model; None: known once they are chosen
    expected: Encoded  # what is known of them before they are encoded
    asked: Callable[[], EncoderPass]  # what the encoder is to leave of each tile


@dataclass
class Item:
    """One image or video: features in the order of the prompt."""

    features: Tensor  # [n, D]
    importance: Tensor  # [n]
    grids: Grids  # that the features come from, before any pruning
    full: int  # features of it then
    position: Tensor | None = None  # int64 [n] their places in those grids; None: all are there
    leading: Tensor | None = None  # [., D] features in front that are no patches
    trailing: Tensor | None = None  # [., D] features behind, which always stay, of importance 1
    appended: int = 0  # more of those, which the model adds later
    leads: Tensor | None = None  # [grids, ., D] features in front of those of each grid (all alike), which always stay

    @property
    def stays(self) -> int:
        """Features besides those of the grids that stay, leading ones not counted."""
        trailing = 0 if self.trailing is None else len(self.trailing)
        return self.appended + trailing + (0 if self.leads is None else self.leads.shape[:2].numel())

    def numbered(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Places of features of the grids, and of those that stay besides, where all are counted through."""
        if self.leads is None:
            return position, torch.arange(self.full - self.stays, self.full, device=position.device)
        (grids, lead, _), area = self.leads.shape, math.prod(self.grids[0])
        first = torch.arange(grids, device=position.device)[:, None] * (lead + area)
        stay = first + torch.arange(lead, device=position.device)
        return position + (position // area + 1) * lead, stay.flatten()


class Kind:
    """A kind of visual of a family: its images, or its videos."""

    modality: str  # "image" | "video"
    pixels: str  # the argument of ``forward`` that brings them
    aliases: tuple[str, ...] = ()  # other names of it
    method: str  # of the inner model that makes their features
    usual: int | None = None  # tokens of each where all have as many
    leading = 0  # features of each in front that are no patches and are never dropped
    shrinks = True  # prompts; False: features have every place, and dropped ones leave inside the language model
    leads = 0  # the same of each of its tiles: they stay in the encoder, a language model may drop them
    side = 1  # edge in patches of a token, that the model merges
    grid = ""  # the argument that says how many patches each has, where the encoder takes any number
    assembles = False  # whether the features of a visual are put together of its tiles'; else they are one tile's
    apart = False  # whether text stands between the placeholders of a visual's tiles

    def __init__(self, model: Any, token_id: int) -> None:
        self.model, self.token_id = model, token_id

    def layouts(self, pixels: Tensor, arguments: dict[str, Any]) -> list[Layout]:
        """Of each, without leading tokens."""
        raise NotImplementedError

    def assemble(self, tiles: Sequence[Tensor], arguments: dict[str, Any], newline: Tensor) -> list[Tensor]:
        """What the model makes of projected tokens, of any number of channels.

        Args:
            tiles: of each visual the tokens of its tiles [tiles, N, C].
            newline: [C] the values of tokens that it adds.

        Returns:
            [n, C] of each visual; what is behind its grids may be missing. Here tile after tile.
        """
        return [x.flatten(0, 1) for x in tiles]

    @property
    def in_order(self) -> bool:
        """Whether the model takes them tile after tile, as `assemble` here: nothing has to stand for dropped ones."""
        return self.assembles and type(self).assemble is Kind.assemble

    def heed(self, pixels: Tensor, placeholders: np.ndarray, arguments: dict[str, Any]) -> None:
        """Note what a prompt tells about its visuals, until its call is over.

        Args:
            placeholders: bool [B, L] in the last L columns of the prompt that is among the `arguments`.
        """

    def lengths(self, features: Any, known: Encoded | None) -> list[int]:
        """Features of each visual, where they were made before; generate repeats them for beams."""
        return [len(x) for x in features]


class PrunedFeatures(Bound):
    """Replacement ``get_image_features`` (or of videos): what a policy leaves of them.

    It refuses another feature layer than the one that pruning ends before.
    """

    def __init__(
        self,
        kind: Kind,
        policy: Policy,
        encoder: VisionEncoder,
        fixed: dict[str, Any],
        backend: str | None,
        turns: Turns,
        marks: bool,
    ) -> None:
        super().__init__(kind.model)
        self.method, self.kind, self.policy, self.encoder = kind.method, kind, policy, encoder
        self.fixed = fixed | {f"{kind.modality}_token_id": kind.token_id}
        self.backend, self.turns = backend, turns
        self.marks = marks  # somebody may ask which tokens the features are, and how important
        self.encoded: Encoded | None = None  # of the last call
        self.places: Places | None = None  # of what was patched; None: nothing is
        self.predicts = False  # nothing is run: of visuals whose count is known once they are chosen the most is left
        self.first = next(iter(self.__signature__.parameters))  # the method's pixels; versions name videos' otherwise
        # Of the prompt at hand: pixels and what will come of them, or the features, made before they are asked for.
        self.found: tuple[Tensor, Prospect] | None = None
        self.ahead: tuple[Tensor, Any] | None = None
        self.remembered: dict[tuple[Layout, ...], Prospect] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.turns, self.turns.running(self.model, inside=True):
            return self._features(named(self, args, kwargs))

    def _features(self, arguments: dict[str, Any]) -> Any:
        if _PASS.get() is not None:
            return self.original(**arguments)
        if self.places is not None and not torch.compiler.is_compiling():
            self.places.check()
        for name, value in self.fixed.items():
            given = arguments.get(name)
            given = getattr(self.model.config, name) if given is None else given
            if given != value:
                raise ValueError(
                    f"{name}={given!r} but the model was patched for {value!r}: unpatch, set it in model.config, "
                    "patch again"
                )
        pixels = self._pixels(arguments, self.first)
        ahead, self.ahead = self.ahead, None
        if ahead is not None and ahead[0] is pixels:
            return ahead[1]
        as_tuple = arguments.get("return_dict") is False
        found = self._prospect(pixels, arguments)
        output, known = self._make(arguments, found)
        self.encoded = found.expected
        full = self.encoded.full
        if not self.kind.shrinks and known.position is not None:
            places = list(known.position)
            self.encoded = Encoded(full, [len(x) for x in places], position=places)
        scored = self.policy.prunes_features and known.importance is not None
        if self.kind.in_order and known.left is not None and not (scored or self.marks):
            self.encoded = _packed(output, found, known.left, known.width)
        elif scored or (self.kind.assembles and self.encoded.kept != full):
            self._choose(output, self._items(output.pooler_output, arguments, found, known), found.kept)
        if self.encoder.record:
            self.encoded = self.encoded._replace(trace=self.encoder.trace)
        for holder in (output, *_first(output)):
            setattr(holder, _ENCODED, self.encoded)
        return output.to_tuple() if as_tuple else output

    def _pixels(self, arguments: dict[str, Any], name: str) -> Any:
        for key in (name, *self.kind.aliases):
            if arguments.get(key) is not None:
                return arguments[key]
        return None

    def _left(self, layout: Layout) -> int:
        """Tokens of a visual that the encoder leaves, lasting ones included: one of its tiles at least."""
        budget = self.policy.encoder_budget(layout.full, len(layout.live))
        if budget >= layout.full:
            return layout.full
        return min(max(budget - layout.lasting, 1), layout.places) + layout.lasting

    def _kept(self, layout: Layout, left: int) -> int | None:
        """Features of a visual that enter the language model; None: known once they are chosen."""
        budget = self.policy.feature_budget(layout.full) if self.policy.prunes_features else left
        if budget is None and self.predicts:
            video = self.kind.modality == "video"
            budget = self.policy.feature_limit(layout.area, layout.without_newlines, video) + layout.behind
        return None if budget is None else min(budget, left) + layout.besides

    def _prospect(self, pixels: Tensor, arguments: dict[str, Any]) -> Prospect:
        """A prompt asks for it several times, and some kinds look at all pixels for it."""
        found = self.found  # read once: another thread's prompt may end meanwhile
        if found is not None and found[0] is pixels:
            return found[1]
        layouts = tuple(self.kind.layouts(pixels, arguments))
        # A mask's are like no others.
        if torch.compiler.is_compiling() or self.predicts or any(layout.masked for layout in layouts):
            return self._foreseen(layouts)
        return self.remembered.get(layouts) or remember(self.remembered, layouts, self._foreseen(layouts))

    def _foreseen(self, layouts: tuple[Layout, ...]) -> Prospect:
        left = [*map(self._left, layouts)]
        kept = [*map(self._kept, layouts, left)]
        full = [layout.full + layout.besides for layout in layouts]
        tile = layouts[0].tile if self.kind.apart and full else None
        expected = Encoded(full, [n if m is None else m for n, m in zip(full, kept, strict=True)], tile=tile)
        return Prospect(layouts, left, kept, expected, self._asked(layouts, left))

    def heed(self, arguments: dict[str, Any]) -> None:
        """Note what a prompt tells about the visuals that come with it, if there is one."""
        ids, (pixels, _) = arguments.get("input_ids"), self.given(arguments)
        if ids is not None and pixels is not None:
            self.kind.heed(pixels, ids.cpu().numpy() == self.kind.token_id, arguments)

    def foresee(self, arguments: dict[str, Any]) -> None:
        """Note what will be left of the visuals that come with a prompt, for one that nobody is going to encode."""
        pixels, output = self.given(arguments)
        if pixels is not None and output is None:
            self.encoded, self.ahead = self._prospect(pixels, arguments).expected, (pixels, None)

    def _asked(self, layouts: tuple[Layout, ...], left: list[int]) -> Callable[[], EncoderPass]:
        """What is to be left of each tile."""
        tokens: list[int] = []
        budgets: list[int] = []
        voids: list[Tensor] = []  # where there are some
        kept, cut = False, False  # images with hidden tokens as they are; others not
        some = any(layout.void is not None for layout in layouts)
        for layout, n in zip(layouts, left, strict=True):
            every, ends = [layout.tile] * len(layout.live), layout.tile_budgets(n)
            # Void tokens leave only where others do, but those that nothing may attend to.
            whole = sum(ends) >= sum(layout.live) and (n == layout.full or not layout.masked)
            kept, cut = kept or (whole and layout.masked), cut or not whole
            tokens += every if whole else layout.live
            budgets += every if whole else ends
            if some:
                none = torch.zeros(len(every), layout.tile, dtype=torch.bool, device="cpu")
                voids.append(none if whole or layout.void is None else layout.void)
        if kept and cut:
            raise ValueError(
                "pixel_attention_mask hides some of an image that is to be kept whole, beside images that are pruned: "
                "give it in a call of its own, or lower the budget below its tokens"
            )
        void = torch.cat(voids) if voids else None
        leads = self.kind.leading + max((layout.leads for layout in layouts), default=0)
        masked = any(layout.masked for layout in layouts)
        return partial(
            EncoderPass, self.kind.side, tuple(tokens), tuple(budgets), void, masked, leads=leads,
            in_order=self.kind.in_order,
        )  # fmt: skip

    def _make(self, arguments: dict[str, Any], found: Prospect) -> tuple[Any, EncoderPass]:
        """The model's own features, and what the encoder noted. Where the model puts tiles together by their places,
        those of dropped tokens are there, too."""
        kind, known = self.kind, found.asked()
        if kind.shrinks and (kind.assembles or kind.side > 1 or self.policy.prunes_features):
            arguments = arguments | dict(encoder_pass=known)
        before = _PASS.set(known)
        try:
            output = self.original(**arguments | dict(return_dict=True))
        finally:
            _PASS.reset(before)
        if isinstance(self.encoder, PackedEncoder):
            known.importance, known.position = self.encoder.importance, self.encoder.position
        return output, known

    def given(self, arguments: dict[str, Any]) -> tuple[Tensor | None, Any]:
        """What of this kind comes with a prompt: raw pixels, or features encoded beforehand."""
        encoded = arguments.get("mm_encoder_outputs")
        output = encoded.get(self.kind.modality) if isinstance(encoded, dict) else None
        return self._pixels(arguments, self.kind.pixels), output

    def visuals(self, arguments: dict[str, Any], placeholders: np.ndarray) -> list[Visuals]:
        """The same, with what is left of it; bool [B, L] `placeholders` of the prompt."""
        kind, lead = self.kind, self.kind.leading
        pixels, output = self.given(arguments)
        if output is not None:
            known = next((getattr(x, _ENCODED) for x in (output, *_first(output)) if hasattr(x, _ENCODED)), None)
            if self.encoder.record:  # not of what was encoded last
                self.encoder.trace = Trace() if known is None else known.trace
            kept = kind.lengths(output.pooler_output, known)
            full = kept if kind.usual is None else [kind.usual + lead] * len(kept)
            full = full if known is None else [n + lead for n in known.full]
            runs = known.runs if known is not None and kind.apart else lambda: [[n] for n in kept]
            return [Visuals(kind.token_id, full, kept, lead, lambda: None, lambda: known, runs)]
        if pixels is None:
            return []
        kind.heed(pixels, placeholders, arguments)
        found = self._prospect(pixels, arguments)
        self.found, whole = (pixels, found), found.expected.full
        left = [n for n in (found.kept if kind.shrinks else whole) if n is not None]
        if len(left) < len(whole):
            left = self._encode_ahead(pixels, arguments).kept
        kept = [n + lead for n in left]
        return [
            Visuals(
                kind.token_id, [n + lead for n in whole], kept, lead,
                found.asked, lambda: self.encoded,
                lambda: self._runs(pixels, found, arguments) if kind.apart else [[n] for n in kept],
            )
        ]  # fmt: skip

    def _runs(self, pixels: Tensor, found: Prospect, arguments: dict[str, Any]) -> list[list[int]]:
        """Of visuals with text between their tiles' placeholders, the features that stay of each tile.

        They are made ahead where a policy chooses among those of all tiles.
        """
        known = found.expected
        if self.policy.prunes_features and any(len(layout.live) > 1 for layout in found.layouts):
            known = self._encode_ahead(pixels, arguments)
        if known.position is not None:
            return known.runs()
        return [layout.tile_budgets(n) for layout, n in zip(found.layouts, known.kept, strict=True)]

    def counts(self, pixels: Tensor, arguments: dict[str, Any]) -> list[int | None]:
        """Features of each visual that enter the language model, without leading ones; None: known once chosen."""
        return self._prospect(pixels, arguments).kept

    def _encode_ahead(self, pixels: Tensor, arguments: dict[str, Any]) -> Encoded:
        """What is left of features, where it is not known before they are made; they wait for the call that wants them.

        A prompt is looked at before its images are encoded, by ``generate`` and by ``forward``.
        """
        if self.ahead is None or self.ahead[0] is not pixels:
            names = self.__signature__.parameters.keys() - {*self.kind.aliases}
            others = {name: arguments[name] for name in names if name in arguments}
            output = self(**others | {self.first: pixels, "return_dict": True})
            self.ahead = pixels, output
        assert self.encoded is not None
        return self.encoded

    def _items(self, features: Any, arguments: dict[str, Any], found: Prospect, known: EncoderPass) -> list[Item]:
        """Every visual's features, without those that the encoder dropped."""
        layouts = found.layouts
        if not self.kind.assembles:
            assert known.importance is not None
            positions = [None] * len(layouts) if known.position is None else known.position
            lead = self.kind.leading
            if not self.kind.shrinks:
                features = [x if at is None else x[at] for x, at in zip(features, positions, strict=True)]
            return [
                Item(x[lead:], weight, layout.grids, layout.full, position, x[:lead] if lead else None)
                for x, weight, layout, position in zip(features, known.importance, layouts, positions, strict=True)
            ]
        areas = [layout.area for layout in layouts]
        # All visuals at once: for each by itself these would be a dozen launches a tile.
        if self.kind.in_order:
            x, leads = _tiled(features, layouts)
            made = areas
        else:
            x = joined([rows[:area] for rows, area in zip(features, areas, strict=True)])
            leads, made = [None] * len(layouts), [len(rows) for rows in features]
        device = x.device
        whole = [left == layout.full for left, layout in zip(found.left, layouts, strict=True)]
        ends = [
            layout.area if every else left - layout.lasting
            for layout, left, every in zip(layouts, found.left, whole, strict=True)
        ]
        image, start = images_of(tuple(areas), device)
        if any(layout.resampled for layout in layouts):
            # Means of what is left of the tokens that a place is made of; the highest of them stay.
            marks = self._marked(device, arguments, layouts, known)
            share, score = joined([rows[:area] for rows, area in zip(marks, areas, strict=True)]).unbind(1)
            stays = constant(tuple(whole), device, torch.bool)[image]
            gone = (share == 0) & ~stays
            means = share.masked_fill(gone | stays, 1)
            x = (x / means[:, None]).to(x.dtype)
            score = score if known.importance is None else score / means
            score = score.masked_fill(gone, float("-inf"))
            pieces, counts = [], []
            for layout, end in zip(layouts, ends, strict=True):
                grids = [h * w for h, w in layout.grids] if layout.even and end < layout.area else [layout.area]
                pieces += grids
                counts += spread(end, grids)
            index = select_features(FeatureView(x, score, pieces, [], None, counts, self.backend), counts, None).index
            x, weight = x[index], score[index]
        else:
            index, weight, number = _placed(layouts, whole, known, sum(ends), device)
            rows = number if self.kind.in_order else index
            x = x if rows is None else x[rows]
        chosen = x, weight, index - start[image[index]] if len(layouts) > 1 else index
        items = []
        parts = zip(*(_parted(part, ends) for part in chosen), strict=True)
        for i, (front, layout, every, (kept, scores, at)) in enumerate(zip(leads, layouts, whole, parts, strict=True)):
            # transformers 5.17 puts the newline behind a video's features later on.
            appended = layout.full - made[i]
            trailing = (layout.behind if every else layout.lasting) - appended
            items.append(
                Item(
                    kept, scores, layout.grids, layout.full + layout.besides,
                    position=None if every else at,
                    trailing=features[i][made[i] - trailing :] if trailing else None,
                    appended=appended,
                    leads=front,
                )
            )  # fmt: skip
        return items

    def _marked(
        self, device: torch.device, arguments: dict[str, Any], layouts: tuple[Layout, ...], known: EncoderPass
    ) -> list[Tensor]:
        """By way of the model's own assembly, of every token of a visual [n, 2]: the share of it that is left, and
        that share's importance. Newlines are none of it, and of importance 1."""
        tile, weight, at = layouts[0].tile, known.importance, known.position
        counts = [len(layout.live) for layout in layouts]
        dtype = torch.float32 if weight is None else weight.dtype
        share = torch.ones((sum(counts), tile) if at is None else at.shape, dtype=dtype, device=device)
        channels = torch.stack([share, share if weight is None else weight], -1)
        channels = channels if at is None else _spread_out(channels, known)
        return self.kind.assemble(channels.split(counts), arguments, constant((0, 1), device, dtype))

    def _choose(self, output: Any, items: list[Item], kept: list[int | None]) -> None:
        known = [max(n - item.stays, 0) for n, item in zip(kept, items, strict=True) if n is not None]
        lengths = [len(item.features) for item in items]
        given = [
            torch.arange(n, device=item.features.device) if item.position is None else item.position
            for n, item in zip(lengths, items, strict=True)
        ]
        whole, places = all(item.position is None for item in items), joined(given)
        view = FeatureView(
            features=joined([item.features for item in items]),
            importance=joined([item.importance for item in items]),
            lengths=lengths,
            grids=[item.grids for item in items],
            position=None if whole else places,
            budgets=known if known else None,
            backend=self.backend,
            video=self.kind.modality == "video",
        )
        if known == lengths:
            chosen, ends = (view.features, places, view.importance, torch.zeros_like(places, dtype=torch.bool)), lengths
        else:
            choice = self.policy.feature_select(view)
            chosen = choice.features, places[choice.index], view.importance[choice.index], choice.recycled
            ends = choice.lengths
        pieces = zip(*(_parted(x, ends) for x in chosen), strict=True)
        rows, positions, weights, recycled = map(list, zip(*map(_surrounded, items, pieces), strict=True))
        if not self.kind.shrinks:
            rows = [
                x.new_zeros(item.full, x.shape[1]).index_copy_(0, at, x)
                for item, x, at in zip(items, rows, positions, strict=True)
            ]
        if isinstance(output.pooler_output, Tensor):  # where they differ in length, feature by feature
            equal = len({len(x) for x in rows}) == 1
            output.pooler_output = torch.stack(rows) if equal else torch.cat(rows)[:, None]
        else:
            output.pooler_output = rows
        assert self.encoded is not None  # with the numbers that were to be expected
        self.encoded = self.encoded._replace(kept=[len(x) for x in positions], importance=weights, position=positions)
        if self.encoder.trace is not None and (known != lengths or (self.kind.assembles and not whole)):
            self._record(items, view, places, positions, recycled)

    def _record(
        self, items: list[Item], view: FeatureView, places: Tensor, positions: list[Tensor], recycled: list[Tensor]
    ) -> None:
        assert self.encoder.trace is not None
        scores = view.importance.new_full((len(items), max(item.full for item in items)), float("nan"))
        pieces = (x.split(view.lengths) for x in (places, view.importance))
        for row, item, place, weight in zip(scores, items, *pieces, strict=True):
            place, stay = item.numbered(place)
            row[place], row[stay] = weight, 1.0
        kept = [len(x) for x in positions]
        self.encoder.trace.stages.append(
            Stage(
                "features", -1, kept, pad_sequence(positions, batch_first=True, padding_value=-1),
                torch.tensor(kept, dtype=torch.int32, device=scores.device), scores, None,
                recycled=pad_sequence(recycled, batch_first=True),
            )
        )  # fmt: skip


def joined(parts: list[Tensor]) -> Tensor:
    """One behind another, in which a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _parted(x: Tensor, lengths: list[int]) -> Sequence[Tensor]:
    """`joined` undone."""
    return (x,) if len(lengths) == 1 else x.split(lengths)


def _first(output: Any) -> Sequence[Tensor]:
    """The tensor that holds the features of an output, or the first of several."""
    features = output.pooler_output
    return (features,) if isinstance(features, Tensor) else features[:1]


class ScatteredProjector(Bound):
    """Replacement ``forward`` of a projector that works token by token: what the encoder left goes in. What comes out
    has every token of the tiles, zeros where one is gone, where the model puts the tiles together by their places."""

    method = "forward"

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        projected, known = self.original(*args, **kwargs), pruned_pass()
        if known is None:
            return projected
        assert known.left is not None
        n, projected = known.width, projected.reshape(len(known.left), -1, projected.shape[-1])
        if known.in_order:
            return projected
        rows = _spread_out(projected[:, -n:], known)
        return torch.cat([projected[:, :-n], rows], 1) if projected.shape[1] > n else rows  # class tokens in front


def pruned_pass() -> EncoderPass | None:
    """What the tower left whose output is being projected; None: everything."""
    known = _PASS.get()
    return None if known is None or known.left is None else known


def _spread_out(x: Tensor, known: EncoderPass) -> Tensor:
    """What is of the tokens that a pass left, x [B, n, C], in a row of all tokens [B, N, C], zeros elsewhere."""
    # One more row, for those that go nowhere.
    out = x.new_zeros(len(x) * known.whole + 1, x.shape[2]).index_copy_(0, known.places, x.flatten(0, 1))
    return out[:-1].unflatten(0, (len(x), known.whole))


def _packed(output: Any, found: Prospect, left: tuple[int, ...], width: int) -> Encoded:
    """Take what is left of the tiles, which stands in rows of that `width`, for an output's features."""
    features, layouts, known = output.pooler_output, found.layouts, found.expected
    lead, tiles = layouts[0].leads, iter(left)
    by_tile = [[next(tiles) + lead for _ in layout.live] for layout in layouts]
    kept = [*map(sum, by_tile)]
    x = joined(list(features)) if isinstance(features, (tuple, list)) else features
    x = x.reshape(-1, x.shape[-1])
    if min(left) < width:
        x = x[held(_filled(tuple(n + lead for n in left), width + lead, x.device))]
    if not isinstance(features, Tensor):
        output.pooler_output = list(x.split(kept))
    else:  # where they differ in length, feature by feature
        output.pooler_output = x.view(len(kept), kept[0], -1) if len({*kept}) == 1 else x[:, None]
    return known._replace(kept=kept, by_tile=by_tile if known.tile is not None else None)


@lru_cache(maxsize=16)
def _filled(lengths: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """Rows with something in them, of tiles of so many among `width`; on the device once: a copy would wait."""
    with torch.inference_mode(False), torch.device("cpu"):
        rows = torch.arange(len(lengths) * width).view(-1, width)
        return rows[torch.arange(width) < torch.tensor(lengths)[:, None]].to(device)


def _placed(
    layouts: tuple[Layout, ...], whole: list[bool], known: EncoderPass, count: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Places [count] of the tokens that are left, counted through all visuals, ascending, their importance, and the row
    of each among all that the encoder gave; None: they are these rows.

    Newlines of visuals that are `whole` are among them, of importance 1.
    """
    order = None if all(x.order is None for x in layouts) else _order(layouts, tuple(whole), device)
    weight = None if known.importance is None else known.importance.flatten()
    if order is None:
        places = torch.arange(count, device=device) if known.position is None else known.places
    else:
        tokens, newlines = map(held, order)
        places = tokens[:-1] if known.position is None else tokens[known.places]
        if len(newlines):
            places = torch.cat([places, newlines])
            weight = None if weight is None else torch.cat([weight, weight.new_ones(len(newlines))])
    number = None
    if order is not None or len(places) > count:
        places, number = places.sort()
        places, number = places[:count], number[:count]
        weight = None if weight is None else weight[number]
    return places, torch.ones(count, dtype=torch.float32, device=device) if weight is None else weight, number


@lru_cache(maxsize=16)
def _order(layouts: tuple[Layout, ...], whole: tuple[bool, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The place of each token of all visuals' tiles, and of one more that is nowhere: behind all. And the newlines of
    those that are `whole`. On the device once: a copy would wait."""
    with torch.inference_mode(False), torch.device("cpu"):
        orders, newlines, start, nowhere = [], [], 0, sum(layout.area for layout in layouts)
        for layout, every in zip(layouts, whole, strict=True):
            order = torch.arange(layout.area) if layout.order is None else layout.order
            orders.append(torch.where(order < layout.area, order + start, nowhere))
            is_newline = torch.full((layout.area + 1,), every).index_fill_(0, order, False)
            newlines.append(is_newline[:-1].nonzero()[:, 0] + start)
            start += layout.area
        return torch.cat([*orders, torch.tensor([nowhere])]).to(device), torch.cat(newlines).to(device)


def spread(total: int, limits: Sequence[int]) -> list[int]:
    """`total` in equal shares of at most `limits`, what remains to the first: the sum is min(total, sum(limits))."""
    shares = [0] * len(limits)
    left = min(total, sum(limits))
    while left:
        open_ = [i for i, limit in enumerate(limits) if shares[i] < limit]
        each, more = divmod(left, len(open_))
        for place, i in enumerate(open_):
            share = min(each or place < more, limits[i] - shares[i])
            shares[i] += share
            left -= share
    return shares


def _tiled(features: Any, layouts: tuple[Layout, ...]) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Features of all tiles [rows, D], and of each visual those in front of each tile's."""
    x = features if isinstance(features, Tensor) else joined(list(features))
    tiles, lead = [len(layout.live) for layout in layouts], layouts[0].leads
    x = x.reshape(-1, x.shape[-1])
    if not lead:
        return x, [None] * len(layouts)
    x = x.unflatten(0, (sum(tiles), -1))
    return x[:, lead:].flatten(0, 1), x[:, :lead].split(tiles)


def _surrounded(item: Item, chosen: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What was chosen of an item's grids, and what stays besides.

    Args:
        chosen: features [n, D], places in the grids, importance, recycled.

    Returns:
        The same of all, places where all are counted through; features without those that are appended later.
    """
    rows, place, weight, recycled = chosen
    if item.stays:
        place, stay = item.numbered(place)
        place = torch.cat([place, stay])
        weight = torch.cat([weight, weight.new_ones(len(stay))])
        recycled = torch.cat([recycled, torch.zeros_like(stay, dtype=torch.bool)])
    leads = None if item.leads is None else item.leads.flatten(0, 1)
    parts = [x for x in (item.leading, rows, leads, item.trailing) if x is not None]
    rows = torch.cat(parts) if len(parts) > 1 else rows  # a view, where nothing stands around
    if leads is not None:
        order = place.argsort()
        rows, place, weight, recycled = (x[order] for x in (rows, place, weight, recycled))
    return rows, place, weight, recycled
