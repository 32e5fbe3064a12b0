"""VFlowOpt.release() against recorded runs of the authors' released code (../shared/golden)."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from golden_cases import golden_manifest, golden_tensors, one_image
from torch.testing import assert_close
from transformers import LlavaOnevisionConfig, LlavaOnevisionModel, Qwen2Config, Qwen2Model, SiglipVisionConfig

import flowcut_kernels as fk
from flowcut_kernels._ops import Select
from flowcut_kernels.models.llava_onevision import OnevisionImages
from flowcut_kernels.models.llm import decoder_replacements
from flowcut_kernels.modules.decoder import EncodedTokens
from flowcut_kernels.ops import patch_entropy
from flowcut_kernels.policies import vflowopt
from flowcut_kernels.policies.base import EncoderStep, EncoderView, FeatureView, Pixels
from flowcut_kernels.trace import Trace

CASES = golden_manifest()


def cases(kind: str) -> list:
    found = [name for name, case in CASES.items() if case["kind"] == kind]
    return found or [pytest.param("", marks=pytest.mark.skip("no ../shared/golden"))]


def seen(attention: torch.Tensor) -> EncoderView:
    """A layer with this attention [B, H, N, N]: one-hot queries, and keys that are the logarithms of its columns."""
    query = torch.eye(attention.shape[-1]).expand_as(attention).contiguous() * attention.shape[-1] ** 0.5
    key = attention.log().clamp_min(-1e4).transpose(2, 3).contiguous()
    side = round(attention.shape[-1] ** 0.5)
    return EncoderView(
        key, key, query, lambda kind: None, 0, None, None, (side, side),
        Pixels(torch.empty(0), (), (), 14), None,
    )  # fmt: skip


@pytest.mark.parametrize("name", cases("vflowopt_attention_map"))
def test_importance(name, monkeypatch):
    """Where no token is a hub the released code has NaN, and this what tokens receive."""
    case, tensors = CASES[name], golden_tensors(name)
    monkeypatch.setattr(vflowopt, "patch_entropy", lambda *_, **options: tensors["entropy"])  # of wrapped bytes
    policy = fk.VFlowOpt(retain_ratio=0.5, hub_threshold=case["t"], entropy_weight=case["alpha_v"])
    found = policy.encoder_select(EncoderStep(Select.SCORE_ONLY), seen(tensors["attention"]))
    expected, received = tensors["combined_map"], tensors["attention"].mean((1, 2))
    if case["alpha_v"]:
        received += case["alpha_v"] * tensors["entropy"].softmax(1)
    hubs = tensors["selected_query_counts"][:, None]
    assert torch.equal(expected.isnan(), (hubs == 0).expand_as(expected))
    assert_close(found.score, expected.where(hubs > 0, received), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", cases("vflowopt_entropy"))
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_entropy(name, dtype):
    """The released code's, of the bytes that it looked at; they had wrapped around, and this is all that differs."""
    tensors = golden_tensors(name)
    found = patch_entropy(tensors[f"cast_uint8_{dtype}"], CASES[name]["patch"])
    assert_close(found, tensors[f"entropy_{dtype}"], rtol=0, atol=2e-6)
    image = tensors["image_uint8"].permute(0, 3, 1, 2)
    assert not torch.equal(image, tensors[f"cast_uint8_{dtype}"])
    half = dict(mean=[0.5] * 3, std=[0.5] * 3)
    assert torch.equal(patch_entropy(tensors["pixel_values"], 14, **half), patch_entropy(image, 14))


@pytest.mark.parametrize("name", cases("vflowopt_topk"))
def test_plain_images(name):
    case, tensors = CASES[name], golden_tensors(name)
    weight = tensors["attn_map"]
    images, patches = weight.shape
    side = math.isqrt(patches)
    policy = fk.VFlowOpt(retain_ratio=case["ratio"], counts="release")
    view = FeatureView(
        torch.arange(weight.numel())[:, None].float(), weight.flatten(), [patches] * images, [((side, side),)] * images,
        None, None, None,
    )  # fmt: skip
    choice = policy.feature_select(view)
    assert torch.equal(choice.index.view(images, -1) - patches * torch.arange(images)[:, None], tensors["keep_indices"])
    assert torch.equal(choice.features[:, 0].long(), choice.index) and not choice.recycled.any()
    assert torch.equal(weight.flatten()[choice.index], tensors["llm_attn_map"])


@pytest.mark.parametrize("name", cases("vflowopt_recycle_anyres"))
def test_recycling(name):
    case, tensors = CASES[name], golden_tensors(name)
    width, height = case["original_size_wh"]
    (across, down), side, size = case["grid_wh"], case["side"], case["image_size"]
    vision = SiglipVisionConfig(image_size=size, patch_size=size // side)
    model = object.__new__(LlavaOnevisionModel)
    model.__dict__["config"] = LlavaOnevisionConfig(
        vision_config=vision, image_grid_pinpoints=[[down * size, across * size]]
    )
    images, shape = OnevisionImages(model, 0), (height, width)
    aspect = dict(vision_aspect_ratio=f"anyres_max_{case['max_num_patches']}")
    newline = torch.full((tensors["features"].shape[2],), case["image_newline_value"])
    (packed,) = images.pack([tensors["features"]], [shape], newline, aspect)
    weight = images.pack([tensors["attn_maps"][..., None]], [shape], torch.ones(1), aspect)[0][:, 0]
    grids = images.layout(shape, len(tensors["features"]), aspect).grids
    assert len(packed) == len(weight) == sum(rows * columns for rows, columns in grids)
    policy = fk.VFlowOpt(retain_ratio=case["ratio"], recycle_cell=case["m"], counts="release")
    choice = policy.feature_select(FeatureView(packed, weight, [len(packed)], [grids], None, None, None))
    assert choice.lengths == [case["image_token_length"]]
    assert_close(weight[choice.index], tensors["out_attn_map"], rtol=0, atol=1e-5)
    assert_close(choice.features, tensors["out_features"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", cases("vflowopt_llm_stage"))
@torch.no_grad()
def test_stages(name):
    """Kept positions; the recorded hidden states lack a causal mask in one layer."""
    case, tensors = CASES[name], golden_tensors(name)
    model = Qwen2Model(Qwen2Config(vocab_size=8, **case["config"])).eval()
    weights = {k.removeprefix("weights."): x for k, x in tensors.items() if k.startswith("weights.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all("embed" in x for x in missing)
    start, count = case["image_start"], case["image_tokens"]
    length = tensors["inputs_embeds"].shape[1]
    record = SimpleNamespace(trace=Trace())
    stages = tuple(zip(case["layers"], case["ratios"], strict=True))
    policy = fk.VFlowOpt(retain_ratio=0.5, llm_stages=stages, counts="release")
    _, replacements = decoder_replacements(model, policy, count, record)
    for module, attribute, replacement in replacements:
        setattr(module, attribute, replacement)
    visual = one_image(start, count, length)
    visual.encoded = lambda: EncodedTokens(tensors["vit_attn_map"][None], None)
    out = model(inputs_embeds=tensors["inputs_embeds"], visual_tokens=visual, use_cache=True)
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == case["tokens_per_layer"]
    cuts = {stage.layer + 1: stage.indices[0] for stage in record.trace.stages}
    text = [i for i in range(length) if not start <= i < start + count]
    kept = torch.arange(count)
    for i, layer in enumerate(case["layers"]):
        kept = cuts.get(layer, kept)  # a ratio of 1 cuts nothing
        assert sorted(text + (kept + start).tolist()) == tensors[f"stage{i}.kept_positions"].tolist()
