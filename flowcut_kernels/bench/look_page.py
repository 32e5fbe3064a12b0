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

from .look import WHERE, Seen, Shown

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
        images=[[_story(seen, steps) for seen in some] for _, some in looked],
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
        looked=[(shown, _png(shown), some, _notes(some)) for shown, some in looked],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _average(seen: Seen) -> str | None:
    """Tokens over the layers of the language model; None where that is known only afterwards, or not of this tile."""
    if seen.tiles > 1 or seen.hidden:
        return None
    try:
        return f"{seen.policy.average_tokens(seen.decoder_layers, math.prod(seen.grid)):.4g}"
    except ValueError:
        return None


def _steps(looked: list[Seen]) -> list[dict[str, Any]]:
    """Where the slider stops: layers of the encoder, and what is behind it as far as somebody cuts there."""
    stages = [stage for seen in looked for stage in seen.stages]
    depth = {"encoder": max(len(seen.layers) for seen in looked)}
    depth["features"] = int(any(stage.name == "features" for stage in stages))
    depth["llm"] = (
        max((seen.decoder_layers for seen in looked), default=0) if any(s.name == "llm" for s in stages) else 0
    )
    return [
        dict(place=name, layer=layer, words=WHERE[name] if name == "features" else f"{WHERE[name]}, layer {layer}")
        for name, count in depth.items()
        for layer in range(count)
    ]


def _story(seen: Seen, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """What became of each token, step by step: the policy's numbers in the form that the page's script reads."""
    tokens = math.prod(seen.grid)
    places = [(step["place"], step["layer"]) for step in steps]
    score: list[Any] = [None] * len(steps)
    entropy: list[float | None] = [None] * len(steps)
    for i, layer in enumerate(seen.layers):
        score[i], entropy[i] = _short(layer.score), float(f"{layer.entropy:.4g}")
    gone, merged = torch.full((2, tokens), -1).unbind()
    kept = [tokens] * len(steps)
    for stage in seen.stages:
        step = places.index((stage.name, max(stage.layer, 0)))
        index = stage.indices[0, : stage.kept[0]].cpu()
        left = torch.zeros(tokens, dtype=torch.bool).index_fill(0, index, True)
        gone[(gone < 0) & ~left] = step
        if stage.recycled is not None:
            merged[index[stage.recycled[0, : len(index)].cpu()]] = step
        if stage.name != "encoder" and stage.scores is not None:
            score[step] = _short(stage.scores[0])
        if stage.entropy is not None:
            entropy[step] = float(f"{float(stage.entropy[0]):.4g}")
        kept[step:] = [stage.kept[0]] * (len(steps) - step)
    return dict(
        label=seen.label, grid=seen.grid, kept=kept, entropy=entropy, gone=gone.tolist(), merged=merged.tolist(),
        score=score, **{name: [_short(getattr(layer, name)) for layer in seen.layers] for name in CRITERIA},
    )  # fmt: skip


def _short(values: Tensor | None) -> list[float | None] | None:
    """Four digits of each, None where there is no number."""
    if values is None:
        return None
    return [float(f"{x:.4g}") if math.isfinite(x) else None for x in values.tolist()]


def _png(shown: Shown) -> str:
    file = io.BytesIO()
    Image.fromarray(shown.picture).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _notes(some: list[Seen]) -> list[str]:
    notes = []
    if some[0].tiles > 1:
        notes.append(f"The model cuts this image into {some[0].tiles} tiles, of which the first is shown.")
    for seen in some:
        if seen.hidden:
            notes.append(
                f"{seen.label}: cuts behind the encoder ({seen.hidden}) are not shown, as tokens are no tile's patches "
                "there."
            )
    return notes
