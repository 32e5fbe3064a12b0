"""Pruning for serving engines that have model code of their own: how many tokens stay, and which.

An engine lays out a prompt before it encodes an image, so that it must know beforehand how many tokens will be left;
afterwards it needs to know which. docs/serving.md shows how a plugin calls the two.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig

from .._ops import Select
from ..models import adapter_of, supported_models
from ..models._features import PrunedFeatures, heeding
from ..models._shuffle import ShuffledImages
from ..ops import score_select
from ..policies.base import Policy


def retained_count(
    config: PreTrainedConfig,
    policy: Policy,
    image_sizes: Sequence[Sequence[int]] | Tensor | None = None,
    *,
    modality: str = "image",
    pixel_shape: Sequence[int] | None = None,
    batch_num_images: Sequence[int] | None = None,
    processor: Any | None = None,
) -> list[int]:
    """Tokens of every image that enter the language model, exactly, before anything is encoded.

    Args:
        config: of one of the whole models of :func:`~flowcut_kernels.supported_models`.
        policy: as for :func:`~flowcut_kernels.patch`.
        image_sizes: of each image what the processor says of it: (height, width) in pixels, or for Qwen-VL its grid
            (frames, rows, columns) of patches; with `processor` always (height, width).
        modality: "image" or "video".
        pixel_shape: of the processor's pixel values, where the count follows from it: of videos without grids
            [videos, frames, 3, height, width]; of one image of InternVL [tiles, 3, height, width], of Idefics3 or
            SmolVLM [1, tiles, 3, height, width], thumbnail included.
        batch_num_images: of LLaVA-OneVision as its processor says, how many images each prompt has, where one has
            several: then their base views are all there is of them.
        processor: the model's, where (height, width) alone does not say how many tiles (InternVL, Idefics3, SmolVLM) or
            patches (Qwen-VL) an image becomes; its image processor alone does where the processor changes nothing of
            its settings, which InternVL's does. Tiles are as large as the configuration says.

    Returns:
        A count for each image or video, in order. What the language model drops later on is not counted.

    Raises:
        TypeError: a configuration of another model, or none.
        ValueError: a modality that the model does not have, sizes that are missing or of another kind, a processor that
            does not count patches, or a policy that knows its counts only afterwards (``VFlowOpt.release``) or does not
            fit the model.
    """
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(
            f"config is a {type(config).__name__}, but what is needed is the model's configuration of transformers, as "
            "AutoConfig.from_pretrained returns it"
        )
    kind: Any = type(config)  # mypy takes a dataclass for something without a hash
    found = _features(kind, json.dumps(config.to_dict(), sort_keys=True, default=str), policy)
    features = next((each for each in found if each.kind.modality == modality), None)
    if features is None:
        known = ", ".join(each.kind.modality for each in found)
        raise ValueError(f"modality={modality!r} but this model has: {known}")
    if image_sizes is None and pixel_shape is None:
        raise ValueError("retained_count: give image_sizes, or pixel_shape where the count follows from it")
    visuals, by_processor = features.kind, processor is not None and modality == "image"
    counted = by_processor and (bool(visuals.grid) or isinstance(visuals, ShuffledImages))
    grids = bool(visuals.grid) and not counted
    side = visuals.model.visual.spatial_merge_size if grids else 1
    sizes = None if image_sizes is None else _sizes(image_sizes, modality, grids, side)
    if counted and sizes is not None:
        patches = _patches(processor, sizes)
        counts = {n: retained_count(config, policy, **_of_patches(visuals, n))[0] for n in {*patches}}
        return [counts[n] for n in patches]
    shape = (len(sizes or ()), *(0,) * (4 if modality == "video" else 3))
    if pixel_shape is not None and not grids:  # which say more than the patches of all in a row
        alone = sizes is None and isinstance(visuals, ShuffledImages)
        shape = _shape(pixel_shape, modality, visuals.apart if alone else None)
    pixels = torch.ones((), device="cpu").expand(shape)
    table = torch.tensor(sizes or (), dtype=torch.int64, device="cpu").view(-1, 3 if grids else 2)
    given = {} if sizes is None else {f"{modality}_grid_thw" if grids else "image_sizes": table}
    arguments: dict[str, Any] = dict(batch_num_images=batch_num_images, **given)
    with heeding():
        if pixel_shape is None:  # then there are no pixels to count by
            areas = [layout.area for layout in visuals.layouts(pixels, arguments)]
            if len(areas) < len(pixels) or 0 in areas:
                raise ValueError(
                    f"image_sizes alone does not say how many tokens the {modality}s of {kind.__name__} have: give "
                    "pixel_shape, or of images the processor"
                )
        if sizes is None and modality == "image":  # one run of placeholders
            run = np.ones((1, sum(layout.full for layout in visuals.layouts(pixels, arguments))), bool)
            visuals.heed(pixels, run, dict(input_ids=torch.from_numpy(run)))
        kept = features.counts(pixels, arguments)
    if sizes is not None and len(kept) != len(sizes):
        raise ValueError(
            f"image_sizes={image_sizes!r} are {len(sizes)} {modality}s, but pixel_shape={pixel_shape!r} has "
            f"{len(kept)}: give one of the two"
        )
    if None in kept:
        raise ValueError(f"{policy} knows how many tokens it leaves only once they are chosen")
    return [n + visuals.leading for n in kept if n is not None]


def _plain(x: Any) -> Any:
    """Lists in the place of arrays and tensors."""
    return x.tolist() if hasattr(x, "tolist") else x


def _sizes(given: Any, modality: str, grids: bool, side: int) -> list[tuple[int, ...]]:
    """Sizes of each image, however they come; of grids the rows and columns are multiples of `side`."""
    try:
        sizes = [tuple(index(_plain(x)) for x in _plain(one)) for one in _plain(given)]
    except TypeError:
        sizes = [()]
    if any(len(one) != (3 if grids else 2) or min(one) < 1 or any(n % side for n in one[-2:]) for one in sizes):
        parts = f"(frames, rows, columns) of patches, the last two multiples of {side}" if grids else "(height, width)"
        other = "; with processor=, of images (height, width)" if grids and modality == "image" else ""
        raise ValueError(
            f"image_sizes={given!r} must be a list with {parts}, of each {modality}: whole numbers above 0{other}"
        )
    return sizes


def _shape(given: Any, modality: str, apart: bool | None) -> tuple[int, ...]:
    """A shape of pixel values, however it comes.

    Args:
        apart: whether images have tiles in a dimension of their own; None: they may have.
    """
    names = "images or tiles, 3, height, width"
    if modality == "video" or apart:
        names = "1, tiles, 3, height, width" if apart else "videos, frames, 3, height, width"
    lengths = {names.count(",") + 1} | ({5} if apart is None else set())
    try:
        shape = tuple(index(_plain(n)) for n in _plain(given))
    except TypeError:
        shape = ()
    if len(shape) not in lengths or min(shape) < 0 or (apart and shape[0] != 1):
        raise ValueError(f"pixel_shape={given!r} must be that of the processor's pixel values, [{names}]")
    return shape


def _patches(processor: Any, sizes: list[tuple[int, ...]]) -> list[int]:
    """What a processor makes of images of (height, width), its own settings for its image processor included."""
    if hasattr(processor, "_get_num_multimodal_tokens"):  # under this name for serving engines
        return processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_patches"]
    processor = getattr(processor, "image_processor", processor)
    if not hasattr(processor, "get_number_of_image_patches"):
        raise ValueError(
            f"processor={type(processor).__name__} does not say how many patches an image has: pass the model's, of "
            "AutoProcessor.from_pretrained"
        )
    found = [processor.get_number_of_image_patches(*size) for size in sizes]
    return [n[0] if isinstance(n, tuple) else n for n in found]  # Idefics3's come with rows and columns


def _of_patches(kind: Any, patches: int) -> dict[str, Any]:
    """Arguments of `retained_count` for an image of which the processor makes so many tiles, or patches."""
    if kind.grid:  # how many they are is all that matters of rows and columns
        side = kind.model.visual.spatial_merge_size
        return dict(image_sizes=[(1, side, patches // side)])
    edge = kind.model.config.vision_config.image_size
    height, width = (edge, edge) if isinstance(edge, int) else edge
    shape = max(patches, 1), 3, height, width  # Idefics3's counts no tiles where there is one
    return dict(pixel_shape=(1, *shape) if kind.apart else shape)


def retention_mask(scores: Tensor, full: Sequence[int], kept: Sequence[int], *, backend: str | None = None) -> Tensor:
    """Which tokens stay, by score: exactly ``kept[i]`` of image i.

    Args:
        scores: float32 or float64 [T] of the images' tokens, one image after another, T = sum(full). For example the S
            of :func:`~flowcut_kernels.ops.anchor_stats_select` at the last layer of an encoder.
        full: tokens of each image.
        kept: tokens to keep of each, as :func:`retained_count` says.
        backend: see docs/install.md.

    Returns:
        bool [T] on the device of the scores; ties go to the earlier token.

    Raises:
        TypeError: scores that are no float32 or float64 tensor.
        ValueError: numbers that do not fit each other, or scores that are not finite.
    """
    if not isinstance(scores, Tensor) or scores.dtype not in (torch.float32, torch.float64):
        found = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores must be a float32 or float64 tensor, got {found}")
    try:
        full, kept = ([index(_plain(n)) for n in _plain(x)] for x in (full, kept))
    except TypeError:
        raise ValueError(f"full={full!r}, kept={kept!r}: give lists of whole numbers, one for each image") from None
    if scores.dim() != 1 or len(scores) != sum(full):
        raise ValueError(f"scores must be [{sum(full)}] = [sum(full)], got {tuple(scores.shape)}")
    if len(kept) != len(full) or any(not 0 < k <= n for k, n in zip(kept, full, strict=True)):
        raise ValueError(f"kept={list(kept)} must name 1 to all of the tokens of each image, full={list(full)}")
    if not len(full):
        return torch.zeros_like(scores, dtype=torch.bool)
    device = scores.device
    budgets = torch.tensor(kept, dtype=torch.int32, device=device)
    _, chosen, lengths = score_select(
        None, None, pad_sequence(scores.split(full), batch_first=True),
        lengths=torch.tensor(full, dtype=torch.int32, device=device),
        mode=Select.FIXED, budget=max(kept), budgets=budgets, backend=backend,
    )  # fmt: skip
    if bool((lengths < 0).any()):
        raise ValueError("scores hold NaN or Inf: check the pixels, and the weights' dtype")
    first = torch.tensor([0, *full[:-1]], device=device).cumsum(0)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[(chosen + first[:, None])[chosen >= 0]] = True
    return mask


@lru_cache(maxsize=16)
def _features(kind: Any, text: str, policy: Policy) -> list[PrunedFeatures]:
    """What patching would put in place of the methods that make a model's features; its weights are never made."""
    classes: list[Any] = list(supported_models())
    model_class = next((m for m in classes if m.config_class is kind), None)
    if model_class is None:
        names = ", ".join(m.config_class.__name__ for m in classes)
        raise TypeError(f"{kind.__name__} is of no supported model; supported: {names}")
    with torch.device("meta"):
        model = model_class._from_config(kind.from_dict(json.loads(text)))
    _, replacements = adapter_of(model, policy).replacements(
        model, policy, record=False, backend="reference", compact_cache=False
    )
    found = [replacement for _, _, replacement in replacements if isinstance(replacement, PrunedFeatures)]
    if not found:
        raise TypeError(f"{kind.__name__} is of a vision tower alone: give the configuration of a whole model")
    return found
