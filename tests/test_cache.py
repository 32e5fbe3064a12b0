"""`compact_kv_cache` in the middle of a generation, against a decoder that recomputes everything from scratch."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import flowcut_kernels as fk

PROMPT, STEPS, NEXT, LIMIT = 19, 3, 4, 32
CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    pad_token_id=0,
    rope_parameters=dict(rope_type="default", rope_theta=100.0),  # quick enough to matter within a few positions
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).double().eval()
    model.set_attn_implementation("sdpa")  # eager computes its softmax in fp32
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(12)  # attention far from uniform, so that every dropped row shows
    return model


@torch.no_grad()
def oracle(model, old, new, keep, kept_positions, next_position):
    """Logits of the tokens `new` [n] after `old` [N], of whose keys they see the rows `keep` at `kept_positions`."""

    def rotated(x, positions):
        cos, sin = model.model.rotary_emb(x, positions[None])
        return apply_rotary_pos_emb(x[None], x[None], cos, sin)[0][0]

    def attend(query, key, value, mask):
        logits = query @ key.repeat_interleave(2, 0).mT / 8**0.5
        return logits.masked_fill(~mask, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 0)

    count, fresh = len(old), len(new)
    old_positions, new_positions = torch.arange(count), next_position + torch.arange(fresh)
    hidden = model.model.embed_tokens(torch.cat([old, new]))
    causal = torch.ones(count, count, dtype=torch.bool).tril()
    seen = torch.cat([torch.ones(fresh, len(keep)), torch.ones(fresh, fresh).tril()], 1).bool()
    for layer in model.model.layers:
        x, block = layer.input_layernorm(hidden), layer.self_attn
        query, key, value = (
            project(x).unflatten(-1, (-1, 8)).transpose(0, 1) for project in (block.q_proj, block.k_proj, block.v_proj)
        )
        before = attend(rotated(query[:, :count], old_positions), rotated(key[:, :count], old_positions),
                        value[:, :count], causal)  # fmt: skip
        keys = torch.cat([rotated(key[:, keep], kept_positions), rotated(key[:, count:], new_positions)], 1)
        values = torch.cat([value[:, keep], value[:, count:]], 1)
        after = attend(rotated(query[:, count:], new_positions), keys, values, seen)
        hidden = hidden + block.o_proj(torch.cat([before, after], 1).transpose(0, 1).flatten(1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden[count:]))


def prefill(model, cache, pads):
    """A left-padded prompt and a few greedy steps: the tokens that the cache holds, and their positions."""
    batch = len(pads)
    ids = torch.randint(1, 64, (batch, PROMPT))
    mask = (torch.arange(PROMPT) >= torch.tensor(pads)[:, None]).long()
    for _ in range(STEPS):
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        seen = cache.get_seq_length()
        logits = model(
            ids[:, int(seen) :], attention_mask=mask, position_ids=positions[:, int(seen) :], past_key_values=cache
        ).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, mask.new_ones(batch, 1)], 1)
    return ids[:, :-1], mask[:, :-1], positions


CACHES = {"dynamic": lambda: DynamicCache(config=CONFIG), "static": lambda: StaticCache(CONFIG, max_cache_len=LIMIT)}


@pytest.mark.parametrize("pads", [(0,), (0, 0), (0, 4, 2)], ids=["single", "ragged", "left_padded"])
@pytest.mark.parametrize("positions", ["keep", "repack"])
@pytest.mark.parametrize("kind", CACHES)
@torch.no_grad()
def test_generation_goes_on_as_if_the_rows_had_been_masked(model, kind, positions, pads):
    cache, batch = CACHES[kind](), len(pads)
    ids, mask, position_ids = prefill(model, cache, pads)
    rows = ids.shape[1]
    live = [10 - 2 * b for b in range(batch)]  # each sample its own number of kept rows
    keep = torch.full((batch, 10), -1)
    for b, n in enumerate(live):
        keep[b, :n] = pads[b] + torch.randperm(rows - pads[b])[:n].sort().values
    lengths = torch.tensor(live)
    found = fk.compact_kv_cache(
        cache, keep, lengths, positions=positions, rotary=model.model.rotary_emb, position_ids=position_ids
    )
    assert found is cache and int(cache.get_seq_length()) == 10

    start = mask.sum(1) if positions == "keep" else lengths
    tokens, steps = torch.randint(1, 64, (batch, NEXT)), []
    seen = (torch.arange(10) < lengths[:, None]).long()
    for i in range(NEXT):
        seen = torch.cat([seen, seen.new_ones(batch, 1)], 1)
        step = dict(attention_mask=seen, position_ids=start[:, None] + i, past_key_values=cache)
        steps.append(model(tokens[:, i : i + 1], **step).logits[:, 0])
    for b, (pad, n) in enumerate(zip(pads, live, strict=True)):
        rows_of_sample = keep[b, :n] - pad
        kept_positions = rows_of_sample if positions == "keep" else torch.arange(n)
        expected = oracle(model, ids[b, pad:], tokens[b], rows_of_sample, kept_positions, int(start[b]))
        everything = oracle(
            model, ids[b, pad:], tokens[b], torch.arange(rows - pad), torch.arange(rows - pad), rows - pad
        )
        got, scale = torch.stack(steps, 1)[b], expected.abs().max()
        assert (everything - expected).abs().max() > 0.01 * scale, "dropping these rows shows nothing"
        # transformers computes the cosines in fp32, so turning twice is not turning once beyond its precision.
        assert (got - expected).abs().max() < (1e-11 if positions == "keep" else 2e-5) * scale


@pytest.mark.parametrize("positions", ["keep", "repack"])
@torch.no_grad()
def test_generate_continues_with_the_cache(model, positions):
    """One sample: after "repack" transformers' own count of positions is right, as after a prompt of that length."""
    cache = DynamicCache(config=CONFIG)
    ids, _, _ = prefill(model, cache, (0,))
    keep = torch.arange(0, ids.shape[1], 2)[None]
    fk.compact_kv_cache(cache, keep, positions=positions, rotary=model.model.rotary_emb.inv_freq)
    if positions == "repack":
        step = model(torch.tensor([[7]]), past_key_values=cache).logits
        expected = oracle(model, ids[0], torch.tensor([7]), keep[0], torch.arange(keep.shape[1]), keep.shape[1])
        torch.testing.assert_close(step[0], expected, rtol=1e-4, atol=1e-4)
    longer = torch.cat([torch.zeros_like(keep), torch.tensor([[7] * (1 + (positions == "repack"))])], 1)
    out = model.generate(longer, past_key_values=cache, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape[1] == longer.shape[1] + 3
    assert cache.get_seq_length() == out.shape[1] - 1


def storage_bytes(tensors):
    return sum(x.untyped_storage().nbytes() for x in tensors)


@torch.no_grad()
def test_memory_of_a_dynamic_cache_falls_and_a_static_one_stays_where_it_is(model):
    keep = torch.tensor([[0, 3, 4, 9]])
    dynamic, static = CACHES["dynamic"](), CACHES["static"]()
    for cache in (dynamic, static):
        prefill(model, cache, (0,))
    before, rows = storage_bytes([x.keys for x in dynamic.layers]), dynamic.get_seq_length()
    addresses = [x.keys.data_ptr() for x in static.layers]
    rest = [x.values[:, :, 4:].clone() for x in static.layers]
    for cache in (dynamic, static):
        fk.compact_kv_cache(cache, keep)
    assert storage_bytes([x.keys for x in dynamic.layers]) * rows == before * 4
    assert addresses == [x.keys.data_ptr() for x in static.layers]
    assert all(torch.equal(a, x.values[:, :, 4:]) for a, x in zip(rest, static.layers, strict=True))


@pytest.mark.parametrize("layer_by_layer", [False, True])
@torch.no_grad()
def test_peak_memory(layer_by_layer):
    """What the allocator was asked for beyond what was there: the kept rows, or one layer's."""
    layers, rows, kept = 6, 4000, 1000
    # CPU memory that was there before the profiler would be freed unseen.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        cache, keep = DynamicCache(), torch.arange(0, rows, rows // kept)[None]
        for layer in range(layers):
            cache.update(torch.randn(1, 2, rows, 64), torch.randn(1, 2, rows, 64), layer)
        wanted = [x.keys[:, :, keep[0]] for x in cache.layers]
        with torch.profiler.record_function("compaction"):
            fk.compact_kv_cache(cache, keep, layer_by_layer=layer_by_layer)
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    start = next(event.start_ns() for event in events if event.name() == "compaction")
    changes = [x.nbytes() for x in events if x.name() == "[memory]" and x.start_ns() >= start]
    peak, left = max(itertools.accumulate(changes)), sum(changes)
    layer, slack = 2 * kept * 2 * 64 * 4, 32 * keep.nbytes  # what the checks of keep need
    assert abs(left - layers * (layer - rows // kept * layer)) <= slack
    assert peak <= (layer if layer_by_layer else layers * layer) + slack
    assert all(torch.equal(x.keys, y) for x, y in zip(cache.layers, wanted, strict=True))


def test_raw_tensors():
    keys, values = ([torch.randn(2, 3, n, 8) for n in (9, 7)] for _ in range(2))
    keep = torch.tensor([[0, 2, 6], [1, 5, -1]])
    new_keys, new_values = fk.compact_kv_cache((keys, values), keep)
    for old, new in zip(keys + values, new_keys + new_values, strict=True):
        assert torch.equal(new[0], old[0][:, keep[0]])
        assert torch.equal(new[1, :, :2], old[1][:, keep[1, :2]])
        assert (new[1, :, 2] == 0).all()
    turned, _ = fk.compact_kv_cache((keys, values), keep, positions="repack", rotary=torch.ones(4))
    assert torch.equal(turned[0][0, :, 0], keys[0][0, :, 0])  # row 0 stays at position 0
    assert not torch.equal(turned[0][0, :, 1], keys[0][0, :, 2])


def filled(cache):
    for layer in range(CONFIG.num_hidden_layers):
        cache.update(torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8), layer)
    return cache


def offloaded(cache):
    cache.offloading = True  # transformers itself needs a GPU to say so
    return cache


def shortened(cache):
    cache.layers[-1].keys, cache.layers[-1].values = torch.randn(2, 1, 2, 2, 8)
    return cache


class Frequencies:
    def __init__(self, rope_type):
        self.rope_type, self.inv_freq = rope_type, torch.ones(4)


SLIDING = LlamaConfig(**(CONFIG.to_dict() | dict(sliding_window=4, layer_types=["sliding_attention"] * 3)))
KEEP = torch.tensor([[0, 2, 3]])
BAD = {
    "positions": (lambda: filled(CACHES["dynamic"]()), dict(positions="drop"), "positions='drop' is unknown"),
    "no rotary": (lambda: filled(CACHES["dynamic"]()), dict(positions="repack"), "needs rotary"),
    "rotary": (lambda: filled(CACHES["dynamic"]()), dict(positions="repack", rotary=object()), "rotary must be"),
    "dynamic rope": (
        lambda: filled(CACHES["dynamic"]()),
        dict(positions="repack", rotary=Frequencies("dynamic")),
        "change with the length",
    ),
    "position_ids": (
        lambda: filled(CACHES["dynamic"]()),
        dict(positions="repack", rotary=torch.ones(4), position_ids=torch.zeros(3, 1, 6, dtype=torch.int64)),
        "position_ids must be",
    ),
    "few position_ids": (
        lambda: filled(CACHES["dynamic"]()),
        dict(positions="repack", rotary=torch.ones(4), position_ids=torch.zeros(1, 2, dtype=torch.int64)),
        "position_ids has 2 columns",
    ),
    "list of position_ids": (
        lambda: filled(CACHES["dynamic"]()),
        dict(positions="repack", rotary=torch.ones(4), position_ids=[[0, 1, 2]]),
        "position_ids must be a tensor .* got list",
    ),
    "list of rows": (lambda: filled(CACHES["static"]()), dict(keep=[[0, 2]]), "keep must be an int64 tensor .* a list"),
    "keep of another rank": (
        lambda: filled(CACHES["dynamic"]()),
        dict(keep=KEEP[0], positions="repack", rotary=torch.ones(4), position_ids=torch.arange(6)[None]),
        r"keep must be an int64 tensor \[batch, kept\], got torch.int64 \(3,\)",
    ),
    "list of lengths": (lambda: filled(CACHES["dynamic"]()), dict(lengths=[3]), "lengths must be .* a list"),
    "another batch": (lambda: filled(CACHES["dynamic"]()), dict(keep=KEEP.expand(2, -1)), r"keys\[0\] must be \[2, 2"),
    "unknown": (lambda: torch.zeros(3), {}, "cache is a Tensor"),
    "offloaded": (lambda: offloaded(filled(CACHES["dynamic"]())), {}, "cache is offloaded"),
    "encoder and decoder": (
        lambda: EncoderDecoderCache(filled(CACHES["dynamic"]()), DynamicCache()), {}, "EncoderDecoderCache without",
    ),
    "empty": (CACHES["dynamic"], {}, "layer 0 of cache is empty|without layers"),
    "sliding": (lambda: filled(DynamicCache(config=SLIDING)), {}, "layer 0 of cache is a DynamicSlidingWindowLayer"),
    "beyond": (lambda: filled(CACHES["dynamic"]()), dict(keep=KEEP + 3), r"keep\[0, 2\] = 6"),
    "shorter layer": (lambda: shortened(filled(CACHES["dynamic"]())), dict(layer_by_layer=True), "shortest layer has"),
    "beyond the room": (
        lambda: filled(CACHES["static"]()),
        dict(keep=torch.nn.functional.pad(KEEP, (0, LIMIT), value=-1)),
        f"keep has {LIMIT + 3} columns, but the static cache has {LIMIT} rows",
    ),
    "not filled": (lambda: filled(CACHES["static"]()), dict(keep=KEEP + 3), "the cache holds 6 rows"),
    "descending": (lambda: filled(CACHES["static"]()), dict(keep=KEEP.flip(1)), r"keep\[0, 1\] = 2"),
    "lengths": (lambda: filled(CACHES["static"]()), dict(lengths=torch.tensor([2])), "disagrees with keep"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_leaves_the_cache_as_it_was(make, arguments, message):
    cache = make()
    layers = [x for x in getattr(cache, "layers", []) if x.is_initialized]
    before = [(x.keys, x.keys.clone(), x.values.clone(), int(x.get_seq_length())) for x in layers]
    with pytest.raises(ValueError, match=message):
        fk.compact_kv_cache(cache, **(dict(keep=KEEP) | arguments))
    for layer, (same, keys, values, rows) in zip(layers, before, strict=True):
        assert layer.keys is same and torch.equal(same, keys) and torch.equal(layer.values, values)
        assert int(layer.get_seq_length()) == rows
