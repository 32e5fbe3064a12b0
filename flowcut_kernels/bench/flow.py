"""Information flow through a vision encoder on one image: the table and a picture of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..analyze import Flow, analyze
from .look import as_pictures
from .report import Section

SHOWN = 5  # layers with pictures, spread over the depth


def measure(
    model: Any, image_processor: Any, image: Image.Image, *, hub_threshold: float, command: str
) -> tuple[Section, Flow, np.ndarray]:
    """The table, the flow it was made from, and what the encoder sees of the first tile (uint8 [H, W, 3])."""
    batch = image_processor([image.convert("RGB")], return_tensors="pt")
    inputs = {
        name: x.to(model.dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in batch.items()
    }
    flow = analyze(model, inputs, hub_threshold=hub_threshold)
    rows = [row | dict(ok=True) for row in flow.rows()]
    facts = dict(
        model=type(model).__name__, anchor=flow.anchor, tiles=flow.entropy.shape[1], patches=flow.inflow.shape[2],
        grid=flow.grid, hub_threshold=hub_threshold,
    )  # fmt: skip
    who = "class token" if flow.anchor == "cls" else "mean token"
    notes = [
        f"entropy: of the {who}'s attention, 1 where it looks at all patches alike",
        f"hubs: patches that get more than {hub_threshold:g} times the attention that patches get on average",
        f"relay: rank correlation of what the {who} looks at with what all tokens look at",
        "criteria: the same of its attention with the value norm; previous: with its attention a layer earlier",
    ]
    section = Section("flow", "Information flow by layer", command, rows, facts, notes)
    return section, flow, as_pictures(batch, image_processor)[0].numpy()


def draw(picture: np.ndarray, flow: Flow, section: Section, path: Path) -> Path:
    """The image, what the anchor and what all tokens look at in some layers (hubs framed), and the table as lines."""
    from matplotlib.patches import Rectangle

    from .plots import INK, MUTED, ORANGE, flow_lines, plt, save

    layers = sorted({round(i) for i in np.linspace(0, len(flow.entropy) - 1, SHOWN)})
    figure: Any = plt.figure(figsize=(2.3 * (len(layers) + 1), 8.2), layout="constrained")
    maps, lines = figure.subfigures(2, 1, height_ratios=(1.35, 1))
    panels = maps.subplots(2, len(layers) + 1, squeeze=False)
    who = "the class token" if flow.anchor == "cls" else "the mean token"
    for row, (name, values) in enumerate(
        ((f"what {who} looks at", flow.inflow), ("what all tokens look at", flow.outflow))
    ):
        panels[row, 0].imshow(picture, interpolation="nearest")
        panels[row, 0].set_title(name, fontsize=10, color=INK, loc="left")
        for panel, layer in zip(panels[row, 1:], layers, strict=True):
            heat = values[layer, 0].reshape(flow.grid).float().cpu().numpy()
            panel.imshow(heat, cmap="viridis", vmin=0, interpolation="nearest")
            panel.set_title(f"layer {layer}", fontsize=10, color=MUTED, loc="left")
            for y, x in flow.hubs[layer, 0].reshape(flow.grid).nonzero().tolist() if row else ():
                panel.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=ORANGE, linewidth=1.2))
    for panel in panels.flat:
        panel.axis("off")
    flow_lines(section, lines)
    return save(figure, path)
