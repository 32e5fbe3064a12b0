"""Measured figures on the pages are those of benchmarks/results."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BENCHMARKS = (DOCS / "benchmarks.md").read_text()
spec = importlib.util.spec_from_file_location("fill_tables", DOCS / "fill_tables.py")
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if tables.MARKED.search(path.read_text())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_tables_are_those_of_the_files(page):
    text = page.read_text()
    assert tables.filled(text) == text, f"{page.name} has other figures than benchmarks/results: run `make docs`"


def test_an_edited_figure_is_set_right():
    stale = BENCHMARKS.replace("| FlowCut | 89.9 ± 1.1 |", "| FlowCut | 98.9 ± 1.1 |")
    assert stale != BENCHMARKS and tables.filled(stale) == BENCHMARKS


@pytest.mark.parametrize("marker", ["cpu-ops.json: anchor_stat", "cpu-kv.json: quality", "compile.json: operators"])
def test_a_table_that_a_file_does_not_have_is_refused(marker):
    with pytest.raises(ValueError, match="has no rows of"):
        tables.filled(f"<!-- {marker} -->\n<!-- end -->")


def test_what_is_measured_is_not_written_by_hand():
    by_hand = re.findall(r"(?:^\|.*\n)+", tables.MARKED.sub("", BENCHMARKS), flags=re.MULTILINE)
    assert len(by_hand) == 1 and all(line.endswith("not measured yet |") for line in by_hand[0].splitlines()[2:])


def test_readme_repeats_figures_of_the_page():
    """Those of a row stand in the part of docs/benchmarks.md with its file's table, there perhaps with more digits."""
    figure = r"\d+(?:\.\d+)?"
    rows = re.findall(r"^\| .* \| (.*) \| .*`([\w-]+\.json)` \|$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(rows) == 8
    for result, file in rows:
        (part,) = (part for part in BENCHMARKS.split("\n## ") if re.search(f"<!-- .*{file}", part))
        there = [float(number) for number in re.findall(figure, part)]
        for found in re.findall(figure, re.sub(r"`.*?`", "", result)):
            digits = len(found.partition(".")[2])
            assert any(f"{number:.{digits}f}" == found for number in there), f"{found} is not in {file}: {result}"
