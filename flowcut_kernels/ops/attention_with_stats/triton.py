"""Triton form of `attention_with_stats`: statistics and flash attention side by side in one launch.

An image's programs are, in this order, the statistics programs of `anchor_stats` (one per block of tokens, all heads)
and one flash program per head and tile of queries. The former wait for memory, the latter for the tensor cores; as the
GPU takes up images one after another, both kinds are resident at the same time. Statistics come first within the image:
they bring its K and V into L2, where the flash programs find them, and their tail (the last block to arrive does the
softmaxes) runs beside flash programs that are still at work instead of after them.

The flash part is Dao's online softmax (arXiv 2307.08691): base 2, fp32 accumulation, one division at the end; nothing
M x N is formed and keys outside the span are not visited.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._ops import Relevance, ValueNorm
from .._triton_common import (
    LOG2_E,
    LOWEST,
    Launch,
    architecture,
    cdiv,
    contiguous_rows,
    load_columns,
    load_rows,
    product_sum,
    tile_widths,
    unit_steps,
    weigh,
    wide,
)
from ..anchor_stats.triton import plan_statistics, read_span, statistics_program


@triton.jit
def _attend_block(
    query, key, value, key_step, value_step, rows, scale, peak, total, out, out_rest,
    D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    DV: tl.constexpr, V_MAIN: tl.constexpr, V_REST: tl.constexpr, KEYS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over KEYS keys (of which `rows` live, None: all); `query` is (main, rest)."""
    weight, new_peak = weigh(query, key, key_step, rows, scale, peak, D, MAIN, REST, KEYS, WIDEN)
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weight, 1)
    v = load_columns(value, value_step, rows, DV, 0, V_MAIN, KEYS)
    weight = weight.to(v.dtype)
    out = product_sum(weight, v, out * shrink[:, None], WIDEN)
    if V_REST:
        v = load_columns(value, value_step, rows, DV, V_MAIN, V_REST, KEYS)
        out_rest = product_sum(weight, v, out_rest * shrink[:, None], WIDEN)
    return new_peak, total, out, out_rest


@triton.jit
def _flash_program(
    query, key, value, output, query_step, key_step, value_step, rows, start, end, scale,
    H: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    DV: tl.constexpr, V_MAIN: tl.constexpr, V_REST: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, SIGN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Attention of the first `rows` of a tile of QUERIES over the keys [start, end) of its head.

    Pointers are at the tile's first query and output row and at the head's first key and value; steps in elements.
    """
    # The peak of the products is that of the logits only where the scale is not negative: its sign goes to the query. A
    # query as it was loaded is multiplied from shared memory, a changed one would take registers.
    q = load_rows(query, query_step, rows, SIGN, D, MAIN, REST, QUERIES)
    scale = tl.abs(scale)

    peak = tl.full([QUERIES], LOWEST, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, V_MAIN], tl.float32)
    out_rest = tl.zeros([QUERIES, V_REST if V_REST else 1], tl.float32)
    last = start + (end - start) // KEYS * KEYS
    for first in tl.range(start, last, KEYS, num_stages=STAGES):
        peak, total, out, out_rest = _attend_block(
            q, key + wide(first) * key_step, value + wide(first) * value_step,
            key_step, value_step, None, scale, peak, total, out, out_rest,
            D, MAIN, REST, DV, V_MAIN, V_REST, KEYS, WIDEN,
        )  # fmt: skip
    if last < end:
        peak, total, out, out_rest = _attend_block(
            q, key + wide(last) * key_step, value + wide(last) * value_step,
            key_step, value_step, end - last, scale, peak, total, out, out_rest,
            D, MAIN, REST, DV, V_MAIN, V_REST, KEYS, WIDEN,
        )  # fmt: skip

    # Over an empty span the total is 0, and so is the output.
    weight = 1.0 / tl.where(total == 0, 1.0, total)
    row = tl.arange(0, QUERIES)[:, None]
    d = tl.arange(0, V_MAIN)[None, :]
    pointers = output + row * (H * DV)
    tl.store(pointers + d, (out * weight[:, None]).to(output.dtype.element_ty), mask=(row < rows) & (d < DV))
    if V_REST:
        d = V_MAIN + tl.arange(0, V_REST)[None, :]
        tl.store(pointers + d, (out_rest * weight[:, None]).to(output.dtype.element_ty), mask=(row < rows) & (d < DV))


# As in `anchor_stats`, other numbers of tokens are no new kernel.
@triton.jit(do_not_specialize=["tokens", "queries", "tiles", "blocks"])
def _attention_with_stats(
    query, key, value, query_anchor, value_anchor, key_span, cu_seqlens, output,
    attention, relevance, value_norm, entropy, scratch, counters,
    query_steps, key_steps, value_steps, query_anchor_steps, value_anchor_steps,
    pitch, image_size, tokens, queries, tiles, blocks, protect, scale, factor,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, UNIT: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, FLASH_STAGES: tl.constexpr, SIGN: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, V_MAIN: tl.constexpr, V_REST: tl.constexpr, WIDEN: tl.constexpr,
    RELEVANCE: tl.constexpr, VALUE_NORM: tl.constexpr, D_MAIN: tl.constexpr = None, D_REST: tl.constexpr = None,
    DV_MAIN: tl.constexpr = None, DV_REST: tl.constexpr = None,
    TOKENS: tl.constexpr = None, HEADS: tl.constexpr = None, STAGES: tl.constexpr = None, ANCHORS: tl.constexpr = None,
    TAIL_HEADS: tl.constexpr = None, TAIL_TOKENS: tl.constexpr = None,
):  # fmt: skip
    program, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    output_row = b * queries
    if cu_seqlens is None:
        start, scored_from, end = read_span(key_span, b, tokens, protect)
        start = tl.maximum(start, 0)
    else:
        # A segment is an image whose batch stride is 0 and whose first token is elsewhere.
        output_row = tl.load(cu_seqlens + b).to(tl.int64)
        query += output_row * query_steps[2] * UNIT
        key += output_row * key_steps[2] * UNIT
        value += output_row * value_steps[2] * UNIT
        end = tl.minimum(tl.load(cu_seqlens + b + 1) - output_row, tokens).to(tl.int32)
        start, scored_from, queries = end * 0, protect, end
    if TOKENS is not None and program < blocks:
        statistics_program(
            program, blocks, b, start, scored_from, end, query_anchor, key, value, value_anchor,
            attention, relevance, value_norm, entropy, scratch, counters, None,
            query_anchor_steps, key_steps, value_steps, value_anchor_steps, pitch, image_size, tokens, 1, protect,
            scale, factor,
            H, G, D, D_MAIN, D_REST, DV, DV_MAIN, DV_REST, UNIT, RELEVANCE, VALUE_NORM,
            TOKENS, HEADS, STAGES, ANCHORS, TAIL_HEADS, TAIL_TOKENS, None, None, None,
        )  # fmt: skip
    else:
        # The tiles of a head are neighbours: they read the same keys and values.
        head, first = (program - blocks) // tiles, (program - blocks) % tiles * QUERIES
        if first < queries:
            kv_head = head // (H // G)
            _flash_program(
                query + (b * query_steps[0] + head.to(tl.int64) * query_steps[1] + first.to(tl.int64) * query_steps[2])
                * UNIT,
                key + (b * key_steps[0] + kv_head.to(tl.int64) * key_steps[1]) * UNIT,
                value + (b * value_steps[0] + kv_head.to(tl.int64) * value_steps[1]) * UNIT,
                output + ((output_row + first) * H + head) * DV,
                query_steps[2] * UNIT, key_steps[2] * UNIT, value_steps[2] * UNIT, queries - first, start, end, scale,
                H, D, MAIN, REST, DV, V_MAIN, V_REST, QUERIES, KEYS, FLASH_STAGES, SIGN, WIDEN,
            )  # fmt: skip


def _tile_shape(queries: int, dim: int, itemsize: int, arch: int) -> tuple[int, int, int, int]:
    """Queries and keys per tile, pipeline stages and registers per thread for rows of `dim` elements.

    Shared memory stays below 99 KiB, which a program may have on every GPU since sm_80. With at most 128 registers two
    programs share a multiprocessor; the limits below that are those at which ptxas spills nothing. fp32 products run
    outside the tensor cores with their operands in registers: small tiles.
    """
    if itemsize == 4:
        return (16, 16, 2, 255) if dim > 64 else (32, 16, 2, 255)
    rows = 64 if queries <= 64 else 128
    if arch < 90:
        return rows, 32, 3, 120 if dim <= 64 else 255
    if dim <= 64:
        return rows, 64, 3, 128 if arch < 100 else 120
    if dim <= 80:
        return rows, 32, 3, 128
    return rows, 64, 2, 255


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_anchor: Tensor | None,
    value_anchor: Tensor | None,
    key_span: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    max_seqlen: int | None,
    scale: float,
    protect: int,
    relevance: int,
    value_norm: int,
    arch: int | None = None,
) -> Launch:
    """The launch of :func:`attention_with_stats`, on `arch` (90 for sm_90) or the tensors' own device."""
    batch, query_heads, queries, dim = query.shape
    heads, value_dim = key.shape[1], value.shape[3]
    output = query.new_empty(batch, queries, query_heads, value_dim)
    images, tokens, rows = batch, key.shape[2], queries
    if cu_seqlens is not None:
        images, tokens, rows = cu_seqlens.shape[0] - 1, max_seqlen, max_seqlen
        cu_seqlens = cu_seqlens.contiguous()
    if key_span is not None:
        key_span = key_span.contiguous()
    query_anchor, value_anchor = contiguous_rows(query_anchor), contiguous_rows(value_anchor)

    if query_anchor is None:
        new = lambda *shape: key.new_empty(shape, dtype=torch.float32)  # noqa: E731
        blocks, statistics = 0, [new(images, 0, tokens), new(images, 0, 0), new(images, 0), new(images, 0)]
        scratch, sizes, factor = (None, None), (None, None), None
        meta = dict(RELEVANCE=Relevance.NONE.name, VALUE_NORM=ValueNorm.NONE.name)
    else:
        blocks, statistics, scratch, sizes, factor, meta = plan_statistics(
            key, value, query_heads, 1, images, tokens, relevance, value_norm
        )
    (main, rest), (value_main, value_rest) = (tile_widths(d, key.element_size()) for d in (dim, value_dim))
    tile, keys, stages, registers = _tile_shape(
        rows, max(dim, value_dim), key.element_size(), arch or architecture(key.device)
    )
    tiles = cdiv(rows, tile)
    unit, all_steps = unit_steps(query, key, value, query_anchor, value_anchor)
    return Launch(
        _attention_with_stats,
        (blocks + tiles * query_heads, images),
        (
            query, key, value, query_anchor, value_anchor, key_span, cu_seqlens, output, *statistics, *scratch,
            *all_steps, *sizes, tokens, rows, tiles, blocks, protect, scale * LOG2_E, factor,
        ),
        dict(
            meta, H=query_heads, G=heads, D=dim, DV=value_dim, UNIT=unit,
            QUERIES=tile, KEYS=keys, FLASH_STAGES=stages, SIGN=-1.0 if scale < 0 else None,
            MAIN=main, REST=rest, V_MAIN=value_main, V_REST=value_rest, WIDEN=key.device.type == "cpu",
            num_warps=8, maxnreg=registers, enable_fp_fusion=True,
        ),
        key.device,
        [output, *statistics],
    )  # fmt: skip


def attention_with_stats(*arguments, **options) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments, results and definition: ``reference.py``; float32, bfloat16 or float16 inputs."""
    output, attention, relevance, value_norm, entropy = prepare(*arguments, **options)()
    return output, attention, relevance, value_norm, entropy
