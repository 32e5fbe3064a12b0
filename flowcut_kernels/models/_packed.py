"""A vision encoder that packs images of any size: what a family adds to the shared blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from ..modules.packed_encoder import PackedBlock, PackedEncoder, PackedMerger, PackedParts
from ..policies.base import Policy
from ..policies.recycling import held
from ._bound import Replacement
from ._tower import check_anchor


@dataclass(frozen=True)
class PackedTower:
    """The facts of a family of packed encoders (``visual.blocks``, read by ``visual.merger`` at their end)."""

    parts: Callable[[Any], PackedParts]  # of a block
    windows: Callable[[Any, Tensor, dict[str, Any]], tuple[Tensor, Tensor]]  # of encoders with `fullatt_block_indexes`
    pixel_mean: Sequence[float]  # of the usual image processor, on a scale of 0..1
    pixel_std: Sequence[float]

    def build(
        self, visual: Any, policy: Policy, *, record: bool, backend: str | None
    ) -> tuple[PackedEncoder, list[Replacement]]:
        """Replacements that prune before the last block, whose output is merged."""
        name, depth, full = type(visual).__name__, len(visual.blocks), getattr(visual, "fullatt_block_indexes", None)
        wanted = getattr(policy, "feature_layer", None)
        if wanted not in (None, -1, depth):
            raise ValueError(f"feature_layer={wanted} but {name} merges what its last block puts out; leave it None")
        check_anchor(policy, visual)
        if depth < 2:
            raise ValueError(f"{name} of {depth} layer has none to prune before its last")
        deepstack = zip(
            getattr(visual, "deepstack_visual_indexes", ()), getattr(visual, "deepstack_merger_list", ()), strict=True
        )
        mergers: list[tuple[int, nn.Module]] = [(depth - 1, visual.merger), *deepstack]
        encoder = PackedEncoder(
            visual,
            policy,
            block=visual.spatial_merge_size**2,
            feature_layer=depth - 1,
            windows=None if full is None else self.windows,
            of_sizes=_of_sizes,
            mergers=mergers,
            pixel_mean=self.pixel_mean,
            pixel_std=self.pixel_std,
            record=record,
            backend=backend,
        )
        replacements: list[Replacement] = [(visual, "forward", encoder)]
        for i, block in enumerate(visual.blocks):
            windowed = full is not None and i not in full
            replacements.append((block, "forward", PackedBlock(block, self.parts, i, windowed)))
        return encoder, [*replacements, *((merger, "forward", PackedMerger(merger, encoder)) for _, merger in mergers)]

    def raster(self, visual: Any, grid_thw: Tensor) -> Tensor:
        """int64 [R] rows of the blocks' input in the order of images, frames and lines of patches."""
        side, rows, total = visual.spatial_merge_size, [], 0
        for count, height, width in grid_thw.tolist():  # squares of patches that are merged are neighbours
            places = torch.arange(count * height * width, device="cpu").view(-1, side, width // side, side)
            rows.append(places.transpose(1, 2).flatten() + total)
            total += places.numel()
        place = torch.cat(rows).to(grid_thw.device)
        if getattr(visual, "fullatt_block_indexes", None) is not None:
            window, _ = self.windows(visual, grid_thw, {})
            place = place.view(-1, side**2)[window].flatten()
        return place.argsort()


def _of_sizes(visual: Any, grids: list[list[int]], device: torch.device) -> dict[str, Tensor]:
    """What the stock encoder would work out of the sizes, on the device once; lengths are for the host."""
    table: tuple[tuple[str, Any], ...] = ()
    if hasattr(visual, "num_grid_per_side"):  # of learned positions
        table = (("num_grid_per_side", visual.num_grid_per_side), ("mode", visual.interpolation_mode),
                 ("align_corners", visual.interpolation_align_corners))  # fmt: skip
    made = _made_of_sizes(tuple(map(tuple, grids)), visual.spatial_merge_size, table, device)
    return {name: held(x) for name, x in made.items()}


@torch.compiler.assume_constant_result
@lru_cache(maxsize=16)  # up to a megabyte each for 16,384 patches
def _made_of_sizes(grids: tuple, side: int, table: tuple, device: torch.device) -> dict[str, Tensor]:
    with torch.inference_mode(False):
        grid = torch.tensor(grids, device="cpu")
        made = dict(position_ids=get_vision_position_ids(grid, side))
        if table:
            found = get_vision_interpolation_indices_and_weights(grid, spatial_merge_size=side, **dict(table))
            made["interp_indices"], made["interp_weights"] = found
        made = {name: x.to(device) for name, x in made.items()}
        return made | dict(cu_seqlens=get_vision_cu_seqlens(grid))
