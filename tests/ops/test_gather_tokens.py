"""`gather_tokens`: rows of several tensors at once, with and without the fused norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.library import opcheck

from flowcut_kernels.ops import gather_tokens
from flowcut_kernels.testing import assert_within_budget


def draw_index(batch, tokens, kept, device):
    """Ascending rows, -1 after the last of a shorter row."""
    rows = []
    for b in range(batch):
        live = kept - min(b, kept)
        rows.append(torch.cat([torch.randperm(tokens)[:live].sort().values, torch.full((kept - live,), -1)]))
    return torch.stack(rows).to(device)


def draw_inputs(batch, tokens, width, dtype, device):
    hidden = torch.randn(batch, tokens, width, device=device).to(dtype)
    return [
        hidden,
        torch.randn(batch, 2 * tokens, 3, 5, device=device)[:, ::2],  # strided tokens
        torch.randn(batch, tokens, device=device),
        torch.arange(batch * tokens, device=device).view(batch, tokens),
        torch.rand(batch, tokens, 7, device=device) > 0.5,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "kept", "width"), [(1, 1, 8), (17, 5, 33), (40, 40, 64), (9, 0, 16)])
def test_rows(backend, device, tokens, kept, width, dtype):
    inputs, index = draw_inputs(3, tokens, width, dtype, device), draw_index(3, tokens, kept, device)
    outputs = gather_tokens(inputs, index, backend=backend)
    assert len(outputs) == len(inputs)
    for x, y in zip(inputs, outputs, strict=True):
        assert y.dtype == x.dtype and y.shape == (3, kept, *x.shape[2:])
        for b in range(3):
            for m, i in enumerate(index[b].tolist()):
                assert torch.equal(y[b, m], x[b, i] if i >= 0 else torch.zeros_like(y[b, m]))


@pytest.mark.parametrize("width", [1024, 1021])
def test_rows_beyond_the_cache(width):
    """Large outputs are written past the cache; the index is a slice, as a ragged batch's is."""
    hidden, norm = torch.randn(2, 2, 1500, width).unbind()
    index = draw_index(2, 1500, 1400, "cpu")[:, :1300]
    found = gather_tokens([hidden, norm], index)
    for x, y in zip((hidden, norm), found, strict=True):
        assert torch.equal(y, x.gather(1, index[..., None].expand(-1, -1, width)))


@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [8, 100, 1024])
def test_norm(backend, device, width, dtype, rms):
    hidden = (3 * torch.randn(2, 13, width, device=device) + 1).to(dtype)
    weight, bias = torch.randn(2, width, device=device).to(dtype)
    index = draw_index(2, 13, 6, device)
    arguments = (weight, None if rms else bias)
    _, normed = gather_tokens([hidden], index, *arguments, eps=1e-6, rms=rms, backend=backend)
    low = gather_tokens([hidden], index, *arguments, eps=1e-6, rms=rms, backend="reference")[1]
    exact = gather_tokens(
        [hidden.double()], index, *(None if x is None else x.double() for x in arguments), eps=1e-6, rms=rms
    )[1]
    assert normed.dtype == dtype and (normed[index < 0] == 0).all()
    # One rounding to the output's precision may fall the other way.
    ulp = torch.finfo(dtype).eps * exact.abs().max()
    assert_within_budget(normed, low.double() + ulp, exact, name="norm")


def test_norm_is_the_modules(device):
    """The same numbers as torch's LayerNorm after a plain gather."""
    norm, hidden = nn.LayerNorm(48, eps=1e-5).to(device), torch.randn(2, 9, 48, device=device)
    index = draw_index(2, 9, 4, device)
    with torch.no_grad():
        _, normed = gather_tokens([hidden], index, norm.weight, norm.bias, eps=norm.eps)
        expected = norm(hidden.gather(1, index.clamp_min(0)[..., None].expand(-1, -1, 48)))
    torch.testing.assert_close(normed[index >= 0], expected[index >= 0])


def test_gradients_flow():
    hidden, weight = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True), torch.randn(6, dtype=torch.float64)
    index = draw_index(2, 7, 3, "cpu")
    assert torch.autograd.gradcheck(lambda x: tuple(gather_tokens([x], index, weight, eps=1e-6)), (hidden,))
    single = torch.randn(2, 7, 6, requires_grad=True)
    gather_tokens([single], index)[0].sum().backward()
    assert single.grad.sum() == 6 * (index >= 0).sum()


@pytest.mark.parametrize("norm", [False, True])
def test_opcheck(norm):
    inputs = [torch.randn(2, 9, 8), torch.arange(18).view(2, 9)]
    arguments = (torch.randn(8), torch.randn(8)) if norm else ()
    opcheck(torch.ops.flowcut_kernels.gather_tokens.default, (inputs, draw_index(2, 9, 4, "cpu"), *arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(inputs=[]), "inputs is empty"),
        (dict(index=torch.zeros(2, 3)), "index must be int64"),
        (dict(index=torch.zeros(3, 3, dtype=torch.int64)), r"inputs\[0\]"),
        (dict(inputs=[torch.zeros(2, 5, 8), torch.zeros(2, 6)]), r"inputs\[1\]"),
        (dict(norm_weight=torch.zeros(7)), "norm_weight"),
        (dict(norm_bias=torch.zeros(8)), "norm_bias"),
        (dict(norm_weight=torch.zeros(8), norm_bias=torch.zeros(8), rms=True), "norm_bias"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else None,
)
def test_bad_input(change, message):
    arguments = dict(inputs=[torch.zeros(2, 5, 8)], index=torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        gather_tokens(**(arguments | change))
