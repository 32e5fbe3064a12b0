"""Idefics3 and SmolVLM: a SigLIP tower that takes masks, pixel shuffle; tiles have text between them."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
from transformers.models.idefics3 import modeling_idefics3
from transformers.models.smolvlm import modeling_smolvlm

from ..modules.encoder import PrunedEncoder
from ..policies.base import Policy
from ._bound import Replacement
from ._features import Layout
from ._shuffle import Runs, ShuffledImages, shuffled_replacements, words_of
from ._tower import Tower, edge
from .clip import vit_parts

IDEFICS3_VIT, SMOLVLM_VIT = (
    Tower(
        model_class=model_class,
        protect=0,
        feature_layer=-1,
        parts=partial(vit_parts, eager=eager),
        pixel_mean=IMAGENET_STANDARD_MEAN,
        pixel_std=IMAGENET_STANDARD_STD,
        hands_on=False,
    )
    for model_class, eager in (
        (modeling_idefics3.Idefics3VisionTransformer, modeling_idefics3.eager_attention_forward),
        (modeling_smolvlm.SmolVLMVisionTransformer, modeling_smolvlm.eager_attention_forward),
    )
)


class Idefics3:
    """Adapter of ``Idefics3ForConditionalGeneration`` and ``SmolVLMForConditionalGeneration``.

    Budgets count per image, over whose tiles and overview they are spread evenly; what is left of a tile stays behind
    the words that say where it lies. A prompt in the form of the processor's tells which tiles are an image. Written
    otherwise, each run of placeholders is an image, as are tiles whose features are made without a prompt
    (``get_image_features``). The frames of a video are images of one tile: budgets count per frame. Tokens that
    ``pixel_attention_mask`` hides go first.
    """

    def __init__(self, model_class: type, tower: Tower) -> None:
        self.model_class, self.tower = model_class, tower

    def replacements(
        self, model: Any, policy: Policy, *, record: bool, backend: str | None, compact_cache: bool
    ) -> tuple[PrunedEncoder, list[Replacement]]:
        inner, config = model.model, model.config
        patch = edge(config.vision_config.patch_size)
        kind = Idefics3Images(inner, config.image_token_id, config.scale_factor, patch)
        return shuffled_replacements(
            model, kind, self.tower, inner.vision_model, inner.connector.modality_projection, policy, {},
            record=record, backend=backend, compact_cache=compact_cache,
        )  # fmt: skip


class Idefics3Images(ShuffledImages):
    """Those of each row of a batch, which is filled up with tiles of zeros."""

    apart = True

    def images(self, pixels: Tensor, runs: Runs, columns: int, arguments: dict[str, Any]) -> list[list[int]]:
        rows = super().images(pixels, runs, columns, arguments)
        if any(count > 1 for row in rows for count in row):  # with no text between
            return rows
        return [_tiles_of_images(*row) for row in zip(words_of(arguments, columns), runs, strict=True)]

    def tiles(self, pixels: Tensor, arguments: dict[str, Any]) -> list[Layout]:
        if pixels.is_meta:
            raise ValueError("pixel_values on the meta device do not say which tiles are filling: give their values")
        real, mask = (pixels != 0).flatten(2).any(-1).cpu(), arguments.get("pixel_attention_mask")
        if not real.any():  # as the model has it
            real[:1, :1] = True
        mask = None if mask is None else mask[real.to(mask.device, non_blocking=True)]
        if mask is None or bool(mask.all()):
            return [self.tile(pixels)] * int(real.sum())
        return self.seen(pixels, mask)


def _tiles_of_images(words: list[int], runs: list[tuple[int, int]]) -> list[int]:
    """Tiles of the images of a row of a prompt, which the processor writes as

        mark place tile mark place tile newline ... mark place overview mark

    with words for places: <row_1_col_1> and on, <global-img>. Whatever the tokenizer makes of these, the mark is the
    word behind the row's last tile, and an image ends where two of them stand before the next tile: its own and that
    one's. A prompt of another form has images of one tile.
    """
    mark = words[runs[-1][1]] if runs and runs[-1][1] < len(words) else None
    texts = [words[end:start] for (_, end), (start, _) in pairwise([(0, 0), *runs])]  # in front of each tile
    if mark is None or not all(mark in text and text[-1] != mark for text in texts):
        return [1] * len(runs)
    ends = [i for i, text in enumerate(texts[1:]) if text.count(mark) > 1]
    return [end - start for start, end in pairwise([-1, *ends, len(runs) - 1])]


IDEFICS3 = Idefics3(modeling_idefics3.Idefics3ForConditionalGeneration, IDEFICS3_VIT)
SMOLVLM = Idefics3(modeling_smolvlm.SmolVLMForConditionalGeneration, SMOLVLM_VIT)
