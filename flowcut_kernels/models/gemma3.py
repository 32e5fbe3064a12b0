"""Gemma 3: a SigLIP tower read at its end, squares of patches that are averaged, image tokens that see each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Gemma3ForConditionalGeneration

from ..modules.encoder import PrunedEncoder
from ..policies.base import Policy
from ._bound import Bound, Replacement
from ._features import pruned_pass
from ._pooling import pooled
from ._vlm import vlm_replacements
from .clip import replace_siglip
from .llava import LlavaImages


class Gemma3:
    """Adapter of ``Gemma3ForConditionalGeneration``.

    A token is a square of patches. The budget counts for each image of a prompt, pan-and-scan crops among them: it is
    only the words around them that tell crops from further images, and which words those are knows the tokenizer.
    """

    model_class = Gemma3ForConditionalGeneration

    def replacements(
        self, model: Any, policy: Policy, *, record: bool, backend: str | None, compact_cache: bool
    ) -> tuple[PrunedEncoder, list[Replacement]]:
        inner, projector = model.model, model.model.multi_modal_projector
        side, rows = projector.kernel_size, projector.patches_per_image
        if rows % side:
            raise ValueError(
                f"mm_tokens_per_image={model.config.mm_tokens_per_image}: {rows} x {rows} patches are no whole squares "
                f"of {side} x {side}; only such are supported"
            )
        tokens = (rows // side) ** 2
        encoder, replacements = replace_siglip(model, policy, side, record=record, backend=backend)
        replacements.append((projector, "forward", PooledProjector(projector)))
        kinds = [LlavaImages(inner, model.config.image_token_id, tokens, leading=0, side=side)]
        replacements += vlm_replacements(
            model, kinds, policy, tokens, encoder, {}, backend=backend, compact_cache=compact_cache
        )
        return encoder, replacements


class PooledProjector(Bound):
    """Replacement ``forward`` of the projector, for the squares of patches that a pruned tower left."""

    method = "forward"

    def __call__(self, vision_outputs: Tensor) -> Tensor:
        known, projector = pruned_pass(), self.model
        if known is None:
            return self.original(vision_outputs)
        normed = projector.mm_soft_emb_norm(pooled(projector.avg_pool, vision_outputs, known))
        return torch.matmul(normed, projector.mm_input_projection_weight).type_as(vision_outputs)
