"""Writes the tables of measured figures into docs/ops, from benchmarks/results: `make docs`.

A table lies between `<!-- FILE.json: OPERATOR -->` and `<!-- end -->`; that of the compiled kernels names no operator.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
TABLE = re.compile(r"(<!-- ([\w-]+\.json)(?:: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def measured(rows: list[dict]) -> Iterator[str]:
    yield "| case | type | time | times faster than | GB/s | of copy | GFLOP/s |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        seconds = row["seconds"]
        time = f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"
        flops = f"{row['flops'] / seconds / 1e9:.3g}" if row["flops"] else ""
        yield (
            f"| {row['case']} | {row['dtype']} | {time} | {row['speedup']:.1f} ({row['torch_form']}) | "
            f"{row['gbs']:.3g} | {row['of_copy']:.0%} | {flops} |"
        )


def compiled(rows: list[dict]) -> Iterator[str]:
    yield "| kernel | variants | warps | registers sm_80 | sm_90 | sm_100 | shared memory, KiB | spilled |"
    yield "|---|---|---|---|---|---|---|---|"
    for kernel, group in groupby(sorted(rows, key=lambda row: row["kernel"]), key=lambda row: row["kernel"]):
        found = list(group)
        registers = [between(row["registers"] for row in found if row["arch"] == arch) for arch in (80, 90, 100)]
        warps, shared = between(row["warps"] for row in found), between(row["shared"] // 1024 for row in found)
        spilled = sum(row["stack"] + row["local"] for row in found)
        yield f"| `{kernel}` | {len(found) // 3} | {warps} | {' | '.join(registers)} | {shared} | {spilled} |"


def between(values: Iterator[int]) -> str:
    least, *_, most = sorted([*values] * 2)
    return f"{least}" if least == most else f"{least} to {most}"


def filled(text: str) -> str:
    """A page with its tables as the files have them; ValueError for an operator that a file does not know."""

    def table(match: re.Match) -> str:
        head, file, operator, end = match.groups()
        rows = [row for section in json.loads((RESULTS / file).read_text())["sections"] for row in section["rows"]]
        if operator is not None:
            rows = [row for row in rows if row.get("op") == operator]
        if not rows:
            raise ValueError(f"{file} has no rows of {operator}")
        lines = compiled(rows) if operator is None else measured(rows)
        return "\n".join([head, *lines, "", end])

    return TABLE.sub(table, text)


if __name__ == "__main__":
    for page in sorted((DOCS / "ops").glob("*.md")):
        page.write_text(filled(page.read_text()))
