"""`recycle_tokens`: pruned tokens merged cell by cell, and `grid_cells`, which says whose cell is which."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

from flowcut_kernels._library import native_error
from flowcut_kernels.ops import grid_cells, recycle_tokens
from flowcut_kernels.testing import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(tokens, dim, cells, dtype=torch.float32, device="cpu"):
    """Features, importance of which a quarter is negative, and cells of which some lack members."""
    features = torch.randn(tokens, dim).to(device, dtype)
    importance = (torch.rand(tokens) - 0.25).to(device)
    cell = torch.randint(-1, cells, (tokens,))
    cell[cell == min(1, cells - 1)] = -1
    return features, importance, cell.to(device)


def same(actual, expected):
    torch.testing.assert_close(actual[0], expected[0], equal_nan=True)
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "dim", "cells"), [(1, 8, 1), (90, 33, 7), (40, 96, 60), (300, 5, 2), (31, 4100, 3), (20, 300, 1)]
)
def test_within_budget(backend, device, tokens, dim, cells, dtype):
    features, importance, cell = draw(tokens, dim, cells, dtype, device)
    if tokens in (1, 20):
        cell.zero_()  # all of them
    merged, position = recycle_tokens(features, importance, cell, cells=cells, backend=backend)
    assert merged.dtype == dtype
    low, _ = recycle_tokens(features, importance, cell, cells=cells, backend="reference")
    exact, expected = recycle_tokens(features.double(), importance, cell, cells=cells)
    # One rounding to the output's precision may fall the other way.
    ulp = torch.finfo(dtype).eps * exact.abs().max()
    assert_within_budget(merged, low.double() + ulp, exact, name="merged")
    assert torch.equal(position, expected)


def test_definition(backend, device):
    """By hand: a weighted mean, a cell whose weights are all 0, a tie, one member, none, a token that is kept."""
    features = torch.tensor([[1.0], [2], [10], [20], [4], [8], [5], [99]], device=device)
    importance = torch.tensor([3.0, 1, -2, -1, 7, 7, 0, 50], device=device)
    cell = torch.tensor([0, 0, 1, 1, 2, 2, 3, -1], device=device)
    merged, position = recycle_tokens(features, importance, cell, cells=5, backend=backend)
    assert merged.flatten().tolist() == [1.25, 15, 6, 5, 0]
    assert position.tolist() == [0, 3, 4, 6, -1]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("broken", ["features", "importance"])
def test_what_is_not_finite_stays_in_its_cell(backend, device, broken, value):
    """And is not looked at in tokens that are not merged."""
    features, importance, cell = draw(50, 40, 6, device=device)
    clean = recycle_tokens(features, importance, cell, cells=6, backend=backend)
    (features if broken == "features" else importance)[cell == -1] = value
    same(recycle_tokens(features, importance, cell, cells=6, backend=backend), clean)
    member = int((cell == 4).nonzero()[2])
    (features[:, 3:] if broken == "features" else importance)[member] = value
    actual = recycle_tokens(features, importance, cell, cells=6, backend=backend)
    same(actual, recycle_tokens(features, importance, cell, cells=6, backend="reference"))
    others = torch.arange(6, device=device) != 4
    same([x[others] for x in actual], [x[others] for x in clean])
    if broken == "importance" and value != -math.inf:
        assert actual[1][4] == member and actual[0][4].isnan().all()


def test_equal_members_are_the_first_ones(backend, device):
    cell = torch.arange(400, device=device) % 3
    for importance in (torch.zeros(400), torch.full((400,), -math.inf), torch.full((400,), math.nan)):
        _, position = recycle_tokens(
            torch.ones(400, 2, device=device), importance.to(device), cell, cells=3, backend=backend
        )
        assert position.tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [24, 33, 64])
def test_strides(backend, device, dim, dtype):
    """NaN beside every row, importance and ids of every other place."""
    features, importance, cell = draw(70, dim, 5, dtype, device)
    expected = recycle_tokens(features, importance, cell, cells=5, backend=backend)
    frame = torch.full((72, dim + 3), math.nan, dtype=dtype, device=device)
    frame[1:71, 2:-1] = features
    spread = torch.full((140,), math.nan, device=device)
    spread[::2] = importance
    pairs = torch.stack([cell, torch.full_like(cell, 999)], 1)
    found = recycle_tokens(frame[1:71, 2:-1], spread[::2], pairs[:, 0], cells=5, backend=backend)
    assert all(map(torch.equal, found, expected))
    columns = features.mT.contiguous().mT
    assert all(map(torch.equal, recycle_tokens(columns, importance, cell, cells=5, backend=backend), expected))


@pytest.mark.parametrize(("tokens", "dim", "cells"), [(0, 8, 3), (5, 8, 0), (5, 0, 3), (0, 0, 0)])
def test_sizes_at_the_edge(backend, device, tokens, dim, cells):
    features, importance, cell = draw(tokens, dim, cells, device=device)
    merged, position = recycle_tokens(features, importance, cell, cells=cells, backend=backend)
    assert merged.shape == (cells, dim) and (merged == 0).all()
    same((merged, position), recycle_tokens(features, importance, cell, cells=cells, backend="reference"))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_mass_is_conserved(data):
    """Sum of I merged over cells = sum of I t over members; a cell's number changes nothing in it."""
    tokens, dim, cells = (data.draw(st.integers(low, high)) for low, high in ((0, 80), (1, 40), (0, 9)))
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(tokens, dim, generator=generator)
    importance = torch.rand(tokens, generator=generator) + 0.01
    cell = torch.tensor(data.draw(st.lists(st.integers(-1, cells - 1), min_size=tokens, max_size=tokens)))
    cell = cell.to(torch.int64)
    for backend in ("reference", *(() if native_error() else ("cpp",))):
        merged, position = recycle_tokens(features, importance, cell, cells=cells, backend=backend)
        mass = torch.zeros(cells).index_add(0, cell[cell >= 0], importance[cell >= 0])
        total = (importance * (cell >= 0)) @ features
        torch.testing.assert_close(mass @ merged, total, rtol=1e-4, atol=1e-4)
        assert ((position >= 0) == (mass > 0)).all()
        chosen = position[position >= 0]
        assert torch.equal(cell[chosen], (mass > 0).nonzero()[:, 0])
        for c, n in zip(cell[chosen].tolist(), chosen.tolist(), strict=True):
            assert importance[n] == importance[cell == c].max()
        order = torch.randperm(cells, generator=generator)
        renamed = torch.cat([order, torch.tensor([-1])])[cell]
        moved = recycle_tokens(features, importance, renamed, cells=cells, backend=backend)
        assert torch.equal(moved[0][order], merged) and torch.equal(moved[1][order], position)


def test_gradients_flow():
    features, importance, cell = draw(30, 4, 5)
    wide = features.double().requires_grad_()
    weights = importance.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: recycle_tokens(*x, cell, cells=5)[0], (wide, weights))


def test_opcheck():
    opcheck(torch.ops.flowcut_kernels.recycle_tokens.default, draw(20, 6, 4), dict(cells=4))


def test_compiles_without_graph_break_or_recompile():
    """fullgraph, dynamic tokens and cells: two sizes, one compilation."""
    counter = CompileCounter()
    run = lambda *x, cells: recycle_tokens(*x, cells=cells)  # noqa: E731
    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    for tokens, cells in ((20, 4), (33, 7)):
        inputs = draw(tokens, 8, cells, device=DEVICE)
        same(compiled(*inputs, cells=cells), run(*inputs, cells=cells))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(tokens=torch.zeros(5, 2, 2)), r"tokens must be floating point \[tokens, dim\]"),
        (dict(tokens=torch.zeros(5, 2, dtype=torch.int32)), "got torch.int32"),
        (dict(importance=torch.zeros(4)), r"importance must be torch.float32 \[5\] on cpu, got torch.float32 \(4,\)"),
        (dict(importance=torch.zeros(5).half()), "importance must be torch.float32"),
        (dict(importance=torch.zeros(5).double()), "importance must be torch.float32"),
        (dict(cell=torch.zeros(5, dtype=torch.int32)), "cell must be torch.int64"),
        (dict(cell=torch.tensor([0, -2, 0, 0, 0])), r"cell has values -2..0, which must lie in -1..2"),
        (dict(cell=torch.tensor([0, 3, 0, 0, 0])), r"cell has values 0..3, which must lie in -1..2"),
        (dict(cells=-1), "cells=-1"),
        (dict(cells=3.0), "cells=3.0 must be a whole number"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else None,
)
def test_bad_input(change, message):
    arguments = dict(
        tokens=torch.zeros(5, 2), importance=torch.ones(5), cell=torch.zeros(5, dtype=torch.int64), cells=3
    )
    with pytest.raises(ValueError, match=message):
        recycle_tokens(**(arguments | change))


def test_ids_out_of_range_are_not_merged_where_nobody_looks():
    """The default body and the Triton form, which run on devices whose ids no check waits for."""
    features, importance, cell = draw(40, 8, 4)
    wild = torch.where(cell == 2, 2**40, torch.where(cell == -1, -7, cell))
    expected = recycle_tokens(features, importance, torch.where(cell == 2, -1, cell), cells=4, backend="reference")
    for module in ("reference", "triton"):
        form = pytest.importorskip(f"flowcut_kernels.ops.recycle_tokens.{module}").recycle_tokens
        same(form(*(x.to(DEVICE) for x in (features, importance, wild)), cells=4), [x.to(DEVICE) for x in expected])


@pytest.mark.parametrize("cell", [1, 2.5, 3.0, 11.756787, 100])
def test_grid_cells(cell):
    grids = [(5, 4), (1, 13), (27, 31), (0, 3), (8, 8)]
    found, count = grid_cells(grids, cell, "cpu")
    names, expected = {}, []
    for g, (rows, columns) in enumerate(grids):
        places = [(g, math.floor(y / cell), math.floor(x / cell)) for y in range(rows) for x in range(columns)]
        for name in sorted(set(places)):  # raster order, on from grid to grid
            names[name] = len(names)
        expected += [names[place] for place in places]
    assert found.tolist() == expected and count == len(names)
    assert grid_cells(tuple(grids), float(cell), torch.device("cpu"))[0] is found  # copied to a device once


def test_grid_cells_without_tokens():
    found, count = grid_cells([], 2.0, "cpu")
    assert found.dtype == torch.int64 and found.shape == (0,) and count == 0


def test_cells_made_in_inference_mode_serve_autograd():
    with torch.inference_mode():
        cell, count = grid_cells([(4, 6)], 2.25, "cpu")
    features = torch.randn(24, 3, requires_grad=True)
    recycle_tokens(features, torch.ones(24), cell, cells=count)[0].sum().backward()
    assert features.grad.sum().item() == pytest.approx(3 * count)


@pytest.mark.parametrize(
    ("grids", "cell", "message"),
    [
        ([(2, 2)], 0.5, "cell=0.5"),
        ([(2, 2)], math.nan, "cell=nan"),
        ([(2, 2)], "2", "cell='2'"),
        ([(2, -2)], 2.0, "none of them negative"),
        ([(2, 2.5)], 2.0, "in whole tokens"),
        ([2, 2], 2.0, r"grids=\[2, 2\] must be \(rows, columns\)"),
    ],
)
def test_grid_cells_bad_input(grids, cell, message):
    with pytest.raises(ValueError, match=message):
        grid_cells(grids, cell, "cpu")
