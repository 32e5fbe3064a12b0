"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: packed images and frames of any size, a 2 x 2 merger, M-RoPE.

Budgets count merged tokens, per image or per video, whose frames get equal shares. The positions of a prompt follow
from the grids of its images and videos, so that it keeps all its placeholders: what the encoder drops leaves at the
entrance of the language model, and every token that is kept has the position that it has in the unpruned prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.vision_utils import get_vision_window_index

from ..modules.decoder import PrunedDeepstack
from ..modules.packed_encoder import PackedEncoder, PackedParts
from ..policies.base import Policy
from ._bound import Replacement
from ._features import Kind, Layout, equal_tiles
from ._packed import PackedTower
from ._vlm import MANY, vlm_replacements


def block_parts(block: Any) -> PackedParts:
    """What a block of the vision encoder is made of."""
    attention = block.attn
    modeling = sys.modules[type(attention).__module__]
    return PackedParts(
        norm1=block.norm1,
        attention=attention,
        norm2=block.norm2,
        mlp=block.mlp,
        eager=modeling.eager_attention_forward,
        rotate=modeling.apply_rotary_pos_emb_vision,
    )


def _windows(visual: Any, grid_thw: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    size = visual.window_size
    return get_vision_window_index(grid_thw, visual.spatial_merge_size, size, visual.patch_size, kwargs=kwargs)


class QwenVL:
    """Adapter of a Qwen-VL: images and videos of different sizes side by side.

    Args:
        mean, std: of the usual image processor, on a scale of 0..1.
    """

    def __init__(self, model_class: type[nn.Module], mean: Sequence[float], std: Sequence[float]) -> None:
        self.model_class, self.tower = model_class, PackedTower(block_parts, _windows, mean, std)

    def replacements(
        self, model: Any, policy: Policy, *, record: bool, backend: str | None, compact_cache: bool
    ) -> tuple[PackedEncoder, list[Replacement]]:
        inner, config = model.model, model.config
        encoder, replacements = self.tower.build(inner.visual, policy, record=record, backend=backend)
        if policy.renumbers:
            raise ValueError(
                f"positions='renumber' with {type(model).__name__}: its positions have three axes and gaps of their "
                "own, which numbers in a row cannot replace; leave positions='keep'"
            )
        kinds = [QwenVisuals(inner, getattr(config, f"{kind}_token_id"), kind) for kind in ("image", "video")]
        replacements += vlm_replacements(
            model, kinds, policy, MANY, encoder, {}, backend=backend, compact_cache=compact_cache
        )
        if hasattr(inner.language_model, "_deepstack_process"):
            replacements.append((inner.language_model, "_deepstack_process", PrunedDeepstack(inner.language_model)))
        return encoder, replacements


class QwenVisuals(Kind):
    """Images, or videos, by their grids; of a video every temporal patch is a frame."""

    shrinks = False

    def __init__(self, model: Any, token_id: int, modality: str) -> None:
        super().__init__(model, token_id)
        self.modality, self.method, self.grid = modality, f"get_{modality}_features", f"{modality}_grid_thw"
        self.pixels = "pixel_values" if modality == "image" else "pixel_values_videos"

    def layouts(self, pixels: Tensor, arguments: dict[str, Any]) -> list[Layout]:
        grids, side = arguments.get(self.grid), self.model.visual.spatial_merge_size
        if grids is None:
            raise ValueError(f"{self.grid} is missing, which says how large each one is: pass the processor's")
        return [equal_tiles(n, (rows // side, columns // side)) for n, rows, columns in grids.tolist()]


QWEN2_VL = QwenVL(Qwen2VLForConditionalGeneration, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
QWEN2_5_VL = QwenVL(Qwen2_5_VLForConditionalGeneration, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
QWEN3_VL = QwenVL(Qwen3VLForConditionalGeneration, IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)
