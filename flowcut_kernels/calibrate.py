"""Freeze an adaptive policy: per-layer counts from sample images instead of a decision per image."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .models import patched, trace
from .policies import FlowCut


def calibrate(
    model: nn.Module, policy: FlowCut, inputs: Mapping[str, Any] | Tensor | Iterable[Mapping[str, Any] | Tensor]
) -> FlowCut:
    """The same policy with the mean schedule of sample images.

    A model patched with the result has static shapes and reads nothing back: it can be captured as a CUDA graph and
    compiled as one graph. Which tokens go is still decided by every image; only how many is fixed.

    Args:
        model: an unpatched instance of one of :func:`supported_models`.
        policy: the policy to freeze; a schedule it has already is replaced.
        inputs: one batch of processor output or pixel values, or several of them; only images are looked at.

    Returns:
        ``policy`` with ``schedule``: for every cut the mean over all images of what they kept, rounded half to even.

    Raises:
        TypeError: a policy that adapts to nothing, or inputs of another type.
        ValueError: no images, images of several tiles with shares of their own, or a model that is patched.
    """
    if not isinstance(policy, FlowCut):
        raise TypeError(f"calibrate: {type(policy).__name__} has no per-image counts to freeze; use a FlowCut policy")
    batches = [inputs] if isinstance(inputs, Mapping | Tensor) else list(inputs)
    patches = 0
    kept: list[dict[int, int]] = []  # per image, layer -> patches it kept there
    with torch.no_grad(), patched(model, replace(policy, schedule=None), record=True):
        for number, batch in enumerate(batches):
            encode_images(model, batch, f"calibrate: inputs[{number}]")
            stages = [stage for stage in trace(model).stages if stage.name == "encoder"]
            images = len(stages[0].kept) if stages else 0
            if stages and stages[0].scores is not None:
                sizes = set(stages[0].scores.isfinite().sum(1).tolist()) | ({patches} - {0})
                if len(sizes) > 1:
                    raise ValueError(
                        f"calibrate: images of {sorted(sizes)} tokens, but a schedule fits one number; give images of "
                        "one size"
                    )
                patches = sizes.pop()
            kept += [{stage.layer: stage.kept[image] for stage in stages} for image in range(images)]
    if not batches:
        raise ValueError("calibrate: inputs is empty; give at least one batch of images")
    schedule: list[tuple[int, int]] = []
    last = patches
    for layer in sorted({layer for counts in kept for layer in counts}):
        # A batch that reached its budget early has no later stages.
        counts = [counts.get(layer, min(counts.values())) for counts in kept]
        mean = round(sum(counts) / len(counts))
        if mean < last:  # a cut that drops nothing is none
            schedule.append((layer, mean))
            last = mean
    budget = policy.encoder_budget(patches)
    if schedule and last != budget:
        raise ValueError(
            f"calibrate: the tiles of these images keep {last} of {patches} tokens each, but a schedule ends with "
            f"{budget}, the budget of an image of that many: it serves images of one tile; leave schedule=None"
        )
    return replace(policy, schedule=tuple(schedule) or None)


def encode_images(model: nn.Module, inputs: Mapping[str, Any] | Tensor, name: str) -> None:
    """Make the image features of processor output or pixel values; errors call these `name`."""
    run: Any = getattr(model, "get_image_features", model)
    accepted = inspect.signature(getattr(model, "get_image_features", model.forward)).parameters
    pixels = next(iter(accepted))
    if not isinstance(inputs, Mapping | Tensor):
        raise TypeError(f"{name} is {type(inputs).__name__}; give processor output")
    arguments: dict = {pixels: inputs} if isinstance(inputs, Tensor) else dict(inputs)
    if pixels not in arguments:  # Video-LLaVA has two names for them, of its processor and of its method
        arguments[pixels] = arguments.get("pixel_values_images", arguments.get("pixel_values"))
    if arguments.get(pixels) is None:
        raise ValueError(f"{name} holds no pixel_values; give images")
    run(**{key: value for key, value in arguments.items() if key in accepted})
