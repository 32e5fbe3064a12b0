"""flowcut-bench at toy sizes: what searches and the main job write, what happens when a check fails, wrong options.

tests/test_docs.py runs every subcommand, and reads the tables it writes.
"""

import json
import re
import shlex
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flowcut_kernels as fk

typer = pytest.importorskip("typer", reason="the bench extra is not installed")
pytest.importorskip("matplotlib", reason="the bench extra is not installed")
pytest.importorskip("optuna", reason="the tune extra is not installed")

from typer.testing import CliRunner  # noqa: E402

from flowcut_kernels.bench import cases, cli, encoder, mini_vlm, ops, quality, report, shapes, timing  # noqa: E402
from flowcut_kernels.bench import conversation as talk  # noqa: E402
from flowcut_kernels.bench.commands import app  # noqa: E402

SCENE = shlex.quote(str(Path(__file__).parents[2] / "docs" / "images" / "scene.png"))
SMALL = dict(image_size=112, hidden_size=64, intermediate_size=128, num_attention_heads=1)
COMMANDS = {
    "ops": "ops --toy --repeats 1",
    "encoder": "encoder --layers 6 --image-size 112 --hidden 64 --tokens 16,8 --batch 1,2 --repeats 1",
    "quality": "quality --questions 16 --policies FlowCut,random",
    "conversation": "conversation --questions 16",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing beyond cache: the copy bandwidth and the flushes use a small buffer."""
    monkeypatch.setattr(ops, "Copy", lambda device: timing.Copy(device, 2**20))


@pytest.fixture
def untrained(monkeypatch):
    """A stand-in without weights, for what does not depend on them."""
    from flowcut_kernels.bench.mini_vlm import model

    monkeypatch.setattr(mini_vlm, "load", lambda dtype=None: (model.build(0).to(dtype).eval(), model.processor()))


def run(command: str, *extra: str):
    return CliRunner().invoke(app, [*shlex.split(command), *map(str, extra)])


@pytest.mark.parametrize(("policy", "kind"), [("hybrid", fk.FlowCut), ("vflowopt", fk.VFlowOpt)])
def test_tune_writes_policies_and_a_curve(policy, kind, untrained, tmp_path):
    """And goes on in a storage: with as many trials as it has, nothing is searched again."""
    command = f"tune --policy {policy} --budget 0.25 --trials 3 --samples 4 --questions 16 --sampler tpe --threads 1"
    files = ("--storage", tmp_path / "tune.log", "--out", tmp_path / "out", "--json", tmp_path / "a.json")
    seen = []
    for _ in range(2):
        done = run(command, *files)
        assert done.exit_code == 0, done.output
        section = report.load(tmp_path / "a.json").sections[0]
        seen.append([{k: v for k, v in row.items() if k != "seconds"} for row in section.rows])
        untuned, tuned = section.rows[1:]
        assert untuned["found"] == "untuned" and tuned["found"] == "tpe" and tuned["objective"] >= untuned["objective"]
        assert tuned["retention"] == pytest.approx(0.25) and "gain_low" in tuned and "held_out_gain_high" in tuned
        found = section.facts["budgets"]["0.25"]
        assert len(found["curves"]["tpe"]) == 3 and max(found["curves"]["tpe"]) == pytest.approx(tuned["objective"])
        assert Image.open(tmp_path / "out" / f"search-{policy}.png").width > 600
        best = kind.from_json(tmp_path / "out" / f"{policy}-0.25-tpe.json")
        assert best == kind.from_json(json.dumps(found["policies"]["tpe"]))
    assert seen[0] == seen[1]


def test_main_job_writes_a_self_contained_page(untrained, tmp_path):
    done = run("--toy", "--threads", 1, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "report.json").read_text())
    sections = {s["name"]: s for s in content["sections"]}
    assert list(sections) == ["quality", "prefill", "encoder", "ops"]
    budgets = sections["prefill"]["rows"]
    assert [row["tokens"] for row in budgets] == [16, 8]
    assert len({row["stock_first_seconds"] for row in budgets}) == 1  # of one and the same rounds
    scene = sections["quality"]["facts"]["scene"]
    survived = np.array([list(map(int, row)) for row in scene["patches"]])
    assert [int((survived > i).sum()) for i in range(len(scene["cuts"]))] == [cut["kept"] for cut in scene["cuts"]]
    assert {"cpu", "torch", "flowcut_kernels", "threads"} <= set(content["machine"])
    for name in ("accuracy.png", "encoder.png", "operators.png", "entropy-quality.png"):
        assert Image.open(tmp_path / name).width > 600

    page = (tmp_path / "report.html").read_text()
    references = []

    class Collect(HTMLParser):
        def handle_starttag(self, tag, attributes):
            references.extend(
                value for key, value in attributes if key in ("src", "href") and not value.startswith("#")
            )
            assert tag not in ("link", "iframe")

    Collect().feed(page)
    assert references and all(value.startswith("data:image/png;base64,") for value in references)
    assert not re.search(r"url\(|@import|https?://", page)
    assert "flowcut-bench quality" in page and str(tmp_path) not in page
    # All that it shows is in the JSON beside it.
    assert run("report", tmp_path / "report.json", "--out", tmp_path / "again").exit_code == 0
    assert (tmp_path / "again" / "report.html").read_text() == page


def test_wrong_operator_fails_without_a_timing(monkeypatch, tmp_path):
    right = cases.anchor_stats

    def wrong(*args, backend=None, **options):
        attention, *rest = right(*args, backend=backend, **options)
        return (attention if backend == "reference" else attention * 1.01, *rest)

    monkeypatch.setattr(cases, "anchor_stats", wrong)
    done = run(COMMANDS["ops"], "--json", tmp_path / "a.json")
    assert done.exit_code == 1 and "FAILED" in done.output
    for row in report.load(tmp_path / "a.json").sections[0].rows:
        assert row["ok"] == (row["op"] not in ("anchor_stats", "received+hubs"))
        assert ("seconds" in row) == row["ok"]


def test_wrong_selection_fails(monkeypatch):
    right = cases.score_select

    def wrong(*args, backend=None, **options):
        score, index, lengths = right(*args, backend=backend, **options)
        return score, index if backend == "reference" else index.roll(1, 1), lengths

    monkeypatch.setattr(cases, "score_select", wrong)
    assert run(COMMANDS["ops"], "--only", "select").exit_code == 1


def test_wrong_encoder_fails(monkeypatch):
    from flowcut_kernels.modules import encoder as blocks

    right, native = blocks._attend, blocks.attention
    monkeypatch.setattr(blocks, "_attend", lambda *a, **k: 1.1 * right(*a, **k))
    monkeypatch.setattr(blocks, "attention", lambda *a, **k: 1.1 * native(*a, **k))
    done = run(COMMANDS["encoder"], "--dtype", "fp32")
    assert done.exit_code == 1 and "check failed" in done.output


def test_wrong_reading_of_a_scene_fails(monkeypatch, untrained):
    right = quality.answers
    monkeypatch.setattr(quality, "answers", lambda *a: right(*a) + 0.1)
    done = run(COMMANDS["quality"])
    assert done.exit_code == 1 and "check failed" in done.output


def test_wrong_second_question_fails(monkeypatch, untrained):
    right = talk.Conversations.hold

    def wrong(*args):
        found = right(*args)
        return found._replace(second=found.second + 0.1)

    monkeypatch.setattr(talk.Conversations, "hold", wrong)
    done = run(COMMANDS["conversation"])
    assert done.exit_code == 1 and "check failed" in done.output


@pytest.mark.parametrize("weights", shapes.WEIGHTS)
def test_schedule_of_the_random_weights(weights):
    """The entropy of the class token falls with depth, so that tokens leave before the last cut."""
    section = encoder.measure(
        dtypes=(torch.float32,), batches=(1,), tokens=(8,), layers=12, repeats=1, weights=weights,
        shape=dict(image_size=112, hidden_size=256, intermediate_size=256, num_attention_heads=4),
    )  # fmt: skip
    profile, schedule = section.facts["entropy"], section.facts["schedule"]
    assert profile[0] > 0.9 and min(profile) == min(profile[-3:]) < profile[0] - 0.05
    assert schedule == sorted(schedule, reverse=True) and schedule[-1] == 8 and schedule[-2] < 60


def test_shares_of_time_add_up():
    section = encoder.measure(
        dtypes=(torch.float32,), batches=(1,), tokens=(8,), layers=6, repeats=1, shape=SMALL
    )  # fmt: skip
    (row,) = section.rows
    parts = sum(row[f"{name}_seconds"] for name in (*encoder.SCORING, "rest"))
    assert parts == pytest.approx(row["split_seconds"]) and 0 < row["scoring_share"] < 1
    assert row["overhead"] == pytest.approx(row["time_ratio"] / row["flop_ratio"])


def test_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    hits = [
        low <= 0.7 <= high
        for low, high in (quality.interval((rng.random((200, 4)) < 0.7).mean(1), i) for i in range(100))
    ]
    assert 88 <= sum(hits) <= 100


def test_verdict_says_where_flowcut_is_behind():
    row = dict(tokens=36, policy="uniform grid", over_flowcut=0.05, over_flowcut_low=0.01, over_flowcut_high=0.09)
    (line,) = quality.verdict([row])
    assert "ahead of none; behind uniform grid" in line


def test_interleaved_ratio():
    times = timing.interleave({"a": lambda: sum(range(3000)), "b": lambda: sum(range(30000))}, repeats=5, least=1e-4)
    assert len(times["a"].values) == 5
    ratio = times["b"].per(times["a"])
    assert ratio.quartiles[0] <= ratio.median <= ratio.quartiles[1] and 4 < ratio.median < 25


def test_cold_clock_times_single_calls():
    clock = timing.Clock("cpu", cold=True)
    assert clock.trash is not None and clock.seconds(lambda: None, 2) < 0.01


def test_flow(untrained, tmp_path):
    """The table of `analyze`, in the file too, and a picture; figures do not depend on the folder."""
    picture = tmp_path / "some picture.png"
    pixels = np.random.default_rng(0).integers(0, 255, (150, 200, 3), np.uint8)
    Image.fromarray(pixels).save(picture)
    done = run("flow", picture, "--out", tmp_path / "out", "--hub-threshold", "1.5")
    assert done.exit_code == 0, done.output
    assert Image.open(tmp_path / "out" / "some-picture-flow.png").width > 600
    (section,) = report.load(tmp_path / "out" / "some-picture-flow.json").sections
    model, processor = mini_vlm.load(torch.float32)
    inputs = processor.image_processor([Image.fromarray(pixels)], return_tensors="pt")
    found = fk.analyze(model, inputs, hub_threshold=1.5)
    assert section.rows == [row | dict(ok=True) for row in found.rows()]
    assert section.facts["tiles"] == 1 and section.facts["grid"] == list(found.grid)
    assert all(f"{row['entropy']:.3f}" in done.output for row in section.rows)


@pytest.mark.parametrize(
    "command, message",
    [
        ("ops --dtype fp12", "fp12"),
        ("kv --dtype fp32,bf16", "one at a time"),
        ("ops --backend guess", "'guess'"),
        ("ops --only nothing --toy", "'nothing'"),
        ("encoder --tokens 0", "--tokens"),
        ("encoder --tokens 64,576", "has 576"),
        ("encoder --weights none", "paper-like"),
        ("encoder --hidden 100", "multiple of 64"),
        ("quality --policies guess", "guess"),
        ("quality --split train", "train"),
        ("quality --ablation none", "flowcut or vflowopt"),
        ("quality --ablation flowcut --policies random", "variants of its own"),
        ("quality --ablation flowcut --out somewhere", "no plots"),
        ("tune --policy none", "hybrid"),
        ("tune --budget 0.1,1", "keeps all tokens"),
        ("tune --sampler gp,grid", "gp,grid"),
        ("tune --budget 10", "--budget '10'"),
        ("tune --split train", "train"),
        ("ops --device nowhere", "nowhere"),
        ("compile --arch 90,1", "--arch '90,1' must be of"),
        (f"flow {SCENE} --model no/such/folder", "no/such/folder"),
        (f"flow {shlex.quote(__file__)}", "cannot be read as a picture"),
    ],
)
def test_bad_options_are_named(command, message):
    done = run(command)
    assert done.exit_code == 2 and message in done.output


def test_other_schema_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="schema 99"):
        report.load(tmp_path / "a.json")


def test_missing_extra_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(SystemExit, match=r"^flowcut-bench needs jinja2: .*flowcut-kernels\[bench\]'$"):
        cli.main()


def test_info_prints_backends_and_variables(capsys):
    from flowcut_kernels import info

    info.main()
    text = capsys.readouterr().out
    assert "reference  available" in text and "FLOWCUT_BACKEND" in text and "torch" in text
    assert "planner    available" in text or "no flowcut_kernels._C" in text or "FLOWCUT_NO_NATIVE=1 is set" in text


def test_presets():
    done = run("presets")
    assert done.exit_code == 0, done.output
    assert "SparseVLM.preset(64)         (3 * 576 + 4 * 82 + 9 * 32 + 16 * 18) / 32 = 82.2" in done.output
