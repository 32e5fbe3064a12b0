"""A KV cache without the rows that no later step needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from ._ops import accumulate_dtype
from .modules.kv_layers import is_pruned
from .ops import compact_kv, compact_kv_
from .ops.compact_kv import check_arguments, check_keep


def compact_kv_cache(
    cache: Any,
    keep: Tensor,
    lengths: Tensor | None = None,
    *,
    positions: str = "keep",
    rotary: nn.Module | Tensor | None = None,
    position_ids: Tensor | None = None,
    layer_by_layer: bool = False,
    backend: str | None = None,
) -> Any:
    """Drop the rows of a KV cache that ``keep`` does not name, in all layers at once.

    Args:
        cache: a transformers ``DynamicCache`` (every layer gets new, smaller tensors, so the old ones' memory is
            released; until then the kept rows exist twice, with ``layer_by_layer`` those of one layer), a
            ``StaticCache`` (in place: no allocation, no host sync, addresses stay, so it may run in a CUDA graph), or
            a pair of lists of tensors [B, G, N, D] (new lists). Full-attention layers only, on one device.
        keep: int64 [B, M], for every sample the ascending rows to keep, then -1 as padding.
        lengths: int32 or int64 [B], the number of rows of every sample, instead of counting them.
        positions: "keep": keys stay rotated as they were, and the next token's position is what it would have been.
            "repack": keys are turned to the positions 0, 1, ... of their new rows, and the next token's position is
            the sample's number of kept rows.
        rotary: for "repack" the model's rotary embedding (``model.model.rotary_emb`` of a Llama) or its ``inv_freq``
            [R/2]; half-split layout, as in Llama and Qwen. One position per token: not for M-RoPE.
        position_ids: for "repack" [B, N], the positions that the keys have now; None: row n is at position n.
            Left-padded prompts, and caches compacted with "keep" before, need it.
        layer_by_layer: a launch for each layer of a ``DynamicCache``, whose old rows go before the next layer's turn.
        backend: as in :func:`flowcut_kernels.ops.compact_kv`.

    Returns:
        The same cache, whose length is now M, or the new pair of lists.

    The next call of the model is told what it cannot see: ``position_ids`` as above (for "keep" always, for "repack"
    where samples differ in length), and for samples shorter than M an ``attention_mask`` that is 0 at rows
    ``lengths[b]..M - 1``.

    Raises:
        ValueError: an unknown cache or layer (sliding window, quantised, offloaded, empty), more columns of ``keep``
            than a static cache has rows, or arguments that do not fit; the cache is as it was. On a GPU the contents of
            ``keep`` are not read back to be checked.
    """
    if positions not in ("keep", "repack"):
        raise ValueError(f"compact_kv_cache: positions={positions!r} is unknown: use 'keep' or 'repack'")
    check_keep("compact_kv_cache", keep)
    raw = isinstance(cache, (tuple, list)) and len(cache) == 2 and all(isinstance(x, (tuple, list)) for x in cache)
    layers = [] if raw else _layers(cache)
    keys, values = cache if raw else ([x.keys for x in layers], [x.values for x in layers])
    static = not raw and isinstance(layers[0], StaticLayer)
    if static:
        _check_filled(layers, keep)
    cos = sin = None
    if positions == "repack" and keys:
        cos, sin = _tables(keep, _frequencies(rotary), position_ids, keys[0])

    if static:
        compact_kv_(keys, values, keep, lengths, cos, sin, backend=backend)
        for layer in layers:
            layer.cumulative_length.fill_(keep.shape[1])
        return cache
    if raw:
        return compact_kv(keys, values, keep, lengths, cos, sin, backend=backend)
    if layer_by_layer:
        check_arguments("compact_kv_cache", keys, values, keep, lengths, cos, sin)  # of all, before the first changes
    del keys, values  # nothing but the cache holds the old rows
    for group in [[layer] for layer in layers] if layer_by_layer else [layers]:
        made = compact_kv([x.keys for x in group], [x.values for x in group], keep, lengths, cos, sin, backend=backend)
        for layer, key, value in zip(group, *made, strict=True):
            layer.keys, layer.values = key, value
        del made, key, value
    return cache


def _layers(cache: Any) -> list:
    """The layers of a transformers cache, all of one kind that can be compacted; ValueError for anything else."""
    layers = getattr(cache, "layers", None)
    if not isinstance(cache, Cache) or not layers:
        raise ValueError(
            f"compact_kv_cache: cache is a {type(cache).__name__} without layers; give a DynamicCache or StaticCache "
            "that a model has filled, or a pair (keys, values) of lists of tensors"
        )
    if is_pruned(cache):
        raise ValueError(
            "compact_kv_cache: cache was filled by a model whose policy drops tokens inside the language model; its "
            "layers know which columns they lack: patch(model, policy, compact_cache=True) drops them from all layers"
        )
    if getattr(cache, "offloading", False):
        raise ValueError("compact_kv_cache: cache is offloaded; compact a cache whose layers stay on the device")
    for i, layer in enumerate(layers):
        # Derived layers keep other rows or more than keys and values.
        if type(layer) not in (DynamicLayer, StaticLayer) or type(layer) is not type(layers[0]):
            raise ValueError(
                f"compact_kv_cache: layer {i} of cache is a {type(layer).__name__}; rows can be dropped only where "
                "every layer is a DynamicLayer, or every layer a StaticLayer, with a row for each token"
            )
        if not layer.is_initialized:
            raise ValueError(f"compact_kv_cache: layer {i} of cache is empty; run the model on the prompt first")
    return layers


def _check_filled(layers: list, keep: Tensor) -> None:
    """A static layer has room for so many rows. Some hold nothing yet: on a GPU nobody looks, as that is a sync."""
    room = min(layer.max_cache_len for layer in layers)
    if keep.shape[1] > room:
        raise ValueError(
            f"compact_kv_cache: keep has {keep.shape[1]} columns, but the static cache has {room} rows, which stay "
            "where they are; leave out columns that are -1 for every sample"
        )
    if keep.device.type != "cpu" or keep.numel() == 0:
        return
    filled = min(int(layer.cumulative_length) for layer in layers)
    if int(keep.max()) >= filled:
        raise ValueError(f"compact_kv_cache: keep names row {int(keep.max())}, but the cache holds {filled} rows")


def _frequencies(rotary: nn.Module | Tensor | None) -> Tensor:
    if rotary is None:
        raise ValueError(
            "compact_kv_cache: positions='repack' needs rotary: the model's rotary embedding or its inv_freq"
        )
    kind = str(getattr(rotary, "rope_type", ""))
    if "dynamic" in kind or kind == "longrope":
        raise ValueError(
            f"compact_kv_cache: the frequencies of rotary (rope_type {kind!r}) change with the length; give the "
            "inv_freq that the keys were rotated with"
        )
    frequencies = rotary if isinstance(rotary, Tensor) else getattr(rotary, "inv_freq", None)
    if not isinstance(frequencies, Tensor) or frequencies.dim() != 1:
        raise ValueError(
            f"compact_kv_cache: rotary must be a rotary embedding with inv_freq [R/2] or that tensor, got "
            f"{type(rotary).__name__}"
        )
    return frequencies


def _tables(keep: Tensor, frequencies: Tensor, position_ids: Tensor | None, key: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of (new - old position) times each frequency for the kept rows."""
    if position_ids is None:
        old = keep
    elif (
        not isinstance(position_ids, Tensor)
        or position_ids.dim() != 2
        or position_ids.shape[0] != keep.shape[0]
        or position_ids.shape[1] > key.shape[2]
    ):
        raise ValueError(
            f"compact_kv_cache: position_ids must be a tensor [{keep.shape[0]}, rows in the cache], one position per "
            f"row, got {tuple(position_ids.shape) if isinstance(position_ids, Tensor) else type(position_ids).__name__}"
        )
    elif keep.device.type == "cpu" and keep.numel() > 0 and int(keep.max()) >= position_ids.shape[1]:
        raise ValueError(
            f"compact_kv_cache: keep names row {int(keep.max())}, position_ids has {position_ids.shape[1]} columns"
        )
    else:
        old = position_ids.gather(1, keep.clamp_min(0))
    # In fp64: the stored angles carry the error of fp32 already.
    shift = (torch.arange(keep.shape[1], device=keep.device) - old).double()
    angle = shift[..., None] * frequencies.to(keep.device, torch.float64)
    dtype = accumulate_dtype(key.dtype)
    return angle.cos().to(dtype), angle.sin().to(dtype)
