"""Taking a mount away again."""

from __future__ import annotations

import errno
import os
import subprocess

from cfsfuse.errors import HostError, UsageError
from cfsfuse.mount import syscalls
from cfsfuse.mount.mountinfo import mount_at, users
from cfsfuse.privilege import has_sys_admin


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount the cfsfuse mount at `mountpoint`; `lazy` hides it now and ends it when its last user goes.

    Raises UsageError when no cfsfuse mount is there, HostError when it is in use or not ours to unmount.
    """
    path = _where(mountpoint)
    mounted = mount_at(path)
    if mounted is None:
        raise UsageError(f"{mountpoint}: nothing is mounted here")
    if not mounted.is_composefs:
        raise UsageError(f"{mountpoint}: a mount of type {mounted.fstype}, not one of cfsfuse; use umount")
    if take_away(path, lazy=lazy):
        names = ", ".join(user for user in users(path) if not user.endswith(f"({os.getpid()})"))
        by = f" by {names}" if names else ""
        raise HostError(f"{mountpoint}: in use{by}; end that first, or use --lazy")


def _where(mountpoint: str) -> str:
    """Return the path of a mount without symlinks, and without a question to its server, which may hang."""
    parent, name = os.path.split(mountpoint.rstrip("/"))
    if name not in ("", ".", ".."):
        path = os.path.join(os.path.realpath(parent), name)
        if mount_at(path) is not None:
            return path
    return os.path.realpath(mountpoint)


def take_away(path: str, *, lazy: bool) -> bool:
    """Unmount whatever is at a path without symlinks; return whether it is in use, and so still there."""
    return (_umount2 if has_sys_admin() else _fusermount)(path, lazy=lazy)


def _umount2(path: str, *, lazy: bool) -> bool:
    """Unmount by ourselves; return whether the mount is in use."""
    try:
        syscalls.umount(path, syscalls.UMOUNT_NOFOLLOW | (syscalls.MNT_DETACH if lazy else 0))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return True
        raise HostError(f"{path}: cannot unmount: {error.strerror}") from None
    return False


def _fusermount(path: str, *, lazy: bool) -> bool:
    """Unmount by the helper; return whether the mount is in use."""
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", path]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except FileNotFoundError:
        raise HostError("fusermount3: not found; install the package fuse3") from None
    if done.returncode == 0:
        return False
    said = " ".join(done.stderr.split())
    if "busy" in said.lower():
        return True
    raise HostError(f"{path}: cannot unmount: {said}")
