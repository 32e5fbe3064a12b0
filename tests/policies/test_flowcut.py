"""Policies: what they accept, at which layers they cut, and that every switch does what it says."""

from __future__ import annotations

import dataclasses
import math
import pickle
from fractions import Fraction
from itertools import pairwise

import pytest
import tiny
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import flowcut_kernels as fk
from flowcut_kernels._ops import Select
from flowcut_kernels.policies.base import DecoderView, EncoderStep, EncoderView, VisualHeads

POLICIES = [fk.FlowCut, fk.AttentionTokens, fk.RandomTokens, fk.UniformTokens]


@pytest.mark.parametrize("policy", [*POLICIES, fk.FlowCut.release])
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ValueError, "exactly one of target_tokens and retain_ratio"),
        (dict(target_tokens=64, retain_ratio=0.1), ValueError, "target_tokens=64, retain_ratio=0.1"),
        (dict(target_tokens=0), ValueError, "target_tokens=0 must be at least 1"),
        (dict(target_tokens=-3), ValueError, "target_tokens=-3 must be at least 1"),
        (dict(target_tokens=True), TypeError, "target_tokens=True must be an int"),
        (dict(target_tokens=0.1), TypeError, "target_tokens=0.1 must be an int; for a share use retain_ratio"),
        (dict(target_tokens="64"), TypeError, "target_tokens='64' must be an int"),
        (dict(retain_ratio=0), ValueError, r"retain_ratio=0 must lie in \(0, 1\]"),
        (dict(retain_ratio=64), ValueError, "retain_ratio=64 .* for a count use target_tokens"),
        (dict(retain_ratio=1.0001), ValueError, "retain_ratio=1.0001 must lie in"),
        (dict(retain_ratio=-0.5), ValueError, "retain_ratio=-0.5 must lie in"),
        (dict(retain_ratio=math.nan), ValueError, "retain_ratio=nan must lie in"),
        (dict(retain_ratio=math.inf), ValueError, "retain_ratio=inf must lie in"),
        (dict(retain_ratio="0.1"), TypeError, "retain_ratio='0.1' must be a number"),
        (dict(retain_ratio=True), TypeError, "retain_ratio=True must be a number"),
        (dict(target_tokens=4, feature_layer="-2"), TypeError, "feature_layer='-2' must be an int"),
        (dict(target_tokens=4, feature_layer=True), TypeError, "feature_layer=True must be an int"),
    ],
)
def test_bad_budgets(policy, arguments, error, words):
    with pytest.raises(error, match=f"{policy.__name__.replace('release', 'FlowCut')}: .*{words}"):
        policy(**arguments)


@pytest.mark.parametrize("last", [dict(llm_layer=1), dict(recycle_cell=2.5)], ids=str)
def test_schedules_of_more_than_a_float_can_hold(last):
    """Which the surplus makes of a budget."""
    with pytest.raises(ValueError, match=r"FlowCut: schedule=\(\(1, 9\),\) must end with target_tokens=1000"):
        fk.FlowCut(10**400, schedule=((1, 9),), **last)
    assert fk.FlowCut(10**400, **last).encoder_budget(576) == 576


@pytest.mark.parametrize(
    ("policy", "name", "value", "words"),
    [
        (fk.FlowCut, "criteria", (), "non-empty subset"),
        (fk.FlowCut, "criteria", "attention", "non-empty subset"),
        (fk.FlowCut, "criteria", ("attention", "colour"), "'colour'.* subset"),
        (fk.FlowCut, "criteria", 3, "3 must be a non-empty subset"),
        (fk.FlowCut, "criteria", [["attention"]], "non-empty subset"),
        (fk.FlowCut, "criteria", None, "None must be a non-empty subset"),
        (fk.FlowCut, "relevance", "dot", "'dot' must be one of .*'scaled_softmax'"),
        (fk.FlowCut, "relevance", ["cosine"], "must be one of"),
        (fk.FlowCut, "value_norm", None, "None must be one of .*'head_mean'"),
        (fk.FlowCut, "batch", "maximum", "'maximum' must be one of .*'max'"),
        (fk.FlowCut, "anchor", "CLS", "'CLS' must be one of .*'mean'"),
        (fk.FlowCut, "history_weight", 1.5, "1.5 must be a number in 0..1"),
        (fk.FlowCut, "history_weight", math.nan, "nan must be a number in 0..1"),
        (fk.FlowCut, "history_weight", None, "None must be a number in 0..1"),
        (fk.FlowCut, "history_weight", "0.5", "'0.5' must be a number in 0..1"),
        (fk.FlowCut, "criteria_weights", (1, 1), "must be three finite numbers"),
        (
            fk.FlowCut,
            "criteria_weights",
            (1, -1, 1),
            "must be three finite numbers >= 0, in the order of .*'relevance'",
        ),
        (fk.FlowCut, "criteria_weights", (1, math.nan, 1), "must be three finite numbers"),
        (fk.FlowCut, "criteria_weights", (1, 1, math.inf), "must be three finite numbers"),
        (fk.FlowCut, "criteria_weights", (True, 1, 1), "must be three finite numbers"),
        (fk.FlowCut, "criteria_weights", 1.0, "1.0 must be three finite numbers"),
        (fk.FlowCut, "criteria_weights", (0, 0, 0), "must be above 0 for one of"),
        (fk.FlowCut, "entropy_exponent", 0, "0 must be a finite number above 0"),
        (fk.FlowCut, "entropy_exponent", math.inf, "inf must be a finite number above 0"),
        (fk.FlowCut, "entropy_exponent", "2", "'2' must be a finite number above 0"),
        (fk.FlowCut, "interval", 0, "0 must be a whole number of layers"),
        (fk.FlowCut, "interval", 2.0, "2.0 must be a whole number of layers"),
        (fk.FlowCut, "interval", True, "True must be a whole number of layers"),
        (fk.FlowCut, "cumulative", "no", "'no' must be True or False"),
        (fk.FlowCut, "adaptive", None, "None must be True or False"),
        (fk.RandomTokens, "seed", 0.5, "0.5 must be an int"),
        (fk.RandomTokens, "seed", None, "None must be an int"),
    ],
)
def test_bad_switches(policy, name, value, words):
    with pytest.raises((ValueError, TypeError), match=f"{policy.__name__}: {name}=.*{words}"):
        policy(64, **{name: value})


@given(ratio=st.floats(0, 1, exclude_min=True), tokens=st.integers(1, 16384))
@example(ratio=0.5, tokens=5)  # 2.5 rounds to even
@example(ratio=0.5, tokens=7)  # 3.5 too
@example(ratio=1e-9, tokens=576)
@example(ratio=0.1, tokens=576)
def test_ratio_rounds_half_to_even(ratio, tokens):
    exact = Fraction(ratio * tokens)  # the product in floating point, rounded exactly
    want = min(max(round(exact), 1), tokens)
    assert fk.FlowCut(retain_ratio=ratio).budget(tokens) == want


@given(target=st.integers(1, 2000), tokens=st.integers(1, 2000))
def test_count_is_capped(target, tokens):
    assert fk.FlowCut(target_tokens=target).budget(tokens) == min(target, tokens)


@pytest.mark.parametrize("policy", [*POLICIES, fk.FlowCut.release])
def test_values_are_frozen_and_comparable(policy):
    one, same, other = policy(64), policy(target_tokens=64), policy(65)
    assert one == same and hash(one) == hash(same) and one != other
    assert eval(repr(one), {c.__name__: c for c in POLICIES}) == one
    assert pickle.loads(pickle.dumps(one)) == one and type(one).from_json(one.to_json()) == one
    assert dataclasses.replace(one, target_tokens=65) == other
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.target_tokens = 3
    with pytest.raises(ValueError, match="target_tokens=0"):
        dataclasses.replace(one, target_tokens=0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "FlowCut.from_json: this is no JSON"),
        ('{"policy": "FlowCut", "fields": [8]}', r"fields=\[8\] must be an object of fields"),
        ("{}", "this holds a None"),
        (fk.RandomTokens(3).to_json(), "this holds a RandomTokens: read it with that class"),
        ('{"policy": "FlowCut", "version": "9.9", "fields": {"x": 1}}', "x is no field, but was one in version 9.9"),
        ('{"policy": "FlowCut", "fields": {"target_tokens": 0}}', "target_tokens=0"),
    ],
)
def test_bad_json(text, words, tmp_path):
    (tmp_path / "policy.json").write_text(text)
    for source in (text, tmp_path / "policy.json", str(tmp_path / "policy.json")):
        with pytest.raises(ValueError, match=words):
            fk.FlowCut.from_json(source)


def test_json_keeps_every_field():
    policy = fk.FlowCut(
        retain_ratio=0.1, criteria=("attention", "value_norm"), criteria_weights=(1, 2, 0.1), schedule=((2, 9), (5, 3))
    )
    assert fk.FlowCut.from_json(policy.to_json()) == policy
    released = fk.VFlowOpt.release(0.25, pixel_mean=(0.5,), pixel_std=(0.2,))
    assert fk.VFlowOpt.from_json(released.to_json()) == released


def test_criteria_are_a_set():
    """Order and container do not matter, so equal choices compare equal."""
    assert fk.FlowCut(8, criteria=["value_norm", "attention"]) == fk.FlowCut(8, criteria=("attention", "value_norm"))
    assert fk.FlowCut(8, criteria={"relevance"}).criteria == ("relevance",)
    with pytest.raises(ValueError, match=r"above 0 for one of \('relevance',\)"):
        fk.FlowCut(8, criteria={"relevance"}, criteria_weights=(1, 0, 1))


def test_release_changes_exactly_what_methods_say():
    release, default = dataclasses.asdict(fk.FlowCut.release(64)), dataclasses.asdict(fk.FlowCut(64))
    changed = {k: v for k, v in release.items() if default[k] != v}
    methods = dict(relevance="softmax", value_norm="head_mean", batch="max", positions="renumber")
    assert changed == methods | dict(view_share=0.5)
    assert fk.FlowCut.release(retain_ratio=0.1, batch="independent").batch == "independent"


# The schedule: methods.md prunes where rem(l) = P - l is a multiple of the interval, scores everywhere before.


@pytest.mark.parametrize("interval", [1, 2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("cumulative", [True, False])
@pytest.mark.parametrize("adaptive", [True, False])
def test_schedule(interval, cumulative, adaptive):
    policy = fk.FlowCut(64, interval=interval, cumulative=cumulative, adaptive=adaptive)
    steps = [policy.encoder_step(layer, 22, 576, 64) for layer in range(24)]
    cuts = set(range(21, -1, -interval))
    for layer, step in enumerate(steps):
        if layer > 21 or (layer not in cuts and not cumulative):
            assert step is None
        elif layer not in cuts:
            assert step.mode == Select.SCORE_ONLY and not step.prunes
        elif layer == 21:
            assert step == EncoderStep(Select.FIXED, 64, static=not adaptive)
        elif adaptive:
            assert step == EncoderStep(Select.ADAPTIVE, 64, math.sqrt(21 - layer))
        else:
            assert step.mode == Select.FIXED and step.static
    release = fk.FlowCut.release(64, interval=interval, adaptive=adaptive).encoder_step(21 - interval, 22, 576, 64)
    assert release.mode == (Select.ADAPTIVE_BATCH if adaptive else Select.FIXED)


@pytest.mark.parametrize("policy", [*POLICIES, fk.FlowCut.release])
@pytest.mark.parametrize("budget", [dict(target_tokens=576), dict(target_tokens=10**9), dict(retain_ratio=1.0)])
def test_budget_of_everything_never_acts(policy, budget):
    all_of_them = policy(**budget).encoder_budget(576)
    assert all(policy(**budget).encoder_step(layer, 22, 576, all_of_them) is None for layer in range(24))


@given(
    tokens=st.integers(2, 4096),
    target=st.integers(1, 4096),
    feature_layer=st.integers(1, 48),
    interval=st.sampled_from([1, 2, 3, 4, 6, 8, 12]),
)
def test_fixed_ratio_ends_at_the_budget(tokens, target, feature_layer, interval):
    assume(target < tokens)
    policy = fk.FlowCut(target, interval=interval, adaptive=False, cumulative=False)
    steps = [policy.encoder_step(layer, feature_layer, tokens, target) for layer in range(feature_layer + 2)]
    budgets = [tokens] + [step.budget for step in steps if step]
    assert budgets == sorted(budgets, reverse=True) and budgets[-1] == target
    shares = [b / a for a, b in pairwise(budgets)]
    equal = (target / tokens) ** (1 / len(shares))
    assert all(abs(b - a * equal) <= 1 for a, b in pairwise(budgets))  # rounding only


# Switches on a model: each one changes the choice. (What it changes it to: tests/modules/test_early_selection.py.)


@torch.no_grad()
def stages_of(model, policy, count=3):
    with fk.patched(model, policy, record=True):
        model(tiny.images(count, seed=5))
        return fk.trace(model).stages


@pytest.mark.parametrize(
    "switch",
    [
        dict(criteria=("attention",)),
        dict(criteria=("attention", "relevance")),
        dict(criteria=("value_norm",)),
        dict(criteria_weights=(1, 5, 1)),
        dict(criteria_weights=(1, 0, 1)),
        dict(criteria_weights=(1, 1, 4)),
        dict(entropy_exponent=8.0),
        dict(relevance="softmax"),
        dict(relevance="scaled_softmax"),
        dict(value_norm="head_mean"),
        dict(cumulative=False),
        dict(history_weight=0.0),
        dict(interval=1),
        dict(interval=3),
        dict(adaptive=False),
        dict(batch="max"),
        dict(anchor="mean"),
        dict(feature_layer=-3),
    ],
    ids=lambda d: ",".join(f"{k}={v}" for k, v in d.items()),
)
def test_switch_changes_the_choice(switch):
    model = tiny.clip_tower()
    default, changed = stages_of(model, fk.FlowCut(8)), stages_of(model, fk.FlowCut(8, **switch))
    assert changed[-1].kept == [8, 8, 8]
    same = [s.layer for s in default] == [s.layer for s in changed] and all(
        torch.equal(a.indices, b.indices) for a, b in zip(default, changed, strict=True)
    )
    assert not same


@pytest.mark.parametrize(
    ("zero", "absent"),
    [
        (dict(history_weight=0.0), dict(cumulative=False)),
        (dict(criteria_weights=(0, 1, 1)), dict(criteria=("relevance", "value_norm"))),
        (dict(criteria_weights=(2, 0, 0)), dict(criteria=("attention",))),
        (dict(criteria_weights=(0, 0, 3)), dict(criteria=("value_norm",), criteria_weights=(1, 1, 3))),
    ],
    ids=str,
)
def test_weight_zero_is_absence(zero, absent):
    model = tiny.clip_tower()
    a = stages_of(model, fk.FlowCut(8, **zero))
    b = stages_of(model, fk.FlowCut(8, **absent))
    assert [s.kept for s in a] == [s.kept for s in b]
    assert all(torch.equal(x.indices, y.indices) for x, y in zip(a, b, strict=True))


def test_full_history_keeps_the_first_judgement():
    """With weight 1 the score of layer 0 decides every cut."""
    stages = stages_of(tiny.clip_tower(), fk.FlowCut(8, history_weight=1.0))
    for stage in stages:
        first = stages[0].scores
        live = ~stage.scores.isnan()
        assert torch.equal(stage.scores[live], first[live])


@pytest.mark.parametrize(("kind", "auto", "other"), [("clip", "cls", "mean"), ("siglip", "mean", None)])
def test_auto_anchor(kind, auto, other):
    model = tiny.TOWERS[kind]()
    chosen = [s.indices for s in stages_of(model, fk.FlowCut(8))]
    for got, want in zip(chosen, (s.indices for s in stages_of(model, fk.FlowCut(8, anchor=auto))), strict=True):
        assert torch.equal(got, want)
    if other is None:
        with pytest.raises(
            ValueError, match="anchor='cls' but SiglipVisionModel has no class token: use anchor='auto'"
        ):
            fk.patch(model, fk.FlowCut(8, anchor="cls"))


def test_trace():
    """Scores explain the cut; patches that are gone stay gone; lists and tensors agree."""
    stages = stages_of(tiny.clip_tower(), fk.FlowCut(8))
    gone = torch.zeros(3, tiny.PATCHES, dtype=torch.bool)
    for stage in stages:
        assert stage.name == "encoder" and stage.lengths.tolist() == stage.kept
        assert ((stage.entropy > 0) & (stage.entropy <= 1)).all()
        assert torch.equal(stage.scores.isnan(), gone)
        for b, count in enumerate(stage.kept):
            ids = stage.indices[b, :count]
            assert (ids.diff() > 0).all() and ids[0] >= 0 and ids[-1] < tiny.PATCHES
            dropped = ~gone[b]
            dropped[ids] = False
            assert stage.scores[b, ids].min() >= stage.scores[b, dropped].max()
            gone[b] = True
            gone[b, ids] = False


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_nothing_is_scored_once_the_budget_is_reached(kind):
    """One token to drop: the last but one cut drops it, and the layer after it costs what the stock layer costs."""
    model = tiny.TOWERS[kind]()
    policy = fk.FlowCut(tiny.PATCHES - 1, interval=1, criteria=("attention",))
    last = tiny.LAYERS - 2 - (kind == "clip")
    with fk.patched(model, policy, record=True), torch.no_grad():
        model.encoder.layers[last - 1].self_attn.q_proj.weight.mul_(8)  # low entropy there
        model(tiny.images(1))
        trace = fk.trace(model)
    reached = next(s.layer for s in trace.stages if s.kept == [tiny.PATCHES - 1])
    assert reached < last, "the budget is reached only by the last cut: the test is too weak"
    assert max(trace.entropy) == trace.stages[-1].layer == reached


# Sanity floors


def blind(policy, rows, columns, batch=2, protect=1):
    """What a floor policy keeps on a grid, without a model."""
    tokens = rows * columns
    kept = policy.budget(tokens)
    step = policy.encoder_step(3, 4, tokens, kept)
    if step is None:
        assert kept == tokens
        return torch.arange(tokens)
    assert policy.encoder_step(2, 4, tokens, kept) is None and policy.encoder_step(4, 4, tokens, kept) is None
    key = torch.empty(batch, 1, tokens + protect, 1)
    view = EncoderView(key, key, None, lambda kind: (key, key), protect, None, None, (rows, columns), None, None)
    choice = policy.encoder_select(step, view)
    assert choice.lengths.tolist() == [kept + protect] * batch
    assert choice.index.tolist() == [choice.index[0].tolist()] * batch
    assert choice.index[0, :protect].tolist() == list(range(protect))
    return choice.index[0, protect:] - protect


@pytest.mark.parametrize("policy", [fk.RandomTokens, fk.UniformTokens])
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), share=st.floats(0, 1, exclude_min=True))
def test_floors_keep_the_exact_count(policy, rows, columns, share):
    patches = blind(policy(retain_ratio=share), rows, columns)
    want = min(max(round(share * rows * columns), 1), rows * columns)
    assert len(patches) == want
    assert (patches.diff() > 0).all() and patches[0] >= 0 and patches[-1] < rows * columns


@given(side=st.integers(2, 24), target=st.integers(1, 576))
def test_uniform_is_uniform(side, target):
    """No empty square of the grid is much larger than a patch's share of the area."""
    assume(target < side * side)
    patches = blind(fk.UniformTokens(target), side, side)
    rows, columns = patches // side, patches % side
    pitch = side / math.sqrt(target)
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    nearest = torch.maximum((grid[:, :1] - rows).abs(), (grid[:, 1:] - columns).abs()).min(1).values
    assert nearest.max() <= math.ceil(pitch) + 1


def test_uniform_of_a_square():
    """576 -> 64: every third row and column, from the middle of their cells."""
    want = [row * 24 + column for row in range(1, 24, 3) for column in range(1, 24, 3)]
    assert blind(fk.UniformTokens(64), 24, 24).tolist() == want


def test_random_is_a_function_of_its_seed():
    state = torch.get_rng_state()
    first = blind(fk.RandomTokens(64, seed=1), 24, 24)
    assert torch.equal(torch.get_rng_state(), state), "the global generator moved"
    torch.manual_seed(99)
    assert torch.equal(blind(fk.RandomTokens(64, seed=1), 24, 24), first)
    others = [blind(fk.RandomTokens(64, seed=s), 24, 24) for s in range(2, 42)]
    assert not any(torch.equal(x, first) for x in others)
    hits = torch.cat(others).bincount(minlength=576).float()  # each patch about 40/9 times of 40
    assert hits.max() <= 14 and (hits == 0).float().mean() < 0.05


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seeds_that_torch_does_not_take(seed):
    with pytest.raises(ValueError, match=f"seed={seed} must be a number of 64 bits"):
        fk.RandomTokens(8, seed=seed)


@pytest.mark.parametrize("policy", [fk.RandomTokens(8, seed=3), fk.UniformTokens(8)], ids=["random", "uniform"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_floors_cut_where_flowcut_makes_its_last(policy, kind):
    model = tiny.TOWERS[kind]()
    stages = stages_of(model, policy)
    assert [s.layer for s in stages] == [stages_of(model, fk.FlowCut(8))[-1].layer]
    assert stages[0].kept == [8, 8, 8] and stages[0].scores is None and stages[0].entropy is None
    assert torch.equal(stages[0].indices, blind(policy, tiny.SIDE, tiny.SIDE, batch=3).expand(3, -1))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_attention_alone(kind):
    """FlowCut with that criterion, without history, in one cut at its last layer; counts are known beforehand."""
    model = tiny.TOWERS[kind]()
    (stage,) = stages_of(model, fk.AttentionTokens(8))
    (same,) = stages_of(model, fk.FlowCut(8, criteria=("attention",), cumulative=False, interval=tiny.LAYERS))
    assert stage.layer == same.layer and torch.equal(stage.indices, same.indices)
    assert torch.equal(stage.scores, same.scores)
    assert not torch.equal(stage.indices, stages_of(model, fk.FlowCut(8))[-1].indices)
    assert fk.AttentionTokens(8).encoder_step(3, 5, 64, 8) is None
    assert fk.AttentionTokens(8).encoder_step(4, 5, 64, 8) == EncoderStep(Select.FIXED, 8, static=True)


@pytest.mark.parametrize("policy", [fk.RandomTokens(1, seed=2), fk.UniformTokens(1)], ids=["random", "uniform"])
def test_floors_choose_tokens_of_every_tile(policy):
    """Tiles of their own grids and budgets, rows in another order, some places gone: as on the rectangle that is left,
    and all patches of a token together."""
    block, protect, grid = 4, 1, (4, 6)
    whole, part = torch.randperm(24), torch.arange(24).view(4, 6)[1:3, 2:].flatten()[torch.randperm(8)]
    places = torch.stack([whole, torch.nn.functional.pad(part, (0, 16), value=-7)])
    key = torch.empty(2, 1, protect + 24 * block, 1)
    view = EncoderView(
        key, key, None, lambda kind: (key, key), protect, torch.tensor([97, 33]), None, grid, None, None,
        block=block, budgets=torch.tensor([7, 3], dtype=torch.int32), places=lambda: places,
    )  # fmt: skip
    choice = policy.encoder_select(EncoderStep(Select.FIXED, 7, static=True), view)
    assert choice.lengths.tolist() == [1 + 28, 1 + 12] and choice.index.shape == (2, 29)
    for image, (budget, sides, corner) in enumerate([(7, grid, 0), (3, (2, 4), 8)]):
        rows = choice.index[image, : 1 + budget * block]
        assert rows[0] == 0 and (rows.diff() > 0).all() and (choice.index[image, len(rows) :] == -1).all()
        patches = (rows[1:] - 1).view(budget, block)
        assert torch.equal(patches % block, torch.arange(block).expand(budget, -1))
        chosen = places[image, patches[:, 0] // block].sort().values
        want = policy._tokens(sides, budget)
        assert torch.equal(chosen, corner + want // sides[1] * grid[1] + want % sides[1])


def test_floors_choose_on_grids_of_their_own():
    key = torch.empty(2, 1, 24, 1)
    view = EncoderView(
        key, key, None, lambda kind: (key, key), 0, torch.tensor([24, 15]), None, (4, 6), None, None,
        grids=[(4, 6), (5, 3)], budgets=torch.tensor([6, 5], dtype=torch.int32),
    )  # fmt: skip
    policy = fk.UniformTokens(1)
    choice = policy.encoder_select(EncoderStep(Select.FIXED, 6, static=True), view)
    assert choice.lengths.tolist() == [6, 5] and choice.index[1, 5] == -1
    assert torch.equal(choice.index[0], policy._tokens((4, 6), 6))
    assert torch.equal(choice.index[1, :5], policy._tokens((5, 3), 5))


def test_a_schedule_demands_its_budget():
    policy = fk.FlowCut(retain_ratio=0.25, schedule=((1, 100), (3, 64)))
    assert policy.encoder_step(3, 4, 256, 64) == EncoderStep(Select.FIXED, 64, static=True)
    with pytest.raises(
        ValueError, match=r"does not end with the 50 to keep of the 200 tokens .* calibrate with images like these"
    ):
        policy.encoder_step(1, 4, 200, 50)


@pytest.mark.parametrize("switch", [{}, dict(relevance="softmax"), dict(criteria=("attention",))], ids=str)
def test_images_of_different_sizes_in_the_language_model(switch):
    """Each one keeps what it keeps alone; what stands behind a smaller one's tokens does not count."""
    policy = fk.FlowCut(5, llm_layer=1, **switch)
    lengths, budgets = [11, 23, 4], [5, 9, 4]
    query, anchor = torch.randn(3, 4, 1, 8), torch.randn(3, 2, 1, 8)
    key, value = torch.randn(2, 3, 2, 23, 8)

    def choose(images, lengths, budgets):
        n = max(lengths)
        heads = VisualHeads(query[images], key[images, :, :n], value[images, :, :n], anchor[images])
        view = DecoderView(
            1, [n] * len(lengths), budgets, lengths, None, None, pytest.fail, lambda: heads, pytest.fail, None
        )
        return policy.decoder_select(view)

    alone = [choose(slice(i, i + 1), lengths[i : i + 1], budgets[i : i + 1]) for i in range(3)]
    for image, length in enumerate(lengths):
        for x in (key, value):
            x[image, :, length:] = float("nan")
    together = choose(slice(None), lengths, budgets)
    assert together.lengths.tolist() == budgets and together.index.shape == (3, 9)
    for image, budget in enumerate(budgets):
        assert torch.equal(together.index[image, :budget], alone[image].index[0])
        assert (together.index[image, budget:] == -1).all()
        torch.testing.assert_close(together.score[image, : lengths[image]], alone[image].score[0])
        torch.testing.assert_close(together.entropy[image], alone[image].entropy[0])
