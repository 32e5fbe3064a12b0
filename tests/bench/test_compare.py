"""flowcut-bench compare on made-up files: what is matched, what counts as a change, and the exit status."""

from copy import deepcopy
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="the bench extra is not installed")
pytest.importorskip("matplotlib", reason="the bench extra is not installed")

from typer.testing import CliRunner

from flowcut_kernels.bench import compare, machine
from flowcut_kernels.bench.commands import app
from flowcut_kernels.bench.report import Report, Section, load

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
OP = dict(op="gather", case="B=1", dtype="float32", backend="cpp", ok=True, refcheck="ok", seconds=0.010, spread=0.02,
          speedup=2.0, speedup_low=1.9, speedup_high=2.1)  # fmt: skip
ANSWERS = dict(policy="FlowCut", tokens=36, ok=True, accuracy=0.80, low=0.78, high=0.82)


def report(*sections: Section) -> Report:
    return Report(machine.facts(), "flowcut-bench", list(sections))


def ops(*rows: dict) -> Report:
    return report(Section("ops", "Operators", "", [OP | row for row in rows], dict(repeats=9)))


def verdicts(a: Report, b: Report) -> list[str]:
    return [row["verdict"] for section in compare.compare(a, b) for row in section.rows]


@pytest.mark.parametrize(
    "change, verdict",
    [
        ({}, "within the spread"),
        # Intervals: A has 9.8..10.2 ms and 1.9..2.1x.
        (dict(seconds=0.0104, speedup=1.7, speedup_low=1.6, speedup_high=1.8), "within the spread"),
        (dict(seconds=0.012, speedup=1.7, speedup_low=1.6, speedup_high=1.8), "worse"),
        (dict(seconds=0.008, speedup=2.5, speedup_low=2.4, speedup_high=2.6), "better"),
        # Slower, but so was torch; and torch alone was slower.
        (dict(seconds=0.012), "within the spread"),
        (dict(seconds=0.012, speedup=2.5, speedup_low=2.4, speedup_high=2.6), "within the spread"),
        (dict(speedup=2.5, speedup_low=2.4, speedup_high=2.6), "within the spread"),
        # A wide spread of B alone hides as much.
        (dict(seconds=0.012, spread=0.2, speedup=1.7, speedup_low=1.6, speedup_high=1.8), "within the spread"),
        (dict(seconds=0.012, spread=None, speedup=1.7, speedup_low=1.6, speedup_high=1.8), "no spread known"),
        (dict(seconds=0.012, speedup=1.7, speedup_low=None), "within the spread"),
        (dict(ok=False, refcheck="FAILED: wrong", seconds=None), "FAILED in B"),
    ],
)
def test_verdict_of_a_time(change, verdict):
    assert verdicts(ops({}), ops(change)) == [verdict]


def test_direction_and_what_has_no_spread():
    """Accuracy is better when higher; bytes are counted; a time without a spread says nothing."""
    a = report(Section("quality", "Answers", "", [ANSWERS]),
               Section("kv", "Cache", "", [dict(dtype="bf16", visual=576, tokens=64, decode_seconds=0.01, speedup=1.3,
                                                kv_bytes=1000, ok=True)]))  # fmt: skip
    b = deepcopy(a)
    b.sections[0].rows[0] |= dict(accuracy=0.85, low=0.83, high=0.87)
    b.sections[1].rows[0] |= dict(kv_bytes=1001, decode_seconds=0.1)
    assert verdicts(a, b) == ["better", "no spread known", "worse"]
    assert verdicts(b, a) == ["worse", "no spread known", "better"]
    b.sections[0].rows[0] |= dict(low=0.81)
    assert verdicts(a, b)[0] == "within the spread"


def test_rows_are_matched_by_what_they_are_of():
    """In any order; what one file lacks is named; equal ones go by their order; settings that differ are named."""
    a = ops({}, dict(case="B=8"), dict(case="B=8", seconds=1.0), dict(op="attention"))
    b = ops(dict(case="B=8"), dict(backend="triton"), dict(case="B=8", seconds=1.0), dict(op="select"))
    b.sections[0].facts["repeats"] = 5
    (section,) = compare.compare(a, b)
    assert [row["row"] for row in section.rows] == [
        "gather, B=1, float32",
        "gather, B=8, float32",
        "gather, B=8, float32 (2)",
    ]
    assert {row["change"] for row in section.rows} == {0.0}
    assert section.notes == [
        "measured differently: repeats 9 → 5",
        "only in A: attention, B=1, float32",
        "only in B: select, B=1, float32",
        "backend cpp → triton",
        "3 within the spread",
    ]
    assert compare.missing(a, report(Section("kv", "Cache", "", []))) == ["only in A: ops", "only in B: kv"]


def run(*arguments: object):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_command(tmp_path):
    """Both machines, what changed alone unless all is asked for, and an exit status where that is asked for."""
    worse = dict(seconds=0.020, speedup=1.0, speedup_low=0.9, speedup_high=1.1)
    a, b = ops({}, dict(case="B=8")), ops(worse, dict(case="B=8"))
    b.machine |= dict(cpu="another processor", threads=77)
    for name, made in (("a", a), ("b", b)):
        made.save(tmp_path / f"{name}.json")
    done = run(tmp_path / "a.json", tmp_path / "b.json")
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "A: " in text and "B: another processor" in text and "77 threads" in text
    assert f"not the same machine or versions: threads {a.machine['threads']} → 77" in text
    assert "10 ms ±2% 20 ms ±2% +100.0% 2.00→1.00x worse" in text
    assert "B=8" not in text and "1 worse, 1 within the spread" in text
    assert max(map(len, done.output.splitlines())) <= 100
    assert "B=8" in run(tmp_path / "a.json", tmp_path / "b.json", "--all").output
    assert run(tmp_path / "a.json", tmp_path / "b.json", "--fail-on-regression").exit_code == 1
    assert run(tmp_path / "b.json", tmp_path / "a.json", "--fail-on-regression").exit_code == 0
    assert run(tmp_path / "a.json", tmp_path / "a.json", "--fail-on-regression").exit_code == 0
    report(Section("kv", "Cache", "", [])).save(tmp_path / "c.json")
    done = run(tmp_path / "a.json", tmp_path / "c.json")
    assert done.exit_code == 2 and "no section in common" in done.output
    for name, content in (("d.json", "{"), ("e.json", '{"schema": 99}'), ("f.json", "[1]")):
        (tmp_path / name).write_text(content)
        done = run(tmp_path / "a.json", tmp_path / name)
        assert done.exit_code == 2 and name in done.output


def test_committed_results_can_be_compared():
    """Each with itself: every figure is found, and nothing has changed."""
    for path in RESULTS.glob("cpu-*.json"):
        known = load(path)
        sections = compare.compare(known, known)
        assert sections and all(section.rows for section in sections), path.name
        assert {row["verdict"] for s in sections for row in s.rows} <= {"within the spread", "no spread known"}
