"""Triton form of `anchor_stats`: one launch; the last program of an image to arrive finishes it.

Programs stream a block of tokens of one image, all heads of it (the usual layout [B, N, H * D] keeps a token's heads
together, so a block is one contiguous piece of K and one of V). Cosines and value norms are final there. Softmaxes need
the whole image: each program leaves its logits, an integer counter per image tells the last program, and that one does
`head_mean_softmax`. No float atomics: results do not depend on the order.

Bytes: K and V once, and 4 bytes per token and head for the logits (written, then read from L2): 1.6 % of bf16 K and V
at D = 64. At 4.8 TB/s a CLIP-L layer (N = 577, H * D = 1024) takes 0.5 us per image.

The attention of many anchors alone is two launches: products of matrices in place of one anchor after another, and a
program per anchor in place of one that finishes them all.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._ops import Relevance, Select, ValueNorm, select_outputs
from .._triton_common import (
    ENOUGH_PROGRAMS,
    LOG2_E,
    TINY,
    Launch,
    arrival_counters,
    cdiv,
    contiguous_rows,
    dots,
    entropy_ratio,
    head_mean_softmax,
    load_rows,
    next_power_of_2,
    powers,
    select_image,
    tile_widths,
    unit_steps,
    wide,
)

_FEW = 4  # anchors that are streamed one by one, where nothing but their attention is asked for


@triton.jit
def _rows(pointer, offset, mask, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """Rows of D elements at offset [x, y, 1]: a tile of MAIN and, where D is no power of 2, one of REST columns.

    Two tiles waste fewer lanes than one padded to the next power of 2 (D = 72: 64 + 8 instead of 128).
    """
    d = tl.arange(0, MAIN)[None, None, :]
    main = tl.load(pointer + offset + d, mask=mask, other=0.0)
    if REST == 0:
        return (main,)
    else:
        d = MAIN + tl.arange(0, REST)[None, None, :]
        if MAIN + REST > D:
            mask = mask & (d < D)
        return main, tl.load(pointer + offset + d, mask=mask, other=0.0)


@triton.jit
def _offset(steps, b, first, head, row, UNIT: tl.constexpr):
    """Where row `row` of the heads `first` + `head` of image b begins, [., HEADS, 1] in 64 bits.

    `first` alone changes from tile to tile of a loop: one number, and the rest is worked out once.
    """
    start = (b * steps[0] + wide(first) * steps[1]) * UNIT
    return start + (head.to(tl.int64)[None, :, None] * steps[1] + row.to(tl.int64) * steps[2]) * UNIT


@triton.jit
def _dot(x, y):
    """Products of rows, summed over the last dimension in fp32."""
    total = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), 2)
    if len(x) > 1:
        total += tl.sum(x[1].to(tl.float32) * y[1].to(tl.float32), 2)
    return total


@triton.jit
def _lanes(x, VECTOR: tl.constexpr):
    """[., HEADS, D] summed over VECTOR neighbours: a thread loads them together, so that no data moves."""
    if x.shape[2] > VECTOR:
        return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // VECTOR, VECTOR]), 3)
    else:
        return tl.sum(x, 2, keep_dims=True)


@triton.jit
def _squares(x):
    """Sum of the squares of all elements."""
    total = tl.sum(tl.sum(x[0].to(tl.float32) * x[0].to(tl.float32), 2), 1)
    if len(x) > 1:
        total += tl.sum(tl.sum(x[1].to(tl.float32) * x[1].to(tl.float32), 2), 1)
    return total


@triton.jit
def _total(total, rest, REST: tl.constexpr):
    """Sums by lane [TOKENS, HEADS, LANES, ...] summed over heads and lanes."""
    result = tl.sum(tl.sum(total, 2), 1)
    if REST:
        result += tl.sum(tl.sum(rest, 2), 1)
    return result


@triton.jit
def _leave(logit, live, token, channel, valid, pitch, logits):
    """Leave base-2 logits [TOKENS, HEADS] of the channels, dead ones -inf, as rows of `pitch` tokens."""
    logit = tl.where(live[:, None], logit, float("-inf"))
    tl.store(logits + (channel[None, :] * pitch + token[:, None]), logit, mask=valid[None, :])


@triton.jit
def stream_block(
    query, key, value, anchor, relevance, value_norm, logits,
    query_steps, key_steps, value_steps, anchor_steps, b, block, pitch, tokens, anchors,
    start, scored_from, end, scale, factor,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr,
    DV: tl.constexpr, DV_MAIN: tl.constexpr, DV_REST: tl.constexpr, UNIT: tl.constexpr,
    RELEVANCE: tl.constexpr, VALUE_NORM: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr, ANCHORS: tl.constexpr,
):  # fmt: skip
    """Everything that one block of tokens contributes; `b` is int64, steps are strides over (batch, head, token)."""
    token = block * TOKENS + tl.arange(0, TOKENS)
    live = (token >= start) & (token < end)
    anchor_id = tl.arange(0, ANCHORS)

    # Sums over heads and their elements stay apart by head of the tile and by lane until the end: no shuffles.
    VECTOR: tl.constexpr = 128 // value.dtype.element_ty.primitive_bitwidth
    LANES: tl.constexpr = DV_MAIN // VECTOR if DV_MAIN > VECTOR else 1
    REST_LANES: tl.constexpr = DV_REST // VECTOR if DV_REST > VECTOR else 1
    dot = tl.zeros([TOKENS, HEADS, LANES, ANCHORS], tl.float32)
    dot_rest = tl.zeros([TOKENS, HEADS, REST_LANES, ANCHORS], tl.float32)
    square = tl.zeros([TOKENS, HEADS, LANES], tl.float32)
    square_rest = tl.zeros([TOKENS, HEADS, REST_LANES], tl.float32)
    norm, norm_rest = square, square_rest
    head_sum = tl.zeros([TOKENS, DV_MAIN], tl.float32)
    head_sum_rest = tl.zeros([TOKENS, DV_REST if DV_REST else 1], tl.float32)

    every = tl.arange(0, triton.next_power_of_2(G))
    among = (every < G)[None, :, None]
    if RELEVANCE == "COSINE" and ANCHORS == 1:
        # Asked for here and needed after the loop: nobody waits for it.
        anchor_row = _rows(anchor, _offset(anchor_steps, b, 0, every, b * 0, UNIT), among, DV, DV_MAIN, DV_REST)

    tile = tl.arange(0, HEADS)
    for first in tl.range(0, G, HEADS, num_stages=STAGES):
        head = first + tile
        valid = head < G
        mask = live[:, None, None]
        head_mask = head[None, :, None] >= 0
        if G % HEADS:
            mask = mask & valid[None, :, None]
            head_mask = valid[None, :, None]
        # Anchors beyond the first find the tile in L1. Their rows are loaded before the tile, so that the compiler
        # brings them to the tile's layout and not the other way round.
        for r in range(anchors):
            if RELEVANCE != "NONE":
                at = _offset(anchor_steps, b, first, tile, b * 0 + r, UNIT)
                a = _rows(anchor, at, head_mask, DV, DV_MAIN, DV_REST)
            if RELEVANCE != "NONE" or VALUE_NORM != "NONE":
                at = _offset(value_steps, b, first, tile, token[:, None, None], UNIT)
                v = _rows(value, at, mask, DV, DV_MAIN, DV_REST)
            for j in tl.static_range(H // G):
                each = tile * (H // G) + j
                at = _offset(query_steps, b, first * (H // G), each, b * 0 + r, UNIT)
                q = _rows(query, at, head_mask, D, D_MAIN, D_REST)
                at = _offset(key_steps, b, first, tile, token[:, None, None], UNIT)
                k = _rows(key, at, mask, D, D_MAIN, D_REST)
                channel = r * H + first * (H // G) + each
                _leave(_dot(k, q) * scale, live, token, channel, valid, pitch, logits)
            if RELEVANCE == "COSINE":
                mine = (anchor_id == r)[None, None, None, :]
                dot += tl.where(mine, _lanes(v[0].to(tl.float32) * a[0].to(tl.float32), VECTOR)[:, :, :, None], 0.0)
                if DV_REST:
                    rest = _lanes(v[1].to(tl.float32) * a[1].to(tl.float32), VECTOR)
                    dot_rest += tl.where(mine, rest[:, :, :, None], 0.0)
            elif RELEVANCE != "NONE":
                _leave(_dot(v, a) * factor, live, token, anchors * H + r * G + head, valid, pitch, logits)
            if r == 0:
                if RELEVANCE == "COSINE":
                    square += _lanes(v[0].to(tl.float32) * v[0].to(tl.float32), VECTOR)
                    if DV_REST:
                        square_rest += _lanes(v[1].to(tl.float32) * v[1].to(tl.float32), VECTOR)
                if VALUE_NORM == "FULL":
                    norm += _lanes(tl.abs(v[0].to(tl.float32)), VECTOR)
                    if DV_REST:
                        norm_rest += _lanes(tl.abs(v[1].to(tl.float32)), VECTOR)
                if VALUE_NORM == "HEAD_MEAN":
                    head_sum += tl.sum(v[0].to(tl.float32), 1)
                    if DV_REST:
                        head_sum_rest += tl.sum(v[1].to(tl.float32), 1)

    scored = live & (token >= scored_from)
    if RELEVANCE == "COSINE":
        anchor_square = tl.zeros([ANCHORS], tl.float32)
        for r in range(anchors):
            if ANCHORS > 1:
                at = _offset(anchor_steps, b, 0, every, b * 0 + r, UNIT)
                anchor_row = _rows(anchor, at, among, DV, DV_MAIN, DV_REST)
            anchor_square += tl.where(anchor_id == r, _squares(anchor_row), 0.0)
        anchor_norm = tl.maximum(tl.sqrt(anchor_square), TINY)
        token_norm = tl.maximum(tl.sqrt(_total(square, square_rest, DV_REST)), TINY)
        cosine = _total(dot, dot_rest, DV_REST) / anchor_norm[None, :] / token_norm[:, None]
        tl.store(
            relevance + (b * anchors + anchor_id[None, :]) * tokens + token[:, None],
            tl.where(scored[:, None], (1 + cosine) * 0.5, 0.0),
            mask=(anchor_id < anchors)[None, :] & (token < tokens)[:, None],
        )
    if VALUE_NORM != "NONE":
        if VALUE_NORM == "FULL":
            total = _total(norm, norm_rest, DV_REST)
        else:
            total = tl.sum(tl.abs(head_sum), 1) / G
            if DV_REST:
                total += tl.sum(tl.abs(head_sum_rest), 1) / G
        tl.store(value_norm + b * tokens + token, tl.where(scored, total, 0.0), mask=token < tokens)


@triton.jit
def finish_image(
    attention, relevance, entropy, logits, b, pitch, tokens, anchors, scored_from, end,
    H: tl.constexpr, G: tl.constexpr, RELEVANCE: tl.constexpr, TAIL_HEADS: tl.constexpr, TAIL_TOKENS: tl.constexpr,
):  # fmt: skip
    """Softmaxes and entropy of an image all of whose blocks are in."""
    count = tl.maximum(end - scored_from, 0)
    for r in range(anchors):
        row = (b * anchors + r) * tokens
        mass, surprise = head_mean_softmax(
            logits + r * H * pitch, H, pitch, attention + row, tokens, scored_from, end, TAIL_HEADS, TAIL_TOKENS
        )
        tl.store(entropy + b * anchors + r, entropy_ratio(mass, surprise, count))
        if RELEVANCE != "NONE" and RELEVANCE != "COSINE":
            head_mean_softmax(
                logits + (anchors * H + r * G) * pitch, G, pitch, relevance + row, tokens, scored_from, end,
                TAIL_HEADS, TAIL_TOKENS,
            )  # fmt: skip


@triton.jit
def read_span(key_span, b, tokens, protect):
    """Live span [start, end) of image b within the tokens, and where its scored part begins."""
    if key_span is None:
        start, end = b.to(tl.int32) * 0, tokens
    else:
        start = tl.load(key_span + 2 * b).to(tl.int32)
        end = tl.minimum(tl.load(key_span + 2 * b + 1), tokens).to(tl.int32)
    return start, tl.maximum(start + protect, 0), end


@triton.jit
def statistics_program(
    block, blocks, b, start, scored_from, end, query, key, value, anchor,
    attention, relevance, value_norm, entropy, scratch, counters, selection,
    query_steps, key_steps, value_steps, anchor_steps, pitch, image_size, tokens, anchors, protect, scale, factor,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr,
    DV: tl.constexpr, DV_MAIN: tl.constexpr, DV_REST: tl.constexpr, UNIT: tl.constexpr,
    RELEVANCE: tl.constexpr, VALUE_NORM: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr, ANCHORS: tl.constexpr,
    TAIL_HEADS: tl.constexpr, TAIL_TOKENS: tl.constexpr,
    MODE: tl.constexpr, SELECT_TILES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The whole program for block `block` of the `blocks` of image b, inside whatever launch runs it.

    MODE None: statistics alone; else `selection` has the arguments of `select_image` that only it needs.
    """
    logits = scratch + b * image_size
    stream_block(
        query, key, value, anchor, relevance, value_norm, logits,
        query_steps, key_steps, value_steps, anchor_steps, b, block, pitch, tokens, anchors,
        start, scored_from, end, scale, factor,
        H, G, D, D_MAIN, D_REST, DV, DV_MAIN, DV_REST, UNIT, RELEVANCE, VALUE_NORM, TOKENS, HEADS, STAGES, ANCHORS,
    )  # fmt: skip
    # The barrier gathers this program's stores before the one thread that announces them.
    tl.debug_barrier()
    if tl.atomic_add(counters + b, 1, sem="acq_rel") == blocks - 1:
        finish_image(
            attention, relevance, entropy, logits, b, pitch, tokens, anchors, scored_from, end,
            H, G, RELEVANCE, TAIL_HEADS, TAIL_TOKENS,
        )  # fmt: skip
        if MODE is not None:
            # The scores are made from what other threads of this program have just written.
            tl.debug_barrier()
            criterion, counting, history, lengths, budgets, score, index, new_lengths = selection[0]
            width, weights, history_weight, score_weight, budget, divisor, entropy_exponent = selection[1]
            select_image(
                b, criterion, relevance if RELEVANCE != "NONE" else None,
                value_norm if VALUE_NORM != "NONE" else None, history, counting, lengths, budgets, score, index,
                new_lengths, tl.num_programs(1), tokens, width, weights, history_weight, score_weight, protect, budget,
                divisor, entropy_exponent, MODE, 1024, SELECT_TILES, 1, GROUP,
            )  # fmt: skip
        tl.store(counters + b, 0)


# Pruning changes the number of tokens from layer to layer: it must not mean a new kernel each time.
@triton.jit(do_not_specialize=["tokens"])
def _anchor_stats(
    query, key, value, anchor, key_span, attention, relevance, value_norm, entropy, scratch, counters, selection,
    query_steps, key_steps, value_steps, anchor_steps, pitch, image_size, tokens, anchors, protect, scale, factor,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr,
    DV: tl.constexpr, DV_MAIN: tl.constexpr, DV_REST: tl.constexpr, UNIT: tl.constexpr,
    RELEVANCE: tl.constexpr, VALUE_NORM: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr, ANCHORS: tl.constexpr,
    TAIL_HEADS: tl.constexpr, TAIL_TOKENS: tl.constexpr,
    MODE: tl.constexpr, SELECT_TILES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    start, scored_from, end = read_span(key_span, b, tokens, protect)
    if MODE is not None:
        lengths = selection[0][3]
        if lengths is not None:
            end = tl.minimum(tl.load(lengths + b), tokens).to(tl.int32)
    statistics_program(
        tl.program_id(0), tl.num_programs(0), b, start, scored_from, end, query, key, value, anchor,
        attention, relevance, value_norm, entropy, scratch, counters, selection,
        query_steps, key_steps, value_steps, anchor_steps, pitch, image_size, tokens, anchors, protect, scale, factor,
        H, G, D, D_MAIN, D_REST, DV, DV_MAIN, DV_REST, UNIT, RELEVANCE, VALUE_NORM,
        TOKENS, HEADS, STAGES, ANCHORS, TAIL_HEADS, TAIL_TOKENS, MODE, SELECT_TILES, GROUP,
    )  # fmt: skip


# As in `_anchor_stats`, other numbers of tokens are no new kernel.
@triton.jit(do_not_specialize=["tokens", "tiles"])
def _anchor_logits(
    query, key, key_span, logits, query_steps, key_steps, pitch, image_size, tokens, tiles, anchors, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Base-2 logits [anchors, H, pitch] of ROWS anchors over KEYS tokens of one head, -inf of dead ones."""
    b, head = tl.program_id(1).to(tl.int64), tl.program_id(0) // tiles
    first, anchor = tl.program_id(0) % tiles * KEYS, tl.program_id(2) * ROWS
    start, _, end = read_span(key_span, b, tokens, 0)
    query_step, key_step = query_steps[2] * UNIT, key_steps[2] * UNIT
    query += (b * query_steps[0] + head.to(tl.int64) * query_steps[1]) * UNIT + wide(anchor) * query_step
    key += (b * key_steps[0] + (head // (H // G)).to(tl.int64) * key_steps[1]) * UNIT + wide(first) * key_step
    rows = load_rows(query, query_step, anchors - anchor, None, D, MAIN, REST, ROWS)
    product = dots(rows, key, key_step, tokens - first, D, MAIN, REST, KEYS, WIDEN)
    row, token = anchor + tl.arange(0, ROWS)[:, None], first + tl.arange(0, KEYS)[None, :]
    logit = tl.where((token >= start) & (token < end), product * scale, float("-inf"))
    at = logits + b * image_size + (row * H + head) * pitch + token
    tl.store(at, logit, mask=(row < anchors) & (token < tokens))


@triton.jit(do_not_specialize=["tokens"])
def _anchor_rows(
    logits, key_span, attention, entropy, pitch, image_size, tokens, anchors, protect,
    H: tl.constexpr, TAIL_HEADS: tl.constexpr, TAIL_TOKENS: tl.constexpr,
):  # fmt: skip
    """Softmax and entropy of one anchor."""
    r, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    _, scored_from, end = read_span(key_span, b, tokens, protect)
    finish_image(
        attention + r * tokens, None, entropy + r, logits + b * image_size + r * H * pitch, b * anchors, pitch, tokens,
        1, scored_from, end, H, H, "NONE", TAIL_HEADS, TAIL_TOKENS,
    )  # fmt: skip


def _block_shape(batch: int, tokens: int, heads: int, dim: int, itemsize: int) -> tuple[int, int, int]:
    """Tokens per program, heads per tile and pipeline stages (`dim`: the power of 2 that a row's main tile has).

    Enough work: 32 or 16 tokens, 8 KiB tiles of K and of V, three stages: 32 KiB of loads in flight per program, and
    two or three programs of 8 warps on a Hopper multiprocessor (bandwidth times latency is about 36 KiB there). Tiles
    span at most 128 elements of a token: an anchor tile smaller than a program has threads costs no layout conversion.
    Little work: blocks of 8 or 4 tokens and all of a block in one tile, so that everything is in flight at once.
    """
    for block in (32, 16):
        if batch * cdiv(tokens, block) >= ENOUGH_PROGRAMS and block * dim * itemsize <= 8192:
            chunk, stages = min(128 // dim, 8192 // (block * dim * itemsize)), 3
            break
    else:
        block = 8 if batch * cdiv(tokens, 8) >= ENOUGH_PROGRAMS else 4
        chunk, stages = 16384 // (block * dim * itemsize), 1
    chunk = max(chunk, 1)
    while chunk > 1 and cdiv(heads, chunk) * chunk * 7 > heads * 8:  # at most 1/8 of the lanes idle
        chunk //= 2
    return block, chunk, stages


class Plan(NamedTuple):
    """What a launch with statistics programs needs of them, whatever else it does."""

    blocks: int  # programs per image
    outputs: list[Tensor]  # attention, relevance, value norm, entropy
    scratch: tuple  # logits and arrival counters
    sizes: tuple[int, int]  # pitch and image_size
    factor: float
    meta: dict[str, Any]  # constexpr arguments


def plan_statistics(
    key: Tensor,
    value: Tensor,
    query_heads: int,
    anchors: int,
    batch: int,
    tokens: int,
    relevance: int,
    value_norm: int,
) -> Plan:
    """Block sizes, outputs and scratch for `batch` images of up to `tokens` tokens of K and V."""
    blocks, scratch, sizes, factor, meta = _layout(
        key.shape[1], key.shape[3], value.shape[3], key.element_size(), query_heads, anchors, batch, tokens, relevance,
        value_norm,
    )  # fmt: skip
    device = key.device
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=device)  # noqa: E731
    outputs = [
        new(batch, anchors, tokens),
        new(batch, anchors, tokens if relevance else 0),
        new(batch, tokens if value_norm else 0),
        new(batch, anchors),
    ]
    if not tokens:  # no program runs: an empty image has entropy ratio 1
        outputs[3].fill_(1.0)
    return Plan(blocks, outputs, (new(scratch), arrival_counters(batch, device)), sizes, factor, meta)


@lru_cache(maxsize=256)
def _layout(
    heads: int,
    dim: int,
    value_dim: int,
    itemsize: int,
    query_heads: int,
    anchors: int,
    batch: int,
    tokens: int,
    relevance: int,
    value_norm: int,
) -> tuple[int, int, tuple[int, int], float, dict[str, Any]]:
    """What a plan takes from shapes alone, the number of logits in place of scratch."""
    main, value_main = (1 << (d.bit_length() - 1) for d in (dim, value_dim))
    rest, value_rest = (next_power_of_2(d - m) if d > m else 0 for d, m in ((dim, main), (value_dim, value_main)))
    block, chunk, stages = _block_shape(batch, tokens, heads, max(main, value_main), itemsize)
    softmax = relevance in (Relevance.SOFTMAX, Relevance.SCALED_SOFTMAX)
    channels = anchors * (query_heads + heads if softmax else query_heads)
    # Nothing else runs when the last image is finished: wide tiles, up to 64 registers for each thread of 8 warps.
    tail_heads = next_power_of_2(query_heads)
    tail_tokens = max(min(256 if tokens <= 256 else 1024, 16384 // tail_heads), 128)
    pitch = cdiv(tokens, max(block, 16)) * max(block, 16)
    if channels * pitch >= 2**31:
        raise ValueError(f"anchor_stats: {anchors} anchors x {query_heads} heads x {tokens} tokens are too many logits")
    return (
        cdiv(tokens, block),
        batch * channels * pitch,
        (pitch, channels * pitch),
        LOG2_E * (value_dim**-0.5 if relevance == Relevance.SCALED_SOFTMAX else 1.0),
        dict(
            D_MAIN=main, D_REST=rest, DV_MAIN=value_main, DV_REST=value_rest,
            RELEVANCE=Relevance(relevance).name, VALUE_NORM=ValueNorm(value_norm).name,
            TOKENS=block, HEADS=chunk, STAGES=stages, ANCHORS=next_power_of_2(anchors),
            TAIL_HEADS=tail_heads, TAIL_TOKENS=tail_tokens,
        ),
    )  # fmt: skip


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    value_anchor: Tensor | None,
    key_span: Tensor | None,
    *,
    scale: float,
    protect: int,
    relevance: int,
    value_norm: int,
    selection: dict | None = None,
) -> Launch:
    """The launch of :func:`anchor_stats`, or with `selection` (that function's further options) of the fused form."""
    batch, query_heads, anchors, dim = query.shape
    heads, tokens, value_dim = key.shape[1], key.shape[2], value.shape[3]
    query, value_anchor = contiguous_rows(query), contiguous_rows(value_anchor)
    if key_span is not None:
        key_span = key_span.contiguous()
    plan = plan_statistics(key, value, query_heads, anchors, batch, tokens, relevance, value_norm)

    outputs = list(plan.outputs)
    select_arguments, mode, block = None, None, 1
    if selection is not None:
        mode, budget, weight = int(selection["mode"]), selection["budget"], selection["history_weight"]
        block = selection.get("block", 1)
        given = (selection["history"], selection["lengths"], selection.get("budgets"))
        history, lengths, budgets = (None if x is None else x.contiguous() for x in given)
        weights, entropy_exponent = powers(selection["criteria_weights"], selection["entropy_exponent"])
        selected = select_outputs(key, batch, tokens, mode, protect, block * budget)
        # Without a divisor the count is n - budget whatever the entropy.
        criterion, counting = plan.outputs[0], plan.outputs[3]
        select_arguments = (
            (
                criterion if selection["attention"] else None, counting if selection["divisor"] else None,
                history, lengths, budgets, *selected,
            ),
            (selected[1].shape[1], weights, weight, 1 - weight, budget, selection["divisor"], entropy_exponent),
        )  # fmt: skip
        outputs += selected
        if not tokens:  # no program runs: an empty image's new length is 0
            outputs[-1].zero_()

    unit, all_steps = unit_steps(query, key, value, value_anchor)
    return Launch(
        _anchor_stats,
        (plan.blocks, batch if anchors else 0),
        (
            query, key, value, value_anchor, key_span, *plan.outputs, *plan.scratch, select_arguments,
            *all_steps, *plan.sizes, tokens, anchors, protect, scale * LOG2_E, plan.factor,
        ),
        dict(
            plan.meta, H=query_heads, G=heads, D=dim, DV=value_dim, UNIT=unit,
            MODE=None if mode is None else Select(mode).name, SELECT_TILES=cdiv(tokens, 1024), GROUP=block,
            # Left alone, ptxas spills a few bytes in some variants to reach 80 registers, or 64. At 128 two programs
            # still fit a multiprocessor; the sums of many anchors need more.
            num_warps=8, maxnreg=128 if anchors <= 4 else 255, enable_fp_fusion=True,
        ),
        key.device,
        outputs,
    )  # fmt: skip


def prepare_all(
    query: Tensor, key: Tensor, value: Tensor, value_anchor: Tensor | None, key_span: Tensor | None, **options: Any
) -> list[Launch]:
    """The launches of :func:`anchor_stats`, with its options; the last one's outputs are its results."""
    batch, heads, anchors, dim = query.shape
    relevance, value_norm = options["relevance"], options["value_norm"]
    if anchors <= _FEW or relevance != Relevance.NONE or value_norm != ValueNorm.NONE or dim > 128:
        return [prepare(query, key, value, value_anchor, key_span, **options)]
    query, tokens = contiguous_rows(query), key.shape[2]
    if key_span is not None:
        key_span = key_span.contiguous()
    plan = plan_statistics(key, value, heads, anchors, batch, tokens, relevance, value_norm)
    logits, sizes = plan.scratch[0], (*plan.sizes, tokens)
    # Tiles of float32 lie in registers, its products run outside the tensor cores.
    rows, keys = (16, 32) if key.element_size() == 4 else (min(max(next_power_of_2(anchors), 16), 64), 128)
    (main, rest), tiles = tile_widths(dim, key.element_size()), cdiv(tokens, keys)
    unit, steps = unit_steps(query, key)
    return [
        Launch(
            _anchor_logits,
            (heads * tiles, batch, cdiv(anchors, rows)),
            (query, key, key_span, logits, *steps, *sizes, tiles, anchors, options["scale"] * LOG2_E),
            dict(
                H=heads, G=key.shape[1], D=dim, UNIT=unit, MAIN=main, REST=rest, ROWS=rows, KEYS=keys,
                WIDEN=key.device.type == "cpu", num_warps=4, enable_fp_fusion=True,
            ),
            key.device,
        ),
        Launch(
            _anchor_rows,
            (anchors, batch),
            (logits, key_span, plan.outputs[0], plan.outputs[3], *sizes, anchors, options["protect"]),
            dict(
                H=heads, TAIL_HEADS=plan.meta["TAIL_HEADS"], TAIL_TOKENS=plan.meta["TAIL_TOKENS"], num_warps=8,
                enable_fp_fusion=True,
            ),
            key.device,
            plan.outputs,
        ),
    ]  # fmt: skip


def anchor_stats(*arguments, **options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments, results and definition: ``reference.py``; float32, bfloat16 or float16 inputs."""
    for launch in prepare_all(*arguments, **options):
        outputs = launch()
    attention, relevance, value_norm, entropy = outputs
    return attention, relevance, value_norm, entropy
