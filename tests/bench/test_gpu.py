"""`flowcut-bench gpu`: the dry run takes every step that the real one takes, so that a typo shows up here."""

from __future__ import annotations

import json
import os
import sys

import pytest

pytest.importorskip("typer", reason="the bench extra is not installed")
pytest.importorskip("triton", reason="Triton compiles the kernels")

from typer.testing import CliRunner

from flowcut_kernels.bench import gpu, machine
from flowcut_kernels.bench.commands import app

STEPS = [step.name for step in gpu.STEPS]


def dry_run(out, *extra):
    return CliRunner().invoke(app, ["gpu", "--dry-run", "--out", str(out), *extra])


def written(out):
    return json.loads((out / "gpu.json").read_text())


@pytest.fixture
def here(monkeypatch):
    """Steps that need no process of their own have none: each would import torch and transformers for seconds."""
    process = gpu._process

    def run(command, environment, log, seconds):
        words = command[len(gpu.CLI) :]
        if command[: len(gpu.CLI)] != gpu.CLI or words[0] == "compile":
            return process(command, environment, log, seconds)
        monkeypatch.setattr(sys, "argv", ["flowcut-bench", *words[: words.index("--json")]])  # reports quote it
        done = CliRunner().invoke(app, words)
        with log.open("a") as file:
            file.write(done.output)
        return "ok" if done.exit_code == 0 else f"exit status {done.exit_code}"

    monkeypatch.setattr(gpu, "_process", run)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the others compile kernels


def test_dry_run(tmp_path, monkeypatch, here):
    done = dry_run(tmp_path, "--only", ",".join(STEPS), "--limit", "3600")
    assert done.exit_code == 0, done.output + (tmp_path / "gpu.log").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.log"}, "all there is to carry away"
    summary, *sections = written(tmp_path)["sections"]
    assert summary["facts"]["steps"] == dict.fromkeys([name for name in gpu.ORDER if name in STEPS], "ok")
    assert {s["name"] for s in sections} == {"compile", "ops", "kv", "encoder", "prefill", "families", "policies"}
    operators = {row["op"] for s in sections if s["name"] == "ops" for row in s["rows"]}
    assert {"anchor_stats_select", "gather+norm", "attention_with_stats"} <= operators
    assert not [row for row in summary["rows"] if row["found"] is not None], "toy sizes are no result"

    # What is done is not done again, what fails is named with its last words, and figures of this commit stay.
    content = written(tmp_path)
    content["sections"][0]["facts"]["steps"]["ops"] = "stopped"
    (tmp_path / "gpu.json").write_text(json.dumps(content))
    monkeypatch.setattr(gpu, "_process", lambda *_: "exit status 3: no such kernel")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)  # no clone: nothing to build or to test
    done = dry_run(tmp_path)
    assert done.exit_code == 1
    assert "ops: exit status 3: no such kernel" in done.output and "encoder: done before" in done.output
    assert len(written(tmp_path)["sections"]) == 1 + len(sections)

    # Those of another commit go.
    content = written(tmp_path)
    content["sections"][0]["facts"]["commits"]["kv"] = "another"
    (tmp_path / "gpu.json").write_text(json.dumps(content))
    dry_run(tmp_path)
    commands = [section["command"] for section in sections]
    assert [s["command"] for s in written(tmp_path)["sections"][1:]] == [c for c in commands if " kv " not in c]


def test_what_is_measured_is_on_disk_whatever_comes_next(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    began = []

    def process(command, *_):
        began.append(command)
        if len(began) == 3:
            raise KeyboardInterrupt
        return "ok"

    monkeypatch.setattr(gpu, "_process", process)
    with pytest.raises(KeyboardInterrupt):
        gpu.run(tmp_path, True, (), 100.0, lambda *_: None, lambda _: None)
    first = gpu.names()[:2]
    assert written(tmp_path)["sections"][0]["facts"]["steps"] == dict.fromkeys(first, "ok")
    report = gpu.run(tmp_path, True, (), 0.5, lambda *_: None, lambda _: None)
    assert [name for name, fate in report.sections[0].facts["steps"].items() if fate == "ok"] == first
    assert f"{gpu.names()[2]}: no time left" in report.failed[0]


@pytest.mark.parametrize(("problem", "done"), [(None, True), ("no library", False)])
def test_a_build_is_not_done_where_its_library_is_not(tmp_path, monkeypatch, problem, done):
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "native_error", lambda: problem)
    monkeypatch.setattr(gpu, "_process", lambda *_: "ok")
    said: list[str] = []
    gpu.run(tmp_path, True, ("build",), 100.0, lambda *_: None, lambda _: None)
    gpu.run(tmp_path, True, (), 100.0, lambda *_: None, said.append)
    assert (said[0] == "build: done before") == done


def test_every_step_has_its_turn_and_a_command_of_its_own():
    assert sorted(gpu.ORDER) == sorted(["build", "tests", *gpu.CHECKERS, *STEPS])
    for dry in (False, True):
        commands = [step.dry if dry else step.real for step in gpu.STEPS]
        assert len(set(commands)) == len(commands), "figures are told apart by the command that made them"


@pytest.mark.parametrize("step", gpu.STEPS, ids=lambda step: step.name)
def test_options_of_the_real_run_exist(step):
    """Parsed, not run."""
    import typer

    name, *options = step.real.format(arch=90).split()
    command = typer.main.get_command(app).get_command(None, name)
    assert command.make_context(name, options).params["device" if name != "compile" else "arch"] in ("cuda", "90")


@pytest.mark.parametrize(
    ("deaf", "words"), [("", "KeyboardInterrupt"), ("signal.signal(signal.SIGINT, signal.SIG_IGN)", "in <module>")]
)
def test_a_step_that_takes_too_long_says_where_it_was(tmp_path, monkeypatch, deaf, words):
    monkeypatch.setattr(gpu, "GRACE", 1)
    command = [sys.executable, "-c", f"import signal, time\n{deaf}\ntime.sleep(60)"]
    fate = gpu._process(command, gpu._environment("ops", True), tmp_path / "gpu.log", 2.0)
    assert fate.startswith("stopped after 2 s: ") and words in (tmp_path / "gpu.log").read_text()


def test_a_command_that_is_not_there(tmp_path):
    assert gpu._process(["no-such-tool"], dict(os.environ), tmp_path / "gpu.log", 1.0).startswith("cannot run no-such")


def test_a_copy_without_git_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("FLOWCUT_COMMIT", "abc123")
    assert machine.commit.__wrapped__() == "abc123"


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
