"""Opponents in the tables of encoder and prefill: all of them, and one that does not fit costs no other figure."""

from __future__ import annotations

import pytest
import torch

from flowcut_kernels.bench import encoder, prefill
from flowcut_kernels.bench.cases import Anchor
from flowcut_kernels.bench.shapes import real
from flowcut_kernels.bench.tables import DASH, views


def cells(section, title: str) -> dict[str, str]:
    """A row of the table of that name, by heading."""
    (view,) = (view for view in views(section) if title in (view.title or ""))
    return {column.header: column.show(section.rows[0]) for column in view.columns}


@pytest.mark.parametrize("fits", [True, False])
def test_prefill(fits, monkeypatch):
    made = prefill.runs_of

    def runs_of(model, *given):
        if not fits and model.config._attn_implementation == "eager":
            raise torch.OutOfMemoryError("no room for N x N maps")
        return made(model, *given)

    monkeypatch.setattr(prefill, "runs_of", runs_of)
    shape = real("llava-1.5-7b", toy=True)
    section = prefill.measure(shape=shape, batches=(2,), steps=1, repeats=1, baselines=True)
    assert not section.failed and all(row["ok"] for row in section.rows)
    assert all(row["torch_ratio"] > 0 and row["of_limit"] > 0 and row["first_seconds"] > 0 for row in section.rows)
    shown = cells(section, "Against eager")
    assert (shown["stock, eager : stock"] != DASH) == fits and shown["torch FlowCut : stock"] != DASH
    assert ("stock on eager attention, B=2: out of memory" in section.notes) == (not fits)


def test_encoder():
    shape = dict(image_size=112, hidden_size=64, intermediate_size=128, num_attention_heads=1)
    section = encoder.measure(dtypes=(torch.float32,), batches=(2,), tokens=(8,), layers=6, repeats=1, shape=shape)
    assert not section.failed
    shown = cells(section, "share of the stock tower on SDPA")
    assert {"stock, eager", "torch FlowCut", "torch FlowCut, eager", "limit"} < {*shown}
    assert DASH not in shown.values()


def test_refcheck_of_a_softmax_of_large_logits():
    """It demands of a relevance no more than correctly rounded logits give, and not much less."""
    case = Anchor(1, 2305, "softmax", torch.float32, torch.device("cpu"), "reference")
    wide = case.value.double()
    logits = (wide[:, :, :1] @ wide.mT)[:, :, 0]
    exact, rounded = (x.softmax(-1).mean(1)[:, 1:] for x in (logits, logits.float().double()))
    error = ((rounded - exact).abs().max() / exact.max()).item()
    assert error <= case._rounded_logits() <= 5 * error
