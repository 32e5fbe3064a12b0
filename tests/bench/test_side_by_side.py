"""flowcut-bench compare without files, at a toy's size: every policy at equal budgets, checked before it is timed."""

import shlex

import pytest
import torch

pytest.importorskip("typer", reason="the bench extra is not installed")
pytest.importorskip("matplotlib", reason="the bench extra is not installed")

from PIL import Image
from typer.testing import CliRunner

import flowcut_kernels as fk
from flowcut_kernels.bench import compare, report, side_by_side
from flowcut_kernels.bench.commands import app
from flowcut_kernels.bench.contenders import NAMES, contender
from flowcut_kernels.bench.free import FreeSelection
from flowcut_kernels.bench.prefill import prompts
from flowcut_kernels.bench.timing import Samples

TOY = "compare --toy --steps 1 --repeats 1 --threads 1"
SHAPE = side_by_side.shape_for("cpu", toy=True)
LAYERS = SHAPE.text.num_hidden_layers


def run(command: str, *extra: object):
    return CliRunner().invoke(app, [*shlex.split(command), *map(str, extra)])


@pytest.fixture(scope="module")
def arena():
    stock = SHAPE.build("cpu", torch.float32)
    given = prompts(stock, SHAPE, 2)
    return side_by_side.Arena(stock, SHAPE, given["input_ids"], given["pixel_values"], None)


def test_command(tmp_path):
    """A row for the stock model and for every policy and budget; what cannot be reached says why."""
    files = ("--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv", "--out", tmp_path)
    done = run(f"{TOY} --tokens 24,8 --policies VFlowOpt,SparseVLM,FastV", *files)
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 100
    assert Image.open(tmp_path / "policies.png").width > 600
    (section,) = report.load(tmp_path / "a.json").sections
    stock, *rows = section.rows
    assert (stock["policy"], stock["average"], stock["speedup"]) == ("stock", 64, 1)
    assert [(row["policy"], row["tokens"]) for row in rows] == [
        (name, tokens) for tokens in (24, 8) for name in ("VFlowOpt", "SparseVLM", "FastV")
    ]
    reached = [row for row in rows if "unreachable" not in row]
    assert [row["policy"] for row in rows if row not in reached] == ["SparseVLM", "FastV"]
    assert "FastV cannot keep 8 of 64 tokens on average" in " ".join(done.output.split())
    per_token = 2 * 64 * 2  # keys and values of a layer, 64 channels in bfloat16
    for row in reached:
        assert row["kv_bytes"] == per_token * sum(n + side_by_side.TEXT for n in row["layers"])
        assert row["average"] == pytest.approx(row["tokens"], abs=1)
        assert 0 < row["flop_ratio"] < 1 and row["choosing"] < 1
        assert row["encoder_seconds"] > 0 and row["first_seconds"] > 0 and row["decode_seconds"] > 0

    # Two such files are compared row by row.
    done = run("compare --all", tmp_path / "a.json", tmp_path / "a.json")
    assert done.exit_code == 0, done.output
    both = report.load(tmp_path / "a.json")
    (section,) = compare.compare(both, both)
    same = {row["row"] for row in section.rows if row["verdict"] == compare.WITHIN}
    assert any(row.endswith(", FastV, bfloat16, 1, 24") for row in same)


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_free_choice_follows_the_schedule_without_choosing(name, arena, monkeypatch):
    policy = contender(name, 24, LAYERS, SHAPE.patches)
    with fk.patched(arena.stock, policy, record=True):
        checked, stages = arena.refcheck(arena.stock, policy)
    assert checked == "ok"

    def never(*args, **options):
        raise AssertionError("somebody chose")

    for method in ("encoder_select", "feature_select", "decoder_select", "entry_select"):
        monkeypatch.setattr(type(policy), method, never)
    free = FreeSelection.like(policy, stages, arena.pixels.device)
    with fk.patched(arena.stock, free, record=True):
        held = side_by_side.held_by(arena.read(arena.stock).past_key_values)
        seen = fk.trace(arena.stock).stages
    assert held == policy.tokens_by_layer(LAYERS, SHAPE.patches)
    # Where images keep different numbers the free choice keeps the mean.
    assert [(s.name, s.layer, round(sum(s.kept) / 2)) for s in seen] == [
        (s.name, s.layer, round(sum(s.kept) / 2)) for s in stages
    ]


def test_wrong_results_are_not_timed(monkeypatch, tmp_path):
    """Other counts than a policy says, and rows that are not what stock layers make of the tokens."""
    from flowcut_kernels.modules import decoder

    class Liar(fk.FastV):
        def tokens_by_layer(self, layers, tokens):
            return [n - 1 for n in super().tokens_by_layer(layers, tokens)]

    def contenders(name, *sizes):
        return Liar(target_tokens=18, layer=1) if name == "random" else contender(name, *sizes)

    right = decoder._attend
    monkeypatch.setattr(side_by_side, "contender", contenders)
    monkeypatch.setattr(decoder, "_attend", lambda *args, **options: -right(*args, **options))
    done = run(f"{TOY} --tokens 24 --policies random,FastV,VisionZip", "--json", tmp_path / "a.json")
    assert done.exit_code == 1
    (section,) = report.load(tmp_path / "a.json").sections
    _, liar, wrong, right_one = section.rows
    assert liar["refcheck"] == "FAILED: layer 0 holds 64 visual tokens, not 63"
    assert wrong["refcheck"].startswith("FAILED: the first logits differ by")
    assert "first_seconds" not in liar | wrong and right_one["ok"] and right_one["first_seconds"] > 0
    assert [what.split(":")[0] for what in section.failed] == ["random, 24 tokens", "FastV, 24 tokens"]


def test_choosing_is_what_the_free_choice_saves():
    times = {"0 encoder": [2, 2], "0 first": [10, 20], "0 decode": [4, 4], "1 encoder": [1, 1], "1 first": [5, 8],
             "1 decode": [2, 2], "1 free": [4, 6]}  # fmt: skip
    found = side_by_side._figures({name: Samples(values) for name, values in times.items()}, 1, steps=2)
    assert found["choosing_seconds"] == 1.5 and found["choosing"] == pytest.approx((1 / 5 + 2 / 8) / 2)
    assert found["speedup"] == pytest.approx((2 + 2.5) / 2) and found["decode_seconds"] == 1
    assert (found["encoder_speedup"], found["llm_seconds"]) == (2, 5.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tokens 64", "must be below the 64 tokens"),
        ("--policies nobody", "'nobody' is unknown: use flowcut"),
        ("--all", "--all is for two files: give A.json and B.json"),
        ("{file}", "give two files"),
        ("{file} {file} --repeats 3", "--repeats says how to measure: leave the files out"),
    ],
)
def test_bad_options(options, message, tmp_path):
    (tmp_path / "a.json").write_text("{}")
    command = "compare" if "{file}" in options else "compare --toy"
    done = run(f"{command} {options.format(file=tmp_path / 'a.json')}")
    assert done.exit_code == 2 and message in " ".join(done.output.replace("│", " ").split())
