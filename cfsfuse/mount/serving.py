"""What everybody who mounts has to know of servers, those included who need none, and shall not import one."""

from __future__ import annotations

import os
from enum import Enum


class Serving(Enum):
    """Which process serves a mount, and how long."""

    BACKGROUND = "a daemon"
    TIED = "a daemon that ends when the process that mounts does"
    FOREGROUND = "the process that mounts"


def open_descriptors() -> list[int]:
    """Return the descriptors above the standard ones: called first of all, those that the caller left open for us."""
    listed = [int(name) for name in os.listdir("/proc/self/fd")]
    # The descriptor of the listing itself is closed by now, and its number will be used again.
    return [fd for fd in listed if fd > 2 and os.path.lexists(f"/proc/self/fd/{fd}")]
