"""Processes that this one starts: what is below it, work that may hang, signals put off, and an end within a bound.

A call into a file system whose server does not answer returns for nothing but SIGKILL, and when the server has read the
request not even for that: it ends with the server. So nobody here waits for a process without a bound. proc(5).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import select
import signal
import struct
import time
import traceback
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Work = Callable[[Callable[[object], None]], object]

_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36
_CPUCLOCK_SCHED = 2  # include/linux/posix-timers_types.h; clock_getcpuclockid(3) makes a clock of it and a pid
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_DEATH = 3.0  # seconds that a process which was killed may take to go
_SHORT_DEATH = 0.5  # where it may well hang in a server
_PAUSE = 0.005
_LENGTH = struct.Struct("=Q")

_prctl = ctypes.CDLL(None).prctl

T = TypeVar("T")


def fork() -> int:
    """os.fork(), with signals put off: what a handler raises would be lost in the hooks that Python has there."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        return os.fork()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def adopting() -> Iterator[None]:
    """Become the parent of processes below this one whose own parent ends, for the length of the block."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        _prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Put off signals that end a program to the end of a block that would otherwise leave a mount or a process behind.

    Servers forked in it set handlers of their own.
    """
    came: list[int] = []
    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda which, _: came.append(which)) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Return whether `condition` comes true in so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(_PAUSE)
    return True


def processor_time(pid: int) -> float:
    """Return the seconds of processor time that a process has used, to the nanosecond; OSError when it has ended."""
    return time.clock_gettime(~pid << 3 | _CPUCLOCK_SCHED)


# What is below this process -------------------------------------------------------------------------------------------


class Started:
    """The processes below this one, but for those that were there before: a shell may have left some to `exec`.

    What those start is not ours either. Only one that starts and is orphaned between two looks, where we adopt orphans,
    could be taken for ours.
    """

    def __init__(self) -> None:
        # With the start time, for a pid is used again.
        self._others = {(pid, start) for pid, (_, _, start) in _below(_table()).items()}

    def living(self) -> list[int]:
        """Return those that live. Children that have ended are waited for."""
        processes = _table()
        others = [pid for pid, (_, _, start) in processes.items() if (pid, start) in self._others]
        for other in others:
            self._others |= {(pid, start) for pid, (_, _, start) in _below(processes, other).items()}
        found = []
        for pid, (state, _, start) in _below(processes).items():
            if (pid, start) in self._others:
                continue
            if state in ("Z", "X"):
                is_reaped(pid)
            else:
                found.append(pid)
        return found

    def end(self, seconds: float = 0) -> bool:
        """Wait so many seconds for their end and kill what is left then; return whether nothing is left."""
        return within(seconds, lambda: not self.living()) or within(_DEATH, self._are_killed)

    def _are_killed(self) -> bool:
        left = self.living()
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        return not left


_Process = tuple[str, int, int]  # state, parent, start time


def _table() -> dict[int, _Process]:
    found = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
            found[pid] = (fields[0].decode(), int(fields[1]), int(fields[19]))
    return found


def _below(processes: dict[int, _Process], top: int | None = None) -> dict[int, _Process]:
    """Return the processes below `top`, which is this one unless another is named."""
    children: dict[int, list[int]] = {}
    for pid, (_, parent, _) in processes.items():
        children.setdefault(parent, []).append(pid)
    found = list(children.get(os.getpid() if top is None else top, ()))
    for pid in found:  # grows meanwhile
        found += children.get(pid, ())
    return {pid: processes[pid] for pid in found}


def is_reaped(pid: int) -> bool:
    """Return whether a child has ended, and wait for it then; it may have been waited for already."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


# Work that may hang ---------------------------------------------------------------------------------------------------


class Overdue(Exception):
    """Nothing has come in time."""


class _Failed(NamedTuple):
    """An exception on its way to another process; `trace` is its traceback."""

    kind: type[BaseException]
    arguments: tuple[object, ...]
    attributes: dict[str, object]
    trace: str

    def restored(self) -> BaseException:
        """Return the exception as it was; its class is not asked to make it once more of other arguments."""
        error = self.kind.__new__(self.kind, *self.arguments)
        error.__dict__.update(self.attributes)
        error.add_note(self.trace)
        return error


class Worker:
    """What comes from a child process; made by `working`."""

    def __init__(self, pid: int, reading: int) -> None:
        self.pid = pid
        self._reading = reading
        self._said = bytearray()

    def receive(self, seconds: float) -> object:
        """Return the next value; raise what the work raises, and Overdue when nothing comes in time.

        Raises EOFError when there is no more, although the work has not ended well: a signal has ended it.
        """
        end = time.monotonic() + seconds
        while (message := self._message()) is None:
            if not select.select([self._reading], [], [], max(0.0, end - time.monotonic()))[0]:
                raise Overdue(f"no end within {seconds:g} s")
            piece = os.read(self._reading, 1 << 20)
            if not piece:
                raise EOFError("crashed")
            self._said += piece
        value: object = pickle.loads(message)  # noqa: S301 - from a child that is a copy of this process
        if isinstance(value, _Failed):
            raise value.restored()
        return value

    def _message(self) -> bytes | None:
        """Take a whole message from what has come; None when there is none yet."""
        if len(self._said) < _LENGTH.size:
            return None
        end = _LENGTH.size + int(_LENGTH.unpack_from(self._said)[0])
        if len(self._said) < end:
            return None
        message = bytes(self._said[_LENGTH.size : end])
        del self._said[:end]
        return message


@contextlib.contextmanager
def working(work: Work) -> Iterator[Worker]:
    """Do `work` in a child process with what sends values here; what it returns is the last of them.

    The child has no standard streams: whoever reads ours must not wait for a process that cannot be killed. It ends
    with the block, and with this process. One that hangs in a server may still be there, for who ends that server.
    """
    reading, writing = os.pipe()
    pid = None
    patience = _SHORT_DEATH
    try:
        with undisturbed():
            parent = os.getpid()
            pid = os.fork()
            if pid == 0:
                os.close(reading)
                _answer(work, writing, parent)
            os.close(writing)
        yield Worker(pid, reading)
        patience = _DEATH
    finally:
        with undisturbed():
            os.close(reading)
            if pid is not None:
                _end(pid, patience)


def bounded(function: Callable[[], T], seconds: float) -> T:
    """Return what `function` returns in a child process, or raise what it raises; Overdue when it takes longer."""
    with working(lambda _: function()) as worker:
        return cast("T", worker.receive(seconds))


def _end(pid: int, patience: float) -> None:
    for kill in (os.killpg, os.kill):  # it may have been too early for its own session
        with contextlib.suppress(OSError):
            kill(pid, signal.SIGKILL)
    within(patience, lambda: is_reaped(pid))


def _answer(work: Work, writing: int, parent: int) -> NoReturn:
    def send(value: object) -> None:
        message = pickle.dumps(value)
        _write(writing, _LENGTH.pack(len(message)) + message)

    try:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(null, stream)
        send(work(send))
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent raises it
        parts = error.__reduce__()
        attributes = parts[2] if len(parts) > 2 else {}
        send(_Failed(type(error), parts[1], attributes, traceback.format_exc()))  # type: ignore[arg-type]  # a tuple
    finally:
        os._exit(0)


def _write(fd: int, message: bytes) -> None:
    while message:
        message = message[os.write(fd, message) :]
