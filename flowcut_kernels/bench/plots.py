"""The report's figures: one idea each, colours that survive colour blindness and grey printing."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure, SubFigure

from . import names
from .report import Report, Section

INK, MUTED, GRID = "#1b1f24", "#667080", "#e3e7ec"
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#b8bec7"


def _axes(width: float = 7.2, height: float = 4.2):
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    _plain(axes)
    return figure, axes


def _plain(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _head(axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, color=INK, pad=12)
    axes.set_xlabel(x, fontsize=9.5, color=MUTED)
    axes.set_ylabel(y, fontsize=9.5, color=MUTED)


def _legend(axes) -> None:
    """Below the axes, where it hides nothing."""
    axes.figure.legend(frameon=False, fontsize=9, labelcolor=INK, loc="outside lower center", ncols=3)


def save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white")
    plt.close(figure)
    return path


def figure_grid(count: int, aspect: float):
    """A grid of bare panels for pictures."""
    columns = min(count, 4)
    rows = -(-count // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(2.9 * columns, 3.3 * rows / aspect + 0.4), squeeze=False, layout="constrained"
    )
    for panel in panels.flat:
        panel.axis("off")
    return figure, list(panels.flat)


def accuracy(section: Section, path: Path, title: str = "Accuracy with few visual tokens") -> Path:
    """Accuracy over kept tokens, a line per policy, 95 % intervals."""
    figure, axes = _axes(6.6, 4.8)
    full = next((row for row in section.rows if row["policy"] == "all tokens"), None)
    if full:
        axes.axhspan(100 * full["low"], 100 * full["high"], color=GRID, alpha=0.7, linewidth=0)
        axes.axhline(100 * full["accuracy"], color=INK, linewidth=1)
        text = f"all {full['tokens']} tokens: {full['accuracy']:.1%}"
        axes.annotate(text, (0, 100 * full["accuracy"]), xytext=(4, 3), xycoords=("axes fraction", "data"),
                      textcoords="offset points", fontsize=9, color=INK)  # fmt: skip
    scored = [row for row in section.rows if row["policy"] != "all tokens" and row.get("accuracy") is not None]
    named = names.looks(row["policy"] for row in scored)
    for i, (name, look) in enumerate(named.items()):
        rows = sorted((row for row in scored if row["policy"] == name), key=lambda row: row["tokens"])
        shift = 1 + 0.012 * (i - len(named) / 2)  # side by side, so that intervals stay apart
        x = [row["tokens"] * shift for row in rows]
        y = [100 * row["accuracy"] for row in rows]
        error = [
            [100 * (row["accuracy"] - row["low"]) for row in rows],
            [100 * (row["high"] - row["accuracy"]) for row in rows],
        ]
        axes.errorbar(x, y, error, color=names.COLOURS[look.colour][0], marker=look.marker, linestyle=look.dash,
                      label=name, markersize=5.5, capsize=2.5,
                      linewidth=2.2 if name == "FlowCut" else 1.4, zorder=4 if name == "FlowCut" else 3)  # fmt: skip
    ticks = sorted({row["tokens"] for row in scored})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{t}\n{t / section.facts['patches']:.0%}" for t in ticks])
    axes.minorticks_off()
    _head(axes, title, "visual tokens kept per image", "accuracy, %")
    _legend(axes)
    return save(figure, path)


def entropy(section: Section, path: Path) -> Path:
    """CLS entropy / ln N over the layers."""
    figure, axes = _axes(6.6, 3.0)
    values = section.facts["entropy"]
    axes.plot(range(len(values)), values, color=BLUE, marker="o", markersize=4.5, linewidth=2)
    axes.set_ylim(min(0.5, min(values) - 0.05), 1.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _head(
        axes, "How spread out the class token's attention is, by layer (1: uniform)", "encoder layer", "entropy / ln N"
    )
    return save(figure, path)


def flow_lines(section: Section, figure: SubFigure) -> None:
    """The flow of information over the layers."""
    shares, correlations = figure.subplots(1, 2)
    concentration = (
        ("entropy", "entropy / ln N", BLUE, "o"),
        ("hub_share", "outflow of hubs", ORANGE, "^"),
        ("class_token", "outflow of the class token", MUTED, "s"),
    )
    agreement = (
        ("relay", "all tokens", BLUE, "o"),
        ("criteria", "value norm", ORANGE, "^"),
        ("previous", "the layer before", MUTED, "s"),
    )
    for axes, title, looks, low in (
        (shares, "How concentrated", concentration, 0),
        (correlations, "What the anchor's attention agrees with (rank correlation)", agreement, -1.02),
    ):
        _plain(axes)
        for key, label, colour, marker in looks:
            known = [(row["layer"], row[key]) for row in section.rows if row[key] is not None]
            if known:
                axes.plot(
                    *zip(*known, strict=True), color=colour, marker=marker, markersize=4.5, linewidth=2, label=label
                )
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(low, 1.02)
        _head(axes, title, "encoder layer", "")
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def encoder(section: Section, path: Path) -> Path | None:
    """Time ratio against FLOPs ratio: on the diagonal, choosing tokens is free."""
    rows = [row for row in section.rows if "time_ratio" in row]
    if not rows:
        return None
    figure, axes = _axes(6.0, 5.6)
    top = 1.08 * max(max(row["time_ratio"], row["flop_ratio"]) for row in rows)
    low = 0.92 * min(min(row["time_ratio"], row["flop_ratio"]) for row in rows)
    axes.plot([low, top], [low, top], color=MUTED, linewidth=1, label="time follows FLOPs")
    axes.fill_between(
        [low, top], [low, top], [1.1 * low, 1.1 * top], color=GRID, linewidth=0, label="up to the target, 1.10"
    )
    markers = dict(zip(dict.fromkeys(row["batch"] for row in rows), "osD^vP*X", strict=False))
    colours = {"float32": BLUE, "bfloat16": ORANGE}
    for dtype, batch in dict.fromkeys((row["dtype"], row["batch"]) for row in rows):
        some = [row for row in rows if (row["dtype"], row["batch"]) == (dtype, batch)]
        error = [[row["time_ratio"] - row["time_ratio_low"] for row in some],
                 [row["time_ratio_high"] - row["time_ratio"] for row in some]]  # fmt: skip
        x, y = [row["flop_ratio"] for row in some], [row["time_ratio"] for row in some]
        axes.errorbar(x, y, error, linestyle="", capsize=2.5, marker=markers[batch], markersize=7, zorder=3,
                      color=colours.get(dtype, "#009e73"), label=f"{dtype}, batch {batch}")  # fmt: skip
    highest = {row["tokens"]: row for row in sorted(rows, key=lambda r: r["time_ratio_high"])}
    for row in highest.values():
        axes.annotate(f"→ {row['tokens']}", (row["flop_ratio"], row["time_ratio_high"]), xytext=(0, 6),
                      textcoords="offset points", ha="center", fontsize=8.5, color=MUTED)  # fmt: skip
    axes.set_xlim(low, top)
    axes.set_ylim(low, top)
    _head(
        axes,
        f"Encoder, {section.facts['patches']} tokens → few: time against arithmetic",
        "FLOPs, pruned / stock",
        "time, pruned / stock",
    )
    _legend(axes)
    return save(figure, path)


def ops(section: Section, path: Path) -> Path | None:
    """Achieved bandwidth of every case against the copy bandwidth of the same run."""
    # score_select moves next to nothing: bandwidth says nothing about it.
    rows = [row for row in section.rows if "gbs" in row and row["op"] != "score_select"][::-1]
    if not rows:
        return None
    figure, axes = _axes(7.6, 0.27 * len(rows) + 1.4)
    names = [
        f"{row['op']}  {row['case']}  {row['dtype'].replace('bfloat', 'bf').replace('float', 'fp')}" for row in rows
    ]
    position = range(len(rows))
    plain = [row["bytes"] / row["torch_seconds"] / 1e9 for row in rows]
    axes.barh([i + 0.19 for i in position], [row["gbs"] for row in rows], 0.38, color=BLUE, label="flowcut_kernels")
    axes.barh([i - 0.19 for i in position], plain, 0.38, color=GREY, label="best vectorised torch")
    limit = section.facts["copy GB/s"]
    axes.axvline(limit, color=ORANGE, linewidth=1.4, label=f"copy, {limit:.0f} GB/s")
    axes.set_yticks(list(position), names, fontsize=8)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.grid(axis="y", visible=False)
    _head(axes, "", "GB/s by the formula's bytes (data in cache may exceed the copy line)", "")
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return save(figure, path)


def policies(section: Section, path: Path) -> Path | None:
    """Time to the first token by policy, a panel per batch and budget, and where the same counts are given for free."""
    stock = {row["batch"]: row for row in section.rows if row["policy"] == "stock"}
    groups: dict[tuple[int, int], list[dict]] = {}
    for row in section.rows:
        if row["policy"] != "stock" and "first_seconds" in row:
            groups.setdefault((row["batch"], row["tokens"]), []).append(row)
    if not groups:
        return None
    most = max(map(len, groups.values()))
    figure, panels = plt.subplots(
        1, len(groups), figsize=(2.6 + 3.6 * len(groups), 0.34 * most + 1.7), squeeze=False, layout="constrained"
    )
    for number, (axes, ((batch, tokens), rows)) in enumerate(zip(panels.flat, groups.items(), strict=True)):
        _plain(axes)
        place, labels = range(len(rows)), number == 0
        encoder, llm, first, spread, saved = (
            [1e3 * row[key] for row in rows]
            for key in ("encoder_seconds", "llm_seconds", "first_seconds", "first_spread", "choosing_seconds")
        )
        error = [time * half / 1e3 for time, half in zip(first, spread, strict=True)]
        axes.barh(place, encoder, 0.66, color=BLUE, label="encoder" if labels else None)
        axes.barh(place, llm, 0.66, left=encoder, xerr=error, color=GREY, error_kw=dict(ecolor=INK, elinewidth=1),
                  label="language model" if labels else None)  # fmt: skip
        free = [a - b for a, b in zip(first, saved, strict=True)]
        axes.plot(free, place, color=ORANGE, marker="D", markersize=5, linestyle="",
                  label="same counts, rows given for free" if labels else None)  # fmt: skip
        whole = 1e3 * stock[batch]["first_seconds"]
        axes.axvline(whole, color=INK, linewidth=1, label="stock model, all tokens" if labels else None)
        axes.set_xlim(0, 1.05 * max([whole, *first]))
        axes.set_yticks(list(place), [row["policy"] for row in rows], fontsize=9)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        _head(axes, f"{tokens} of {section.facts['patches']} tokens on average, batch {batch}", "1st token, ms", "")
    _legend(panels.flat[0])
    return save(figure, path)


def search(section: Section, path: Path) -> Path | None:
    """Best objective so far over the trials of each search; the first trial is the untuned policy."""
    budgets = section.facts["budgets"]
    if not budgets:
        return None
    figure, panels = plt.subplots(
        1, len(budgets), figsize=(1.2 + 4.0 * len(budgets), 3.8), squeeze=False, layout="constrained"
    )
    looks = {"gp": (BLUE, "o", "Gaussian process"), "tpe": (ORANGE, "^", "tree-structured Parzen")}
    for number, (axes, (budget, found)) in enumerate(zip(panels.flat, budgets.items(), strict=True)):
        _plain(axes)
        for sampler, values in found["curves"].items():
            colour, marker, name = looks[sampler]
            known = [(i, value) for i, value in enumerate(values, 1) if value is not None]
            best = [max(value for _, value in known[: i + 1]) for i in range(len(known))]
            trial = [i for i, _ in known]
            label = name if number == 0 else None
            axes.plot(trial, [value for _, value in known], color=colour, marker=marker, markersize=3, linestyle="",
                      alpha=0.35)  # fmt: skip
            axes.step(trial, best, where="post", color=colour, linewidth=2, label=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        start, top = (
            known[0][1],
            max(value for values in found["curves"].values() for value in values if value is not None),
        )
        axes.set_ylim(
            start - 2 * max(top - start, 1e-3), top + 0.3 * max(top - start, 1e-3)
        )  # some draws are far below
        axes.axhline(start, color=MUTED, linewidth=1, linestyle="--", label=None if number else "untuned")
        _head(axes, f"{float(budget):.0%} of the visual tokens", "trial", "" if number else "mean cosine similarity")
    _legend(panels.flat[0])
    return save(figure, path)


def draw(report: Report, folder: Path) -> dict[str, list[Path]]:
    """Every figure the report has data for: section name -> files."""
    found: dict[str, list[Path | None]] = {}
    for section in report.sections:
        files: list[Path | None] = []
        if section.name == "quality" and section.rows:
            files.append(accuracy(section, folder / "accuracy.png"))
        if section.name == "generation":
            files.append(accuracy(section, folder / "lists.png", "Lists of digits with few visual tokens"))
        if section.name == "encoder":
            files.append(encoder(section, folder / "encoder.png"))
        if section.name == "tune":
            files.append(search(section, folder / f"search-{section.facts['policy']}.png"))
        if section.name == "policies":
            files.append(policies(section, folder / "policies.png"))
        if section.name == "ops":
            files.append(ops(section, folder / "operators.png"))
        if section.facts.get("entropy"):
            files.append(entropy(section, folder / f"entropy-{section.name}.png"))
        found[section.name] = files
    return {name: [file for file in files if file] for name, files in found.items()}
