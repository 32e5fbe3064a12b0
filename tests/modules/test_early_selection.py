"""Exact early selection: the same as pruning after the layer, for less arithmetic.

The oracle below is methods.md section 1.1 word by word, with N x N attention, one image at a time and nothing of the
package.
"""

from __future__ import annotations

import math
import weakref

import pytest
import tiny
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import flowcut_kernels as fk

COSINE, SCALED, UNSCALED = "cosine", "scaled_softmax", "softmax"


def layer_statistics(attention, normed, protect, anchor, relevance, value_norm):
    """Attention, relevance, norm of the patches of one image [N, D], from full attention."""
    heads, dim = attention.num_heads, attention.head_dim

    def split(projection):
        return projection(normed).view(-1, heads, dim).transpose(0, 1)  # [H, N, d]

    q, k, v = split(attention.q_proj), split(attention.k_proj), split(attention.v_proj)
    if anchor == "cls":
        q_anchor, v_anchor = q[:, 0], v[:, 0]
    else:
        q_anchor, v_anchor = q.mean(1), v.mean(1)
    rows = torch.cat([q_anchor[:, None], q], 1) @ k.mT / dim**0.5
    a = rows.softmax(-1)[:, 0].mean(0)
    products = torch.einsum("hd,hnd->hn", v_anchor, v)
    if relevance == COSINE:
        flat, flat_anchor = v.transpose(0, 1).flatten(1), v_anchor.flatten()
        r = (1 + flat @ flat_anchor / (flat.norm(dim=1) * flat_anchor.norm())) / 2
    else:
        r = (products / (dim**0.5 if relevance == SCALED else 1)).softmax(-1).mean(0)
    g = (v.transpose(0, 1).flatten(1) if value_norm == "full" else v.mean(0)).abs().sum(1)
    return a[protect:], r[protect:], g[protect:]


@torch.no_grad()
def prune_after_layer(model, pixels, policy, feature_layer, protect, anchor):
    """Hidden states after every layer, per image, and kept patches per pruning layer, per image."""
    embedded = model.embeddings(pixels)
    if hasattr(model, "pre_layrnorm"):
        embedded = model.pre_layrnorm(embedded)
    hidden = [x[None] for x in embedded]
    full = hidden[0].shape[1] - protect
    target = policy.target_tokens
    alive = [torch.arange(full) for _ in hidden]
    history = [None] * len(hidden)
    states, kept = [], {}
    last = feature_layer - 1
    for number, layer in enumerate(model.encoder.layers):
        normed = [layer.layer_norm1(x)[0] for x in hidden]
        after = [layer(x, None) for x in hidden]
        remaining = last - number
        if remaining >= 0 and any(len(ids) > target for ids in alive):
            counts = []
            for i, x in enumerate(normed):
                a, r, g = layer_statistics(layer.self_attn, x, protect, anchor, policy.relevance, policy.value_norm)
                p = a / a.sum()
                weight = dict(zip(("attention", "relevance", "value_norm"), policy.criteria_weights, strict=True))
                terms = dict(attention=p, relevance=r / r.sum())
                terms = [weight[c] * terms[c] for c in policy.criteria if c in terms]
                score = sum(terms) if terms else torch.ones_like(g)
                if "value_norm" in policy.criteria:
                    score = score * g ** weight["value_norm"]
                if policy.cumulative and history[i] is not None:
                    w = policy.history_weight
                    score = w * history[i] + (1 - w) * score
                history[i] = score
                n = len(alive[i])
                h = -(p * p.log()).sum() / math.log(n)
                share = 1.0 if remaining == 0 else (1 - h**policy.entropy_exponent) / remaining**0.5
                counts.append(round(float((n - target) * share)))
            if remaining % policy.interval == 0:
                if policy.batch == "max":
                    counts = [max(counts)] * len(counts)
                for i, count in enumerate(counts):
                    n = len(alive[i])
                    if not policy.adaptive:
                        cuts = last // policy.interval + 1
                        done = cuts - remaining // policy.interval
                        count = n - round(full * (target / full) ** (done / cuts))
                    keep = max(n - max(count, 0), min(target, n))
                    chosen = sorted(sorted(range(n), key=lambda j: (-float(history[i][j]), j))[:keep])
                    alive[i], history[i] = alive[i][chosen], history[i][chosen]
                    rows = list(range(protect)) + [protect + j for j in chosen]
                    after[i] = after[i][:, rows]
                kept[number] = [ids.clone() for ids in alive]
        hidden = after
        states.append([x[0] for x in hidden])
    return states, kept


VARIANTS = {
    "default": fk.FlowCut(8),
    "release": fk.FlowCut.release(8),
    "scaled_softmax": fk.FlowCut(8, relevance=SCALED),
    "attention only": fk.FlowCut(8, criteria=("attention",)),
    "relevance only": fk.FlowCut(8, criteria=("relevance",)),
    "norm only": fk.FlowCut(8, criteria=("value_norm",)),
    "no norm": fk.FlowCut(8, criteria=("attention", "relevance")),
    "weights": fk.FlowCut(8, criteria_weights=(0.3, 2.0, 1.7)),
    "exponent": fk.FlowCut(8, entropy_exponent=3.5),
    "not cumulative": fk.FlowCut(8, cumulative=False),
    "history 0.9": fk.FlowCut(8, history_weight=0.9),
    "history 0": fk.FlowCut(8, history_weight=0.0),
    "interval 1": fk.FlowCut(8, interval=1),
    "interval 4": fk.FlowCut(8, interval=4),
    "fixed ratio": fk.FlowCut(8, adaptive=False),
    "mean anchor": fk.FlowCut(8, anchor="mean"),
    "budget 1": fk.FlowCut(1),
    "budget all but one": fk.FlowCut(tiny.PATCHES - 1),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("kind", "variant"),
    [("clip", v) for v in VARIANTS] + [("siglip", v) for v in ("default", "release", "interval 1", "fixed ratio")],
)
def test_equals_pruning_after_the_layer(kind, variant, attention):
    policy, protect = VARIANTS[variant], int(kind == "clip")
    model = tiny.TOWERS[kind](attention).double()
    pixels = tiny.images(3, seed=5).double()
    pixels[1] *= 0.2  # a flatter image keeps more at first: the batch is ragged
    feature_layer = tiny.LAYERS - 1 - protect
    anchor = "mean" if policy.anchor == "mean" or not protect else "cls"
    want, kept = prune_after_layer(model, pixels, policy, feature_layer, protect, anchor)
    with fk.patched(model, policy, record=True), torch.no_grad():
        output = model(pixels, output_hidden_states=True)
        stages = fk.trace(model).stages

    assert [s.layer for s in stages] == list(kept)
    for stage in stages:
        assert stage.kept == [len(ids) for ids in kept[stage.layer]] == stage.lengths.tolist()
        for row, ids in zip(stage.indices, kept[stage.layer], strict=True):
            assert row[: len(ids)].tolist() == ids.tolist() and (row[len(ids) :] == -1).all()
    assert stages[-1].kept == [policy.target_tokens] * 3
    if variant == "default":
        assert any(len(set(s.kept)) > 1 for s in stages), "no ragged stage: the test is too weak"
    tolerance = 1e-10 if attention == "sdpa" else 1e-5  # transformers' eager softmax is fp32 at best
    for got, rows in zip(output.hidden_states[1:], want, strict=True):
        assert got.shape[1] == max(len(x) for x in rows)
        for b, x in enumerate(rows):  # of a ragged batch the rest of the rows is padding
            assert_close(got[b, : len(x)], x, rtol=tolerance, atol=tolerance)


def rows_through(model):
    """Hooks that count the token rows each projection of each layer sees."""
    seen: dict[tuple[int, str], int] = {}
    handles = []

    def count(key):
        def hook(module, args, output):
            seen[key] = seen.get(key, 0) + args[0].shape[:-1].numel()

        return hook

    for i, layer in enumerate(model.encoder.layers):
        parts = {n: getattr(layer.self_attn, f"{n}_proj") for n in "qkv"} | dict(
            out=layer.self_attn.out_proj, mlp=layer.mlp.fc1
        )
        handles += [part.register_forward_hook(count((i, name))) for name, part in parts.items()]
    return seen, handles


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_dropped_tokens_cost_nothing(kind):
    model, protect = tiny.TOWERS[kind]("eager"), int(kind == "clip")
    config, pixels = model.config, tiny.images(1, seed=5)
    with torch.no_grad(), FlopCounterMode(display=False) as stock:
        model(pixels)
    with fk.patched(model, fk.FlowCut(8), record=True, backend="reference"), torch.no_grad():
        seen, handles = rows_through(model)
        with FlopCounterMode(display=False) as pruned:
            model(pixels)
        cuts = {s.layer: s.kept[0] + protect for s in fk.trace(model).stages}
        scored = set(fk.trace(model).entropy)
    for handle in handles:
        handle.remove()

    width, inner, tokens = config.hidden_size, config.intermediate_size, tiny.PATCHES + protect
    formula = saved = 0
    for i in range(config.num_hidden_layers):
        kept = cuts.get(i, tokens)
        # The anchor's own row is projected apart at a cut, and the mean token's at every scored layer.
        own = i in cuts if protect else i in scored
        value_anchor = 0 if protect else int(i in scored)
        assert seen[i, "k"] == tokens
        assert seen[i, "v"] == tokens + value_anchor
        assert seen[i, "q"] == kept + own
        assert seen[i, "out"] == seen[i, "mlp"] == kept
        projections = 2 * width * width * (seen[i, "q"] + seen[i, "k"] + seen[i, "v"] + kept)
        formula += projections + 2 * 2 * kept * tokens * width + 2 * 2 * kept * width * inner
        saved += tokens - kept
        tokens = kept
    assert saved > 40
    stock, pruned = stock.get_total_flops(), pruned.get_total_flops()
    rest = pruned - formula  # embeddings and pooling, as in the stock model, and the statistics of one anchor
    head = stock - sum(
        8 * n * width * width + 4 * n * n * width + 4 * n * width * inner
        for n in [tiny.PATCHES + protect] * config.num_hidden_layers
    )
    statistics = len(scored) * 8 * (tiny.PATCHES + protect) * width
    assert rest <= head + statistics
    assert pruned < 0.75 * stock


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_layers_after_the_feature_layer(kind):
    """They run on a bare tower and never inside a VLM."""
    model = tiny.llava(kind, vision_feature_layer=-3, vision_feature_select_strategy="full")
    tower = model.model.vision_tower
    pixels = tiny.images(2)
    with fk.patched(model, fk.FlowCut(8)), torch.no_grad():
        seen, handles = rows_through(tower)
        with FlopCounterMode(display=False) as flops:
            features = model.get_image_features(pixels).pooler_output
    assert {i for i, _ in seen} == set(range(tiny.LAYERS - 2))
    assert len(features) == 2 and features[0].shape[0] == 8 + (kind == "clip")
    seen.clear()
    with (
        fk.patched(tower, fk.FlowCut(8, feature_layer=-3)),
        torch.no_grad(),
        FlopCounterMode(display=False) as bare,
    ):
        output = tower(pixels, output_hidden_states=True)
    assert {i for i, _ in seen} == set(range(tiny.LAYERS))
    for handle in handles:
        handle.remove()
    assert flops.get_total_flops() < bare.get_total_flops()
    # The VLM's features are what its projector makes of the bare tower's hidden state.
    want = model.model.multi_modal_projector(output.hidden_states[-3])
    assert_close(torch.stack(list(features)), want, rtol=0, atol=1e-6)


def test_a_module_swapped_after_patching_counts():
    """Adapters and quantised projections are put in place of the stock ones at any time."""
    model, pixels = tiny.clip_tower(), tiny.images(2)
    with fk.patched(model, fk.FlowCut(target_tokens=5)), torch.no_grad():
        before = model(pixels).last_hidden_state
        for layer in model.encoder.layers:
            layer.self_attn.v_proj = torch.nn.Linear(layer.self_attn.embed_dim, layer.self_attn.embed_dim)
        swapped = model(pixels).last_hidden_state
    with fk.patched(model, fk.FlowCut(target_tokens=5)), torch.no_grad():
        assert torch.equal(swapped, model(pixels).last_hidden_state)
    assert not torch.equal(before, swapped)


def test_a_norm_with_a_forward_of_its_own_counts():
    """Offloading and other wrappers replace an instance's forward: kept rows are not normed behind its back."""
    model, pixels = tiny.clip_tower(), tiny.images(2)
    for layer in model.encoder.layers:
        norm = layer.layer_norm1
        norm.forward = lambda x, norm=norm: 0.5 * type(norm).forward(norm, x)
    model, pixels = model.double(), pixels.double()
    want, _ = prune_after_layer(model, pixels, fk.FlowCut(8), tiny.LAYERS - 2, 1, "cls")
    with fk.patched(model, fk.FlowCut(8)), torch.no_grad():
        got = model(pixels).last_hidden_state
    assert_close(got, torch.stack(want[-1]), rtol=1e-9, atol=1e-9)


def test_nothing_of_the_attention_lives_during_the_mlp():
    """Peak memory: queries, keys, values and normed rows are gone before the wide MLP runs, as in the stock layer."""
    model, pixels = tiny.clip_tower(), tiny.images(2)
    made, alive = [], []
    for layer in model.encoder.layers:
        for module in (layer.layer_norm1, layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            module.register_forward_hook(lambda _, args, out: made.append(weakref.ref(out.untyped_storage())))
        layer.mlp.register_forward_pre_hook(lambda *_: alive.append(sum(x() is not None for x in made)))
    with fk.patched(model, fk.FlowCut(8)), torch.no_grad():
        model(pixels)
    assert made and alive == [0] * tiny.LAYERS
