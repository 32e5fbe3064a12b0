"""All policies on one model at the same average number of tokens: time by part, memory, and what choosing costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cost import cost
from ..models import patch, patched, trace
from ..policies.base import Policy
from ..trace import Stage
from .contenders import NAMES, contender
from .free import FreeSelection
from .prefill import PARTS, TEXT, cpu_shape, prompts, runs_of
from .quality import unreachable
from .report import Section
from .shapes import Shape, quarter_llava, real, twin
from .timing import Clock, Run, Samples, interleave

Tick = Callable[..., object]
STOCK = "stock"


def shape_for(device: torch.device | str, toy: bool = False) -> Shape:
    """LLaVA-1.5-7B on a GPU, a quarter of its width elsewhere; or a toy with layers enough to prune between."""
    if toy:
        small = dict(hidden_size=64, intermediate_size=128, num_attention_heads=1)
        vision, text = small | dict(image_size=112), small | dict(num_key_value_heads=1, vocab_size=64)
        return cpu_shape(6, 8, (24, 8), vision, text)
    return real("llava-1.5-7b") if torch.device(device).type == "cuda" else quarter_llava()


def measure(
    *,
    device: torch.device | str = "cpu",
    shape: Shape,
    dtype: torch.dtype = torch.bfloat16,
    batches: Sequence[int] = (1,),
    tokens: Sequence[int],
    policies: Sequence[str] = NAMES,
    steps: int = 4,
    repeats: int = 5,
    backend: str | None = None,
    command: str = "flowcut-bench compare",
    tick: Tick = lambda label, share=None: None,
) -> Section:
    """A LLaVA of that shape, an image and 32 words per prompt, under one policy after the other in every round.

    Args:
        shape: of one view.
        tokens: averages over the language model's layers.
        policies: names of :func:`~flowcut_kernels.bench.contenders.contender`.
        steps: decoded tokens per repeat.
    """
    device = torch.device(device)
    tick("making the model")
    stock = shape.build(device, dtype)
    layers = shape.text.num_hidden_layers
    millions = sum(p.numel() for p in stock.model.language_model.parameters()) / 1e6
    rows, cells = [], [(name, budget) for budget in tokens for name in policies]
    for batch in batches:
        given = prompts(stock, shape, batch)
        arena = Arena(stock, shape, given["input_ids"], given["pixel_values"], backend)
        rows += arena.run(cells, steps, repeats, tick)
    return Section(
        "policies",
        f"All policies at equal average tokens: {shape.name}",
        command,
        rows,
        facts=dict(model=shape.name, patches=shape.patches, text_layers=layers, text_parameters_millions=millions,
                   prompt_words=TEXT, decode_steps=steps, repeats=repeats),
        notes=[
            f"an image and {TEXT} words per prompt; language model of {layers} layers, {millions:,.3g} M parameters, "
            "random weights; stock on SDPA; all in turns",
            "kept: visual tokens among the keys of a layer of the language model, mean over its layers",
            "encoder: with projector; 1st token: encoder, projector and prefill; a token: decoding on the cache that "
            "prefill left; memory: peak up to the 1st token beyond the weights, on CUDA",
            "choosing: time of the 1st token beyond that of the same counts in every layer with rows given for free, "
            "which neither scores nor merges; FLOPs: of matrix products at these counts, choosing left out",
            "checked first: the tokens that every layer's cache holds, and, unless a policy merges tokens inside the "
            "language model, the first logits against stock layers from whose rows the same tokens are cut",
            *dict.fromkeys(unreachable(rows)),
        ],
        failed=[f"{row['policy']}, {row['tokens']} tokens: {row['refcheck']}" for row in rows if not row["ok"]],
    )  # fmt: skip


@dataclass
class Arena:
    """The stock model and a batch of prompts, which every policy is given."""

    stock: Any
    shape: Shape
    ids: Tensor  # int64 [B, image and words]
    pixels: Tensor  # [B, 3, S, S]
    backend: str | None

    def run(self, cells: Sequence[tuple[str, int]], steps: int, repeats: int, tick: Tick) -> list[dict[str, Any]]:
        """Rows of the stock model and of the (policy, average) `cells`, in this order."""
        batch, patches = len(self.ids), self.shape.patches
        common = dict(model=self.shape.name, dtype=str(self.stock.dtype).removeprefix("torch."), batch=batch,
                      stock_tokens=patches)  # fmt: skip
        stock = common | dict(policy=STOCK, tokens=patches, average=float(patches))
        rows, runs = [stock | dict(ok=True, refcheck="ok")], {}
        runs[0] = self._runs(self.stock, rows[0], steps)
        for number, (name, tokens) in enumerate(cells, 1):
            tick(f"B={batch} check {name} {tokens}", (number - 1) / len(cells))
            row = common | dict(policy=name, tokens=tokens, ok=True, refcheck="ok")
            rows.append(row)
            try:
                policy = contender(name, tokens, self.shape.text.num_hidden_layers, patches)
            except ValueError as error:
                row["unreachable"] = str(error)
                continue
            try:
                entered = self._enter(policy, row, steps)
            except Exception as error:  # one policy must not cost the others
                row |= dict(ok=False, refcheck=f"FAILED: {type(error).__name__}: {error}")
                continue
            if entered is not None:
                runs[number] = entered
        every = {f"{number} {part}": run for number, parts in runs.items() for part, run in parts.items()}
        done = 0

        def round_done() -> None:
            nonlocal done
            done += 1
            tick(f"B={batch} round {done} of {repeats}", done / repeats)

        tick(f"B={batch} warm-up", 0.0)
        times = interleave(every, repeats=repeats, clock=Clock(self.pixels.device), warmup=1, tick=round_done)
        for number in runs:
            rows[number] |= _figures(times, number, steps)
        return rows

    def read(self, model: Any) -> Any:
        """The prompts up to their first token."""
        return model(input_ids=self.ids, pixel_values=self.pixels, use_cache=True, logits_to_keep=1)

    def _enter(self, policy: Policy, row: dict[str, Any], steps: int) -> dict[str, Run] | None:
        """What is timed of a policy; None where the check of it fails, as `row` then says."""
        layers, patches = self.shape.text.num_hidden_layers, self.shape.patches
        row |= dict(
            settings=str(policy), average=policy.average_tokens(layers, patches),
            layers=policy.tokens_by_layer(layers, patches),
        )  # fmt: skip
        model, free = twin(self.stock), twin(self.stock)
        with patched(model, policy, record=True, backend=self.backend):
            problem, stages = self.refcheck(model, policy)
        like = FreeSelection.like(policy, stages, self.pixels.device)
        patch(free, like, backend=self.backend)
        if problem == "ok":
            with torch.inference_mode():
                held = held_by(self.read(free).past_key_values)
            problem = "ok" if held == row["layers"] else f"rows given for free: {differing(held, row['layers'])}"
        if problem != "ok":
            row |= dict(ok=False, refcheck=f"FAILED: {problem}")
            return None
        predicted = cost(self.stock, like, dict(input_ids=self.ids, pixel_values=self.pixels))
        row |= dict(flop_ratio=predicted.pruned.flops / predicted.full.flops)
        return self._runs(patch(model, policy, backend=self.backend), row, steps) | dict(free=partial(self.read, free))

    def _runs(self, model: Any, row: dict[str, Any], steps: int) -> dict[str, Run]:
        """What is timed of a model; its memory is noted in `row`."""
        runs, held = runs_of(model, dict(input_ids=self.ids, pixel_values=self.pixels), steps)
        row |= held
        return runs

    @torch.inference_mode()
    def refcheck(self, model: Any, policy: Policy) -> tuple[str, list[Stage]]:
        """ "ok" or what differs from what the policy says it does, and the cuts of a model that records them."""
        output = self.read(model)
        stages = list(trace(model).stages)
        wanted = policy.tokens_by_layer(self.shape.text.num_hidden_layers, self.shape.patches)
        held = held_by(output.past_key_values)
        if held != wanted:
            return differing(held, wanted), stages
        inside = [stage for stage in stages if stage.name == "llm"]
        if any(stage.recycled is not None for stage in inside):
            return "ok", stages
        logits = self._textbook(model, policy, stages)
        error = ((output.logits[:1] - logits).abs().max() / logits.abs().max()).item()
        allowed = max(100 * torch.finfo(torch.float32).eps, 8 * torch.finfo(logits.dtype).eps)
        return ("ok" if error <= allowed else f"the first logits differ by {error:.1e}"), stages

    def _textbook(self, model: Any, policy: Policy, stages: Sequence[Stage]) -> Tensor:
        """Logits [1, 1, V] of the first prompt: stock layers on all their rows, of which the cuts take theirs.

        It goes on from the features that the patched `model` made.
        """
        decoder, device = self.stock.model.language_model, self.pixels.device
        layers, patches = len(decoder.layers), self.shape.patches
        chosen = {stage.layer: stage.indices[0, : stage.kept[0]] for stage in stages if stage.name == "llm"}
        before = [stage.indices[0, : stage.kept[0]] for stage in stages if stage.name != "llm"]
        where = before[-1] if before else torch.arange(patches, device=device)  # tokens of the image that are left
        visual = next(iter(model.get_image_features(self.pixels).pooler_output))[None]
        hidden = torch.cat([visual, self.stock.get_input_embeddings()(self.ids[:1, -TEXT:])], 1)
        columns = torch.arange(hidden.shape[1], device=device)[None]
        for number, layer in enumerate(decoder.layers):
            rows = None
            if number in chosen:
                words = torch.arange(len(where), hidden.shape[1], device=device)
                rows, where = torch.cat([torch.searchsorted(where, chosen[number]), words]), chosen[number]
            enters = policy.decoder_entry(number, layers, patches, patches) is not None
            if rows is not None and enters:
                hidden, columns = hidden[:, rows], columns[:, rows]
            hidden = layer(hidden, attention_mask=None, position_embeddings=decoder.rotary_emb(hidden, columns))
            if rows is not None and not enters:
                hidden, columns = hidden[:, rows], columns[:, rows]
        return self.stock.lm_head(decoder.norm(hidden[:, -1:]))


def held_by(cache: Any) -> list[int]:
    """Visual tokens of a prompt that each layer of a cache holds."""
    return [layer.keys.shape[2] - TEXT for layer in cache.layers]


def differing(held: list[int], wanted: list[int]) -> str:
    """Where the layers of a cache do not hold what a policy says."""
    layer = next(i for i, (a, b) in enumerate(zip(held, wanted, strict=True)) if a != b)
    return f"layer {layer} holds {held[layer]} visual tokens, not {wanted[layer]}"


def _figures(times: Mapping[str, Samples], number: int, steps: int) -> dict[str, Any]:
    """The timed figures of a row, and how many times faster than row 0 it is."""
    found: dict[str, Any] = {}
    for part in PARTS:
        samples, stock = times[f"{number} {part}"], times[f"0 {part}"]
        found[f"{part}_seconds"] = samples.median / (steps if part == "decode" else 1)
        found[f"{part}_spread"] = samples.spread
        name = "speedup" if part == "first" else f"{part}_speedup"
        found |= _with_quartiles(name, stock.per(samples))
    found["llm_seconds"] = max(found["first_seconds"] - found["encoder_seconds"], 0.0)
    if number:
        pairs = list(zip(times[f"{number} first"].values, times[f"{number} free"].values, strict=True))
        found |= _with_quartiles("choosing_seconds", Samples([first - free for first, free in pairs]))
        found |= _with_quartiles("choosing", Samples([1 - free / first for first, free in pairs]))
    return found


def _with_quartiles(name: str, samples: Samples) -> dict[str, float]:
    low, high = samples.quartiles
    return {name: samples.median, f"{name}_low": low, f"{name}_high": high}
