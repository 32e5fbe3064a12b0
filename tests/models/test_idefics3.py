"""Idefics3 and SmolVLM: the towers alone."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import PATCH, SIDE
from transformers import Idefics3VisionConfig, SmolVLMVisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

import flowcut_kernels as fk

TOWERS = {Idefics3VisionTransformer: Idefics3VisionConfig, SmolVLMVisionTransformer: SmolVLMVisionConfig}


@pytest.mark.parametrize("kind", TOWERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_towers_are_siglip(kind, attention):
    """With whole images and the same weights they keep what a SigLIP tower keeps, and come to the same."""
    siglip, pixels = tiny.siglip_tower(attention, vision_use_head=False), tiny.images(3)
    model = kind(TOWERS[kind](**tiny.VISION, image_size=SIDE * PATCH)).eval()
    model.set_attn_implementation(attention)
    model.load_state_dict(siglip.state_dict())
    whole = torch.ones(3, SIDE, SIDE, dtype=torch.bool)
    with fk.patched(model, fk.FlowCut(8), record=True), fk.patched(siglip, fk.FlowCut(8), record=True):
        assert torch.equal(model(pixels, patch_attention_mask=whole)[0], siglip(pixels)[0])
        for stage, other in zip(fk.trace(model).stages, fk.trace(siglip).stages, strict=True):
            assert torch.equal(stage.indices, other.indices)
        whole[1, SIDE - 2 :] = False
        with pytest.raises(ValueError, match=r"attention_mask was passed .* only unmasked images are supported"):
            model(pixels, patch_attention_mask=whole)
