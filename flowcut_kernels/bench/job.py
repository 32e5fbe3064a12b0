"""The main job: every table at the size that fits three minutes on two cores."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from typing import Any

import torch

from . import encoder, machine, ops, prefill, quality, scene
from .report import Report, Section
from .terminal import Tick

POLICIES = ("FlowCut", "VFlowOpt", "hybrid", "CLS attention", "CLS staged", "random", "uniform grid")
SMALL = dict(image_size=112, hidden_size=64, intermediate_size=128, num_attention_heads=1)
SMALL_TEXT = dict(hidden_size=64, intermediate_size=64, num_attention_heads=1, num_key_value_heads=1, vocab_size=64)


def measure(command: str, *, device: str, backend: str | None, toy: bool, tick: Tick) -> Report:
    """Fewer cases and repeats than the subcommands take; each section names the command that repeats it."""
    common = dict(device=device, backend=backend)
    # Fewer budgets in the encoder's section, and bfloat16 alone in the operators': that is what three minutes hold.
    tower = dict(shape=SMALL, layers=6, tokens=(16, 8)) if toy else dict(tokens=(192, 64))
    chain = prefill.cpu_shape(6, 1, (16, 8), SMALL, SMALL_TEXT) if toy else prefill.cpu_shape(tokens=(192, 128, 64))
    asked = dict(questions=64 if toy else 800, per_scene=8, policies=POLICIES)
    names = shlex.quote(",".join(POLICIES))
    jobs: tuple[tuple[Callable[..., Section], str, dict[str, Any]], ...] = (
        (quality.measure, f"quality --questions 800 --per-scene 8 --policies {names}", common | asked),
        (prefill.measure, "prefill --tokens 192,128,64 --repeats 3", common | dict(repeats=3, shape=chain)),
        (
            encoder.measure,
            "encoder --batch 1 --tokens 192,64 --repeats 3 --no-baselines",
            common | dict(batches=(1,), repeats=3, baselines=False) | tower,
        ),
        (
            ops.measure,
            "ops --dtype bf16 --repeats 3",
            common | dict(repeats=3, dtypes=(torch.bfloat16,), toy=toy),
        ),
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
    sections[0].facts["scene"] = scene.kept()
    return Report(machine.facts(device), command, sections, time.perf_counter() - start)
