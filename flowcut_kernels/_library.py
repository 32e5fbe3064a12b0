"""Loads the native library and chooses a backend; remembers why something is not available."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

logger = logging.getLogger("flowcut_kernels")

BACKENDS = ("auto", "reference", "cpp", "triton", "cuda")
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# Plain globals, so that choosing a backend can be traced by torch.compile.
_native_error: str | None = "it was not loaded yet"
_cuda_error: str | None = "the native library was not loaded yet"
_planner: ModuleType | None = None
_planner_error: str | None = "it was not loaded yet"
_triton_error = None if importlib.util.find_spec("triton") else "triton is not installed"


def load_native() -> None:
    """Load the native library if it is there, which registers the C++ forms; remember why not otherwise."""
    global _native_error, _cuda_error
    folder = Path(__file__).parent
    found = sorted(folder.glob("flowcut_kernels_native*.so"))
    if os.environ.get("FLOWCUT_NO_NATIVE") == "1":
        _native_error = "FLOWCUT_NO_NATIVE=1 is set"
    elif not found:
        _native_error = f"no flowcut_kernels_native*.so in {folder.name}/: install with a C++ compiler to build it"
    else:
        try:
            torch.ops.load_library(str(found[0]))
            _native_error = None
        except Exception as error:  # a library built for another torch or machine must not break the import
            _native_error = f"{found[0].name} did not load: {error}"
    if _native_error is not None:
        _cuda_error = _native_error
    elif torch._C._dispatch_has_kernel_for_dispatch_key("flowcut_kernels::compact_kv", "CUDA"):
        _cuda_error = None
    else:
        _cuda_error = "the native library was built without nvcc"


def load_planner() -> None:
    """Import the page planner ``_C`` if it is there; remember why not otherwise."""
    global _planner, _planner_error
    if os.environ.get("FLOWCUT_NO_NATIVE") == "1":
        _planner_error = "FLOWCUT_NO_NATIVE=1 is set"
        return
    try:
        _planner = importlib.import_module("flowcut_kernels._C")
        _planner_error = None
    except ModuleNotFoundError:
        _planner_error = (
            "no flowcut_kernels._C for this Python: install with a C++ compiler, pybind11 and Python's headers to "
            "build it"
        )
    except Exception as error:  # a module built for another machine must not break the import
        _planner_error = f"flowcut_kernels._C did not load: {error}"


def planner() -> ModuleType | None:
    """The page planner's C++ form, None when it is not there."""
    return _planner


def planner_error() -> str | None:
    """None when the page planner's C++ form is loaded, else the reason why it is not."""
    return _planner_error


def native_error() -> str | None:
    """None when the native library is loaded, else the reason why it is not."""
    return _native_error


def cuda_error() -> str | None:
    """None when the native library carries CUDA kernels, else the reason why not."""
    return _cuda_error


def triton_error() -> str | None:
    """None when Triton can be imported, else the reason."""
    return _triton_error


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _log_choice(op: str, device: str, dtype: torch.dtype, choice: str, reason: str) -> None:
    logger.info("%s on %s %s: backend %s (%s)", op, device, dtype, choice, reason)


def resolve_backend(backend: str | None = None) -> str:
    """The requested backend: the argument, else ``FLOWCUT_BACKEND``, else "auto"; ValueError for an unknown name."""
    name = backend or os.environ.get("FLOWCUT_BACKEND") or "auto"
    if name not in BACKENDS:
        source = "backend" if backend else "FLOWCUT_BACKEND"
        raise ValueError(f"{source}={name!r} is unknown: use one of {', '.join(BACKENDS)}")
    return name


def choose_backend(
    op: str,
    backend: str | None,
    tensor: Tensor,
    forms: tuple[str, ...] = ("cpp", "triton"),
    dtypes: tuple[torch.dtype, ...] = NATIVE_DTYPES,
) -> str:
    """The form of `op` for `tensor` and its like: "reference" or one of its native `forms`, which take `dtypes`.

    An explicit request never falls back: RuntimeError says why it cannot be honoured. "auto" takes the native
    form of the tensor's device where its dtype allows, else the reference, and logs its choice once.
    """
    requested = resolve_backend(backend)
    device, dtype = tensor.device.type, tensor.dtype
    if requested == "reference":
        return "reference"
    if requested == "auto":
        if device == "cpu":
            choice, problem = "cpp", native_error()
        elif device == "cuda":
            choice, problem = ("cuda", cuda_error()) if "cuda" in forms else ("triton", triton_error())
        else:
            choice, problem = "reference", f"no native form for {device}"
        if choice not in ("reference", *forms):
            problem = f"no {choice} form for these tensors"
        if problem is None and dtype not in dtypes:
            problem = f"{dtype} has no native form"
        choice = choice if problem is None else "reference"
        if not torch.compiler.is_compiling():
            _log_choice(op, device, dtype, choice, problem or "native form available")
        return choice

    problem = None
    if requested not in forms:
        problem = f"it has no {requested} form for these tensors; use {' or '.join(map(repr, (*forms, 'reference')))}"
    elif requested == "cuda":
        problem = cuda_error() if device == "cuda" else f"it needs CUDA tensors, got {device}"
    elif requested == "cpp":
        problem = native_error() if device == "cpu" else f"it needs CPU tensors, got {device}"
    elif requested == "triton":
        problem = triton_error()
        if problem is None and device != "cuda" and not (device == "cpu" and _interpreted()):
            problem = f"it needs CUDA tensors (or CPU tensors with TRITON_INTERPRET=1), got {device}"
    if problem is None and dtype not in dtypes:
        problem = f"{dtype} has no native form; use float32, bfloat16 or float16, or backend='reference'"
    if problem is not None:
        raise RuntimeError(f"backend={requested!r} was asked for {op}, but {problem}")
    return requested
