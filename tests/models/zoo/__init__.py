"""The families that test_conformance.py puts every policy through: one module each, found by being in this package.

A module here has a ``FAMILY``: a tiny random model, what its processor makes of a prompt, and where its vision tower
keeps what an oracle must see. ``llava.py`` is the shortest example, ``llava_onevision.py`` has tiles and videos.

A prompt is rows of parts: ids of text tokens (3..89), :class:`Image` and :class:`Video`. The pixels of a part depend
on that part alone, so that a row is the same in any batch.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from tiny import IMAGE, PAD, VIDEO, VOCAB
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import flowcut_kernels as fk


@dataclass(frozen=True)
class Image:
    """An image of a prompt, by its size in pixels."""

    height: int = 56
    width: int = 56
    seed: int = 0

    @property
    def pixels(self) -> np.ndarray:
        """uint8 [H, W, 3], as an image processor is given it."""
        return _noise(("image", self.seed), (self.height, self.width, 3))


@dataclass(frozen=True)
class Video:
    frames: int = 2
    height: int = 56
    width: int = 56
    seed: int = 0

    @property
    def pixels(self) -> np.ndarray:
        """uint8 [F, H, W, 3]."""
        return _noise(("video", self.seed), (self.frames, self.height, self.width, 3))


Part = int | Image | Video
POLICIES = tuple(getattr(fk, name) for name in fk.policies.__all__ if name != "Policy")
# Of `Family.refuses`
NO_CLASS_TOKEN = {fk.VisionZip: "VisionZip asks for a class token, which .* lacks"}
SQUARES = {fk.VisionZip: "VisionZip keeps single patches, but .* squares of 2 x 2 patches, which are merged"}


class Tile(NamedTuple):
    """One input of the vision encoder: an image, a view of one, a frame. Its n tokens are in raster order."""

    grid: tuple[int, int]  # rows and columns of its tokens
    rows: Tensor  # int64 [n, block] rows of each token's patches in the tower, counted through all tiles of a call
    tokens: Tensor  # int64 [n] places of its tokens in what the projector puts out, counted likewise
    protected: Tensor  # int64 [p] rows that are no patches (a class token)
    leads: Tensor = torch.arange(0)  # int64 [.] places of such in what the projector puts out: they stay


@dataclass(frozen=True)
class Family:
    """What the conformance tests need of a family."""

    name: str
    # (attention="sdpa", dtype=torch.float32) -> a tiny model whose language model has GQA and 3 layers or more
    model: Callable[..., Any]
    prompt: Callable[..., dict[str, Any]]  # (rows, padding="left") -> what the processor gives of a list of rows
    layers: Callable[[Any], Sequence[nn.Module]]  # vision layers of a model that run before the features are read
    attention: Callable[[nn.Module], nn.Module]  # the attention module of such a layer
    projector: Callable[[Any], nn.Module]  # of a model: its output [.., tokens, D] is what the model then assembles
    processor: Callable[[], Any]  # the family's own, for images and text
    # (model, inputs, "image" | "video") -> the tiles of every image or video, in the order of the tower's rows
    tiles: Callable[[Any, dict[str, Any], str], list[list[Tile]]]
    # The same -> rows and columns of the grids that an image's tokens make up in the language model, newlines included
    grids: Callable[[Any, dict[str, Any], str], list[list[tuple[int, int]]]] | None = None  # None: the tiles'
    kinds: tuple[str, ...] = ("image",)
    # Policies that are not defined for it, and words of the reason with which `patch` refuses them
    refuses: dict[type[fk.policies.base.Policy], str] = field(default_factory=dict)
    video_layers: Callable[[Any], Sequence[nn.Module]] | None = None  # the same where frames have their own tower
    written_type: int = 0  # token type of what the model writes
    # (model, inputs) -> position_ids of an unpruned prompt, which kept tokens keep (M-RoPE); None: contiguous ones
    positions: Callable[[Any, dict[str, Any]], Tensor] | None = None
    sizes: tuple[tuple[int, int], ...] = ((56, 56), (40, 70), (100, 60))  # of images, for different numbers of tokens
    skips: dict[str, str] = field(default_factory=dict)  # test name -> why it is not for this family

    def __str__(self) -> str:
        return self.name

    @property
    def policies(self) -> tuple[type[fk.policies.base.Policy], ...]:
        """All others."""
        return tuple(policy for policy in POLICIES if policy not in self.refuses)

    @property
    def prunes_llm(self) -> bool:
        """Whether its language model can be cut: FlowCut(llm_layer=...) and llm_stages."""
        return fk.FastV in self.policies


def families() -> list[Family]:
    """Every ``FAMILY`` of the modules of this package."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return sorted((module.FAMILY for module in modules), key=str)


def parts_of(rows: Iterable[Iterable[Part]], kind: type) -> list[Any]:
    """The images, or the videos, of a prompt in its order."""
    return [part for row in rows for part in row if isinstance(part, kind)]


def spell(rows: Iterable[Iterable[int]], padding: str = "left") -> dict[str, Tensor]:
    """input_ids and attention_mask of rows of ids."""
    flat = [list(row) for row in rows]
    width = max(map(len, flat))
    ids, mask = torch.full((len(flat), width), PAD), torch.zeros(len(flat), width, dtype=torch.long)
    for i, row in enumerate(flat):
        live = slice(width - len(row), width) if padding == "left" else slice(len(row))
        ids[i, live], mask[i, live] = torch.tensor(row), 1
    return dict(input_ids=ids, attention_mask=mask)


def write(rows: Iterable[list[Part]], spelled: Callable[[Any, list[Part]], list[int]]) -> list[list[int]]:
    """Rows of ids: text as it is, images and videos as `spelled` out, which is told their row too."""
    return [[i for part in row for i in ([part] if isinstance(part, int) else spelled(part, row))] for row in rows]


def batched_tiles(count: int, grid: tuple[int, int], *, protect: int = 0, block: int = 1, leads: int = 0) -> list[Tile]:
    """`count` tiles of a tower that takes a batch of images, with patches in raster order.

    Args:
        grid: rows and columns of a tile's tokens.
        protect: leading rows that are no patches.
        block: patches of a token, a square.
        leads: those of the leading rows that the projector is given.
    """
    height, width, side = *grid, round(block**0.5)
    patches = torch.arange(height * width * block).view(height, side, width, side)
    rows = patches.transpose(1, 2).reshape(height * width, block) + protect
    places, every = torch.arange(leads + height * width), protect + height * width * block
    return [
        Tile(grid, rows + i * every, at[leads:], torch.arange(protect) + i * every, at[:leads])
        for i in range(count)
        for at in [places + i * len(places)]
    ]


def tokenizer(attributes: dict[str, Any] | None = None, /, **special: int) -> PreTrainedTokenizerFast:
    """Words "w3".."w89" and the `special` ones, by their ids; "<image>" and "<video>" where none are given.

    Args:
        attributes: names by which a processor asks for them.
    """
    names = {PAD: "<pad>"} | {id_: f"<{name}>" for name, id_ in (special or dict(image=IMAGE, video=VIDEO)).items()}
    words = {names.get(i, f"w{i}"): i for i in range(VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    others = [name for id_, name in names.items() if id_ != PAD]
    reader = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="w2", additional_special_tokens=others, padding_side="left"
    )
    for name, value in (attributes or {}).items():
        setattr(reader, name, value)
    return reader


def without_videos(kind: type, *parts: Any, **settings: Any) -> Any:
    """A processor of this `kind` for images and text; its video processor would need torchvision, and is None."""
    unchecked = type(kind.__name__, (kind,), dict(check_argument_for_proper_class=lambda *_: None))
    return unchecked(*parts, **settings)


def _noise(seed: tuple, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.default_rng([*map(ord, seed[0]), seed[1], *shape])
    return generator.integers(0, 256, shape, dtype=np.uint8)
