"""Policies: one file per method, decisions only, no model code."""

from .base import Policy
from .fastv import FastV
from .floors import AttentionTokens, RandomTokens, UniformTokens
from .flowcut import FlowCut
from .pyramiddrop import PyramidDrop
from .sparsevlm import SparseVLM
from .vflowopt import VFlowOpt
from .visionzip import VisionZip

__all__ = [
    "AttentionTokens",
    "FastV",
    "FlowCut",
    "Policy",
    "PyramidDrop",
    "RandomTokens",
    "SparseVLM",
    "UniformTokens",
    "VFlowOpt",
    "VisionZip",
]
