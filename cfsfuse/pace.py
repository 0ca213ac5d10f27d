"""Whether a disk is so fast that waiting for it costs everybody less than a thread that waits."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

# Going to a thread and back takes two wake-ups and several turns of the interpreter's lock: 150 to 300 µs on a virtual
# machine, of which the processor is busy for most; a solid-state disk answers in about the same.
_FAST = 1e-3  # seconds
_WEIGHT = 1 / 8


class Pace:
    """The recent pace of the reads that had to wait: a moving average, in which a slow one counts in full."""

    def __init__(self) -> None:
        self._average = 1.0  # slow, until there is evidence of the contrary

    @property
    def is_fast(self) -> bool:
        return self._average < _FAST

    def timed(self, work: Callable[[], T]) -> T:
        """Do `work` and note how long it took."""
        start = time.perf_counter()
        try:
            return work()
        finally:
            seconds = time.perf_counter() - start
            self._average = max(
                seconds if seconds > _FAST else 0.0, self._average + (seconds - self._average) * _WEIGHT
            )
