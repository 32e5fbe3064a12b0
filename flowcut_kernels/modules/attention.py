"""Attention modules of Hugging Face vision encoders on `attention_with_stats`, with or without its statistics.

    layer.self_attn = FusedClipAttention(layer.self_attn)

Each is made from a stock module and is that module in all but ``forward``: the same attributes, the very same
sub-modules, parameters and hooks, the same state dict. Assigning the old module back undoes it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.siglip.modeling_siglip import SiglipAttention

from .._ops import Relevance, ValueNorm, accumulate_dtype
from ..ops import attention_with_stats

Statistics = tuple[Tensor, ...]  # attention, relevance, value norm, entropy


class _FusedAttention(nn.Module):
    """What the fused modules share: construction from a stock module, and when to leave a call to its forward."""

    # By name, so that no model family is imported for the sake of this check.
    serves: tuple[str, ...]
    stock: Any  # the class whose forward is the fallback
    config: Any

    def __init__(self, attention: nn.Module) -> None:
        stock = type(attention)
        if f"{stock.__module__}.{stock.__qualname__}" not in self.serves:
            names = " or ".join(name.rpartition(".")[2] for name in self.serves)
            raise TypeError(f"{type(self).__name__} is made from a {names} of transformers, got {stock.__name__}")
        if "forward" in vars(attention):
            raise ValueError(
                f"{type(self).__name__}: the {stock.__name__} has a forward of its own (fk.patch or another "
                "library's hook), which would be lost; remove that first"
            )
        # Not the stock class's: it would make new weights.
        nn.Module.__init__(self)
        vars(self).update(vars(attention))
        self.stock = stock

    def _leaves(self, hidden_states: Tensor, dropout: float, options: dict[str, Any]) -> bool:
        """Whether the kernel does not serve the call."""
        asked = any(options.get(name) for name in ("is_causal", "output_attentions"))
        recorded = torch.is_grad_enabled() and (
            hidden_states.requires_grad or any(parameter.requires_grad for parameter in self.parameters())
        )
        return options.get("attention_mask") is not None or asked or recorded or (self.training and dropout > 0)


class _FusedEncoderAttention(_FusedAttention):
    """What CLIP's and SigLIP's attention have in common."""

    protect = 0
    dropout: Any
    scale: Any
    head_dim: Any
    q_proj: Any
    k_proj: Any
    v_proj: Any
    out_proj: Any

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        options = dict(kwargs, attention_mask=attention_mask)
        if self.config._attn_implementation == "eager" or self._leaves(hidden_states, self.dropout, options):
            return self.stock.forward(self, hidden_states, attention_mask, **kwargs)
        output, *_ = attention_with_stats(*self._project(hidden_states), scale=self.scale)
        return self.out_proj(output.flatten(2)), None

    def with_stats(
        self, hidden_states: Tensor, *, relevance: Relevance = Relevance.COSINE, value_norm: ValueNorm = ValueNorm.FULL
    ) -> tuple[Tensor, Statistics]:
        """The output [B, N, C] and the anchor's (attention, relevance, value norm, entropy) of `anchor_stats`.

        The anchor is the class token (CLIP) or the mean token (SigLIP). No mask, no dropout; differentiable.
        """
        query, key, value = self._project(hidden_states)
        output, *statistics = attention_with_stats(
            query, key, value, self._anchor(query), self._anchor(value),
            scale=self.scale, protect=self.protect, relevance=relevance, value_norm=value_norm,
        )  # fmt: skip
        return self.out_proj(output.flatten(2)), tuple(statistics)

    def _project(self, hidden_states: Tensor) -> list[Tensor]:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return [p(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections]

    def _anchor(self, x: Tensor) -> Tensor:
        return x.mean(2, keepdim=True, dtype=accumulate_dtype(x.dtype)).to(x.dtype)


class FusedClipAttention(_FusedEncoderAttention, CLIPAttention):
    """Drop-in for ``CLIPAttention``, [B, N, C] -> ([B, N, C], None); the anchor is the class token.

    The stock forward runs where the kernel does not serve: a mask, causal attention (CLIP's text tower),
    ``output_attentions`` or the "eager" implementation (both return the attention map), dropout in training, autograd.

    Args:
        attention: the module to replace, whose weights, hooks and state dict this one has. Heads of up to 128.

    Raises:
        TypeError: another class than ``CLIPAttention``.
        ValueError: a module with a forward of its own, which would be lost.
    """

    serves = ("transformers.models.clip.modeling_clip.CLIPAttention",)
    protect = 1

    def _anchor(self, x: Tensor) -> Tensor:
        return x[:, :, :1]


class FusedSiglipAttention(_FusedEncoderAttention, SiglipAttention):
    """Drop-in for ``SiglipAttention``; as :class:`FusedClipAttention`, but the anchor is the mean token."""

    serves = ("transformers.models.siglip.modeling_siglip.SiglipAttention",)


class FusedQwen2VLVisionAttention(_FusedAttention):
    """Drop-in for the vision attention of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: packed [T, C] -> [T, C].

    Segments (images, frames or windows) attend within themselves by ``cu_seqlens`` [S + 1], in one launch where stock
    SDPA loops over them. Where ``max_seqlen`` is not given, more than one segment costs one read-back from the device
    (stock SDPA: the same); give it for CUDA graphs and fullgraph compilation. The stock forward runs where the kernel
    does not serve: a mask, ``output_attentions``, dropout in training, autograd. Arguments and errors:
    :class:`FusedClipAttention`.
    """

    serves = (
        "transformers.models.qwen2_vl.modeling_qwen2_vl.VisionAttention",
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLVisionAttention",
        "transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionAttention",
    )
    attention_dropout: float
    scaling: float
    num_heads: int
    qkv: nn.Module
    proj: nn.Module

    def __init__(self, attention: nn.Module) -> None:
        super().__init__(attention)
        self.rotate = sys.modules[self.stock.__module__].apply_rotary_pos_emb_vision

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if position_embeddings is None or self._leaves(hidden_states, self.attention_dropout, kwargs):
            return self.stock.forward(self, hidden_states, cu_seqlens, position_embeddings, max_seqlen, **kwargs)
        return self._attend(self._project(hidden_states, position_embeddings), cu_seqlens, max_seqlen)[0]

    def with_stats(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        max_seqlen: int | None = None,
        *,
        relevance: Relevance = Relevance.COSINE,
        value_norm: ValueNorm = ValueNorm.FULL,
    ) -> tuple[Tensor, Statistics]:
        """The output [T, C] and each segment's statistics [S, 1, max_seqlen] etc. of `attention_with_stats`.

        The anchor of a segment is its mean query (after RoPE) and mean value. No mask, no dropout.
        """
        heads = self._project(hidden_states, position_embeddings)
        anchors = [self._anchor(x, cu_seqlens.diff()) for x in (heads[0], heads[2])]
        return self._attend(heads, cu_seqlens, max_seqlen, anchors, relevance=relevance, value_norm=value_norm)

    @staticmethod
    def _anchor(x: Tensor, lengths: Tensor) -> Tensor:
        rows = x[0].transpose(0, 1).to(accumulate_dtype(x.dtype))
        # `unsafe` skips a check of the lengths that would wait for the device.
        return torch.segment_reduce(rows, "mean", lengths=lengths, axis=0, unsafe=True).to(x.dtype)[:, :, None]

    def _project(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> list[Tensor]:
        query, key, value = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        query, key = self.rotate(query, key, *position_embeddings)
        return [x.transpose(0, 1)[None] for x in (query, key, value)]

    def _attend(
        self, heads: list[Tensor], cu_seqlens: Tensor, max_seqlen: int | None, anchors: Any = (), **options: Any
    ) -> tuple[Tensor, Statistics]:
        if max_seqlen is None:
            one = cu_seqlens.shape[0] == 2
            max_seqlen = heads[0].shape[2] if one else int(cu_seqlens.diff().max())
        output, *statistics = attention_with_stats(
            *heads, *anchors, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, scale=self.scaling, **options
        )
        return self.proj(output[0].flatten(1)), tuple(statistics)
