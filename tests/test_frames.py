"""Frames of calls in one piece of memory."""

import sys
import time
from statistics import median

import pytest

from flowcut_kernels._frames import in_one_chunk

DEPTHS = range(0, 160)  # of frames of `below`, more than fill a chunk


def inner():
    pass


def loop(calls):
    start = time.process_time()
    for _ in range(calls):
        inner()
    return time.process_time() - start


def below(depth, run):
    return run() if depth == 0 else below(depth - 1, run)


def worst(run):
    """How many times as long calls take below the worst depth as below most."""
    taken = [below(depth, run) for depth in DEPTHS]
    return max(taken) / median(taken)


@pytest.mark.skipif(sys.implementation.name != "cpython" or sys.version_info < (3, 11), reason="keeps frames otherwise")
def test_no_call_asks_for_memory():
    """Of 2,000 calls in a loop those that do not fit in a chunk ask the system for another one, each of them."""
    assert worst(lambda: loop(2000)) > 10
    assert worst(lambda: in_one_chunk(loop, 2000)) < 5


def test_passes_on():
    assert in_one_chunk(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        in_one_chunk(divmod, 7, 0)
