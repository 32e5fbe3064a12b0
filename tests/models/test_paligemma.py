"""PaliGemma against an oracle that knows nothing of placeholders, masks, caches or cuts.

The oracle takes the features of a patched bare tower through the projector, writes them between the embeddings of the
text by hand, and runs the stock language model's layers on each sample alone, with a mask made by hand: the prefix
(image and question, token type 0) is seen by everything, the suffix by what follows.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import tiny
import torch
from test_llava import IMG, spell
from tiny import PATCHES
from torch.testing import assert_close
from transformers import Gemma2Config, GemmaConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from zoo.paligemma import model as model_of

import flowcut_kernels as fk

KEEP = 8
CLOSE = dict(rtol=1e-5, atol=1e-5)  # rotary tables and norms are fp32 in an fp64 model
ROWS = [[IMG, 1, 5, 6, 7, 8], [IMG, IMG, 1, 9, 4], [1, 4, 5, 3]]


def paligemma(**text):
    if text.get("text_config") is Gemma2Config:  # which takes no SDPA
        text |= dict(sliding_window=12, query_pre_attn_scalar=8, attention=None)
    return model_of(dtype=torch.float64, **text)


def inputs_for(rows, side="left", suffix=0):
    ids, mask = spell(rows, side=side)
    types = torch.zeros_like(ids)
    if suffix:
        types[:, -suffix:] = 1
    pixels = tiny.images(sum(row.count(IMG) for row in rows), seed=3).double()
    return dict(input_ids=ids, attention_mask=mask, token_type_ids=types, pixel_values=pixels)


def oracle(model, policy, rows, pixels, suffix=0, cut=None):
    """Logits of each row alone; `cut`: layer -> columns that go on from it, of a single row."""
    inner, text = model.model, model.model.language_model
    tower = copy.deepcopy(inner.vision_tower)
    with fk.patched(tower, policy):
        features = iter(inner.multi_modal_projector(tower(pixels).last_hidden_state))
    embed = model.get_input_embeddings()
    logits = []
    for row in rows:
        x = torch.cat([next(features) if t == IMG else embed(torch.tensor([t])) for t in row])[None]
        column = torch.arange(x.shape[1])
        rotary = text.rotary_emb(x, position_ids=column[None] + 1)
        seen = (column <= column[:, None]) | (column < x.shape[1] - suffix)
        for number, layer in enumerate(text.layers):
            x = layer(
                x,
                attention_mask=seen[column][:, column][None, None],
                position_embeddings=tuple(t[:, column] for t in rotary),
                position_ids=None,
            )
            kept = (cut or {}).get(number)
            if kept is not None:
                x, column = x[:, kept], column[kept]
        logits.append(model.lm_head(text.norm(x))[0])
    return logits


@contextmanager
def given_only(model, features):
    """The stock model, whose images' features are these."""
    output = BaseModelOutputWithPooling(pooler_output=features)
    model.model.get_image_features = lambda pixel_values, **kwargs: output
    yield
    del model.model.get_image_features


@pytest.fixture(scope="module")
def model():
    return paligemma()


@pytest.mark.parametrize("policy", [fk.FlowCut(KEEP), fk.UniformTokens(KEEP)], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("suffix", [0, 2])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_prefix_of_the_kept_tokens(model, side, suffix, policy):
    """Whatever is left of the image is part of the prefix, the question of it behind, and the suffix is causal."""
    rows = ROWS if side == "left" or not suffix else ROWS[:1]
    inputs = inputs_for(rows, side, suffix)
    want = oracle(model, policy, rows, inputs["pixel_values"], suffix)
    with fk.patched(model, policy):
        got = model(**inputs).logits
    assert got.shape[1] == max(map(len, want))
    for x, y in zip(got, want, strict=True):
        assert_close(x[-len(y) :] if side == "left" else x[: len(y)], y, **CLOSE)


@pytest.mark.parametrize("types", [True, False], ids=["prefix mask", "no mask"])
@torch.no_grad()
def test_cut_in_gemma(types):
    """Layers behind the cut hold the kept tokens at their places; what is written is a causal suffix to all layers.

    Without token types transformers makes no mask at all, and Gemma's attention is then not causal.
    """
    model, row = paligemma(), ROWS[0]
    policy = fk.FlowCut(KEEP, llm_layer=1)
    inputs = inputs_for([row])
    if not types:
        del inputs["token_type_ids"], inputs["attention_mask"]
    with fk.patched(model, policy, record=True):
        logits = model(**inputs).logits[0]
        *_, entered, left = fk.trace(model).stages
        output = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    assert (entered.name, left.name, left.kept) == ("encoder", "llm", [KEEP])
    text = torch.arange(2 * KEEP, 2 * KEEP + len(row) - 1 + 4)
    kept = torch.cat([torch.isin(entered.indices[0], left.indices[0]).nonzero().flatten(), text])
    written = output.sequences[0, -4:].tolist()
    assert len(set(written)) > 1
    for n in range(4):
        cut = {1: kept[: len(kept) - 4 + n]}
        encoder = fk.FlowCut(2 * KEEP)
        want = oracle(model, encoder, [row + written[:n]], inputs["pixel_values"], suffix=n, cut=cut)[0]
        assert_close(output.logits[n][0].double(), want[-1], **CLOSE)
        if n == 0:
            assert_close(logits, want, **CLOSE)


@pytest.mark.parametrize("text_config", [GemmaConfig, Gemma2Config])
@torch.no_grad()
def test_positions_count_from_one(text_config):
    """A loop of the caller's own goes on as `generate` does, with positions of the full prompt or of the pruned one."""
    model, rows = paligemma(text_config=text_config), ROWS[:1]
    inputs = inputs_for(rows)
    length = inputs["input_ids"].shape[1]
    with fk.patched(model, fk.FlowCut(KEEP)):
        want = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, length:]
        assert len(want.unique()) > 1
        for start in (length, length - PATCHES + KEEP):
            output = model(**inputs, position_ids=torch.arange(1, length + 1)[None], use_cache=True)
            for n, token in enumerate(want):
                assert output.logits[0, -1].argmax() == token
                output = model(
                    input_ids=token[None, None],
                    position_ids=torch.tensor([[start + 1 + n]]),
                    past_key_values=output.past_key_values,
                )


@torch.no_grad()
def test_sliding_windows_of_gemma_2():
    """The stock model on a prompt of the kept tokens alone says the same, prefix and windows included."""
    model, policy = paligemma(text_config=Gemma2Config), fk.FlowCut(KEEP)
    inputs = inputs_for(ROWS)
    tower = copy.deepcopy(model.model.vision_tower)
    with fk.patched(tower, policy):
        features = model.model.multi_modal_projector(tower(inputs["pixel_values"]).last_hidden_state)
    short = inputs | dict(zip(("input_ids", "attention_mask"), spell(ROWS, KEEP), strict=True))
    short["token_type_ids"] = torch.zeros_like(short["input_ids"])
    settings = dict(max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with given_only(model, features):
        want = model.generate(**short, **settings)
    with fk.patched(model, policy):
        got = model.generate(**inputs, **settings)
    assert torch.equal(got.sequences[:, -4:], want.sequences[:, -4:])
    assert len(got.sequences[:, -4:].unique()) > 4
    for x, y in zip(got.logits, want.logits, strict=True):
        assert_close(x, y, **CLOSE)


def test_refused():
    for model, policy, why in (
        (paligemma(), fk.FlowCut(KEEP, feature_layer=-2), "feature_layer=-2"),
        (paligemma(), fk.FlowCut(KEEP, anchor="cls"), "class token"),
        (paligemma(text_config=Gemma2Config), fk.FlowCut(KEEP, llm_layer=1), "Gemma2Model.*without llm_layer"),
    ):
        with pytest.raises(ValueError, match=why):
            fk.patch(model, policy)
