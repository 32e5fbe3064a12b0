"""What a patched model kept, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Stage:
    """One cut. B images; patches are numbered in raster order of the original grid of N patches.

    Where a family stitches an image from several grids, they are numbered as its unpruned features follow each other.
    """

    name: str  # "encoder", "features" (projected, before the language model) or "llm"
    layer: int  # 0-based layer whose output first holds fewer tokens; -1 for features
    kept: list[int]  # patches kept per image
    indices: Tensor  # int64 [B, K] kept patches, ascending, -1 after the last of a shorter image
    lengths: Tensor  # int32 [B], as a tensor, the numbers of `kept`
    scores: Tensor | None  # float [B, N] score the cut was made by, NaN for patches that were gone before
    entropy: Tensor | None  # float [B] entropy ratio of the anchor's attention, 0..1
    recycled: Tensor | None = None  # bool [B, K] kept places that stand for pruned ones or for a class token


@dataclass
class Trace:
    """The cuts of one forward pass of the vision encoder, in order, and the entropy of every scored layer.

    Where a prompt brings images and videos, which are two passes, that is the one of the videos.
    """

    stages: list[Stage] = field(default_factory=list)
    entropy: dict[int, Tensor] = field(default_factory=dict)  # layer -> entropy ratio [B]
