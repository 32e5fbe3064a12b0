"""Rows of a block-table KV cache dropped: a plan on the host, then all layers in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..._library import NATIVE_DTYPES, choose_backend, planner, planner_error, resolve_backend
from ..._ops import LIB, accumulate_dtype
from ..compact_kv import check_writable
from .reference import compact_kv_paged_ as _reference_
from .reference import plan_paged as _plan_reference


class PagedPlan(NamedTuple):
    """What `plan_paged` decided. A slot is block * block_size + row within the block."""

    moves: np.ndarray
    """int64 [moved, 2]: source slot and destination slot."""
    offsets: np.ndarray
    """int64 [B + 1]: the moves of sequence b are offsets[b]..offsets[b + 1] - 1, to be run in this order."""
    shifts: np.ndarray
    """int64 [moved]: new minus old row of the sequence."""
    block_tables: np.ndarray
    """int32 [B, W]: the new tables, -1 after the last block."""
    context_lens: np.ndarray
    """[B], of the type given: the kept rows of every sequence."""
    ref_counts: np.ndarray
    """int32 [blocks]: the new counts."""
    taken_blocks: np.ndarray
    """int32: the blocks of `free_blocks` now in use, its first ones."""
    freed_blocks: np.ndarray
    """int32, ascending: blocks whose last reference went. None of them is written or taken by this plan."""


def plan_paged(
    block_tables: Any,
    context_lens: Any,
    keep: Any,
    block_size: int,
    ref_counts: Any = None,
    free_blocks: Any = None,
    *,
    backend: str | None = None,
) -> PagedPlan:
    """Where the kept rows of every sequence go, and which blocks become free. Nothing is changed.

    Kept rows go to the front of the sequence's own blocks. A block whose rows all stay is not touched and stays
    shared. A block that others refer to as well is never written: the sequence takes a free block in its place
    (copy on write) and drops its reference; sequences that keep the same rows of the same blocks share the copy.

    Args:
        block_tables: integers [B, W], the blocks of every sequence; entries after its last used block are not read.
        context_lens: integers [B], the rows of every sequence.
        keep: integers [B, M], for every sequence the ascending rows to keep, then -1 as padding.
        block_size: rows of a block.
        ref_counts: integers [blocks], the references to every block, those of sequences that are not given here
            included; None: these tables are all there are.
        free_blocks: integers, blocks without references that copies on write may take, in this order; None: none.
        backend: "reference" plans in Python, "cpp" in C++; None: ``FLOWCUT_BACKEND``, and C++ if it is there.

    All but `block_size` are numpy arrays, CPU tensors or lists; nothing here needs torch or a device. The moves of
    different sequences may run at the same time, those of one in their order. Definition: ``reference.py``.

    Raises:
        ValueError: arguments that do not fit, naming the argument, or too few `free_blocks`.
        RuntimeError: "cpp" was asked for but the planner was not built.
    """
    requested = resolve_backend(backend)
    if requested == "cpp" and planner_error() is not None:
        raise RuntimeError(f"backend='cpp' was asked for plan_paged, but {planner_error()}")
    return _plan(block_tables, context_lens, keep, block_size, ref_counts, free_blocks, None, requested)


def compact_kv_paged(
    keys: Sequence[Tensor],
    values: Sequence[Tensor] | None,
    block_tables: Any,
    context_lens: Any,
    keep: Any,
    ref_counts: Any = None,
    free_blocks: Any = None,
    *,
    inv_freq: Tensor | None = None,
    backend: str | None = None,
) -> PagedPlan:
    """Drop the rows of block-table caches that ``keep`` does not name, in place, in all layers with one launch.

    Args:
        keys, values: one tensor [blocks, block_size, G, D] per layer, all of one dtype (float8 too) and on one device;
            last dimension contiguous, other strides free, none overlapping another; D may differ between keys and
            values. ``values=None``: `keys` holds interleaved caches [blocks, 2, block_size, G, D]. Views serve other
            layouts: ``cache.unbind(0)`` of [2, blocks, ...], ``cache.transpose(1, 2)`` of [blocks, G, block_size, D].
        block_tables, context_lens, keep, ref_counts, free_blocks: on the host, as in :func:`plan_paged`.
        inv_freq: [R/2], the frequencies of keys that carry rotary embeddings in the half-split layout (Llama, Qwen)
            with row n at position n. Then keys that move are turned to the positions of their new rows; shared rows
            that stay have theirs. None: keys stay rotated as they were. Keys of float32, bfloat16, float16 (or
            float64 in the reference).
        backend: "auto", "reference", "cpp" (CPU tensors) or "cuda"; None: ``FLOWCUT_BACKEND`` or "auto". It says what
            moves the rows; the plan is made in C++ if it can be, for "reference" in Python.

    Returns:
        The plan, whose tables, lengths and counts hold from now on. Freed blocks may be handed out at once to work
        on the same CUDA stream. Rows of a block after the last kept one stay as they were, and a last block that is
        shared stays so: copy it before rows are appended, as after a fork.

    Raises:
        ValueError: arguments that do not fit, naming the argument, or too few `free_blocks`; nothing was changed.
        RuntimeError: an explicitly requested backend that cannot serve these tensors.
    """
    keys, values = _checked_caches(list(keys), None if values is None else list(values))
    blocks, block_size = keys[0].shape[:2]
    _check_frequencies(keys, inv_freq)
    choice = choose_backend(
        "compact_kv_paged", backend, keys[0], ("cpp", "cuda"), (keys[0].dtype,) if inv_freq is None else NATIVE_DTYPES
    )
    check_writable("compact_kv_paged", keys, values)
    plan = _plan(block_tables, context_lens, keep, block_size, ref_counts, free_blocks, blocks, choice)
    if len(plan.moves) == 0:
        return plan
    device = keys[0].device
    moves, offsets, shifts = (torch.from_numpy(x).to(device) for x in (plan.moves, plan.offsets, plan.shifts))
    cos = sin = None
    if inv_freq is not None:
        # In fp64: the stored angles carry the error of fp32 already.
        angle = shifts.double()[:, None] * inv_freq.to(device, torch.float64)
        dtype = accumulate_dtype(keys[0].dtype)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    if choice == "reference":
        _reference_(keys, values, moves, offsets, cos, sin)
    else:
        torch.ops.flowcut_kernels.compact_kv_paged_.default(keys, values, moves, offsets, cos, sin)
    return plan


def _checked_caches(caches: list[Tensor], values: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of every layer; ValueError if they do not fit each other."""
    op, keys = "compact_kv_paged", caches
    if values is None:
        for i, x in enumerate(caches):
            if x.dim() != 5 or x.shape[1] != 2:
                raise ValueError(
                    f"{op}: keys[{i}] must be [blocks, 2, block_size, heads, dim] where values is None, got "
                    f"{tuple(x.shape)}; give keys and values as two lists of [blocks, block_size, heads, dim]"
                )
        keys, values = [x[:, 0] for x in caches], [x[:, 1] for x in caches]
    if not keys or len(keys) != len(values):
        raise ValueError(
            f"{op}: keys and values must hold one tensor per layer, got {len(keys)} keys and {len(values)} values"
        )
    first = keys[0]
    for name, tensors in (("keys", keys), ("values", values)):
        for i, x in enumerate(tensors):
            if x.dim() != 4 or x.shape[:3] != first.shape[:3] or x.shape[1] == 0:
                wanted = ", ".join(map(str, first.shape[:3])) if first.dim() == 4 else "blocks, block_size, heads"
                raise ValueError(f"{op}: {name}[{i}] must be [{wanted}, dim], got {tuple(x.shape)}")
            if x.dtype != first.dtype or x.device != first.device:
                raise ValueError(
                    f"{op}: {name}[{i}] is {x.dtype} on {x.device}; all keys and values must be {first.dtype} on "
                    f"{first.device}, like keys[0]"
                )
            if x.stride(3) != 1 and x.shape[3] > 1:
                raise ValueError(
                    f"{op}: {name}[{i}] needs a contiguous last dimension, its stride is {x.stride(3)}; it is written "
                    "in place, so keep the cache in another layout"
                )
    return keys, values


def _check_frequencies(keys: list[Tensor], inv_freq: Tensor | None) -> None:
    if inv_freq is None:
        return
    if keys[0].dtype not in (*NATIVE_DTYPES, torch.float64):
        raise ValueError(
            f"compact_kv_paged: keys of {keys[0].dtype} cannot be turned; use float32, bfloat16 or float16 keys, or no "
            "inv_freq"
        )
    dim = min(x.shape[3] for x in keys)
    if inv_freq.dim() != 1 or 2 * inv_freq.shape[0] > dim:
        raise ValueError(
            f"compact_kv_paged: inv_freq must be [half of the rotary width], at most [{dim // 2}], got "
            f"{tuple(inv_freq.shape)}"
        )


def _plan(tables, lengths, keep, block_size, ref_counts, free_blocks, blocks: int | None, form: str) -> PagedPlan:
    """`blocks`: how many the caches have, None where they are not known. `form` "reference": in Python."""
    native = None if form == "reference" else planner()
    if isinstance(block_size, bool) or not isinstance(block_size, (int, np.integer)) or not 0 < block_size < 2**31:
        raise ValueError(f"plan_paged: block_size={block_size!r} must be a positive integer")
    tables = _integers("block_tables", tables, 2)
    batch = tables.shape[0]
    lengths, keep = _integers("context_lens", lengths, 1, batch), _integers("keep", keep, 2, batch)
    free = _integers("free_blocks", () if free_blocks is None else free_blocks, 1)
    _check_lengths(lengths, tables.shape[1], int(block_size))
    _check_keep(keep, lengths)
    used = np.arange(tables.shape[1]) * int(block_size) < lengths[:, None]
    if ref_counts is not None:
        counts = _integers("ref_counts", ref_counts, 1, blocks)
    else:
        known = 1 + max((int(x.max()) for x in (tables[used], free) if x.size), default=-1)
        if known > 2**31:
            raise ValueError(f"plan_paged: block {known - 1} does not fit int32; blocks are numbered from 0")
        counts = np.zeros(known if blocks is None else blocks, np.int64)
        inside = tables[used & (tables >= 0) & (tables < len(counts))]
        counts += np.bincount(inside, minlength=len(counts))
    _check_blocks(tables, used, counts, free)
    arrays = (
        np.where(used, tables, -1).astype(np.int32),
        np.ascontiguousarray(lengths, np.int64),
        np.ascontiguousarray(keep, np.int64),
        int(block_size),
        counts.astype(np.int32),
        free.astype(np.int32),
    )
    plan = PagedPlan(*(_plan_reference if native is None else native.plan_paged)(*arrays))
    return plan._replace(context_lens=plan.context_lens.astype(lengths.dtype))


def _integers(name: str, x: Any, dims: int, size: int | None = None) -> np.ndarray:
    if isinstance(x, Tensor):
        if x.device.type != "cpu":
            raise ValueError(f"plan_paged: {name} is on {x.device}, plans are made on the host; call .cpu() on it")
        x = x.detach()
    array = np.asarray(x)
    if array.size == 0 and not isinstance(x, (Tensor, np.ndarray)):
        array = array.astype(np.int64)  # an empty list has no type of its own
    wanted = ["any" if size is None else size, "any"][:dims]
    if array.ndim != dims or array.dtype.kind != "i" or (size is not None and array.shape[0] != size):
        raise ValueError(
            f"plan_paged: {name} must be int32 or int64 [{', '.join(map(str, wanted))}], got {array.dtype} "
            f"{array.shape}"
        )
    return array


def _check_lengths(lengths: np.ndarray, width: int, block_size: int) -> None:
    for b in np.flatnonzero((lengths < 0) | (lengths > width * block_size)):
        raise ValueError(
            f"plan_paged: context_lens[{b}] = {lengths[b]} must lie in 0..{width * block_size}: block_tables has "
            f"{width} blocks of {block_size} rows for a sequence"
        )


def _check_keep(keep: np.ndarray, lengths: np.ndarray) -> None:
    live = keep >= 0
    # A row after padding, or one that does not exceed the row before it; padding follows anything.
    broken = (keep < -1) | (keep >= lengths[:, None])
    broken[:, 1:] |= live[:, 1:] & (~live[:, :-1] | (keep[:, 1:] <= keep[:, :-1]))
    for b, m in np.argwhere(broken):
        raise ValueError(
            f"plan_paged: keep[{b}, {m}] = {keep[b, m]}: rows must ascend without repetition within "
            f"0..{lengths[b] - 1} (context_lens[{b}] = {lengths[b]}), then -1 as padding; sort them"
        )


def _check_blocks(tables: np.ndarray, used: np.ndarray, counts: np.ndarray, free: np.ndarray) -> None:
    blocks = len(counts)
    for b, i in np.argwhere(used & ((tables < 0) | (tables >= blocks))):
        raise ValueError(
            f"plan_paged: block_tables[{b}, {i}] = {tables[b, i]} is no block, they are 0..{blocks - 1}; the "
            "context_lens say that the sequence uses it"
        )
    references = np.bincount(tables[used], minlength=blocks)
    for block in np.flatnonzero((references > counts) | (counts < 0) | (counts >= 2**31)):
        raise ValueError(
            f"plan_paged: ref_counts[{block}] = {counts[block]}, but block_tables refers to block {block} "
            f"{references[block]} times; count every table that holds it"
        )
    for i in np.flatnonzero((free < 0) | (free >= blocks)):
        raise ValueError(f"plan_paged: free_blocks[{i}] = {free[i]} is no block, they are 0..{blocks - 1}")
    for i in np.flatnonzero((counts[free] != 0) | (np.bincount(free, minlength=blocks)[free] > 1)):
        raise ValueError(
            f"plan_paged: free_blocks[{i}] = {free[i]} is in use ({counts[free[i]]} references) or named twice; give "
            "every free block once"
        )


LIB.impl("compact_kv_paged_", _reference_, "CompositeExplicitAutograd")

__all__ = ["PagedPlan", "compact_kv_paged", "plan_paged"]
