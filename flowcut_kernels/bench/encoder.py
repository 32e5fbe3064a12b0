"""A CLIP-L-shaped tower, stock on SDPA against FlowCut: time, FLOPs, and where the rest of the time goes."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ..calibrate import calibrate
from ..cost import Schedule, encoder_flops
from ..models import patch, patched, trace
from ..modules import _rows as blocks
from ..policies import FlowCut
from ..policies import flowcut as scoring
from ..policies.base import Policy
from ..trace import Trace
from . import plain
from .entropy import cls_entropy
from .free import FreeSelection
from .report import Section
from .shapes import WEIGHTS, clip_large, llava, patches_of, random_pixels, twin
from .timing import Clock, Samples, captured, interleave, peak_memory, synchronise

Tick = Callable[..., object]
TARGET = {"cpu": 1.10, "cuda": 1.15}
# Opponents in the same run; those on eager attention form the N x N maps, as released code does.
BASELINES = ("stock_eager", "torch_sdpa", "torch_eager", "limit")
BASELINE_NOTE = (
    "torch FlowCut: vectorised torch that prunes after the layer; its eager form takes the class token's attention "
    "from the layer's N x N map, as released code does; limit: the same schedule with rows chosen for free"
)
FROZEN = ("frozen", "frozen_graph", "stock_graph")
FROZEN_NOTE = "frozen: a schedule calibrated on the same images"
SCORING = {"anchor_stats_select": scoring, "gather_tokens": blocks}

KERNELS = {"_anchor_stats": "anchor_stats_select", "_gather_tokens": "gather_tokens"}  # as the profiler names them


def measure(
    *,
    device: torch.device | str = "cpu",
    dtypes=(torch.float32, torch.bfloat16),
    batches=(1, 4),
    tokens=(192, 128, 64),
    weights: str = "paper-like",
    layers: int = 24,
    repeats: int = 5,
    backend: str | None = None,
    baselines: bool = True,
    frozen: bool = False,
    shape: dict | None = None,
    command: str = "flowcut-bench encoder",
    tick: Tick = lambda label, share=None: None,
) -> Section:
    """Stock tower against patched tower through ``get_image_features`` of a LLaVA that reads layer -2.

    Args:
        baselines: also time the stock tower on eager attention, FlowCut in plain torch on SDPA and on eager, and free
            selection, the limit.
        frozen: also time the calibrated policy, and it and the stock tower as CUDA graphs.
        shape: changes to the CLIP-L configuration, for tests.
    """
    device, gains = torch.device(device), WEIGHTS[weights]
    config: Any = clip_large(layers, **(shape or {}))
    patches = patches_of(config)
    failed, checks = [], {}
    # A check in fp64 would take as long as the measurement: four layers of the same tower see a smaller image.
    small = dict(image_size=min(config.image_size, 16 * config.patch_size))
    shallow = clip_large(4, **((shape or {}) | small))
    for dtype in dtypes:
        tick(f"check {_short(dtype)}")
        checks[dtype] = refcheck(shallow, gains, dtype, device, backend, keep=max(2, patches_of(shallow) // 9))
        if checks[dtype] != "ok":
            failed.append(f"{_short(dtype)}: {checks[dtype]}")

    stock = llava(config, gains=gains).to(device)
    rows, entropy = [], cls_entropy(stock, random_pixels(config, 1).to(device))
    for dtype in dtypes:
        if checks[dtype] != "ok":
            rows += [dict(dtype=_short(dtype), batch=b, tokens=t, ok=False, refcheck=f"FAILED: {checks[dtype]}")
                     for b in batches for t in tokens]  # fmt: skip
            continue
        stock = stock.to(dtype)
        for batch in batches:
            tick(f"{_short(dtype)} B={batch}", len(rows) / (len(dtypes) * len(batches) * len(tokens)))
            pixels = random_pixels(config, batch).to(device, dtype)
            try:
                rows += _rows(stock, pixels, tokens, backend, repeats, baselines, frozen)
            except Exception as error:  # too little memory for one batch, say, must not cost the others
                failed.append(f"{_short(dtype)} B={batch}: {error}")
                rows += [dict(dtype=_short(dtype), batch=batch, tokens=t, ok=False,
                              refcheck=f"FAILED: {type(error).__name__}") for t in tokens]  # fmt: skip
    schedule = [kept[0] for kept in rows[-1]["schedule"]] if not failed else []
    return Section(
        "encoder",
        f"Vision encoder, CLIP-L/14-336 shape, {layers} layers, {weights} weights",
        command,
        rows,
        facts=dict(
            weights=weights, layers=layers, repeats=repeats, patches=patches, entropy=entropy, schedule=schedule
        ),
        notes=[
            "get_image_features of a LLaVA reading layer -2; stock on SDPA; interleaved; scoring included",
            "FLOPs: matrix products at the traced token counts; time/FLOPs = 1.00: choosing is free",
            f"CLS entropy / ln N by layer: {' '.join(f'{x:.2f}'.removeprefix('0') for x in entropy)}",
            f"kept after each cut, {patches}→{tokens[-1]}, first image: {' '.join(str(k) for k in schedule)}",
            "scoring: share of time in anchor_stats_select and gather_tokens (a separate pass; on CUDA their kernels)",
            f"target: time at most {TARGET.get(device.type, math.inf):.2f}x of stock time x FLOPs ratio",
            *([BASELINE_NOTE] if baselines else []),
            *([FROZEN_NOTE] if frozen else []),
        ],
        failed=failed,
    )


def refcheck(config, gains, dtype, device, backend, keep: int) -> str:
    """ "ok", or what differs on a shallow tower: all kept is stock; kept rows equal pruning after the layer.

    Both with a fixed schedule and with one that lets the images of a batch differ in length.
    """
    model = llava(config, gains=gains).to(device)
    patches = patches_of(config)
    pixels = random_pixels(config, 2).to(device, dtype)
    with torch.inference_mode():
        model.to(dtype)
        plain_features = model.get_image_features(pixels).pooler_output
        with patched(model, FlowCut(target_tokens=patches), backend=backend):
            whole = model.get_image_features(pixels).pooler_output
        if not all(torch.equal(a, b) for a, b in zip(plain_features, whole, strict=True)):
            return "keeping all tokens differs from the stock model"
        # Without the entropy rule a shallow tower cuts at every second layer too.
        for policy in (FlowCut(target_tokens=keep, adaptive=False), FlowCut(target_tokens=keep, interval=1)):
            problem = _check_policy(model, policy, pixels, backend)
            if problem:
                return f"{problem} (adaptive={policy.adaptive})"
        if dtype == torch.float32:
            policy = FlowCut(target_tokens=keep, interval=1, batch="max")
            with patched(model, policy, backend=backend):
                ours = torch.stack(list(model.get_image_features(pixels).pooler_output))
            for attention in ("sdpa", "eager"):
                theirs, _ = plain.encoder(model, pixels, policy, attention)
                error = ((theirs - ours).abs().max() / ours.abs().max()).item()
                if not error <= 1e-3:  # a token chosen differently is off by far more
                    return f"FlowCut in plain torch on {attention} gives other features: error {error:.1e}"
    return "ok"


def _check_policy(model: Any, policy: FlowCut, pixels: Tensor, backend: str | None) -> str | None:
    with patched(model, policy, record=True, backend=backend):
        features = _read(model, pixels)
        stages = trace(model).stages
    with patched(model, policy, record=True, backend="reference"):
        _read(model, pixels)
        wanted = trace(model).stages
    # From layer 1 on, low-precision inputs differ in their last bit, and with them a near-tie or a count.
    exact_stages = [
        torch.equal(a.indices, b.indices)
        for a, b in zip(stages, wanted, strict=True)
        if a.layer == 0 or pixels.dtype == torch.float32
    ]
    if not all(exact_stages):
        return "kept tokens differ from the reference"
    tower = model.model.vision_tower
    late = _prune_after(tower, pixels, stages)
    exact = _prune_after(copy.deepcopy(tower).double(), pixels.double(), stages)
    scale = exact.abs().max()
    error, budget = ((features - exact).abs().max() / scale).item(), 2 * ((late - exact).abs().max() / scale).item()
    return None if error <= budget else f"kept tokens' features: error {error:.1e} exceeds {budget:.1e}"


def _read(model: Any, pixels: Tensor) -> Tensor:
    """Features before the projector, class token included: the patched tower's ``hidden_states[-2]``."""
    return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]


def _prune_after(tower: Any, pixels: Tensor, stages) -> Tensor:
    """The textbook order, image by image: every layer runs on all its tokens, then the chosen rows are cut out."""
    images = []
    for image in range(len(pixels)):
        hidden = tower.pre_layrnorm(tower.embeddings(pixels[image : image + 1]))
        cuts = {stage.layer: stage.indices[image, : stage.kept[image]] + 1 for stage in stages}
        where = torch.arange(hidden.shape[1], device=hidden.device)
        for number, layer in enumerate(list(tower.encoder.layers)[:-1]):
            hidden = type(layer).forward(layer, hidden, None)
            if number in cuts:
                kept = torch.cat([cuts[number].new_zeros(1), cuts[number]])
                hidden, where = hidden[:, torch.searchsorted(where, kept)], kept
        images.append(hidden)
    return torch.cat(images)


def _rows(
    stock, pixels: Tensor, tokens, backend: str | None, repeats: int, baselines: bool, frozen: bool
) -> list[dict]:
    """One row per budget; their rounds share one measurement of the stock model."""

    def pruning(policy: Policy) -> Callable[[], object]:
        return partial(patch(twin(stock), policy, backend=backend).get_image_features, pixels)

    runs: dict[str, Callable[[], object]] = {"stock": lambda: stock.get_image_features(pixels)}
    if baselines:
        eager = twin(stock)
        eager.set_attn_implementation("eager")
        runs["stock_eager"] = lambda: eager.get_image_features(pixels)
    seen, split, peaks = {}, {}, {}
    if pixels.device.type == "cuda":  # elsewhere nothing is to be seen, and the call takes seconds
        with torch.inference_mode():
            _, peaks["stock"] = peak_memory(runs["stock"], pixels.device)
    for budget in tokens:
        policy = FlowCut(target_tokens=budget)
        with torch.inference_mode(), patched(stock, policy, record=True, backend=backend):
            _, peaks[str(budget)] = peak_memory(partial(stock.get_image_features, pixels), pixels.device)
            seen[budget] = trace(stock)
        runs[str(budget)] = pruning(policy)
        if baselines:
            by_batch = replace(policy, batch="max")
            for attention in ("sdpa", "eager"):
                runs[f"torch_{attention} {budget}"] = partial(plain.encoder, stock, pixels, by_batch, attention)
            runs[f"limit {budget}"] = pruning(FreeSelection.like(policy, seen[budget].stages, pixels.device))
        if frozen:
            static = pruning(calibrate(stock, policy, pixels))
            runs[f"frozen {budget}"], runs[f"frozen_graph {budget}"] = static, captured(static, pixels.device)
    if frozen:
        runs["stock_graph"] = captured(runs["stock"], pixels.device)
    times = interleave(runs, repeats=repeats, clock=Clock(pixels.device), warmup=1)
    for budget in tokens:
        split[budget] = spent(runs[str(budget)], pixels.device, max(1, repeats // 2))
    return [
        _row(pixels, budget, times, seen[budget], split[budget], flop_ratio(seen[budget], stock.model.vision_tower))
        | dict(
            patches=patches_of(stock.config.vision_config),
            stock_peak_bytes=peaks.get("stock"),
            peak_bytes=peaks[str(budget)],
        )
        for budget in tokens
    ]


def _row(pixels: Tensor, budget: int, times: dict[str, Samples], seen: Trace, split: dict, ratio: float) -> dict:
    ours, stock = times[str(budget)], times["stock"]
    relative = ours.per(stock)
    inside = sum(split[op] for op in SCORING)
    return dict(
        dtype=_short(pixels.dtype),
        batch=len(pixels),
        tokens=budget,
        ok=True,
        refcheck="ok",
        seconds=ours.median,
        spread=ours.spread,
        stock_seconds=stock.median,
        stock_spread=stock.spread,
        time_ratio=relative.median,
        time_ratio_low=relative.quartiles[0],
        time_ratio_high=relative.quartiles[1],
        flop_ratio=ratio,
        overhead=relative.median / ratio,
        met=relative.median / ratio <= TARGET.get(pixels.device.type, math.inf),
        scoring_share=inside / split["total"],
        scoring_of_stock=inside / stock.median,
        **{
            f"{name}_ratio": times[key].per(stock).median
            for name in (*BASELINES, *FROZEN)
            for key in (name, f"{name} {budget}")
            if key in times
        },
        **{f"{op}_seconds": split[op] for op in SCORING},
        split_seconds=split["total"],
        rest_seconds=split["total"] - inside,
        expected_seconds=stock.median * ratio,
        schedule=[stage.kept for stage in seen.stages],
    )


def flop_ratio(seen: Trace, tower: Any) -> float:
    """FLOPs of the traced schedule over those of the stock encoder, whose last layer nobody reads; mean over images."""
    patches, layers = patches_of(tower.config), tower.config.num_hidden_layers
    whole = encoder_flops(tower, Schedule.stock(layers, patches + 1), patches)
    parts = []
    batch = len(seen.stages[0].kept)
    for image in range(batch):
        kept = {stage.layer: stage.kept[image] + 1 for stage in seen.stages}
        parts.append(encoder_flops(tower, Schedule.cut(layers - 1, patches + 1, kept), patches))
    return math.fsum(parts) / batch / whole


def spent(run: Callable[[], object], device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds per call of `run`, in all and inside each scoring operator; medians of a separate, instrumented pass.

    On CUDA the operators' share is the time of their kernels, from torch's profiler; NaN where it saw none.
    """
    passes = []
    for _ in range(repeats):
        inside = dict.fromkeys(SCORING, 0.0)
        with torch.inference_mode(), ExitStack() as stack:
            if device.type == "cuda":
                profiler = stack.enter_context(profile(activities=[ProfilerActivity.CUDA]))
            else:
                stack.enter_context(_timed_operators(inside))
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            total = time.perf_counter() - start
        if device.type == "cuda":
            seen = {event.key: event.device_time_total * 1e-6 for event in profiler.key_averages()}
            # A profiler that may not look at the device sees nothing, which is not the same as 0.
            inside = {operator: seen.get(kernel, math.nan) for kernel, operator in KERNELS.items()}
        passes.append(inside | {"total": total})
    return sorted(passes, key=lambda p: p["total"])[len(passes) // 2]


@contextmanager
def _timed_operators(inside: dict[str, float]) -> Iterator[None]:
    def timed(name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                inside[name] += time.perf_counter() - start

        return call

    with ExitStack() as stack:
        for name, module in SCORING.items():
            stack.enter_context(mock.patch.object(module, name, timed(name, getattr(module, name))))
        yield


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
