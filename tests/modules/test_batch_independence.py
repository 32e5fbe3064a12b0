"""By default an image keeps the same tokens alone, in any batch slot, beside anything, whatever the padding holds."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import flowcut_kernels as fk
from flowcut_kernels.modules import _rows

POOL = 6


@pytest.fixture(scope="module", params=["clip", "siglip"])
def tower(request):
    return tiny.TOWERS[request.param]().double()


@pytest.fixture(scope="module")
def pool():
    """Images from flat to busy, so that their counts differ much."""
    pixels = tiny.images(POOL, seed=8).double()
    return pixels * torch.logspace(-2, 0.5, POOL).double()[:, None, None, None]


@torch.no_grad()
def run(model, pixels, policy, backend=None):
    """Per image and cut: the kept patches; per image: the features."""
    with fk.patched(model, policy, record=True, backend=backend):
        output = model(pixels, output_hidden_states=True)
        stages = fk.trace(model).stages
    kept = [
        [stage.indices[b][: stage.kept[b]].tolist() for stage in stages if stage.kept[b] < tiny.PATCHES]
        for b in range(len(pixels))
    ]
    # Once an image is down to its budget, later cuts made for its neighbours change nothing.
    kept = [[ids for i, ids in enumerate(cuts) if i == 0 or ids != cuts[i - 1]] for cuts in kept]
    return kept, output.hidden_states[-2]


@pytest.fixture(scope="module")
def alone(tower, pool):
    policy = fk.FlowCut(8)
    return [run(tower, pool[i : i + 1], policy) for i in range(POOL)]


@settings(max_examples=25, deadline=None)
@given(batch=st.lists(st.integers(0, POOL - 1), min_size=1, max_size=5))
def test_any_slot_any_neighbours(tower, pool, alone, batch):
    kept, features = run(tower, pool[batch], fk.FlowCut(8))
    for slot, image in enumerate(batch):
        assert kept[slot] == alone[image][0][0]
        assert_close(features[slot], alone[image][1][0], rtol=1e-9, atol=1e-9)


def test_batch_is_ragged_where_it_matters(tower, pool):
    """Else the tests above and below would show nothing."""
    with fk.patched(tower, fk.FlowCut(8), record=True), torch.no_grad():
        tower(pool)
        assert any(max(s.kept) - min(s.kept) >= 4 for s in fk.trace(tower).stages)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("poison", [1e4, -1e30])
def test_padding_content(tower, pool, alone, poison, monkeypatch, attention):
    """Padded rows of everything that is gathered hold garbage instead of zeros."""
    gather, poisoned = _rows.gather_tokens, []

    def gather_garbage(inputs, index, *args, **kwargs):
        outputs = gather(inputs, index, *args, **kwargs)
        absent = index < 0
        for x in outputs:
            if x.dtype != torch.bool:  # the mask
                x[absent] = poison if x.is_floating_point() else 1
        poisoned.append(int(absent.sum()))
        return outputs

    monkeypatch.setattr(_rows, "gather_tokens", gather_garbage)
    monkeypatch.setattr(tower.config, "_attn_implementation", attention)
    kept, features = run(tower, pool, fk.FlowCut(8))
    assert sum(poisoned) > 0
    tolerance = 1e-9 if attention == "sdpa" else 1e-3  # transformers' eager softmax is fp32
    for image in range(POOL):
        assert kept[image] == alone[image][0][0]
        assert_close(features[image], alone[image][1][0], rtol=tolerance, atol=tolerance)


def test_native_precision(tower, pool):
    """The default backend in fp32; the images' scores are no near-ties."""
    model, pixels, images = tower.float(), pool.float(), [4, 0, 2]
    try:
        kept, _ = run(model, pixels[images], fk.FlowCut(8))
        assert kept == [run(model, pixels[i : i + 1], fk.FlowCut(8))[0][0] for i in images]
    finally:
        tower.double()


def test_release_couples_counts(tower, pool):
    """The released code prunes by the largest count of the batch; a batch of one has only its own."""
    pixels = pool[[0, 5]]
    policy = fk.FlowCut.release(8)

    def counts(x):
        with fk.patched(tower, policy, record=True), torch.no_grad():
            tower(x)
            return [s.kept for s in fk.trace(tower).stages]

    single, both = [counts(pixels[i : i + 1]) for i in range(2)], counts(pixels)
    assert all(len(set(kept)) == 1 for kept in both), "never ragged"
    assert both[0][0] == min(single[0][0][0], single[1][0][0])
    assert single[0][0] != single[1][0], "the two images ask for the same count: the test is too weak"
