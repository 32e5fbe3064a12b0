"""FlowCut in CLIP against recorded runs: the authors' released code (../shared/golden), and our own in fp64."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import tiny
import torch
from golden_cases import drawn, encoder_tensor, golden_manifest, golden_tensors, sha256
from safetensors import safe_open
from torch.testing import assert_close
from transformers import CLIPVisionConfig, CLIPVisionModel

import flowcut_kernels as fk
from flowcut_kernels import _library

FIXTURE = Path(__file__).parents[1] / "fixtures" / "flowcut_tiny.safetensors"
CASES = golden_manifest()
OPS = ("anchor_stats", "score_select", "gather_tokens")


def runs(kind: str) -> list:
    """Cases and backends. What takes minutes runs where FLOWCUT_TEST_ALL is set, or a GPU makes it quick."""
    slow = pytest.mark.skipif(os.environ.get("FLOWCUT_TEST_ALL") != "1", reason="minutes: set FLOWCUT_TEST_ALL=1")
    params = []
    for name, case in CASES.items():
        if case["kind"] != kind:
            continue
        config = CASES[case["weights"].split()[0]]["config"]
        work = (config["image_size"] // config["patch_size"]) ** 2 * config["num_hidden_layers"]
        small, big = work > 500, work > 5000
        many = case.get("batch", 1) > 1 or case["target_patches"] > 64
        for backend in ("reference", "cpp", "triton"):
            late = small and not torch.cuda.is_available() if backend == "triton" else big and many
            params.append(pytest.param(name, backend, marks=[slow] if late else []))
    return params or [pytest.param("", "", marks=pytest.mark.skip("no ../shared/golden"))]


def device_or_skip(backend: str) -> str:
    if backend == "cpp" and (reason := _library.native_error()):
        pytest.skip(f"C++ form not built: {reason}")
    if backend == "triton":
        if reason := _library.triton_error():
            pytest.skip(reason)
        if torch.cuda.is_available():
            return "cuda"
        if any(importlib.util.find_spec(f"flowcut_kernels.ops.{op}.triton") is None for op in OPS):
            pytest.skip("not every operator has a Triton form")
    return "cpu"


@pytest.fixture(scope="module")
def tower():
    """The encoder of a case, built from its file or from the recipe."""
    built: dict[str, CLIPVisionModel] = {}

    def build(weights: str) -> CLIPVisionModel:
        if weights not in built:
            built.clear()
            case = CASES[weights]
            model = CLIPVisionModel(CLIPVisionConfig(**case["config"])).eval()
            if case["file"]:
                state = golden_tensors(weights)
            else:
                names = {f"vision_model.{name}": x.shape for name, x in model.named_parameters()}
                layers = case["config"]["num_hidden_layers"]
                state = {n: encoder_tensor(n, shape, case["seed"], case["gains"], layers) for n, shape in names.items()}
                if "big" not in weights:  # hashing the big one takes as long as running it
                    assert sha256(state) == case["sha256_state_dict"]
            state = {name.removeprefix("vision_model."): x for name, x in state.items() if "position_ids" not in name}
            model.load_state_dict(state)
            built[weights] = model
        return built[weights]

    yield build
    built.clear()


@torch.no_grad()
def run(model, pixels, policy, backend, device):
    model = model.to(device)
    with fk.patched(model, policy, record=True, backend=backend):
        output = model(pixels.to(device), output_hidden_states=True)
        stages = fk.trace(model).stages
    model.cpu()
    return [x.cpu() for x in output.hidden_states], stages


@pytest.mark.parametrize(("name", "backend"), runs("flowcut_clip"))
def test_released_code(name, backend, tower):
    device = device_or_skip(backend)
    case, want, model = CASES[name], golden_tensors(name), tower(CASES[name]["weights"])
    pixels = want.get("pixel_values")
    if pixels is None:
        size = model.config.image_size
        pixels = drawn("pixel_values", case["pixel_seed"], (case["batch"], 3, size, size), case["pixel_amplitude"])
    states, stages = run(model, pixels, fk.FlowCut.release(case["target_patches"]), backend, device)

    assert [s.layer for s in stages] == [i for i in range(len(states)) if f"layer{i:02d}.keep_global" in want]
    for stage in stages:
        layer = f"layer{stage.layer:02d}"
        assert torch.equal(stage.indices.cpu(), want[f"{layer}.keep_global"]), layer
        scores = stage.scores.cpu()
        live = ~scores.isnan()
        assert_close(scores[live], want[f"{layer}.cumulative"].flatten(), rtol=1e-4, atol=0)
        if f"{layer}.entropy_ratio" in want:
            assert_close(stage.entropy.cpu(), want[f"{layer}.entropy_ratio"], rtol=1e-4, atol=0)
    assert [x.shape[1] for x in states[1:]] == want["num_tokens_after"].tolist()
    patches = states[-2][:, 1:, : case["hidden_channels_stored"]]
    assert_close(patches, want["hidden_m2_patches"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "backend"), runs("flowcut_clip_ties"))
def test_released_code_with_ties(name, backend, tower):
    """Which of equal patches stay is undefined there; how many, and with what scores, is not. Here the lower stay."""
    device = device_or_skip(backend)
    case, want = CASES[name], golden_tensors(name)
    model = tower(case["weights"].split()[0])
    positions = model.embeddings.position_embedding.weight
    saved = positions.detach().clone()
    with torch.no_grad():
        positions[1:] = 0
    try:
        states, stages = run(model, want["pixel_values"], fk.FlowCut.release(case["target_patches"]), backend, device)
    finally:
        with torch.no_grad():
            positions.copy_(saved)
    assert [x.shape[1] for x in states[1:]] == want["num_tokens_after"].tolist()
    for stage in stages:
        scores = stage.scores.cpu()
        got = scores[~scores.isnan()].sort().values
        assert_close(got, want[f"layer{stage.layer:02d}.cumulative"].flatten().sort().values, rtol=1e-4, atol=0)
    rows = states[-2][0, 1:]
    distance = torch.cdist(rows, want["hidden_m2_patches"][0])  # as a multiset
    assert distance.min(0).values.max() < 1e-4 and distance.min(1).values.max() < 1e-4


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("name", ["clip_default", "clip_release", "siglip_default"])
def test_own_recording(name, backend):
    """What ``fixtures/make.py`` recorded with the reference in fp64, so that something is checked without ../shared."""
    device = device_or_skip(backend)
    if backend == "triton" and device == "cpu" and os.environ.get("FLOWCUT_TEST_ALL") != "1":
        pytest.skip("minutes in the interpreter: set FLOWCUT_TEST_ALL=1")
    kind, preset = name.split("_")
    policy = (fk.FlowCut if preset == "default" else fk.FlowCut.release)(target_tokens=10)
    states, stages = run(tiny.TOWERS[kind](), tiny.images(2, seed=7), policy, backend, device)
    with safe_open(FIXTURE, "pt") as file:
        want = {key: file.get_tensor(key) for key in file.keys() if key.startswith(name)}  # noqa: SIM118
    assert len(stages) == sum("indices" in key for key in want) >= 3
    for stage in stages:
        key = f"{name}.layer{stage.layer}"
        assert torch.equal(stage.indices.cpu(), want[f"{key}.indices"].long()), key
        assert_close(stage.scores.cpu().double(), want[f"{key}.scores"], rtol=1e-4, atol=0, equal_nan=True)
        assert_close(stage.entropy.cpu().double(), want[f"{key}.entropy"], rtol=1e-5, atol=0)
    assert_close(states[-2].double(), want[f"{name}.hidden"].double(), rtol=1e-4, atol=1e-4)
