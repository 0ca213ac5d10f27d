"""The directory to mount on: whether it will do, and a lock on it, so that two who mount there see each other."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from typing import TYPE_CHECKING

from cfsfuse.errors import HostError, UsageError
from cfsfuse.mount.mountinfo import mount_at
from cfsfuse.privilege import has_sys_admin

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def claimed(mountpoint: str) -> Iterator[int]:
    """Hold a lock on the mount point, so that of two who mount there at once the second sees the first's mount."""
    try:
        fd = os.open(mountpoint, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError:
        # A directory that may not be read can be mounted on; two at once are not kept apart there.
        fd = os.memfd_create("cfsfuse-claim", os.MFD_CLOEXEC)
    except OSError as error:
        dead = error.errno == errno.ENOTCONN
        remedy = "a dead mount is there, take it away with cfsfuse umount" if dead else "create the directory first"
        raise UsageError(f"{mountpoint}: mountpoint: {error.strerror}; {remedy}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        # A child has this lock as well, as long as nobody says that it ends.
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def check_mountpoint(mountpoint: str) -> None:
    """Raise UsageError unless `mountpoint` is a directory on which no image is mounted."""
    there = mount_at(mountpoint)
    if there is not None and there.is_composefs:
        raise UsageError(f"{mountpoint}: {there.source} is mounted here already; cfsfuse umount {mountpoint}")
    try:
        status = os.stat(mountpoint)
    except OSError as error:
        raise UsageError(f"{mountpoint}: mountpoint: {error.strerror}; create the directory first") from None
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{mountpoint}: mountpoint is not a directory")
    if not os.access(mountpoint, os.W_OK) and not has_sys_admin():
        raise HostError(f"{mountpoint}: mountpoint is not writable for this user, as fusermount3 demands")
