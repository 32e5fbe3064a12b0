"""LLaVA-OneVision: an image is a base view and tiles, stitched, unpadded and resized; videos are pooled frames.

Importance takes the way of the features: it goes through the model's own methods as a feature of one channel, with
newline tokens of importance 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from ..modules.encoder import PrunedEncoder
from ..policies.base import Policy
from ._bound import Replacement
from ._features import Item, Kind
from ._vlm import vlm_replacements
from .clip import replace_tower

Grids = tuple[tuple[int, int], ...]

_MANY = 1 << 20  # more tokens than an image or a video has


class LlavaOnevision:
    """Adapter of ``LlavaOnevisionForConditionalGeneration`` for policies that leave the encoder's tiles whole."""

    model_class = LlavaOnevisionForConditionalGeneration

    def replacements(
        self, model: Any, policy: Policy, *, record: bool, backend: str | None, compact_cache: bool
    ) -> tuple[PrunedEncoder, list[Replacement]]:
        inner, config = model.model, model.config
        tower, encoder, replacements, fixed = replace_tower(model, policy, record=record, backend=backend)
        patches = tower.patches(inner.vision_tower)
        # What chooses among features follows their number; what does not must leave the largest image whole.
        most = patches if policy.prunes_features else _MANY
        if policy.encoder_budget(most) < most:
            raise ValueError(
                f"{type(policy).__name__} prunes inside the vision encoder, but {type(model).__name__} stitches whole "
                "tiles: use VFlowOpt"
            )
        kinds = OnevisionImages(inner, config.image_token_id), OnevisionVideos(inner, config.video_token_id)
        replacements += vlm_replacements(
            model, kinds, policy, _MANY, encoder, fixed, backend=backend, compact_cache=compact_cache
        )
        return encoder, replacements


class OnevisionImages(Kind):
    """A base view and tiles, packed with newline tokens; one of several images in a prompt has the base view alone."""

    modality, pixels, method = "image", "pixel_values", "get_image_features"

    def tokens(self, pixels: Tensor, arguments: dict[str, Any]) -> list[int]:
        sizes, views = self._sizes_and_views(arguments)
        grids = [layout(self.model, size, n, self._aspect(arguments)) for size, n in zip(sizes, views, strict=True)]
        return [_area(grid) + (n == 1) for grid, n in zip(grids, views, strict=True)]

    def tiles(self, pixels: Tensor, arguments: dict[str, Any]) -> int:
        return sum(self._sizes_and_views(arguments)[1])

    def items(
        self, features: Sequence[Tensor], arguments: dict[str, Any], importance: Tensor, position: Tensor | None
    ) -> list[Item]:
        sizes, views = self._sizes_and_views(arguments)
        aspect, newline, items = self._aspect(arguments), importance.new_ones(1), []
        for x, tiles, size, n in zip(features, importance.split(views), sizes, views, strict=True):
            weight, end = pack(self.model, tiles[..., None], size, newline, aspect)[:, 0], len(x) - (n == 1)
            last = x[end:] if n == 1 else None
            items.append(Item(x[:end], weight[:end], layout(self.model, size, n, aspect), trailing=last))
        return items

    def _sizes_and_views(self, arguments: dict[str, Any]) -> tuple[list[tuple[int, int]], list[int]]:
        """Height and width of every image, and its number of views."""
        sizes, per_prompt = arguments.get("image_sizes"), arguments.get("batch_num_images")
        if sizes is None:
            raise ValueError("image_sizes is missing, which says how an image was tiled: pass the processor's")
        sizes = [tuple(size) for size in (sizes.tolist() if isinstance(sizes, Tensor) else sizes)]
        alone = [True] * len(sizes) if per_prompt is None else [n == 1 for n in per_prompt for _ in range(int(n))]
        if len(alone) != len(sizes):
            raise ValueError(
                f"batch_num_images counts {len(alone)} images but image_sizes has {len(sizes)}: pass the processor's"
            )
        points, edge = self.model.config.image_grid_pinpoints, self.model.config.vision_config.image_size
        views = [
            image_size_to_num_patches(list(size), points, edge) if one else 1
            for size, one in zip(sizes, alone, strict=True)
        ]
        return sizes, views

    def _aspect(self, arguments: dict[str, Any]) -> str:
        return arguments.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio


class OnevisionVideos(Kind):
    """Frames whose features are pooled to half the side, and one newline token."""

    modality, pixels, method = "video", "pixel_values_videos", "get_video_features"

    def tokens(self, pixels: Tensor, arguments: dict[str, Any]) -> list[int]:
        return [pixels.shape[1] * self._pooled**2 + 1] * len(pixels)

    def tiles(self, pixels: Tensor, arguments: dict[str, Any]) -> int:
        return pixels.shape[0] * pixels.shape[1]

    def items(
        self, features: Sequence[Tensor], arguments: dict[str, Any], importance: Tensor, position: Tensor | None
    ) -> list[Item]:
        pooled = type(self.model).apply_pooling(self.model, importance[..., None])[..., 0]
        weights = pooled.unflatten(0, (len(features), -1))
        grids = ((self._pooled, self._pooled),) * weights.shape[1]
        area = _area(grids)
        return [
            # transformers 5.17 puts the newline behind a video's features later on.
            Item(x[:area], weight.flatten(), grids, trailing=x[area:], appended=area + 1 - len(x))
            for x, weight in zip(features, weights, strict=True)
        ]

    @property
    def _pooled(self) -> int:
        return -(-_side(self.model) // 2)


def pack(model: Any, tiles: Tensor, size: tuple[int, int], newline: Tensor, aspect: str) -> Tensor:
    """One image's tokens [n, D] from those of its views [V, N, D], the way the model packs them.

    Args:
        size: height and width of the image.
        newline: [D] put behind every row of tiles.
        aspect: "anyres_max_9" and the like.
    """
    packed, _ = type(model).pack_image_features(
        model, [tiles], torch.tensor([size]), image_newline=newline, vision_aspect_ratio=aspect
    )
    return packed[0]


def layout(model: Any, size: tuple[int, int], views: int, aspect: str) -> Grids:
    """Rows and columns of the grids of a packed image: the base view, and with tiles their rows, newlines included."""
    side = _side(model)
    if views == 1:
        return ((side, side),)
    newlines = pack(model, torch.zeros(views, side * side, 1), size, torch.ones(1), aspect)[side * side :, 0]
    columns = int(newlines.argmax()) + 1
    return (side, side), (len(newlines) // columns, columns)


def _side(model: Any) -> int:
    return model.config.vision_config.image_size // model.config.vision_config.patch_size


def _area(grids: Grids) -> int:
    return sum(rows * columns for rows, columns in grids)
