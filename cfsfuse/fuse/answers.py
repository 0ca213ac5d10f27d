"""What every FUSE session answers in the same way: the one errno table, and facts of an inode that no image records."""

from __future__ import annotations

import errno
import logging

from cfsfuse.erofs import overlay
from cfsfuse.erofs.ondisk import NAME_MAX
from cfsfuse.errors import (
    CfsError,
    DigestMismatch,
    ImageError,
    ObjectForbidden,
    ObjectMissing,
    ObjectUnusable,
    PathNotFound,
)
from cfsfuse.lru import Lru

log = logging.getLogger(__name__)

FOREVER = 365 * 24 * 3600
"""Seconds for which the kernel may keep what it has learnt, a year: the view never changes."""

COOKIES = 512
"""Places of a listing in each directory block: one of 4096 bytes has at most 315 dirents."""

ERRNO: dict[type[CfsError], int] = {
    PathNotFound: errno.ENOENT,
    ObjectMissing: errno.ENOENT,
    ObjectForbidden: errno.EACCES,
    ObjectUnusable: errno.EIO,
    DigestMismatch: errno.EIO,
    ImageError: errno.EIO,
}

DEVICE_MASK = 0o130000
"""S_IFCHR and S_IFBLK agree in these bits of S_IFMT, and no other type does."""

_XATTR_PREFIXES = (b"user.", b"trusted.", b"security.")
_ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")
_REPORTS = 1024


class Reports:
    """Errors of the image in the log, each once: whoever may look at the mount could fill it otherwise."""

    def __init__(self) -> None:
        self._reported: Lru[str, bool] = Lru(_REPORTS)

    def report(self, error: ImageError) -> None:
        if self._reported.get(str(error)) is None:
            self._reported.put(str(error), True)
            log.error("image: %s", error)


def errno_of(error: CfsError) -> int:
    """Return the errno that a domain error becomes."""
    return next((number for kind, number in ERRNO.items() if isinstance(error, kind)), errno.EIO)


def errno_of_absent_xattr(name: bytes) -> int:
    """Return what the kernel mount answers for a name that an inode does not have: it depends on the name's handler."""
    if name in (*_XATTR_PREFIXES, overlay.PREFIX):
        return errno.EINVAL
    if name.startswith(overlay.PREFIX) and len(overlay.stored(name)) > NAME_MAX:
        return errno.EOPNOTSUPP  # overlayfs escapes the name, and then it is too long
    return errno.ENODATA if name.startswith(_XATTR_PREFIXES) or name in _ACLS else errno.EOPNOTSUPP
