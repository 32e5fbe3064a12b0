"""What the answers of the trained stand-in lose with the tokens: accuracy by policy and budget, with intervals."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from ..models import patch, unpatch
from ..policies import FlowCut, Policy, RandomTokens, UniformTokens, VFlowOpt, VisionZip
from .entropy import cls_entropy
from .report import Section
from .shapes import patches_of
from .timing import synchronise

Tick = Callable[..., object]
SHARES = (0.33, 0.22, 0.11, 0.06)
ALL = "all tokens"
TIMED = 5  # batches whose encoder is timed by itself

# name -> policy for a budget, the number of encoder layers and the number of the batch
POLICIES: dict[str, Callable[[int, int, int], Policy]] = {
    "FlowCut": lambda t, layers, i: FlowCut(target_tokens=t),
    "FlowCut release": lambda t, layers, i: FlowCut.release(target_tokens=t),
    "VFlowOpt": lambda t, layers, i: VFlowOpt(target_tokens=t),
    "hybrid": lambda t, layers, i: FlowCut(target_tokens=t, recycle_cell=4),
    "VisionZip": lambda t, layers, i: VisionZip(target_tokens=t),
    "CLS attention": lambda t, layers, i: FlowCut(t, criteria=("attention",), cumulative=False, interval=layers),
    "CLS staged": lambda t, layers, i: FlowCut(t, criteria=("attention",)),
    "random": lambda t, layers, i: RandomTokens(target_tokens=t, seed=i),
    "uniform grid": lambda t, layers, i: UniformTokens(target_tokens=t),
}


@dataclass
class Exam:
    """S scenes with Q questions each."""

    pixels: Tensor  # [S, 3, H, W]
    ids: Tensor  # int64 [S, Q, L] words after the image, padded on the right
    last: Tensor  # int64 [S, Q] index of the last word
    answer: Tensor  # int64 [S, Q]
    kinds: np.ndarray  # str [S, Q]

    @staticmethod
    def of(asked: list, processor) -> Exam:
        """From the stand-in's questions, which come scene by scene; scenes with fewer questions are left out."""
        scenes: dict[int, list] = {}
        for question in asked:
            scenes.setdefault(question.scene, []).append(question)
        most = max(len(group) for group in scenes.values())
        groups = [group for group in scenes.values() if len(group) == most]
        tokenizer = processor.tokenizer
        words = [[tokenizer(q.prompt.removeprefix("<image>").strip()).input_ids for q in group] for group in groups]
        longest = max(len(w) for group in words for w in group)
        pad = tokenizer.pad_token_id
        pixels = processor.image_processor([group[0].image for group in groups], return_tensors="pt")["pixel_values"]
        return Exam(
            pixels,
            torch.tensor([[w + [pad] * (longest - len(w)) for w in group] for group in words]),
            torch.tensor([[len(w) - 1 for w in group] for group in words]),
            torch.tensor([[tokenizer.convert_tokens_to_ids(q.answer) for q in group] for group in groups]),
            np.array([[q.kind for q in group] for group in groups]),
        )

    def batches(self, size: int) -> list[slice]:
        return [slice(i, i + size) for i in range(0, len(self.pixels), size)]


def answers(model, pixels: Tensor, ids: Tensor, last: Tensor) -> Tensor:
    """Logits [S, Q, vocabulary] of the token after each question; the scene is read once for all its questions.

    Right for policies whose choice does not depend on the question.
    """
    scenes, per_scene = ids.shape[:2]
    decoder, config = model.model.language_model, model.config
    cache = DynamicCache(config=config.get_text_config())
    image = ids.new_full((scenes, patches_of(config.vision_config)), config.image_token_id)
    model(input_ids=image, pixel_values=pixels, past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(per_scene)
    hidden = decoder(input_ids=ids.flatten(0, 1), past_key_values=cache, use_cache=True).last_hidden_state
    hidden = hidden[torch.arange(len(hidden), device=hidden.device), last.flatten()]
    return model.lm_head(hidden).unflatten(0, (scenes, per_scene))


@torch.inference_mode()
def refcheck(model, processor, asked: list, budget: int, backend: str | None) -> str:
    """ "ok", or what differs: reading each scene once must answer as the model does on the processor's own output."""
    exam = Exam.of(asked, processor)
    inputs = processor(
        images=[q.image for q in asked], text=[q.prompt for q in asked], padding=True, return_tensors="pt"
    ).to(model.device)  # fmt: skip
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    staged = VFlowOpt(target_tokens=2 * budget, recycle_cell=4, llm_stages=((1, 0.5),))
    for policy in (None, FlowCut(target_tokens=budget), staged):
        if policy:
            patch(model, policy, backend=backend)
        try:
            whole = model(**inputs, logits_to_keep=1).logits[:, -1].float()
            pixels = exam.pixels.to(model.device, model.dtype)
            quick = answers(model, pixels, exam.ids.to(model.device), exam.last.to(model.device)).flatten(0, 1).float()
        finally:
            if policy:
                unpatch(model)
        scale = whole.abs().max()
        error = ((quick - whole).abs().max() / scale).item()
        if not error <= 100 * torch.finfo(model.dtype).eps:
            return f"logits of {policy or ALL} differ by {error:.1e} of the largest from the model's own forward"
    return "ok"


@torch.inference_mode()
def take(
    model,
    exam: Exam,
    policy: Callable[[int], Policy] | None,
    size: int,
    backend: str | None,
    tick: Callable[[], object],
) -> tuple:
    """Answer every question: (right [S, Q], encoder seconds per image)."""
    right, seconds = [], []
    for number, part in enumerate(exam.batches(size)):
        pixels = exam.pixels[part].to(model.device, model.dtype)
        if policy:
            patch(model, policy(number), backend=backend)
        try:
            if number < TIMED:
                synchronise(model.device)
                start = time.perf_counter()
                model.get_image_features(pixels)
                synchronise(model.device)
                seconds.append((time.perf_counter() - start) / len(pixels))
            guess = answers(model, pixels, exam.ids[part].to(model.device), exam.last[part].to(model.device)).argmax(-1)
        finally:
            if policy:
                unpatch(model)
        right.append((guess.cpu() == exam.answer[part]).numpy())
        tick()
    return np.concatenate(right), float(np.median(seconds))


def interval(per_scene: np.ndarray, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over scenes: questions about one scene are not independent."""
    chosen = np.random.default_rng(seed).integers(len(per_scene), size=(draws, len(per_scene)))
    low, high = np.quantile(per_scene[chosen].mean(1), (0.025, 0.975))
    return float(low), float(high)


def loaded(
    stand_in: tuple[Callable, Callable] | None, dtype: torch.dtype, device: torch.device | str
) -> tuple[Any, Any, Callable]:
    """Model, processor and ``questions`` of a stand-in; of the shipped one for None."""
    if stand_in is None:
        from .mini_vlm import load
        from .mini_vlm.quiz import questions

        stand_in = load, questions
    model, processor = stand_in[0](dtype=dtype)
    return model.to(device), processor, stand_in[1]


def measure(
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    split: str = "dev",
    questions: int = 2000,
    shares=SHARES,
    policies=tuple(POLICIES),
    seed: int = 0,
    per_scene: int = 4,
    batch: int = 16,
    backend: str | None = None,
    stand_in: tuple[Callable, Callable] | None = None,
    command: str = "flowcut-bench quality",
    tick: Tick = lambda label, share=None: None,
) -> Section:
    """Accuracy of the trained stand-in with all tokens and with a share of them.

    Args:
        per_scene: questions about one scene; more of them are cheaper and tell less.
        stand_in: ``load(dtype=...)`` and ``questions(split, n, seed, per_scene)``; None: the shipped one's.
    """
    tick("loading")
    model, processor, draw = loaded(stand_in, dtype, device)
    asked = draw(split, -(-questions // per_scene) * per_scene, seed, per_scene)  # whole scenes
    vision = model.config.vision_config
    tokens, layers = patches_of(vision), vision.num_hidden_layers
    budgets = [max(1, round(share * tokens)) for share in shares]
    checked = refcheck(model, processor, asked[: -(-8 // per_scene) * per_scene], budgets[len(budgets) // 2], backend)
    exam = Exam.of(asked, processor)
    rows, failed = [], [] if checked == "ok" else [checked]
    if not failed:
        entropy = cls_entropy(model, exam.pixels[:100].to(device, dtype))
        rows = _rows(model, exam, tokens, layers, budgets, policies, batch, backend, tick)
    return Section(
        "quality",
        "Accuracy of the trained stand-in",
        command,
        rows,
        facts=dict(
            split=split, scenes=len(exam.pixels), questions=exam.answer.numel(), seed=seed, patches=tokens,
            dtype=str(dtype).removeprefix("torch."), entropy=[] if failed else entropy,
        ),
        notes=[
            f"{exam.answer.numel():,} questions about {len(exam.pixels):,} scenes of held-out digits ({split} split)",
            "±: half of the 95 % interval, bootstrap over scenes; differences: paired by scene, percentage points",
            "CLS attention: one cut by that alone, at FlowCut's last; CLS staged: the same in FlowCut's steps",
            "hybrid: FlowCut leaves twice as many in the encoder, and its surplus is recycled by cells of 4 x 4",
            "CLS entropy / ln N by layer: " + ("" if failed else " ".join(f"{x:.2f}" for x in entropy)),
            *verdict(rows),
        ],
        failed=failed,
    )  # fmt: skip


def _rows(
    model, exam: Exam, tokens: int, layers: int, budgets, policies, batch: int, backend: str | None, tick: Tick
) -> list[dict]:
    runs = [(ALL, tokens)] + [(name, budget) for budget in budgets for name in policies]
    total, done = len(runs) * len(exam.batches(batch)), 0
    results: dict[tuple[str, int], tuple[np.ndarray, float]] = {}
    for name, budget in runs:

        def step(name=name, budget=budget) -> None:
            nonlocal done
            done += 1
            tick(f"{name}, {budget} tokens", done / total)

        policy = None if name == ALL else lambda i, name=name, budget=budget: POLICIES[name](budget, layers, i)
        results[name, budget] = take(model, exam, policy, batch, backend, step)
    rows = []
    for (name, budget), (right, seconds) in results.items():
        low, high = interval(right.mean(1))
        row = dict(
            policy=name, tokens=budget, share=budget / tokens, accuracy=float(right.mean()), low=low, high=high,
            questions=right.size, encoder_seconds=seconds, ok=True,
            kinds={kind: float(right[exam.kinds == kind].mean()) for kind in np.unique(exam.kinds).tolist()},
        )  # fmt: skip
        for key, other in (("over_random", "random"), ("over_flowcut", "FlowCut")):
            if name not in (ALL, other) and (other, budget) in results:
                difference = right.mean(1) - results[other, budget][0].mean(1)
                row[key] = float(difference.mean())
                row[f"{key}_low"], row[f"{key}_high"] = interval(difference)
        rows.append(row)
    return rows


def verdict(rows: list[dict]) -> list[str]:
    """Where FlowCut is ahead and where behind, in words, so that nobody has to find it in the table."""
    found = []
    for budget in sorted({row["tokens"] for row in rows if "over_flowcut" in row}, reverse=True):
        others = [row for row in rows if row["tokens"] == budget and "over_flowcut" in row]
        worse = [row["policy"] for row in others if row["over_flowcut_high"] < 0]
        better = [row["policy"] for row in others if row["over_flowcut_low"] > 0]
        text = f"{budget} tokens, beyond chance: FlowCut is ahead of {', '.join(worse) or 'none'}"
        found.append(text + (f"; behind {', '.join(better)}" if better else ""))
    return found
