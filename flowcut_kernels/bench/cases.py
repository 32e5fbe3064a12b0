"""The registry of operator cases: inputs as models make them, opponents, bytes and FLOPs by formula, and a check."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._library import NATIVE_DTYPES, choose_backend
from .._ops import Relevance, Select, ValueNorm
from ..ops import (
    anchor_stats,
    anchor_stats_select,
    attention,
    attention_with_stats,
    compact_kv,
    compact_kv_paged,
    gather_tokens,
    grid_cells,
    patch_entropy,
    received_attention,
    recycle_tokens,
    score_select,
)
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
    reads_back: bool = False  # a side waits for the device, which no CUDA graph can


def budgeted(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], exact: Sequence[Tensor], floors: Sequence[float] = ()
) -> Check:
    """Error budget: twice the error that plain torch makes at the same precision, and at least two fp32 roundings.

    floors, one for each result: relative errors, instead of a rounding's, that no fp32 form can be held to.
    """
    worst = Check(True, 0.0, float("inf"))
    floors = floors or [torch.finfo(torch.float32).eps] * len(exact)
    for mine, other, truth, floor in zip(ours, theirs, exact, floors, strict=True):
        scale = truth.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        error = ((mine.double() - truth).abs().max() / scale).item()
        budget = 2 * max(((other.double() - truth).abs().max() / scale).item(), floor)
        if not error <= budget:  # NaN fails
            return Check(False, error, budget, f"error {error:.1e} exceeds {budget:.1e}")
        if error / budget >= worst.error / worst.budget:
            worst = Check(True, error, budget)
    return worst


KINDS = {
    "cosine": (Relevance.COSINE, ValueNorm.FULL),
    "softmax": (Relevance.SOFTMAX, ValueNorm.HEAD_MEAN),
}


def projected(batch: int, tokens: int, dtype: torch.dtype, device: torch.device, seed: int, dim: int = DIM) -> Tensor:
    """A projection's output [B, N, H * d] seen as heads [B, H, N, d]: strided, as transformers passes it."""
    generator = torch.Generator(device).manual_seed(seed)
    flat = torch.randn(batch, tokens, HEADS * dim, generator=generator, device=device).to(dtype)
    return flat.unflatten(-1, (HEADS, dim)).transpose(1, 2)


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
        self.key, self.value = (projected(batch, tokens, dtype, device, seed) for seed in (1, 2))
        self.query = projected(batch, 1, dtype, device, 3)
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

    def run(self) -> tuple[Tensor, ...]:
        return self._stats(self.query, self.key, self.value, self.backend)

    def _stats(self, query: Tensor, key: Tensor, value: Tensor, backend: str | None) -> tuple[Tensor, ...]:
        options: dict[str, Any] = dict(protect=1, relevance=self.relevance, value_norm=self.norm, backend=backend)
        return anchor_stats(query, key, value, value[:, :, :1], **options)

    def check(self) -> Check:
        exact = self._stats(self.query.double(), self.key.double(), self.value.double(), "reference")
        theirs = plain.stats(self.query, self.key, self.value, plain.dots_matmul, self.relevance)
        ours, others, truth = ([x.flatten() for x in outputs] for outputs in (self.run(), theirs, exact))
        floors = [torch.finfo(torch.float32).eps] * len(truth)
        if self.relevance == Relevance.SOFTMAX:
            floors[1] = self._rounded_logits()
        return budgeted(ours, others, truth, floors)

    def _rounded_logits(self) -> float:
        """Largest relative error, to first order, of a softmax relevance whose logits l are exact but for one rounding.

        d ln w_n = dl_n - sum_j w_j dl_j for a weight w_n, and |dl| <= eps / 2 |l|: at |v|^2 = d, a few 1e-6. How much
        of it befalls the few tokens that are large is chance: of 60 draws, correctly rounded logits were beyond twice
        the error of plain torch's matmul in 2, torch's own sums of products in 17.
        """
        logits = (self.value[:, :, :1].double() @ self.value.double().transpose(-1, -2))[:, :, 0]
        weight, size = logits.softmax(-1), logits.abs()
        error = weight * (size + (weight * size).sum(-1, keepdim=True)) * torch.finfo(torch.float32).eps / 2
        return (error.mean(1)[:, 1:].max() / weight.mean(1)[:, 1:].max()).item()


class Attention:
    """`attention`: M queries over N keys.

    bytes = 2 B (M + N) H d size (Q, K, V and the output once), FLOPs = 4 B H M N d (exponentials not counted)
    """

    def __init__(
        self, batch: int, queries: int, tokens: int, dtype: torch.dtype, device: torch.device, backend: str | None
    ) -> None:
        self.backend = backend
        self.query = projected(batch, queries, dtype, device, 1)
        self.key, self.value = (projected(batch, tokens, dtype, device, seed) for seed in (2, 3))
        self.case = Case(
            "attention",
            f"B={batch} M={queries} N={tokens}",
            dtype,
            choose_backend("attention", backend, self.key, ("cpp",)),
            self.run,
            {"sdpa": self.plain},
            self.check,
            bytes=2 * batch * (queries + tokens) * HEADS * DIM * dtype.itemsize,
            flops=4 * batch * HEADS * queries * tokens * DIM,
            wants_speedup=2.0,
        )

    def run(self) -> Tensor:
        return attention(self.query, self.key, self.value, backend=self.backend)

    def plain(self) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(self.query, self.key, self.value)

    def check(self) -> Check:
        exact = attention(self.query.double(), self.key.double(), self.value.double(), backend="reference")
        return budgeted([self.run()], [self.plain().transpose(1, 2)], [exact])


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
            self.check_select, select_bytes, flops, reads_back=True,
        )  # fmt: skip
        self.cases = [
            Case(
                "gather_tokens", name, dtype, gathers, self.gather,
                {"gather": self.plain_gather, "indexing": self.indexed_gather}, self.check_gather, gather_bytes, 0,
            ),
            Case(
                "select+gather", name, dtype, gathers, self.both,
                {"topk, sort, cat, gather": self.plain_both, "topk, sort, cat, indexing": self.indexed_both},
                self.check_both, select_bytes + gather_bytes, flops, wants_speedup=2.0, reads_back=True,
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


class Layer:
    """A pruning layer as FlowCut runs it: `anchor_stats_select`, and `gather_tokens` with the norm of the kept rows.

    With a `block`, patches that are merged later, as Qwen2-VL's: 16 heads of 80, and the mean token looks at them.

    stats+select: bytes = 2 B N H d size (K and V once) + 20 B N (history in; score, index out), FLOPs as `anchor_stats`
    gather+norm: bytes = 3 B M D size (rows in; rows and normed rows out) + 32 B M (index, history and position)
    """

    def __init__(
        self,
        batch: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        backend: str | None,
        limited: bool,
        block: int = 1,
    ) -> None:
        self.backend, self.budget, self.block = backend, tokens // 2 // block, block
        dim = DIM if block == 1 else 80
        self.hidden_size = HEADS * dim
        self.query, self.key, self.value = (
            projected(batch, n, dtype, device, 6 + n, dim) for n in (1, tokens, tokens + 1)
        )
        self.value = self.value[:, :, :tokens]
        self.anchor = self.value[:, :, :1] if block == 1 else self.value.mean(2, keepdim=True)
        generator = torch.Generator(device).manual_seed(7)
        self.history = torch.rand(batch, tokens, generator=generator, device=device)
        self.hidden = torch.randn(batch, tokens, self.hidden_size, generator=generator, device=device).to(dtype)
        self.position = torch.arange(tokens, device=device).repeat(batch, 1)
        self.weight, self.bias = torch.randn(2, self.hidden_size, generator=generator, device=device).to(dtype)
        self.index = self.select()[1]
        name, elements, kept = f"B={batch} N={tokens}", batch * tokens * HEADS * dim, batch * self.index.shape[1]
        name += f" block={block}" * (block > 1)
        chosen = choose_backend("anchor_stats_select", backend, self.key)
        self.cases = [
            Case(
                "anchor_stats_select", name, dtype, chosen, self.select, {"vectorised": self.plain_select},
                self.check_select, 2 * elements * dtype.itemsize + 20 * batch * tokens, 8 * elements,
                wants_copy=0.8 if limited else None,
            ),
            Case(
                "gather+norm", name, dtype, chosen, self.gather, {"gather, layer_norm": self.plain_gather},
                self.check_gather, 3 * kept * HEADS * dim * dtype.itemsize + 32 * kept, 8 * kept * HEADS * dim,
                wants_copy=0.8 if limited else None,
            ),
        ]  # fmt: skip

    def select(self, backend: str | None = None) -> tuple[Tensor, ...]:
        return anchor_stats_select(
            self.query, self.key, self.value, self.anchor, history=self.history, protect=int(self.block == 1),
            mode=Select.FIXED, budget=self.budget, block=self.block, backend=backend or self.backend,
        )  # fmt: skip

    def gather(self) -> list[Tensor]:
        rows = [self.hidden, self.history, self.position]
        return gather_tokens(rows, self.index, self.weight, self.bias, backend=self.backend)

    def plain_select(self) -> Tensor:
        if self.block > 1:
            score, _ = plain.score_by_mean(self.query, self.key, self.value, self.anchor, self.history)
            return plain.choose_groups(score, self.budget, self.block)
        attention, related, norm, entropy = plain.stats(
            self.query, self.key, self.value, plain.dots_block, Relevance.COSINE
        )
        return plain.choose(plain.fuse(attention, related, norm, self.history), entropy[:, 0], self.budget, 0.0)

    def plain_gather(self) -> list[Tensor]:
        hidden, *rest = plain.gather([self.hidden, self.history, self.position], self.index)
        return [hidden, *rest, torch.nn.functional.layer_norm(hidden, (self.hidden_size,), self.weight, self.bias)]

    def check_select(self) -> Check:
        wanted = self.select("reference")
        score, index, lengths, entropy = self.select()
        # Two forms may swap tokens whose scores tie within their rounding.
        kept, others = (wanted[0].gather(1, i).sort().values for i in (index, wanted[1]))
        if not (torch.equal(lengths, wanted[2]) and torch.allclose(kept, others, rtol=1e-5, atol=0)):
            return Check(False, detail="kept tokens differ from the reference")
        error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in ((score, wanted[0]), (entropy, wanted[3])))
        return Check(error <= 1e-4, error, 1e-4, f"error {error:.1e} exceeds 1e-4")

    def check_gather(self) -> Check:
        ours, theirs = self.gather(), self.plain_gather()
        if not all(torch.equal(a, b) for a, b in zip(ours[:-1], theirs[:-1], strict=True)):
            return Check(False, detail="gathered rows differ")
        rows, weight, bias = (x.double() for x in (theirs[0], self.weight, self.bias))
        exact = torch.nn.functional.layer_norm(rows, (self.hidden_size,), weight, bias)
        return budgeted([ours[-1]], [theirs[-1]], [exact])


class AttentionWithStats:
    """`attention_with_stats`: all queries over all keys, and the class token's statistics; the opponent is SDPA alone.

    bytes = 4 B N H d size (Q, K, V and the output once), FLOPs = 4 B H N N d
    """

    def __init__(
        self, batch: int, tokens: int, dim: int, dtype: torch.dtype, device: torch.device, backend: str | None
    ) -> None:
        self.backend = backend
        heads = HEADS * DIM // dim
        self.query, self.key, self.value = (
            projected(batch, tokens, dtype, device, seed).transpose(1, 2).flatten(2).unflatten(-1, (heads, dim))
            .transpose(1, 2) for seed in (1, 2, 3)
        )  # fmt: skip
        elements = batch * tokens * HEADS * DIM
        self.case = Case(
            "attention_with_stats",
            f"B={batch} N={tokens} d={dim}",
            dtype,
            choose_backend("attention_with_stats", backend, self.key, ("triton",)),
            self.run,
            {"sdpa alone": self.plain},
            self.check,
            bytes=4 * elements * dtype.itemsize,
            flops=4 * elements * tokens,
            wants_speedup=1 / 1.1,
        )

    def run(self, backend: str | None = None) -> tuple[Tensor, ...]:
        inputs = (self.query, self.key, self.value, self.query[:, :, :1], self.value[:, :, :1])
        return attention_with_stats(*inputs, protect=1, backend=backend or self.backend)

    def plain(self) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(self.query, self.key, self.value)

    def check(self) -> Check:
        wide = [x[:1].double() for x in (self.query, self.key, self.value)]
        exact = torch.nn.functional.scaled_dot_product_attention(*wide).transpose(1, 2)
        output, *statistics = self.run()
        _, *wanted = self.run("reference")
        error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(statistics, wanted, strict=True))
        if not error <= 1e-4:
            return Check(False, error, 1e-4, f"statistics: error {error:.1e} exceeds 1e-4")
        return budgeted([output[:1]], [self.plain()[:1].transpose(1, 2)], [exact])


class Received:
    """`received_attention`; and with the rows of the tokens that receive most (hubs, by `anchor_stats`) against SDPA.

    "lse" is given the rows' log-sum-exp, which in a model the layer's own attention leaves.

    received: bytes = 2 B N H d size (Q and K once) + 4 B N, FLOPs = 2 B H N N d (exponentials not counted)
    with R hubs: bytes + B (N + R) H d size + 4 B N R, FLOPs + 2 B H N R d
    with the log-sum-exp: bytes + 4 B H N
    """

    def __init__(
        self, batch: int, tokens: int, dim: int, dtype: torch.dtype, device: torch.device, backend: str | None
    ) -> None:
        self.backend, self.hubs = backend, min(25, tokens)
        self.query, self.key, self.value = (projected(batch, tokens, dtype, device, seed, dim) for seed in (1, 2, 3))
        name, elements = f"B={batch} N={tokens} d={dim}", batch * tokens * HEADS * dim
        moved, flops = 2 * elements * dtype.itemsize + 4 * batch * tokens, 2 * elements * tokens
        hub_elements = batch * self.hubs * HEADS * dim
        forms = {
            f"{rows} rows" + ", by image" * by_image: partial(
                plain.received_by_image if by_image else plain.received, self.query, self.key, rows
            )
            for rows in (64, 256)
            for by_image in ([False, True] if batch > 1 else [False])
        }
        chosen = choose_backend("received_attention", backend, self.key)
        logits = (q.float() @ k.float().mT * dim**-0.5 for q, k in zip(self.query, self.key, strict=True))
        self.lse = torch.stack([x.logsumexp(-1) for x in logits])
        self.cases = [
            Case(
                "received_attention", name, dtype, chosen, self.run, forms, self.check_received, moved, flops,
                wants_speedup=2.0,
            ),
            *(
                Case(
                    "received+hubs", name + " lse" * (lse is not None), dtype, chosen, partial(self.both, lse),
                    {"sdpa": self.sdpa}, partial(self.check_both, lse),
                    moved + (elements + hub_elements) * dtype.itemsize + 4 * batch * tokens * self.hubs
                    + (0 if lse is None else 4 * lse.numel()),
                    flops + 2 * elements * self.hubs,
                    wants_speedup=1.0 if device.type == "cuda" else 1 / 1.5,
                )
                for lse in (None, self.lse)
            ),
        ]  # fmt: skip

    def run(self, lse: Tensor | None = None) -> Tensor:
        return received_attention(self.query, self.key, lse=lse, backend=self.backend)

    def both(self, lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        received = self.run(lse)
        index = received.topk(self.hubs).indices
        rows = self.query.gather(2, index[:, None, :, None].expand(-1, HEADS, -1, self.query.shape[3]))
        options: dict[str, Any] = dict(relevance=Relevance.NONE, value_norm=ValueNorm.NONE, backend=self.backend)
        return received, index, anchor_stats(rows, self.key, self.value, **options)[0]

    def sdpa(self) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(self.query, self.key, self.value)

    def check_received(self) -> Check:
        query, key = self.query[-1:], self.key[-1:]
        return budgeted([self.run()[-1:]], [plain.received(query, key, 64)], [self._exact(query, key)])

    def check_both(self, lse: Tensor | None) -> Check:
        received, index, hubs = (x[-1:] for x in self.both(lse))
        query, key = self.query[-1:], self.key[-1:]
        rows = query[:, :, index[0]]
        theirs = (rows @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).float().softmax(-1).mean(1)
        wide, rows = key.double(), rows.double()
        exact = (rows @ wide.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1).mean(1)
        return budgeted([received, hubs], [plain.received(query, key, 64), theirs], [self._exact(query, key), exact])

    def _exact(self, query: Tensor, key: Tensor) -> Tensor:
        return received_attention(query.double(), key.double(), backend="reference")


class Compaction:
    """`compact_kv`: rows of the keys and values of all layers dropped.

    bytes = 4 L B H M d size (kept keys and values read and written) + 8 B M (index), FLOPs = 0
    """

    def __init__(
        self, batch: int, layers: int, heads: int, dim: int, tokens: int, kept: int,
        dtype: torch.dtype, device: torch.device, backend: str | None,
    ) -> None:  # fmt: skip
        generator = torch.Generator(device).manual_seed(8)
        self.backend = backend
        self.keys, self.values = (
            [
                torch.randn(batch, heads, tokens, dim, generator=generator, device=device).to(dtype)
                for _ in range(layers)
            ]
            for _ in range(2)
        )
        drawn = torch.rand(batch, tokens, generator=generator, device=device).topk(kept).indices
        self.keep = drawn.sort().values
        self.case = Case(
            "compact_kv",
            f"L={layers} B={batch} {tokens}→{kept}",
            dtype,
            choose_backend("compact_kv", backend, self.keys[0], ("cpp", "cuda"), (dtype,)),
            self.run,
            {"gather": self.gather} | ({"index_select": self.index_select} if batch == 1 else {}),
            self.check,
            bytes=4 * layers * batch * heads * kept * dim * dtype.itemsize + 8 * batch * kept,
            flops=0,
        )

    def run(self) -> tuple[list[Tensor], list[Tensor]]:
        return compact_kv(self.keys, self.values, self.keep, backend=self.backend)

    def gather(self) -> list[Tensor]:
        index = self.keep[:, None, :, None]
        return [x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (*self.keys, *self.values)]

    def index_select(self) -> list[Tensor]:
        return [x.index_select(2, self.keep[0]) for x in (*self.keys, *self.values)]

    def check(self) -> Check:
        keys, values = self.run()
        same = all(torch.equal(a, b) for a, b in zip((*keys, *values), self.gather(), strict=True))
        return Check(same, detail="" if same else "kept rows differ")


class PagedCompaction:
    """`compact_kv_paged`: the same in blocks of 16 rows, plan included; the opponent moves the same rows unplanned.

    bytes = 4 L B H M d size (kept keys and values read and written) + 8 B M (keep), FLOPs = 0
    """

    def __init__(
        self, batch: int, layers: int, heads: int, dim: int, tokens: int, kept: int,
        dtype: torch.dtype, device: torch.device, backend: str | None,
    ) -> None:  # fmt: skip
        generator = torch.Generator(device).manual_seed(9)
        self.backend = backend
        width = -(-tokens // 16)
        shape = (batch * width, 2, 16, heads, dim)
        self.caches = [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(layers)]
        tables = torch.randperm(batch * width, generator=torch.Generator().manual_seed(9)).view(batch, width)
        # Row 0 goes, so that every kept row moves.
        drawn = torch.rand(batch, tokens - 1, generator=generator, device=device).topk(kept).indices.cpu() + 1
        keep = drawn.sort().values
        self.arguments = (tables.numpy(), torch.full((batch,), tokens).numpy(), keep.numpy())
        slots = tables.gather(1, keep // 16) * 16 + keep % 16
        target = tables[:, : -(-kept // 16)].repeat_interleave(16, 1)[:, :kept] * 16 + torch.arange(kept) % 16
        self.source, self.target = slots.flatten().to(device), target.flatten().to(device)
        self.case = Case(
            "compact_kv_paged",
            f"L={layers} B={batch} {tokens}→{kept}",
            dtype,
            choose_backend("compact_kv_paged", backend, self.caches[0], ("cpp", "cuda"), (dtype,)),
            self.run,
            {"index": self.index},
            self.check,
            bytes=4 * layers * batch * heads * kept * dim * dtype.itemsize + 8 * batch * kept,
            flops=0,
            reads_back=True,  # the plan is made on the host and copied
        )

    def run(self) -> None:
        compact_kv_paged(self.caches, None, *self.arguments, backend=self.backend)

    def index(self) -> None:
        for cache in self.caches:
            cache[self.target // 16, :, self.target % 16] = cache[self.source // 16, :, self.source % 16]

    def check(self) -> Check:
        before = [x.clone() for x in self.caches]
        self.run()
        ours = [x.clone() for x in self.caches]
        for cache, old in zip(self.caches, before, strict=True):
            cache.copy_(old)
        self.index()
        same = all(torch.equal(a, b) for a, b in zip(ours, self.caches, strict=True))
        return Check(same, detail="" if same else "rows differ")


class Entropy:
    """`patch_entropy`: square images in patches of 14, uint8 or normalised.

    bytes = 3 B P^2 size (pixels of whole patches, once) + 4 B (P / 14)^2
    FLOPs = B P^2 times 3 (bytes: sum and division) or 18 (floats: multiply, add, clamp and round each channel besides)
    """

    def __init__(self, batch: int, edge: int, dtype: torch.dtype, device: torch.device, backend: str | None) -> None:
        generator = torch.Generator(device).manual_seed(10)
        # As smooth as a photograph: neighbours are alike.
        coarse = torch.rand(batch, 3, edge // 8, edge // 8, generator=generator, device=device)
        image = torch.nn.functional.interpolate(coarse, (edge, edge), mode="bilinear").mul(255).round()
        mean, std = [0.48, 0.46, 0.41], [0.27] * 3
        centre, scale = (torch.tensor(x, device=device)[:, None, None] for x in (mean, std))
        normalised = dtype != torch.uint8
        self.shift: dict[str, Any] = dict(mean=mean, std=std) if normalised else {}
        self.pixels = ((image / 255 - centre) / scale if normalised else image).to(dtype)
        self.backend = backend
        whole, pixels = edge // 14, batch * (edge // 14 * 14) ** 2
        self.case = Case(
            "patch_entropy",
            f"B={batch} {edge}x{edge} p=14",
            dtype,
            choose_backend("patch_entropy", backend, self.pixels, dtypes=(torch.uint8, *NATIVE_DTYPES)),
            self.run,
            {
                name: partial(plain.patch_entropy, self.pixels, 14, centre, scale, count)
                for name, count in plain.COUNTS.items()
                if name != "bincount" or device.type == "cpu"  # elsewhere it waits for the device, which no graph can
            },
            self.check,
            bytes=3 * pixels * dtype.itemsize + 4 * batch * whole**2,
            flops=pixels * (18 if normalised else 3),
            wants_speedup=5.0,
        )

    def run(self, backend: str | None = None) -> Tensor:
        return patch_entropy(self.pixels, 14, backend=backend or self.backend, **self.shift)

    def check(self) -> Check:
        error = (self.run() - self.run("reference")).abs().max().item()
        return Check(error <= 2e-6, error, 2e-6, f"error of {error:.1e} bits exceeds 2e-6")


class Recycling:
    """`recycle_tokens`: three quarters of the tokens of square grids merged in cells of 10 x 10.

    One row for scatter forms, one for `embedding_bag`, which reads rows as sparingly once members are sorted.

    bytes = M D size (members' rows, once) + C (D size + 8) (outputs) + 12 T + 8 M (cell and importance; members)
    FLOPs = 2 M D, of T tokens, M members and C cells
    """

    def __init__(
        self, grids: int, edge: int, dim: int, dtype: torch.dtype, device: torch.device, backend: str | None
    ) -> None:
        generator = torch.Generator(device).manual_seed(11)
        new = lambda *shape: torch.rand(*shape, generator=generator, device=device)  # noqa: E731
        cell, self.cells = grid_cells([(edge, edge)] * grids, 10.0, device)
        tokens = len(cell)
        kept = new(tokens) < 0.25
        self.inputs = (new(tokens, dim).sub_(0.5).to(dtype), new(tokens), torch.where(kept, -1, cell))
        self.backend = backend
        members = int((~kept).sum())
        moved = (members + self.cells) * dim * dtype.itemsize + 8 * (self.cells + members) + 12 * tokens
        name = f"{grids} x {edge}x{edge} D={dim}"
        self.cases = [
            Case(
                "recycle_tokens", f"{name}{suffix}", dtype, choose_backend("recycle_tokens", backend, self.inputs[0]),
                self.run, {form: partial(plain.recycle, *self.inputs, self.cells, add) for form, add in forms.items()},
                self.check, moved, 2 * members * dim, wants_speedup=wanted, reads_back=True,
            )
            for suffix, forms, wanted in (("", plain.SUMS, 5.0), (" (bag)", plain.BAG, None))
        ]  # fmt: skip

    def run(self) -> tuple[Tensor, Tensor]:
        return recycle_tokens(*self.inputs, cells=self.cells, backend=self.backend)

    def check(self) -> Check:
        tokens, importance, cell = self.inputs
        tokens = tokens[:, ::16]  # columns are independent: some of them do
        merged, position = self.run()
        exact, expected = recycle_tokens(tokens.double(), importance, cell, cells=self.cells, backend="reference")
        if not torch.equal(position, expected):
            return Check(False, detail="positions differ from the reference")
        theirs, _ = plain.recycle(tokens, importance, cell, self.cells, plain.SUMS["index_add"])
        return budgeted([merged[:, ::16]], [theirs], [exact])


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
    if device.type == "cpu" and backend != "triton":  # elsewhere it is torch's own attention
        for batch, queries, tokens in [(2, 5, 37)] if toy else [(1, 577, 577), (4, 577, 577), (1, 64, 299)]:
            for dtype in dtypes:
                yield Attention(batch, queries, tokens, dtype, device, backend).case
    cuts = [(2, 37, 8, 2.0)] if toy else [(b, *cut) for b in (1, 8) for cut in ((577, 64, 2.0), (300, 64, 0.0))]
    for batch, tokens, budget, divisor in cuts:
        for dtype in dtypes:
            cut = Cut(batch, tokens, budget, divisor, dtype, device, backend)
            if dtype == dtypes[0]:  # criteria are float32 whatever the model's dtype
                yield cut.select_case
            yield from cut.cases
    cuda = device.type == "cuda"
    layers = [(2, 37)] if toy else [(64, 577), (64, 1025), (64, 2305)] if cuda else [(1, 577), (8, 577)]
    for batch, tokens in layers:
        for dtype in dtypes:
            yield from Layer(batch, tokens, dtype, device, backend, limited=cuda).cases
    for dtype in dtypes:
        yield from Layer(1, 48 if toy else 4096, dtype, device, backend, limited=False, block=4).cases
    if cuda or toy:  # its fused form is a GPU kernel
        for tokens, dim in itertools.product((37,) if toy else (577, 1025, 2305, 4096), (64, 128)):
            yield AttentionWithStats(2 if toy else 8, tokens, dim, dtypes[-1], device, backend).case
    for batch, tokens, dim in [(2, 37, 64)] if toy else [(10, 729, 72), (1, 577, 64)]:
        for dtype in dtypes:
            yield from Received(batch, tokens, dim, dtype, device, backend).cases
    for dtype in (torch.uint8, *dtypes):
        yield Entropy(*((2, 40) if toy else (10, 384)), dtype, device, backend).case
    for grids, edge, dim in [(2, 13, 40)] if toy else [(8, 80, 1024), (2, 80, 3584)]:
        for dtype in dtypes:
            yield from Recycling(grids, edge, dim, dtype, device, backend).cases
    if backend != "triton":  # it has none
        for batch in (1, 4):
            shape = (2, 3, 16, 37, 9) if toy else (8, 32, 128, 608, 96)
            yield Compaction(batch, *shape, dtypes[-1], device, backend).case
            yield PagedCompaction(batch, *shape, dtypes[-1], device, backend).case
