"""The main job: every table at the size that fits three minutes on two cores."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import encoder, machine, ops, prefill, quality
from .look import draw, look, show
from .report import Report, Section
from .terminal import Tick

POLICIES = ("FlowCut", "VFlowOpt", "hybrid", "CLS attention", "random", "uniform grid")
SMALL = dict(image_size=112, hidden_size=64, intermediate_size=128, num_attention_heads=1)
SMALL_TEXT = dict(hidden_size=64, intermediate_size=64, num_attention_heads=1, num_key_value_heads=1, vocab_size=64)


def measure(command: str, *, device: str, backend: str | None, toy: bool, tick: Tick) -> Report:
    """Fewer cases and repeats than the subcommands take; each section names the command that repeats it."""
    common = dict(device=device, backend=backend)
    sized = dict(shape=SMALL, layers=6, tokens=(16, 8)) if toy else dict(tokens=(64,))
    chain = prefill.cpu_shape(6, 1, (8,), SMALL, SMALL_TEXT) if toy else prefill.cpu_shape(tokens=(64,))
    asked = dict(questions=64 if toy else 800, per_scene=8, policies=POLICIES)
    names = shlex.quote(",".join(POLICIES))
    jobs: tuple[tuple[Callable[..., Section], str, dict[str, Any]], ...] = (
        (quality.measure, f"quality --questions 800 --per-scene 8 --policies {names}", common | asked),
        (
            encoder.measure,
            "encoder --batch 1 --tokens 64 --repeats 3 --no-baselines",
            common | dict(batches=(1,), repeats=3, baselines=False) | sized,
        ),
        (prefill.measure, "prefill --tokens 64 --repeats 3", common | dict(repeats=3, shape=chain)),
        (ops.measure, "ops --repeats 3", common | dict(repeats=3, toy=toy)),
    )
    start, sections = time.perf_counter(), []
    for number, (run, again, options) in enumerate(jobs, 1):
        began = time.perf_counter()
        label = f"{number}/{len(jobs)} {again.split()[0]}:"
        section = run(
            command=f"flowcut-bench {again}",
            tick=lambda what, share=None, label=label: tick(f"{label} {what}", share),
            **options,
        )
        section.seconds = time.perf_counter() - began
        sections.append(section)
    return Report(machine.facts(device), command, sections, time.perf_counter() - start)


def sample(path: Path, share: float = 0.11) -> Path:
    """A scene of the development split and what FlowCut keeps of it."""
    from ..policies import FlowCut
    from . import mini_vlm

    model, processor = mini_vlm.load()
    shown = show(model, processor, mini_vlm.questions("dev", 1)[0].image, "scene")
    return draw(shown, look(model, processor, shown, FlowCut(retain_ratio=share), "FlowCut"), path)
