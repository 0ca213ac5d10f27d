"""Waiting for requests: awake while they follow closely, asleep when they do not."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

pytest.importorskip("pyfuse3")  # the package that this is a part of needs it

from cfsfuse.fuse.polling import RequestWaiter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LONG = 0.05  # seconds of polling; long, so that a slow machine makes no difference


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    yield reading, writing
    os.close(reading)
    os.close(writing)


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count how often the event loop is left to sleep."""
    counted: list[int] = []
    original = trio.lowlevel.wait_readable

    async def wait_readable(fd: int) -> None:
        counted.append(fd)
        await original(fd)

    monkeypatch.setattr(trio.lowlevel, "wait_readable", wait_readable)
    return counted


def waiter(
    seconds: float, *, idle: Callable[[], bool] = lambda: True, work: Callable[[], bool] = lambda: False
) -> RequestWaiter:
    return RequestWaiter(seconds, idle, work)


def processors(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(count)))


async def request(waiting: RequestWaiter, pipe: tuple[int, int]) -> None:
    """Let one request come while the waiter waits for it, and take it."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiting.wait_readable, pipe[0])
        await trio.testing.wait_all_tasks_blocked()
        os.write(pipe[1], b"x")
    os.read(pipe[0], 1)


async def close_requests(waiting: RequestWaiter, pipe: tuple[int, int], count: int) -> None:
    """Let `count` requests come, each already there when it is waited for."""
    for _ in range(count):
        os.write(pipe[1], b"x")
        await waiting.wait_readable(pipe[0])
        os.read(pipe[0], 1)


async def test_requests_that_follow_closely_are_polled_for(
    pipe: tuple[int, int], sleeps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    processors(monkeypatch, 2)
    waiting = waiter(LONG)
    await close_requests(waiting, pipe, 1)
    sleeps.clear()
    await close_requests(waiting, pipe, 500)
    assert len(sleeps) < 50


@pytest.mark.parametrize(
    ("count", "seconds", "idle"), [(1, LONG, True), (2, 0.0, True), (2, LONG, False)],
    ids=["single processor", "poll=0", "others are working"],
)  # fmt: skip
async def test_it_sleeps_when_polling_would_do_harm(
    pipe: tuple[int, int],
    sleeps: list[int],
    monkeypatch: pytest.MonkeyPatch,
    *,
    count: int,
    seconds: float,
    idle: bool,
) -> None:
    processors(monkeypatch, count)
    waiting = waiter(seconds, idle=lambda: idle)
    for _ in range(50):
        await request(waiting, pipe)
    assert len(sleeps) == 50


async def test_what_is_there_is_taken_without_sleep(
    pipe: tuple[int, int], sleeps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    processors(monkeypatch, 1)
    await close_requests(waiter(0.0), pipe, 100)
    assert sleeps == []


async def test_what_is_taken_is_returned(pipe: tuple[int, int]) -> None:
    given = iter([None, None, b"first"])
    os.write(pipe[1], b"x")
    assert await waiter(0.0).request(pipe[0], lambda: next(given)) == b"first"


async def test_idle_wait_uses_no_processor_time(
    pipe: tuple[int, int], sleeps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    processors(monkeypatch, 2)
    waiting = waiter(0.001)
    await request(waiting, pipe)
    sleeps.clear()
    with trio.move_on_after(0.5):
        before = time.thread_time()
        await waiting.wait_readable(pipe[0])
    assert time.thread_time() - before < 0.1
    assert sleeps == [pipe[0]]


async def test_after_a_pause_it_waits_asleep_first(
    pipe: tuple[int, int], sleeps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    processors(monkeypatch, 2)
    waiting = waiter(0.0001)
    await close_requests(waiting, pipe, 10)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiting.wait_readable, pipe[0])
        with trio.move_on_after(0.02):
            await trio.sleep_forever()
        os.write(pipe[1], b"x")
    os.read(pipe[0], 1)
    sleeps.clear()
    await request(waiting, pipe)
    assert len(sleeps) == 1


async def test_other_tasks_get_their_turn_while_there_is_work_ahead(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much there is: a signal, or the end of the mount, waits for a few steps at most."""
    processors(monkeypatch, 2)
    steps: list[float] = []

    def work() -> bool:
        time.sleep(0.0005)
        steps.append(time.monotonic())
        return True

    waiting = waiter(LONG, work=work)
    await close_requests(waiting, pipe, 1)
    await request(waiting, pipe)
    steps.clear()
    turns = 0
    with trio.move_on_after(0.2) as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(waiting.wait_readable, pipe[0])
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1
    assert scope.cancelled_caught
    assert len(steps) > 20
    assert turns > len(steps) / 10


async def test_no_work_ahead_while_others_are_working(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    processors(monkeypatch, 2)
    steps: list[int] = []
    idle = [True]

    def work() -> bool:
        steps.append(1)
        idle[0] = len(steps) < 5
        return True

    waiting = waiter(LONG, work=work, idle=lambda: idle[0])
    await request(waiting, pipe)
    with trio.move_on_after(0.1):
        await waiting.wait_readable(pipe[0])
    assert len(steps) == 5


async def test_other_tasks_get_their_turn_while_requests_pour_in(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    processors(monkeypatch, 2)
    waiting = waiter(LONG)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        end = time.perf_counter() + 0.1
        while time.perf_counter() < end:
            await close_requests(waiting, pipe, 20)
        nursery.cancel_scope.cancel()
    assert turns > 5


async def test_waiting_can_be_cancelled(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    processors(monkeypatch, 2)
    waiting = waiter(0.001)
    await close_requests(waiting, pipe, 5)
    with trio.move_on_after(0.05) as scope:
        await waiting.wait_readable(pipe[0])
    assert scope.cancelled_caught
    await request(waiting, pipe)


async def test_closed_pipe_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    processors(monkeypatch, 2)
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    waiting = waiter(LONG)
    await close_requests(waiting, (reading, writing), 5)
    os.close(writing)
    with trio.fail_after(5):
        await waiting.wait_readable(reading)
    assert os.read(reading, 1) == b""
    os.close(reading)
