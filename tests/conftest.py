"""Shared fixtures: golden cases of the authors' code, tiny random models, backends."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"


def golden_manifest() -> dict:
    """The manifest's cases, empty where the folder is absent."""
    path = GOLDEN / "manifest.json"
    return json.loads(path.read_text())["cases"] if path.exists() else {}


def golden_tensors(case: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / golden_manifest()[case]["file"])


def drawn(name: str, seed: int, shape: tuple[int, ...], amplitude: float) -> torch.Tensor:
    """The manifest's recipe for random tensors."""
    import zlib

    stream = np.random.RandomState((seed * 1000003 + zlib.crc32(name.encode())) % 2**32)
    return torch.from_numpy((amplitude * (2 * stream.random_sample(shape) - 1)).astype(np.float32))


