"""FastV (ECCV 2024, arXiv 2403.06764): from an early layer of the language model on, what its last token looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import DecoderView, Selection, is_whole
from .stages import DecoderPolicy, keep_most_attended


@dataclass(frozen=True, kw_only=True)
class FastV(DecoderPolicy):
    """Keep the visual tokens that the prompt's last token attends to in a layer of the language model.

    Layers 0..K - 1 see all tokens. Those of an image with the highest attention in layer K - 1 go on to layer K, of
    equals the first: the softmax of the last token's logits over all keys that it sees, mean over heads. They keep
    their positions. The choice is made inside layer K - 1, before its queries and its MLP are computed for what goes.

    The presets keep 166, 98 and 30 of LLaVA-1.5's 576 tokens: (2 * 576 + 30 * T) / 32 is 191.6, 127.9 and 64.1.

    Args:
        target_tokens, retain_ratio: what is kept of an image from layer K on, exactly one of them (see
            :class:`Policy`). :meth:`average_tokens` says what that is on average over the layers.
        layer: K, at least 1.
    """

    layer: int = 2

    presets: ClassVar = {192: dict(target_tokens=166), 128: dict(target_tokens=98), 64: dict(target_tokens=30)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.layer) or self.layer < 1:
            raise ValueError(f"FastV: layer={self.layer!r} must be a decoder layer, at least 1")

    def check_decoder(self, layers: int) -> None:
        if self.layer >= layers:
            raise ValueError(f"FastV: layer={self.layer} but the language model has {layers} layers")

    def decoder_step(self, layer: int, layers: int, tokens: int, left: int) -> int | None:
        return self.budget(tokens) if layer == self.layer - 1 else None

    def decoder_select(self, view: DecoderView) -> Selection:
        return keep_most_attended(view)

    def attention_anchors(self, enters: bool, samples: int, images: int, words: int) -> int:
        return samples
