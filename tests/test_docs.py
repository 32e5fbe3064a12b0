"""Whatever a page shows is run: python blocks as they stand, commands at their smallest, names and links looked up.

A page is one session: its python blocks share their names, in order. Before each of them `model`, `processor`, `image`,
`prompt` and `inputs` are made anew, as ``docs/README.md`` tells readers: LLaVA-1.5 with all its layers and tokens, but
a width of 64. Checkpoints by name are such models of their family. A ``text`` block behind python is what that prints.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentParser
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

import typer.main
from markdown_it import MarkdownIt
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from flowcut_kernels.bench import commands, families, ops, timing

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md" and path.parent.name != "api"  # history; made from the code
)

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
# Subcommands of flowcut-bench whose commands are run, once further options have made them small.
SMALL = {
    "ops": "--toy --repeats 1 --threads 1 --json small.json",
    "encoder": "--layers 6 --image-size 112 --hidden 64 --tokens 16 --batch 1 --repeats 1 --threads 1",
    "kv": "--toy --repeats 1 --steps 1 --threads 1",
    "look": "",
    "flow": "",
    "report": "",
    "compare A.json B.json": "",
    "presets": "",
}
# Those that take longer: options are parsed, checked, and handed to the signature of the function that measures.
SLOW = {
    "": "the main job: tests/bench/test_cli.py runs it at toy size",
    "prefill": "tests/bench/test_cli.py",
    "quality": "tests/bench/test_cli.py",
    "conversation": "tests/bench/test_cli.py",
    "tune": "tests/bench/test_cli.py",
    "compile": "tests/ops/test_compile.py",
    "compare": "tests/bench/test_side_by_side.py",
    "gpu": "tests/bench/test_gpu.py runs it dry",
}


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
    shutil.copytree(ROOT / "docs" / "images", tmp_path / "docs" / "images")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, folder, monkeypatch):
    check(command, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "flowcut-bench ops --repeat 3",
        "flowcut-bench opps",
        "flowcut-bench quality --policies guess",
        "flowcut-bench look NOTHING",
        "make tset",
        "pip install '.[tine]' --no-build-isolation",
        "python -m benchmarks.mini_vlm.train --sede 1",
        "lmms-eval --model flowcut --model_args pretrained=llava-hf/llava-1.5-7b-hf,policy=FlowCut,target_token=64",
        "unheard of",
    ],
)
def test_wrong_commands_are_found(command, folder, monkeypatch):
    with pytest.raises((Exception, pytest.fail.Exception)):
        check(command, monkeypatch)


def check(command: str, monkeypatch) -> None:
    program, *words = shlex.split(command)
    if program == "flowcut-bench":
        bench(words, monkeypatch)
    elif program == "make":
        done = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and words, done.stderr
    elif program == "pip":
        install(words)
    elif program == "lmms-eval":
        lmms_eval(words)
    elif words[:1] == ["-m"]:
        module(words[1], words[2:], monkeypatch)
    else:
        pytest.fail(f"{command!r} is neither run nor compared with anything")


def bench(words: list[str], monkeypatch) -> None:
    app = typer.main.get_command(commands.app)  # made anew, so that what its commands do may be taken away
    for command in (app, *app.commands.values()):
        command.callback = lambda **options: None
    app.main(words, prog_name="flowcut-bench", standalone_mode=False)

    name = next((word for word in words if not word.startswith("-")), "")
    if words[:3] == ["compare", "A.json", "B.json"]:
        name = "compare A.json B.json"
    assert name in SMALL.keys() | SLOW.keys(), f"flowcut-bench {name}: say in tests/test_docs.py how it is tested"
    if name in SMALL:
        monkeypatch.setattr(ops, "Copy", lambda device: timing.Copy(device, 2**20))
        found = CliRunner().invoke(commands.app, [*words, *SMALL[name].split()])
        assert found.exit_code == 0, found.output
        if name == "ops":  # --only may have left none
            assert json.loads(Path("small.json").read_text())["sections"][0]["rows"]
    elif name not in ("", "gpu"):

        def bound(title, measure, options, threads, device, *files) -> None:
            tick = len  # anything that can be called
            inspect.signature(measure).bind(**options, device=device, command="", tick=tick)

        monkeypatch.setattr(commands, "section", bound)
        found = CliRunner().invoke(commands.app, words)
        assert found.exit_code == 0, found.output


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


def lmms_eval(words: list[str]) -> None:
    """tests/integrations runs this command; options that it does not use are unknown here, too."""
    tested = (ROOT / "tests" / "integrations" / "test_lmms_eval.py").read_text()
    options = dict(zip(words[::2], [*words[1::2], None], strict=False))
    assert all(f'"{option}"' in tested for option in options) and options["--model"] == "flowcut"
    given = dict(pair.split("=") for pair in options["--model_args"].split(","))
    assert given.pop("pretrained") in CHECKPOINTS
    policy = given.pop("policy")
    if policy != "none":
        getattr(fk, policy)(**{name: json.loads(value) for name, value in given.items()})


def module(name: str, words: list[str], monkeypatch) -> None:
    """A module's command line: run where it is quick, else parsed."""
    monkeypatch.syspath_prepend(ROOT)
    if name == "flowcut_kernels.info":
        info.main()
        return
    assert name.startswith("benchmarks.mini_vlm."), f"python -m {name}: say in tests/test_docs.py how it is run"
    parse, end = ArgumentParser.parse_args, "no further"

    def parsed(parser, *args):
        parse(parser, *args)
        sys.exit(end)

    monkeypatch.setattr(ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(SystemExit, match=end):
        runpy.run_module(name, run_name="__main__")


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
