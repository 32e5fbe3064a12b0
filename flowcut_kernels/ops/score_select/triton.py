"""Triton form of `score_select`: one launch, one program per image (the body is `select_image`)."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..._ops import Select, any_tensor, select_outputs
from .._triton_common import Launch, cdiv, next_power_of_2, powers, select_image


@triton.jit(do_not_specialize=["tokens", "width", "budget"])
def _score_select(
    attention, relevance, value_norm, history, entropy, lengths, budgets, score, index, new_lengths,
    batch, tokens, width, weights, history_weight, score_weight, protect, budget, divisor, entropy_exponent,
    MODE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, BATCH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    select_image(
        tl.program_id(0).to(tl.int64), attention, relevance, value_norm, history, entropy, lengths, budgets, score,
        index, new_lengths, batch, tokens, width, weights, history_weight, score_weight, protect, budget, divisor,
        entropy_exponent, MODE, TILE, TILES, BATCH, GROUP,
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
    criteria_weights: Sequence[float] = (1.0, 1.0, 1.0),
    entropy_exponent: float = 2.0,
    budgets: Tensor | None = None,
    block: int = 1,
) -> Launch:
    """The launch of :func:`score_select`.

    Latency decides, not bandwidth (at most 16 bytes per token in, 12 out): up to 4,096 keys stay in registers, 8 per
    thread; longer rows are read again from L1 in tiles of 2,048. Few tile sizes, so that pruning compiles little.
    Powers of the norm take float64, which leaves registers for 4 keys per thread.
    """
    given = (attention, relevance, value_norm, history, entropy, lengths, budgets)
    criteria = [None if x is None else x.contiguous() for x in given]
    first = any_tensor(*criteria)
    batch, tokens = first.shape
    score, index, new_lengths = select_outputs(first, batch, tokens, mode, protect, block * budget)
    weights, entropy_exponent = powers(criteria_weights, entropy_exponent)
    tile = 1024 if tokens <= 1024 else 4096 if tokens <= 4096 and weights[2] is None else 2048
    if divisor == 0:
        criteria[4] = None  # the count is n - budget whatever the entropy
    return Launch(
        _score_select,
        (batch,),
        (*criteria, score, index, new_lengths, batch, tokens, index.shape[1],
         weights, history_weight, 1 - history_weight, protect, budget, divisor, entropy_exponent),
        dict(
            MODE=Select(mode).name, TILE=tile, TILES=cdiv(tokens, tile) or 1, BATCH=next_power_of_2(batch),
            GROUP=block, num_warps=4 if tile == 1024 else 16, enable_fp_fusion=False,
        ),
        first.device,
        [score, index, new_lengths],
    )  # fmt: skip


def score_select(*arguments, **options) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments, results and definition: ``reference.py``; float32 criteria, unit stride along the tokens."""
    score, index, new_lengths = prepare(*arguments, **options)()
    return score, index, new_lengths
