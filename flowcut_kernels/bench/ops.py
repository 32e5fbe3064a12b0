"""The operators' table: every case is checked, then timed against torch and the copy bandwidth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .cases import Case, cases
from .machine import cache_bytes
from .report import Section
from .timing import Clock, Copy, Run, Samples, captured, interleave, synchronise

Tick = Callable[..., object]


def measure(
    *,
    device: torch.device | str = "cpu",
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
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
    clock = Clock(device, cold, queued=True)
    copy = Copy(device)
    rows, failed = [], []
    try:
        for case in cases(device, dtypes, backend, toy):
            if only and only not in case.op:
                continue
            tick(f"{case.op} {case.name}")
            rows.append(row(case, clock, repeats, copy))
    except Exception as error:  # of a case in the making: it must not cost what was measured before it
        failed = [f"the case after {rows[-1]['op']} {rows[-1]['case']}: {error}" if rows else str(error)]
    copied = Samples([x["copy_gbs"] for x in rows if x["ok"]])
    order = list(dict.fromkeys(x["op"] for x in rows))
    rows.sort(key=lambda x: order.index(x["op"]))
    return Section(
        "ops",
        "Operators",
        command,
        rows,
        facts={
            "copy GB/s": copied.median if copied.values else None,
            "copy spread": copied.spread if copied.values else None,
            "cache MiB": cache_bytes(device) / 2**20,
            "cold cache": cold,
            "repeats": repeats,
        },
        notes=[
            "checked against the fp64 reference first: at most twice the error of plain torch at the same precision",
            "torch: the fastest of up to six forms, none of them N x N; its rounds, ours and copies interleaved",
            "GB/s: the formula's bytes; copy: share of what Tensor.copy_ beyond cache moves in the same rounds",
            "target: 2x faster than torch, 5x for patch_entropy and recycle_tokens, and 60 % of copy where the data "
            "exceed twice the last-level cache",
        ],
        failed=[*(f"{x['op']} {x['case']} {x['dtype']}: {x['refcheck']}" for x in rows if not x["ok"]), *failed],
    )


def row(case: Case, clock: Clock, repeats: int, copy: Copy) -> dict[str, Any]:
    """A case checked, then timed in turns with its fastest opponent and the copy; one that cannot run says why."""
    found: dict[str, Any] = dict(
        op=case.op,
        case=case.name,
        dtype=str(case.dtype).removeprefix("torch."),
        backend=case.backend,
        bytes=case.bytes,
        flops=case.flops,
        wants_speedup=case.wants_speedup,
        wants_copy=case.wants_copy,
    )
    try:
        return found | _measured(case, clock, repeats, copy)
    except Exception as error:  # a kernel that does not compile, say, must not cost the other operators
        return found | dict(ok=False, refcheck=f"FAILED: {type(error).__name__}: {error}")


def _measured(case: Case, clock: Clock, repeats: int, copy: Copy) -> dict[str, Any]:
    with torch.inference_mode():
        check = case.check()
    found: dict[str, Any] = dict(
        ok=check.ok,
        refcheck="ok" if check.ok else f"FAILED: {check.detail}",
        error=check.error,
        budget=check.budget,
    )
    if not check.ok:
        return found
    # On CUDA kernels are timed, not Python: both sides replay a graph, and the host's share is a figure of its own.
    host = _host_seconds(case.ours, clock.device)
    wrap = (lambda run, _: run) if case.reads_back else captured
    torch_forms = {name: wrap(run, clock.device) for name, run in case.torch.items()}
    trial = interleave(torch_forms, repeats=2, clock=clock, warmup=1)
    opponent = min(trial, key=lambda name: min(trial[name].values))
    runs = {"ours": wrap(case.ours, clock.device), "torch": torch_forms[opponent], "copy": copy}
    times = interleave(runs, repeats=repeats, clock=clock)
    speedup = times["torch"].per(times["ours"])
    found |= dict(
        seconds=times["ours"].median,
        spread=times["ours"].spread,
        host_seconds=host,
        torch_seconds=times["torch"].median,
        torch_form=opponent,
        torch_trial_seconds={name: min(samples.values) for name, samples in trial.items()},
        speedup=speedup.median,
        of_torch=times["ours"].per(times["torch"]).median,
        speedup_low=speedup.quartiles[0],
        speedup_high=speedup.quartiles[1],
        gbs=case.bytes / times["ours"].median / 1e9,
        copy_gbs=copy.bytes / times["copy"].median / 1e9,
        of_copy=times["copy"].per(times["ours"]).median * case.bytes / copy.bytes,
    )
    wanted = [
        found[got] >= want for got, want in (("speedup", case.wants_speedup), ("of_copy", case.wants_copy)) if want
    ]
    return found | dict(met=all(wanted) if wanted else None)


@torch.inference_mode()
def _host_seconds(run: Run, device: torch.device) -> float | None:
    """Seconds until `run` returns, its kernels still queued; None on the CPU, where that is all there is."""
    if device.type != "cuda":
        return None
    spans = []
    for _ in range(20):
        synchronise(device)
        start = time.perf_counter()
        run()
        spans.append(time.perf_counter() - start)
    return statistics.median(spans)
