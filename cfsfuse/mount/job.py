"""Processes around a command: who waits for it, signals that are passed on to it, and the end of what it leaves."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from typing import TYPE_CHECKING, NamedTuple, NoReturn, Self

from cfsfuse.mount import syscalls
from cfsfuse.processes import adopting

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from types import FrameType, TracebackType

PATIENCE = 2.0  # seconds for what has been killed to be gone: it takes a moment, unless it hangs in the kernel

_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_OF_THE_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
_OF_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)  # which it ignores, but commands rely on
_ORPHANED = signal.SIGALRM  # tells the process that does the work that the one above it has been killed


def apart() -> int | None:
    """Go on in a child process, returning None there; here return its exit status when it has ended.

    Should one of the two be killed, the other ends the command with all that it has started.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where a caller has it ignored, the kernel keeps no exit status
    us, not_ours = os.getpid(), children()
    with adopting(), Signals() as signals:
        pid = os.fork()
        if pid == 0:
            signal.signal(_ORPHANED, _end)
            syscalls.die_with_parent(_ORPHANED)
            if os.getppid() != us:
                signal.raise_signal(_ORPHANED)
            return None
        status = signals.attend(pid)
        if os.WIFSIGNALED(status):  # or it has done that itself
            end_children(lambda pid: pid in not_ours or _shares_our_mounts(pid))
    return exit_status(status)


class Signals:
    """What comes to a process on behalf of a child: it waits from the fork on, as long as the block runs.

    What the caller of this process has it ignore is none of that.
    """

    def __init__(self) -> None:
        self._heard = _heard()
        self._awaited = (*self._heard, signal.SIGCHLD, _ORPHANED)
        self._mask: set[int] = set()

    def __enter__(self) -> Self:
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._awaited)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def fork(self) -> int:
        """Fork what becomes a command: there, no signal is lost to a handler of ours."""
        pid = os.fork()
        if pid == 0:
            for number in (*self._heard, _ORPHANED, *_OF_PYTHON):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        return pid

    def attend(self, pid: int) -> int:
        """Pass signals on to a child until it ends; return its status, as of waitpid(2).

        Others that end meanwhile are reaped: orphans are ours. SystemExit when the process above has been killed.
        """
        while (status := _reaped(pid)) is None:
            came = signal.sigwaitinfo(self._awaited)
            if came.si_signo == _ORPHANED:
                _end(came.si_signo, None)
            if came.si_signo != signal.SIGCHLD and not _has_got(pid, came):
                with contextlib.suppress(PermissionError):  # a set-user-ID program
                    os.kill(pid, came.si_signo)
        return status

    def ignore(self) -> None:
        """Ignore those that wait and those to come."""
        _ignore(self._heard)


class Server(NamedTuple):
    """A child that serves the tree. Its descriptor tells of its end when it has been reaped as well."""

    pid: int
    fd: int

    def has_ended(self, seconds: float = 0) -> bool:
        """Return whether it has, or does within a time."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.fd, signal.SIGKILL)


@contextlib.contextmanager
def servers() -> Iterator[list[Server]]:
    """Yield what serves, right after mounting: all children."""
    with contextlib.ExitStack() as stack:
        yield [Server(pid, stack.enter_context(syscalls.closing(os.pidfd_open(pid)))) for pid in children()]


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let signals end this process as an exception does, so that nothing stays behind.

    In a server that is forked meanwhile they have their default effect, until it has handlers of its own.
    """
    us = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        _ignore(before)  # a second one would interrupt the clearing up
        if os.getpid() == us:
            _end(number, frame)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    before = {number: signal.signal(number, end) for number in (*_heard(), _ORPHANED)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def children() -> list[int]:
    pid = os.getpid()
    with contextlib.suppress(OSError), open(f"/proc/self/task/{pid}/children", encoding="ascii") as file:
        return [int(word) for word in file.read().split()]
    return []


def end_children(is_spared: Callable[[int], bool] = lambda _: False, seconds: float = PATIENCE) -> list[int]:
    """Kill the children; when one ends its own become ours, and their turn comes. Return those that do not end."""
    end = time.monotonic() + seconds
    while (left := [pid for pid in children() if not is_spared(pid)]) and time.monotonic() < end:
        for pid in left:
            with contextlib.suppress(PermissionError):  # a set-user-ID program
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, os.WNOHANG)
        time.sleep(0.002)
    return left


def exit_status(status: int) -> int:
    """Return for a status of waitpid(2) the one that a shell would have."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _heard() -> list[signal.Signals]:
    numbers = (*_FORWARDED, *_OF_THE_TERMINAL)
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def _ignore(numbers: Collection[signal.Signals]) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def _reaped(pid: int) -> int | None:
    """Reap what has ended up to a child, and return that one's status; None when it has not ended."""
    while (ended := os.waitpid(-1, os.WNOHANG))[0]:
        if ended[0] == pid:
            return ended[1]
    return None


def _has_got(pid: int, came: signal.struct_siginfo) -> bool:
    """Return whether a child has got a signal by itself: the kernel sends what is typed to a whole process group."""
    is_typed = came.si_signo in _OF_THE_TERMINAL and came.si_code > 0
    return is_typed and os.getpgid(pid) == os.getpgrp()


def _shares_our_mounts(pid: int) -> bool:
    """Return whether an orphan is none of the command's: other children of the caller's may have left it."""
    with contextlib.suppress(OSError):
        return os.path.samefile(f"/proc/{pid}/ns/mnt", "/proc/self/ns/mnt")
    return False
