"""A fresh process: importing changes nothing, and everything runs with neither Triton nor the native library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SCRIPT = """
import importlib.machinery, json, logging, os, sys, warnings

BLOCKED, find = set(sys.argv[1].split(",")), importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = staticmethod(lambda name, *rest: (
    None if name.partition(".")[0] in BLOCKED else find(name, *rest)))  # as if not installed
sys.path[:0] = ["tests"]

import torch
from transformers import CLIPVisionModel, LlavaForConditionalGeneration, SiglipVisionModel
import tiny

def state():
    classes = {c for k in (CLIPVisionModel, LlavaForConditionalGeneration, SiglipVisionModel) for c in k.__mro__}
    modules = [m for n, m in sys.modules.items() if n.startswith("transformers.models.") and m is not None]
    classes |= {c for m in modules for c in vars(m).values() if isinstance(c, type)}
    return dict(
        environment=dict(os.environ),
        threads=(torch.get_num_threads(), torch.get_num_interop_threads()),
        defaults=[str(x) for x in (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(),
                  torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision(),
                  torch.are_deterministic_algorithms_enabled())],
        random=torch.get_rng_state().tolist(),
        classes={f"{c.__module__}.{c.__qualname__}": sorted((k, id(v)) for k, v in vars(c).items()) for c in classes},
        modules={n: sorted((k, id(v)) for k, v in vars(m).items()) for n, m in sys.modules.items()
                 if n.startswith("transformers.models.") and ".modeling_" in n},
        handlers=len(logging.getLogger().handlers),
        warnings=len(warnings.filters),
        hooks=[
            len(v)
            for k, v in vars(torch.nn.modules.module).items()
            if k.startswith("_global_") and hasattr(v, "keys")
        ],
    )

before, loaded = state(), set(sys.modules)
import flowcut_kernels as fk
after, new = state(), set(sys.modules) - loaded
changed = [k for k in before if before[k] != after[k]]

from flowcut_kernels import _library
results = {}
with torch.no_grad():
    model = tiny.llava()
    ids = torch.tensor([[1] + [tiny.IMAGE] * tiny.PATCHES + [5, 6]])
    with fk.patched(model, fk.FlowCut(target_tokens=8), record=True):
        out = model.generate(ids, pixel_values=tiny.images(1), max_new_tokens=3, do_sample=False)
        results["sequence"] = out[0, -3:].tolist()
        results["kept"] = fk.trace(model).stages[-1].indices.tolist()
print(json.dumps(dict(
    changed=changed, new=sorted(new), results=results, native=_library.native_error(), triton=_library.triton_error(),
    triton_loaded="triton" in sys.modules,
)))
"""


def fresh(blocked: str, **environment: str) -> dict:
    variables = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FLOWCUT_BACKEND")}
    paths = [str(ROOT), variables.get("PYTHONPATH", "")]
    variables |= dict(PYTHONPATH=os.pathsep.join(filter(None, paths)), OMP_NUM_THREADS="1") | environment
    command = [sys.executable, "-c", SCRIPT, blocked]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def bare() -> dict:
    return fresh("triton,matplotlib,sklearn,lmms_eval,datasets,accelerate,dill", FLOWCUT_NO_NATIVE="1")


@pytest.fixture(scope="module")
def full() -> dict:
    return fresh("")


@pytest.mark.parametrize("process", ["bare", "full"])
def test_import_changes_nothing(process, request):
    assert request.getfixturevalue(process)["changed"] == []


@pytest.mark.parametrize("process", ["bare", "full"])
def test_import_is_light(process, request):
    """Kernels, plots and the trained stand-in load when they are used."""
    heavy = (
        "triton",
        "matplotlib",
        "sklearn",
        "scipy",
        "pandas",
        "PIL",
        "hypothesis",
        "pytest",
        "numpy.f2py",
        "optuna",
        "lmms_eval",
        "datasets",
    )
    new = request.getfixturevalue(process)["new"]
    assert not [name for name in new if name.startswith(heavy)]
    assert "flowcut_kernels.bench" not in new
    assert not [name for name in new if name.startswith("flowcut_kernels.ops.") and name.endswith(".triton")]


def test_runs_with_nothing_compiled(bare, full):
    """FlowCut end to end in LLaVA on the references alone, with the same outcome."""
    assert bare["native"] == "FLOWCUT_NO_NATIVE=1 is set"
    assert bare["triton"] and not bare["triton_loaded"]
    assert bare["results"] == full["results"]
