"""An image file → an `Image` that nobody can change any more.

The bytes are copied into a sealed memfd, and everything (the digest check included) is done on that copy. So
truncating, overwriting or deleting the file afterwards changes nothing, and no error of its disk can reach the daemon
as a SIGBUS, which a mapping of the file itself could, even with fs-verity.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
from typing import TYPE_CHECKING

from cfsfuse.erofs.image import Image
from cfsfuse.errors import ImageDigestMismatch, ImageError
from cfsfuse.verity.digest import ALGORITHMS
from cfsfuse.verity.ioctl import measure
from cfsfuse.verity.merkle import content_digest

if TYPE_CHECKING:
    from collections.abc import Iterator

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def open_image(path: str, digest: str | None = None) -> Image:
    """Return the image in the file at `path`; raise ImageError when it is not one.

    With `digest`, lower-case hex of an fs-verity digest (sha256 or sha512 by its length), raise ImageDigestMismatch
    unless the very bytes that the image consists of have it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise ImageError(path, f"cannot open the image: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ImageError(path, "not an image: not a regular file")
        content = _sealed_copy(fd, path)
        if digest is not None:
            _check_digest(path, fd, content, digest)
    finally:
        os.close(fd)
    with naming(path):
        return Image(content)


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Put the path of the image file into the ImageErrors of the block: those who raise them do not know it."""
    try:
        yield
    except ImageError as error:
        error.image = path
        raise


def _sealed_copy(fd: int, path: str) -> mmap.mmap | bytes:
    copy = os.memfd_create("cfsfuse-image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        size = 0
        while count := os.sendfile(copy, fd, size, 1 << 30):
            size += count
        fcntl.fcntl(copy, fcntl.F_ADD_SEALS, _SEALS)
        return mmap.mmap(copy, size, prot=mmap.PROT_READ) if size else b""
    except OSError as error:
        raise ImageError(path, f"cannot read the image: {error.strerror}") from None
    finally:
        os.close(copy)


def _check_digest(path: str, fd: int, content: mmap.mmap | bytes, expected: str) -> None:
    algorithm = ALGORITHMS["sha256" if len(expected) == 64 else "sha512"]
    # With kernel fs-verity every byte of the copy has been verified on its way here.
    measured = measure(fd)
    if measured is not None and measured.algorithm == algorithm.name:
        found = measured.value
    else:
        found = content_digest(algorithm, content)
    if found.hex() != expected:
        raise ImageDigestMismatch(path, expected, found.hex())
