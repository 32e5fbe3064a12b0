"""What the pages of the documentation show: their blocks, code within a line, and commands."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md" and path.parent.name != "api"  # history; made from the code
)


class Block(NamedTuple):
    page: str
    line: int  # of its first line
    kind: str
    text: str

    @property
    def first(self) -> str:
        return self.text.split("\n", 1)[0]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def tokens(page: str) -> list:
    return MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text())


def blocks(page: str) -> list[Block]:
    return [Block(page, t.map[0] + 2, t.info, t.content) for t in tokens(page) if t.type == "fence"]


def inline(page: str) -> list[str]:
    """Code within a page's lines."""
    return [c.content for t in tokens(page) for c in t.children or () if c.type == "code_inline"]


def commands_of(page: str) -> list[str]:
    """Commands of its shell blocks, and those between backticks."""
    found = []
    for block in blocks(page):
        if block.kind == "bash":
            lines = block.text.replace("\\\n", " ").splitlines()
            found += [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]
    return found + [code for code in inline(page) if re.match(r"(flowcut-bench|make|pip|python|lmms-eval) \S", code)]
