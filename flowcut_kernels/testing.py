"""Helpers for tests of operators: the error budget that replaces hand-tuned tolerances."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(actual: Tensor, low: Tensor, exact: Tensor, *, factor: float = 2.0, name: str = "") -> None:
    """`actual` is as close to the fp64 result `exact` as plain torch in low precision (`low`) is, within `factor`.

    The bound per element is factor * max|low - exact| + 4 ulp(fp32) of the largest magnitude; NaN never passes.

    Raises:
        AssertionError: with the errors and the place of the worst element.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)} != {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    error = (actual.double() - exact.double()).abs()
    allowed = (
        factor * (low.double() - exact.double()).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    )
    worst = int(error.argmax())
    assert bool((error <= allowed).all()), (
        f"{name}: error {error.max():.3e} at flat index {worst} is over the budget {allowed:.3e} "
        f"(got {actual.flatten()[worst]}, exact {exact.flatten()[worst]})"
    )
