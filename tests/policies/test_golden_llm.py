"""FlowCut's stage in the language model against recorded runs of the authors' released code (../shared/golden)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from golden_cases import golden_manifest, golden_tensors, one_image
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaModel

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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", cases("flowcut_llm_model"))
@torch.no_grad()
def test_model(name, attention):
    case, tensors = CASES[name], golden_tensors(name)
    model = LlamaModel(LlamaConfig(vocab_size=8, **case["config"])).eval()
    model.set_attn_implementation(attention)
    weights = {k.removeprefix("weights."): x for k, x in tensors.items() if k.startswith("weights.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all("embed" in x for x in missing)
    start, count, length = case["visual_start"], case["visual_num"], case["last_instruct_pos"]
    policy = fk.FlowCut.release(case["target"], llm_layer=case["prune_layer"])
    record = SimpleNamespace(trace=Trace())
    _, replacements = decoder_replacements(model, policy, count, record)
    for module, attribute, replacement in replacements:
        setattr(module, attribute, replacement)
    visual = one_image(start, count, length)
    out = model(inputs_embeds=tensors["inputs_embeds"], visual_tokens=visual, use_cache=True, output_hidden_states=True)
    (stage,) = record.trace.stages
    assert torch.equal(stage.indices, tensors["keep_indices"])
    assert [x.shape[1] for x in out.hidden_states] == case["hidden_lengths"]
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == case["kv_lengths"]
    assert_close(out.hidden_states[case["prune_layer"] + 1], tensors["hidden_after_prune_layer"], rtol=1e-4, atol=1e-5)
    assert_close(out.last_hidden_state, tensors["last_hidden_state"], rtol=1e-4, atol=1e-5)
