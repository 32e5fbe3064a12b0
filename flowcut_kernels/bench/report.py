"""One result format: sections of flat rows and the machine they hold for; JSON, CSV and a self-contained page."""

from __future__ import annotations

import base64
import csv
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass
class Section:
    """One table: flat rows, facts that hold for all of them, and what a reader has to know."""

    name: str
    title: str
    command: str  # repeats this table
    rows: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # checks that did not hold
    seconds: float = 0.0  # wall time of the measurement


@dataclass
class Report:
    """A run of flowcut-bench."""

    machine: dict[str, Any]
    command: str
    sections: list[Section] = field(default_factory=list)
    seconds: float = 0.0
    schema: int = SCHEMA

    @property
    def failed(self) -> list[str]:
        return [f"{section.name}: {what}" for section in self.sections for what in section.failed]

    def section(self, name: str) -> Section | None:
        return next((s for s in self.sections if s.name == name), None)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_plain(asdict(self)), indent=1, allow_nan=False) + "\n")

    def save_csv(self, path: Path) -> None:
        """All rows of all sections in one table; the first column names the section."""
        rows = [{"section": s.name, **row} for s in self.sections for row in s.rows]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for row in rows:
                writer.writerow({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in _plain(row).items()})


def load(path: Path) -> Report:
    """A report written by `Report.save`; ValueError for another schema."""
    content = json.loads(path.read_text())
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path.name} has schema {content.get('schema')!r}; this version reads schema {SCHEMA}")
    sections = [Section(**section) for section in content.pop("sections")]
    return Report(**content, sections=sections)


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_page(report: Report, images: dict[str, list[Path]], path: Path) -> None:
    """One HTML file with everything in it: style, tables, plots as data.

    Args:
        images: section name -> PNGs shown under that section.
    """
    from jinja2 import Environment, PackageLoader

    from .tables import alarming, cells, starts, views

    environment = Environment(
        loader=PackageLoader("flowcut_kernels.bench", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    pictures = {
        name: [(base64.b64encode(file.read_bytes()).decode(), file.stem) for file in files]
        for name, files in images.items()
    }
    page = environment.get_template("report.html.j2").render(
        report=report,
        views=views,
        starts=starts,
        cells=cells,
        alarming=alarming,
        pictures=pictures,
        headline=headline(report),
    )
    path.write_text(page)


def headline(report: Report) -> list[tuple[str, str]]:
    """The few figures a reader wants first: (figure, what it is)."""
    found = []
    quality = report.section("quality")
    if quality:
        full = next((r for r in quality.rows if r["policy"] == "all tokens"), None)
        ours = next((r for r in quality.rows if r["policy"] == "FlowCut" and r["share"] <= 0.12), None)
        if full and ours and full["accuracy"]:
            what = f"of the accuracy with all tokens, from {ours['tokens']} of {full['tokens']} ({ours['share']:.0%})"
            found.append((f"{ours['accuracy'] / full['accuracy']:.1%}", what))
    prefill = report.section("prefill")
    if prefill and prefill.rows:
        row = max(prefill.rows, key=lambda r: r.get("speedup", 0))
        if "speedup" in row:
            found.append(
                (f"{row['speedup']:.2f}x", f"image to first token, {row['stock_tokens']} → {row['tokens']} tokens")
            )
            found.append((f"{1 - row['kv_bytes'] / row['stock_kv_bytes']:.0%}", "of the KV cache saved"))
    encoder = report.section("encoder")
    if encoder:
        rows = [r for r in encoder.rows if "overhead" in r]
        if rows:
            worst = max(r["overhead"] for r in rows)
            found.append((f"{worst:.2f}x", "vision encoder time over what its remaining FLOPs predict (worst row)"))
    ops = report.section("ops")
    if ops:
        ratios = [r["speedup"] for r in ops.rows if r["op"] == "anchor_stats" and "speedup" in r]
        if ratios:
            found.append((f"{min(ratios):.1f}-{max(ratios):.1f}x", "anchor_stats against the best vectorised torch"))
    return found
