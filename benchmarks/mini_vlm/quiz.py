"""Questions about scenes: one-token answers, the key word last, drawn type by type."""

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
    answer: str  # one word of the vocabulary
    kind: str  # a key of MIX
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


def questions(split: str, n: int, seed: int = 0, per_scene: int = 4) -> list[Question]:
    """n questions about scenes of one split ("train", "dev" or "test"), `per_scene` to a scene; deterministic."""
    scenes = generate(split, -(-n // per_scene), (seed, 99))
    asked = quiz(scenes, per_scene, seed)
    images = [Image.fromarray(image) for image in scenes.images]
    flat = [
        Question(images[i], f"<image> {text}", answer, kind, i)
        for i, row in enumerate(asked)
        for text, answer, kind in row
    ]
    return flat[:n]
