"""A process that outlives a killed daemon and takes its dead mount away.

fusermount3's own auto_unmount does not always: up to libfuse 3.14 at least it looks at the mount before the kernel
has declared it dead, takes that for somebody else's mount, and leaves it. And through fusermount3 root could not have
`dev` or `suid`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import TYPE_CHECKING

from cfsfuse.mount.privilege import is_privileged

if TYPE_CHECKING:
    from collections.abc import Iterator

# Ends when it reads a line. At the end of the file instead, the daemon has died: its mount is hidden at once, and
# goes when the last who uses it does. A shell, for it costs a megabyte where a Python would cost ten.
_SCRIPT = 'trap "" INT TERM HUP; read -r done || exec "$@"'


@contextlib.contextmanager
def watched(mountpoint: str) -> Iterator[None]:
    """Unmount `mountpoint` should this process be killed in the block; after the block all is as before."""
    unmount = ["umount", "-l"] if is_privileged() else ["fusermount3", "-u", "-z"]
    command = ["sh", "-c", _SCRIPT, "cfsfuse-watcher", *unmount, "--", mountpoint]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/"
    ) as watcher:
        try:
            yield
        finally:
            with contextlib.suppress(BrokenPipeError):
                os.write(watcher.stdin.fileno(), b"\n")  # type: ignore[union-attr]  # a pipe was asked for
