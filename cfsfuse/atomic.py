"""Files that appear whole or not at all: a temporary name beside the final one, fsync, rename."""

from __future__ import annotations

import contextlib
import os
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def published(directory: int, name: bytes, mode: int = 0o644) -> Iterator[int]:
    """Yield a descriptor to write (and read) what `name` in the directory descriptor shall hold.

    The file gets its name when the block ends well; otherwise nothing stays behind. The temporary name starts with a
    dot and ends in `.tmp`, so that what a killed process leaves can be told from everything else.
    """
    temporary = b".%s.%s.tmp" % (name[:200], secrets.token_hex(8).encode())
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=directory)
    try:
        yield fd
        os.fsync(fd)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=directory)
        raise
    finally:
        os.close(fd)
    os.fsync(directory)


@contextlib.contextmanager
def opened_directory(path: bytes | str, *, dir_fd: int | None = None) -> Iterator[int]:
    """Yield a descriptor of a directory, without following a symlink in its last component."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)
