"""Everything that only a GPU can show, as one resumable command; on a CPU the same steps at toy size.

Each step is a process of its own that writes one file, so that a failure or a time limit costs that step alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import machine
from .report import Report, Section, load

CLI = [sys.executable, "-m", "flowcut_kernels.bench.cli"]
ROOT = Path(__file__).parents[2]  # of a clone


@dataclass(frozen=True)
class Step:
    """A subcommand of flowcut-bench with the options of a real and of a dry run."""

    name: str
    real: str
    dry: str


TOY = "--repeats 1 --device cpu"
ENCODER = "--layers 6 --image-size 112 --hidden 64 --frozen"
STEPS = (
    *(
        Step(
            f"prefill-{model}", f"prefill --model {model} --batch {batch} --baselines --repeats 5 --device cuda",
            f"prefill --model {model} --toy --batch 1,2 --baselines {TOY}",
        )
        for model, batch in (("llava-1.5-7b", "1,8,32"), ("llava-next-7b", "1,8"))
    ),
    Step(
        "encoder", "encoder --dtype bf16 --batch 1,8,32 --frozen --repeats 9 --device cuda",
        f"encoder {ENCODER} --tokens 16,8 --batch 1,2 {TOY}",
    ),
    Step("kv", "kv --repeats 9 --device cuda", f"kv --toy {TOY}"),
    Step("ops", "ops --dtype bf16 --repeats 15 --device cuda", f"ops --toy {TOY}"),
    Step(
        "compare", "compare --tokens 64 --batch 1,8 --repeats 5 --device cuda",
        f"compare --toy --tokens 24 --steps 1 --policies FlowCut,FastV,random {TOY}",
    ),
    Step(
        "encoder-16384", "encoder --dtype bf16 --batch 1 --image-size 1792 --layers 8 --tokens 1638 --repeats 5 "
        "--no-baselines --device cuda", f"encoder {ENCODER} --tokens 8 --batch 1 --no-baselines {TOY}",
    ),
    Step("ops-cold", "ops --dtype bf16 --repeats 15 --device cuda --cold", f"ops --toy --only gather --cold {TOY}"),
    Step(
        "prefill-llava-onevision-7b",
        "prefill --model llava-onevision-7b --batch 1,8 --baselines --repeats 5 --device cuda",
        f"prefill --model llava-onevision-7b --toy --batch 1,2 --baselines {TOY}",
    ),
    Step(
        "prefill-families", "prefill --family all --repeats 3 --device cuda",
        f"prefill --family all --toy {TOY}",
    ),
    *(
        Step(
            f"prefill-{model}-batch-32", f"prefill --model {model} --batch 32 --repeats 3 --device cuda",
            f"prefill --model {model} --toy --batch 1 {TOY}",
        )
        for model in ("llava-next-7b", "llava-onevision-7b")
    ),
    Step("compile", "compile --arch {arch}", "compile --arch 90 --only gather"),
)  # fmt: skip
# Compilation for other generations needs no GPU, and CI does it.
TESTS = "tests/ops tests/modules tests/policies tests/test_calibrate.py --deselect tests/ops/test_compile.py"
DRY_TESTS = "tests/ops/test_gather_tokens.py"
TEST_SECONDS = 150  # the tests' share; a run of its own (--only tests) may take all the time


def run(
    out: Path, dry: bool, only: Iterable[str], limit: float, tick: Callable[..., object]
) -> tuple[Report, dict[str, str]]:
    """Run the steps that have no file of this commit in `out` (all that `only` names, if any), within `limit` seconds.

    Returns:
        All sections found in `out` with the table of targets, and what became of every step.
    """
    only, start, fates, stamp = set(only), time.perf_counter(), {}, machine.commit() or "no commit"
    out.mkdir(parents=True, exist_ok=True)
    clone = (ROOT / "setup.py").exists()
    names = [*["build"] * clone, *(step.name for step in STEPS), *["tests"] * clone]
    steps = {step.name: step for step in STEPS}
    for number, name in enumerate(names):
        path, marker = out / f"{name}.json", out / f"{name}.done"
        if only and name not in only:
            continue
        left = limit - (time.perf_counter() - start)
        if not only and marker.exists() and marker.read_text() == stamp:
            fates[name] = "done before"
        elif left < 1:
            fates[name] = "no time left"
        else:
            tick(name, number / len(names))
            for file in (path, marker):
                file.unlink(missing_ok=True)
            seconds = min(left, TEST_SECONDS) if name == "tests" and not only else left
            fates[name] = _process(_command(name, steps, path, dry), out / f"{name}.log", seconds)
            if fates[name] == "ok":
                marker.write_text(stamp)
    files = [out / f"{name}.json" for name in steps]
    reports = [load(file) for file in files if file.exists()]
    sections = [section for report in reports for section in report.sections]
    failed = [f"{name}: {fate}" for name, fate in fates.items() if fate not in ("ok", "done before")]
    again = f"flowcut-bench gpu --out {out.name}" + " --dry-run" * dry
    rows = targets(sections)
    summary = Section("gpu", "Targets", again, rows, dict(steps=fates), ["a miss is reported, not a failure"], failed)
    return Report(
        machine.facts("cpu" if dry else "cuda"), again, [summary, *sections], time.perf_counter() - start
    ), fates


def _command(name: str, steps: dict[str, Step], path: Path, dry: bool) -> list[str]:
    if name == "build":
        return [sys.executable, "-m", "pip", "install", "-q", "-e", str(ROOT), "--no-build-isolation", "--no-deps"]
    if name == "tests":
        chosen = (DRY_TESTS if dry else TESTS).split()
        return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT),
                *(str(ROOT / part) for part in chosen)]  # fmt: skip
    step = steps[name]
    return [*CLI, *(step.dry if dry else step.real).format(arch=_architecture(dry)).split(), "--json", str(path)]


def _architecture(dry: bool) -> int:
    import torch

    if dry:
        return 90
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _process(command: list[str], log: Path, seconds: float) -> str:
    """ "ok", or how the process ended; its output is in `log`."""
    with log.open("w") as file:
        # A session of its own, so that what the process started ends with it.
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after {seconds:.0f} s, see {log.name}"
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return "ok" if code == 0 else f"exit status {code}, see {log.name}"


def targets(sections: Iterable[Section]) -> list[dict[str, Any]]:
    """What was promised, what was measured, and whether it holds; None where nothing was measured."""
    rows = [
        dict(row, section=section.name)
        for section in sections
        for row in section.rows
        if row.get("ok") and not section.facts.get("cold cache")
    ]

    def of(key: str, combine: Callable = max, count: int = 1, **wanted: Any) -> float | None:
        """The worst of `count` rows; None unless every one of them is there."""
        found = [row[key] for row in rows if row.get(key) is not None and _matches(row, wanted)]
        return combine(found) if len(found) == count else None

    def ratio(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else a / b

    def at_most(what: str, bound: float, found: float | None) -> dict[str, Any]:
        return dict(
            ok=True, what=what, target=f"<= {bound:g}", found=found, met=None if found is None else found <= bound
        )

    def at_least(what: str, bound: float, found: float | None) -> dict[str, Any]:
        return dict(
            ok=True, what=what, target=f">= {bound:g}", found=found, met=None if found is None else found >= bound
        )

    # Every real case and no toy: rows are told apart by their size.
    bf16: dict[str, Any] = dict(section="encoder", dtype="bfloat16")
    prefill: dict[str, Any] = dict(section="prefill", dtype="bfloat16")
    graph = of("frozen_graph_ratio", tokens=64, batch=1, patches=576, **bf16)
    return [
        at_least("stats+select, B=64, N=577..2,305: share of copy", 0.8,
                 of("of_copy", min, 3, op="anchor_stats_select", wants_copy=0.8)),
        at_least("gather+norm, B=64, N=577..2,305: share of copy", 0.8,
                 of("of_copy", min, 3, op="gather+norm", wants_copy=0.8)),
        at_most("scoring over all layers, CLIP-L B=8: share of the stock encoder", 0.03,
                of("scoring_of_stock", tokens=64, batch=8, patches=576, **bf16)),
        at_most("encoder 576→64, B=8: time / FLOPs", 1.15, of("overhead", tokens=64, batch=8, patches=576, **bf16)),
        at_most("encoder 576→64, B=32: time / FLOPs", 1.15, of("overhead", tokens=64, batch=32, patches=576, **bf16)),
        at_most("same, B=1, frozen in a CUDA graph: share of stock", 0.5, graph),
        at_most("same: share of stock in its own CUDA graph", 1.0,
                ratio(graph, of("stock_graph_ratio", tokens=64, batch=1, patches=576, **bf16))),
        at_least("prefill LLaVA-1.5-7B 576→64, B=8: times faster", 3.2,
                 of("speedup", model="llava-1.5-7b", tokens=64, batch=8, **prefill)),
        at_least("same: share of the free-selection limit", 0.9,
                 of("of_limit", model="llava-1.5-7b", tokens=64, batch=8, **prefill)),
        at_least("prefill LLaVA-NeXT-7B 2,880→160, B=1 and 8: times faster", 5.0,
                 of("speedup", min, 2, model="llava-next-7b", tokens=160, **prefill)),
        at_most("attention_with_stats : SDPA, N=577..4,096", 1.1,
                of("of_torch", max, 8, op="attention_with_stats")),
        at_most("received_attention and 25 hub rows : SDPA, 10 tiles of 729", 1.0,
                of("of_torch", op="received+hubs", case="B=10 N=729 d=72", dtype="bfloat16")),
        at_least("compact_kv, 32 layers, 3,000→400: share of copy", 0.85,
                 of("of_copy", op="compact_kv", wants_copy=0.85)),
        at_least("same: times faster than index_select by layer", 3.0,
                 of("speedup", op="compact_kv", wants_speedup=3.0)),
        at_most("peak memory of the encoder at N=16,384: share of stock", 1.0,
                ratio(of("peak_bytes", patches=16384, **bf16), of("stock_peak_bytes", patches=16384, **bf16))),
    ]  # fmt: skip


def _matches(row: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(row.get(key) == value for key, value in wanted.items())
