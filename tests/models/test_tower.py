"""Bare vision towers: what users of CLIPVisionModel and SiglipVisionModel get from a patched one."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from tiny import PATCHES
from torch.testing import assert_close
from transformers import CLIPVisionConfig, CLIPVisionModel

import flowcut_kernels as fk

KINDS = pytest.mark.parametrize("kind", ["clip", "siglip"])
ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])
POLICY = fk.FlowCut(8)


@KINDS
@ATTENTION
@pytest.mark.parametrize("policy", [fk.FlowCut(PATCHES), fk.FlowCut.release(10**6), fk.RandomTokens(retain_ratio=1.0)])
@torch.no_grad()
def test_budget_of_everything_changes_nothing(kind, attention, policy):
    model, pixels = tiny.TOWERS[kind](attention), tiny.images(2)
    want = model(pixels, output_hidden_states=True)
    with fk.patched(model, policy, record=True):
        got = model(pixels, output_hidden_states=True)
        assert fk.trace(model).stages == []
    assert torch.equal(got.last_hidden_state, want.last_hidden_state)
    assert torch.equal(got.pooler_output, want.pooler_output)
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        assert torch.equal(a, b)


@KINDS
@torch.no_grad()
def test_hidden_states_keep_their_numbers(kind):
    """hidden_states[i] is the output of layer i - 1, with the tokens that its cut left, as the trace says."""
    model, pixels, protect = tiny.TOWERS[kind](), tiny.images(3), int(kind == "clip")
    stock = model(pixels, output_hidden_states=True)
    with fk.patched(model, POLICY, record=True):
        output = model(pixels, output_hidden_states=True)
        stages = {s.layer: max(s.kept) for s in fk.trace(model).stages}
        as_tuple = model(pixels, return_dict=False)
        plain = model(pixels)
    assert len(output.hidden_states) == tiny.LAYERS + 1
    assert torch.equal(output.hidden_states[0], stock.hidden_states[0])
    tokens = PATCHES
    for layer, states in enumerate(output.hidden_states[1:]):
        tokens = stages.get(layer, tokens)
        assert states.shape[1] == tokens + protect
    assert output.last_hidden_state.shape[1] == 8 + protect
    # Up to the first cut nothing differs, but for rounding: the queries of a scored layer are computed apart.
    first = min(stages)
    for a, b in zip(output.hidden_states[: first + 1], stock.hidden_states[: first + 1], strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-5)
    for same in (as_tuple[0], plain.last_hidden_state):
        assert torch.equal(same, output.last_hidden_state)
    assert torch.equal(as_tuple[1], plain.pooler_output)
    if kind == "clip":
        assert torch.equal(model.post_layernorm(output.hidden_states[-1][:, 0]), output.pooler_output)


@KINDS
@torch.no_grad()
def test_eager_equals_sdpa(kind):
    pixels, seen = tiny.images(3), []
    for attention in ("sdpa", "eager"):
        model = tiny.TOWERS[kind](attention)
        with fk.patched(model, POLICY, record=True):
            seen.append((model(pixels).last_hidden_state, fk.trace(model).stages))
    (a, stages), (b, others) = seen
    assert_close(a, b, rtol=1e-3, atol=1e-3)
    for x, y in zip(stages, others, strict=True):
        assert torch.equal(x.indices, y.indices)


@KINDS
@torch.no_grad()
def test_attention_is_the_models_own(kind, monkeypatch):
    """The configured function is called at every layer, also where tokens are dropped and the batch is ragged."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = tiny.TOWERS[kind]()
    calls, masked, sdpa = [], [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module, query, key, value, mask, **kwargs):
        calls.append((query.shape[2], key.shape[2]))
        masked.append(mask is not None)
        return sdpa(module, query, key, value, mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy)
    with fk.patched(model, POLICY, record=True):
        model(tiny.images(3))
        traced = fk.trace(model).stages
        stages = {s.layer: max(s.kept) for s in traced}
    protect, tokens, want = int(kind == "clip"), PATCHES, []
    for layer in range(tiny.LAYERS):
        kept = stages.get(layer, tokens)
        want.append((kept + protect, tokens + protect))
        tokens = kept
    assert calls == want
    # Only while images differ in length is there a mask, and never for one image.
    ragged = [layer for layer, s in ((s.layer, s) for s in traced) if len(set(s.kept)) > 1]
    assert masked == [any(r < layer <= min(c for c in stages if c > r) for r in ragged) for layer in range(tiny.LAYERS)]
    assert any(masked)
    masked.clear()
    with fk.patched(model, POLICY):
        model(tiny.images(1))
    assert not any(masked)


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision(kind, dtype):
    """As close to the fp32 run as the stock tower is, where both keep the same."""
    model, pixels = tiny.TOWERS[kind](), tiny.images(2)
    low = copy.deepcopy(model).to(dtype)
    noise = (low(pixels.to(dtype)).last_hidden_state - model(pixels).last_hidden_state).abs().mean()
    policy = fk.UniformTokens(8)
    with fk.patched(model, policy), fk.patched(low, policy):
        error = (low(pixels.to(dtype)).last_hidden_state - model(pixels).last_hidden_state).abs().mean()
    assert error < 2 * noise
    with fk.patched(low, POLICY, record=True):
        output = low(pixels.to(dtype))
        assert fk.trace(low).stages[-1].kept == [8, 8]
    assert output.last_hidden_state.dtype == dtype and output.last_hidden_state.isfinite().all()


@KINDS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38])
@torch.no_grad()
def test_not_finite(kind, value):
    """Named by image and layer, and the model goes on working."""
    model, pixels = tiny.TOWERS[kind](), tiny.images(3)
    broken = pixels.clone()
    broken[1, :, 3, 3] = value
    with fk.patched(model, POLICY):
        want = model(pixels).last_hidden_state
        with pytest.raises(
            ValueError, match=r"sample\(s\) \[1\] at encoder layer \d+ hold NaN or Inf: check pixel_values"
        ):
            model(broken)
        assert torch.equal(model(pixels).last_hidden_state, want)


@KINDS
@pytest.mark.parametrize("shape", [(10, 6), (9, 9)])
@torch.no_grad()
def test_other_image_sizes(kind, shape):
    """interpolate_pos_encoding: the budget and the numbering follow the image's own grid."""
    model = tiny.TOWERS[kind]()
    pixels = torch.nn.functional.interpolate(tiny.images(2), size=[n * tiny.PATCH for n in shape])
    patches = shape[0] * shape[1]
    with fk.patched(model, fk.FlowCut(retain_ratio=0.25), record=True):
        output = model(pixels, interpolate_pos_encoding=True)
        last = fk.trace(model).stages[-1]
    assert last.kept == [round(patches / 4)] * 2
    assert last.scores.shape == (2, patches) and last.indices.max() < patches
    assert output.last_hidden_state.shape[1] == last.kept[0] + (kind == "clip")


@KINDS
def test_gradients_reach_the_pixels(kind):
    """Every image gets some, and so do all layers, those after the last cut included."""
    model, pixels = tiny.TOWERS[kind]().train(), tiny.images(2).requires_grad_()
    with fk.patched(model, POLICY):
        model(pixels).last_hidden_state.square().sum().backward()
    assert pixels.grad.isfinite().all() and (pixels.grad.flatten(1).abs().amax(1) > 0).all()
    for layer in model.encoder.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.out_proj, layer.mlp.fc1):
            assert part.weight.grad.isfinite().all() and part.weight.grad.abs().max() > 0


@KINDS
@torch.no_grad()
def test_dropout_of_the_attention_is_kept(kind):
    """In training mode the model's own attention dropout applies at the pruning layer as well, in eval mode never."""
    model, pixels = tiny.TOWERS[kind](), tiny.images(1)
    cut = tiny.LAYERS - 2 - (kind == "clip")
    model.encoder.layers[cut].self_attn.dropout = 0.9
    with fk.patched(model, fk.UniformTokens(8), record=True):
        assert torch.equal(model(pixels)[0], model(pixels)[0])
        assert fk.trace(model).stages[0].layer == cut
        model.train()
        assert not torch.equal(model(pixels)[0], model(pixels)[0])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")
@KINDS
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(kind, reentrant):
    """Layers run again in the backward pass, last first: the same choice, the same gradients, one trace."""
    model, results = tiny.TOWERS[kind]().train(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        model.zero_grad()
        pixels = tiny.images(3).requires_grad_()
        with fk.patched(model, POLICY, record=True):
            model(pixels).last_hidden_state.square().sum().backward()
            stages = fk.trace(model).stages
        results.append(
            (pixels.grad, stages, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
    (pixels, stages, gradients), (again, repeated, others) = results
    assert any(len(set(stage.kept)) > 1 for stage in stages), "never ragged: the test is too weak"
    assert [(s.layer, s.kept) for s in stages] == [(s.layer, s.kept) for s in repeated]
    assert_close(again, pixels, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert_close(others[name], gradient, rtol=1e-4, atol=1e-4)


@KINDS
def test_refused_requests(kind):
    model, pixels = tiny.TOWERS[kind]("eager"), tiny.images(1)
    with fk.patched(model, POLICY):
        with pytest.raises(ValueError, match=r"output_attentions=True .* form no attention map: unpatch first"):
            model(pixels, output_attentions=True)
        with pytest.raises(ValueError, match="attention_mask was passed to a patched vision encoder"):
            model.encoder(torch.zeros(1, 65, 32), attention_mask=torch.zeros(1, 1, 65, 65))
        model(pixels, is_causal=False)  # what transformers adds where a configuration has the field


@KINDS
@pytest.mark.parametrize("layer", [0, 1, tiny.LAYERS + 1, -tiny.LAYERS, -tiny.LAYERS - 5])
def test_feature_layers_that_leave_nothing_to_prune(kind, layer):
    model = tiny.TOWERS[kind]()
    with pytest.raises(ValueError, match=rf"feature_layer={layer} of 8 layers .* use 2\.\.8 or -7\.\.-1"):
        fk.patch(model, fk.FlowCut(8, feature_layer=layer))
    for policy in (POLICY, fk.RandomTokens(8, feature_layer=2), fk.FlowCut(8, feature_layer=-1)):
        with fk.patched(model, policy), torch.no_grad():
            assert model(tiny.images(1))[0].shape[1] == 8 + (kind == "clip")


@torch.no_grad()
def test_one_layer_is_enough():
    """The smallest schedule: one cut on the output of layer 0, scored from the embeddings."""
    config = CLIPVisionConfig(**(tiny.VISION | dict(num_hidden_layers=2)), image_size=14)
    model = tiny.fill(CLIPVisionModel(config), 5)
    with fk.patched(model, fk.FlowCut(1, feature_layer=-1), record=True):
        output = model(tiny.images(2, side=2))
        stages = fk.trace(model).stages
    assert [(s.layer, s.kept) for s in stages] == [(0, [1, 1])]
    assert output[0].shape[1] == 2


@torch.no_grad()
def test_single_patch():
    """An image of one patch: nothing to choose."""
    config = CLIPVisionConfig(**tiny.VISION, image_size=tiny.PATCH)
    model = tiny.fill(CLIPVisionModel(config), 5)
    pixels = tiny.images(2, side=1)
    want = model(pixels)[0]
    for policy in (fk.FlowCut(1), fk.FlowCut(retain_ratio=0.01), fk.UniformTokens(3)):
        with fk.patched(model, policy):
            assert torch.equal(model(pixels)[0], want)


@KINDS
@torch.no_grad()
def test_blank_images(kind):
    """All patches alike but for their position, a whole batch of them: no NaN from flat attention, exact budget."""
    model = tiny.TOWERS[kind]()
    for weights in (None, 0.0):
        if weights is not None:
            model.embeddings.position_embedding.weight.fill_(weights)  # now every patch ties with every other
        with fk.patched(model, POLICY, record=True):
            output = model(torch.zeros_like(tiny.images(2)))
            last = fk.trace(model).stages[-1]
        assert last.kept == [8, 8] and output[0].isfinite().all()
    if kind == "siglip":  # exact ties go to the lower index
        assert last.indices.tolist() == [list(range(8))] * 2


@KINDS
def test_inference_mode_and_views(kind):
    """Channels-last and sliced pixels give what contiguous ones give, as nearly as they do in the stock model."""
    model, pixels = tiny.TOWERS[kind](), tiny.images(4)
    plain = pixels[::2].contiguous()
    for given in (pixels[::2], plain.to(memory_format=torch.channels_last)):
        with torch.inference_mode():
            stock = (model(given)[0] - model(plain)[0]).abs().max().item()  # its convolution may round differently
            with fk.patched(model, POLICY):
                assert_close(model(given)[0], model(plain)[0], rtol=0, atol=max(1e-4, 10 * stock))
