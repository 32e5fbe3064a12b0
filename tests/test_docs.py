"""Whatever a page shows is run: python blocks as they stand, commands made small, names and links looked up.

A page is one session: its python blocks share their names, in order. Before each of them `model`, `processor`, `image`,
`prompt` and `inputs` are made anew, as ``docs/README.md`` tells readers: LLaVA-1.5 with all its layers and tokens, but
a width of 64. Checkpoints by name are such models of their family. A ``text`` block behind python is what that prints.

A command is run with further options that make it small. What another test runs, or CI itself, is in ELSEWHERE.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from packaging.requirements import Requirement

import flowcut_kernels as fk
from flowcut_kernels import info, policies

pytest.importorskip("typer", reason="the bench extra is not installed")
pytest.importorskip("matplotlib", reason="the bench extra is not installed")
# Its log goes to what stderr is when it is first imported: here, as that of a command is closed behind it.
pytest.importorskip("optuna", reason="the tune extra is not installed")

from pages import PAGES, ROOT, blocks, commands_of, inline, tokens
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from flowcut_kernels.bench import commands, families, ops, report, timing

# Checkpoints that pages load -> a family of `flowcut-bench prefill`; with all its layers, but thin.
CHECKPOINTS = {
    "llava-hf/llava-1.5-7b-hf": "llava-1.5-7b",
    "llava-hf/llava-v1.6-vicuna-7b-hf": "llava-next-7b",
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": "llava-onevision-7b",
    "Qwen/Qwen2-VL-7B-Instruct": "qwen2-vl-7b",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2.5-vl-7b",
}
# First line of a python block -> why it is compiled, but not run.
NOT_RUN = {
    "# 1. Multimodal processor, when placeholders are written: one count an image.": "part of a plugin for vLLM, which "
    "is no dependency; tests/models/test_serving.py runs its two functions",
}
# First line of a python block -> the file that it is quoted from.
QUOTED = {"class PaliGemma:": "flowcut_kernels/models/paligemma.py"}


class Small(NamedTuple):
    """What makes a command small: options behind those of the page, as of a repeated one the last counts."""

    options: str = ""
    makes: str = ""  # files that must be there then; reports in front of their tables


def measured(options: str) -> Small:
    return Small(f"{options} --json small.json --csv small.csv", "small.json small.csv")


# Beginnings of commands; the longest that fits counts.
SMALL = {
    "flowcut-bench ops": measured("--toy --repeats 1"),
    "flowcut-bench encoder": measured("--layers 6 --image-size 112 --hidden 64 --tokens 16,8 --batch 1,2 --repeats 1"),
    "flowcut-bench prefill": measured(
        "--layers 6 --text-layers 1 --image-size 112 --hidden 64 --tokens 8 --steps 1 --repeats 1"
    ),
    "flowcut-bench prefill --family": measured("--family paligemma-3b --toy --repeats 1 --device cpu"),
    "flowcut-bench kv": measured("--toy --repeats 1 --steps 2"),
    "flowcut-bench quality": measured("--questions 8 --shares 0.11"),
    "flowcut-bench conversation": measured("--questions 16"),
    "flowcut-bench tune": measured("--budget 0.25 --trials 2 --samples 4 --questions 16"),
    "flowcut-bench compare": measured("--toy --tokens 24 --steps 1 --repeats 1"),
    "flowcut-bench compare A.json B.json": Small(),
    "flowcut-bench compile": measured("--only gather --arch 90"),
    "flowcut-bench gpu": Small("--dry-run --only kv", "DIR/gpu.json DIR/gpu.log"),
    "flowcut-bench look": Small(makes="*/look.html */*.png"),
    "flowcut-bench flow": Small(makes="*/*-flow.json */*-flow.png"),
    "flowcut-bench report": Small(makes="pages/report.html pages/report.json pages/accuracy.png"),
    "flowcut-bench presets": Small(),
    "python -m flowcut_kernels.info": Small(),
    "python -m benchmarks.mini_vlm.train": Small(
        "--scale 0.0003 --threads 1 --out trained", "trained/model.safetensors"
    ),
    "python -m benchmarks.mini_vlm.evaluate": Small("--scenes 8"),
    "python docs/generate_api.py": Small(makes="docs/api/*.md"),
    "python docs/fill_tables.py": Small(makes="docs/*.md docs/ops/*.md"),
}
# Beginnings of commands that are not run here -> where they are. Here they are compared with what they name.
ELSEWHERE = {
    "make bench": "tests/bench/test_cli.py runs the main job",
    "make test": "CI runs it: it has run this test",
    "make sanitize": "CI runs it, as a part of make test; it compiles for a minute",
    "pip install": "make test begins with the build, in an environment of its own",
    "lmms-eval": "tests/integrations/test_lmms_eval.py runs those of docs/lmms_eval.md",
}
COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))


@cache
def thin(family: str) -> Any:
    found = families.FAMILIES[family]
    if family == "llava-1.5-7b":  # examples count on its 576 tokens
        found = replace(found, narrow_vision=dict(image_size=336))
    model = found.build("thin", "cpu", torch.float32)
    model.generation_config.eos_token_id = list(range(96))  # one word says it all
    return model


@cache
def processor() -> Any:
    """LLaVA-1.5's, for the words of the narrow models."""
    names = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, 90)), "<image>"]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", additional_special_tokens=["<image>"], padding_side="left"
    )
    size = dict(height=336, width=336)
    return transformers.LlavaProcessor(
        transformers.LlavaImageProcessorPil(size=size, crop_size=size), tokenizer, patch_size=14,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, image_token="<image>",
    )  # fmt: skip


def picture() -> Image.Image:
    noise = torch.randint(0, 255, (150, 200, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.fromarray(noise.numpy())


def prelude() -> dict[str, Any]:
    image, prompt = picture(), "USER: <image> what is this ASSISTANT:"
    inputs = processor()(images=image, text=prompt, return_tensors="pt")
    model = copy.deepcopy(thin("llava-1.5-7b"))
    return dict(fk=fk, model=model, processor=processor(), image=image, prompt=prompt, inputs=inputs)


@pytest.fixture
def offline(monkeypatch):
    """Checkpoints by name are thin models; folders are loaded as always."""
    from_folder = transformers.PreTrainedModel.from_pretrained.__func__

    def load(cls, name, *args, **options):
        if isinstance(name, Path):
            return from_folder(cls, name, *args, **options)
        assert options.keys() <= {"dtype", "attn_implementation", "device_map"}, f"unknown option among {options}"
        model = copy.deepcopy(thin(CHECKPOINTS[name]))
        assert type(model) is cls, f"{name} is a {type(model).__name__}"
        return model

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(load))
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name: (CHECKPOINTS[name], processor())[1])


def test_every_block_says_what_it_is():
    kinds = {"python", "bash", "text", "py"}  # "py": signatures, which tests/test_docs_ops.py compares
    wrong = [f"{block}: ```{block.kind}" for page in PAGES for block in blocks(page) if block.kind not in kinds]
    assert not wrong, f"{wrong}: use one of {kinds}"
    first = {block.first for page in PAGES for block in blocks(page)}
    assert NOT_RUN.keys() | QUOTED.keys() <= first, "a block is listed that no page has"


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.kind == "python" for block in blocks(page))])
def test_python(page, offline, monkeypatch, tmp_path):
    session = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", session)  # where dataclasses look for it
    (tmp_path / "docs").symlink_to(ROOT / "docs")  # pictures by the path that they have in a clone
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    shown = blocks(page)
    for i, block in enumerate(shown):
        if block.kind != "python":
            continue
        code = compile("\n" * (block.line - 1) + block.text, page, "exec")  # errors name the page's own line
        if block.first in QUOTED:
            assert block.text in (ROOT / QUOTED[block.first]).read_text(), f"{block} has changed: quote it again"
        if block.first in NOT_RUN.keys() | QUOTED.keys():
            continue
        torch.manual_seed(0)
        vars(session).update(prelude())
        with contextlib.redirect_stdout(io.StringIO()) as written:
            exec(code, vars(session))
        if i + 1 < len(shown) and shown[i + 1].kind == "text":
            expected = shown[i + 1]
            lines = [[line.rstrip() for line in text.splitlines()] for text in (written.getvalue(), expected.text)]
            assert lines[0] == lines[1], f"{expected}: what the block before it prints is something else"


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Where commands run: what pages call IMAGE, MODEL, A.json and B.json is there."""
    picture().save(tmp_path / "IMAGE", "png")
    shutil.copytree(ROOT / "benchmarks" / "mini_vlm" / "weights", tmp_path / "MODEL")
    for name, source in (("A.json", "cpu-kv.json"), ("B.json", "cpu-kv-run2.json")):
        shutil.copy(ROOT / "benchmarks" / "results" / source, tmp_path / name)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("api"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(ops, "Copy", lambda device: timing.Copy(device, 2**20))
    monkeypatch.setattr(timing, "SETTLING", 0.0)  # seconds are not looked at


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, folder, monkeypatch):
    check(command, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "flowcut-bench ops --repeat 3",
        "flowcut-bench opps",
        "flowcut-bench quality --policies guess",
        "flowcut-bench tune --budget 25,11",  # although what makes it small has another
        "flowcut-bench look NOTHING",
        "make tset",
        "pip install '.[tine]' --no-build-isolation",
        "python -m benchmarks.mini_vlm.train --sede 1",
        "lmms-eval --model flowcut --model_args policy=FlowCut",
        "unheard of",
    ],
)
def test_wrong_commands_are_found(command, folder, monkeypatch):
    with pytest.raises((Exception, pytest.fail.Exception)):
        check(command, monkeypatch)


def test_every_subcommand_is_on_a_page():
    """And so is run."""
    found = {command.split()[1] for command in COMMANDS if command.startswith("flowcut-bench ")}
    assert found == {each.name or each.callback.__name__ for each in commands.app.registered_commands}


def check(command: str, monkeypatch) -> None:
    program, *words = shlex.split(command)
    if program == "make":
        dry = ["make", "--no-print-directory", "--dry-run", "--old-file=.venv/built", *words]
        done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and words, done.stderr
        for line in [] if command in ELSEWHERE else done.stdout.splitlines():
            check(line.replace(".venv/bin/python", "python"), monkeypatch)
    elif program == "pip":
        install(words)
    elif program == "lmms-eval":
        assert command in commands_of("docs/lmms_eval.md"), ELSEWHERE[program]
    else:
        run(command, monkeypatch)


def run(command: str, monkeypatch) -> None:
    """A command made small: it ends well, and what it prints and writes is there and right."""
    begins = [begin for begin in SMALL if f"{command} ".startswith(f"{begin} ")]
    assert begins, f"{command!r}: say in tests/test_docs.py what makes it small, or where it is run"
    small = SMALL[max(begins, key=len)]
    program, *words = shlex.split(command)
    if program == "python":
        output = python([*words, *small.options.split()], monkeypatch)
    else:
        if "--json" in small.options:  # what is replaced must be right, too
            with monkeypatch.context() as without:
                without.setattr(commands, "section", lambda *args: None)
                bench(words)
        output = bench([*words, *small.options.split()], apart=words[0] == "compile")
        assert "--json" not in small.options or max(map(len, output.splitlines())) <= 100
    written = [path for pattern in small.makes.split() for path in sorted(Path().glob(pattern)) or [Path(pattern)]]
    assert all(path.stat().st_size for path in written) and (written or output.strip())
    for path in written:
        if path.parts[0] == "docs":
            assert path.read_text() == (ROOT / path).read_text(), f"{path} is out of date: run `make docs`"
        elif path.suffix == ".json":
            rows = checked(path)
        elif path.suffix == ".csv":
            lines = path.read_text().splitlines()
            assert len(lines) == 1 + rows and lines[0].startswith("section,")


def python(words: list[str], monkeypatch) -> str:
    """``python WORDS`` in this process; returns what it prints."""
    start = runpy.run_module if words[0] == "-m" else runpy.run_path
    name, *options = words[words[0] == "-m" :]
    monkeypatch.delitem(sys.modules, name, raising=False)  # it may be imported by now
    monkeypatch.setattr(sys, "argv", [name, *options])
    with contextlib.redirect_stdout(io.StringIO()) as written:
        try:
            start(name, run_name="__main__")
        except SystemExit as end:
            assert not end.code, f"{name} ends with {end.code}: {written.getvalue()}"
    return written.getvalue()


def bench(words: list[str], apart: bool = False) -> str:
    """``flowcut-bench WORDS``; returns what it prints.

    Apart: in a process of its own, as where Triton's interpreter runs the kernels there are none to compile.
    """
    if apart:
        variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        program = [sys.executable, "-m", "flowcut_kernels.bench.cli"]
        done = subprocess.run([*program, *words], env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    found = CliRunner().invoke(commands.app, words)
    assert found.exit_code == 0, found.output
    return found.output


def checked(path: Path) -> int:
    """Rows of a report, which are there and right; it is the same when read and saved, and names no folder."""
    made = report.load(path)
    assert not made.failed and made.sections
    assert all(section.rows and all(row["ok"] for row in section.rows) for section in made.sections)
    made.save(Path("again.json"))
    assert path.read_text() == Path("again.json").read_text() and str(Path.cwd()) not in path.read_text()
    return sum(len(section.rows) for section in made.sections)


def install(words: list[str]) -> None:
    """What pages tell to install is what the build and the extras are declared to need."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    build = {need.name: need for need in map(Requirement, declared["build-system"]["requires"])}
    extras = declared["project"]["optional-dependencies"]
    assert words[0] == "install"
    needs = [word for word in words[1:] if not word.startswith("-")]
    assert set(words[1:]) - set(needs) <= {"--no-build-isolation"}
    if needs == ["."] or needs[0].startswith(".["):
        assert "--no-build-isolation" in words and len(needs) == 1
        asked = needs[0][2:-1].split(",") if needs != ["."] else []
        assert set(asked) <= extras.keys()
    else:
        asked = {need.name: need for need in map(Requirement, needs)}
        assert asked.keys() <= build.keys()
        assert all(not need.specifier or need.specifier == build[name].specifier for name, need in asked.items())


@pytest.mark.parametrize("page", PAGES)
def test_names_and_links(page):
    """Files exist, ``fk.NAME`` and ``flowcut_kernels.NAME`` are there, policies in a sentence can be made."""
    text, here = (ROOT / page).read_text(), (ROOT / page).parent
    links = [c.attrs.get("href", c.attrs.get("src", "")) for t in tokens(page) for c in t.children or ()]
    files = [link.split("#")[0] for link in links if link and not re.match(r"https?:|#", link)]
    missing = [path for path in files if not (here / path).exists()]
    rooms = "benchmarks|csrc|docs|flowcut_kernels|tests"
    for code in inline(page):
        path = re.fullmatch(rf"(?:{rooms})/[\w./-]+|[\w-]+\.json", code)
        if path and not (ROOT / code).exists() and not (ROOT / "benchmarks" / "results" / code).exists():
            missing.append(code)
    for name in re.findall(r"\b(?:fk|flowcut_kernels)((?:\.[A-Za-z_]\w*)+)", text):
        missing += [name[1:]] if not _is_there(name[1:].split(".")) else []
    for code in inline(page):
        policy = re.match(r"(?:fk\.)?([A-Z]\w+)(?:\.(?:preset|release))?\([^)]", code)
        if policy and hasattr(fk, policy[1]):
            eval(code, dict(fk=fk), vars(fk))
    assert not missing, f"{page} names what is not there"


@pytest.mark.parametrize("name", [name for name in policies.__all__ if name != "Policy"])
def test_policy_has_a_page_with_all_its_fields(name):
    page = f"docs/policies/{name.removesuffix('Tokens').lower()}.md"
    missing = {field.name for field in fields(getattr(policies, name))} - set(inline(page))
    assert not missing, f"{page} does not say what {missing} do"
    assert f"[{name}]({Path(page).name})" in (ROOT / "docs/policies/README.md").read_text()


def test_environment_variables_are_in_the_table():
    named = {code.split("=")[0] for code in inline("docs/install.md")}
    assert info.VARIABLES.keys() <= named


def _is_there(names: list[str]) -> bool:
    found: Any = fk
    for i, name in enumerate(names):
        if not hasattr(found, name):
            try:
                found = importlib.import_module(".".join(["flowcut_kernels", *names[: i + 1]]))
            except ImportError:
                return (ROOT / "flowcut_kernels" / "/".join(names)).parent.is_dir() and names[-1] in ("py", "so")
        else:
            found = getattr(found, name)
    return True


def test_names_that_are_not_there_are_found():
    assert _is_there(["ops", "anchor_stats"]) and _is_there(["models", "llava", "Llava"])
    assert not _is_there(["FlowCutt"]) and not _is_there(["ops", "anchor_stat"])
