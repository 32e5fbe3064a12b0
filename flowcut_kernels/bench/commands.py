"""Subcommands of flowcut-bench: options, progress, output files and the exit status."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .._library import resolve_backend
from . import machine
from .page import write_page
from .report import Report, Section
from .tables import show_report
from .terminal import Tick, progress, terminal, typed

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")

LOOKED = "flowcut,vflowopt,fastv,cls-attention,uniform-grid"  # where no policy is named
DESCRIBE = "Describe the image."

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Json = Annotated[Path | None, typer.Option("--json", help="Write the figures to this JSON file.")]
Csv = Annotated[Path | None, typer.Option("--csv", help="Write the rows to this CSV file.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads torch and the kernels use.")]
Dtype = Annotated[str, typer.Option(help="fp32, bf16, fp16, or several separated by commas.")]
Repeats = Annotated[int, typer.Option(min=1, help="Interleaved rounds per figure.")]


def known_backend(name: str | None) -> str | None:
    """Refused before anything is measured."""
    try:
        resolve_backend(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return name


Backend = Annotated[str | None, typer.Option(callback=known_backend, help="auto, reference, cpp, triton or cuda.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]
Counts = Annotated[str, typer.Option(help="Visual tokens to keep, separated by commas.")]
Split = Annotated[str, typer.Option(help="dev, or test: scored once, for figures that are committed.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for report.json, report.html and the plots.")]


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    out: Out = Path("flowcut-report"),
    threads: Threads = None,
    device: Device = "cpu",
    backend: Backend = None,
    toy: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """What choosing visual tokens costs and saves on this machine.

    Without a command: the main job, under three minutes on two cores. It checks and times the operators, measures the
    vision encoder and the way to the first token, and lets the trained stand-in answer questions with all tokens and
    with few. It writes report.json, report.html and PNG plots.
    """
    if context.invoked_subcommand is None:
        main_job(out, threads, device, backend, toy)


def main_job(out: Path, threads: int | None, device: str, backend: str | None, toy: bool) -> None:
    from . import job, plots

    prepare(threads, device)
    with progress("flowcut-bench") as tick:
        report = job.measure(typed(), device=device, backend=backend, toy=toy, tick=tick)
        tick("drawing")
        plots.draw(report, out)
    console = terminal()
    show_report(report, console, details=False)
    report.save(out / "report.json")
    write_page(report, out / "report.html")
    console.print(f"{report.seconds:.0f} s; wrote {out}/report.html, report.json and plots")
    if report.failed:
        raise typer.Exit(1)


@app.command()
def ops(
    only: Annotated[str | None, typer.Option(help="Only operators whose name contains this.")] = None,
    cold: Annotated[bool, typer.Option(help="Flush the cache before every call.")] = False,
    dtype: Dtype = "fp32,bf16",
    repeats: Repeats = 9,
    threads: Threads = None,
    device: Device = "cpu",
    backend: Backend = None,
    toy: Annotated[bool, typer.Option(hidden=True)] = False,
    json: Json = None,
    csv: Csv = None,
) -> None:
    """Operators: time against the best vectorised torch, GB/s against the copy bandwidth."""
    from .ops import measure

    options = dict(backend=backend, repeats=repeats, cold=cold, only=only, toy=toy, dtypes=dtypes(dtype))
    section("ops", measure, options, threads, device, json, csv)


@app.command()
def encoder(
    weights: Annotated[
        str, typer.Option(help="How random weights are scaled: paper-like, golden-like.")
    ] = "paper-like",
    tokens: Counts = "192,128,64",
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,4",
    layers: Annotated[int, typer.Option(min=4, help="Layers of the tower.")] = 24,
    image_size: Annotated[int, typer.Option(min=56, help="Pixels; patches are 14 x 14.")] = 336,
    hidden: Annotated[int, typer.Option(min=64, help="Width; heads of 64, MLP 4 x as wide.")] = 1024,
    baselines: Annotated[bool, typer.Option(help="Also time eager attention, plain torch, the limit.")] = True,
    frozen: Annotated[bool, typer.Option(help="Also time the calibrated schedule and CUDA graphs.")] = False,
    dtype: Dtype = "fp32,bf16",
    repeats: Repeats = 5,
    threads: Threads = None,
    device: Device = "cpu",
    backend: Backend = None,
    json: Json = None,
    csv: Csv = None,
) -> None:
    """Vision encoder: stock on SDPA against FlowCut, time and FLOPs."""
    from .encoder import WEIGHTS, measure

    if weights not in WEIGHTS:
        raise typer.BadParameter(f"--weights {weights!r} is unknown: use {' or '.join(WEIGHTS)}")
    budgets, patches = numbers(tokens, "--tokens"), (image_size // 14) ** 2
    if max(budgets) >= patches:
        raise typer.BadParameter(f"--tokens {max(budgets)} prunes nothing: the image has {patches}, keep fewer")
    options = dict(
        dtypes=dtypes(dtype), batches=numbers(batch, "--batch"), tokens=budgets, weights=weights,
        layers=layers, repeats=repeats, backend=backend, shape=width(image_size, hidden),
        baselines=baselines, frozen=frozen,
    )  # fmt: skip
    section("encoder", measure, options, threads, device, json, csv)


@app.command()
def prefill(
    model: Annotated[
        str | None, typer.Option(help="llava-1.5-7b, llava-next-7b or llava-onevision-7b at full size; sets the rest.")
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(help="Model families, separated by commas, or all: what pruning gains, and its cost in Python."),
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1",
    tokens: Counts = "192,64",
    layers: Annotated[int, typer.Option(min=4, help="Layers of the tower.")] = 24,
    text_layers: Annotated[int, typer.Option(min=1, help="Layers of the language model.")] = 8,
    image_size: Annotated[int, typer.Option(min=56, help="Pixels; patches are 14 x 14.")] = 336,
    hidden: Annotated[int, typer.Option(min=64, help="Width of both; heads of 64.")] = 1024,
    steps: Annotated[int, typer.Option(min=1, help="Tokens decoded per repeat.")] = 4,
    baselines: Annotated[bool, typer.Option(help="Also time eager attention and free selection, the limit.")] = False,
    dtype: Dtype = "bf16",
    repeats: Repeats = 3,
    threads: Threads = None,
    device: Device = "cpu",
    backend: Backend = None,
    toy: Annotated[
        bool, typer.Option("--toy", help="With --model or --family: the same structure at a toy's size.")
    ] = False,
    host: Annotated[
        bool,
        typer.Option("--host", help="With --family: CPU time alone, as a share of the least that a prefill takes."),
    ] = False,
    json: Json = None,
    csv: Csv = None,
) -> None:
    """Image to first token and decoding: encoder, projector, language model, KV cache."""
    from . import families
    from .prefill import cpu_shape, measure
    from .shapes import REAL, real

    if family is not None:
        names = tuple(families.FAMILIES) if family == "all" else tuple(family.split(","))
        unknown = [name for name in names if name not in families.FAMILIES]
        if unknown or model is not None:
            wrong = f"{unknown[0]!r} is unknown" if unknown else "does not go with --model"
            raise typer.BadParameter(f"--family {wrong}: use all or {', '.join(families.FAMILIES)}")
        asked: dict[str, Any] = dict(families=names, backend=backend)
        if host:
            section("prefill", families.measure_host, asked, threads, device, json, csv)
            return
        asked |= dict(size="toy" if toy else "real", dtype=single(dtype), repeats=repeats)
        section("prefill", families.measure, asked, threads, device, json, csv)
        return
    if host:
        raise typer.BadParameter("--host counts by family: give --family too")
    if model in REAL:
        shape = real(model, toy)
    elif model is None:
        text = dict(hidden_size=hidden, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64)
        shape = cpu_shape(layers, text_layers, numbers(tokens, "--tokens"), width(image_size, hidden), text)
    else:
        raise typer.BadParameter(f"--model {model!r} is unknown: use {', '.join(REAL)}")
    options = dict(
        dtypes=dtypes(dtype), shape=shape, batches=numbers(batch, "--batch"), steps=steps, repeats=repeats,
        baselines=baselines, backend=backend,
    )  # fmt: skip
    section("prefill", measure, options, threads, device, json, csv)


@app.command()
def kv(
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    steps: Annotated[int, typer.Option(min=1, help="Tokens decoded per repeat.")] = 8,
    repeats: Repeats = 9,
    threads: Threads = None,
    device: Device = "cpu",
    backend: Backend = None,
    toy: Annotated[bool, typer.Option(hidden=True)] = False,
    json: Json = None,
    csv: Csv = None,
) -> None:
    """The KV cache: what dropping rows costs, and what a decoding step gains."""
    from .kv import measure

    options = dict(dtype=single(dtype), steps=steps, repeats=repeats, backend=backend, toy=toy)
    section("kv", measure, options, threads, device, json, csv)


@app.command()
def quality(
    ablation: Annotated[
        str | None, typer.Option(help="flowcut or vflowopt: what its parts are worth, instead of all policies.")
    ] = None,
    generation: Annotated[
        bool, typer.Option("--generation", help="Lists of a scene's digits, written by generate, instead of questions.")
    ] = False,
    split: Split = "dev",
    questions: Annotated[int, typer.Option(min=8, help="Questions to answer, or lists to write.")] = 2000,
    per_scene: Annotated[int, typer.Option(min=1, help="Questions about one scene; of lists there is one.")] = 4,
    policies: Annotated[str | None, typer.Option(help="Names separated by commas; all by default.")] = None,
    shares: Annotated[
        str | None,
        typer.Option(
            help="Shares of the visual tokens, separated by commas: 0.33,0.22,0.11,0.06, with --ablation 0.22,0.06."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Which scenes are drawn.")] = 0,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    threads: Threads = None,
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the accuracy and entropy plots.")] = None,
    json: Json = None,
    csv: Csv = None,
) -> None:
    """Accuracy of the trained stand-in with all tokens, and with equal average shares of them under each policy."""
    from . import ablation as parts
    from . import generation as lists
    from .quality import measure

    if ablation is not None and (generation or policies or out):
        raise typer.BadParameter(
            "--ablation has variants of its own, and no plots: leave out --generation, --policies and --out"
        )
    if ablation is not None and ablation not in parts.POLICIES:
        raise typer.BadParameter(f"--ablation {ablation!r} is unknown: use {' or '.join(parts.POLICIES)}")
    chosen = contestants(policies)
    if split not in ("dev", "test"):
        raise typer.BadParameter(f"--split {split!r} is unknown: use dev or test")
    options: dict = dict(split=split, questions=questions, seed=seed, dtype=single(dtype))
    if shares is not None:
        options["shares"] = shares_of("--shares", shares)
    if ablation is not None:
        section("ablation", parts.measure, options | dict(of=ablation, per_scene=per_scene), threads, device, json, csv)
    elif generation:
        section("generation", lists.measure, options | dict(policies=chosen), threads, device, json, csv, out)
    else:
        options |= dict(policies=chosen, per_scene=per_scene)
        section("quality", measure, options, threads, device, json, csv, out)


@app.command()
def conversation(
    questions: Annotated[int, typer.Option(min=8, help="Conversations, each with a second question.")] = 2000,
    seed: Annotated[int, typer.Option(help="Which scenes are drawn.")] = 0,
    threads: Threads = None,
    device: Device = "cpu",
    json: Json = None,
    csv: Csv = None,
) -> None:
    """Accuracy of the trained stand-in on a second question, on the pruned cache of the first, compacted or not."""
    from .conversation import measure

    section("conversation", measure, dict(questions=questions, seed=seed), threads, device, json, csv)


@app.command()
def tune(
    policy: Annotated[str, typer.Option(help="vflowopt, flowcut or hybrid.")] = "vflowopt",
    budget: Annotated[str, typer.Option(help="Average shares of the visual tokens, separated by commas.")] = "0.1,0.25",
    trials: Annotated[int, typer.Option(min=1, help="Trials of each search.")] = 60,
    sampler: Annotated[str, typer.Option(help="gp, tpe, or both separated by a comma.")] = "gp,tpe",
    samples: Annotated[int, typer.Option(min=1, help="Prompts the search sees, without answers.")] = 64,
    questions: Annotated[int, typer.Option(min=8, help="Held-out questions to answer.")] = 2000,
    split: Split = "dev",
    seed: Annotated[int, typer.Option(help="Which scenes are drawn, and of the samplers.")] = 0,
    storage: Annotated[
        str | None, typer.Option(help="URL of an Optuna storage, or a journal file: go on there, or share it.")
    ] = None,
    threads: Threads = None,
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the policies found and the curve.")] = None,
    json: Json = None,
    csv: Csv = None,
) -> None:
    """Search a policy's numbers on unlabelled samples, and score what is found on held-out questions.

    Ctrl-C ends the search that is running, with the best it found.
    """
    if importlib.util.find_spec("optuna") is None:
        raise typer.BadParameter("tune needs Optuna: pip install 'flowcut-kernels\\[tune]'")
    from .tune import POLICIES, SAMPLERS, measure

    if policy not in POLICIES:
        raise typer.BadParameter(f"--policy {policy!r} is unknown: use {', '.join(POLICIES)}")
    chosen = tuple(name for name in SAMPLERS if name in sampler.split(","))
    if set(sampler.split(",")) != set(chosen):
        raise typer.BadParameter(f"--sampler {sampler!r} is unknown: use {' or '.join(SAMPLERS)}")
    if split not in ("dev", "test"):
        raise typer.BadParameter(f"--split {split!r} is unknown: use dev or test")
    shares = shares_of("--budget", budget)
    if max(shares) == 1:
        raise typer.BadParameter(f"--budget {budget!r} keeps all tokens: a search needs shares below 1")
    options = dict(
        policy=policy, budgets=shares, trials=trials, samplers=chosen, samples=samples,
        questions=questions, split=split, seed=seed, storage=storage, folder=out,
    )  # fmt: skip
    section("tune", measure, options, threads, device, json, csv, out)


@app.command()
def look(
    images: Annotated[
        list[Path] | None,
        typer.Argument(metavar="IMAGE", help="Pictures; with the stand-in one of its scenes.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for look.html and the PNGs.")] = Path("flowcut-report"),
    model: Annotated[str, typer.Option(help="mini, or a folder or hub name of a supported model.")] = "mini",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Names, separated by commas: flowcut,random or 'flowcut(interval=3)'. An unknown one lists them.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Visual tokens, on average over the language model's layers.")
    ] = None,
    retain: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="The same as a share of the image's; 0.11 where neither is given."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What a model with a language model is asked.")] = None,
) -> None:
    """What policies keep, layer by layer: a page to explore it in a browser, and PNGs."""
    from . import look as looking
    from .look_page import write_page

    if tokens is not None and retain is not None:
        raise typer.BadParameter("--tokens and --retain are the same budget: give one of them")
    if not images and model != "mini":
        raise typer.BadParameter(f"--model {model} needs pictures: flowcut-bench look IMAGE... --model {model}")
    try:
        chosen = looking.choices(policy or [LOOKED])
    except ValueError as error:
        raise typer.BadParameter(f"--policy {error}") from error
    try:
        pictures = looking.opened(images or [])
    except ValueError as error:
        raise typer.BadParameter(f"IMAGE: {error}") from error
    prepare(None)

    def budget(shown: looking.Shown) -> int:
        return tokens or max(1, round((0.11 if retain is None else retain) * shown.tokens))

    looked = []
    with progress("look") as tick:
        loaded, processor = loaded_model(model, tick)
        layers = looking.decoder_layers(loaded)
        if model == "mini":
            from . import mini_vlm

            scene = mini_vlm.questions("dev", 1)[0]
            prompt, pictures = prompt or scene.prompt, pictures or {"scene": scene.image}
        for number, (name, picture) in enumerate(pictures.items()):
            tick(name, number / len(pictures))
            shown = looking.show(loaded, processor, picture, name, prompt or DESCRIBE if layers else None)
            some = []
            for choice in chosen:
                try:
                    given = choice.policy(budget(shown), layers, shown.tokens)
                    some.append(looking.look(loaded, processor, shown, given, choice.label))
                except (TypeError, ValueError) as error:
                    if policy:
                        raise typer.BadParameter(f"--policy {choice.label}: {error}") from error
                    print(f"without {choice.label}: {error}")  # nobody asked for it
            if not some:
                raise typer.BadParameter(f"{name}: the model takes none of the policies, for the reasons above")
            looked.append((shown, some))
        tick("drawing")
        for shown, some in looked:
            for seen in some:
                name = looking.file_name(Path(shown.name).stem, seen.label, budget(shown))
                looking.draw(shown, seen, out / name)
        page = write_page("the trained stand-in" if model == "mini" else Path(model).name, looked, out / "look.html")
    for shown, some in looked:
        print(f"{shown.name}: {shown.tokens} tokens" + (f", {shown.prompt!r}: {shown.answer!r}" if layers else ""))
        for seen in some:
            cuts = " → ".join(str(cut.kept) for cut in seen.cuts)
            print(f"  {seen.label}: {cuts} kept" + (f", {seen.answer!r}" if layers else ""))
    print(f"wrote {page} and {sum(len(some) for _, some in looked)} PNGs beside it")


@app.command()
def flow(
    image: Annotated[Path, typer.Argument(help="A picture.", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option("--out", help="Folder for the table (JSON) and the picture.")] = Path(
        "flowcut-report"
    ),
    model: Annotated[str, typer.Option(help="mini, or a folder or hub name of a supported model.")] = "mini",
    hub_threshold: Annotated[float, typer.Option(min=0, help="Attention of a hub, times the mean.")] = 3.0,
) -> None:
    """What the class token and all tokens look at, layer by layer: whether FlowCut's premise holds for a model."""
    from . import flow as flows
    from .look import file_name, images_of, opened

    try:
        (given,) = opened([image]).values()
    except ValueError as error:
        raise typer.BadParameter(f"IMAGE: {error}") from error
    prepare(None)
    with progress("flow") as tick:
        loaded, processor = loaded_model(model, tick)
        tick("encoding")
        start = time.perf_counter()
        try:
            section, found, picture = flows.measure(
                loaded, images_of(processor), given, hub_threshold=hub_threshold, command=typed()
            )
        except ValueError as error:
            raise typer.BadParameter(f"--model {model!r}: {error}") from error
        section.seconds = time.perf_counter() - start
        path = flows.draw(picture, found, section, out / file_name(image.stem, "flow"))
    report = Report(machine.facts(), typed(), [section], section.seconds)
    show_report(report, terminal())
    report.save(path.with_suffix(".json"))
    print(f"wrote {path} and {path.with_suffix('.json')}")


@app.command()
def presets() -> None:
    """What every policy's presets keep of LLaVA-1.5's 576 visual tokens in its 32 layers, and the true average."""
    from rich.table import Table

    from .. import policies

    table = Table("preset", "(layers * tokens + ...) / layers = average", box=None, pad_edge=False)
    for name in sorted(set(policies.__all__) - {"Policy"}):
        policy = getattr(policies, name)
        for average in policy.presets:
            table.add_row(f"{name}.preset({average})", policy.preset(average).arithmetic(32, 576))
    terminal().print(table, highlight=False)


@app.command()
def compare(
    context: typer.Context,
    a: Annotated[
        Path | None, typer.Argument(metavar="A.json", help="Figures to compare with.", exists=True, dir_okay=False)
    ] = None,
    b: Annotated[
        Path | None, typer.Argument(metavar="B.json", help="New figures.", exists=True, dir_okay=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Files: also show figures that did not change.")] = False,
    fail_on_regression: Annotated[
        bool,
        typer.Option(
            "--fail-on-regression", help="Files: exit status 1 where B is worse beyond the spread, or failed."
        ),
    ] = False,
    tokens: Annotated[
        str, typer.Option(help="Visual tokens on average over the language model's layers, separated by commas.")
    ] = "192,64",
    policies: Annotated[str | None, typer.Option(help="Names separated by commas; all by default.")] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1",
    steps: Annotated[int, typer.Option(min=1, help="Tokens decoded per repeat.")] = 4,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    repeats: Repeats = 5,
    threads: Threads = None,
    device: Device = "cpu",
    backend: Backend = None,
    toy: Annotated[bool, typer.Option("--toy", help="A model of a toy's size.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the plot.")] = None,
    json: Json = None,
    csv: Csv = None,
) -> None:
    """Speed of all policies at equal budgets in one run; or two result files: what is better or worse in B than in A.

    Without files: encoder, prefill, decoding, memory and what choosing costs, on LLaVA-1.5-7B's shape on a GPU and a
    quarter of its width elsewhere, random weights.
    """
    if (a is None) != (b is None):
        raise typer.BadParameter("give two files, A.json and B.json, or none to measure all policies")
    for option in context.command.params:
        source = context.get_parameter_source(str(option.name))
        if option.name in ("a", "b") or source is None or source.name != "COMMANDLINE":
            continue
        of_files = option.name in ("everything", "fail_on_regression")
        if of_files and a is None:
            raise typer.BadParameter(f"{option.opts[0]} is for two files: give A.json and B.json")
        if not of_files and a is not None:
            raise typer.BadParameter(f"{option.opts[0]} says how to measure: leave the files out")
    if a is not None and b is not None:
        compare_files(a, b, everything, fail_on_regression)
        return
    from . import side_by_side as contest

    chosen = contestants(policies)
    shape, averages = contest.shape_for(device, toy), numbers(tokens, "--tokens")
    if max(averages) >= shape.patches:
        raise typer.BadParameter(f"--tokens {tokens!r} must be below the {shape.patches} tokens of the image")
    options = dict(
        shape=shape, tokens=averages, policies=chosen, batches=numbers(batch, "--batch"), steps=steps,
        dtype=single(dtype), repeats=repeats, backend=backend,
    )  # fmt: skip
    section("compare", contest.measure, options, threads, device, json, csv, out)


def compare_files(a: Path, b: Path, everything: bool, fail_on_regression: bool) -> None:
    """Two result files: what is better or worse in B than in A, beyond the spread."""
    from . import compare as comparing
    from .tables import show

    reports = [loaded_report(path) for path in (a, b)]
    console = terminal()
    for name, report in zip("AB", reports, strict=True):
        console.print(f"{name}: {machine.line(report.machine)}", style="dim", highlight=False)
    for what in comparing.differences(reports[0].machine, reports[1].machine, comparing.MACHINE):
        console.print(f"not the same machine or versions: {what}", style="bold", highlight=False)
    console.print()
    sections = comparing.compare(*reports)
    worse = any(row["verdict"] in comparing.REGRESSIONS for section in sections for row in section.rows)
    for section in sections:
        if not everything:
            section.rows = [row for row in section.rows if row["verdict"] != comparing.WITHIN]
        show(section, console)
    for what in (*comparing.missing(*reports), comparing.CAUTION):
        console.print(what, style="dim", highlight=False)
    if not sections:
        raise typer.BadParameter("the two files have no section in common")
    if worse and fail_on_regression:
        raise typer.Exit(1)


@app.command()
def report(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.json", help="Figures of any command.", exists=True, dir_okay=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for report.html, report.json and the plots.")],
) -> None:
    """Any JSON of flowcut-bench as a page that needs nothing else, and its plots; nothing is measured."""
    from . import plots

    found = loaded_report(file)
    plotted = [path for paths in plots.draw(found, out).values() for path in paths]
    found.save(out / "report.json")
    write_page(found, out / "report.html")
    print(f"wrote {', '.join(str(path) for path in (out / 'report.html', out / 'report.json', *plotted))}")
    if found.failed:
        raise typer.Exit(1)


@app.command()
def gpu(
    out: Annotated[Path, typer.Option("--out", help="Folder for gpu.json, the figures, and gpu.log.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The same steps on the CPU at toy size.")] = False,
    only: Annotated[str | None, typer.Option(help="Steps to run (again), separated by commas.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Seconds in all; steps that no longer fit are named.")] = 540,
) -> None:
    """Everything that needs a GPU, resumable: build, operators, 7 B prefill, encoder, tests, memory, targets.

    Steps run one after another, each as a process of its own. gpu.json is written after every step. The same command
    goes on where the last one ended; a new commit starts again.
    """
    from . import gpu as steps

    known, chosen = steps.names(), only.split(",") if only else []
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise typer.BadParameter(f"--only {unknown[0]!r} is unknown: use {', '.join(known)}")
    prepare(None, "cpu" if dry_run else "cuda")
    with progress("gpu") as tick:
        report = steps.run(out, dry_run, chosen, limit, tick, partial(print, flush=True))
    summary, *sections = report.sections
    # The targets and what failed come last: it may be the end of the output alone that somebody sees.
    show_report(replace(report, sections=[*sections, summary]), terminal())
    if report.failed:
        raise typer.Exit(1)


@app.command()
def compile(
    only: Annotated[str | None, typer.Option(help="Only kernels whose name contains this.")] = None,
    arch: Annotated[str, typer.Option(help="GPU architectures, separated by commas.")] = "80,90,100",
    json: Json = None,
    csv: Csv = None,
) -> None:
    """Triton and CUDA kernels compiled for GPUs this machine need not have: registers, spills, shared memory."""
    if importlib.util.find_spec("triton") is None:
        raise typer.BadParameter("compile needs triton: pip install triton")
    from .compile import known_architectures

    architectures, known = numbers(arch, "--arch"), known_architectures()
    if not {*architectures} <= {*known}:
        raise typer.BadParameter(f"--arch {arch!r} must be of {', '.join(map(str, known))}, which this Triton knows")
    section("compile", compiled, dict(architectures=architectures, only=only), None, "cpu", json, csv)


def compiled(*, architectures: tuple[int, ...], only: str | None, device: str, command: str, tick: Tick) -> Section:
    from .compile import compile_all

    tick("Triton kernels")
    rows = []
    for found in compile_all(architectures, only):
        row = asdict(found)
        del row["faults"]  # part of the failure
        rows.append(row | dict(ok=found.failure is None, refcheck=found.failure or ""))
    failed = [f"{row['kernel']} {row['variant']} sm_{row['arch']} {row['refcheck']}" for row in rows if not row["ok"]]
    notes = [
        "spills (stack and local bytes), too much shared memory, tensor-core products that ptxas had to serialise and "
        "counters of blocks without their barriers fail; nothing runs, so no GPU is needed"
    ]
    return Section("compile", "Kernels compiled", command, rows, dict(architectures=architectures), notes, failed)


def section(
    title: str,
    measure: Callable[..., Section | list[Section]],
    options: dict,
    threads: int | None,
    device: str,
    json: Path | None,
    csv: Path | None,
    out: Path | None = None,
) -> None:
    """Measure, show it, write the files, and exit with 1 when a check failed."""
    prepare(threads, device)
    start = time.perf_counter()
    with progress(title) as tick:
        found = measure(**options, device=device, command=typed(), tick=tick)
    seconds = time.perf_counter() - start
    sections = found if isinstance(found, list) else [found]
    if options.get("only") and not any(each.rows for each in sections):
        raise typer.BadParameter(f"--only {options['only']!r}: no name contains it")
    sections[0].seconds = seconds
    report = Report(machine.facts(device), typed(), sections, seconds)
    show_report(report, terminal())
    if json:
        report.save(json)
    if csv:
        report.save_csv(csv)
    if out:
        from . import plots

        plots.draw(report, out)
    if report.failed:
        raise typer.Exit(1)


def loaded_report(path: Path) -> Report:
    """`report.load`, errors as those of the argument."""
    from .report import load

    try:
        return load(path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise typer.BadParameter(f"{path.name} is no file of flowcut-bench: {error}") from error


def loaded_model(name: str, tick: Tick) -> tuple:
    """`look.load_model`, errors as those of the option."""
    from .look import load_model

    tick("loading the model")
    try:
        return load_model(name)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--model {name!r}: {error}") from error


def width(image_size: int, hidden: int) -> dict:
    if hidden % 64 or image_size % 14:
        raise typer.BadParameter("--hidden must be a multiple of 64 and --image-size of 14")
    return dict(
        image_size=image_size, hidden_size=hidden, intermediate_size=4 * hidden, num_attention_heads=hidden // 64
    )


def numbers(text: str, name: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise typer.BadParameter(f"{name} {text!r} must be whole numbers of at least 1, separated by commas")
    return found


def shares_of(option: str, text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < share <= 1 for share in found):
        raise typer.BadParameter(f"{option} {text!r} must be shares in (0, 1], separated by commas")
    return found


def contestants(policies: str | None) -> tuple[str, ...]:
    """What --policies names; all without it."""
    from .contenders import NAMES, named

    try:
        return named(policies) if policies else NAMES
    except ValueError as error:
        raise typer.BadParameter(f"--policies {error}") from error


def dtypes(text: str) -> tuple[torch.dtype, ...]:
    unknown = [part for part in text.split(",") if part not in DTYPES]
    if unknown:
        raise typer.BadParameter(f"--dtype {unknown[0]!r} is unknown: use {', '.join(DTYPES)}")
    return tuple(DTYPES[part] for part in text.split(","))


def single(text: str) -> torch.dtype:
    """The one --dtype of a command that measures one."""
    found = dtypes(text)
    if len(found) > 1:
        raise typer.BadParameter(f"--dtype {text!r}: one at a time here")
    return found[0]


def prepare(threads: int | None, device: str = "cpu") -> None:
    from transformers.utils import logging

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"--device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    logging.disable_progress_bar()  # there is a bar of our own
    if threads:
        torch.set_num_threads(threads)
