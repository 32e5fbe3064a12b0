"""The page's charts, from a section's rows: what stands where, in percent of the plot, and the words beside it.

Positions are shares, so that a chart fits any width while its text keeps its size. ``report.html.j2`` draws them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from matplotlib.ticker import MaxNLocator

from .names import Look, looks
from .report import Section
from .tables import duration, precision

LABEL_GAP = 4.4  # percent of a plot's height that a line of text takes
SIDE_BY_SIDE = 20.0  # pixels that the intervals of all series at one place take, at most 3 for each
FAR = 0.10  # differences of accuracies beyond this are only hinted at: floors would leave no room for the others
ARITHMETIC = 10.0  # FLOPs per byte from which on memory is no longer what an operator waits for

Row = dict[str, Any]
Values = dict[str, list[tuple[float, float, float, float, str]]]  # name -> x, y, low, high, what it is in words


class Axis:
    """Where a value stands, in percent of the way from `low` to `high`; either may be the larger."""

    def __init__(self, low: float, high: float, log: bool = False) -> None:
        self.scale: Callable[[float], float] = math.log if log else float
        self.low, self.high = low, high if high != low else low + 1

    def at(self, value: float) -> float:
        start, end = self.scale(self.low), self.scale(self.high)
        return 100 * (self.scale(value) - start) / (end - start)

    def inside(self, value: float) -> bool:
        return -0.001 <= self.at(value) <= 100.001

    def clamped(self, value: float) -> float:
        return min(max(self.at(value), 0.0), 100.0)


class Tick(NamedTuple):
    at: float
    text: str
    detail: str = ""


class Point(NamedTuple):
    """A value of a line and its interval, which is the value where none is known; no text: no mark."""

    x: float
    y: float
    low: float
    high: float
    text: str


class Series(NamedTuple):
    name: str
    look: Look
    strong: bool
    shift: float  # pixels to the right, so that intervals stay apart
    points: list[Point]
    label: float  # where its name stands, percent from the top


class Level(NamedTuple):
    """A horizontal line for comparison, and its interval."""

    y: float
    low: float
    high: float
    text: str


class Lines(NamedTuple):
    """Series over a common axis; the table says what their points say."""

    title: str
    caption: str
    x_title: str
    y_title: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    series: list[Series]
    level: Level | None = None


class Mark(NamedTuple):
    """A piece of a bar; kind: bar, thin, range, dot, limit, left or right (what lies beyond the axis)."""

    kind: str
    start: float
    end: float
    tone: str = "ours"


class Bar(NamedTuple):
    label: str
    marks: list[Mark]
    text: str


class Bars(NamedTuple):
    """Bars with their figures beside them: a chart that is a table."""

    title: str
    caption: str
    heads: tuple[str, str]  # of the names, of the figures
    ticks: list[Tick]
    groups: list[tuple[str, list[Bar]]]
    key: list[tuple[Mark, str]]  # what a mark means
    folded: bool = False


Chart = Lines | Bars


def charts(section: Section, machine: Row) -> list[Chart]:
    """Every chart that a section's rows suffice for, most important first; none for sections nobody knows."""
    section = replace(section, facts={"cache MiB": machine.get("last-level cache MiB"), **section.facts})
    rows = [row for row in section.rows if row.get("ok", True)]
    made = [make(section, rows) for make in CHARTS.get(section.name, ())]
    found = [chart for chart in made if chart and (isinstance(chart, Lines) or chart.groups)]
    entropies = section.facts.get("entropy")
    if entropies:
        known = dict(entropy=list(enumerate(entropies)))
        caption = "1: the class token looks everywhere alike, and little can be dropped. The lower, the more can go."
        found.append(by_layer("How spread out the class token's attention is", caption, "entropy / ln N", known))
    return found


# ---- lines


def spread(wanted: Sequence[float], gap: float = LABEL_GAP) -> list[float]:
    """Positions in 0..100 at least `gap` apart, in the same order, near the wanted ones."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    low = -math.inf
    for i in order:
        placed[i] = low = max(wanted[i], low + gap)
    high = 100 + gap
    for i in reversed(order):
        placed[i] = high = min(placed[i], high - gap)
    return placed


def lines(
    values: Values,
    x_axis: Axis,
    x_ticks: list[Tick],
    y_form: Callable[[float], str],
    *,
    title: str,
    caption: str,
    x_title: str,
    y_title: str,
    strong: str | None = None,
    level: tuple[float, float, float, str] | None = None,
) -> Lines | None:
    """A chart of `values`, each name's in the order of the axis; None where there are none."""
    values = {name: points for name, points in values.items() if points}
    ends = [y for points in values.values() for point in points for y in point[2:4]] + list(level[:3] if level else ())
    if not values:
        return None
    steps = MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]).tick_values(min(ends), max(ends))
    y_axis = Axis(float(steps[-1]), float(steps[0]))  # from the top
    wanted = [y_axis.at(points[-1][1]) for points in values.values()]
    styles, labels, middle = looks(values), spread(wanted), (len(values) - 1) / 2
    return Lines(
        title,
        caption,
        x_title,
        y_title,
        x_ticks,
        [Tick(y_axis.at(step), y_form(step)) for step in map(float, steps)],
        [
            Series(
                name,
                styles[name],
                name == strong or len(values) == 1,
                min(3.0, SIDE_BY_SIDE / len(values)) * (number - middle),
                [
                    Point(x_axis.at(x), y_axis.at(y), y_axis.at(low), y_axis.at(high), text) 
                    for x, y, low, high, text in points
                ],
                labels[number],
            )
            for number, (name, points) in enumerate(values.items())
        ],
        Level(y_axis.at(level[0]), y_axis.at(level[1]), y_axis.at(level[2]), level[3]) if level else None,
    )  # fmt: skip


def over_tokens(
    rows: list[Row],
    field: str,
    ends: tuple[str, str],
    name: Callable[[Row], str],
    reference: Row | None,
    **words: Any,
) -> Lines | None:
    """Shares of right answers over the tokens left, many on the left: the lines fan out towards their names."""
    rows = [row for row in rows if row is not reference and row.get(field) is not None]
    budgets = sorted({row["tokens"] for row in rows}, reverse=True)
    if not budgets:
        return None
    most = reference["tokens"] if reference else budgets[0]
    axis = Axis(most * 1.06, budgets[-1] / 1.06, log=True)
    values: Values = {}
    level = None
    if reference and reference.get(field) is not None:
        start, low, high = _interval(reference, field, *ends)
        level = (start, low, high, f"all {most:g} tokens: {share(start)}")
        values = {name(row): [(most, start, start, start, "")] for row in rows}
    for row in sorted(rows, key=lambda row: -row["tokens"]):
        y, low, high = _interval(row, field, *ends)
        text = f"{name(row)}, {row['tokens']:g} tokens: {share(y)} ({share(low)} to {share(high)})"
        values.setdefault(name(row), []).append((row["tokens"], y, low, high, text))
    ticks = [Tick(axis.at(t), f"{t:g}", f"{t / most:.0%}") for t in ((most, *budgets) if reference else budgets)]
    return lines(values, axis, ticks, share_of_axis, level=level, **words)


def _interval(row: Row, field: str, low: str, high: str) -> tuple[float, float, float]:
    """A figure and its interval, which is the figure alone where the row has none."""
    value: float = row[field]
    return value, row.get(low, value), row.get(high, value)


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


def share_of_axis(value: float) -> str:
    return f"{100 * value:g}"


def accuracy(section: Section, rows: list[Row]) -> Chart | None:
    return _by_policy(rows, "accuracy", ("low", "high"), "Accuracy against visual tokens", "Right answers", "right, %")


def lists(section: Section, rows: list[Row]) -> Chart | None:
    what = "Lists of all digits in a scene that are right word for word"
    return _by_policy(
        rows, "accuracy", ("low", "high"), "Lists that are right against visual tokens", what, "right lists, %"
    )


def digits(section: Section, rows: list[Row]) -> Chart | None:
    what = "F1 of the digits of a list as a set"
    return _by_policy(rows, "f1", ("f1_low", "f1_high"), "Digits that are found against visual tokens", what, "F1, %")


def _by_policy(rows: list[Row], field: str, ends: tuple[str, str], title: str, what: str, y_title: str) -> Chart | None:
    full = next((row for row in rows if row["policy"] == "all tokens"), None)
    return over_tokens(
        rows, field, ends, lambda row: row["policy"], full, title=title,
        caption=f"{what}, with 95 % intervals; to the right fewer tokens are left (averages over the language model's "
        "layers). Solid: chosen in the encoder, dotted: in the language model, dashed: by no criterion at all.",
        x_title="visual tokens per image", y_title=y_title, strong="FlowCut",
    )  # fmt: skip


def second_answers(section: Section, rows: list[Row]) -> Chart | None:
    full = next((row for row in rows if row.get("where") == "all tokens"), None)

    def name(row: Row) -> str:
        return row["where"] + ("" if row.get("compact") is None else f", compact {'on' if row['compact'] else 'off'}")

    return over_tokens(
        rows, "second", ("second_low", "second_high"), name, full,
        title="The second answer against visual tokens", caption="Right answers, with 95 % intervals.",
        x_title="visual tokens per image", y_title="right answers, %",
    )  # fmt: skip


def by_layer(title: str, caption: str, y_title: str, known: dict[str, list]) -> Chart:
    last = max(layer for points in known.values() for layer, _ in points)
    axis = Axis(-0.03 * last, 1.03 * last)
    steps = MaxNLocator(nbins=6, integer=True, steps=[1, 2, 4, 5, 10]).tick_values(0, max(last, 1))
    values: Values = {
        name: [(layer, y, y, y, f"{name}, layer {layer}: {y:.3f}") for layer, y in points]
        for name, points in known.items()
    }
    ticks = [Tick(axis.at(step), f"{step:g}") for step in map(float, steps) if axis.inside(step)]
    chart = lines(
        values, axis, ticks, "{:g}".format, title=title, caption=caption, x_title="encoder layer", y_title=y_title
    )
    assert chart
    return chart


def flow(section: Section, rows: list[Row]) -> Chart | None:
    parts = dict(entropy="entropy / ln N", hub_share="to the hubs", class_token="to the class token")
    known = {
        name: [(row["layer"], row[key]) for row in rows if row.get(key) is not None] for key, name in parts.items()
    }
    known = {name: points for name, points in known.items() if points}
    caption = "Entropy of the anchor's attention, and the shares of all attention that hubs and class token receive."
    return by_layer("How concentrated the flow of information is", caption, "share", known) if known else None


def searches(section: Section, rows: list[Row]) -> Chart | None:
    """The best objective so far, a line for every budget and sampler."""
    values: Values = {}
    for budget, found in (section.facts.get("budgets") or {}).items():
        for sampler, curve in found["curves"].items():
            name, best = f"{float(budget):.0%}, {sampler}", -math.inf
            for trial, value in enumerate(curve, 1):
                best = max(best, -math.inf if value is None else value)
                if best > -math.inf:
                    text = f"{name}, trial {trial}: {best:.4f}"
                    values.setdefault(name, []).append((trial, best, best, best, text))
    last = max((points[-1][0] for points in values.values()), default=1)
    axis = Axis(0, 1.03 * last)
    steps = MaxNLocator(nbins=6, integer=True).tick_values(0, last)
    return lines(
        values, axis, [Tick(axis.at(step), f"{step:g}") for step in map(float, steps) if axis.inside(step)],
        "{:g}".format, title="The best found so far",
        caption="The first trial is the policy as given, so that a search never ends below it.",
        x_title="trial", y_title="mean cosine similarity",
    )  # fmt: skip


# ---- bars


def against_flowcut(section: Section, rows: list[Row]) -> Chart | None:
    return _paired(rows, "over_flowcut", "policy", "FlowCut")


def against_default(section: Section, rows: list[Row]) -> Chart | None:
    return _paired(rows, "over_default", "variant", "the default")


def _paired(rows: list[Row], key: str, name: str, base: str) -> Chart | None:
    """Paired differences of accuracies, by budget, best first."""
    rows = [row for row in rows if row.get(key) is not None]
    if not rows:
        return None
    ends = [row[f"{key}{end}"] for row in rows for end in ("_low", "_high")]
    axis = Axis(max(min(*ends, -0.01), -FAR), min(max(*ends, 0.01), FAR))

    def bar(row: Row) -> Bar:
        value, low, high = _interval(row, key, f"{key}_low", f"{key}_high")
        tone = "ahead" if low > 0 else "behind" if high < 0 else "even"
        marks = [Mark("limit", axis.at(0), axis.at(0), "even")]
        if axis.inside(value):
            marks += [Mark("range", axis.clamped(low), axis.clamped(high), tone),
                      Mark("dot", axis.at(value), axis.at(value), tone)]  # fmt: skip
        else:
            marks.append(Mark("left" if value < 0 else "right", axis.clamped(value), axis.clamped(value), tone))
        return Bar(row[name], marks, f"{100 * value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})")

    rows = sorted(rows, key=lambda row: (-row["tokens"], -row[key]))
    return Bars(
        f"Against {base}",
        f"Right answers more or fewer than with {base} on the same questions, percentage points, paired by scene, with "
        "95 % intervals, each by itself. Colour: beyond chance. An arrow: further away than this axis goes.",
        (name, "difference"),
        [Tick(axis.at(step), f"{100 * step:+g}" if step else "0") for step in _steps(axis, 4)],
        _grouped(rows, lambda row: f"{row['tokens']:g} tokens ({row['share']:.0%})", bar),
        [(Mark("dot", 50, 50, "ahead"), f"ahead of {base}"), (Mark("dot", 50, 50, "even"), "not told apart"),
         (Mark("dot", 50, 50, "behind"), f"behind {base}")],
    )  # fmt: skip


def encoder(section: Section, rows: list[Row]) -> Chart | None:
    """Time as a share of the stock tower's, beside what the arithmetic that is left predicts."""
    rows = [row for row in rows if row.get("time_ratio") is not None]

    def bar(row: Row, axis: Axis) -> Bar:
        ratio, flops = row["time_ratio"], axis.at(row["flop_ratio"])
        _, low, high = _interval(row, "time_ratio", "time_ratio_low", "time_ratio_high")
        marks = [Mark("bar", 0, axis.at(ratio)), Mark("range", axis.clamped(low), axis.clamped(high), "even"),
                 Mark("limit", flops, flops, "second")]  # fmt: skip
        text = f"{ratio:.0%} ({duration(row['stock_seconds'])} → {duration(row['seconds'])})"
        return Bar(f"→ {row['tokens']} tokens", marks, text)

    return _of_stock(
        rows, bar, lambda row: max(row.get("time_ratio_high", 0), row["time_ratio"], row["flop_ratio"]),
        lambda row: f"{precision(row)}, batch {row['batch']}",
        "Encoder time against the stock tower",
        f"All {section.facts.get('patches', '')} tokens in the stock tower are 100 %. Choosing tokens is included: "
        "where the bar ends at the FLOPs mark, it costs nothing. On CPUs it may end before: layers that score run the "
        "package's own attention, which is faster. Whiskers: quartiles.",
        [(Mark("bar", 0, 100), "FlowCut"), (Mark("limit", 50, 50, "second"), "what its FLOPs predict")],
    )  # fmt: skip


def first_token(section: Section, rows: list[Row]) -> Chart | None:
    rows = [row for row in rows if row.get("first_seconds") is not None]
    parts = ("encoder_seconds", "llm_seconds", "first_seconds")
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        stock = {part: row[f"stock_{part}"] for part in parts} | dict(name=f"all {row['stock_tokens']} tokens")
        some = groups.setdefault((precision(row), row["batch"], row["model"], row["stock_tokens"]), [stock])
        # What ran beside its own stock model is shown as a share of that one.
        drift = some[0]["first_seconds"] / row["stock_first_seconds"]
        name = f"{row['tokens']} tokens ({row['tokens'] / row['stock_tokens']:.0%})"
        some.append({part: row[part] * drift for part in parts} | dict(name=name, row=row))
    named = [(f"{kind}, batch {batch}", some) for (kind, batch, *_), some in groups.items()]
    return _first_tokens(named, "Time to the first token against visual tokens", "visual tokens")


def side_by_side(section: Section, rows: list[Row]) -> Chart | None:
    rows = [row for row in rows if row.get("first_seconds") is not None]
    stock = {row["batch"]: row | dict(name="stock") for row in rows if row["policy"] == "stock"}
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["first_seconds"]):
        if row["policy"] != "stock" and row["batch"] in stock:
            some = groups.setdefault((row["batch"], row["tokens"]), [stock[row["batch"]]])
            some.append(row | dict(name=row["policy"], row=row))
    named = [
        (f"{tokens:g} tokens on average, batch {batch}", groups[batch, tokens])
        for batch, tokens in sorted(groups, key=lambda group: (group[0], -group[1]))
    ]
    return _first_tokens(named, "Time to the first token by policy", "policy")


def _first_tokens(groups: list[tuple[str, list[Row]]], title: str, head: str) -> Chart:
    """Encoder and language model up to the first token; 100 % is each group's first row, the stock model."""
    axis = Axis(0, max([1.0, *(row["first_seconds"] / some[0]["first_seconds"] for _, some in groups for row in some)]))

    def bar(row: Row, stock: Row) -> Bar:
        encoder, first = (axis.at(row[part] / stock["first_seconds"]) for part in ("encoder_seconds", "first_seconds"))
        marks = [Mark("bar", 0, encoder), Mark("bar", encoder, first, "second")]
        if "row" not in row:
            return Bar(row["name"], marks, duration(row["first_seconds"]))
        measured = row["row"]
        _, low, high = _interval(measured, "speedup", "speedup_low", "speedup_high")
        marks.append(Mark("range", axis.clamped(1 / high), axis.clamped(1 / low), "even"))
        return Bar(row["name"], marks, f"{duration(measured['first_seconds'])} ({measured['speedup']:.2f}x as fast)")

    return Bars(
        title,
        "The stock model's time is 100 %. Pruning saves in the encoder, and then in the prefill of the language model. "
        "Whiskers: quartiles.",
        (head, "1st token"),
        _percent(axis),
        [(heading, [bar(row, some[0]) for row in some]) for heading, some in groups],
        [(Mark("bar", 0, 100), "encoder"), (Mark("bar", 0, 100, "second"), "language model")],
    )


def families(section: Section, rows: list[Row]) -> Chart | None:
    rows = [row for row in rows if row.get("speedup")]

    def bar(row: Row, axis: Axis) -> Bar:
        ratio = 1 / row["speedup"]
        low, high = (1 / row[key] if row.get(key) else ratio for key in ("speedup_high", "speedup_low"))
        marks = [Mark("bar", 0, axis.at(ratio)), Mark("range", axis.clamped(low), axis.clamped(high), "even")]
        return Bar(row["family"], marks, f"{ratio:.0%} ({row['stock_tokens']} → {row['tokens']} tokens)")

    return _of_stock(
        rows, bar, lambda row: max(1 / row.get(key, 1) for key in ("speedup_low", "speedup")),
        lambda row: f"{precision(row)}, {row.get('size', 'real')} size",
        "Time to the first token by family", "The stock model's time with all tokens is 100 %. Whiskers: quartiles.",
        [(Mark("bar", 0, 100), "FlowCut")],
    )  # fmt: skip


def decoding(section: Section, rows: list[Row]) -> Chart | None:
    """Time of a decoded token on caches of different length."""
    groups = []
    for row in rows:
        axis = Axis(0, 1)
        parts = (("stock_", "all tokens"), ("", "kept ones alone"), ("late_", "kept ones after layer 1"))
        bars = []
        for prefix, label in parts:
            seconds = row.get(f"{prefix}decode_seconds")
            if seconds is not None:
                faster = row.get(f"{prefix}speedup") or 1.0
                mark = Mark("bar", 0, axis.clamped(1 / faster), "other" if prefix == "stock_" else "ours")
                bars.append(Bar(label, [mark], duration(seconds) + f" ({faster:.2f}x as fast)" * (prefix != "stock_")))
        groups.append((f"{row['visual']} → {row['tokens']} visual tokens", bars))
    return Bars(
        "Time of a decoded token", "The stock model's time with all tokens in the cache is 100 %.",
        ("cache", "a token"), _percent(Axis(0, 1)), groups, [],
    )  # fmt: skip


def beyond_cache(section: Section, rows: list[Row]) -> Chart | None:
    return _roofline(
        [row for row in _by_memory(rows) if row["bytes"] > _twice_the_cache(section)],
        "Operators against the memory's limit",
        "Bytes by formula over time, as a share of what a plain copy beyond cache moved in the same rounds"
        + (f" ({section.facts['copy GB/s']:.0f} GB/s)" if section.facts.get("copy GB/s") else "")
        + ": the roof of an operator that waits for memory. These cases exceed twice the last-level cache. A copy "
        "writes as much as it reads, which takes longer than reading: what mostly reads may pass the line.",
        folded=False,
    )  # fmt: skip


def in_cache(section: Section, rows: list[Row]) -> Chart | None:
    return _roofline(
        [row for row in _by_memory(rows) if row["bytes"] <= _twice_the_cache(section)],
        "Operators whose data may stay in cache",
        "The same shares. Data in cache move faster than a copy beyond it, so the line is a landmark here, no limit.",
        folded=True,
    )


def arithmetic(section: Section, rows: list[Row]) -> Chart | None:
    """Operators that wait for products: FLOPs per second, of which no limit is measured."""
    rows = [row for row in rows if row.get("seconds") and row.get("flops", 0) / row["bytes"] >= ARITHMETIC]
    if not rows:
        return None
    rate = {id(row): (row["flops"] / row["seconds"], row["flops"] / row["torch_seconds"]) for row in rows}
    axis = Axis(0, max(map(max, rate.values())))

    def bar(row: Row) -> Bar:
        ours, other = rate[id(row)]
        marks = [Mark("bar", 0, axis.at(ours)), Mark("thin", 0, axis.at(other), "other")]
        return Bar(_case(row), marks, f"{ours / 1e9:.3g} GFLOP/s ({row['speedup']:.1f}x)")

    return Bars(
        "Operators that wait for arithmetic",
        f"At least {ARITHMETIC:g} FLOPs per byte: FLOPs by formula over time. The limit of arithmetic is not measured.",
        ("case", "rate, against torch"),
        [Tick(axis.at(step), f"{step / 1e9:g}") for step in _steps(axis, 4)],
        _grouped(rows, lambda row: row["op"], bar),
        [(Mark("bar", 0, 100), "flowcut_kernels"), (Mark("thin", 0, 100, "other"), "best vectorised torch")],
    )


def _roofline(rows: list[Row], title: str, caption: str, folded: bool) -> Chart | None:
    if not rows:
        return None
    shares = {id(row): (row["of_copy"], row["of_copy"] / row["speedup"]) for row in rows}
    axis = Axis(0, max([1.0, *(max(both) for both in shares.values())]))

    def bar(row: Row) -> Bar:
        ours, other = shares[id(row)]
        roof = axis.at(1)
        marks = [
            Mark("bar", 0, axis.at(ours)),
            Mark("thin", 0, axis.at(other), "other"),
            Mark("limit", roof, roof, "roof"),
        ]
        return Bar(_case(row), marks, f"{ours:.0%} ({row['gbs']:.0f} GB/s, {row['speedup']:.1f}x)")

    return Bars(
        title, caption, ("case", "of copy (rate, against torch)"), _percent(axis),
        _grouped(rows, lambda row: row["op"], bar),
        [(Mark("bar", 0, 100), "flowcut_kernels"), (Mark("thin", 0, 100, "other"), "best vectorised torch"),
         (Mark("limit", 50, 50, "roof"), "copy")],
        folded,
    )  # fmt: skip


def _of_stock(
    rows: list[Row],
    bar: Callable[[Row, Axis], Bar],
    highest: Callable[[Row], float],
    group: Callable[[Row], str],
    title: str,
    caption: str,
    key: list[tuple[Mark, str]],
) -> Chart | None:
    if not rows:
        return None
    axis = Axis(0, max([1.0, *map(highest, rows)]))
    stock = Mark("limit", axis.at(1), axis.at(1), "even")

    def beside_stock(row: Row) -> Bar:
        made = bar(row, axis)
        return made._replace(marks=[*made.marks, stock])

    return Bars(title, caption, ("", "of stock"), _percent(axis), _grouped(rows, group, beside_stock), key)


def _grouped(
    rows: Iterable[Row], group: Callable[[Row], str], bar: Callable[[Row], Bar]
) -> list[tuple[str, list[Bar]]]:
    found: dict[str, list[Bar]] = {}
    for row in rows:
        found.setdefault(group(row), []).append(bar(row))
    return list(found.items())


def _steps(axis: Axis, about: int) -> list[float]:
    steps = MaxNLocator(nbins=about, steps=[1, 2, 5, 10]).tick_values(axis.low, axis.high)
    return [step for step in map(float, steps) if axis.inside(step)]


def _percent(axis: Axis) -> list[Tick]:
    return [Tick(axis.at(step), f"{step:.0%}") for step in _steps(axis, 3)]


def _twice_the_cache(section: Section) -> float:
    return 2 * 2**20 * (section.facts.get("cache MiB") or 0)


def _by_memory(rows: list[Row]) -> list[Row]:
    # score_select moves next to nothing: bandwidth says nothing about it.
    return [
        row for row in rows
        if row.get("of_copy") and row.get("flops", 0) / row["bytes"] < ARITHMETIC and row["op"] != "score_select"
    ]  # fmt: skip


def _case(row: Row) -> str:
    return f"{row['case']}, {precision(row)}"


CHARTS: dict[str, tuple[Callable[[Section, list[Row]], Chart | None], ...]] = {
    "quality": (accuracy, against_flowcut),
    "ablation": (against_default,),
    "generation": (lists, against_flowcut, digits),
    "encoder": (encoder,),
    "prefill": (first_token,),
    "policies": (side_by_side,),
    "families": (families,),
    "kv": (decoding,),
    "ops": (beyond_cache, arithmetic, in_cache),
    "conversation": (second_answers,),
    "tune": (searches,),
    "flow": (flow,),
}
