"""FastV, PyramidDrop and SparseVLM on made-up scores, words and rows, against slow transcriptions image by image."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import flowcut_kernels as fk
from flowcut_kernels.policies.base import DecoderView, PromptView

# Images of a batch: (tokens, share that stays, seed).
IMAGES = st.lists(st.tuples(st.integers(1, 150), st.floats(0, 1), st.integers(0, 10**6)), min_size=1, max_size=4)


def drawn(tokens: int, seed: int, levels: int = 6) -> Tensor:
    """Scores with ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, levels, (tokens,), generator=generator) / 8


def padded(rows: list[Tensor]) -> Tensor:
    """Rows of different length in one tensor; what nobody may read is NaN."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float("nan"))


def view(lengths: list[int], full: list[int], budgets: list[int], **given) -> DecoderView:
    never = pytest.fail
    parts = dict(layer=1, importance=None, scores=None, hidden=never, heads=never, attention=never, backend=None)
    return DecoderView(full=full, budgets=budgets, lengths=lengths, **parts | given)


def best(score: Tensor, count: int) -> list[int]:
    """The highest, of equals the first, in their order."""
    return sorted(sorted(range(len(score)), key=lambda i: (-score[i].item(), i))[:count])


@pytest.mark.parametrize(
    "choose",
    [fk.FastV(1).decoder_select, fk.PyramidDrop(1).entry_select, fk.SparseVLM(1).decoder_select],
    ids=["FastV", "PyramidDrop", "SparseVLM"],
)
@given(images=IMAGES)
def test_the_most_attended(choose, images):
    """Exactly as many as asked of every image, rising, of equals the first, whatever is next to it."""
    scores = [drawn(tokens, seed) for tokens, _, seed in images]
    lengths = [len(score) for score in scores]
    budgets = [max(round(share * n), 1) for n, (_, share, _) in zip(lengths, images, strict=True)]
    found = choose(view(lengths, lengths, budgets, attention=lambda: padded(scores)))
    assert found.lengths.tolist() == budgets
    for score, budget, index in zip(scores, budgets, found.index, strict=True):
        assert index[:budget].tolist() == best(score, budget) and (index[budget:] == -1).all()


def clustered(points: Tensor, score: Tensor, kept: int, recycled: int) -> dict[int, Tensor]:
    """SparseVLM's rows after a cut by their places: what stays, and means of clusters in their centres' places."""
    stay = best(score, kept)
    others = [i for i in range(len(score)) if i not in stay]
    count, x = int(len(others) / 10) + 1, points[others].double()
    assert count == recycled
    d = [[math.dist(a, b) / math.sqrt(len(a)) for b in x.tolist()] for a in x.tolist()]
    near = [sorted(row)[:count] for row in d]
    density = [math.exp(-sum(v * v for v in row) / len(row)) for row in near]
    farthest = max(map(max, d))
    rank = [
        density[i] * min((d[i][j] for j in range(len(x)) if density[j] > density[i]), default=farthest)
        for i in range(len(x))
    ]
    centres = sorted(sorted(range(len(x)), key=lambda i: (-rank[i], i))[:count])
    rows = {i: points[i] for i in stay}
    for centre in centres:
        members = [i for i in range(len(x)) if (i if i in centres else min(centres, key=lambda c: d[i][c])) == centre]
        rows[others[centre]] = x[members].mean(0)
    return dict(sorted(rows.items()))


@given(images=IMAGES)
def test_clusters(images):
    """Images of different sizes, some of which keep all that they have."""
    policy, generator = fk.SparseVLM(retain_ratio=0.25, layers=(1,), surplus=()), torch.Generator().manual_seed(7)
    # Of the tokens of an image those that go through layer 1 are left: k, and some of the others.
    full = [max(tokens, 2) for tokens, *_ in images]
    lengths = [policy.decoder_step(1, 4, n, n) or n for n in full]
    budgets = [min(policy.decoder_entry(2, 4, n, left) or left, left) for n, left in zip(full, lengths, strict=True)]
    scores = [drawn(n, seed) for n, (*_, seed) in zip(lengths, images, strict=True)]
    points = [torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in lengths]
    rows = padded([x.flatten() for x in points]).unflatten(1, (-1, 5))
    found = policy.entry_select(
        view(lengths, full, budgets, layer=2, scores=padded(scores), hidden=lambda: rows)
    )  # fmt: skip
    merged = found.merge(rows)
    assert found.lengths.tolist() == budgets
    for i, (budget, n) in enumerate(zip(budgets, full, strict=True)):
        kept = policy.budget(n)
        want = {j: points[i][j] for j in range(lengths[i])}
        if budget < lengths[i]:
            want = clustered(points[i], scores[i], kept, budget - kept)
        assert found.index[i, :budget].tolist() == list(want) and (found.index[i, budget:] == -1).all()
        assert_close(merged[i, :budget], torch.stack(list(want.values())))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(
    "samples", [[[(0, 3), (7, 2)], [(2, 4)]], [[(1, 5)], [(4, 3)], [(6, 4)]]], ids=["two", "three"]
)
def test_raters(samples, padding):
    """Words behind an image whose mean relevance exceeds the mean; of an image without any the prompt's last token."""
    length, generator = 12, torch.Generator().manual_seed(3)
    embeds = torch.randn(len(samples), length, 8, generator=generator, dtype=torch.float64)
    pad = 2  # of the second sample
    live = torch.ones(len(samples), length, dtype=torch.bool)
    live[1, slice(pad) if padding == "left" else slice(length - pad, length)] = False
    embeds[~live] = float("nan")
    last = torch.where(live, torch.arange(length), 0).amax(1)
    images = [(b, list(range(at, at + n))) for b, parts in enumerate(samples) for at, n in parts]
    words = live.clone()
    for b, columns in images:
        words[b, columns] = False
    columns = torch.nn.utils.rnn.pad_sequence([torch.tensor(c) for _, c in images], True, -1)
    prompt = PromptView(embeds, lambda: words, columns, torch.tensor([b for b, _ in images]), last, length)
    raters = fk.SparseVLM(4).decoder_raters(prompt)
    several = 0
    for (b, columns), row in zip(images, raters, strict=True):
        asked = [t for t in range(columns[-1] + 1, length) if words[b, t]]
        relevance = [(embeds[b, asked] @ embeds[b, v]).softmax(0) for v in columns]
        mean = sum(relevance) / len(columns)
        want = [t for t, m in zip(asked, mean, strict=True) if m > mean.mean()] or [int(last[b])]
        assert row[row >= 0].tolist() == want
        several += len(want) > 1
    assert several, "no image has several raters: the test is too weak"


@pytest.mark.parametrize("policy", [fk.AttentionTokens(9), fk.VisionZip(9, contextual_share=0, class_token=False)])
@torch.no_grad()
def test_ties_in_the_encoder(policy):
    """Where everything is attended to alike, the first stay."""
    tower = tiny.clip_tower()
    for layer in tower.encoder.layers:
        layer.self_attn.k_proj.weight.zero_()
    with fk.patched(tower, policy, record=True):
        tower(tiny.images(2))
        assert fk.trace(tower).stages[-1].indices.tolist() == [list(range(9))] * 2


@pytest.mark.parametrize(
    ("policy", "left"),  # SparseVLM's others are the next ones
    [(fk.FastV(9), 9), (fk.PyramidDrop(9, layers=(1,)), 9), (fk.SparseVLM(9, layers=(1,), surplus=()), 9 + 17)],
    ids=str,
)
@torch.no_grad()
def test_ties_in_the_language_model(policy, left):
    model = tiny.llava(text=dict(num_hidden_layers=4))
    model.model.language_model.layers[1].self_attn.k_proj.weight.zero_()
    ids = torch.tensor([[1, *[tiny.IMAGE] * tiny.PATCHES, 5, 6, 7]])
    with fk.patched(model, policy, record=True):
        model(input_ids=ids, pixel_values=tiny.images(1))
        (stage, *_) = fk.trace(model).stages
    assert stage.layer == 1 and stage.indices.tolist() == [list(range(left))]


def test_counts_of_tokens():
    """methods.md: what SparseVLM lets through a layer, and into the next."""
    policy = fk.SparseVLM(110)
    assert policy.decoder_step(2, 32, 576, 576) == 300 + int(0.3 * 276) + 1 == 383
    assert policy.decoder_entry(3, 32, 576, 383) == 300 + int(83 / 10) + 1 == 309
