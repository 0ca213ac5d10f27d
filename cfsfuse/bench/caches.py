"""The kernel's caches: who may drop them, and doing it."""

from __future__ import annotations

import os
import subprocess
import time

_DROP = "/proc/sys/vm/drop_caches"  # proc_sys_vm(5)
_PAGES_AND_INODES = b"3"


def can_drop() -> bool:
    """Return whether we may. Root may not inside a user namespace, nor where /proc/sys is read-only."""
    try:
        os.close(os.open(_DROP, os.O_WRONLY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def drop(settle: float) -> None:
    """Write back and drop what is cached, load the programs again that the workloads start, and wait so many seconds.

    Dropping also makes the kernel forget inodes, which a server has to hear of: that shall not be part of a figure.
    """
    os.sync()
    fd = os.open(_DROP, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, _PAGES_AND_INODES)
    finally:
        os.close(fd)
    # The first column would otherwise pay for reading the program, and the others for nothing.
    for program in ("find", "ls"):
        subprocess.run([program, "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    time.sleep(settle)
