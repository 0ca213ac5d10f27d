"""Waiting for the next request, without sleeping while requests follow one another closely.

Waking a sleeping server costs more than any request's work: 30 to 60 µs between the processors of a virtual machine.
So for a while after a request the server asks for the next one again and again, and only then sleeps.
"""

from __future__ import annotations

import os
import select
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

# The event loop gets a turn at least that often, in seconds: signals and finished threads wait for it.
_TURN = 0.001
# A gap that includes our own waking up counts as close up to this multiple of the polling time.
_CLOSE = 3


class RequestWaiter:
    """Decides, request by request, between polling and sleeping."""

    def __init__(self, seconds: float, is_idle: Callable[[], bool], work_ahead: Callable[[], bool]) -> None:
        """Poll for up to `seconds` after a request, but not while `is_idle` denies it: other tasks need the loop.

        Between polls `work_ahead` may do a little of what will be asked next; it returns whether it did.
        """
        # On a single processor polling would keep away the very process that makes the next request.
        self._seconds = seconds if len(os.sched_getaffinity(0)) > 1 else 0.0
        self._is_idle = is_idle
        self._work_ahead = work_ahead
        self._poll = select.poll()
        self._fd: int | None = None
        self._last_turn = 0.0
        self._close = False

    async def wait_readable(self, fd: int) -> None:
        """Return when `fd`, which is the same in every call, is readable."""
        if fd != self._fd:
            self._poll.register(fd, select.POLLIN)
            self._fd = fd
        await self.request(fd, lambda: self._poll.poll(0) or None)

    async def request(self, fd: int, take: Callable[[], T | None]) -> T:
        """Return what `take` gives; when it has nothing to give, it will have when `fd` is readable."""
        start = perf_counter()
        if start - self._last_turn > _TURN:
            start = await self._take_turn()
        end = start + self._seconds
        while (found := take()) is None:
            if self._close and self._is_idle() and (self._work_ahead() or perf_counter() < end):
                if perf_counter() - self._last_turn > _TURN:
                    await self._take_turn()
                continue
            await trio.lowlevel.wait_readable(fd)
            self._last_turn = perf_counter()
            self._close = self._last_turn - start < self._seconds * _CLOSE
        return found

    async def _take_turn(self) -> float:
        """Give the event loop a turn; return the time after it."""
        await trio.lowlevel.checkpoint()
        self._last_turn = perf_counter()
        return self._last_turn
