"""What a second question loses on a pruned cache, with and without the rows that early layers still hold.

The stand-in answers in one word, from the prompt itself, which `compact_cache` cannot change: only what is read later
misses the rows. So this is about conversations: an image, a first question, by which the tokens are chosen, its answer,
and a second question about the same scene that is read on the same cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from ..models import patch, unpatch
from ..policies import FlowCut
from .quality import ALL, Exam, Tick, interval, loaded
from .report import Section
from .shapes import patches_of

SHARES = (0.22, 0.11, 0.06)
ENCODER, INSIDE = "encoder", "LLM layer 1"
ANSWERS = ("first", "second", "continued")


class Way(NamedTuple):
    """What a row of the table measures."""

    where: str
    tokens: int  # visual tokens that reach the last layer
    compact: bool | None = None  # None where the language model drops nothing

    def patch(self, model, backend: str | None) -> None:
        if self.where == ENCODER:
            patch(model, FlowCut(target_tokens=self.tokens), backend=backend)
        elif self.where == INSIDE:
            policy = FlowCut(target_tokens=self.tokens, llm_layer=1)
            patch(model, policy, backend=backend, compact_cache=bool(self.compact))


class Answers(NamedTuple):
    """Logits [B, vocabulary] of the answers in B conversations."""

    first: Tensor
    second: Tensor  # to the second question, read in the first one's place
    continued: Tensor  # to the second question, read after the first one and its answer
    kv_bytes: int  # of all B, before the second question


@dataclass
class Conversations:
    """Every question of an exam first, and the next one about its scene second: each is asked once in either place."""

    exam: Exam

    def __post_init__(self) -> None:
        exam = self.exam
        self.scene = torch.arange(len(exam.pixels)).repeat_interleave(exam.answer.shape[1])
        self.ids, self.last, self.answer = (x.flatten(0, 1) for x in (exam.ids, exam.last, exam.answer))
        self.next = torch.arange(len(self.scene)).view(exam.answer.shape).roll(-1, 1).flatten()

    def batches(self, size: int) -> list[Tensor]:
        """Conversations whose first questions are equally long: no prompt is padded."""
        lengths = (torch.nonzero(self.last == length).flatten() for length in self.last.unique())
        return [batch for group in lengths for batch in group.split(size)]

    def hold(self, model, batch: Tensor) -> Answers:
        """The first question with the image in one prompt, then its answer, then the second one in either way."""
        device, config, other = model.device, model.config, self.next[batch]
        words = self.ids[batch, : int(self.last[batch[0]]) + 1]
        image = words.new_full((len(words), patches_of(config.vision_config)), config.image_token_id)
        pixels = self.exam.pixels[self.scene[batch]].to(device, model.dtype)
        cache = DynamicCache(config=config.get_text_config())
        prompt = torch.cat([image, words], 1).to(device)
        first = model(input_ids=prompt, pixel_values=pixels, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        visual = cache.get_seq_length() - words.shape[1]  # columns of the image
        model(input_ids=first.argmax(-1)[:, None], past_key_values=cache)
        layers: list[Any] = cache.layers
        kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

        second, last = self.ids[other].to(device), self.last[other].to(device)
        seen, new = cache.get_seq_length(), second.shape[1]
        # As if the rows after the image were cut off, which a cache whose prompt was pruned does not allow.
        mask = torch.ones((len(second), seen + new), dtype=torch.long, device=device)
        mask[:, visual:seen] = 0
        place = (visual + torch.arange(new, device=device)).expand(len(second), -1)
        every = torch.arange(len(second), device=device)
        in_place, continued = (
            model(input_ids=second, past_key_values=copy.deepcopy(cache), **options).logits[every, last]
            for options in (dict(attention_mask=mask, position_ids=place), {})
        )
        return Answers(first, in_place, continued, kv_bytes)


def distinct(asked: list, per_scene: int) -> list:
    """The first `per_scene` different questions of each scene that has so many: no second one repeats the first."""
    scenes: dict[int, dict] = {}
    for question in asked:
        scenes.setdefault(question.scene, {}).setdefault(question.prompt, question)
    groups = (list(scene.values())[:per_scene] for scene in scenes.values())
    return [question for group in groups if len(group) == per_scene for question in group]


@torch.inference_mode()
def refcheck(model, processor, asked: list, budget: int, backend: str | None) -> str:
    """ "ok", or what differs: a second question must be answered as by a forward without a cache on the same words."""
    exam = Exam.of(asked, processor)
    talk = Conversations(exam)
    for way in (Way(ALL, 0), Way(ENCODER, budget)):
        way.patch(model, backend)
        try:
            for batch in talk.batches(len(talk.scene)):
                found = talk.hold(model, batch)
                written = processor.tokenizer.batch_decode(found.first.argmax(-1)[:, None])
                pairs = [(asked[i], asked[j]) for i, j in zip(batch.tolist(), talk.next[batch].tolist(), strict=True)]
                alone = [b.prompt for _, b in pairs]
                after = [
                    f"{a.prompt} {word} {b.prompt.removeprefix('<image>').strip()}"
                    for (a, b), word in zip(pairs, written, strict=True)
                ]
                for prompts, logits in ((alone, found.second), (after, found.continued)):
                    inputs = processor(
                        images=[b.image for _, b in pairs], text=prompts, padding=True, return_tensors="pt"
                    ).to(model.device)  # fmt: skip
                    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
                    whole = model(**inputs, logits_to_keep=1).logits[:, -1]
                    error = ((logits - whole).abs().max() / whole.abs().max()).item()
                    if not error <= 100 * torch.finfo(model.dtype).eps:
                        what = "in place" if prompts is alone else "continued"
                        return f"{way.where}: logits of second questions {what} differ by {error:.1e} of the largest"
        finally:
            if way.where != ALL:
                unpatch(model)
    return "ok"


@torch.inference_mode()
def take(
    model, talk: Conversations, way: Way, size: int, backend: str | None, tick: Callable[[], object]
) -> tuple[dict[str, np.ndarray], float]:
    """Hold every conversation: (which answers are right, bool [S, Q] each, KV bytes of a conversation)."""
    right = {name: torch.zeros(len(talk.scene), dtype=torch.bool) for name in ANSWERS}
    total = 0
    way.patch(model, backend)
    try:
        for batch in talk.batches(size):
            found = talk.hold(model, batch)
            wanted = talk.answer[batch], talk.answer[talk.next[batch]], talk.answer[talk.next[batch]]
            for name, answer in zip(ANSWERS, wanted, strict=True):
                right[name][batch] = getattr(found, name).argmax(-1).cpu() == answer
            total += found.kv_bytes
            tick()
    finally:
        if way.where != ALL:
            unpatch(model)
    shape = talk.exam.answer.shape
    return {name: x.view(shape).numpy() for name, x in right.items()}, total / len(talk.scene)


def measure(
    *,
    device: torch.device | str = "cpu",
    questions: int = 2000,
    shares=SHARES,
    seed: int = 0,
    per_scene: int = 4,
    batch: int = 32,
    backend: str | None = None,
    stand_in: tuple[Callable, Callable] | None = None,
    command: str = "flowcut-bench conversation",
    tick: Tick = lambda label, share=None: None,
) -> Section:
    """Accuracy of the trained stand-in's answers to a first and to a second question, development split.

    Args:
        questions: conversations; scenes without `per_scene` different questions are left out.
        stand_in: ``load()`` and ``questions(split, n, seed, per_scene)``; None: the shipped one's.
    """
    tick("loading")
    model, processor, draw = loaded(stand_in, torch.float32, device)
    drawn = 3 * per_scene  # enough that nearly all scenes have per_scene different ones
    asked = distinct(draw("dev", -(-questions // per_scene) * drawn, seed, drawn), per_scene)
    exam = Exam.of(asked, processor)
    tokens = patches_of(model.config.vision_config)
    budgets = [max(1, round(share * tokens)) for share in shares]
    checked = refcheck(model, processor, asked[: 2 * per_scene], budgets[len(budgets) // 2], backend)
    rows: list[dict] = []
    failed = [] if checked == "ok" else [checked]
    if not failed:
        rows, failed = _rows(model, Conversations(exam), tokens, budgets, batch, backend, tick)
    count = exam.answer.numel()
    return Section(
        "conversation",
        "A second question on the cache of the first",
        command,
        rows,
        facts=dict(split="dev", scenes=len(exam.pixels), conversations=count, seed=seed, patches=tokens),
        notes=[
            f"{count:,} conversations about {len(exam.pixels):,} scenes of held-out digits (dev split): each of a "
            f"scene's {per_scene} different questions comes first once, and chooses the tokens, and second once",
            "2nd answer: the second question takes the first one's positions, which is masked with its answer, as the "
            "stand-in was trained on one question per image",
            "continued: it is read after the first question and its answer, which the stand-in has not learned to do",
            "±: half of the 95 % interval, bootstrap over scenes; on: compact_cache=True, its differences from off and "
            "from the encoder's row are paired by scene; KV: float32, of a conversation before the second question",
            *verdict(rows),
        ],
        failed=failed,
    )  # fmt: skip


def _rows(
    model, talk: Conversations, tokens: int, budgets: list[int], batch: int, backend: str | None, tick: Tick
) -> tuple[list[dict], list[str]]:
    ways = [Way(ALL, tokens)]
    for budget in budgets:
        ways += [Way(ENCODER, budget), Way(INSIDE, budget, False), Way(INSIDE, budget, True)]
    total, done = len(ways) * len(talk.batches(batch)), 0
    results: dict[Way, tuple[dict[str, np.ndarray], float]] = {}
    for way in ways:

        def step(way=way) -> None:
            nonlocal done
            done += 1
            tick(f"{way.where}, {way.tokens} tokens", done / total)

        results[way] = take(model, talk, way, batch, backend, step)
    rows: list[dict] = []
    failed = []
    for way, (right, kv_bytes) in results.items():
        row = dict(
            policy=ALL if way.where == ALL else "FlowCut", where=way.where, compact=way.compact, tokens=way.tokens,
            share=way.tokens / tokens, conversations=right["first"].size, kv_bytes=kv_bytes, ok=True,
        )  # fmt: skip
        for name in ANSWERS:
            row[name] = float(right[name].mean())
            row[f"{name}_low"], row[f"{name}_high"] = interval(right[name].mean(1))
        if way.compact:
            off, alone = results[way._replace(compact=False)], results[Way(ENCODER, way.tokens)]
            for key, (other, _) in (("over_off", off), ("over_encoder", alone)):
                for name in ANSWERS[1:]:
                    difference = right[name].mean(1) - other[name].mean(1)
                    row[f"{name}_{key}"] = float(difference.mean())
                    row[f"{name}_{key}_low"], row[f"{name}_{key}_high"] = interval(difference)
            if not (right["first"] == off[0]["first"]).all():
                failed.append(f"{way.tokens} tokens: compacting the cache changed answers to first questions")
            if kv_bytes != alone[1]:
                failed.append(f"{way.tokens} tokens: a compacted cache is not as small as after the encoder alone")
        rows.append(row)
    return rows, failed


def verdict(rows: list[dict]) -> list[str]:
    """What compacting does to second answers, in words, so that nobody has to find it in the table."""
    found = []
    for row in (row for row in rows if row["compact"]):
        said = []
        for key, other in (("over_off", "off"), ("over_encoder", "the encoder alone (as many bytes)")):
            low, high = row[f"second_{key}_low"], row[f"second_{key}_high"]
            said.append(f"{'behind' if high < 0 else 'ahead of' if low > 0 else 'not told apart from'} {other}")
        found.append(f"{row['tokens']} tokens, 2nd answers, beyond chance: compact on is {', '.join(said)}")
    return found
