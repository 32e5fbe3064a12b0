"""report.html: what a reader sees in a browser is what the JSON says, wherever the page is read."""

import io
import json
import math
import re
from itertools import groupby, pairwise
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="the bench extra is not installed")
pytest.importorskip("matplotlib", reason="the bench extra is not installed")

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from flowcut_kernels.bench import charts, contenders, mini_vlm, names, page, report, tables
from flowcut_kernels.bench.commands import app

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
MAIN = RESULTS / "cpu-main-job.json"
HOSTILE = "<img src=x onerror=\"document.title='taken'\"></style><script>document.title='taken'</script>"
MACHINE = {"date": "2026-01-01", "cpu": "a <b>CPU</b>", "isa": [], "cores": 2, "threads": 2, "last-level cache MiB": 32}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page of the committed main job, as the command writes it."""
    folder = tmp_path_factory.mktemp("report")
    done = CliRunner().invoke(app, ["report", str(MAIN), "--out", str(folder)])
    assert done.exit_code == 0, done.output
    assert (folder / "accuracy.png").exists() and str(folder / "report.html") in done.output.replace("\n", "")
    assert json.loads((folder / "report.json").read_text()) == json.loads(MAIN.read_text())
    return folder / "report.html"


def write(folder: Path, *sections: report.Section) -> Path:
    path = folder / "page.html"
    page.write_page(report.Report(MACHINE, "flowcut-bench", list(sections)), path)
    return path


@pytest.mark.parametrize("width, scheme", [(1200, "light"), (360, "dark")])
def test_page_loads_at_any_width(written, visit, width, scheme):
    """Nothing is fetched, logged or wider than the window (`visit`), and text is readable on its ground."""
    seen = visit(written, width=width, color_scheme=scheme)
    assert seen.locator("figure").count() >= 8 and seen.locator("h1").count() == 1
    levels = seen.eval_on_selector_all("h1, h2, h3", "all => all.map(e => +e.tagName[1])")
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert seen.eval_on_selector_all("th:not([scope])", "all => all.length") == 0
    assert seen.eval_on_selector_all("table:not(:has(caption))", "all => all.length") == 0
    small = "all => Math.min(...all.filter(e => e.innerText).map(e => parseFloat(getComputedStyle(e).fontSize)))"
    assert seen.eval_on_selector_all("p, li, td, th, span, small", small) >= 11
    page_colour = seen.evaluate("getComputedStyle(document.body).backgroundColor")
    for where in ("p", "td", ".axis", ".notes", ".ends .place", ".findings b", "small"):
        colour = seen.eval_on_selector(where, "e => getComputedStyle(e).color")
        assert contrast(colour, page_colour) >= 4.5, where
    for where in (".mark.bar", ".mark.thin", ".mark.dot"):
        colour = seen.eval_on_selector(where, "e => getComputedStyle(e).backgroundColor")
        assert contrast(colour, page_colour) >= 3, where


def contrast(a: str, b: str) -> float:
    """WCAG's contrast of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_lines_stand_where_the_json_says(written, visit):
    """Marks and intervals as drawn, read against the axis as drawn."""
    seen = visit(written)
    drawn = seen.evaluate("""() => {
        const chart = document.querySelector("figure:has(.plot)"), middle = e => { const b = e.getBoundingClientRect();
            return [b.x + b.width / 2, b.y + b.height / 2, b.y, b.y + b.height]; };
        const texts = s => [...chart.querySelectorAll(s)].map(e => [e.firstChild.textContent, ...middle(e)]);
        return { y: texts(".ys span"), x: texts(".xs span"), ends: texts(".ends .place"),
            marks: [...chart.querySelectorAll(".series g:has(use)")].map(g => [g.querySelector("title").textContent,
                middle(g.querySelector("use")), middle(g.querySelector(".interval"))]) } }""")
    (y0, *_), (y1, *_) = sorted(drawn["y"], key=lambda tick: float(tick[0]))[:: len(drawn["y"]) - 1]
    at = {float(text): y for text, _, y, *_ in drawn["y"]}
    low, high = float(y0), float(y1)

    def value(y: float) -> float:
        return (low + (y - at[low]) / (at[high] - at[low]) * (high - low)) / 100

    section = report.load(MAIN).section("quality")
    rows = {(row["policy"], row["tokens"]): row for row in section.rows if "accuracy" in row}
    rows = {key: row for key, row in rows.items() if key[0] != "all tokens"}
    assert len(drawn["marks"]) == len(rows)
    columns = {text: x for text, x, *_ in drawn["x"]}
    for text, (x, y, *_), (_, _, top, bottom) in drawn["marks"]:
        policy, tokens = re.match(r"(.*), (\d+) tokens", text).groups()
        row = rows[policy, int(tokens)]
        assert value(y) == pytest.approx(row["accuracy"], abs=0.002), text
        assert (value(bottom), value(top)) == pytest.approx((row["low"], row["high"]), abs=0.003), text
        assert abs(x - columns[tokens]) < 15 and f"{100 * row['accuracy']:.1f} %" in text
    assert {text for text, *_ in drawn["ends"]} == {policy for policy, _ in rows}
    places = sorted(y for _, _, y, *_ in drawn["ends"])
    assert min(b - a for a, b in pairwise(places)) >= 14  # no name covers another


def test_bars_stand_where_the_json_says(written, visit):
    seen = visit(written, width=360)
    bars = seen.evaluate("""() => [...document.querySelectorAll("figure:has(.bars)")].map(f => [
        f.querySelector("h3").textContent,
        [...f.querySelectorAll("thead .tick")].map(t => [t.textContent, t.style.left]),
        [...f.querySelectorAll("tbody tr:has(.track)")].map(r => {
            const track = r.querySelector(".track").getBoundingClientRect();
            const end = kind => {
                const mark = r.querySelector(".mark." + kind)?.getBoundingClientRect();
                if (!mark || !track.width) return null;
                const at = /bar|thin|second/.test(kind) ? mark.right : mark.x + mark.width / 2;
                return 100 * (at - track.x) / track.width;
            };
            return [r.querySelector(".value").textContent, ...["bar", "thin", "dot", "roof", "second"].map(end)];
        })])""")
    found = {title: (ticks, rows) for title, ticks, rows in bars}
    sections = report.load(MAIN)

    def unit(title: str) -> tuple[float, float]:
        """Percent of the track by unit of the axis, and where zero is."""
        (text, left), (other, right) = found[title][0][0], found[title][0][-1]
        a, b, x, y = (float(v.rstrip("%")) for v in (text, other, left, right))
        return (y - x) / (b - a), x - a * (y - x) / (b - a)

    rows = [row for row in sections.section("ops").rows if row["op"] == "anchor_stats" and row["bytes"] > 2**26]
    scale, zero = unit("Operators against the memory's limit")
    for row, (text, bar, thin, _, roof, _) in zip(rows, found["Operators against the memory's limit"][1], strict=False):
        assert (bar - zero) / scale == pytest.approx(100 * row["of_copy"], abs=1)
        assert (thin - zero) / scale == pytest.approx(100 * row["of_copy"] / row["speedup"], abs=1)
        assert (roof - zero) / scale == pytest.approx(100, abs=1)
        assert text == f"{row['of_copy']:.0%} ({row['gbs']:.0f} GB/s, {row['speedup']:.1f}x)"

    rows = [row for row in sections.section("quality").rows if "over_flowcut" in row]
    rows.sort(key=lambda row: (-row["tokens"], -row["over_flowcut"]))
    scale, zero = unit("Against FlowCut")
    for row, (text, _, _, dot, *_) in zip(rows, found["Against FlowCut"][1], strict=True):
        value = 100 * row["over_flowcut"]
        assert text.startswith(f"{value:+.1f} (")
        assert dot is None if value < -10 else (dot - zero) / scale == pytest.approx(value, abs=0.2)

    rows = sections.section("prefill").rows
    stock, *pruned = found["Time to the first token against visual tokens"][1]
    assert stock[0] == tables.duration(rows[0]["stock_first_seconds"])
    scale, zero = unit("Time to the first token against visual tokens")
    for row, (text, encoder, *_, first) in zip(rows, pruned, strict=True):
        for part, end in (("encoder", encoder), ("first", first)):
            wanted = 100 * row[f"{part}_seconds"] / row["stock_first_seconds"]
            assert (end - zero) / scale == pytest.approx(wanted, abs=1)
        assert text == f"{tables.duration(row['first_seconds'])} ({row['speedup']:.2f}x as fast)"
    scale, zero = unit("Encoder time against the stock tower")
    ends = [bar for _, bar, *_ in found["Encoder time against the stock tower"][1]]
    ratios = [100 * row["time_ratio"] for row in sections.section("encoder").rows]
    assert [(end - zero) / scale for end in ends] == pytest.approx(ratios, abs=1)


def test_keyboard_reaches_tables_and_names(written, visit):
    seen = visit(written)
    sections = report.load(MAIN).sections
    number = [section.name for section in sections].index("ops")
    table = f"#table-{number + 1}-1"
    seen.evaluate("table => document.querySelector(table).closest('details').open = true", table)

    def column(name: str) -> list[str]:
        """Its cells, once Enter is pressed on its head."""
        head = seen.locator(f"{table} th button", has_text=re.compile(f"^{name}$"))
        head.focus()
        seen.keyboard.press("Enter")
        cells = f"rows => rows.map(r => r.cells[{[c.header for c in tables.TABLES['ops']].index(name)}].textContent)"
        return seen.eval_on_selector_all(f"{table} tbody tr", cells)

    for descending in (True, False):
        shown = [float(text.rstrip("x")) for text in column("faster")]
        assert shown == sorted(shown, reverse=descending) and len(shown) == len(sections[number].rows)
    scale = {"s": 1, "ms": 1e-3, "µs": 1e-6}
    shown = [float(a) * scale[b] for a, b in (text.split()[:2] for text in column("time"))]
    assert shown == sorted(shown, reverse=True)
    names_together = [name for name, _ in groupby(column("operator"))]
    assert len(names_together) == len({row["op"] for row in sections[number].rows})

    lines = seen.locator("figure:has(.plot)").first
    assert lines.locator(".plot .series.s2").is_visible()
    lines.locator(".pick2").focus()
    seen.keyboard.press("Space")
    assert not lines.locator(".plot .series.s2").is_visible() and lines.locator(".plot .series.s1").is_visible()
    box = seen.locator(".scroll").first
    assert box.get_attribute("tabindex") == "0" and box.get_attribute("aria-label")


def test_hostile_names_stay_names(visit, tmp_path):
    row = dict(tokens=8, share=0.1, accuracy=0.5, low=0.4, high=0.6, questions=4, ok=True, encoder_seconds=1.0,
               kinds={HOSTILE: 0.5})  # fmt: skip
    beside = dict(over_flowcut=0.1, over_flowcut_low=0.05, over_flowcut_high=0.15)
    rows = [row | dict(policy="FlowCut"), row | beside | dict(policy=HOSTILE)]
    section = report.Section("quality", HOSTILE, HOSTILE, rows, dict(patches=80), [HOSTILE], [HOSTILE])
    other = report.Section(HOSTILE, HOSTILE, "", [{HOSTILE: HOSTILE, "ok": True}])
    path = write(tmp_path, section, other)
    assert "<img" not in path.read_text()
    seen = visit(path, width=360)
    assert seen.title() != "taken" and seen.locator(".ends .place").nth(1).inner_text() == HOSTILE
    assert "1 check failed" in seen.locator("[role=alert]").inner_text()


def test_sections_nobody_knows_get_a_table(visit, tmp_path):
    rows = [
        dict(policy="a", tokens=3, first_seconds=0.0021, ratio=1 / 3, schedule=[1, 2], ok=True, refcheck="ok"),
        dict(policy="b", tokens=None, note="not reachable", ok=False, refcheck="FAILED: so"),
    ]
    seen = visit(write(tmp_path, report.Section("something new", "New", "flowcut-bench new", rows)), width=360)
    heads = [text.split()[0] for text in seen.locator("thead th").all_inner_texts()]
    assert heads == ["policy", "tokens", "first", "ratio", "note", "check"]
    first, second = (row.locator("th, td").all_inner_texts() for row in seen.locator("tbody tr").all())
    assert first == ["a", "3", "2.1 ms", "0.3333", "-", "ok"] and second[-2:] == ["not reachable", "FAILED: so"]


@pytest.mark.parametrize("width, scheme", [(1200, "light"), (360, "dark")])
def test_scene_is_drawn_from_what_the_json_says(visit, tmp_path, width, scheme):
    """Kept patches show the scene, dropped ones fade into the page, in every panel."""
    (asked,) = mini_vlm.questions("dev", 1)
    facts = dict(split="dev", seed=0, question=asked.prompt.removeprefix("<image> "), answer=asked.answer,
                 said_by_stock="1", said="2", cuts=[dict(layer=1, kept=12), dict(layer=3, kept=4)],
                 patches=["2211", "1111", "1111", "0022"])  # fmt: skip
    rows = [dict(policy="FlowCut", tokens=4, share=0.25, accuracy=0.5, low=0.4, high=0.6, kinds={}, ok=True)]
    section = report.Section("quality", "", "", rows, dict(patches=16, scene=facts))
    seen = visit(write(tmp_path, section), width=width, color_scheme=scheme)
    assert (
        f"“{facts['question']}”: {asked.answer} is right. The model says “1” with all patches"
        in seen.locator(".scene p").inner_text()
    )
    panels = seen.locator(".scene li").all()
    assert [panel.inner_text() for panel in panels] == ["all 16 patches", "12 after layer 1", "4 after layer 3"]
    ground = np.array(
        [int(x) for x in re.findall(r"\d+", seen.evaluate("getComputedStyle(document.body).background"))[:3]]
    )
    for cut, panel in enumerate(panels):
        shown = Image.open(io.BytesIO(panel.locator("svg").screenshot())).convert("RGB").resize((160, 160))
        for number, digit in enumerate("".join(facts["patches"])):
            box = [40 * (number % 4) + 8, 40 * (number // 4) + 8]  # the middle of a patch
            mean, scene = (np.asarray(x.convert("RGB").crop((*box, box[0] + 24, box[1] + 24))).mean((0, 1)) for x in
                           (shown, asked.image))  # fmt: skip
            wanted = scene if int(digit) >= cut else 0.2 * scene + 0.8 * ground
            assert np.abs(mean - wanted).max() < 8, (cut, number)

    facts |= dict(answer="another one", said=HOSTILE)
    seen = visit(write(tmp_path, section), width=width)
    assert "another one by now" in seen.locator(".scene p").inner_text() and seen.locator("image").count() == 0


def test_first_token_is_told_at_the_budget_of_the_accuracy():
    """With what it was measured on, beside the number."""
    rows = [dict(tokens=tokens, stock_tokens=576, speedup=speedup, stock_first_seconds=2.0, first_seconds=2 / speedup,
                 stock_kv_bytes=100, kv_bytes=16)
            for tokens, speedup in ((192, 1.6), (64, 2.5), (16, 3.0))]  # fmt: skip
    section = report.Section("prefill", "", "", rows, dict(text_parameters_millions=135.5))
    (finding,) = page.findings(report.Report(MACHINE, "", [section]))
    assert finding.figure == "2.50x" and "(2 s → 800 ms) with 64 of 576 visual tokens (11%)" in finding.sentence
    assert finding.model == "random weights, a language model of 136 M parameters"
    section.rows = rows[:1]
    assert page.findings(report.Report(MACHINE, "", [section]))[0].figure == "1.60x"


@pytest.mark.parametrize("name", sorted(path.stem for path in RESULTS.glob("cpu-*.json")))
def test_every_committed_result_has_a_page(name, tmp_path):
    found = report.load(RESULTS / f"{name}.json")
    page.write_page(found, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "nan%" not in text and "inf%" not in text and len(text) < 400_000
    assert all(charts.charts(s, found.machine) for s in found.sections if s.name in charts.CHARTS)


def test_page_says_where_something_is_ahead():
    def row(policy, tokens, low, high):
        return dict(policy=policy, tokens=tokens, over_flowcut=0.02, over_flowcut_low=low, over_flowcut_high=high)

    rows = [row("hybrid", 8, 0.01, 0.03), row("uniform grid", 16, 0.01, 0.03), row("CLS attention", 16, 0.015, 0.025),
            row("random", 32, -0.01, 0.03), dict(policy="FastV", tokens=8, unreachable="why")]  # fmt: skip
    section = report.Section("quality", "", "", rows)
    assert page.ahead_of_flowcut(section) == [
        "With 16 tokens ahead of FlowCut beyond chance: uniform grid, a floor, by 2.0 points (95 % interval 1.0 to "
        "3.0); CLS attention, a single criterion, by 2.0 points (95 % interval 1.5 to 2.5).",
        "With 8 tokens ahead of FlowCut beyond chance: hybrid by 2.0 points (95 % interval 1.0 to 3.0).",
    ]
    section.rows = section.rows[3:]
    assert page.ahead_of_flowcut(section) == ["Nothing is ahead of FlowCut beyond chance in this run."]
    section.rows = section.rows[1:]
    assert page.ahead_of_flowcut(section) == []


def test_policies_side_by_side_and_what_cannot_be_reached():
    """Sections of other commands: rows without figures are in the table, not in the charts."""
    common = dict(batch=1, dtype="bfloat16", tokens=64, encoder_seconds=2.0, ok=True, refcheck="ok")
    rows = [common | dict(policy="stock", tokens=576, llm_seconds=2.0, first_seconds=4.0),
            common | dict(policy="FastV", llm_seconds=1.0, first_seconds=3.0, speedup=1.3),
            common | dict(policy="FlowCut", encoder_seconds=1.0, llm_seconds=1.0, first_seconds=2.0, speedup=2.1),
            dict(policy="SparseVLM", tokens=64, batch=1, ok=True, unreachable="(2 * 576 + 1) / 3")]  # fmt: skip
    (chart,) = charts.charts(report.Section("policies", "", "", rows), {})
    ((heading, bars),) = chart.groups
    (finding,) = page.findings(report.Report(MACHINE, "", [report.Section("policies", "", "", rows)]))
    assert finding.figure == "2.10x" and "64 tokens on average, the fastest of all" in finding.sentence
    assert heading == "64 tokens on average, batch 1" and [bar.label for bar in bars] == ["stock", "FlowCut", "FastV"]
    assert [bar.marks[1].end for bar in bars] == [100, 50, 75] and bars[1].text == "2 s (2.10x as fast)"

    rows = [dict(variant="criteria=attention", tokens=8, share=0.1, ok=True, over_default=-0.05, over_default_low=-0.06,
                 over_default_high=-0.04)]  # fmt: skip
    (chart,) = charts.charts(report.Section("ablation", "", "", rows), {})
    lists = dict(tokens=8, share=0.1, ok=True, accuracy=0.5, low=0.4, high=0.6, f1=0.75, f1_low=0.7, f1_high=0.8)
    rows = [lists | dict(policy="all tokens", tokens=80), lists | dict(policy="FlowCut"), lists | dict(policy="FastV")]
    right, digits = charts.charts(report.Section("generation", "", "", rows), {})
    assert right.series[1].points[-1].text == "FastV, 8 tokens: 50.0 % (40.0 % to 60.0 %)"
    assert digits.series[1].points[-1].text == "FastV, 8 tokens: 75.0 % (70.0 % to 80.0 %)"
    assert chart.groups[0][1][0].text == "-5.0 (-6.0 to -4.0)" and chart.groups[0][1][0].marks[-1].tone == "behind"


def test_every_policy_is_explained_and_told_apart():
    assert set(contenders.NAMES) <= set(names.LOOKS) and all(look.meaning for look in names.LOOKS.values())
    known = names.looks([*names.LOOKS, *(f"new {i}" for i in range(20))])
    assert len({(look.colour, look.marker) for look in known.values()}) == len(known)


def test_labels_keep_apart():
    places = charts.spread([50, 50, 51, 99, 99.5, 100], 4)
    gaps = [b - a for a, b in pairwise(places)]
    assert min(gaps) >= 4 - 1e-9 and places[-1] <= 100 and math.isclose(places[0], 50)
