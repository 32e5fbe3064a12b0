"""``python -m flowcut_kernels.info``: versions, backends and why one is missing, environment variables."""

from __future__ import annotations

import os

import torch

from ._library import cuda_error, native_error, planner_error, triton_error
from .bench import machine

# name -> what it does; the one table of variables that the package reads at run time or while it is built.
VARIABLES = {
    "FLOWCUT_BACKEND": "auto (default), reference, cpp, triton or cuda, for every call that names none",
    "FLOWCUT_NO_NATIVE": "1: do not load the native library nor the page planner",
    "FLOWCUT_CPU_ISA": "avx512_bf16, avx512, avx2, scalar: instruction set of the C++ kernels instead of the best one",
    "TRITON_INTERPRET": "1: run Triton kernels on CPU tensors in Triton's interpreter",
    "FLOWCUT_COMMIT": "commit that figures of flowcut-bench name, for copies of a clone without .git",
    "FLOWCUT_NATIVE": "0: build the Python part alone",
    "FLOWCUT_CUDA": "0: build without CUDA kernels although nvcc is there",
    "FLOWCUT_CUDA_ARCHS": 'architectures of the CUDA kernels, "80;90;100" by default',
    "MAX_JOBS": "compile jobs of the build",
}


def sections() -> dict[str, dict[str, str]]:
    """Everything that is printed: section -> name -> value."""
    found = machine.facts("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("date", "native library", "triton kernels"):
        found.pop(name, None)
    versions = {
        name: " ".join(value) if isinstance(value, list) else str(value)
        for name, value in found.items()
        if value not in (None, [])
    }
    triton = triton_error()
    if triton is None and not torch.cuda.is_available():
        triton = "no CUDA device (TRITON_INTERPRET=1 runs the kernels slowly on the CPU)"
    backends = {
        "reference": "available",
        "cpp": _state(native_error()),
        "triton": _state(triton),
        "cuda": _state(cuda_error() or (None if torch.cuda.is_available() else "no CUDA device")),
        "planner": _state(planner_error()),
    }
    variables = {
        name: (f"= {os.environ[name]!r}; " if name in os.environ else "not set; ") + what
        for name, what in VARIABLES.items()
    }
    return {"machine and versions": versions, "backends": backends, "environment variables": variables}


def _state(problem: str | None) -> str:
    return "available" if problem is None else f"not available: {problem}"


def main() -> None:
    for title, lines in sections().items():
        print(title)
        widest = max(map(len, lines))
        for name, value in lines.items():
            print(f"  {name:<{widest}}  {value}")
        print()


if __name__ == "__main__":
    main()
