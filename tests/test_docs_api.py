"""The committed API reference is what the docstrings say."""

import importlib.util
import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def generator():
    spec = importlib.util.spec_from_file_location("generate_api", DOCS / "generate_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_up_to_date():
    made = generator().reference()  # ValueError where a public name has no docstring
    there = {path.name: path.read_text() for path in (DOCS / "api").glob("*.md")}
    stale = [name for name in sorted(made.keys() | there.keys()) if made.get(name) != there.get(name)]
    assert not stale, f"docs/api: {', '.join(stale)} is not what the docstrings say: run `make docs` and commit it"


def test_a_docstring_in_markdown():
    doc = """Do it, see :func:`~pkg.other` and :meth:`gone`.

Args:
    one, two: first line
        and the next: with a colon.
    three: ``None``.

Returns:
    pair [B, N]: of things.

What comes after.

Raises:
    ValueError: always.
"""
    assert generator().markdown(doc, {"other": "page.md#other"}) == (
        "Do it, see [`other`](page.md#other) and `gone`.\n\n**Args**\n\n- `one, two`: first line and the next: with a "
        "colon.\n- `three`: `None`.\n\n**Returns**\n\npair [B, N]: of things.\n\nWhat comes after.\n\n**Raises**\n\n"
        "- `ValueError`: always."
    )


def test_every_relative_link_of_the_reference_exists():
    texts = {path: path.read_text() for path in (DOCS / "api").glob("*.md")}
    for path, text in texts.items():
        for file, anchor in re.findall(r"\]\(([\w./]+\.md)(?:#([\w-]+))?\)", text):
            target = path.parent / file
            assert target.exists(), (path.name, file)
            headings = re.findall(r"^#+ `?([^`\n]+)`?$", target.read_text(), flags=re.MULTILINE)
            anchors = [heading.lower().replace(".", "") for heading in headings]
            assert not anchor or re.sub(r"-\d$", "", anchor) in anchors, (path.name, file, anchor)
