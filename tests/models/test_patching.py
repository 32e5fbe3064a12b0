"""patch, unpatch, patched, trace: one instance, in place, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import sys
import weakref

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import IMAGE, PATCHES
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    SiglipVisionModel,
)

import flowcut_kernels as fk
from flowcut_kernels import _library
from flowcut_kernels._frames import in_one_chunk

POLICY = fk.FlowCut(8)
BUILDERS = {"clip": tiny.clip_tower, "siglip": tiny.siglip_tower, "llava": tiny.llava}


@pytest.fixture(params=BUILDERS)
def model(request):
    return BUILDERS[request.param]()


@torch.no_grad()
def run(model):
    """Something of the model's output to compare."""
    if hasattr(model, "generate"):
        ids = torch.tensor([[1] + [IMAGE] * PATCHES + [5, 6, 7]])
        return model.generate(ids, pixel_values=tiny.images(1), max_new_tokens=4, do_sample=False)
    return model(tiny.images(1), output_hidden_states=True).last_hidden_state


def tokens(model):
    """Visual tokens that reach the output."""
    with torch.no_grad():
        if hasattr(model, "generate"):
            return model.get_image_features(tiny.images(1)).pooler_output[0].shape[0]
        return model(tiny.images(1)).last_hidden_state.shape[1] - hasattr(model.embeddings, "class_embedding")


def snapshot(model):
    """Everything reachable from the model's modules and classes, by identity; configurations by value."""
    seen: dict[str, object] = {}

    def note(path, value):
        seen[path] = value if isinstance(value, (int, float, str, bool, type(None), tuple)) else id(value)
        if isinstance(value, dict):
            for key, inner in value.items():
                note(f"{path}[{key!r}]", inner)

    for name, module in model.named_modules():
        for key, value in vars(module).items():
            note(f"{name}.{key}", value)
        for cls in type(module).__mro__:
            for key, value in vars(cls).items():
                note(f"{cls.__qualname__}::{key}", value)
    for name, module in model.named_modules():
        if hasattr(module, "config"):
            seen[f"{name} config"] = repr(module.config.to_dict())
    if hasattr(model, "generation_config"):
        seen["generation config"] = repr(model.generation_config.to_dict())
    seen["values"] = {name: x.clone() for name, x in model.state_dict().items()}
    return seen


def assert_same(before, after):
    values, others = before.pop("values"), after.pop("values")
    # Python's own bookkeeping of classes is not the model's.
    noise = ("__abstractmethods__", "_abc_impl", "__weakref__", "__dict__")
    changed = {k for k in before.keys() | after.keys() if before.get(k, "absent") != after.get(k, "absent")}
    assert not {k for k in changed if not k.endswith(noise)}
    assert values.keys() == others.keys()
    for name, x in values.items():
        assert torch.equal(x, others[name]), name


def test_nothing_is_left_behind(model):
    """After patch, runs, a failing run, a second policy and unpatch: attributes, hooks, configuration, classes."""
    want = run(model)  # transformers installs its own hooks the first time
    before = snapshot(model)
    for policy in (POLICY, fk.RandomTokens(8)):
        assert fk.patch(model, policy, record=True) is model
        assert tokens(model) == 8
        assert not torch.equal(run(model), want)
        with pytest.raises(Exception):  # noqa: B017
            model("nonsense")
        assert fk.unpatch(model) is model
    assert_same(before, snapshot(model))
    assert torch.equal(run(model), want)


def test_only_forward_is_replaced(model):
    """Parameters, modules and hooks stay while patched; signatures read like the stock ones."""
    run(model)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    modules = {name: id(m) for name, m in model.named_modules()}
    hooks = {name: list(m._forward_hooks) for name, m in model.named_modules()}
    signatures = {
        name: inspect.signature(getattr(model, name)) for name in ("forward", "generate") if hasattr(model, name)
    }
    with fk.patched(model, POLICY):
        assert {name: id(p) for name, p in model.named_parameters()} == parameters
        assert {name: id(m) for name, m in model.named_modules()} == modules
        assert {name: list(m._forward_hooks) for name, m in model.named_modules()} == hooks
        assert {name: inspect.signature(getattr(model, name)) for name in signatures} == signatures


def test_restored_after_exceptions(model):
    want, before = run(model), snapshot(model)
    with pytest.raises(KeyError, match="body"), fk.patched(model, POLICY):
        assert tokens(model) == 8
        raise KeyError("body")
    with pytest.raises(ValueError, match="NaN"), fk.patched(model, POLICY), torch.no_grad():
        pixels = torch.full_like(tiny.images(1), float("nan"))
        model.get_image_features(pixels) if hasattr(model, "generate") else model(pixels)
    assert_same(before, snapshot(model))
    assert torch.equal(run(model), want)


def test_nesting(model):
    """The inner patch is refused and the outer one goes on; one after the other is fine."""
    with fk.patched(model, POLICY):
        refused = r"already patched with FlowCut\(target_tokens=8\): call unpatch\(model\) first"
        with pytest.raises(ValueError, match=refused), fk.patched(model, fk.FlowCut(4)):
            raise AssertionError("not reached")
        with pytest.raises(ValueError, match="already patched"):
            fk.patch(model, POLICY)
        assert tokens(model) == 8
    with fk.patched(model, fk.FlowCut(4)):
        assert tokens(model) == 4
    assert tokens(model) == PATCHES


def test_unpatch_of_unpatched(model):
    before = snapshot(model)
    for call in (fk.unpatch, fk.trace):
        with pytest.raises(
            ValueError, match=rf"this {type(model).__name__} is not patched: call patch\(model, policy\)"
        ):
            call(model)
    fk.unpatch(fk.patch(model, POLICY))
    with pytest.raises(ValueError, match="not patched"):
        fk.unpatch(model)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("kind", BUILDERS)
def test_other_instances_are_untouched(kind):
    one, other = BUILDERS[kind](), BUILDERS[kind]()
    want = run(other)
    fk.patch(one, POLICY)
    assert torch.equal(run(other), want)
    fk.patch(other, fk.FlowCut(4))
    assert (tokens(one), tokens(other), tokens(BUILDERS[kind]())) == (8, 4, PATCHES)
    fk.unpatch(one)
    assert (tokens(one), tokens(other)) == (PATCHES, 4)


@pytest.mark.parametrize("target", ["tower", "model"])
def test_part_and_whole_are_not_patched_together(target):
    model = tiny.llava()
    tower = model.model.vision_tower
    first, second = (tower, model) if target == "tower" else (model, tower)
    fk.patch(first, POLICY)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"CLIPEncoder.forward of this instance is already replaced .* undo that first"
    ):
        fk.patch(second, POLICY)
    assert_same(before, snapshot(model))
    fk.unpatch(first)
    fk.unpatch(fk.patch(second, POLICY))


def test_shared_tower():
    """Two VLMs with one tower: the second is refused while the first is patched."""
    one, other = tiny.llava(), tiny.llava()
    other.model.vision_tower = one.model.vision_tower
    with fk.patched(one, POLICY), pytest.raises(ValueError, match="already replaced"):
        fk.patch(other, POLICY)
    with fk.patched(other, POLICY):
        assert tokens(other) == 8


def test_replaced_by_someone_else(model):
    """A forward that is not the class's own (accelerate, other patchers) is refused, and noticed on the way out."""
    layers = model.model.vision_tower.encoder.layers if hasattr(model, "generate") else model.encoder.layers
    stock = layers[2].forward
    layers[2].forward = lambda *args, **kwargs: stock(*args, **kwargs)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"EncoderLayer.forward of this instance is already replaced .* undo that first"
    ):
        fk.patch(model, POLICY)
    assert_same(before, snapshot(model))
    del layers[2].forward

    fk.patch(model, POLICY)
    ours = layers[2].forward
    layers[2].forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(ValueError, match=r"EncoderLayer.forward was replaced after patch\(\): undo that first"):
        fk.unpatch(model)
    assert tokens(model) == 8  # still working
    layers[2].forward = ours
    fk.unpatch(model)


# Copies


def test_shallow_copy(model):
    """Shares the layers of the patched model: only that one may undo what they were given."""
    want = run(model)
    fk.patch(model, POLICY)
    pruned, twin = run(model), copy.copy(model)
    with pytest.raises(ValueError, match="is a shallow copy of a patched model"):
        fk.unpatch(twin)
    assert torch.equal(run(model), pruned)
    assert torch.equal(run(fk.unpatch(model)), want) and torch.equal(run(copy.copy(model)), want)


def test_deepcopy(model):
    """A copy of a patched model is patched by itself: unpatching one leaves the other."""
    want = run(model)
    fk.patch(model, POLICY)
    pruned = run(model)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin), pruned)
    fk.unpatch(model)
    assert torch.equal(run(model), want) and torch.equal(run(twin), pruned)
    with torch.no_grad():
        next(model.parameters()).zero_()  # the copy reads its own weights
    assert torch.equal(run(twin), pruned)
    fk.unpatch(twin)
    assert torch.equal(run(twin), want)


def test_pickle(model):
    """As long as transformers has not installed its own hooks, which do not pickle."""
    fresh = copy.deepcopy(model)
    want = run(fresh)
    loaded = pickle.loads(pickle.dumps(fk.patch(model, POLICY)))
    assert tokens(loaded) == 8 and torch.equal(run(loaded), run(model))
    assert torch.equal(run(fk.unpatch(loaded)), want)


def test_saving(model, tmp_path):
    """A patched model is saved as the model it is."""
    model.save_pretrained(tmp_path / "stock")
    fk.patch(model, POLICY)
    run(model)
    model.save_pretrained(tmp_path / "patched")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("stock", "patched")]
    assert weights[0].keys() == weights[1].keys() == {k for k in weights[0] if "flowcut" not in k}
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    texts = [(tmp_path / name / "config.json").read_text() for name in ("stock", "patched")]
    assert texts[0] == texts[1]
    state = model.state_dict()
    fk.unpatch(model)
    assert list(state) == list(model.state_dict())
    model.load_state_dict(state)


def test_loaded_by_name(tmp_path):
    """What from_pretrained returns, through the automatic class."""
    stock = tiny.llava()
    stock.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    with fk.patched(stock, POLICY), fk.patched(loaded, POLICY):
        assert torch.equal(run(stock), run(loaded))


@pytest.mark.parametrize("kind", BUILDERS)
def test_weights_set_after_patching(kind):
    """A patched model that is cast, emptied and loaded runs on its new weights."""
    model = fk.patch(BUILDERS[kind](), POLICY)
    want, state = run(model), {name: x.clone() for name, x in model.state_dict().items()}
    model.double().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(state)
    assert torch.equal(run(model), want)


# Refusals


class Subclass(CLIPVisionModel):
    pass


@pytest.mark.parametrize(
    "build", [lambda: nn.Linear(2, 2), lambda: tiny.llava().model, lambda: tiny.clip_tower().encoder]
)
def test_unsupported_models(build):
    model = build()
    names = ", ".join(c.__name__ for c in fk.supported_models())
    with pytest.raises(TypeError, match=f"{type(model).__name__} is not supported; supported models: {names}"):
        fk.patch(model, POLICY)
    assert fk.supported_models()[:3] == [CLIPVisionModel, SiglipVisionModel, LlavaForConditionalGeneration]


def test_subclasses_may_differ_and_are_refused():
    config = tiny.clip_tower().config
    with pytest.raises(TypeError, match="Subclass is not supported"):
        fk.patch(Subclass(config), POLICY)


@pytest.mark.parametrize("policy", [None, 64, "flowcut", fk.FlowCut, dict(target_tokens=64)])
def test_not_a_policy(model, policy):
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"policy=.* is not a policy: use for example FlowCut\(target_tokens=64\)"):
        fk.patch(model, policy)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("facts", "policy", "words"),
    [
        (dict(vision_feature_layer=0), POLICY, "feature_layer=0 of 8 layers leaves no layer to prune"),
        (
            {},
            fk.FlowCut(8, feature_layer=-1),
            "feature_layer=-1 but model.config.vision_feature_layer is -2; leave it None",
        ),
        ({}, fk.RandomTokens(8, feature_layer=3), "feature_layer=3 but model.config.vision_feature_layer is -2"),
    ],
)
def test_configurations_that_cannot_be_served(facts, policy, words):
    model = tiny.llava(**facts)
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        fk.patch(model, policy)
    assert_same(before, snapshot(model))


def test_class_token_of_a_tower_without_one():
    model = tiny.llava("siglip", vision_feature_select_strategy="default")
    with pytest.raises(ValueError, match="drops the first token, but SiglipVisionModel has no class token: set 'full'"):
        fk.patch(model, POLICY)
    with pytest.raises(ValueError, match="anchor='cls' but SiglipVisionModel has no class token"):
        fk.patch(tiny.llava("siglip"), fk.FlowCut(8, anchor="cls"))


def test_unsupported_tower():
    model = tiny.llava()
    model.model.vision_tower = nn.Identity()
    with pytest.raises(
        ValueError, match="vision tower Identity of LlavaForConditionalGeneration is not supported: use"
    ):
        fk.patch(model, POLICY)


# Backends


@pytest.mark.parametrize("way", ["argument", "environment"])
@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("cuda", "has no cuda form"),
        ("cpp", "FLOWCUT_NO_NATIVE"),
        ("triton", "needs CUDA tensors"),
    ],
)
def test_backend_that_cannot_be_honoured(model, backend, words, way, monkeypatch):
    """No silent fallback: an error with the reason, nothing changed, and a model that serves when asked for less."""
    want = run(fk.patch(copy.deepcopy(model), POLICY, backend="reference"))
    run(model)
    before = snapshot(model)
    monkeypatch.setattr(_library, "native_error", lambda: "FLOWCUT_NO_NATIVE=1 is set")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if way == "environment":
        monkeypatch.setenv("FLOWCUT_BACKEND", backend)
    with pytest.raises(RuntimeError, match=f"{backend}'? was asked for .*, but .*({words})"):
        fk.patch(model, POLICY, backend=backend if way == "argument" else None)
    assert_same(before, snapshot(model))
    monkeypatch.delenv("FLOWCUT_BACKEND", raising=False)
    for less in ("reference", None):  # the automatic choice falls back
        with fk.patched(model, POLICY, backend=less):
            assert torch.equal(run(model), want)


def test_backend_asked_for_after_patching(model, monkeypatch):
    """The environment is read at every call, and an impossible request is refused there as well."""
    monkeypatch.setattr(_library, "native_error", lambda: "FLOWCUT_NO_NATIVE=1 is set")
    with fk.patched(model, POLICY):
        want = run(model)
        monkeypatch.setenv("FLOWCUT_BACKEND", "cpp")
        with pytest.raises(RuntimeError, match=r"cpp'? was asked for .*, but FLOWCUT_NO_NATIVE=1 is set"):
            run(model)
        monkeypatch.delenv("FLOWCUT_BACKEND")
        assert torch.equal(run(model), want)


@pytest.mark.parametrize("way", ["backend", "FLOWCUT_BACKEND"])
def test_unknown_backend(model, way, monkeypatch):
    before = snapshot(model)
    if way == "FLOWCUT_BACKEND":
        monkeypatch.setenv(way, "gpu")
    with pytest.raises(ValueError, match=f"{way}='gpu' is unknown: use one of auto, reference, cpp, triton, cuda"):
        fk.patch(model, POLICY, backend="gpu" if way == "backend" else None)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("kind", BUILDERS)
def test_backends_agree(kind):
    """The whole model, with every backend that this machine has."""
    model = BUILDERS[kind]()
    results = {}
    for backend in ("reference", "cpp", "auto"):
        if backend == "cpp" and _library.native_error():
            continue
        with fk.patched(model, POLICY, backend=backend):
            results[backend] = run(model)
    for backend, got in results.items():
        torch.testing.assert_close(got, results["reference"], rtol=1e-4, atol=1e-4, msg=backend)


# Trace


def test_trace_errors(model):
    with fk.patched(model, POLICY), pytest.raises(ValueError, match=r"trace needs patch\(model, policy, record=True\)"):
        fk.trace(model)
    with fk.patched(model, POLICY, record=True):
        with pytest.raises(
            ValueError, match="nothing to trace: the model has not encoded an image since it was patched"
        ):
            fk.trace(model)
        run(model)
        assert len(fk.trace(model).stages) >= 3
    with fk.patched(model, POLICY, record=True), pytest.raises(ValueError, match="nothing to trace"):
        fk.trace(model)


def test_trace_is_of_the_last_pass(model):
    """Text-only passes do not touch it; a trace once taken does not change."""
    with fk.patched(model, POLICY, record=True), torch.no_grad():
        run(model)
        first = fk.trace(model)
        kept = [stage.indices.clone() for stage in first.stages]
        if hasattr(model, "generate"):
            model(input_ids=torch.tensor([[1, 5]]))
            assert fk.trace(model) is first
            model.get_image_features(tiny.images(2))
        else:
            model(tiny.images(2))
        assert fk.trace(model) is not first and fk.trace(model).stages[-1].kept == [8, 8]
        assert all(torch.equal(stage.indices, x) for stage, x in zip(first.stages, kept, strict=True))


def test_recording_changes_nothing(model):
    with fk.patched(model, POLICY):
        want = run(model)
    with fk.patched(model, POLICY, record=True):
        assert torch.equal(run(model), want)


def test_patched_model_can_be_freed():
    """No registry outside the model holds it."""
    model = fk.patch(tiny.llava(), POLICY)
    run(model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_a_pass_keeps_its_frames_in_one_chunk():
    """Prompt and decoding steps alike; the stock model's are wherever its caller's are."""
    model, found = tiny.llava(), []

    def look(*_):
        frame, names = sys._getframe(), set()
        while frame := frame.f_back:
            names.add(frame.f_code)
        found.append(in_one_chunk.__code__ in names)

    model.get_decoder().layers[0].register_forward_pre_hook(look)
    run(model)
    assert found == [False] * 4
    with fk.patched(model, POLICY):
        run(model)
    assert found[4:] == [True] * 4
