"""What a forward pass costs with and without pruning: tokens by layer, FLOPs, bytes of KV cache, all by formula.

FLOPs are those of matrix products, two per multiply-add, of padding too. Attention counts every query by every key, as
``torch.utils.flop_counter`` does; a causal kernel does about half of that. What a kernel computes twice rather than
keep (`received_attention`) counts twice. Norms, softmax, rotary tables and element-wise work are left out.
"""

from __future__ import annotations

import math
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
from .modules.encoder import EncoderPass, PrunedEncoder, PrunedEncoderLayer
from .modules.packed_encoder import PackedEncoder
from .policies.base import EncoderStep, Policy, is_whole

# Matrices of hidden by intermediate in an MLP, for the families whose layers the formulas describe.
_MLP_MATRICES = dict(clip_vision_model=2, siglip_vision_model=2, llama=3, mistral=3, qwen2=3)


@dataclass(frozen=True)
class Schedule:
    """Rows of an image or a prompt at each layer that runs: `entering` see K and V, `leaving` everything else."""

    entering: tuple[int, ...] = ()
    leaving: tuple[int, ...] = ()
    merging: frozenset[int] = frozenset()  # layers that run on all that enter, and whose output is merged

    @staticmethod
    def stock(layers: int, rows: int) -> Schedule:
        """All `rows` at each of `layers`."""
        return Schedule((rows,) * layers, (rows,) * layers)

    @staticmethod
    def cut(
        layers: int, rows: int, kept_after: Mapping[int, int], kept_before: Mapping[int, int] | None = None
    ) -> Schedule:
        """`kept_after`, `kept_before`: layer -> rows that its output holds or that enter it, where it prunes."""
        entering, leaving, live = [], [], rows
        for layer in range(layers):
            live = (kept_before or {}).get(layer, live)
            entering.append(live)
            live = kept_after.get(layer, live)
            leaving.append(live)
        return Schedule(tuple(entering), tuple(leaving))

    @property
    def layers(self) -> list[tuple[int, int]]:
        """Rows that enter each layer, and those that it computes."""
        pairs = zip(self.entering, self.leaving, strict=True)
        return [(rows, rows if i in self.merging else left) for i, (rows, left) in enumerate(pairs)]

    def __str__(self) -> str:
        return ", ".join(f"{rows} x {len(list(same))}" for rows, same in groupby(self.leaving))


_Walk = tuple[Schedule, int, bool]  # through an encoder: rows, FLOPs of choosing them, whether entropy mattered


@dataclass(frozen=True)
class Side:
    """What one forward pass over a prompt costs, all its images and samples together."""

    encoder: Schedule  # of one image, class token included; of tiles that differ, the longest (of the first kind)
    decoder: Schedule  # of one sample: text, visual tokens and padding; empty for a bare tower
    encoder_flops: int  # patch embedding, layers, choosing tokens, pooling head
    projector_flops: int
    prefill_flops: int  # layers, choosing tokens, output head
    scoring_flops: int  # choosing tokens: included in encoder and prefill
    kv_bytes: int  # keys and values once the prompt is read, of the key heads alone (GQA)

    @property
    def flops(self) -> int:
        """Of encoder, projector and prefill together."""
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
        :class:`Cost`. The KV cache is a ``DynamicCache`` in the language model's dtype.

    Raises:
        TypeError: an unsupported model class, something that is no policy, or inputs of another type.
        ValueError: inputs without images or not for the unpruned model, a number out of its range, what `patch`
            refuses, or layers of a family that the formulas do not describe.
    """
    arguments = {"pixel_values": inputs} if isinstance(inputs, Tensor) else inputs
    if not isinstance(arguments, Mapping):
        raise TypeError(f"cost: inputs is {type(inputs).__name__}; give processor output")
    if not 0 <= entropy <= 1:
        raise ValueError(f"cost: entropy={entropy} must lie in 0..1")
    if not is_whole(logits_to_keep) or logits_to_keep < 0:
        raise ValueError(f"cost: logits_to_keep={logits_to_keep!r} must be a number of columns, 0 for all")
    # What `patch` would install knows which layers run and what is left of a prompt.
    encoder, replacements = adapter_of(model, policy).replacements(
        model, policy, record=False, backend=None, compact_cache=compact_cache
    )
    if isinstance(encoder, PackedEncoder):
        raise ValueError(
            f"cost: no formula for {type(model).__name__}, whose encoder reads images of any size in one sequence"
        )
    _config(encoder.encoder)
    layers = {*encoder.layers}  # of one tower, where there are two alike
    runs = sum(isinstance(new, PrunedEncoderLayer) and module in layers for module, _, new in replacements)
    forward = next((new for _, _, new in replacements if isinstance(new, PrunedForward)), None)
    prompt = None if forward is None else _Prompt.read(forward, encoder, arguments)
    passes = [_bare_pass(encoder, arguments)] if prompt is None else prompt.passes

    walks = [_walk_encoder(encoder, runs, entropy, asked) for asked in passes]
    stock = Schedule.stock(len(encoder.layers), encoder.protect + _patches(encoder.encoder.config))
    stocks = [(stock, 0, False)] * len(passes)
    full, pruned = _encoded(encoder, passes, stocks), _encoded(encoder, passes, walks)
    if prompt is not None:
        rows, looks = _walk_decoder(policy, prompt)
        every = Schedule.stock(len(rows.entering), prompt.columns)
        full = _prefilled(full, prompt, _read(prompt, stocks), every, 0, logits_to_keep, False)
        pruned = _prefilled(pruned, prompt, _read(prompt, walks), rows, looks, logits_to_keep, compact_cache)
    return Cost(full, pruned, entropy if any(adapts for *_, adapts in walks) else None)


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
    flops += sum(layer_flops(config, *rows) for rows in schedule.layers)
    if config.model_type == "siglip_vision_model" and getattr(config, "vision_use_head", True):
        flops += layer_flops(config, schedule.leaving[-1], 1)
    return flops


def projector_flops(vision: Any, text: Any, rows: int) -> int:
    """FLOPs of LLaVA's projector: 2 n D_v D_t and 2 n D_t D_t."""
    return 2 * rows * text.hidden_size * (vision.hidden_size + text.hidden_size)


def decoder_flops(config: Any, schedule: Schedule, logits: int = 1) -> int:
    """FLOPs of a language model for one prompt: its layers, and 2 D V for each of the columns the output head sees."""
    layers = sum(layer_flops(config, *rows) for rows in schedule.layers)
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


def _walk_encoder(encoder: PrunedEncoder, runs: int, entropy: float, asked: EncoderPass) -> _Walk:
    """Rows of the longest tile of a pass by layer, FLOPs of choosing them of one, and whether `entropy` mattered."""
    policy, config, protect = encoder.policy, _config(encoder.encoder), encoder.protect
    patches = _patches(config)
    state = encoder.started(asked, _tiles(asked), patches)
    live = list(state.tokens) if state.void is None else [math.prod(state.grid)] * len(state.tokens)
    before: dict[int, int] = {}
    cuts: dict[int, int] = {}
    looks, adapts, merging = 0, False, set()
    for layer in range(runs):
        step, ends = state.step(layer)
        if step is None:
            continue
        if step.prunes and live != state.tokens and not cuts:
            live = list(state.tokens)
            before[layer] = protect + state.block * max(live)
        looks += policy.encoder_scoring_flops(
            step, state.block * max(live), protect, config.hidden_size, config.num_attention_heads
        )
        if step.prunes:
            adapts |= _adapts(step)
            power = entropy ** getattr(policy, "entropy_exponent", 2.0)
            steps = [step._replace(budget=end) for end in ends or [step.budget] * len(live)]
            state.left = live = [_kept(each, n, power) for each, n in zip(steps, live, strict=True)]
            cuts[layer] = protect + state.block * max(live)
        if step.merges:
            merging.add(layer)
    rows = Schedule.cut(runs, protect + patches, cuts, before)
    return replace(rows, merging=frozenset(merging)), looks, adapts


def _adapts(step: EncoderStep) -> bool:
    return step.mode in (Select.ADAPTIVE, Select.ADAPTIVE_BATCH) and step.divisor > 0


def _kept(step: EncoderStep, live: int, power: float) -> int:
    """Patches that a cut leaves of `live`, by the rule of `score_select`; `power` of the entropy ratio."""
    if not _adapts(step):
        return min(step.budget, live)
    return max(live - round((live - step.budget) / step.divisor * (1 - power)), step.budget)


def _encoded(encoder: PrunedEncoder, passes: list[EncoderPass], walks: Sequence[_Walk]) -> Side:
    """The vision tower's part, for all images."""
    config, flops, looked = _config(encoder.encoder), 0, 0
    for asked, (rows, looks, *_) in zip(passes, walks, strict=True):
        flops += _tiles(asked) * (encoder_flops(config, rows) + looks)
        looked += _tiles(asked) * looks
    return Side(walks[0][0], Schedule(), flops, 0, 0, looked, 0)


def _tiles(asked: EncoderPass) -> int:
    return len(asked.tokens or ())


def _bare_pass(encoder: PrunedEncoder, arguments: Mapping[str, Any]) -> EncoderPass:
    if arguments.get("pixel_values") is None:
        raise ValueError("cost: inputs holds no pixel_values; give images")
    return EncoderPass(tokens=[_patches(encoder.encoder.config)] * len(arguments["pixel_values"]))


@dataclass
class _Prompt:
    """A batch of prompts, and what is left of it when it enters the language model."""

    model: Any
    passes: list[EncoderPass]  # what the encoder is given, and is to leave
    protect: int  # rows of each in front of its patches: a class token
    samples: int
    columns: int
    left: int  # columns
    visual: VisualTokens

    @classmethod
    def read(cls, forward: PrunedForward, encoder: PrunedEncoder, arguments: Mapping[str, Any]) -> _Prompt:
        """As a patched model's `forward` reads it.

        Raises:
            ValueError: a prompt without images, that is none of the unpruned model's, or that cannot be predicted.
        """
        ids, left = arguments.get("input_ids"), dict(arguments)
        if ids is None:
            raise ValueError("cost: inputs holds no input_ids; give processor output")
        if encoder.policy.feature_budget(_patches(encoder.encoder.config)) is None:  # looking would run the encoder
            raise ValueError(
                f"cost: how many tokens {encoder.policy} keeps is known only once they are chosen; with counts='exact' "
                "it is known before"
            )
        if not forward.shrinker.comes(left):
            raise ValueError("cost: inputs holds no pixel_values; give images")
        with forward.shrinker.reading():
            return cls._read(forward, encoder, ids, left)

    @classmethod
    def _read(cls, forward: PrunedForward, encoder: PrunedEncoder, ids: Tensor, left: dict[str, Any]) -> _Prompt:
        masks = torch.stack([ids == token_id for token_id in forward.shrinker.token_ids]).cpu()
        given = forward.shrinker.visuals(left, masks)
        for visuals in given:
            counts = (ids == visuals.token_id).sum(1).tolist()
            if sum(counts) != sum(visuals.full):
                raise ValueError(
                    f"cost: input_ids hold {counts} image placeholders per row for {len(visuals.full)} image(s) of "
                    f"{sum(visuals.full)} together; give the processor's output for the unpruned model"
                )
        forward.shrink(left)
        visual = forward.visual_tokens(left)
        assert visual is not None
        return cls(
            model=forward.model,
            passes=[asked for visuals in given if (asked := visuals.asked()) is not None],
            protect=encoder.protect,
            samples=len(ids),
            columns=ids.shape[1],
            left=left["input_ids"].shape[1],
            visual=visual,
        )


def _walk_decoder(policy: Policy, prompt: _Prompt) -> tuple[Schedule, int]:
    """Rows of a sample by layer, and FLOPs of choosing them for all samples."""
    language, visual = prompt.model.get_decoder(), prompt.visual
    text, layers = _config(language), len(language.layers)
    widths = _widths(text)
    rows, left, live, gaps = prompt.left, visual.lengths, visual.live.sum(1).tolist(), False
    tokens = [0] * prompt.samples
    for sample, count in zip(visual.samples.tolist(), left, strict=True):
        tokens[sample] += count
    words = max(rows - min(count for count in tokens if count), 1)
    entries: dict[int, int] = {}
    cuts: dict[int, int] = {}
    looks = 0
    for layer in range(layers):
        for decide, made in ((policy.decoder_entry, entries), (policy.decoder_step, cuts)):
            steps = [decide(layer, layers, full, now) for full, now in zip(visual.full, left, strict=True)]
            kept = [now if step is None else min(step, now) for step, now in zip(steps, left, strict=True)]
            if kept == left:
                continue
            chosen = len(left) * policy.decoder_scoring_flops(max(left), *widths)
            if chosen:  # with the query of each sample's last instruction token
                looks += chosen + 2 * prompt.samples * text.hidden_size * widths[0]
            asked = policy.attention_anchors(made is entries, prompt.samples, len(left), words)
            looks += 2 * asked * widths[0] * (text.hidden_size + rows)
            if asked and made is entries:  # the layer's own keys come later
                looks += 2 * prompt.samples * rows * text.hidden_size * widths[1]
            if asked and not (entries or cuts):
                looks += len(left) * policy.prompt_scoring_flops(max(left), words, text.hidden_size)
            lost = [0] * prompt.samples
            for sample, now, then in zip(visual.samples.tolist(), left, kept, strict=True):
                lost[sample] += now - then
            live = [now - gone for now, gone in zip(live, lost, strict=True)]
            gaps = gaps or len(set(lost)) > 1  # samples of different length are padded anew
            made[layer] = rows = max(live) if gaps else rows - lost[0]
            left = kept
    return Schedule.cut(layers, prompt.left, cuts, entries), looks


def _read(prompt: _Prompt, walks: Sequence[_Walk]) -> int:
    """Rows that the projector is given."""
    return sum(
        _tiles(asked) * (asked.leads + (rows.leaving[-1] - prompt.protect) // asked.side**2)
        for asked, (rows, *_) in zip(prompt.passes, walks, strict=True)
    )


def _prefilled(
    side: Side, prompt: _Prompt, read: int, rows: Schedule, looks: int, logits_to_keep: int, compact: bool
) -> Side:
    """`side` with the projector, the language model and its cache."""
    language = prompt.model.get_decoder()
    vision, text = prompt.model.config.vision_config, _config(language)
    window = getattr(text, "sliding_window", None)
    if window is not None and window < rows.entering[0]:
        raise ValueError(
            f"cost: {rows.entering[0]} columns do not fit text_config.sliding_window={window}: set it None"
        )
    logits = min(logits_to_keep or prompt.columns, rows.leaving[-1])
    held = (rows.leaving[-1],) * len(rows.leaving) if compact else rows.entering
    return replace(
        side,
        decoder=rows,
        projector_flops=projector_flops(vision, text, read),
        prefill_flops=prompt.samples * decoder_flops(text, rows, logits) + looks,
        scoring_flops=side.scoring_flops + looks,
        kv_bytes=prompt.samples * kv_bytes(text, held, language.dtype),
    )
