"""Builds the native library and the page planner with CMake and ninja; all else is declared in pyproject.toml.

The native library knows nothing of Python. The planner is a pybind11 module, so a wheel serves one Python version.

FLOWCUT_NATIVE=0 installs the Python part alone. FLOWCUT_CUDA=0 leaves out the CUDA kernels, which are otherwise
compiled when nvcc is found (a GPU need not be present) for FLOWCUT_CUDA_ARCHS (default "80;90;100").
MAX_JOBS limits the compiler processes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:  # --no-build-isolation does not look at pyproject.toml's list
    raise SystemExit(f"flowcut_kernels: setuptools {setuptools.__version__} is too old: pip install 'setuptools>=77'")

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
NATIVE = os.environ.get("FLOWCUT_NATIVE", "1") != "0"
LIBRARY, FACTS = "flowcut_kernels_native.so", "_build_info.json"
BUILD = ROOT / "build" / "native"  # kept, so that a second build compiles only what changed
GIB_PER_JOB = 2.0  # what nvcc needs for one file and several architectures


def jobs() -> int:
    """Compiler processes that fit into the free memory, at most one per processor."""
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(free / GIB_PER_JOB)))


def program(name: str) -> str:
    """CMake and ninja from the running Python's environment (active or not) or from the system."""
    found = shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))
    if found is None:
        raise SystemExit(f"flowcut_kernels: {name} is needed to build the native library: pip install {name}")
    return found


def planner_options() -> list[str]:
    """What CMake needs to build the page planner, which is left out where pybind11 or Python's headers are missing."""
    headers = Path(sysconfig.get_path("include"))
    if importlib.util.find_spec("pybind11") is None or not (headers / "Python.h").exists():
        return ["-Dpybind11_DIR="]
    import pybind11

    # The build folder is kept: unless they are named, CMake stays with the headers of the Python before.
    return [
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DPython_INCLUDE_DIR={headers}",
    ]


class BuildNative(build_ext):
    """One CMake build; its library, its Python module and its build facts land beside the Python modules."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("_native"):
            return os.path.join(*fullname.split(".")[:-1], LIBRARY)
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        self.build_all()
        super().build_extensions()

    def build_all(self) -> None:
        torch = importlib.util.find_spec("torch")
        if torch is None or torch.origin is None:
            raise SystemExit(
                "flowcut_kernels: torch is not installed where the build runs: install torch first and add "
                "--no-build-isolation, or set FLOWCUT_NATIVE=0 for the Python part alone"
            )
        configure = [
            program("cmake"),
            f"-S{ROOT}",
            f"-B{BUILD}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={program('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DFLOWCUT_TORCH_DIR={Path(torch.origin).parent}",
            f"-DFLOWCUT_CUDA={'OFF' if os.environ.get('FLOWCUT_CUDA') == '0' else 'ON'}",
            f"-DFLOWCUT_CUDA_ARCHS={os.environ.get('FLOWCUT_CUDA_ARCHS', '80;90;100')}",
            *planner_options(),
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run([program("cmake"), "--build", str(BUILD), f"-j{jobs()}"], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                "flowcut_kernels: the native build failed, see above; it needs a C++20 compiler (g++ >= 11 or "
                "clang++ >= 14). FLOWCUT_NATIVE=0 installs the Python part alone."
            ) from error

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        if not (BUILD / target.name).exists():  # an error for the native library, a warning for the planner
            raise CompileError("it was left out; install pybind11 and Python's headers to build it")
        target.parent.mkdir(parents=True, exist_ok=True)
        for name in (target.name, FACTS):
            shutil.copy2(BUILD / name, target.with_name(name))

    def copy_extensions_to_source(self) -> None:  # an editable install
        super().copy_extensions_to_source()
        shutil.copy2(BUILD / FACTS, ROOT / "flowcut_kernels")


EXTENSIONS = [
    Extension("flowcut_kernels.flowcut_kernels_native", sources=[]),
    Extension("flowcut_kernels._C", sources=[], optional=True),
]

setup(
    packages=[*find_packages(include=["flowcut_kernels", "flowcut_kernels.*"]), "flowcut_kernels.bench.mini_vlm"],
    package_dir={"flowcut_kernels.bench.mini_vlm": "benchmarks/mini_vlm"},
    ext_modules=EXTENSIONS if NATIVE else [],
    cmdclass={"build_ext": BuildNative},
)
