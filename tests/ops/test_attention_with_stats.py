"""`attention_with_stats`: every backend against the reference in fp64, and that against softmax written out."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

from flowcut_kernels import _library
from flowcut_kernels._ops import Relevance, ValueNorm
from flowcut_kernels.ops import anchor_stats, attention_with_stats
from flowcut_kernels.testing import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("output", "attention", "relevance", "value_norm", "entropy")
backends = pytest.mark.parametrize("backend", ["reference", "triton"], indirect=True)


def draw(batch, q_heads, kv_heads, queries, tokens, dim, dtype=torch.float32, device="cpu", images=None, fused=False):
    """q, k, v as views of [B, N, heads * D] (or of one QKV product), and the anchors of `images` images."""
    images = batch if images is None else images
    heads = (q_heads, kv_heads, kv_heads)
    if fused:
        whole = torch.randn(batch, tokens, sum(heads) * dim, dtype=torch.float64).to(device, dtype)
        parts = whole.split([n * dim for n in heads], -1)
        parts = (parts[0][:, :queries], *parts[1:])
    else:
        rows = (queries, tokens, tokens)
        parts = [
            torch.randn(batch, m, n * dim, dtype=torch.float64).to(device, dtype)
            for n, m in zip(heads, rows, strict=True)
        ]
    views = [x.unflatten(-1, (-1, dim)).transpose(1, 2) for x in parts]
    anchors = [torch.randn(images, n, 1, dim, dtype=torch.float64).to(device, dtype) for n in heads[:2]]
    return *views, *anchors


def check(inputs, backend, **options):
    """All five results within the error budget of the reference in the inputs' precision."""
    exact = attention_with_stats(*(x.double() for x in inputs), backend="reference", **options)
    low = attention_with_stats(*inputs, backend="reference", **options)
    actual = attention_with_stats(*inputs, backend=backend, **options)
    for name, a, b, e in zip(NAMES, actual, low, exact, strict=True):
        assert a.dtype == (inputs[0].dtype if name == "output" else torch.float32) and a.is_contiguous()
        # Triton's interpreter cuts bf16 numbers off where a GPU rounds them: twice the error.
        cuts = backend == "triton" and a.device.type == "cpu" and a.dtype == torch.bfloat16
        assert_within_budget(a, b, e, factor=4.0 if cuts else 2.0, name=name)
    return actual


def packing(*lengths, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


@backends
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        *((dim, torch.bfloat16) for dim in (16, 64, 72, 80, 88, 96, 128)),
        *((dim, torch.float32) for dim in (64, 72, 128)),
        (72, torch.float16),
    ],
    ids=str,
)
def test_head_dims_and_dtypes(backend, device, dim, dtype):
    check(draw(1, 2, 1, 35, 35, dim, dtype, device), backend, protect=1)


@backends
@pytest.mark.parametrize(
    ("queries", "tokens", "fused"), [(1, 1, False), (3, 70, True), (70, 17, False), (65, 65, True), (0, 5, False)]
)
def test_sizes_and_layouts(backend, device, queries, tokens, fused):
    """Kept queries only, one token, more than one tile of queries and of keys, views of one QKV product."""
    check(draw(2, 2, 2, queries, tokens, 24, device=device, fused=fused), backend)


@backends
@pytest.mark.parametrize(
    ("relevance", "value_norm"), [(Relevance.SOFTMAX, ValueNorm.HEAD_MEAN), (Relevance.NONE, ValueNorm.NONE)]
)
@pytest.mark.parametrize("scale", [None, -0.3, 0.0])
def test_options(backend, device, relevance, value_norm, scale):
    check(
        draw(2, 4, 2, 9, 21, 32, device=device), backend, relevance=relevance, value_norm=value_norm, scale=scale
    )  # fmt: skip


@backends
def test_spans_ignore_dead_keys(backend, device):
    """Keys outside the span hold NaN and Inf; length-1, empty and shifted spans; an empty span's output is 0."""
    inputs = draw(4, 2, 2, 5, 37, 16, device=device)
    spans = torch.tensor([[0, 37], [0, 1], [5, 5], [3, 36]], device=device)
    clean = check(inputs, backend, key_span=spans, protect=1)
    assert (clean[0][2] == 0).all()
    poisoned = [x.clone(memory_format=torch.preserve_format) for x in inputs]
    for b, (start, end) in enumerate(spans.tolist()):
        for x in poisoned[1:3]:
            x[b, :, :start], x[b, :, end:] = float("nan"), float("inf")
    for a, b in zip(attention_with_stats(*poisoned, key_span=spans, protect=1, backend=backend), clean, strict=True):
        assert torch.equal(a, b)


@backends
@pytest.mark.parametrize("lengths", [(7, 1, 22), (16, 0, 16), (33,)], ids=str)
def test_packed(backend, device, lengths):
    """Each segment is what it would be alone; statistics begin at its first token and are 0 after its last."""
    total, longest = sum(lengths), max(lengths)
    query, key, value, *anchors = draw(1, 4, 2, total, total, 24, device=device, images=len(lengths), fused=True)
    cu_seqlens = packing(*lengths, device=device)
    packed = check((query, key, value, *anchors), backend, cu_seqlens=cu_seqlens, max_seqlen=longest, protect=0)
    for s, (start, length) in enumerate(zip(cu_seqlens[:-1].tolist(), lengths, strict=True)):
        rows = slice(start, start + length)
        alone = attention_with_stats(
            query[:, :, rows], key[:, :, rows], value[:, :, rows], *(x[s : s + 1] for x in anchors), backend=backend
        )
        for name, p, a in zip(NAMES, packed, alone, strict=True):
            p = p[:, rows] if name == "output" else p[s : s + 1]
            if name in NAMES[1:4]:
                assert (p[..., length:] == 0).all()
                p = p[..., :length]
            torch.testing.assert_close(p, a, rtol=1e-5, atol=1e-6, msg=name)


@backends
@pytest.mark.parametrize("packed", [False, True])
def test_without_statistics(backend, device, packed):
    query, key, value, *anchors = draw(1, 2, 2, 20, 20, 64, device=device, images=3 if packed else 1)
    options = dict(cu_seqlens=packing(7, 1, 12, device=device), max_seqlen=12) if packed else {}
    output, *statistics = attention_with_stats(query, key, value, backend=backend, **options)
    expected = attention_with_stats(query, key, value, *anchors, backend=backend, **options)[0]
    assert torch.equal(output, expected)
    assert all(x.numel() == 0 for x in statistics) and statistics[0].dim() == 3


@pytest.mark.parametrize("spans", [None, [[0, 9], [2, 7]]])
def test_reference_is_softmax_written_out(spans):
    query, key, value, *anchors = (x.double() for x in draw(2, 4, 2, 5, 9, 16))
    span = None if spans is None else torch.tensor(spans)
    results = attention_with_stats(query, key, value, *anchors, key_span=span, protect=1, backend="reference")
    for b in range(2):
        start, end = (0, 9) if spans is None else spans[b]
        for h in range(4):
            logits = query[b, h] @ key[b, h // 2, start:end].T / 4
            weight = logits.exp() / logits.exp().sum(1, keepdim=True)
            torch.testing.assert_close(results[0][b, :, h], weight @ value[b, h // 2, start:end])
    for a, b in zip(
        results[1:], anchor_stats(anchors[0], key, value, anchors[1], key_span=span, protect=1), strict=True
    ):
        torch.testing.assert_close(a, b)


@backends
def test_repeats_bit_for_bit_and_writes_everything(backend, device, monkeypatch):
    """NaN in everything that `empty` hands out: nothing of it is left, nothing of it is read. Counters end at 0."""
    inputs = draw(2, 2, 2, 19, 37, 40, device=device)
    first = attention_with_stats(*inputs, protect=1, backend=backend)

    new_empty, counters = torch.Tensor.new_empty, []

    def poisoned(self, *size, **options):
        x = new_empty(self, *size, **options)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    def counted(count, device):
        counters.append(torch.zeros(count, dtype=torch.int32, device=device))
        return counters[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    if backend == "triton":
        monkeypatch.setattr(import_module("flowcut_kernels.ops.anchor_stats.triton"), "arrival_counters", counted)
    for a, b in zip(attention_with_stats(*inputs, protect=1, backend=backend), first, strict=True):
        assert torch.equal(a, b)
    assert len(counters) == (backend == "triton") and not any(x.any() for x in counters)


@backends
def test_autograd_runs_the_reference(backend, device):
    """Finite gradients of the packed form's output, an empty segment included, on every backend."""
    inputs = [x.requires_grad_() for x in draw(1, 2, 1, 6, 6, 8, device=device, images=3)]
    options = dict(cu_seqlens=packing(4, 0, 2, device=device), max_seqlen=4)
    results = []
    for choice in (backend, "reference"):
        output, attention, *_ = attention_with_stats(*inputs, **options, backend=choice)
        results.append(torch.autograd.grad(output.square().sum() + attention.square().sum(), inputs[:4]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.isfinite().all() and a.any()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("statistics", [False, True])
def test_opcheck(packed, statistics):
    query, key, value, *anchors = draw(1, 4, 2, 9, 9, 16, images=2 if packed else 1)
    opcheck(
        torch.ops.flowcut_kernels.attention_with_stats.default,
        (
            query, key, value, *(anchors if statistics else (None, None)),
            None if packed else torch.tensor([[1, 7]]), packing(4, 5) if packed else None,
        ),
        dict(
            max_seqlen=5 if packed else None, scale=0.25, protect=0,
            relevance=int(Relevance.COSINE) * statistics, value_norm=int(ValueNorm.FULL) * statistics,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_graph_break_or_recompile(packed):
    """fullgraph, dynamic tokens: two sizes, one compilation."""
    counter = CompileCounter()

    def run(*inputs, cu_seqlens=None):
        longest = None if cu_seqlens is None else inputs[0].shape[2] - 1
        return attention_with_stats(*inputs, cu_seqlens=cu_seqlens, max_seqlen=longest)

    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (11, 19):
        inputs = draw(
            1 if packed else tokens - 8, 4, 2, tokens, tokens, 16, device=DEVICE, images=2 if packed else None
        )
        options = dict(cu_seqlens=packing(2, tokens - 2, device=DEVICE)) if packed else {}
        for a, b in zip(compiled(*inputs, **options), run(*inputs, **options), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(query=torch.zeros(2, 3, 5, 8)), "query"),
        (dict(query=torch.zeros(2, 4, 8)), "query must be"),
        (dict(query=torch.zeros(2, 4, 8, 5).transpose(2, 3)), "query needs a contiguous last dimension"),
        (dict(key=torch.zeros(2, 2, 5, 8).half()), "is torch.float16|is torch.float32"),
        (dict(value=torch.zeros(2, 2, 4, 8)), "value"),
        (dict(value_anchor=None), "value_anchor is None"),
        (dict(query_anchor=torch.zeros(2, 4, 2, 8)), r"query_anchor must be \(2, 4, 1, 8\)"),
        (dict(value_anchor=torch.zeros(2, 2, 1, 7)), r"value_anchor must be \(2, 2, 1, 8\)"),
        (dict(key_span=torch.zeros(2, 2)), "key_span must be integer"),
        (dict(protect=6), "protect=6"),
        (dict(relevance=5), "relevance=5"),
        (dict(value_norm=7), "value_norm=7"),
        (dict(max_seqlen=5), "max_seqlen=5 belongs to the packed form"),
        (dict(cu_seqlens=packing(5), max_seqlen=5), "cu_seqlens needs batch 1"),
        (dict(cu_seqlens=torch.zeros(2), max_seqlen=5), "cu_seqlens must be integer"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else None,
)
def test_bad_input(change, message):
    arguments = dict(
        query=torch.zeros(2, 4, 5, 8),
        key=torch.zeros(2, 2, 5, 8),
        value=torch.zeros(2, 2, 5, 8),
        query_anchor=torch.zeros(2, 4, 1, 8),
        value_anchor=torch.zeros(2, 2, 1, 8),
    )
    with pytest.raises(ValueError, match=message):
        attention_with_stats(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(max_seqlen=None), "max_seqlen=None"),
        (dict(max_seqlen=6), "max_seqlen=6"),
        (dict(key_span=torch.tensor([[0, 5]])), "exclude each other"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else None,
)
def test_bad_packing(change, message):
    options = dict(cu_seqlens=packing(2, 3), max_seqlen=3)
    with pytest.raises(ValueError, match=message):
        attention_with_stats(*torch.zeros(3, 1, 2, 5, 8), **(options | change))


@pytest.mark.parametrize(("backend", "dim"), [("cpp", 8), ("triton", 136), ("cuda", 8)])
def test_an_explicit_backend_never_falls_back(backend, dim):
    if backend == "triton" and _library.triton_error():
        pytest.skip(_library.triton_error())
    with pytest.raises(RuntimeError, match=f"backend='{backend}' was asked for attention_with_stats"):
        attention_with_stats(*torch.zeros(3, 1, 2, 5, dim), backend=backend)
