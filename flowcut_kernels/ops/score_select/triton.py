"""Triton form of `score_select`: one launch, one program per image (the body is `select_image`)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..._ops import any_tensor, select_outputs
from .._triton_common import Launch, select_image


@triton.jit(do_not_specialize=["tokens", "width", "budget"])
def _score_select(
    attention, relevance, value_norm, history, entropy, lengths, score, index, new_lengths,
    batch, tokens, width, history_weight, score_weight, protect, budget, divisor,
    MODE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    select_image(
        tl.program_id(0).to(tl.int64), attention, relevance, value_norm, history, entropy, lengths, score, index,
        new_lengths, batch, tokens, width, history_weight, score_weight, protect, budget, divisor,
        MODE, TILE, TILES, BATCH,
    )  # fmt: skip


def prepare(
    attention: Tensor | None,
    relevance: Tensor | None,
    value_norm: Tensor | None,
    history: Tensor | None,
    entropy: Tensor | None,
    lengths: Tensor | None,
    *,
    history_weight: float,
    protect: int,
    mode: int,
    budget: int,
    divisor: float,
) -> Launch:
    """The launch of :func:`score_select`.

    Latency decides, not bandwidth (at most 16 bytes per token in, 12 out): up to 4,096 keys stay in registers, 8 per
    thread; longer rows are read again from L1 in tiles of 4,096. Two tile sizes only, so that pruning compiles little.
    """
    given = (attention, relevance, value_norm, history, entropy, lengths)
    criteria = [None if x is None else x.contiguous() for x in given]
    first = any_tensor(*criteria)
    batch, tokens = first.shape
    tile = 1024 if tokens <= 1024 else 4096
    score, index, new_lengths = select_outputs(first, batch, tokens, mode, protect, budget)
    if divisor == 0:
        criteria[4] = None  # the count is n - budget whatever the entropy
    return Launch(
        _score_select,
        (batch,),
        (*criteria, score, index, new_lengths, batch, tokens, index.shape[1],
         history_weight, 1 - history_weight, protect, budget, divisor),
        dict(
            MODE=mode, TILE=tile, TILES=triton.cdiv(tokens, tile) or 1, BATCH=triton.next_power_of_2(batch),
            num_warps=tile // 256, enable_fp_fusion=False,
        ),
        first.device,
        [score, index, new_lengths],
    )  # fmt: skip


def score_select(*arguments, **options) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments, results and definition: ``reference.py``; float32 criteria, unit stride along the tokens."""
    score, index, new_lengths = prepare(*arguments, **options)()
    return score, index, new_lengths
