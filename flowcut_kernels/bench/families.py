"""Every model family from the picture to the first token, random weights: what pruning gains, and its cost in Python.

A family's real size is that of a published model. A thin model has all its layers, but hardly any width, so that its
forward pass costs little but the Python around the layers; a toy is thin and shallow.

How long the stock model's prefill takes at real size is known from below without a GPU: the host has to run the Python
of all layers, which a thin model's pass shows, and the device has to do the matrix products, which `fk.cost` counts.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Container
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ..cost import Matrices, cost
from ..integrations.serving import retained_count
from ..models import patched, trace
from ..modules.encoder import PrunedEncoderLayer
from ..modules.packed_encoder import PackedBlock
from ..policies import FlowCut, UniformTokens
from .report import Section
from .shapes import NoInit, twin
from .timing import Clock, Run, interleave, synchronise

Tick = Callable[..., object]
Arguments = dict[str, Any]
Settings = dict[str, Any]

TEXT = 32  # words after the picture
SHARE = 0.11  # of the visual tokens that stay
CALLS = 32  # forward passes whose CPU time is compared, in turns, where nothing else is measured
ROUNDS = 9  # the same at each of DEPTHS
DEPTHS = range(0, 128, 8)  # of a caller's frames: so many of `_below` fill one of the chunks that Python keeps them in
PEAK = 989e12  # FLOP/s of dense bfloat16 matrix products on an H200, by its data sheet


@dataclass(frozen=True)
class Family:
    """A published model: its configuration, and the picture or video that it is shown."""

    model: str  # class of transformers without "ForConditionalGeneration"; its configuration is named alike
    vision: tuple[str, Settings]  # class and settings of the configuration
    text: tuple[str, Settings]
    shown: Callable[[Any], Arguments]  # configuration -> what a processor makes of a picture or video
    settings: Settings = field(default_factory=dict)
    narrow_vision: Settings = field(default_factory=dict)  # instead of NARROW
    narrow: Settings = field(default_factory=dict)  # of the settings
    narrow_text: Settings = field(default_factory=dict)
    largest: Callable[[Any], Arguments] | None = None  # as `shown`, of what fills the model; None: that does

    def config(self, size: str) -> Any:
        """The configuration; `size` is "real", "thin" or "toy"."""
        vision, text, settings = dict(self.vision[1]), dict(self.text[1]), dict(self.settings)
        if size != "real":
            vision |= {k: v for k, v in (NARROW | self.narrow_vision).items() if k in vision}
            text |= NARROW_TEXT | self.narrow_text
            settings |= self.narrow
        if size == "toy":
            vision |= {k: v for k, v in SHALLOW.items() if k in vision}
            text["num_hidden_layers"] = 4
        return getattr(transformers, f"{self.model}Config")(
            vision_config=getattr(transformers, self.vision[0])(**vision),
            text_config=getattr(transformers, self.text[0])(**text),
            **settings,
        )

    def build(self, size: str, device: torch.device | str, dtype: torch.dtype) -> Any:
        """The model with random weights, made on `device`; on the meta device without any."""
        kind = getattr(transformers, f"{self.model}ForConditionalGeneration")
        with NoInit(), torch.device(device):
            model = kind._from_config(self.config(size), dtype=dtype).eval()
        if model.device.type != "meta":
            generator = torch.Generator(device).manual_seed(1)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        bound = math.sqrt(3 / parameter[0].numel())
                        parameter.uniform_(-bound, bound, generator=generator)
        return model.requires_grad_(False)


def prompt(model: Any, shown: Arguments) -> Arguments:
    """What the processor would hand to `model`: the picture or video, its placeholders and TEXT words.

    For a model on the meta device, of which only `cost` asks anything, it is on the CPU.
    """
    config, device = model.config, torch.device("cpu" if model.device.type == "meta" else model.device)
    shown = {
        name: value.to(device, model.dtype) if value.is_floating_point() else value.to(device)
        for name, value in shown.items()
    }
    video = "pixel_values_videos" in shown
    token_id = config.video_token_id if video else config.image_token_id
    text = 1 + torch.arange(TEXT, device=device)
    ids = torch.cat([text[:1], torch.full((sum(counts(config, shown)),), token_id, device=device), text])[None]
    kinds = (ids == token_id).int()
    # Families differ in who says which tokens are visual; each forward takes one of the two at most.
    named = {"mm_token_type_ids": kinds * (1 + video), "token_type_ids": kinds}
    takes = inspect.signature(type(model).forward).parameters
    named = {name: value for name, value in named.items() if name in takes}
    return shown | named | dict(input_ids=ids, attention_mask=torch.ones_like(ids))


def counts(config: Any, shown: Arguments) -> list[int]:
    """Tokens of each image or video as the stock model makes them."""
    video = "pixel_values_videos" in shown
    pixels = shown["pixel_values_videos" if video else "pixel_values"]
    sizes = next((value for name, value in shown.items() if name in ("image_sizes", "image_grid_thw")), None)
    everything, modality = UniformTokens(retain_ratio=1.0), "video" if video else "image"
    return retained_count(config, everything, sizes, modality=modality, pixel_shape=pixels.shape)


def square(config: Any) -> Arguments:
    """One picture at the tower's size."""
    return dict(pixel_values=_noise(1, 3, *_size(config)))


def anyres(side: int) -> Callable[[Any], Arguments]:
    """A picture of side x side tiles, and its base view."""

    def shown(config: Any) -> Arguments:
        height, width = _size(config)
        size = torch.tensor([[side * height, side * width]])
        return dict(pixel_values=_noise(1, 1 + side**2, 3, height, width), image_sizes=size)

    return shown


def tiles(count: int) -> Callable[[Any], Arguments]:
    """A picture of so many tiles, its thumbnail among them, as images one after another."""
    return lambda config: dict(pixel_values=_noise(count, 3, *_size(config)))


def stacked_tiles(count: int) -> Callable[[Any], Arguments]:
    """The same, by sample."""
    return lambda config: dict(pixel_values=_noise(1, count, 3, *_size(config)))


def frames(count: int) -> Callable[[Any], Arguments]:
    """A video of so many frames."""
    return lambda config: dict(pixel_values_videos=_noise(1, count, 3, *_size(config)))


def packed(side: int) -> Callable[[Any], Arguments]:
    """A picture of side x side patches; narrow models are shown eight by eight."""

    def shown(config: Any) -> Arguments:
        vision = config.vision_config
        edge = side if vision.num_heads > NARROW["num_heads"] else 8
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return dict(pixel_values=_noise(edge * edge, values), image_grid_thw=torch.tensor([[1, edge, edge]]))

    return shown


def _size(config: Any) -> tuple[int, int]:
    size = config.vision_config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _noise(*shape: int) -> Tensor:
    return torch.empty(shape).uniform_(-1.8, 1.8, generator=torch.Generator().manual_seed(2))


def _clip(size: int = 336) -> tuple[str, Settings]:
    """CLIP-L/14."""
    settings = dict(
        hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24, image_size=size,
        patch_size=14,
    )  # fmt: skip
    return "CLIPVisionConfig", settings


def _siglip(kind: str = "SiglipVisionConfig", size: int = 384, layers: int = 27, **more: Any) -> tuple[str, Settings]:
    """SigLIP-so400m/14."""
    settings = dict(
        hidden_size=1152, intermediate_size=4304, num_attention_heads=16, num_hidden_layers=layers, image_size=size,
        patch_size=14,
    )  # fmt: skip
    return kind, settings | more


def _text(
    kind: str, hidden: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int, **more: Any
) -> tuple[str, Settings]:
    settings = dict(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocabulary,
    )  # fmt: skip
    return kind, settings | more


_VICUNA = _text("LlamaConfig", 4096, 11008, 32, 32, 32, 32064)
_QWEN: tuple[int, int, int, int, int, int] = (3584, 18944, 28, 28, 4, 152064)
_ANYRES = dict(image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]])
_NARROW_ANYRES = dict(image_grid_pinpoints=[[112, 112], [336, 336]])
_MROPE: Settings = dict(rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]))
_NARROW_MROPE: Settings = dict(rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3]))
_QWEN_IDS = dict(image_token_id=151655, video_token_id=151656, vision_start_token_id=151652)
_NARROW_IDS = dict(image_token_id=90, video_token_id=91, vision_start_token_id=92)

# Whatever a vision configuration has of these; four patches a side for towers of one size.
NARROW: Settings = dict(
    hidden_size=64, embed_dim=64, intermediate_size=64, mlp_ratio=1, num_attention_heads=2, num_heads=2, image_size=56,
    out_hidden_size=64,
)  # fmt: skip
NARROW_TEXT: Settings = dict(
    hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=96, pad_token_id=0,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
SHALLOW: Settings = dict(num_hidden_layers=6, depth=6, fullatt_block_indexes=[2, 5], deepstack_visual_indexes=[1, 3])

FAMILIES: dict[str, Family] = {
    "llava-1.5-7b": Family(
        "Llava", _clip(), _VICUNA, square, dict(image_token_index=32000), narrow=dict(image_token_index=90)
    ),
    "vipllava-7b": Family(
        "VipLlava", _clip(), _VICUNA, square, dict(image_token_index=32000),
        narrow=dict(image_token_index=90, vision_feature_layer=[-2, -5, 3]),
    ),
    "llava-next-7b": Family(
        "LlavaNext", _clip(), _VICUNA, anyres(2), dict(image_token_index=32000, **_ANYRES),
        narrow=dict(image_token_index=90, **_NARROW_ANYRES),
    ),
    "llava-onevision-7b": Family(
        "LlavaOnevision", _siglip(layers=26, vision_use_head=False), _text("Qwen2Config", *_QWEN), anyres(2),
        dict(image_token_index=151646, video_token_index=151647, vision_feature_layer=-1,
             image_grid_pinpoints=[[384 * h, 384 * w] for h in range(1, 7) for w in range(1, 7)]),
        narrow=dict(image_token_index=90, video_token_index=91, **_NARROW_ANYRES),
        largest=anyres(6),
    ),
    "video-llava-7b": Family(
        "VideoLlava", _clip(224), _VICUNA, frames(8), dict(image_token_index=32000, video_token_index=32001),
        narrow=dict(image_token_index=90, video_token_index=91),
    ),
    "llava-next-video-7b": Family(
        "LlavaNextVideo", _clip(), _VICUNA, frames(8),
        dict(image_token_index=32001, video_token_index=32000, **_ANYRES),
        narrow=dict(image_token_index=90, video_token_index=91, **_NARROW_ANYRES),
        largest=frames(24),
    ),
    "internvl3-8b": Family(
        "InternVL",
        ("InternVLVisionConfig", dict(
            hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24, image_size=448,
            patch_size=14, attention_bias=True,
        )),
        _text("Qwen2Config", *_QWEN), tiles(5), dict(image_token_id=151667), narrow=dict(image_token_id=90),
        largest=tiles(13),
    ),
    "qwen2-vl-7b": Family(
        "Qwen2VL", ("Qwen2VLVisionConfig", dict(depth=32, embed_dim=1280, hidden_size=3584, num_heads=16, mlp_ratio=4)),
        _text("Qwen2VLTextConfig", *_QWEN, **_MROPE), packed(64), _QWEN_IDS, narrow=_NARROW_IDS,
        narrow_text=_NARROW_MROPE,
        largest=packed(256),
    ),
    "qwen2.5-vl-7b": Family(
        "Qwen2_5_VL",
        ("Qwen2_5_VLVisionConfig", dict(
            depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584, window_size=112,
            fullatt_block_indexes=[7, 15, 23, 31],
        )),
        _text("Qwen2_5_VLTextConfig", *_QWEN, **_MROPE), packed(64), _QWEN_IDS, narrow=_NARROW_IDS,
        narrow_text=_NARROW_MROPE,
        largest=packed(256),
    ),
    "qwen3-vl-8b": Family(
        "Qwen3VL",
        ("Qwen3VLVisionConfig", dict(
            depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, patch_size=16, out_hidden_size=4096,
            deepstack_visual_indexes=[8, 16, 24],
        )),
        _text("Qwen3VLTextConfig", 4096, 12288, 36, 32, 8, 151936, head_dim=128, rope_parameters=dict(
            rope_type="default", rope_theta=5e6, mrope_section=[24, 20, 20],
        )),
        packed(64), _QWEN_IDS, narrow=_NARROW_IDS, narrow_text=_NARROW_MROPE | dict(head_dim=16),
        largest=packed(256),
    ),
    "gemma-3-4b": Family(
        "Gemma3", _siglip(size=896, vision_use_head=False),
        _text("Gemma3TextConfig", 2560, 10240, 34, 8, 4, 262208, head_dim=256, sliding_window=1024), tiles(1),
        dict(image_token_index=262144, mm_tokens_per_image=256),
        narrow=dict(image_token_index=90, mm_tokens_per_image=4), narrow_text=dict(head_dim=16),
        largest=tiles(5),
    ),
    "paligemma-3b": Family(
        "PaliGemma", _siglip(size=448, vision_use_head=False),
        _text("GemmaConfig", 2048, 16384, 18, 8, 1, 257216, head_dim=256), square,
        dict(image_token_index=256000, projection_dim=2048, hidden_size=2048),
        narrow=dict(image_token_index=90, projection_dim=64, hidden_size=64), narrow_text=dict(head_dim=16),
    ),
    "idefics3-8b": Family(
        "Idefics3", _siglip("Idefics3VisionConfig", 364), _text("LlamaConfig", 4096, 14336, 32, 32, 8, 128260),
        stacked_tiles(5), dict(image_token_id=128257, scale_factor=2), narrow=dict(image_token_id=90),
        largest=stacked_tiles(17),
    ),
    "smolvlm2-2.2b": Family(
        "SmolVLM", _siglip("SmolVLMVisionConfig", 378), _text("LlamaConfig", 2048, 8192, 24, 32, 32, 49280),
        stacked_tiles(5), dict(image_token_id=49190, scale_factor=3), narrow=dict(image_token_id=90, scale_factor=2),
        largest=stacked_tiles(17),
    ),
}  # fmt: skip


def measure(
    *,
    device: torch.device | str = "cpu",
    families: tuple[str, ...] = tuple(FAMILIES),
    size: str = "toy",
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 3,
    backend: str | None = None,
    command: str = "flowcut-bench prefill --family all",
    tick: Tick = lambda label, share=None: None,
) -> Section:
    """The stock model against FlowCut with SHARE of the tokens, and what patching costs in CPU time on a thin model.

    Args:
        families: names in FAMILIES.
        size: "real" or "toy", of the models whose first token is timed.
    """
    device = torch.device(device)
    calls = CALLS if size == "real" else repeats  # of the thin model, for a share that a toy does not have
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for number, name in enumerate(families):
        tick(name, number / len(families))
        row: dict[str, Any] = dict(family=name, dtype=str(dtype).removeprefix("torch."), size=size)
        try:
            row |= first_token(FAMILIES[name], size, device, dtype, repeats, backend)
            if row["ok"]:
                row |= overhead(FAMILIES[name], FAMILIES[name].shown, device, backend, calls)
                if size == "real":  # of a toy's it would say nothing
                    row["adapter_share"] = row["adapter_seconds"] / row["stock_first_seconds"]
        except Exception as error:  # one family's failure must not cost the others
            row |= dict(ok=False, refcheck=f"FAILED: {type(error).__name__}: {error}")
        failed += [] if row["ok"] else [f"{name}: {row['refcheck']}"]
        rows.append(row)
    return Section(
        "families",
        f"Model families, {size} size: all visual tokens against {SHARE:.0%} of them",
        command,
        rows,
        facts=dict(share=SHARE, size=size, repeats=repeats, calls=calls, prompt_words=TEXT),
        notes=[
            f"one picture or video and {TEXT} words; random weights; FlowCut(retain_ratio={SHARE})",
            "1st token: encoder, projector, prefill",
            "host: CPU time of a patched forward pass of a thin model (all layers, width 64) beyond the stock one's, "
            "without the time in modules that are the same. "
            "adapter: one cut without scoring (UniformTokens), what prompts, features and caches take; all: FlowCut, "
            "its operators on the CPU included. Of stock: the adapter's share of the stock first token",
        ],
        failed=failed,
    )


@torch.inference_mode()
def first_token(
    family: Family, size: str, device: torch.device, dtype: torch.dtype, repeats: int, backend: str | None
) -> dict[str, Any]:
    """Tokens and times of the stock and the pruned model, once keeping all tokens has proved to be the stock model."""
    stock = family.build(size, device, dtype)
    inputs = prompt(stock, family.shown(stock.config)) | dict(use_cache=True, logits_to_keep=1)
    pruned = twin(stock)
    with patched(pruned, FlowCut(retain_ratio=1.0), backend=backend):
        if not torch.equal(pruned(**inputs).logits, stock(**inputs).logits):
            return dict(ok=False, refcheck="keeping all tokens differs from the stock model")
    policy = FlowCut(retain_ratio=SHARE)
    with patched(pruned, policy, record=True, backend=backend):
        pruned(**inputs)
        kept = [sum(stage.kept) for stage in trace(pruned).stages]
    with patched(pruned, policy, backend=backend):
        runs: dict[str, Callable[[], object]] = {
            name: partial(model, **inputs) for name, model in (("stock", stock), ("ours", pruned))
        }
        times = interleave(runs, repeats=repeats, clock=Clock(device), warmup=1)
    speedup = times["stock"].per(times["ours"])
    return dict(
        ok=True, refcheck="ok", stock_tokens=int(_is_visual(stock.config, inputs).sum()), tokens=kept[-1],
        schedule=kept, stock_first_seconds=times["stock"].median, first_seconds=times["ours"].median,
        speedup=speedup.median, speedup_low=speedup.quartiles[0], speedup_high=speedup.quartiles[1],
    )  # fmt: skip


class _HostClock(Clock):
    """CPU time of this process, whatever the device still has to do, without what calls of some modules take."""

    def __init__(self, device: torch.device, without: Container[nn.Module] = ()) -> None:
        super().__init__(device)
        self.without = without

    def _span(self, run: Run, calls: int) -> float:
        taken, entered = 0.0, []  # one of these modules may call another

        def enter(module: nn.Module, _: Any) -> None:
            if module in self.without:
                entered.append(time.process_time())

        def leave(module: nn.Module, *_: Any) -> None:
            nonlocal taken
            if module in self.without and (start := entered.pop()) and not entered:
                taken += time.process_time() - start

        synchronise(self.device)
        with ExitStack() as stack:
            if self.without:  # hooks of all modules: a module's own would change what the package does
                for hook in (register_module_forward_pre_hook(enter), register_module_forward_hook(leave)):
                    stack.callback(hook.remove)
            start = time.process_time()
            for _ in range(calls):
                run()
            return time.process_time() - start - taken


@torch.inference_mode()
def overhead(
    family: Family, shown: Callable[[Any], Arguments], device: torch.device, backend: str | None, calls: int
) -> dict[str, float]:
    """CPU seconds of this process: the thin stock model's forward pass, and what a patched one takes beyond it.

    Each is the least of `calls` passes: what else a machine does only adds to CPU time. Fewer tokens are less work even
    for a thin model, and must not be set against what the adapter takes. So the time in modules that the patch leaves
    alone is left out, on both sides.
    """
    stock = family.build("thin", device, torch.float32)
    inputs = prompt(stock, shown(stock.config)) | dict(logits_to_keep=1)
    policies = dict(adapter_seconds=UniformTokens(retain_ratio=SHARE), python_seconds=FlowCut(retain_ratio=SHARE))
    models = dict(stock=stock) | {name: twin(stock) for name in policies}
    runs: dict[str, Run] = {name: partial(model, **inputs) for name, model in models.items()}
    with ExitStack() as stack:
        for name, policy in policies.items():
            stack.enter_context(patched(models[name], policy, backend=backend))
        same = _unchanged(models["adapter_seconds"])
        alone = {model.get_submodule(name) for model in models.values() for name in same}
        around = interleave(runs, repeats=calls, clock=_HostClock(device, alone), least=0)
        host = interleave(dict(stock=runs["stock"]), repeats=calls, clock=_HostClock(device), least=0)["stock"]
    least = {name: min(samples.values) for name, samples in around.items()}
    beyond = {name: least[name] - least["stock"] for name in policies}
    return dict(stock_host_seconds=min(host.values)) | beyond


@torch.inference_mode()
def by_caller(
    family: Family, shown: Callable[[Any], Arguments], device: torch.device, backend: str | None, rounds: int
) -> dict[str, float]:
    """How many times as long a thin model's forward pass takes below the worst of DEPTHS as below the best.

    CPU time of this process, the least of `rounds` passes at each.
    """
    stock = family.build("thin", device, torch.float32)
    inputs = prompt(stock, shown(stock.config)) | dict(logits_to_keep=1)
    with patched(ours := twin(stock), UniformTokens(retain_ratio=SHARE), backend=backend):
        return {
            f"{name}_by_caller": _by_depth(partial(model, **inputs), rounds)
            for name, model in (("stock", stock), ("patched", ours))
        }


def _by_depth(run: Run, rounds: int) -> float:
    taken: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    run()
    for _ in range(rounds):
        for depth, seconds in taken.items():
            start = time.process_time()
            _below(depth, run)
            seconds.append(time.process_time() - start)
    least = [*map(min, taken.values())]
    return max(least) / min(least)


def _below(depth: int, run: Run) -> object:
    """`run` so many frames deeper."""
    return run() if depth == 0 else _below(depth - 1, run)


def _unchanged(model: nn.Module) -> list[str]:
    """Names of a patched model's modules that nothing in it replaces.

    A block of the encoder may do without its attention module, and itself do what that does: on both sides only its
    innermost modules are named.
    """
    blocks = [x for x in model.modules() if isinstance(vars(x).get("forward"), (PrunedEncoderLayer, PackedBlock))]
    inside = {part for block in blocks for part in block.modules() if [*part.children()]}
    return [
        name
        for name, module in model.named_modules()
        if module not in inside and not any("forward" in vars(part) for part in module.modules())
    ]


def products(family: Family, shown: Callable[[Any], Arguments]) -> dict[str, int]:
    """Visual tokens of the stock model's prefill at real size, and the FLOPs of its matrix products."""
    model = family.build("real", "meta", torch.bfloat16)
    inputs = prompt(model, shown(model.config))
    flops = cost(model, UniformTokens(retain_ratio=SHARE), inputs).full.flops
    columns = inputs["input_ids"].shape[1]  # a causal kernel does half of what counts as attention there
    flops -= 2 * columns**2 * sum(Matrices.of(layer).width for layer in model.get_decoder().layers)
    return dict(stock_tokens=int(_is_visual(model.config, inputs).sum()), flops=flops)


def measure_host(
    *,
    device: torch.device | str = "cpu",
    families: tuple[str, ...] = tuple(FAMILIES),
    backend: str | None = None,
    command: str = "flowcut-bench prefill --family all --host",
    tick: Tick = lambda label, share=None: None,
) -> Section:
    """What patching costs in CPU time, as a share of the least that the stock model's prefill takes at real size."""
    device = torch.device(device)
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(families):
        tick(name, number / len(families))
        family, checked = FAMILIES[name], thin_check(FAMILIES[name], device, backend)
        for size, shown in (("usual", family.shown), ("largest", family.largest)):
            if shown is None:
                continue
            row: dict[str, Any] = dict(family=name, prompt=size, ok=checked == "ok", refcheck=checked)
            if row["ok"]:
                row |= overhead(family, shown, device, backend, CALLS) | products(family, shown)
                row |= by_caller(family, shown, device, backend, ROUNDS)
                row["least_seconds"] = max(row["stock_host_seconds"], row["flops"] / PEAK)
                row["adapter_share"] = row["adapter_seconds"] / row["least_seconds"]
            rows.append(row)
    return Section(
        "host",
        "Host time of a patched prefill, by family",
        command,
        rows,
        facts=dict(share=SHARE, calls=CALLS, prompt_words=TEXT, peak=PEAK),
        notes=[
            f"CPU time of a forward pass of a thin model, the least of {CALLS}: all layers, width 64, small tiles; "
            f"{TEXT} words behind one picture or video, which has as many tiles or frames as at real size, the usual "
            "ones or the most",
            "adapter, all: beyond the stock model's, without the time in modules that are the same, as fewer tokens "
            "make up for nothing here. adapter: one cut without scoring (UniformTokens), what prompts, features and "
            "caches take; all: FlowCut, its operators on the CPU included",
            "stock takes at least: at real size, the longer of the stock host time of the thin model and the matrix "
            f"products (fk.cost, half of the attention where it is causal) at {PEAK / 1e12:.0f} TFLOP/s, the peak of "
            "an H200",
            "by caller: how many times as long a pass takes below the worst depth of the caller's stack as below the "
            "best; the other columns are of one that costs nothing",
        ],
        failed=[f"{row['family']}: {row['refcheck']}" for row in rows if not row["ok"]],
    )


@torch.inference_mode()
def thin_check(family: Family, device: torch.device, backend: str | None) -> str:
    """ "ok", or how a patched thin model that keeps all tokens differs from the stock one."""
    stock = family.build("thin", device, torch.float32)
    inputs = prompt(stock, family.shown(stock.config)) | dict(logits_to_keep=1)
    with patched(ours := twin(stock), UniformTokens(retain_ratio=1.0), backend=backend):
        same = torch.equal(ours(**inputs).logits, stock(**inputs).logits)
    return "ok" if same else "FAILED: keeping all tokens differs from the stock model"


def _is_visual(config: Any, inputs: Arguments) -> Tensor:
    video = "pixel_values_videos" in inputs
    return inputs["input_ids"] == (config.video_token_id if video else config.image_token_id)
