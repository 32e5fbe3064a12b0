"""`compact_kv` and `compact_kv_`: rows of a KV cache dropped, keys turned to new positions."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from flowcut_kernels import _library
from flowcut_kernels.ops import compact_kv, compact_kv_
from flowcut_kernels.testing import assert_within_budget

OPS = torch.ops.flowcut_kernels
UNAVAILABLE = {
    "reference": None,
    "cpp": _library.native_error(),
    "cuda": _library.cuda_error() or (None if torch.cuda.is_available() else "no CUDA device"),
}
MOVED = [
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@pytest.fixture(params=UNAVAILABLE)
def backend(request):
    if UNAVAILABLE[request.param]:
        pytest.skip(UNAVAILABLE[request.param])
    return request.param


@pytest.fixture
def device(backend):
    return "cuda" if backend == "cuda" else "cpu"


def draw_keep(batch, tokens, kept, device="cpu"):
    """Ascending rows, -1 after the last of a shorter sample."""
    rows = []
    for b in range(batch):
        live = max(min(kept, tokens) - 2 * b, 0)
        rows.append(torch.cat([torch.randperm(tokens)[:live].sort().values, torch.full((kept - live,), -1)]))
    return torch.stack(rows).to(device)


def flat(keys_and_values):
    keys, values = keys_and_values
    return keys + values


def as_bytes(x):
    return x.contiguous().view(torch.uint8)


def draw(shape, dtype, device="cpu", layout="dense", guards=None):
    """Random bits but for NaN, which torch may rewrite, dense or strided, with random bytes around the tensor."""
    batch, heads, tokens, dim = shape
    size = dtype.itemsize
    wide = {"dense": (batch, heads, tokens, dim), "projected": (batch, tokens, heads, dim + 5)}[layout]
    count = math.prod(wide)
    buffer = torch.randint(256, ((count + 64) * size,), dtype=torch.uint8, device=device) & 0xBF
    if guards is not None:
        guards.append(buffer)
    x = buffer.view(dtype)[32 : 32 + count].view(wide)
    return x if layout == "dense" else x.transpose(1, 2)[..., :dim]


@pytest.mark.parametrize("dtype", MOVED, ids=str)
@pytest.mark.parametrize(
    ("tokens", "kept", "dim", "layout"),
    [
        (1, 1, 8, "projected"),
        (37, 11, 64, "dense"),
        (30, 30, 33, "projected"),
        (9, 0, 16, "dense"),
        (21, 25, 20, "projected"),
        (0, 3, 8, "dense"),
        (12, 5, 1, "projected"),
    ],
)
@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in_place"])
def test_rows(backend, device, tokens, kept, dim, layout, dtype, in_place):
    """Every byte of every row, with layers of different lengths and V of another width than K."""
    guards: list = []
    keep = draw_keep(3, tokens, kept, device)
    keys = [draw((3, 2, tokens + i, dim), dtype, device, layout, guards) for i in range(2)]
    values = [draw((3, 2, tokens + i, dim + 3), dtype, device, layout, guards) for i in range(2)]
    before, memory = [x.clone() for x in keys + values], [x.clone() for x in guards]
    if in_place:
        assert compact_kv_(keys, values, keep, backend=backend) is None
        after = keys + values
    else:
        after = flat(compact_kv(keys, values, keep, backend=backend))
        assert all(torch.equal(a, b) for a, b in zip(guards, memory, strict=True))
    for old, new in zip(before, after, strict=True):
        expected = old.clone() if in_place else torch.zeros(3, 2, kept, old.shape[3], device=device).to(dtype)
        for b, m in (keep >= 0).nonzero().tolist():
            expected.view(torch.uint8)[b, :, m] = old.view(torch.uint8)[b, :, keep[b, m]]
        assert new.shape == expected.shape and new.dtype == dtype
        assert torch.equal(as_bytes(new), as_bytes(expected))
    if in_place:  # nothing but the rows: what lies around and between them is as it was
        for x, old in zip(keys + values, before, strict=True):
            x.copy_(old)
        assert all(torch.equal(a, b) for a, b in zip(guards, memory, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (128, 96), (20, 10), (33, 2), (80, 80)])
@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in_place"])
def test_turned_keys_are_those_of_the_new_positions(backend, device, dim, rotary, dtype, in_place):
    """Against keys that were rotated at their new positions in the first place, in fp64."""
    tokens, frequency = 45, 100.0 ** -torch.linspace(0, 1, rotary // 2, dtype=torch.float64)
    raw, old = torch.randn(2, 3, tokens, dim, dtype=torch.float64), torch.arange(tokens) + 5
    keep = draw_keep(2, tokens, 17)
    position = torch.arange(17).expand(2, -1)

    def rotate(x, position):
        angle = (position[..., None] * frequency).expand(*x.shape[:-1], -1)
        a, b, rest = x.split([rotary // 2, rotary // 2, dim - rotary], -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], -1)

    kept = raw.gather(2, keep.clamp_min(0)[:, None, :, None].expand(-1, 3, -1, dim))
    exact = rotate(kept, position[:, None]).masked_fill((keep < 0)[:, None, :, None], 0)
    angle = (position - old[keep.clamp_min(0)])[..., None] * frequency
    stored, value = rotate(raw, old).to(dtype).to(device), torch.randn(2, 3, tokens, 24).to(dtype).to(device)
    keep, cos, sin = keep.to(device), angle.cos().float().to(device), angle.sin().float().to(device)

    def run(backend):
        keys, values = [stored.clone() for _ in range(2)], [value.clone() for _ in range(2)]
        if in_place:
            compact_kv_(keys, values, keep, None, cos, sin, backend=backend)
            keys, values = ([x[:, :, :17] * (keep >= 0)[:, None, :, None] for x in all] for all in (keys, values))
        else:
            keys, values = compact_kv(keys, values, keep, None, cos, sin, backend=backend)
        assert torch.equal(*keys) and torch.equal(*values)
        return keys[0], values[0]

    (keys, values), (low, plain) = run(backend), run("reference")
    assert torch.equal(keys, low) and torch.equal(values, plain)  # products and sums are rounded alike
    # The stored keys were rounded once already, which the same move in fp64 shows.
    rounded = compact_kv(
        [stored.double()], [value.double()], keep, None, cos.double(), sin.double(), backend="reference"
    )[0][0]
    assert_within_budget(keys.cpu(), low.cpu(), rounded.cpu(), name="turned")
    bound = 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert (keys.cpu().double() - exact).abs().max() <= bound


def test_lengths_say_the_same_as_the_padding(backend, device):
    keys, values = ([torch.randn(3, 2, 9, 4, device=device)] for _ in range(2))
    keep = draw_keep(3, 9, 6, device)
    plain = compact_kv(keys, values, keep, backend=backend)
    for dtype in (torch.int32, torch.int64):
        counted = compact_kv(keys, values, keep, (keep >= 0).sum(1).to(dtype), backend=backend)
        assert torch.equal(counted[0][0], plain[0][0]) and torch.equal(counted[1][0], plain[1][0])


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in_place"])
def test_rows_beyond_the_cache(in_place):
    """Large outputs are written past the cache, by several threads."""
    keys, values = torch.randn(2, 2, 1, 8, 1500, 128).unbind()
    keep = draw_keep(1, 1500, 1400)
    expected = [x.index_select(2, keep[0]) for x in (*keys, *values)]
    if in_place:
        compact_kv_(keys, values, keep)
        found = [x[:, :, :1400] for x in (*keys, *values)]
    else:
        found = flat(compact_kv(keys, values, keep))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradients_flow():
    keys, values = torch.randn(2, 2, 2, 7, 4, dtype=torch.float64, requires_grad=True).unbind()
    keep, (cos, sin) = draw_keep(2, 7, 4), torch.randn(2, 2, 4, 2, dtype=torch.float64)

    def run(keys, values):
        return tuple(flat(compact_kv([keys], [values], keep, None, cos, sin)))

    assert torch.autograd.gradcheck(run, (keys, values))
    with pytest.raises(ValueError, match=r"keys\[0\] requires grad"):
        compact_kv_([keys], [values], keep)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("op", [OPS.compact_kv.default, OPS.compact_kv_.default], ids=["new", "in_place"])
def test_opcheck(op, turned):
    keys, values = ([torch.randn(2, 3, n, 8) for n in (9, 11)] for _ in range(2))
    tables = torch.randn(2, 2, 4, 3).unbind() if turned else (None, None)
    opcheck(op, (keys, values, draw_keep(2, 9, 4), *tables))


def test_compiles_without_a_break():
    def step(keys, values, keep):
        return [x + 1 for x in compact_kv([keys], [values], keep)[0]]

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (9, 14):
        x, keep = torch.randn(2, 2, 3, tokens, 8), draw_keep(2, tokens, 4)
        assert torch.equal(compiled(*x, keep)[0], step(*x, keep)[0])


X = torch.zeros(2, 3, 5, 8)
KEEP = torch.tensor([[0, 2, 3], [1, 4, -1]])
TABLE = torch.zeros(2, 3, 4)
BAD = {
    "no layer": (dict(keys=[], values=[]), "one tensor per layer"),
    "fewer values": (dict(values=[]), "got 1 keys and 0 values"),
    "keep dtype": (dict(keep=KEEP.int()), "keep must be an int64 tensor"),
    "batch": (dict(keep=KEEP[:1]), r"keys\[0\] must be \[1, 3, tokens, dim\]"),
    "heads": (dict(values=[X[:, :2]]), r"values\[0\] must be \[2, 3, tokens, dim\]"),
    "dtype": (dict(values=[X.half()]), r"values\[0\] is torch.float16"),
    "dim stride": (dict(keys=[X.mT.contiguous().mT]), "contiguous last dimension"),
    "too far": (dict(keep=KEEP + 1), r"keep\[1, 1\] = 5"),
    "shortest layer": (dict(keys=[X, X[:, :, :4]], values=[X, X]), "the shortest layer has 4"),
    "below": (dict(keep=KEEP - (KEEP < 0).long()), r"keep\[1, 2\] = -2"),
    "repeated": (dict(keep=KEEP[:, [0, 1, 1]]), r"keep\[0, 2\] = 2"),
    "descending": (dict(keep=KEEP.flip(1)), r"keep\[0, 1\] = 2"),
    "after padding": (dict(keep=KEEP[:, [2, 0, 1]][1:].expand(2, -1)), r"keep\[0, 1\] = 1"),
    "lengths shape": (
        dict(lengths=torch.zeros(3, dtype=torch.int64)),
        r"lengths must be an int32 or int64 tensor \[2\]",
    ),
    "lengths": (dict(lengths=torch.tensor([3, 3])), r"lengths=\[3, 3\] disagrees with keep"),
    "one table": (dict(cos=TABLE), "sin is None"),
    "table shape": (dict(cos=TABLE, sin=TABLE[:, :2]), "sin must be torch.float32"),
    "table dtype": (dict(cos=TABLE.double(), sin=TABLE), "cos must be torch.float32"),
    "table width": (dict(cos=torch.zeros(2, 3, 5), sin=torch.zeros(2, 3, 5)), "turns 10 columns"),
    "float8": (
        dict(keys=[X.to(torch.float8_e5m2)], values=[X.to(torch.float8_e5m2)], cos=TABLE, sin=TABLE),
        "cannot be turned",
    ),
}


@pytest.mark.parametrize("op", [compact_kv, compact_kv_], ids=["new", "in_place"])
@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input(op, change, message):
    arguments = dict(keys=[X], values=[X], keep=KEEP) | change
    with pytest.raises(ValueError, match=message):
        op(**arguments)
    assert (X == 0).all()


def test_a_requested_backend_is_never_replaced():
    with pytest.raises(RuntimeError, match=r"needs CUDA tensors"):
        compact_kv([X], [X], KEEP, backend="cuda")
    with pytest.raises(RuntimeError, match="it has no triton form"):
        compact_kv_([X], [X], KEEP, backend="triton")


def test_an_expanded_tensor_is_not_compacted_in_place():
    with pytest.raises(ValueError, match=r"values\[0\] is an expanded tensor"):
        compact_kv_([X.clone()], [X[:, :, :1].expand(-1, -1, 5, -1)], KEEP)


@pytest.mark.parametrize("twin", [lambda x: x, lambda x: x[..., :6], lambda x: x.view(torch.int32).view(x.dtype)])
def test_a_tensor_given_twice_is_not_compacted_in_place(twin):
    x = X.clone()
    with pytest.raises(ValueError, match=r"values\[1\] shares memory with keys\[0\], whose rows would be moved twice"):
        compact_kv_([x, X.clone()], [X.clone(), twin(x)], KEEP)
    assert torch.equal(x, X)


@pytest.mark.parametrize(
    "parts",
    [
        lambda x: (x.flatten()[:240].view_as(X), x.flatten()[239:479].view_as(X)),
        lambda x: (x[:, :, :5], x[:, :, 4:9]),
        lambda x: (x[:, :, 3:5], x[:, :, :4]),
        lambda x: (x[:, :3], x[:, 2:]),
        lambda x: (x[..., 4:12], x[..., :5]),
        lambda x: (x[0].expand(2, -1, -1, -1)[:1], x[:1, :, 2:]),
    ],
    ids=["dense", "rows", "fewer rows", "heads", "columns", "one sample"],
)
def test_tensors_that_overlap_are_not_compacted_in_place(parts):
    memory = torch.arange(2 * 5 * 10 * 16.0).view(2, 5, 10, 16)
    key, value = parts(memory)
    before, keep = memory.clone(), torch.arange(2).expand(len(key), -1)
    for pair, names in (((key, value), "values[0] shares memory with keys[0]"), ((value, key), "values[0] shares")):
        with pytest.raises(ValueError, match=re.escape(names)):
            compact_kv_(pair[:1], pair[1:], keep)
    assert torch.equal(memory, before)


@pytest.mark.parametrize("order", ["lvbgnd", "blvgnd", "bgnlvd", "blgnvd", "bnvlgd", "vbnlgd", "gnblvd", "lbgvnd"])
@pytest.mark.parametrize("samples", [1, 3])
def test_slices_of_one_buffer_are_apart(order, samples):
    """Keys and values of all layers, whichever way their elements lie between each other's."""
    sizes = dict(l=4, v=2, b=samples, g=2, n=6, d=8)
    memory = torch.randn([sizes[name] for name in order]).permute([order.index(name) for name in "lvbgnd"])
    keys, values = ([layer[i] for layer in memory] for i in range(2))
    keep = torch.tensor([1, 2, 5]).expand(samples, -1)
    want = flat(compact_kv(keys, values, keep))
    compact_kv_(keys, values, keep)
    assert all(torch.equal(x[:, :, :3], y) for x, y in zip((*keys, *values), want, strict=True))


DIRECT = {
    "beyond": (lambda: OPS.compact_kv([X], [X], KEEP + 1), r"keep\[1, 1\] = 5 after 2"),
    "repeated": (lambda: OPS.compact_kv_([X], [X], KEEP[:, [0, 1, 1]]), "rows must ascend"),
    "after padding": (lambda: OPS.compact_kv_([X], [X], KEEP[:, [2, 0, 1]]), "rows must ascend"),
    "shape": (lambda: OPS.compact_kv([X], [X[:, :1]], KEEP), "keys and values must be"),
    "count": (lambda: OPS.compact_kv([X], [], KEEP), "as many"),
    "stride": (lambda: OPS.compact_kv([X.mT.contiguous().mT], [X], KEEP), "contiguous last dimension"),
    "table": (lambda: OPS.compact_kv([X], [X], KEEP, TABLE, TABLE[:1]), "cos and sin must be"),
    "width": (lambda: OPS.compact_kv([X[..., :6]], [X], KEEP, TABLE, TABLE), "cos and sin are for 8 columns"),
    "fp64": (lambda: OPS.compact_kv([X.double()], [X.double()], KEEP, TABLE, TABLE), "use backend='reference'"),
}


@pytest.mark.parametrize(("call", "message"), DIRECT.values(), ids=DIRECT)
@pytest.mark.skipif(_library.native_error() is not None, reason=str(_library.native_error()))
def test_a_direct_call_with_bad_arguments_is_an_error(call, message):
    """The dispatcher can be called around the Python checks: an error then, never a wild read or write."""
    with pytest.raises(RuntimeError, match=message):
        call()


@st.composite
def sweeps(draw):
    """Rows to keep, vectors per row, vectors per tile, and in which order a tile's threads come to their reads."""
    tokens, width, tile = draw(st.integers(1, 24)), draw(st.integers(1, 5)), draw(st.integers(1, 12))
    keep = sorted(draw(st.sets(st.integers(0, tokens - 1))))
    return tokens, width, tile, keep, draw(st.randoms(use_true_random=False))


@settings(max_examples=200, deadline=None)
@given(sweeps())
def test_the_sweep_in_place_reads_every_row_before_it_is_overwritten(case):
    """The schedule of csrc/include/compact_kv.cuh: per tile read, barrier, write; no barrier after the writes.

    Threads run freely between two barriers, so the writes of a tile mix with the reads of the next in any order.
    """
    tokens, width, tile, keep, random = case
    memory = [[(row, column) for column in range(width)] for row in range(tokens)]
    items = [(m, column) for m in range(len(keep)) for column in range(width)]
    tiles = [items[i : i + tile] for i in range(0, len(items), tile)]
    writes: list = []
    for reads in [*tiles, []]:
        steps, registers = [("write", *w) for w in writes] + [("read", m, c, None) for m, c in reads], []
        random.shuffle(steps)
        for what, m, column, value in steps:
            if what == "write":
                memory[m][column] = value
            else:
                registers.append((m, column, memory[keep[m]][column]))
        writes = registers
    for m, row in enumerate(keep):
        assert memory[m] == [(row, column) for column in range(width)]


LIBRARY = sorted(Path(_library.__file__).parent.glob("flowcut_kernels_native*.so"))


@pytest.mark.skipif(_library.cuda_error() is not None, reason=str(_library.cuda_error()))
def test_cuda_kernels_do_not_spill():
    """Registers, stack and local memory of every kernel in the library, for every architecture it was built for."""
    triton = pytest.importorskip("triton", reason="cuobjdump comes with Triton")
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(LIBRARY[0])]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.findall(r"Function (\S*compact_kv\S*):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert len(used) % 27 == 0 and used, text[-2000:]  # compact_kv new and in place, compact_kv_paged
    for name, registers, stack, local in used:
        # 128 registers let two blocks share a multiprocessor.
        assert int(registers) <= 128 and int(stack) == int(local) == 0, f"{name}: {registers} registers, stack {stack}"


def test_the_cuda_kernels_on_the_host(tmp_path):
    """The source of both operators' kernels, a thread per CUDA thread, under the address sanitizer."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on the path")
    folder, program = Path(__file__).parent, tmp_path / "host"
    flags = ["-x", "c++", "-std=c++20", "-Xcompiler", "-pthread,-ffp-contract=off,-fsanitize=address"]
    command = [nvcc, *flags, f"-I{folder.parents[1] / 'csrc/include'}", str(folder / "compact_kv_on_host.cpp")]
    subprocess.run([*command, "-o", str(program)], check=True, capture_output=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
