"""What every policy is: a validated budget, and decisions in a vision encoder, behind it and in a language model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._ops import Select

P = TypeVar("P", bound="Policy")
_LARGEST = torch.finfo(torch.float32).max
# Lowest and highest value of a field, and "int" for whole numbers or "log" for a logarithmic scale.
Range = tuple[float, float] | tuple[float, float, str]


@dataclass(frozen=True)
class Policy:
    """Base of the policies: how many visual tokens an image, or a video, keeps.

    The budget is that of an image with all tiles that a model cuts it into, or of a video with all its frames, and is
    spread evenly over them. It counts what would enter the language model: merged tokens where patches are merged.
    Frames that a model is given as images of their own (InternVL, Idefics3, SmolVLM) have a budget each.

    Args:
        target_tokens: tokens kept per image, at least 1; a number at or above the image's tokens keeps everything.
        retain_ratio: the same as a share of the image's tokens, in (0, 1]. Give exactly one of the two.

    Raises:
        ValueError: both or neither budget, or a value outside its range.
        TypeError: a budget of the wrong type.
    """

    target_tokens: int | None = None
    retain_ratio: float | None = None

    # average -> fields of a `preset`. What leaves the encoder stays: the budget is the average.
    presets: ClassVar[Mapping[int, Mapping[str, Any]]] = {n: dict(target_tokens=n) for n in (192, 128, 64)}

    def __post_init__(self) -> None:
        name = type(self).__name__
        if (self.target_tokens is None) == (self.retain_ratio is None):
            got = f"target_tokens={self.target_tokens!r}, retain_ratio={self.retain_ratio!r}"
            raise ValueError(f"{name}: give exactly one of target_tokens and retain_ratio, got {got}")
        if self.target_tokens is not None:
            if not is_whole(self.target_tokens):
                raise TypeError(
                    f"{name}: target_tokens={self.target_tokens!r} must be an int; for a share use retain_ratio"
                )
            if self.target_tokens < 1:
                raise ValueError(f"{name}: target_tokens={self.target_tokens} must be at least 1")
        else:
            if isinstance(self.retain_ratio, bool) or not isinstance(self.retain_ratio, (int, float)):
                raise TypeError(f"{name}: retain_ratio={self.retain_ratio!r} must be a number in (0, 1]")
            if not 0 < self.retain_ratio <= 1:
                raise ValueError(
                    f"{name}: retain_ratio={self.retain_ratio} must lie in (0, 1]; for a count use target_tokens"
                )

    def __str__(self) -> str:
        """For messages: the fields that were set. ``repr`` has all."""
        set_ = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in set_)})"

    def to_json(self, path: str | os.PathLike | None = None) -> str:
        """The policy as JSON text, written to the file `path` if one is named; :meth:`from_json` reads either."""
        from .. import __version__

        content = dict(policy=type(self).__name__, version=__version__, fields=asdict(self))
        text = json.dumps(content, indent=1, allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    @classmethod
    def from_json(cls: type[P], source: str | os.PathLike) -> P:
        """The policy that :meth:`to_json` wrote.

        Args:
            source: a file's path, or the text itself (which starts with a brace).

        Raises:
            ValueError: text that is no policy of this class, or names a field that it does not have.
            OSError: a file that cannot be read.
        """
        inline = isinstance(source, str) and source.lstrip().startswith("{")
        try:
            content = json.loads(source if inline else Path(source).read_text())  # type: ignore[arg-type]
        except json.JSONDecodeError as error:
            raise ValueError(f"{cls.__name__}.from_json: this is no JSON: {error}") from error
        name = content.get("policy") if isinstance(content, dict) else None
        if name != cls.__name__:
            raise ValueError(f"{cls.__name__}.from_json: this holds a {name}: read it with that class")
        given = content.get("fields")
        if not isinstance(given, dict):
            raise ValueError(f"{cls.__name__}.from_json: fields={given!r} must be an object of fields and their values")
        unknown = sorted(given.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(
                f"{cls.__name__}.from_json: {', '.join(unknown)} is no field, but was one in "
                f"version {content.get('version')}, which wrote this"
            )
        return cls(**{name: _as_tuple(value) for name, value in given.items()})

    @classmethod
    def preset(cls: type[P], average: int, **changes: Any) -> P:
        """The settings for 192, 128 or 64 of LLaVA-1.5's 576 tokens on average over its language model's 32 layers.

        Those that papers publish for such an average; the true one may be another: :meth:`arithmetic` says.

        Args:
            average: one of the class's ``presets``.
            changes: fields to set otherwise.

        Raises:
            ValueError: there is no preset for this average.
        """
        if average not in cls.presets:
            known = ", ".join(map(str, cls.presets))
            hint = f"must be one of {known}; for others set the fields" if known else "has no preset: set the fields"
            raise ValueError(f"{cls.__name__}.preset: average={average!r} {hint}")
        return cls(**{**cls.presets[average], **changes})

    def search_space(self, budget: float) -> dict[str, Range]:
        """Fields that :func:`~flowcut_kernels.tune` searches by default for an average retention of `budget`."""
        return {}

    def budget(self, tokens: int) -> int:
        """Tokens kept of an image that has `tokens`: at least 1, at most all, ratios rounded half to even."""
        if self.target_tokens is not None:
            return min(self.target_tokens, tokens)
        assert self.retain_ratio is not None
        return min(max(1, round(self.retain_ratio * tokens)), tokens)

    @property
    def may_prune(self) -> bool:
        """Whether some image has more tokens than its budget. The encoder cannot tell: it may see parts of images."""
        return self.retain_ratio != 1

    def encoder_budget(self, tokens: int, tiles: int = 1) -> int:
        """Tokens the vision encoder leaves of an image that has `tokens`; more than the budget where others follow.

        Args:
            tiles: inputs of the encoder that the image is made of; what is left is spread over them.
        """
        return self.budget(tokens)

    def check_encoder(self, feature_layer: int, tokens: int) -> None:
        """ValueError where this policy does not fit an encoder of `tokens` patches that is read at `feature_layer`."""

    def encoder_step(self, layer: int, feature_layer: int, tokens: int, budget: int) -> EncoderStep | None:
        """What to do at an encoder layer whose output feeds the next one; None: run the layer as it is.

        Args:
            tokens: of an input of the encoder, unpruned: an image, or a tile of it, or a frame.
            budget: tokens that the encoder leaves of it: `encoder_budget`, or a tile's part of that.
        """
        raise NotImplementedError

    def encoder_select(self, step: EncoderStep, view: EncoderView) -> Selection:
        """Score the tokens of a layer and choose which rows go on."""
        raise NotImplementedError

    def encoder_scoring_flops(
        self, step: EncoderStep, tokens: int, protect: int, width: int, heads: int, anchor: Callable[[str], int]
    ) -> int:
        """FLOPs of the matrix products by which `encoder_select` chooses among `tokens` patches of `width` channels.

        Args:
            anchor: those of `view.anchor`, by the same name.
        """
        return 0

    @property
    def needs_class_token(self) -> bool:
        """Whether `encoder_select` asks for a class token, which some encoders lack."""
        return False

    @property
    def merges_features(self) -> bool:
        """Whether the output of the feature layer is merged, so that no other layer's fits it."""
        return False

    @property
    def keeps_blocks(self) -> bool:
        """Whether patches that a model merges into one token stay or go together."""
        return True

    @property
    def wants_pixels(self) -> bool:
        """Whether `encoder_select` looks at the pixels."""
        return False

    @property
    def prunes_features(self) -> bool:
        """Whether `feature_select` chooses among the projected features, before the language model."""
        return False

    def feature_budget(self, tokens: int) -> int | None:
        """Tokens that enter the language model of an image that has `tokens`; None: known once they are chosen."""
        return self.encoder_budget(tokens)

    def feature_limit(self, tokens: int, grids: Sequence[tuple[int, int]], video: bool) -> int:
        """Most tokens that may be left of an image or a `video` where no `feature_budget` says.

        Args:
            grids: (rows, columns) of its grids, without newlines.
        """
        return tokens

    def tokens_by_layer(self, layers: int, tokens: int) -> list[int]:
        """Tokens of an image of `tokens` among the keys of each of `layers` layers of a language model."""
        left = self.feature_budget(tokens)
        if left is None:
            raise ValueError(f"{self}: how many tokens enter the language model is known only once they are chosen")
        found = []
        for layer in range(layers):
            entry = self.decoder_entry(layer, layers, tokens, left)
            left = left if entry is None else min(entry, left)
            found.append(left)
            step = self.decoder_step(layer, layers, tokens, left)
            left = left if step is None else min(step, left)
        return found

    def average_tokens(self, layers: int, tokens: int) -> float:
        """Mean of :meth:`tokens_by_layer`: what papers call the average retention of `tokens`."""
        return sum(self.tokens_by_layer(layers, tokens)) / layers

    def arithmetic(self, layers: int, tokens: int) -> str:
        """How :meth:`average_tokens` comes about, by runs of layers * tokens: "(2 * 576 + 30 * 30) / 32 = 64.1"."""
        runs = [(len(list(same)), kept) for kept, same in groupby(self.tokens_by_layer(layers, tokens))]
        terms = " + ".join(f"{n} * {kept}" if n > 1 else str(kept) for n, kept in runs)
        return f"({terms}) / {layers} = {self.average_tokens(layers, tokens):.1f}"

    def feature_select(self, view: FeatureView) -> FeatureSelection:
        """Choose which projected features go on, `feature_budget` of every image."""
        raise NotImplementedError

    @property
    def renumbers(self) -> bool:
        """Whether tokens after a cut in the language model get new positions without gaps."""
        return False

    def check_decoder(self, layers: int) -> None:
        """ValueError where this policy does not fit a language model of `layers` layers."""

    def decoder_step(self, layer: int, layers: int, tokens: int, left: int) -> int | None:
        """Visual tokens that go on from decoder layer `layer` of `layers`; None: all of them.

        Args:
            tokens: of the unpruned image.
            left: of the image at this layer.
        """
        return None

    def decoder_raters(self, prompt: PromptView) -> Tensor | None:
        """int64 [I, R] columns of each image whose attention `view.attention` is the mean of, -1 for none.

        None: the prompt's last token's, which one kernel makes.
        """
        return None

    def decoder_entry(self, layer: int, layers: int, tokens: int, left: int) -> int | None:
        """Visual tokens that enter decoder layer `layer`, its own keys included; arguments as of `decoder_step`."""
        return None

    def decoder_select(self, view: DecoderView) -> Selection:
        """Choose which visual tokens go on from a decoder layer, `view.budgets` of the images."""
        raise NotImplementedError

    def entry_select(self, view: DecoderView) -> Selection:
        """Choose which visual tokens enter a decoder layer, `view.budgets` of the images."""
        raise NotImplementedError

    def decoder_scoring_flops(self, tokens: int, width: int, key_width: int) -> int:
        """The same of `decoder_select`; columns of all query and of all key heads. 0 where no heads are asked for."""
        return 0

    def attention_anchors(self, enters: bool, samples: int, images: int, words: int) -> int:
        """Tokens whose `view.attention` is asked for by `decoder_select`, or by `entry_select` where the cut `enters`.

        Args:
            words: of a sample, the most.
        """
        return 0

    def prompt_scoring_flops(self, tokens: int, words: int, hidden: int) -> int:
        """FLOPs of `decoder_raters` for an image of `tokens`, with embeddings of `hidden` channels."""
        return 0


def _as_tuple(value: Any) -> Any:
    """Sequences of a field are tuples, which JSON does not know."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def is_whole(value: object) -> bool:
    """True for an int that is no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """True for an int or float that is no bool, and finite in float32, in which scores are computed."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def check_feature_layer(policy: Any) -> None:
    """TypeError unless ``policy.feature_layer`` is None or an int."""
    index = policy.feature_layer
    if index is not None and not is_whole(index):
        name = type(policy).__name__
        raise TypeError(f"{name}: feature_layer={index!r} must be an int such as -2; None: the model's configuration")


class EncoderStep(NamedTuple):
    """A layer at which a policy looks at the tokens."""

    mode: Select
    budget: int = 0  # tokens to end with, for the pruning modes
    divisor: float = 0.0  # sqrt of the remaining layers, for the adaptive modes
    static: bool = False  # counts follow from the step and the shapes alone: nothing has to be read back
    merges: bool = False  # the layer runs on all rows, and the choice merges its output
    lse: bool = False  # of a layer that keeps all rows: the choice wants what its attention knows of them

    @property
    def prunes(self) -> bool:
        """Whether tokens are dropped, and not only scored."""
        return self.mode != Select.SCORE_ONLY


@dataclass
class EncoderView:
    """What a policy may see of one encoder layer, before its attention is applied."""

    key: Tensor  # [B, H, N, d] strided view
    value: Tensor  # [B, H, N, d] strided view
    query: Tensor | None  # [B, H, N, d] where the step does not prune
    anchor: Callable[[str], tuple[Tensor, Tensor]]  # "cls" | "mean" -> query and value [B, H, 1, d]
    protect: int  # leading tokens that are not patches (1 for CLS)
    lengths: Tensor | None  # live tokens per image [B] where the batch is ragged, else None
    history: Tensor | None  # cumulative score [B, N] of the layer before
    grid: tuple[int, int]  # tokens of the unpruned image: rows, columns
    pixels: Pixels | None  # where the policy wants them
    backend: str | None
    block: int = 1  # patches of a token, consecutive rows behind `protect` that stay or go together
    budgets: Tensor | None = None  # int32 [B] each one's part of the step's budget, the largest; None: all the same
    # int64 [B, n] of each token in its grid, row by row, made when asked for; None: in this order, all there
    places: Callable[[], Tensor] | None = None
    grids: list[tuple[int, int]] | None = None  # each one's; None: all the same
    # [B, H, N] row log-sum-exp of the layer's attention, where the step wants it; None: it leaves none
    lse: Tensor | None = None


class Pixels(NamedTuple):
    """Images as the vision tower is given them."""

    values: Tensor  # [B, C, H, W], normalised
    mean: Sequence[float]  # [C] of the normalisation that is usual for the tower, on a scale of 0..1
    std: Sequence[float]
    patch_size: int
    # What is of their patches [B, P], in the order of a view's rows [B', N]; None: images of the view's grid
    arrange: Callable[[Tensor], Tensor] | None = None


@dataclass
class FeatureView:
    """The projected features of I images (or videos), one after another: T tokens."""

    features: Tensor  # [T, D]
    importance: Tensor  # float32 [T]
    lengths: list[int]  # tokens of each image, T together
    grids: list[tuple[tuple[int, int], ...]]  # of each image: (rows, columns) of its grids before any pruning
    position: Tensor | None  # int64 [T] token of its image's grids; None: all are there
    budgets: list[int] | None  # tokens to leave of each image; None: the policy says
    backend: str | None
    video: bool = False  # they are videos, and the grids frames


@dataclass
class FeatureSelection:
    """K features that go on, image after image."""

    features: Tensor  # [K, D]
    index: Tensor  # int64 [K] their places among the T, ascending
    recycled: Tensor  # bool [K] those that stand for several
    lengths: list[int]  # of each image, K together


@dataclass
class DecoderView:
    """What a policy may see of one decoder layer's I images, before its attention is applied.

    What is made of the layer's input is made when asked for.
    """

    layer: int
    full: list[int]  # tokens of each image before anything was pruned
    budgets: list[int]  # tokens to keep of each image
    lengths: list[int]  # tokens of each image; n is the largest
    importance: Tensor | None  # float32 [I, n] of the tokens, for policies that prune features
    scores: Tensor | None  # [I, n] that the last cut chose them by
    hidden: Callable[[], Tensor]  # [I, n, D] the layer's input
    heads: Callable[[], VisualHeads]
    attention: Callable[[], Tensor]  # float32 [I, n] of `decoder_raters`: head mean of the softmax over all keys
    backend: str | None


class PromptView(NamedTuple):
    """A prompt of B samples and L columns with I images, as it enters the language model."""

    embeds: Tensor  # [B, L, D]
    words: Callable[[], Tensor]  # bool [B, L] no visual tokens, no padding, nothing that is to be learnt
    columns: Tensor  # int64 [I, n] of each image's tokens, -1 after the last
    samples: Tensor  # int64 [I] each image's
    last: Tensor  # int64 [B] column of the prompt's last token
    most: int  # at least 1, and as many as any sample with images has words


class VisualHeads(NamedTuple):
    """Rotated queries and keys, and values: of each image's n tokens, and of its last instruction token."""

    query: Tensor  # [I, H, 1, d] of the last instruction token
    key: Tensor  # [I, G, n, d] of the image's tokens
    value: Tensor  # [I, G, n, d]
    value_anchor: Tensor  # [I, G, 1, d] of the last instruction token


@dataclass
class Selection:
    """A policy's decision for a batch of images."""

    index: Tensor | None  # int64 [B, M] rows to keep, ascending, then -1; None where the step does not prune
    lengths: Tensor  # int32 [B] live rows afterwards; -1 marks scores that are not finite
    score: Tensor | None = None  # cumulative score [B, N]
    entropy: Tensor | None = None  # entropy ratio of the anchor's attention [B]
    # Rows [B, N, D] -> [B, M, D]: a layer's output where an encoder's step merges, a layer's input at its entrance.
    merge: Callable[[Tensor], Tensor] | None = None
    merged: Tensor | None = None  # bool [B, M] rows that are no longer a token's own
