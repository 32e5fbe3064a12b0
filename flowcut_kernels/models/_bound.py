"""Replaced methods of one model instance."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
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
