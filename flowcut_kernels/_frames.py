"""Where Python keeps the frames of calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def in_one_chunk(run: Callable, *args: Any) -> Any:
    """`run(*args)`, with the frames of all that it calls in one piece of memory.

    CPython 3.11 and later keep a thread's frames in chunks of 16 KiB. A call that no longer fits gets one more chunk
    from the system, and gives it back when it returns. Where that happens to the calls in a model's inner loop, a
    forward pass takes up to half as long again, by nothing but how deep its caller's stack is. A frame that says it
    needs 64 KiB is given a chunk of 128: what it leaves is several times what a model's frames take.
    """
    return run(*args)


in_one_chunk.__code__ = in_one_chunk.__code__.replace(co_stacksize=64 * 1024 // 8)
