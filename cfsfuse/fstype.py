"""What kind of file system a descriptor is on. Numbers: include/uapi/linux/magic.h."""

from __future__ import annotations

import ctypes
import os
import struct

_EXT4 = 0xEF53
_XFS = 0x58465342
_BTRFS = 0x9123683E
_F2FS = 0xF2F52010
_TMPFS = 0x01021994

HAS_VERITY = frozenset((_EXT4, _BTRFS, _F2FS))
"""File systems in which the kernel itself answers for fs-verity. A FUSE server can claim any digest: the kernel passes
the question on to it."""

LOCAL = frozenset((_EXT4, _XFS, _BTRFS, _F2FS, _TMPFS))
"""File systems on a disk of this machine, or in its memory: no server can make a read wait for ever."""

_fstatfs = ctypes.CDLL(None, use_errno=True).fstatfs


def file_system_type(fd: int) -> int:
    """Return `f_type` of fstatfs(2), the first field of struct statfs."""
    buffer = ctypes.create_string_buffer(256)
    if _fstatfs(fd, buffer):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    value: int = struct.unpack_from("@l", buffer.raw)[0]
    return value & 0xFFFFFFFF
