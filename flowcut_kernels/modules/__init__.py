"""Stateless replacement blocks for the layers of Hugging Face models."""

from .encoder import PrunedEncoder, PrunedEncoderLayer, SkippedEncoderLayer

__all__ = ["PrunedEncoder", "PrunedEncoderLayer", "SkippedEncoderLayer"]
