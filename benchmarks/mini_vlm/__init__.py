"""A tiny LLaVA trained on scenes of real handwritten digits: a stand-in where no large model can be downloaded."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"


def load(dtype=None):
    """The trained model in evaluation mode and its processor: (LlavaForConditionalGeneration, LlavaProcessor).

    dtype: of the weights, float32 unless given.
    """
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    model = LlavaForConditionalGeneration.from_pretrained(WEIGHTS, dtype=dtype or torch.float32)
    return model.eval(), LlavaProcessor.from_pretrained(WEIGHTS)


def questions(split: str = "dev", n: int = 200, seed: int = 0):
    """n questions (image, prompt, answer, kind, scene) about scenes of "train", "dev" or "test"; deterministic."""
    from .quiz import questions as draw

    return draw(split, n, seed)
