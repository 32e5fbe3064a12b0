"""Replacement blocks for the layers of Hugging Face models: they own no weights."""

from .attention import FusedClipAttention, FusedQwen2VLVisionAttention, FusedSiglipAttention
from .encoder import PrunedEncoder, PrunedEncoderLayer, SkippedEncoderLayer

__all__ = [
    "FusedClipAttention",
    "FusedQwen2VLVisionAttention",
    "FusedSiglipAttention",
    "PrunedEncoder",
    "PrunedEncoderLayer",
    "SkippedEncoderLayer",
]
