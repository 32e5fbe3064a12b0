"""What the parts of FlowCut and of VFlowOpt are worth: the policy without each of them, on the trained stand-in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations, product
from typing import Any

import torch

from ..policies import FlowCut, Policy, VFlowOpt
from ..policies.flowcut import CRITERIA
from ..tune import published_stages
from .contenders import nearest
from .quality import ALL, INTERVALS, Chosen, Run, Tick, accuracy, paired, sit, take, take_all
from .report import Section

SHARES = (0.22, 0.06)
DEFAULT = "default"
AHEAD, BEHIND, TIED = "ahead", "behind", "not told apart"

Variants = dict[str, list[dict[str, Any]]]  # part -> fields that are not the default


def flowcut(cuts: int, layers: int) -> Variants:
    """As the paper's tables: criteria with and without history and entropy, interval, weight of the history."""
    subsets = [some for count in (1, 2, 3) for some in combinations(CRITERIA, count)]
    return {
        "score": [
            ({} if some == CRITERIA else dict(criteria=some))
            | ({} if cumulative else dict(cumulative=False))
            | ({} if adaptive else dict(adaptive=False))
            for some, cumulative, adaptive in product(subsets[::-1], (True, False), (True, False))
        ],
        "interval": [dict(interval=n) for n in (1, 3, 4, 6) if n <= cuts],  # as many as may cut: the last one alone
        "history": [dict(history_weight=weight) for weight in (0.0, 0.25, 0.75)],
    }


def vflowopt(cuts: int, layers: int) -> Variants:
    """Entropy of the patches, recycling, and stages in the language model that each leave a share."""
    depths = [depth for depth, _ in published_stages(layers)]
    return {
        "entropy": [{}, dict(entropy_weight=1.0), dict(entropy_weight=-1.0)],
        "recycling": [dict(recycle_cell=cell) for cell in (None, 2.0, 4.0, 8.0)],
        "stages": [
            dict(llm_stages=tuple((depth, share) for depth in depths)) | cell
            for cell in ({}, dict(recycle_cell=None))
            for share in (0.75, 0.5, 0.25)
            if depths
        ],
    }


# name -> policy, and its variants for the layers of the encoder that may cut, and for those of the language model
POLICIES: dict[str, tuple[type[Policy], Callable[[int, int], Variants]]] = {
    "flowcut": (FlowCut, flowcut),
    "vflowopt": (VFlowOpt, vflowopt),
}


def named(changes: dict[str, Any]) -> str:
    """A variant, by the fields that make it."""

    def text(value: Any) -> str:
        return "+".join(value) if value and isinstance(value, tuple) and isinstance(value[0], str) else str(value)

    return ", ".join(f"{field}={text(value)}" for field, value in changes.items()) or DEFAULT


def measure(
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    of: str = "flowcut",
    split: str = "dev",
    questions: int = 2000,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
    per_scene: int = 4,
    batch: int = 16,
    backend: str | None = None,
    stand_in: tuple[Callable, Callable] | None = None,
    command: str = "flowcut-bench quality --ablation",
    tick: Tick = lambda label, share=None: None,
) -> Section:
    """Accuracy of every variant at the same average tokens, and its difference to the default.

    Args:
        of: a key of ``POLICIES``; the others are as in :func:`~flowcut_kernels.bench.quality.measure`.
    """
    tick("loading")
    sat = sit(device=device, dtype=dtype, split=split, questions=questions, shares=shares, seed=seed,
              per_scene=per_scene, backend=backend, stand_in=stand_in)  # fmt: skip
    rows: list[dict[str, Any]] = []
    kind, variants = POLICIES[of]
    config = sat.model.config
    parts = variants(config.vision_config.num_hidden_layers + config.vision_feature_layer, sat.layers)
    asked = [(part, changes) for part, some in parts.items() for changes in some]
    if not sat.failed:
        runs: dict[Run, Chosen] = {(ALL, sat.tokens): None}
        averages: dict[Run, float] = {}
        for budget in sat.budgets:
            for _, changes in asked:
                policy = nearest(partial(kind, **changes), budget, sat.layers, sat.tokens)
                assert policy is not None  # every layer's tokens follow from those that enter
                averages[named(changes), budget] = policy.average_tokens(sat.layers, sat.tokens)
                runs[named(changes), budget] = _always(policy)
        results = take_all(
            runs, len(sat.exam.batches(batch)), tick,
            lambda policy, step: take(sat.model, sat.exam, policy, batch, backend, step),
        )  # fmt: skip
        whole = accuracy(results[ALL, sat.tokens])
        rows.append(dict(of=of, part=ALL, variant=ALL, tokens=sat.tokens, share=1.0, ok=True, **whole))
        for budget in sat.budgets:
            base = results[DEFAULT, budget]
            for part, changes in asked:
                name = named(changes)
                right = results[name, budget]
                row = dict(of=of, part=part, variant=name, tokens=budget, share=budget / sat.tokens, ok=True)
                row |= dict(average=averages[name, budget], **accuracy(right))
                if changes:
                    row |= paired("over_default", right.mean(1) - base.mean(1))
                rows.append(row)
    return Section(
        "ablation",
        f"What the parts of {kind.__name__} are worth to the trained stand-in",
        command,
        rows,
        facts=sat.facts | dict(of=of),
        notes=[
            sat.note,
            f"default: {kind.__name__}(target_tokens=kept); a variant has these fields instead, and as many tokens on "
            "average over the layers of the language model",
            INTERVALS,
            *verdict(rows),
        ],
        failed=sat.failed,
    )  # fmt: skip


def _always(policy: Policy) -> Callable[[int], Policy]:
    return lambda batch: policy


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """What a single criterion is worth, and which variants are told apart from the default, in words."""
    found = []
    for budget in sorted({row["tokens"] for row in rows if "over_default" in row}, reverse=True):
        fate = {row["variant"]: _fate(row) for row in rows if row["tokens"] == budget and "over_default" in row}
        single = {name: fate[f"criteria={name}"] for name in CRITERIA if f"criteria={name}" in fate}
        if single:
            said = ", ".join(f"{name} {what}" for name, what in single.items())
            found.append(f"{budget} tokens, beyond chance, one criterion in place of all three: {said}")
        ahead, behind = ("; ".join(name for name in fate if fate[name] == what) for what in (AHEAD, BEHIND))
        tied = sum(what == TIED for what in fate.values())
        found.append(
            f"{budget} tokens, beyond chance: ahead of the default: {ahead or 'none'}. Behind it: {behind or 'none'}. "
            f"Not told apart: {tied} of {len(fate)}"
        )
    return found


def _fate(row: dict[str, Any]) -> str:
    return AHEAD if row["over_default_low"] > 0 else BEHIND if row["over_default_high"] < 0 else TIED
