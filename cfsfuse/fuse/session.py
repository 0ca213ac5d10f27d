"""The life of a mounted session: one AsyncExitStack, read from top to bottom.

pyfuse3 keeps one session a process, in globals.
"""

from __future__ import annotations

import contextlib
import os
import types
from typing import TYPE_CHECKING, Protocol

import pyfuse3
import trio

from cfsfuse.errors import HostError
from cfsfuse.fuse.life import SIGNALS, settle_memory, stop_on_signal
from cfsfuse.fuse.polling import RequestWaiter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cfsfuse.fuse.operations import Operations

# Requests under way at once, each in a task: many more than may wait for threads, so that metadata never waits for
# them.
_TASKS = 256


class Turn:
    """Lets one task at a time wait for requests: pyfuse3 takes it around its wait, as it would a trio.Lock.

    A trio.Lock hands over to the next task whenever it is released, at the cost of a round of the scheduler for every
    request. Here the task that has answered a request without suspending goes on with the next one; another one takes
    the turn only when it has suspended.
    """

    def __init__(self) -> None:
        self._taken = False
        self._woken = False
        self._waiting = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        while self._taken:
            await self._waiting.park()
            self._woken = False
        self._taken = True

    async def __aexit__(self, *_: object) -> None:
        self._taken = False
        if not self._woken and self._waiting:
            self._woken = True
            self._waiting.unpark()


class Life(Protocol):
    """What the one who mounts wants to know, and knows, of the mount's life."""

    async def begins(self) -> None:
        """Announce the mount: it is usable. Raises a CfsError when it is not."""

    def ends(self) -> bool:
        """Return whether what is mounted there is still this mount, and left to the session to unmount."""


async def serve(operations: Operations, mountpoint: str, options: Sequence[str], *, poll: float, life: Life) -> None:
    """Mount at `mountpoint` and serve until it is unmounted, or until SIGINT or SIGTERM.

    `options` are libfuse's, `poll` is in seconds. Raises HostError, with what libfuse or fusermount3 said, when the
    mount fails; then nothing stays mounted.
    """
    async with contextlib.AsyncExitStack() as stack:
        signals = stack.enter_context(trio.open_signal_receiver(*SIGNALS))
        _mount(operations, mountpoint, options)
        # Lazily, so a mount in use goes away as well.
        stack.callback(lambda: pyfuse3.close(unmount=life.ends()))
        stack.enter_context(_polled(RequestWaiter(poll, operations.is_idle, operations.work_ahead)))
        settle_memory()
        await life.begins()
        nursery = await stack.enter_async_context(trio.open_nursery())

        def stop() -> None:
            pyfuse3.terminate()
            nursery.cancel_scope.cancel()

        nursery.start_soon(stop_on_signal, signals, stop)
        await pyfuse3.main(min_tasks=_TASKS, max_tasks=_TASKS)
        nursery.cancel_scope.cancel()


@contextlib.contextmanager
def _polled(waiter: RequestWaiter) -> Iterator[None]:
    """Let pyfuse3 wait through `waiter`: it takes what it needs of trio from its own global, as for asyncio."""
    original = pyfuse3.trio  # type: ignore[attr-defined]  # not in the stubs; pyfuse3.asyncio replaces it as well
    lowlevel = types.SimpleNamespace(**vars(trio.lowlevel))
    lowlevel.wait_readable = waiter.wait_readable
    pyfuse3.trio = types.SimpleNamespace(**vars(trio))  # type: ignore[attr-defined]  # likewise
    pyfuse3.trio.lowlevel = lowlevel  # type: ignore[attr-defined]  # likewise
    pyfuse3.trio.Lock = Turn  # type: ignore[attr-defined]  # likewise
    try:
        yield
    finally:
        pyfuse3.trio = original  # type: ignore[attr-defined]  # likewise


def _mount(operations: Operations, mountpoint: str, options: Sequence[str]) -> None:
    with _captured_stderr() as said:
        try:
            pyfuse3.init(operations, mountpoint, set(options))
        except RuntimeError as error:
            reason = " ".join(said().split()) or str(error)
            raise HostError(f"{mountpoint}: {reason}") from None


@contextlib.contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    """Give what is written to descriptor 2: libfuse and fusermount3 say their reasons only there."""
    kept = os.dup(2)
    with open(os.memfd_create("cfsfuse-stderr", os.MFD_CLOEXEC), "w+b") as file:
        os.dup2(file.fileno(), 2)

        def said() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
