"""Everything that only a GPU can show, as one resumable command; on a CPU the same steps at toy size.

Each step is a process of its own, so that a failure or a time limit costs that step alone. After every step gpu.json
holds all figures so far: it and gpu.log, what the steps printed, are all there is to carry away, or back to go on.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .._library import native_error
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

    def options(self, dry: bool) -> str:
        return (self.dry if dry else self.real).format(arch=_architecture(dry))


TOY = "--repeats 1 --device cpu"
ENCODER = "--layers 6 --image-size 112 --hidden 64"
STEPS = (
    *(
        Step(
            f"prefill-{model}", f"prefill --model {model} --batch {batch} --baselines --repeats 5 --device cuda",
            f"prefill --model {model} --toy --batch {few} --baselines {TOY}",
        )
        for model, batch, few in (("llava-1.5-7b", "1,8,32", "1,2"), ("llava-next-7b", "1,8", "2"))
    ),
    Step(
        "encoder", "encoder --dtype bf16 --batch 1,8,32 --repeats 9 --device cuda",
        f"encoder {ENCODER} --tokens 16,8 --batch 2 {TOY}",
    ),
    Step(
        "encoder-frozen", "encoder --dtype bf16 --batch 1 --frozen --no-baselines --repeats 9 --device cuda",
        f"encoder {ENCODER} --frozen --tokens 8 --batch 1 {TOY}",
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
        f"prefill --model llava-onevision-7b --toy --batch 2 --baselines {TOY}",
    ),
    Step(
        "prefill-families", "prefill --family all --repeats 3 --device cuda",
        f"prefill --family qwen2.5-vl-7b --toy {TOY}",
    ),
    *(
        Step(
            f"prefill-{model}-batch-32", f"prefill --model {model} --batch 32 --baselines --repeats 3 --device cuda",
            f"prefill --model {model} --toy --batch 1 --baselines {TOY}",
        )
        for model in ("llava-next-7b", "llava-onevision-7b")
    ),
    Step("compile", "compile --arch {arch}", "compile --arch 90 --only gather"),
)  # fmt: skip
# Compilation for other generations needs no GPU, and CI does it.
TESTS = "tests/ops tests/modules tests/policies tests/test_calibrate.py --deselect tests/ops/test_compile.py"
DRY_TESTS = "tests/ops/test_counters.py"
# Of compute-sanitizer, over the tests of kernels. Without a caching allocator there is no graph to capture.
CHECKERS = ("memcheck", "racecheck")
CHECKED = "(triton or cuda) and not graph and not compile and not many"
# What is most likely to fail, and what most targets rest on, come first.
ORDER = (
    *("build", "ops", "prefill-llava-1.5-7b", "encoder", "encoder-frozen", "tests", "kv", "prefill-llava-next-7b"),
    *("encoder-16384", "compare", "ops-cold", "prefill-llava-onevision-7b", "prefill-families"),
    *("prefill-llava-next-7b-batch-32", "prefill-llava-onevision-7b-batch-32", "compile", *CHECKERS),
)
# The most a step may take; where --only names it, it may take all the time.
SECONDS = dict(build=240, tests=150)
GRACE = 15  # seconds that a step has to say where it was stopped


def names() -> list[str]:
    """Steps in order; an installed package has nothing to build or to test."""
    clone = (ROOT / "setup.py").exists()
    return [name for name in ORDER if clone or name not in ("build", "tests", *CHECKERS)]


def run(
    out: Path,
    dry: bool,
    only: Iterable[str],
    limit: float,
    tick: Callable[..., object],
    say: Callable[[str], object] = print,
) -> Report:
    """Run the steps that did not end well at this commit (all that `only` names, if any), within `limit` seconds.

    Returns:
        What gpu.json holds: the table of targets, whose facts say what became of every step, and all sections.
    """
    only, start, commit = set(only), time.perf_counter(), machine.commit() or "no commit"
    out.mkdir(parents=True, exist_ok=True)
    path, steps = out / "gpu.json", {step.name: step for step in STEPS}
    report = load(path) if path.exists() else Report(machine.facts("cpu" if dry else "cuda"), "", [])
    facts: dict[str, dict[str, Any]] = dict(steps={}, commits={}, seconds={})
    if report.sections:
        facts |= report.sections[0].facts
    commands = {name: f"flowcut-bench {step.options(dry)}" for name, step in steps.items()}
    # Figures of another commit go: they would stand under this machine line and count as this commit's.
    facts["steps"] = {name: fate for name, fate in facts["steps"].items() if facts["commits"].get(name) == commit}
    found = {
        name: [s for s in report.sections[1:] if s.command == commands[name]] if name in facts["steps"] else []
        for name in steps
    }
    chosen = [name for name in names() if not only or name in only]
    missed = []
    for number, name in enumerate(chosen):
        left = limit - (time.perf_counter() - start)
        gone = name == "build" and native_error() is not None  # gpu.json went on to a fresh machine
        if not (only or gone) and facts["steps"].get(name) == "ok" and facts["commits"].get(name) == commit:
            say(f"{name}: done before")
            continue
        if left < 1:
            missed.append(name)
            facts["steps"].setdefault(name, "no time left")
            say(f"{name}: no time left")
            continue
        tick(name, number / len(chosen))
        before = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            figures = Path(folder, "figures.json")
            seconds = left if only else min(left, SECONDS.get(name, left))
            command = _command(name, dry, commands.get(name, ""), figures)
            fate = _process(command, _environment(name, dry), out / "gpu.log", seconds)
            if figures.exists():
                step_report = load(figures)
                report.machine, found[name] = step_report.machine, step_report.sections
        facts["steps"][name], facts["commits"][name] = fate, commit
        facts["seconds"][name] = round(time.perf_counter() - before, 1)
        say(f"{name}: {fate}, {facts['seconds'][name]:.0f} s")
        _save(path, report, facts, found, dry, missed, time.perf_counter() - start)
    return _save(path, report, facts, found, dry, missed, time.perf_counter() - start)


def _save(
    path: Path, report: Report, facts: dict, found: dict[str, list[Section]], dry: bool, missed: list[str], spent: float
) -> Report:
    """gpu.json, whole at any moment."""
    sections = [section for name in ORDER for section in found.get(name, ())]
    again = f"flowcut-bench gpu --out {path.parent.name}" + " --dry-run" * dry
    failed = [f"{name}: {fate}" for name, fate in facts["steps"].items() if fate != "ok"]
    failed += [f"{name}: no time left" for name in missed if facts["steps"][name] == "ok"]
    notes = ["a miss is reported, not a failure"]
    summary = Section("gpu", "Targets", again, targets(sections), facts, notes, failed)
    whole = Report(report.machine, again, [summary, *sections], spent)
    part = path.with_suffix(".part")
    whole.save(part)
    part.replace(path)
    return whole


def _command(name: str, dry: bool, command: str, figures: Path) -> list[str]:
    pytest = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    if find_spec("xdist") and not dry:
        pytest += ["-n", str(len(os.sched_getaffinity(0)))]
    if name == "build":
        return [sys.executable, "setup.py", "build_ext", "--inplace"]
    if name == "tests" or (dry and name in CHECKERS):
        return [*pytest, *(DRY_TESTS if dry else TESTS).split()]
    if name in CHECKERS:
        checker = f"compute-sanitizer --tool {name} --target-processes all --error-exitcode 9"
        return [*checker.split(), *pytest, "tests/ops", "-k", CHECKED]
    return [*CLI, *command.split()[1:], "--json", str(figures)]


def _environment(name: str, dry: bool) -> dict[str, str]:
    """Of a step's process, which may have neither an installed package nor a network."""
    given = dict(os.environ, HF_HUB_OFFLINE="1", PYTHONFAULTHANDLER="1", PYTHONUNBUFFERED="1")
    if (ROOT / "setup.py").exists():
        given["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    if name in ("tests", *CHECKERS):
        given["OMP_NUM_THREADS"] = "1"  # a process for every core
    if name in CHECKERS:
        given["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else an access beyond a tensor falls into the next
    if name == "build" and not dry:
        given.setdefault("FLOWCUT_CUDA_ARCHS", str(_architecture(dry)))  # a third of the compiler's time
    return given


def _architecture(dry: bool) -> int:
    import torch

    if dry:
        return 90
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _process(command: list[str], environment: dict[str, str], log: Path, seconds: float) -> str:
    """ "ok", or how the process ended and its last words; all of its output goes to the end of `log`."""
    with log.open("a+", errors="replace") as file:
        file.write(f"\n== {shlex.join(command)}\n")
        file.flush()
        start = file.tell()
        try:
            # A session of its own, so that what the process started ends with it. A shell's background jobs ignore
            # interrupts, and what they start inherits that.
            process = subprocess.Popen(
                command, cwd=ROOT if (ROOT / "setup.py").exists() else None, env=environment, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip
        except OSError as error:
            return f"cannot run {command[0]}: {error.strerror}"
        try:
            code = process.wait(seconds)
            fate = "ok" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            fate = f"stopped after {seconds:.0f} s"
            # First an interrupt, for pytest's summary; then a signal at which Python says where it hangs.
            for number in (signal.SIGINT, signal.SIGABRT):
                process.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
                    break
        finally:
            with suppress(ProcessLookupError):  # nothing of it is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        file.seek(start)
        last = next((line for line in reversed(file.read().splitlines()) if line.strip()), "")
    return fate if fate == "ok" or not last else f"{fate}: {last.strip()[:200]}"


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
        at_most("same, with the log-sum-exp that the layer's attention leaves", 1.0,
                of("of_torch", op="received+hubs", case="B=10 N=729 d=72 lse", dtype="bfloat16")),
        at_least("compact_kv, 32 layers, 3,000→400: share of copy", 0.85,
                 of("of_copy", op="compact_kv", wants_copy=0.85)),
        at_least("same: times faster than index_select by layer", 3.0,
                 of("speedup", op="compact_kv", wants_speedup=3.0)),
        at_most("peak memory of the encoder at N=16,384: share of stock", 1.0,
                ratio(of("peak_bytes", patches=16384, **bf16), of("stock_peak_bytes", patches=16384, **bf16))),
    ]  # fmt: skip


def _matches(row: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(row.get(key) == value for key, value in wanted.items())
