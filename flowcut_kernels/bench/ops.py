"""The operators' table: cases, opponents in vectorised torch, bytes and FLOPs by formula, a check before timing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._library import choose_backend
from .._ops import Relevance, Select, ValueNorm
from ..ops import anchor_stats, gather_tokens, score_select
from .machine import cache_bytes
from .plain import stats_forms
from .report import Section
from .timing import Clock, Run, Samples, copy_bandwidth, interleave

HEADS, DIM, HIDDEN = 16, 64, 1024  # CLIP-L
Tick = Callable[..., object]


class Check(NamedTuple):
    """Largest error relative to the fp64 reference's largest value, and what is allowed."""

    ok: bool
    error: float
    budget: float
    detail: str = ""


@dataclass
class Case:
    """One row of the table."""

    op: str
    name: str
    dtype: torch.dtype
    backend: str
    ours: Run
    torch: dict[str, Run]  # forms of the same in vectorised torch; the fastest is the opponent
    check: Callable[[], Check]
    bytes: int
    flops: int
    wants_speedup: float | None = None
    wants_copy: float | None = None  # share of the copy bandwidth, where the data exceeds cache


def budgeted(ours: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> Check:
    """Error budget: twice the error that plain torch makes at the same precision, and at least two fp32 roundings."""
    worst = Check(True, 0.0, float("inf"))
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        scale = truth.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        error = ((mine.double() - truth).abs().max() / scale).item()
        budget = 2 * max(((theirs.double() - truth).abs().max() / scale).item(), torch.finfo(torch.float32).eps)
        if not error <= budget:  # NaN fails
            return Check(False, error, budget, f"error {error:.1e} exceeds {budget:.1e}")
        if error / budget >= worst.error / worst.budget:
            worst = Check(True, error, budget)
    return worst


def projected(batch: int, tokens: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """A projection's output [B, N, H * d] seen as heads, [B, H, N, d]: strided, as transformers passes it."""
    generator = torch.Generator(device).manual_seed(seed)
    flat = torch.randn(batch, tokens, HEADS * DIM, generator=generator, device=device, dtype=torch.float32).to(dtype)
    return flat.unflatten(-1, (HEADS, DIM)).transpose(1, 2)


def anchor_cases(shapes: list[tuple[int, int]], dtypes, device, backend) -> Iterator[Case]:
    """`anchor_stats`: the CLS token's view of N tokens.

    bytes = 2 B N H d size (K and V once) + B (3 N + 1) 4 (outputs)
    FLOPs = B N H d (2 for q.k + 2 for v.v + 2 for the squares or the head mean + 2 for the absolute sum)
    """
    kinds = {
        "cosine": (Relevance.COSINE, ValueNorm.FULL),
        "softmax": (Relevance.SOFTMAX, ValueNorm.HEAD_MEAN),
    }
    for batch, tokens in shapes:
        for dtype in dtypes:
            key, value = (projected(batch, tokens, dtype, device, seed) for seed in (1, 2))
            query = projected(batch, 1, dtype, device, 3)
            elements = batch * tokens * HEADS * DIM
            moved = 2 * elements * dtype.itemsize + 4 * batch * (3 * tokens + 1)
            for label, (relevance, norm) in kinds.items():

                def ours(backend=backend, precise=False, relevance=relevance, norm=norm, q=query, k=key, v=value):
                    q, k, v = (x.double() if precise else x for x in (q, k, v))
                    return anchor_stats(
                        q, k, v, v[:, :, :1], protect=1, relevance=relevance, value_norm=norm, backend=backend
                    )

                plain = stats_forms(query, key, value, relevance)

                def check(ours=ours, plain=plain) -> Check:
                    mine, exact = ours(), ours("reference", True)
                    theirs = plain["matmul"]()
                    return budgeted(*([x.flatten() for x in outputs] for outputs in (mine, theirs, exact)))

                yield Case(
                    "anchor_stats", f"B={batch} N={tokens} {label}", dtype,
                    choose_backend("anchor_stats", backend, key), ours, plain, check, moved, 8 * elements, 2.0,
                    0.6 if moved > 2 * cache_bytes(device) else None,
                )  # fmt: skip


@dataclass
class _Cut:
    """A pruning layer's inputs: criteria of N tokens, and the tensors whose kept rows go on."""

    batch: int
    tokens: int
    budget: int
    divisor: float
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(4)
        new = lambda *shape: torch.rand(*shape, generator=generator, device=self.device)  # noqa: E731
        self.criteria = [new(self.batch, self.tokens) for _ in range(4)]  # attention, relevance, norm, history
        self.entropy = 0.8 + 0.01 * new(self.batch)
        self.rows = [new(self.batch, self.tokens, HIDDEN).to(self.dtype) for _ in range(2)] + [self.criteria[3]]

    def select(self, backend: str | None, precise: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        cast = [x.double() if precise else x for x in (*self.criteria, self.entropy)]
        return score_select(
            *cast[:3], history=cast[3], entropy=cast[4], protect=1, mode=Select.ADAPTIVE_BATCH, budget=self.budget,
            divisor=self.divisor, backend=backend,
        )  # fmt: skip

    def select_plain(self) -> tuple[Tensor, Tensor]:
        """topk, sort and cat with the class token, the count read back, as released pruning code does it."""
        attention, relevance, norm, history = (x[:, 1:] for x in self.criteria)
        score = attention / attention.sum(-1, keepdim=True) + relevance / relevance.sum(-1, keepdim=True)
        score = 0.5 * history + 0.5 * score * norm
        live = self.tokens - 1
        count = live - self.budget
        if self.divisor:
            share = (count / self.divisor * (1 - self.entropy.square())).round().max()
            count = int(share.item())
        index = score.topk(max(live - count, self.budget)).indices.sort().values + 1
        return score, torch.cat([index.new_zeros(self.batch, 1), index], 1)

    def gather_plain(self, index: Tensor) -> list[Tensor]:
        wide = [index.view(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:]) for x in self.rows]
        return [x.gather(1, i) for x, i in zip(self.rows, wide, strict=True)]

    def gather_indexed(self, index: Tensor) -> list[Tensor]:
        batch = torch.arange(self.batch, device=self.device)[:, None]
        return [x[batch, index] for x in self.rows]


def cut_cases(shapes: list[tuple[int, int, int, float]], dtypes, device, backend) -> Iterator[Case]:
    """`score_select`, `gather_tokens` (hidden, its norm, history) and the two in a row, at a pruning layer.

    select: bytes = B N 4 (4 read + 1 written) + B N 8 (index), FLOPs = 8 B N (divisions, sums, history)
    gather: bytes = 2 B M (2 D size + 4) (read and written) + B M 8 (index), FLOPs = 0
    """
    for batch, tokens, budget, divisor in shapes:
        for dtype in dtypes:
            cut = _Cut(batch, tokens, budget, divisor, dtype, device)
            exact = cut.select("reference", True)
            width = int(exact[2][0])
            index = exact[1][:, :width].contiguous()
            name = f"B={batch} {tokens - 1}→{width - 1}"
            size = dict(
                score_select=20 * batch * tokens + 8 * batch * tokens,
                gather_tokens=2 * batch * width * (2 * HIDDEN * dtype.itemsize + 4) + 8 * batch * width,
            )
            runs = dict(
                score_select=lambda cut=cut: cut.select(backend),
                gather_tokens=lambda cut=cut, index=index: gather_tokens(cut.rows, index, backend=backend),
                select_gather=lambda cut=cut, m=width: gather_tokens(
                    cut.rows, cut.select(backend)[1][:, :m], backend=backend
                ),
            )
            plain = dict(
                score_select={"topk, sort, cat": cut.select_plain},
                gather_tokens={
                    "gather": lambda cut=cut, index=index: cut.gather_plain(index),
                    "indexing": lambda cut=cut, index=index: cut.gather_indexed(index),
                },
                select_gather={
                    "topk, sort, cat, gather": lambda cut=cut: cut.gather_plain(cut.select_plain()[1]),
                    "topk, sort, cat, indexing": lambda cut=cut: cut.gather_indexed(cut.select_plain()[1]),
                },
            )

            def check_select(cut=cut, exact=exact) -> Check:
                score, chosen, lengths = cut.select(backend)
                if not (torch.equal(chosen, exact[1]) and torch.equal(lengths, exact[2])):
                    return Check(False, float("nan"), 0.0, "kept tokens differ from the fp64 reference")
                return budgeted([score[:, 1:]], [cut.select_plain()[0]], [exact[0][:, 1:]])

            def check_gather(cut=cut, index=index, run=runs["gather_tokens"]) -> Check:
                same = all(torch.equal(a, b) for a, b in zip(run(), cut.gather_plain(index), strict=True))
                return Check(same, 0.0, 0.0, "" if same else "gathered rows differ")

            def check_both(cut=cut, index=index, run=runs["select_gather"]) -> Check:
                same = all(torch.equal(a, b) for a, b in zip(run(), cut.gather_plain(index), strict=True))
                return Check(same, 0.0, 0.0, "" if same else "selected and gathered rows differ")

            checks = dict(score_select=check_select, gather_tokens=check_gather, select_gather=check_both)
            for op in runs:
                if op == "score_select" and dtype != dtypes[0]:
                    continue  # criteria are float32 whatever the model's dtype
                first = cut.criteria[0] if op == "score_select" else cut.rows[0]
                yield Case(
                    op.replace("select_gather", "select+gather"), name,
                    torch.float32 if op == "score_select" else dtype,
                    choose_backend(op.replace("select_gather", "gather_tokens"), backend, first),
                    runs[op], plain[op], checks[op], sum(size.values()) if op == "select_gather" else size[op],
                    0 if op == "gather_tokens" else 8 * batch * tokens, 2.0 if op == "select_gather" else None,
                )  # fmt: skip


def cases(device: torch.device, dtypes, backend: str | None = None, toy: bool = False) -> Iterator[Case]:
    """Every case of the table, built when its turn comes."""
    beyond = (16, 2305)  # K and V exceed any CPU's cache
    anchor = [(2, 37)] if toy else [(1, 577), (8, 577), (1, 2305), (8, 2305), beyond]
    cuts = [(2, 37, 8, 2.0)] if toy else [(b, *cut) for b in (1, 8) for cut in ((577, 64, 2.0), (300, 64, 0.0))]
    yield from anchor_cases(anchor, dtypes, device, backend)
    yield from cut_cases(cuts, dtypes, device, backend)


def measure(
    *,
    device: torch.device | str = "cpu",
    dtypes=(torch.float32, torch.bfloat16),
    backend: str | None = None,
    repeats: int = 9,
    cold: bool = False,
    only: str | None = None,
    toy: bool = False,
    command: str = "flowcut-bench ops",
    tick: Tick = lambda label, share=None: None,
) -> Section:
    """The operator table: every row is checked against the fp64 reference before it is timed."""
    device = torch.device(device)
    clock = Clock(device, cold)
    bandwidth = copy_bandwidth(device)
    rows = []
    for case in cases(device, dtypes, backend, toy):
        if only and only not in case.op:
            continue
        tick(f"{case.op} {case.name}")
        rows.append(_row(case, clock, repeats))
    order = list(dict.fromkeys(row["op"] for row in rows))
    rows.sort(key=lambda row: order.index(row["op"]))
    bandwidth = Samples(bandwidth.values + copy_bandwidth(device).values)
    for row in rows:
        _against_limit(row, bandwidth.median)
    return Section(
        "ops",
        "Operators",
        command,
        rows,
        facts={
            "copy GB/s": bandwidth.median / 1e9,
            "copy spread": bandwidth.spread,
            "cold cache": cold,
            "repeats": repeats,
        },
        notes=[
            "checked against the fp64 reference first: at most twice the error of plain torch at the same precision",
            "torch: the fastest of up to six forms, none of them N x N; its rounds and ours interleaved",
            "GB/s from the formula's bytes; copy: bytes read plus written by Tensor.copy_ beyond cache, this run",
            "target: 2x faster than torch, and 60 % of copy where the data exceed twice the last-level cache",
        ],
        failed=[f"{row['op']} {row['case']} {row['dtype']}: {row['refcheck']}" for row in rows if not row["ok"]],
    )


def _row(case: Case, clock: Clock, repeats: int) -> dict:
    with torch.inference_mode():
        check = case.check()
    row = dict(
        op=case.op,
        case=case.name,
        dtype=str(case.dtype).removeprefix("torch."),
        backend=case.backend,
        ok=check.ok,
        refcheck="ok" if check.ok else f"FAILED: {check.detail}",
        error=check.error,
        budget=check.budget,
        bytes=case.bytes,
        flops=case.flops,
        wants_speedup=case.wants_speedup,
        wants_copy=case.wants_copy,
    )
    if not check.ok:
        return row
    trial = interleave(case.torch, repeats=2, clock=clock, warmup=1)
    opponent = min(trial, key=lambda name: min(trial[name].values))
    times = interleave({"ours": case.ours, "torch": case.torch[opponent]}, repeats=repeats, clock=clock)
    speedup = times["torch"].per(times["ours"])
    return row | dict(
        seconds=times["ours"].median,
        spread=times["ours"].spread,
        torch_seconds=times["torch"].median,
        torch_form=opponent,
        speedup=speedup.median,
        speedup_low=speedup.quartiles[0],
        speedup_high=speedup.quartiles[1],
        gbs=case.bytes / times["ours"].median / 1e9,
    )


def _against_limit(row: dict, bandwidth: float) -> None:
    if "gbs" not in row:
        return
    row["of_copy"] = row["gbs"] * 1e9 / bandwidth
    wanted = [
        row[got] >= row[want] for got, want in (("speedup", "wants_speedup"), ("of_copy", "wants_copy")) if row[want]
    ]
    row["met"] = all(wanted) if wanted else None
