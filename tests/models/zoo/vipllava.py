"""VipLLaVA: CLIP read at several layers, 64 tokens an image."""

from __future__ import annotations

from typing import Any

import tiny
import torch

import flowcut_kernels as fk
from zoo import Family
from zoo import llava as plain


def model(attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    return tiny.vipllava(attention=attention).to(dtype)


FAMILY = Family(
    name="vipllava",
    model=model,
    prompt=plain.prompt,
    layers=plain.FAMILY.layers,
    attention=plain.FAMILY.attention,
    projector=plain.FAMILY.projector,
    tiles=plain.FAMILY.tiles,
    processor=plain.processor,
    refuses={fk.VisionZip: "VisionZip merges tokens of one layer's output, but .* are read"},
)
