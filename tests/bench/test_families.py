"""Families of `flowcut-bench prefill`: their real sizes, and what counts as the adapter's time on the host."""

import sys
import time

import pytest
import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from flowcut_kernels.bench import families
from flowcut_kernels.bench.families import FAMILIES, counts, measure_host, products

typer = pytest.importorskip("typer", reason="the bench extra is not installed")
from typer.testing import CliRunner  # noqa: E402

from flowcut_kernels.bench.commands import app  # noqa: E402


def spend(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


class Spending(nn.Module):
    def __init__(self, seconds: float, *inner: nn.Module) -> None:
        super().__init__()
        self.seconds, self.inner = seconds, nn.ModuleList(inner)

    def forward(self):
        spend(self.seconds)
        for module in self.inner:
            module()


@pytest.mark.parametrize("skipped, left", [((), 0.16), ((1,), 0.06), ((1, 2), 0.06), ((2,), 0.12), ((0,), 0.0)])
def test_clock_leaves_modules_out(skipped, left):
    """Each with all that it calls, and once where one is inside another; no hook stays."""
    inner = Spending(0.04)
    outer = Spending(0.06, inner)
    modules = [Spending(0.06, outer), outer, inner]
    clock = families._HostClock("cpu", {modules[i] for i in skipped})
    assert left <= clock.seconds(modules[0]) < left + 0.03
    assert not _global_forward_hooks and not _global_forward_pre_hooks


@pytest.mark.parametrize(
    "name, usual, largest",
    [("llava-1.5-7b", 576, None), ("llava-next-7b", 576 + 48 * 49, None), ("llava-onevision-7b", None, 729 + 81 * 82),
     ("internvl3-8b", 5 * 256, 13 * 256), ("smolvlm2-2.2b", 5 * 81, 17 * 81)],
)  # fmt: skip
def test_real_sizes(name, usual, largest):
    """In tokens, as those who published them count."""
    family = FAMILIES[name]
    for shown, tokens in ((family.shown, usual), (family.largest, largest)):
        if tokens is not None:
            config = family.config("real")
            assert sum(counts(config, shown(config))) == tokens


def test_passes_by_caller():
    """As often below each depth of the caller's stack; the slowest depth is found."""
    depths = []

    def run():
        frame, depth = sys._getframe(), 0
        while frame := frame.f_back:
            depth += frame.f_code.co_name == "_below"
        depths.append(depth - 1)
        spend(0.009 if depths[-1] == families.DEPTHS[5] else 0.003)

    assert 2 < families._by_depth(run, 3) < 4
    assert sorted(depths) == [-1, *sorted([*families.DEPTHS] * 3)]


def test_products():
    """Of LLaVA-1.5: about two FLOPs for each weight and token, attention beside it."""
    found = products(FAMILIES["llava-1.5-7b"], FAMILIES["llava-1.5-7b"].shown)
    columns = 1 + 576 + families.TEXT
    language = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    attention = 32 * 2 * columns**2 * 4096  # causal: half of it
    vision = 24 * 12 * 1024**2 * 577 * 2  # with 4 x 577^2 x 1024 for attention, and the projector
    assert found["stock_tokens"] == 576
    assert 0 < found["flops"] - 2 * columns * language - attention - vision < 0.01 * found["flops"] + vision / 4


def test_host_rows(monkeypatch):
    monkeypatch.setattr(families, "CALLS", 3)
    monkeypatch.setattr(families, "ROUNDS", 1)
    section = measure_host(families=("qwen2-vl-7b",))
    usual, largest = section.rows
    assert (usual["prompt"], largest["prompt"]) == ("usual", "largest") and not section.failed
    assert (usual["stock_tokens"], largest["stock_tokens"]) == (1024, 16384)
    for row in section.rows:
        assert row["least_seconds"] == max(row["stock_host_seconds"], row["flops"] / families.PEAK)
        assert row["adapter_share"] == row["adapter_seconds"] / row["least_seconds"]
        assert row["adapter_seconds"] < row["python_seconds"]
        assert row["stock_by_caller"] > 1 and row["patched_by_caller"] > 1
    assert largest["least_seconds"] > largest["stock_host_seconds"]


def test_no_figure_without_a_check(monkeypatch):
    """A patched model that differs from the stock one is not timed, and fails the command."""
    real = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: real(a, b) and a.dim() != 3)  # logits never
    done = CliRunner().invoke(app, ["prefill", "--family", "paligemma-3b", "--host", "--threads", "1"])
    assert done.exit_code == 1 and "keeping all tokens differs" in " ".join(done.output.split())
    done = CliRunner().invoke(app, ["prefill", "--host"])
    assert done.exit_code == 2 and "--family" in done.output
