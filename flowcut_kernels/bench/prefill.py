"""From the image to the first token and on: encoder, projector, language model, KV cache, all tokens against pruned."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from unittest import mock

import torch
from torch import Tensor

from ..models import patched
from ..policies import FlowCut
from .report import Section
from .shapes import PAPER, clip_large, llava, patches_of, random_pixels, small_llama, twin
from .timing import Clock, Samples, interleave, synchronise

Tick = Callable[..., object]
TEXT = 32  # prompt words after the image


def measure(
    *,
    device: torch.device | str = "cpu",
    dtypes=(torch.bfloat16,),
    tokens=(192, 64),
    layers: int = 24,
    text_layers: int = 8,
    steps: int = 4,
    repeats: int = 3,
    backend: str | None = None,
    vision_shape: dict | None = None,
    text_shape: dict | None = None,
    command: str = "flowcut-bench prefill",
    tick: Tick = lambda label, share=None: None,
) -> Section:
    """A LLaVA of CLIP-L-shaped tower and small Llama, one image and 32 words.

    Args:
        steps: decoded tokens per repeat.
        vision_shape, text_shape: changes to the configurations, for tests.
    """
    device = torch.device(device)
    small = (clip_large(4, **(vision_shape or {})), small_llama(2, **(text_shape or {})))
    patches = patches_of(small[0])
    rows, failed = [], []
    for dtype in dtypes:
        tick(f"check {_short(dtype)}")
        checked = refcheck(*small, dtype, device, backend, max(1, patches // 9))
        failed += [] if checked == "ok" else [f"{_short(dtype)}: {checked}"]
    vision, text = clip_large(layers, **(vision_shape or {})), small_llama(text_layers, **(text_shape or {}))
    if failed:
        rows = [dict(dtype=_short(d), stock_tokens=patches, tokens=t, ok=False, refcheck=f"FAILED: {failed[0]}")
                for d in dtypes for t in tokens]  # fmt: skip
    else:
        stock = llava(vision, text, PAPER).to(device)
        for dtype in dtypes:
            stock = stock.to(dtype)
            pruned = twin(stock)
            for budget in tokens:
                tick(f"{_short(dtype)} {patches}→{budget}", len(rows) / (len(dtypes) * len(tokens)))
                rows.append(_row(stock, pruned, budget, steps, repeats, backend))
    millions = sum(p.numel() for p in stock.model.language_model.parameters()) / 1e6 if not failed else 0
    return Section(
        "prefill",
        f"Image to tokens: CLIP-L-shaped tower ({layers} layers), Llama ({text_layers} layers of {text.hidden_size})",
        command,
        rows,
        facts=dict(layers=layers, text_layers=text_layers, text_parameters_millions=millions, prompt_words=TEXT,
                   decode_steps=steps, repeats=repeats),
        notes=[
            f"one image and {TEXT} words; language model of {millions:.0f} M parameters, random weights; all → pruned",
            "1st token: encoder, projector and prefill; a token: decoding on the cache that prefill left",
            "a 7 B language model spends a far larger share on prefill than this small one, and saves more",
        ],
        failed=failed,
    )  # fmt: skip


def prompt(model) -> Tensor:
    """An image and TEXT words, as the processor writes them."""
    ids = torch.randint(1, model.config.image_token_id - 1, (1, TEXT), generator=torch.Generator().manual_seed(5))
    image = torch.full((1, model.config.image_seq_length), model.config.image_token_id)
    return torch.cat([image, ids], 1).to(model.device)


@torch.inference_mode()
def refcheck(vision, text, dtype, device, backend, keep: int) -> str:
    """ "ok", or what differs on a shallow model: all kept is stock; pruned is the decoder on kept features."""
    model = llava(vision, text, PAPER).to(device, dtype)
    ids, pixels = prompt(model), random_pixels(vision, 1).to(device, dtype)
    plain = model(input_ids=ids, pixel_values=pixels, logits_to_keep=1).logits
    with patched(model, FlowCut(target_tokens=model.config.image_seq_length), backend=backend):
        if not torch.equal(model(input_ids=ids, pixel_values=pixels, logits_to_keep=1).logits, plain):
            return "keeping all tokens differs from the stock model"
    with patched(model, FlowCut(target_tokens=keep), backend=backend):
        output = model(input_ids=ids, pixel_values=pixels, logits_to_keep=1)
        visual = torch.stack(list(model.get_image_features(pixels).pooler_output))
    if output.past_key_values.get_seq_length() != keep + TEXT:
        return f"the cache holds {output.past_key_values.get_seq_length()} tokens, not {keep + TEXT}"
    embeds = torch.cat([visual, model.get_input_embeddings()(ids[:, -TEXT:])], 1)
    hidden = model.model.language_model(inputs_embeds=embeds).last_hidden_state[:, -1:]
    error = ((model.lm_head(hidden) - output.logits).abs().max() / output.logits.abs().max()).item()
    allowed = max(100 * torch.finfo(torch.float32).eps, 4 * torch.finfo(dtype).eps)
    return "ok" if error <= allowed else f"pruned logits differ by {error:.1e}"


def _row(stock, pruned, budget: int, steps: int, repeats: int, backend: str | None) -> dict:
    device, patches = stock.device, stock.config.image_seq_length
    ids, pixels = prompt(stock), random_pixels(stock.config.vision_config, 1).to(device, stock.dtype)
    token = ids[:, -1:]
    runs: dict[str, Callable[[], object]] = {}
    encoder: dict[str, Samples] = {"stock": Samples(), "ours": Samples()}
    sizes = {}
    with patched(pruned, FlowCut(target_tokens=budget), backend=backend), ExitStack() as stack:
        for name, model in (("stock", stock), ("ours", pruned)):

            def first(model=model):
                return model(input_ids=ids, pixel_values=pixels, use_cache=True, logits_to_keep=1)

            with torch.inference_mode():
                cache = first().past_key_values
            sizes[name] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            prefilled = [(layer.keys, layer.values) for layer in cache.layers]

            def decode(model=model, cache=cache, prefilled=prefilled):
                for layer, (keys, values) in zip(cache.layers, prefilled, strict=True):
                    layer.keys, layer.values = keys, values
                for _ in range(steps):
                    model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)

            runs[f"{name} first"], runs[f"{name} decode"] = first, decode
            timed = _timed(model.model.get_image_features, encoder[name], device)
            stack.enter_context(mock.patch.object(model.model, "get_image_features", timed))
        times = interleave(runs, repeats=repeats, clock=Clock(device), warmup=1)
    row = dict(dtype=_short(stock.dtype), stock_tokens=patches, tokens=budget, ok=True, refcheck="ok",
               stock_kv_bytes=sizes["stock"], kv_bytes=sizes["ours"])  # fmt: skip
    for name, prefix in (("stock", "stock_"), ("ours", "")):
        seconds = {"encoder": Samples(encoder[name].values[1:]).median, "first": times[f"{name} first"].median}
        seconds["llm"] = max(seconds["first"] - seconds["encoder"], 0.0)
        seconds["decode"] = times[f"{name} decode"].median / steps
        row |= {f"{prefix}{part}_seconds": value for part, value in seconds.items()}
        row[f"{prefix}first_spread"] = times[f"{name} first"].spread
    speedup = times["stock first"].per(times["ours first"])
    return row | dict(speedup=speedup.median, speedup_low=speedup.quartiles[0], speedup_high=speedup.quartiles[1])


def _timed(function: Callable, seconds: Samples, device: torch.device) -> Callable:
    """`function`, whose calls leave their seconds in `seconds`; the first is a warm-up."""

    def call(*args, **kwargs):
        synchronise(device)
        start = time.perf_counter()
        output = function(*args, **kwargs)
        synchronise(device)
        seconds.values.append(time.perf_counter() - start)
        return output

    return call


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
