"""SparseVLM (ICML 2025, arXiv 2410.04417): words of the question rate the visual tokens, and what goes is clustered."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from .._ops import Select, accumulate_dtype
from ..ops import gather_tokens, score_select
from .base import DecoderView, PromptView, Selection, is_number, is_whole
from .recycling import constant, means_into
from .stages import DecoderPolicy, keep_most_attended


@dataclass(frozen=True, kw_only=True)
class SparseVLM(DecoderPolicy):
    """Keep the visual tokens that the relevant words attend to, and merge the best of the others, layer after layer.

    Raters of an image are words behind it: with V its features and w_t the embeddings as they enter the language model,
    m_t = mean_v softmax_t(V w_t) over these words, and t rates if m_t exceeds the mean of m; if none does, the prompt's
    last token rates. At each of `layers` the k tokens of highest mean attention stay, over heads and raters, of equals
    the first. Of the n others the int(0.3 n) + 1 = n' best go through the layer too, and its output is then clustered
    around g = int(n' / 10) + 1 of them (density peaks): with d_ij = |x_i - x_j| / sqrt(D) and rho_i = exp(-mean d^2 to
    the g nearest, itself included), the centres have the g largest rho_i * min {d_ij: rho_j > rho_i} (max d where there
    is no such j), every other token belongs to the nearest centre, and a cluster becomes its mean.

    A cluster stands in its centre's place and has its position; the published code puts clusters behind the other
    tokens, numbers positions anew and adds noise to rho.

    The presets are the published settings for LLaVA-1.5. Their true averages are higher than what they are called:
    layers 0 to 2 have all tokens, and clusters add to what is kept.

    - 192: (3 * 576 + 4 * (300 + 9) + 9 * (200 + 4) + 16 * (110 + 3)) / 32 = 206.5
    - 128: (3 * 576 + 4 * (303 + 9) + 9 * (110 + 7) + 16 * (36 + 3)) / 32 = 145.4
    - 64: (3 * 576 + 4 * (66 + 16) + 9 * (30 + 2) + 16 * (17 + 1)) / 32 = 82.2

    Args:
        target_tokens, retain_ratio: k at the last of `layers`, exactly one of them (see :class:`Policy`). Clusters come
            on top: :meth:`average_tokens` counts them.
        layers: rising decoder layers, counted from 0, none of them the last.
        surplus: k at the earlier ones as multiples of the last, not rising and at least 1.
    """

    layers: tuple[int, ...] = (2, 6, 15)
    surplus: tuple[float, ...] = (300 / 110, 200 / 110)

    presets: ClassVar = {
        192: dict(target_tokens=110),
        128: dict(target_tokens=36, surplus=(303 / 36, 110 / 36)),
        64: dict(target_tokens=17, surplus=(66 / 17, 30 / 17)),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = tuple(self.layers) if isinstance(self.layers, (tuple, list)) else ()
        if not layers or not all(map(is_whole, layers)) or any(b <= a for a, b in pairwise((-1, *layers))):
            raise ValueError(f"SparseVLM: layers={self.layers!r} must be rising decoder layers, counted from 0")
        surplus = tuple(self.surplus) if isinstance(self.surplus, (tuple, list)) else (None,)
        if not all(map(is_number, surplus)) or any(b > a for a, b in pairwise((*surplus, 1))):
            raise ValueError(f"SparseVLM: surplus={self.surplus!r} must be numbers that do not rise, at least 1")
        if len(surplus) != len(layers) - 1:
            raise ValueError(f"SparseVLM: surplus={surplus} must be a number for each of layers={layers} but the last")
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "surplus", surplus)

    def check_decoder(self, layers: int) -> None:
        if self.layers[-1] + 1 >= layers:
            raise ValueError(
                f"SparseVLM: layers={self.layers} must end before the last of the language model's {layers} layers"
            )

    def _kept(self, layer: int, tokens: int) -> int | None:
        """k at a layer."""
        if layer not in self.layers:
            return None
        return min(round((*self.surplus, 1)[self.layers.index(layer)] * self.budget(tokens)), tokens)

    def decoder_step(self, layer: int, layers: int, tokens: int, left: int) -> int | None:
        kept = self._kept(layer, tokens)
        return None if kept is None or kept >= left else kept + int(0.3 * (left - kept)) + 1

    def decoder_entry(self, layer: int, layers: int, tokens: int, left: int) -> int | None:
        kept = self._kept(layer - 1, tokens)
        return None if kept is None or kept >= left else kept + clusters(left - kept)

    def decoder_raters(self, prompt: PromptView) -> Tensor:
        column = torch.arange(prompt.embeds.shape[1], device=prompt.columns.device)
        words = (prompt.words()[prompt.samples] & (column > prompt.columns.amax(1, keepdim=True))).long()
        order = words.argsort(dim=1, descending=True, stable=True)[:, : prompt.most]
        absent = words.gather(1, order) == 0
        dtype, samples = accumulate_dtype(prompt.embeds.dtype), prompt.samples[:, None]
        features = prompt.embeds[samples, prompt.columns.clamp_min(0)].to(dtype)
        relevance = features @ prompt.embeds[samples, order].to(dtype).transpose(1, 2)
        relevance = relevance.masked_fill(absent[:, None], float("-inf")).softmax(-1)
        relevance = relevance.masked_fill((prompt.columns < 0)[..., None], 0).sum(1)
        relevance = relevance.masked_fill(absent, 0)  # of an image without words it is NaN
        rates = ~absent & (relevance > relevance.sum(1, keepdim=True) / (~absent).sum(1, keepdim=True).clamp_min(1))
        raters = order.masked_fill(~rates, -1)
        raters[:, 0] = torch.where(rates.any(1), raters[:, 0], prompt.last[prompt.samples])
        return raters

    def decoder_select(self, view: DecoderView) -> Selection:
        return keep_most_attended(view)

    def entry_select(self, view: DecoderView) -> Selection:
        assert view.scores is not None
        scores, device, lengths = view.scores, view.scores.device, view.lengths
        best = [self._kept(view.layer - 1, full) or full for full in view.full]
        best = [min(k, n) for k, n in zip(best, lengths, strict=True)]
        made = [budget - k for budget, k in zip(view.budgets, best, strict=True)]
        ends, kept = constant(tuple(lengths), device), constant(tuple(best), device)
        _, index, finite = score_select(
            scores, lengths=ends, mode=Select.FIXED, budget=max(best), budgets=kept.int(),
            backend=view.backend,
        )  # fmt: skip
        place = torch.arange(scores.shape[1], device=device)
        # One more place, for those of `index` that hold none.
        stays = torch.nn.functional.pad(torch.zeros_like(scores, dtype=torch.bool), (0, 1))
        stays = stays.scatter(1, torch.where(index < 0, len(place), index), True)[:, :-1]
        rest = (place < ends[:, None]) & ~stays
        most = max(n - k for n, k in zip(lengths, best, strict=True))
        order = (~rest).long().argsort(dim=1, stable=True)[:, :most]
        live = rest.gather(1, order)
        points = view.hidden()
        points = points.gather(1, order[..., None].expand(-1, -1, points.shape[2]))
        centre, nearest = density_peaks(points, live, made)
        centres = torch.zeros_like(stays).scatter(1, order, centre & live)
        left = stays | centres
        width = max(view.budgets)
        row = (~left).long().argsort(dim=1, stable=True)[:, :width]
        absent = ~left.gather(1, row)
        target = (left.cumsum(1) - 1).gather(1, order.gather(1, nearest))
        into = order.new_full(scores.shape, -1).scatter(1, order, torch.where(live, target, -1))
        count = constant(tuple(view.budgets), device, torch.int32)
        return Selection(
            row.masked_fill(absent, -1),
            torch.where(finite < 0, -1, count),
            scores,
            merge=partial(_means, row=row.masked_fill(absent, -1), into=into, backend=view.backend),
            merged=centres.gather(1, row),
        )

    def attention_anchors(self, enters: bool, samples: int, images: int, words: int) -> int:
        return 0 if enters else images * words  # those that do not rate are left out afterwards

    def prompt_scoring_flops(self, tokens: int, words: int, hidden: int) -> int:
        return 2 * tokens * words * hidden


def clusters(tokens: int) -> int:
    """How many clusters so many tokens become."""
    return int(tokens / 10) + 1


def density_peaks(points: Tensor, live: Tensor, clusters: list[int]) -> tuple[Tensor, Tensor]:
    """Cluster the `live` [I, n] of `points` [I, n, D]: bool [I, n] centres, and int64 [I, n] the centre of each point.

    Density peaks with nearest neighbours (Du et al. 2016), from all n x n distances; the formulas are in
    :class:`SparseVLM`, by which n is at most 0.3 of an image's tokens and one.
    """
    device = points.device
    count, most = constant(tuple(clusters), device)[:, None], max(max(clusters), 1)
    points = points.to(accumulate_dtype(points.dtype))
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") / points.shape[2] ** 0.5
    pair = live[:, :, None] & live[:, None]
    near = distance.masked_fill(~pair, float("inf")).topk(min(most, points.shape[1]), dim=2, largest=False).values
    used = torch.arange(near.shape[2], device=device) < count
    density = (-near.square().masked_fill(~used[:, None], 0).sum(2) / count.clamp_min(1)).exp()
    farthest = distance.masked_fill(~pair, 0).amax((1, 2))[:, None, None]
    denser = pair & (density[:, None] > density[:, :, None])
    rank = density * torch.where(denser, distance, farthest).amin(2)
    rank = rank.masked_fill(~live, float("-inf"))
    order = rank.argsort(dim=1, descending=True, stable=True)[:, :most]
    centre = torch.zeros_like(live).scatter(1, order, used[:, : order.shape[1]].expand(len(live), -1))
    nearest = distance.masked_fill(~centre[:, None], float("inf")).argmin(2)
    itself = torch.arange(live.shape[1], device=device)
    return centre, torch.where(centre, itself, nearest)


def _means(rows: Tensor, *, row: Tensor, into: Tensor, backend: str | None) -> Tensor:
    """Rows `row` [I, K] of [I, n, D], -1 for none, those that others go `into` [I, n] replaced by their mean."""
    (kept,) = gather_tokens([rows], row, backend=backend)
    means, several = means_into(rows, into, row.shape[1], backend)
    return torch.where(several[..., None], means, kept)
