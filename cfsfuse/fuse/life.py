"""What the sessions have in common: signals end them, and memory is settled when they begin."""

from __future__ import annotations

import gc
import logging
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


async def stop_on_signal(signals: AsyncIterator[int], stop: Callable[[], object]) -> None:
    """Wait for a signal, and `stop`. Requests that wait for a disk are not waited for."""
    async for number in signals:
        log.info("%s: unmounting", signal.Signals(number).name)
        stop()
        return


def settle_memory() -> None:
    """Tell the collector of cycles, which is off while a mount is made, that what exists now lives as long as that."""
    gc.freeze()
    gc.enable()
    # Listings allocate by the thousand and hardly anything is a cycle: look for those seldom.
    gc.set_threshold(50_000)
