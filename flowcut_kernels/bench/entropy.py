"""How sharp the class token's attention is at each layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models import patched, trace
from ..policies import FlowCut


@torch.inference_mode()
def cls_entropy(model, pixels: Tensor) -> list[float]:
    """Mean CLS entropy / ln N of a LLaVA's unpruned tower at every layer that may be scored."""
    # A single cut at the last such layer: all layers before it are scored on all tokens.
    policy = FlowCut(target_tokens=1, interval=model.config.vision_config.num_hidden_layers)
    with patched(model, policy, record=True):
        model.get_image_features(pixels)
        return [float(x.mean()) for _, x in sorted(trace(model).entropy.items())]
