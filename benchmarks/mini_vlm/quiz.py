"""Questions about scenes: one-word answers, the key word last, drawn type by type; and lists of all digits."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from .scenes import COLOURS, SIZE, Scenes, generate

CORNERS = ["top-left", "top-right", "bottom-left", "bottom-right"]
SIDES = ["left", "right", "top", "bottom"]
# Share of every type in the mix. A type that a scene cannot ask is redrawn.
MIX = {
    "digit at corner": 0.20,
    "digit of colour": 0.20,
    "colour of digit": 0.20,
    "corner of digit": 0.15,
    "digit present": 0.15,
    "number of digits": 0.10,
}
LIST = "digit list"
WORDS = [
    "which",
    "what",
    "digit",
    "colour",
    "corner",
    "is",
    "has",
    "there",
    "a",
    "how",
    "many",
    "digits",
    "list",
    "yes",
    "no",
    *(str(d) for d in range(10)),
    *COLOURS,
    *CORNERS,
    *SIDES,
]


@dataclasses.dataclass
class Question:
    """One question about one image."""

    image: Image.Image  # SIZE x SIZE pixels
    prompt: str  # starts with "<image>"
    answer: str  # words of the vocabulary: one for kinds of MIX
    kind: str  # a key of MIX, or LIST
    scene: int  # index of the scene within its batch


def ask(scenes: Scenes, index: int, rng: np.random.Generator) -> tuple[str, str, str]:
    """A random question about one scene: (question, answer, kind)."""
    colours = list(COLOURS)
    count = int((scenes.digits[index] >= 0).sum())
    digits, tints = scenes.digits[index, :count], scenes.colours[index, :count]
    x, y = (scenes.centres[index, :count] > SIZE / 2).T
    corner = 2 * y + x
    while True:
        kind = rng.choice(list(MIX), p=list(MIX.values()))
        pick = int(rng.integers(count))
        if kind == "digit at corner" and (corner == corner[pick]).sum() == 1:
            return f"which digit is {CORNERS[corner[pick]]}", str(digits[pick]), kind
        if kind == "digit of colour":
            return f"which digit is {colours[tints[pick]]}", str(digits[pick]), kind
        if kind == "colour of digit":
            return f"what colour has {digits[pick]}", colours[tints[pick]], kind
        if kind == "corner of digit":
            return f"which corner has {digits[pick]}", CORNERS[corner[pick]], kind
        if kind == "digit present":
            yes = rng.random() < 0.5
            digit = digits[pick] if yes else rng.choice(np.setdiff1d(np.arange(10), digits))
            return f"is there a {digit}", "yes" if yes else "no", kind
        if kind == "number of digits":
            return "how many digits", str(count), kind


def quiz(scenes: Scenes, per_scene: int, seed: int | tuple[int, ...]) -> list[list[tuple[str, str, str]]]:
    """`per_scene` questions (question, answer, kind) about every scene."""
    rng = np.random.default_rng([*np.atleast_1d(seed), 77])
    return [[ask(scenes, i, rng) for _ in range(per_scene)] for i in range(len(scenes.images))]


def listing(scenes: Scenes, index: int) -> tuple[str, str, str]:
    """The question for all digits of one scene, whose answer is them in rising order: (question, answer, kind)."""
    digits = scenes.digits[index]
    return "list digits", " ".join(map(str, np.sort(digits[digits >= 0]))), LIST


def _drawn(split: str, count: int, seed: int) -> tuple[Scenes, list[Image.Image]]:
    """Scenes of the questions of a seed, and their images."""
    scenes = generate(split, count, (seed, 99))
    return scenes, [Image.fromarray(image) for image in scenes.images]


def questions(split: str, n: int, seed: int = 0, per_scene: int = 4) -> list[Question]:
    """n questions about scenes of one split ("train", "dev" or "test"), `per_scene` to a scene; deterministic."""
    scenes, images = _drawn(split, -(-n // per_scene), seed)
    asked = quiz(scenes, per_scene, seed)
    flat = [
        Question(images[i], f"<image> {text}", answer, kind, i)
        for i, row in enumerate(asked)
        for text, answer, kind in row
    ]
    return flat[:n]


def lists(split: str, n: int, seed: int = 0) -> list[Question]:
    """For each of n scenes, which `questions` asks about too: list its digits, such as "2 5 9"; deterministic."""
    scenes, images = _drawn(split, n, seed)
    asked = [listing(scenes, i) for i in range(n)]
    return [
        Question(image, f"<image> {text}", answer, kind, i)
        for i, (image, (text, answer, kind)) in enumerate(zip(images, asked, strict=True))
    ]
