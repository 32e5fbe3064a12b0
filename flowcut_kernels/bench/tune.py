"""What a search on unlabelled samples gains: objective and held-out accuracy of the trained stand-in, tuned and not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from optuna import load_study
from optuna.storages import InMemoryStorage

from ..policies import FlowCut, Policy
from ..policies.stages import average_retention
from ..tune import Objective, open_storage, published_policy, published_stages, tune
from .quality import ALL, Exam, Tick, accuracy, interval, loaded, refcheck, take
from .report import Section
from .shapes import patches_of

BUDGETS = (0.10, 0.25)
SAMPLERS: tuple[Literal["gp", "tpe"], ...] = ("gp", "tpe")
UNTUNED = "untuned"
SIZE = 16  # prompts, or scenes, of a batch
HELD_OUT = 256  # prompts whose states are compared

# name -> where the search starts, for a budget and the number of decoder layers
POLICIES: dict[str, Callable[[float, int], Policy]] = {
    "flowcut": lambda budget, layers: FlowCut(retain_ratio=budget),
    "vflowopt": published_policy,
    "hybrid": lambda budget, layers: FlowCut(
        retain_ratio=budget, recycle_cell=16.0, llm_stages=published_stages(layers)
    ),
}


def prompts(asked: list, processor) -> list[dict[str, Any]]:
    """Processor output of questions, in batches."""
    parts = [asked[i : i + SIZE] for i in range(0, len(asked), SIZE)]
    return [
        dict(processor(images=[q.image for q in p], text=[q.prompt for q in p], padding=True, return_tensors="pt"))
        for p in parts
    ]


def measure(
    *,
    device: torch.device | str = "cpu",
    policy: str = "vflowopt",
    budgets: tuple[float, ...] = BUDGETS,
    trials: int = 60,
    samplers: tuple[Literal["gp", "tpe"], ...] = SAMPLERS,
    samples: int = 64,
    questions: int = 2000,
    split: str = "dev",
    seed: int = 0,
    per_scene: int = 4,
    storage: str | None = None,
    folder: Path | None = None,
    backend: str | None = None,
    stand_in: tuple[Callable, Callable] | None = None,
    command: str = "flowcut-bench tune",
    tick: Tick = lambda label, share=None: None,
) -> Section:
    """Search a policy's numbers, then score what was found and the untuned policy on other questions.

    Args:
        policy: a key of ``POLICIES``.
        samples: prompts the search sees, of scenes of the development split that are asked nothing else.
        questions: held-out ones, about scenes of ``split``.
        storage: as in :func:`~flowcut_kernels.tune`; studies are named by policy, budget and sampler.
        folder: where the policies found are written as JSON; None: nowhere.
        stand_in: ``load()`` and ``questions(split, n, seed, per_scene)``; None: the shipped one's.
    """
    tick("loading")
    model, processor, draw = loaded(stand_in, torch.float32, device)
    seen = prompts(draw("dev", samples, seed + 1, 1), processor)
    asked = draw(split, -(-questions // per_scene) * per_scene, seed, per_scene)
    tokens, layers = patches_of(model.config.vision_config), model.config.get_text_config().num_hidden_layers
    failed = (
        []
        if (checked := refcheck(model, processor, asked[: 2 * per_scene], tokens // 9, backend)) == "ok"
        else [checked]
    )
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    if not failed:
        exam = Exam.of(asked, processor)
        held_out = Objective(model, prompts(asked[::per_scene][:HELD_OUT], processor), backend)
        score = partial(_score, model, exam, held_out, backend)
        rows.append(dict(policy=ALL, found=ALL, tokens=tokens, ok=True, **accuracy(score(None)[0])))
        store = open_storage(storage) or InMemoryStorage()
        for number, budget in enumerate(budgets):
            base = POLICIES[policy](budget, layers)
            results, curves = {UNTUNED: (base, 0.0)}, {}
            for i, sampler in enumerate(samplers):
                name, before = f"{policy} {budget:g} {sampler}", number * len(samplers) + i

                def show(study, trial, name=name, before=before) -> None:
                    done = (before + min(trial.number + 1, trials) / trials) / len(budgets) / len(samplers)
                    tick(f"{name}, {trial.number + 1} of {trials} trials", done)

                start = time.perf_counter()
                best = tune(
                    model, seen, budget, trials, store, policy=base, sampler=sampler, seed=seed, study_name=name,
                    backend=backend, progress=False, on_trial=show,
                )  # fmt: skip
                results[sampler] = best, time.perf_counter() - start
                curves[sampler] = [t.value for t in load_study(study_name=name, storage=store).trials]
                if folder is not None:
                    folder.mkdir(parents=True, exist_ok=True)
                    best.to_json(folder / f"{name.replace(' ', '-')}.json")
            tick(f"{policy} {budget:g}, scoring")
            found = _rows(results, Objective(model, seen, backend), score, tokens, budget, layers)
            rows += found
            failed += _broken(found, budget)
            policies = {name: json.loads(chosen.to_json()) for name, (chosen, _) in results.items()}
            facts[f"{budget:g}"] = dict(curves=curves, policies=policies)
    return Section(
        "tune",
        f"{policy}: tuned on unlabelled samples",
        command,
        rows,
        facts=dict(
            policy=policy, samples=samples, trials=trials, split=split, questions=len(asked), seed=seed,
            patches=tokens, budgets=facts,
        ),
        notes=[
            f"the search sees {samples} prompts of the development split, without their answers; scored are "
            f"{len(asked):,} questions about other scenes ({split} split)",
            "objective: mean cosine of the last prompt token's final state to that of the unpruned model, on the "
            f"prompts of the search and on {min(HELD_OUT, len(asked) // per_scene)} held-out ones",
            "±: half of the 95 % interval, bootstrap over scenes; differences are paired",
            *verdict(rows),
        ],
        failed=failed,
    )  # fmt: skip


def _score(model, exam: Exam, held_out: Objective, backend: str | None, policy: Policy | None) -> tuple:
    """Right answers by scene [S, Q], similarities [prompts]."""
    chosen = None if policy is None else lambda number: policy
    right = take(model, exam, chosen, SIZE, backend, lambda: None)
    return right, None if policy is None else held_out.similarities(policy).numpy()


def _rows(
    results: dict[str, tuple[Policy, float]],
    objective: Objective,
    score: Callable[[Policy], tuple],
    tokens: int,
    budget: float,
    layers: int,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    first: tuple = ()
    for name, (policy, seconds) in results.items():
        right, similar = score(policy)
        first = first or (right, similar)
        row = dict(
            policy=type(policy).__name__, found=name, budget=budget, tokens=budget * tokens,
            objective=objective(policy),
            retention=average_retention(policy.retain_ratio or 0.0, getattr(policy, "llm_stages", ()), layers),
            held_out=float(similar.mean()), seconds=seconds or None, ok=True, **accuracy(right),
        )  # fmt: skip
        if name != UNTUNED:
            for key, gain in (("gain", right.mean(1) - first[0].mean(1)), ("held_out_gain", similar - first[1])):
                row[key] = float(gain.mean())
                row[f"{key}_low"], row[f"{key}_high"] = interval(gain)
        rows.append(row)
    return rows


def _broken(rows: list[dict[str, Any]], budget: float) -> list[str]:
    """What a search must not do."""
    failed = []
    for row in rows:
        if abs(row["retention"] - budget) > 1e-9:
            failed.append(f"{row['found']} at {budget:.0%} keeps {row['retention']:.2%} on average")
        if row["objective"] < rows[0]["objective"] - 1e-6:
            failed.append(
                f"{row['found']} at {budget:.0%} is worse than the untuned policy on the search's own samples"
            )
    return failed


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """Where tuning helps, in words, so that nobody has to find it in the table."""
    found = []
    for row in (row for row in rows if "gain" in row):
        said = []
        for key, what in (("gain", "accuracy"), ("held_out_gain", "held-out objective")):
            low, high = row[f"{key}_low"], row[f"{key}_high"]
            said.append(f"{what} {'better' if low > 0 else 'worse' if high < 0 else 'not told apart'}")
        found.append(f"{row['budget']:.0%}, {row['found']} against untuned, beyond chance: {', '.join(said)}")
    return found
