"""Every operator of ``torch.ops.flowcut_kernels``: schema and fake (shape) implementation, torch only.

Bodies are registered elsewhere under the same names: the reference as the default for any device
(``ops/<op>/__init__.py``), the C++ form for CPU tensors and the CUDA C++ form (``csrc/library.cpp``), the Triton form
for CUDA tensors (``ops/<op>/triton.py``).
"""

from __future__ import annotations

from enum import IntEnum
from functools import wraps

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
    "attention_with_stats(Tensor query, Tensor key, Tensor value, Tensor? query_anchor, Tensor? value_anchor, "
    "Tensor? key_span, Tensor? cu_seqlens, *, SymInt? max_seqlen, float scale, int protect, int relevance, "
    "int value_norm) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIB.define(
    "score_select(Tensor? attention, Tensor? relevance, Tensor? value_norm, Tensor? history, Tensor? entropy, "
    "Tensor? lengths, *, float history_weight, int protect, int mode, int budget, float divisor, "
    "float[] criteria_weights=[1.0, 1.0, 1.0], float entropy_exponent=2.0, Tensor? budgets=None, int block=1) "
    "-> (Tensor, Tensor, Tensor)"
)
LIB.define(
    "anchor_stats_select(Tensor query, Tensor key, Tensor value, Tensor? value_anchor, Tensor? history, "
    "Tensor? lengths, *, float scale, int protect, bool attention, int relevance, int value_norm, "
    "float history_weight, int mode, int budget, float divisor, float[] criteria_weights=[1.0, 1.0, 1.0], "
    "float entropy_exponent=2.0, Tensor? budgets=None, int block=1) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIB.define(
    "gather_tokens(Tensor[] inputs, Tensor index, Tensor? norm_weight=None, Tensor? norm_bias=None, *, "
    "float eps=1e-05, bool rms=False) -> Tensor[]"
)
LIB.define("patch_entropy(Tensor pixels, *, int patch_size, float[] mean, float[] std) -> Tensor")
LIB.define("recycle_tokens(Tensor tokens, Tensor importance, Tensor cell, *, SymInt cells) -> (Tensor, Tensor)")
LIB.define("attention(Tensor query, Tensor key, Tensor value, Tensor? key_span, *, float scale) -> Tensor")
LIB.define("received_attention(Tensor query, Tensor key, Tensor? lse, Tensor? lengths, *, float scale) -> Tensor")
LIB.define(
    "compact_kv(Tensor[] keys, Tensor[] values, Tensor keep, Tensor? cos=None, Tensor? sin=None) "
    "-> (Tensor[], Tensor[])"
)
LIB.define("compact_kv_(Tensor(a!)[] keys, Tensor(b!)[] values, Tensor keep, Tensor? cos=None, Tensor? sin=None) -> ()")
LIB.define(
    "compact_kv_paged_(Tensor(a!)[] keys, Tensor(b!)[] values, Tensor moves, Tensor offsets, Tensor? cos=None, "
    "Tensor? sin=None) -> ()"
)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics of fp32, bf16 and fp16 inputs are fp32; fp64 stays fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(reference):
    """The same function outside of autocast, which would narrow the products that its definition has in fp32."""

    @wraps(reference)
    def call(first: Tensor, *arguments, **options):
        device = first.device.type
        # Compiled code runs on devices that have autocast; torch 2.11 cannot trace the question.
        if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(device):
            return reference(first, *arguments, **options)
        with torch.autocast(device, enabled=False):
            return reference(first, *arguments, **options)

    return call


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


@torch.library.register_fake("flowcut_kernels::attention_with_stats", lib=LIB)
def _(
    query, key, value, query_anchor, value_anchor, key_span, cu_seqlens, *,
    max_seqlen, scale, protect, relevance, value_norm,
):  # fmt: skip
    images, tokens = key.shape[0], key.shape[2]
    if cu_seqlens is not None:
        images, tokens = cu_seqlens.shape[0] - 1, max_seqlen
    anchors, dtype = 0 if query_anchor is None else 1, accumulate_dtype(key.dtype)
    new = lambda *shape: key.new_empty(shape, dtype=dtype)  # noqa: E731
    return (
        key.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3])),
        new(images, anchors, tokens),
        new(images, anchors, tokens if relevance else 0),
        new(images, tokens if value_norm else 0),
        new(images, anchors),
    )


@torch.library.register_fake("flowcut_kernels::score_select", lib=LIB)
def _(attention, relevance, value_norm, history, entropy, lengths, *, protect, mode, budget, block=1, **options):
    first = any_tensor(attention, relevance, value_norm)
    return tuple(select_outputs(first, *first.shape, mode, protect, block * budget))


def select_outputs(like: Tensor, batch: int, tokens: int, mode: int, protect: int, rows: int) -> list[Tensor]:
    """Unwritten score, index and new lengths of `score_select` on the device of `like`; a budget of `rows`."""
    widths: dict[int, int] = {Select.SCORE_ONLY: 0, Select.FIXED: min(protect + rows, tokens)}
    width = widths.get(mode, tokens)
    return [
        like.new_empty((batch, tokens), dtype=accumulate_dtype(like.dtype)),
        like.new_empty((batch, width), dtype=torch.int64),
        like.new_empty((batch,), dtype=torch.int32),
    ]


@torch.library.register_fake("flowcut_kernels::anchor_stats_select", lib=LIB)
def _(query, key, value, value_anchor, history, lengths, *, protect, mode, budget, block=1, **options):
    selected = select_outputs(key, key.shape[0], key.shape[2], mode, protect, block * budget)
    return (*selected, key.new_empty((key.shape[0],), dtype=accumulate_dtype(key.dtype)))


@torch.library.register_fake("flowcut_kernels::gather_tokens", lib=LIB)
def _(inputs, index, norm_weight=None, norm_bias=None, *, eps=1e-5, rms=False):
    rows = [x.new_empty((*index.shape, *x.shape[2:])) for x in inputs]
    return rows if norm_weight is None else [*rows, torch.empty_like(rows[0])]


@torch.library.register_fake("flowcut_kernels::patch_entropy", lib=LIB)
def _(pixels, *, patch_size, mean, std):
    batch, _, height, width = pixels.shape
    return pixels.new_empty((batch, (height // patch_size) * (width // patch_size)), dtype=torch.float32)


@torch.library.register_fake("flowcut_kernels::recycle_tokens", lib=LIB)
def _(tokens, importance, cell, *, cells):
    return tokens.new_empty((cells, tokens.shape[1])), cell.new_empty((cells,))


@torch.library.register_fake("flowcut_kernels::attention", lib=LIB)
def _(query, key, value, key_span, *, scale):
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, value.shape[3]))


@torch.library.register_fake("flowcut_kernels::received_attention", lib=LIB)
def _(query, key, lse, lengths, *, scale):
    return key.new_empty((key.shape[0], key.shape[2]), dtype=accumulate_dtype(key.dtype))


@torch.library.register_fake("flowcut_kernels::compact_kv", lib=LIB)
def _(keys, values, keep, cos=None, sin=None):
    new = lambda x: x.new_empty((*x.shape[:2], keep.shape[1], x.shape[3]))  # noqa: E731
    return [new(x) for x in keys], [new(x) for x in values]


@torch.library.register_fake("flowcut_kernels::compact_kv_", lib=LIB)
def _(keys, values, keep, cos=None, sin=None):
    return None


@torch.library.register_fake("flowcut_kernels::compact_kv_paged_", lib=LIB)
def _(keys, values, moves, offsets, cos=None, sin=None):
    return None


def any_tensor(*tensors: Tensor | None) -> Tensor:
    """The first tensor that is given."""
    return next(t for t in tensors if t is not None)
