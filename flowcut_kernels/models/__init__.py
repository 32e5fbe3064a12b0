"""Patch and unpatch Hugging Face models, one instance at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from .._library import choose_backend, resolve_backend
from ..modules.packed_encoder import VisionEncoder
from ..policies.base import Policy
from ..trace import Trace
from ._bound import Places, Replacement
from ._features import PrunedFeatures
from .clip import CLIP, SIGLIP
from .gemma3 import Gemma3
from .idefics3 import IDEFICS3, IDEFICS3_VIT, SMOLVLM, SMOLVLM_VIT
from .internvl import INTERN_VIT, InternVL
from .llava import Llava
from .llava_next import LlavaNext
from .llava_next_video import LlavaNextVideo
from .llava_onevision import LlavaOnevision
from .paligemma import PaliGemma
from .qwen_vl import QWEN2_5_VL, QWEN2_VL, QWEN3_VL
from .video_llava import VideoLlava
from .vipllava import VipLlava

Model = TypeVar("Model", bound=nn.Module)

ADAPTERS = (
    CLIP,
    SIGLIP,
    Llava(),
    LlavaNext(),
    LlavaOnevision(),
    LlavaNextVideo(),
    VideoLlava(),
    PaliGemma(),
    Gemma3(),
    VipLlava(),
    QWEN2_VL,
    QWEN2_5_VL,
    QWEN3_VL,
    INTERN_VIT,
    InternVL(),
    IDEFICS3_VIT,
    IDEFICS3,
    SMOLVLM_VIT,
    SMOLVLM,
)
_HANDLE = "_flowcut_patch"


@dataclass
class _Patch:
    """What `patch` installed on a model."""

    model: nn.Module
    policy: Policy
    encoder: VisionEncoder
    replacements: list[Replacement]
    record: bool


def supported_models() -> list[type[nn.Module]]:
    """The model classes `patch` accepts."""
    return [adapter.model_class for adapter in ADAPTERS]


def adapter_of(model: nn.Module, policy: Policy) -> Any:
    """What knows the family of `model`; TypeError for an unsupported class, or where `policy` is none."""
    if not isinstance(policy, Policy):
        # A model's, or processor output's, would fill pages.
        given = f"a {type(policy).__name__}" if isinstance(policy, nn.Module | Mapping | Tensor) else repr(policy)
        raise TypeError(f"policy={given} is not a policy: use for example FlowCut(target_tokens=64)")
    return family_of(model)


def family_of(model: nn.Module) -> Any:
    """The adapter of a model's class; TypeError where it has none."""
    adapter = next((a for a in ADAPTERS if type(model) is a.model_class), None)
    if adapter is None:
        raise TypeError(f"{type(model).__name__} is not supported; {_what_to_do(model)}")
    return adapter


def _what_to_do(model: Any) -> str:
    """With a model whose class has no adapter."""
    classes = supported_models()
    names = f"supported models: {', '.join(c.__name__ for c in classes)}"
    wrapped = next((n for n, m in _parts(model) if type(m) in classes and hasattr(m, "generate")), None)
    if wrapped is not None:
        return f"{names}. It holds one of them: patch that, .{wrapped}"
    if not isinstance(model, nn.Module):  # a name, a class, a processor
        return f"{names}. Give an instance, as from_pretrained returns it"
    if type(model).__module__.startswith("transformers_modules."):
        return (
            f"{names}. Its code came with its checkpoint, so nobody knows how it works: load a checkpoint for "
            "transformers' own class, without trust_remote_code=True (their names often end in -hf)"
        )
    family = [c for c in classes if c.__module__ == type(model).__module__ and hasattr(c, "generate")]
    if family:
        return f"{names}. Its family is supported: patch the whole {family[0].__name__}"
    return f"{names}. CONTRIBUTING.md says how to add one (Adding a model family)"


def patch(
    model: Model, policy: Policy, *, record: bool = False, backend: str | None = None, compact_cache: bool = False
) -> Model:
    """Make this model instance prune visual tokens by `policy`, in place, until :func:`unpatch`.

    A whole VLM takes unchanged processor output in ``forward`` and ``generate``; its layers after the feature layer
    no longer run. ``forward`` returns logits and hidden states of what is left of the prompt: count columns from the
    end (docs/patched_models.md). On a bare vision tower all layers run and ``hidden_states`` simply hold fewer tokens
    from the first cut on. No parameter, buffer, hook, configuration or class is touched; other instances are not
    affected. Threads that call a patched VLM take turns. A callback of ``generate`` (streamer, logits processor,
    stopping criterion) may call it too, or wait for a thread that does; a hook inside the model may do neither.

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
    for name, value in dict(record=record, compact_cache=compact_cache).items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r} must be True or False")
    resolve_backend(backend)
    if _HANDLE in vars(model):
        raise ValueError(
            f"this {type(model).__name__} is already patched with {vars(model)[_HANDLE].policy}: "
            "call unpatch(model) first"
        )
    weight = _weight_of(model)
    if choose_backend("patch", backend, weight) == "triton" and weight.device.type == "cuda":
        from ..ops._triton_common import reserve_counters

        reserve_counters(weight.device)
    encoder, replacements = adapter.replacements(
        model, policy, record=record, backend=backend, compact_cache=compact_cache
    )
    for module, name, _ in replacements:
        now = vars(module).get(_slot(module, name))
        if now is not None and not _is_own(module, name, now):
            raise ValueError(
                f"{type(module).__name__}.{name} of this instance is already replaced (by patching a part of the "
                "model, or by another library): undo that first"
            )
    _check_devices(model, replacements)
    places = Places(model, dict.fromkeys(module for module, *_ in replacements))
    setattr(model, _HANDLE, _Patch(model, policy, encoder, replacements, record))
    for module, name, replacement in replacements:
        setattr(module, _slot(module, name), replacement)
        if isinstance(replacement, PrunedFeatures):
            replacement.places = places
    return model


def unpatch(model: Model) -> Model:
    """Undo :func:`patch`: the model is exactly as before.

    Raises:
        ValueError: a model that is not patched, a shallow copy of one, or a method that something else replaced after
            `patch`.
    """
    handle = _handle(model)
    if handle.model is not model:
        raise ValueError(
            f"this {type(model).__name__} is a shallow copy of a patched model and shares its layers: unpatch that one "
            "and copy it again, or use copy.deepcopy"
        )
    for module, name, replacement in handle.replacements:
        if vars(module).get(_slot(module, name)) is not replacement:
            raise ValueError(f"{type(module).__name__}.{name} was replaced after patch(): undo that first")
    for module, name, _ in handle.replacements:
        slot = _slot(module, name)
        if slot == name:
            delattr(module, name)
        else:
            setattr(module, slot, getattr(type(module), name).__get__(module))
    delattr(model, _HANDLE)
    return model


def _slot(module: nn.Module, name: str) -> str:
    """The attribute that holds a method of this instance; accelerate's hooks keep what they call in their own."""
    return "_old_forward" if name == "forward" and "_hf_hook" in vars(module) else name


def _is_own(module: nn.Module, name: str, method: Any) -> bool:
    """Whether `method` is the class's own, which removed hooks leave on the instance."""
    return getattr(method, "__func__", None) is getattr(type(module), name)


def _weight_of(model: nn.Module) -> Tensor:
    """A parameter that says on which device and in which dtype a model computes."""
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]  # quantised ones may be integers
    return next((weight for weight in weights if not weight.is_meta), weights[0])


def _check_devices(model: nn.Module, replacements: list[Replacement]) -> None:
    """ValueError unless all layers that were given a new forward compute on one device; what they share is there."""
    layers = {module for module, name, _ in replacements if name == "forward" and module is not model}
    weights = [weight for module in layers for weight in module.parameters() if not weight.is_meta]
    devices = sorted({str(weight.device) for weight in weights})
    if len(devices) > 1:
        raise ValueError(
            f"the layers that would be patched lie on {', '.join(devices)}: give a device_map that puts the vision "
            "tower on one device, and with it the language model where the policy prunes there too"
        )


@contextmanager
def patched(
    model: Model, policy: Policy, *, record: bool = False, backend: str | None = None, compact_cache: bool = False
) -> Iterator[Model]:
    """:func:`patch` for the body of a ``with`` statement; restored even when the body raises.

    Arguments and errors: :func:`patch`.
    """
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


def _parts(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model, itself included, by name; of a pipeline those of its model."""
    if isinstance(model, nn.Module):
        yield from model.named_modules()
    elif isinstance(getattr(model, "model", None), nn.Module):
        yield from model.model.named_modules(prefix="model")


def is_patched(model: nn.Module) -> bool:
    """Whether `model` or a part of it is patched."""
    return any(_HANDLE in vars(module) for module in model.modules())


def _handle(model: nn.Module) -> _Patch:
    if isinstance(model, nn.Module) and _HANDLE in vars(model):
        return vars(model)[_HANDLE]
    # What torch.compile, PEFT and others put around a model is not the model.
    held = next((name for name, part in _parts(model) if _HANDLE in vars(part)), None)
    what = "call patch(model, policy) first" if held is None else f"it holds a model that is: give that, .{held}"
    raise ValueError(f"this {type(model).__name__} is not patched: {what}")
