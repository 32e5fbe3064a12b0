"""Language models (Llama, Qwen2, Mistral share their layers' layout) whose layers can drop visual tokens."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from ..modules.decoder import DecoderParts, PrunedDecoder, PrunedDecoderLayer
from ..modules.encoder import PrunedEncoder
from ..policies.base import Policy
from ._bound import Replacement

FAMILIES = ("Llama", "Qwen2", "Mistral")


def _parts(layer: Any, module: str, family: str) -> DecoderParts:
    attention, modeling = layer.self_attn, sys.modules[module]
    return DecoderParts(
        norm1=layer.input_layernorm,
        attention=attention,
        q_proj=attention.q_proj,
        k_proj=attention.k_proj,
        v_proj=attention.v_proj,
        out_proj=attention.o_proj,
        norm2=layer.post_attention_layernorm,
        mlp=layer.mlp,
        eager=modeling.eager_attention_forward,
        rotate=modeling.apply_rotary_pos_emb,
        rms_norm=getattr(modeling, f"{family}RMSNorm"),
    )


def decoder_replacements(
    model: Any,
    policy: Policy,
    tokens: int,
    encoder: PrunedEncoder,
    *,
    backend: str | None = None,
    compact_cache: bool = False,
) -> tuple[PrunedDecoder | None, list[Replacement]]:
    """What makes a language model prune by `policy`; nothing where the policy leaves it alone.

    Raises:
        ValueError: a language model that cannot be served, by class, sliding window or attention implementation.
    """
    count = len(model.layers)
    policy.check_decoder(count)
    left = policy.feature_budget(tokens) or tokens
    steps = [policy.decoder_step(i, count, tokens, left) for i in range(count)]
    if all(step is None or step >= left for step in steps):
        return None, []
    # By name: the modules of families that nobody loaded stay unloaded.
    family, module = type(model).__name__.removesuffix("Model"), type(model).__module__
    if family not in FAMILIES or module != f"transformers.models.{family.lower()}.modeling_{family.lower()}":
        raise ValueError(
            f"{policy} prunes inside the language model, which must be one of "
            f"{', '.join(f'{name}Model' for name in FAMILIES)}; got {module}.{type(model).__name__}"
        )
    parts = partial(_parts, module=module, family=family)
    window = getattr(model.config, "sliding_window", None)
    if window is not None:
        raise ValueError(
            f"text_config.sliding_window={window}: visual tokens cannot be dropped from layers that keep only recent "
            "rows; set it to None, or prune before the language model alone (llm_layer=None, llm_stages=())"
        )
    if model.config._attn_implementation == "flex_attention":
        raise ValueError("attn_implementation='flex_attention' has masks that cannot be cut: use 'sdpa' or 'eager'")
    decoder = PrunedDecoder(model, policy, encoder, backend, compact_cache)
    layers: list[Replacement] = [
        (layer, "forward", PrunedDecoderLayer(layer, parts, i)) for i, layer in enumerate(model.layers)
    ]
    return decoder, [(model, "forward", decoder), *layers]
