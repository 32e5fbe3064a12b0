"""Models of real shapes with random weights, whose class token loses entropy with depth as a trained CLIP's does."""

from __future__ import annotations

import copy
import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CLIPVisionConfig, LlamaConfig, Qwen2Config, SiglipVisionConfig


@dataclass(frozen=True)
class Gains:
    """Weights are uniform; a linear weight has standard deviation gain / sqrt(fan_in).

    `qk` are (layer, gain) points joined by straight lines: the larger, the sharper the attention.
    """

    qk: tuple[tuple[int, float], ...]
    value: float
    output: float
    mlp: float
    position: float = 0.5
    cls: float = 0.7
    patch: float = 1.0
    seed: int = 501


# CLS entropy / ln N falls from 0.99 to about 0.65 with depth, the shape FlowCut's paper shows for CLIP-L.
PAPER = Gains(qk=((0, 0.9), (10, 1.6), (23, 2.8)), value=0.35, output=0.4, mlp=0.5)
# The stored recipe of a published comparison: FlowCut cuts 576 -> 570 -> 561 -> ... -> 299 -> 64.
GOLDEN_LIKE = Gains(qk=((0, 1.2), (23, 1.9)), value=0.35, output=0.4, mlp=0.5)
# Without a class token: the mean of all queries is short, so the same entropies ask for larger weights.
PAPER_MEAN = Gains(qk=((0, 2.5), (12, 4.0), (26, 6.5)), value=0.35, output=0.4, mlp=0.5)
WEIGHTS = {"paper-like": PAPER, "golden-like": GOLDEN_LIKE}


@dataclass(frozen=True)
class Shape:
    """A vision-language model to time: configurations, its picture, and what to keep of it."""

    name: str
    vision: Any
    text: Any
    views: int  # of the picture, each a row of the encoder's batch: 1, or an overview and tiles of two by two
    tokens: tuple[int, ...]  # visual tokens kept per prompt
    gains: Gains = PAPER
    kind: str = "Llava"  # class of transformers without "ForConditionalGeneration"

    @property
    def patches(self) -> int:
        """Of the picture's views; a model may put newline tokens between their rows."""
        return self.views * patches_of(self.vision)

    def build(self, device: torch.device | str, dtype: torch.dtype) -> Any:
        """The model, its weights made on `device`."""
        return llava(self.vision, self.text, self.gains, kind=self.kind, device=device, dtype=dtype)


def real(name: str, toy: bool = False) -> Shape:
    """One of REAL at full size, or with the same structure at a size for a dry run."""
    vision, text, views, tokens, gains, kind = REAL[name]
    if toy:
        small = dict(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_hidden_layers=6)
        vision = type(vision)(**(vision.to_dict() | small | dict(image_size=8 * vision.patch_size)))
        text = type(text)(
            hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2,
            vocab_size=64,
        )  # fmt: skip
        tokens = tuple(views * kept for kept in (24, 8))
    return Shape(name, vision, text, views, tokens, gains, kind)


def quarter_llava() -> Shape:
    """LLaVA-1.5-7B at a quarter of its width and about a 16th of its work, most of it the language model's as there.

    All tokens and all layers, which policies name, and heads as wide.
    """
    vision = clip_large(hidden_size=256, intermediate_size=1024, num_attention_heads=4)
    text = small_llama(32, intermediate_size=2752, num_attention_heads=8, num_key_value_heads=8)
    return Shape("LLaVA-1.5-7B at a quarter of its width", vision, text, 1, (192, 64))


def llama_7b(vocabulary: int = 32064) -> LlamaConfig:
    """Vicuna-7B."""
    return LlamaConfig(vocab_size=vocabulary, max_position_embeddings=4096)


def clip_large(layers: int = 24, **changes: Any) -> CLIPVisionConfig:
    """CLIP-L/14-336: 24 layers, 16 heads of 64, 576 patches and CLS."""
    shape = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, image_size=336, patch_size=14)
    return CLIPVisionConfig(num_hidden_layers=layers, **(shape | changes))


def siglip_so400m(layers: int = 26, **changes: Any) -> SiglipVisionConfig:
    """SigLIP-so400m/14-384 as LLaVA-OneVision reads it: 26 layers, 16 heads of 72, 729 patches, no class token."""
    shape = dict(hidden_size=1152, intermediate_size=4304, num_attention_heads=16, image_size=384, patch_size=14)
    return SiglipVisionConfig(num_hidden_layers=layers, vision_use_head=False, **(shape | changes))


def small_llama(layers: int = 8, **changes: Any) -> LlamaConfig:
    """A decoder that fits a CPU: 8 layers, hidden 1,024, 16 heads of 64."""
    shape = dict(
        hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=16, vocab_size=32000
    )
    return LlamaConfig(num_hidden_layers=layers, max_position_embeddings=4096, **(shape | changes))


def _qwen2_7b() -> Qwen2Config:
    return Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=152064,
    )  # fmt: skip


def patches_of(config: Any) -> int:
    """Patches of an image at the size a vision configuration names."""
    return (config.image_size // config.patch_size) ** 2


def llava(
    vision: Any,
    text: Any = None,
    gains: Gains = PAPER,
    *,
    kind: str = "Llava",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A LlavaForConditionalGeneration, or another `kind` of it, made on `device`; without `text` hardly any decoder.

    It reads layer -2 of a CLIP tower, without the class token, and the last layer of a SigLIP tower. Kinds that tile a
    picture know one of two by two tiles.
    """
    clip = isinstance(vision, CLIPVisionConfig)
    text = text or LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=64,
    )
    own: dict[str, Any] = dict(image_seq_length=patches_of(vision))
    if kind != "Llava":
        own = dict(image_grid_pinpoints=[[2 * vision.image_size] * 2], video_token_index=text.vocab_size - 2)
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision, text_config=text, image_token_index=text.vocab_size - 1,
        vision_feature_layer=-2 if clip else -1, vision_feature_select_strategy="default" if clip else "full", **own,
    )  # fmt: skip
    with NoInit(), torch.device(device):
        model = getattr(transformers, f"{kind}ForConditionalGeneration")._from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        fill(model.model.vision_tower, gains)
        rest = [p for name, p in model.named_parameters() if "vision_tower" not in name]
        generator = torch.Generator(device).manual_seed(gains.seed)
        for parameter in rest:
            if parameter.dim() > 1:
                bound = math.sqrt(3 / parameter.shape[1])
                parameter.uniform_(-bound, bound, generator=generator)
            elif parameter.ne(1).any():  # norms keep their ones
                parameter.zero_()
    return model.requires_grad_(False)


def fill(tower: nn.Module, gains: Gains) -> None:
    """Draw every weight of a CLIP tower from numpy's frozen stream: the same numbers on every machine."""
    points = np.array(gains.qk)

    def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
        offset, bound = 0.0, math.sqrt(3.0)
        if "norm" in name or "layrnorm" in name:
            offset, bound = (1.0, 0.1) if name.endswith("weight") else (0.0, 0.05)
        elif name.endswith("bias"):
            bound = 0.02
        elif "class_embedding" in name:
            bound *= gains.cls
        elif "position_embedding" in name:
            bound *= gains.position
        elif "patch_embedding" in name:
            bound *= gains.patch / np.sqrt(np.prod(shape[1:]))
        else:
            if "q_proj" in name or "k_proj" in name:
                gain = float(np.interp(int(name.split("layers.")[1].split(".")[0]), points[:, 0], points[:, 1]))
            else:
                gain = next(
                    g
                    for key, g in (("v_proj", gains.value), ("out_proj", gains.output), ("", gains.mlp))
                    if key in name
                )
            bound *= gain / np.sqrt(shape[1])
        # The recipe's names carry the prefix that older checkpoints have.
        full = name if name.startswith("vision_model.") else f"vision_model.{name}"
        return draw(full, gains.seed, shape, bound, offset)

    parameters = dict(tower.named_parameters())
    with ThreadPoolExecutor() as pool:  # numpy draws without holding the interpreter
        values = pool.map(drawn, parameters, [tuple(p.shape) for p in parameters.values()])
        for parameter, value in zip(parameters.values(), values, strict=True):
            parameter.copy_(value)


def draw(name: str, seed: int, shape: tuple[int, ...], bound: float, offset: float = 0.0) -> Tensor:
    """offset + bound * uniform(-1, 1), a function of the name and the seed."""
    stream = np.random.RandomState((seed * 1000003 + zlib.crc32(name.encode())) % 2**32)
    values = stream.random_sample(shape)
    values *= 2
    values -= 1
    values *= bound
    values += offset
    return torch.from_numpy(values.astype(np.float32))


def random_pixels(config: Any, batch: int, seed: int = 33) -> Tensor:
    """Normalised pixels [B, 3, S, S], uniform noise."""
    size: Any = config.image_size
    return draw("pixel_values", seed, (batch, 3, size, size), 1.8)


REAL: dict[str, tuple] = {
    "llava-1.5-7b": (clip_large(), llama_7b(), 1, (192, 128, 64), PAPER, "Llava"),
    "llava-next-7b": (clip_large(), llama_7b(), 5, (640, 320, 160), PAPER, "LlavaNext"),
    "llava-onevision-7b": (siglip_so400m(), _qwen2_7b(), 5, (1820, 910, 365), PAPER_MEAN, "LlavaOnevision"),
}


def twin(model: Any) -> Any:
    """A second instance on the same parameters, so that stock and patched model can be timed in turns."""
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


class NoInit(TorchFunctionMode):
    """Skips drawing initial weights that are overwritten anyway (300 M normals take seconds)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return function(*args, **(kwargs or {}))
