"""What the Triton forms share: launches, arrival counters, products of rows, and the two tails that finish an image.

`head_mean_softmax` is the statistics tail and `select_image` the selection tail. Both work on one image from device
memory, so that the same body serves a launch of its own and the last program of a fused launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from ctypes import c_float
from dataclasses import dataclass, field
from functools import lru_cache
from math import gcd
from threading import Lock
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs that fill a large GPU about three times over (132 multiprocessors); launchers shrink their blocks until a
# launch has as many. Only a heuristic: fewer multiprocessors just see more waves.
ENOUGH_PROGRAMS = 400

_IMAGES = 65535  # of a launch: a grid's second axis (CUDA C++ Programming Guide, "Compute Capabilities")

LOG2_E = 1.4426950408889634
# The most negative float32: a maximum that is finite even when nothing lives.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# The least normal float32: smaller numbers may be flushed to 0 by the logarithm.
TINY = tl.constexpr(1.1754943508222875e-38)


@dataclass
class Launch:
    """One prepared kernel launch. Built from meta tensors, it can be compiled without a GPU (``bench/compile.py``)."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple
    meta: dict[str, Any]  # constexpr arguments and compile options
    device: torch.device
    outputs: list[Tensor] = field(default_factory=list)

    def __call__(self) -> list[Tensor]:
        """Launch on the device's current stream (nothing for an empty grid); returns the outputs.

        ValueError for more images than the grid's second axis takes.
        """
        if len(self.grid) > 1 and self.grid[1] > _IMAGES:
            raise ValueError(
                f"{self.kernel.fn.__name__.lstrip('_')}: {self.grid[1]} images (or segments of cu_seqlens) in one "
                f"call, a GPU's grid takes {_IMAGES}: pass fewer at a time"
            )
        if all(self.grid):
            with device_guard(self.device):
                self.kernel[self.grid](*self.arguments, **self.meta)
        return self.outputs


# Triton's own two are kernel code that runs on the host too: 5 us a call, a dozen calls a launch.
def cdiv(n: int, size: int) -> int:
    """Blocks of `size` that cover n."""
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is at least n; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


def device_guard(device: torch.device):
    """Make `device` current if it is a GPU: Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def architecture(device: torch.device) -> int:
    """90 for an sm_90 device; for the interpreter 80, the least that the kernels are written for."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def steps(shape: tuple[int, ...], strides: tuple[int, ...], dims: int) -> tuple[int, ...]:
    """The leading `dims` strides; 0 where a dimension of size 1 makes the stride meaningless."""
    return tuple(s if n > 1 else 0 for s, n in zip(strides[:dims], shape[:dims], strict=True))


def vector_unit(itemsize: int, *sizes: int) -> int:
    """Elements of the widest access (at most 16 bytes) that all sizes are a multiple of.

    Sizes and strides go to the kernels divided by it and are multiplied again inside: the compiler then knows that
    rows of 72 or 88 elements are 16-byte aligned, which it cannot see in the numbers themselves.
    """
    return gcd(16 // itemsize, *sizes)


Steps = tuple[int, tuple[tuple[int, ...] | None, ...]]


def unit_steps(*tensors: Tensor | None) -> Steps:
    """The common vector unit of tensors [batch, heads, tokens, dim], and their first three strides divided by it."""
    itemsize = next(x.element_size() for x in tensors if x is not None)
    return _unit_steps(itemsize, *(None if x is None else (x.shape, x.stride()) for x in tensors))


@lru_cache(maxsize=1024)  # this and its like take longer than a launch, in every layer that scores
def _unit_steps(itemsize: int, *tensors: tuple[tuple[int, ...], tuple[int, ...]] | None) -> Steps:
    given = [None if x is None else steps(*x, 3) for x in tensors]
    unit = vector_unit(itemsize, *(s for three in given if three for s in three))
    return unit, tuple(None if three is None else tuple(s // unit for s in three) for three in given)


def contiguous_rows(x: Tensor | None) -> Tensor | None:
    """x, copied only if its last dimension is strided."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


# Zeroed counters by (device, stream), and by device those that nobody has taken yet.
_counters: dict[tuple[int, int], Tensor] = {}
_reserve: dict[int, Tensor] = {}
_lock = Lock()  # threads launch too, and no two streams may have the same counters
_RESERVE, _SHARE = 1 << 16, 1 << 10


def reserve_counters(device: torch.device) -> None:
    """Make a GPU's counters, so that no later launch allocates any, be it captured or in a private memory pool."""
    with _lock:
        if device.index not in _reserve:
            with device_guard(device):
                reserve = torch.zeros(_RESERVE, dtype=torch.int32, device=device)
                torch.cuda.synchronize(device)  # launches of any stream may take from it
            _reserve[device.index] = reserve


def arrival_counters(count: int, device: torch.device) -> Tensor:
    """`count` int32 zeros for one launch, which must leave them at zero again; no memset in the steady state.

    Launches of a stream run one after another and share their counters. A captured launch may be replayed beside
    anything, so it gets counters of its own. Only a capture that nothing warmed up, or one that finds the reserve of
    65,536 exhausted, pays a memset node.
    """
    count = -(-count // 4) * 4  # slices stay 16-byte aligned
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    with device_guard(device):
        if torch.cuda.is_current_stream_capturing():
            return _take(count, device)
        key = (device.index, torch.cuda.current_stream().cuda_stream)
        if key not in _counters or _counters[key].numel() < count:
            reserve_counters(device)
            _counters[key] = _take(max(count, _SHARE), device)
        return _counters[key]


def _take(count: int, device: torch.device) -> Tensor:
    with _lock:
        reserve = _reserve.get(device.index)
        if reserve is not None and reserve.numel() >= count:
            _reserve[device.index] = reserve[count:]
            return reserve[:count]
    return torch.zeros(count, dtype=torch.int32, device=device)


def powers(criteria_weights: Sequence[float], entropy_exponent: float) -> tuple[tuple, float | None]:
    """Weights and exponent as `select_image` takes them: None for g^1 and h^2, which need no power."""
    *shares, norm = criteria_weights
    # A launch rounds to float32, the interpreter does not.
    norm, entropy = (c_float(x).value for x in (norm, entropy_exponent))
    return (*shares, None if norm == 1 else norm), None if entropy == 2 else entropy


def tile_widths(dim: int, itemsize: int) -> tuple[int, int]:
    """Widths of the two tiles that hold a row of a product, powers of 2 and at least 16; 72 is 64 + 16, not 128."""
    main = min(max(1 << (dim.bit_length() - 1), 16), 256 // itemsize)
    return main, max(next_power_of_2(dim - main), 16) if dim > main else 0


@triton.jit
def load_columns(pointer, step, rows, D: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """COLUMNS elements from FIRST of ROWS rows `step` apart; rows None: all are there, else the first `rows` of them.

    Elements beyond D and rows that are not there are 0.
    """
    row = tl.arange(0, ROWS)[:, None]
    d = FIRST + tl.arange(0, COLUMNS)[None, :]
    pointers = pointer + row * step + d
    if rows is None and FIRST + COLUMNS <= D:
        return tl.load(pointers)
    elif rows is None:
        return tl.load(pointers, mask=(row >= 0) & (d < D), other=0.0)
    elif FIRST + COLUMNS <= D:
        return tl.load(pointers, mask=(row < rows) & (d >= 0), other=0.0)
    else:
        return tl.load(pointers, mask=(row < rows) & (d < D), other=0.0)


@triton.jit
def load_rows(pointer, step, rows, sign, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr):
    """ROWS rows as the two tiles (main, rest) that `dots` takes, times a sign (None: as they are)."""
    main = load_columns(pointer, step, rows, D, 0, MAIN, ROWS)
    if sign is not None:
        main = (main.to(tl.float32) * sign).to(main.dtype)
    rest = main
    if REST:
        rest = load_columns(pointer, step, rows, D, MAIN, REST, ROWS)
        if sign is not None:
            rest = (rest.to(tl.float32) * sign).to(main.dtype)
    return main, rest


@triton.jit
def wide(x):
    """x in 64 bits; by way of a tensor, since the interpreter's loop counters are plain numbers."""
    return tl.full([], x, tl.int64)


@triton.jit
def product_sum(x, y, total, WIDEN: tl.constexpr):
    """total + x @ y in fp32; WIDEN for the interpreter, whose products know no bf16."""
    if WIDEN:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, total, input_precision="ieee")


@triton.jit
def dots(
    x, pointer, step, rows, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Products of the rows x = (main, rest) with ROWS rows at `pointer`, of which `rows` are there (None: all)."""
    y = load_columns(pointer, step, rows, D, 0, MAIN, ROWS)
    product = product_sum(x[0], tl.trans(y), None, WIDEN)
    if REST:
        y = load_columns(pointer, step, rows, D, MAIN, REST, ROWS)
        product = product_sum(x[1], tl.trans(y), product, WIDEN)
    return product


@triton.jit
def weigh(
    x, pointer, step, rows, scale, peak, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """A step of the online softmax, scale >= 0: weights of ROWS more rows relative to the new peak, and that."""
    product = dots(x, pointer, step, rows, D, MAIN, REST, ROWS, WIDEN)
    if rows is None:
        new_peak = tl.maximum(peak, tl.max(product, 1) * scale)
        weight = tl.exp2(product * scale - new_peak[:, None])
    else:
        logit = tl.where((tl.arange(0, ROWS) < rows)[None, :], product * scale, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logit, 1))
        weight = tl.exp2(logit - new_peak[:, None])
    return weight, new_peak


@triton.jit
def _logits(row, token, tokens):
    """Logits of tokens, -inf behind the last one, where lies nothing that anybody wrote."""
    # The mask ends at a multiple of 4, so that loads are wide.
    logit = tl.load(row + token, mask=token < (tokens + 3) // 4 * 4, other=float("-inf"))
    return tl.where(token < tokens, logit, float("-inf"))


@triton.jit
def head_mean_softmax(logits, heads, pitch, out, tokens, scored_from, end, HEADS: tl.constexpr, TOKENS: tl.constexpr):
    """Write the mean over `heads` channels of the softmax of their base-2 logits; return (sum a, sum a log2 a).

    logits [heads, pitch], -inf where dead, pitch a multiple of 4; out [tokens] is 0 outside the scored tokens
    [scored_from, end). Two passes over tiles of TOKENS tokens, all loads of a tile in flight at once; the second finds
    them in L1 (16 heads of 577 tokens are 37 KB). A peak and a total left by every block would spare the first pass,
    but each block would have to reduce over its tokens: across warps in every step of its stream, or after one more
    trip of its logits through L2, the last of which the tail waits for. At 577 tokens in blocks of 8 that is what it
    saves.
    """
    # Padded heads read the last one and weigh nothing: loads need no mask for them.
    head = tl.arange(0, HEADS)
    row = logits + tl.minimum(head, heads - 1) * pitch
    peak = tl.full([HEADS], LOWEST, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    # Of [TOKENS / 128, HEADS, 128] a warp holds a few heads, so that sums over tokens need no other warp.
    place = tl.arange(0, TOKENS // 128)[:, None, None] * 128 + tl.arange(0, 128)[None, None, :]
    for start in tl.range(0, tokens, TOKENS):
        logit = _logits(row[None, :, None], start + place, tokens)
        new_peak = tl.maximum(peak, tl.max(tl.max(logit, 0), 1))
        weight = tl.exp2(logit - new_peak[None, :, None])
        total = total * tl.exp2(peak - new_peak) + tl.sum(tl.sum(weight, 0), 1)
        peak = new_peak
    # A span without live keys sums to 0; a NaN stays and spreads over the image, as in the definition.
    weight = tl.where(head < heads, 1.0 / (tl.where(total == 0, 1.0, total) * heads), 0.0)

    mass = tl.zeros([TOKENS], tl.float32)
    surprise = tl.zeros([TOKENS], tl.float32)
    for start in tl.range(0, tokens, TOKENS):
        # Of [HEADS, TOKENS] a warp holds a few tokens, all of their heads where tiles are wide.
        token = start + tl.arange(0, TOKENS)
        logit = _logits(row[:, None], token[None, :], tokens)
        mean = tl.sum(tl.exp2(logit - peak[:, None]) * weight[:, None], 0)
        mean = tl.where((token >= scored_from) & (token < end), mean, 0.0)
        tl.store(out + token, mean, mask=token < tokens)
        mass += mean
        surprise += mean * tl.log2(tl.maximum(mean, TINY))
    return tl.sum(mass, 0), tl.sum(surprise, 0)


@triton.jit
def entropy_ratio(mass, surprise, count):
    """Entropy of a / sum a over log(count), from sum a and sum a log2 a; 1 where there is nothing to choose from."""
    some = tl.where(mass == 0, 1.0, mass)
    ratio = (tl.log2(some) - surprise / some) / tl.log2(tl.maximum(count, 2).to(tl.float32))
    return tl.where((count <= 1) | (mass == 0), 1.0, ratio)


@triton.jit
def _product(x, y):
    """The rounded float32 product: by way of float64, so that no compiler contracts it with a neighbour to an fma."""
    return (x.to(tl.float64) * y.to(tl.float64)).to(tl.float32)


@triton.jit
def _power(x, exponent):
    """x^exponent of x >= 0, in float64 and rounded once, so that all forms agree on the float32."""
    return tl.exp2(exponent * tl.log2(x.to(tl.float64))).to(tl.float32)


@triton.jit
def _adaptive_count(n, entropy, tokens, budget, divisor, exponent):
    """round_half_even((n - budget) / divisor * (1 - h^e)) within 0..tokens, in the definition's float32 arithmetic.

    exponent None: e = 2.
    """
    if exponent is None:  # noqa: SIM108
        power = _product(entropy, entropy)
    else:
        power = _power(tl.where(entropy < 0, 0.0, entropy), exponent)
    count = _product(tl.div_rn((n - budget).to(tl.float32), divisor), 1.0 - power)
    count = tl.where(count > 0, tl.minimum(count, tokens), 0.0)
    whole = tl.floor(count)
    rest = count - whole
    odd = whole - 2 * tl.floor(whole * 0.5)
    return (whole + tl.where((rest > 0.5) | ((rest == 0.5) & (odd > 0)), 1.0, 0.0)).to(tl.int32)


@triton.jit
def live_tokens(lengths, b, tokens, mask):
    """Live tokens of image (or images) b; 0 where masked."""
    if lengths is None:
        return tl.where(mask, tokens, 0)
    else:
        return tl.minimum(tl.load(lengths + b, mask=mask, other=0), tokens).to(tl.int32)


@triton.jit
def _target(budgets, b, budget, mask):
    """Groups that image (or images) b is to end with."""
    if budgets is None:
        return budget
    else:
        return tl.minimum(tl.maximum(tl.load(budgets + b, mask=mask, other=0), 0), budget)


@triton.jit
def _batch_count(
    lengths, entropy, budgets, batch, tokens, protect, budget, divisor, exponent,
    BATCH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The largest count of the batch; every image works it out for itself."""
    image = tl.arange(0, BATCH)
    known = image < batch
    live = live_tokens(lengths, image, tokens, known)
    h = tl.load(entropy + image, mask=known, other=1.0)
    n = tl.maximum(live - protect, 0) // GROUP
    counts = _adaptive_count(n, h, tokens, _target(budgets, image, budget, known), divisor, exponent)
    return tl.max(tl.where(known, counts, 0), 0)


@triton.jit
def _share(criterion, total, column, candidate):
    """criterion / total over the candidates, 0 where the total is 0."""
    x = tl.load(criterion + column, mask=candidate, other=0.0)
    return tl.where(total == 0, 0.0, tl.div_rn(x, tl.where(total == 0, 1.0, total)))


@triton.jit
def _groups(tile, live, protect, COUNT: tl.constexpr, GROUP: tl.constexpr):
    """First tokens of the COUNT groups of a tile, and which of them are candidates.

    Without groups a tile may begin with protected tokens, so that its loads are aligned.
    """
    column = tile * COUNT + tl.arange(0, COUNT)
    if GROUP > 1:
        column = protect + column * GROUP
    return column, (column >= protect) & (column < live)


@triton.jit
def _keys(score, candidate):
    """Candidates' scores as unsigned integers in the same order, everything else 0 (below any finite score)."""
    bits = score.to(tl.uint32, bitcast=True)
    ordered = tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(candidate, ordered, 0)


@triton.jit
def _range(least, most, key, candidate):
    """Least and largest key so far, by place in the tile."""
    return tl.minimum(least, tl.where(candidate, key, 0xFFFFFFFF)), tl.maximum(most, key)


@triton.jit
def _bits(x):
    """Bits that the unsigned x takes: the exponent of a float."""
    x = x ^ (x & (x >> 1))  # its first bit stays, and no rounding reaches the next power of two
    return tl.maximum((x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126, 0)


@triton.jit
def _shifted(key, shift):
    """key >> shift for an even shift of up to 32, which at once is undefined."""
    return key >> shift // 2 >> shift // 2


@triton.jit
def _digit_counts(key, prefix, shift, FIELD: tl.constexpr, COUNT: tl.constexpr):
    """Three fields of a COUNT: 1 where a key starts with `prefix` and its next two bits are >= 1, >= 2, >= 3."""
    high = key >> shift
    digit = high & 3
    counts = (digit >= 1).to(COUNT) | (digit >= 2).to(COUNT) << FIELD | (digit >= 3).to(COUNT) << 2 * FIELD
    return tl.where(high >> 2 == prefix, counts, 0)


@triton.jit
def select_image(
    b, attention, relevance, value_norm, history, entropy, lengths, budgets, score, index, new_lengths,
    batch, tokens, width, weights, history_weight, score_weight, protect, budget, divisor, entropy_exponent,
    MODE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, BATCH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`score_select` for image b (int64), in tiles of TILE tokens; reference.py of that operator is the definition.

    `weights` and `entropy_exponent` come from :func:`powers`, GROUP is `block`.

    The k-th largest score is found digit by digit (two bits a step, counts of the three upper digits in one packed
    sum), from the first bits in which scores differ to those that tell kept from dropped: about 6 steps of 16 where
    none tie. Ties go to the lower index through a prefix sum, and a second field of the same sum gives each kept token
    its place. One tile keeps its keys in registers; more tiles read them again from `score`.
    """
    row = b * tokens
    live = live_tokens(lengths, b, tokens, b >= 0)
    n = tl.maximum(live - protect, 0) // GROUP
    target = _target(budgets, b, budget, b >= 0)
    GROUPS: tl.constexpr = TILE if GROUP == 1 else 1024  # of a tile of theirs
    GROUP_TILES: tl.constexpr = (TILES * TILE + GROUPS * GROUP - 1) // (GROUPS * GROUP)
    # Up to 1,024 keys 32 bits hold the three counts: not all of them have the same digit where any is counted.
    FEW: tl.constexpr = GROUP_TILES * GROUPS <= 1024
    FIELD: tl.constexpr = 11 if FEW else 21
    COUNT: tl.constexpr = tl.uint32 if FEW else tl.int64

    attention_sum = tl.zeros([TILE], tl.float32)
    relevance_sum = tl.zeros([TILE], tl.float32)
    for tile in range(TILES):
        column = tile * TILE + tl.arange(0, TILE)
        candidate = (column >= protect) & (column < live)
        if attention is not None:
            attention_sum += tl.load(attention + row + column, mask=candidate, other=0.0)
        if relevance is not None:
            relevance_sum += tl.load(relevance + row + column, mask=candidate, other=0.0)
    attention_total = tl.sum(attention_sum, 0)
    relevance_total = tl.sum(relevance_sum, 0)

    least = tl.full([GROUPS], 0xFFFFFFFF, tl.uint32)
    most = tl.zeros([GROUPS], tl.uint32)
    key = most
    for tile in range(TILES):
        column = tile * TILE + tl.arange(0, TILE)
        candidate = (column >= protect) & (column < live)
        if attention is None and relevance is None:
            s = tl.full([TILE], 1.0, tl.float32)
        else:
            s = tl.zeros([TILE], tl.float32)
        if attention is not None:
            s += weights[0] * _share(attention + row, attention_total, column, candidate)
        if relevance is not None:
            s += weights[1] * _share(relevance + row, relevance_total, column, candidate)
        if value_norm is not None:
            g = tl.load(value_norm + row + column, mask=candidate, other=0.0)
            if weights[2] is not None:
                g = _power(g, weights[2])
            s *= g
        if history is not None:
            s = history_weight * tl.load(history + row + column, mask=candidate, other=0.0) + score_weight * s
        # -0.0 becomes +0.0, so that the two tie.
        s = tl.where(candidate & (s != 0), s, 0.0)
        if GROUP == 1:
            tile_key = _keys(s, candidate)
            least, most = _range(least, most, tile_key, candidate)
            if TILES == 1:
                key = tile_key
        tl.store(score + row + column, s, mask=column < tokens)
    if GROUP > 1:
        # Other threads' scores are read from here on.
        tl.debug_barrier()
        for tile in range(GROUP_TILES):
            column, candidate = _groups(tile, live, protect, GROUPS, GROUP)
            s = tl.zeros([GROUPS], tl.float32)
            for i in tl.static_range(GROUP):
                s += tl.load(score + row + column + i, mask=candidate, other=0.0)
            s = tl.div_rn(s, tl.full([GROUPS], GROUP, tl.float32))
            tile_key = _keys(s, candidate)
            least, most = _range(least, most, tile_key, candidate)
            if GROUP_TILES == 1:
                key = tile_key
            for i in tl.static_range(GROUP):
                tl.store(score + row + column + i, s, mask=candidate)
    lowest, highest = tl.min(least, 0), tl.max(most, 0)
    finite = (lowest > 0x007FFFFF) & (highest < 0xFF800000)  # keys of the infinities; beyond them are the NaNs

    if MODE == "SCORE_ONLY":
        tl.store(new_lengths + b, tl.where(finite, live, -1))
    else:
        keep = tl.minimum(n, target)
        if MODE != "FIXED" and entropy is not None:
            finite = finite & (tl.abs(tl.load(entropy + b)) < float("inf"))
            if MODE == "ADAPTIVE_BATCH":
                dropped = _batch_count(
                    lengths, entropy, budgets, batch, tokens, protect, budget, divisor, entropy_exponent, BATCH, GROUP
                )
            else:
                dropped = _adaptive_count(n, tl.load(entropy + b), tokens, target, divisor, entropy_exponent)
            keep = tl.maximum(n - dropped, keep)

        if GROUP_TILES > 1:
            # Other threads' scores are read from here on.
            tl.debug_barrier()
        # Keys start with `prefix`, `shift` bits follow; `inside` of them do, of which `need` are to be found.
        shift = (_bits(lowest ^ highest) + 1) // 2 * 2
        shift = tl.where(n > 0, tl.minimum(shift, 32), 0)
        prefix = _shifted(highest, shift)
        need, inside = keep, n
        while (shift > 0) & (need > 0) & (need < inside):
            shift -= 2
            if GROUP_TILES == 1:
                counted = _digit_counts(key, prefix, shift, FIELD, COUNT)
            else:
                counted = tl.zeros([GROUPS], COUNT)
                for tile in range(GROUP_TILES):
                    column, candidate = _groups(tile, live, protect, GROUPS, GROUP)
                    tile_key = _keys(tl.load(score + row + column, mask=candidate, other=0.0), candidate)
                    counted += _digit_counts(tile_key, prefix, shift, FIELD, COUNT)
            counts = tl.sum(counted, 0)
            MASK: tl.constexpr = (1 << FIELD) - 1
            least_1, least_2 = (counts & MASK).to(tl.int32), (counts >> FIELD & MASK).to(tl.int32)
            least_3 = (counts >> 2 * FIELD).to(tl.int32)
            digit = (least_1 >= need).to(tl.int32) + (least_2 >= need).to(tl.int32) + (least_3 >= need).to(tl.int32)
            prefix = prefix * 4 + digit.to(tl.uint32)
            # The largest of the counts that falls short is the number of keys above the digit, the least of the others
            # that of keys not below it.
            above = tl.maximum(tl.where(least_1 < need, least_1, 0), tl.where(least_2 < need, least_2, 0))
            above = tl.maximum(above, tl.where(least_3 < need, least_3, 0))
            inside = tl.minimum(inside, tl.where(least_1 < need, inside, least_1))
            inside = tl.minimum(inside, tl.where(least_2 < need, inside, least_2))
            inside = tl.minimum(inside, tl.where(least_3 < need, inside, least_3)) - above
            need -= above

        kept_length = tl.where(finite, protect + keep * GROUP, 0)
        if GROUP > 1:
            for tile in range(TILES):
                place = tile * TILE + tl.arange(0, TILE)
                tl.store(index + b * width + place, tl.where(place < kept_length, place, -1).to(tl.int64),
                         mask=((place < protect) | (place >= kept_length)) & (place < width))  # fmt: skip
        HALF: tl.constexpr = 16 if FEW else 32
        before = tl.full([], 0, COUNT)
        for tile in range(GROUP_TILES):
            column, candidate = _groups(tile, live, protect, GROUPS, GROUP)
            if GROUP_TILES == 1:
                tile_key = key
            else:
                tile_key = _keys(tl.load(score + row + column, mask=candidate, other=0.0), candidate)
            start = _shifted(tile_key, shift)
            greater = (candidate & (start > prefix)).to(COUNT)
            equal = (candidate & (start == prefix)).to(COUNT)
            packed = greater | equal << HALF
            earlier = before + tl.cumsum(packed, 0) - packed
            ties = (earlier >> HALF).to(tl.int32)
            chosen = (greater > 0) | ((equal > 0) & (ties < need))
            place = protect + ((earlier & ((1 << HALF) - 1)).to(tl.int32) + tl.minimum(ties, need)) * GROUP
            if GROUP > 1:
                for i in tl.static_range(GROUP):
                    tl.store(index + b * width + place + i, (column + i).to(tl.int64),
                             mask=chosen & (place < kept_length))  # fmt: skip
            else:
                place = tl.where(column < protect, column, place)
                chosen = (chosen | (column < protect)) & (place < kept_length)
                tl.store(index + b * width + place, column.to(tl.int64), mask=chosen)
                tl.store(index + b * width + column, tl.full([TILE], -1, tl.int64),
                         mask=(column >= kept_length) & (column < width))  # fmt: skip
            before += tl.sum(packed, 0)
        tl.store(new_lengths + b, tl.where(finite, kept_length, -1))
