"""Pictures of what policies keep of an image, layer by layer: a page to explore them, and PNGs to print."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..calibrate import encode_images
from ..models import patched, supported_models, trace
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
class Seen:
    """What became of the N tokens of an image's first tile under a policy, in raster order."""

    label: str
    policy: Policy
    grid: tuple[int, int]  # rows and columns of tokens, N together
    tiles: int  # of the image, of which this is the first
    layers: list[Layer]  # of the encoder
    stages: list[Stage]  # cuts, as far as their tokens are those of the grid
    hidden: int  # other cuts, behind the encoder
    decoder_layers: int  # of the language model; 0: there is none
    answer: str | None  # to the prompt, if there was one

    @property
    def left(self) -> int:
        """Tokens in the end."""
        return self.stages[-1].kept[0] if self.stages else math.prod(self.grid)


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
class Shown:
    """An image as a model is given it."""

    name: str
    picture: np.ndarray  # uint8 [H, W, 3] the first tile, after resizing and cropping
    inputs: dict[str, Any]  # of the processor
    prompt: str | None
    tokens: int  # visual tokens of the image, unpruned
    answer: str | None  # with all tokens, if there is a prompt


@torch.inference_mode()
def show(model: Any, processor: Any, image: Image.Image, name: str, prompt: str | None = None) -> Shown:
    """What `model` gets of an image and says to `prompt`; without one, nobody asks."""
    image = image.convert("RGB")
    if prompt is None:
        batch = images_of(processor)([image], return_tensors="pt")
    else:
        prompt = prompt.replace(processor.image_token, "").strip()
        batch = processor(images=[image], text=[_worded(processor, prompt)], return_tensors="pt")
    inputs: dict[str, Any] = {
        key: x.to(model.device, model.dtype if x.is_floating_point() else x.dtype) if isinstance(x, Tensor) else x
        for key, x in batch.items()
    }
    tokens = patches_of(getattr(model.config, "vision_config", model.config))
    if prompt is not None:
        tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    picture = as_picture(inputs["pixel_values"], images_of(processor))
    return Shown(name, picture, inputs, prompt, tokens, prompt and _answer(model, processor, inputs))


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
        ValueError: a model or settings that the policy does not fit, or a model that packs images of any size.
    """
    answer = None
    with patched(model, policy, record=True), watched(model, policy) as seen:
        if shown.prompt is None:
            encode_images(model, shown.inputs, "look: inputs")
        else:
            answer = _answer(model, processor, shown.inputs)
        stages = trace(model).stages
    grid, layers, depth = seen.grid, seen.layers, decoder_layers(model) or 0
    inside, behind = ([s for s in stages if (s.name == "encoder") == want] for want in (True, False))
    if behind:
        scores = behind[0].scores
        assert scores is not None
        side = math.isqrt(math.prod(grid) // scores.shape[1]) or 1  # of a square of patches that became one token
        if seen.tiles > 1 or side**2 * scores.shape[1] != math.prod(grid) or any(n % side for n in grid):
            return Seen(label, policy, grid, seen.tiles, layers, inside, len(behind), depth, answer)
        if side > 1:
            layers, grid = [_merged(layer, grid, side) for layer in layers], (grid[0] // side, grid[1] // side)
    return Seen(label, policy, grid, seen.tiles, layers, stages, 0, depth, answer)


def _merged(layer: Layer, grid: tuple[int, int], side: int) -> Layer:
    """Of squares of side x side patches, the means."""

    def mean(x: Tensor) -> Tensor:
        return x.unflatten(0, (grid[0] // side, side, grid[1] // side, side)).mean((1, 3)).flatten()

    score = None if layer.score is None else mean(layer.score)
    return Layer(mean(layer.attention), mean(layer.relevance), mean(layer.value_norm), layer.entropy, score)


def as_picture(pixels: torch.Tensor, image_processor) -> np.ndarray:
    """The first tile of what `image_processor` made, [.., 3, H, W], as uint8 [H, W, 3]."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (image_processor.image_mean, image_processor.image_std))
    picture = (pixels.flatten(0, -4)[0].float() * std + mean).clamp(0, 1).permute(1, 2, 0)
    return (picture * 255).round().byte().numpy()


def overlay(picture: np.ndarray, kept: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """`picture` with the tokens that are not kept washed out."""
    mask = np.zeros(math.prod(grid), bool)
    mask[kept] = True
    # Pixels are spread over rows and columns as evenly as they go.
    row, column = (np.arange(n) * cells // n for n, cells in zip(picture.shape, grid, strict=False))
    alive = mask.reshape(grid)[row[:, None], column][..., None]
    grey = picture.mean(-1, keepdims=True)
    faded = 0.22 * grey + 0.78 * 250
    return np.where(alive, picture, faded).astype(np.uint8)


def draw(shown: Shown, seen: Seen, path: Path) -> Path:
    """The image and one panel per cut, as a PNG."""
    from .plots import INK, MUTED, figure_grid, save

    picture, tokens = shown.picture, math.prod(seen.grid)
    figure, panels = figure_grid(len(seen.stages) + 1, picture.shape[1] / picture.shape[0])
    drawn = [("what the encoder sees", f"{tokens} tokens", picture)]
    for stage in seen.stages:
        kept = stage.indices[0, : stage.kept[0]].cpu().numpy()
        entropy = f", entropy {float(stage.entropy[0]):.2f}" if stage.entropy is not None else ""
        drawn.append((f"after {place_of(stage)}", f"{stage.kept[0]} kept{entropy}", overlay(picture, kept, seen.grid)))
    for panel, (head, detail, image) in zip(panels, drawn, strict=False):
        panel.imshow(image, interpolation="nearest")
        panel.set_title(head, fontsize=11, color=INK, loc="left", pad=16)
        panel.text(0, 1.02, detail, transform=panel.transAxes, fontsize=9, color=MUTED, va="bottom")
    figure.suptitle(f"{seen.label}: {seen.left} of {tokens} tokens", x=0.005, ha="left", fontsize=13, color=INK)
    return save(figure, path)


def place_of(stage: Stage) -> str:
    """Where a cut is, in words."""
    return f"{WHERE[stage.name]}, layer {stage.layer}" if stage.layer >= 0 else WHERE[stage.name]


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
