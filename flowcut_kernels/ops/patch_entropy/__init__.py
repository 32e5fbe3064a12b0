"""Entropy of the grey levels of every image patch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._library import NATIVE_DTYPES, choose_backend
from ..._ops import LIB
from .reference import patch_entropy as _reference


def patch_entropy(
    pixels: Tensor,
    patch_size: int,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Shannon entropy in bits of the 256-bin grey-level histogram of each patch (VFlowOpt, arXiv 2508.05211).

    Args:
        pixels: [B, C, H, W] of one or three channels: uint8, or floating point as an image processor normalised it.
        patch_size: edge of a patch in pixels; rows and columns beyond the last whole patch are ignored.
        mean, std: the image processor's, one number per channel; None: 0 and 1, floating pixels lie in 0..1. They go
            with floating pixels only.
        backend: see docs/install.md; None: ``FLOWCUT_BACKEND`` or "auto".

    Returns:
        float32 [B, (H // patch_size) * (W // patch_size)], patches in raster order; NaN for a patch with NaN among its
        pixels. Not differentiable. Definition: ``reference.py``.

    Raises:
        ValueError: arguments that do not fit, naming the argument.
        RuntimeError: an explicitly requested backend that cannot serve these tensors.
    """
    _check(pixels, patch_size, mean, std)
    if pixels.dtype == torch.uint8:
        mean = std = ()
    else:
        mean = [0.0] * pixels.shape[1] if mean is None else [float(x) for x in mean]
        std = [1.0] * pixels.shape[1] if std is None else [float(x) for x in std]
    pixels = pixels.detach()
    choice = choose_backend("patch_entropy", backend, pixels, dtypes=(torch.uint8, *NATIVE_DTYPES))
    if choice == "reference":
        return _reference(pixels, patch_size=patch_size, mean=mean, std=std)
    if choice == "triton" and pixels.device.type == "cpu":
        return _triton(pixels, patch_size=patch_size, mean=mean, std=std)
    return torch.ops.flowcut_kernels.patch_entropy.default(pixels, patch_size=patch_size, mean=mean, std=std)


def _check(pixels, patch_size, mean, std) -> None:
    if pixels.dim() != 4 or pixels.shape[1] not in (1, 3):
        raise ValueError(
            f"patch_entropy: pixels must be [batch, channels, height, width] of 1 or 3 channels, "
            f"got {tuple(pixels.shape)}"
        )
    whole = pixels.dtype == torch.uint8
    if not whole and pixels.dtype not in (*NATIVE_DTYPES, torch.float64):
        raise ValueError(f"patch_entropy: pixels must be uint8 or floating point, got {pixels.dtype}")
    if not isinstance(patch_size, int) or patch_size < 1:
        raise ValueError(f"patch_entropy: patch_size={patch_size!r} must be a whole number of pixels, at least 1")
    for name, x in (("mean", mean), ("std", std)):
        if x is not None and whole:
            raise ValueError(f"patch_entropy: {name} is given but pixels are uint8, which nothing normalised; drop it")
        if x is not None and (not hasattr(x, "__len__") or len(x) != pixels.shape[1]):
            raise ValueError(
                f"patch_entropy: {name}={x!r} must be {pixels.shape[1]} numbers, one for each channel of pixels"
            )
    if std is not None and not all(x > 0 for x in std):
        raise ValueError(f"patch_entropy: std={std!r} must be positive")


def _triton(*arguments, **options):
    from .triton import patch_entropy

    return patch_entropy(*arguments, **options)


LIB.impl("patch_entropy", _reference, "CompositeExplicitAutograd")
LIB.impl("patch_entropy", _triton, "CUDA")
