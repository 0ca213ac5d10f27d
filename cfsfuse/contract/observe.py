"""What checks are made of: calls whose failure is an observation, too."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Observations = dict[str, object]
"""What a check has observed, by name; values that can be compared."""

CHUNK = 1 << 20
# A larger file is read in samples, unless it is known that there is so much to be read: images have files of a terabyte
# that consist of nothing.
WHOLE_MAX = 16 << 20

_STAT_FIELDS = ("mode", "nlink", "uid", "gid", "rdev", "size", "ino", "blocks", "blksize", "dev")
_TIME_FIELDS = ("atime_ns", "mtime_ns", "ctime_ns")

libc = ctypes.CDLL(None, use_errno=True)


class Failure(NamedTuple):
    """The errno, by name, with which a call failed."""

    name: str

    def __repr__(self) -> str:
        return self.name


ABSENT = Failure("not observed")
FORBIDDEN = Failure("EACCES")
NOT_TRIED = Failure("not tried: this is not on a read-only mount")


def attempt(call: Callable[..., object], *arguments: object, **named: object) -> object:
    """Return what `call` returns, or the Failure."""
    try:
        return call(*arguments, **named)
    except OSError as error:
        return failure(error)


def failure(error: OSError) -> Failure:
    return Failure(errno.errorcode.get(error.errno or 0, str(error)))


@contextlib.contextmanager
def opened(path: bytes, flags: int) -> Iterator[int | Failure]:
    """Open `path` for the time being, without waiting and without following a link; the Failure where that fails."""
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        yield failure(error)
        return
    try:
        yield fd
    finally:
        os.close(fd)


def is_protected(path: bytes) -> bool:
    """Return whether what stands at `path` is on a read-only mount: asked before everything that might change it.

    A path that leads out of the mount, through a link that stands where a directory was, or into a mount below it, ends
    here. What is behind a directory that may not be searched is safe, too.
    """
    with opened(path, os.O_PATH) as fd:
        if isinstance(fd, Failure):
            return fd == FORBIDDEN
        return bool(os.fstatvfs(fd).f_flag & os.ST_RDONLY)


def stat_fields(prefix: str, status: object) -> Observations:
    if not isinstance(status, os.stat_result):
        return {prefix: status}
    return {prefix + name: getattr(status, "st_" + name) for name in (*_STAT_FIELDS, *_TIME_FIELDS)}


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
