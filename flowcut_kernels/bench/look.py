"""Pictures of what a policy keeps, cut by cut."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..models import patched, supported_models, trace
from ..policies import FlowCut, Policy, RandomTokens, UniformTokens
from ..trace import Trace

POLICIES = {
    "flowcut": lambda tokens: FlowCut(target_tokens=tokens),
    "flowcut-release": lambda tokens: FlowCut.release(target_tokens=tokens),
    "random": lambda tokens: RandomTokens(target_tokens=tokens),
    "uniform": lambda tokens: UniformTokens(target_tokens=tokens),
}


def load_model(name: str):
    """The shipped stand-in ("mini"), or a model folder or hub name of a supported class: (model, image processor)."""
    if name == "mini":
        from . import mini_vlm

        model, processor = mini_vlm.load()
        return model, processor.image_processor
    import transformers

    config = transformers.AutoConfig.from_pretrained(name)
    known = {kind.__name__: kind for kind in supported_models()}
    kind: Any = next((known[a] for a in config.architectures or () if a in known), None)
    if kind is None:
        raise ValueError(f"{config.architectures} is not supported: use a model of {', '.join(known)}")
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    except ImportError as error:  # older transformers load no image processor without it
        raise ValueError(f"transformers {transformers.__version__} needs torchvision here: pip install it") from error
    return kind.from_pretrained(name).eval(), processor


@torch.inference_mode()
def look(model, image_processor, image: Image.Image, policy: Policy) -> tuple[np.ndarray, Trace]:
    """What the encoder sees (uint8 [H, W, 3], after resizing and cropping) and the cuts it makes."""
    pixels = image_processor([image.convert("RGB")], return_tensors="pt")["pixel_values"].to(model.dtype)
    with patched(model, policy, record=True):
        if hasattr(model, "get_image_features"):
            model.get_image_features(pixels)
        else:
            model(pixels)
        seen = trace(model)
    return as_picture(pixels, image_processor), seen


def as_picture(pixels: torch.Tensor, image_processor) -> np.ndarray:
    """The first tile of what `image_processor` made, [.., 3, H, W], as uint8 [H, W, 3]."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (image_processor.image_mean, image_processor.image_std))
    picture = (pixels.flatten(0, -4)[0].float() * std + mean).clamp(0, 1).permute(1, 2, 0)
    return (picture * 255).round().byte().numpy()


def overlay(picture: np.ndarray, kept: np.ndarray, patches: int) -> np.ndarray:
    """`picture` with the patches that are not kept washed out and a thin grid."""
    side = round(patches**0.5)
    patch = picture.shape[0] // side
    mask = np.zeros(patches, bool)
    mask[kept] = True
    alive = np.kron(mask.reshape(side, side), np.ones((patch, patch), bool))[..., None]
    grey = picture.mean(-1, keepdims=True)
    faded = 0.22 * grey + 0.78 * 250
    return np.where(alive, picture, faded).astype(np.uint8)


def draw(picture: np.ndarray, seen: Trace, patches: int, path: Path, title: str) -> None:
    """The image and one panel per cut, as a PNG."""
    from .plots import INK, MUTED, figure_grid, save

    figure, panels = figure_grid(len(seen.stages) + 1, picture.shape[1] / picture.shape[0])
    shown = [("what the encoder sees", f"{patches} patches", picture)]
    for stage in seen.stages:
        kept = stage.indices[0, : stage.kept[0]].numpy()
        entropy = f", entropy {float(stage.entropy[0]):.2f}" if stage.entropy is not None else ""
        shown.append((f"after layer {stage.layer}", f"{stage.kept[0]} kept{entropy}", overlay(picture, kept, patches)))
    for panel, (head, detail, image) in zip(panels, shown, strict=False):
        panel.imshow(image, interpolation="nearest")
        panel.set_title(head, fontsize=11, color=INK, loc="left", pad=16)
        panel.text(0, 1.02, detail, transform=panel.transAxes, fontsize=9, color=MUTED, va="bottom")
    figure.suptitle(title, x=0.02, ha="left", fontsize=13, color=INK)
    save(figure, path)


def file_name(image: Path, *words: object) -> str:
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", image.stem) or "image"
    return "-".join(map(str, (stem, *words))) + ".png"
