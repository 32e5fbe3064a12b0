"""LLaVA-OneVision: an image is a base view and tiles, stitched, unpadded and resized; videos are pooled frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from ..modules.encoder import PrunedEncoder
from ..policies.base import Policy
from ._anyres import AnyresImages, Size, tile_side
from ._bound import Replacement
from ._features import Kind, Layout, equal_tiles
from ._vlm import tiled_replacements


class LlavaOnevision:
    """Adapter of ``LlavaOnevisionForConditionalGeneration``.

    Budgets count per image and per video, the newline behind a video included (which never stays alone), and are spread
    evenly over views or frames. Where the model resamples, each of its tokens is a mean of four at most. Then the
    encoder leaves four times as many tokens, so that enough places have one, and of these the highest scores stay: as
    many as the budget says.
    """

    model_class = LlavaOnevisionForConditionalGeneration

    def replacements(
        self, model: Any, policy: Policy, *, record: bool, backend: str | None, compact_cache: bool
    ) -> tuple[PrunedEncoder, list[Replacement]]:
        inner, config = model.model, model.config
        kinds = OnevisionImages(inner, config.image_token_id), OnevisionVideos(inner, config.video_token_id)
        return tiled_replacements(model, kinds, policy, record=record, backend=backend, compact_cache=compact_cache)


class OnevisionImages(AnyresImages):
    """A base view and tiles, packed with newline tokens; one of several images in a prompt has the base view alone."""

    def views(self, sizes: list[Size], arguments: dict[str, Any]) -> list[int]:
        per_prompt = arguments.get("batch_num_images")
        alone = [True] * len(sizes) if per_prompt is None else [n == 1 for n in per_prompt for _ in range(int(n))]
        if len(alone) != len(sizes):
            raise ValueError(
                f"batch_num_images counts {len(alone)} images but image_sizes has {len(sizes)}: pass the processor's"
            )
        points, edge = self.model.config.image_grid_pinpoints, self.model.config.vision_config.image_size
        return [
            image_size_to_num_patches(list(size), points, edge) if one else 1
            for size, one in zip(sizes, alone, strict=True)
        ]

    def options(self, arguments: dict[str, Any]) -> dict[str, Any]:
        aspect = arguments.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio
        return dict(vision_aspect_ratio=aspect)


class OnevisionVideos(Kind):
    """Frames whose features are pooled to half the side, and one newline token."""

    modality, pixels, method = "video", "pixel_values_videos", "get_video_features"
    assembles = True

    def layouts(self, pixels: Tensor, arguments: dict[str, Any]) -> list[Layout]:
        videos, frames = pixels.shape[:2]
        side = tile_side(self.model)
        pooled = -(-side // 2)
        return [equal_tiles(frames, (pooled, pooled), side**2, behind=1, lasting=1, even=True)] * videos

    def assemble(self, tiles: Sequence[Tensor], arguments: dict[str, Any], newline: Tensor) -> list[Tensor]:
        pooled = type(self.model).apply_pooling(self.model, torch.cat(list(tiles)))
        return [x.flatten(0, 1) for x in pooled.split([len(x) for x in tiles])]
