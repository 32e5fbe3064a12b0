"""CLIP and SigLIP vision towers (they share their layers' layout)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.clip import modeling_clip
from transformers.models.siglip import modeling_siglip

from ..modules.encoder import LayerParts, PrunedEncoder
from ..policies.base import Policy
from ._bound import Replacement
from ._tower import Tower


def vit_parts(layer: Any, eager: Callable) -> LayerParts:
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
        dropout=attention.dropout,
    )


CLIP = Tower(
    model_class=modeling_clip.CLIPVisionModel,
    protect=1,
    feature_layer=-2,  # what LLaVA reads
    parts=partial(vit_parts, eager=modeling_clip.eager_attention_forward),
    pixel_mean=OPENAI_CLIP_MEAN,
    pixel_std=OPENAI_CLIP_STD,
)
SIGLIP = Tower(
    model_class=modeling_siglip.SiglipVisionModel,
    protect=0,
    feature_layer=-1,
    parts=partial(vit_parts, eager=modeling_siglip.eager_attention_forward),
    pixel_mean=IMAGENET_STANDARD_MEAN,
    pixel_std=IMAGENET_STANDARD_STD,
)


def replace_tower(
    model: Any, policy: Policy, *, record: bool, backend: str | None, name: str = "vision_tower"
) -> tuple[Tower, PrunedEncoder, list[Replacement], dict[str, Any]]:
    """The tower of a LLaVA-like model whose layers after the feature layer never run.

    Returns:
        The tower's facts, its encoder, what replaces its parts, and the settings that must not change afterwards.
    """
    tower_model, config = getattr(model.model, name), model.config
    tower = next((t for t in (CLIP, SIGLIP) if type(tower_model) is t.model_class), None)
    if tower is None:
        raise ValueError(
            f"vision tower {type(tower_model).__name__} of {type(model).__name__} is not supported: use a model "
            f"with {CLIP.model_class.__name__} or {SIGLIP.model_class.__name__}"
        )
    # VipLLaVA's setting was called otherwise up to transformers 5.22, and it always drops the first token.
    names = "vision_feature_layer", "vision_feature_layers", "vision_feature_select_strategy"
    fixed = {name: getattr(config, name) for name in names if hasattr(config, name)}
    layers, strategy = next(iter(fixed)), fixed.get("vision_feature_select_strategy", "default")
    index = fixed[layers]
    if strategy == "default" and tower.protect != 1:
        raise ValueError(
            f"vision_feature_select_strategy={strategy!r} drops the first token, but {type(tower_model).__name__} has "
            "no class token: set 'full'"
        )
    if tower.protect and strategy == "full" and getattr(policy, "class_token", False):
        raise ValueError(
            "class_token=True, but vision_feature_select_strategy='full' gives the language model the class token "
            "anyway: set class_token=False"
        )
    wanted = getattr(policy, "feature_layer", None)
    if wanted is not None and wanted != index:
        raise ValueError(f"feature_layer={wanted} but model.config.{layers} is {index}; leave it None")
    encoder, replacements = tower.build(tower_model, policy, index, runs_rest=False, record=record, backend=backend)
    return tower, encoder, replacements, fixed


def replace_siglip(
    model: Any, policy: Policy, side: int = 1, *, record: bool, backend: str | None
) -> tuple[PrunedEncoder, list[Replacement]]:
    """The SigLIP tower of a model that reads its last hidden state, behind the final norm.

    Args:
        side: edge in patches of a token, that the model merges.
    """
    tower_model, wanted = model.model.vision_tower, getattr(policy, "feature_layer", None)
    if type(tower_model) is not SIGLIP.model_class:
        raise ValueError(
            f"vision tower {type(tower_model).__name__} of {type(model).__name__} is not supported: use a model with "
            f"{SIGLIP.model_class.__name__}"
        )
    if wanted not in (None, -1):
        raise ValueError(f"feature_layer={wanted} but {type(model).__name__} reads the last layer: leave it None")
    return SIGLIP.build(tower_model, policy, -1, runs_rest=False, record=record, backend=backend, side=side)
