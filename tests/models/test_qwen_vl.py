"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL beside what test_conformance.py asks of them."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
from typing import Any

import pytest
import tiny
import torch
from golden_cases import golden_manifest, golden_tensors
from test_conformance import GREEDY, STEPS, given
from tiny import IMAGE
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from zoo import Image, Video

import flowcut_kernels as fk
from flowcut_kernels.models.qwen_vl import block_parts
from flowcut_kernels.modules import packed_encoder
from flowcut_kernels.modules.packed_encoder import PackedBlock, PackedEncoder
from flowcut_kernels.ops import patch_entropy, received_attention
from flowcut_kernels.policies import vflowopt
from flowcut_kernels.policies.recycling import _constant

ONE, OTHER, THIRD = Image(56, 56, 0), Image(40, 70, 1), Image(100, 60, 2)
FILM = Video(3, 56, 40, seed=2)
ROWS = [[3, ONE, 4, OTHER, 5, 6], [7, FILM, 8], [9, 10], [THIRD, 11]]
POLICY = fk.FlowCut(7)


@pytest.fixture(params=tiny.QWENS)
def family(request):
    return importlib.import_module(f"zoo.{request.param}").FAMILY


def stages(model, inputs: dict[str, Any], policy=POLICY, kind: str = "image") -> list:
    """The encoder's part of the trace."""
    pixels = "pixel_values" if kind == "image" else "pixel_values_videos"
    with fk.patched(model, policy, record=True), torch.no_grad():
        getattr(model.model, f"get_{kind}_features")(inputs[pixels], inputs[f"{kind}_grid_thw"])
        return fk.trace(model).stages


CASES = {name: case for name, case in golden_manifest().items() if case["kind"] == "flowcut_qwen_vision"}


@pytest.mark.parametrize("name", CASES or ["absent"])
@torch.no_grad()
def test_scores_of_the_released_code(name):
    """It prunes single patches up to the last layer's output, and its merger makes tokens of whichever are left."""
    if not CASES:
        pytest.skip("golden cases are not there")
    case, tensors = CASES[name], golden_tensors(name)
    visual = Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(**case["vision_config"])).eval()
    visual.load_state_dict({k.removeprefix("weights."): x for k, x in tensors.items() if k.startswith("weights.")})
    visual.set_attn_implementation(case["attn_impl"])
    policy = fk.FlowCut(case["patch_target"], criteria=("attention", "value_norm"), value_norm="head_mean")
    visual.forward = encoder = PackedEncoder(visual, policy, 1, len(visual.blocks), record=True)
    for i, block in enumerate(visual.blocks):
        block.forward = PackedBlock(block, block_parts, i, windowed=False)
    output = visual(tensors["pixel_values"], tensors["grid_thw"])
    cuts = [i for i in range(len(visual.blocks)) if f"layer{i:02}.keep_global" in tensors]
    assert [stage.layer for stage in encoder.trace.stages] == cuts
    for stage in encoder.trace.stages:
        known = f"layer{stage.layer:02}."
        assert torch.equal(stage.indices[0], tensors[known + "keep_global"])
        score = stage.scores[0][stage.scores[0].isfinite()]
        assert_close(score, tensors[known + "cumulative"], rtol=2e-5, atol=1e-6)
    for layer, entropy in encoder.trace.entropy.items():
        if f"layer{layer:02}.entropy_ratio" in tensors:
            assert_close(entropy, tensors[f"layer{layer:02}.entropy_ratio"], rtol=1e-5, atol=1e-6)
    assert_close(output.pooler_output, tensors["merger_output"], rtol=2e-4, atol=2e-4)


@torch.no_grad()
def test_static_passes_copy_nothing_to_the_device(family):
    """Shapes that were there before find all their constants: a copy would wait for the device."""
    model, inputs = family.model(), family.prompt([[3, ONE, 4, OTHER, 5, FILM, 6]])
    with fk.patched(model, fk.FlowCut(7, adaptive=False)):
        model(**inputs)
        before = _constant.cache_info().misses
        model(**inputs)
    assert _constant.cache_info().misses == before


@torch.no_grad()
def test_kept_tokens_have_their_own_positions(family):
    """Read back from the tables that every decoder layer's attention is given, in a pass over the prompt and later."""
    model, inputs = family.model(), given(family, ROWS)
    text, seen = model.model.language_model, []
    for layer in text.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["position_embeddings"]), with_kwargs=True
        )
    positions = family.positions(model, inputs)
    with fk.patched(model, POLICY, record=True):
        out = model.generate(**inputs, **GREEDY)
    table = text.rotary_emb(model.get_input_embeddings()(inputs["input_ids"]), positions)
    wanted = []
    for row, ids in enumerate(inputs["input_ids"]):
        live, columns = inputs["attention_mask"][row].bool(), torch.arange(len(ids))
        gone = torch.zeros_like(live)
        for kind, token_id in (("image", IMAGE), ("video", tiny.VIDEO)):
            for mine, kept in visuals_of(family, model, inputs, kind, row):
                at = columns[ids == token_id][mine]
                gone[at] = True
                gone[at[kept]] = False
        wanted.append([x[row][live & ~gone] for x in table])
    depth = len(text.layers)
    for tables in seen[:depth]:
        for row, pair in enumerate(wanted):
            for got, want in zip(tables, pair, strict=True):
                assert torch.equal(got[row, -len(want) :], want)
    # What is written goes on behind the largest position of its row.
    after = positions.amax((0, 2)) + 1
    for step in range(STEPS - 1):
        next_ = (after + step)[None, :, None].expand(3, -1, -1)
        want = text.rotary_emb(out.logits[0][:, None], next_)
        for tables in seen[depth * (step + 1) : depth * (step + 2)]:
            assert all(torch.equal(got, x) for got, x in zip(tables, want, strict=True))


def visuals_of(family, model, inputs, kind: str, row: int):
    """Of a row's images: which of its placeholders each one has, and which of these are kept."""
    if f"{kind}_grid_thw" not in inputs:
        return
    kept = [x[x >= 0] for x in stages(model, inputs, kind=kind)[-1].indices]
    token_id = getattr(model.config, f"{kind}_token_id")
    sizes = [int(grid.prod()) // 4 for grid in inputs[f"{kind}_grid_thw"]]
    before = int((inputs["input_ids"][:row] == token_id).sum())
    mine, first = int((inputs["input_ids"][row] == token_id).sum()), 0
    for size, places in zip(sizes, kept, strict=True):
        if before <= first < before + mine:
            yield slice(first - before, first - before + size), places
        first += size


@torch.no_grad()
def test_cuts_by_frame(family):
    """Budgets of a video are spread over its frames; each cut keeps the best of a frame, the mean of whole blocks."""
    model = family.model()
    inputs = given(family, [[FILM, 3, Video(2, 40, 40, seed=5)]])
    for target in (7, 2):  # with fewer than frames, some have none
        found = stages(model, inputs, fk.FlowCut(target), "video")
        assert found[-1].kept == [target, target]
        for visual, (count, height, width) in enumerate(inputs["video_grid_thw"].tolist()):
            area = height * width // 4
            kept = [stage.indices[visual][stage.indices[visual] >= 0] // area for stage in found]
            frames = [x.bincount(minlength=count).tolist() for x in kept]
            assert frames[-1] == [target // count + (f < target % count) for f in range(count)]
            for stage, counts in zip(found, frames, strict=True):
                kept, scores = stage.indices[visual], stage.scores[visual]
                for f, left in enumerate(counts):
                    span = scores[f * area : (f + 1) * area]
                    best = span.nan_to_num(-1.0).argsort(descending=True, stable=True)[:left].sort().values
                    assert torch.equal(kept[kept // area == f] - f * area, best)


@torch.no_grad()
def test_share_of_a_frame(family):
    """Its own share of the budget each, whatever their number; then what the language model is to be given."""
    model, inputs = family.model(), given(family, [[3, FILM, 8]])
    for target, left in ((8, 12), (200, 105)):  # FILM has 3 frames of 7 x 5 tokens
        policy = fk.FlowCut(target, llm_layer=1, view_share=0.5)
        with fk.patched(model, policy, record=True):
            model(**inputs)
            kept = [stage.kept for stage in fk.trace(model).stages]
        assert kept[-2:] == ([[left], [target]] if left < 105 else [])


@torch.no_grad()
def test_entropy_of_patches(family):
    """VFlowOpt's second term, of images whose patches come one by one and in windows."""
    model, mean, std = family.model(), (0.4, 0.5, 0.3), (0.2, 0.25, 0.3)
    images = [ONE, Image(40, 72, 4)]  # multiples of a token's edge: nothing is resized
    inputs = given(family, [[*images, 3]])
    pixels = [torch.tensor(image.pixels).permute(2, 0, 1)[None] / 255 for image in images]
    flat = [(x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None] for x in pixels]
    patches = [x.unfold(2, 4, 4).unfold(3, 4, 4)[0] for x in flat]  # [3, rows, columns, 4, 4]
    blocks = [x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).permute(1, 3, 2, 4, 0, 5, 6) for x in patches]
    inputs["pixel_values"] = torch.cat([x.reshape(-1, 3 * 4 * 4) for x in blocks])
    scores = []
    for weight in (0.0, -0.7):
        policy = fk.VFlowOpt(8, hub_threshold=1e9, entropy_weight=weight, pixel_mean=mean, pixel_std=std)
        scores.append(stages(model, inputs, policy)[0].scores)
    for row, x in enumerate(flat):
        share = patch_entropy(x, 4, mean=mean, std=std)[0].softmax(0).view(*(n // 4 for n in x.shape[2:]))
        want = -0.7 * share.unfold(0, 2, 2).unfold(1, 2, 2).mean((2, 3)).flatten()
        got = (scores[1] - scores[0])[row]
        assert_close(got[got.isfinite()], want.to(got), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("images", [[ONE, OTHER], [ONE, dataclasses.replace(ONE, seed=7)]], ids=["uneven", "even"])
@torch.no_grad()
def test_attention_leaves_its_log_sum_exp(family, images, monkeypatch):
    """Of every image to VFlowOpt, whose importance is the same without; features are the stock model's, bit for bit."""
    model = family.model()
    inputs, policy, seen = given(family, [[*images, 3]]), fk.VFlowOpt(7, hub_threshold=1.6), []
    pixels = inputs["pixel_values"], inputs["image_grid_thw"]
    want = model.model.get_image_features(*pixels).pooler_output

    def received(query, key, *, lse, lengths, **options):
        seen.append(lse is not None)
        for i, rows in enumerate(lse if lse is not None else ()):
            n = rows.shape[1] if lengths is None else int(lengths[i])
            q, k = query[i, :, :n].double(), key[i, :, :n].double()
            truth = (q @ k.mT * query.shape[-1] ** -0.5).logsumexp(-1)
            assert_close(rows[:, :n], truth.float(), rtol=1e-5, atol=1e-5)
        return received_attention(query, key, lse=lse, lengths=lengths, **options)

    monkeypatch.setattr(vflowopt, "received_attention", received)
    with fk.patched(model, fk.VFlowOpt(retain_ratio=1.0, llm_stages=((1, 0.5),))):
        got = model.model.get_image_features(*pixels).pooler_output
    assert all(map(torch.equal, got, want))
    scores = stages(model, inputs, policy)[0].scores
    monkeypatch.setattr(packed_encoder, "sdpa_with_lse", lambda *_: None)
    assert_close(stages(model, inputs, policy)[0].scores, scores, rtol=1e-5, atol=1e-7, equal_nan=True)
    assert seen == [True, True, False]


@torch.no_grad()
def test_rows_of_a_window_leave_none():
    """They know its keys alone."""
    model, family = tiny.qwen("qwen2_5_vl", fullatt_block_indexes=[2]), importlib.import_module("zoo.qwen2_5_vl").FAMILY
    inputs, policy = given(family, [[OTHER, 3]]), fk.VFlowOpt(7, hub_threshold=1.6)
    found = stages(model, inputs, policy)[0].scores
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_encoder, "sdpa_with_lse", lambda *_: None)
        assert torch.equal(stages(model, inputs, policy)[0].scores, found)


@torch.no_grad()
def test_batch_mates_change_nothing(family):
    model, policy = family.model(), fk.FlowCut(6, recycle_cell=2.5, encoder_surplus=1.5)
    images = [ONE, OTHER, THIRD, Image(24, 40, 4)]
    together = given(family, [[image, 3] for image in images])
    with fk.patched(model, policy):
        whole = model.model.get_image_features(together["pixel_values"], together["image_grid_thw"]).pooler_output
        for image, want in zip(images, whole, strict=True):
            alone = given(family, [[image, 3]])
            got = model.model.get_image_features(alone["pixel_values"], alone["image_grid_thw"]).pooler_output[0]
            assert torch.equal(got.any(1), want.any(1)) and int(got.any(1).sum()) == 6
            assert_close(got, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_dropped_rows_cost_nothing(family, monkeypatch):
    """A layer that prunes gives projection and MLP the kept rows; windows that lost all rows are gone."""
    model, inputs, rows, pieces = family.model(), given(family, [[ONE, 3, THIRD]]), {}, []
    blocks = model.model.visual.blocks
    for i, block in enumerate(blocks):
        for name in ("attn.proj", "mlp"):
            block.get_submodule(name).register_forward_pre_hook(lambda _, x, at=(i, name): rows.update({at: len(x[0])}))
    blocks[-1].register_forward_pre_hook(lambda *_: pieces.clear())  # the others score

    def attend(module, query, *args, **options):
        pieces.append(query.shape[2])
        return sdpa_attention_forward(module, query, *args, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", attend)
    found = stages(model, inputs)
    left = {stage.layer: 4 * sum(stage.kept) for stage in found}
    now = len(inputs["pixel_values"])
    for i in range(len(blocks)):
        now = left.get(i, now)
        assert rows[i, "attn.proj"] == rows[i, "mlp"] == now
    assert now == 4 * 2 * 7 == sum(pieces) and min(pieces) > 0


@torch.no_grad()
def test_flash_attention(family, monkeypatch):
    """Queries that are left and all keys, in one call with lengths of their own; here by a stand-in."""

    def flash(module, query, key, value, attention_mask, *, scaling, is_causal, **lengths):
        assert attention_mask is None and not is_causal
        ends = [lengths[f"cu_seq_lens_{x}"].tolist() for x in "qk"]
        assert [max(torch.tensor(x).diff().tolist()) for x in ends] == [lengths[f"max_length_{x}"] for x in "qk"]
        parts = []
        for (a, b), (c, d) in zip(*(list(itertools.pairwise(x)) for x in ends), strict=True):
            logits = query[..., a:b, :] @ key[..., c:d, :].mT * scaling
            parts.append((logits.softmax(-1) @ value[..., c:d, :]).transpose(1, 2))
        assert ends[0][-1] == query.shape[2] and ends[1][-1] == key.shape[2]
        return torch.cat(parts, 1), None

    model, inputs = family.model(), given(family, [[ONE, 3, THIRD, 4, OTHER]])
    arguments = inputs["pixel_values"], inputs["image_grid_thw"]
    with fk.patched(model, POLICY):
        want = model.model.get_image_features(*arguments).pooler_output
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", flash)
        monkeypatch.setattr(model.model.visual.config, "_attn_implementation_internal", "flash_attention_2")
        got = model.model.get_image_features(*arguments).pooler_output
    for x, y in zip(got, want, strict=True):
        assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_loss_and_gradients(family):
    """The loss is over the columns that are left; gradients pass the cuts, with checkpointing the same ones."""
    model, inputs = family.model().train(), given(family, [[3, ONE, 4, 5, 6], [7, THIRD, OTHER, 8]])
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100)[:, :-2], inputs["input_ids"][:, -2:]], 1)
    grads = []
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        with fk.patched(model, POLICY):
            output = model(**inputs, labels=labels, use_cache=False)
            output.loss.backward()
        assert output.logits.shape[1] < labels.shape[1]
        assert_close(output.loss, cross_entropy(output.logits[:, -3:-1].flatten(0, 1), labels[:, -2:].flatten()))
        grads.append({name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None})
        model.zero_grad()
    assert grads[0]["model.visual.patch_embed.proj.weight"].abs().max() > 0
    for name, x in grads[0].items():
        assert_close(grads[1][name], x, msg=name)


@torch.no_grad()
def test_features_made_elsewhere(family):
    """Those that the patched model made are pruned, those of another model are whole."""
    model, inputs = family.model(), given(family, [[3, ONE, 4, OTHER, 5]])
    if "mm_encoder_outputs" not in inspect.signature(type(model).forward).parameters:
        pytest.skip("this transformers encodes no features beforehand")
    pixels, grid = inputs.pop("pixel_values"), inputs["image_grid_thw"]
    whole = model(**inputs, pixel_values=pixels).logits
    stock = model.model.get_image_features(pixels, grid, return_dict=True)
    with fk.patched(model, POLICY):
        assert_close(model(**inputs, mm_encoder_outputs=dict(image=stock)).logits, whole)
        ahead = model.model.get_image_features(pixels, grid, return_dict=True)
        want = model(**inputs, pixel_values=pixels).logits
        assert want.shape[1] < whole.shape[1]
        assert torch.equal(model(**inputs, mm_encoder_outputs=dict(image=ahead)).logits, want)


@torch.no_grad()
def test_caches(family):
    """Static and compacted ones give what a growing one gives."""
    model, inputs = family.model(), given(family, ROWS[:3])
    policy = fk.FlowCut(5, llm_layer=0)
    with fk.patched(model, POLICY):
        want = model.generate(**inputs, **GREEDY)
        length = inputs["input_ids"].shape[1]
        assert want.past_key_values.get_seq_length() == length + STEPS - 1
        live, ids = inputs["attention_mask"].sum(1), inputs["input_ids"]
        text = live - torch.isin(ids, torch.tensor([IMAGE, tiny.VIDEO])).sum(1)
        rows = int((text + torch.tensor([2 * 7, 7, 0])).max()) + STEPS - 1
        assert all(layer.keys.shape[2] == rows for layer in want.past_key_values.layers)
        static = model.generate(**inputs, **GREEDY, cache_implementation="static", disable_compile=True)
    with fk.patched(model, POLICY, compact_cache=True):  # no layer of the language model drops more
        compacted = model.generate(**inputs, **GREEDY)
    for other in (static, compacted):
        assert torch.equal(other.sequences, want.sequences)
        assert_close(torch.stack(other.logits), torch.stack(want.logits), rtol=1e-4, atol=1e-4)
    with fk.patched(model, policy, compact_cache=True):
        out = model.generate(**inputs, **GREEDY)
        assert len({layer.keys.shape[2] for layer in out.past_key_values.layers}) == 1


@torch.no_grad()
def test_an_image_in_a_later_turn(family):
    """A prompt in two passes over one cache, each with images, answers as in one."""
    model, turns = family.model(), [[3, ONE, 4, 5], [6, OTHER, FILM, 7, 8]]
    whole, parts = given(family, [turns[0] + turns[1]]), [given(family, [turn]) for turn in turns]
    positions, cache, seen = family.positions(model, whole), DynamicCache(config=model.config.get_text_config()), 0
    with fk.patched(model, POLICY):
        want = model(**whole).logits
        for inputs in parts:
            length = inputs["input_ids"].shape[1]
            inputs["position_ids"] = positions[..., seen : seen + length]
            seen += length
            inputs["attention_mask"] = torch.ones(1, seen, dtype=torch.long)
            got = model(**inputs, past_key_values=cache).logits
            assert cache.get_seq_length() == seen
    assert_close(got, want[:, -got.shape[1] :], rtol=1e-3, atol=1e-3)


def refused(model, policy, match: str, inputs: dict | None = None, **settings) -> None:
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=match):
        if inputs is None:
            fk.patch(model, policy)
        else:
            with fk.patched(model, policy), torch.no_grad():
                model.generate(**inputs, **settings)
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()


def test_bad_input(family):
    model, inputs = family.model(), given(family, ROWS)
    for policy, match in (
        (fk.FlowCut.release(8), "positions='renumber'"),
        (fk.FlowCut(8, anchor="cls"), "anchor='cls'"),
        (fk.FlowCut(8, feature_layer=-2), "feature_layer=-2"),
        (fk.FlowCut(8, llm_layer=9), "llm_layer=9"),
        (fk.VisionZip(8), "class token"),
    ):
        refused(model, policy, match)
    refused(model, POLICY, "image_grid_thw is missing", {k: x for k, x in inputs.items() if k != "image_grid_thw"})
    if "mm_encoder_outputs" in inspect.signature(type(model).forward).parameters:  # else the stock model fails too
        refused(model, POLICY, "prefill_chunk_size", inputs, prefill_chunk_size=20, max_new_tokens=2)
    frozen = fk.calibrate(model, fk.FlowCut(retain_ratio=0.2), given(family, [[ONE, 3], [ONE, 4]]))
    refused(model, frozen, "calibrate with images like these", inputs, max_new_tokens=1)


def test_sliding_windows(family):
    """All policies drop tokens at the entrance of the language model: none is named that would not."""
    model = family.model()
    model.config.text_config.sliding_window, model.config.text_config.layer_types = 16, ["sliding_attention"] * 4
    refused(model, POLICY, "sliding_window=16.*load the model with None there$")


@torch.no_grad()
def test_calibrated(family):
    """Without a look at their entropy images keep what the schedule says, of different sizes a share."""
    model, inputs = family.model(), given(family, [[ONE, 3, dataclasses.replace(ONE, seed=7)]])
    frozen = fk.calibrate(model, POLICY, inputs)
    assert [stage.kept for stage in stages(model, inputs, frozen)] == [[n, n] for _, n in frozen.schedule]
    inputs = given(family, [[ONE, 3, OTHER]])
    frozen = fk.calibrate(model, POLICY, [inputs])
    found = stages(model, inputs, frozen)
    tokens, ends = found[0].scores.isfinite().sum(1).tolist(), found[-1].kept
    for stage, (_, share) in zip(found, frozen.schedule, strict=True):
        assert stage.kept == [end + round(share * (n - end)) for n, end in zip(tokens, ends, strict=True)]


@torch.no_grad()
def test_compiles_as_one_graph(family):
    """With sizes as a list, where nobody counts windows."""
    if family.name == "qwen2_5_vl":
        pytest.skip("a cut reads back whose windows its tokens are of")
    model, inputs = tiny.qwen(family.name, depth=4), given(family, [[ONE, 3, OTHER]])
    visual, pixels, grid = model.model.visual, inputs["pixel_values"], inputs["image_grid_thw"]
    compiled = torch.compile(visual, fullgraph=True, backend="eager")
    with fk.patched(model, fk.calibrate(model, POLICY, [inputs])):
        for x in (pixels, torch.randn_like(pixels)):
            assert_close(compiled(x, grid_thw=grid.tolist()).pooler_output, visual(x, grid).pooler_output)


@torch.no_grad()
def test_layers_share_what_they_know_of_the_prompt(family):
    """Behind one cut all layers hold the same columns: they are made once, not by every layer."""
    model, inputs = family.model(), given(family, [[ONE, 3, OTHER], [3, 4]])
    with fk.patched(model, POLICY):
        cache = model(**inputs).past_key_values
    assert len({id(layer.columns) for layer in cache.layers}) == 1
    assert all(layer.keys.shape[2] == layer.columns.shape[1] for layer in cache.layers)
