"""What longer answers of the trained stand-in lose with the tokens: all digits of a scene, listed by `generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..models import patch, unpatch
from .contenders import NAMES
from .quality import (
    ALL,
    INTERVALS,
    RIVALS,
    SHARES,
    Chosen,
    Tick,
    accuracy,
    budgets_of,
    contest,
    loaded,
    paired,
    take_all,
    unreachable,
    verdict,
)
from .report import Section
from .shapes import patches_of


class Lists(NamedTuple):
    """Prompts in batches, as the processor makes them, and the answers to them."""

    inputs: list[dict[str, torch.Tensor]]
    answers: list[str]
    tokenizer: Any

    @classmethod
    def of(cls, asked: list, processor: Any, size: int) -> Lists:
        parts = [asked[i : i + size] for i in range(0, len(asked), size)]
        inputs = [
            dict(processor(images=[q.image for q in p], text=[q.prompt for q in p], padding=True, return_tensors="pt"))
            for p in parts
        ]
        return cls(inputs, [q.answer for q in asked], processor.tokenizer)


def scores(said: str, answer: str) -> tuple[float, float]:
    """Whether an answer is right word for word, and the F1 of its words as a set; nothing said is 0."""
    words, wanted = set(said.split()), set(answer.split())
    return float(said.split() == answer.split()), 2 * len(words & wanted) / (len(words) + len(wanted))


@torch.inference_mode()
def write(model, lists: Lists, policy: Chosen, backend: str | None, tick: Callable[[], object]) -> np.ndarray:
    """Greedy answers to all prompts: float [prompts, 2] of `scores`."""
    longest = max(len(answer.split()) for answer in lists.answers) + 1  # one more than is right, or the end
    said: list[str] = []
    for number, inputs in enumerate(lists.inputs):
        if policy:
            patch(model, policy(number), backend=backend)
        try:
            moved = {k: x.to(model.device, model.dtype if x.is_floating_point() else None) for k, x in inputs.items()}
            output = model.generate(**moved, max_new_tokens=longest, do_sample=False)
        finally:
            if policy:
                unpatch(model)
        said += lists.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        tick()
    return np.array([scores(*pair) for pair in zip(said, lists.answers, strict=True)])


def measure(
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    split: str = "dev",
    questions: int = 1000,
    shares: Sequence[float] = SHARES,
    policies: Sequence[str] = NAMES,
    seed: int = 0,
    batch: int = 16,
    backend: str | None = None,
    stand_in: tuple[Callable, Callable] | None = None,
    command: str = "flowcut-bench quality --generation",
    tick: Tick = lambda label, share=None: None,
) -> Section:
    """Lists of digits that the trained stand-in writes, one for each scene: right word for word, and their F1.

    Args:
        stand_in: ``load(dtype=...)`` and ``lists(split, n, seed)``; None: the shipped one's. The others are as in
            :func:`~flowcut_kernels.bench.quality.measure`.
    """
    tick("loading")
    model, processor, draw = loaded(stand_in, dtype, device, "lists")
    lists = Lists.of(draw(split, questions, seed), processor, batch)
    tokens, layers = patches_of(model.config.vision_config), model.config.get_text_config().num_hidden_layers
    rows, runs = contest(policies, budgets_of(shares, tokens), layers, tokens)
    results = take_all(runs, len(lists.inputs), tick, lambda policy, step: write(model, lists, policy, backend, step))
    for row in rows:
        name, budget = row["policy"], row["tokens"]
        if (name, budget) not in results:
            continue
        found = results[name, budget]
        row |= dict(**accuracy(found[:, :1]), **paired("f1", found[:, 1]), questions=len(found))
        for key, other in RIVALS:
            if name not in (ALL, other) and (other, budget) in results:
                row |= paired(key, found[:, 0] - results[other, budget][:, 0])
                row |= paired(f"f1_{key}", found[:, 1] - results[other, budget][:, 1])
    return Section(
        "generation",
        "Lists of digits that the trained stand-in writes",
        command,
        rows,
        facts=dict(
            split=split, questions=questions, seed=seed, patches=tokens, dtype=str(dtype).removeprefix("torch."),
        ),
        notes=[
            f"one list for each of {questions:,} scenes of held-out digits ({split} split), greedy decoding",
            "right: all digits of the scene in rising order and nothing else; F1: of the digits as a set, mean",
            INTERVALS,
            *unreachable(rows),
            *verdict(rows),
        ],
    )  # fmt: skip
