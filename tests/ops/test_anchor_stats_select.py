"""`anchor_stats_select`: statistics and selection of a layer, one launch on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch.library import opcheck

from flowcut_kernels._ops import Relevance, Select, ValueNorm
from flowcut_kernels.ops import anchor_stats_select
from flowcut_kernels.testing import assert_within_budget


def draw(batch, heads, kv_heads, tokens, dim, dtype, device):
    """Projections as transformers passes them: [B, N, H * d] seen as heads; anchors are token 0; a history."""
    flat = torch.randn(3, batch, tokens, heads * dim, device=device).to(dtype)
    query = flat[0].unflatten(-1, (heads, dim)).transpose(1, 2)
    key, value = (x[..., : kv_heads * dim].unflatten(-1, (kv_heads, dim)).transpose(1, 2) for x in flat[1:])
    return query[:, :, :1], key, value, value[:, :, :1], torch.rand(batch, tokens, device=device)


CASES = [  # B, H, G, N, d
    (1, 1, 1, 1, 64),
    (2, 2, 2, 33, 64),
    (3, 3, 3, 17, 72),
    (2, 2, 1, 40, 80),
    (1, 2, 2, 21, 88),
    (1, 2, 2, 19, 96),
    (2, 4, 2, 26, 128),
]
RULES = [
    dict(mode=Select.SCORE_ONLY),
    dict(mode=Select.ADAPTIVE, budget=3, divisor=2.0),
    dict(mode=Select.ADAPTIVE, budget=3, divisor=0.0, relevance=Relevance.SCALED_SOFTMAX),
    dict(
        mode=Select.ADAPTIVE_BATCH, budget=2, divisor=1.4, relevance=Relevance.SOFTMAX, value_norm=ValueNorm.HEAD_MEAN
    ),
    dict(mode=Select.FIXED, budget=7, attention=False),
    dict(mode=Select.ADAPTIVE, budget=3, divisor=2.0, criteria_weights=(0.3, 1.7, 2.5), entropy_exponent=3.5),
    dict(mode=Select.ADAPTIVE_BATCH, budget=2, divisor=1.4, criteria_weights=(0, 1, 0.5), entropy_exponent=0.7),
    dict(mode=Select.FIXED, budget=7, relevance=Relevance.NONE, value_norm=ValueNorm.NONE),
    dict(mode=Select.SCORE_ONLY, block=4),
    dict(mode=Select.FIXED, budget=5, block=4, budgets=(5, 2)),
    dict(mode=Select.ADAPTIVE, budget=3, divisor=2.0, block=4, budgets=(1, 3)),
    dict(mode=Select.ADAPTIVE_BATCH, budget=3, divisor=2.0, block=16, budgets=(1, 3)),
    dict(mode=Select.ADAPTIVE, budget=40, divisor=2.0, budgets=(5, 40)),
]


def rule_id(rule):
    return ",".join(str(getattr(value, "name", value)).lower() for value in rule.values())


@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "ragged"])
@pytest.mark.parametrize(
    ("case", "rule"),
    [(CASES[1], rule) for rule in RULES] + [(case, RULES[1]) for case in CASES],
    ids=lambda x: rule_id(x) if isinstance(x, dict) else str(x),
)
def test_equals_the_definition(backend, device, case, rule, ragged):
    *inputs, history = draw(*case, torch.float32, device)
    tokens = case[3]
    lengths = None
    if ragged:
        fewer = rule.get("block", 4)
        lengths = torch.tensor([max(1, tokens - fewer * b) for b in range(case[0])], dtype=torch.int32)
    options = dict(protect=1, history=history if ragged else None, lengths=lengths) | rule
    if "budgets" in rule:
        options["budgets"] = torch.tensor(rule["budgets"], dtype=torch.int32, device=device)
    if ragged:  # what lies behind an image's last token must not matter
        options["lengths"] = lengths = lengths.to(device)
        for x in inputs[1:3]:
            for b, length in enumerate(lengths.tolist()):
                x[b, :, length:] = float("nan")
    score, index, kept, entropy = anchor_stats_select(*inputs, **options, backend=backend)
    low = anchor_stats_select(*inputs, **options, backend="reference")
    exact_options = options | dict(history=history.double() if ragged else None)
    exact = anchor_stats_select(*(x.double() for x in inputs), **exact_options, backend="reference")
    assert torch.equal(index, low[1]) and torch.equal(kept, low[2])
    # Unscaled softmaxes magnify the rounding of their logits, which differs between forms.
    assert_within_budget(score, low[0], exact[0], factor=4, name="score")
    assert_within_budget(entropy, low[3], exact[3], name="entropy")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_inputs(backend, device, dtype):
    *inputs, history = draw(2, 2, 2, 37, 64, dtype, device)
    options = dict(protect=1, mode=Select.FIXED, budget=9, history=history)
    score, index, kept, _ = anchor_stats_select(*inputs, **options, backend=backend)
    low = anchor_stats_select(*inputs, **options, backend="reference")
    assert torch.equal(index, low[1]) and torch.equal(kept, low[2]) and score.dtype == torch.float32
    exact = anchor_stats_select(
        *(x.double() for x in inputs), **(options | dict(history=history.double())), backend="reference"
    )
    assert_within_budget(score, low[0], exact[0], name="score")


def test_cut_to_the_budget_under_uniform_attention(backend, device):
    """Without a divisor the entropy has no say, not even at h = 1, where the rule would drop nothing."""
    query, key, value, anchor, _ = draw(2, 2, 2, 12, 16, torch.float32, device)
    options = dict(protect=1, mode=Select.ADAPTIVE, budget=3, divisor=0.0, backend=backend)
    _, _, kept, entropy = anchor_stats_select(torch.zeros_like(query), key, value, anchor, **options)
    assert kept.tolist() == [4, 4] and entropy.tolist() == pytest.approx([1, 1])


def test_not_finite_is_marked(backend, device):
    query, key, value, anchor, _ = draw(2, 2, 2, 12, 16, torch.float32, device)
    value[1, 0, 5] = float("nan")
    _, index, kept, _ = anchor_stats_select(
        query, key, value, anchor, protect=1, mode=Select.FIXED, budget=3, backend=backend
    )
    assert kept.tolist() == [4, -1] and (index[1] == -1).all() and (index[0] >= 0).all()


def test_opcheck():
    *inputs, history = draw(2, 2, 2, 9, 16, torch.float32, "cpu")
    options = dict(
        scale=0.25, protect=1, attention=True, relevance=1, value_norm=1, criteria_weights=[1.0, 0.5, 2.0],
        history_weight=0.5, entropy_exponent=1.5,
    )  # fmt: skip
    for rule in (dict(mode=1, budget=2, divisor=2.0), dict(mode=3, budget=2, divisor=0.0)):
        opcheck(
            torch.ops.flowcut_kernels.anchor_stats_select.default,
            (*inputs, history, torch.tensor([9, 5])),
            options | rule,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(query=torch.zeros(1, 2, 2, 4), value_anchor=torch.zeros(1, 2, 2, 4)), "exactly one"),
        (dict(value_anchor=None), "anchor_stats_select: value_anchor"),
        (dict(history=torch.zeros(1, 3)), "history must be"),
        (dict(history=torch.zeros(1, 5, dtype=torch.float64)), "history must be"),
        (dict(lengths=torch.zeros(1)), "lengths must be integer"),
        (dict(mode=9), "mode=9"),
        (dict(criteria_weights=(1, math.inf, 1)), r"criteria_weights=\(1, inf, 1\) must be three finite numbers"),
        (dict(criteria_weights=(0, 0, 0)), "no criterion"),
        (dict(entropy_exponent=-1), "entropy_exponent=-1 must be a finite number > 0"),
        (dict(history_weight=2.0), "history_weight=2.0"),
        (dict(budget=-1), "budget=-1"),
        (dict(block=2), "anchor_stats_select: block=2 must"),
        (dict(budgets=torch.ones(2, dtype=torch.int32)), r"anchor_stats_select: budgets must be int32 \[1\]"),
        (dict(protect=6), "protect=6"),
        (dict(attention=False, relevance=Relevance.NONE, value_norm=ValueNorm.NONE), "no criterion"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else None,
)
def test_bad_input(change, message):
    arguments = dict(
        query=torch.zeros(1, 2, 1, 4), key=torch.zeros(1, 2, 5, 4), value=torch.zeros(1, 2, 5, 4),
        value_anchor=torch.zeros(1, 2, 1, 4),
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        anchor_stats_select(**(arguments | change))
