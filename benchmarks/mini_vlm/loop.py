"""A resumable training loop: Muon for the matrices inside the blocks, AdamW for the rest, safetensors checkpoints."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

# Without units for bfloat16 a step takes five times as long in it as in float32.
UNITS = torch.cpu.get_capabilities().get("avx512_bf16", False)


def now() -> np.ndarray:
    """Seconds of wall clock and of processor time, [2]; only differences mean something."""
    return np.array([time.monotonic(), time.process_time()])


def save(path: Path, task: nn.Module, optimisers: list[torch.optim.Optimizer], step: int, spent: np.ndarray) -> None:
    """Write weights, optimiser state, step and time so far to one safetensors file, replaced in one move."""
    tensors = {f"task.{key}": value for key, value in task.state_dict().items()}
    for number, optimiser in enumerate(optimisers):
        for index, state in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    partial = path.with_suffix(".partial")
    save_file(
        {key: value.detach().contiguous() for key, value in tensors.items()},
        partial,
        {"step": str(step), "wall": f"{spent[0]:.1f}", "cpu": f"{spent[1]:.1f}"},
    )
    os.replace(partial, path)


def restore(path: Path, task: nn.Module, optimisers: list[torch.optim.Optimizer]) -> tuple[int, np.ndarray]:
    """Load what `save` wrote, if it is there: (steps done, time so far)."""
    if not path.exists():
        return 0, np.zeros(2)
    weights, states = {}, [{} for _ in optimisers]
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
            kind, _, rest = key.partition(".")
            if kind == "task":
                weights[rest] = file.get_tensor(key)
            else:
                number, index, field = rest.split(".")
                states[int(number)].setdefault(int(index), {})[field] = file.get_tensor(key)
        notes = file.metadata()
    task.load_state_dict(weights)
    for optimiser, state in zip(optimisers, states, strict=True):
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return int(notes["step"]), np.array([float(notes["wall"]), float(notes["cpu"])])


def fit(
    name: str,
    task: nn.Module,
    loss: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
    steps: int,
    rate: float,
    folder: Path,
    progress: Progress,
    every: int = 100,
) -> np.ndarray:
    """Minimise `loss(step)` over the parameters of `task`; resumes from folder/name.safetensors.
    rate: peak learning rate, reached after a short warm-up and taken to zero over the last 40 % of the steps.
    Returns the time it took in all, as `now` counts it.
    """
    named = [(key, value) for key, value in task.named_parameters() if value.requires_grad]
    matrices = [value for key, value in named if value.ndim == 2 and ".layers." in key]
    inside = {id(value) for value in matrices}
    rest = [value for _, value in named if id(value) not in inside]
    optimisers = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, weight_decay=0.01, betas=(0.9, 0.98)),
    ]
    path = folder / f"{name}.safetensors"
    done, spent = restore(path, task, optimisers)
    bar = progress.add_task(name, total=steps, completed=done)
    figures: dict[str, float] = {}
    started = now() - spent
    task.train()
    for step in range(done, steps):
        scale = min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = rate * scale
        with torch.autocast("cpu", torch.bfloat16, enabled=UNITS):
            value, latest = loss(step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(rest + matrices, 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        for key, figure in {"loss": value.item(), **latest}.items():
            figures[key] = 0.97 * figures.get(key, figure) + 0.03 * figure
        progress.update(
            bar,
            advance=1,
            description=f"{name}  " + "  ".join(f"{key} {figure:.3f}" for key, figure in figures.items()),
        )
        if (step + 1) % every == 0 or step + 1 == steps:
            save(path, task, optimisers, step + 1, now() - started)
    task.eval()
    return now() - started
