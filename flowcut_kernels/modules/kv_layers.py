"""Layers of a transformers cache that hold fewer rows than the model has seen columns."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from ..ops import compact_kv, compact_kv_

NEVER = 2**62  # a column that is not there


class PrunedRows:
    """What a layer of a cache knows of the columns it has no rows of. To the outside it has the length that was seen.

    Rows 0..known-1 are `columns`; every later row is the column `dropped` places after it.
    """

    columns: Tensor  # int64 [B, known] column of each row, -1 for a row nobody sees; [1, known] stands for every sample
    dropped: int  # columns seen minus rows held
    stage: tuple[float, ...] = ()  # the cuts that came before this layer; layers of one stage hold the same columns
    gaps: bool  # whether there are rows nobody sees
    vanished: (
        Tensor | None
    )  # int64 [B, n] columns whose positions later rows take, NEVER for none; None: rows keep theirs

    def rows(self) -> int:
        """Rows held."""
        raise NotImplementedError

    def keys_with(self, new: int) -> int:
        """Keys that attention is given after `new` rows are added."""
        raise NotImplementedError

    def columns_of(self, rows: int) -> Tensor:
        """int64 [B or 1, rows] column of each row, those included that are still to be written."""
        known = self.columns.shape[1]
        tail = torch.arange(known, rows, device=self.columns.device) + self.dropped
        return torch.cat([self.columns, tail.expand(len(self.columns), -1)], 1)

    def forget(self, device: torch.device) -> None:
        """As a layer that holds every column so far."""
        self.columns = _every(self.rows(), device)
        self.stage, self.dropped, self.gaps, self.vanished = (), 0, False, None

    def _reorder(self, index: Tensor) -> None:
        if len(self.columns) > 1:
            self.columns = self.columns[index.to(self.columns.device)]
        if self.vanished is not None and len(self.vanished) > 1:
            self.vanished = self.vanished[index.to(self.vanished.device)]


@lru_cache(maxsize=4)
def _every(rows: int, device: torch.device) -> Tensor:
    """int64 [1, rows] of rows that hold every column, the same for all layers."""
    with torch.inference_mode(False):
        return torch.arange(rows, device=device)[None]


class PrunedDynamicLayer(PrunedRows, DynamicLayer):
    """A growing layer without the rows of dropped tokens."""

    def rows(self) -> int:
        return DynamicLayer.get_seq_length(self)

    def keys_with(self, new: int) -> int:
        return self.rows() + new

    def get_seq_length(self) -> int:
        return self.rows() + self.dropped

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last columns (their negative number)."""
        if tokens_to_remove > 0:  # in transformers 5.17 also the length to be left
            tokens_to_remove = min(tokens_to_remove - self.get_seq_length(), 0)
        known, rows = self.columns.shape[1], self.rows()
        if -tokens_to_remove <= rows - known:
            super().crop(tokens_to_remove)
            return
        # Into what was cut: samples may have kept different numbers of the columns that are left.
        end = max(self.get_seq_length() + tokens_to_remove, 0)
        gone = self.columns >= end
        left = int(torch.where(gone, 0, torch.arange(1, known + 1, device=gone.device)).amax()) if known else 0
        if self.vanished is not None:
            self.vanished = self.vanished.masked_fill(self.vanished >= end, NEVER)
        self.columns = self.columns.masked_fill(gone, -1)[:, :left]
        self.gaps, self.dropped = self.gaps or bool((self.columns < 0).any()), end - left
        self.keys, self.values = (x[..., :left, :] for x in (self.keys, self.values) if x is not None)

    def reset(self) -> None:
        self.keys = self.values = None  # transformers 5.17 itself would keep zeros of the old length
        self.is_initialized = False
        self.forget(self.columns.device)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._reorder(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._reorder(torch.arange(len(self.columns), device=self.columns.device).repeat_interleave(repeats))


class PrunedStaticLayer(PrunedRows, StaticLayer):
    """A preallocated layer without the rows of dropped tokens; its tensors stay where they are."""

    def rows(self) -> int:
        return int(self.cumulative_length)

    def keys_with(self, new: int) -> int:
        return self.max_cache_len

    def get_seq_length(self) -> Any:
        return self.cumulative_length + self.dropped

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len + self.dropped, 0  # as many columns as will ever have been seen

    def reset(self) -> None:
        super().reset()
        self.forget(self.columns.device)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._reorder(beam_idx)


_PRUNED: dict[type, type[PrunedRows]] = {DynamicLayer: PrunedDynamicLayer, StaticLayer: PrunedStaticLayer}


def is_pruned(cache: Any) -> bool:
    """Whether a layer of `cache` may lack rows."""
    return any(isinstance(layer, PrunedRows) for layer in getattr(cache, "layers", []))


def check_cache(cache: Any) -> None:
    """ValueError for a cache whose layers cannot hold fewer rows than the model has seen columns."""
    if cache is None:
        return
    if not isinstance(cache, Cache) or getattr(cache, "offloading", False):
        raise ValueError(
            "past_key_values: pruning inside the language model needs a DynamicCache or StaticCache on the device, got "
            f"{type(cache).__name__}{' that is offloaded' * bool(getattr(cache, 'offloading', False))}"
        )
    for i, layer in enumerate(cache.layers):
        if type(layer) not in _PRUNED and not isinstance(layer, PrunedRows):
            raise ValueError(
                f"past_key_values: layer {i} is a {type(layer).__name__}; pruning inside the language model needs a "
                "DynamicCache or StaticCache of full-attention layers"
            )


def pruned_layer(cache: Cache, number: int, device: torch.device) -> PrunedRows:
    """Layer `number` of `cache` as one that may lack rows: itself, or what takes the place of a plain one."""
    while len(cache.layers) <= number:  # a DynamicCache made without a configuration grows as layers are reached
        cache.layers.append(DynamicLayer())
    layer: Any = cache.layers[number]
    if isinstance(layer, PrunedRows):
        return layer
    pruned: Any = object.__new__(_PRUNED[type(layer)])
    vars(pruned).update(vars(layer))
    pruned.forget(device)
    cache.layers[number] = pruned
    return pruned


class Rewind:
    """What takes a cache back to before a pass that failed. It holds no keys or values."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.layers = [(_rows(layer), _facts(layer)) for layer in cache.layers]

    def __call__(self) -> None:
        del self.cache.layers[len(self.layers) :]
        layers: list[Any] = self.cache.layers
        for layer, (rows, facts) in zip(layers, self.layers, strict=True):
            if isinstance(layer, StaticLayer):
                layer.cumulative_length.fill_(rows)
            elif rows == 0:
                layer.keys = layer.values = None
                layer.is_initialized = False
            else:
                layer.keys, layer.values = layer.keys[..., :rows, :], layer.values[..., :rows, :]
            if isinstance(layer, PrunedRows):
                layer.forget(layer.columns.device)
                vars(layer).update(facts)


def _rows(layer: Any) -> int:
    return layer.rows() if isinstance(layer, PrunedRows) else int(layer.get_seq_length())


def _facts(layer: Any) -> dict[str, Any]:
    return {name: x for name, x in vars(layer).items() if name in PrunedRows.__annotations__}


def compact(cache: Cache, kept: Tensor, seen: int, length: int, backend: str | None = None) -> None:
    """Drop from every layer the rows of new columns that did not reach the last one.

    Args:
        cache: after a pass over `length` new columns.
        kept: int64 [B, M] those of the new columns that reached the last layer, -1 for padding.
        seen: columns before the pass; their rows stay.
    """
    batch, device = len(kept), kept.device
    reached = torch.ones((batch, seen + length + 1), dtype=torch.bool, device=device)
    reached[:, seen:] = False
    reached.scatter_(1, torch.where(kept < 0, seen + length, kept + seen), True)
    reached[:, -1] = False  # where the padding went
    layers = [pruned_layer(cache, number, device) for number in range(len(cache.layers))]
    groups: dict[tuple[float, ...], list[Any]] = {}
    for layer in layers:
        groups.setdefault(layer.stage, []).append(layer)
    for group in groups.values():
        first = group[0]
        rows = first.rows()
        columns = first.columns_of(rows).expand(batch, -1)
        live = reached.gather(1, columns.clamp_min(0)) & (columns >= 0)
        if bool(live.all()):
            continue
        # Samples with fewer rows are filled up with rows that nobody sees: no sample depends on its neighbours.
        left = int(live.sum(1).max())
        keep = (~live).long().argsort(dim=1, stable=True)[:, :left].sort(1).values
        known = columns.gather(1, keep).masked_fill(~live.gather(1, keep), -1)
        gaps = bool((known < 0).any())
        keys, values = [layer.keys for layer in group], [layer.values for layer in group]
        if isinstance(first, StaticLayer):
            compact_kv_(keys, values, keep, backend=backend)
        else:
            keys, values = compact_kv(keys, values, keep, backend=backend)
        for layer, key, value in zip(group, keys, values, strict=True):
            layer.keys, layer.values = key, value
            layer.columns, layer.gaps, layer.dropped = known, gaps, seen + length - left
            if isinstance(layer, StaticLayer):
                layer.cumulative_length.fill_(left)
