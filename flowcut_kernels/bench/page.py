"""A report as one HTML page that needs nothing else: figures drawn from the rows, tables, notes, commands."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from .charts import Bars, charts
from .names import COLOURS, LOOKS
from .report import Report, Section
from .scene import drawn, panels
from .tables import alarming, cells, duration, starts, views

FEW = 0.12  # the share of the visual tokens that the first figures are about
RANDOM = "random weights"
# What a section is about, for those who see one for the first time.
LEADS = {
    "quality": "A small LLaVA, trained to answer questions about scenes of handwritten digits, stands in for large "
    "models. It ranks methods; it predicts the score of no published benchmark.",
    "prefill": "From an image to the first token of the answer, with random weights: time depends on how many tokens "
    "are kept, not on what they show.",
    "encoder": "The vision tower alone, with random weights: does choosing tokens take time beyond the arithmetic that "
    "is left?",
    "ops": "The kernels that rate, choose, move and merge tokens. Each is checked before it is timed.",
}


class Finding(NamedTuple):
    """A figure that matters, the sentence it belongs to, and of what model it holds."""

    figure: str
    sentence: str
    model: str = ""


def write_page(report: Report, path: Path) -> None:
    """Write `report` as one file without references to any other; what it shows follows from the report alone."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("flowcut_kernels.bench", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    style, script = (Markup(environment.get_template(f"report.{kind}").render()) for kind in ("css", "js"))
    page = environment.get_template("report.html.j2").render(
        report=report,
        machine=report.machine,
        where=where(report.machine),
        findings=findings(report),
        ahead=[(section.title, said) for section in report.sections if (said := ahead_of_flowcut(section))],
        charts=[charts(section, report.machine) for section in report.sections],
        is_bars=lambda chart: isinstance(chart, Bars),
        views=views,
        starts=starts,
        cells=cells,
        alarming=alarming,
        leads=LEADS,
        drawn=drawn,
        panels=panels,
        colours=COLOURS,
        style=style,
        script=script,
        # The browser runs this script, and nothing that a name in the results might smuggle in.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def where(machine: dict[str, Any]) -> str:
    """The machine and the versions, in a sentence."""
    commit = machine.get("commit")
    changed = " with changes that are not committed" if commit and commit.endswith("+") else ""
    parts = [
        f"Measured on {machine.get('gpu') or machine.get('cpu')}",
        f"{machine.get('cores')} cores, {machine.get('threads')} threads" if machine.get("cores") else None,
        f"on {machine.get('date')}" if machine.get("date") else None,
        f"with flowcut_kernels {machine.get('flowcut_kernels')}"
        + (f" (commit {commit.rstrip('+')}{changed})" if commit else ""),
        *(f"{name} {machine[name]}" for name in ("torch", "transformers", "python") if machine.get(name)),
    ]
    return ", ".join(part for part in parts if part) + "."


def findings(report: Report) -> list[Finding]:
    """The few figures a reader wants first; ranges where a section has several rows."""
    makers = dict(quality=_quality, prefill=_prefill, policies=_policies, encoder=_encoder, kv=_kv, ops=_ops)
    found = []
    for name, make in makers.items():
        section = report.section(name)
        if section:
            found += make([row for row in section.rows if row.get("ok", True)], section.facts)
    return found


def _quality(rows: list[dict], facts: dict) -> list[Finding]:
    rows = [row for row in rows if row.get("accuracy")]
    full = next((row for row in rows if row["policy"] == "all tokens"), None)
    ours = next((row for row in rows if row["policy"] == "FlowCut" and row["share"] <= FEW), None)
    if not full or not ours:
        return []
    return [
        Finding(
            f"{ours['accuracy'] / full['accuracy']:.1%}",
            f"of the accuracy is left when FlowCut keeps {ours['tokens']} of {full['tokens']} visual tokens "
            f"({ours['share']:.0%}): {ours['accuracy']:.1%} right answers against {full['accuracy']:.1%}.",
            "a small trained stand-in",
        )
    ]


def _prefill(rows: list[dict], facts: dict) -> list[Finding]:
    rows = [row for row in rows if row.get("speedup")]
    if not rows:
        return []
    shares = [row["tokens"] / row["stock_tokens"] for row in rows]
    share = max((few for few in shares if few <= FEW), default=min(shares))
    rows = [row for row, its in zip(rows, shares, strict=True) if its == share]
    saved = _range([100 * (1 - row["kv_bytes"] / row["stock_kv_bytes"]) for row in rows], "{:.0f}")
    first = f" ({duration(rows[0]['stock_first_seconds'])} → {duration(rows[0]['first_seconds'])})" * (len(rows) == 1)
    what = (
        f"as fast from image to first token{first} with {rows[0]['tokens']} of {rows[0]['stock_tokens']} visual tokens "
        f"({share:.0%}), and {saved}% of the KV cache saved."
    )
    return [Finding(_range([row["speedup"] for row in rows], "{:.2f}") + "x", what, _decoder(facts))]


def _decoder(facts: dict) -> str:
    millions = facts.get("text_parameters_millions") or facts.get("parameters_millions")
    return f"{RANDOM}, a language model of {millions:,.0f} M parameters" if millions else RANDOM


def _policies(rows: list[dict], facts: dict) -> list[Finding]:
    rows = [row for row in rows if row.get("speedup")]
    ours = min((row for row in rows if row["policy"] == "FlowCut"), key=lambda row: row["tokens"], default=None)
    if not ours:
        return []
    same = [row for row in rows if (row["tokens"], row["batch"]) == (ours["tokens"], ours["batch"])]
    best = max(same, key=lambda row: row["speedup"])
    rest = "the fastest of all" if best is ours else f"the fastest is {best['policy']} with {best['speedup']:.2f}x"
    what = f"as fast from image to first token with FlowCut and {ours['tokens']:g} tokens on average, {rest}."
    return [Finding(f"{ours['speedup']:.2f}x", what, _decoder(facts))]


def _encoder(rows: list[dict], facts: dict) -> list[Finding]:
    rows = [row for row in rows if row.get("overhead")]
    worst = max((row["overhead"] for row in rows), default=None)
    what = "the time that the pruned encoder's FLOPs predict, choosing tokens included"
    return [Finding(f"{worst:.2f}x", f"{what}{' (the worst row)' * (len(rows) > 1)}.", RANDOM)] if worst else []


def _kv(rows: list[dict], facts: dict) -> list[Finding]:
    rows = [row for row in rows if row.get("speedup")]
    if not rows:
        return []
    best = max(rows, key=lambda row: row["visual"])
    what = f"faster decoding with {best['tokens']} of {best['visual']} visual tokens in the cache."
    return [Finding(f"{best['speedup']:.2f}x", what, _decoder(facts))]


def _ops(rows: list[dict], facts: dict) -> list[Finding]:
    ratios = [row["speedup"] for row in rows if row["op"] == "anchor_stats" and row.get("speedup")]
    what = "faster than the best of several vectorised torch forms: anchor_stats, which reads K and V once."
    return [Finding(_range(ratios, "{:.1f}") + "x", what)] if ratios else []


def _range(values: list[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def ahead_of_flowcut(section: Section) -> list[str]:
    """A sentence for every budget at which others answer more than FlowCut beyond chance; one if there is none."""
    rows = [row for row in section.rows if row.get("over_flowcut") is not None]
    found: dict[float, list[str]] = {}
    for row in sorted(rows, key=lambda row: (-row["tokens"], -row["over_flowcut"])):
        if row["over_flowcut_low"] > 0:
            role = LOOKS[row["policy"]].role if row["policy"] in LOOKS else ""
            value, low, high = (100 * row[f"over_flowcut{end}"] for end in ("", "_low", "_high"))
            points = f"{value:.1f} points (95 % interval {low:.1f} to {high:.1f})"
            found.setdefault(row["tokens"], []).append(f"{row['policy']}{f', {role},' * bool(role)} by {points}")
    said = [
        f"With {tokens:g} tokens ahead of FlowCut beyond chance: {'; '.join(who)}." for tokens, who in found.items()
    ]
    return said or (["Nothing is ahead of FlowCut beyond chance in this run."] if rows else [])
