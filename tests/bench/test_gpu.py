"""`flowcut-bench gpu`: the dry run takes every step that the real one takes, so that a typo shows up here."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("typer", reason="the bench extra is not installed")
pytest.importorskip("triton", reason="Triton compiles the kernels")

from typer.testing import CliRunner

from flowcut_kernels.bench import gpu
from flowcut_kernels.bench.commands import app


def dry_run(out, *extra):
    return CliRunner().invoke(app, ["gpu", "--dry-run", "--out", str(out), *extra])


def test_dry_run(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the processes compile kernels
    names = [step.name for step in gpu.STEPS]
    done = dry_run(tmp_path, "--only", ",".join(names))
    logs = "\n".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert done.exit_code == 0, done.output + logs
    content = json.loads((tmp_path / "gpu.json").read_text())
    summary, *sections = content["sections"]
    assert summary["facts"]["steps"] == dict.fromkeys(names, "ok")
    assert {s["name"] for s in sections} == {"compile", "ops", "kv", "encoder", "prefill", "families", "policies"}
    operators = {row["op"] for s in sections if s["name"] == "ops" for row in s["rows"]}
    assert {"anchor_stats_select", "gather+norm", "attention_with_stats"} <= operators
    assert not [row for row in summary["rows"] if row["found"] is not None], "toy sizes are no result"

    # What is done is not done again, and what fails is named.
    (tmp_path / "ops.done").unlink()
    monkeypatch.setattr(gpu, "_process", lambda command, log, seconds: f"exit status 3, see {log.name}")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    done = dry_run(tmp_path)
    assert done.exit_code == 1
    assert "ops: exit status 3, see ops.log" in done.output and "encoder: done before" in done.output


@pytest.mark.parametrize("step", gpu.STEPS, ids=lambda step: step.name)
def test_options_of_the_real_run_exist(step):
    """Parsed, not run."""
    import typer

    name, *options = step.real.format(arch=90).split()
    command = typer.main.get_command(app).get_command(None, name)
    assert command.make_context(name, options).params["device" if name != "compile" else "arch"] in ("cuda", "90")


def test_a_step_that_takes_too_long_is_stopped(tmp_path):
    import sys

    fate = gpu._process([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "a.log", 1.0)
    assert fate == "stopped after 1 s, see a.log"


def test_targets_are_read_from_the_rows():
    row = dict(ok=True, dtype="bfloat16", batch=8, tokens=64, patches=576, overhead=1.2, scoring_of_stock=0.01)
    layer = dict(ok=True, op="gather+norm", wants_copy=0.8, of_copy=0.9)
    sections = [gpu.Section("encoder", "", "", [row]), gpu.Section("ops", "", "", [layer, layer])]
    found = {r["what"]: r for r in gpu.targets(sections)}
    assert found["encoder 576→64, B=8: time / FLOPs"]["met"] is False
    assert found["scoring over all layers, CLIP-L B=8: share of the stock encoder"]["met"] is True
    assert found["encoder 576→64, B=32: time / FLOPs"]["met"] is None
    assert found["gather+norm, B=64, N=577..2,305: share of copy"]["met"] is None, "one of three cases is missing"


@pytest.mark.parametrize(("options", "message"), [(["--only", "nothing"], "nothing"), (["--limit", "0"], "--limit")])
def test_bad_options(tmp_path, options, message):
    done = dry_run(tmp_path, *options)
    assert done.exit_code == 2 and message in done.output
