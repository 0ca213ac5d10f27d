"""What a mount leaves behind and what that uses; and work on a mount, which may hang.

The benchmark is the subreaper of all that it starts: a daemon becomes its child when the daemon's own parent ends. So
what it has `Started` is exactly what the one mount under way has, whatever its names and sessions.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from cfsfuse import processes
from cfsfuse.bench.failure import ColumnFailed
from cfsfuse.processes import Overdue

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cfsfuse.processes import Started

_DEVICE = "/dev/fuse"


def bounded(
    function: Callable[[], Sequence[float]], seconds: float, give_up: Callable[[], object] | None = None
) -> list[float]:
    """Return what `function` does in a child process; raise ColumnFailed for its error, or when it takes longer.

    In that case `give_up` is called, which has to end the server in which the child may hang.
    """
    try:
        return list(processes.bounded(function, seconds))
    except Overdue as error:
        if give_up is not None:
            give_up()
        raise ColumnFailed(str(error)) from None
    except OSError as error:
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        raise ColumnFailed(f"{where}{error.strerror}") from None
    except ColumnFailed:
        raise
    except Exception as error:
        raise ColumnFailed(str(error) or repr(error)) from error


def servers(started: Started) -> tuple[int, ...]:
    """Return the processes that serve the mount under way; none when the kernel alone does.

    Those that hold /dev/fuse, or where none does all of them. fusermount3 is none, although it may hold it, too.
    """
    found = [pid for pid in started.living() if not _name(pid).startswith("fusermount")]
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
    """Return the seconds of processor time that processes have used; raise ColumnFailed when one has ended."""
    try:
        return sum(map(processes.processor_time, pids))
    except OSError:
        raise ColumnFailed("its server has ended") from None


def resident_memory(pids: Sequence[int]) -> float:
    """Return the resident memory of processes in MiB; raise ColumnFailed when one has ended."""
    try:
        return sum(map(_resident, pids)) / (1 << 20)
    except OSError:
        raise ColumnFailed("its server has ended") from None


def _resident(pid: int) -> int:
    with open(f"/proc/{pid}/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
