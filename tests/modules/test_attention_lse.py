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


def parts(attention: str = "sdpa", training: bool = False, scale: float = 0.3) -> SimpleNamespace:
    config = SimpleNamespace(_attn_implementation=attention)
    return SimpleNamespace(attention=SimpleNamespace(config=config, training=training, scale=scale))


def heads(batch: int, tokens: int, dim: int, dtype: torch.dtype = torch.float32) -> list:
    return [torch.randn(batch, tokens, 4, dim).to(DEVICE, dtype).transpose(1, 2) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "dim"), [(1, 16), (65, 64), (577, 72), (729, 80)])
def test_bits_of_sdpa_and_log_sum_exp(tokens, dim, dtype):
    query, key, value = heads(2, tokens, dim, dtype)
    output, lse = encoder._flash(parts(), query, key, value)
    assert torch.equal(output, scaled_dot_product_attention(query, key, value, scale=0.3).transpose(1, 2))
    assert output.is_contiguous() and lse.dtype == torch.float32
    assert_close(lse, (0.3 * query.double() @ key.double().mT).logsumexp(-1).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
def test_every_kernel_of_a_gpu(kernel, monkeypatch):
    """As torch says, without a GPU, what shapes they leave."""
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: SDPBackend.__members__[kernel].value)
    with FakeTensorMode():
        query, key, value = torch.empty(3, 2, 729, 4, 72, dtype=torch.bfloat16, device="cuda").transpose(2, 3)
        output, lse = encoder._flash(parts(), query, key, value)
        assert output.shape == (2, 729, 4, 72) and output.is_contiguous()
        assert lse.shape == (2, 4, 729) and lse.dtype == torch.float32
        assert encoder._flash(parts(), *(x.narrow(3, 0, 70) for x in (query, key, value))) is None


def test_another_attention_leaves_none(monkeypatch):
    given = heads(1, 9, 16)
    assert encoder._flash(parts("eager"), *given) is None
    assert encoder._flash(parts(training=True), *given) is None
    with sdpa_kernel(SDPBackend.MATH):
        assert encoder._flash(parts(), *given) is None
    with torch.autocast(DEVICE, torch.bfloat16):
        assert encoder._flash(parts(), *given) is None
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", lambda *_, **__: None)
    assert encoder._flash(parts(), *given) is None


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
            monkeypatch.setattr(encoder, "_flash", lambda *_: None)
        with fk.patched(model, fk.VFlowOpt(9, hub_threshold=1.6), record=True):
            model.get_image_features(pixels)
            scores.append(fk.trace(model).stages[0].scores)
    assert seen == [True, False]
    assert_close(*scores, rtol=1e-5, atol=1e-7)
