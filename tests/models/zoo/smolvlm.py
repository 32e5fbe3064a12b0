"""SmolVLM: Idefics3 with classes of its own; the frames of a video are images without tiles."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from unittest import mock

from transformers import (
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
    SmolVLMVisionConfig,
)
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from zoo import idefics3, without_videos

IMAGES = SmolVLMImageProcessorPil(**idefics3.TILING)


def processor() -> SmolVLMProcessor:
    with mock.patch.object(processing_smolvlm, "num2words", str):  # which it wants for videos
        return without_videos(SmolVLMProcessor, IMAGES, idefics3.words(), None, image_seq_len=idefics3.TOKENS)


FAMILY = replace(
    idefics3.FAMILY,
    name="smolvlm",
    processor=processor,
    model=partial(idefics3.build, SmolVLMConfig, SmolVLMVisionConfig, SmolVLMForConditionalGeneration),
    prompt=partial(idefics3.prompt, images=IMAGES),
)
