"""Opening, permissions, locks, and what is behind fifos and sockets."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from typing import TYPE_CHECKING

from cfsfuse.contract.observe import NOT_TRIED, Failure, attempt, checked, is_protected, libc, opened

if TYPE_CHECKING:
    from cfsfuse.contract.entries import Entry
    from cfsfuse.contract.observe import Observations

_OPEN_FLAGS = {
    "read": os.O_RDONLY,
    "write": os.O_WRONLY,
    "read and write": os.O_RDWR,
    "append": os.O_WRONLY | os.O_APPEND,
    "truncate": os.O_WRONLY | os.O_TRUNC,
    "read and truncate": os.O_RDONLY | os.O_TRUNC,
    "create": os.O_WRONLY | os.O_CREAT,
    "create to read": os.O_RDONLY | os.O_CREAT,
    "create exclusively": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
    "directory": os.O_RDONLY | os.O_DIRECTORY,
    "directory to write": os.O_WRONLY | os.O_DIRECTORY,
    "unnamed": os.O_RDWR | os.O_TMPFILE,
    "no access time": os.O_RDONLY | os.O_NOATIME,
    "direct": os.O_RDONLY | os.O_DIRECT,
    "synchronous": os.O_RDONLY | os.O_SYNC,
    "path": os.O_PATH,
}


def check_open(path: bytes, entry: Entry) -> Observations:
    """Every kind of open(2) of every kind of entry; never one that waits for a fifo's other end, or follows a link."""
    if not is_protected(path):
        return {"open": NOT_TRIED}
    return {name: open_result(path, flags) for name, flags in _OPEN_FLAGS.items() if entry.sampled or name == "read"}


def check_special(path: bytes, entry: Entry) -> Observations:
    """What fifos and sockets do: those of a read-only file system work, for whoever may write to them."""
    if not (stat.S_ISFIFO(entry.mode) or stat.S_ISSOCK(entry.mode)):
        return {}
    if not is_protected(path):
        return {"open": NOT_TRIED}
    if stat.S_ISFIFO(entry.mode):
        return {"through the fifo": attempt(_through_fifo, path)}
    return {"connect": attempt(_connected, path)}


_ACCESS_MODES = {
    "F": os.F_OK,
    "R": os.R_OK,
    "W": os.W_OK,
    "X": os.X_OK,
    "RW": os.R_OK | os.W_OK,
    "RX": os.R_OK | os.X_OK,
    "WX": os.W_OK | os.X_OK,
}
_AT_FDCWD = -100  # include/uapi/linux/fcntl.h
_AT_SYMLINK_NOFOLLOW = 0x100


def check_access(path: bytes, entry: Entry) -> Observations:
    """access(2) in every mode, with its errno: read-only is told apart from forbidden. And entering a directory."""
    modes = _ACCESS_MODES if entry.sampled else ("R", "X")
    seen = {name: attempt(_access, path, _ACCESS_MODES[name]) for name in modes}
    if entry.is_directory:
        seen["enter"] = attempt(lambda: os.lstat(path + b"/.").st_ino)
        seen["list"] = attempt(lambda: len(os.listdir(path)))
    return seen


def check_locks(path: bytes, entry: Entry) -> Observations:
    """Advisory locks, which programs such as databases take before they read."""
    if not entry.is_regular or not entry.sampled:
        return {}
    with opened(path, os.O_RDONLY) as fd:
        if isinstance(fd, Failure):
            return {"open": fd}
        return {
            "flock shared": attempt(fcntl.flock, fd, fcntl.LOCK_SH | fcntl.LOCK_NB),
            "flock exclusive": attempt(fcntl.flock, fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
            "lockf shared": attempt(fcntl.lockf, fd, fcntl.LOCK_SH | fcntl.LOCK_NB),
            "lockf exclusive": attempt(fcntl.lockf, fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
        }


def _access(path: bytes, mode: int) -> None:
    # os.access would keep the errno to itself.
    checked(libc.faccessat(_AT_FDCWD, path, mode, _AT_SYMLINK_NOFOLLOW))


def open_result(path: bytes, flags: int) -> object:
    with opened(path, flags) as fd:
        return fd if isinstance(fd, Failure) else fcntl.fcntl(fd, fcntl.F_GETFL)


def _through_fifo(path: bytes) -> bytes | Failure:
    with opened(path, os.O_RDONLY) as reading, opened(path, os.O_WRONLY) as writing:
        if isinstance(reading, Failure):
            return reading
        if isinstance(writing, Failure):
            return writing
        os.write(writing, b"through")
        return os.read(reading, 64)


def _connected(path: bytes) -> None:
    # By descriptor, because an address has room for 108 bytes of path only.
    with opened(path, os.O_PATH) as fd, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.connect(f"/proc/self/fd/{fd}")
