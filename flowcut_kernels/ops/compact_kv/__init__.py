"""Rows of a KV cache dropped: keys and values of all layers at once, keys turned to new positions if wanted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..._library import NATIVE_DTYPES, choose_backend
from ..._ops import LIB, accumulate_dtype
from .reference import compact_kv as _reference
from .reference import compact_kv_ as _reference_


def compact_kv(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    keep: Tensor,
    lengths: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """New keys and values of every layer that hold the rows ``keep`` alone.

    Args:
        keys, values: one tensor [B, G, N, D] per layer, all of one dtype (float8 too) and on one device; last
            dimension contiguous, other strides free. N may differ between layers, D between keys and values.
        keep: int64 [B, M], for every sample ascending rows that every layer has, then -1 as padding.
        lengths: int32 or int64 [B], the number of rows of every sample, instead of counting them.
        cos, sin: float32 [B, M, R/2] of the angles by which the kept keys are turned, (new - old position) times
            each frequency. For keys that carry rotary embeddings in the half-split layout (Llama, Qwen: columns j and
            j + R/2 are one point); columns from R on stay. The layout's two halves have the same angles, so one is
            given, and as a table rather than as frequencies because it is the same for all layers and heads: sines
            are computed once, and a kernel reads them from cache. Keys of float32, bfloat16, float16 (or float64 with
            float64 tables, in the reference).
        backend: "auto", "reference", "cpp" (CPU tensors) or "cuda"; None: ``FLOWCUT_BACKEND`` or "auto".

    Returns:
        (keys, values): contiguous tensors [B, G, M, D] per layer, zeros where ``keep`` is -1. Differentiable: where
        autograd records, the reference runs. Definition: ``reference.py``.

    Raises:
        ValueError: arguments that do not fit, naming the argument; nothing was changed. The contents of ``keep`` and
            ``lengths`` are checked on the CPU. On a GPU they are not read back: a row that a layer does not have
            gives zeros, and with ``lengths`` rows after them count as padding.
        RuntimeError: an explicitly requested backend that cannot serve these tensors.
    """
    keys, values = list(keys), list(values)
    keep = check_arguments("compact_kv", keys, values, keep, lengths, cos, sin)
    choice = _choose("compact_kv", backend, keys[0], cos)
    if choice == "reference" or (torch.is_grad_enabled() and any(x.requires_grad for x in (*keys, *values))):
        return _reference(keys, values, keep, cos, sin)
    return torch.ops.flowcut_kernels.compact_kv.default(keys, values, keep, cos, sin)


def compact_kv_(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    keep: Tensor,
    lengths: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    backend: str | None = None,
) -> None:
    """The same in place: the kept rows move to the front of every tensor, the rows after them stay as they were.

    Nothing is allocated and no address changes (static caches, CUDA graphs). Rows ascend, so each moves to where it
    was or before, and one sweep forward is enough. Arguments and errors: :func:`compact_kv`; the tensors must not
    overlap, neither themselves nor each other, and autograd must not record.
    """
    keys, values = list(keys), list(values)
    keep = check_arguments("compact_kv_", keys, values, keep, lengths, cos, sin)
    choice = _choose("compact_kv_", backend, keys[0], cos)
    check_writable("compact_kv_", keys, values)
    if choice == "reference":
        _reference_(keys, values, keep, cos, sin)
    else:
        torch.ops.flowcut_kernels.compact_kv_.default(keys, values, keep, cos, sin)


def _choose(op: str, backend: str | None, key: Tensor, cos: Tensor | None) -> str:
    # Rows that are only moved are bytes, whatever their type.
    return choose_backend(op, backend, key, ("cpp", "cuda"), (key.dtype,) if cos is None else NATIVE_DTYPES)


def _name(i: int, keys: list[Tensor]) -> str:
    """Of the i-th of all keys and values."""
    return f"keys[{i}]" if i < len(keys) else f"values[{i - len(keys)}]"


def _is(x: object, shape: tuple[int, ...], *dtypes: torch.dtype) -> bool:
    return isinstance(x, Tensor) and tuple(x.shape) == shape and x.dtype in dtypes


def _said(x: object) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"


def check_keep(op: str, keep: Tensor) -> None:
    """ValueError in the name of `op` unless `keep` is int64 [B, M]."""
    if not isinstance(keep, Tensor) or keep.dim() != 2 or keep.dtype != torch.int64:
        raise ValueError(f"{op}: keep must be an int64 tensor [batch, kept], got {_said(keep)}")


def check_writable(op: str, keys: list[Tensor], values: list[Tensor]) -> None:
    """ValueError in the name of `op` where autograd records, or where rows share memory and would be moved twice."""
    recorded, compiling = torch.is_grad_enabled(), torch.compiler.is_compiling()
    length, spans = 0, []
    layout: _Layout | None = None
    for i, x in enumerate((*keys, *values)):
        if (x.shape, x.stride()) != layout:  # most are alike
            layout = x.shape, x.stride()
            if any(stride == 0 and size > 1 for size, stride in zip(*layout, strict=True)):
                raise ValueError(
                    f"{op}: {_name(i, keys)} is an expanded tensor, whose rows share memory; clone() it first"
                )
            length = 1 + sum((size - 1) * stride for size, stride in zip(*layout, strict=True)) if x.numel() else 0
        if recorded and x.requires_grad:
            raise ValueError(f"{op}: {_name(i, keys)} requires grad; call it under torch.no_grad()")
        if length and not compiling and (at := x.data_ptr()):  # 0: of a tensor that only stands for others
            spans.append((at // x.element_size(), length, i, layout))
    spans.sort()
    far = before = (0, 0, 0, layout)
    for span in spans:
        at, length, i, layout = span
        if at < far[0] + far[1]:  # it may lie between the rows of those before it
            for start, _, other, its in {far, before}:
                if _meet(at - start, its, layout):
                    first, second = sorted((i, other))
                    raise ValueError(
                        f"{op}: {_name(second, keys)} shares memory with {_name(first, keys)}, whose rows would be "
                        "moved twice; give it once, or clone() it"
                    )
        before, far = span, span if at + length > far[0] + far[1] else far


_Layout = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides


@lru_cache(maxsize=256)
def _meet(offset: int, x: _Layout, y: _Layout) -> bool:
    """Whether some element of x is one of y, which begins `offset` elements later.

    Exact where both have the same strides, each of them longer than the dimensions within it reach, as in slices of one
    cache; of others it is only known that they do if they begin together.
    """
    steps = []
    for n, m, stride, other in zip(x[0], y[0], x[1], y[1], strict=True):
        if n > 1 and m > 1 and stride != other:
            return offset == 0
        if n > 1 or m > 1:
            steps.append((stride if n > 1 else other, n, m))
    left = [offset]  # to be made up by the dimensions to come
    for stride, n, m in sorted(steps, reverse=True):
        left = [at - i * stride for at in left for i in (at // stride, at // stride + 1) if -m < i < n]
    return 0 in left


def check_arguments(op, keys, values, keep, lengths, cos, sin) -> Tensor:
    """`keep` with -1 at and after every sample's length; ValueError in the name of `op` unless the arguments fit."""
    if not keys or len(keys) != len(values):
        raise ValueError(
            f"{op}: keys and values must hold one tensor per layer, got {len(keys)} keys and {len(values)} values"
        )
    check_keep(op, keep)
    first, (batch, kept) = keys[0], keep.shape
    heads = first.shape[1] if first.dim() == 4 else "heads"
    dtype, device, tokens = first.dtype, keep.device, []
    for i, x in enumerate((*keys, *values)):  # 64 tensors and more: what is asked of each is a part of the whole time
        shape = x.shape
        if len(shape) != 4 or shape[0] != batch or shape[1] != heads:
            raise ValueError(f"{op}: {_name(i, keys)} must be [{batch}, {heads}, tokens, dim], got {tuple(shape)}")
        if x.dtype != dtype or x.device != device:
            raise ValueError(
                f"{op}: {_name(i, keys)} is {x.dtype} on {x.device}; all keys and values must be {dtype} on {device}, "
                "like keys[0] and keep"
            )
        if x.stride(3) != 1 and shape[3] > 1:
            raise ValueError(
                f"{op}: {_name(i, keys)} needs a contiguous last dimension, its stride is {x.stride(3)}; call "
                "contiguous() on it"
            )
        tokens.append(shape[2])
    _check_rotation(op, keys, keep, cos, sin)
    if lengths is not None and not _is(lengths, (batch,), torch.int32, torch.int64):
        raise ValueError(f"{op}: lengths must be an int32 or int64 tensor [{batch}], got {_said(lengths)}")
    if lengths is not None and lengths.device != keep.device:
        raise ValueError(f"{op}: lengths is on {lengths.device} but keep is on {keep.device}; move one")
    if keep.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_rows(op, keep, lengths, min(tokens))
    elif lengths is not None:
        keep = keep.masked_fill(torch.arange(kept, device=keep.device) >= lengths[:, None], -1)
    return keep


def _check_rotation(op, keys, keep, cos, sin) -> None:
    if (cos is None) != (sin is None):
        raise ValueError(f"{op}: cos and sin come together, but {'cos' if cos is None else 'sin'} is None")
    if cos is None:
        return
    dtype = keys[0].dtype
    if dtype not in (*NATIVE_DTYPES, torch.float64):
        raise ValueError(
            f"{op}: keys of {dtype} cannot be turned; use float32, bfloat16 or float16 keys, or no cos and sin"
        )
    for name, x in (("cos", cos), ("sin", sin)):
        if x.dim() != 3 or x.shape != (*keep.shape, cos.shape[-1]) or x.dtype != accumulate_dtype(dtype):
            raise ValueError(
                f"{op}: {name} must be {accumulate_dtype(dtype)} [{keep.shape[0]}, {keep.shape[1]}, half of the "
                f"rotary width], got {x.dtype} {tuple(x.shape)}"
            )
        if x.device != keep.device:
            raise ValueError(f"{op}: {name} is on {x.device} but keep is on {keep.device}; move one")
    for i, x in enumerate(keys):
        if 2 * cos.shape[2] > x.shape[3]:
            raise ValueError(
                f"{op}: cos turns {2 * cos.shape[2]} columns but keys[{i}] has {x.shape[3]}; give half the rotary width"
            )


def _check_rows(op: str, keep: Tensor, lengths: Tensor | None, tokens: int) -> None:
    live = keep >= 0
    # A row after padding, or one that does not exceed the row before it; padding follows anything.
    broken = (keep < -1) | (keep >= tokens)
    broken[:, 1:] |= live[:, 1:] & (keep[:, 1:] <= torch.where(live, keep, tokens)[:, :-1])
    if bool(broken.any()):
        b, m = broken.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: keep[{b}, {m}] = {int(keep[b, m])}: rows must ascend without repetition within 0..{tokens - 1} "
            f"(the shortest layer has {tokens}), then -1 as padding; sort them"
        )
    if lengths is not None and not torch.equal(live.sum(1), lengths.long()):
        raise ValueError(
            f"{op}: lengths={lengths.tolist()} disagrees with keep, whose samples have {live.sum(1).tolist()} rows "
            "before the padding of -1"
        )


LIB.impl("compact_kv", _reference, "CompositeExplicitAutograd")
LIB.impl("compact_kv_", _reference_, "CompositeExplicitAutograd")

__all__ = ["compact_kv", "compact_kv_"]
