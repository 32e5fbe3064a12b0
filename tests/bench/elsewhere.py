"""A device that is not there: it computes on the CPU, counts launches, and notes whenever the host has to wait for it.

Its tensors say that they are elsewhere (on "meta", whose name everybody knows and which nobody has to build), so that
code takes the ways that it takes on a GPU, and what would be a copy between host and device is seen as one.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE, HOST = torch.device("meta"), torch.device("cpu")
aten = torch.ops.aten
# What the host needs an answer to; copies, masks as indices and lengths of repeats are told by their arguments.
ASKS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "lift_fresh", "detach", "detach_"}  # nothing is computed


class There(Tensor):
    """A tensor on the device."""

    here: Tensor  # its values
    is_meta = False  # as it has some

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        tensor = Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            device=DEVICE,
        )  # fmt: skip
        tensor.here = here
        return tensor

    def __repr__(self, **_: Any) -> str:
        return f"There({self.here})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} was called without the device")


def values(tree: Any) -> Any:
    return tree_map_only(There, lambda x: x.here, tree)


class Device(TorchDispatchMode):
    """Runs what is asked of the device, and counts it; with what `waits` for it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.operators = 0  # of the host as well
        self.constructors = _Constructors(self)

    def __enter__(self) -> Device:
        self.constructors.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.constructors.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators += 1
        options, leaves = dict(kwargs or {}), tree_leaves((args, kwargs))
        is_there = any(isinstance(x, There) for x in leaves)
        to = options.get("device") or (DEVICE if is_there else HOST)
        if "device" in options:
            options["device"] = HOST
        output = function(*values(args), **values(options))
        results = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        if is_there or to == DEVICE:
            storages = {x.untyped_storage().data_ptr() for x in values(leaves) if isinstance(x, Tensor)}
            is_view = results and all(x.untyped_storage().data_ptr() in storages for x in results)
            if function._opname not in FREE and (function._schema.is_mutable or not is_view):
                self.launches[function._opname] += 1
            if any(x.numel() for x in results or [torch.ones(1)]) and self._waits(function, args, options, to, leaves):
                self.waits[f"{function._opname} in {_where()}"] += 1
        if function._schema.is_mutable and isinstance(output, Tensor):
            return next((x for x in leaves if isinstance(x, There) and x.here is output), output)
        return tree_map_only(Tensor, There, output) if to == DEVICE else output

    @staticmethod
    def _waits(function: Any, args: Any, options: dict, to: torch.device, leaves: list) -> bool:
        here = any(isinstance(x, Tensor) and not isinstance(x, There) and x.dim() for x in leaves)
        if function in INDEXING:
            return here or any(x is not None and x.dtype == torch.bool for x in args[1])
        if function is aten.repeat_interleave.Tensor:
            return options.get("output_size") is None
        copies_in = here and to == DEVICE and function in (aten._to_copy.default, aten.copy_.default)
        # A copy to the device may be left to itself: what it is made of is set aside at once.
        return to == HOST or function in ASKS or (copies_in and not options.get("non_blocking"))


class _Constructors(TorchFunctionMode):
    """What torch makes or fuses below the level of operators."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        options = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and options.get("device") is not None:
            device = options.pop("device")
            return function(tree_map_only(There, Tensor.item, args[0]), *args[1:], **options).to(device)
        if function is scaled_dot_product_attention and isinstance(args[0], There):
            self.device.launches["attention"] += 1
            with torch._C._DisableTorchDispatch():
                output = function(*values(args), **values(options))
            return There(output)
        return function(*args, **options)


def _where() -> str:
    """The innermost function that is no part of torch."""
    frame = sys._getframe(2)
    while f"{frame.f_globals.get('__name__')}.".startswith(("torch.", __name__)):
        frame = frame.f_back
    return f"{frame.f_globals['__name__']}.{frame.f_code.co_name}"


def move(model: nn.Module) -> nn.Module:
    """The model, on the device."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: There(x.detach()) for name, x in held.items() if x is not None})
    return model
