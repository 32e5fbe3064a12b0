"""Triton form of `received_attention`: a pass over the keys for the rows' log-sum-exp, then one over the rows.

Both are a flash attention (arXiv 2307.08691) without values: a tile of one head's rows stays, those of the other side
stream past it, and what a product of tiles leaves behind is one number per row that stays. The second pass knows the
log-sum-exp, so it needs neither maximum nor rescaling; where the caller has it, from the attention that ran anyway, the
first is not launched.

A program of the second pass leaves the column sums of its head; the last one of a tile to arrive, known by an integer
counter, adds the heads up. No float atomics: results do not depend on the order. Bytes beside Q and K: 4 per token and
head for the log-sum-exp and 4 for the sums. FLOPs are those of an attention, exponentials twice as many.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton_common import (
    LOG2_E,
    LOWEST,
    Launch,
    architecture,
    arrival_counters,
    cdiv,
    dots,
    live_tokens,
    load_rows,
    next_power_of_2,
    tile_widths,
    unit_steps,
    weigh,
    wide,
)


@triton.jit
def _head(pointer, steps, b, head, UNIT: tl.constexpr):
    """Where head `head` of image b begins, in 64 bits."""
    return pointer + (b * steps[0] + head.to(tl.int64) * steps[1]) * UNIT


@triton.jit
def _grow(
    rows_kept, key, key_step, rows, scale, peak, total,
    D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, STREAMED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Peak and total of the online softmax after STREAMED more keys (of which `rows` live, None: all)."""
    weight, new_peak = weigh(rows_kept, key, key_step, rows, scale, peak, D, MAIN, REST, STREAMED, WIDEN)
    return new_peak, total * tl.exp2(peak - new_peak) + tl.sum(weight, 1)


@triton.jit
def _receive(
    keys_kept, query, query_step, lse, rows, scale, base,
    D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, STREAMED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """What the keys receive from STREAMED rows (of which `rows` live, None: all), whose `lse` is to base 2^(1/base)."""
    row = tl.arange(0, STREAMED)
    norm = tl.load(lse + row) if rows is None else tl.load(lse + row, mask=row < rows, other=float("inf"))
    norm = norm if base is None else norm * base
    product = dots(keys_kept, query, query_step, rows, D, MAIN, REST, STREAMED, WIDEN)
    return tl.sum(tl.exp2(product * scale - norm[None, :]), 1)


# Other numbers of tokens are no new kernel.
@triton.jit(do_not_specialize=["tokens", "tiles"])
def _row_lse(
    query, key, lengths, lse, query_steps, key_steps, tokens, tiles, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    KEPT: tl.constexpr, STREAMED: tl.constexpr, STAGES: tl.constexpr, SIGN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """lse [B, H, tokens] of the live rows, base 2: one program per head and tile of KEPT rows."""
    b = tl.program_id(1).to(tl.int64)
    head, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * KEPT
    live = live_tokens(lengths, b, tokens, b >= 0)
    if first < live:
        query_step, key_step = query_steps[2] * UNIT, key_steps[2] * UNIT
        key = _head(key, key_steps, b, head // (H // G), UNIT)
        query = _head(query, query_steps, b, head, UNIT) + wide(first) * query_step
        rows = load_rows(query, query_step, live - first, SIGN, D, MAIN, REST, KEPT)
        peak = tl.full([KEPT], LOWEST, tl.float32)
        total = tl.zeros([KEPT], tl.float32)
        last = live // STREAMED * STREAMED
        for start in tl.range(0, last, STREAMED, num_stages=STAGES):
            peak, total = _grow(
                rows, key + wide(start) * key_step, key_step, None, scale, peak, total,
                D, MAIN, REST, STREAMED, WIDEN,
            )  # fmt: skip
        if last < live:
            peak, total = _grow(
                rows, key + wide(last) * key_step, key_step, live - last, scale, peak, total,
                D, MAIN, REST, STREAMED, WIDEN,
            )  # fmt: skip
        row = first + tl.arange(0, KEPT)
        tl.store(lse + (b * H + head) * tokens + row, peak + tl.log2(total), mask=row < live)


@triton.jit(do_not_specialize=["tokens", "tiles"])
def _received_attention(
    query, key, lse, lengths, partial, counters, received, query_steps, key_steps, tokens, tiles, scale, base,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    KEPT: tl.constexpr, STREAMED: tl.constexpr, STAGES: tl.constexpr, HEADS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """received [B, tokens], by way of partial [B, H, tokens]: one program per head and tile of KEPT keys."""
    b = tl.program_id(1).to(tl.int64)
    head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    first = tile * KEPT
    live = live_tokens(lengths, b, tokens, b >= 0)
    end = tl.where(first < live, live, 0)  # a dead tile receives nothing
    query_step, key_step = query_steps[2] * UNIT, key_steps[2] * UNIT
    query = _head(query, query_steps, b, head, UNIT)
    lse += (b * H + head) * tokens
    key = _head(key, key_steps, b, head // (H // G), UNIT) + wide(first) * key_step
    keys = load_rows(key, key_step, live - first, None, D, MAIN, REST, KEPT)
    total = tl.zeros([KEPT], tl.float32)
    last = end // STREAMED * STREAMED
    for start in tl.range(0, last, STREAMED, num_stages=STAGES):
        total += _receive(
            keys, query + wide(start) * query_step, query_step, lse + start, None, scale, base,
            D, MAIN, REST, STREAMED, WIDEN,
        )  # fmt: skip
    if last < end:
        total += _receive(
            keys, query + wide(last) * query_step, query_step, lse + last, end - last, scale, base,
            D, MAIN, REST, STREAMED, WIDEN,
        )  # fmt: skip
    token = first + tl.arange(0, KEPT)
    partial += b * H * tokens
    tl.store(partial + head.to(tl.int64) * tokens + token, tl.where(token < live, total, 0.0), mask=token < tokens)

    # The barrier gathers this program's stores before the one thread that announces them.
    tl.debug_barrier()
    counter = counters + b * tiles + tile
    if tl.atomic_add(counter, 1, sem="acq_rel") == H - 1:
        each = tl.arange(0, HEADS)[:, None]
        mask = (each < H) & (token < tokens)[None, :]
        sums = tl.load(partial + each.to(tl.int64) * tokens + token[None, :], mask=mask, other=0.0)
        mean = tl.sum(sums, 0) / (H * tl.maximum(live, 1)).to(tl.float32)
        tl.store(received + b * tokens + token, mean, mask=token < tokens)
        tl.store(counter, 0)


def _tile_shape(dim: int, itemsize: int, arch: int) -> tuple[int, int, int, int]:
    """Rows that stay and that stream per tile, pipeline stages and registers per thread for rows of `dim` elements.

    Exponentials and products overlap only where several programs share a multiprocessor: with at most 80 registers
    three do, with 128 two, the least at which ptxas spills nothing. Shared memory and float32 as in
    `attention_with_stats`. Batch and tokens play no part, so that they change no bit.
    """
    if itemsize == 4:
        return (16, 16, 2, 255) if dim > 64 else (32, 16, 2, 255)
    return (128, 64, 3, 80) if arch == 90 else (128, 64 if arch > 90 else 32, 3, 128)


def prepare(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    lengths: Tensor | None,
    *,
    scale: float,
    arch: int | None = None,
) -> list[Launch]:
    """The launches of :func:`received_attention`, on `arch` (90 for sm_90) or the tensors' own device."""
    batch, query_heads, tokens, dim = query.shape
    new = lambda *shape: key.new_empty(shape, dtype=torch.float32)  # noqa: E731
    main, rest = tile_widths(dim, key.element_size())
    kept, streamed, stages, registers = _tile_shape(dim, key.element_size(), arch or architecture(key.device))
    tiles = cdiv(tokens, kept)
    unit, steps = unit_steps(query, key)
    if lengths is not None:
        lengths = lengths.contiguous()
    meta: dict[str, Any] = dict(
        H=query_heads, G=key.shape[1], D=dim, UNIT=unit, MAIN=main, REST=rest, KEPT=kept, STREAMED=streamed,
        STAGES=stages, WIDEN=key.device.type == "cpu", num_warps=8, maxnreg=registers, enable_fp_fusion=True,
    )  # fmt: skip
    grid, launches = (tiles * query_heads, batch), []
    norm = new(batch, query_heads, tokens) if lse is None else lse.contiguous()
    if lse is None:
        # Peaks are found among the products, so a negative scale's sign goes to the rows.
        arguments: tuple = (query, key, lengths, norm, *steps, tokens, tiles, abs(scale) * LOG2_E)
        signed = dict(meta, SIGN=-1.0 if scale < 0 else None)
        launches.append(Launch(_row_lse, grid, arguments, signed, key.device, [norm]))
    received = new(batch, tokens)
    counters = arrival_counters(batch * tiles, key.device)
    arguments = (
        query, key, norm, lengths, new(batch, query_heads, tokens), counters, received, *steps, tokens, tiles,
        scale * LOG2_E, None if lse is None else LOG2_E,
    )  # fmt: skip
    meta = dict(meta, HEADS=next_power_of_2(query_heads))
    launches.append(Launch(_received_attention, grid, arguments, meta, key.device, [received]))
    return launches


def received_attention(*arguments, **options) -> Tensor:
    """Arguments, results and definition: ``reference.py``; float32, bfloat16 or float16 inputs."""
    for launch in prepare(*arguments, **options):
        (result,) = launch()
    return result
