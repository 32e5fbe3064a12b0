"""`received_attention`: every backend against the fp64 reference, and that against softmax written out."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

from flowcut_kernels import _library
from flowcut_kernels.ops import received_attention
from flowcut_kernels.testing import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")


def draw(batch, heads, kv_heads, tokens, dim, dtype=torch.float32, layout="bnhd", device="cpu"):
    """q and k: views of [B, N, heads * D], views whose rows have NaN between them, or plain [B, heads, N, D]."""
    views = []
    for count in (heads, kv_heads):
        rows = torch.randn(batch, tokens, count, dim, dtype=torch.float64).to(device, dtype)
        if layout == "bhnd":
            views.append(rows.transpose(1, 2).contiguous())
            continue
        gap = 3 if layout == "gaps" else 0
        padded = torch.full((batch, tokens, count, dim + gap), NAN, dtype=dtype, device=device)
        padded[..., :dim] = rows
        views.append(padded[..., :dim].transpose(1, 2))
    return views


def plain(query, key, lengths=None, scale=None):
    """Column mean of each sample's attention map, in fp64, and the rows' log-sum-exp (NaN in dead ones)."""
    batch, heads, tokens, dim = query.shape
    received = torch.zeros(batch, tokens, dtype=torch.float64, device=query.device)
    lse = torch.full((batch, heads, tokens), NAN, dtype=torch.float64, device=query.device)
    for b, n in enumerate([tokens] * batch if lengths is None else lengths.tolist()):
        k = key[b, :, :n].double().repeat_interleave(heads // key.shape[1], 0)
        logits = query[b, :, :n].double() @ k.mT * (dim**-0.5 if scale is None else scale)
        lse[b, :, :n] = logits.logsumexp(-1)
        if n:
            received[b, :n] = logits.softmax(-1).mean((0, 1))
    return received, lse


def check(inputs, backend, lengths=None, **options):
    """Within twice the error of the reference in the inputs' precision, with and without the log-sum-exp."""
    exact, lse = plain(*inputs, lengths, options.get("scale"))
    results = []
    for given in (None, lse.float()):
        low = received_attention(*inputs, lse=given, lengths=lengths, backend="reference", **options)
        actual = received_attention(*inputs, lse=given, lengths=lengths, backend=backend, **options)
        assert actual.dtype == torch.float32 and actual.is_contiguous()
        assert_within_budget(actual, low, exact, name="received" if given is None else "received by lse")
        live = (exact > 0).any(-1)
        torch.testing.assert_close(actual.sum(-1)[live], torch.ones_like(actual.sum(-1)[live]))
        results.append(actual)
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [5, 16, 64, 72, 80, 88, 96, 128])
def test_head_dims_and_dtypes(backend, device, dim, dtype):
    check(draw(2, 2, 1, 37, dim, dtype, device=device), backend)


@pytest.mark.parametrize("layout", ["bnhd", "gaps", "bhnd"])
@pytest.mark.parametrize("tokens", [1, 2, 17, 130])
def test_sizes_and_layouts(backend, device, tokens, layout):
    """One token, and more than one tile; nothing beside a row is read."""
    check(draw(2, 2, 2, tokens, 40, torch.bfloat16, layout, device), backend)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("tokens", [95, 96, 577, 729])
def test_blocks_and_parts(tokens, dtype):
    """Sizes at which the C++ form has full and partial tiles, blocks, vectors and parts."""
    if _library.native_error():
        pytest.skip(_library.native_error())
    check(draw(1, 3, 3, tokens, 24, dtype), "cpp")


def test_parts_of_a_shorter_sample():
    """Rows that share a head fall into parts by the live tokens alone, and 3,072 make more parts than 3,120 do."""
    if _library.native_error():
        pytest.skip(_library.native_error())
    query, key = draw(2, 8, 1, 390, 8)
    received, _ = check((query, key), "cpp", torch.tensor([390, 384]))
    alone = received_attention(query[1:, :, :384], key[1:, :, :384], backend="cpp")
    assert torch.equal(received[1, :384], alone[0])


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 1), (6, 3), (6, 6)])
@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
def test_grouped_heads_and_scales(backend, device, heads, kv_heads, scale):
    check(draw(2, heads, kv_heads, 21, 32, device=device), backend, scale=scale)


@pytest.mark.parametrize(
    ("dtype", "lengths_dtype"), [*((dtype, torch.int32) for dtype in DTYPES), (DTYPES[-1], torch.int64)], ids=str
)
def test_lengths_ignore_dead_tokens(backend, device, dtype, lengths_dtype):
    """Dead tokens hold NaN and Inf, as queries, keys and log-sum-exp; full, odd, length-1, empty samples."""
    inputs = draw(4, 4, 2, 70, 32, dtype, device=device)
    lengths = torch.tensor([70, 37, 1, 0], dtype=lengths_dtype, device=device)
    results = check(inputs, backend, lengths)
    column = torch.arange(70, device=device)
    assert all((clean[column >= lengths[:, None]] == 0).all() for clean in results)
    _, lse = plain(*inputs, lengths)
    query, key = (x.clone(memory_format=torch.preserve_format) for x in inputs)
    for b, n in enumerate(lengths.tolist()):
        query[b, :, n:], key[b, :, n:] = NAN, INF
        key[b, :, n + 1 :] = NAN
    for given, clean in zip((None, lse.float()), results, strict=True):
        assert torch.equal(received_attention(query, key, lse=given, lengths=lengths, backend=backend), clean)


def test_lengths_equal_the_slice(backend, device):
    """A sample's result depends on its live tokens alone: not on its neighbours, its place, or the padding's size."""
    query, key = draw(3, 4, 2, 150, 24, torch.bfloat16, device=device)
    lengths = torch.tensor([150, 20, 133], device=device)
    batched = received_attention(query, key, lengths=lengths, backend=backend)
    turned = received_attention(query.flip(0), key.flip(0), lengths=lengths.flip(0), backend=backend).flip(0)
    for b, n in enumerate(lengths.tolist()):
        alone = received_attention(query[b : b + 1, :, :n], key[b : b + 1, :, :n], backend=backend)
        if backend == "reference":  # torch's products may differ in the last bit
            torch.testing.assert_close(batched[b, :n], alone[0])
            torch.testing.assert_close(batched[b], turned[b])
        else:
            assert torch.equal(batched[b, :n], alone[0])
            assert torch.equal(batched[b], turned[b])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 700), (3, 205)])
def test_threads_change_no_bit(batch, tokens, dtype):
    if _library.native_error():
        pytest.skip(_library.native_error())
    inputs, before = draw(batch, 4, 2, tokens, 72, dtype), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(received_attention(*inputs, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other, results[0]) for other in results[1:])


def test_strided_lse(backend, device):
    """As flash attentions leave it: a slice of padded rows, or [B, N, H] transposed."""
    inputs = draw(2, 2, 2, 19, 16, device=device)
    lse = plain(*inputs)[1].float()
    expected = received_attention(*inputs, lse=lse, backend=backend)
    padded = torch.nn.functional.pad(lse, (0, 13), value=NAN)[..., :19]
    for other in (padded, lse.mT.contiguous().mT):
        assert torch.equal(received_attention(*inputs, lse=other, backend=backend), expected)


def test_large_logits(backend, device):
    """Every row looks at one key: no overflow, and that key gets exactly its share."""
    query, key = draw(1, 1, 1, 50, 64, device=device)
    key /= key.norm(dim=-1, keepdim=True)
    query = key[:, :, torch.arange(50) // 5 * 5].clone()
    expected = torch.zeros(50, device=device)
    expected[::5] = 0.1
    lse = 4096 * (query * query).sum(-1)
    for given in (None, lse):
        received = received_attention(query, key, lse=given, scale=4096, backend=backend)[0]
        # Two sums of squares that should be 1 may differ by some 1e-7, their logits by 4096 times that.
        torch.testing.assert_close(received, expected, rtol=4e-3, atol=1e-7)


def test_a_nan_in_a_live_row_spreads(backend, device):
    query, key = draw(2, 1, 1, 20, 16, device=device)
    query[1, 0, 3] = NAN
    received = received_attention(query, key, backend=backend)
    assert received[0].isfinite().all() and received[1].isnan().all()


def test_empty(backend, device):
    """No tokens or no images: empty results, no error."""
    assert received_attention(*draw(2, 2, 2, 0, 16, device=device), backend=backend).shape == (2, 0)
    assert received_attention(*draw(0, 2, 2, 5, 16, device=device), backend=backend).shape == (0, 5)


MEMORY = """
import re, sys, torch
from pathlib import Path
from flowcut_kernels.ops import received_attention

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def extra(tokens):
    query, key = torch.randn(2, 1, 1, tokens, 8)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    before = peak()
    received = received_attention(query, key, backend=sys.argv[1])
    assert abs(received.sum().item() - 1) < 1e-4
    return peak() - before

torch.set_num_threads(2)
extra(512)  # threads start
tokens = int(sys.argv[2])
print(extra(tokens // 4), extra(tokens))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory cannot be reset")
@pytest.mark.parametrize(("form", "tokens"), [("reference", 8192), ("cpp", 16384)])
def test_memory_is_linear(form, tokens):
    """At N = 16,384 a map would be 1 GiB, 16 times that at 4,096; four times the tokens take four times the memory."""
    if form == "cpp" and _library.native_error():
        pytest.skip(_library.native_error())
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, form, str(tokens)], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    quarter, whole = (int(kib) for kib in run.stdout.split())
    print(f"{form}: {quarter} KiB at N={tokens // 4:,}, {whole} KiB at N={tokens:,}")
    # What libraries take for themselves on the way, some tens of MiB at times, is in there too.
    quarter_of_a_map = 4 * tokens**2 / 1024 / 4
    assert whole < min(5 * quarter + 32 * 1024, quarter_of_a_map)


def test_triton_memory_is_linear():
    """Twice the tokens, twice the bytes of everything that the launches touch."""
    pytest.importorskip("triton")
    prepare = import_module("flowcut_kernels.ops.received_attention.triton").prepare

    def touched(tokens):
        query = torch.empty(1, 16, tokens, 72, dtype=torch.bfloat16, device="meta")
        tensors = {
            id(x): x.numel() * x.element_size()
            for launch in prepare(query, query, None, None, scale=0.1)
            for x in launch.arguments
            if isinstance(x, torch.Tensor)
        }
        return sum(tensors.values())

    assert 16 * 16384 * 4 < touched(16384) <= 2.01 * touched(8192)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_graph_replay_changes_no_bit():
    """Captured, then replayed on other inputs: every time the bits of an ordinary call."""
    query, key = draw(3, 16, 16, 729, 72, torch.bfloat16, device="cuda")
    received_attention(query, key)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = received_attention(query, key)
    query.copy_(torch.randn_like(query))
    for _ in range(3):
        graph.replay()
        assert torch.equal(captured, received_attention(query, key))


@pytest.mark.parametrize("given", [False, True], ids=["", "lse"])
@pytest.mark.parametrize("lengths", [None, torch.tensor([9, 7])], ids=["all", "lengths"])
def test_opcheck(lengths, given):
    query, key = draw(2, 4, 2, 9, 16)
    lse = plain(query, key, lengths, 0.25)[1].float() if given else None
    opcheck(torch.ops.flowcut_kernels.received_attention.default, (query, key, lse, lengths), dict(scale=0.25))


def test_compiles_without_graph_break_or_recompile():
    """fullgraph, dynamic batch and tokens: two sizes, one compilation."""
    counter = CompileCounter()
    compiled = torch.compile(lambda *x: received_attention(*x), backend=counter, fullgraph=True, dynamic=True)
    for batch, tokens in ((3, 11), (5, 19)):
        inputs = draw(batch, 4, 2, tokens, 16, device=DEVICE)
        torch.testing.assert_close(compiled(*inputs), received_attention(*inputs))
    assert counter.frame_count == 1


Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 5, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(query=torch.zeros(2, 3, 5, 8)), "query .* does not fit key"),
        (dict(query=torch.zeros(2, 4, 4, 8)), "query .* does not fit key"),
        (dict(query=torch.zeros(2, 4, 8)), r"query must be \[batch, heads, tokens, dim\]"),
        (dict(query=Q.half()), "query is torch.float16 .* but key is torch.float32"),
        (dict(query=Q.int()), "query must be floating point, got torch.int32"),
        (dict(key=torch.zeros(2, 2, 8, 5).transpose(2, 3)), "key needs a contiguous last dimension"),
        (dict(lse=torch.zeros(2, 2, 5)), r"lse must be torch.float32 \(2, 4, 5\)"),
        (dict(lse=torch.zeros(2, 4, 5).double()), "lse must be torch.float32 .* got torch.float64"),
        (dict(lengths=torch.zeros(3, dtype=torch.int32)), r"lengths must be int32 or int64 \[2\]"),
        (dict(lengths=torch.zeros(2)), "lengths must be int32 or int64"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else None,
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        received_attention(**(dict(query=Q, key=K) | change))


def test_wide_heads_have_no_triton_form():
    wide = torch.zeros(1, 1, 3, 160)
    with pytest.raises(RuntimeError, match="no triton form for these tensors; use 'cpp' or 'reference'"):
        received_attention(wide, wide, backend="triton")
