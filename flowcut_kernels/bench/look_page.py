"""The page of ``flowcut-bench look``: one HTML file with everything in it, for any browser and without a network."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader
from PIL import Image
from torch import Tensor

from .look import WHERE, Seen, Shown, View

CRITERIA = ("attention", "relevance", "value_norm")


def write_page(model: str, looked: list[tuple[Shown, list[Seen]]], path: Path) -> Path:
    """The images, each under the same policies.

    Args:
        model: its name, as readers are to see it.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    from .. import __version__

    steps = _steps([seen for _, some in looked for seen in some])
    data = dict(
        steps=steps,
        scale=[to_hex(colormaps["viridis"](i / 16)) for i in range(17)],
        images=[[_story(shown, seen, steps) for seen in some] for shown, some in looked],
    )
    environment = Environment(
        loader=PackageLoader("flowcut_kernels.bench", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("look.html.j2").render(
        model=model,
        version=__version__,
        steps=steps,
        data=data,
        average=_average,
        looked=[
            (shown, [(view, _png(view)) for view in shown.views], some, _notes(shown, some)) for shown, some in looked
        ],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _average(shown: Shown, seen: Seen) -> str | None:
    """Tokens over the layers of the language model; None where that is known only afterwards."""
    try:
        return f"{seen.policy.average_tokens(seen.decoder_layers, shown.tokens):.4g}"
    except ValueError:
        return None


def _steps(looked: list[Seen]) -> list[dict[str, Any]]:
    """Where the slider stops: layers of the encoder, and what is behind it as far as somebody cuts there."""
    cuts = [cut for seen in looked for cut in seen.cuts]
    depth = {"encoder": max(len(seen.layers) for seen in looked)}
    depth["features"] = int(any(cut.place == "features" for cut in cuts))
    depth["llm"] = max(seen.decoder_layers for seen in looked) if any(cut.place == "llm" for cut in cuts) else 0
    return [
        dict(place=name, layer=layer, words=WHERE[name] if name == "features" else f"{WHERE[name]}, layer {layer}")
        for name, count in depth.items()
        for layer in range(count)
    ]


def _story(shown: Shown, seen: Seen, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """What became of each token, step by step: the policy's numbers in the form that the page's script reads."""
    tokens = seen.layers[0].attention.shape
    places = [(step["place"], step["layer"]) for step in steps]
    score: list[Tensor | None] = [None] * len(steps)
    entropy: list[float | None] = [None] * len(steps)
    for i, layer in enumerate(seen.layers):
        score[i], entropy[i] = layer.score, float(layer.entropy.mean())
    gone, merged = torch.full((2, *tokens), -1).unbind()
    kept = [tokens.numel()] * len(steps)
    for cut in seen.cuts:
        step = places.index((cut.place, max(cut.layer, 0)))
        gone[(gone < 0) & ~cut.alive] = step
        if cut.merged is not None:
            merged[cut.merged] = step
        if cut.place != "encoder":
            score[step] = cut.scores
        if cut.entropy is not None:
            entropy[step] = cut.entropy
        kept[step:] = [cut.kept] * (len(steps) - step)
    criteria = {name: [getattr(layer, name) for layer in seen.layers] for name in CRITERIA}

    def part(view: View) -> dict[str, Any]:
        """The same of the tokens of one view, in raster order."""
        left = view.lay(gone, seen.grid)
        return dict(
            grid=view.grid(seen.grid), tile=seen.grid, gone=left.tolist(),
            kept=[int(((left < 0) | (left > step)).sum()) for step in range(len(steps))],
            merged=view.lay(merged, seen.grid).tolist(),
            **{
                name: [None if x is None else _short(view.lay(x, seen.grid)) for x in values]
                for name, values in (criteria | dict(score=score)).items()
            },
        )  # fmt: skip

    return dict(
        label=seen.label, kept=kept, entropy=[None if x is None else float(f"{x:.4g}") for x in entropy],
        views=[part(view) for view in shown.views],
    )  # fmt: skip


def _short(values: Tensor) -> list[float | None]:
    """Four digits of each, None where there is no number."""
    return [float(f"{x:.4g}") if math.isfinite(x) else None for x in values.tolist()]


def _png(view: View) -> str:
    file = io.BytesIO()
    Image.fromarray(view.picture).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _notes(shown: Shown, some: list[Seen]) -> list[str]:
    """What a reader must know of an image in several tiles."""
    if len(some[0].layers[0].attention) == 1:
        return []
    notes = ["A tile attends to itself alone: attention is shared out within each, and its entropy is their mean."]
    newlines = max(seen.newlines for seen in some)
    if newlines:
        notes.append(
            f"The model puts {newlines} newlines among the tokens. They count among those left, and are not drawn."
        )
    if any(seen.resized for seen in some):
        notes.append(
            "The model resizes what the tiles became: behind the encoder a token is a mean of up to four, which are "
            "drawn as long as it is there."
        )
    return notes
