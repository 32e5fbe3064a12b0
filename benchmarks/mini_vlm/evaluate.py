"""What the trained model knows: accuracy by question type, with all visual tokens and with a few, and CLS attention.

`python -m benchmarks.mini_vlm.evaluate --split test` prints the figures of the committed weights as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter

import numpy as np
import torch

from . import load
from .language import TOKENS, LanguageTask, encode, features
from .model import PAD, pixels
from .quiz import LIST, MIX, listing, quiz
from .scenes import Scenes, contrast, generate

KEPT = {f"{share} %": round(share / 100 * TOKENS) for share in (33, 22, 11, 6)}


def exam(split: str, scenes: int, seed: int, per_scene: int = 8) -> tuple[Scenes, list[list[tuple[str, str, str]]]]:
    """Scenes of one split and the questions about them."""
    drawn = generate(split, scenes, (seed, 3))
    return drawn, quiz(drawn, per_scene, seed)


def answers(model, visual: torch.Tensor, asked: list, size: int = 50) -> np.ndarray:
    """Whether every question is answered right from the given visual tokens [B, K, D]: bool [B, Q]."""
    ids, last = encode(asked)
    task, right = LanguageTask(model), []
    with torch.no_grad():
        for i in range(0, len(ids), size):
            some, at = ids[i : i + size], last[i : i + size, :, None]
            guess = task.logits(visual[i : i + size].float(), some).argmax(-1).gather(2, at)
            right.append(guess == some.gather(2, at + 1))
    return torch.cat(right)[..., 0].numpy()


def lists(model, visual: torch.Tensor, drawn: Scenes) -> float:
    """Share of scenes whose digits greedy decoding lists exactly, from the given visual tokens [B, K, D]."""
    ids, last = encode([[listing(drawn, i)] for i in range(len(drawn.images))])
    with torch.no_grad():
        guess = LanguageTask(model).logits(visual.float(), ids).argmax(-1)[..., :-1]
    wanted = ids[..., 1:]  # decoding is exact where each word follows from the right ones before it
    asked = torch.arange(wanted.shape[-1]) < last[..., None]
    return ((guess == wanted) | asked | (wanted == PAD)).all(-1).float().mean().item()


def per_kind(right: np.ndarray, asked: list) -> dict[str, float]:
    """Share of right answers, overall and per question type."""
    kinds = np.array([[kind for *_, kind in row] for row in asked])
    return {"all": float(right.mean()), **{kind: float(right[kinds == kind].mean()) for kind in MIX}}


def blind_floor(asked: list, seed: int) -> float:
    """Accuracy of the best answer that looks at the wording alone, learnt on twice as many training questions."""
    table: dict[str, Counter] = {}
    for row in exam("train", 2 * len(asked), seed)[1]:
        for text, answer, _ in row:
            table.setdefault(text, Counter())[answer] += 1
    best = {
        text: found.most_common(1)[0][0] for text, found in table.items()
    }  # nothing on a wording that never came up
    return float(np.mean([best.get(text) == answer for row in asked for text, answer, _ in row]))


def cls_attention(tower, images: np.ndarray, size: int = 32) -> torch.Tensor:
    """Attention of the CLS token to the patches, mean over heads, renormalised: float32 [layers, B, N]."""
    usual = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        chunks = [
            torch.stack(
                [a[:, :, 0, 1:].mean(1) for a in tower(pixels(images[i : i + size]), output_attentions=True).attentions]
            )
            for i in range(0, len(images), size)
        ]
    tower.set_attn_implementation(usual)
    attention = torch.cat(chunks, 1)
    return attention / attention.sum(-1, keepdim=True)


def top(score: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` highest scores, ascending: [B, N] -> [B, count]."""
    return score.topk(count).indices.sort().values


def report(model, split: str, scenes: int, seed: int) -> dict:
    """Every figure of training.json that describes the trained model."""
    drawn, asked = exam(split, scenes, seed)
    tower = model.model.vision_tower
    visual = features(tower, drawn.images)
    attention = cls_attention(tower, drawn.images)
    entropy = -(attention * attention.clamp_min(1e-20).log()).sum(-1).mean(1) / math.log(TOKENS)
    on_digits = (attention * torch.from_numpy(drawn.patch_mask)).sum(-1).mean(1)
    rules = {
        "CLS attention": attention[-2],
        "pixel contrast": torch.from_numpy(contrast(drawn.images)),
        "random": torch.rand(attention[0].shape, generator=torch.Generator().manual_seed(seed)),
    }

    def figures(visual: torch.Tensor) -> dict[str, float]:
        return per_kind(answers(model, visual, asked), asked) | {LIST: lists(model, visual, drawn)}

    kept = {
        rule: {
            share: figures(visual.gather(1, top(score, count)[..., None].expand(-1, -1, visual.shape[-1])))
            for share, count in KEPT.items()
        }
        for rule, score in rules.items()
    }
    return {
        "split": split,
        "scenes": scenes,
        "questions": scenes * len(asked[0]),
        "accuracy": figures(visual),
        "accuracy from the wording alone": blind_floor(asked, seed),
        "accuracy with visual tokens kept after the encoder": kept,
        "patches that show a digit": float(drawn.patch_mask.mean()),
        "CLS attention by layer: entropy / ln N": entropy.tolist(),
        "CLS attention by layer: share on digit patches": on_digits.tolist(),
    }


def rounded(value):
    """The same JSON value with four decimals."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=("train", "dev", "test"), default="dev")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(json.dumps(rounded(report(load()[0], options.split, options.scenes, options.seed)), indent=1))
