"""The KV cache: what dropping rows costs, and what a decoding step gains."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from ..cache import compact_kv_cache
from .cases import Compaction, PagedCompaction
from .ops import row
from .report import Section
from .shapes import llama_7b, small_llama
from .timing import Clock, Copy, interleave

Tick = Callable[..., object]
WORDS = 32  # of the prompt, behind the visual tokens
DECODED = ((576, 64), (2880, 160), (8192, 512))  # visual tokens -> kept


def measure(
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    steps: int = 8,
    repeats: int = 9,
    backend: str | None = None,
    toy: bool = False,
    command: str = "flowcut-bench kv",
    tick: Tick = lambda label, share=None: None,
) -> list[Section]:
    """Compaction against per-layer indexing and the copy bandwidth; decoding on full and pruned caches."""
    device = torch.device(device)
    keep_freed_memory()
    return [
        compaction(device, dtype, repeats, backend, toy, command, tick),
        decoding(device, dtype, steps, repeats, toy, command, tick),
    ]


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for this process, as CUDA's allocator does.

    Otherwise whether a large output comes with page faults, which cost more than moving the rows, is up to the heap's
    layout at that moment.
    """
    trim_threshold, mmap_threshold = -1, -3
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**25)


def compaction(
    device: torch.device, dtype: torch.dtype, repeats: int, backend: str | None, toy: bool, command: str, tick: Tick
) -> Section:
    """`compact_kv` at the size of a 32-layer model with 8 key heads of 128."""
    sizes = [(1, 2, 2, 16, 40, 7)] if toy else [(1, 32, 8, 128, 3000, 400), (4, 32, 8, 128, 3000, 400)]
    clock, copy, rows = Clock(device, queued=True), Copy(device), []
    # On a GPU the goal is three times and 85 %.
    wants = (
        dict(wants_speedup=3.0, wants_copy=0.85) if device.type == "cuda" else dict(wants_speedup=1.5, wants_copy=0.75)
    )
    for size in sizes:
        for kind in (Compaction, PagedCompaction):
            tick(f"{kind.__name__} B={size[0]}")
            case = kind(*size, dtype, device, backend).case
            if kind is Compaction and size[0] == 1:
                case.wants_speedup, case.wants_copy = wants["wants_speedup"], wants["wants_copy"]
            rows.append(row(case, clock, repeats, copy))
            del case
    return Section(
        "ops",
        "KV-cache compaction",
        command,
        rows,
        facts={"copy GB/s": rows[0].get("copy_gbs"), "repeats": repeats},
        notes=[
            "all layers' keys and values, random rows kept; checked to be the same rows first",
            "torch: the fastest of index_select (one sample) and gather, layer by layer; paged: indexing of blocks",
            "freed memory stays with the process on both sides: new pages would cost more than the rows",
        ],
        failed=[f"{r['op']} {r['case']} {r['dtype']}: {r['refcheck']}" for r in rows if not r["ok"]],
    )


def decoding(
    device: torch.device, dtype: torch.dtype, steps: int, repeats: int, toy: bool, command: str, tick: Tick
) -> Section:
    """Seconds per decoded token and bytes of the cache with all visual tokens, with few, and with few after layer 1."""
    text = (
        small_llama(2, hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1)
        if toy
        else (llama_7b() if device.type == "cuda" else small_llama())
    )
    text.max_position_embeddings = 16384
    with torch.device(device):
        model: Any = LlamaForCausalLM(text).eval()
    model = model.to(dtype)
    rows, failed = [], []
    for visual, kept in [(40, 8)] if toy else DECODED:
        tick(f"decode {visual} → {kept}")
        full = filled(text, [visual + WORDS] * text.num_hidden_layers, dtype, device)
        keep = spread(visual, kept, device)
        problem = refcheck(model, full, keep)
        failed += [f"{visual} → {kept}: {problem}"] * (problem != "ok")
        late = [visual + WORDS if i < 2 else kept + WORDS for i in range(text.num_hidden_layers)]
        caches = {
            "stock": full,
            "ours": compact_kv_cache(copied(full), keep),
            "late": filled(text, late, dtype, device),
        }
        found: dict[str, Any] = dict(
            visual=visual,
            tokens=kept,
            dtype=str(dtype).removeprefix("torch."),
            ok=problem == "ok",
            refcheck=problem if problem == "ok" else f"FAILED: {problem}",
        )
        runs = {name: decoder(model, cache, steps) for name, cache in caches.items()}
        times = interleave(runs, repeats=repeats, clock=Clock(device), warmup=1)
        for name, prefix in (("stock", "stock_"), ("ours", ""), ("late", "late_")):
            found[f"{prefix}kv_bytes"] = bytes_of(caches[name])
            found[f"{prefix}decode_seconds"] = times[name].median / steps
        found["speedup"] = times["stock"].per(times["ours"]).median
        found["late_speedup"] = times["stock"].per(times["late"]).median
        rows.append(found)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return Section(
        "kv",
        f"Decoding: {text.num_hidden_layers} layers, {text.num_key_value_heads} key heads of {text.head_dim}",
        command,
        rows,
        facts=dict(parameters_millions=millions, words=WORDS, steps=steps, repeats=repeats),
        notes=[
            f"one sample, {WORDS} words behind the visual tokens, a model of {millions:,.0f} M random parameters",
            "pruned: the kept tokens alone in every layer (by the encoder, or by compact_cache); after layer 1: the "
            "first two layers hold all",
            "checked first: a step on the compacted cache equals one on the full cache with the dropped rows masked",
        ],
        failed=failed,
    )


def filled(config: Any, lengths: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
    """A cache of random keys and values, `lengths` rows by layer."""
    generator = torch.Generator(device).manual_seed(10)
    cache = DynamicCache()
    for layer, rows in enumerate(lengths):
        shape = (1, config.num_key_value_heads, rows, config.head_dim)
        keys, values = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


def copied(cache: Any) -> Any:
    twin = DynamicCache()
    for number, layer in enumerate(cache.layers):
        twin.update(layer.keys, layer.values, number)
    return twin


def spread(visual: int, kept: int, device: torch.device) -> Tensor:
    """Evenly spread visual rows and all words [1, M]."""
    rows = torch.arange(kept, device=device) * visual // kept
    return torch.cat([rows, torch.arange(visual, visual + WORDS, device=device)])[None]


def bytes_of(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.inference_mode()
def refcheck(model: LlamaForCausalLM, full: Any, keep: Tensor) -> str:
    """ "ok", or by how much a step on the compacted cache differs from one that masks what was dropped."""
    token, columns = torch.tensor([[7]], device=keep.device), full.get_seq_length()
    mask = torch.zeros((1, columns + 1), dtype=torch.long, device=keep.device)
    mask[0, keep[0]] = mask[0, -1] = 1
    position = torch.tensor([[columns]], device=keep.device)
    masked = model(input_ids=token, past_key_values=copied(full), attention_mask=mask, position_ids=position).logits
    cache = compact_kv_cache(copied(full), keep)
    short = model(input_ids=token, past_key_values=cache, position_ids=position).logits
    error = ((short - masked).abs().max() / masked.abs().max()).item()
    allowed = max(100 * torch.finfo(torch.float32).eps, 4 * torch.finfo(model.dtype).eps)
    return "ok" if error <= allowed else f"logits differ by {error:.1e}"


def decoder(model: LlamaForCausalLM, cache: Any, steps: int) -> Callable[[], None]:
    """`steps` tokens from the cache as it is now, again at each call."""
    token = torch.tensor([[7]], device=model.device)
    start = [(layer.keys, layer.values) for layer in cache.layers]
    position = max(keys.shape[2] for keys, _ in start)

    def run() -> None:
        for layer, (keys, values) in zip(cache.layers, start, strict=True):
            layer.keys, layer.values = keys, values
        for step in range(steps):
            place = torch.tensor([[position + step]], device=model.device)
            model(input_ids=token, past_key_values=cache, position_ids=place, use_cache=True, logits_to_keep=1)

    return run
