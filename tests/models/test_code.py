"""The package's own code, read: adapters are small, imports point one way, no number stands in for a configuration."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import flowcut_kernels as fk

pytestmark = pytest.mark.any_transformers
CODE = Path(fk.__file__).parent
FILES = {str(path.relative_to(CODE)): ast.parse(path.read_text()) for path in CODE.rglob("*.py")}
# Tokens, edges, patches and layers of LLaVA-1.5 and LLaVA-OneVision, and where an image starts in the former's prompt.
FIXED = {576, 24, 27, 729, 14, 336, 35}
ROOMS = ("ops", "policies", "modules", "models")  # each imports from those before it


def nodes(name: str, *kinds: type[ast.AST]) -> Iterator:
    return (node for node in ast.walk(FILES[name]) if isinstance(node, kinds))


@pytest.mark.parametrize("name", sorted(name for name in FILES if name.startswith("models/") and "/_" not in name))
def test_adapters_are_small(name):
    """Lines of code, without imports and docstrings."""
    said = (x for x in nodes(name, ast.Expr) if isinstance(x.value, ast.Constant))
    others = {n for x in (*nodes(name, ast.Import, ast.ImportFrom), *said) for n in range(x.lineno, x.end_lineno + 1)}
    lines = enumerate((CODE / name).read_text().splitlines(), 1)
    assert len([line for n, line in lines if n not in others and line.strip()]) <= 80


def test_no_fixed_numbers():
    """But in defaults of policies, which are settings that were published, and in the models of the benchmarks."""
    found = []
    for name in FILES:
        fields = [x for kind in nodes(name, ast.ClassDef) for x in kind.body if isinstance(x, ast.AnnAssign)]
        settings = {id(x) for field in fields for x in ast.walk(field)} if name.startswith("policies/") else set()
        if not name.startswith("bench/"):
            numbers = (x for x in nodes(name, ast.Constant) if type(x.value) is int and id(x) not in settings)
            found += [(name, x.lineno, x.value) for x in numbers if x.value in FIXED]
    assert not found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room):
    later = ROOMS[ROOMS.index(room) + 1 :]
    for name in FILES:
        if name.startswith(f"{room}/"):
            outward = [x for x in nodes(name, ast.ImportFrom) if x.level == name.count("/") + 1]
            assert not [x.module for x in outward if (x.module or "").split(".")[0] in later], name
