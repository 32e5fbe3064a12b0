"""How a section is shown: which columns, in which order, with which units; the same for terminal and page."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .machine import line
from .report import Report, Section

DASH = "-"


class Column(NamedTuple):
    """A column: header, the cell's text from a row, and whether it holds figures."""

    header: str
    show: Callable[[dict[str, Any]], str]
    figure: bool = True
    wraps: bool = False


class View(NamedTuple):
    """One table of a section; `group`: rows with the same value of this key stand together."""

    columns: list[Column]
    group: str | None = None
    title: str | None = None  # None: the section's own
    detail: bool = False  # not part of the overview


def duration(seconds: float) -> str:
    """Three digits with a unit that fits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale or unit == "µs":
            value = seconds / scale
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
    return DASH


def _sizes(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return DASH
    unit, scale = next(((u, s) for u, s in (("GiB", 2**30), ("MiB", 2**20)) if before >= s), ("KiB", 2**10))
    return f"{before / scale:.3g}→{after / scale:.3g} {unit}"


def _size(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: DASH if row.get(key) is None else _sizes(row[key], row[key]).partition("→")[2]


def _cell(key: str, form: Callable[[Any], str] = str) -> Callable[[dict[str, Any]], str]:
    return lambda row: DASH if row.get(key) is None else form(row[key])


def _time(key: str, spread: str | None = None) -> Callable[[dict[str, Any]], str]:
    def show(row: dict[str, Any]) -> str:
        if row.get(key) is None:
            return DASH
        return duration(row[key]) + (f" ±{row[spread]:.0%}" if spread else "")

    return show


def _verdict(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: (
        row["refcheck"] if not row.get("ok", True) else _cell(key, lambda met: "yes" if met else "NO")(row)
    )


def _points(key: str) -> Callable[[dict[str, Any]], str]:
    """A difference in percentage points with half its interval."""

    def show(row: dict[str, Any]) -> str:
        if row.get(key) is None:
            return DASH
        return f"{100 * row[key]:+.1f} ±{50 * (row[f'{key}_high'] - row[f'{key}_low']):.1f}"

    return show


def _difference(key: str) -> Callable[[dict[str, Any]], str]:
    """A difference with half its interval."""

    def show(row: dict[str, Any]) -> str:
        if row.get(key) is None:
            return DASH
        return f"{row[key]:+.4f} ±{(row[f'{key}_high'] - row[f'{key}_low']) / 2:.4f}"

    return show


def _accuracy(row: dict[str, Any]) -> str:
    if "unreachable" in row:
        return "not reachable"
    return f"{100 * row['accuracy']:.1f} % ±{50 * (row['high'] - row['low']):.1f}"


def _answers(key: str) -> Callable[[dict[str, Any]], str]:
    """A share in percent, such as the accuracy of one of several answers, with half its interval."""
    return lambda row: (
        DASH if row.get(key) is None else (f"{100 * row[key]:.1f} ±{50 * (row[f'{key}_high'] - row[f'{key}_low']):.1f}")
    )


def _kind(kind: str, row: dict[str, Any]) -> str:
    return f"{100 * row['kinds'][kind]:.1f}" if "kinds" in row else DASH


def precision(row: dict[str, Any]) -> str:
    return str(row["dtype"]).replace("bfloat", "bf").replace("float", "fp")


times = "{:.2f}x".format
percent = "{:.0%}".format

KEPT = [
    Column("kept", lambda row: f"{row['tokens']} ({row['share']:.0%})", False),
    Column("policy", _cell("policy"), False),
]
TALK = [
    KEPT[0],
    Column("FlowCut in", _cell("where"), False),
    Column("compact", _cell("compact", lambda on: "on" if on else "off"), False),
]
TABLES: dict[str, list[Column]] = {
    "ops": [
        Column("operator", _cell("op"), False),
        Column("case", _cell("case"), False, True),
        Column("type", precision, False),
        Column("time", _time("seconds", "spread")),
        Column("torch", _time("torch_seconds")),
        Column("faster", _cell("speedup", times)),
        Column("GB/s", _cell("gbs", "{:.0f}".format)),
        Column("copy", _cell("of_copy", percent)),
        Column("target", _verdict("met"), False, True),
    ],
    "encoder": [
        Column("type", precision, False),
        Column("B", _cell("batch")),
        Column("kept", _cell("tokens")),
        Column("stock", _time("stock_seconds", "stock_spread")),
        Column("FlowCut", _time("seconds", "spread")),
        Column("time", _cell("time_ratio", times)),
        Column("FLOPs", _cell("flop_ratio", times)),
        Column("time/FLOPs", _cell("overhead", times)),
        Column("scoring", _cell("scoring_share", "{:.1%}".format)),
        Column("target", _verdict("met"), False, True),
    ],
    "encoder split": [
        Column("type", precision, False),
        Column("B", _cell("batch")),
        Column("kept", _cell("tokens")),
        Column("in all", _time("split_seconds")),
        Column("stats, select", _time("anchor_stats_select_seconds")),
        Column("gather", _time("gather_tokens_seconds")),
        Column("everything else", _time("rest_seconds")),
        Column("stock x FLOPs", _time("expected_seconds")),
    ],
    "encoder others": [
        Column("type", precision, False),
        Column("B", _cell("batch")),
        Column("kept", _cell("tokens")),
        Column("FlowCut", _cell("time_ratio", times)),
        Column("stock, eager", _cell("stock_eager_ratio", times)),
        Column("torch FlowCut", _cell("torch_sdpa_ratio", times)),
        Column("torch FlowCut, eager", _cell("torch_eager_ratio", times)),
        Column("limit", _cell("limit_ratio", times)),
    ],
    "encoder frozen": [
        Column("type", precision, False),
        Column("B", _cell("batch")),
        Column("kept", _cell("tokens")),
        Column("FlowCut", _cell("time_ratio", times)),
        Column("frozen", _cell("frozen_ratio", times)),
        Column("frozen, graph", _cell("frozen_graph_ratio", times)),
        Column("stock, graph", _cell("stock_graph_ratio", times)),
    ],
    "prefill": [
        Column("type", precision, False),
        Column("B", _cell("batch")),
        Column("tokens", lambda r: f"{r['stock_tokens']}→{r['tokens']}", False),
        Column("encoder", lambda r: _pair(r, "encoder")),
        Column("LLM prefill", lambda r: _pair(r, "llm")),
        Column("1st token", lambda r: _pair(r, "first")),
        Column("faster", _cell("speedup", times)),
        Column("a token", lambda r: _pair(r, "decode")),
        Column(
            "KV cache", lambda r: _sizes(r["stock_kv_bytes"], r["kv_bytes"]) if r["ok"] else r["refcheck"], True, True
        ),
    ],
    "families": [
        Column("family", _cell("family"), False),
        Column("type", precision, False),
        Column("tokens", lambda r: f"{r['stock_tokens']}→{r['tokens']}" if r["ok"] else r["refcheck"], False, True),
        Column("1st token", lambda r: _pair(r, "first")),
        Column("faster", _cell("speedup", times)),
        Column("host: all", _time("python_seconds")),
        Column("adapter", _time("adapter_seconds")),
        Column("of stock", _cell("adapter_share", "{:.1%}".format)),
    ],
    "host": [
        Column("family", _cell("family"), False),
        Column("prompt", _cell("prompt"), False),
        Column("tokens", lambda r: f"{r['stock_tokens']:,}" if r["ok"] else r["refcheck"]),
        Column("stock", _time("stock_host_seconds")),
        Column("all", _time("python_seconds")),
        Column("adapter", _time("adapter_seconds")),
        Column("stock takes at least", _time("least_seconds")),
        Column("adapter : that", _cell("adapter_share", "{:.1%}".format)),
        Column("stock by caller", _cell("stock_by_caller", times)),
        Column("patched by caller", _cell("patched_by_caller", times)),
    ],
    "prefill limits": [
        Column("type", precision, False),
        Column("B", _cell("batch")),
        Column("tokens", lambda r: f"{r['stock_tokens']}→{r['tokens']}", False),
        Column("stock, eager : stock", _cell("eager_ratio", times)),
        Column("torch FlowCut : stock", _cell("torch_ratio", times)),
        Column("of the limit", _cell("of_limit", percent)),
        Column("memory beyond weights", lambda r: _sizes(r["stock_peak_bytes"], r["peak_bytes"])),
    ],
    "policies": [
        Column("B", _cell("batch")),
        Column("policy", _cell("policy"), False),
        Column("kept", _cell("average", "{:.4g}".format)),
        Column("encoder", _time("encoder_seconds")),
        Column(
            "1st token",
            lambda r: "not reachable" if "unreachable" in r else _time("first_seconds", "first_spread")(r),
        ),
        Column("faster", _cell("speedup", times)),
        Column("a token", _time("decode_seconds")),
        Column("KV cache", _size("kv_bytes")),
        Column("choosing, %", lambda r: _answers("choosing")(r) if r["ok"] else r["refcheck"], True, True),
    ],
    "policies split": [
        Column("B", _cell("batch")),
        Column("policy", _cell("policy"), False),
        Column("kept", _cell("average", "{:.4g}".format)),
        Column("FLOPs", _cell("flop_ratio", times)),
        Column("time", _cell("speedup", lambda faster: times(1 / faster))),
        Column("choosing", _cell("choosing_seconds", lambda x: ("-" if x < 0 else "") + duration(abs(x)))),
        Column("encoder faster", _cell("encoder_speedup", times)),
        Column("a token faster", _cell("decode_speedup", times)),
        Column("memory", _size("peak_bytes")),
    ],
    "kv": [
        Column("type", precision, False),
        Column("visual tokens", lambda r: f"{r['visual']}→{r['tokens']}", False),
        Column("tokens/s", lambda r: _rates(r, "decode")),
        Column("faster", _cell("speedup", times)),
        Column(
            "KV cache", lambda r: _sizes(r["stock_kv_bytes"], r["kv_bytes"]) if r["ok"] else r["refcheck"], True, True
        ),
        Column("faster, after layer 1", _cell("late_speedup", times)),
        Column("KV cache", lambda r: _sizes(r["stock_kv_bytes"], r["late_kv_bytes"])),
    ],
    "quality": [
        *KEPT,
        Column("average", _cell("average", "{:.1f}".format)),
        Column("accuracy", _accuracy),
        Column("over random", _points("over_random")),
        Column("over FlowCut", _points("over_flowcut")),
    ],
    "ablation": [
        KEPT[0],
        Column("variant", _cell("variant"), False, True),
        Column("average", _cell("average", "{:.1f}".format)),
        Column("accuracy", _accuracy),
        Column("over default", _points("over_default")),
    ],
    "generation": [
        *KEPT,
        Column("right", _accuracy),
        Column("over random", _points("over_random")),
        Column("over FlowCut", _points("over_flowcut")),
        Column("F1, %", _answers("f1")),
        Column("F1 over FlowCut", _points("f1_over_flowcut"), True, True),
    ],
    "conversation": [
        *TALK,
        Column("1st, %", _answers("first")),
        Column("2nd, %", _answers("second")),
        Column("on - off", _points("second_over_off")),
        Column("on - encoder", _points("second_over_encoder")),
        Column("KV", lambda row: f"{row['kv_bytes'] / 2**10:.0f} KiB"),
    ],
    "conversation continued": [
        *TALK,
        Column("2nd, %", _answers("continued")),
        Column("on - off", _points("continued_over_off")),
        Column("on - encoder", _points("continued_over_encoder")),
    ],
    "tune": [
        Column("kept", _cell("budget", percent), False),
        Column("settings", _cell("found"), False),
        Column("objective", _cell("objective", "{:.4f}".format)),
        Column("held out", _cell("held_out", "{:.4f}".format)),
        Column("against untuned", _difference("held_out_gain")),
        Column("accuracy", _accuracy),
        Column("against untuned", _points("gain")),
        Column("search", _time("seconds")),
    ],
    "flow": [
        Column("layer", _cell("layer")),
        Column("entropy", _cell("entropy", "{:.3f}".format)),
        Column("to the class token", _cell("class_token", "{:.1%}".format)),
        Column("hubs", _cell("hubs", "{:.1f}".format)),
        Column("to the hubs", _cell("hub_share", "{:.1%}".format)),
        Column("relay", _cell("relay", "{:+.2f}".format)),
        Column("criteria", _cell("criteria", "{:+.2f}".format)),
        Column("previous", _cell("previous", "{:+.2f}".format)),
    ],
    "compare": [
        Column("of", _cell("row"), False, True),
        Column("figure", _cell("figure", lambda name: name.replace("_", " ")), False, True),
        Column("A", _cell("a")),
        Column("B", _cell("b")),
        Column("change", _cell("change", "{:+.1%}".format)),
        Column("ratio", _cell("ratio")),
        Column("verdict", _cell("verdict"), False, True),
    ],
    "gpu": [
        Column("what", _cell("what"), False, True),
        Column("target", _cell("target")),
        Column("measured", _cell("found", "{:.3g}".format)),
        Column("met", _verdict("met"), False),
    ],
    "compile": [
        Column("kernel", _cell("kernel"), False),
        Column("case", _cell("variant"), False, True),
        Column("arch", _cell("arch", "sm_{}".format), False),
        Column("warps", _cell("warps")),
        Column("registers", _cell("registers")),
        Column("stack", _cell("stack")),
        Column("local", _cell("local")),
        Column("shared", _cell("shared")),
        Column("blocks/SM", _cell("blocks")),
    ],
}


def views(section: Section) -> list[View]:
    """The tables of a section: the main one, then details."""
    groups = {
        "ops": "op",
        "quality": "tokens",
        "ablation": "tokens",
        "generation": "tokens",
        "policies": "tokens",
        "conversation": "tokens",
        "compile": "kernel",
        "tune": "budget",
        "compare": "row",
    }
    found = [View(TABLES.get(section.name) or generic(section.rows), groups.get(section.name))]
    if section.name == "encoder":
        found.append(View(TABLES["encoder split"], None, "Where the pruned encoder's time goes", True))
        if any("stock_eager_ratio" in row for row in section.rows):
            found.append(View(TABLES["encoder others"], None, "Time as a share of the stock tower on SDPA", True))
        if any("frozen_ratio" in row for row in section.rows):
            found.append(View(TABLES["encoder frozen"], None, "Static schedule, as a share of the stock tower", True))
    if section.name == "prefill" and any("of_limit" in row for row in section.rows):
        found.append(View(TABLES["prefill limits"], None, "Against eager attention and free selection", True))
    if section.name == "policies":
        title = "Against the arithmetic, and by part, as a share of stock"
        found.append(View(TABLES["policies split"], "tokens", title, True))
    if section.name == "conversation":
        continued = TABLES["conversation continued"]
        found.append(View(continued, "tokens", "The same questions, read after the first one and its answer", True))
    if section.name == "quality" and section.rows:
        kinds = [Column(kind, partial(_kind, kind), True, True) for kind in section.rows[0]["kinds"]]
        found.append(View([*KEPT, *kinds], "tokens", "Accuracy by type of question, %", True))
    return found


def generic(rows: list[dict[str, Any]]) -> list[Column]:
    """A column for whatever the rows say in one word or figure, for sections without a table of their own."""

    def column(key: str) -> Column:
        values = [row[key] for row in rows if row.get(key) is not None]
        figure = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        if figure and key.endswith("seconds"):
            return Column(key.removesuffix("seconds").strip("_") or "time", _time(key))
        form = "{:.4g}".format if figure and any(isinstance(value, float) for value in values) else str
        return Column(key, _cell(key, form), figure, not figure)

    flat = dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, list | dict))
    columns = [column(key) for key in flat if key not in ("ok", "refcheck")]
    checked = any("refcheck" in row for row in rows)
    return [c._replace(header=c.header.replace("_", " ")) for c in columns] + (
        [Column("check", _cell("refcheck"), False, True)] if checked else []
    )


def _pair(row: dict[str, Any], key: str) -> str:
    if row.get(f"{key}_seconds") is None:
        return DASH
    before, after = row[f"stock_{key}_seconds"], row[f"{key}_seconds"]
    digits = ".3g" if max(before, after) < 1 else ".0f"
    return f"{1e3 * before:{digits}}→{1e3 * after:{digits}} ms"


def _rates(row: dict[str, Any], key: str) -> str:
    if row.get(f"{key}_seconds") is None:
        return DASH
    return f"{1 / row[f'stock_{key}_seconds']:.3g}→{1 / row[f'{key}_seconds']:.3g}"


def cells(view: View, row: dict[str, Any]) -> list[str]:
    return [column.show(row) for column in view.columns]


def alarming(text: str) -> bool:
    """A missed target or a failed check."""
    return text in ("NO", "worse") or text.startswith("FAILED")


def starts(view: View, rows: list[dict[str, Any]]) -> list[bool]:
    """Whether each row begins a new group."""
    keys = [row.get(view.group) if view.group else None for row in rows]
    return [i > 0 and keys[i] != keys[i - 1] for i in range(len(rows))]


def show(section: Section, console: Console, details: bool = True) -> None:
    """The section's tables, readable at 100 columns."""
    for view in views(section):
        if view.detail and not details:
            continue
        table = Table(
            title=view.title or section.title,
            box=box.SIMPLE_HEAD,
            title_justify="left",
            title_style="bold",
            pad_edge=False,
        )
        for column in view.columns:
            justify: Any = "right" if column.figure else "left"
            width = max(map(len, column.header.split()))
            table.add_column(column.header, justify=justify, no_wrap=not column.wraps, min_width=width)
        for row, new in zip(section.rows, starts(view, section.rows), strict=True):
            if new:
                table.add_section()
            table.add_row(*(Text(text, style="red" if alarming(text) else "") for text in cells(view, row)))
        console.print(table)
    for note in section.notes:
        console.print(Padding(Text(note, style="dim"), (0, 0, 0, 2)))
    for what in section.failed:
        console.print(Padding(Text(f"check failed: {what}", style="bold red"), (0, 0, 0, 2)))
    console.print()


def show_report(report: Report, console: Console, details: bool = True) -> None:
    console.print(line(report.machine), style="dim", highlight=False)
    console.print()
    for section in report.sections:
        show(section, console, details)
