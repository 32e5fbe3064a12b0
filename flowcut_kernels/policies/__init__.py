"""Policies: one file per method, decisions only, no model code."""

from .base import Policy
from .floors import RandomTokens, UniformTokens
from .flowcut import FlowCut
from .vflowopt import VFlowOpt

__all__ = ["FlowCut", "Policy", "RandomTokens", "UniformTokens", "VFlowOpt"]
