"""Patch and unpatch Hugging Face models, one instance at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from .._library import choose_backend, resolve_backend
from ..modules.encoder import PrunedEncoder
from ..policies.base import Policy
from ..trace import Trace
from ._bound import Replacement
from .clip import CLIP, SIGLIP
from .idefics3 import IDEFICS3_VIT, SMOLVLM_VIT
from .internvl import INTERN_VIT
from .llava import Llava
from .llava_onevision import LlavaOnevision
from .paligemma import PaliGemma

Model = TypeVar("Model", bound=nn.Module)

ADAPTERS = (CLIP, SIGLIP, Llava(), LlavaOnevision(), PaliGemma(), INTERN_VIT, IDEFICS3_VIT, SMOLVLM_VIT)
_HANDLE = "_flowcut_patch"


@dataclass
class _Patch:
    """What `patch` installed on a model."""

    policy: Policy
    encoder: PrunedEncoder
    replacements: list[Replacement]
    record: bool


def supported_models() -> list[type[nn.Module]]:
    """The model classes `patch` accepts."""
    return [adapter.model_class for adapter in ADAPTERS]


def adapter_of(model: nn.Module, policy: Policy) -> Any:
    """What knows the family of `model`; TypeError for an unsupported class, or where `policy` is none."""
    if not isinstance(policy, Policy):
        raise TypeError(f"policy={policy!r} is not a policy: use for example FlowCut(target_tokens=64)")
    adapter = next((a for a in ADAPTERS if type(model) is a.model_class), None)
    if adapter is None:
        names = ", ".join(c.__name__ for c in supported_models())
        raise TypeError(f"{type(model).__name__} is not supported; supported models: {names}")
    return adapter


def patch(
    model: Model, policy: Policy, *, record: bool = False, backend: str | None = None, compact_cache: bool = False
) -> Model:
    """Make this model instance prune visual tokens by `policy`, in place, until :func:`unpatch`.

    A whole VLM takes unchanged processor output in ``forward`` and ``generate``; its layers after the feature layer
    no longer run. On a bare vision tower all layers run and ``hidden_states`` simply hold fewer tokens from the
    first cut on. No parameter, buffer, hook, configuration or class is touched; other instances are not affected.

    Args:
        model: an instance of one of :func:`supported_models`.
        policy: what to keep, for example ``FlowCut(target_tokens=64)``.
        record: keep a :class:`Trace` of the last forward pass for :func:`trace`.
        backend: "auto", "reference", "cpp" or "triton"; None: ``FLOWCUT_BACKEND`` or "auto".
        compact_cache: where the policy prunes in the language model too, the layers before a cut also lose the dropped
            tokens' rows of their KV cache once the prompt is read, so that all layers end at one length. What is
            written then no longer sees those tokens in the early layers.

    Returns:
        The same model.

    Raises:
        TypeError: an unsupported model class or something that is no policy.
        RuntimeError: a requested backend that cannot serve the model's device and dtype.
        ValueError: a model that is patched already, or whose configuration or hooks cannot be served. Nothing is
            changed then.
    """
    adapter = adapter_of(model, policy)
    if not isinstance(compact_cache, bool):
        raise TypeError(f"compact_cache={compact_cache!r} must be True or False")
    resolve_backend(backend)
    if _HANDLE in vars(model):
        raise ValueError(
            f"this {type(model).__name__} is already patched with {vars(model)[_HANDLE].policy}: "
            "call unpatch(model) first"
        )
    weight = next(model.parameters())
    if choose_backend("patch", backend, weight) == "triton" and weight.device.type == "cuda":
        from ..ops._triton_common import reserve_counters

        reserve_counters(weight.device)
    encoder, replacements = adapter.replacements(
        model, policy, record=record, backend=backend, compact_cache=compact_cache
    )
    for module, name, _ in replacements:
        if name in vars(module):
            raise ValueError(
                f"{type(module).__name__}.{name} of this instance is already replaced (by patching a part of the "
                "model, or by accelerate's hooks for offloaded weights): undo that first"
            )
    setattr(model, _HANDLE, _Patch(policy, encoder, replacements, record))
    for module, name, replacement in replacements:
        setattr(module, name, replacement)
    return model


def unpatch(model: Model) -> Model:
    """Undo :func:`patch`: the model is exactly as before.

    Raises:
        ValueError: a model that is not patched, or a method that something else replaced after `patch`.
    """
    handle = _handle(model)
    for module, name, replacement in handle.replacements:
        if vars(module).get(name) is not replacement:
            raise ValueError(f"{type(module).__name__}.{name} was replaced after patch(): undo that first")
    for module, name, _ in handle.replacements:
        delattr(module, name)
    delattr(model, _HANDLE)
    return model


@contextmanager
def patched(
    model: Model, policy: Policy, *, record: bool = False, backend: str | None = None, compact_cache: bool = False
) -> Iterator[Model]:
    """:func:`patch` for the body of a ``with`` statement; restored even when the body raises."""
    patch(model, policy, record=record, backend=backend, compact_cache=compact_cache)
    try:
        yield model
    finally:
        unpatch(model)


def trace(model: nn.Module) -> Trace:
    """What the last forward pass of a model patched with ``record=True`` kept, in the encoder and the language model.

    Raises:
        ValueError: a model that is not patched, was patched without ``record=True``, or has not run yet.
    """
    handle = _handle(model)
    if not handle.record:
        raise ValueError("trace needs patch(model, policy, record=True)")
    if handle.encoder.trace is None:
        raise ValueError("nothing to trace: the model has not encoded an image since it was patched")
    return handle.encoder.trace


def _handle(model: nn.Module) -> _Patch:
    if _HANDLE not in vars(model):
        raise ValueError(f"this {type(model).__name__} is not patched: call patch(model, policy) first")
    return vars(model)[_HANDLE]
