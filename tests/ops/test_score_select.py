"""`score_select`: fusion, history, count and ordered top-k; properties and equality of all backends."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from flowcut_kernels._library import native_error
from flowcut_kernels._ops import Select
from flowcut_kernels.ops import score_select
from flowcut_kernels.ops.score_select import raise_if_not_finite

PRUNING = [Select.ADAPTIVE, Select.ADAPTIVE_BATCH, Select.FIXED]


def draw(batch=3, tokens=23, device="cpu"):
    positive = lambda: torch.rand(batch, tokens, device=device) + 0.01  # noqa: E731
    return dict(
        attention=positive(),
        relevance=positive(),
        value_norm=positive(),
        history=positive(),
        entropy=torch.rand(batch, device=device),
    )


def same(actual, expected):
    torch.testing.assert_close(actual[0], expected[0], rtol=2e-6, atol=0)
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[2], expected[2])


RULES = [
    {},
    dict(criteria_weights=(0.3, 1.7, 2.5), entropy_exponent=0.6),
    dict(criteria_weights=(1.0, 2.0, 0.4)),
    dict(criteria_weights=(0, 1, 1), entropy_exponent=3),
]


def rule_id(rule):
    return ",".join(map(str, (*rule.get("criteria_weights", ()), rule.get("entropy_exponent", ""))))


@pytest.mark.parametrize("rule", RULES, ids=rule_id)
@pytest.mark.parametrize("lengths", [None, [23, 1, 9]], ids=["full", "ragged"])
@pytest.mark.parametrize("protect", [0, 1])
@pytest.mark.parametrize("mode", list(Select), ids=lambda x: x.name)
def test_equals_reference(backend, device, mode, protect, lengths, rule):
    inputs = draw(device=device)
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=device)
    for budget, divisor in ((5, 1.7), (1, 0.0), (22, 3.0), (50, 1.0), (0, 2.0)):
        options = dict(mode=mode, protect=protect, budget=budget, divisor=divisor, lengths=lengths, **rule)
        same(score_select(**inputs, **options, backend=backend), score_select(**inputs, **options, backend="reference"))


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.3, 1.7, 2.5)], ids=str)
@pytest.mark.parametrize(
    "drop", ["attention", "relevance", "value_norm", "history", "attention,relevance", "attention,value_norm"]
)
def test_criteria_subsets(backend, device, drop, weights):
    inputs = {name: None if name in drop.split(",") else x for name, x in draw(device=device).items()}
    options = dict(mode=Select.FIXED, budget=7, protect=1, history_weight=0.3, criteria_weights=weights)
    actual = score_select(**inputs, **options, backend=backend)
    same(actual, score_select(**inputs, **options, backend="reference"))
    a, r, g, s = (inputs[k] for k in ("attention", "relevance", "value_norm", "history"))
    terms = [
        w * x[:, 1:] / x[:, 1:].sum(1, keepdim=True) for x, w in zip((a, r), weights, strict=False) if x is not None
    ]
    expected = (sum(terms) if terms else 1.0) * (1.0 if g is None else g[:, 1:] ** weights[2])
    expected = expected if s is None else 0.3 * s[:, 1:] + 0.7 * expected
    torch.testing.assert_close(actual[0][:, 1:], expected)


@pytest.mark.parametrize(
    ("protect", "lengths", "rule"), [(0, None, {}), (1, [0, 3, 1, 2], RULES[1])], ids=["full", "ragged"]
)
@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("mode", list(Select), ids=lambda x: x.name)
def test_groups_and_budgets_equal_reference(backend, device, mode, block, protect, lengths, rule):
    """Whole groups of tokens, each sample to its own budget: below, at and above what it has."""
    inputs = draw(4, protect + 3 * block * (13 if block == 1 else 1), device)
    groups = (inputs["history"].shape[1] - protect) // block
    if lengths is not None:
        lengths = [protect + n * groups // 3 * block for n in lengths]
        for name in ("attention", "relevance", "value_norm", "history"):
            for b, length in enumerate(lengths):
                inputs[name][b, length:] = math.nan
        lengths = torch.tensor(lengths, device=device)
    budgets = torch.tensor([0, 1, groups, groups + 9], dtype=torch.int32, device=device)
    options = dict(mode=mode, protect=protect, block=block, divisor=1.7, lengths=lengths, budgets=budgets, **rule)
    options["budget"] = groups + 9
    same(score_select(**inputs, **options, backend=backend), score_select(**inputs, **options, backend="reference"))


@pytest.mark.parametrize(("block", "tokens"), [(3, 5001), (4, 1026), (16, 4098)])
def test_groups_of_long_rows(backend, device, block, tokens):
    """More tokens than a tile, and more groups than one; two protected rows."""
    inputs = draw(1, tokens - tokens % block + 2, device)
    groups = tokens // block
    lengths = torch.tensor([2 + (groups - 5) * block], device=device)
    options = dict(mode=Select.ADAPTIVE, protect=2, divisor=2.0, budget=groups // 3, block=block, lengths=lengths)
    same(score_select(**inputs, **options, backend=backend), score_select(**inputs, **options, backend="reference"))


@pytest.mark.parametrize("block", [1, 4])
def test_a_sample_keeps_what_it_keeps_alone(backend, device, block):
    """With its budget as the only one; and of groups, what their means keep."""
    inputs = draw(3, 1 + 40, device)
    budgets = torch.tensor([7, 2, 10], dtype=torch.int32, device=device)
    for mode in (Select.ADAPTIVE, Select.FIXED):
        options = dict(mode=mode, protect=1, divisor=1.3, block=block, backend=backend)
        score, index, lengths = score_select(**inputs, **options, budget=10, budgets=budgets)
        for b, budget in enumerate(budgets.tolist()):
            alone = score_select(**{k: x[b : b + 1] for k, x in inputs.items()}, **options, budget=budget)
            kept = int(alone[2])
            assert torch.equal(score[b], alone[0][0]) and lengths[b] == kept
            assert torch.equal(index[b, :kept], alone[1][0, :kept]) and (index[b, kept:] == -1).all()
            means = score[b, 1:].view(-1, block)
            assert (means == means[:, :1]).all()
            best = means[:, 0].argsort(descending=True, stable=True)[: (kept - 1) // block].sort().values
            rows = (best[:, None] * block + torch.arange(block, device=device)).flatten() + 1
            assert torch.equal(index[b, 1:kept], rows)


def test_scores_of_groups_are_means(backend, device):
    """Of the scores with their history; ties go to the lower group, and one NaN marks the sample."""
    norm = torch.tensor([[9.0, 1, 3, -0.0, 0.0, 4, 0, 2, 2, 0, 0, 8]], device=device)
    options = dict(history=2 * norm, history_weight=0.5, budget=3, block=2, backend=backend)
    score, index, lengths = score_select(None, None, norm, **options)
    assert (score / 1.5).tolist() == [[5, 5, 1.5, 1.5, 2, 2, 1, 1, 1, 1, 4, 4]]
    assert index.tolist() == [[0, 1, 4, 5, 10, 11]] and lengths.tolist() == [6]
    assert score_select(None, None, norm, **options | dict(budget=5))[1].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 10, 11]]
    norm[0, 8] = math.nan
    assert score_select(None, None, norm, **options)[2].tolist() == [-1]


def test_means_of_any_block_are_the_same_to_the_bit(backend, device):
    """A sum divided, not multiplied by what a ninth is rounded to: else groups tie in one form alone."""
    norm = torch.randint(0, 1000, (2, 60 * 9), device=device).float()
    score, *_ = score_select(None, None, norm, mode=Select.SCORE_ONLY, block=9, backend=backend)
    want = torch.tensor([[n / 9 for n in row] for row in norm.view(2, 60, 9).sum(2).tolist()], device=device)
    assert torch.equal(score[:, ::9], want)


@pytest.mark.parametrize("exponent", [2, 0.5, 1, 3, 7.3])
def test_count_follows_the_paper(backend, device, exponent):
    """c = round_half_even((n - T) / sqrt(rem) * (1 - h^e)), each image its own; the paper has e = 2."""
    batch, tokens, budget, remaining = 24, 41, 8, 6
    inputs = draw(batch, tokens, device)
    inputs["entropy"][:3] = torch.tensor([0.0, -1e-8, 1.0])  # rounding may leave a ratio below 0
    options = dict(mode=Select.ADAPTIVE, budget=budget, divisor=math.sqrt(remaining), protect=1)
    *_, lengths = score_select(**inputs, **options, entropy_exponent=exponent, backend=backend)
    for h, length in zip(inputs["entropy"].tolist(), lengths.tolist(), strict=True):
        count = round((40 - budget) / math.sqrt(remaining) * (1 - max(h, 0.0) ** exponent))
        assert length == 1 + max(40 - count, budget)


@pytest.mark.parametrize(("difference", "count"), [(5, 2), (7, 4), (9, 4), (11, 6)])
def test_count_rounds_half_to_even(backend, device, difference, count):
    inputs = draw(1, 30, device) | dict(entropy=torch.zeros(1, device=device))
    *_, lengths = score_select(**inputs, mode=Select.ADAPTIVE, budget=30 - difference, divisor=2.0, backend=backend)
    assert lengths.item() == 30 - count


@pytest.mark.parametrize(("tokens", "block"), [(300, 1), (1024, 1), (4096, 4)])
def test_scores_up_to_a_power_of_two(backend, device, tokens, block):
    """The bits in which they differ are all ones, which rounds up as a float; 1,024 keys fill a packed count."""
    score = torch.linspace(0.5, 1.5, tokens // block, device=device)
    score[0], score[-1] = 2.0**-31, 2 - 2.0**-23
    options = dict(mode=Select.FIXED, protect=0, budget=100, block=block)
    given = (None, None, score.roll(7).repeat_interleave(block)[None])
    same(score_select(*given, **options, backend=backend), score_select(*given, **options, backend="reference"))


def test_ties_go_to_the_lower_index(backend, device):
    """Equal scores, signed zeros included."""
    score = torch.tensor([[0.0, 2.0, -0.0, 2.0, 0.0, 2.0, 1.0, 2.0]], device=device)
    for budget, kept in ((2, [1, 3]), (3, [1, 3, 5]), (6, [0, 1, 3, 5, 6, 7]), (7, [0, 1, 2, 3, 5, 6, 7])):
        _, index, _ = score_select(None, None, score, mode=Select.FIXED, budget=budget, backend=backend)
        assert index.tolist() == [kept]


def test_all_equal_scores(backend, device):
    _, index, _ = score_select(
        torch.ones(2, 70, device=device), mode=Select.FIXED, budget=33, protect=1, backend=backend
    )
    assert index.tolist() == [list(range(34))] * 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", list(Select), ids=lambda x: x.name)
def test_not_finite_is_marked_and_named(backend, device, mode, value):
    inputs = draw(device=device)
    inputs["value_norm"][1, 7] = value
    _, index, lengths = score_select(**inputs, mode=mode, budget=4, divisor=1.0, protect=1, backend=backend)
    assert lengths[1] == -1 and (index[1] == -1).all() and (lengths[[0, 2]] > 0).all()
    with pytest.raises(ValueError, match=r"sample\(s\) \[1\] at layer 3 hold NaN or Inf"):
        raise_if_not_finite(lengths.tolist(), "layer 3")


def test_entropy_that_is_not_finite_is_marked(backend, device):
    """No count follows from NaN; a mode that reads no entropy does not mind."""
    inputs = draw(device=device)
    inputs["entropy"][2] = math.nan
    options = dict(budget=4, divisor=1.0, protect=1, backend=backend)
    _, index, lengths = score_select(**inputs, mode=Select.ADAPTIVE, **options)
    assert lengths[2] == -1 and (index[2] == -1).all() and (lengths[:2] > 0).all()
    assert (score_select(**inputs, mode=Select.FIXED, **options)[2] == 5).all()


def test_dead_and_protected_tokens_may_hold_anything(backend, device):
    inputs = draw(device=device)
    lengths = torch.tensor([23, 12, 5], device=device)
    options = dict(mode=Select.ADAPTIVE, budget=3, divisor=1.1, protect=2, lengths=lengths, backend=backend)
    clean = score_select(**inputs, **options)
    for name in ("attention", "relevance", "value_norm", "history"):
        for b, length in enumerate(lengths.tolist()):
            inputs[name][b, length:] = math.nan
            inputs[name][b, :2] = math.inf
    for a, b in zip(score_select(**inputs, **options), clean, strict=True):
        assert torch.equal(a, b)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_selection_properties(data):
    """Exact k, ascending unique indices, protected tokens kept, the k best kept, result independent of the slot."""
    tokens = data.draw(st.integers(1, 60))
    protect = data.draw(st.integers(0, min(2, tokens)))
    budget = data.draw(st.integers(0, tokens))
    values = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]), min_size=tokens, max_size=tokens)
    rows = torch.tensor(data.draw(st.lists(values, min_size=1, max_size=4)))
    lengths = torch.tensor([data.draw(st.integers(protect, tokens)) for _ in rows])
    options = dict(mode=Select.FIXED, budget=budget, protect=protect)
    for backend in ("reference", *(() if native_error() else ("cpp",))):
        score, index, new = score_select(None, None, rows, lengths=lengths, **options, backend=backend)
        for b, length in enumerate(lengths.tolist()):
            kept = [i for i in index[b].tolist() if i >= 0]
            k = min(budget, length - protect)
            assert index[b].tolist() == kept + [-1] * (index.shape[1] - len(kept))
            assert len(kept) == protect + k == new[b] and kept == sorted(set(kept))
            assert kept[:protect] == list(range(protect))
            candidates = sorted(range(protect, length), key=lambda i: (-rows[b, i].item(), i))
            assert kept[protect:] == sorted(candidates[:k])
            alone = score_select(None, None, rows[b : b + 1], lengths=lengths[b : b + 1], **options, backend=backend)
            assert torch.equal(alone[0][0], score[b]) and torch.equal(alone[1][0], index[b])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 2**31))
def test_random_scores_match_the_reference(tokens, budget, seed):
    if native_error():
        pytest.skip(native_error())
    score = torch.randn(2, tokens, generator=torch.Generator().manual_seed(seed))
    for a, b in zip(
        score_select(None, None, score, budget=budget, backend="cpp"),
        score_select(None, None, score, budget=budget, backend="reference"),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", list(Select), ids=lambda x: x.name)
def test_opcheck(mode):
    inputs = draw(2, 9)
    opcheck(
        torch.ops.flowcut_kernels.score_select.default,
        (*inputs.values(), torch.tensor([9, 6], dtype=torch.int32)),
        dict(criteria_weights=[1.0, 0.5, 2.0], history_weight=0.5, protect=1, mode=int(mode), budget=3)
        | dict(divisor=1.5, entropy_exponent=1.5),
    )
    opcheck(
        torch.ops.flowcut_kernels.score_select.default,
        (*inputs.values(), None),
        dict(history_weight=0.5, protect=1, mode=int(mode), budget=2, divisor=1.5, block=4)
        | dict(budgets=torch.tensor([2, 1], dtype=torch.int32)),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(attention=None, relevance=None, value_norm=None, history=None), "at least one"),
        (dict(relevance=torch.ones(2, 4)), "relevance"),
        (dict(history=torch.ones(2, 5).half()), "history"),
        (dict(entropy=None), "entropy"),
        (dict(entropy=torch.ones(3)), "entropy"),
        (dict(lengths=torch.ones(2)), "lengths"),
        (dict(criteria_weights=(1, 1)), r"criteria_weights=\(1, 1\) must be three finite numbers >= 0"),
        (dict(criteria_weights=(1, -1, 1)), r"criteria_weights=\(1, -1, 1\)"),
        (dict(criteria_weights=(1, 1, math.nan)), r"criteria_weights=\(1, 1, nan\)"),
        (dict(criteria_weights=(0, 1, 0), relevance=None), r"criteria_weights=\(0, 1, 0\) leaves no criterion"),
        (dict(entropy_exponent=0), "entropy_exponent=0 must"),
        (dict(entropy_exponent=math.inf), "entropy_exponent=inf must"),
        (dict(history_weight=1.5), "history_weight=1.5"),
        (dict(protect=6), "protect=6"),
        (dict(mode=9), "mode=9"),
        (dict(budget=-1), "budget=-1"),
        (dict(block=0), "score_select: block=0 must be at least 1"),
        (dict(block=2), "block=2 must be at least 1 and divide the 5 tokens behind protect"),
        (dict(budgets=torch.ones(3, dtype=torch.int32)), r"score_select: budgets must be int32 \[2\] on cpu"),
        (dict(budgets=torch.ones(2)), r"budgets must be int32 \[2\] on cpu, got torch.float32 \[?\(2,\)"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else None,
)
def test_bad_input(change, message):
    arguments = dict(draw(2, 5), mode=Select.ADAPTIVE, budget=2, divisor=1.0)
    with pytest.raises(ValueError, match=message):
        score_select(**(arguments | change))
