"""What is mounted where: /proc/self/mountinfo, and who uses a mount. proc(5)."""

from __future__ import annotations

import contextlib
import os
import re
from typing import NamedTuple

FUSE_TYPE = "fuse.cfsfuse"
COMPOSEFS_SOURCE = "composefs"
"""The source of the overlay mount of every composefs image, as mount.composefs has it too."""

_OCTAL = re.compile(rb"\\([0-7]{3})")


class Mount(NamedTuple):
    """A line of mountinfo: mount point, file system type, source, and `major:minor` of its device.

    A device number belongs to one FUSE mount as long as that exists.
    """

    mountpoint: str
    fstype: str
    source: str
    device: str

    @property
    def is_composefs(self) -> bool:
        """Whether it is the mount of a composefs image, whoever made it."""
        return self.fstype == FUSE_TYPE or (self.fstype == "overlay" and self.source == COMPOSEFS_SOURCE)


def mount_at(mountpoint: str) -> Mount | None:
    """Return the topmost mount whose mount point is `mountpoint`, an absolute path without symlinks; None without one.

    os.path.ismount would ask the file system itself, and is wrong for a dead one and for that of another user.
    """
    found = None
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            before, _, after = line.partition(b" - ")
            _, _, device, _, escaped, *_ = before.split(b" ")
            path = os.fsdecode(_unescape(escaped))
            if path == mountpoint:
                fstype, source = after.split(b" ")[:2]
                found = Mount(path, fstype.decode(), os.fsdecode(_unescape(source)), device.decode())
    return found


def users(mountpoint: str) -> list[str]:
    """Return the processes seen to use what is mounted there, as "name (pid)"; only those that we may look at."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if any(_is_below(link, mountpoint) for link in _links(pid)):
                with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
                    found.append(f"{file.read().strip()} ({pid})")
    return found


def _links(pid: str) -> list[str]:
    links = []
    base = f"/proc/{pid}"
    for path in (f"{base}/cwd", f"{base}/root", *(entry.path for entry in os.scandir(f"{base}/fd"))):
        with contextlib.suppress(OSError):
            links.append(os.readlink(path))
    with open(f"{base}/maps", encoding="utf-8", errors="surrogateescape") as file:
        links += [line.split(maxsplit=5)[-1].rstrip("\n") for line in file if "/" in line]
    return links


def _is_below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _unescape(text: bytes) -> bytes:
    return _OCTAL.sub(lambda match: bytes([int(match[1], 8)]), text)
