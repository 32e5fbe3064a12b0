"""Visual-token pruning for vision-language models: fused scoring kernels, policies, one-line patching.

import flowcut_kernels as fk

model = fk.patch(model, fk.FlowCut(target_tokens=64))
out = model.generate(**processor(images=image, text=prompt, return_tensors="pt"), max_new_tokens=32)
fk.unpatch(model)
"""

from .analyze import Flow, analyze
from .cache import compact_kv_cache
from .calibrate import calibrate
from .cost import Cost, cost
from .models import patch, patched, supported_models, trace, unpatch
from .policies import (
    AttentionTokens,
    FastV,
    FlowCut,
    PyramidDrop,
    RandomTokens,
    SparseVLM,
    UniformTokens,
    VFlowOpt,
    VisionZip,
)
from .trace import Stage, Trace
from .tune import tune

__version__ = "0.1.0"

__all__ = [
    "AttentionTokens",
    "Cost",
    "FastV",
    "Flow",
    "FlowCut",
    "PyramidDrop",
    "RandomTokens",
    "SparseVLM",
    "Stage",
    "Trace",
    "UniformTokens",
    "VFlowOpt",
    "VisionZip",
    "analyze",
    "calibrate",
    "compact_kv_cache",
    "cost",
    "patch",
    "patched",
    "supported_models",
    "trace",
    "tune",
    "unpatch",
]
