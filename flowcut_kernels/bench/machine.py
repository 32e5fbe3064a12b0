"""What the figures were measured on: processor, memory, versions. No paths and no host name."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .._library import native_error, triton_error

# Instruction sets that decide how fast these kernels and the matrix products beside them run.
ISA = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16", "avx512_vnni"),
    *("avx_vnni", "amx_tile", "amx_bf16", "amx_int8", "neon", "asimd", "sve", "sve2", "bf16", "i8mm"),
)


def facts(device: torch.device | str = "cpu") -> dict[str, object]:
    """Machine, versions and settings of this process, ready for JSON."""
    device = torch.device(device)
    cpu = _cpu()
    found: dict[str, object] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu["model"],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": cpu["isa"],
        "last-level cache MiB": round(cache_bytes("cpu") / 2**20),
        "memory GiB": _memory_gib(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "flowcut_kernels": __version__,
        "commit": commit(),
        "native library": native_error() or "loaded",
        "torch": torch.__version__,
    }
    for name in ("triton", "transformers", "numpy"):
        found[name] = version(name)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu memory GiB"] = round(properties.total_memory / 2**30, 1)
        found["gpu architecture"] = f"sm_{properties.major}{properties.minor}"
        found["cuda"] = torch.version.cuda
        found["triton kernels"] = triton_error() or "available"
    return found


def line(found: dict[str, object]) -> str:
    """The facts that matter most, in one line."""
    isa: Any = found["isa"]
    wide = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "sve", "asimd") if flag in isa]
    parts = [
        found.get("gpu") or found["cpu"],
        f"{found['cores']} cores, {found['threads']} threads",
        " ".join(wide[:2]),
        f"{found['memory GiB']} GiB",
        f"torch {found['torch']}",
        f"transformers {found['transformers']}",
        f"flowcut_kernels {found['flowcut_kernels']}" + (f" ({found['commit']})" if found["commit"] else ""),
    ]
    return " · ".join(str(part) for part in parts if part)


def version(package: str) -> str | None:
    """The installed version, None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def commit() -> str | None:
    """Short commit of the clone this package runs from, "+" where it has changes; None outside a clone.

    A copy without .git is told its commit by FLOWCUT_COMMIT.
    """
    if told := os.environ.get("FLOWCUT_COMMIT"):
        return told
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


@cache
def cache_bytes(device: torch.device | str) -> int:
    """Size of the last-level cache of a CPU, of the L2 of a GPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}.get(text[-1], 1))
    return max(sizes, default=32 * 2**20)


@cache
def _cpu() -> dict[str, object]:
    fields: dict[str, str] = {}
    try:
        for text in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = text.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    model = fields.get("model name") or platform.processor() or platform.machine()
    return {"model": model, "isa": [flag for flag in ISA if flag in flags]}


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (OSError, ValueError):
        return None
