"""The definition of `plan_paged` in Python and of `compact_kv_paged_` in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..compact_kv.reference import _plain, _turn


def plan_paged(
    block_tables: np.ndarray,
    context_lens: np.ndarray,
    keep: np.ndarray,
    block_size: int,
    ref_counts: np.ndarray,
    free_blocks: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """Row m of sequence b becomes its old row keep[b, m]: the fields of `PagedPlan` in their order.

    Row n lies in slot table[n // block_size] * block_size + n % block_size. A block whose rows all stay is not
    touched. Of the others, one with a single reference is written in place, and one with several is left to them: the
    rows go to the next free block, or to the block that an earlier sequence filled with the same rows.
    """
    counts, tables = ref_counts.copy(), np.full_like(block_tables, -1)
    moves: list[tuple[int, int]] = []
    shifts: list[int] = []
    offsets, lengths = [0], []
    copies: dict[tuple[tuple[int, int], ...], int] = {}
    free = free_blocks.tolist()
    needed = 0
    for table, length, rows, new_table in zip(
        block_tables.tolist(), context_lens.tolist(), keep.tolist(), tables, strict=True
    ):
        kept = [row for row in rows if row >= 0]
        for block in table[: -(-length // block_size)]:
            counts[block] -= 1
        for i, first in enumerate(range(0, len(kept), block_size)):
            block = table[i]
            # Source slot and shift of every row of this block.
            content = tuple(
                (table[row // block_size] * block_size + row % block_size, m - row)
                for m, row in enumerate(kept[first : first + block_size], first)
            )
            written = any(shift for _, shift in content)
            if written and ref_counts[block] > 1:
                written = content not in copies
                if written:
                    copies[content] = free[needed] if needed < len(free) else -1
                    needed += 1
                block = copies[content]
            for offset, (source, shift) in enumerate(content):
                if written and source != block * block_size + offset:
                    moves.append((source, block * block_size + offset))
                    shifts.append(shift)
            new_table[i] = block
            if block >= 0:
                counts[block] += 1
        lengths.append(len(kept))
        offsets.append(len(moves))
    if needed > len(free):
        raise ValueError(
            f"plan_paged: free_blocks has {len(free)} blocks, but {needed} are needed for copies of shared blocks; "
            "free some first, or compact fewer sequences"
        )
    return (
        np.array(moves, np.int64).reshape(-1, 2),
        np.array(offsets, np.int64),
        np.array(shifts, np.int64),
        tables,
        np.array(lengths, np.int64),
        counts,
        free_blocks[:needed].copy(),
        np.flatnonzero((ref_counts > 0) & (counts == 0)).astype(np.int32),
    )


def compact_kv_paged_(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    moves: Tensor,
    offsets: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> None:
    """x[slot t] = x[slot s] for every move (s, t) and every key and value tensor x, rows read before any is written.

    Keys are turned by the angles of `cos` and `sin` [moved, R/2] as in `compact_kv`. `offsets` says which moves are
    one sequence's; other forms run each sequence's moves in order, which for a plan of `plan_paged` is the same.
    """
    source, target = moves.unbind(1)
    for i, x in enumerate([*keys, *values]):
        size = x.shape[1]
        if i < len(keys) and cos is not None and sin is not None:
            x[target // size, target % size] = _turn(x[source // size, source % size], cos[:, None], sin[:, None])
        else:
            plain = _plain(x)
            plain[target // size, target % size] = plain[source // size, source % size]
