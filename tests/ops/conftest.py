"""Every operator test runs on every backend that this machine can run."""

from __future__ import annotations

import pytest
import torch

from flowcut_kernels import _library

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _unavailable(backend: str) -> str | None:
    if backend == "cpp":
        return _library.native_error()
    if backend == "triton":
        return _library.triton_error()
    return None


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    reason = _unavailable(request.param)
    if reason:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    return "cpu" if backend == "cpp" else DEVICE
