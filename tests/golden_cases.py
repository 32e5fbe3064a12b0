"""Golden cases of the authors' code (../shared/golden), and the recipe their random tensors are drawn by."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from flowcut_kernels.modules.decoder import VisualTokens

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
SQRT3 = 3**0.5
STREAM = np.random.RandomState()  # seeded anew for every tensor; a new one would ask the system for entropy first


def golden_manifest() -> dict:
    """The manifest's cases, empty where the folder is absent."""
    path = GOLDEN / "manifest.json"
    return json.loads(path.read_text())["cases"] if path.exists() else {}


def golden_tensors(case: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / golden_manifest()[case]["file"])


def drawn(name: str, seed: int, shape: tuple[int, ...], amplitude: float, offset: float = 0.0) -> Tensor:
    """The manifest's recipe for random tensors: the same numbers on every machine."""
    STREAM.seed((seed * 1000003 + zlib.crc32(name.encode())) % 2**32)
    values = STREAM.random_sample(tuple(shape))
    values *= 2.0
    values -= 1.0
    values *= amplitude
    values += offset
    return torch.from_numpy(values.astype(np.float32))


def encoder_tensor(name: str, shape: tuple[int, ...], seed: int, gains: dict, layers: int) -> Tensor:
    """The manifest's recipe for one weight of a vision encoder."""
    if "norm" in name or "layrnorm" in name:
        weight = name.endswith("weight")
        if "q_norm" in name or "k_norm" in name:
            return drawn(name, seed, shape, 0.1, gains["qk"][0])
        return drawn(name, seed, shape, 0.1 if weight else 0.05, 1.0 if weight else 0.0)
    if name.endswith("bias"):
        return drawn(name, seed, shape, 0.02)
    if "lambda_" in name:  # scale of a residual branch
        return drawn(name, seed, shape, 0.1, 1.0)
    if name.endswith(("class_embedding", "cls_token")):
        return drawn(name, seed, shape, gains["cls"] * SQRT3)
    if "position_embedding" in name:
        return drawn(name, seed, shape, gains["pos"] * SQRT3)
    if "patch_embedding" in name:
        return drawn(name, seed, shape, gains["patch"] * SQRT3 / np.sqrt(np.prod(shape[1:])))
    if "q_proj" in name or "k_proj" in name:
        first, last = gains["qk"]
        gain = first + (last - first) * int(re.search(r"layers?\.(\d+)", name)[1]) / max(layers - 1, 1)
    else:
        out = "out_proj" in name or "projection_layer" in name
        gain = gains["v"] if "v_proj" in name else gains["out"] if out else gains["mlp"]
    return drawn(name, seed, shape, gain * SQRT3 / np.sqrt(shape[1]))


def sha256(tensors: dict[str, Tensor]) -> str:
    """Of a state dict, as the manifest computes it."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(memoryview(tensors[name].contiguous().numpy()).cast("B"))
    return digest.hexdigest()


def one_image(start: int, count: int, length: int, batch: int = 1) -> VisualTokens:
    """Prompts of `length` columns with one image each; their last column asks."""
    column = torch.arange(length).repeat(batch, 1)
    return VisualTokens(
        columns=column[:, start : start + count],
        lengths=[count] * batch,
        full=[count] * batch,
        sources=list(range(batch)),
        samples=torch.arange(batch),
        counts=[1] * batch,
        ends=column[:, [-1, -1]],
        tokens=((column >= start) & (column < start + count)).numpy(),
        live=np.ones((batch, length), bool),
        prompt=length,
        right=False,
    )
