"""Processes: those that a mount leaves behind, what they use, and work that may hang done in a child.

The benchmark is the subreaper of all that it starts: a daemon becomes its child when the daemon's own parent ends. So
the living descendants of this process are exactly what the one mount under way has started, whatever its names and
sessions.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import time
from typing import TYPE_CHECKING, NoReturn

from cfsfuse.bench.failure import Failure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_PR_SET_CHILD_SUBREAPER = 36  # include/uapi/linux/prctl.h
_CPUCLOCK_SCHED = 2  # include/linux/posix-timers_types.h; clock_getcpuclockid(3) makes a clock of it and a pid
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_DEATH = 5.0  # seconds that a process which was killed may take to go
_DEVICE = "/dev/fuse"


@contextlib.contextmanager
def adopting() -> Iterator[None]:
    """Be the subreaper for the length of the block."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off signals to the end of a block that would otherwise leave a mount or a process behind."""
    pending: list[int] = []
    heard = [number for number in _INTERRUPTS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda which, _: pending.append(which)) for number in heard}
    try:
        yield
    finally:
        for heard_before, handler in before.items():
            signal.signal(heard_before, handler)
        for number in pending[:1]:
            signal.raise_signal(number)


def bounded(function: Callable[[], Sequence[float]], seconds: float) -> list[float]:
    """Return what `function` does, called in a child process; raise Failure for its error, or when it takes longer.

    A call into a file system whose server hangs returns for nothing but SIGKILL. It and what it has started are killed.
    """
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as pipe:
        with uninterrupted():
            pid = os.fork()
            if pid == 0:
                _answer(function, writing)
            os.close(writing)
        try:
            said = _read_all(pipe.fileno(), seconds)
        finally:
            with uninterrupted():
                _kill_group(pid)
                within(_DEATH, lambda: _is_reaped(pid))
    if said is None:
        raise Failure(f"no end within {seconds:g} s")
    answer = json.loads(said or b'"crashed"')
    if isinstance(answer, str):
        raise Failure(answer)
    return [float(value) for value in answer]


def _answer(function: Callable[[], Sequence[float]], writing: int) -> NoReturn:
    answer: Sequence[float] | str = "crashed"
    try:
        for number in _INTERRUPTS:
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        answer = function()
    except OSError as error:
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        answer = f"{where}{error.strerror}"
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent says it
        answer = str(error) or repr(error)
    finally:
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)


def _read_all(fd: int, seconds: float) -> bytes | None:
    """Return what is written to a pipe up to its end; None when that does not come in time."""
    said = b""
    end = time.monotonic() + seconds
    while select.select([fd], [], [], max(0.0, end - time.monotonic()))[0]:
        piece = os.read(fd, 1 << 16)
        if not piece:
            return said
        said += piece
    return None


def _kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):  # it may have been too early for its own session
        with contextlib.suppress(OSError):
            kill(pid, signal.SIGKILL)


def _is_reaped(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Return whether `condition` comes true in so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


# What a mount has started ---------------------------------------------------------------------------------------------


def descendants() -> list[int]:
    """Return the living processes below this one. Children that have ended are waited for, whosesoever they were."""
    me = os.getpid()
    children: dict[int, list[int]] = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        state, parent = _state(pid)
        if state in ("Z", "X"):
            if parent == me:
                _is_reaped(pid)
        else:
            children.setdefault(parent, []).append(pid)
    found = list(children.get(me, ()))
    for pid in found:  # grows meanwhile
        found += children.get(pid, ())
    return found


def _state(pid: int) -> tuple[str, int]:
    """Return the state of a process, and its parent; as if it had ended for long when it is not there."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, parent = file.read().rpartition(b")")[2].split()[:2]
    except OSError:
        return "X", 0
    return state.decode(), int(parent)


def kill_descendants() -> bool:
    """Kill all that is below this process; return whether nothing is left."""

    def are_gone() -> bool:
        left = descendants()
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        return not left

    return within(_DEATH, are_gone)


def servers() -> tuple[int, ...]:
    """Return the processes that serve the mount under way; none when the kernel alone does.

    Those that hold /dev/fuse, or where none does all of them. fusermount3 is none, although it may hold it, too.
    """
    found = [pid for pid in descendants() if not _name(pid).startswith("fusermount")]
    return tuple([pid for pid in found if _holds_device(pid)] or found)


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _holds_device(pid: int) -> bool:
    with contextlib.suppress(OSError):  # it has ended, or is not ours to look at
        return any(_link(entry.path) == _DEVICE for entry in os.scandir(f"/proc/{pid}/fd"))
    return False


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def processor_time(pids: Sequence[int]) -> float:
    """Return the processor time that processes have used, in seconds, to the nanosecond; Failure when one has ended."""
    try:
        return sum(time.clock_gettime(~pid << 3 | _CPUCLOCK_SCHED) for pid in pids)
    except OSError:
        raise Failure("its server has ended") from None


def resident_memory(pids: Sequence[int]) -> float:
    """Return the resident memory of processes in MiB; raise Failure when one has ended."""
    try:
        return sum(map(_resident, pids)) / (1 << 20)
    except OSError:
        raise Failure("its server has ended") from None


def _resident(pid: int) -> int:
    with open(f"/proc/{pid}/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
