"""LLaVA-NeXT: an image is a base view and tiles, stitched and unpadded, with a newline behind every row."""

from __future__ import annotations

from typing import Any

from transformers import LlavaNextForConditionalGeneration
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from ..modules.encoder import PrunedEncoder
from ..policies.base import Policy
from ._anyres import AnyresImages, Size
from ._bound import Replacement
from ._vlm import tiled_replacements


class LlavaNext:
    """Adapter of ``LlavaNextForConditionalGeneration``.

    Budgets count per image. FlowCut as published leaves 2T in the encoder, over all views, and T behind layer 1 of the
    language model: ``FlowCut(T, llm_layer=1)``; as released, T/2 of every view: ``FlowCut.release(T, llm_layer=1)``.
    """

    model_class = LlavaNextForConditionalGeneration

    def replacements(
        self, model: Any, policy: Policy, *, record: bool, backend: str | None, compact_cache: bool
    ) -> tuple[PrunedEncoder, list[Replacement]]:
        kinds = [NextImages(model.model, model.config.image_token_id)]
        return tiled_replacements(model, kinds, policy, record=record, backend=backend, compact_cache=compact_cache)


class NextImages(AnyresImages):
    """A base view and tiles, packed with newline tokens."""

    def views(self, sizes: list[Size], arguments: dict[str, Any]) -> list[int]:
        points, edge = self.model.config.image_grid_pinpoints, self.model.config.vision_config.image_size
        return [image_size_to_num_patches(list(size), points, edge) for size in sizes]

    def options(self, arguments: dict[str, Any]) -> dict[str, Any]:
        given = arguments.get("vision_feature_select_strategy")
        return dict(vision_feature_select_strategy=given or self.model.config.vision_feature_select_strategy)
