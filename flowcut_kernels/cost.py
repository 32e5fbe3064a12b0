"""What a forward pass costs with and without pruning: tokens by layer, FLOPs, bytes of KV cache, all by formula.

FLOPs are those of matrix products, two per multiply-add, of padding too. Attention counts every query by every key, as
``torch.utils.flop_counter`` does; a causal kernel does about half of that, one that knows a language model's sliding
window less. In an encoder that packs images, pairs within an image count, or within a window where a layer has some:
the C++ attention, which pads images that were cut to different lengths, computes more. Norms, softmax, rotary tables
and element-wise work are left out, and what `received_attention` computes twice on a GPU where attention leaves no
log-sum-exp.

How many multiply-adds a row costs is how many weights the matrices have that it goes through, so that a family needs no
formula of its own: what its layers, its projector and its output head are made of is read from the modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ._ops import Select
from .models import adapter_of
from .models._bound import Replacement
from .models._prompt import PrunedForward
from .modules.decoder import VisualTokens
from .modules.encoder import EncoderPass, PrunedEncoder, PrunedEncoderLayer
from .modules.packed_encoder import PackedBlock, PackedEncoder, Segments, VisionEncoder
from .policies.base import EncoderStep, Policy, is_whole


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


@dataclass(frozen=True)
class Side:
    """What one forward pass over a prompt costs, all its images and samples together."""

    encoder: Schedule  # patches of one image, class token included; of tiles or frames that differ, the longest
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
        model: an instance of one of :func:`supported_models`, patched or not. Of its weights only the shapes are
            looked at: the meta device will do.
        policy: as for :func:`patch`.
        inputs: processor output for the unpruned model, or pixel values for a bare tower. Of the pixels only the shape
            counts, but Idefics3 and SmolVLM know filling by its zeros; ids and attention mask tell images, text and
            padding apart.
        compact_cache: as for :func:`patch`.
        logits_to_keep: columns of a sample that the output head sees, as in the model's ``forward``: 1 is what
            ``generate`` asks for, 0 (all) the default of ``forward``.
        entropy: entropy ratio, 0..1, assumed at every layer for an adaptive policy, whose counts inside the encoder
            depend on the image (what it ends with does not). 1 is the most it can cost; 0.9 costs about as much as
            a class token whose entropy falls from 0.99 to 0.65 with depth, as in FlowCut's paper. Not used where the
            policy has a schedule: ``cost(model, calibrate(model, policy, inputs), inputs)`` is exact for one image.

    Returns:
        :class:`Cost`. The KV cache is a ``DynamicCache`` in the language model's dtype; a layer with a sliding window
        holds what later tokens see, and torch frees the rest of a longer prompt's rows with the next token. What is
        left of an image is taken to be spread evenly over the windows of an encoder that has some (Qwen2.5-VL): which
        tokens stay is not known. Where ``VFlowOpt.release`` recycles, every cell is taken to come back, which is the
        most that can be left.

    Raises:
        TypeError: an unsupported model class, something that is no policy, or inputs of another type.
        ValueError: inputs without images or not for the unpruned model, a number out of its range, what `patch`
            refuses, layers with experts or whose keys come from another projection than ``k_proj`` or ``qkv``, several
            modules with matrices before the language model.
    """
    arguments = {"pixel_values": inputs} if isinstance(inputs, Tensor) else inputs
    if not isinstance(arguments, Mapping):
        raise TypeError(f"cost: inputs is {type(inputs).__name__}; give processor output")
    if not isinstance(entropy, int | float) or not 0 <= entropy <= 1:
        raise ValueError(f"cost: entropy={entropy!r} must lie in 0..1")
    if not is_whole(logits_to_keep) or logits_to_keep < 0:
        raise ValueError(f"cost: logits_to_keep={logits_to_keep!r} must be a number of columns, 0 for all")
    if not isinstance(compact_cache, bool):
        raise TypeError(f"cost: compact_cache={compact_cache!r} must be True or False")
    # What `patch` would install knows which layers run and what is left of a prompt.
    encoder, replacements = adapter_of(model, policy).replacements(
        model, policy, record=False, backend=None, compact_cache=compact_cache
    )
    vision = _Vision(model, encoder, replacements)
    forward = next((new for _, _, new in replacements if isinstance(new, PrunedForward)), None)
    prompt = None if forward is None else _Prompt.read(forward, arguments)
    passes = [vision.bare_pass(arguments)] if prompt is None else prompt.passes

    stocks = [vision.walk(asked, None) for asked in passes]
    walks = [vision.walk(asked, entropy) for asked in passes]
    full, pruned = _encoded(stocks), _encoded(walks)
    if prompt is not None:
        rows, looks = _walk_decoder(policy, prompt)
        every = Schedule.stock(len(rows.entering), prompt.columns)
        full = _prefilled(full, prompt, every, 0, logits_to_keep, False)
        pruned = _prefilled(pruned, prompt, rows, looks, logits_to_keep, compact_cache)
    return Cost(full, pruned, entropy if any(walk.adapts for walk in walks) else None)


def weights(module: Any) -> int:
    """Of all matrices of a module: multiply-adds of a row that goes through them, or of a patch through a convolution.

    Tables that rows are looked up in are none of them.
    """
    children = [*module.children()]
    if not children and hasattr(module, "in_features"):  # a quantised one's weights have another shape
        return module.in_features * module.out_features
    own = [] if isinstance(module, nn.Embedding) else module.parameters(recurse=False)
    return sum(x.numel() for x in own if x.dim() > 1) + sum(map(weights, children))


def _columns(projection: Any) -> int:
    """That a projection puts out; of what somebody put around one, such as an adapter of low rank, the most of its
    parts'."""
    found = [part.out_features for part in projection.modules() if hasattr(part, "out_features")]
    if not found:
        raise ValueError(f"cost: no formula for {type(projection).__name__}, which holds no linear layer")
    return max(found)


@dataclass(frozen=True)
class Matrices:
    """What a layer of attention and MLP is made of."""

    entering: int  # weights that every row meets that enters: those of K and V, and of Q where one matrix makes all
    leaving: int  # all others
    width: int  # columns of all query heads
    key_width: int  # of all key heads

    @classmethod
    def of(cls, layer: nn.Module) -> Matrices:
        """Those of `layer`.

        Raises:
            ValueError: a layer without projections by their usual names, or with matrices of which a row meets some.
        """
        parts = [*layer.modules()]
        attention: Any = next((x for x in parts if hasattr(x, "qkv") or hasattr(x, "k_proj")), None)
        experts = any(isinstance(x, nn.ModuleList) for x in parts) or any(x.dim() > 2 for x in layer.parameters())
        if attention is None or experts:
            raise ValueError(
                f"cost: no formula for {type(layer).__name__}, which "
                + ("has experts" if experts else "projects its keys neither by k_proj nor by qkv")
            )
        if hasattr(attention, "qkv"):
            projections, width = [attention.qkv], _columns(attention.qkv) // 3
            key_width = width
        else:
            projections = [attention.k_proj, attention.v_proj]
            width, key_width = _columns(attention.q_proj), _columns(attention.k_proj)
        entering = sum(map(weights, projections))
        return cls(entering, weights(layer) - entering, width, key_width)

    def flops(self, entering: int, leaving: int, pairs: int | None = None) -> int:
        """Of a layer that so many rows enter and leave: two for each weight that each meets, four a column of pairs.

        Args:
            pairs: of a query and a key; None: every row that leaves with every row that enters.
        """
        pairs = entering * leaving if pairs is None else pairs
        return 2 * (entering * self.entering + leaving * self.leaving) + 4 * pairs * self.width


def encoder_flops(tower: Any, schedule: Schedule, patches: int) -> int:
    """FLOPs of a vision tower for one image of so many patches; scoring is not counted.

    Patch embedding - the layers - the pooling head of a SigLIP tower, a layer whose single query attends to all.
    """
    (layers,) = (x for x in tower.encoder.children() if isinstance(x, nn.ModuleList))
    flops = 2 * patches * weights(tower.get_input_embeddings())
    for layer, rows in zip(layers, schedule.layers, strict=False):  # those behind the last that is read do not run
        flops += Matrices.of(layer).flops(*rows)
    if getattr(tower, "head", None) is not None:
        flops += Matrices.of(layers[-1]).flops(schedule.leaving[-1], 1)
    return flops


def decoder_flops(language: Any, schedule: Schedule) -> int:
    """FLOPs of the layers of a language model for one prompt."""
    return sum(Matrices.of(layer).flops(*rows) for layer, rows in zip(language.layers, schedule.layers, strict=True))


def kv_bytes(language: Any, rows: Sequence[int]) -> int:
    """Bytes of the keys and values of one prompt whose cache holds `rows` by layer, or what a sliding window leaves."""
    total = 0
    for layer, held, cached in zip(language.layers, rows, DynamicCache(config=language.config).layers, strict=True):
        window = getattr(cached, "sliding_window", None)
        total += 2 * Matrices.of(layer).key_width * (held if window is None else min(held, window - 1))
    return total * language.dtype.itemsize


def _saved(full: int, pruned: int) -> float:
    return 1 - pruned / full if full else 0.0


class _Walk(NamedTuple):
    """One pass of an encoder, all its images together."""

    rows: Schedule  # of the longest tile
    encoder_flops: int
    projector_flops: int
    looks: int  # FLOPs of choosing tokens: included
    adapts: bool  # whether `entropy` mattered


@dataclass
class _Vision:
    """A vision encoder, and what stands between it and the language model."""

    model: Any
    encoder: VisionEncoder
    replacements: list[Replacement]

    @cached_property
    def layers(self) -> list[Any]:
        """The layers that run. Where there are two towers alike, of one of them."""
        own = {*self.encoder.encoder.modules()}
        kinds = PrunedEncoderLayer, PackedBlock
        return [new for module, _, new in self.replacements if isinstance(new, kinds) and module in own]

    @cached_property
    def tower(self) -> Any:
        """The module that holds the encoder."""
        encoder = self.encoder.encoder
        return next(x for x in self.model.modules() if getattr(x, "encoder", None) is encoder)

    @cached_property
    def projector(self) -> int:
        """Weights of what is neither a vision tower nor the language model."""
        encoders = {module for module, _, new in self.replacements if isinstance(new, VisionEncoder)}
        language = self.model.get_decoder()
        others = [x for x in self.model.model.children() if x is not language and encoders.isdisjoint(x.modules())]
        made = {type(x).__name__: weights(x) for x in others if weights(x)}
        if len(made) > 1:
            raise ValueError(
                f"cost: no formula for {type(self.model).__name__} with {' and '.join(made)}: which of them images and "
                "videos go through is not known"
            )
        return sum(made.values())

    def bare_pass(self, arguments: Mapping[str, Any]) -> EncoderPass:
        """Of a tower by itself."""
        if arguments.get("pixel_values") is None:
            raise ValueError("cost: inputs holds no pixel_values; give images")
        patches = adapter_of(self.model, self.encoder.policy).patches(self.model)
        return EncoderPass(tokens=(patches,) * len(arguments["pixel_values"]))

    def walk(self, asked: Any, entropy: float | None) -> _Walk:
        """A pass; with no `entropy` that of the stock model.

        Args:
            asked: :class:`EncoderPass`, or the grids of the images of a packed encoder.
        """
        return self._frames(asked, entropy) if isinstance(self.encoder, PackedEncoder) else self._tiles(asked, entropy)

    def _tiles(self, asked: EncoderPass, entropy: float | None) -> _Walk:
        assert asked.tokens is not None and isinstance(self.encoder, PrunedEncoder)
        tiles, protect = len(asked.tokens), self.encoder.protect
        patches = asked.side**2 * (max(asked.tokens) if asked.void is None else asked.void.shape[1])
        if entropy is None:
            rows, looks, adapts = Schedule.stock(len(self.encoder.layers), protect + patches), 0, False
        else:
            rows, looks, adapts = self._cuts(self.encoder, asked, patches, entropy)
        tokens = asked.leads + (rows.leaving[-1] - protect) // asked.side**2
        projected = 0 if self.model is self.tower else 2 * tiles * tokens * self.projector
        flops = tiles * (encoder_flops(self.tower, rows, patches) + looks)
        return _Walk(rows, flops, projected, tiles * looks, adapts)

    def _cuts(
        self, encoder: PrunedEncoder, asked: EncoderPass, patches: int, entropy: float
    ) -> tuple[Schedule, int, bool]:
        """Rows of the longest tile by layer, FLOPs of choosing them of one, and whether `entropy` mattered."""
        policy, protect = encoder.policy, encoder.protect
        assert asked.tokens is not None
        state = encoder.started(asked, len(asked.tokens), patches)
        before: dict[int, int] = {}
        cuts: dict[int, int] = {}
        live = list(state.tokens) if state.void is None else [math.prod(state.grid)] * len(state.tokens)
        looks, adapts, merging = 0, False, set()
        for layer, pruned in enumerate(self.layers):
            step, ends = state.step(layer)
            leaves = (step is not None and step.prunes) or (layer == 0 and asked.masked)
            if leaves and live != state.tokens and not cuts:
                live = list(state.tokens)
                before[layer] = protect + state.block * max(live)
            if step is None:
                continue
            parts, matrices, tokens = pruned.parts_of(pruned.layer), Matrices.of(pruned.layer), state.block * max(live)
            anchor = _anchor(step, matrices, protect + tokens, parts.linear)
            heads = matrices.width // parts.attention.head_dim
            looks += policy.encoder_scoring_flops(step, tokens, protect, matrices.width, heads, anchor)
            if step.prunes:
                adapts |= _adapts(step)
                ends = ends or [step.budget] * len(live)
                live = _kept(policy, step, ends, live, entropy)
                state.leave(live)
                cuts[layer] = protect + state.block * max(live)
            if step.merges:
                merging.add(layer)
        rows = Schedule.cut(len(self.layers), protect + patches, cuts, before)
        return replace(rows, merging=frozenset(merging)), looks, adapts

    def _frames(self, grids: Tensor, entropy: float | None) -> _Walk:
        encoder, device = self.encoder, torch.device("cpu")
        assert isinstance(encoder, PackedEncoder)
        state, policy = encoder.started(grids.cpu(), device, {}), encoder.policy
        sizes = list(state.rows.segments.lengths)
        near = _shares(sizes, state.rows.windows)
        rows, longest = sizes, sizes.index(max(sizes))
        flops, projected, looks, adapts = 2 * sum(sizes) * weights(encoder.encoder.patch_embed), 0, 0, False
        entering, leaving = [], []
        for layer, pruned in enumerate(self.layers):
            matrices, left = Matrices.of(pruned.block), rows
            if entropy is not None and (made := state.step(layer)) is not None:
                step, budgets, _ = made
                heads = pruned.parts_of(pruned.block).attention.num_heads
                # The mean query is that of projected ones.
                looks += len(rows) * policy.encoder_scoring_flops(
                    step, max(rows), 0, matrices.width, heads, lambda kind: 0
                )
                if step.prunes:
                    adapts |= _adapts(step)
                    live = [n // encoder.block for n in rows]
                    left = [encoder.block * n for n in _kept(policy, step, budgets, live, entropy)]
                    state.rows = replace(state.rows, segments=Segments(tuple(left), device))
            shares = near if pruned.windowed else [1.0] * len(rows)
            pairs = sum(n * m * share for n, m, share in zip(left, rows, shares, strict=True))
            flops += matrices.flops(sum(rows), sum(left), round(pairs))
            entering.append(rows[longest])
            leaving.append(left[longest])
            rows = left
            projected += sum(2 * sum(rows) // encoder.block * weights(x) for at, x in encoder.mergers if at == layer)
        return _Walk(Schedule(tuple(entering), tuple(leaving)), flops + looks, projected, looks, adapts)


def _shares(sizes: Sequence[int], windows: Sequence[int]) -> list[float]:
    """Of each frame's pairs of rows those within a window. What is left of a frame is taken to be as evenly spread."""
    found, lengths = [], iter(windows)
    for size in sizes if windows else ():
        rows = pairs = 0
        while rows < size:
            rows, pairs = rows + (length := next(lengths)), pairs + length**2
        found.append(pairs / size**2)
    return found


def _anchor(step: EncoderStep, matrices: Matrices, rows: int, linear: bool) -> Callable[[str], int]:
    """FLOPs of the anchor that a view of so many `rows` makes."""
    one = matrices.entering  # a row's projection: half of K's and V's, two for each weight
    mean = 2 * one if linear else (rows + 1) * one  # the mean token's query, or the mean of all queries; its value
    return lambda kind: mean if kind == "mean" else one * (step.prunes and not step.merges)


def _adapts(step: EncoderStep) -> bool:
    return step.mode in (Select.ADAPTIVE, Select.ADAPTIVE_BATCH) and step.divisor > 0


def _kept(policy: Policy, step: EncoderStep, budgets: Sequence[int], live: Sequence[int], entropy: float) -> list[int]:
    """Tokens that a cut to `budgets` leaves of those that are `live`, by the rule of `score_select`."""
    if not _adapts(step):
        return [min(budget, n) for budget, n in zip(budgets, live, strict=True)]
    gone = 1 - entropy ** getattr(policy, "entropy_exponent", 2.0)
    return [max(n - round((n - budget) / step.divisor * gone), budget) for budget, n in zip(budgets, live, strict=True)]


def _encoded(walks: Sequence[_Walk]) -> Side:
    """The vision tower's part and the projector's, for all images."""
    return Side(
        encoder=walks[0].rows if walks else Schedule(),
        decoder=Schedule(),
        encoder_flops=sum(walk.encoder_flops for walk in walks),
        projector_flops=sum(walk.projector_flops for walk in walks),
        prefill_flops=0,
        scoring_flops=sum(walk.looks for walk in walks),
        kv_bytes=0,
    )


@dataclass
class _Prompt:
    """A batch of prompts, and what is left of it when it enters the language model."""

    model: Any
    passes: list[Any]  # what the encoder is given, and is to leave: as of `_Vision.walk`
    samples: int
    columns: int
    left: int  # columns
    visual: VisualTokens

    @classmethod
    def read(cls, forward: PrunedForward, arguments: Mapping[str, Any]) -> _Prompt:
        """As a patched model's `forward` reads it.

        Raises:
            ValueError: a prompt without images, or that is none of the unpruned model's.
        """
        ids, left = arguments.get("input_ids"), dict(arguments)
        if ids is None:
            raise ValueError("cost: inputs holds no input_ids; give processor output")
        if not forward.shrinker.comes(left):
            raise ValueError("cost: inputs holds no pixel_values; give images")
        for features in forward.shrinker.kinds:
            features.predicts = True
        with forward.shrinker.reading():
            return cls._read(forward, ids, left)

    @classmethod
    def _read(cls, forward: PrunedForward, ids: Tensor, left: dict[str, Any]) -> _Prompt:
        passes: list[Any] = []
        for features in forward.shrinker.kinds:
            placeholders = ids.cpu().numpy() == features.kind.token_id
            for visuals in features.visuals(left, placeholders):
                counts = placeholders.sum(1).tolist()
                if sum(counts) != sum(visuals.full):
                    raise ValueError(
                        f"cost: input_ids hold {counts} image placeholders per row for {len(visuals.full)} image(s) "
                        f"of {sum(visuals.full)} together; give the processor's output for the unpruned model"
                    )
                asked, grid = visuals.asked(), features.kind.grid
                passes += [] if asked is None else [left[grid] if grid else asked]
            features.foresee(left)
        forward.shrink(left)
        visual = forward.visual_tokens(left)
        assert visual is not None
        return cls(
            model=forward.model,
            passes=passes,
            samples=len(ids),
            columns=ids.shape[1],
            left=left["input_ids"].shape[1],
            visual=visual,
        )


def _walk_decoder(policy: Policy, prompt: _Prompt) -> tuple[Schedule, int]:
    """Rows of a sample by layer, and FLOPs of choosing them for all samples."""
    language, visual = prompt.model.get_decoder(), prompt.visual
    layers, hidden = len(language.layers), language.config.hidden_size
    rows, left, live, gaps, rated = prompt.left, visual.lengths, visual.live.sum(1).tolist(), False, False
    tokens = [0] * prompt.samples
    for sample, count in zip(visual.samples.tolist(), left, strict=True):
        tokens[sample] += count
    words = max(rows - min(count for count in tokens if count), 1)
    entries: dict[int, int] = {}
    cuts: dict[int, int] = {}
    looks = 0

    def drop(kept: list[int]) -> int:
        """Rows of a sample without the tokens beyond those `kept`; samples of different length are padded anew."""
        nonlocal left, live, gaps
        lost = [0] * prompt.samples
        for sample, now, then in zip(visual.samples.tolist(), left, kept, strict=True):
            lost[sample] += now - then
        left, live = kept, [now - gone for now, gone in zip(live, lost, strict=True)]
        gaps = gaps or len(set(lost)) > 1
        return max(live) if gaps else rows - lost[0]

    known = visual.known().kept
    if known is not None and known != left:  # the prompt has columns for what the encoder dropped
        entries[0] = rows = drop(known)
    for layer, module in enumerate(language.layers):
        matrices = Matrices.of(module)
        for decide, made in ((policy.decoder_entry, entries), (policy.decoder_step, cuts)):
            steps = [decide(layer, layers, full, now) for full, now in zip(visual.full, left, strict=True)]
            kept = [now if step is None else min(step, now) for step, now in zip(steps, left, strict=True)]
            if kept == left:
                continue
            chosen = len(left) * policy.decoder_scoring_flops(max(left), matrices.width, matrices.key_width)
            if chosen:  # with the query of each sample's last instruction token
                looks += chosen + 2 * prompt.samples * hidden * matrices.width
            asked = policy.attention_anchors(made is entries, prompt.samples, len(left), words)
            looks += 2 * asked * matrices.width * (hidden + rows)
            if asked and made is entries:  # the layer's own keys come later
                looks += 2 * prompt.samples * rows * hidden * matrices.key_width
            if asked and not rated:
                looks += len(left) * policy.prompt_scoring_flops(max(visual.lengths), words, hidden)
                rated = True
            made[layer] = rows = drop(kept)
    return Schedule.cut(layers, prompt.left, cuts, entries), looks


def _prefilled(side: Side, prompt: _Prompt, rows: Schedule, looks: int, logits_to_keep: int, compact: bool) -> Side:
    """`side` with the language model and its cache."""
    language, head = prompt.model.get_decoder(), prompt.model.get_output_embeddings()
    logits = min(logits_to_keep or prompt.columns, rows.leaving[-1])
    held = (rows.leaving[-1],) * len(rows.leaving) if compact else rows.entering
    flops = decoder_flops(language, rows) + 2 * logits * weights(head)
    return replace(
        side,
        decoder=rows,
        prefill_flops=prompt.samples * flops + looks,
        scoring_flops=side.scoring_flops + looks,
        kv_bytes=prompt.samples * kv_bytes(language, held),
    )
