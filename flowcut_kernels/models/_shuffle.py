"""Models that merge squares of patches by pixel shuffle: a token is a square, and stays or goes as one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..modules.encoder import PrunedEncoder
from ..policies.base import Policy
from ._bound import Replacement
from ._features import HEEDED, Encoded, Kind, Layout, ScatteredProjector, equal_tiles
from ._tower import Tower
from ._vlm import MANY, vlm_replacements

Runs = list[list[tuple[int, int]]]  # of each row: first column and end


class ShuffledImages(Kind):
    """Images of equal tiles, whose tokens stand one behind another. Which tiles are an image, a prompt tells; with none
    at hand each of them is one."""

    modality, pixels, method = "image", "pixel_values", "get_image_features"
    assembles = True

    def __init__(self, model: Any, token_id: int, side: int, patch: int) -> None:
        super().__init__(model, token_id)
        self.side, self.patch = side, patch

    def tile(self, pixels: Tensor) -> Layout:
        """Of a whole tile as an image by itself."""
        rows, columns = (size // self.patch // self.side for size in pixels.shape[-2:])
        return equal_tiles(1, PrunedEncoder.grid(rows * columns))

    def tiles(self, pixels: Tensor, arguments: dict[str, Any]) -> list[Layout]:
        """Of each tile as an image by itself."""
        return [self.tile(pixels)] * len(pixels)

    def seen(self, pixels: Tensor, mask: Tensor) -> list[Layout]:
        """Of each tile as an image by itself, whose other pixels a `mask` [tiles, H, W] hides."""
        whole, seen = self.tile(pixels), torch.nn.functional.max_pool2d(mask.float(), self.patch)
        least, most = (torch.nn.functional.max_pool2d(x, self.side).flatten(1) for x in (-seen, seen))
        if bool((-least != most).any()):
            raise ValueError(
                f"pixel_attention_mask ends inside a token, {self.side} x {self.side} patches of {self.patch} pixels: "
                "pad images to multiples of its edge, or unpatch"
            )
        live = most.sum(1).int().tolist()
        return [
            replace(whole, live=(n,), places=n, void=hidden[None], masked=True) if n < whole.tile else whole
            for n, hidden in zip(live, (most == 0).cpu(), strict=True)
        ]

    def images(self, pixels: Tensor, runs: Runs, columns: int, arguments: dict[str, Any]) -> list[list[int]]:
        """Tiles of the images of each row of a prompt, by the runs of placeholders in its last columns (see `heed`);
        here these are images, none where they are no whole tiles."""
        rows, size = [[end - start for start, end in row] for row in runs], self.tile(pixels).tile
        return [] if any(n % size for row in rows for n in row) else [[n // size for n in row] for row in rows]

    def heed(self, pixels: Tensor, placeholders: np.ndarray, arguments: dict[str, Any]) -> None:
        rows = self._heeded()
        if rows:  # by `generate`, which repeats rows for its beams
            rows = [row for row in rows for _ in range(len(placeholders) // len(rows))]
        else:
            rows = self.images(pixels, runs_of(placeholders), placeholders.shape[1], arguments)
        HEEDED.set((self.model, rows))

    def layouts(self, pixels: Tensor, arguments: dict[str, Any]) -> list[Layout]:
        tiles = self.tiles(pixels, arguments)
        counts = [count for row in self._heeded() for count in row]
        if sum(counts) != len(tiles):
            return tiles
        each = iter(tiles)
        return [_together([next(each) for _ in range(count)]) for count in counts]

    def lengths(self, features: Any, known: Encoded | None) -> list[int]:
        rows, found = self._heeded(), super().lengths(features, known)
        if known is None:
            return found
        kept, copies = iter(known.kept), sum(found) // sum(known.kept)
        images = [[next(kept) for _ in row] for row in rows] if sum(map(len, rows)) == len(known.kept) else [known.kept]
        return [n for row in images for n in row * copies]

    def _heeded(self) -> list[list[int]]:
        """Tiles of the images of each row of the prompt at hand."""
        model, rows = HEEDED.get() or (None, [])
        return rows if model is self.model else []


def runs_of(mask: np.ndarray) -> Runs:
    """Of a mask [B, L]."""
    batch, length = mask.shape
    framed = np.zeros((batch, length + 2), bool)
    framed[:, 1:-1] = mask
    row, edge = (framed[:, 1:] != framed[:, :-1]).nonzero()
    found: Runs = [[] for _ in range(batch)]
    for i, start, end in zip(row[::2].tolist(), edge[::2].tolist(), edge[1::2].tolist(), strict=True):
        found[i].append((start, end))
    return found


def words_of(arguments: dict[str, Any], columns: int) -> list[list[int]]:
    """The last `columns` of each row of a prompt as numbers, equal ones for equal words."""
    ids = arguments.get("input_ids")
    if ids is None:
        embeds = arguments["inputs_embeds"].detach()
        ids = embeds.flatten(0, 1).unique(dim=0, return_inverse=True)[1].view(embeds.shape[:2])
    return ids[:, -columns:].tolist()


def _together(tiles: list[Layout]) -> Layout:
    """Tiles, each as an image by itself, as one image."""
    first, count, void = tiles[0], len(tiles), None
    if first.void is None and all(x is first for x in tiles):
        return equal_tiles(count, first.grids[0])
    if any(x.void is not None for x in tiles):
        none = torch.zeros(1, first.tile, dtype=torch.bool, device="cpu")
        void = torch.cat([none if x.void is None else x.void for x in tiles])
    return Layout(
        grids=sum((x.grids for x in tiles), ()),
        tile=tiles[0].tile,
        live=sum((x.live for x in tiles), ()),
        places=sum(x.places for x in tiles),
        void=void,
        masked=any(x.masked for x in tiles),
    )


def shuffled_replacements(
    model: Any,
    kind: ShuffledImages,
    tower: Tower,
    tower_model: Any,
    projector: nn.Module,
    policy: Policy,
    fixed: dict[str, Any],
    *,
    record: bool,
    backend: str | None,
    compact_cache: bool,
) -> tuple[PrunedEncoder, list[Replacement]]:
    """All of a model whose tower is read at ``fixed["vision_feature_layer"]``, or behind its last layer."""
    if type(tower_model) is not tower.model_class:
        raise ValueError(
            f"vision tower {type(tower_model).__name__} of {type(model).__name__} is not supported: use a model with "
            f"{tower.model_class.__name__}"
        )
    index, wanted = fixed.get("vision_feature_layer", -1), getattr(policy, "feature_layer", None)
    if wanted not in (None, index):
        raise ValueError(f"feature_layer={wanted} but {type(model).__name__} reads layer {index}; leave it None")
    encoder, replacements = tower.build(
        tower_model, policy, index, runs_rest=False, record=record, backend=backend, side=kind.side
    )
    replacements.append((projector, "forward", ScatteredProjector(projector)))
    replacements += vlm_replacements(
        model, [kind], policy, MANY, encoder, fixed, backend=backend, compact_cache=compact_cache
    )
    return encoder, replacements
