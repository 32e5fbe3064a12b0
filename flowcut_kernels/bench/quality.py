"""What the answers of the trained stand-in lose with the tokens: accuracy by policy and budget, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from ..models import patch, unpatch
from ..policies import FastV, FlowCut, Policy, VFlowOpt
from ..policies.stages import DecoderPolicy
from .contenders import NAMES, contender
from .entropy import cls_entropy
from .names import LOOKS, SINGLE
from .report import Section
from .shapes import patches_of

Tick = Callable[..., object]
T = TypeVar("T")
Run = tuple[str, int]  # a policy's name and its budget
Chosen = Callable[[int], Policy] | None  # the policy for a batch's number; None: all tokens
SHARES = (0.33, 0.22, 0.11, 0.06)
ALL = "all tokens"
PROMPTS = 16  # that go through the language model together
RIVALS = (("over_random", "random"), ("over_flowcut", "FlowCut"))  # key of a paired difference, and to whom
INTERVALS = (
    "±: half of the 95 % interval, bootstrap over scenes; differences: paired by scene, percentage points; beyond "
    "chance: the interval leaves out 0, each by itself, so that one in twenty does where there is no difference"
)


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


def answers_by_prompt(model, pixels: Tensor, ids: Tensor, last: Tensor, once: bool = False) -> Tensor:
    """The same from a prompt for each question, for policies that know it when they choose.

    Args:
        once: the vision encoder still reads a scene once; for policies that leave it alone.
    """
    scenes, per_scene, longest = ids.shape
    config = model.config
    tokens, pad = patches_of(config.vision_config), config.get_text_config().pad_token_id
    image = ids.new_full((scenes, per_scene, tokens), config.image_token_id)
    # Padded on the left, as the processor does, so that every answer follows the last column.
    column = torch.arange(tokens + longest, device=ids.device) - (longest - 1 - last)[..., None]
    mask = column >= 0
    prompts = torch.cat([image, ids], 2).gather(2, column.clamp_min(0)).masked_fill(~mask, pad)
    found = []
    with encoded_once(model, per_scene if once else 1):
        for part in torch.arange(scenes).split(max(PROMPTS // per_scene, 1)):
            output = model(
                input_ids=prompts[part].flatten(0, 1),
                attention_mask=mask[part].flatten(0, 1).long(),
                pixel_values=pixels[part].repeat_interleave(per_scene, 0),
                logits_to_keep=1,
            )
            found.append(output.logits[:, -1].unflatten(0, (-1, per_scene)))
    return torch.cat(found)


@contextmanager
def encoded_once(model, copies: int) -> Iterator[None]:
    """While images come `copies` at a time: the vision tower is given one of them, and its features are repeated."""

    def first(module, args, kwargs):
        def one(x):
            return x[::copies] if isinstance(x, Tensor) else x

        return tuple(map(one, args)), {name: one(x) for name, x in kwargs.items()}

    hooks = (
        model.model.vision_tower.register_forward_pre_hook(first, with_kwargs=True),
        model.model.multi_modal_projector.register_forward_hook(lambda *call: call[-1].repeat_interleave(copies, 0)),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def reads_question(policy: Policy, layers: int, tokens: int) -> bool:
    """Whether what goes on depends on the words: a cut in the language model asks for attention, or for heads."""
    for layer in range(layers):
        enters = policy.decoder_entry(layer, layers, tokens, tokens) is not None
        leaves = policy.decoder_step(layer, layers, tokens, tokens) is not None
        if enters and policy.attention_anchors(True, 1, 1, 1):
            return True
        if leaves and (policy.attention_anchors(False, 1, 1, 1) or policy.decoder_scoring_flops(1, 1, 1)):
            return True
    return False


def answering(model, policy: Policy | None) -> Callable[..., Tensor]:
    """How questions are put to the model under a policy."""
    config = model.config
    layers, tokens = config.get_text_config().num_hidden_layers, patches_of(config.vision_config)
    if policy is None or not reads_question(policy, layers, tokens):
        return answers
    return partial(answers_by_prompt, once=isinstance(policy, DecoderPolicy))


@torch.inference_mode()
def refcheck(model, processor, asked: list, budget: int, backend: str | None) -> str:
    """ "ok", or what differs: both ways to put questions must answer as the model on the processor's own output."""
    exam = Exam.of(asked, processor)
    inputs = processor(
        images=[q.image for q in asked], text=[q.prompt for q in asked], padding=True, return_tensors="pt"
    ).to(model.device)  # fmt: skip
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    staged = VFlowOpt(target_tokens=2 * budget, recycle_cell=4, llm_stages=((1, 0.5),))
    for policy in (None, FlowCut(target_tokens=budget), staged, FastV(target_tokens=budget, layer=1)):
        if policy:
            patch(model, policy, backend=backend)
        try:
            whole = model(**inputs, logits_to_keep=1).logits[:, -1].float()
            pixels = exam.pixels.to(model.device, model.dtype)
            found = answering(model, policy)(model, pixels, exam.ids.to(model.device), exam.last.to(model.device))
        finally:
            if policy:
                unpatch(model)
        scale = whole.abs().max()
        error = ((found.flatten(0, 1).float() - whole).abs().max() / scale).item()
        if not error <= 100 * torch.finfo(model.dtype).eps:
            return f"logits of {policy or ALL} differ by {error:.1e} of the largest from the model's own forward"
    return "ok"


@torch.inference_mode()
def take(
    model,
    exam: Exam,
    policy: Chosen,
    size: int,
    backend: str | None,
    tick: Callable[[], object],
) -> np.ndarray:
    """Answer every question: bool [S, Q], which are right."""
    right = []
    for number, part in enumerate(exam.batches(size)):
        pixels = exam.pixels[part].to(model.device, model.dtype)
        chosen = policy(number) if policy else None
        if chosen:
            patch(model, chosen, backend=backend)
        try:
            ids, last = exam.ids[part].to(model.device), exam.last[part].to(model.device)
            guess = answering(model, chosen)(model, pixels, ids, last).argmax(-1)
        finally:
            if chosen:
                unpatch(model)
        right.append((guess.cpu() == exam.answer[part]).numpy())
        tick()
    return np.concatenate(right)


def take_all(runs: dict[Run, Chosen], batches: int, tick: Tick, one: Callable[[Chosen, Callable], T]) -> dict[Run, T]:
    """What `one` finds in every run, of a policy and of what is to be called after each of the `batches`."""
    done, found = 0, {}
    for (name, budget), policy in runs.items():

        def step(label=f"{name}, {budget} tokens") -> None:
            nonlocal done
            done += 1
            tick(label, done / batches / len(runs))

        found[name, budget] = one(policy, step)
    return found


def interval(per_scene: np.ndarray, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over scenes: questions about one scene are not independent."""
    chosen = np.random.default_rng(seed).integers(len(per_scene), size=(draws, len(per_scene)))
    low, high = np.quantile(per_scene[chosen].mean(1), (0.025, 0.975))
    return float(low), float(high)


def accuracy(right: np.ndarray) -> dict[str, float]:
    """Of answers [S, Q], with its interval."""
    low, high = interval(right.mean(1))
    return dict(accuracy=float(right.mean()), low=low, high=high)


def paired(key: str, difference: np.ndarray) -> dict[str, float]:
    """Mean of what differs scene by scene, with its interval."""
    low, high = interval(difference)
    return {key: float(difference.mean()), f"{key}_low": low, f"{key}_high": high}


def loaded(
    stand_in: tuple[Callable, Callable] | None,
    dtype: torch.dtype,
    device: torch.device | str,
    asks: str = "questions",
) -> tuple[Any, Any, Callable]:
    """Model, processor and ``questions`` (or what else `asks`) of a stand-in; of the shipped one for None."""
    if stand_in is None:
        from .mini_vlm import load, quiz

        stand_in = load, getattr(quiz, asks)
    model, processor = stand_in[0](dtype=dtype)
    return model.to(device), processor, stand_in[1]


def budgets_of(shares: Sequence[float], tokens: int) -> list[int]:
    return [max(1, round(share * tokens)) for share in shares]


class Sitting(NamedTuple):
    """The stand-in and the questions that every run puts to it."""

    model: Any
    exam: Exam
    tokens: int  # of an image
    layers: int  # of the language model
    budgets: list[int]
    failed: list[str]  # checks that did not hold; then nothing is to be measured
    facts: dict[str, Any]

    @property
    def note(self) -> str:
        scenes, questions = self.exam.answer.shape
        return (
            f"{scenes * questions:,} questions about {scenes:,} scenes of held-out digits ({self.facts['split']} split)"
        )


def sit(
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    split: str,
    questions: int,
    shares: Sequence[float],
    seed: int,
    per_scene: int,
    backend: str | None,
    stand_in: tuple[Callable, Callable] | None,
) -> Sitting:
    """Load, draw and check, as `measure` is told."""
    model, processor, draw = loaded(stand_in, dtype, device)
    asked = draw(split, -(-questions // per_scene) * per_scene, seed, per_scene)  # whole scenes
    tokens = patches_of(model.config.vision_config)
    budgets = budgets_of(shares, tokens)
    checked = refcheck(model, processor, asked[: -(-8 // per_scene) * per_scene], budgets[len(budgets) // 2], backend)
    exam = Exam.of(asked, processor)
    facts = dict(
        split=split, scenes=len(exam.pixels), questions=exam.answer.numel(), seed=seed, patches=tokens,
        dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
    layers = model.config.get_text_config().num_hidden_layers
    return Sitting(model, exam, tokens, layers, budgets, [] if checked == "ok" else [checked], facts)


def measure(
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    split: str = "dev",
    questions: int = 2000,
    shares: Sequence[float] = SHARES,
    policies: Sequence[str] = NAMES,
    seed: int = 0,
    per_scene: int = 4,
    batch: int = 16,
    backend: str | None = None,
    stand_in: tuple[Callable, Callable] | None = None,
    command: str = "flowcut-bench quality",
    tick: Tick = lambda label, share=None: None,
) -> Section:
    """Accuracy of the trained stand-in with all tokens, and with a share of them on average over its decoder's layers.

    Args:
        policies: of :data:`~flowcut_kernels.bench.contenders.NAMES`.
        per_scene: questions about one scene; more of them are cheaper and tell less.
        stand_in: ``load(dtype=...)`` and ``questions(split, n, seed, per_scene)``; None: the shipped one's.
    """
    tick("loading")
    sat = sit(device=device, dtype=dtype, split=split, questions=questions, shares=shares, seed=seed,
              per_scene=per_scene, backend=backend, stand_in=stand_in)  # fmt: skip
    rows: list[dict[str, Any]] = []
    entropy: list[float] = []
    if not sat.failed:
        entropy = cls_entropy(sat.model, sat.exam.pixels[:100].to(device, dtype))
        rows = _rows(sat, policies, batch, backend, tick)
    return Section(
        "quality",
        "Accuracy of the trained stand-in",
        command,
        rows,
        facts=sat.facts | dict(entropy=entropy),
        notes=[
            sat.note,
            "kept: tokens asked for, on average over the layers of the language model; average: what it comes to",
            INTERVALS,
            "CLS attention: one cut by that alone, at FlowCut's last; CLS staged: the same in FlowCut's steps",
            "hybrid: FlowCut leaves twice as many in the encoder, and its surplus is recycled by cells of 4 x 4",
            "CLS entropy / ln N by layer: " + " ".join(f"{x:.2f}" for x in entropy),
            *unreachable(rows),
            *verdict(rows),
        ],
        failed=sat.failed,
    )


def contest(
    policies: Sequence[str], budgets: Sequence[int], layers: int, tokens: int
) -> tuple[list[dict[str, Any]], dict[Run, Chosen]]:
    """A row for all tokens and for every policy at every budget, and the runs of those that can reach it.

    What a policy cannot reach keeps its row, which says why.
    """
    rows: list[dict[str, Any]] = [dict(policy=ALL, tokens=tokens, share=1.0, average=float(tokens), ok=True)]
    runs: dict[Run, Chosen] = {(ALL, tokens): None}
    for name, budget in ((name, budget) for budget in budgets for name in policies):
        row = dict(policy=name, tokens=budget, share=budget / tokens)
        try:
            row["average"] = contender(name, budget, layers, tokens).average_tokens(layers, tokens)
            runs[name, budget] = partial(contender, name, budget, layers, tokens)
        except ValueError as error:
            row["unreachable"] = str(error)
        rows.append(row | dict(ok=True))
    return rows, runs


def _rows(sat: Sitting, policies: Sequence[str], batch: int, backend: str | None, tick: Tick) -> list[dict[str, Any]]:
    exam = sat.exam
    rows, runs = contest(policies, sat.budgets, sat.layers, sat.tokens)
    results = take_all(
        runs, len(exam.batches(batch)), tick,
        lambda policy, step: take(sat.model, exam, policy, batch, backend, step),
    )  # fmt: skip
    for row in rows:
        name, budget = row["policy"], row["tokens"]
        if (name, budget) not in results:
            continue
        right = results[name, budget]
        row |= dict(
            **accuracy(right), questions=right.size,
            kinds={kind: float(right[exam.kinds == kind].mean()) for kind in np.unique(exam.kinds).tolist()},
        )  # fmt: skip
        for key, other in RIVALS:
            if name not in (ALL, other) and (other, budget) in results:
                row |= paired(key, right.mean(1) - results[other, budget].mean(1))
    return rows


def unreachable(rows: list[dict[str, Any]]) -> list[str]:
    """Why cells of a table are empty."""
    return [f"not reachable: {row['unreachable']}" for row in rows if "unreachable" in row]


def verdict(rows: list[dict]) -> list[str]:
    """Where FlowCut is ahead and where behind, in words, so that nobody has to find it in the table."""
    found = []
    for budget in sorted({row["tokens"] for row in rows if "over_flowcut" in row}, reverse=True):
        others = [row for row in rows if row["tokens"] == budget and "over_flowcut" in row]
        worse = [row["policy"] for row in others if row["over_flowcut_high"] < 0]
        better = [row["policy"] for row in others if row["over_flowcut_low"] > 0]
        text = f"{budget} tokens, beyond chance: FlowCut is ahead of {', '.join(worse) or 'none'}"
        found.append(text + (f"; behind {', '.join(better)}" if better else ""))
    single = [row for row in rows if "over_flowcut" in row and LOOKS[row["policy"]].role == SINGLE]
    if single:
        wins = [f"{row['policy']} at {row['tokens']}" for row in single if row["over_flowcut_low"] > 0]
        found.append(f"attention alone beats FlowCut beyond chance: {', '.join(wins) or 'at no budget'}")
    return found
