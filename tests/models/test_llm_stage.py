"""Pruning inside the language model against a slow oracle: the pruned forward pass in fp64, from scratch, uncached.

The oracle is the decoder's arithmetic by hand, one unpadded sample at a time. It takes the embeddings that the patched
model made of a prompt, and drops rows after the layers that cut.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from dataclasses import dataclass

import pytest
import tiny
import torch
import transformers
from test_llava import IMG, inputs_for
from tiny import IMAGE
from torch import Tensor
from torch.nn.functional import cross_entropy, silu
from torch.testing import assert_close
from transformers import (
    AttentionInterface,
    DynamicCache,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
)
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

import flowcut_kernels as fk
from flowcut_kernels.modules import decoder
from flowcut_kernels.policies.base import DecoderView, Selection

# transformers' RMSNorm and the logits of generate are fp32 in an fp64 model.
CLOSE = {torch.float64: dict(rtol=1e-5, atol=1e-5), torch.float32: dict(rtol=2e-3, atol=2e-3)}
LEFT = 24  # visual tokens the encoder leaves
DECODERS = {
    "llama gqa": (LlamaConfig, {}),
    "llama mha": (LlamaConfig, dict(num_key_value_heads=4)),
    "qwen2": (Qwen2Config, {}),
    "mistral": (MistralConfig, dict(sliding_window=None, head_dim=16)),
    "qwen3": (Qwen3Config, dict(head_dim=16)),
}
PROMPTS = {
    "one": [[1, IMG, 5, 6, 7]],
    "four": [[1, IMG, 5, 6, 7], [1, 9, IMG, 8], [IMG, 3], [1, 4, 5, 6, IMG, 7, 8]],
    "several images": [[1, IMG, 4, 5, IMG, 6], [1, IMG, 7, IMG, 8, 9, 10]],
    "one, two or none": [[1, IMG, 5], [1, 11, 12, 13], [1, 9, IMG, IMG, 8, 7]],
    "image last": [[1, 5, IMG], [1, IMG]],
}


@dataclass(frozen=True, kw_only=True)
class Stages(fk.FlowCut):
    """FlowCut's choice at any decoder layers: (layer, tokens kept)."""

    stages: tuple[tuple[int, int], ...] = ()

    def encoder_budget(self, tokens: int, tiles: int = 1) -> int:
        return LEFT

    def decoder_step(self, layer: int, layers: int, tokens: int, left: int) -> int | None:
        return dict(self.stages).get(layer)


@dataclass(frozen=True, kw_only=True)
class First(Stages):
    """Keeps the first tokens: for what does not depend on the choice."""

    def decoder_select(self, view: DecoderView) -> Selection:
        images, kept = len(view.budgets), view.budgets[0]
        index = torch.arange(kept).expand(images, -1)
        return Selection(index, torch.full((images,), kept, dtype=torch.int32))


def model_of(decoder: str = "llama gqa", attention: str = "sdpa", dtype=torch.float64):
    config, text = DECODERS[decoder]
    return tiny.llava(attention=attention, text_config=config, text=dict(num_hidden_layers=4) | text).to(dtype)


def spread(stages=((1, 10), (2, 6)), **settings) -> Stages:
    return Stages(target_tokens=stages[-1][1], stages=stages, **settings)


def given(rows: list, side: str = "left", dtype=torch.float64) -> dict:
    inputs = inputs_for(rows, side)
    return {name: x.to(dtype) if name == "pixel_values" else x for name, x in inputs.items()}


def rms(x: Tensor, norm) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight


def rotated(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """[n, heads, d] turned by half-split rotary embeddings."""
    half = x.shape[-1] // 2
    # transformers computes the frequencies in fp32
    frequencies = 1.0 / theta ** (torch.arange(0, 2 * half, 2, dtype=torch.float32) / (2 * half))
    angle = (positions.float()[:, None] * frequencies)[:, None]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@dataclass
class Image:
    columns: list[int]
    ask: int  # column of the instruction's last token
    cuts: dict[int, list[int]] | None = None  # columns that a layer leaves, where that is known


class Oracle:
    """Logits [L', V] of what is left of one sample, and the kept columns by layer."""

    def __init__(self, model, policy: Stages) -> None:
        self.model, self.policy = copy.deepcopy(model).double(), policy
        self.text, self.close = self.model.model.language_model, CLOSE.get(model.dtype)

    def __call__(self, embeds: Tensor, images: list[Image], turns: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """`turns`: columns after each see only what that much of the sequence kept (a compacted cache)."""
        reached = [
            self(embeds[:end], [image for image in images if min(image.columns, default=end) < end], turns[:turn])[1]
            for turn, end in enumerate(turns)
        ]
        x, columns = embeds, torch.arange(len(embeds))
        positions = columns
        images = [Image(list(image.columns), image.ask, image.cuts) for image in images]
        for number, layer in enumerate(self.text.layers):
            attention = layer.self_attn
            normed = rms(x, layer.input_layernorm)
            q, k, v = (
                projection(normed).unflatten(-1, (-1, attention.head_dim))
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            if hasattr(attention, "q_norm"):
                q, k = rms(q, attention.q_norm), rms(k, attention.k_norm)
            q, k = rotated(q, positions), rotated(k, positions)
            group = q.shape[1] // k.shape[1]
            logits = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) / attention.head_dim**0.5
            future = torch.ones(len(x), len(x)).triu(1).bool()
            for end, left in zip(turns, reached, strict=True):
                future |= (columns >= end)[:, None] & (columns < end) & ~torch.isin(columns, left)
            weights = logits.masked_fill(future, -torch.inf).softmax(-1)
            mixed = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1))
            x = x + attention.o_proj(mixed.flatten(1))
            normed = rms(x, layer.post_attention_layernorm)
            x = x + layer.mlp.down_proj(silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed))
            keep = dict(self.policy.stages).get(number)
            if keep is None:
                continue
            live = torch.ones(len(x), dtype=torch.bool)
            for image in images:
                row = {int(c): i for i, c in enumerate(columns)}
                at = torch.tensor([row[c] for c in image.columns], dtype=torch.long)
                if image.cuts and number in image.cuts:
                    kept = torch.tensor([i for i, c in enumerate(image.columns) if c in image.cuts[number]]).long()
                else:
                    kept = self.choose(q[row[image.ask]], k[at], v[at], v[row[image.ask]], keep).sort().values
                live[at] = False
                live[at[kept]] = True
                image.columns = [image.columns[i] for i in kept]
                if image.cuts is not None:
                    image.cuts[number] = image.columns
            x, columns, positions = x[live], columns[live], positions[live]
            if self.policy.positions == "renumber":
                positions = torch.arange(len(x))
        return self.model.lm_head(rms(x, self.text.norm)), columns

    def kept(self, embeds: Tensor, images: list[Image]) -> list[Image]:
        """The images with what each cut leaves of them, so that it need not be decided again."""
        done = [Image(list(image.columns), image.ask, {}) for image in images]
        self(embeds, done)
        return done

    def choose(self, query: Tensor, key: Tensor, value: Tensor, anchor: Tensor, keep: int) -> Tensor:
        if isinstance(self.policy, First):
            return torch.arange(keep)
        group, d = query.shape[0] // key.shape[1], query.shape[-1]
        attention = (torch.einsum("hd,nhd->hn", query, key.repeat_interleave(group, 1)) / d**0.5).softmax(-1).mean(0)
        if self.policy.relevance == "cosine":
            relevance = (1 + torch.cosine_similarity(value.flatten(1), anchor.flatten()[None], dim=1)) / 2
        else:
            relevance = (torch.einsum("hd,nhd->hn", anchor, value) / d**0.5).softmax(-1).mean(0)
        norm = value.flatten(1) if self.policy.value_norm == "full" else value.mean(1)
        score = (attention / attention.sum() + relevance / relevance.sum()) * norm.abs().sum(1)
        return score.topk(keep).indices


class Inside:
    """The embeddings that the language model is given, by call."""

    def __init__(self, model) -> None:
        self.embeds: list[Tensor] = []
        self.handle = model.model.language_model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module, args, kwargs) -> None:
        self.embeds.append(kwargs["inputs_embeds"].detach().double())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


def shrunk(row: list, left: int = LEFT) -> tuple[list[int], list[Image]]:
    """ids of a row as the language model sees it, and its images."""
    ids, images = [], []
    for token in row:
        if token == IMG:
            images.append(Image(list(range(len(ids), len(ids) + left)), -1))
        ids += [IMAGE] * left if token == IMG else [token]
    for image in images:
        image.ask = max(i for i, token in enumerate(ids) if token != IMAGE)
    return ids, images


def prompts_of(inside: Inside, rows: list, side: str = "left") -> list[tuple[Tensor, list[Image]]]:
    """Embeddings of every unpadded sample of the first call, and its images."""
    samples = []
    copies = len(inside.embeds[0]) // len(rows)  # beams
    for embeds, row in zip(inside.embeds[0][::copies], rows, strict=True):
        ids, images = shrunk(row)
        samples.append((embeds[-len(ids) :] if side == "left" else embeds[: len(ids)], images))
    return samples


def check_steps(
    oracle: Oracle,
    samples,
    new: Tensor,
    logits: tuple[Tensor, ...],
    compacted: bool = False,
    turns: tuple[int, ...] = (),
) -> None:
    """logits [B, V] of every step against the oracle's, given the tokens [B, steps] that were written.

    `turns`: columns at which the cache was compacted before, where `compacted`.
    """
    table = oracle.model.get_input_embeddings().weight
    for b, (embeds, images) in enumerate(samples):
        for step, got in enumerate(logits):
            whole = torch.cat([embeds, table[new[b, :step]]])
            wanted, _ = oracle(whole, images, (*turns, len(embeds)) if compacted else ())
            assert_close(got[b].double(), wanted[-1], **oracle.close)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("decoder", DECODERS)
@torch.no_grad()
def test_every_step_of_generate(decoder, prompt, attention, positions):
    # In fp64 transformers' own eager attention makes NaN of padded rows.
    dtype = torch.float32 if attention == "eager" else torch.float64
    model, policy, rows = model_of(decoder, attention, dtype), spread(positions=positions), PROMPTS[prompt]
    oracle = Oracle(model, policy)
    with Inside(model) as inside, fk.patched(model, policy):
        out = model.generate(
            **given(rows, dtype=dtype), max_new_tokens=4, min_new_tokens=4, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    check_steps(oracle, prompts_of(inside, rows), out.sequences[:, -4:], out.logits)


@pytest.mark.parametrize("stages", [((0, 5),), ((3, 5),), ((0, 12), (1, 9), (3, 2)), ((1, LEFT),)], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prompt", PROMPTS)
@torch.no_grad()
def test_forward(prompt, side, stages):
    model, policy, rows = model_of(), spread(stages), PROMPTS[prompt]
    oracle = Oracle(model, policy)
    with Inside(model) as inside, fk.patched(model, policy):
        out = model(**given(rows, side))
    wanted = [oracle(*sample) for sample in prompts_of(inside, rows, side)]
    longest = max(len(logits) for logits, _ in wanted)
    if len({sum(x == IMG for x in row) for row in rows}) > 1 or len(rows) == 1:
        assert out.logits.shape[1] == longest  # otherwise padding that was there stays
    for got, (logits, _) in zip(out.logits, wanted, strict=True):
        live = got[-len(logits) :] if side == "left" else got[: len(logits)]
        assert_close(live, logits, **oracle.close)


ROWS = PROMPTS["several images"]
GREEDY = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)


def generated(model, policy, rows, /, compact_cache=False, **options):
    """What generate returns, the embeddings it was given, and an oracle."""
    oracle = Oracle(model, policy)
    with Inside(model) as inside, fk.patched(model, policy, compact_cache=compact_cache):
        out = model.generate(**given(rows), return_dict_in_generate=True, output_logits=True, **options)
    return out, prompts_of(inside, rows), oracle


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize(
    "cache",
    ["none", "dynamic", "static", "static qwen2", "lazy dynamic", "prompt lookup", "sampling"],
    ids=lambda x: x.replace(" ", "-"),
)
@torch.no_grad()
def test_generate_with(cache, positions):
    rows = ROWS[:1] if cache == "prompt lookup" else PROMPTS["one, two or none"] if "static" in cache else ROWS
    options = (
        GREEDY
        | {
            "none": dict(use_cache=False),
            "dynamic": dict(past_key_values=DynamicCache()),
            "static": dict(cache_implementation="static"),
            "static qwen2": dict(cache_implementation="static"),
            "lazy dynamic": dict(past_key_values=DynamicCache(config=model_of().config.get_text_config())),
            "prompt lookup": dict(prompt_lookup_num_tokens=2),
            "sampling": dict(do_sample=True, temperature=3.0),
        }[cache]
    )
    torch.manual_seed(0)
    model = model_of("qwen2" if "qwen2" in cache else "llama gqa")
    out, samples, oracle = generated(model, spread(positions=positions), rows, **options)
    check_steps(oracle, samples, out.sequences[:, -4:], out.logits)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("prompt", PROMPTS)
@torch.no_grad()
def test_compacted_cache(prompt, cache, positions):
    rows, model = PROMPTS[prompt], model_of()
    cache = (
        DynamicCache() if cache == "dynamic" else StaticCache(config=model.config.get_text_config(), max_cache_len=200)
    )
    out, samples, oracle = generated(
        model,
        spread(positions=positions),
        rows,
        compact_cache=True,
        past_key_values=cache,
        disable_compile=True,
        **GREEDY,
    )
    check_steps(oracle, samples, out.sequences[:, -4:], out.logits, compacted=True)
    lengths = {layer.rows() for layer in cache.layers}
    assert len(lengths) == 1
    most = max(sum(x == IMG for x in row) * 6 + sum(x != IMG for x in row) for row in rows)
    if len(rows) == 1 or prompt == "one, two or none":
        assert lengths == {most + 3}
    whole = max(len(shrunk(row)[0]) for row in rows)
    assert {int(cache.get_seq_length(i)) for i in range(4)} == {whole + 3}


@pytest.mark.parametrize("compact_cache", [False, True])
@pytest.mark.parametrize("prompt", ["one", "one, two or none"])
@torch.no_grad()
def test_beams(prompt, compact_cache):
    rows = PROMPTS[prompt]
    out, samples, oracle = generated(
        model_of(), spread(), rows, compact_cache=compact_cache, num_beams=3, num_return_sequences=2, max_new_tokens=5,
        min_new_tokens=5, length_penalty=0.0, output_scores=True,
    )  # fmt: skip
    table = oracle.model.get_input_embeddings().weight
    for b, (sequence, score) in enumerate(zip(out.sequences, out.sequences_scores, strict=True)):
        embeds, images = samples[b // 2]
        new = sequence[-5:]
        whole = torch.cat([embeds, table[new[:-1]]])
        # The prompt's last token has read the whole prompt, compacted or not.
        logits = oracle(whole, images, (len(embeds),) if compact_cache else ())[0][-5:]
        assert_close(score.double(), logits.log_softmax(-1).gather(1, new[:, None]).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["generate", "forward"])
@pytest.mark.parametrize(
    "cache", [DynamicCache, lambda: StaticCache(config=model_of().config.get_text_config(), max_cache_len=400)]
)
@pytest.mark.parametrize("compact_cache", [False, True])
@pytest.mark.parametrize("positions", ["keep", "renumber"])
@torch.no_grad()
def test_second_turn_with_another_image(positions, compact_cache, cache, form):
    model, policy, cache = model_of(), spread(positions=positions), cache()
    oracle = Oracle(model, policy)
    first, second = [1, IMG, 5, 6, 7], [8, 9, IMG, 10, 11, 12]
    with fk.patched(model, policy, compact_cache=compact_cache), Inside(model) as inside:
        one = model.generate(**given([first]), past_key_values=cache, **GREEDY)[0, -4:].tolist()
        turn = len(inside.embeds)
        inputs = given([second])
        if form == "generate":
            talk = given([first])["input_ids"][0].tolist() + one + inputs["input_ids"][0].tolist()
            inputs |= dict(input_ids=torch.tensor([talk]), attention_mask=torch.ones(1, len(talk), dtype=torch.long))
            out = model.generate(
                **inputs, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **GREEDY
            )
            new, logits = out.sequences[:, -4:], out.logits
        else:
            ids = torch.cat([torch.tensor([one[-1:]]), inputs["input_ids"]], 1)
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"], past_key_values=cache).logits[:, -1:]
            logits, new = list(logits.unbind(1)), torch.zeros(1, 0, dtype=torch.long)
    ids, images = shrunk([*first, *one, *second])
    images[0].ask = len(shrunk(first)[0]) - 1
    table = oracle.model.get_input_embeddings().weight
    # The last token written in the first turn is only read in the second.
    embeds = torch.cat([inside.embeds[0][0], table[torch.tensor(one[:-1])], inside.embeds[turn][0]])
    assert len(embeds) == len(ids)
    turns = (len(inside.embeds[0][0]),)
    check_steps(oracle, [(embeds, images)], new, tuple(logits), compacted=compact_cache, turns=turns)


def flash(query, key, value, causal=False, softmax_scale=None, **_):
    """flash_attn_func [B, N, H, d]: causality is aligned to the last key, and a query without keys gets zeros."""
    queries, keys = query.shape[1], key.shape[1]
    allowed = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries if causal else keys)
    group = query.shape[2] // key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, *(x.repeat_interleave(group, 2) for x in (key, value))))
    weights = (query @ key.mT * softmax_scale).masked_fill(~allowed, -torch.inf).softmax(-1)
    return (weights.nan_to_num(0) @ value).transpose(1, 2)


def flash_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=0, max_seqlen_k=0, causal=False, softmax_scale=None, dropout_p=0.0
):
    """flash_attn_varlen_func [tokens, H, d]; transformers looks at its signature for what it takes."""
    queries, keys, values = (
        x.split(ends.diff().tolist()) for x, ends in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))
    )
    pieces = zip(queries, keys, values, strict=True)
    return torch.cat([flash(*(x[None] for x in piece), causal, softmax_scale)[0] for piece in pieces])


def on_flash_attention(model, monkeypatch, name="flash_attention_2"):
    """A model on FlashAttention as transformers calls it: all of its masking and unpadding, kernels in plain torch."""
    utils = transformers.modeling_flash_attention_utils
    own = flash, flash_varlen, None, utils._pad_input, utils._unpad_input
    monkeypatch.setattr(utils, "_lazy_imports", lambda *_, **__: own)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    monkeypatch.setitem(AttentionInterface._global_mapping, name, flash_attention_forward)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, flash_attention_mask)
    for config in (model.config.get_text_config(), model.config.vision_config):
        monkeypatch.setattr(config, "_attn_implementation", name)
    return model


@pytest.fixture
def flash_model(request, monkeypatch):
    return on_flash_attention(model_of(), monkeypatch, getattr(request, "param", "flash_attention_2"))


@pytest.mark.parametrize("compact_cache", [False, True])
@pytest.mark.parametrize("prompt", PROMPTS)
@torch.no_grad()
def test_flash_attention(flash_model, prompt, compact_cache):
    out, samples, oracle = generated(flash_model, spread(), PROMPTS[prompt], compact_cache=compact_cache, **GREEDY)
    check_steps(oracle, samples, out.sequences[:, -4:], out.logits, compacted=compact_cache)


@pytest.mark.parametrize("compact_cache", [False, True])
@torch.no_grad()
def test_flash_attention_on_a_static_cache(flash_model, compact_cache):
    """With padding: a prompt without any is read wrongly by transformers itself, which leaves out its mask."""
    rows = PROMPTS["one, two or none"]
    cache = StaticCache(config=flash_model.config.get_text_config(), max_cache_len=120)
    out, samples, oracle = generated(
        flash_model, spread(positions="renumber"), rows, compact_cache=compact_cache, past_key_values=cache,
        disable_compile=True, **GREEDY,
    )  # fmt: skip
    check_steps(oracle, samples, out.sequences[:, -4:], out.logits, compacted=compact_cache)


@pytest.mark.parametrize("flash_model", ["flash_attention_2", "kernels-community/flash-attn2"], indirect=True)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_flash_attention_in_two_turns(flash_model, side):
    """More queries than one, fewer than keys; and padding on either side of the first turn."""
    rows, policy, cache = PROMPTS["one, two or none"], spread(), DynamicCache()
    oracle = Oracle(flash_model, policy)
    with Inside(flash_model) as inside, fk.patched(flash_model, policy):
        first = given(rows, side)
        out = flash_model(**first, past_key_values=cache)
        if side == "left":
            new = torch.tensor([[40, 41, 42]] * len(rows))
            mask = torch.nn.functional.pad(first["attention_mask"], (0, 3), value=1)
            again = flash_model(input_ids=new, past_key_values=cache, attention_mask=mask)
    table = oracle.model.get_input_embeddings().weight
    for b, (embeds, images) in enumerate(prompts_of(inside, rows, side)):
        wanted = oracle(embeds, images)[0]
        got = out.logits[b, -len(wanted) :] if side == "left" else out.logits[b, : len(wanted)]
        assert_close(got, wanted, **oracle.close)
        if side == "left":
            assert_close(again.logits[b], oracle(torch.cat([embeds, table[new[b]]]), images)[0][-3:], **oracle.close)


@torch.no_grad()
def test_own_decoding_loop():
    model, policy = model_of(), spread()
    oracle = Oracle(model, policy)
    rows, written, logits = PROMPTS["one, two or none"], [], []
    with fk.patched(model, policy), Inside(model) as inside:
        inputs = given(rows)
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
        out = model(**inputs, position_ids=positions, use_cache=True)
        for _ in range(3):
            logits.append(out.logits[:, -1])
            written.append(logits[-1].argmax(-1, keepdim=True))
            inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
            positions = inputs["attention_mask"].sum(1, keepdim=True) - 1
            out = model(
                input_ids=written[-1], attention_mask=inputs["attention_mask"], position_ids=positions,
                past_key_values=out.past_key_values,
            )  # fmt: skip
    check_steps(oracle, prompts_of(inside, rows), torch.cat(written, 1), tuple(logits))


@torch.no_grad()
def test_what_dropped_tokens_see():
    model, policy = model_of(), spread(((1, 10), (2, 6)))
    text, rows = model.model.language_model, {}
    for number, layer in enumerate(text.layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(layer.self_attn, name).register_forward_hook(
                lambda m, args, out, key=(number, name): rows.setdefault(key, []).append(args[0].shape[1])
            )
        layer.mlp.register_forward_hook(
            lambda m, args, out, key=(number, "mlp"): rows.setdefault(key, []).append(args[0].shape[1])
        )
    with fk.patched(model, policy):
        cache = model(**given(PROMPTS["one"]), use_cache=True).past_key_values
    whole, kept = 4 + LEFT, [4 + LEFT, 4 + 10, 4 + 6, 4 + 6]
    for number in range(4):
        before = [whole, *kept][number]
        assert rows[number, "k_proj"] == rows[number, "v_proj"] == [before]
        assert rows[number, "o_proj"] == rows[number, "mlp"] == [kept[number]]
        asked = [1, kept[number]] if number in (1, 2) else [kept[number]]  # the instruction's own query comes first
        assert rows[number, "q_proj"] == asked
    assert [layer.keys.shape[2] for layer in cache.layers] == [whole, whole, 14, 10]
    assert cache.get_seq_length() == whole and [cache.get_seq_length(i) for i in range(4)] == [whole] * 4


@torch.no_grad()
def test_nothing_of_the_attention_lives_during_the_mlp():
    model, made, alive = model_of(), [], []
    for layer in model.model.language_model.layers:
        for module in (layer.input_layernorm, *(getattr(layer.self_attn, f"{x}_proj") for x in "qkv")):
            module.register_forward_hook(lambda _, args, out: made.append(weakref.ref(out.untyped_storage())))
        layer.mlp.register_forward_pre_hook(lambda *_: alive.append(sum(x() is not None for x in made)))
    with fk.patched(model, spread()):
        model(**given(PROMPTS["one"]), use_cache=False)
    assert made and alive == [0] * 4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("prompt", ["one", "several images", "one, two or none"])
def test_loss_and_gradients(prompt, checkpointing):
    rows = PROMPTS[prompt]
    model, policy = model_of().train(), spread()
    oracle = Oracle(model, policy)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    inputs = given(rows, "right")
    labels = inputs["input_ids"].clone()
    labels[(labels == IMAGE) | (inputs["attention_mask"] == 0)] = -100
    for row, mask in zip(labels, inputs["attention_mask"], strict=True):
        row[: int(mask.sum()) - 1] = -100  # the last token is the answer
    with Inside(model) as inside, fk.patched(model, policy):
        out = model(**inputs, labels=labels)
        out.loss.backward()
    losses = []
    for (embeds, images), row in zip(prompts_of(inside, rows, "right"), rows, strict=True):
        for image in images:
            image.ask = max(i for i, token in enumerate(shrunk(row)[0][:-1]) if token != IMAGE)
        logits, _ = oracle(embeds, images)
        losses.append(cross_entropy(logits[-2][None], torch.tensor([row[-1]])))
    want = torch.stack(losses).mean()
    assert_close(out.loss.double(), want, **oracle.close)
    want.backward()
    for (name, got), wanted in zip(
        model.model.language_model.layers.named_parameters(), oracle.text.layers.parameters(), strict=True
    ):
        assert got.grad is not None, name
        assert_close(got.grad, wanted.grad, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_trace_counts_in_patches():
    model, policy, rows = model_of(), spread(), ROWS
    with Inside(model) as inside, fk.patched(model, policy, record=True):
        model(**given(rows))
        *encoder, first, second = fk.trace(model).stages
    oracle = Oracle(model, policy)
    assert [stage.name for stage in (encoder[-1], first, second)] == ["encoder", "llm", "llm"]
    assert (first.layer, second.layer) == (1, 2) and first.kept == [10] * 4 and second.kept == [6] * 4
    image = 0
    for embeds, images in prompts_of(inside, rows):
        _, columns = oracle(embeds, images)
        for one in images:
            at = [one.columns.index(c) for c in columns.tolist() if c in one.columns]
            assert second.indices[image].tolist() == encoder[-1].indices[image][at].tolist()
            assert set(second.indices[image].tolist()) < set(first.indices[image].tolist())
            scored = second.scores[image].isfinite().nonzero().flatten()
            assert scored.tolist() == first.indices[image].tolist()
            image += 1


@torch.no_grad()
def test_an_image_keeps_the_same_tokens_in_any_company():
    model, policy = model_of(), spread()
    rows = PROMPTS["four"]
    with fk.patched(model, policy, record=True):
        model(**given(rows))
        together = fk.trace(model).stages[-1].indices
        for b, row in enumerate(rows):
            inputs = given([row]) | dict(pixel_values=given(rows)["pixel_values"][b : b + 1])
            model(**inputs)
            assert torch.equal(fk.trace(model).stages[-1].indices[0], together[b])


@torch.no_grad()
def test_keeping_everything_changes_nothing():
    model, inputs = model_of(), given(ROWS)
    stock = model(**inputs).logits
    with fk.patched(model, fk.FlowCut(target_tokens=tiny.PATCHES, llm_layer=1)):
        assert torch.equal(model(**inputs).logits, stock)


def test_unpatching_leaves_no_trace():
    model = model_of()
    modules = {name: dict(vars(module)) for name, module in model.named_modules()}
    fk.unpatch(fk.patch(model, fk.FlowCut(target_tokens=8, llm_layer=1)))
    for name, module in model.named_modules():
        assert vars(module).keys() == modules[name].keys(), name


@pytest.mark.parametrize(
    ("change", "policy", "words"),
    [
        (dict(), dict(llm_layer=4), "llm_layer=4 but the language model has 4 layers"),
        (dict(text_config=MistralConfig, text=dict(sliding_window=64)), dict(llm_layer=1), "sliding_window=64"),
    ],
)
def test_models_that_do_not_fit(change, policy, words):
    model = tiny.llava(**dict(text=dict(num_hidden_layers=4)) | change)
    before = dict(vars(model))
    with pytest.raises(ValueError, match=words):
        fk.patch(model, fk.FlowCut(target_tokens=8, **policy))
    assert vars(model).keys() == before.keys()


@torch.no_grad()
def test_attention_that_cannot_be_cut():
    """Whenever it was chosen."""
    model, cache, words = model_of(), DynamicCache(), "'flex_attention' has masks that cannot be cut"
    fk.patch(model, spread())
    model.model.language_model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=words):
        model(**given(ROWS), past_key_values=cache)
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match=words):
        fk.patch(fk.unpatch(model), spread())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(llm_layer=-1), "llm_layer=-1"),
        (dict(llm_layer=1.0), "llm_layer=1.0"),
        (dict(encoder_surplus=0.5), "encoder_surplus=0.5"),
        (dict(positions="shift"), "positions='shift'"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        fk.FlowCut(target_tokens=8, **settings)


@torch.no_grad()
def test_caches_that_do_not_fit():
    model = model_of()
    with fk.patched(model, spread()):
        cache = DynamicCache(config=MistralConfig(num_hidden_layers=4, sliding_window=64))
        with pytest.raises(ValueError, match="layer 0 is a DynamicSlidingWindowLayer"):
            model(**given(ROWS), past_key_values=cache)
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize("compact_cache", [False, True])
@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("away", [1, 3, 10])
@torch.no_grad()
def test_cropped_prompt(away, positions, compact_cache):
    """The end of a prompt is taken back, its image included, and other words are read in its place."""
    model, policy, rows = model_of(), spread(positions=positions), PROMPTS["several images"]
    oracle = Oracle(model, policy)
    with Inside(model) as inside, fk.patched(model, policy, compact_cache=compact_cache):
        inputs = given(rows)
        places = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
        cache = model(**inputs, position_ids=places, use_cache=True).past_key_values
        cache.crop(-away)
        whole = max(len(shrunk(row)[0]) for row in rows)
        assert {cache.get_seq_length(i) for i in range(4)} == {whole - away}
        new = torch.tensor([[40, 41], [42, 43]])
        mask = torch.stack([torch.arange(whole - away + 2) >= whole - len(shrunk(row)[0]) for row in rows]).long()
        out = model(
            input_ids=new, past_key_values=cache, attention_mask=mask, position_ids=(mask.cumsum(1) - 1)[:, -2:]
        )
    for b, (embeds, images) in enumerate(prompts_of(inside, rows)):
        # Which tokens an image kept was decided by the words that are gone.
        fixed = oracle.kept(embeds, images)
        left = embeds[: len(embeds) - away]
        for image in fixed:
            image.columns = [column for column in image.columns if column < len(left)]
        whole = torch.cat([left, oracle.model.get_input_embeddings().weight[new[b]]])
        wanted = oracle(whole, fixed, (len(left),) if compact_cache else ())[0][-2:]
        assert_close(out.logits[b].double(), wanted, **oracle.close)


@torch.no_grad()
def test_reset_for_another_batch():
    model, policy = model_of(), spread()
    oracle, cache = Oracle(model, policy), DynamicCache()
    with fk.patched(model, policy, compact_cache=True):
        model(**given(PROMPTS["four"]), past_key_values=cache)
        cache.reset()
        with Inside(model) as inside:
            logits = model(**given(PROMPTS["one"]), past_key_values=cache).logits
    assert_close(logits[0], oracle(*prompts_of(inside, PROMPTS["one"])[0])[0], **oracle.close)


@pytest.mark.parametrize("compact_cache", [False, True])
@torch.no_grad()
def test_assisted_with_candidates_in_the_first_pass(compact_cache):
    rows = [[1, IMG, 5, 6, 7, 5]]
    _, samples, _ = generated(model_of(), spread(), rows, **GREEDY)  # without candidates behind the prompt
    for options in (dict(prompt_lookup_num_tokens=3), dict(assistant_model=model_of())):
        out, _, oracle = generated(model_of(), spread(), rows, compact_cache=compact_cache, **GREEDY, **options)
        check_steps(oracle, samples, out.sequences[:, -4:], out.logits, compacted=compact_cache)


@torch.no_grad()
def test_a_model_that_drafts_penalises_once(monkeypatch):
    """Of the processors that it is handed it replaces its own of the same class."""
    model, drafts, penalties, steps, drafted = model_of(), model_of(), [], [], []
    apply, generate = RepetitionPenaltyLogitsProcessor.__call__, drafts.generate
    monkeypatch.setattr(RepetitionPenaltyLogitsProcessor, "__call__", lambda *args: penalties.append(1) or apply(*args))
    drafts.register_forward_hook(lambda *_: steps.append(1))

    def counting(*args, **kwargs):
        before = len(penalties)
        output = generate(*args, **kwargs)
        drafted.append(len(penalties) - before)
        return output

    drafts.generate = counting
    with fk.patched(model, spread()):
        model.generate(**given([[1, IMG, 5, 6, 7, 5]]), assistant_model=drafts, repetition_penalty=1.3, **GREEDY)
    assert sum(drafted) == len(steps) > 0


@torch.no_grad()
def test_a_draft_that_fails_leaves_the_cache_as_it_was():
    """The prompt was read and compacted by then."""
    model, cache, calls = model_of(), DynamicCache(), []

    def second(*_):
        calls.append(cache.get_seq_length(3))
        if len(calls) == 2:
            raise RuntimeError("on purpose")

    model.model.language_model.layers[3].mlp.register_forward_pre_hook(second)
    with fk.patched(model, spread(), compact_cache=True), pytest.raises(RuntimeError, match="on purpose"):
        model.generate(**given([[1, IMG, 5, 6, 7, 5]]), past_key_values=cache, prompt_lookup_num_tokens=2, **GREEDY)
    assert calls == [LEFT + 5, LEFT + 7] and cache.get_seq_length() == 0


@torch.no_grad()
def test_policies_may_change_between_turns():
    model, cache = model_of(), DynamicCache()
    with fk.patched(model, spread(((2, 10),))):
        model(**given(PROMPTS["four"]), past_key_values=cache)
    with fk.patched(model, spread(((1, 10),))):
        inputs = given(PROMPTS["four"])
        seen = cache.get_seq_length()
        inputs["attention_mask"] = torch.cat([torch.ones(4, seen).long(), inputs["attention_mask"]], 1)
        assert model(**inputs, past_key_values=cache).logits.isfinite().all()
    with fk.patched(model, fk.FlowCut(8)), pytest.raises(ValueError, match="go on with the policy"):
        model(input_ids=torch.tensor([[3]]), past_key_values=cache)


@pytest.mark.parametrize("compact_cache", [False, True])
@torch.no_grad()
def test_a_pruned_cache_is_compacted_by_patch_alone(compact_cache):
    model, cache = model_of(), DynamicCache()
    with fk.patched(model, spread(), compact_cache=compact_cache):
        model(**given(PROMPTS["one"]), past_key_values=cache)
    before = [layer.keys for layer in cache.layers]
    with pytest.raises(ValueError, match=r"patch\(model, policy, compact_cache=True\) drops them from all layers"):
        fk.compact_kv_cache(cache, torch.arange(3)[None])
    assert all(layer.keys is x for layer, x in zip(cache.layers, before, strict=True))


@torch.no_grad()
def test_static_cache_holds_more_columns_than_rows():
    """Compacted, a static cache goes on past the number of columns that it has rows for."""
    model, policy, rows = model_of(), spread(), PROMPTS["one"]
    oracle, logits, written = Oracle(model, policy), [], []
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=30)
    with Inside(model) as inside, fk.patched(model, policy, compact_cache=True):
        out = model(**given(rows), past_key_values=cache)
        for _ in range(8):  # 28 columns of the prompt, and 36 in the end
            logits.append(out.logits[:, -1])
            written.append(logits[-1].argmax(-1, keepdim=True))
            out = model(input_ids=written[-1], past_key_values=cache)
    check_steps(oracle, prompts_of(inside, rows), torch.cat(written, 1), tuple(logits), compacted=True)


@torch.no_grad()
def test_a_model_called_while_another_prompt_is_generated():
    model, rows = model_of(), PROMPTS["one"]
    longer = given([[1, 4, 4, 4, IMG, 5, 6, 7, 8, 9]])
    seen = []

    class Calls(LogitsProcessor):
        def __call__(self, ids, scores):
            seen.append(model(**longer).logits[:, -1])
            return scores

    with fk.patched(model, spread()):
        alone = model(**longer).logits[:, -1]
        model.generate(**given(rows), logits_processor=LogitsProcessorList([Calls()]), **GREEDY)
    assert len(seen) == 4 and all(torch.equal(x, alone) for x in seen)


@pytest.mark.parametrize(
    "options", [dict(num_beams=3), dict(num_return_sequences=3, do_sample=True), dict(use_cache=False)]
)
@torch.no_grad()
def test_trace_of_generate(options):
    model = model_of()
    with fk.patched(model, spread(), record=True):
        model.generate(**given(ROWS), **GREEDY | options)
        stages = fk.trace(model).stages
    copies = 3 if "num_beams" in options or "num_return_sequences" in options else 1
    assert [stage.name for stage in stages[-2:]] == ["llm", "llm"] and stages[-3].name == "encoder"
    assert all(len(stage.kept) in (4, 4 * copies) for stage in stages[-2:])


@torch.no_grad()
def test_not_finite_scores():
    model, inputs = model_of(), given(PROMPTS["one"])
    model.model.language_model.layers[1].self_attn.k_proj.weight.fill_(torch.nan)
    with fk.patched(model, spread()), pytest.raises(ValueError, match="at decoder layer 1"):
        model(**inputs)


def fail(*_):
    raise RuntimeError("on purpose")


@pytest.mark.parametrize("compact_cache", [False, True])
@pytest.mark.parametrize("cache", [DynamicCache, lambda: StaticCache(model_of().config.get_text_config(), 200)])
@torch.no_grad()
def test_a_failed_turn_leaves_the_cache_as_it_was(cache, compact_cache):
    model, cache, again = model_of(), cache(), given([[3, IMG, 4]])
    again.pop("attention_mask")
    with fk.patched(model, First(target_tokens=6, stages=((1, 10), (2, 6))), compact_cache=compact_cache):
        model(**given(PROMPTS["one"]), past_key_values=cache)
        twin = copy.deepcopy(cache)
        handle = model.model.language_model.layers[2].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            model(**again, past_key_values=cache)
        handle.remove()
        assert [cache.get_seq_length(i) for i in range(4)] == [twin.get_seq_length(i) for i in range(4)]
        assert torch.equal(model(**again, past_key_values=cache).logits, model(**again, past_key_values=twin).logits)


@torch.no_grad()
def test_not_finite_scores_where_nobody_looks(monkeypatch):
    """As on a GPU: nothing is read back, and the logits say it."""
    model, inputs = model_of(), given(PROMPTS["one"])
    model.model.language_model.layers[1].self_attn.k_proj.weight.fill_(torch.nan)
    monkeypatch.setattr(decoder, "raise_if_not_finite", lambda *_: None)
    with fk.patched(model, spread()):
        assert model(**inputs).logits.isnan().all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m(**given(ROWS), output_attentions=True), "output_attentions=True"),
        (lambda m: m(**given(ROWS) | dict(attention_mask=torch.ones(2, 9).long())), "attention_mask must be"),
    ],
)
@torch.no_grad()
def test_calls_that_cannot_be_served(call, words):
    model = model_of()
    with fk.patched(model, spread()), pytest.raises(ValueError, match=words):
        call(model)


@pytest.mark.skipif(
    "mm_encoder_outputs" not in inspect.signature(LlavaForConditionalGeneration.forward).parameters,
    reason="this transformers forgets the images of a prompt that is read in chunks",
)
@torch.no_grad()
def test_prompt_in_chunks():
    model = model_of()
    with fk.patched(model, spread()), pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**given(PROMPTS["one"]), prefill_chunk_size=26, **GREEDY)


@torch.no_grad()
def test_a_copy_of_a_patched_model():
    model, inputs = model_of(), given(ROWS)
    with fk.patched(model, spread()):
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_autocast():
    model, inputs = model_of(dtype=torch.float32), given(ROWS, dtype=torch.float32)
    with fk.patched(model, spread()), torch.autocast("cpu", torch.bfloat16):
        assert model(**inputs).logits.isfinite().all()
        model.generate(**inputs, **GREEDY)


@torch.no_grad()
def test_low_precision():
    model, policy = model_of(dtype=torch.bfloat16), First(target_tokens=6, stages=((1, 10), (2, 6)))
    oracle = Oracle(model, policy)
    with Inside(model) as inside, fk.patched(model, policy):
        logits = model(**given(ROWS, dtype=torch.bfloat16)).logits.double()
    for got, sample in zip(logits, prompts_of(inside, ROWS), strict=True):
        wanted = oracle(*sample)[0]
        assert (got[-len(wanted) :] - wanted).abs().max() < 0.05 * wanted.abs().max()
