"""FastV, PyramidDrop and SparseVLM in whole models against their formulas, in fp64 from scratch, sample by sample."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from test_llava import IMG, inputs_for
from test_llm_stage import GREEDY, Image, Inside, on_flash_attention, rms, rotated, shrunk
from tiny import PATCHES
from torch import Tensor
from torch.nn.functional import silu
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

import flowcut_kernels as fk

CLOSE = dict(rtol=1e-5, atol=1e-5)  # transformers' RMSNorm and the logits of generate are fp32 in an fp64 model
LAYERS = 5
POLICIES = {
    "FastV": fk.FastV(target_tokens=11),
    "FastV at 1": fk.FastV(retain_ratio=0.4, layer=1),
    "SparseVLM": fk.SparseVLM(target_tokens=9, layers=(0, 2, 3), surplus=(4, 3)),
    "SparseVLM once": fk.SparseVLM(retain_ratio=0.1, layers=(1,), surplus=()),
    "PyramidDrop": fk.PyramidDrop(retain_ratio=0.125, layers=(1, 2, 3)),
}
PROMPTS = {
    "one": [[1, IMG, 5, 6, 7]],
    "four": [[1, IMG, 5, 6, 7], [1, 9, IMG, 8], [IMG, 3], [1, 4, 5, 6, IMG, 7, 8]],
    "several images": [[1, IMG, 4, 5, IMG, 6], [1, IMG, 7, IMG, 8, 9, 10]],
    "one, two or none": [[1, IMG, 5], [1, 11, 12, 13], [1, 9, IMG, IMG, 8, 7]],
    "image last": [[1, 5, IMG], [1, IMG], [1, 7, 8, IMG], [9, IMG, IMG], [4, 5, 6, 7, IMG]],
    "many words": [[1, IMG, *range(3, 80)], [1, 5, IMG, *range(9, 14)]],
}


def model_of(attention: str = "sdpa", dtype=torch.float64):
    return tiny.llava(attention=attention, text=dict(num_hidden_layers=LAYERS)).to(dtype)


def given(rows: list, side: str = "left", dtype=torch.float64) -> dict:
    inputs = inputs_for(rows, side)
    return {name: x.to(dtype) if name == "pixel_values" else x for name, x in inputs.items()}


def clusters_of(x: Tensor) -> dict[int, list[int]]:
    """The rows of x [n, D] around int(n / 10) + 1 of them, by density peaks."""
    number = int(len(x) / 10) + 1
    d = (x[:, None] - x[None]).norm(dim=-1) / x.shape[1] ** 0.5
    density = [torch.exp(-(d[i].sort().values[:number] ** 2).mean()) for i in range(len(x))]
    rank = [
        density[i] * min([d[i, j] for j in range(len(x)) if density[j] > density[i]], default=d.max())
        for i in range(len(x))
    ]
    members: dict[int, list[int]] = {c: [] for c in sorted(range(len(x)), key=lambda i: -rank[i].item())[:number]}
    for i in range(len(x)):
        members[i if i in members else min(sorted(members), key=lambda c: d[i, c].item())].append(i)
    return members


class Oracle:
    """Logits [L', V] of what is left of one sample."""

    def __init__(self, model, policy) -> None:
        self.model, self.policy = copy.deepcopy(model).double(), policy
        self.text = self.model.model.language_model

    def __call__(self, embeds: Tensor, images: list[Image]) -> Tensor:
        """Every image asks its `ask`, the last column of its prompt."""
        self.x, self.columns = embeds, torch.arange(len(embeds))
        self.images = [Image(list(image.columns), image.ask) for image in images]
        for image in self.images:
            visual = {c for each in images for c in each.columns}
            image.words = [c for c in range(max(image.columns) + 1, image.ask + 1) if c not in visual]
            if image.words:
                relevance = torch.stack([(embeds[image.words] @ embeds[v]).softmax(0) for v in image.columns]).mean(0)
                image.raters = [c for c, m in zip(image.words, relevance, strict=True) if m > relevance.mean()]
            if not image.words or not image.raters:
                image.raters = [image.ask]
        for number, layer in enumerate(self.text.layers):
            weights, after = self.run(layer)
            if isinstance(self.policy, fk.PyramidDrop) and number in self.policy.layers:
                share = (self.policy.budget(PATCHES) / PATCHES) ** (1 / len(self.policy.layers))
                for image in self.images:
                    count = round(PATCHES * share ** (self.policy.layers.index(number) + 1))
                    self.keep(image, self.asked(weights, image), count)
                weights, after = self.run(layer)
            self.x = after
            if isinstance(self.policy, fk.SparseVLM) and number in self.policy.layers:
                surplus = (*self.policy.surplus, 1)[self.policy.layers.index(number)]
                self.cluster(weights, round(surplus * self.policy.budget(PATCHES)))
            if isinstance(self.policy, fk.FastV) and number == self.policy.layer - 1:
                for image in self.images:
                    self.keep(image, self.asked(weights, image), self.policy.budget(PATCHES))
        return self.model.lm_head(rms(self.x, self.text.norm))

    def run(self, layer) -> tuple[Tensor, Tensor]:
        """The attention map [H, Q, K] of a layer, and its output."""
        attention, x = layer.self_attn, self.x
        normed = rms(x, layer.input_layernorm)
        q, k, v = (
            projection(normed).unflatten(-1, (-1, attention.head_dim))
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = rotated(q, self.columns), rotated(k, self.columns)
        k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
        logits = torch.einsum("qhd,khd->hqk", q, k) / attention.head_dim**0.5
        weights = logits.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf).softmax(-1)
        x = x + attention.o_proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        normed = rms(x, layer.post_attention_layernorm)
        return weights, x + layer.mlp.down_proj(silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed))

    def rows(self, image: Image) -> Tensor:
        row = {int(c): i for i, c in enumerate(self.columns)}
        return torch.tensor([row[c] for c in image.columns], dtype=torch.long)

    def asked(self, weights: Tensor, image: Image) -> Tensor:
        """Head-mean attention of the last column of the prompt that is left."""
        last = int((self.columns <= image.ask).sum()) - 1
        return weights[:, last].mean(0)[self.rows(image)]

    def cluster(self, weights: Tensor, count: int) -> None:
        """Keep the best `count` of each image, and means of clusters of the best others in their centres' places."""
        row, changed, gone = {int(c): i for i, c in enumerate(self.columns)}, self.x.clone(), set()
        for image in self.images:
            if len(image.columns) <= count:
                continue
            asked = [row[c] if c in row else max(i for c2, i in row.items() if c2 <= c) for c in image.raters]
            score = weights[:, asked].mean((0, 1))[self.rows(image)]
            order = [image.columns[i] for i in score.argsort(descending=True)]
            others = sorted(order[count : count + int(0.3 * (len(order) - count)) + 1])
            x = self.x[[row[c] for c in others]]
            found = clusters_of(x)
            for c, part in found.items():
                changed[row[others[c]]] = x[part].mean(0)
            left = sorted(order[:count] + [others[c] for c in found])
            gone |= set(image.columns) - set(left)
            image.columns = left
        live = ~torch.isin(self.columns, torch.tensor(sorted(gone), dtype=torch.long))
        self.x, self.columns = changed[live], self.columns[live]

    def keep(self, image: Image, score: Tensor, count: int) -> None:
        """The best of an image, once all have been asked of the same map."""
        best = score.topk(min(count, len(score))).indices.sort().values
        image.kept = [image.columns[i] for i in best]
        if image is self.images[-1]:
            gone = [c for each in self.images for c in each.columns if c not in each.kept]
            live = ~torch.isin(self.columns, torch.tensor(gone, dtype=torch.long))
            self.x, self.columns = self.x[live], self.columns[live]
            for each in self.images:
                each.columns = each.kept


def samples_of(inside: Inside, rows: list, side: str = "left") -> list[tuple[Tensor, list[Image]]]:
    """Embeddings of every unpadded sample of the first call, and its images."""
    samples = []
    copies = len(inside.embeds[0]) // len(rows)  # beams
    for embeds, row in zip(inside.embeds[0][::copies], rows, strict=True):
        ids, images = shrunk(row, PATCHES)
        for image in images:
            image.ask = len(ids) - 1
        samples.append((embeds[-len(ids) :] if side == "left" else embeds[: len(ids)], images))
    return samples


def check(oracle: Oracle, samples, new: Tensor, logits) -> None:
    """logits [B, V] of every step against the oracle's, given the tokens [B, steps] that were written."""
    table = oracle.model.get_input_embeddings().weight
    for b, (embeds, images) in enumerate(samples):
        for step, got in enumerate(logits):
            assert_close(got[b].double(), oracle(torch.cat([embeds, table[new[b, :step]]]), images)[-1], **CLOSE)


def generated(model, policy, rows, **options):
    oracle = Oracle(model, policy)
    with Inside(model) as inside, fk.patched(model, policy):
        out = model.generate(**given(rows), return_dict_in_generate=True, output_logits=True, **GREEDY | options)
    return oracle, samples_of(inside, rows), out.sequences[:, -4:], out.logits


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_every_step_of_generate(policy, prompt):
    check(*generated(model_of(), POLICIES[policy], PROMPTS[prompt]))


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", ["FastV", "PyramidDrop", "SparseVLM"])
@torch.no_grad()
def test_forward_with_padding_on_the_right(policy, attention, prompt):
    policy, rows = POLICIES[policy], PROMPTS[prompt]
    model = model_of(attention)
    oracle = Oracle(model, policy)
    with Inside(model) as inside, fk.patched(model, policy):
        out = model(**given(rows, "right")).logits
    for got, sample in zip(out, samples_of(inside, rows, "right"), strict=True):
        wanted = oracle(*sample)
        assert_close(got[: len(wanted)], wanted, **CLOSE)


@pytest.mark.parametrize("policy", ["FastV", "PyramidDrop", "SparseVLM"])
@pytest.mark.parametrize("cache", ["none", "static", "beams", "flash"])
@torch.no_grad()
def test_generate_with(cache, policy, monkeypatch):
    rows, model = PROMPTS["one, two or none"], model_of()
    if cache == "flash":
        on_flash_attention(model, monkeypatch)
    options = dict(none=dict(use_cache=False), static=dict(cache_implementation="static")).get(cache, {})
    if cache != "beams":
        return check(*generated(model, POLICIES[policy], rows, **options))
    oracle, policy = Oracle(model, POLICIES[policy]), POLICIES[policy]
    with Inside(model) as inside, fk.patched(model, policy):
        out = model.generate(
            **given(rows), **GREEDY | dict(num_beams=3, num_return_sequences=2, length_penalty=0.0),
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    table, samples = oracle.model.get_input_embeddings().weight, samples_of(inside, rows)
    for b, (sequence, score) in enumerate(zip(out.sequences, out.sequences_scores, strict=True)):
        embeds, images = samples[b // 2]
        logits = oracle(torch.cat([embeds, table[sequence[-4:-1]]]), images)[-4:]
        want = logits.log_softmax(-1).gather(1, sequence[-4:, None]).sum()
        assert_close(score.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", ["FastV", "PyramidDrop", "SparseVLM"])
@torch.no_grad()
def test_an_image_without_words(policy):
    model, policy = model_of(), POLICIES[policy]
    oracle = Oracle(model, policy)
    with Inside(model) as inside, fk.patched(model, policy):
        logits = model(**given([[IMG]])).logits
    wanted = oracle(inside.embeds[0][0], [Image(list(range(PATCHES)), PATCHES - 1)])
    assert_close(logits[0], wanted, **CLOSE)


@pytest.mark.parametrize("policy", ["FastV", "PyramidDrop", "SparseVLM"])
@torch.no_grad()
def test_compacted_cache(policy):
    """The prompt's logits are the same, and all layers end with the rows that reached the last one."""
    model, policy, inputs = model_of(), POLICIES[policy], given(PROMPTS["several images"])
    found = []
    for compact_cache in (False, True):
        with fk.patched(model, policy, compact_cache=compact_cache):
            found.append(model(**inputs, use_cache=True))
    assert torch.equal(found[0].logits, found[1].logits)
    rows = [[layer.keys.shape[2] for layer in output.past_key_values.layers] for output in found]
    longest = max(len(row) - row.count(IMG) + policy.tokens_by_layer(LAYERS, PATCHES)[-1] * row.count(IMG)
                  for row in PROMPTS["several images"])  # fmt: skip
    assert rows[1] == [longest] * LAYERS and rows[0][-1] == longest < rows[0][0]


@pytest.mark.parametrize("cache", [DynamicCache, lambda: StaticCache(model_of().config.get_text_config(), 400)])
@pytest.mark.parametrize("policy", ["FastV", "PyramidDrop", "SparseVLM"])
@torch.no_grad()
def test_second_turn_with_another_image(policy, cache):
    """The last token of a turn sees the turns before it."""
    model, policy, cache = model_of(), POLICIES[policy], cache()
    oracle, first, second = Oracle(model, policy), [1, IMG, 5, 6, 7], [8, 9, IMG, 10, 11, 12]
    with fk.patched(model, policy), Inside(model) as inside:
        model(**given([first]), past_key_values=cache)
        again = given([second])
        logits = model(input_ids=again["input_ids"], pixel_values=again["pixel_values"], past_key_values=cache).logits
    ids, images = shrunk([*first, *second], PATCHES)
    images[0].ask, images[1].ask = len(shrunk(first, PATCHES)[0]) - 1, len(ids) - 1
    embeds = torch.cat([inside.embeds[0][0], inside.embeds[1][0]])
    assert_close(logits[0, -1], oracle(embeds, images)[-1], **CLOSE)


@pytest.mark.parametrize("policy", ["FastV", "PyramidDrop", "SparseVLM"])
@torch.no_grad()
def test_an_image_keeps_the_same_tokens_in_any_company(policy):
    model, policy, rows = model_of(), POLICIES[policy], PROMPTS["four"]
    with fk.patched(model, policy, record=True):
        model(**given(rows))
        together = fk.trace(model).stages[-1]
        for b, row in enumerate(rows):
            model(**given([row]) | dict(pixel_values=given(rows)["pixel_values"][b : b + 1]))
            assert torch.equal(fk.trace(model).stages[-1].indices[0], together.indices[b])
    assert (together.indices.diff(dim=1) > 0).all()


@pytest.mark.parametrize("policy", [fk.FastV(PATCHES), fk.PyramidDrop(PATCHES, layers=(1,))], ids=str)
@torch.no_grad()
def test_all_tokens_is_the_stock_model(policy):
    model, inputs = model_of(), given(PROMPTS["several images"])
    stock = model(**inputs).logits
    with fk.patched(model, policy):
        assert torch.equal(model(**inputs).logits, stock)


@pytest.mark.parametrize("policy", ["FastV", "PyramidDrop", "SparseVLM"])
def test_loss_and_gradients(policy):
    """Checkpointed layers make the same choice again; answers with labels do not choose."""
    policy, rows = POLICIES[policy], PROMPTS["one"]
    found = []
    for checkpointing in (False, True):
        model = model_of().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        inputs = given(rows)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -2:] = inputs["input_ids"][:, -2:]
        oracle = Oracle(model, policy)
        with Inside(model) as inside, fk.patched(model, policy):
            loss = model(**inputs, labels=labels).loss
            loss.backward()
        found.append([x.grad for x in model.model.language_model.layers.parameters()])
    ((embeds, images),) = samples_of(inside, rows)
    images[0].ask -= 2
    want = torch.nn.functional.cross_entropy(oracle(embeds, images)[-3:-1], inputs["input_ids"][0, -2:])
    assert_close(loss.double(), want, **CLOSE)
    want.backward()
    for plain, again, x in zip(*found, oracle.text.layers.parameters(), strict=True):
        assert_close(plain, x.grad, rtol=1e-4, atol=1e-5)
        assert_close(again, x.grad, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_not_finite_scores():
    model = model_of()
    model.model.language_model.layers[1].self_attn.k_proj.weight.fill_(torch.nan)
    for policy in ("FastV", "PyramidDrop"):
        with fk.patched(model, POLICIES[policy]), pytest.raises(ValueError, match="at decoder layer 1"):
            model(**given(PROMPTS["one"]))


@pytest.mark.parametrize(
    "policy",
    [*POLICIES.values(), fk.SparseVLM.preset(64), fk.VisionZip.preset(64), fk.AttentionTokens(retain_ratio=0.1)],
    ids=str,
)
def test_json(policy):
    assert type(policy).from_json(policy.to_json()) == policy


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fk.FastV(8, layer=0), ValueError, "FastV: layer=0 must be a decoder layer, at least 1"),
        (lambda: fk.FastV(8, layer=2.0), ValueError, "FastV: layer=2.0 must be"),
        (lambda: fk.FastV.preset(100), ValueError, "FastV.preset: average=100 must be one of 192, 128, 64"),
        (lambda: fk.patch(model_of(), fk.FastV(8, layer=5)), ValueError, "layer=5 but the language model has 5 layers"),
        (lambda: fk.SparseVLM(8, layers=(1, 1, 2)), ValueError, r"layers=\(1, 1, 2\) must be rising"),
        (lambda: fk.SparseVLM(8, layers=(1, 2)), ValueError, r"must be a number for each of layers=\(1, 2\)"),
        (lambda: fk.SparseVLM(8, surplus=(1, 2)), ValueError, r"surplus=\(1, 2\) must be numbers that do not rise"),
        (lambda: fk.SparseVLM(8, surplus=(2, 0.5)), ValueError, r"surplus=\(2, 0.5\) must be numbers"),
        (lambda: fk.SparseVLM(8, surplus=3), ValueError, "surplus=3 must be numbers"),
        (lambda: fk.patch(model_of(), fk.SparseVLM(8, layers=(1, 2, 4))), ValueError, "must end before the last"),
        (lambda: fk.PyramidDrop(8, layers=()), ValueError, r"layers=\(\) must be rising decoder layers, at least 1"),
        (lambda: fk.PyramidDrop(8, layers=(2, 2)), ValueError, r"layers=\(2, 2\) must be rising"),
        (lambda: fk.PyramidDrop(8, layers=(0, 2)), ValueError, r"layers=\(0, 2\) must be rising"),
        (lambda: fk.PyramidDrop(8, layers=2), ValueError, "layers=2 must be rising"),
        (lambda: fk.patch(model_of(), fk.PyramidDrop(8)), ValueError, "names layer 24, but the language model has 5"),
        (lambda: fk.patch(tiny.clip_tower(), fk.FastV(8)), ValueError, "CLIPVisionModel has no projector"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
