"""What attention knows of its rows goes to a policy that wants it: SDPA's own kernel, its bits, its log-sum-exp."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import flowcut_kernels as fk
from flowcut_kernels.modules import encoder
from flowcut_kernels.ops import received_attention
from flowcut_kernels.policies import vflowopt

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def attend(query, key, value, attention: str = "sdpa", training: bool = False, scale: float = 0.3):
    """Of a layer with such a module."""
    module = SimpleNamespace(config=SimpleNamespace(_attn_implementation=attention), training=training)
    return encoder.sdpa_with_lse(module, scale, query, key, value)


def heads(batch: int, tokens: int, dim: int, dtype: torch.dtype = torch.float32) -> list:
    return [torch.randn(batch, tokens, 4, dim).to(DEVICE, dtype).transpose(1, 2) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "dim"), [(1, 16), (65, 64), (577, 72), (729, 80)])
def test_bits_of_sdpa_and_log_sum_exp(tokens, dim, dtype):
    query, key, value = heads(2, tokens, dim, dtype)
    output, lse = attend(query, key, value)
    assert torch.equal(output, scaled_dot_product_attention(query, key, value, scale=0.3).transpose(1, 2))
    assert output.is_contiguous() and lse.dtype == torch.float32
    assert_close(lse, (0.3 * query.double() @ key.double().mT).logsumexp(-1).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
def test_every_kernel_of_a_gpu(kernel, monkeypatch):
    """As torch says, without a GPU, what shapes they leave."""
    chosen, private = SDPBackend.__members__[kernel].value, encoder._private
    monkeypatch.setattr(
        encoder, "_private", lambda name, *a: (lambda *_, **__: chosen) if "choice" in name else private(name, *a)
    )
    with FakeTensorMode():
        query, key, value = torch.empty(3, 2, 729, 4, 72, dtype=torch.bfloat16, device="cuda").transpose(2, 3)
        output, lse = attend(query, key, value)
        assert output.shape == (2, 729, 4, 72) and output.is_contiguous()
        assert lse.shape == (2, 4, 729) and lse.dtype == torch.float32
        assert attend(*(x.narrow(3, 0, 70) for x in (query, key, value))) is None


def test_another_attention_leaves_none(monkeypatch):
    given = heads(1, 9, 16)
    assert attend(*given, "eager") is None
    assert attend(*given, training=True) is None
    with sdpa_kernel(SDPBackend.MATH):
        assert attend(*given) is None
    with torch.autocast(DEVICE, torch.bfloat16):
        assert attend(*given) is None
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", lambda *_, **__: None)
    assert attend(*given) is None


KERNEL = "_scaled_dot_product_flash_attention_for_cpu"
KNOWN = {name: getattr(torch.ops.aten, name) for name in ("_fused_sdp_choice", KERNEL)}


@pytest.fixture
def another_torch(monkeypatch):
    """`torch.ops.aten` with other operators, which nobody has looked up yet."""

    def pretend(**operators) -> None:
        there = {name: x for name, x in (KNOWN | operators).items() if x is not None}
        encoder._private.cache_clear()
        monkeypatch.setattr(torch, "ops", SimpleNamespace(aten=SimpleNamespace(**there)))

    yield pretend
    encoder._private.cache_clear()


def changed(arguments: str, results: str) -> SimpleNamespace:
    schema = torch._C.parse_schema(f"aten::x({arguments}) -> ({results})")
    return SimpleNamespace(default=SimpleNamespace(_schema=schema))


HEADS = "Tensor query, Tensor key, Tensor value"


@pytest.mark.skipif(DEVICE != "cpu", reason="kernels of a CPU")
@pytest.mark.parametrize(
    "operators",
    [
        {KERNEL: None},
        dict(_fused_sdp_choice=None),
        {KERNEL: changed(f"{HEADS}, Tensor? sinks, *, float? scale=None", "Tensor output, Tensor logsumexp")},
        {KERNEL: changed(HEADS, "Tensor output, Tensor logsumexp")},
        {KERNEL: changed(f"{HEADS}, *, float? scale=None", "Tensor output, Tensor rng_state, Tensor logsumexp")},
        dict(_fused_sdp_choice=changed("Tensor heads", "int")),
    ],
    ids=["no kernel", "no choice", "one more argument", "no scale", "other results", "another choice"],
)
def test_a_torch_with_other_private_operators(operators, another_torch):
    """Leaves none, which is found out once."""
    given = heads(1, 9, 16)
    another_torch(**operators)
    assert attend(*given) is None
    looked = encoder._private.cache_info().misses
    assert attend(*given) is None and encoder._private.cache_info().misses == looked
    another_torch()
    assert attend(*given) is not None


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_importance_is_made_with_it(tower, monkeypatch):
    """And without it is the same."""
    model, pixels, seen, scores = tiny.llava(tower), tiny.images(3), [], []

    def received(query, key, *, lse, **options):
        seen.append(lse is not None)
        return received_attention(query, key, lse=lse, **options)

    monkeypatch.setattr(vflowopt, "received_attention", received)
    for leaves in (True, False):
        if not leaves:
            monkeypatch.setattr(encoder, "sdpa_with_lse", lambda *_: None)
        with fk.patched(model, fk.VFlowOpt(9, hub_threshold=1.6), record=True):
            model.get_image_features(pixels)
            scores.append(fk.trace(model).stages[0].scores)
    assert seen == [True, False]
    assert_close(*scores, rtol=1e-5, atol=1e-7)
