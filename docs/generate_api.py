"""Writes docs/api from the package's own signatures and docstrings: `make docs`.

An object is shown by its source up to the body, as ruff formatted it, and by its docstring. Objects are imported rather
than parsed, because functions such as `fk.tune` share the name of the module that they come from.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from enum import Enum
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

from typer import Context
from typer.cli import get_docs_for_click
from typer.main import get_command

FOLDER = Path(__file__).parent / "api"
NOTE = "<!-- Made by `make docs` from docstrings: edit those. -->"
PACKAGE = "flowcut_kernels"
VIEWS = "EncoderStep EncoderView Pixels Selection FeatureView FeatureSelection DecoderView PromptView VisualHeads"


class Page(NamedTuple):
    file: str
    title: str
    about: str
    names: dict[str, list[str]]  # module -> what is public of it


def pages() -> list[Page]:
    exported = lambda module: list(import_module(module).__all__)  # noqa: E731
    policies, base = exported(f"{PACKAGE}.policies"), f"{PACKAGE}.policies.base"
    rest = [name for name in exported(PACKAGE) if name not in policies]
    return [
        Page(
            "flowcut_kernels.md",
            PACKAGE,
            "`import flowcut_kernels as fk`. Its policies have [a page of their own](policies.md).",
            {PACKAGE: rest, f"{PACKAGE}.cost": ["Side", "Schedule"]},
        ),
        Page(
            "policies.md",
            "Policies",
            f"What `fk.patch` takes; and, from `{base}`, what the decisions of a policy see and what they answer.",
            {f"{PACKAGE}.policies": policies, base: VIEWS.split()},
        ),
        Page(
            "ops.md",
            f"{PACKAGE}.ops",
            "How each of them works and what it costs: [a page per operator](../ops/README.md).",
            {f"{PACKAGE}.ops": exported(f"{PACKAGE}.ops")},
        ),
        Page(
            "modules.md",
            f"{PACKAGE}.modules",
            "What takes the place of layers of Hugging Face models.",
            {f"{PACKAGE}.modules": exported(f"{PACKAGE}.modules")},
        ),
        Page(
            "integrations.md",
            "Integrations and helpers",
            f"`{PACKAGE}.integrations.serving` ([how engines call it](../serving.md)), and `{PACKAGE}.testing` for "
            "tests of operators. [lmms-eval](../lmms_eval.md) is given its arguments on the command line.",
            {
                f"{PACKAGE}.integrations.serving": ["retained_count", "retention_mask"],
                f"{PACKAGE}.testing": ["assert_within_budget"],
            },
        ),
    ]


class Entry(NamedTuple):
    name: str  # "patch", "FlowCut", "FlowCut.release"
    code: str  # the source that is shown
    doc: str  # the docstring, "" where it is missing


def entries(page: Page) -> Iterator[Entry]:
    """Everything on a page, in order: names as they are exported, methods behind their class."""
    for module, names in page.names.items():
        for name in names:
            found = getattr(import_module(module), name)
            if not inspect.isclass(found):
                yield Entry(name, signature(found), inspect.getdoc(found) or "")
                continue
            yield Entry(name, class_head(found), inspect.cleandoc(found.__doc__ or ""))
            for attribute, method in methods(found):
                yield Entry(f"{name}.{attribute}", signature(method), inspect.getdoc(method) or "")


def methods(owner: type) -> Iterator[tuple[str, Any]]:
    """Public methods of a class and of its private bases; overrides only where they say something of their own."""
    ours = [each for each in owner.__mro__ if each is owner or each.__name__[0] == "_"]
    public = [each for each in owner.__mro__ if each not in ours]
    for base in ours:
        for name, member in vars(base).items():
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            known = any(hasattr(each, name) for each in public)
            if name[0] != "_" and inspect.isfunction(function) and (function.__doc__ or not known):
                yield name, function


def parsed(found: Any) -> tuple[list[str], Any]:
    """Lines of a function or class, decorators included, and its node."""
    text = dedent(inspect.getsource(found))
    return text.splitlines(), ast.parse(text).body[0]


def signature(function: Any) -> str:
    """Decorators and signature."""
    lines, node = parsed(function)
    return "\n".join(lines[: node.body[0].lineno - 1])


def class_head(owner: type) -> str:
    """Decorators, bases, fields with their comments, and a constructor that is written out."""
    lines, node = parsed(owner)
    has_fields = hasattr(owner, "__dataclass_fields__") or hasattr(owner, "_fields") or issubclass(owner, Enum)
    documented = ast.get_docstring(node) is not None
    fields = [child for child in node.body[documented:] if has_fields and not isinstance(child, ast.FunctionDef)]
    head = lines[: node.body[0].lineno - 1]
    if fields:
        first = node.body[0].end_lineno if documented else node.body[0].lineno - 1
        head += [line for line in lines[first : fields[-1].end_lineno] if line]
    elif "__init__" in vars(owner) and not has_fields:
        head += ["    " + line for line in signature(vars(owner)["__init__"]).splitlines()]
    return "\n".join(head)


def markdown(doc: str, links: dict[str, str], owner: str = "") -> str:
    """A Google-style docstring as Markdown; methods are looked up in the class `owner` first."""

    def linked(match: re.Match) -> str:
        last = match[1].rpartition(".")[2].lstrip("~")
        target = links.get(f"{owner}.{last}") or links.get(f"Policy.{last}") or links.get(last)
        shown = last if match[1][0] == "~" else match[1]
        return f"[`{shown}`]({target})" if target else f"`{shown}`"

    text, *sections = re.split(r"^(Args|Returns|Raises):\n", doc, flags=re.MULTILINE)
    parts = [text]
    for title, content in zip(sections[::2], sections[1::2], strict=True):
        block = re.match(r"(?:(?:    .*)?(?:\n|$))*", content)  # ends where lines are not indented any more
        assert block is not None
        inside = dedent(block[0]).strip()
        if title != "Returns":
            items = re.findall(r"^(\S[^:]*): (.*(?:\n+ +.*)*)", inside, flags=re.MULTILINE)
            inside = "\n".join(f"- `{name}`: {' '.join(what.split())}" for name, what in items)
        parts += [f"**{title}**", inside, content[block.end() :]]
    result = "\n\n".join(part.strip() for part in parts if part.strip())
    return re.sub(r":(?:func|class|meth|mod):`([^`]+)`", linked, result).replace("``", "`")


def page_of(page: Page, name: str) -> str:
    """A page of docs/ops or docs/policies on an operator or a policy, "" where there is none."""
    folder, stem = page.file.removesuffix(".md"), name.removesuffix("_")
    stem = stem if folder == "ops" else stem.lower().removesuffix("tokens")
    return f"../{folder}/{stem}.md" * (FOLDER.parent / folder / f"{stem}.md").exists()


def command_line() -> str:
    """The help of every command, by typer itself."""
    command: Any = get_command(import_module(f"{PACKAGE}.bench.commands").app)
    for each in command.commands.values():
        each.short_help = each.help.partition("\n\n")[0].replace("\n", " ")  # typer would cut it short
    return get_docs_for_click(obj=command, ctx=Context(command), name="flowcut-bench")


def reference() -> dict[str, str]:
    """File -> text of all of docs/api; ValueError where something public has no docstring."""
    found = [(page, list(entries(page))) for page in pages()]
    missing = [entry.name for _, each in found for entry in each if not entry.doc]
    if missing:
        raise ValueError(f"public, but without a docstring: {', '.join(missing)}")
    links: dict[str, str] = {}
    for page, each in found:
        seen = Counter([page.title.lower()])
        for entry in each:
            anchor = entry.name.lower().replace(".", "")
            links[entry.name] = f"{page.file}#{anchor}" + f"-{seen[anchor]}" * (seen[anchor] > 0)  # as GitHub has them
            seen[anchor] += 1
    texts = {"cli.md": f"{NOTE}\n\n{command_line().strip()}\n"}
    index = [NOTE, "# API reference"]
    for page, each in found:
        parts = [NOTE, f"# {page.title}", page.about]
        rows = ["| | |", "|---|---|"]
        for name, code, doc in each:
            owner, _, method = name.partition(".")
            text = markdown(doc, links, owner)
            if more := page_of(page, name):
                text += f"\n\n[How it works, and what it costs]({more})"
            parts += [f"##{'#' * bool(method)} `{name}`", f"```py\n{code}\n```", text]
            if not method:
                rows.append(f"| [`{name}`]({links[name]}) | {' '.join(text.partition(chr(10) * 2)[0].split())} |")
        texts[page.file] = "\n\n".join(parts) + "\n"
        index += [f"## [{page.title}]({page.file})", "\n".join(rows)]
    index += ["## [flowcut-bench](cli.md)", "Every command with its options."]
    return texts | {"README.md": "\n\n".join(index) + "\n"}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    texts = reference()
    for old in FOLDER.glob("*.md"):
        old.unlink()
    for file, text in texts.items():
        (FOLDER / file).write_text(text)
