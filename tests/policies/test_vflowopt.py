"""VFlowOpt's settings, and what recycling promises for any importance, grids and budgets."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flowcut_kernels as fk
from flowcut_kernels._ops import Select
from flowcut_kernels.policies.base import EncoderStep, EncoderView, FeatureView, Pixels
from flowcut_kernels.policies.recycling import select_features
from flowcut_kernels.policies.stages import average_retention
from flowcut_kernels.policies.vflowopt import PRESETS


@pytest.mark.parametrize("ratio", sorted(PRESETS))
def test_published_presets_meet_their_average(ratio):
    policy = fk.VFlowOpt.release(ratio)
    assert average_retention(policy.retain_ratio, policy.llm_stages, 28) == pytest.approx(ratio, abs=5e-3)
    assert policy.counts == "release" and policy.entropy_weight == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hub_threshold=-1), "hub_threshold=-1 must be a number, at least 0"),
        (dict(hub_threshold=float("nan")), "hub_threshold=nan"),
        (dict(hub_threshold=10**400), "hub_threshold=1000"),  # more than a float can hold
        (dict(entropy_weight=1e39), "entropy_weight=1e.39"),  # more than float32 can
        (dict(entropy_weight="1"), "entropy_weight='1' must be a number"),
        (dict(recycle_cell=0.5), "recycle_cell=0.5 must be None or a number of tokens, at least 1"),
        (dict(recycle_cell=float("inf")), "recycle_cell=inf"),
        (dict(llm_stages=((0, 0.5),)), "llm_stages=.* must be .layer, ratio. pairs"),
        (dict(llm_stages=((2, 1.5),)), "llm_stages=.* a share in"),
        (dict(llm_stages=((2, 0.0),)), "llm_stages=.* a share in"),
        (dict(llm_stages=((4, 0.5), (4, 0.5))), "must name rising layers"),
        (dict(llm_stages=3), "llm_stages=3"),
        (dict(counts="drift"), "counts='drift' must be 'exact' or 'release'"),
        (dict(pixel_mean=(0.5,)), "give pixel_mean and pixel_std together"),
        (dict(pixel_mean="x", pixel_std="y"), "pixel_mean='x' must be a tuple of numbers"),
        (dict(pixel_mean=(), pixel_std=()), r"pixel_mean=\(\) must be a tuple of numbers"),
        (dict(pixel_mean=(0.5,), pixel_std=(0.0,)), r"pixel_std=\(0.0,\) must be positive"),
        (dict(target_tokens=3), "exactly one of target_tokens and retain_ratio"),
        (dict(retain_ratio=None, target_tokens=5, counts="release"), "give retain_ratio instead of target_tokens"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else None,
)
def test_bad_settings(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fk.VFlowOpt(**(dict(retain_ratio=0.1) | change))


@torch.no_grad()
def test_large_numbers():
    """An int of more than 64 bits is a number too."""
    model, ids = tiny.llava(), torch.tensor([[1] + [tiny.IMAGE] * tiny.PATCHES + [5, 6]])
    found = []
    for number in (1e30, 10**30):
        with fk.patched(model, fk.VFlowOpt(9, hub_threshold=number, entropy_weight=number)):
            found.append(model(ids, pixel_values=tiny.images(1)).logits)
    assert torch.equal(*found)


def test_unpublished_preset():
    with pytest.raises(ValueError, match=r"retain_ratio=0.3 must be one of \[0.1, 0.25, 0.5\]"):
        fk.VFlowOpt.release(0.3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(recycle_cell=2.0, llm_layer=1), "llm_layer=1 with recycle_cell=2.0"),
        (dict(llm_stages=((1, 0.5),), llm_layer=1), "llm_layer=1 with recycle_cell=None, llm_stages="),
        (dict(recycle_cell=0), "recycle_cell=0 must be None"),
        (dict(llm_stages=((1, 2),)), "a share in"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else None,
)
def test_bad_settings_of_the_hybrid(change, message):
    with pytest.raises(ValueError, match=message):
        fk.FlowCut(8, **change)


side = st.integers(1, 7)
images = st.lists(st.lists(st.tuples(side, side), min_size=1, max_size=3), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(images, st.one_of(st.none(), st.floats(1, 9)), st.integers(0, 2**31), st.booleans(), st.data())
def test_budget_is_exact(grids, cell, seed, ties, data):
    """Every image ends with its budget; what is kept outranks what is pruned; nothing of a kept cell-mate is lost."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [sum(h * w for h, w in image) for image in grids]
    budgets = [data.draw(st.integers(1, n)) for n in lengths]
    tokens = sum(lengths)
    features = torch.randn(tokens, 5, generator=generator, dtype=torch.float64)
    weight = torch.rand(tokens, generator=generator, dtype=torch.float64)
    weight = (3 * weight).round() / 4 if ties else weight
    view = FeatureView(features, weight, lengths, [tuple(image) for image in grids], None, budgets, None)
    choice = select_features(view, budgets, cell)
    assert choice.lengths == budgets and len(choice.index) == len(choice.features) == sum(budgets)
    plain = select_features(view, budgets, None)
    assert not plain.recycled.any() and torch.equal(plain.features, features[plain.index])
    start = first = 0
    for n, budget in zip(lengths, budgets, strict=True):
        at = slice(first, first + budget)
        index, recycled = choice.index[at] - start, choice.recycled[at]
        assert (index.diff() > 0).all() and (index >= 0).all() and (index < n).all()
        own = weight[start : start + n]
        kept = index[~recycled]
        assert torch.equal(choice.features[at][~recycled], features[start + kept])
        gone = torch.ones(n, dtype=torch.bool)
        gone[kept] = False
        if len(kept) and gone.any():
            assert own[kept].min() >= own[gone].max()
        if ties and cell is None:  # to the earlier
            assert plain.index[at].tolist() == sorted(
                (start + torch.argsort(own, descending=True, stable=True)[:budget]).tolist()
            )
        start, first = start + n, first + budget


def test_mass_is_kept_where_cells_fit():
    """The weighted sum of all features is that of the kept and the recycled ones."""
    torch.manual_seed(0)
    features, weight = torch.randn(64, 6, dtype=torch.float64), torch.rand(64, dtype=torch.float64)
    view = FeatureView(features, weight, [64], [((8, 8),)], None, [30], None)
    choice = select_features(view, [30], 3.0)
    cells = [(i // 8 // 3, i % 8 // 3) for i in range(64)]
    kept = set(choice.index[~choice.recycled].tolist())
    total = (weight[:, None] * features).sum(0)
    mine = (weight[choice.index][:, None] * features[choice.index])[~choice.recycled].sum(0)
    for row, i in zip(choice.features[choice.recycled], choice.index[choice.recycled].tolist(), strict=True):
        members = [j for j in range(64) if cells[j] == cells[i] and j not in kept]
        mine = mine + weight[members].sum() * row
    torch.testing.assert_close(mine, total)


def test_gradients_reach_every_feature():
    features = torch.randn(16, 4, requires_grad=True)
    view = FeatureView(features, torch.rand(16), [16], [((4, 4),)], None, [6], None)
    select_features(view, [6], 2.0).features.sum().backward()
    assert (features.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_tokens_of_several_patches_have_the_mean_of_their_importance(weight):
    """Patches in another order, those of a token in a row: the mean of what they are given one by one."""
    rows, columns, side = 3, 4, 2
    policy = fk.VFlowOpt(4, hub_threshold=1.0, entropy_weight=weight)
    query, key, value = torch.randn(3, 2, 2, rows * columns * side**2, 8)
    pixels = torch.rand(2, 3, rows * side * 4, columns * side * 4)
    pixels = Pixels(pixels.pow(torch.linspace(0.5, 9, columns * side * 4)), (0.0,) * 3, (1.0,) * 3, 4)

    def score(heads, grid, **options):
        query, key, value = heads
        view = EncoderView(
            key, value, query, lambda kind: (key, value), 0, None, None, grid, pixels, "reference", **options
        )
        return policy.encoder_select(EncoderStep(Select.SCORE_ONLY, static=True), view).score

    patches = score((query, key, value), (rows * side, columns * side))
    tokens = patches.unflatten(1, (rows, side, columns, side)).transpose(2, 3).flatten(3).flatten(1, 2)
    places = torch.stack([torch.randperm(rows * columns) for _ in range(2)])
    raster = torch.arange(key.shape[2]).view(rows, side, columns, side).transpose(1, 2).reshape(rows * columns, -1)
    order = raster[places].flatten(1)
    heads = [x.gather(2, order[:, None, :, None].expand_as(x)) for x in (query, key, value)]
    got = score(heads, (rows, columns), block=side**2, places=lambda: places).unflatten(1, (-1, side**2))
    want = tokens.mean(2).gather(1, places)[..., None]
    torch.testing.assert_close(got, want.expand_as(got))
