"""Pictures of what policies keep of an image, layer by layer: a page to explore them, and PNGs to print."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..calibrate import encode_images
from ..models import patched, supported_models, trace
from ..models._features import Kind
from ..policies import Policy
from ..trace import Stage
from .contenders import INSIDE, KNOWN, contender
from .shapes import patches_of
from .watch import Layer, watched

WHERE = {"encoder": "encoder", "features": "projector", "llm": "language model"}  # by a stage's name
WORDS = 16  # of an answer, at most


@dataclass(frozen=True)
class Choice:
    """A policy as it was asked for, without a budget."""

    label: str
    name: str  # of a contender
    fields: dict[str, Any]

    def policy(self, tokens: int, layers: int | None, of: int) -> Policy:
        """With `tokens` of an image's `of` on average over the `layers` of a language model, None where there is none.

        Raises:
            ValueError, TypeError: a budget that cannot be reached, or fields that make no policy.
        """
        if layers is None and self.name in INSIDE:
            raise ValueError("a vision tower alone has no language model to cut in: give the whole model")
        policy = contender(self.name, min(tokens, of), layers or 1, of)
        known = [field.name for field in dataclasses.fields(policy)]
        unknown = [name for name in self.fields if name not in known]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no field of {type(policy).__name__}: it has {', '.join(known)}")
        return dataclasses.replace(policy, **self.fields)


def choices(texts: Sequence[str]) -> list[Choice]:
    """Names of policies, commas between them, fields in brackets: "flowcut(interval=3),random".

    Raises:
        ValueError: an unknown name, or what is no such list.
    """
    found = []
    for text in texts:
        try:
            tree = ast.parse(re.sub(r"(?<=[a-z])-(?=[a-z])", "_", text.strip()), mode="eval").body
        except SyntaxError as error:
            raise ValueError(f"{text!r} is no list of policies, such as flowcut(interval=3),random") from error
        for node in tree.elts if isinstance(tree, ast.Tuple) else [tree]:
            called = node.func if isinstance(node, ast.Call) and not node.args else node
            name = ast.unparse(called).replace("_", "-")
            if name not in KNOWN:
                raise ValueError(f"{name!r} is unknown: use {', '.join(KNOWN)}")
            fields = {str(k.arg): _value(k) for k in getattr(node, "keywords", ())}
            given = ", ".join(f"{field}={value!r}" for field, value in fields.items())
            found.append(Choice(f"{name}({given})" if given else name, KNOWN[name], fields))
    return found


def _value(keyword: ast.keyword) -> Any:
    try:
        return ast.literal_eval(keyword.value)
    except ValueError as error:
        raise ValueError(f"{ast.unparse(keyword)} is no value: numbers, tuples, words in quotes") from error


@dataclass(frozen=True)
class Cut:
    """What is left of the N tokens of each of an image's T tiles."""

    place: str  # a stage's name
    layer: int
    kept: int  # tokens, as the trace counts them there
    alive: Tensor  # bool [T, N]
    merged: Tensor | None = None  # bool [T, N] tokens that stand for others too
    scores: Tensor | None = None  # float [T, N] by which it was cut, NaN for tokens that were gone before
    entropy: float | None = None  # ratio, of several tiles the mean

    @property
    def where(self) -> str:
        """In words."""
        return WHERE[self.place] if self.place == "features" else f"{WHERE[self.place]}, layer {self.layer}"


@dataclass(frozen=True)
class Seen:
    """What became of the N tokens of each of an image's T tiles under a policy, in raster order."""

    label: str
    policy: Policy
    grid: tuple[int, int]  # rows and columns of a tile's tokens, N together
    layers: list[Layer]  # of the encoder
    cuts: list[Cut]
    decoder_layers: int  # of the language model; 0: there is none
    answer: str | None  # to the prompt, if there was one
    newlines: int = 0  # tokens that the model puts among those of the tiles
    resized: bool = False  # whether a token of the language model is a mean of several of the tiles'


def load_model(name: str):
    """The shipped stand-in ("mini"), or a model folder or hub name of a supported class: (model, processor).

    Of a bare vision tower the image processor.
    """
    if name == "mini":
        from . import mini_vlm

        return mini_vlm.load()
    import transformers

    config = transformers.AutoConfig.from_pretrained(name)
    known = {kind.__name__: kind for kind in supported_models()}
    kind: Any = next((known[a] for a in config.architectures or () if a in known), None)
    if kind is None:
        raise ValueError(f"{config.architectures} is not supported: use a model of {', '.join(known)}")
    reader = transformers.AutoProcessor if hasattr(kind, "generate") else transformers.AutoImageProcessor
    try:
        processor = reader.from_pretrained(name)
    except ImportError as error:  # older transformers load no image processor without it
        raise ValueError(f"transformers {transformers.__version__} needs torchvision here: pip install it") from error
    return kind.from_pretrained(name).eval(), processor


def images_of(processor: Any) -> Any:
    """The image processor of a processor, or itself."""
    return getattr(processor, "image_processor", processor)


def decoder_layers(model: Any) -> int | None:
    """Layers of the language model; None for a vision tower alone."""
    return model.config.get_text_config().num_hidden_layers if hasattr(model, "generate") else None


@dataclass(frozen=True)
class View:
    """Tiles of an image side by side, as the model is given them."""

    name: str  # empty where an image has one view
    picture: np.ndarray  # uint8 [H, W, 3]
    tiles: tuple[tuple[int, ...], ...]  # their numbers, by rows and columns

    def lay(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x [T, N] of the tokens of all tiles, `grid` of them in a tile, in raster order of this picture."""
        return _side_by_side(x[torch.tensor(self.tiles)].unflatten(2, grid)).flatten()

    def grid(self, tile: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens, `tile` of them in a tile."""
        return len(self.tiles) * tile[0], len(self.tiles[0]) * tile[1]


@dataclass(frozen=True)
class Shown:
    """An image as a model is given it."""

    name: str
    views: list[View]
    inputs: dict[str, Any]  # of the processor
    prompt: str | None
    tokens: int  # visual tokens of the image, unpruned
    answer: str | None  # with all tokens, if there is a prompt


@torch.inference_mode()
def show(model: Any, processor: Any, image: Image.Image, name: str, prompt: str | None = None) -> Shown:
    """What `model` gets of an image and says to `prompt`; without one, nobody asks."""
    image, reader = image.convert("RGB"), images_of(processor)
    if prompt is None:
        read = partial(reader, return_tensors="pt")
    else:
        prompt = prompt.replace(processor.image_token, "").strip()
        read = partial(processor, text=[_worded(processor, prompt)], return_tensors="pt")
    batch = read(images=[image])
    inputs: dict[str, Any] = {
        key: x.to(model.device, model.dtype if x.is_floating_point() else x.dtype) if isinstance(x, Tensor) else x
        for key, x in batch.items()
    }
    views = views_of(image, lambda image: as_pictures(read(images=[image]), reader))
    tiles = sum(len(row) for view in views for row in view.tiles)
    if prompt is None:
        tokens = tiles * patches_of(getattr(model.config, "vision_config", model.config))
    else:
        tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    answer = prompt and _answer(model, processor, inputs)
    return Shown(name, views, inputs, prompt, tokens, answer)


def _worded(processor: Any, prompt: str) -> str:
    """A prompt with the image in front, in the form that a model was trained on."""
    if getattr(processor, "chat_template", None):
        content = [dict(type="image"), dict(type="text", text=prompt)]
        return processor.apply_chat_template([dict(role="user", content=content)], add_generation_prompt=True)
    return f"{processor.image_token} {prompt}"


def _answer(model: Any, processor: Any, inputs: dict[str, Any]) -> str:
    written = model.generate(**inputs, max_new_tokens=WORDS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(written, skip_special_tokens=True).strip()


@torch.inference_mode()
def look(model: Any, processor: Any, shown: Shown, policy: Policy, label: str) -> Seen:
    """What `policy` finds and cuts in every layer, and what the model then says to the prompt.

    Raises:
        ValueError: a model or settings that the policy does not fit.
    """
    answer = None
    with patched(model, policy, record=True), watched(model, policy) as seen:
        if shown.prompt is None:
            encode_images(model, shown.inputs, "look: inputs")
        else:
            answer = _answer(model, processor, shown.inputs)
        stages = trace(model).stages
    grid, layers, kind = seen.grid, seen.layers, seen.kind
    side = kind.side if kind is not None and seen.block == 1 else 1
    if side > 1:  # patches by themselves, where nothing is dropped
        layers, grid = [_merged(layer, grid, side) for layer in layers], (grid[0] // side, grid[1] // side)
    tiles = len(layers[0].attention)
    alive = torch.ones(tiles, math.prod(grid), dtype=torch.bool)
    behind = [stage for stage in stages if stage.name != "encoder"]
    cuts = [_cut(stage, alive.shape) for stage in stages if stage.name == "encoder"]
    newlines, resized = 0, False
    if kind is not None and (behind or not cuts):
        made = _Assembly(kind, shown.inputs, alive.shape, len(behind[0].kept) if behind else 1)
        used = made.back(torch.ones(len(made.places), max(made.places))) > 0
        newlines, resized = made.newlines, sum(made.places) - made.newlines < int(used.sum())
        features = bool(behind) and behind[0].name == "features"
        if not cuts and not features and not used.all():  # tokens of a tile's padding, which the model leaves out
            cuts.append(Cut("features", -1, shown.tokens, used))
        cuts += [_cut(stage, alive.shape, made) for stage in behind]
    for i, cut in enumerate(cuts):
        alive = alive & cut.alive
        cuts[i] = dataclasses.replace(cut, alive=alive)
    return Seen(label, policy, grid, layers, cuts, decoder_layers(model) or 0, answer, newlines, resized)


def _cut(stage: Stage, shape: Sequence[int], made: _Assembly | None = None) -> Cut:
    """A stage in terms of the tokens of tiles, from which its own were `made`."""
    indices, scores = stage.indices.cpu(), None if stage.scores is None else stage.scores.float().cpu()
    tokens = max(made.places) if made else shape[1]

    def marks(some: Tensor) -> Tensor:
        found = torch.zeros(len(indices), tokens + 1)  # the rest of a shorter row writes to a spare column
        found.scatter_(1, indices.where(some, tokens).clamp_max(tokens), 1)
        return (made.back(found) if made else found[:, :-1]) > 0

    if made and scores is not None:
        scores = made.back(scores.nan_to_num(0, 0, 0)) / made.back(scores.isfinite().float())  # 0 / 0: has none
    return Cut(
        stage.name, stage.layer, sum(stage.kept), marks(indices >= 0),
        None if stage.recycled is None else marks(stage.recycled.cpu() & (indices >= 0)), scores,
        None if stage.entropy is None else float(stage.entropy.mean()),
    )  # fmt: skip


class _Assembly:
    """How a model makes its visual tokens from those of an image's tiles: stitched, unpadded, resized, newlines added.

    Ones and newlines of zero are sent through the model's own code, and gradients tell what became of each token.
    """

    def __init__(self, kind: Kind, inputs: dict[str, Any], shape: Sequence[int], images: int) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            self.tokens = torch.ones(*shape, 1, requires_grad=True)
            parts = self.tokens.split(shape[0] // images)
            self.made = [x[:, 0] for x in kind.assemble(parts, inputs, self.tokens.new_zeros(1))]
        self.places = [len(x) for x in self.made]
        self.newlines = sum(int((x == 0).sum()) for x in self.made)

    def back(self, weights: Tensor) -> Tensor:
        """[T, N] for each token of the tiles: `weights` [B, n] of the visual tokens it has a part in, times that."""
        with torch.inference_mode(False), torch.enable_grad():
            total = sum((x * w[: len(x)].clone()).sum() for x, w in zip(self.made, weights, strict=True))
            return torch.autograd.grad(total, self.tokens, retain_graph=True)[0][..., 0]


def _merged(layer: Layer, grid: tuple[int, int], side: int) -> Layer:
    """Of squares of side x side patches, the means."""

    def mean(x: Tensor) -> Tensor:
        return x.unflatten(1, (grid[0] // side, side, grid[1] // side, side)).mean((2, 4)).flatten(1)

    score = None if layer.score is None else mean(layer.score)
    return Layer(mean(layer.attention), mean(layer.relevance), mean(layer.value_norm), layer.entropy, score)


def _side_by_side(x: Tensor) -> Tensor:
    """Tiles [rows, columns, h, w, ...] as one picture [rows * h, columns * w, ...]."""
    return x.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def as_pictures(batch: Any, image_processor: Any) -> Tensor:
    """Tiles of the image that `image_processor` made `batch` of, as uint8 [T, H, W, 3]."""
    pixels = batch["pixel_values"]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (image_processor.image_mean, image_processor.image_std))
    if "image_grid_thw" in batch:  # of packed patches [R, 3 * images * p * p], block by block
        side, size = image_processor.merge_size, image_processor.patch_size
        _, rows, columns = batch["image_grid_thw"][0].tolist()
        patches = pixels.view(rows // side, columns // side, side, side, 3, -1, size, size)[..., 0, :, :]
        pixels = patches.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, rows * size, columns * size)
    pictures = (pixels.flatten(0, -4).float() * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
    return (pictures * 255).round().byte()


def views_of(image: Image.Image, read: Callable[[Image.Image], Tensor]) -> list[View]:
    """The tiles that `read` cuts an image into, side by side where they lie in it, then each that shows all of it.

    Side by side they read as one picture, which needs no selector and fits any width. Where they lie is asked of the
    processor itself: it gets a picture of the same size whose red says how far right and whose green how far down,
    and whose blue is missing in what it pads with.
    """
    pictures = read(image)
    if len(pictures) == 1:
        return [View("", pictures[0].numpy(), ((0,),))]
    right, down = np.meshgrid(*(np.linspace(0, 255, n) for n in image.size))
    ramps = np.stack([right, down, np.full_like(right, 255)], -1).round().astype(np.uint8)
    place, inside = read(Image.fromarray(ramps)).float().flatten(1, 2).split((2, 1), 2)
    inside = inside > 127
    span = place.where(inside, 0).amax(1) - place.where(inside, 255).amin(1)
    middle = (place * inside).sum(1) / inside.sum(1)
    whole = (span > 0.9 * 255).all(1)
    parts, overviews = ((whole == want).nonzero()[:, 0].tolist() for want in (False, True))
    rows = _rows(parts, middle) if parts else []
    name = "overview" if len(overviews) == 1 else "overview, tile {}"  # a small image may be one tile besides
    views = [View(name.format(i + 1), pictures[i].numpy(), ((i,),)) for i in overviews]
    if not rows:
        return [View(f"tile {i + 1}", pictures[i].numpy(), ((i,),)) for i in parts] + views
    together = _side_by_side(pictures[torch.tensor(rows)]).numpy()
    return [View(f"{len(rows)} by {len(rows[0])} tiles", together, tuple(map(tuple, rows))), *views]


def _rows(parts: list[int], middle: Tensor) -> list[list[int]] | None:
    """Tiles whose middles are `middle` [T, 2] (right, down) as rows of a grid; None where they make none."""
    ends = (middle[parts, 0].diff() < 5).nonzero()[:, 0].tolist()  # where the next one lies no further right
    columns = ends[0] + 1 if ends else len(parts)
    if len(parts) % columns:
        return None
    places = middle[parts].unflatten(0, (-1, columns))
    rows, lines = places[..., 1], places[..., 0].T
    even = all(bool((x.amax(1) - x.amin(1) < 5).all()) for x in (rows, lines))
    return torch.tensor(parts).view(-1, columns).tolist() if even else None


def overlay(picture: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """`picture` with the tokens washed out that are not `alive` (bool [rows, columns])."""
    # Pixels are spread over rows and columns as evenly as they go.
    row, column = (np.arange(n) * cells // n for n, cells in zip(picture.shape, alive.shape, strict=False))
    grey = picture.mean(-1, keepdims=True)
    faded = 0.22 * grey + 0.78 * 250
    return np.where(alive[row[:, None], column][..., None], picture, faded).astype(np.uint8)


def draw(shown: Shown, seen: Seen, path: Path) -> Path:
    """The image and one panel per cut, as a PNG; views one below the other."""
    from .plots import INK, MUTED, figure_grid, save

    def panel(alive: Tensor | None = None) -> np.ndarray:
        pictures = [
            view.picture
            if alive is None
            else overlay(view.picture, view.lay(alive, seen.grid).view(view.grid(seen.grid)).numpy())
            for view in shown.views
        ]
        width = max(picture.shape[1] for picture in pictures)
        gaps = [0, *[width // 24] * (len(pictures) - 1)]
        sides = [((gap, 0), (0, width - x.shape[1]), (0, 0)) for gap, x in zip(gaps, pictures, strict=True)]
        return np.concatenate([np.pad(x, side, constant_values=255) for x, side in zip(pictures, sides, strict=True)])

    whole, tokens = panel(), seen.layers[0].attention.numel()
    figure, panels = figure_grid(len(seen.cuts) + 1, whole.shape[1] / whole.shape[0])
    drawn = [("what the encoder sees", f"{tokens} tokens", whole)]
    for cut in seen.cuts:
        entropy = f", entropy {cut.entropy:.2f}" if cut.entropy is not None else ""
        drawn.append((f"after {cut.where}", f"{cut.kept} kept{entropy}", panel(cut.alive)))
    for axes, (head, detail, image) in zip(panels, drawn, strict=False):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(head, fontsize=11, color=INK, loc="left", pad=16)
        axes.text(0, 1.02, detail, transform=axes.transAxes, fontsize=9, color=MUTED, va="bottom")
    left = seen.cuts[-1].kept if seen.cuts else shown.tokens
    figure.suptitle(f"{seen.label}: {left} of {shown.tokens} tokens", x=0.005, ha="left", fontsize=13, color=INK)
    return save(figure, path)


def opened(paths: Sequence[Path]) -> dict[str, Image.Image]:
    """Pictures by the names of their files, numbered where two are the same.

    Raises:
        ValueError: a file that holds no picture.
    """
    found: dict[str, Image.Image] = {}
    for path in paths:
        name, number = path.name, 1
        while name in found:
            number += 1
            name = f"{path.stem} {number}{path.suffix}"
        try:
            found[name] = Image.open(path).convert("RGB")
        except OSError as error:
            raise ValueError(f"{path.name} cannot be read as a picture: {error}") from error
    return found


def file_name(*words: object) -> str:
    """Of a PNG, in letters that every system takes."""
    return re.sub(r"[^A-Za-z0-9]+", "-", " ".join(map(str, words))).strip("-") + ".png"
