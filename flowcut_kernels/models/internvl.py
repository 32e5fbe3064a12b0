"""InternVL: InternViT with a class token and scaled residuals, pixel shuffle; an image is tiles and a thumbnail."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.internvl import modeling_internvl

from ..modules.encoder import LayerParts, PrunedEncoder
from ..policies.base import Policy
from ._bound import Replacement
from ._shuffle import Runs, ShuffledImages, shuffled_replacements
from ._tower import Tower, edge


def _parts(layer: Any) -> LayerParts:
    attention = layer.attention

    def query(x: Tensor) -> Tensor:
        return attention.q_norm(attention.q_proj(x))

    def key(x: Tensor) -> Tensor:
        return attention.k_norm(attention.k_proj(x))

    def output(x: Tensor) -> Tensor:
        return layer.lambda_1 * attention.projection_dropout(attention.projection_layer(x))

    def mlp(x: Tensor) -> Tensor:
        return layer.lambda_2 * layer.dropout(layer.mlp(x))

    return LayerParts(
        norm1=layer.layernorm_before,
        attention=attention,
        q_proj=query,
        k_proj=key,
        v_proj=attention.v_proj,
        out_proj=output,
        norm2=layer.layernorm_after,
        mlp=mlp,
        eager=modeling_internvl.eager_attention_forward,
        dropout=attention.attention_dropout,
        linear=not attention.config.use_qk_norm,
    )


INTERN_VIT = Tower(
    model_class=modeling_internvl.InternVLVisionModel,
    protect=1,
    feature_layer=-1,
    parts=_parts,
    pixel_mean=IMAGENET_DEFAULT_MEAN,
    pixel_std=IMAGENET_DEFAULT_STD,
    layers="layer",
    hands_on=False,
)


class InternVL:
    """Adapter of ``InternVLForConditionalGeneration``.

    Budgets count per image, which a prompt tells by its run of placeholders: tiles and thumbnail, over which the budget
    is spread evenly. The frames of a video are runs of their own, so budgets count per frame. Features that are made
    without a prompt (``get_image_features``) are pruned per tile.
    """

    model_class = modeling_internvl.InternVLForConditionalGeneration

    def replacements(
        self, model: Any, policy: Policy, *, record: bool, backend: str | None, compact_cache: bool
    ) -> tuple[PrunedEncoder, list[Replacement]]:
        inner, config = model.model, model.config
        fixed = {name: getattr(config, name) for name in ("vision_feature_layer", "vision_feature_select_strategy")}
        index, strategy = fixed.values()
        if not isinstance(index, int) or strategy != "default":
            raise ValueError(
                f"vision_feature_layer={index!r}, vision_feature_select_strategy={strategy!r}: pixel shuffle takes the "
                "patches of one layer, without the class token; set an int and 'default'"
            )
        side = round(1 / config.downsample_ratio)
        kind = InternVLImages(inner, config.image_token_id, side, edge(config.vision_config.patch_size))
        return shuffled_replacements(
            model, kind, INTERN_VIT, inner.vision_tower, inner.multi_modal_projector, policy, fixed,
            record=record, backend=backend, compact_cache=compact_cache,
        )  # fmt: skip


class InternVLImages(ShuffledImages):
    """Each a run of placeholders."""

    def images(self, pixels: Tensor, runs: Runs, columns: int, arguments: dict[str, Any]) -> list[list[int]]:
        rows, tiles = super().images(pixels, runs, columns, arguments), len(pixels)
        if sum(map(sum, rows)) == tiles:
            return rows
        counts = [*map(len, runs)]
        if sum(counts) in (1, tiles):  # of a prompt that fits what is left of one image, or of images of one tile
            return [[tiles // sum(counts)] * n for n in counts]
        return []
