"""The bar while something runs, the console, and the command as it was typed."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Tick = Callable[..., None]


@contextmanager
def progress(title: str) -> Iterator[Tick]:
    """A bar on standard error while something runs; the yielded function takes a label and the share done, if known."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)

        def tick(label: str, share: float | None = None) -> None:
            bar.update(
                task, description=f"{title} {label}", total=None if share is None else 1.0, completed=share or 0.0
            )

        yield tick


def terminal() -> Console:
    """Standard output; 100 columns where it is not a terminal that knows better."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100)


def typed() -> str:
    """The command as it was typed, without the path of the program; file names are left out."""
    files, words, skip = ("--json", "--csv", "--out"), [], False
    for word in sys.argv[1:]:
        if not skip and word.partition("=")[0] not in files:
            words.append(word)
        skip = word in files
    return shlex.join(["flowcut-bench", *words])
