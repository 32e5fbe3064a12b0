"""Arrival counters of the Triton kernels: no two launches that may run at once share any."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import combinations
from time import sleep
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from flowcut_kernels.ops import _triton_common as common

GPU = SimpleNamespace(type="cuda", index=0)


@pytest.fixture
def cuda(monkeypatch):
    """Counters made from scratch on a GPU that is not there: its stream, whether it captures, waits and memsets."""
    state = SimpleNamespace(stream=1, capturing=False, waits=0, memsets=0)

    def zeros(count, dtype, device):
        state.memsets += 1
        return torch.zeros(count, dtype=dtype)

    def synchronize(device):
        state.waits += 1

    runtime = SimpleNamespace(
        is_current_stream_capturing=lambda: state.capturing,
        current_stream=lambda: SimpleNamespace(cuda_stream=state.stream),
        synchronize=synchronize,
    )
    monkeypatch.setattr(common, "torch", SimpleNamespace(zeros=zeros, int32=torch.int32, cuda=runtime))
    monkeypatch.setattr(common, "device_guard", lambda device: nullcontext())
    monkeypatch.setattr(common, "_counters", {})
    monkeypatch.setattr(common, "_reserve", {})
    return state


def disjoint(*slices):
    spans = [(x.data_ptr(), x.data_ptr() + 4 * x.numel()) for x in slices]
    return all(a[1] <= b[0] or b[1] <= a[0] for a, b in combinations(spans, 2))


def test_a_stream_has_counters_of_its_own_and_so_has_every_captured_launch(cuda):
    common.reserve_counters(GPU)
    assert (cuda.waits, cuda.memsets) == (1, 1)
    taken = []
    for cuda.stream in (1, 2):
        taken.append(common.arrival_counters(8, GPU))
        assert common.arrival_counters(5, GPU) is taken[-1], "launches of a stream run one after another"
    cuda.capturing = True
    taken += [common.arrival_counters(6, GPU) for _ in range(3)]
    assert disjoint(*taken) and not any(x.data_ptr() % 16 for x in taken)
    assert (cuda.waits, cuda.memsets) == (1, 1), "nothing waits or allocates behind the reserve"


def test_more_images_than_a_stream_has_counters_for(cuda):
    few, many = common.arrival_counters(8, GPU), common.arrival_counters(5000, GPU)
    assert many.numel() >= 5000 and disjoint(few, many) and common.arrival_counters(8, GPU) is many


@pytest.mark.parametrize("reserved", [False, True])
def test_a_capture_without_a_reserve_pays_a_memset_and_never_waits(cuda, reserved):
    if reserved:
        common.reserve_counters(GPU)
    cuda.capturing, cuda.waits, cuda.memsets = True, 0, 0
    taken = [common.arrival_counters(40_000, GPU) for _ in range(2)]
    assert disjoint(*taken) and (cuda.waits, cuda.memsets) == (0, 2 - reserved)


class Slow(torch.Tensor):
    """Lets other threads run while somebody looks at what is left."""

    def numel(self):
        sleep(1e-3)
        return super().numel()


def test_threads_take_disjoint_counters(cuda, monkeypatch):
    """While they capture, so that every launch takes some."""
    common.reserve_counters(GPU)
    monkeypatch.setitem(common._reserve, GPU.index, common._reserve[GPU.index].as_subclass(Slow))
    cuda.capturing = True
    with ThreadPoolExecutor(4) as threads:
        taken = list(threads.map(lambda _: common.arrival_counters(4, GPU), range(12)))
    assert len({x.data_ptr() for x in taken}) == 12


def test_more_images_than_a_grid_has_places(monkeypatch):
    from flowcut_kernels.ops import anchor_stats, attention_with_stats

    assert common._IMAGES == 65535
    monkeypatch.setattr(common, "_IMAGES", 2)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.zeros(3, 1, 1, 16, device=device)
    anchor_stats(x[:2], x[:2], x[:2], x[:2], backend="triton")
    with pytest.raises(ValueError, match=r"anchor_stats: 3 images .* takes 2: pass fewer at a time"):
        anchor_stats(x, x, x, x, backend="triton")
    with pytest.raises(ValueError, match=r"attention_with_stats: 3 images"):
        attention_with_stats(x, x, x, backend="triton")
