"""Rules for all unit tests: hypothesis profiles, and no warning in the log that a test has not claimed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Deterministic: what fails on one machine fails on all. The long run (-m slow) draws anew each time.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("ci", max_examples=100, derandomize=True, database=None, **_COMMON)  # type: ignore[arg-type]
settings.register_profile("long", max_examples=5000, database=None, **_COMMON)  # type: ignore[arg-type]
settings.load_profile("ci")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes minutes, unless -m asks for something."""
    if not config.getoption("-m"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True)
def claim(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[str, int], list[str]]]:
    """Fail a test that leaves warnings in the log; `claim(text, count)` expects exactly so many that have `text`."""
    claimed: set[int] = set()
    caplog.set_level(logging.DEBUG, "cfsfuse")

    def warnings() -> list[logging.LogRecord]:
        return [record for record in caplog.get_records("call") if record.levelno >= logging.WARNING]

    def expect(text: str, count: int = 1) -> list[str]:
        found = [record for record in warnings() if text in record.getMessage()]
        assert len(found) == count, [record.getMessage() for record in warnings()]
        claimed.update(map(id, found))
        return [record.getMessage() for record in found]

    yield expect
    left = [record.getMessage() for record in warnings() if id(record) not in claimed]
    assert not left, f"warnings in the log that the test did not claim: {left}"
