"""Policies that look at no token."""

from __future__ import annotations

import pytest
import torch

import flowcut_kernels as fk
from flowcut_kernels._ops import Select
from flowcut_kernels.policies.base import EncoderStep, EncoderView

STEP = EncoderStep(Select.FIXED, 3, static=True)


def view(budgets: torch.Tensor | None) -> EncoderView:
    """Two tiles of 3 x 3 tokens behind a class token."""
    heads = torch.zeros(2, 1, 10, 4)
    return EncoderView(
        key=heads, value=heads, query=None, anchor=pytest.fail, protect=1, lengths=None, history=None, grid=(3, 3),
        pixels=None, backend=None, budgets=budgets,
    )  # fmt: skip


@pytest.mark.parametrize("policy", [fk.UniformTokens(3), fk.RandomTokens(3)], ids=str)
def test_tiles_with_budgets_of_their_own_are_chosen_from_once(policy):
    """Each as if alone, and from the second pass on the choice is looked up."""
    both, (first, other) = policy.encoder_select(STEP, view(None)).index, torch.tensor([3, 2]).int()
    with torch.inference_mode():
        found, again = (policy.encoder_select(STEP, view(torch.stack([first, other]))) for _ in range(2))
    assert not found.index.is_inference(), "training may come next"
    assert found.lengths.tolist() == [4, 3] and again.index is found.index and again.lengths is found.lengths
    fewer = policy.encoder_select(STEP._replace(budget=2), view(None)).index
    assert found.index.tolist() == [both[0].tolist(), [*fewer[1].tolist(), -1]]
