"""What a patched model kept, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Stage:
    """One cut. B images; tokens (patches, or what they are merged to) are numbered in raster order of the original N.

    Where an image is made of several tiles, a stage of the encoder is of B tiles, each numbered by itself (Qwen-VL: of
    images and videos, frame after frame). Later stages are of images, whose tokens are numbered as the unpruned
    features follow each other, newlines included; a stage "features" then says what the encoder left of them.
    """

    name: str  # "encoder", "features" (projected, before the language model) or "llm"
    layer: int  # 0-based layer whose output first holds fewer tokens; -1 for features
    kept: list[int]  # tokens kept of each
    indices: Tensor  # int64 [B, K] kept tokens, ascending, -1 after the last of a shorter image
    lengths: Tensor  # int32 [B], as a tensor, the numbers of `kept`
    scores: Tensor | None  # float [B, N] score the cut was made by, NaN for tokens that were gone before
    entropy: Tensor | None  # float [B] entropy ratio of the anchor's attention, 0..1
    recycled: Tensor | None = None  # bool [B, K] kept places that stand for pruned ones or for a class token


@dataclass
class Trace:
    """The cuts of one forward pass of the vision encoder, in order, and the entropy of every scored layer.

    Where a prompt brings images and videos, which are two passes, that is the one of the videos.
    """

    stages: list[Stage] = field(default_factory=list)
    entropy: dict[int, Tensor] = field(default_factory=dict)  # layer -> entropy ratio [B]
