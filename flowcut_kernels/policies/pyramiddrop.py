"""PyramidDrop (CVPR 2025, arXiv 2410.17247): the deeper in the language model, the fewer visual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from .base import DecoderView, Selection, is_whole
from .stages import DecoderPolicy, keep_most_attended


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(DecoderPolicy):
    """Drop visual tokens before some layers of the language model, the same share before each.

    Before the i-th of m `layers`, round(N * (T / N)^(i / m)) of an image's N tokens stay: those with the highest
    attention of the prompt's last token, of equals the first. That is the softmax of its logits over all keys that it
    sees, mean over heads, with the projections of the layer to come. Dropped tokens are not among that layer's keys
    either. The rest keep their positions. For the choice the layer's keys are made of all tokens, and once more of the
    rest when it runs; nothing else of the layer is.

    The published setting is about 270 of LLaVA-1.5's 576 tokens on average: 8 * (576 + 288 + 144 + 72) / 32. For the
    other presets, at which PyramidDrop is compared elsewhere, nobody has published settings. Eight layers of all tokens
    are 144 already, so that 128 and 64 begin earlier:

    - 192: 8 * (576 + 144 + 36 + 9) / 32 = 191.2
    - 128: (4 * 576 + 4 * 202 + 8 * 71 + 16 * 25) / 32 = 127.5, before layers 4, 8 and 16
    - 64: (2 * 576 + 2 * 171 + 4 * 51 + 24 * 15) / 32 = 64.3, before layers 2, 4 and 8

    Args:
        target_tokens, retain_ratio: what is left of an image in the end, T, exactly one of them (see :class:`Policy`).
            The published setting is a retain_ratio of 1/8 in three stages, each of which halves.
        layers: rising decoder layers, counted from 0 and at least 1. The published ones are a quarter, half and three
            quarters of LLaVA-1.5's 32.
    """

    layers: tuple[int, ...] = (8, 16, 24)

    presets: ClassVar = {
        270: dict(target_tokens=72),
        192: dict(target_tokens=9),
        128: dict(target_tokens=25, layers=(4, 8, 16)),
        64: dict(target_tokens=15, layers=(2, 4, 8)),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = tuple(self.layers) if isinstance(self.layers, (tuple, list)) else ()
        rising = all(is_whole(layer) for layer in layers) and all(a < b for a, b in pairwise((0, *layers)))
        if not layers or not rising:
            raise ValueError(f"PyramidDrop: layers={self.layers!r} must be rising decoder layers, at least 1")
        object.__setattr__(self, "layers", layers)

    def check_decoder(self, layers: int) -> None:
        if self.layers[-1] >= layers:
            raise ValueError(
                f"PyramidDrop: layers={self.layers} names layer {self.layers[-1]}, but the language model has {layers}"
            )

    def decoder_entry(self, layer: int, layers: int, tokens: int, left: int) -> int | None:
        if layer not in self.layers:
            return None
        stage, last = self.layers.index(layer) + 1, self.budget(tokens)
        return max(round(tokens * (last / tokens) ** (stage / len(self.layers))), last)

    def entry_select(self, view: DecoderView) -> Selection:
        return keep_most_attended(view)

    def attention_anchors(self, enters: bool, samples: int, images: int, words: int) -> int:
        return samples
