"""`attention`: every backend against softmax(Q K^T) V in fp64, on views as transformers makes them."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck
from torch.nn.functional import scaled_dot_product_attention

from flowcut_kernels import _library
from flowcut_kernels.ops import attention
from flowcut_kernels.testing import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")
PAYLOADS = (0x7FC00000, 0x7FC00001, 0x7F800001, -0x00400000)  # bit patterns of NaN


@pytest.fixture
def device() -> str:
    """The C++ form is for CPUs; on a GPU there would only be torch's own attention to test."""
    return "cpu"


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    if request.param == "cpp" and _library.native_error():
        pytest.skip(_library.native_error())
    return request.param


def draw(
    batch, heads, kv_heads, queries, tokens, dim, value_dim=None, dtype=torch.float32, layout="bnhd", device="cpu"
):
    """q, k, v: strided views of [B, N, H*D], views whose rows have NaN between them, or plain [B, H, N, D]."""
    sizes = [(heads, queries, dim), (kv_heads, tokens, dim), (kv_heads, tokens, value_dim or dim)]
    if layout == "bhnd":
        return [torch.randn(batch, *size).to(device, dtype) for size in sizes]
    gap = 3 if layout == "gaps" else 0
    views = []
    for count, length, width in sizes:
        rows = torch.full((batch, length, count, width + gap), NAN, dtype=dtype, device=device)
        rows[..., :width] = torch.randn(batch, length, count, width).to(device, dtype)
        views.append(rows[..., :width].transpose(1, 2))
    return views


def plain(query, key, value, spans=None, scale=None):
    """torch's attention, sample by sample over its live keys alone: [B, M, H, Dv]."""
    group = query.shape[1] // key.shape[1]
    spans = [(0, key.shape[2])] * len(key) if spans is None else spans.tolist()
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    for b, (start, end) in enumerate(spans):
        if start < end:
            k, v = (x[b : b + 1, :, start:end].repeat_interleave(group, 1) for x in (key, value))
            out[b : b + 1] = scaled_dot_product_attention(query[b : b + 1], k, v, scale=scale)
    return out.transpose(1, 2)


def check(inputs, backend, spans=None, scale=None):
    """Within twice the error of torch's attention in the inputs' precision."""
    low, exact = plain(*inputs, spans, scale), plain(*(x.double() for x in inputs), spans, scale)
    actual = attention(*inputs, key_span=spans, scale=scale, backend=backend)
    assert actual.dtype == inputs[0].dtype and actual.is_contiguous()
    assert_within_budget(actual, low, exact)
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("dim", "value_dim"), [(1, 1), (5, 7), (33, 33), (64, 64), (72, 72), (80, 16), (88, 88), (96, 96), (128, 256)]
)
def test_head_dims_and_dtypes(backend, device, dim, value_dim, dtype):
    check(draw(2, 4, 2, 37, 53, dim, value_dim, dtype, device=device), backend)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("layout", ["bnhd", "gaps", "bhnd"])
@pytest.mark.parametrize(
    ("queries", "tokens"), [(1, 1), (1, 577), (19, 1), (16, 2), (64, 299), (145, 97), (100, 96), (577, 577)]
)
def test_sizes_and_layouts(backend, device, queries, tokens, layout, dtype):
    """Full and partial blocks of queries, tiles of keys, pairs of keys; nothing beside a row is read."""
    check(draw(1, 2, 2, queries, tokens, 40, dtype=dtype, layout=layout, device=device), backend)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 1), (6, 3), (6, 6)])
@pytest.mark.parametrize("queries", [1, 21])
def test_grouped_heads(backend, device, queries, heads, kv_heads):
    check(draw(2, heads, kv_heads, queries, 45, 64, device=device), backend, scale=0.3)


@pytest.mark.parametrize("span_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spans_ignore_dead_keys(backend, device, dtype, span_dtype):
    """Keys outside the span hold NaN and Inf; length-1, empty, odd and shifted spans."""
    inputs = draw(5, 4, 2, 33, 133, 32, dtype=dtype, device=device)
    spans = torch.tensor([[0, 133], [0, 1], [5, 5], [7, 120], [132, 133]], dtype=span_dtype, device=device)
    clean = check(inputs, backend, spans)
    assert (clean[2] == 0).all()
    query, key, value = (x.clone(memory_format=torch.preserve_format) for x in inputs)
    for b, (start, end) in enumerate(spans.tolist()):
        for x in (key, value):
            x[b, :, :start] = NAN
            x[b, :, end:] = INF
    query[2] = NAN
    assert torch.equal(attention(query, key, value, key_span=spans, backend=backend), clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_place_and_threads_change_no_bit(dtype):
    """A query's output depends on itself and its sample's live keys: not on batch, block, lane or thread."""
    if _library.native_error():
        pytest.skip(_library.native_error())
    query, key, value = draw(3, 4, 2, 77, 205, 72, dtype=dtype)
    spans, order = torch.tensor([[0, 205], [3, 150], [10, 11]]), torch.randperm(77)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(attention(query, key, value, key_span=spans, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other, results[0])
    assert torch.equal(attention(query[:, :, order], key, value, key_span=spans, backend="cpp"), results[0][:, order])
    for b, (start, end) in enumerate(spans.tolist()):
        one, live = slice(b, b + 1), slice(start, end)
        alone = attention(query[one, :, :7], key[one, :, live], value[one, :, live], backend="cpp")
        assert torch.equal(alone, results[0][one, :7])


@pytest.mark.parametrize("bits", PAYLOADS, ids=hex)
def test_every_nan_stays(backend, device, bits):
    query, key, value = draw(1, 1, 1, 20, 20, 16, device=device)
    query[0, 0, 3] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    out = attention(query, key, value, backend=backend)
    assert out[0, 3].isnan().all() and out[0, :3].isfinite().all() and out[0, 4:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(backend, device, dtype):
    """The best key takes all, wherever it lies; NaN stays in its row; logits of -inf alone give 0, as in torch."""
    query, key, value = draw(1, 1, 1, 200, 200, 64, dtype=dtype, device=device)
    key /= key.norm(dim=-1, keepdim=True)
    query = key.flip(2).clone()
    query[:, :, 3] = NAN
    out = attention(query, key, value, scale=2.0**20, backend=backend)[:, :, 0]
    assert out[:, 3].isnan().all()
    winner = (query.double() @ key.double().transpose(-1, -2))[0, 0].argmax(-1)
    expected = value[0, :, winner]
    expected[:, 3] = out[:, 3]
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert (attention(query[:, :, :1].abs() + 1, key * 0 - INF, value, backend=backend) == 0).all()


@pytest.mark.parametrize(("batch", "queries", "tokens"), [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_nothing(backend, device, batch, queries, tokens):
    out = attention(*draw(batch, 2, 2, queries, tokens, 16, device=device), backend=backend)
    assert torch.equal(out, torch.zeros(batch, queries, 2, 16, device=device))


def test_gradients():
    """Where autograd records, torch's attention runs, whatever the backend."""
    inputs, spans = [x.requires_grad_() for x in draw(2, 4, 2, 5, 7, 8)], torch.tensor([[0, 7], [2, 5]])
    ours, theirs = (
        torch.autograd.grad(f(*inputs).square().sum(), inputs)
        for f in (lambda *x: attention(*x, key_span=spans), lambda *x: plain(*x, spans))
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("spans", [None, torch.tensor([[0, 9], [1, 7]])], ids=["all", "spans"])
def test_opcheck(spans):
    opcheck(torch.ops.flowcut_kernels.attention.default, (*draw(2, 4, 2, 5, 9, 16), spans), dict(scale=0.25))


def test_compiles_without_graph_break_or_recompile():
    """fullgraph, dynamic batch, queries and tokens: two sizes, one compilation."""
    counter = CompileCounter()
    compiled = torch.compile(lambda *x: attention(*x), backend=counter, fullgraph=True, dynamic=True)
    for batch, queries, tokens in ((3, 5, 11), (5, 6, 19)):
        inputs = draw(batch, 4, 2, queries, tokens, 16)
        torch.testing.assert_close(compiled(*inputs), attention(*inputs))
    assert counter.frame_count == 1


Q, K = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(query=torch.zeros(2, 3, 3, 8)), "query .* does not fit key"),
        (dict(query=torch.zeros(2, 4, 8)), r"query must be \[batch, heads, tokens, dim\]"),
        (dict(query=Q.half()), "query is torch.float16 .* but key is torch.float32"),
        (dict(query=Q.int()), "query must be floating point, got torch.int32"),
        (dict(key=torch.zeros(2, 2, 8, 5).transpose(2, 3)), "key needs a contiguous last dimension"),
        (dict(value=torch.zeros(2, 2, 4, 8)), r"value \(2, 2, 4, 8\) does not fit key"),
        (dict(key_span=torch.zeros(3, 2, dtype=torch.int32)), r"key_span must be integer \[2, 2\]"),
        (dict(key_span=torch.zeros(2, 2)), "key_span must be integer"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else None,
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        attention(**(dict(query=Q, key=K, value=K) | change))


def test_there_is_no_triton_form():
    with pytest.raises(RuntimeError, match="no triton form for these tensors; use 'cpp' or 'reference'"):
        attention(Q, K, K, backend="triton")
