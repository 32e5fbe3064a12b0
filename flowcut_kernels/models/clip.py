"""CLIP and SigLIP vision towers (they share their layers' layout)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers.models.clip import modeling_clip
from transformers.models.siglip import modeling_siglip

from ..modules.encoder import LayerParts
from ._tower import Tower


def _parts(layer: Any, eager: Callable) -> LayerParts:
    attention = layer.self_attn
    return LayerParts(
        norm1=layer.layer_norm1,
        attention=attention,
        q_proj=attention.q_proj,
        k_proj=attention.k_proj,
        v_proj=attention.v_proj,
        out_proj=attention.out_proj,
        norm2=layer.layer_norm2,
        mlp=layer.mlp,
        eager=eager,
    )


CLIP = Tower(
    model_class=modeling_clip.CLIPVisionModel,
    protect=1,
    feature_layer=-2,  # what LLaVA reads
    parts=partial(_parts, eager=modeling_clip.eager_attention_forward),
)
SIGLIP = Tower(
    model_class=modeling_siglip.SiglipVisionModel,
    protect=0,
    feature_layer=-1,
    parts=partial(_parts, eager=modeling_siglip.eager_attention_forward),
)
