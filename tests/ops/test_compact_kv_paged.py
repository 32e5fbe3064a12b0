"""`plan_paged` and `compact_kv_paged`: rows of block-table caches dropped, shared blocks copied on write."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_compact_kv import MOVED, UNAVAILABLE
from torch.library import opcheck

from flowcut_kernels import _library
from flowcut_kernels.ops import compact_kv_, compact_kv_paged, plan_paged

OPS = torch.ops.flowcut_kernels
PLANNERS = ["reference"] if _library.planner_error() else ["reference", "cpp"]
NO_PLANNER = pytest.mark.skipif(_library.planner_error() is not None, reason=str(_library.planner_error()))


@pytest.fixture(params=UNAVAILABLE)
def backend(request):
    if UNAVAILABLE[request.param]:
        pytest.skip(UNAVAILABLE[request.param])
    return request.param


@pytest.fixture
def device(backend):
    return "cuda" if backend == "cuda" else "cpu"


@pytest.fixture(params=["reference", "cpp"])
def form(request):
    if request.param not in PLANNERS:
        pytest.skip(str(_library.planner_error()))
    return request.param


def draw_batch(random, sequences=5, block_size=4, most=6):
    """Arguments of `plan_paged`: sequences that share leading blocks and, some of them, the rows to keep."""
    ids = random.sample(range(2 * sequences * most), 2 * sequences * most)
    tables: list[list[int]] = []
    lengths: list[int] = []
    keeps: list[list[int]] = []
    for _ in range(sequences):
        parent = random.randrange(len(tables)) if tables and random.random() < 0.7 else None
        table = [] if parent is None else tables[parent][: random.randint(0, most)]
        table = table + [ids.pop() for _ in range(random.randint(0, most - len(table)))]
        length = max(len(table) * block_size - random.randrange(block_size), 0)
        twin = parent is not None and random.random() < 0.5
        share = random.choice([0.0, 0.3, 0.9, 1.0])
        rows = keeps[parent] if twin else [n for n in range(length) if random.random() < share]
        tables, lengths = [*tables, table], [*lengths, length]
        keeps.append([n for n in rows if n < length])
    pad = lambda rows, width, value: np.array([[*r, *[value] * (width - len(r))] for r in rows], np.int64)  # noqa: E731
    counts = np.bincount([i for t in tables for i in t], minlength=2 * sequences * most).astype(np.int32)
    for block in random.sample(range(len(counts)), 4):  # sequences that are not in this call
        counts[block] += random.randint(0, 1)
    free = [i for i in ids if counts[i] == 0]
    return dict(
        block_tables=pad(tables, most + 1, 7).astype(np.int32),  # unused entries name a block like any other
        context_lens=np.array(lengths, np.int32),
        keep=pad(keeps, most * block_size, -1),
        block_size=block_size,
        ref_counts=counts,
        free_blocks=np.array(free, np.int32),
    )


def moving_batch(seed, block_size):
    """A batch that moves rows in place, copies blocks and frees some."""
    source = random.Random(seed)
    while True:
        batch = draw_batch(source, block_size=block_size)
        plan = plan_paged(**batch, backend="reference")
        if (
            len(plan.taken_blocks)
            and len(plan.freed_blocks)
            and set(plan.moves[:, 1] // block_size) - {*plan.taken_blocks}
        ):
            return batch


def slots(table, rows, size):
    rows = np.asarray(rows, np.int64)
    return np.asarray(table, np.int64)[rows // size] * size + rows % size


def check_plan(batch, plan):
    """The plan against what it is for, not against how it is made."""
    size, counts = batch["block_size"], batch["ref_counts"]
    old = np.arange(len(counts) * size)
    new = old.copy()
    new[plan.moves[:, 1]] = old[plan.moves[:, 0]]
    references = counts.astype(np.int64)
    for b, (table, length) in enumerate(zip(batch["block_tables"], batch["context_lens"], strict=True)):
        keep = batch["keep"][b][batch["keep"][b] >= 0]
        assert plan.context_lens[b] == len(keep)
        used = -(-len(keep) // size)
        assert (plan.block_tables[b][used:] == -1).all()
        found = new[slots(plan.block_tables[b], range(len(keep)), size)]
        assert found.tolist() == slots(table, keep, size).tolist()
        np.subtract.at(references, table[: -(-length // size)], 1)
        np.add.at(references, plan.block_tables[b][:used], 1)
        mine = slice(*plan.offsets[b : b + 2])
        where = {slot: row for row, slot in enumerate(slots(table, range(length), size))}
        assert (plan.shifts[mine] <= 0).all()
        # What this sequence overwrites, none of its later moves reads.
        sources = [where[s] for s in plan.moves[mine, 0]]
        targets = [where.get(t, -1) for t in plan.moves[mine, 1]]
        assert all(t not in sources[i + 1 :] for i, t in enumerate(targets))
    assert plan.ref_counts.tolist() == references.tolist()
    assert plan.freed_blocks.tolist() == np.flatnonzero((counts > 0) & (references == 0)).tolist()
    taken = len(plan.taken_blocks)
    assert plan.taken_blocks.tolist() == batch["free_blocks"][:taken].tolist()
    written = np.unique(plan.moves[:, 1] // size)
    assert (counts[written] <= 1).all() and set(plan.taken_blocks) == set(written[counts[written] == 0])
    assert len(np.unique(plan.moves[:, 1])) == len(plan.moves)
    owner = np.repeat(np.arange(len(plan.offsets) - 1), np.diff(plan.offsets))
    writers = dict(zip(plan.moves[:, 1].tolist(), owner, strict=True))
    assert all(writers.get(s, b) == b for s, b in zip(plan.moves[:, 0].tolist(), owner, strict=True))


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 5), st.integers(1, 7))
def test_plans(random, sequences, block_size):
    """Every kept row arrives, nothing shared is written, references add up; C++ and Python decide alike."""
    batch = draw_batch(random, sequences, block_size)
    plans = [plan_paged(**batch, backend=form) for form in PLANNERS]
    for plan in plans:
        check_plan(batch, plan)
        for name, a, b in zip(plan._fields, plan, plans[0], strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape and (a == b).all(), name


def test_sequences_that_share_and_keep_the_same_share_the_copy(form):
    """Beams of one prompt: block 0 stays, block 1 is copied once for two of three, and what all left is freed."""
    plan = plan_paged(
        [[0, 1, 2], [0, 1, 3], [0, 1, 4]], [6, 6, 6], [[0, 1, 3, 5], [0, 1, 3, 4], [0, 1, 3, -1]], 2,
        free_blocks=[9, 7, 8, 5], backend=form,
    )  # fmt: skip
    assert plan.block_tables.tolist() == [[0, 9, -1], [0, 7, -1], [0, 8, -1]]
    assert plan.moves.tolist() == [[3, 18], [5, 19], [3, 14], [6, 15], [3, 16]]
    twins = plan_paged([[0, 1], [0, 1]], [4, 4], [[1, 3]] * 2, 2, free_blocks=[5], backend=form)
    assert twins.block_tables.tolist() == [[5, -1]] * 2 and twins.moves.tolist() == [[1, 10], [3, 11]]
    assert twins.ref_counts.tolist() == [0, 0, 0, 0, 0, 2] and twins.freed_blocks.tolist() == [0, 1]


def test_lists_and_tensors_are_read(form):
    batch = moving_batch(3, 4)
    plan = plan_paged(**batch, backend=form)
    for convert in (lambda x: torch.from_numpy(x).long(), lambda x: x.tolist(), lambda x: np.asfortranarray(x)):
        same = {k: v if k == "block_size" else convert(v) for k, v in batch.items()}
        for a, b in zip(plan, plan_paged(**same, backend=form), strict=True):
            assert (a == b).all()


def draw_caches(layout, shape, dtype, device):
    """Keys and values arguments in memory of random bits but NaN's, and that memory."""
    blocks, size, heads, dim = shape
    wide = {
        "split": (2, blocks, size, heads, dim),
        "interleaved": (blocks, 2, size, heads, dim),
        "planes": (2, blocks, size, heads, dim),
        "heads first": (2, blocks, heads, size, dim),
        "padded": (2, blocks, size, heads + 1, dim + 3),
    }[layout]
    count = int(np.prod(wide))
    memory = [
        torch.randint(256, ((count + 16) * dtype.itemsize,), dtype=torch.uint8, device=device) & 0xBF for _ in range(3)
    ]
    caches = [x.view(dtype)[8 : 8 + count].view(wide) for x in memory]
    if layout == "interleaved":
        return caches, None, memory
    keys, values = zip(*(x.unbind() for x in caches), strict=True)
    if layout == "heads first":
        keys, values = ([x.transpose(1, 2) for x in all] for all in (keys, values))
    if layout == "padded":
        keys, values = ([x[:, :, 1:, 2 : 2 + dim] for x in all] for all in (keys, values))
    return list(keys), list(values), memory


def split(keys, values):
    return [*keys, *values] if values is not None else [x[:, i] for i in range(2) for x in keys]


def rows_of(x, table, rows):
    """The bytes of rows [n, G, D] of a sequence."""
    size = x.shape[1]
    table = torch.as_tensor(np.asarray(table, np.int64), device=x.device)
    rows = torch.as_tensor(np.asarray(rows, np.int64), device=x.device)
    return x.view(torch.uint8)[table[rows // size], rows % size]


def arguments(batch):
    return {k: v for k, v in batch.items() if k != "block_size"}


@pytest.mark.parametrize("dtype", MOVED, ids=str)
@pytest.mark.parametrize(
    ("layout", "block_size", "heads", "dim"),
    [
        ("split", 16, 2, 64),
        ("interleaved", 16, 2, 128),
        ("interleaved", 5, 3, 33),
        ("planes", 1, 1, 8),
        ("heads first", 8, 2, 20),
        ("padded", 3, 2, 7),
    ],
)
def test_rows(backend, device, layout, block_size, heads, dim, dtype):
    """Every byte of every row of every sequence, and nothing else is written."""
    batch = moving_batch(dim, block_size)
    shape = (len(batch["ref_counts"]), block_size, heads, dim)
    keys, values, memory = draw_caches(layout, shape, dtype, device)
    tensors, before = split(keys, values), [x.clone() for x in split(keys, values)]
    kept = [x.clone() for x in memory]
    plan = compact_kv_paged(keys, values, **arguments(batch), backend=backend)
    check_plan(batch, plan)
    target = torch.from_numpy(plan.moves[:, 1]).to(device)
    for x, old in zip(tensors, before, strict=True):
        for b, length in enumerate(plan.context_lens):
            new = rows_of(x, plan.block_tables[b], range(length))
            assert torch.equal(new, rows_of(old, batch["block_tables"][b], batch["keep"][b][:length]))
        bytes_of = [y.view(torch.uint8) for y in (x, old)]
        at = target // block_size, target % block_size
        bytes_of[0][at] = bytes_of[1][at]
    assert all(torch.equal(a, b) for a, b in zip(memory, kept, strict=True))


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("dim", [128, 20])
def test_more_rows_than_a_cache_holds(backend, device, dim, heads_first):
    """Some forms take another way for them, by whole lines where rows are aligned."""
    blocks, size, heads, rows = 64, 16, 4, 1000
    layers = 3 if dim == 128 else 14
    memory = torch.randn(layers, 2, blocks, *((heads, size) if heads_first else (size, heads)), dim, device=device)
    keys, values = ([x.transpose(1, 2) if heads_first else x for x in memory[:, i]] for i in range(2))
    table, keep = np.random.default_rng(0).permutation(blocks)[None], np.arange(1, rows)[None]
    want = [x[table[0]].flatten(0, 1)[1:rows].clone() for x in (*keys, *values)]
    assert sum(x.nbytes for x in want) > 8 << 20
    compact_kv_paged(keys, values, table, [rows], keep, backend=backend)
    for x, wanted in zip((*keys, *values), want, strict=True):
        assert torch.equal(x[table[0]].flatten(0, 1)[: rows - 1], wanted)


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["keep none", "keep all"])
def test_no_row_moves(backend, device, share):
    keys, values, memory = draw_caches("split", (9, 4, 2, 8), torch.float16, device)
    before = [x.clone() for x in memory]
    keep = [list(range(7)), list(range(10))] if share else [[], []]
    keep = np.array([[*r, *[-1] * (10 - len(r))] for r in keep])
    plan = compact_kv_paged(keys, values, [[3, 4, 0], [3, 5, 6]], [7, 10], keep, backend=backend)
    assert len(plan.moves) == 0 and all(torch.equal(a, b) for a, b in zip(memory, before, strict=True))
    assert plan.freed_blocks.tolist() == ([] if share else [3, 4, 5, 6])
    assert plan.block_tables.tolist() == ([[3, 4, -1], [3, 5, 6]] if share else [[-1] * 3] * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (128, 96), (20, 10), (33, 2)])
def test_turned_keys(backend, device, dim, rotary, dtype):
    """As `compact_kv_` turns them in a cache without blocks: the same bits."""
    batch = moving_batch(dim, 4)
    blocks, longest = len(batch["ref_counts"]), int(batch["context_lens"].max())
    keys, values = ([torch.randn(blocks, 4, 2, dim).to(dtype).to(device) for _ in range(2)] for _ in range(2))
    inv_freq = 100.0 ** -torch.linspace(0, 1, rotary // 2, dtype=torch.float64)

    dense = []
    for x in [*keys, *values]:
        rows = torch.zeros(len(batch["keep"]), longest, 2, dim, dtype=dtype, device=device)
        for b, length in enumerate(batch["context_lens"]):
            rows[b, :length] = rows_of(x, batch["block_tables"][b], range(length)).view(dtype)
        dense.append(rows.transpose(1, 2))
    keep = torch.from_numpy(batch["keep"])[:, :longest].to(device)
    shift = torch.arange(keep.shape[1], device=device) - keep
    angle = shift.double()[..., None] * inv_freq.to(device)
    compact_kv_(dense[:2], dense[2:], keep, None, angle.cos().float(), angle.sin().float(), backend="reference")

    plan = compact_kv_paged(keys, values, **arguments(batch), inv_freq=inv_freq, backend=backend)
    for x, wanted in zip([*keys, *values], dense, strict=True):
        for b, length in enumerate(plan.context_lens):
            found = rows_of(x, plan.block_tables[b], range(length)).view(dtype)
            assert torch.equal(found, wanted[b, :, :length].transpose(0, 1))


@pytest.mark.parametrize("turned", [False, True])
def test_opcheck(turned):
    keys, values = (list(x.unbind()) for x in torch.randn(2, 5, 2, 3, 2, 8).unbind(2))  # interleaved
    moves, offsets = torch.tensor([[4, 3], [5, 4], [9, 8]]), torch.tensor([0, 2, 3])
    tables = torch.randn(2, 3, 3).unbind() if turned else (None, None)
    opcheck(OPS.compact_kv_paged_.default, (keys, values, moves, offsets, *tables))


X = torch.zeros(6, 2, 1, 8)
PLAN = dict(
    block_tables=[[0, 1, 2], [0, 3, 9]], context_lens=[5, 4], keep=[[1, 4], [0, -1]], ref_counts=[2, 1, 1, 1, 0, 0],
    free_blocks=[4, 5],
)  # fmt: skip
BAD_PLAN = {
    "tables dtype": (dict(block_tables=[[0.0, 1, 2]] * 2), r"block_tables must be int32 or int64 \[any, any\]"),
    "tables shape": (dict(block_tables=[0, 1, 2]), "block_tables must be"),
    "batch": (dict(keep=[[1, 4]]), r"keep must be int32 or int64 \[2, any\], got int64 \(1, 2\)"),
    "lengths shape": (dict(context_lens=[5]), r"context_lens must be int32 or int64 \[2\]"),
    "too long": (dict(context_lens=[7, 4]), r"context_lens\[0\] = 7 must lie in 0..6"),
    "negative length": (dict(context_lens=[5, -1]), r"context_lens\[1\] = -1"),
    "no block": (dict(context_lens=[5, 5]), r"block_tables\[1, 2\] = 9 is no block"),
    "negative block": (dict(block_tables=[[0, -1, 2], [0, 3, 9]]), r"block_tables\[0, 1\] = -1 is no block"),
    "beyond": (dict(keep=[[1, 5], [0, -1]]), r"keep\[0, 1\] = 5: rows must ascend .* 0..4"),
    "below": (dict(keep=[[1, 4], [0, -2]]), r"keep\[1, 1\] = -2"),
    "repeated": (dict(keep=[[1, 4], [2, 2]]), r"keep\[1, 1\] = 2"),
    "descending": (dict(keep=[[4, 1], [0, -1]]), r"keep\[0, 1\] = 1"),
    "after padding": (dict(keep=[[1, 4], [-1, 0]]), r"keep\[1, 1\] = 0"),
    "counts": (dict(ref_counts=[1, 1, 1, 1, 0, 0]), r"ref_counts\[0\] = 1, but block_tables refers to block 0 2 times"),
    "used free block": (dict(free_blocks=[4, 3]), r"free_blocks\[1\] = 3 is in use \(1 references\)"),
    "free block twice": (dict(free_blocks=[4, 4]), r"free_blocks\[0\] = 4 is in use .* or named twice"),
    "no free block": (dict(free_blocks=[6]), r"free_blocks\[0\] = 6 is no block"),
    "huge block": (dict(block_tables=[[0, 2**40, 2], [0, 3, 9]]), r"block_tables\[0, 1\] = \d+ is no block"),
    "too few free blocks": (dict(free_blocks=None), "free_blocks has 0 blocks, but 1 are needed"),
}
BAD_CALL = {
    "no layer": (dict(keys=[], values=[]), "one tensor per layer"),
    "fewer values": (dict(values=[]), "got 1 keys and 0 values"),
    "interleaved": (dict(values=None), r"keys\[0\] must be \[blocks, 2, block_size, heads, dim\]"),
    "blocks": (dict(values=[X[:5]]), r"values\[0\] must be \[6, 2, 1, dim\], got \(5, 2, 1, 8\)"),
    "dtype": (dict(values=[X.half()]), r"values\[0\] is torch.float16"),
    "dim stride": (dict(keys=[X.repeat(1, 1, 1, 2)[..., ::2]]), "contiguous last dimension"),
    "expanded": (dict(values=[X[:1].expand(6, -1, -1, -1)]), r"values\[0\] is an expanded tensor"),
    "given twice": (dict(keys=[X], values=[X]), r"values\[0\] shares memory with keys\[0\]"),
    "grad": (dict(keys=[X.clone().requires_grad_()]), r"keys\[0\] requires grad"),
    "beyond the cache": (dict(ref_counts=None, context_lens=[5, 5]), r"block_tables\[1, 2\] = 9 is no block, .* 0..5"),
    "counts size": (dict(ref_counts=[2, 1, 1, 1, 0, 0, 0]), r"ref_counts must be int32 or int64 \[6\]"),
    "frequencies": (dict(inv_freq=torch.ones(5)), r"inv_freq must be .* at most \[4\], got \(5,\)"),
    "float8": (
        dict(keys=[X.to(torch.float8_e5m2)], values=[X.to(torch.float8_e5m2)], inv_freq=torch.ones(2)),
        "cannot be turned",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_PLAN.values(), ids=BAD_PLAN)
def test_bad_plan(form, change, message):
    with pytest.raises(ValueError, match=message):
        plan_paged(**(PLAN | change), block_size=2, backend=form)


@pytest.mark.parametrize(("change", "message"), (BAD_PLAN | BAD_CALL).values(), ids=BAD_PLAN | BAD_CALL)
def test_bad_input_leaves_the_cache(backend, device, change, message):
    caches = torch.randint(256, (2, 6, 2, 1, 32), dtype=torch.uint8).view(torch.float32).to(device)
    before = caches.view(torch.uint8).clone()
    given = dict(keys=[caches[0]], values=[caches[1]]) | PLAN | change
    if device == "cuda":
        given |= {k: [x.cuda() for x in given[k]] for k in ("keys", "values") if given[k]}
    with pytest.raises(ValueError, match=message):
        compact_kv_paged(**given, backend=backend)
    assert torch.equal(caches.view(torch.uint8), before)


def test_a_block_that_no_count_can_have(form):
    with pytest.raises(ValueError, match=f"block {2**40} does not fit int32"):
        plan_paged([[2**40]], [1], [[0]], 2, backend=form)


@pytest.mark.parametrize("block_size", [0, -1, 2.0, True, 2**31], ids=str)
def test_bad_block_size(form, block_size):
    with pytest.raises(ValueError, match="must be a positive integer"):
        plan_paged(**PLAN, block_size=block_size, backend=form)


def test_a_requested_backend_is_never_replaced(monkeypatch):
    with pytest.raises(RuntimeError, match="needs CUDA tensors"):
        compact_kv_paged([X], [X], **PLAN, backend="cuda")
    monkeypatch.setattr(_library, "_planner_error", "it was left out")
    with pytest.raises(RuntimeError, match="asked for plan_paged, but it was left out"):
        plan_paged(**PLAN, block_size=2, backend="cpp")


M, O = torch.tensor([[2, 1]]), torch.tensor([0, 1])  # noqa: E741
TABLE = torch.zeros(1, 4)
DIRECT = {
    "source": (lambda: OPS.compact_kv_paged_([X], [X], M + 10, O), r"moves\[0, 0\] = 12 must lie in 0..11"),
    "target": (lambda: OPS.compact_kv_paged_([X], [X], M - 2, O), r"moves\[0, 1\] = -1 must lie in 0..11"),
    "offsets": (lambda: OPS.compact_kv_paged_([X], [X], M, O + 1), r"offsets\[1\] = 2 must ascend within 0..1"),
    "descending": (lambda: OPS.compact_kv_paged_([X], [X], M, O.flip(0)), r"offsets\[1\] = 0 must ascend"),
    "dtype": (lambda: OPS.compact_kv_paged_([X], [X], M.int(), O), "moves must be int64"),
    "shape": (lambda: OPS.compact_kv_paged_([X], [X[:5]], M, O), "keys and values must be"),
    "count": (lambda: OPS.compact_kv_paged_([X], [], M, O), "as many"),
    "stride": (lambda: OPS.compact_kv_paged_([X.repeat(1, 1, 1, 2)[..., ::2]], [X], M, O), "contiguous last"),
    "one table": (lambda: OPS.compact_kv_paged_([X], [X], M, O, TABLE), "come together"),
    "table": (lambda: OPS.compact_kv_paged_([X], [X], M, O, TABLE, TABLE[:0]), "cos and sin must be"),
    "width": (lambda: OPS.compact_kv_paged_([X[..., :6]], [X], M, O, TABLE, TABLE), "cos and sin are for 8 columns"),
    "fp64": (lambda: OPS.compact_kv_paged_([X.double()], [X.double()], M, O, TABLE, TABLE), "use backend='reference'"),
}


@pytest.mark.parametrize(("call", "message"), DIRECT.values(), ids=DIRECT)
@pytest.mark.skipif(_library.native_error() is not None, reason=str(_library.native_error()))
def test_a_direct_call_with_bad_arguments_is_an_error(call, message):
    """The dispatcher can be called around the Python checks: an error then, never a wild read or write."""
    with pytest.raises(RuntimeError, match=message):
        call()


@NO_PLANNER
@pytest.mark.parametrize("case", [name for name in BAD_PLAN if name not in ("tables dtype", "huge block")])
def test_a_direct_call_of_the_planner_with_bad_arguments_is_an_error(case):
    types = dict(block_tables=np.int32, ref_counts=np.int32, free_blocks=np.int32)
    given = PLAN | BAD_PLAN[case][0]
    given = {k: np.array([] if v is None else v, types.get(k, np.int64)) for k, v in given.items()}
    with pytest.raises(ValueError, match="plan_paged"):
        _library.planner().plan_paged(**given, block_size=2)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _library.planner().plan_paged(**given | dict(block_tables=np.zeros((2, 3))), block_size=2)


WITHOUT_TORCH = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
table, counts, free = (np.array(x, np.int32) for x in ([[0, 1]], [1, 1], []))
plan = module.plan_paged(table, np.array([4]), np.array([[1, 3]]), 2, counts, free)
print([x.tolist() for x in plan], "torch" in sys.modules)
"""


@NO_PLANNER
def test_the_planner_needs_no_torch():
    path = importlib.util.find_spec("flowcut_kernels._C").origin
    run = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, path], capture_output=True, text=True)
    expected = [[[1, 0], [3, 1]], [0, 2], [-1, -2], [[0, -1]], [2], [1, 0], [], [1]]
    assert run.stdout.strip() == f"{expected} False", run.stderr


class Engine(RuleBasedStateMachine):
    """A small paged engine on real caches, against a model: every sequence is a list of row ids."""

    BLOCKS, SIZE = 14, 3

    @initialize(form=st.sampled_from(PLANNERS), interleaved=st.booleans())
    def start(self, form, interleaved):
        self.form, self.next_id = form, 1
        self.cache = torch.zeros(self.BLOCKS, 2, self.SIZE, 1, 1, dtype=torch.int64)
        self.caches = ([self.cache], None) if interleaved else ([self.cache[:, 0]], [self.cache[:, 1]])
        self.counts, self.free = np.zeros(self.BLOCKS, np.int32), list(range(self.BLOCKS))
        self.tables: list[list[int]] = []
        self.model: list[list[int]] = []

    def take(self):
        block = self.free.pop(0)
        self.counts[block] = 1
        return block

    def drop(self, blocks):
        for block in blocks:
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free.append(block)

    @precondition(lambda self: len(self.model) < 5)
    @rule()
    def new(self):
        self.tables.append([])
        self.model.append([])

    @precondition(lambda self: self.model)
    @rule(data=st.data(), rows=st.integers(1, 7))
    def append(self, data, rows):
        b = data.draw(st.integers(0, len(self.model) - 1))
        table, model = self.tables[b], self.model[b]
        for _ in range(rows):
            i, offset = divmod(len(model), self.SIZE)
            fresh = i == len(table)
            if (fresh or self.counts[table[i]] > 1) and not self.free:
                return
            if fresh:
                table.append(self.take())
            elif self.counts[table[i]] > 1:
                block = self.take()
                self.cache[block] = self.cache[table[i]]
                self.drop([table[i]])
                table[i] = block
            self.cache[table[i], :, offset] = torch.tensor([self.next_id, -self.next_id]).view(2, 1, 1)
            model.append(self.next_id)
            self.next_id += 1

    @precondition(lambda self: self.model and len(self.model) < 5)
    @rule(data=st.data())
    def fork(self, data):
        b = data.draw(st.integers(0, len(self.model) - 1))
        self.tables.append(list(self.tables[b]))
        self.model.append(list(self.model[b]))
        self.counts[self.tables[b]] += 1

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def release(self, data):
        b = data.draw(st.integers(0, len(self.model) - 1))
        self.drop(self.tables.pop(b))
        self.model.pop(b)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def compact(self, data):
        chosen = data.draw(st.sets(st.integers(0, len(self.model) - 1), min_size=1).map(sorted))
        keeps: list[list[int]] = []
        for b in chosen:
            length = len(self.model[b])
            same = [k for k in keeps if not k or k[-1] < length]
            drawn = st.sets(st.integers(0, length - 1)).map(sorted) if length else st.just([])
            keeps.append(data.draw(st.sampled_from(same) | drawn if same else drawn))
        pad = lambda rows, width: [[*r, *[-1] * (width - len(r))] for r in rows]  # noqa: E731
        tables = pad([self.tables[b] for b in chosen], self.BLOCKS)
        lengths, keep = [len(self.model[b]) for b in chosen], pad(keeps, 1 + max(map(len, keeps)))
        before = self.cache.clone()
        try:
            plan = compact_kv_paged(*self.caches, tables, lengths, keep, self.counts, self.free, backend=self.form)
        except ValueError as error:
            assert "are needed for copies of shared blocks" in str(error)
            assert torch.equal(self.cache, before)
            return
        for b, table, rows in zip(chosen, plan.block_tables.tolist(), keeps, strict=True):
            self.tables[b] = [block for block in table if block >= 0]
            self.model[b] = [self.model[b][row] for row in rows]
        assert plan.context_lens.tolist() == list(map(len, keeps))
        assert self.free[: len(plan.taken_blocks)] == plan.taken_blocks.tolist()
        self.counts = plan.ref_counts
        self.free = self.free[len(plan.taken_blocks) :] + plan.freed_blocks.tolist()

    @invariant()
    def every_sequence_is_intact(self):
        for table, model in zip(self.tables, self.model, strict=True):
            assert len(table) == -(-len(model) // self.SIZE)
            rows = [(table[n // self.SIZE], n % self.SIZE) for n in range(len(model))]
            assert [self.cache[i, :, j].flatten().tolist() for i, j in rows] == [[x, -x] for x in model]

    @invariant()
    def no_block_leaks(self):
        references = np.bincount([i for t in self.tables for i in t], minlength=self.BLOCKS)
        assert self.counts.tolist() == references.tolist()
        assert sorted(self.free) == np.flatnonzero(references == 0).tolist()


TestEngine = Engine.TestCase
TestEngine.settings = settings(max_examples=120, stateful_step_count=25, deadline=None)
