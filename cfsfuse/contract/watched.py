"""A comparison in a process of its own, and somebody who watches whether it gets on.

A mount whose server does not answer hangs whoever looks at it, without an end by any signal. So what looks is a child,
and this process touches no mount: it can say which one it is, and leave.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
import time
from typing import TYPE_CHECKING

from cfsfuse.contract.comparison import Finding, Outcome
from cfsfuse.errors import HostError, printable
from cfsfuse.processes import Overdue, processor_time, working

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from cfsfuse.contract.comparison import Comparison
    from cfsfuse.processes import Worker

_TICK = 0.1  # seconds between two looks at the child
_HEAD = struct.Struct("=QQHH")  # looks, entries, lengths of the name and of the path
_SIZE = 1 << 14  # room for a name and a path that a system call takes


class _Whereabouts:
    """At whom and where the child looks, in memory that it shares with its parent."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SIZE)
        self._looks = 0

    def tell(self, entries: int, name: str, path: bytes) -> None:
        """Note what is about to be looked at."""
        self._looks += 1
        said = name.encode(errors="surrogateescape")
        _HEAD.pack_into(self._memory, 0, self._looks, entries, len(said), len(path))
        self._memory[_HEAD.size : _HEAD.size + len(said) + len(path)] = said + path

    @property
    def looks(self) -> int:
        return int(_HEAD.unpack_from(self._memory)[0])

    @property
    def entries(self) -> int:
        return int(_HEAD.unpack_from(self._memory)[1])

    @property
    def place(self) -> tuple[str, bytes]:
        """Name and path."""
        _, _, middle, length = _HEAD.unpack_from(self._memory)
        said = self._memory[_HEAD.size : _HEAD.size + middle + length]
        return said[:middle].decode(errors="surrogateescape"), said[middle:]


def watched(
    comparison: Comparison, patience: float, progress: Callable[[int], object] = lambda _: None
) -> Generator[Finding, None, None]:
    """Yield the findings of a comparison that another process makes; the outcome is in `comparison` afterwards.

    `progress` is told the number of entries that have been looked at. Raises what `Comparison.findings` does, and
    HostError when a mount keeps the other waiting for `patience` seconds, or something ends it.
    """
    where = _Whereabouts()

    def work(send: Callable[[object], None]) -> Outcome:
        for finding in comparison.findings(lambda name, path: where.tell(comparison.entries, name, path)):
            send(finding)
        return comparison.outcome

    with working(work) as worker:
        seen, since = (0, 0.0), time.monotonic()
        while True:
            value = None
            with contextlib.suppress(Overdue):
                value = _received(worker, where)
            progress(where.entries)
            if isinstance(value, Outcome):
                comparison.outcome = value
                return
            if isinstance(value, Finding):
                yield value
            signs = (where.looks, _used(worker.pid))
            if value is not None or signs != seen:
                seen, since = signs, time.monotonic()
            elif time.monotonic() - since > patience:
                raise unanswered(*where.place, patience)


def _received(worker: Worker, where: _Whereabouts) -> object:
    try:
        return worker.receive(_TICK)
    except EOFError:
        name, path = where.place
        place = f"at {printable(path or b'/')} of {name}"
        raise HostError(
            f"the comparison was killed {place}; where the kernel ran out of memory, its log says so"
        ) from None


def _used(pid: int) -> float:
    """Return the processor time of the child, which it uses for large files: these are one look."""
    with contextlib.suppress(OSError):
        return processor_time(pid)
    return 0.0


def unanswered(name: str, path: bytes, patience: float) -> HostError:
    """Return the error of a mount that does not answer."""
    return HostError(
        f"{name}: no answer within {patience:g} s when {printable(path or b'/')} was looked at: what serves it hangs; "
        "end that and compare again, or give it more time with --patience"
    )
