"""LLaVA-NeXT-Video: images as LLaVA-NeXT, and videos whose frames are pooled square by square."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import LlavaNextVideoForConditionalGeneration

from ..modules.encoder import PrunedEncoder
from ..policies.base import Policy
from ._anyres import tile_side
from ._bound import Replacement
from ._features import Kind, Layout, equal_tiles
from ._pooling import PooledTokens
from ._tower import check_squares
from ._vlm import tiled_replacements
from .llava_next import NextImages


class LlavaNextVideo:
    """Adapter of ``LlavaNextVideoForConditionalGeneration``.

    Budgets count per image and per video, and are spread evenly over views or frames. A token of a video is a square
    of patches, pooled in any of the model's ways.
    """

    model_class = LlavaNextVideoForConditionalGeneration

    def replacements(
        self, model: Any, policy: Policy, *, record: bool, backend: str | None, compact_cache: bool
    ) -> tuple[PrunedEncoder, list[Replacement]]:
        inner, config = model.model, model.config
        side, stride = tile_side(inner), config.spatial_pool_stride
        if side % stride:
            raise ValueError(
                f"spatial_pool_stride={stride}: {side} x {side} patches are no whole squares of {stride} x {stride}; "
                "only such are supported"
            )
        check_squares(policy, inner.vision_tower, stride)
        kinds = NextImages(inner, config.image_token_id), NextVideos(inner, config.video_token_id)
        encoder, replacements = tiled_replacements(
            model, kinds, policy, record=record, backend=backend, compact_cache=compact_cache
        )
        resampler = inner.vision_resampler
        return encoder, [*replacements, (resampler, "forward", PooledTokens(resampler))]


class NextVideos(Kind):
    """Frames of pooled tokens."""

    modality, pixels, method = "video", "pixel_values_videos", "get_video_features"
    assembles = True

    def __init__(self, model: Any, token_id: int) -> None:
        super().__init__(model, token_id)
        self.side = model.config.spatial_pool_stride

    def layouts(self, pixels: Tensor, arguments: dict[str, Any]) -> list[Layout]:
        videos, frames = pixels.shape[:2]
        edge = tile_side(self.model) // self.side
        return [equal_tiles(frames, (edge, edge), even=True)] * videos
