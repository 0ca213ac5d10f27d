"""What the kernel knows of a file's fs-verity, and how it is enabled. Numbers: include/uapi/linux/fsverity.h."""

from __future__ import annotations

import errno
import fcntl
import struct
from enum import Enum
from typing import NamedTuple

from cfsfuse.fstype import HAS_VERITY, file_system_type
from cfsfuse.verity.digest import ALGORITHMS, BLOCK_SIZE, SHA256

_FS_IOC_ENABLE_VERITY = 0x40806685  # _IOW('f', 133, struct fsverity_enable_arg)
_ENABLE_ARG = struct.Struct("=IIIIQIIQ88x")  # version, hash_algorithm, block_size; no salt, no signature; (reserved)
if _ENABLE_ARG.size != 128:
    raise AssertionError("struct fsverity_enable_arg has 128 bytes")

_FS_IOC_MEASURE_VERITY = 0xC0046686  # _IOWR('f', 134, struct fsverity_digest)
_FSVERITY_DIGEST = struct.Struct("<HH64s")  # digest_algorithm, digest_size, digest
_NAMES = {algorithm.number: algorithm.name for algorithm in ALGORITHMS.values()}

# No fs-verity in this file, file system or kernel; all mean that user space has to verify.
_ABSENT = (errno.ENODATA, errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)


class Absence(Enum):
    """What has no fs-verity, where there is none."""

    FILE = "the file"
    FILE_SYSTEM = "the file system, or the kernel"


class Measured(NamedTuple):
    """A digest that the kernel enforces on every read: hashlib name of the algorithm, and the digest."""

    algorithm: str
    value: bytes


def measure(fd: int) -> Measured | None:
    """Return the fs-verity digest that the kernel enforces on the file `fd`, None when it enforces none.

    Only file systems are asked that have fs-verity themselves: a FUSE server is asked by the kernel, and may lie.
    """
    found = _ask(fd)
    return found if isinstance(found, Measured) else None


def absence(fd: int) -> Absence:
    """Return why `measure` has no digest for a file."""
    found = _ask(fd)
    return found if isinstance(found, Absence) else Absence.FILE


def _ask(fd: int) -> Measured | Absence:
    if file_system_type(fd) not in HAS_VERITY:
        return Absence.FILE_SYSTEM
    argument = bytearray(_FSVERITY_DIGEST.pack(0, 64, b""))
    try:
        fcntl.ioctl(fd, _FS_IOC_MEASURE_VERITY, argument)
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
        return Absence.FILE if error.errno == errno.ENODATA else Absence.FILE_SYSTEM
    number, size, digest = _FSVERITY_DIGEST.unpack(argument)
    return Measured(_NAMES[number], digest[:size]) if number in _NAMES else Absence.FILE


def enable(fd: int) -> None:
    """Enable fs-verity as composefs has it (SHA-256, blocks of 4096 bytes, no salt): nobody can write the file again.

    `fd` is open for reading only, and nobody has the file open for writing: ETXTBSY otherwise. The caller needs write
    permission on the file. ENOTTY, EOPNOTSUPP: the kernel, or the file system, has no fs-verity.
    """
    fcntl.ioctl(fd, _FS_IOC_ENABLE_VERITY, _ENABLE_ARG.pack(1, SHA256.number, BLOCK_SIZE, 0, 0, 0, 0, 0))
