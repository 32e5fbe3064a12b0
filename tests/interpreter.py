"""Triton's interpreter in half the time."""

from __future__ import annotations

from functools import cache
from types import FunctionType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_once() -> None:
    """Let a launch put the interpreter's forms into the language's modules once.

    By itself it does so for every function that a kernel calls, again and again, which takes half of its time.
    """
    patch, done = interpreter._patch_lang, set()

    @cache
    def modules(function: FunctionType) -> frozenset[str]:
        """Those that a function sees."""
        found = {id(x) for x in function.__globals__.values()}
        return frozenset(module.__name__ for module in (tl, tl.core) if id(module) in found)

    def once(function: FunctionType) -> Any:
        scope = interpreter._LangPatchScope()
        if not modules(function) <= done:
            scope = patch(function)
            done.update(modules(function))
            restore = scope.restore
            # Only a launch restores, when it ends; for functions the interpreter leaves that to it.
            scope.restore = lambda: (done.clear(), restore())
        return scope

    interpreter._patch_lang = once
