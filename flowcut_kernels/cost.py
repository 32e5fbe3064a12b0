"""What a forward pass costs with and without pruning: tokens by layer, FLOPs, bytes of KV cache, all by formula.

FLOPs are those of matrix products, two per multiply-add, of padding too. Attention counts every query by every key, as
``torch.utils.flop_counter`` does; a causal kernel does about half of that. Norms, softmax, rotary tables and
element-wise work are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ._ops import Select
from .models import adapter_of
from .models._prompt import PrunedForward
from .modules.decoder import VisualTokens
from .modules.encoder import PrunedEncoder, PrunedEncoderLayer
from .policies.base import EncoderStep, Policy, is_whole

# Matrices of hidden by intermediate in an MLP, for the families whose layers the formulas describe.
_MLP_MATRICES = dict(clip_vision_model=2, siglip_vision_model=2, llama=3, mistral=3, qwen2=3)


@dataclass(frozen=True)
class Schedule:
    """Rows of an image or a prompt at each layer that runs: `entering` see K and V, `leaving` everything else."""

    entering: tuple[int, ...] = ()
    leaving: tuple[int, ...] = ()

    @staticmethod
    def stock(layers: int, rows: int) -> Schedule:
        return Schedule((rows,) * layers, (rows,) * layers)

    @staticmethod
    def cut(layers: int, rows: int, kept_after: Mapping[int, int]) -> Schedule:
        """`kept_after`: layer -> rows that its output holds, for the layers that prune."""
        entering, leaving, live = [], [], rows
        for layer in range(layers):
            entering.append(live)
            live = kept_after.get(layer, live)
            leaving.append(live)
        return Schedule(tuple(entering), tuple(leaving))

    def __str__(self) -> str:
        return ", ".join(f"{rows} x {len(list(same))}" for rows, same in groupby(self.leaving))


@dataclass(frozen=True)
class Side:
    """What one forward pass over a prompt costs, all its images and samples together."""

    encoder: Schedule  # of one image, class token included
    decoder: Schedule  # of one sample: text, visual tokens and padding; empty for a bare tower
    encoder_flops: int  # patch embedding, layers, choosing tokens, pooling head
    projector_flops: int
    prefill_flops: int  # layers, choosing tokens, output head
    scoring_flops: int  # choosing tokens: included in encoder and prefill
    kv_bytes: int  # keys and values once the prompt is read, of the key heads alone (GQA)

    @property
    def flops(self) -> int:
        return self.encoder_flops + self.projector_flops + self.prefill_flops


@dataclass(frozen=True)
class Cost:
    """The stock model and the pruned one on the same prompt; ``print`` shows a table."""

    full: Side
    pruned: Side
    entropy: float | None  # assumed where the policy's counts depend on the image, else None

    @property
    def flops_saved(self) -> float:
        """Share of the FLOPs of encoder, projector and prefill."""
        return _saved(self.full.flops, self.pruned.flops)

    @property
    def kv_saved(self) -> float:
        """Share of the KV cache."""
        return _saved(self.full.kv_bytes, self.pruned.kv_bytes)

    def __str__(self) -> str:
        lines = [f"{'':10}{'full':>18}{'pruned':>18}{'saved':>9}"]
        for name, field, unit, scale in (
            ("encoder", "encoder_flops", "GFLOP", 1e9),
            ("projector", "projector_flops", "GFLOP", 1e9),
            ("prefill", "prefill_flops", "GFLOP", 1e9),
            ("total", "flops", "GFLOP", 1e9),
            ("KV cache", "kv_bytes", "MiB", 2**20),
        ):
            full, pruned = getattr(self.full, field), getattr(self.pruned, field)
            sizes = [f"{x / scale:,.1f} {unit}" for x in (full, pruned)]
            lines.append(f"{name:10}{sizes[0]:>18}{sizes[1]:>18}{_saved(full, pruned):>9.1%}")
        lines.append(f"choosing tokens (included): {self.pruned.scoring_flops / 1e9:.3f} GFLOP")
        lines.append(f"rows per image after the encoder's layers: {self.pruned.encoder}; full {self.full.encoder}")
        if self.full.decoder.leaving:
            lines.append(f"rows per prompt after the decoder's layers: {self.pruned.decoder}; full {self.full.decoder}")
        if self.entropy is not None:
            lines.append(f"assumed: an entropy ratio of {self.entropy} at every layer of the encoder")
        return "\n".join(lines)


def cost(
    model: nn.Module,
    policy: Policy,
    inputs: Mapping[str, Any] | Tensor,
    *,
    compact_cache: bool = False,
    logits_to_keep: int = 1,
    entropy: float = 0.9,
) -> Cost:
    """Predict what a prompt costs up to its first token, with `policy` and without. Nothing is run.

    Args:
        model: an instance of one of :func:`supported_models`, patched or not. Its weights are not looked at: the meta
            device will do.
        policy: as for :func:`patch`.
        inputs: processor output for the unpruned model, or pixel values for a bare tower. Of the pixels only the shape
            counts; ids and attention mask tell images, text and padding apart.
        compact_cache: as for :func:`patch`.
        logits_to_keep: columns of a sample that the output head sees, as in the model's ``forward``: 1 is what
            ``generate`` asks for, 0 (all) the default of ``forward``.
        entropy: entropy ratio, 0..1, assumed at every layer for an adaptive policy, whose counts inside the encoder
            depend on the image (what it ends with does not). 1 is the most it can cost; 0.9 costs about as much as
            a class token whose entropy falls from 0.99 to 0.65 with depth, as in FlowCut's paper. Not used where the
            policy has a schedule: ``cost(model, calibrate(model, policy, inputs), inputs)`` is exact for one image.

    Returns:
        :class:`Cost`. The KV cache is a ``DynamicCache`` in the model's dtype.

    Raises:
        TypeError: an unsupported model class, something that is no policy, or inputs of another type.
        ValueError: inputs without images or not for the unpruned model, a number out of its range, what `patch`
            refuses, or layers of a family that the formulas do not describe.
    """
    arguments = {"pixel_values": inputs} if isinstance(inputs, Tensor) else inputs
    if not isinstance(arguments, Mapping):
        raise TypeError(f"cost: inputs is {type(inputs).__name__}; give processor output")
    if arguments.get("pixel_values") is None:
        raise ValueError("cost: inputs holds no pixel_values; give images")
    if not 0 <= entropy <= 1:
        raise ValueError(f"cost: entropy={entropy} must lie in 0..1")
    if not is_whole(logits_to_keep) or logits_to_keep < 0:
        raise ValueError(f"cost: logits_to_keep={logits_to_keep!r} must be a number of columns, 0 for all")
    # What `patch` would install knows which layers run and what is left of a prompt.
    encoder, replacements = adapter_of(model, policy).replacements(
        model, policy, record=False, backend=None, compact_cache=compact_cache
    )
    runs = sum(isinstance(new, PrunedEncoderLayer) for _, _, new in replacements)
    forward = next((new for _, _, new in replacements if isinstance(new, PrunedForward)), None)
    images, vision = arguments["pixel_values"].shape[0], _config(encoder.encoder)
    schedule, scoring, adapts = _walk_encoder(encoder, runs, entropy)
    stock = Schedule.stock(len(encoder.layers), schedule.entering[0])
    full = Side(stock, Schedule(), images * encoder_flops(vision, stock), 0, 0, 0, 0)
    looks = images * scoring
    pruned = Side(schedule, Schedule(), images * encoder_flops(vision, schedule) + looks, 0, 0, looks, 0)
    if forward is not None:
        full, pruned = _with_language_model(
            full, pruned, policy, forward, dict(arguments), compact=compact_cache, logits_to_keep=logits_to_keep
        )
    return Cost(full, pruned, entropy if adapts else None)


def layer_flops(config: Any, entering: int, leaving: int) -> int:
    """FLOPs of one layer that N rows enter and M leave, D hidden, H heads and G key heads of d, I intermediate.

    2 N D G d for each of K and V - 2 M D H d for each of Q and output projection - 2 M N H d for each of the two
    attention products - 2 M D I for each matrix of the MLP.

    Args:
        config: of a CLIP or SigLIP tower, or of a Llama, Mistral or Qwen2.
    """
    hidden, (width, key_width) = config.hidden_size, _widths(config)
    mlp = _MLP_MATRICES[config.model_type] * config.intermediate_size
    return 4 * entering * hidden * key_width + leaving * (4 * hidden * width + 4 * entering * width + 2 * hidden * mlp)


def encoder_flops(config: Any, schedule: Schedule) -> int:
    """FLOPs of a vision tower for one image; scoring is not counted.

    Patch embedding 2 P D (C p p) - the layers - the pooling head of a SigLIP tower, whose single query attends to all.
    """
    hidden = config.hidden_size
    flops = 2 * _patches(config) * hidden * config.num_channels * config.patch_size**2
    flops += sum(layer_flops(config, *rows) for rows in zip(schedule.entering, schedule.leaving, strict=True))
    if config.model_type == "siglip_vision_model" and getattr(config, "vision_use_head", True):
        flops += layer_flops(config, schedule.leaving[-1], 1)
    return flops


def projector_flops(vision: Any, text: Any, rows: int) -> int:
    """FLOPs of LLaVA's projector: 2 n D_v D_t and 2 n D_t D_t."""
    return 2 * rows * text.hidden_size * (vision.hidden_size + text.hidden_size)


def decoder_flops(config: Any, schedule: Schedule, logits: int = 1) -> int:
    """FLOPs of a language model for one prompt: its layers, and 2 D V for each of the columns the output head sees."""
    layers = sum(layer_flops(config, *rows) for rows in zip(schedule.entering, schedule.leaving, strict=True))
    return layers + 2 * logits * config.hidden_size * config.vocab_size


def kv_bytes(config: Any, rows: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one prompt whose cache holds `rows` by layer."""
    return sum(rows) * 2 * _widths(config)[1] * dtype.itemsize


def _widths(config: Any) -> tuple[int, int]:
    """Columns of all query heads, and of all key heads."""
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * dim, (getattr(config, "num_key_value_heads", None) or heads) * dim


def _patches(config: Any) -> int:
    return (config.image_size // config.patch_size) ** 2


def _config(model: Any) -> Any:
    config = model.config
    if config.model_type not in _MLP_MATRICES:
        raise ValueError(
            f"cost: no formula for layers of model_type={config.model_type!r}; there are {', '.join(_MLP_MATRICES)}"
        )
    return config


def _saved(full: int, pruned: int) -> float:
    return 1 - pruned / full if full else 0.0


def _walk_encoder(encoder: PrunedEncoder, runs: int, entropy: float) -> tuple[Schedule, int, bool]:
    """Rows of one image by layer, FLOPs of choosing them, and whether `entropy` mattered."""
    policy, config, protect = encoder.policy, _config(encoder.encoder), encoder.protect
    patches = live = _patches(config)
    cuts: dict[int, int] = {}
    scoring, adapts = 0, False
    for layer in range(runs):
        step = policy.encoder_step(layer, encoder.feature_layer, patches)
        if step is None or (cuts and live <= policy.encoder_budget(patches)):
            continue
        scoring += policy.encoder_scoring_flops(step, live, protect, config.hidden_size)
        if step.prunes:
            adapts |= _adapts(step)
            live = _kept(step, live, entropy)
            cuts[layer] = protect + live
    return Schedule.cut(runs, protect + patches, cuts), scoring, adapts


def _adapts(step: EncoderStep) -> bool:
    return step.mode in (Select.ADAPTIVE, Select.ADAPTIVE_BATCH) and step.divisor > 0


def _kept(step: EncoderStep, live: int, entropy: float) -> int:
    """Patches that a cut leaves of `live`, by the rule of `score_select`."""
    if not _adapts(step):
        return min(step.budget, live)
    return max(live - round((live - step.budget) / step.divisor * (1 - entropy**2)), step.budget)


def _with_language_model(
    full: Side,
    pruned: Side,
    policy: Policy,
    forward: PrunedForward,
    arguments: dict[str, Any],
    *,
    compact: bool,
    logits_to_keep: int,
) -> tuple[Side, Side]:
    """Both sides with projector, language model and cache; `forward` is what a patched model would run."""
    ids = arguments.get("input_ids")
    if ids is None:
        raise ValueError("cost: inputs holds no input_ids; give processor output")
    model, language = forward.model, forward.model.model.language_model
    vision, text, layers = model.config.vision_config, _config(language), len(language.layers)
    (samples, columns), images, patches = ids.shape, len(arguments["pixel_values"]), _patches(vision)
    window = getattr(text, "sliding_window", None)
    if window is not None and window < columns:
        raise ValueError(f"cost: {columns} columns do not fit text_config.sliding_window={window}: set it None")
    if policy.feature_budget(patches) is None:  # to ask further would run the encoder
        raise ValueError(f"cost: how many tokens {policy} keeps is known only once they are chosen")
    given = forward.shrinker.visuals(arguments)
    for visuals in given:
        counts = (ids == visuals.token_id).sum(1).tolist()
        if sum(counts) != sum(visuals.full):
            raise ValueError(
                f"cost: input_ids hold {counts} image placeholders per row for {len(visuals.full)} image(s) of "
                f"{sum(visuals.full)} together; give the processor's output for the unpruned model"
            )
    forward.shrink(arguments)
    visual, left = forward.visual_tokens(arguments), arguments["input_ids"].shape[1]
    assert visual is not None
    cuts, looks = _walk_decoder(policy, text, layers, left, visual)

    def extended(side: Side, rows: Schedule, patches: int, looks: int, compact: bool) -> Side:
        logits = min(logits_to_keep or columns, rows.leaving[-1])
        held = (rows.leaving[-1],) * layers if compact else rows.entering
        return replace(
            side,
            decoder=rows,
            projector_flops=projector_flops(vision, text, images * (patches + given[0].leading)),
            prefill_flops=samples * decoder_flops(text, rows, logits) + looks,
            scoring_flops=side.scoring_flops + looks,
            kv_bytes=samples * kv_bytes(text, held, model.dtype),
        )

    full = extended(full, Schedule.stock(layers, columns), patches, 0, False)
    return full, extended(pruned, Schedule.cut(layers, left, cuts), policy.encoder_budget(patches), looks, compact)


def _walk_decoder(
    policy: Policy, text: Any, layers: int, columns: int, visual: VisualTokens
) -> tuple[dict[int, int], int]:
    """Rows of a sample after each cut, and FLOPs of choosing them for all samples. As `DecoderState.make_cut`."""
    width, key_width = _widths(text)
    rows, left, live, gaps = columns, visual.lengths, visual.live.sum(1).tolist(), False
    owners = visual.samples.tolist()
    cuts: dict[int, int] = {}
    scoring = 0
    for layer in range(layers):
        steps = [policy.decoder_step(layer, layers, full, now) for full, now in zip(visual.full, left, strict=True)]
        kept = [now if step is None else min(step, now) for step, now in zip(steps, left, strict=True)]
        if kept == left:
            continue
        looks = len(left) * policy.decoder_scoring_flops(max(left), width, key_width)
        if looks:  # and the query of each sample's last instruction token
            scoring += looks + len(live) * 2 * text.hidden_size * width
        lost = [0] * len(live)
        for sample, now, then in zip(owners, left, kept, strict=True):
            lost[sample] += now - then
        live = [rows - gone for rows, gone in zip(live, lost, strict=True)]
        gaps = gaps or len(set(lost)) > 1  # samples of different length are padded anew
        cuts[layer] = rows = max(live) if gaps else rows - lost[0]
        left = kept
    return cuts, scoring
