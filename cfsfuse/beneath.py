"""Open a file below a directory, and nothing else: no way out by `..`, symlinks, absolute paths or mounts.

openat2(2) does it in one call since Linux 5.6. Where it is missing or forbidden (old kernels, seccomp filters), a walk
that opens each component by itself gives nearly the same guarantee: it tells another mount by its device only.
Constants: include/uapi/linux/openat2.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

_SYS_OPENAT2 = 437  # the same on every architecture
_OPEN_HOW = struct.Struct("<QQQ")  # flags, mode, resolve
_RESOLVE_NO_XDEV = 0x01
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_RESOLVE_CACHED = 0x20
_RESOLVE = _RESOLVE_NO_XDEV | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH

# O_NONBLOCK: a fifo in the place of an object must not stop us. O_NOFOLLOW is for the walk.
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW
_HOW = ctypes.create_string_buffer(_OPEN_HOW.pack(_FLAGS, 0, _RESOLVE), _OPEN_HOW.size)
_HOW_CACHED = ctypes.create_string_buffer(_OPEN_HOW.pack(_FLAGS, 0, _RESOLVE | _RESOLVE_CACHED), _OPEN_HOW.size)
# With both O_PATH and O_NOFOLLOW a symlink is itself what is opened, if it is the last component.
_FLAGS_PATH = os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW
_HOW_PATH = ctypes.create_string_buffer(_OPEN_HOW.pack(_FLAGS_PATH, 0, _RESOLVE), _OPEN_HOW.size)

_NO_NAMES = frozenset((b"", b".", b".."))

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_openat2_works = True


def open_beneath(directory: int, path: bytes, *, wait: bool = True) -> int:
    """Return a descriptor of the file at `path` below the descriptor `directory`, open for reading.

    With wait=False, BlockingIOError when the kernel would have to read a disk for the look-up. Other OSErrors are
    those of openat2(2): ELOOP for a symlink, EXDEV for a way out. A path with an empty, `.` or `..` component, or a
    NUL, is EXDEV.
    """
    return _open(directory, path, _FLAGS, _HOW if wait else _HOW_CACHED, wait=wait)


def status_beneath(directory: int, path: bytes) -> os.stat_result:
    """Return what is at `path` below the descriptor `directory`, a symlink too, without opening it.

    lstat(2) guards the last component of a path only: the others may be symlinks, and lead anywhere.
    """
    fd = _open(directory, path, _FLAGS_PATH, _HOW_PATH, wait=True)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def would_block() -> BlockingIOError:
    """Return the error that says: ask again where waiting is allowed."""
    return BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def _open(directory: int, path: bytes, flags: int, how: ctypes.Array[ctypes.c_char], *, wait: bool) -> int:
    """Open as `how` says, a struct open_how; or by the walk, with `flags`, which are those of `how`."""
    global _openat2_works  # noqa: PLW0603 - found out once, by trying: a probe would cost every start
    # A NUL would cut the path short in C. The components are refused so that both ways mean the same.
    if b"\0" in path or not _NO_NAMES.isdisjoint(path.split(b"/")):
        raise OSError(errno.EXDEV, "the path leaves the directory")
    if _openat2_works:
        fd: int = _syscall(_SYS_OPENAT2, directory, path, how, _OPEN_HOW.size)
        if fd >= 0:
            return fd
        number = ctypes.get_errno()
        # EPERM: seccomp filters of container engines that do not know the call. EINVAL: before RESOLVE_CACHED (5.12).
        if number == errno.EINVAL and not wait:
            raise would_block()
        if number not in (errno.ENOSYS, errno.EPERM):
            raise OSError(number, os.strerror(number))
        if number == errno.ENOSYS:
            _openat2_works = False
    if not wait:
        raise would_block()
    return _walk(directory, path, flags)


def _walk(directory: int, path: bytes, flags: int) -> int:
    """Open component by component; each is a plain directory on the device of `directory`, the last is anything."""
    *parents, last = path.split(b"/")
    device = os.fstat(directory).st_dev
    at = directory
    try:
        for name in parents:
            below = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            if at != directory:
                os.close(at)
            at = below
            if os.fstat(at).st_dev != device:
                raise OSError(errno.EXDEV, "the path crosses a mount")
        fd = os.open(last, flags, dir_fd=at)
        if os.fstat(fd).st_dev != device:
            os.close(fd)
            raise OSError(errno.EXDEV, "the path crosses a mount")
        return fd
    finally:
        if at != directory:
            os.close(at)
