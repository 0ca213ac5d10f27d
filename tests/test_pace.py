"""When waiting for a disk in place is worth it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from cfsfuse.pace import Pace

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Callable[[Pace, float, int], None]:
    """Let a number of reads take so many seconds each."""

    def taking(pace: Pace, seconds: float, times: int) -> None:
        for _ in range(times):
            clock = iter((0.0, seconds))
            monkeypatch.setattr(time, "perf_counter", lambda clock=clock: next(clock))
            assert pace.timed(lambda: "answer") == "answer"

    return taking


def test_a_disk_is_slow_until_it_has_been_fast_for_a_while(take: Callable[[Pace, float, int], None]) -> None:
    pace = Pace()
    assert not pace.is_fast
    take(pace, 200e-6, 10)
    assert not pace.is_fast
    take(pace, 200e-6, 90)
    assert pace.is_fast


def test_one_slow_read_is_enough_to_be_slow_again(take: Callable[[Pace, float, int], None]) -> None:
    pace = Pace()
    take(pace, 200e-6, 100)
    take(pace, 0.5, 1)
    assert not pace.is_fast


def test_reads_that_fail_say_nothing_about_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pace()
    pace._average = 0.0
    clock = iter((0.0, 1.0))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))

    def fail() -> None:
        raise ValueError("gone")

    with pytest.raises(ValueError, match="gone"):
        pace.timed(fail)
    assert pace.is_fast


def test_where_a_server_may_hang_no_read_is_fast(take: Callable[[Pace, float, int], None]) -> None:
    pace = Pace(may_be_fast=False)
    take(pace, 200e-6, 100)
    assert not pace.is_fast
