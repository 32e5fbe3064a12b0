"""Every operator of ``torch.ops.flowcut_kernels``: schema and fake (shape) implementation, torch only.

Bodies are registered elsewhere under the same names: the reference as the default for any device
(``ops/<op>/__init__.py``), the C++ form for CPU tensors (``csrc/library.cpp``), the Triton form for CUDA tensors
(``ops/<op>/triton.py``).
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

LIB = torch.library.Library("flowcut_kernels", "DEF")


class Relevance(IntEnum):
    """How `anchor_stats` compares the anchor's value vector with a token's (integers, since they cross the ABI)."""

    NONE = 0
    COSINE = 1  # (1 + cos(v_anchor, v_n)) / 2 on the full [heads * d] vectors
    SOFTMAX = 2  # head mean of softmax_n(v_anchor . v_n), as in the released FlowCut code
    SCALED_SOFTMAX = 3  # the same with 1/sqrt(d), as written in the FlowCut paper


class ValueNorm(IntEnum):
    """Which L1 norm `anchor_stats` takes of a token's value vector."""

    NONE = 0
    FULL = 1  # L1 norm of the full [heads * d] vector
    HEAD_MEAN = 2  # L1 norm of the head-mean [d] vector, as in the released FlowCut code


class Select(IntEnum):
    """What `score_select` does after updating the score."""

    SCORE_ONLY = 0
    ADAPTIVE = 1  # entropy rule, each image its own count
    ADAPTIVE_BATCH = 2  # entropy rule, the batch's largest count for every image (released FlowCut code)
    FIXED = 3  # keep exactly `budget` candidates


LIB.define(
    "anchor_stats(Tensor query, Tensor key, Tensor value, Tensor? value_anchor, Tensor? key_span, *, "
    "float scale, int protect, int relevance, int value_norm) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIB.define(
    "score_select(Tensor? attention, Tensor? relevance, Tensor? value_norm, Tensor? history, Tensor? entropy, "
    "Tensor? lengths, *, float history_weight, int protect, int mode, int budget, float divisor) "
    "-> (Tensor, Tensor, Tensor)"
)
LIB.define(
    "gather_tokens(Tensor[] inputs, Tensor index, Tensor? norm_weight=None, Tensor? norm_bias=None, *, "
    "float eps=1e-05, bool rms=False) -> Tensor[]"
)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics of fp32, bf16 and fp16 inputs are fp32; fp64 stays fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("flowcut_kernels::anchor_stats", lib=LIB)
def _(query, key, value, value_anchor, key_span, *, scale, protect, relevance, value_norm):
    batch, _, anchors, _ = query.shape
    tokens, dtype = key.shape[2], accumulate_dtype(key.dtype)
    new = lambda *shape: key.new_empty(shape, dtype=dtype)  # noqa: E731
    return (
        new(batch, anchors, tokens),
        new(batch, anchors, tokens if relevance else 0),
        new(batch, tokens if value_norm else 0),
        new(batch, anchors),
    )


@torch.library.register_fake("flowcut_kernels::score_select", lib=LIB)
def _(attention, relevance, value_norm, history, entropy, lengths, *, history_weight, protect, mode, budget, divisor):
    first = next(t for t in (attention, relevance, value_norm) if t is not None)
    batch, tokens = first.shape
    width = {Select.SCORE_ONLY: 0, Select.FIXED: min(protect + budget, tokens)}.get(mode, tokens)
    return (
        torch.empty_like(first, memory_format=torch.contiguous_format),
        first.new_empty((batch, width), dtype=torch.int64),
        first.new_empty((batch,), dtype=torch.int32),
    )


@torch.library.register_fake("flowcut_kernels::gather_tokens", lib=LIB)
def _(inputs, index, norm_weight=None, norm_bias=None, *, eps=1e-5, rms=False):
    rows = [x.new_empty((*index.shape, *x.shape[2:])) for x in inputs]
    return rows if norm_weight is None else [*rows, torch.empty_like(rows[0])]


def any_tensor(*tensors: Tensor | None) -> Tensor:
    """The first tensor that is given."""
    return next(t for t in tensors if t is not None)
