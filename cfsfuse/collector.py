"""Python's search for reference cycles, switched off where a tree is made."""

from __future__ import annotations

import contextlib
import gc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Keep the collector from running in the block: in the whole process, all its threads, for the time of a build.

    The objects of a growing tree live on, and are in no cycles; looking for some again and again would take as long as
    making them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
