"""The registry of operator cases: inputs as models make them, opponents, bytes and FLOPs by formula, and a check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._library import choose_backend
from .._ops import Relevance, Select, ValueNorm
from ..ops import anchor_stats, gather_tokens, score_select
from . import plain
from .machine import cache_bytes
from .timing import Run

HEADS, DIM, HIDDEN = 16, 64, 1024  # CLIP-L


class Check(NamedTuple):
    """Largest error relative to the fp64 reference's largest value, and what is allowed."""

    ok: bool
    error: float = 0.0
    budget: float = 0.0
    detail: str = ""


@dataclass
class Case:
    """One row of the table."""

    op: str
    name: str
    dtype: torch.dtype
    backend: str
    ours: Run
    torch: Mapping[str, Run]  # forms of the same in torch; the fastest is the opponent
    check: Callable[[], Check]
    bytes: int
    flops: int
    wants_speedup: float | None = None
    wants_copy: float | None = None  # share of the copy bandwidth


def budgeted(ours: Sequence[Tensor], theirs: Sequence[Tensor], exact: Sequence[Tensor]) -> Check:
    """Error budget: twice the error that plain torch makes at the same precision, and at least two fp32 roundings."""
    worst = Check(True, 0.0, float("inf"))
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        scale = truth.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        error = ((mine.double() - truth).abs().max() / scale).item()
        budget = 2 * max(((other.double() - truth).abs().max() / scale).item(), torch.finfo(torch.float32).eps)
        if not error <= budget:  # NaN fails
            return Check(False, error, budget, f"error {error:.1e} exceeds {budget:.1e}")
        if error / budget >= worst.error / worst.budget:
            worst = Check(True, error, budget)
    return worst


KINDS = {
    "cosine": (Relevance.COSINE, ValueNorm.FULL),
    "softmax": (Relevance.SOFTMAX, ValueNorm.HEAD_MEAN),
}


class Anchor:
    """`anchor_stats`: the CLS token's view of N tokens.

    bytes = 2 B N H d size (K and V once) + B (3 N + 1) 4 (outputs)
    FLOPs = B N H d (2 for q.k + 2 for v.v + 2 for the squares or the head mean + 2 for the absolute sum)
    """

    def __init__(
        self, batch: int, tokens: int, kind: str, dtype: torch.dtype, device: torch.device, backend: str | None
    ) -> None:
        self.relevance, self.norm = KINDS[kind]
        self.backend = backend
        self.key, self.value = (self._projected(batch, tokens, dtype, device, seed) for seed in (1, 2))
        self.query = self._projected(batch, 1, dtype, device, 3)
        elements = batch * tokens * HEADS * DIM
        moved = 2 * elements * dtype.itemsize + 4 * batch * (3 * tokens + 1)
        self.case = Case(
            "anchor_stats",
            f"B={batch} N={tokens} {kind}",
            dtype,
            choose_backend("anchor_stats", backend, self.key),
            self.run,
            plain.stats_forms(self.query, self.key, self.value, self.relevance),
            self.check,
            bytes=moved,
            flops=8 * elements,
            wants_speedup=2.0,
            wants_copy=0.6 if moved > 2 * cache_bytes(device) else None,
        )

    @staticmethod
    def _projected(batch: int, tokens: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
        """A projection's output [B, N, H * d] seen as heads [B, H, N, d]: strided, as transformers passes it."""
        generator = torch.Generator(device).manual_seed(seed)
        flat = torch.randn(batch, tokens, HEADS * DIM, generator=generator, device=device).to(dtype)
        return flat.unflatten(-1, (HEADS, DIM)).transpose(1, 2)

    def run(self) -> tuple[Tensor, ...]:
        return self._stats(self.query, self.key, self.value, self.backend)

    def _stats(self, query: Tensor, key: Tensor, value: Tensor, backend: str | None) -> tuple[Tensor, ...]:
        options: dict[str, Any] = dict(protect=1, relevance=self.relevance, value_norm=self.norm, backend=backend)
        return anchor_stats(query, key, value, value[:, :, :1], **options)

    def check(self) -> Check:
        exact = self._stats(self.query.double(), self.key.double(), self.value.double(), "reference")
        theirs = plain.stats(self.query, self.key, self.value, plain.dots_matmul, self.relevance)
        ours, others, truth = ([x.flatten() for x in outputs] for outputs in (self.run(), theirs, exact))
        return budgeted(ours, others, truth)


class Cut:
    """A pruning layer: `score_select`, `gather_tokens` of hidden, its norm and history, and the two in a row.

    select: bytes = B N (16 read + 4 and 8 written: score, index), FLOPs = 8 B N (shares, fusion, history)
    gather: bytes = 2 B M (2 D size + 4) (read and written) + 8 B M (index), FLOPs = 0
    """

    def __init__(
        self,
        batch: int,
        tokens: int,
        budget: int,
        divisor: float,
        dtype: torch.dtype,
        device: torch.device,
        backend: str | None,
    ) -> None:
        generator = torch.Generator(device).manual_seed(4)

        def new(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=device)

        self.criteria = [new(batch, tokens) for _ in range(4)]  # attention, relevance, norm, history
        self.entropy = 0.8 + 0.01 * new(batch)
        self.rows = [new(batch, tokens, HIDDEN).to(dtype) for _ in range(2)] + [self.criteria[3]]
        self.budget, self.divisor, self.backend = budget, divisor, backend
        self.exact = self._select([x.double() for x in (*self.criteria, self.entropy)], "reference")
        self.width = width = int(self.exact[2][0])
        self.index = self.exact[1][:, :width].contiguous()
        name = f"B={batch} {tokens - 1}→{width - 1}"
        select_bytes, flops = 28 * batch * tokens, 8 * batch * tokens
        gather_bytes = 2 * batch * width * (2 * HIDDEN * dtype.itemsize + 4) + 8 * batch * width
        chosen = choose_backend("score_select", backend, self.criteria[0])
        gathers = choose_backend("gather_tokens", backend, self.rows[0])
        self.select_case = Case(
            "score_select", name, torch.float32, chosen, self.select, {"topk, sort, cat": self.plain_select},
            self.check_select, select_bytes, flops,
        )  # fmt: skip
        self.cases = [
            Case(
                "gather_tokens", name, dtype, gathers, self.gather,
                {"gather": self.plain_gather, "indexing": self.indexed_gather}, self.check_gather, gather_bytes, 0,
            ),
            Case(
                "select+gather", name, dtype, gathers, self.both,
                {"topk, sort, cat, gather": self.plain_both, "topk, sort, cat, indexing": self.indexed_both},
                self.check_both, select_bytes + gather_bytes, flops, wants_speedup=2.0,
            ),
        ]  # fmt: skip

    def _select(self, given: Sequence[Tensor], backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
        attention, relevance, norm, history, entropy = given
        return score_select(
            attention, relevance, norm, history=history, entropy=entropy, protect=1, mode=Select.ADAPTIVE_BATCH,
            budget=self.budget, divisor=self.divisor, backend=backend,
        )  # fmt: skip

    def select(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._select((*self.criteria, self.entropy), self.backend)

    def gather(self) -> list[Tensor]:
        return gather_tokens(self.rows, self.index, backend=self.backend)

    def both(self) -> list[Tensor]:
        return gather_tokens(self.rows, self.select()[1][:, : self.width], backend=self.backend)

    def plain_select(self) -> tuple[Tensor, Tensor]:
        return plain.select(self.criteria, self.entropy, self.budget, self.divisor)

    def plain_gather(self) -> list[Tensor]:
        return plain.gather(self.rows, self.index)

    def indexed_gather(self) -> list[Tensor]:
        return plain.gather_by_indexing(self.rows, self.index)

    def plain_both(self) -> list[Tensor]:
        return plain.gather(self.rows, self.plain_select()[1])

    def indexed_both(self) -> list[Tensor]:
        return plain.gather_by_indexing(self.rows, self.plain_select()[1])

    def check_select(self) -> Check:
        score, index, lengths = self.select()
        if not (torch.equal(index, self.exact[1]) and torch.equal(lengths, self.exact[2])):
            return Check(False, detail="kept tokens differ from the fp64 reference")
        return budgeted([score], [self.plain_select()[0]], [self.exact[0]])

    def check_gather(self) -> Check:
        return self._same(self.gather())

    def check_both(self) -> Check:
        return self._same(self.both())

    def _same(self, rows: list[Tensor]) -> Check:
        same = all(torch.equal(a, b) for a, b in zip(rows, self.plain_gather(), strict=True))
        return Check(same, detail="" if same else "gathered rows differ")


def cases(
    device: torch.device, dtypes: Sequence[torch.dtype], backend: str | None = None, toy: bool = False
) -> Iterator[Case]:
    """Every case of the table, built when its turn comes."""
    beyond = (16, 2305)  # K and V exceed the cache of most CPUs
    shapes = [(2, 37)] if toy else [(1, 577), (8, 577), (1, 2305), (8, 2305), beyond]
    for batch, tokens in shapes:
        for dtype in dtypes:
            for kind in KINDS:
                yield Anchor(batch, tokens, kind, dtype, device, backend).case
    cuts = [(2, 37, 8, 2.0)] if toy else [(b, *cut) for b in (1, 8) for cut in ((577, 64, 2.0), (300, 64, 0.0))]
    for batch, tokens, budget, divisor in cuts:
        for dtype in dtypes:
            cut = Cut(batch, tokens, budget, divisor, dtype, device, backend)
            if dtype == dtypes[0]:  # criteria are float32 whatever the model's dtype
                yield cut.select_case
            yield from cut.cases
