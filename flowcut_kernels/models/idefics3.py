"""Idefics3 and SmolVLM: a SigLIP tower for images of any size, whose layers have SigLIP's layout."""

from __future__ import annotations

from functools import partial

from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
from transformers.models.idefics3 import modeling_idefics3
from transformers.models.smolvlm import modeling_smolvlm

from ._tower import Tower
from .clip import vit_parts

IDEFICS3_VIT, SMOLVLM_VIT = (
    Tower(
        model_class=model_class,
        protect=0,
        feature_layer=-1,
        parts=partial(vit_parts, eager=eager),
        pixel_mean=IMAGENET_STANDARD_MEAN,
        pixel_std=IMAGENET_STANDARD_STD,
    )
    for model_class, eager in (
        (modeling_idefics3.Idefics3VisionTransformer, modeling_idefics3.eager_attention_forward),
        (modeling_smolvlm.SmolVLMVisionTransformer, modeling_smolvlm.eager_attention_forward),
    )
)
