"""Whether a disk is so fast that waiting for it costs everybody less than a thread that waits."""

from __future__ import annotations

import time
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

# Going to a thread and back takes two wake-ups and several turns of the interpreter's lock: 150 to 300 µs on a virtual
# machine, of which the processor is busy for most; a solid-state disk answers in about the same.
_FAST = 1e-3  # seconds
_SLOW = 4 * _FAST  # what a slow read counts at most: a dozen fast ones make up for it
_WEIGHT = 1 / 8


class Pace:
    """The recent pace of the reads that were waited for, be it in vain: a moving average.

    A slow one sets it back at once, whatever else has come from memory.
    """

    def __init__(self, *, may_be_fast: bool = True) -> None:
        """Start slow, until there is evidence of the contrary; without `may_be_fast` there never is."""
        self._average = _SLOW
        self._may_be_fast = may_be_fast
        self._lock = Lock()

    @property
    def is_fast(self) -> bool:
        return self._may_be_fast and self._average < _FAST

    def timed(self, work: Callable[[], T]) -> T:
        """Do `work` and, when it succeeds, note how long it took."""
        start = time.perf_counter()
        done = work()
        seconds = min(time.perf_counter() - start, _SLOW)
        with self._lock:
            average = self._average + (seconds - self._average) * _WEIGHT
            self._average = max(seconds, average) if seconds > _FAST else average
        return done
