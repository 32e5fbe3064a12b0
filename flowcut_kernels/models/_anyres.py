"""Images of any resolution: a base view and tiles that the model stitches, unpads and maybe resizes, with newlines."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..modules.encoder import remember
from ._features import Kind, Layout

Size = tuple[int, int]  # height and width


class AnyresImages(Kind):
    """Images that ``pack_image_features`` makes of their views.

    A budget counts per image and is spread evenly over its views; newlines are there only while nothing is pruned in
    the encoder.
    """

    modality, pixels, method = "image", "pixel_values", "get_image_features"
    assembles = True

    def __init__(self, model: Any, token_id: int) -> None:
        super().__init__(model, token_id)
        self.remembered: dict[Hashable, Layout] = {}

    def views(self, sizes: list[Size], arguments: dict[str, Any]) -> list[int]:
        """Number of views of images of these sizes."""
        raise NotImplementedError

    def options(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Of ``pack_image_features``."""
        raise NotImplementedError

    def layouts(self, pixels: Tensor, arguments: dict[str, Any]) -> list[Layout]:
        sizes, options = self._sizes(arguments), self.options(arguments)
        return [self.layout(size, n, options) for size, n in zip(sizes, self.views(sizes, arguments), strict=True)]

    def assemble(self, tiles: Sequence[Tensor], arguments: dict[str, Any], newline: Tensor) -> list[Tensor]:
        return self.pack(tiles, self._sizes(arguments), newline, self.options(arguments))

    def pack(self, tiles: Sequence[Tensor], sizes: list[Size], newline: Tensor, options: dict[str, Any]) -> Any:
        """Images' tokens [n, C] from those of their views [V, N, C], as the model packs them."""
        return type(self.model).pack_image_features(self.model, tiles, sizes, image_newline=newline, **options)[0]

    def layout(self, size: Size, views: int, options: dict[str, Any]) -> Layout:
        """By sending ones and newlines of zero through the model's packing: its gradient tells which tokens count."""
        points = tuple(map(tuple, self.model.config.image_grid_pinpoints))
        key = size, views, points, *options.values()
        layout = self.remembered.get(key)
        if layout is None:
            side = tile_side(self.model)
            exact: Any = dict(dtype=torch.float32, device="cpu")  # whatever the defaults are
            with torch.inference_mode(False), torch.enable_grad():
                tokens = torch.ones(views, side**2, 1, **exact, requires_grad=True)
                packed = self.pack([tokens], [size], tokens.new_zeros(1), options)[0]
                counts = torch.autograd.grad(packed.sum(), tokens)[0][..., 0] > 0
                numbers = torch.arange(1.0, tokens.numel() + 1, **exact).view_as(tokens)
                placed = self.pack([numbers], [size], tokens.new_zeros(1), options)[0][:, 0].long()
            grids, is_place = [(side, side)], packed[:, 0] > 0
            if views > 1 and len(packed) > side**2:  # of a line of an image no row of the tiles is left
                columns = int((~is_place[side**2 :]).int().argmax()) + 1
                grids.append(((len(packed) - side**2) // columns, columns))
            layout = Layout(
                grids=tuple(grids),
                tile=side**2,
                live=tuple(counts.sum(1).tolist()),
                places=int(is_place.sum()),
                void=None if counts.all() else ~counts,
                behind=int(views == 1),
            )
            if not layout.resampled:
                order = torch.full((tokens.numel() + 1,), layout.area, device="cpu")
                order[placed[: layout.area] - 1] = torch.arange(layout.area, device="cpu")
                layout = replace(layout, order=order[:-1])
            remember(self.remembered, key, layout)
        return layout

    @staticmethod
    def _sizes(arguments: dict[str, Any]) -> list[Size]:
        sizes = arguments.get("image_sizes")
        if sizes is None:
            raise ValueError("image_sizes is missing, which says how an image was tiled: pass the processor's")
        return [tuple(size) for size in (sizes.tolist() if isinstance(sizes, Tensor) else sizes)]


def tile_side(model: Any) -> int:
    """Rows, and columns, of the patches of a view."""
    return model.config.vision_config.image_size // model.config.vision_config.patch_size
