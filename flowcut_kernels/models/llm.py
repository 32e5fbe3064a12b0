"""Language models (Llama, Mistral, Gemma, Qwen share their layers' layout) whose layers can drop visual tokens."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from ..modules.decoder import DecoderParts, PrunedDecoder, PrunedDecoderLayer, check_attention
from ..modules.packed_encoder import VisionEncoder
from ..policies.base import Policy
from ._bound import Replacement

# By name: the modules of families that nobody loaded stay unloaded. Class, its file, the beginning of the name of its
# norm if that scales by its weight alone.
FAMILIES = {
    "LlamaModel": ("llama", "Llama"),
    "GemmaModel": ("gemma", ""),  # whose norm adds 1 to its weight
    "MistralModel": ("mistral", "Mistral"),
    "Qwen2Model": ("qwen2", "Qwen2"),
    "Qwen3Model": ("qwen3", "Qwen3"),
    "Qwen2VLTextModel": ("qwen2_vl", "Qwen2VL"),
    "Qwen2_5_VLTextModel": ("qwen2_5_vl", "Qwen2_5_VL"),
    "Qwen3VLTextModel": ("qwen3_vl", "Qwen3VLText"),
}


def _parts(layer: Any, module: str, norm: str) -> DecoderParts:
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
        rms_norm=getattr(modeling, f"{norm}RMSNorm") if norm else None,
        q_norm=getattr(attention, "q_norm", None),
        k_norm=getattr(attention, "k_norm", None),
    )


def decoder_replacements(
    model: Any,
    policy: Policy,
    tokens: int,
    encoder: VisionEncoder,
    *,
    backend: str | None = None,
    compact_cache: bool = False,
    entrance: bool = False,
    leads: int = 0,
) -> tuple[PrunedDecoder | None, list[Replacement]]:
    """What makes a language model prune by `policy`; nothing where the policy leaves it alone.

    Args:
        tokens: of an image, the most where they differ.
        entrance: the prompt has columns for all tokens of an image: those that the encoder drops leave here.
        leads: class tokens that an image has at least beside its budget, and that stages cut too.

    Raises:
        ValueError: a language model that cannot be served, by class, sliding window or attention implementation.
    """
    count = len(model.layers)
    policy.check_decoder(count)
    left = (policy.feature_budget(tokens) or tokens) + leads
    steps = [ask(i, count, tokens, left) for i in range(count) for ask in (policy.decoder_entry, policy.decoder_step)]
    if not entrance and all(step is None or step >= left for step in steps):
        return None, []
    name, module = type(model).__name__, type(model).__module__
    file, norm = FAMILIES.get(name, ("", ""))
    if module != f"transformers.models.{file}.modeling_{file}":
        raise ValueError(
            f"{policy} drops tokens inside the language model, which must be one of {', '.join(FAMILIES)}; got "
            f"{module}.{name}: use FlowCut or VFlowOpt without llm_layer and llm_stages, which prune before it alone"
        )
    parts = partial(_parts, module=module, norm=norm)
    window = getattr(model.config, "sliding_window", None)
    if window is not None and set(getattr(model.config, "layer_types", None) or ["?"]) != {"full_attention"}:
        instead = "" if entrance else ", or use FlowCut or VFlowOpt without llm_layer and llm_stages"
        raise ValueError(
            f"text_config.sliding_window={window}: visual tokens cannot be dropped from layers that keep only recent "
            f"rows; load the model with None there{instead}"
        )
    check_attention(model)
    decoder = PrunedDecoder(model, policy, encoder, backend, compact_cache)
    layers: list[Replacement] = [
        (layer, "forward", PrunedDecoderLayer(layer, parts, i)) for i, layer in enumerate(model.layers)
    ]
    return decoder, [(model, "forward", decoder), *layers]
