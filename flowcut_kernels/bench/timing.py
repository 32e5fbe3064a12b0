"""Medians of interleaved repeats, ratios that share their noise, and the copy bandwidth as the limit."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .._frames import in_one_chunk
from .machine import cache_bytes

Run = Callable[[], object]
# Untimed calls before a sample: what the last function left dirty in a cache of tens of megabytes is written back at
# the cost of the next calls (a gather of 64 MB on two cores: 1.6 ms right away, 1.3 after one call, 1.0 after four).
SETTLING = 5e-3  # seconds that surely turn the cache over
LONG = 0.05  # seconds of a function for which that does not matter


@dataclass
class Samples:
    """Repeats of one figure (seconds per call, or a ratio of two such)."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.values) < 2:
            return self.values[0], self.values[0]
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        low, high = self.quartiles
        return (high - low) / 2 / self.median

    def per(self, other: Samples) -> Samples:
        """Ratios self / other, round by round: both sides of a round ran within moments of each other."""
        return Samples([a / b for a, b in zip(self.values, other.values, strict=True)])


def synchronise(device: torch.device) -> None:
    """Wait until everything queued on `device` is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(run: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """What `run` returns, and the bytes it needed beyond those that were allocated before; None but on CUDA."""
    if device.type != "cuda":
        return run(), None
    run()  # what is made once and stays, such as a library's workspace, is nobody's peak
    synchronise(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = run()
    synchronise(device)
    return result, torch.cuda.max_memory_allocated(device) - before


@torch.inference_mode()
def captured(run: Run, device: torch.device) -> Run:
    """`run` as a replay of a CUDA graph; without CUDA the same function, so that a dry run takes the same path."""
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class Clock:
    """Times calls on one device: events on CUDA, the wall clock elsewhere.

    How deep the caller's stack is has no part in it.
    """

    def __init__(self, device: torch.device | str = "cpu", cold: bool = False, queued: bool = False) -> None:
        """`queued`: on CUDA, hold the device back until the calls wait in its queue: no launch latency is timed."""
        self.device, self.queued = torch.device(device), queued
        # Two caches' worth: reading and writing it leaves nothing of the data behind.
        size = 2 * cache_bytes(self.device) if cold else 0
        self.trash = torch.zeros(size // 4, device=self.device) if cold else None

    def seconds(self, run: Run, calls: int = 1) -> float:
        """Seconds per call of `run`, averaged over `calls` calls in a row (each alone when the cache is flushed)."""
        if self.trash is None:
            return in_one_chunk(self._span, run, calls) / calls
        total = 0.0
        for _ in range(calls):
            self.trash.add_(1)
            total += in_one_chunk(self._span, run, 1)
        return total / calls

    def _span(self, run: Run, calls: int) -> float:
        synchronise(self.device)
        if self.device.type == "cuda":
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if self.queued:
                torch.cuda._sleep(1_000_000)  # cycles: about half a millisecond
            first.record()
            for _ in range(calls):
                run()
            last.record()
            last.synchronize()
            return first.elapsed_time(last) / 1e3
        start = time.perf_counter()
        for _ in range(calls):
            run()
        synchronise(self.device)
        return time.perf_counter() - start


@torch.inference_mode()
def interleave(
    runs: Mapping[str, Run],
    *,
    repeats: int,
    clock: Clock | None = None,
    warmup: int = 2,
    least: float = 2e-3,
    tick: Callable[[], object] | None = None,
) -> dict[str, Samples]:
    """Time several functions in turns, so that a slow moment of the machine meets all of them.

    Before each sample a short function runs untimed, up to four times, so that it finds the cache as it left it.

    Args:
        runs: name -> function without arguments.
        repeats: rounds; every second round runs in reverse order.
        clock: device and cache state; None: the CPU, caches warm.
        warmup: calls of each before the first round.
        least: seconds one sample should last; shorter functions are called several times per sample.
        tick: called after every round, for a progress bar.
    """
    clock = clock or Clock()
    calls, settle = {}, {}
    for name, run in runs.items():
        once = min(clock.seconds(run) for _ in range(max(warmup, 1)))
        calls[name] = max(1, min(200, round(least / max(once, 1e-7))))
        settle[name] = min(4, math.ceil(SETTLING / max(once, 1e-7))) if once < LONG else 0
    samples = {name: Samples() for name in runs}
    collects = gc.isenabled()
    gc.disable()
    try:
        for i in range(repeats):
            for name in list(runs) if i % 2 == 0 else reversed(list(runs)):
                for _ in range(settle[name]):
                    runs[name]()
                samples[name].values.append(clock.seconds(runs[name], calls[name]))
            if tick:
                tick()
    finally:
        if collects:
            gc.enable()
    return samples


class Copy:
    """``Tensor.copy_`` on data that fits no cache: what it reads and writes per second is the bandwidth."""

    def __init__(self, device: torch.device, size: int | None = None) -> None:
        size = size or max(4 * cache_bytes(device), 2**27)
        self.source, self.target = (torch.ones(size // 4, device=device) for _ in range(2))
        self.bytes = 2 * size  # read plus written

    def __call__(self) -> None:
        self.target.copy_(self.source)
