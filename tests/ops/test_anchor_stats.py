"""`anchor_stats`: every backend against the fp64 reference, on views as transformers makes them."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

from flowcut_kernels._ops import Relevance, ValueNorm
from flowcut_kernels.ops import anchor_stats
from flowcut_kernels.testing import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

NAMES = ("attention", "relevance", "value_norm", "entropy")


def draw(batch, q_heads, kv_heads, tokens, dim, anchors=1, dtype=torch.float32, layout="bnhd", device="cpu"):
    """q, k, v, v_anchor; K and V as strided views of [B, N, G*D], of a fused QKV product, or [B, G, N, D]."""
    query = torch.randn(batch, q_heads, anchors, dim, dtype=torch.float64)
    anchor = torch.randn(batch, kv_heads, anchors, dim, dtype=torch.float64)
    if layout == "bhnd":
        key, value = torch.randn(2, batch, kv_heads, tokens, dim, dtype=torch.float64)
    else:
        width = kv_heads * dim
        fused = torch.randn(batch, tokens, 3 * width, dtype=torch.float64)
        key, value = fused[..., :width], fused[..., 2 * width :]
        if layout == "bnhd":
            key, value = key.contiguous(), value.contiguous()
    query, key, value, anchor = (x.to(device, dtype) for x in (query, key, value, anchor))
    if layout != "bhnd":
        key, value = (x.unflatten(-1, (kv_heads, dim)).transpose(1, 2) for x in (key, value))
    return query, key, value, anchor


def check(inputs, backend, **options):
    """Compare with the reference in fp64, within the error budget of the reference in the inputs' precision."""
    exact = anchor_stats(*(x.double() for x in inputs), backend="reference", **options)
    low = anchor_stats(*inputs, backend="reference", **options)
    actual = anchor_stats(*inputs, backend=backend, **options)
    for name, a, b, e in zip(NAMES, actual, low, exact, strict=True):
        assert a.dtype == torch.float32
        assert_within_budget(a, b, e, name=name)
    return actual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [16, 64, 72, 80, 88, 96, 128])
def test_head_dims_and_dtypes(backend, device, dim, dtype):
    check(draw(2, 4, 2, 37, dim, dtype=dtype, device=device), backend, protect=1)


@pytest.mark.parametrize("value_norm", list(ValueNorm), ids=lambda x: x.name)
@pytest.mark.parametrize("relevance", list(Relevance), ids=lambda x: x.name)
def test_modes(backend, device, relevance, value_norm):
    check(draw(2, 3, 3, 21, 24, device=device), backend, protect=1, relevance=relevance, value_norm=value_norm)


@pytest.mark.parametrize("layout", ["bnhd", "fused", "bhnd"])
@pytest.mark.parametrize("tokens", [1, 2, 17, 130])
def test_layouts_and_sizes(backend, device, tokens, layout):
    check(draw(2, 2, 2, tokens, 64, layout=layout, device=device), backend, protect=int(tokens > 1))


@pytest.mark.parametrize("anchors", [1, 3, 9])
def test_several_anchors(backend, device, anchors):
    check(draw(2, 4, 2, 29, 32, anchors, device=device), backend, relevance=Relevance.SCALED_SOFTMAX)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize(
    ("anchors", "dim", "layout", "dtype"),
    [
        (5, 72, "bnhd", torch.float32),
        (18, 16, "bhnd", torch.float32),
        (25, 40, "fused", torch.bfloat16),
        (66, 16, "bhnd", torch.float16),
    ],
)
def test_attention_of_many_anchors(backend, device, anchors, dim, layout, dtype):
    """Hubs, as VFlowOpt asks for them: dead keys hold NaN, spans are shifted or empty, batch-mates change nothing."""
    alone = dict(relevance=Relevance.NONE, value_norm=ValueNorm.NONE, backend=backend)
    query, key, value, anchor = draw(3, 2, 1, 140, dim, anchors, dtype, layout, device)
    spans = torch.tensor([[0, 140], [5, 5], [7, 133]], device=device)
    clean = check((query, key, value, anchor), key_span=spans, protect=1, **alone)
    for b, (start, end) in enumerate(spans.tolist()):
        key[b, :, :start], key[b, :, end:] = float("nan"), float("inf")
    for rows in (slice(3), slice(2, 3)):
        given = (x[rows] for x in (query, key, value, anchor))
        poisoned = anchor_stats(*given, key_span=spans[rows], protect=1, **alone)
        torch.testing.assert_close(poisoned[0], clean[0][rows], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(poisoned[3], clean[3][rows], rtol=1e-6, atol=1e-7)
    assert anchor_stats(*draw(1, 2, 2, 0, 16, 9, device=device), **alone)[3].tolist() == [[1.0] * 9]


@pytest.mark.parametrize("span_dtype", [torch.int32, torch.int64], ids=str)
def test_spans_ignore_dead_keys(backend, device, span_dtype):
    """Keys outside the span hold NaN and Inf; length-1, empty and shifted spans."""
    inputs = draw(4, 4, 2, 33, 32, device=device)
    spans = torch.tensor([[0, 33], [0, 1], [5, 5], [7, 20]], dtype=span_dtype, device=device)
    clean = check(inputs, backend, key_span=spans, protect=1)
    query, key, value, anchor = (x.clone(memory_format=torch.preserve_format) for x in inputs)
    for b, (start, end) in enumerate(spans.tolist()):
        for x in (key, value):
            x[b, :, :start] = float("nan")
            x[b, :, end:] = float("inf")
    poisoned = anchor_stats(query, key, value, anchor, key_span=spans, protect=1, backend=backend)
    for a, b in zip(poisoned, clean, strict=True):
        assert torch.equal(a, b)


def test_span_equals_the_slice(backend, device):
    """A sample's result depends on its live keys alone, wherever they lie and whoever its neighbours are."""
    query, key, value, anchor = draw(3, 2, 2, 40, 64, device=device)
    spans = torch.tensor([[0, 40], [3, 20], [10, 38]], device=device)
    batched = anchor_stats(query, key, value, anchor, key_span=spans, protect=1, backend=backend)
    for b, (start, end) in enumerate(spans.tolist()):
        one = slice(b, b + 1)
        alone = anchor_stats(
            query[one], key[one, :, start:end], value[one, :, start:end], anchor[one], protect=1, backend=backend
        )
        for name, x, y in zip(NAMES, batched, alone, strict=True):
            x = x[one] if name == "entropy" else x[one, ..., start:end]
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7, msg=name)


def test_zero_vectors_and_uniform_attention(backend, device):
    """cos of a zero vector is 0 (relevance 1/2); equal logits have entropy ratio 1."""
    query, key, value, anchor = draw(1, 2, 2, 9, 16, device=device)
    attention, relevance, norm, entropy = anchor_stats(
        query, torch.zeros_like(key), torch.zeros_like(value), anchor, backend=backend
    )
    torch.testing.assert_close(attention, torch.full_like(attention, 1 / 9))
    assert (relevance == 0.5).all() and (norm == 0).all()
    torch.testing.assert_close(entropy, torch.ones_like(entropy))


def test_extreme_logits(backend, device):
    """One key takes everything: no NaN, entropy 0; nothing overflows at large scale."""
    query, key, value, anchor = draw(1, 1, 1, 12, 16, device=device)
    key[0, 0, 4] = 100 * query[0, 0, 0]
    attention, *_, entropy = anchor_stats(query, key, value, anchor, scale=10.0, backend=backend)
    assert attention[0, 0].argmax() == 4 and attention[0, 0, 4] == 1 and entropy.item() == 0


def test_many_tokens(device, backend):
    tokens = 300 if backend == "triton" and device == "cpu" else 16_384
    check(draw(1, 1, 1, tokens, 64, device=device), backend, protect=1)


def test_empty(backend, device):
    """No tokens or no images: empty results, no error."""
    attention, relevance, norm, entropy = anchor_stats(*draw(1, 2, 2, 0, 16, device=device), backend=backend)
    assert attention.shape == relevance.shape == (1, 1, 0) and norm.shape == (1, 0) and entropy.tolist() == [[1.0]]
    assert anchor_stats(*draw(0, 2, 2, 5, 16, device=device), backend=backend)[0].shape == (0, 1, 5)


@pytest.mark.parametrize("relevance", [Relevance.NONE, Relevance.COSINE, Relevance.SOFTMAX], ids=lambda x: x.name)
def test_opcheck(relevance):
    query, key, value, anchor = draw(2, 4, 2, 9, 16)
    opcheck(
        torch.ops.flowcut_kernels.anchor_stats.default,
        (query, key, value, anchor if relevance else None, torch.tensor([[0, 9], [1, 7]])),
        dict(scale=0.25, protect=1, relevance=int(relevance), value_norm=int(ValueNorm.FULL)),
    )


def test_compiles_without_graph_break_or_recompile():
    """fullgraph, dynamic batch and tokens: two sizes, one compilation."""
    counter = CompileCounter()
    compiled = torch.compile(lambda *x: anchor_stats(*x, protect=1), backend=counter, fullgraph=True, dynamic=True)
    for batch, tokens in ((3, 11), (5, 19)):
        inputs = draw(batch, 4, 2, tokens, 16, device=DEVICE)
        for a, b in zip(compiled(*inputs), anchor_stats(*inputs, protect=1), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(query=torch.zeros(2, 3, 1, 8)), "query"),
        (dict(key=torch.zeros(2, 2, 5, 8).half()), "is torch.float16|is torch.float32"),
        (dict(value=torch.zeros(2, 2, 4, 8)), "value"),
        (dict(value_anchor=None), "value_anchor"),
        (dict(key_span=torch.zeros(3, 2, dtype=torch.int32)), "key_span"),
        (dict(key_span=torch.zeros(2, 2)), "key_span"),
        (dict(protect=6), "protect=6"),
        (dict(relevance=5), "relevance=5"),
        (dict(value_norm=7), "value_norm=7"),
        (dict(key=torch.zeros(2, 2, 8, 5).transpose(2, 3)), "contiguous last dimension"),
        (dict(query=torch.zeros(2, 4, 8)), "query"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else None,
)
def test_bad_input(change, message):
    arguments = dict(
        query=torch.zeros(2, 4, 1, 8),
        key=torch.zeros(2, 2, 5, 8),
        value=torch.zeros(2, 2, 5, 8),
        value_anchor=torch.zeros(2, 2, 1, 8),
    )
    with pytest.raises(ValueError, match=message):
        anchor_stats(**(arguments | change))
