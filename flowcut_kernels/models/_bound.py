"""Replaced methods of one model instance."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

from torch import nn

from ..modules._signature import signature_of

Replacement = tuple[nn.Module, str, Callable]


class Turns:
    """One thread at a time: what is known of a prompt is kept beside the model. A copy of a model has turns of its
    own."""

    def __init__(self) -> None:
        self.lock, self.busy = RLock(), False

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        return Turns, ()

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def running(self, model: nn.Module, inside: bool = False) -> _Running:
        """While a model runs in a thread whose turn it is.

        Args:
            inside: this may be a part of what is running.

        Raises:
            RuntimeError: it runs already: a hook calls the model that called it.
        """
        if self.busy and not inside:
            raise RuntimeError(
                f"a patched {type(model).__name__} was called while it runs, by a hook of its own: call it before or "
                "afterwards, or from a logits processor, stopping criterion or streamer"
            )
        return _Running(self)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """While a thread whose turn it is runs what may wait for another one's turn."""
        self.lock.release()
        try:
            yield
        finally:
            self.lock.acquire()


class _Running:
    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def __enter__(self) -> None:
        self.before, self.turns.busy = self.turns.busy, True

    def __exit__(self, *_: object) -> None:
        self.turns.busy = self.before


class Places:
    """Where in a model the modules are that `patch` gave a method. What wraps one of them keeps it in the model."""

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module]) -> None:
        self.model, self.modules = model, [module for module in modules if module is not model]
        self.held = self._find()

    def check(self) -> None:
        """ValueError where one of them was assigned over: what is in its place prunes nothing."""
        if all(holder._modules.get(name) is module for holder, name, module in self.held.values()):
            return
        here = {*self.model.modules()}
        if not here.issuperset(self.modules):
            path = next(path for path, (at, name, was) in self.held.items() if at._modules.get(name) is not was)
            raise ValueError(
                f".{path} of this {type(self.model).__name__} was replaced after patch(), by a module that is not "
                "patched: call unpatch(model), which leaves it in place, then patch(model, policy) again"
            )
        self.held = self._find()

    def _find(self) -> dict[str, tuple[Any, str, nn.Module]]:
        """Path -> holder, name in it and module, of all modules on the way to them."""
        paths, held = {module: path for path, module in self.model.named_modules()}, {}
        for module in self.modules:
            holder, path = self.model, ""
            for name in paths[module].split("."):
                path = f"{path}.{name}".lstrip(".")
                child = holder._modules[name]
                assert child is not None
                held[path] = holder, name, child
                holder = child
        return held


class Bound:
    """A replaced method of one model instance, with the signature of the class's own."""

    method: str

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:
        return signature_of(getattr(type(self.model), self.method))

    def original(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self.model), self.method)(self.model, *args, **kwargs)


def named(method: Bound, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, those of ** included, without defaults."""
    if not args:  # every decoding step
        return kwargs
    signature = method.__signature__
    bound = signature.bind(*args, **kwargs).arguments
    variable = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    return bound | (bound.pop(variable[0], {}) if variable else {})
