"""The native library as a whole: instruction sets, threads, memory, direct calls, build facts.

What the C++ operators compute is tested beside the other backends in ``test_<op>.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowcut_kernels import _library
from flowcut_kernels._ops import Relevance, Select, ValueNorm
from flowcut_kernels.ops import anchor_stats, gather_tokens, patch_entropy, recycle_tokens, score_select

pytestmark = pytest.mark.skipif(_library.native_error() is not None, reason=str(_library.native_error()))

OPS = torch.ops.flowcut_kernels
FACTS = Path(_library.__file__).with_name("_build_info.json")
HERE = Path(__file__).parent


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=os.environ | env, cwd=HERE.parents[1], capture_output=True, text=True)


# The library alone: the package would import transformers for seconds.
CHOSEN_ISA = """
import ctypes, glob, torch
[found] = glob.glob("flowcut_kernels/flowcut_kernels_native*.so")
library = torch.library.Library("flowcut_kernels", "DEF")
library.define("patch_entropy(Tensor pixels, *, int patch_size, float[] mean, float[] std) -> Tensor")
torch.ops.load_library(found)
torch.ops.flowcut_kernels.patch_entropy(torch.ones(1, 3, 2, 2), patch_size=2, mean=[0.0] * 3, std=[1.0] * 3)
isa = ctypes.CDLL(found).flowcut_cpu_isa
isa.restype = ctypes.c_char_p
print(isa().decode())
"""


@pytest.mark.parametrize("isa", ["avx512", "avx2", "scalar"])
def test_other_instruction_sets_pass_the_operator_tests(isa):
    chosen = python("-c", CHOSEN_ISA, FLOWCUT_CPU_ISA=isa)
    if "cannot be had" in chosen.stderr:
        pytest.skip(chosen.stderr.splitlines()[-1])
    assert chosen.stdout.strip() == isa, chosen.stderr
    if "FLOWCUT_CPU_ISA" not in os.environ and python("-c", CHOSEN_ISA).stdout == chosen.stdout:
        pytest.skip(f"{isa} is the best that this machine has: the other tests run on it")
    ops = ["attention", "received_attention"]
    if isa != "avx512":  # it and avx512_bf16 compile to the same but for these
        ops += ["anchor_stats", "score_select", "gather_tokens", "compact_kv", "compact_kv_paged"]
        ops += ["patch_entropy", "recycle_tokens"]
    files = [str(HERE / f"test_{op}.py") for op in ops]
    wanted = "cpp and not compile and not opcheck and not memory"
    run = python("-m", "pytest", "-q", "-k", wanted, *files, FLOWCUT_CPU_ISA=isa)
    assert run.returncode == 0, run.stdout[-4000:]
    assert "[100%]" in run.stdout


REFCHECKS = """
import torch
from flowcut_kernels.bench.cases import Anchor, budgeted, projected
from flowcut_kernels.ops import anchor_stats

check = Anchor(1, 2305, "softmax", torch.float32, torch.device("cpu"), "cpp").check()
assert check.ok, check.detail

value = projected(8, 2305, torch.float32, torch.device("cpu"), 2)
norm = anchor_stats(value[:, :, :1], value, value, None, relevance=0, value_norm=1, backend="cpp")[2]
sums = value.transpose(1, 2).flatten(2).abs()
check = budgeted([norm], [sums.sum(-1)], [sums.double().sum(-1)])
assert check.ok, check.detail
"""


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "scalar"])
def test_every_instruction_set_passes_the_refchecks(isa):
    """Where the order of a sum shows: a softmax of large logits, sums of 1,024 values."""
    chosen = python("-c", CHOSEN_ISA, FLOWCUT_CPU_ISA=isa)
    if "cannot be had" in chosen.stderr:
        pytest.skip(chosen.stderr.splitlines()[-1])
    run = python("-c", REFCHECKS, FLOWCUT_CPU_ISA=isa)
    assert run.returncode == 0, run.stderr


def test_an_instruction_set_that_cannot_be_had_is_an_error():
    run = python("-c", CHOSEN_ISA, FLOWCUT_CPU_ISA="neon")
    assert "FLOWCUT_CPU_ISA=neon cannot be had: this machine offers" in run.stderr


def draw(tokens, dim, dtype, pad=0, heads=4, batch=2):
    """q, k, v, v_anchor; K and V as views into one buffer whose unused columns hold NaN."""
    fused = torch.full((batch, tokens, heads, 2 * (dim + pad)), float("nan"), dtype=dtype)
    key, value = (fused[..., i * (dim + pad) :][..., :dim] for i in range(2))
    key.copy_(torch.randn(key.shape))
    value.copy_(torch.randn(value.shape))
    query, anchor = torch.randn(2, batch, heads, 1, dim).to(dtype)
    return query, key.transpose(1, 2), value.transpose(1, 2), anchor


@pytest.mark.parametrize("relevance", [Relevance.COSINE, Relevance.SOFTMAX], ids=lambda x: x.name)
# The second size is walked row by row, as data that does not fit the caches is.
@pytest.mark.parametrize(("tokens", "heads"), [(333, 4), (9001, 12)])
def test_thread_count_changes_no_bit(tokens, heads, relevance):
    inputs = draw(tokens, 64, torch.bfloat16, heads=heads)
    hidden, before = torch.randn(2, tokens, 96), torch.get_num_threads()
    cell, pixels = torch.randint(-1, 9, (tokens,)), torch.rand(3, 3, 200, tokens)

    def everything(threads):
        torch.set_num_threads(threads)
        stats = anchor_stats(*inputs, protect=1, relevance=relevance, backend="cpp")
        attention, relevant, norm, entropy = stats
        score, index, lengths = score_select(
            attention[:, 0], relevant[:, 0], norm, entropy=entropy[:, 0], protect=1, mode=Select.ADAPTIVE, budget=9,
            divisor=1.5, backend="cpp",
        )  # fmt: skip
        rows = gather_tokens([hidden, score], index, torch.ones(96), backend="cpp")
        merged = recycle_tokens(hidden[0], score[0], cell, cells=9, backend="cpp")
        return [*stats, score, index, lengths, *rows, *merged, patch_entropy(pixels, 8, backend="cpp")]

    try:
        one, two, three = (everything(n) for n in (1, 2, 3))
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(one, two, three, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("value_norm", [ValueNorm.FULL, ValueNorm.HEAD_MEAN], ids=lambda x: x.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_tokens_place_changes_no_bit_of_its_own_statistics(dtype, value_norm):
    """Equal tokens tie exactly, wherever they lie in a block, a vector or the remainder of one."""
    query, key, value, anchor = draw(77, 72, dtype)
    order = torch.randperm(77)
    options = dict(relevance=Relevance.COSINE, value_norm=value_norm, backend="cpp")
    _, relevance, norm, _ = anchor_stats(query, key, value, anchor, **options)
    shuffled = anchor_stats(query, key[:, :, order], value[:, :, order], anchor, **options)
    assert torch.equal(shuffled[1], relevance[..., order])
    assert torch.equal(shuffled[2], norm[:, order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [5, 24, 72, 88, 100])
def test_nothing_beside_a_row_is_read(dim, dtype):
    """NaN between the rows of K and V, where a load that is too wide would find them."""
    inputs = draw(45, dim, dtype, pad=3)
    dense = tuple(x.clone(memory_format=torch.contiguous_format) for x in inputs)
    for relevance, value_norm in ((Relevance.COSINE, ValueNorm.FULL), (Relevance.SOFTMAX, ValueNorm.HEAD_MEAN)):
        options = dict(relevance=relevance, value_norm=value_norm, backend="cpp")
        for a, b in zip(anchor_stats(*inputs, **options), anchor_stats(*dense, **options), strict=True):
            assert not a.isnan().any()
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


MEMORY = """
import resource, torch
from flowcut_kernels.ops import anchor_stats
qkv = torch.ones(1, 16384, 3 * 1024)
query, key, value = (x.unflatten(-1, (16, 64)).transpose(1, 2) for x in qkv.chunk(3, -1))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
anchor_stats(query[:, :, :1], key[:, :, :64], value[:, :, :64], value[:, :, :1], backend="cpp")  # threads start
before = peak()
anchor_stats(query[:, :, :1], key, value, value[:, :, :1], backend="cpp")
print(peak() - before)
"""


def test_keys_and_values_are_read_in_place():
    run = python("-c", MEMORY)
    assert run.returncode == 0, run.stderr
    kib = int(run.stdout)
    assert kib < 8 * 1024, f"{kib} KiB on top of K and V of 64 MiB each"


def _anchor_stats(query, key, value, anchor, span=None):
    return OPS.anchor_stats(query, key, value, anchor, span, scale=1.0, protect=0, relevance=1, value_norm=1)


def _score_select(*criteria, weights=(1.0, 1.0, 1.0), mode=3, budget=1, divisor=0.0, protect=0):
    options = dict(criteria_weights=weights, history_weight=0.5, entropy_exponent=2.0)
    options |= dict(protect=protect, mode=mode, budget=budget, divisor=divisor)
    return OPS.score_select(*criteria, *[None] * (6 - len(criteria)), **options)


def _patch_entropy(pixels, size=2, mean=(), std=()):
    return OPS.patch_entropy(pixels, patch_size=size, mean=mean, std=std)


def _recycle_tokens(*inputs, cells=3):
    return OPS.recycle_tokens(*inputs, cells=cells)


def _attention(query, key, value, span=None):
    return OPS.attention(query, key, value, span, scale=1.0)


def _received_attention(query, key, lse=None, lengths=None):
    return OPS.received_attention(query, key, lse, lengths, scale=1.0)


K = torch.ones(1, 2, 3, 4)
Q = torch.ones(1, 2, 1, 4)
S = torch.ones(2, 5)
X = torch.ones(2, 5, 4)
I = torch.zeros(2, 3, dtype=torch.int64)  # noqa: E741
P = torch.ones(1, 3, 4, 4)
F, C = torch.ones(5), torch.zeros(5, dtype=torch.int64)

DIRECT_CALLS = {
    "fp64 key": (
        lambda: _anchor_stats(Q.double(), K.double(), K.double(), Q.double()),
        "float32, bfloat16 and float16",
    ),
    "heads": (lambda: _anchor_stats(torch.ones(1, 3, 1, 4), K, K, Q), "must be a multiple of key's 2"),
    "query dim": (lambda: _anchor_stats(torch.ones(1, 2, 1, 5), K, K, Q), r"query must be \[1, 2, 1, 4\], got"),
    "value tokens": (lambda: _anchor_stats(Q, K, K[:, :, :2], Q), r"value must be \[1, 2, 3, 4\]"),
    "value dtype": (lambda: _anchor_stats(Q, K, K.half(), Q), "of one dtype"),
    "strided dim": (lambda: _anchor_stats(Q, torch.ones(1, 2, 3, 8)[..., ::2], K, Q), "contiguous last dimension"),
    "no value_anchor": (lambda: _anchor_stats(Q, K, K, None), "relevance needs value_anchor"),
    "span shape": (lambda: _anchor_stats(Q, K, K, Q, torch.zeros(2, 2, dtype=torch.int32)), "key_span must be"),
    "span dtype": (lambda: _anchor_stats(Q, K, K, Q, torch.zeros(1, 2)), "key_span must be int32 or int64"),
    "criterion shape": (lambda: _score_select(S, S[:, :4]), r"relevance must be \[2, 5\], got \[2, 4\]"),
    "criterion dtype": (lambda: _score_select(S.double()), "float32 CPU tensors"),
    "no entropy": (lambda: _score_select(S, mode=1, divisor=1.0), "entropy is None"),
    "weights": (lambda: _score_select(S, weights=[1.0]), "criteria_weights must be 3 numbers, got 1"),
    "protect": (lambda: _score_select(S, protect=6), "protect=6"),
    "index beyond": (lambda: OPS.gather_tokens([X], I + 5), r"index\[0, 0\] = 5 must lie in -1..4"),
    "index below": (lambda: OPS.gather_tokens([X], I - 2), r"= -2 must lie in -1..4"),
    "rows": (lambda: OPS.gather_tokens([X, torch.ones(2, 5, 4, 3).mT], I), r"inputs\[1\] are not contiguous"),
    "tokens": (lambda: OPS.gather_tokens([X, S[:, :4]], I), r"inputs\[1\] must be a CPU tensor \[2, 5, ...\]"),
    "norm size": (lambda: OPS.gather_tokens([X], I, torch.ones(3)), r"norm_weight must be \[4\]"),
    "norm dtype": (lambda: OPS.gather_tokens([X], I, torch.ones(4).half()), "norm_weight must have the dtype"),
    "pixels": (lambda: _patch_entropy(K), r"\[batch, 1 or 3, height, width\], got \[1, 2, 3, 4\]"),
    "pixels int32": (lambda: _patch_entropy(P.int()), "float32, bfloat16 and float16"),
    "patch size": (lambda: _patch_entropy(P, 0), "patch_size=0"),
    "mean": (lambda: _patch_entropy(P, mean=[0.5] * 3, std=[0.5]), "mean and std must be of 3 values"),
    "tokens rank": (lambda: _recycle_tokens(K, F, C), r"tokens must be a CPU tensor \[tokens, dim\]"),
    "tokens fp64": (lambda: _recycle_tokens(S.T.double(), F, C), "float32, bfloat16 and float16"),
    "importance": (lambda: _recycle_tokens(S.T, F[:4], C), r"importance must be \[5\], got \[4\]"),
    "importance dtype": (lambda: _recycle_tokens(S.T, F.half(), C), "importance must be a float32"),
    "cell": (lambda: _recycle_tokens(S.T, F, C[1:]), r"cell must be \[5\], got \[4\]"),
    "cell dtype": (lambda: _recycle_tokens(S.T, F, C.int()), "cell must be an int64"),
    "cell beyond": (lambda: _recycle_tokens(S.T, F, C + 3), r"cell\[0\] = 3 must lie in -1..2"),
    "cell below": (lambda: _recycle_tokens(S.T, F, C - 2), r"cell\[0\] = -2 must lie in -1..2"),
    "cells": (lambda: _recycle_tokens(S.T, F, C, cells=-1), "cells=-1"),
    "attention fp64": (lambda: _attention(Q.double(), K.double(), K.double()), "float32, bfloat16 and float16"),
    "attention heads": (lambda: _attention(torch.ones(1, 3, 1, 4), K, K), "must be a multiple of key's 2"),
    "attention dim": (lambda: _attention(torch.ones(1, 2, 1, 5), K, K), r"query must be \[1, 2, 1, 4\], got"),
    "attention value": (lambda: _attention(Q, K, K[:, :, :2]), r"value must be \[1, 2, 3, 4\]"),
    "attention dtype": (lambda: _attention(Q.half(), K, K), "of one dtype"),
    "attention strides": (lambda: _attention(torch.ones(1, 2, 3, 8)[..., ::2], K, K), "contiguous last dimension"),
    "attention span": (lambda: _attention(Q, K, K, torch.zeros(2, 2, dtype=torch.int32)), "key_span must be"),
    "received fp64": (lambda: _received_attention(K.double(), K.double()), "float32, bfloat16 and float16"),
    "received heads": (lambda: _received_attention(torch.ones(1, 3, 3, 4), K), "must be a multiple of key's 2"),
    "received tokens": (lambda: _received_attention(Q, K), r"query must be \[1, 2, 3, 4\], got \[1, 2, 1, 4\]"),
    "received dtype": (lambda: _received_attention(K.half(), K), "of one dtype"),
    "received strides": (lambda: _received_attention(torch.ones(1, 2, 3, 8)[..., ::2], K), "contiguous last dimension"),
    "received lse": (lambda: _received_attention(K, K, K[..., 0].half()), "lse must be a float32 CPU tensor"),
    "received rows": (lambda: _received_attention(K, K, K[:, :1, :, 0]), r"lse must be \[1, 2, 3\], got \[1, 1, 3\]"),
    "received lengths": (lambda: _received_attention(K, K, None, I), r"lengths must be \[1\], got \[2, 3\]"),
}


@pytest.mark.parametrize(("call", "message"), DIRECT_CALLS.values(), ids=DIRECT_CALLS)
def test_a_direct_call_with_bad_arguments_is_an_error(call, message):
    """The dispatcher can be called around the Python checks: an error then, never a wild read."""
    with pytest.raises(RuntimeError, match=message):
        call()


def test_build_facts():
    facts = json.loads(FACTS.read_text())
    assert facts["torch_abi"] == "2.10"
    assert "scalar" in facts["cpu_isas"]
    assert {"compiler", "flags", "torch", "cuda_archs", "cuda_compiler"} <= facts.keys()
    assert str(Path.home()) not in FACTS.read_text()
