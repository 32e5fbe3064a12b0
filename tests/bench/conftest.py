"""Fixtures of the tests that open pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from browser import Visits, chromium

from flowcut_kernels.bench import timing


@pytest.fixture(autouse=True)
def _unsettled(monkeypatch) -> None:
    """Calls that only settle the caches before a sample are left out: no test looks at how long something took."""
    monkeypatch.setattr(timing, "SETTLING", 0.0)


# By module, not by session: until Playwright's loop is closed nothing else in the process can run one.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture
def visit(browser) -> Iterator[Visits]:
    """``visit(path, width=1280)`` opens a page; a page with :meth:`Visits.complaints` when the test ends fails it."""
    visits = Visits(browser)
    yield visits
    complaints = visits.complaints()
    visits.close()
    assert not complaints
