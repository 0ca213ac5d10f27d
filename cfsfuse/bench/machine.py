"""What the figures were measured on."""

from __future__ import annotations

import os
import platform

from cfsfuse.verity.digest import SHA256


def describe() -> dict[str, object]:
    """Return kernel, processor, how many of them we may use, Python, and the load before anything is measured."""
    return {
        "kernel": platform.release(),
        "processor": _model(),
        "processors": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "sha256": "hashlib" if SHA256.side_by_side is None else f"{SHA256.side_by_side.lanes} lanes",
        "load": os.getloadavg()[0],
    }


def _model() -> str:
    """Return what the processor calls itself; where /proc/cpuinfo has no name, the architecture."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.machine()
