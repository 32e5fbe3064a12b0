"""Signatures of replaced methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache


@lru_cache(maxsize=64)
def signature_of(method: Callable) -> inspect.Signature:
    """Of a class's method, without self; kept, as finding out takes as long as ten operators."""
    return inspect.signature(method.__get__(object()))
