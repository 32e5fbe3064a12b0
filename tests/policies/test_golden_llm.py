"""FlowCut's stage in the language model against recorded runs of the authors' released code (../shared/golden)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from golden_cases import golden_manifest, golden_tensors, one_image
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaModel, Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

import flowcut_kernels as fk
from flowcut_kernels import _library
from flowcut_kernels.models.llm import decoder_replacements
from flowcut_kernels.policies.base import DecoderView, VisualHeads
from flowcut_kernels.trace import Trace

CASES = golden_manifest()


def cases(kind: str) -> list:
    found = [name for name, case in CASES.items() if case["kind"] == kind]
    return found or [pytest.param("", marks=pytest.mark.skip("no ../shared/golden"))]


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("name", cases("flowcut_llm_attention"))
def test_choice(name, backend):
    if backend == "cpp" and (reason := _library.native_error()):
        pytest.skip(f"C++ form not built: {reason}")
    if backend == "triton" and (reason := _library.triton_error()):
        pytest.skip(reason)
    case, tensors = CASES[name], golden_tensors(name)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    query, key, value = (tensors[x].to(device) for x in ("query", "key", "value"))
    visual, ask = slice(case["visual_start"], case["visual_start"] + case["visual_num"]), case["last_instruct_pos"] - 1
    choice = fk.FlowCut.release(case["target"], llm_layer=1).decoder_select(
        DecoderView(
            layer=1,
            full=[case["visual_num"]] * len(query),
            budgets=[case["target"]] * len(query),
            lengths=[case["visual_num"]] * len(query),
            importance=None,
            heads=lambda: VisualHeads(
                query=query[:, :, ask : ask + 1],
                key=key[:, :, visual],
                value=value[:, :, visual],
                value_anchor=value[:, :, ask : ask + 1],
            ),
            scores=None,
            hidden=pytest.fail,
            attention=pytest.fail,
            backend=backend,
        )
    )
    assert torch.equal(choice.index.cpu(), tensors["keep_indices"])
    got, want = choice.score.cpu(), tensors["score"]
    assert_close(got / got.sum(1, keepdim=True), want / want.sum(1, keepdim=True), rtol=1e-4, atol=0)


def run(model, attention, tensors, prefix, policy, *, visual_tokens, **inputs):
    """What `model` makes of a prompt under `policy`, with the weights behind `prefix`, and the cut that it records."""
    model.set_attn_implementation(attention)
    weights = {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all("embed" in x for x in missing)
    record = SimpleNamespace(trace=Trace())
    _, replacements = decoder_replacements(model, policy, visual_tokens.full[0], record)
    for module, attribute, replacement in replacements:
        setattr(module, attribute, replacement)
    out = model(visual_tokens=visual_tokens, use_cache=True, output_hidden_states=True, **inputs)
    (stage,) = record.trace.stages
    return out, stage


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", cases("flowcut_llm_model"))
@torch.no_grad()
def test_model(name, attention):
    case, tensors = CASES[name], golden_tensors(name)
    model = LlamaModel(LlamaConfig(vocab_size=8, **case["config"])).eval()
    policy = fk.FlowCut.release(case["target"], llm_layer=case["prune_layer"])
    embeds, length = tensors["inputs_embeds"], case["last_instruct_pos"]
    visual = one_image(case["visual_start"], case["visual_num"], length, batch=len(embeds))
    out, stage = run(model, attention, tensors, "weights.", policy, inputs_embeds=embeds, visual_tokens=visual)
    assert torch.equal(stage.indices, tensors["keep_indices"])
    assert [x.shape[1] for x in out.hidden_states] == case["hidden_lengths"]
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == case["kv_lengths"]
    assert_close(out.hidden_states[case["prune_layer"] + 1], tensors["hidden_after_prune_layer"], rtol=1e-4, atol=1e-5)
    assert_close(out.last_hidden_state, tensors["last_hidden_state"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", cases("flowcut_qwen_model"))
@torch.no_grad()
def test_qwen(name, attention):
    """The features and positions that the released code gave its language model; those after the cut are as before."""
    case, tensors = CASES[name], golden_tensors(name)
    (ids,), start, left = tensors["input_ids"], case["visual_start"], case["vit_target_merged"]
    image = ids == ids[start]
    stays = ~image
    stays[start : start + left] = True
    words, width = tensors["weights.model.embed_tokens.weight"].shape
    keys, inner = (len(tensors[f"weights.model.layers.0.{x}.weight"]) for x in ("self_attn.k_proj", "mlp.gate_proj"))
    head = 16  # like the two below not in the manifest: with others the recorded scores do not come out
    config = Qwen2VLTextConfig(
        vocab_size=words, hidden_size=width, intermediate_size=inner, num_hidden_layers=len(case["kv_lengths"]),
        num_attention_heads=width // head, num_key_value_heads=keys // head, rms_norm_eps=1e-5, pad_token_id=None,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3]),
    )  # fmt: skip
    embeds = tensors["weights.model.embed_tokens.weight"][ids]
    embeds[start : start + left] = tensors["vit_output"]
    policy = fk.FlowCut.release(case["user_target"], llm_layer=1, positions="keep")
    out, stage = run(
        Qwen2VLTextModel(config).eval(), attention, tensors, "weights.model.", policy,
        inputs_embeds=embeds[stays][None], position_ids=tensors["position_ids"][:, :, stays],
        visual_tokens=one_image(start, left, int(stays.sum())),
    )  # fmt: skip
    assert torch.equal(stage.indices[0], tensors["llm_keep_indices"])
    assert_close(stage.scores, tensors["llm_score"], rtol=1e-4, atol=0)
    assert [x.shape[1] for x in out.hidden_states] == case["hidden_lengths"]
    assert_close(out.last_hidden_state, tensors["last_hidden_state"], rtol=1e-4, atol=1e-5)
