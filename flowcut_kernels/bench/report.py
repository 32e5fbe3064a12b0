"""One result format: sections of flat rows and the machine they hold for; JSON and CSV."""

from __future__ import annotations

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
