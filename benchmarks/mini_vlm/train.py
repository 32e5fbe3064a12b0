"""Train the mini-VLM from nothing: `python -m benchmarks.mini_vlm.train` from the root of a clone.

Stage A trains the vision tower, stage B the projector and language model on cached features. An interrupted run goes on
where its last checkpoint left it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import WEIGHTS, language, vision
from .evaluate import report, rounded
from .loop import fit, now
from .model import build, processor
from .quiz import MIX, listing, quiz
from .scenes import generate

RECIPE = {
    "vision": {"steps": 3000, "batch": 16, "rate": 2e-3, "crowded": 0.45},
    "language": {"steps": 1500, "batch": 8, "rate": 2e-3, "scenes": 2500, "questions": 16},
}
PART = 250  # scenes that are drawn at once


def scaled(recipe: dict, scale: float) -> dict:
    """The recipe with that share of its steps and scenes, one of each at least."""

    def part(key: str, value: float) -> float:
        return max(1, round(scale * value)) if key in ("steps", "scenes") else value

    return {stage: {key: part(key, value) for key, value in each.items()} for stage, each in recipe.items()}


def train_vision(model, recipe: dict, seed: int, work: Path, progress: Progress) -> np.ndarray:
    """Stage A in place; returns the time it took, as `now` counts it."""
    vision.initialise(model.model.vision_tower)
    task = vision.VisionTask(model.model.vision_tower)

    def loss(step: int):
        return task(vision.batch(seed, step, recipe["batch"], crowded=step < recipe["crowded"] * recipe["steps"]))

    return fit("vision", task, loss, recipe["steps"], recipe["rate"], work, progress)


def train_language(model, recipe: dict, seed: int, work: Path, progress: Progress) -> np.ndarray:
    """Stage B in place, features of the frozen tower included; returns the time it took, as `now` counts it."""
    started = now()
    visual, ids, last = [], [], []
    for part in progress.track(range(-(-recipe["scenes"] // PART)), description="features"):
        scenes = generate("train", min(PART, recipe["scenes"] - part * PART), (seed, 2, part))
        visual.append(language.features(model.model.vision_tower, scenes.images))
        asked = quiz(scenes, recipe["questions"], (seed, part))
        asked = [[*row, listing(scenes, i)] for i, row in enumerate(asked)]
        for store, tensor in zip((ids, last), language.encode(asked), strict=True):
            store.append(tensor)
    visual, ids, last = torch.cat(visual), torch.cat(ids), torch.cat(last)
    language.initialise(model, visual[:100])
    task = language.LanguageTask(model)
    prepared = now() - started

    def loss(step: int):
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        rows = torch.randint(len(ids), (recipe["batch"],), generator=generator)
        return task(language.thin(visual[rows].float(), generator), ids[rows], last[rows])

    return prepared + fit("language", task, loss, recipe["steps"], recipe["rate"], work, progress)


def export(model, notes: dict, folder: Path) -> None:
    """Write weights (float16), configuration, processor and notes to `folder`, which appears complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent))
    model.half().save_pretrained(partial)
    processor().save_pretrained(partial)
    (partial / "training.json").write_text(json.dumps(rounded(notes), indent=1) + "\n")
    for file in partial.iterdir():
        file.chmod(0o644)
    partial.chmod(0o755)
    if folder.exists():
        old = Path(tempfile.mkdtemp(dir=folder.parent))
        os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old)
    else:
        os.replace(partial, folder)


def main() -> None:
    """Parse the command line, train, evaluate on the development split, write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder for the trained model")
    parser.add_argument("--work", type=Path, help="folder for checkpoints (default: next to --out)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps and scenes; below 1 with --out")
    options = parser.parse_args()
    if not 0 < options.scale <= 1:
        parser.error(f"--scale {options.scale} must be in (0, 1]")
    if options.scale < 1 and options.out == WEIGHTS:
        parser.error(f"--scale {options.scale} is a trial: give --out, where it does not replace the trained model")
    recipe = scaled(RECIPE, options.scale)
    torch.set_num_threads(options.threads)
    trial = f"-{options.scale:g}" * (options.scale < 1)  # never goes on where a whole run was interrupted
    work = options.work or options.out.parent / f"checkpoints-{options.seed}{trial}"
    work.mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    model = build(options.seed)
    model.set_attn_implementation("plain")
    with Progress(*columns) as progress:
        spent = {
            "vision": train_vision(model, recipe["vision"], options.seed, work, progress),
            "language": train_language(model, recipe["language"], options.seed, work, progress),
        }
    model.set_attn_implementation("sdpa")
    model = model.eval().half().float()  # judge the weights that are written
    started = now()
    found = report(model, "dev", max(8, round(options.scale * 500)), options.seed)
    spent["evaluation"] = now() - started
    spent["all"] = sum(spent.values())
    capability = torch.backends.cpu.get_cpu_capability()
    notes = {
        "seed": options.seed,
        "recipe": recipe,
        "question mix": MIX,
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": {stage: {"wall": wall / 60, "processor": cpu / 60} for stage, (wall, cpu) in spent.items()},
        "machine": f"{platform.machine()}, {options.threads} of {os.cpu_count()} cores, {capability}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "development": found,
    }
    export(model, notes, options.out)
    for stage in ("vision", "language"):
        (work / f"{stage}.safetensors").unlink()  # the next run starts from nothing
    print(json.dumps(rounded(found["accuracy"]), indent=1))


if __name__ == "__main__":
    main()
