"""Shared by all tests. Helpers to import live beside this file: ``golden_cases``, ``tiny``."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

# Triton reads it when it is first imported; without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# By default convolutions of float32, such as a tower's first, have the precision of TF32.
torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Where Triton's interpreter has something to run."""
    interpreted = not torch.cuda.is_available() and find_spec("triton")
    if interpreted and any("triton" in item.name for item in session.items):
        from interpreter import patch_once

        patch_once()
