"""Writes the tables of measured figures into the pages, from benchmarks/results: `make docs`.

A table lies between `<!-- FILE.json: NAME -->` and `<!-- end -->`; NAME is one of TABLES or an operator, that of the
compiled kernels has none. Several files in front of the name are runs of one command, or the parts of one table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- ([\w .-]+\.json)(?:: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, Any]


class Table(NamedTuple):
    """Rows with the same labels share a line, whose cells show them, once for each value of ``across``."""

    section: str
    labels: dict[str, Callable[[Row], str]]
    cells: dict[str, Callable[..., str]]  # of all rows that share a place, most often a single one
    across: Callable[[Row], str] = lambda row: ""
    where: Callable[[Row], bool] = lambda row: True

    def lines(self, rows: list[Row]) -> Iterator[str]:
        places: dict[tuple[str, ...], dict[str, list[Row]]] = {}
        for row in rows:
            label = tuple(show(row) for show in self.labels.values())
            places.setdefault(label, {}).setdefault(self.across(row), []).append(row)
        values = list(dict.fromkeys(map(self.across, rows)))
        heads = [*self.labels, *(", ".join(filter(None, (head, value))) for value in values for head in self.cells)]
        yield f"| {' | '.join(heads)} |"
        yield "|---" * len(heads) + "|"
        for label, found in places.items():
            cells = (show(*found[value]) for value in values for show in self.cells.values())
            yield f"| {' | '.join([*label, *cells])} |"


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def between(values: Iterable[Any], show: Callable[[Any], str]) -> str:
    least, *_, most = sorted([*values] * 2)
    return " to ".join(dict.fromkeys([show(least), show(most)]))


def cell(key: str, show: Callable[[Any], str] = str) -> Callable[[Row], str]:
    return lambda row: show(row[key])


def span(key: str, show: Callable[[Any], str], where: Callable[[Row], bool] = lambda row: True) -> Callable[..., str]:
    """From the least to the most: in the first run and, in brackets, in all of them."""

    def spans(*rows: Row) -> str:
        shown = [row for row in rows if where(row)]
        if not shown:
            return ""
        once = [row for row in shown if row["run"] == shown[0]["run"]]
        first, every = (between((row[key] for row in each), show) for each in (once, shown))
        return first if once == shown else f"{first} ({every})"

    return spans


def every(key: str, show: Callable[[Any], str]) -> Callable[..., str]:
    """From the least to the most of all runs."""
    return lambda *rows: between((row[key] for row in rows), show)


def interval(key: str, form: str = ".1f") -> Callable[[Row], str]:
    """A share in %, or a difference in points, ± half of its interval: 95 %, of `choosing` the quartiles."""
    ends = "" if key == "accuracy" else f"{key}_"

    def show(row: Row) -> str:
        if key not in row:
            return "not reachable" if "unreachable" in row else ""
        return f"{100 * row[key]:{form}} ± {50 * (row[f'{ends}high'] - row[f'{ends}low']):.1f}"

    return show


def against_default(row: Row) -> str:
    difference = interval("over_default", "+.1f")(row)
    return f"{100 * row['accuracy']:.1f}" + (f" ({difference})" if difference else "")


def kept(row: Row) -> str:
    return f"{row['tokens']:.0f} ({100 * row['tokens'] / row['facts']['patches']:.0f} %)"


def pruned(row: Row) -> bool:
    return not {row.get("policy"), row.get("variant")} & {"all tokens", "stock"}


def parts(row: Row) -> tuple[str, str]:
    """Of a variant of FlowCut: its criteria, and what else it has instead of the default."""
    criteria, rest = re.fullmatch(r"(?:criteria=([^,]+))?(?:, )?(.*)", row["variant"]).groups()
    return criteria or "all three", "default" if rest in ("", "default") else f"`{rest}`"


def cases(*rows: Row) -> str:
    """How many, and the values that stand in each place of their names."""
    found = [[*row["case"].split(), row["dtype"]] for row in rows if row["run"] == rows[0]["run"]]
    return f"{len(found)}: {'; '.join(', '.join(dict.fromkeys(values)) for values in zip(*found, strict=True))}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.{1 if seconds > 0.004 else 2}f}"


def mebibytes(size: float) -> str:
    return f"{size / 2**20:.3g}"


code, ratio, tenths, percent = "`{}`".format, "{:.2f}".format, "{:.1f}".format, "{:.0%}".format
policies: dict[str, Callable[[Row], str]] = {"policy": cell("policy")}
OPERATOR = Table(
    "ops",
    {"case": cell("case"), "type": cell("dtype")},
    {
        "time": cell("seconds", duration),
        "times faster than": lambda row: f"{row['speedup']:.1f} ({row['torch_form']})",
        "GB/s": cell("gbs", "{:.3g}".format),
        "of copy": cell("of_copy", percent),
        "GFLOP/s": lambda row: f"{row['flops'] / row['seconds'] / 1e9:.3g}" if row["flops"] else "",
    },
)
TABLES = {
    None: Table(
        "compile",
        {"kernel": cell("kernel", code)},
        {
            "variants": lambda *rows: str(len(rows) // 3),
            "warps": span("warps", str),
            "registers sm_80": span("registers", str, lambda row: row["arch"] == 80),
            "sm_90": span("registers", str, lambda row: row["arch"] == 90),
            "sm_100": span("registers", str, lambda row: row["arch"] == 100),
            "shared memory, KiB": span("shared", lambda size: str(size // 1024)),
            "spilled": lambda *rows: str(sum(row["stack"] + row["local"] for row in rows)),
        },
    ),
    "operators": Table(
        "ops",
        {"operator": cell("op", code)},
        {
            "cases": cases,
            "times faster": span("speedup", tenths),
            "of copy, beyond cache": span("of_copy", percent, lambda row: row["wants_copy"] is not None),
        },
    ),
    "cases": Table(
        "ops",
        {"operator": cell("op", code), "case": cell("case")},
        {
            "time": span("seconds", duration),
            "torch": span("torch_seconds", duration),
            "by": lambda *rows: " or ".join(dict.fromkeys(row["torch_form"] for row in rows)),
            "times faster": span("speedup", tenths),
            "of copy": span("of_copy", percent),
        },
    ),
    "quality": Table("quality", policies, {"": interval("accuracy")}, kept, pruned),
    "generation": Table(
        "generation",
        policies,
        {"": lambda row: interval("accuracy")(row) + (f", {row['f1']:.2f}" if "f1" in row else "")},
        kept,
        pruned,
    ),
    "ablation": Table("ablation", {"variant": cell("variant", code)}, {"": against_default}, kept, pruned),
    "criteria": Table(
        "ablation",
        {"criteria": lambda row: parts(row)[0].replace("_", " "), "tokens": kept},
        {"": against_default},
        lambda row: parts(row)[1],
        lambda row: row["part"] == "score",
    ),
    "tune": Table(
        "tune",
        {"kept": kept},
        {"": interval("accuracy")},
        lambda row: f"{row['facts']['policy']}, {row['found']}",
        pruned,
    ),
    "conversation": Table(
        "conversation",
        {
            "kept": kept,
            "FlowCut in": cell("where"),
            "compact_cache": cell("compact", {None: "", False: "off", True: "on"}.__getitem__),
        },
        {
            "1st answer": interval("first"),
            "2nd answer": interval("second"),
            "on - off, points": interval("second_over_off", "+.1f"),
            "on - encoder, points": interval("second_over_encoder", "+.1f"),
            "KV cache": cell("kv_bytes", lambda size: f"{size / 2**10:,.0f} KiB"),
        },
    ),
    "policies": Table(
        "policies",
        policies,
        {
            "first token": cell("first_seconds", duration),
            "times faster": cell("speedup", ratio),
            "encoder faster": cell("encoder_speedup", ratio),
            "choosing": interval("choosing", "+.1f"),
        },
        cell("tokens"),
        pruned,
    ),
    "encoder": Table(
        "encoder",
        {"weights": lambda row: row["facts"]["weights"], "type": cell("dtype"), "batch": cell("batch")},
        {
            "FlowCut": cell("time_ratio", ratio),
            "FLOPs": cell("flop_ratio", ratio),
            "time / FLOPs": cell("overhead", ratio),
            "stock, eager": cell("stock_eager_ratio", ratio),
            "torch FlowCut": cell("torch_sdpa_ratio", ratio),
            "torch FlowCut, eager": cell("torch_eager_ratio", ratio),
        },
    ),
    "families": Table(
        "families",
        {"family": cell("family")},
        {
            "visual tokens": lambda row: f"{row['stock_tokens']:,} -> {row['tokens']:,}",
            "stock, first token": cell("stock_first_seconds", "{:.1f} s".format),
            "FlowCut": cell("first_seconds", "{:.1f} s".format),
            "times faster": lambda row: "{speedup:.2f} ({speedup_low:.2f} to {speedup_high:.2f})".format(**row),
            "adapter's share": cell("adapter_share", "{:.2%}".format),
        },
    ),
    "host": Table(
        "host",
        {"family": cell("family"), "picture or video": cell("prompt"), "tokens": cell("stock_tokens", "{:,}".format)},
        {
            "stock, ms": every("stock_host_seconds", milliseconds),
            "at least, ms": every("least_seconds", milliseconds),
            "adapter, ms": every("adapter_seconds", milliseconds),
            "share": every("adapter_share", "{:.1%}".format),
            "FlowCut, ms": every("python_seconds", milliseconds),
            "stock by caller": every("stock_by_caller", ratio),
            "patched": every("patched_by_caller", ratio),
        },
    ),
    "kv": Table(
        "kv",
        {"visual tokens": lambda row: f"{row['visual']:,} -> {row['tokens']}"},
        {
            "tokens/s": lambda row, *more: f"{1 / row['stock_decode_seconds']:.0f} -> {1 / row['decode_seconds']:.0f}",
            "times faster": span("speedup", ratio),
            "KV cache, MiB": lambda row, *more: f"{mebibytes(row['stock_kv_bytes'])} -> {mebibytes(row['kv_bytes'])}",
            "after layer 1: times faster": span("late_speedup", ratio),
            "after layer 1: KV cache, MiB": lambda row, *more: mebibytes(row["late_kv_bytes"]),
        },
    ),
}


def filled(text: str) -> str:
    """A page with its tables as the files have them; ValueError for a table or operator that a file does not know."""

    def table(match: re.Match) -> str:
        head, files, name, end = match.groups()
        shown = TABLES.get(name, OPERATOR)
        rows = [
            row | {"run": run, "facts": section["facts"]}
            for run, file in enumerate(files.split())
            for section in json.loads((RESULTS / file).read_text())["sections"]
            if section["name"] == shown.section
            for row in section["rows"]
        ]
        rows = [row for row in rows if shown.where(row) and (shown is not OPERATOR or row["op"] == name)]
        if not rows:
            raise ValueError(f"{files} has no rows of {name}: that is neither one of {[*TABLES]} nor an operator in it")
        return "\n".join([head, *shown.lines(rows), "", end])

    return MARKED.sub(table, text)


if __name__ == "__main__":
    for page in DOCS.rglob("*.md"):
        page.write_text(filled(page.read_text()))
