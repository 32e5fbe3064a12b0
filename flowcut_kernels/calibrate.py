"""Freeze an adaptive policy: per-layer counts from sample images instead of a decision per image."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .models import patched, trace
from .models._features import PrunedFeatures, heeding
from .policies import FlowCut


def calibrate(
    model: nn.Module, policy: FlowCut, inputs: Mapping[str, Any] | Tensor | Iterable[Mapping[str, Any] | Tensor]
) -> FlowCut:
    """The same policy with the mean schedule of sample images.

    An encoder patched with the result has static shapes and reads nothing back (of Qwen-VL: docs/static_shapes.md):
    it can be captured as a CUDA graph and compiled as one graph. Which tokens go is still decided by every image; only
    how many is fixed.

    Args:
        model: an unpatched instance of one of :func:`supported_models`.
        policy: the policy to freeze; a schedule it has already is replaced.
        inputs: one batch of processor output or pixel values, or several of them, of the sizes that are to come. Only
            images are looked at, and where a prompt says which tiles are one (InternVL, Idefics3, SmolVLM), that.

    Returns:
        ``policy`` with ``schedule``: for every cut the mean over all images of what they kept, rounded half to even.
        Images of different sizes, or of several tiles, which have budgets of their own: the mean share of what each had
        above its budget, to four digits; such a schedule fits images of any size.

    Raises:
        TypeError: a policy that adapts to nothing, or inputs of another type.
        ValueError: no images, or a model that is patched.
    """
    if not isinstance(policy, FlowCut):
        raise TypeError(f"calibrate: {type(policy).__name__} has no per-image counts to freeze; use a FlowCut policy")
    if not isinstance(inputs, Iterable):
        raise TypeError(f"calibrate: inputs is {type(inputs).__name__}; give processor output, or a list of it")
    batches = [inputs] if isinstance(inputs, Mapping | Tensor) else list(inputs)
    if not batches:
        raise ValueError("calibrate: inputs is empty; give at least one batch of images")
    # Per image or tile: tokens, what was left, and layer -> kept there.
    seen: list[tuple[int, int, dict[int, int]]] = []
    with torch.no_grad(), patched(model, replace(policy, schedule=None), record=True):
        for number, batch in enumerate(batches):
            encode_images(model, batch, f"calibrate: inputs[{number}]")
            stages = [stage for stage in trace(model).stages if stage.name == "encoder"]
            if not stages:
                continue
            assert stages[0].scores is not None
            for image, tokens in enumerate(stages[0].scores.isfinite().sum(1).tolist()):
                left = stages[-1].kept[image]
                if left < tokens:
                    seen.append((tokens, left, {stage.layer: stage.kept[image] for stage in stages}))
    # A batch that reached its budget early has no later stages.
    layers = sorted({layer for *_, kept in seen for layer in kept})
    kinds = {(tokens, left) for tokens, left, _ in seen}
    counts = len(kinds) == 1 and all(left == policy.encoder_budget(tokens) for tokens, left in kinds)
    schedule: list[tuple[int, float]] = []
    last: float = min(kinds)[0] if counts else 1.0
    for layer in layers:
        mean: float
        if counts:
            mean = round(sum(kept.get(layer, left) for _, left, kept in seen) / len(seen))
        else:
            shares = [(kept.get(layer, left) - left) / (tokens - left) for tokens, left, kept in seen]
            mean = round(sum(shares) / len(seen), 4)
        if mean < last:  # a cut that drops nothing is none
            schedule.append((layer, mean))
            last = mean
    return replace(policy, schedule=tuple(schedule) or None)


def encode_images(model: nn.Module, inputs: Mapping[str, Any] | Tensor, name: str) -> None:
    """Make the image features of processor output or pixel values; errors call these `name`."""
    run: Any = getattr(model, "get_image_features", model)
    accepted = inspect.signature(getattr(model, "get_image_features", model.forward)).parameters
    pixels = next(iter(accepted))
    if not isinstance(inputs, Mapping | Tensor):
        raise TypeError(f"{name} is {type(inputs).__name__}; give processor output")
    if isinstance(inputs, Tensor) and (inputs.dim() == 3 or (inputs.dim() < 3 and not inputs.is_floating_point())):
        what = "one image without its batch: give it as [1, ...]" if inputs.dim() == 3 else "ids: give pixel values"
        raise ValueError(f"{name} is a {inputs.dtype} tensor {tuple(inputs.shape)}, as is {what}, or processor output")
    arguments: dict = {pixels: inputs} if isinstance(inputs, Tensor) else dict(inputs)
    if pixels not in arguments:  # Video-LLaVA has two names for them, of its processor and of its method
        arguments[pixels] = arguments.get("pixel_values_images", arguments.get("pixel_values"))
    if arguments.get(pixels) is None:
        raise ValueError(f"{name} holds no pixel_values; give images")
    if not isinstance(arguments[pixels], Tensor):
        kind = type(arguments[pixels]).__name__
        raise TypeError(f"{name} holds {pixels} as {kind}; call the processor with return_tensors='pt'")
    made = vars(getattr(model, "model", model)).get("get_image_features")
    with heeding():
        if isinstance(made, PrunedFeatures):
            made.heed(arguments)
        run(**{key: value for key, value in arguments.items() if key in accepted})
