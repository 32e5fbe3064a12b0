"""What the names in results stand for, and how each looks in every figure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

# Okabe and Ito's colours, on white and on a dark page; the yellow that nobody can read on white is left out.
COLOURS = {
    "blue": ("#0072b2", "#5ab4f0"),
    "vermilion": ("#d55e00", "#ff8f4d"),
    "green": ("#009e73", "#35c99d"),
    "purple": ("#b0568f", "#e8a3cc"),
    "orange": ("#c98600", "#f5b83d"),
    "sky": ("#3d9bd4", "#9bd3f7"),
    "grey": ("#737982", "#9aa3ae"),
    "ink": ("#1b1f24", "#e4e8ee"),
}
MARKERS = {"o": "circle", "s": "square", "^": "triangle", "v": "triangle upside down", "D": "diamond", "X": "cross"}
SOLID, DOTTED, DASHED = "-", ":", "--"  # chosen in the encoder, in the language model, by no criterion
FLOOR, SINGLE = "a floor", "a single criterion"


class Look(NamedTuple):
    """Colour and marker of a policy, the same everywhere, and what it does in one line."""

    colour: str
    marker: str
    dash: str = SOLID
    meaning: str = ""
    role: str = ""  # FLOOR or SINGLE: what a method has to beat


LOOKS = {
    "FlowCut": Look(
        "blue", "o", SOLID, "drops tokens in steps inside the encoder, by three criteria accumulated over its layers"
    ),
    "FlowCut release": Look("sky", "s", SOLID, "FlowCut with the formulas of its authors' released code"),
    "VFlowOpt": Look("green", "^", SOLID, "keeps what the encoder's hub tokens attend to, and merges the rest"),
    "hybrid": Look("purple", "D", SOLID, "FlowCut leaves twice as many, and the surplus is merged by grid cells"),
    "VisionZip": Look("orange", "v", SOLID, "keeps what the class token attends to, and merges the rest by keys"),
    "SparseVLM": Look("green", "s", DOTTED, "inside the language model in stages, rated by words of the question"),
    "PyramidDrop": Look("purple", "v", DOTTED, "inside the language model in stages, by the last word's attention"),
    "FastV": Look("orange", "X", DOTTED, "inside the language model in one cut, by the last word's attention"),
    "CLS attention": Look(
        "vermilion", "^", SOLID, "one cut by the class token's attention alone, at FlowCut's last layer", SINGLE
    ),
    "CLS staged": Look(
        "vermilion", "s", SOLID, "the class token's attention alone, in as many steps as FlowCut takes", SINGLE
    ),
    "random": Look("grey", "X", DASHED, "as many tokens, drawn by lot", FLOOR),
    "uniform grid": Look("ink", "D", DASHED, "as many tokens, evenly spread over the image", FLOOR),
}  # fmt: skip


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A look for every name; one that is not known takes a colour and a marker that no other here has."""
    named = list(dict.fromkeys(names))
    found = {name: LOOKS[name] for name in named if name in LOOKS}
    taken = {(look.colour, look.marker) for look in found.values()}
    free = [Look(colour, marker) for marker in MARKERS for colour in COLOURS if (colour, marker) not in taken]
    for number, name in enumerate(name for name in named if name not in LOOKS):
        found[name] = free[number % len(free)]
    return {name: found[name] for name in named}
