"""The messages of the kernel's FUSE protocol: layouts only, no input.

include/uapi/linux/fuse.h, whose names these are; fuse(4). Everything is in the machine's byte order. A request is a
`fuse_in_header` and what its opcode has behind that; an answer is a `fuse_out_header` and what the opcode wants back,
or the header alone with a negative errno.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct

from cfsfuse.errors import ImageError

SPOKEN = (7, 31)
"""The version that has all we use: a newer kernel speaks it as well."""

OLDEST = (7, 23)
"""The version since which an answer to INIT is as long as ours: Linux 3.15."""

ROOT_ID = 1
MIN_READ_BUFFER = 8192


class Opcode(IntEnum):
    """What a request asks for: those that a read-only file system may meet."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    READLINK = 5
    OPEN = 14
    READ = 15
    STATFS = 17
    RELEASE = 18
    GETXATTR = 22
    LISTXATTR = 23
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    READDIRPLUS = 44


class InitFlag(IntFlag):
    """What kernel and server agree on in INIT."""

    ASYNC_READ = 1 << 0
    DO_READDIRPLUS = 1 << 13
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    POSIX_ACL = 1 << 20
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25


class OpenFlag(IntFlag):
    """What the kernel may do with an open file or directory."""

    KEEP_CACHE = 1 << 1
    CACHE_DIR = 1 << 3


IN_HEADER = Struct("=IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
OUT_HEADER = Struct("=IiQ")  # len, error, unique
INIT_IN = Struct("=IIII")  # major, minor, max_readahead, flags
# major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages
INIT_OUT = Struct("=IIIIHHIIH34x")
READ_IN = Struct("=QQII16x")  # fh, offset, size, read_flags: also of READDIRPLUS
OPEN_OUT = Struct("=QII")  # fh, open_flags, padding
GETXATTR_IN = Struct("=I4x")  # size
GETXATTR_OUT = Struct("=I4x")  # size
_ATTR = (
    "QQQqqqIIIIIIIIII"  # ino, size, blocks, three times, their nanoseconds, mode, nlink, uid, gid, rdev, blksize, flags
)
ATTR_OUT = Struct(f"=QII{_ATTR}")  # attr_valid, attr_valid_nsec, dummy, attr
ENTRY_OUT = Struct(f"=QQQQII{_ATTR}")  # nodeid, generation, entry_valid, attr_valid, their nanoseconds, attr
DIRENT = Struct("=QQII")  # ino, off, namelen, type
DIRENTPLUS = Struct(ENTRY_OUT.format + DIRENT.format[1:])
KSTATFS = Struct("=QQQQQIII28x")  # blocks, bfree, bavail, files, ffree, bsize, namelen, frsize

_SIZES = {
    IN_HEADER: 40,
    OUT_HEADER: 16,
    INIT_OUT: 64,
    READ_IN: 40,
    OPEN_OUT: 16,
    GETXATTR_IN: 8,
    GETXATTR_OUT: 8,
    ATTR_OUT: 104,
    ENTRY_OUT: 128,
    DIRENT: 24,
    DIRENTPLUS: 152,
    KSTATFS: 80,
}
if wrong := [layout.format for layout, size in _SIZES.items() if layout.size != size]:
    raise AssertionError(wrong)


def check_root(nid: int) -> None:
    """Raise ImageError when the root of an image has a number that in FUSE stands for the root itself, or nothing."""
    if nid <= ROOT_ID:
        raise ImageError("root_nid", f"{nid} cannot be served through FUSE")
