"""Models that are not stock: refused with the reason and what to do, or served as they are."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_patching import POLICY, assert_same, run, snapshot
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import Image, idefics3, llava_next, llava_onevision, qwen2_5_vl, video_llava

import flowcut_kernels as fk


class Odd(nn.Module):
    """Of no family."""


class Wrapper(nn.Module):
    """What DistributedDataParallel, PEFT and others put around a model."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Module()
        self.base.module = tiny.llava()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (Odd, "CONTRIBUTING.md says how to add one (Adding a model family)"),
        (Wrapper, "It holds one of them: patch that, .base.module"),
        (lambda: tiny.llava().model, "Its family is supported: patch the whole LlavaForConditionalGeneration"),
        (lambda: tiny.qwen("qwen2_vl").model.visual, "patch the whole Qwen2VLForConditionalGeneration"),
        (lambda: SimpleNamespace(model=tiny.llava()), "It holds one of them: patch that, .model"),  # a pipeline
        (lambda: "llava-hf/llava-1.5-7b-hf", "Give an instance, as from_pretrained returns it"),
        (lambda: type(tiny.llava()), "Give an instance, as from_pretrained returns it"),
    ],
)
def test_unknown_classes(build, words):
    model = build()
    names = ", ".join(c.__name__ for c in fk.supported_models())
    said = f"{type(model).__name__} is not supported; supported models: {names}"
    with pytest.raises(TypeError, match=re.escape(said) + ".*" + re.escape(words)):
        fk.patch(model, POLICY)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(record="yes"), "record='yes' must be True or False"),
        (dict(compact_cache=1), "compact_cache=1 must be True or False"),
        (dict(policy=nn.Linear(1, 1)), "policy=a Linear is not a policy: use for example"),
        (dict(policy=8), "policy=8 is not a policy"),
    ],
)
def test_arguments_of_another_type(options, words):
    model = tiny.llava()
    before = snapshot(model)
    with pytest.raises(TypeError, match=words):
        fk.patch(model, **dict(policy=POLICY) | options)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("call", [fk.unpatch, fk.trace])
def test_what_is_around_a_patched_model(call):
    """Is not patched, and says what is."""
    outer = Wrapper()
    model = fk.patch(outer.base.module, POLICY)
    for around, name in ((outer, ".base.module"), (SimpleNamespace(model=model), ".model")):
        words = f"this {type(around).__name__} is not patched: it holds a model that is: give that, {name}"
        with pytest.raises(ValueError, match=re.escape(words)):
            call(around)


def test_remote_code():
    """Its class may have the name of a supported one."""
    remote = type("LlavaForConditionalGeneration", (Odd,), dict(__module__="transformers_modules.some.model.modeling"))
    with pytest.raises(TypeError, match=r"came with its checkpoint.*without trust_remote_code=True"):
        fk.patch(remote(), POLICY)


# Quantised weights: projections are called, and never read.


class Int8(nn.Linear):
    """As bitsandbytes and GPTQ make them: a linear layer of integers and scales, without a weight to multiply with."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.scale = nn.Parameter(linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        codes = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantised(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, Int8(child))
    return model


@pytest.mark.parametrize("policy", [fk.FlowCut(9, llm_layer=1), fk.VFlowOpt(9, llm_stages=((1, 0.5),))], ids=str)
@torch.no_grad()
def test_quantised_linear_layers(policy):
    """In tower and language model: what a model gives that has the rounded weights."""
    model, rounded = quantised(tiny.llava()), tiny.llava()
    for name, module in model.named_modules():
        if isinstance(module, Int8):
            rounded.get_submodule(name).weight.copy_(module.weight * module.scale)
    ids, pixels = torch.tensor([[1] + [tiny.IMAGE] * tiny.PATCHES + [5, 6, 7]]), tiny.images(1)
    stock = model(ids, pixel_values=pixels).logits
    with fk.patched(model, policy, record=True), fk.patched(rounded, policy, record=True):
        got, want = (m(ids, pixel_values=pixels).logits for m in (model, rounded))
        for a, b in zip(fk.trace(model).stages, fk.trace(rounded).stages, strict=True):
            assert torch.equal(a.indices, b.indices)
        assert got.shape[1] < stock.shape[1]
    assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(ids, pixel_values=pixels).logits, stock)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization", "ignore:torch.quantize_per_tensor")
@torch.no_grad()
def test_dynamic_quantisation_of_torch():
    """Its modules have a method where others have a weight."""
    model = copy.deepcopy(tiny.llava())
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    assert callable(model.model.vision_tower.encoder.layers[0].self_attn.q_proj.weight)
    whole = run(model)
    with fk.patched(model, fk.FlowCut(9, llm_layer=1), record=True):
        run(model)
        assert [stage.kept for stage in fk.trace(model).stages][-2:] == [[18], [9]]
    assert torch.equal(run(model), whole)


# Parts that somebody patched or replaced


@pytest.mark.parametrize("part", ["vision_tower", "language_model"])
def test_parts_with_a_forward_of_their_own(part):
    """Named, and nothing is changed, before the whole is patched."""
    model = llava_onevision.model()
    module = getattr(model.model, part)
    layer = (module.encoder if part == "vision_tower" else module).layers[1]
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{type(layer).__name__}.forward of this instance is already replaced"):
        fk.patch(model, fk.VFlowOpt(9, llm_stages=((1, 0.5),)))
    assert_same(before, snapshot(model))


def test_layers_on_several_devices(monkeypatch):
    """A device map that splits the tower. Layers that nothing is dropped in may lie anywhere."""
    model = tiny.llava()
    towers, texts = model.model.vision_tower.encoder.layers, model.model.language_model.layers
    elsewhere = SimpleNamespace(is_meta=False, device=torch.device("cuda:1"))  # which this machine need not have
    monkeypatch.setattr(texts[0], "parameters", lambda: iter([elsewhere]), raising=False)
    fk.unpatch(fk.patch(model, POLICY))
    said = "the layers that would be patched lie on cpu, cuda:1: give a device_map that puts the vision tower on one"
    with pytest.raises(ValueError, match=said):
        fk.patch(model, fk.FlowCut(9, llm_layer=1))
    monkeypatch.setattr(towers[3], "parameters", lambda: iter([elsewhere]), raising=False)
    with pytest.raises(ValueError, match=said):
        fk.patch(model, POLICY)


class Wrapped(nn.Module):
    """As torch.compile and others put themselves around a part."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> object:
        return super().__getattr__(name) if name == "module" else getattr(self.module, name)

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.module(*args, **kwargs)


@pytest.mark.parametrize(
    ("family", "path"),
    [
        (llava_next, "model.vision_tower"),
        (llava_next, "model.multi_modal_projector"),
        (llava_next, "model.language_model"),
        (qwen2_5_vl, "model.visual"),
        (qwen2_5_vl, "model.visual.blocks.1"),
        (idefics3, "model.vision_model"),
        (video_llava, "model.image_tower"),
    ],
)
@torch.no_grad()
def test_parts_assigned_over_after_patching(family, path):
    """Are told before anything runs, and may be wrapped; a copy has places of its own."""
    model, inputs = family.FAMILY.model(), family.FAMILY.prompt([[5, Image(), 6, 7]])
    part, other = model.get_submodule(path), family.FAMILY.model().get_submodule(path)
    fk.patch(model, fk.FlowCut(4, llm_layer=1))
    twin = copy.deepcopy(model)
    pruned = model(**inputs).logits
    said = re.escape(f".{path} of this {type(model).__name__} was replaced after patch(), by a module that is not")
    for module, error in ((Wrapped(part), None), (other, said), (part, None)):
        model.set_submodule(path, module)
        if error is None:
            assert torch.equal(model(**inputs).logits, pruned)
            continue
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=error):
                call(**inputs)
    assert torch.equal(twin(**inputs).logits, pruned)
    # What the error says helps.
    model.set_submodule(path, other)
    fk.patch(fk.unpatch(model), fk.FlowCut(4, llm_layer=1))
    assert torch.equal(model(**inputs).logits, pruned)


@pytest.mark.parametrize("family", [llava_next, qwen2_5_vl])
@torch.no_grad()
def test_placeholders_edited_after_patching(family):
    """A stock model would look for the new id, for which the prompt has not been made to fit."""
    model, inputs = family.FAMILY.model(), family.FAMILY.prompt([[5, Image(), 6, 7]])
    with fk.patched(model, POLICY):
        model.config.image_token_id = 88
        with pytest.raises(ValueError, match="image_token_id=88 but the model was patched for 90: unpatch, set it in"):
            model(**inputs)
