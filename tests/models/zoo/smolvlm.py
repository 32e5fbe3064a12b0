"""SmolVLM: Idefics3 with classes of its own; the frames of a video are images without tiles."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from transformers import (
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMVisionConfig,
)
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from zoo import idefics3

FAMILY = replace(
    idefics3.FAMILY,
    name="smolvlm",
    processor=None,
    model=partial(idefics3.build, SmolVLMConfig, SmolVLMVisionConfig, SmolVLMForConditionalGeneration),
    prompt=partial(idefics3.prompt, images=SmolVLMImageProcessorPil(**idefics3.TILING)),
)
