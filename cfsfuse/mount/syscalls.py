"""The system calls of mounting, which Python lacks: thin, each raises OSError, and errors of the kernel's own are told.

Numbers and flags: include/uapi/asm-generic/unistd.h (the same on every architecture but alpha), in include/uapi/linux
mount.h, fcntl.h and loop.h, include/linux/fs.h. fsopen(2), fsconfig(2), fsmount(2), move_mount(2), mount_setattr(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
_SYS_MOUNT_SETATTR = 442

_FSOPEN_CLOEXEC = 1
_FSCONFIG_SET_FLAG = 0
_FSCONFIG_SET_STRING = 1
_FSCONFIG_SET_FD = 5
_FSCONFIG_CMD_CREATE = 6
_FSMOUNT_CLOEXEC = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_OPEN_TREE_CLONE = 1
_MOUNT_ATTR_IDMAP = 0x00100000
_MOUNT_ATTR = struct.Struct("<QQQQ")  # attr_set, attr_clr, propagation, userns_fd

# Attributes of a mount, of fsmount(2); mount(2) has the same bits for all but the last.
ATTR_RDONLY = 0x01
ATTR_NOSUID = 0x02
ATTR_NODEV = 0x04
ATTR_NOEXEC = 0x08
ATTR_NOATIME = 0x10

_MS_NOATIME = 1 << 10
_MS_REC = 1 << 14
_MS_SILENT = 1 << 15
_MS_PRIVATE = 1 << 18
_MS_SLAVE = 1 << 19
_CLONE_NEWNS = 0x20000  # include/uapi/linux/sched.h
CLONE_NEWUSER = 0x10000000
_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000

_LOOP_CONFIGURE = 0x4C0A
_LOOP_CTL_GET_FREE = 0x4C82
_LO_FLAGS_READ_ONLY = 1
_LO_FLAGS_AUTOCLEAR = 4
# struct loop_config: fd, block_size, and in its struct loop_info64 the flags behind 52 bytes of fields left 0.
_LOOP_CONFIG = struct.Struct("=II52xI176x64x")
_LOOP_TRIES = 64  # somebody else may take the free device before we do

_LOG_SIZE = 8192  # bytes of one message of a file system context

_libc = ctypes.CDLL(None, use_errno=True)


def call(number: int, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """Make a system call by its number and return its result."""
    # An int becomes a C long: without that, ctypes would pass 32 bits and leave the register's upper half undefined.
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    return _checked(int(_libc.syscall(ctypes.c_long(number), *words)))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


class Context:
    """A file system on its way to be mounted; what the kernel says about an error is part of its text."""

    def __init__(self, fstype: str) -> None:
        self._fstype = fstype
        self._fd = call(_SYS_FSOPEN, fstype.encode(), _FSOPEN_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def set(self, key: str, value: str | int | None = None) -> None:
        """Set a parameter: a flag, a string, or a descriptor."""
        name = key.encode()
        if value is None:
            self._config(key, _FSCONFIG_SET_FLAG, name, None, 0)
        elif isinstance(value, int):
            self._config(key, _FSCONFIG_SET_FD, name, None, value)
        else:
            self._config(f"{key}={value}", _FSCONFIG_SET_STRING, name, os.fsencode(value), 0)

    def takes_anything(self) -> bool:
        """Return whether parameters are kept unread until the file system is made: overlayfs does so before 6.5."""
        with contextlib.suppress(OSError):
            self.set("no such parameter", "")
            return True
        return False

    def mount(self, attributes: int) -> int:
        """Make the file system, and return the descriptor of a mount of it that is attached nowhere."""
        self._config("", _FSCONFIG_CMD_CREATE, None, None, 0)
        return call(_SYS_FSMOUNT, self._fd, _FSMOUNT_CLOEXEC, attributes)

    def _config(self, what: str, *arguments: int | bytes | None) -> None:
        try:
            call(_SYS_FSCONFIG, self._fd, *arguments)
        except OSError as error:
            said = "; ".join(self._said()) or what
            raise OSError(
                error.errno, f"{error.strerror} ({self._fstype}: {said})" if said else error.strerror
            ) from None

    def _said(self) -> Iterator[str]:
        """Yield the kernel's messages, each of which is one read, without the letter that gives its severity."""
        with contextlib.suppress(OSError):  # ENODATA: that was all
            while message := os.read(self._fd, _LOG_SIZE):
                yield message.decode(errors="replace").strip().removeprefix("e ").removeprefix("w ")


def move_mount(mount: int, mountpoint: str) -> None:
    """Attach the detached mount `mount` at a path."""
    call(_SYS_MOVE_MOUNT, mount, b"", _AT_FDCWD, os.fsencode(mountpoint), _MOVE_MOUNT_F_EMPTY_PATH)


def open_tree(path: str) -> int:
    """Return a copy, attached nowhere, of the mounts at a path and below it."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_RECURSIVE
    return call(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags)


def set_idmap(mount: int, user_namespace: int) -> None:
    """Map the owners of a detached mount as `user_namespace`, a descriptor, does."""
    _set_attributes(mount, _MOUNT_ATTR_IDMAP, _AT_EMPTY_PATH, user_namespace)


def set_read_only(mount: int) -> None:
    """Let a detached mount, and those below it, take no changes."""
    _set_attributes(mount, ATTR_RDONLY, _AT_EMPTY_PATH | _AT_RECURSIVE)


def _set_attributes(mount: int, attributes: int, flags: int, user_namespace: int = 0) -> None:
    packed = _MOUNT_ATTR.pack(attributes, 0, 0, user_namespace)
    call(_SYS_MOUNT_SETATTR, mount, b"", flags, packed, len(packed))


def old_mount(source: str, target: str, fstype: str, attributes: int, data: str) -> None:
    """mount(2), with no word in the kernel's log: callers try what it may not know."""
    flags = attributes ^ (ATTR_NOATIME | _MS_NOATIME) if attributes & ATTR_NOATIME else attributes
    arguments = [os.fsencode(word) for word in (source, target, fstype)]
    _checked(_libc.mount(*arguments, ctypes.c_ulong(flags | _MS_SILENT), os.fsencode(data)))


def unshare_user() -> None:
    """Give this process a user namespace of its own, with all capabilities in it and no owner mapped yet."""
    _checked(_libc.unshare(CLONE_NEWUSER))


def pivot_root() -> None:
    """Make the mount point that is the working directory the root, and let go of the old one."""
    if _libc.pivot_root(b".", b".") == 0:
        umount(".", MNT_DETACH)
    elif ctypes.get_errno() == errno.EINVAL:  # the root is that of an initramfs, which cannot be left so
        os.chroot(".")
    else:
        _checked(-1)
    os.chdir("/")


def die_with_parent(number: int) -> None:
    """Have the kernel send this process a signal when its parent ends."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(number)))


def unshare_mounts(*, follow: bool = False) -> None:
    """Give this process a mount namespace of its own, from which no mount reaches others.

    With `follow`, what is mounted and unmounted where it comes from still is here too: a namespace that lives for long
    would keep devices busy.
    """
    _checked(_libc.unshare(_CLONE_NEWNS))
    _checked(_libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | (_MS_SLAVE if follow else _MS_PRIVATE)), None))


def umount(path: str, flags: int = 0) -> None:
    """umount2(2)."""
    _checked(_libc.umount2(os.fsencode(path), flags))


@contextlib.contextmanager
def loop_device(file: int) -> Iterator[str]:
    """Yield the path of a loop device of a descriptor; the kernel lets go of it with its last user, such as a mount."""
    with contextlib.ExitStack() as stack:
        control = stack.enter_context(closing(os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)))
        for _ in range(_LOOP_TRIES):
            path = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            with closing(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as device:
                flags = _LO_FLAGS_READ_ONLY | _LO_FLAGS_AUTOCLEAR
                try:
                    fcntl.ioctl(device, _LOOP_CONFIGURE, _LOOP_CONFIG.pack(file, 0, flags))
                except OSError as error:
                    if error.errno != errno.EBUSY:
                        raise
                    continue
                yield path
                return
    raise OSError(errno.EBUSY, "no loop device stays free for long enough")


@contextlib.contextmanager
def closing(fd: int) -> Iterator[int]:
    """Close a descriptor at the end of the block."""
    try:
        yield fd
    finally:
        os.close(fd)
