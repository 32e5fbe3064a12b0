"""Two result files, A and B: which figures differ beyond the spread of their measurement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from .report import Report, Section
from .tables import duration

BETTER, WORSE, WITHIN, UNKNOWN, FAILED, MENDED = (
    "better", "worse", "within the spread", "no spread known", "FAILED in B", "failed in A"
)  # fmt: skip
REGRESSIONS = (WORSE, FAILED)


class Kind(NamedTuple):
    """What is compared in sections of one name."""

    row: tuple[str, ...]  # fields that say what a row is of
    figures: tuple[str, ...]
    # Of times: the ratio to something that ran in turns with them and that the package has no part in.
    ratios: Mapping[str, str] = MappingProxyType({})


KINDS = {
    "ops": Kind(("op", "case", "dtype"), ("seconds",), {"seconds": "speedup"}),
    "encoder": Kind(("dtype", "batch", "tokens"), ("seconds",), {"seconds": "time_ratio"}),
    "prefill": Kind(
        ("model", "dtype", "batch", "stock_tokens", "tokens"),
        ("first_seconds", "decode_seconds", "kv_bytes", "peak_bytes"),
        {"first_seconds": "speedup"},
    ),
    "families": Kind(
        ("family", "size", "dtype", "stock_tokens", "tokens"),
        ("first_seconds", "python_seconds", "adapter_seconds"),
        {"first_seconds": "speedup"},
    ),
    "host": Kind(("family", "prompt"), ("python_seconds", "adapter_seconds")),
    "policies": Kind(
        ("model", "policy", "dtype", "batch", "tokens"),
        ("encoder_seconds", "first_seconds", "decode_seconds", "choosing", "kv_bytes", "peak_bytes"),
        {"encoder_seconds": "encoder_speedup", "first_seconds": "speedup", "decode_seconds": "decode_speedup"},
    ),
    "kv": Kind(("dtype", "visual", "tokens"), ("decode_seconds", "kv_bytes"), {"decode_seconds": "speedup"}),
    "quality": Kind(("policy", "tokens"), ("accuracy",)),
    "ablation": Kind(("of", "variant", "tokens"), ("accuracy",)),
    "generation": Kind(("policy", "tokens"), ("accuracy", "f1")),
    "conversation": Kind(("policy", "where", "compact", "tokens"), ("first", "second", "continued", "kv_bytes")),
    "tune": Kind(("budget", "found"), ("objective", "held_out", "accuracy")),
    "compile": Kind(("kernel", "variant", "arch"), ("registers", "stack", "local", "shared")),
}
HIGHER = (  # is better
    *("speedup", "encoder_speedup", "decode_speedup", "accuracy", "f1"),
    *("first", "second", "continued", "objective", "held_out"),
)
# These are counted, not measured.
EXACT = ("kv_bytes", "registers", "stack", "local", "shared")
SHARES = ("accuracy", "f1", "first", "second", "continued", "choosing")
MACHINE = ("cpu", "gpu", "cores", "threads", "os", "python", "torch", "triton", "transformers")
CAUTION = (
    "the spread is that of repeats in one process; in other processes of the same commit an operator's time can differ "
    "by more (of three runs on two cores, one row in five did): measure again before you believe a verdict"
)


def compare(a: Report, b: Report) -> list[Section]:
    """One section for each name that both files have; what only one of them has stands in the notes.

    Rows are matched by the fields that say what they are of, and where several agree in these by their order. A figure
    is better or worse where the intervals of A and B do not touch: quartiles of the repeats, 95 % intervals of
    accuracies, or plus and minus the spread, which is half the distance between the quartiles. The speed of a machine
    drifts from run to run, so a time has changed only where its ratio to stock or torch, measured in turns with it, has
    changed the same way.
    """
    names = list(dict.fromkeys(section.name for section in a.sections if b.section(section.name)))
    return [_compared(name, a, b) for name in names]


def differences(a: dict[str, Any], b: dict[str, Any], keys: tuple[str, ...]) -> list[str]:
    """What differs among `keys`, as text."""
    return [f"{key} {a.get(key)} → {b.get(key)}" for key in keys if a.get(key) != b.get(key)]


def missing(a: Report, b: Report) -> list[str]:
    """Names of sections that one file lacks, and that it does."""
    names = [{section.name for section in report.sections} for report in (a, b)]
    return [f"only in {file}: {name}" for file, i in (("A", 0), ("B", 1)) for name in sorted(names[i] - names[1 - i])]


def _compared(name: str, a: Report, b: Report) -> Section:
    kind, notes = KINDS.get(name), _facts(name, a, b)
    if kind is None:
        return Section("compare", name, "", [], {}, [*notes, "nothing in these sections has a better and a worse"])
    before, after = (_rows(name, kind, report) for report in (a, b))
    rows = [row for key in before if key in after for row in _figures(kind, key, before[key], after[key])]
    for file, here, there in (("A", before, after), ("B", after, before)):
        only = [_label(key) for key in here if key not in there]
        notes += [f"only in {file}: {'; '.join(only)}"] if only else []
    backends = {(before[key].get("backend"), after[key].get("backend")) for key in before if key in after}
    notes += [f"backend {x} → {y}" for x, y in sorted(backends, key=str) if x != y]
    counts = Counter(row["verdict"] for row in rows)
    order = (WORSE, FAILED, BETTER, MENDED, WITHIN, UNKNOWN)
    notes += [
        ", ".join(f"{counts[verdict]} {verdict}" for verdict in order if counts[verdict]) or "no figure in common"
    ]
    return Section("compare", name, "", rows, {}, notes)


def _facts(name: str, a: Report, b: Report) -> list[str]:
    """Settings of the measurement that differ; measured facts are floats and lists."""
    settings = [
        {key: value for s in report.sections if s.name == name for key, value in s.facts.items() if _is_setting(value)}
        for report in (a, b)
    ]
    found = differences(settings[0], settings[1], tuple(settings[0] | settings[1]))
    return [f"measured differently: {', '.join(found)}"] if found else []


def _is_setting(value: Any) -> bool:
    return value is None or isinstance(value, (str, int))


def _rows(name: str, kind: Kind, report: Report) -> dict[tuple, dict[str, Any]]:
    found: dict[tuple, dict[str, Any]] = {}
    seen: Counter[tuple] = Counter()
    for section in report.sections:
        for row in section.rows if section.name == name else ():
            key = tuple(row.get(field) for field in kind.row)
            seen[key] += 1
            numbered = (*key, seen[key])
            found[numbered] = row
    return found


def _label(key: tuple) -> str:
    number = key[-1]
    return ", ".join(str(field) for field in key[:-1] if field is not None) + (f" ({number})" if number > 1 else "")


def _figures(kind: Kind, key: tuple, a: dict[str, Any], b: dict[str, Any]) -> Iterator[dict[str, Any]]:
    label = _label(key)
    if not (a.get("ok", True) and b.get("ok", True)):
        if a.get("ok", True) != b.get("ok", True):
            verdict = FAILED if a.get("ok", True) else MENDED
            yield dict(row=label, figure="check", a=a.get("refcheck"), b=b.get("refcheck"), verdict=verdict)
        return
    for field in kind.figures:
        x, y = a.get(field), b.get(field)
        if x is None or y is None:
            continue
        intervals = interval(a, field), interval(b, field)
        verdict, ratios = verdict_of(*intervals, field in HIGHER), None
        ratio = kind.ratios.get(field, "")
        if a.get(ratio) is not None and b.get(ratio) is not None:
            ratios = f"{a[ratio]:.2f}→{b[ratio]:.2f}x"
            if verdict in (BETTER, WORSE) and verdict != verdict_of(
                interval(a, ratio), interval(b, ratio), ratio in HIGHER
            ):
                verdict = WITHIN
        yield dict(
            row=label,
            figure=field,
            a=_shown(field, x, intervals[0]),
            b=_shown(field, y, intervals[1]),
            change=y / x - 1 if x else None,
            ratio=ratios,
            verdict=verdict,
        )


def interval(row: dict[str, Any], field: str) -> tuple[float, float] | None:
    """Where a figure may lie, None where its row does not say."""
    value = row[field]
    if field in EXACT:
        return value, value
    ends = ("low", "high") if field == "accuracy" else (f"{field}_low", f"{field}_high")
    if all(row.get(end) is not None for end in ends):
        return row[ends[0]], row[ends[1]]
    spread = row.get(f"{field.removesuffix('seconds')}spread") if field.endswith("seconds") else None
    return None if spread is None else (value * (1 - spread), value * (1 + spread))


def verdict_of(a: tuple[float, float] | None, b: tuple[float, float] | None, higher: bool) -> str:
    """What B is against A, by where they may lie; `higher`: that is better."""
    if a is None or b is None:
        return UNKNOWN
    if a[0] <= b[1] and b[0] <= a[1]:
        return WITHIN
    return BETTER if (b[0] > a[1]) == higher else WORSE


def _shown(field: str, value: float, where: tuple[float, float] | None) -> str:
    half = (where[1] - where[0]) / 2 if where else 0
    if field in SHARES:
        return f"{100 * value:.1f} %" + (f" ±{100 * half:.1f}" if half else "")
    if field.endswith("seconds"):
        text = duration(value)
    elif field.endswith("bytes"):
        text = f"{value / 2**20:.4g} MiB"
    else:
        text = f"{value:.4g}"
    return text + (f" ±{half / value:.0%}" if half and value else "")
