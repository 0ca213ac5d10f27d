"""An image file → an `Image` that nobody can change any more.

The bytes are copied into a sealed memfd, and everything (the digest check included) is done on that copy. So
truncating, overwriting or deleting the file afterwards changes nothing, and no error of its disk can reach the daemon
as a SIGBUS, which a mapping of the file itself could, even with fs-verity.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
from typing import TYPE_CHECKING

from cfsfuse.erofs.image import Image
from cfsfuse.erofs.ondisk import BLOCK_SIZE
from cfsfuse.errors import HostError, ImageDigestMismatch, ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

_MFD_NOEXEC_SEAL = 0x0008  # include/uapi/linux/memfd.h
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def open_image(path: str, digest: str | None = None) -> Image:
    """Return the image in the file at `path`; raise ImageError when it is not one.

    With `digest`, lower-case hex of an fs-verity digest (sha256 or sha512 by its length), raise ImageDigestMismatch
    unless the very bytes that the image consists of have it.
    """
    with naming(path):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            raise ImageError("image", f"cannot be opened: {error.strerror}") from None
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("image", "not a regular file")
            # First the beginning alone: something else of a terabyte shall not be copied to memory to be refused.
            beginning(fd)
            copy = sealed_copy(fd, path)
        finally:
            os.close(fd)
        try:
            content = mapped(copy, path)
        finally:
            os.close(copy)
        if digest is not None:
            check_digest(path, content, digest)
        return Image(content)


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Put the path of the image file into the ImageErrors of the block: those who raise them do not know it."""
    try:
        yield
    except ImageError as error:
        error.image = path
        raise


def beginning(fd: int) -> Image:
    """Return what can be said of the image in `fd` by its first block; raise ImageError when it is none."""
    try:
        return Image(os.pread(fd, BLOCK_SIZE, 0), size=os.fstat(fd).st_size)
    except OSError as error:
        raise ImageError("image", f"cannot be read: {error.strerror}") from None


def sealed_copy(fd: int, path: str) -> int:
    """Return the descriptor of a copy, in memory, of the file `fd`: nobody can change it any more."""
    try:
        copy = _memfd()
    except OSError as error:
        raise HostError(f"{path}: no memory for the image: {error.strerror}") from None
    try:
        size = 0
        while count := os.sendfile(copy, fd, size, 1 << 30):
            size += count
        fcntl.fcntl(copy, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        os.close(copy)
        if error.errno in (errno.ENOMEM, errno.ENOSPC):
            raise HostError(f"{path}: no memory for the image: {error.strerror}") from None
        raise ImageError("image", f"cannot be read: {error.strerror}") from None
    return copy


def mapped(copy: int, path: str) -> mmap.mmap | bytes:
    """Return the bytes of a sealed copy."""
    try:
        size = os.fstat(copy).st_size
        # Private, for before Linux 6.7 a sealed file cannot be mapped shared, not even to be read.
        return mmap.mmap(copy, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) if size else b""
    except OSError as error:
        raise HostError(f"{path}: no memory for the image: {error.strerror}") from None


def _memfd() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("cfsfuse-image", flags | _MFD_NOEXEC_SEAL)  # demanded by sysctl vm.memfd_noexec=2
    except OSError:
        return os.memfd_create("cfsfuse-image", flags)  # before Linux 6.3


def check_digest(path: str, content: mmap.mmap | bytes, expected: str) -> None:
    """Raise ImageDigestMismatch unless `content` has the fs-verity digest `expected`."""
    from cfsfuse.verity.digest import ALGORITHMS
    from cfsfuse.verity.merkle import content_digest

    algorithm = ALGORITHMS["sha256" if len(expected) == 64 else "sha512"]
    found = content_digest(algorithm, content).hex()
    if found != expected:
        raise ImageDigestMismatch(path, expected, found)
