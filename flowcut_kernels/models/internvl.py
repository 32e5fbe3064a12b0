"""InternVL: InternViT with a class token and scaled residuals."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.internvl import modeling_internvl

from ..modules.encoder import LayerParts
from ._tower import Tower


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
)
