"""From the image to the first token and on: encoder, projector, language model, KV cache, all tokens against pruned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..models import patched, trace
from ..policies import FlowCut
from ..policies.base import Policy
from .free import FreeSelection
from .report import Section
from .shapes import PAPER, Shape, clip_large, llava, patches_of, random_pixels, small_llama, twin
from .timing import Clock, interleave, peak_memory

Tick = Callable[..., object]
TEXT = 32  # prompt words after the image


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
        baselines: also time the stock model on eager attention, and pruning with free selection.
    """
    device, shape = torch.device(device), shape or cpu_shape()
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for dtype in dtypes:
        tick(f"check {_short(dtype)}")
        checked = refcheck(shape, dtype, device, backend)
        failed += [] if checked == "ok" else [f"{_short(dtype)}: {checked}"]
    if failed:
        bad = dict(model=shape.name, stock_tokens=shape.patches, ok=False, refcheck=f"FAILED: {failed[0]}")
        rows = [bad | dict(dtype=_short(d), batch=b, tokens=t) for d in dtypes for b in batches for t in shape.tokens]
    millions = 0.0
    for dtype in dtypes if not failed else ():
        stock = llava(shape.vision, shape.text, shape.gains, device=device, dtype=dtype)
        millions = sum(p.numel() for p in stock.model.language_model.parameters()) / 1e6
        pruned = twin(stock)
        for batch in batches:
            for budget in shape.tokens:
                tick(
                    f"{_short(dtype)} B={batch} {shape.patches}→{budget}", len(rows) / len(batches) / len(shape.tokens)
                )
                rows.append(_row(stock, pruned, shape, batch, budget, steps, repeats, baselines, backend))
        del stock, pruned
    cuts = " ".join(map(str, rows[-1]["schedule"])) if not failed else "-"
    return Section(
        "prefill",
        f"Image to tokens: {shape.name}",
        command,
        rows,
        facts=dict(model=shape.name, views=shape.views, text_parameters_millions=millions, prompt_words=TEXT,
                   decode_steps=steps, repeats=repeats),
        notes=[
            f"{shape.views} view(s) of an image and {TEXT} words per prompt; language model of {millions:,.0f} M "
            "parameters, random weights; all → pruned",
            *(["views go in as images of LLaVA-1.5's class: no newline tokens, no unpadding"] * (shape.views > 1)),
            "tower weights scaled so that the entropy of the anchor's attention falls with depth (shapes.py); kept "
            f"after each cut, first view: {cuts}",
            "1st token: encoder, projector and prefill; a token: decoding on the cache that prefill left",
            *(["limit: the same schedule with rows chosen for free, so that only scoring is missing"] * baselines),
        ],
        failed=failed,
    )  # fmt: skip


def prompt(model, batch: int = 1, views: int = 1) -> Tensor:
    """Images and TEXT words, as the processor writes them."""
    ids = torch.randint(1, model.config.image_token_id - 1, (1, TEXT), generator=torch.Generator().manual_seed(5))
    image = torch.full((1, views * model.config.image_seq_length), model.config.image_token_id)
    return torch.cat([image, ids], 1).repeat(batch, 1).to(model.device)


@torch.inference_mode()
def refcheck(shape: Shape, dtype: torch.dtype, device: torch.device, backend: str | None) -> str:
    """ "ok", or what differs on a shallow model: all kept is stock; pruned is the decoder on kept features."""
    vision, text = type(shape.vision)(**shape.vision.to_dict()), type(shape.text)(**shape.text.to_dict())
    vision.num_hidden_layers, text.num_hidden_layers = 4, 2
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:2]
    model = llava(vision, text, shape.gains, device=device, dtype=dtype)
    keep = max(1, patches_of(vision) // 9)
    ids, pixels = prompt(model, 1, shape.views), random_pixels(vision, shape.views).to(device, dtype)
    plain = model(input_ids=ids, pixel_values=pixels, logits_to_keep=1).logits
    with patched(model, FlowCut(target_tokens=model.config.image_seq_length), backend=backend):
        if not torch.equal(model(input_ids=ids, pixel_values=pixels, logits_to_keep=1).logits, plain):
            return "keeping all tokens differs from the stock model"
    with patched(model, FlowCut(target_tokens=keep), backend=backend):
        output = model(input_ids=ids, pixel_values=pixels, logits_to_keep=1)
        visual = torch.cat(list(model.get_image_features(pixels).pooler_output))[None]
    wanted = shape.views * keep + TEXT
    if output.past_key_values.get_seq_length() != wanted:
        return f"the cache holds {output.past_key_values.get_seq_length()} tokens, not {wanted}"
    embeds = torch.cat([visual, model.get_input_embeddings()(ids[:, -TEXT:])], 1)
    hidden = model.model.language_model(inputs_embeds=embeds).last_hidden_state[:, -1:]
    error = ((model.lm_head(hidden) - output.logits).abs().max() / output.logits.abs().max()).item()
    allowed = max(100 * torch.finfo(torch.float32).eps, 4 * torch.finfo(dtype).eps)
    return "ok" if error <= allowed else f"pruned logits differ by {error:.1e}"


def _row(
    stock, pruned, shape: Shape, batch: int, budget: int, steps: int, repeats: int, baselines: bool, backend: str | None
) -> dict:
    device = stock.device
    ids = prompt(stock, batch, shape.views)
    pixels = random_pixels(shape.vision, batch * shape.views).to(device, stock.dtype)
    token = ids[:, -1:]
    policy = FlowCut(target_tokens=budget // shape.views)
    with torch.inference_mode(), patched(pruned, policy, record=True, backend=backend):
        pruned.get_image_features(pixels)
        stages = trace(pruned).stages
    models: dict[str, tuple[Any, Policy | None]] = {"stock": (stock, None), "ours": (pruned, policy)}
    if baselines:
        eager, free = twin(stock), twin(stock)
        eager.set_attn_implementation("eager")
        models |= {"eager": (eager, None), "limit": (free, FreeSelection.like(policy, stages, device))}
    runs: dict[str, Callable[[], object]] = {}
    sizes, peaks = {}, {}
    with ExitStack() as stack:
        for name, (model, chosen) in models.items():
            if chosen is not None:
                stack.enter_context(patched(model, chosen, backend=backend))

            def first(model=model):
                return model(input_ids=ids, pixel_values=pixels, use_cache=True, logits_to_keep=1)

            with torch.inference_mode():
                cache, peaks[name] = peak_memory(first, device)
                cache = cache.past_key_values
            sizes[name] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            prefilled = [(layer.keys, layer.values) for layer in cache.layers]

            def decode(model=model, cache=cache, prefilled=prefilled):
                for layer, (keys, values) in zip(cache.layers, prefilled, strict=True):
                    layer.keys, layer.values = keys, values
                for _ in range(steps):
                    model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)

            runs[f"{name} first"] = first
            if name in ("stock", "ours"):
                runs[f"{name} encoder"] = partial(model.get_image_features, pixels)
                runs[f"{name} decode"] = decode
        times = interleave(runs, repeats=repeats, clock=Clock(device), warmup=1)
    row = dict(model=shape.name, dtype=_short(stock.dtype), batch=batch, stock_tokens=shape.patches, tokens=budget,
               ok=True, refcheck="ok", stock_kv_bytes=sizes["stock"], kv_bytes=sizes["ours"],
               stock_peak_bytes=peaks["stock"], peak_bytes=peaks["ours"],
               schedule=[stage.kept[0] for stage in stages])  # fmt: skip
    for name, prefix in (("stock", "stock_"), ("ours", "")):
        seconds = {part: times[f"{name} {part}"].median for part in ("encoder", "first")}
        seconds["llm"] = max(seconds["first"] - seconds["encoder"], 0.0)
        seconds["decode"] = times[f"{name} decode"].median / steps
        row |= {f"{prefix}{part}_seconds": value for part, value in seconds.items()}
        row[f"{prefix}first_spread"] = times[f"{name} first"].spread
    speedup = times["stock first"].per(times["ours first"])
    row |= dict(speedup=speedup.median, speedup_low=speedup.quartiles[0], speedup_high=speedup.quartiles[1])
    if baselines:
        row["eager_ratio"] = times["eager first"].per(times["stock first"]).median
        row["of_limit"] = times["limit first"].per(times["ours first"]).median
    return row


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
