"""From the image to the first token and on: encoder, projector, language model, KV cache, all tokens against pruned."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..models import patch, patched, trace
from ..policies import FlowCut
from . import plain
from .free import FreeSelection
from .kv import bytes_of
from .report import Section
from .shapes import PAPER, Shape, clip_large, patches_of, random_pixels, small_llama, twin
from .timing import Clock, Run, interleave, peak_memory

Tick = Callable[..., object]
PARTS = ("encoder", "first", "decode")  # what is timed of a model; first: up to the first token
TEXT = 32  # prompt words after the image
BASELINE_NOTE = (
    "torch FlowCut: vectorised torch that prunes after the layer; limit: the same schedule with rows chosen for free, "
    "so that only scoring is missing"
)


def cpu_shape(
    layers: int = 24, text_layers: int = 8, tokens: Sequence[int] = (192, 64), vision: dict | None = None,
    text: dict | None = None,
) -> Shape:  # fmt: skip
    """A CLIP-L-shaped tower before a Llama that fits a CPU; `vision` and `text` change their configurations."""
    name = f"CLIP-L-shaped tower ({layers} layers), small Llama ({text_layers} layers)"
    return Shape(
        name, clip_large(layers, **(vision or {})), small_llama(text_layers, **(text or {})), 1, tuple(tokens), PAPER
    )


def measure(
    *,
    device: torch.device | str = "cpu",
    shape: Shape | None = None,
    dtypes=(torch.bfloat16,),
    batches=(1,),
    steps: int = 4,
    repeats: int = 3,
    baselines: bool = False,
    backend: str | None = None,
    command: str = "flowcut-bench prefill",
    tick: Tick = lambda label, share=None: None,
) -> Section:
    """A LLaVA of that shape, a picture (all its views) and 32 words per prompt.

    Args:
        steps: decoded tokens per repeat.
        baselines: also time the stock model on eager attention, FlowCut in plain torch, and free selection.
    """
    device, shape = torch.device(device), shape or cpu_shape()
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for dtype in dict.fromkeys((*dtypes, *[torch.float32] * baselines)):
        tick(f"check {_short(dtype)}")
        checked = refcheck(shape, dtype, device, backend)
        failed += [] if checked == "ok" else [f"{_short(dtype)}: {checked}"]

    def bad(dtype: torch.dtype, batch: int, tokens: int, why: str) -> dict[str, Any]:
        return dict(model=shape.name, stock_tokens=shape.patches, dtype=_short(dtype), batch=batch, tokens=tokens,
                    ok=False, refcheck=f"FAILED: {why}")  # fmt: skip

    if failed:
        rows = [bad(d, b, t, failed[0]) for d in dtypes for b in batches for t in shape.tokens]
    millions = 0.0
    for dtype in dtypes if not failed else ():
        tick(f"making the model, {_short(dtype)}")
        stock = shape.build(device, dtype)
        millions = sum(p.numel() for p in stock.model.language_model.parameters()) / 1e6
        for batch in batches:
            tick(f"{_short(dtype)} B={batch} warm-up")
            try:
                rows += _rows(stock, shape, batch, steps, repeats, baselines, backend, tick)
            except Exception as error:  # too little memory for one size, say, must not cost the others
                failed.append(f"B={batch}: {error}")
                rows += [bad(dtype, batch, budget, type(error).__name__) for budget in shape.tokens]
        del stock
    unfit = sorted({row["batch"] for row in rows if baselines and row["ok"] and row["eager_ratio"] is None})
    cuts = " ".join(str(kept) for row in rows[-1:] for kept in row.get("schedule", "-"))
    return Section(
        "prefill",
        f"Image to first token: {shape.name}",
        command,
        rows,
        facts=dict(model=shape.name, views=shape.views, text_parameters_millions=millions, prompt_words=TEXT,
                   decode_steps=steps, repeats=repeats),
        notes=[
            f"{shape.views} view(s) of an image and {TEXT} words per prompt; language model of {millions:,.0f} M "
            "parameters, random weights; all → pruned",
            *(["tokens: of all views, and the newlines between their rows, which go with the first cut"]
              * (shape.views > 1)),
            "tower weights scaled so that the entropy of the anchor's attention falls with depth (shapes.py); kept "
            f"after each cut, first view: {cuts}",
            "1st token: encoder, projector and prefill; a token: decoding on the cache that prefill left",
            *([BASELINE_NOTE] * baselines),
            *(f"stock on eager attention, B={batch}: out of memory" for batch in unfit),
        ],
        failed=failed,
    )  # fmt: skip


@torch.inference_mode()
def prompts(model: Any, shape: Shape, batch: int = 1) -> dict[str, Tensor]:
    """A picture and TEXT words each, as the processor writes them."""
    pixels = random_pixels(shape.vision, batch * shape.views).to(model.device, model.dtype)
    shown = dict(pixel_values=pixels)
    if shape.views > 1:
        size = torch.full((batch, 2), 2 * shape.vision.image_size, device=model.device)
        shown = dict(pixel_values=pixels.unflatten(0, (batch, shape.views)), image_sizes=size)
    one = {name: value[:1] for name, value in shown.items()}
    tokens = len(model.get_image_features(**one).pooler_output[0])
    ids = torch.randint(1, model.config.image_token_id - 1, (1, TEXT), generator=torch.Generator().manual_seed(5))
    image = torch.full((1, tokens), model.config.image_token_id)
    return dict(input_ids=torch.cat([image, ids], 1).repeat(batch, 1).to(model.device)) | shown


def plain_first(model: Any, shape: Shape, policy: FlowCut, inputs: dict[str, Tensor]) -> Tensor:
    """Logits [B, 1, V] behind the prompts with FlowCut in vectorised torch; the policy's budget counts for a view."""
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    tokens, where = plain.encoder(model, pixels.flatten(0, -4), policy, "sdpa")
    visual = tokens.unflatten(0, (-1, shape.views)).flatten(1, 2)
    if shape.views > 1:  # rows of the picture run through two tiles; the overview comes first
        side = math.isqrt(patches_of(shape.vision))
        corners = torch.tensor([-side * side, *(2 * side * side * i + side * j for i in (0, 1) for j in (0, 1))])
        widths = torch.tensor([side] + 4 * [2 * side])[:, None].to(where.device)
        where = where.unflatten(0, (-1, shape.views))
        place = corners[:, None].to(where.device) + where // side * widths + where % side
        (visual,) = plain.gather([visual], place.flatten(1).argsort(1))
    embeds = torch.cat([visual, model.get_input_embeddings()(ids[:, -TEXT:])], 1)
    hidden = model.model.language_model(inputs_embeds=embeds, use_cache=True).last_hidden_state
    return model.lm_head(hidden[:, -1:])


def shallow(shape: Shape) -> Shape:
    """The same with four layers in the tower and two in the language model."""
    vision, text = type(shape.vision)(**shape.vision.to_dict()), type(shape.text)(**shape.text.to_dict())
    vision.num_hidden_layers, text.num_hidden_layers = 4, 2
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:2]
    return replace(shape, vision=vision, text=text)


@torch.inference_mode()
def refcheck(shape: Shape, dtype: torch.dtype, device: torch.device, backend: str | None) -> str:
    """ "ok", or what differs on a shallow model: all kept is stock; pruned is the decoder on kept features.

    In float32, where no near-tie is decided by rounding, FlowCut in plain torch gives the same logits, too.
    """
    model, views = shallow(shape).build(device, dtype), shape.views
    keep = max(1, patches_of(shape.vision) // 9)
    inputs = prompts(model, shape)
    plain_logits = model(**inputs, logits_to_keep=1).logits
    with patched(model, FlowCut(retain_ratio=1.0), backend=backend):
        if not torch.equal(model(**inputs, logits_to_keep=1).logits, plain_logits):
            return "keeping all tokens differs from the stock model"
    # Without the entropy rule a shallow tower cuts at every second layer too.
    policy = FlowCut(target_tokens=views * keep, interval=1, batch="max")
    with patched(model, policy, backend=backend):
        output = model(**inputs, logits_to_keep=1)
        visual = torch.cat(list(model.get_image_features(**_shown(inputs)).pooler_output))[None]
    wanted = views * keep + TEXT
    if output.past_key_values.get_seq_length() != wanted:
        return f"the cache holds {output.past_key_values.get_seq_length()} tokens, not {wanted}"
    embeds = torch.cat([visual, model.get_input_embeddings()(inputs["input_ids"][:, -TEXT:])], 1)
    hidden = model.model.language_model(inputs_embeds=embeds).last_hidden_state[:, -1:]
    allowed = max(100 * torch.finfo(torch.float32).eps, 4 * torch.finfo(dtype).eps)

    def error(logits: Tensor) -> float:
        return ((logits - output.logits).abs().max() / output.logits.abs().max()).item()

    if not error(model.lm_head(hidden)) <= allowed:
        return f"pruned logits differ by {error(model.lm_head(hidden)):.1e}"
    if dtype == torch.float32:
        by_view = replace(policy, target_tokens=keep)
        if not error(plain_first(model, shape, by_view, inputs)) <= 1e-3:  # another token is off by far more
            return "FlowCut in plain torch gives other logits"
    return "ok"


def runs_of(model: Any, inputs: dict[str, Tensor], steps: int) -> tuple[dict[str, Run], dict[str, int | None]]:
    """What is timed of a model, by part, decoding `steps` tokens; and the bytes of its cache and of its peak."""
    first = partial(model, **inputs, use_cache=True, logits_to_keep=1)
    with torch.inference_mode():
        output, peak = peak_memory(first, model.device)
    cache, token = output.past_key_values, inputs["input_ids"][:, -1:]
    prefilled = [(layer.keys, layer.values) for layer in cache.layers]

    def decode() -> None:
        for layer, (keys, values) in zip(cache.layers, prefilled, strict=True):
            layer.keys, layer.values = keys, values
        for _ in range(steps):
            model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)

    encoder = partial(model.get_image_features, **_shown(inputs))
    return dict(encoder=encoder, first=first, decode=decode), dict(kv_bytes=bytes_of(cache), peak_bytes=peak)


def _shown(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a prompt, what the encoder gets."""
    return {name: value for name, value in inputs.items() if name != "input_ids"}


def _rows(
    stock: Any, shape: Shape, batch: int, steps: int, repeats: int, baselines: bool, backend: str | None, tick: Tick
) -> list[dict[str, Any]]:
    """A row per budget; their rounds share one measurement of the stock model."""
    device, dtype, inputs = stock.device, _short(stock.dtype), prompts(stock, shape, batch)
    runs: dict[str, Run] = {}

    def enter(name: str, model: Any, parts: Sequence[str] = PARTS) -> dict[str, int | None]:
        made, held = runs_of(model, inputs, steps)
        runs.update({f"{name} {part}": made[part] for part in parts})
        return held

    common = dict(model=shape.name, dtype=dtype, batch=batch, stock_tokens=inputs["input_ids"].shape[1] - TEXT,
                  ok=True, refcheck="ok")  # fmt: skip
    common |= {f"stock_{key}": value for key, value in enter("stock", stock).items()}
    if baselines:
        eager = twin(stock)
        eager.set_attn_implementation("eager")
        with suppress(torch.OutOfMemoryError):  # its N x N maps may not fit where all else does
            enter("eager", eager, ["first"])
    rows = []
    for budget in shape.tokens:
        policy, pruned = FlowCut(target_tokens=budget), twin(stock)
        with torch.inference_mode(), patched(pruned, policy, record=True, backend=backend):
            pruned.get_image_features(**_shown(inputs))
            stages = trace(pruned).stages
        schedule = [stage.kept[0] for stage in stages if stage.name == "encoder"]
        held = enter(str(budget), patch(pruned, policy, backend=backend))
        rows.append(common | held | dict(tokens=budget, schedule=schedule))
        if baselines:
            free = FreeSelection.like(policy, stages, device)
            enter(f"limit {budget}", patch(twin(stock), free, backend=backend), ["first"])
            by_view = FlowCut(target_tokens=budget // shape.views, batch="max")
            runs[f"plain {budget} first"] = partial(plain_first, stock, shape, by_view, inputs)
    done = itertools.count(1)
    times = interleave(
        runs, repeats=repeats, clock=Clock(device), warmup=1,
        tick=lambda: tick(f"{dtype} B={batch} round {next(done)} of {repeats}"),
    )  # fmt: skip
    for row in rows:
        ours = str(row["tokens"])
        for name, prefix in (("stock", "stock_"), (ours, "")):
            seconds = {part: times[f"{name} {part}"].median for part in ("encoder", "first")}
            seconds["llm"] = max(seconds["first"] - seconds["encoder"], 0.0)
            seconds["decode"] = times[f"{name} decode"].median / steps
            row |= {f"{prefix}{part}_seconds": value for part, value in seconds.items()}
            row[f"{prefix}first_spread"] = times[f"{name} first"].spread
        speedup = times["stock first"].per(times[f"{ours} first"])
        row |= dict(speedup=speedup.median, speedup_low=speedup.quartiles[0], speedup_high=speedup.quartiles[1])
        if baselines:
            eager_time = times.get("eager first")
            row["eager_ratio"] = None if eager_time is None else eager_time.per(times["stock first"]).median
            row["torch_ratio"] = times[f"plain {ours} first"].per(times["stock first"]).median
            row["of_limit"] = times[f"limit {ours} first"].per(times[f"{ours} first"]).median
    return rows


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
