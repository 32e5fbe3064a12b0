"""The pages of docs/ops: signatures and forms are the package's. tests/test_docs.py runs their examples."""

import ast
import inspect
import re
import textwrap
from pathlib import Path

import pytest

from flowcut_kernels import ops

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path for path in (ROOT / "docs" / "ops").glob("*.md")}
INDEX = PAGES.pop("README")


def test_every_operator_has_a_page_and_a_line_with_its_forms():
    folder = ROOT / "flowcut_kernels" / "ops"
    assert PAGES.keys() == {path.parent.name for path in folder.glob("*/reference.py")}
    rows = re.findall(r"^\| \[`(\w+)`\]\((\w+)\.md\)(.*)$", INDEX.read_text(), flags=re.MULTILINE)
    assert {op: link for op, link, _ in rows} == {op: op for op in PAGES}
    for op, _, rest in rows:
        composed = (folder / op / "_compose.py").exists()  # of two operators' C++ forms
        there = [
            composed or (ROOT / "csrc" / "cpu" / f"{op}.cpp").exists(),
            (folder / op / "triton.py").exists(),
            (ROOT / "csrc" / "cuda" / f"{op}.cu").exists(),
        ]
        assert ["yes" in form for form in rest.split("|")[2:5]] == there, op


@pytest.mark.parametrize("op", sorted(PAGES))
def test_signatures_are_the_functions(op):
    def parameters(code: str) -> str:
        tree = ast.parse(code).body[0]
        for argument in ast.walk(tree):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        return ast.dump(tree.args)

    block = re.search(r"^```py\n(.*?)^```", PAGES[op].read_text(), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"^(\w+)(\((?:.|\n)*?\))(?: -> .*)?$", block[1], flags=re.MULTILINE)
    assert op in dict(found)
    for name, arguments in found:
        source = textwrap.dedent(inspect.getsource(getattr(ops, name)))
        assert parameters(f"def f{arguments}: ...") == parameters(source), name
