"""Prompts of a patched VLM: the processor's placeholders shrink to the pruned count, and grow back in the output."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Shrunk(NamedTuple):
    """Which columns of a [B, L] prompt are left."""

    columns: Tensor  # int64 [B, L'], -1 where a row is padded
    length: int  # L

    def take(self, x: Tensor, pad: int) -> Tensor:
        """The columns of x [B, L, ...], `pad` where a row is padded."""
        index, absent = self.columns.clamp_min(0), self.columns < 0
        trailing = [1] * (x.dim() - 2)
        out = x.gather(1, index.view(*index.shape, *trailing).expand(*index.shape, *x.shape[2:]))
        return out.masked_fill(absent.view(*absent.shape, *trailing), pad)

    def removed(self, attention_mask: Tensor | None) -> Tensor:
        """Placeholders dropped before each column [B, L']: original minus new position."""
        kept = torch.zeros(len(self.columns), self.length + 1, dtype=torch.int64, device=self.columns.device)
        kept.scatter_(1, self.columns.masked_fill(self.columns < 0, self.length), 1)
        kept = kept[:, :-1]
        if attention_mask is not None:  # trimmed padding columns were never positions
            kept = kept | (attention_mask == 0).long()
        return self.take((1 - kept).cumsum(1), 0)


@dataclass(frozen=True)
class PromptShrinker:
    """Drops the placeholders that pruned features no longer fill."""

    image_token_id: int
    full: int  # placeholders per image as the processor writes them
    kept: int  # features per image after pruning

    def shrink(self, is_image: Tensor, attention_mask: Tensor | None, images: int | None) -> Shrunk | None:
        """The columns to keep of a prompt, or None where nothing has to go.

        Args:
            is_image: bool [B, L], placeholders.
            attention_mask: [B, L] or None.
            images: images given with the prompt; None when unknown (a later turn, whose images are in the cache).

        Raises:
            ValueError: a placeholder count that fits neither the full nor the pruned images.
        """
        counts = is_image.sum(1).tolist()
        if self.kept == self.full or not any(counts):
            return None

        def fits(per_image: int) -> bool:
            total = images is None or sum(counts) == images * per_image
            return total and all(count % per_image == 0 for count in counts)

        if not fits(self.full):
            if fits(self.kept):
                return None
            given = "" if images is None else f" for {images} image(s)"
            raise ValueError(
                f"input_ids hold {counts} image placeholders per row{given}; each image needs {self.full} (the "
                f"processor's output) or {self.kept} (already pruned), id {self.image_token_id}"
            )
        if attention_mask is not None and attention_mask.shape != is_image.shape:
            raise ValueError(
                f"attention_mask must be {tuple(is_image.shape)} like input_ids, got {tuple(attention_mask.shape)}"
            )
        keep = ~(is_image & ((is_image.cumsum(1) - 1) % self.full >= self.kept))
        if attention_mask is None and len(set(counts)) > 1:
            raise ValueError(
                f"rows hold different numbers of image placeholders ({counts}), so they are padded after pruning: pass "
                "the processor's attention_mask"
            )
        live = keep if attention_mask is None else keep & attention_mask.bool()
        right = attention_mask is not None and bool((attention_mask[:, -1] == 0).any() and attention_mask[:, 0].all())
        order = (~keep if right else keep).long().argsort(dim=1, stable=True)
        columns = order.masked_fill(~keep.gather(1, order), -1)
        # Padding columns that no row needs any more go too.
        used = live.gather(1, order).any(0).nonzero().flatten()
        columns = columns[:, : int(used[-1]) + 1] if right else columns[:, int(used[0]) :]
        return Shrunk(columns, is_image.shape[1])


class _Bound:
    """A replaced method of one model instance, with the signature of the class's own."""

    method: str

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(getattr(type(self.model), self.method).__get__(self.model))

    def original(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self.model), self.method)(self.model, *args, **kwargs)


class _PromptMethod(_Bound):
    def __init__(self, model: nn.Module, shrinker: PromptShrinker) -> None:
        super().__init__(model)
        self.shrinker = shrinker

    def _placeholders(self, arguments: dict[str, Any]) -> Tensor | None:
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        if ids is not None:
            return ids == self.shrinker.image_token_id
        if embeds is None:
            return None
        token = torch.tensor(self.shrinker.image_token_id, device=embeds.device)
        return (embeds == self.model.get_input_embeddings()(token)).all(-1)

    def _shrink(self, arguments: dict[str, Any], images: int | None) -> Shrunk | None:
        """Shrink every prompt-shaped argument in place of `arguments`."""
        is_image = self._placeholders(arguments)
        mask = arguments.get("attention_mask")
        shrunk = None if is_image is None else self.shrinker.shrink(is_image, mask, images)
        if shrunk is None:
            return None
        pad_id = self.model.config.get_text_config().pad_token_id
        pads = dict(
            input_ids=0 if pad_id is None or pad_id == self.shrinker.image_token_id else pad_id,
            inputs_embeds=0,
            attention_mask=0,
            labels=-100,
            token_type_ids=0,
        )
        for name, pad in pads.items():
            if arguments.get(name) is not None:
                arguments[name] = shrunk.take(arguments[name], pad)
        if arguments.get("position_ids") is not None:
            positions = arguments["position_ids"].expand(*is_image.shape)
            arguments["position_ids"] = (shrunk.take(positions, 0) - shrunk.removed(mask)).clamp_min(0)
        return shrunk


def _images(arguments: dict[str, Any]) -> int | None:
    """Images that come with a prompt: raw pixels or features encoded beforehand."""
    if arguments.get("pixel_values") is not None:
        return arguments["pixel_values"].shape[0]
    encoded = (arguments.get("mm_encoder_outputs") or {}).get("image")
    return None if encoded is None else len(encoded.pooler_output)


class PrunedForward(_PromptMethod):
    """Replacement ``forward`` of a VLM: unchanged processor output in, outputs of the shrunk sequence out."""

    method = "forward"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = _named(self.__signature__, args, kwargs)
        images = _images(arguments)
        if images is None:
            self._shrink_old_mask(arguments)
            return self.original(**arguments)
        shrunk = self._shrink(arguments, images)
        if shrunk is not None and isinstance(arguments.get("logits_to_keep"), Tensor):
            raise ValueError("logits_to_keep as a tensor indexes the unpruned prompt: pass an int, or a pruned prompt")
        output = self.original(**arguments)
        cache = getattr(output, "past_key_values", None)
        if shrunk is not None and cache is not None:
            cache._flowcut_prompt = shrunk  # a caller's own decoding loop keeps growing the full mask
        return output

    def _shrink_old_mask(self, arguments: dict[str, Any]) -> None:
        """A decoding loop of the caller's own passes masks and positions of the full prompt: translate them."""
        shrunk = getattr(arguments.get("past_key_values"), "_flowcut_prompt", None)
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        new = arguments["input_ids"] if arguments.get("input_ids") is not None else arguments.get("inputs_embeds")
        if shrunk is None or mask is None or mask.dim() != 2 or new is None:
            return
        if mask.shape[1] != arguments["past_key_values"].get_seq_length() + new.shape[1]:
            prompt = shrunk.take(mask[:, : shrunk.length], 0)
            arguments["attention_mask"] = torch.cat([prompt, mask[:, shrunk.length :]], 1)
            if positions is not None:
                arguments["position_ids"] = positions - shrunk.removed(mask[:, : shrunk.length])[:, -1:]


class PrunedGenerate(_PromptMethod):
    """Replacement ``generate`` of a VLM: returned sequences start with the prompt as it was given."""

    method = "generate"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = _named(self.__signature__, args, kwargs)
        prompt = arguments.pop("inputs", None)
        if prompt is not None:
            if arguments.get("input_ids") is not None:
                raise ValueError("generate: give the prompt as inputs or as input_ids, not both")
            arguments["input_ids"] = prompt
        prompt = arguments.get("input_ids")
        shrunk = self._shrink(arguments, _images(arguments))
        if shrunk is None:
            return self.original(**arguments)
        self._shift_lengths(arguments, shrunk.length - shrunk.columns.shape[1])
        if arguments.get("streamer") is not None and prompt is not None:
            arguments["streamer"] = _PromptStreamer(arguments["streamer"], prompt)
        output = self.original(**arguments)
        if prompt is None:  # inputs_embeds: the sequences hold new tokens only
            return output
        sequences = output if isinstance(output, Tensor) else output.sequences
        new = sequences[:, shrunk.columns.shape[1] :]
        full = torch.cat([prompt.to(new.device).repeat_interleave(len(new) // len(prompt), 0), new], 1)
        if isinstance(output, Tensor):
            return full
        output.sequences = full
        return output

    def _shift_lengths(self, arguments: dict[str, Any], removed: int) -> None:
        """max_length and min_length count the prompt, so they shrink with it."""
        config = arguments.get("generation_config") or self.model.generation_config
        for name in ("max_length", "min_length"):
            value = arguments.get(name)
            if value is None:
                value = getattr(config, name, None)
            if value and (name != "max_length" or arguments.get("max_new_tokens") is None):
                if arguments.get("generation_config") is None or name in arguments:
                    arguments[name] = max(value - removed, 0)
                else:
                    arguments["generation_config"] = config = copy.copy(config)
                    setattr(config, name, max(value - removed, 0))


class _PromptStreamer:
    """Hands the streamer the prompt it expects in place of the shrunk one."""

    def __init__(self, streamer: Any, prompt: Tensor) -> None:
        self.streamer, self.prompt = streamer, prompt

    def put(self, value: Tensor) -> None:
        prompt, self.prompt = self.prompt, None
        self.streamer.put(value if prompt is None else prompt.cpu())

    def end(self) -> None:
        self.streamer.end()


class FixedFeatureLayer(_Bound):
    """Replacement ``get_image_features`` that refuses another feature layer than the one pruning ends before."""

    method = "get_image_features"

    def __init__(self, model: nn.Module, **fixed: Any) -> None:
        super().__init__(model)
        self.fixed = fixed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = _named(self.__signature__, args, kwargs)
        for name, value in self.fixed.items():
            if arguments.get(name) not in (None, value):
                raise ValueError(
                    f"{name}={arguments[name]!r} but the model was patched for {value!r}: unpatch, set it in model.config, "
                    "patch again"
                )
        return self.original(**arguments)


def _named(signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, those of ** included, without defaults."""
    bound = signature.bind(*args, **kwargs).arguments
    variable = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    return bound | bound.pop(variable, {})


Replacement = tuple[nn.Module, str, Callable]
