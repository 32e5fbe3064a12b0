"""One scene of the stand-in and what FlowCut keeps of it: as facts of a section, and as the picture they stand for."""

from __future__ import annotations

import base64
import io
from typing import Any, NamedTuple

import torch

from ..policies import FlowCut
from .look import look, show


def kept(share: float = 0.11, split: str = "dev", seed: int = 0) -> dict[str, Any]:
    """A question about the scene, what is answered with all patches and with a `share` of them, and which those are.

    patches: a word per row of the grid, a digit per patch: how many of the cuts it survives.
    """
    from . import mini_vlm

    model, processor = mini_vlm.load()
    (asked,) = mini_vlm.questions(split, 1, seed)
    shown = show(model, processor, asked.image, "scene", asked.prompt)
    seen = look(model, processor, shown, FlowCut(retain_ratio=share), "FlowCut")
    assert len(seen.cuts) < 10, "a digit is a number of cuts"
    survived = torch.stack([cut.alive[0] for cut in seen.cuts]).sum(0).view(seen.grid)
    return dict(
        split=split, seed=seed, question=shown.prompt, answer=asked.answer, said_by_stock=shown.answer,
        said=seen.answer, cuts=[dict(layer=cut.layer, kept=cut.kept) for cut in seen.cuts],
        patches=["".join(map(str, row)) for row in survived.tolist()],
    )  # fmt: skip


def drawn(scene: dict[str, Any]) -> str | None:
    """The scene as PNG in base64; None where the generator draws another one by now."""
    from . import mini_vlm

    (asked,) = mini_vlm.questions(scene["split"], 1, scene["seed"])
    if (asked.prompt.removeprefix("<image>").strip(), asked.answer) != (scene["question"], scene["answer"]):
        return None
    file = io.BytesIO()
    asked.image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


class Panel(NamedTuple):
    """A state of the scene: what it is, and the patches that are gone as an SVG path, of which a patch is a unit."""

    words: str
    faded: str


def panels(scene: dict[str, Any]) -> list[Panel]:
    """The whole scene, and what is left of it after each cut."""
    rows = scene["patches"]
    words = [
        f"all {sum(map(len, rows))} patches",
        *(f"{cut['kept']} after layer {cut['layer']}" for cut in scene["cuts"]),
    ]
    return [
        Panel(
            text,
            "".join(
                f"M{x} {y}h1v1h-1z" for y, row in enumerate(rows) for x, digit in enumerate(row) if int(digit) < cut
            ),
        )
        for cut, text in enumerate(words)
    ]
