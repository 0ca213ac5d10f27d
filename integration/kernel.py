"""The kernel's own composefs mount of an image, through the raw system calls: the oracle of the contract.

EROFS gives the metadata, overlayfs above it the contents, from data-only layers below it. mount(8) is left out on
purpose: it sets up loop devices on its own account, and spells options its own way.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# include/uapi/asm-generic/unistd.h; the same on every architecture but alpha.
_SYS_MOVE_MOUNT = 429
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432

# include/uapi/linux/mount.h
_FSOPEN_CLOEXEC = 1
_FSCONFIG_SET_FLAG = 0
_FSCONFIG_SET_STRING = 1
_FSCONFIG_SET_FD = 5
_FSCONFIG_CMD_CREATE = 6
_FSMOUNT_CLOEXEC = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
MOUNT_ATTR_RDONLY = 1
MOUNT_ATTR_NOSUID = 2
MOUNT_ATTR_NODEV = 4

# include/uapi/linux/fcntl.h, include/linux/fs.h
_AT_FDCWD = -100
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8

# include/uapi/linux/loop.h
_LOOP_CONFIGURE = 0x4C0A
_LOOP_CTL_GET_FREE = 0x4C82
_LO_FLAGS_READ_ONLY = 1
_LO_FLAGS_AUTOCLEAR = 4
# struct loop_config: fd, block_size, and in its struct loop_info64 the flags behind 52 bytes of fields left 0.
_LOOP_CONFIG = struct.Struct("=II52xI176x64x")
_LOOP_TRIES = 16  # somebody else may take the free device before we do

_LOG_SIZE = 4096
# The mount flags that FUSE always has: with them the two views can be compared without exceptions.
LIKE_FUSE = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV

Parameter = tuple[str, "str | int | None"]
"""A parameter of a file system: a string, a descriptor, or None for a flag."""

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def mounted(
    image: str, base_directories: Sequence[str], mountpoint: str, attributes: int = LIKE_FUSE
) -> Iterator[None]:
    """Mount `image` at `mountpoint`; raise OSError, with what the kernel says to it, where that is not possible.

    Nothing is mounted afterwards, and no loop device is taken: only the overlay mount refers to the EROFS mount.
    """
    with contextlib.ExitStack() as stack:
        lower = stack.enter_context(_closing(_erofs(image)))
        data = [stack.enter_context(_closing(os.open(path, os.O_PATH | os.O_CLOEXEC))) for path in base_directories]
        with _closing(_overlay(lower, data, attributes)) as mount:
            _move_mount(mount, mountpoint)
    try:
        yield
    finally:
        _unmount(mountpoint)


def detach(mountpoint: str) -> None:
    """Take away whatever is mounted at `mountpoint`, in use or not; nothing there is well, too."""
    _libc.umount2(os.fsencode(mountpoint), _MNT_DETACH | _UMOUNT_NOFOLLOW)


def _unmount(mountpoint: str) -> None:
    if _libc.umount2(os.fsencode(mountpoint), _UMOUNT_NOFOLLOW) < 0:
        number = ctypes.get_errno()
        detach(mountpoint)
        raise OSError(number, os.strerror(number), mountpoint)


def _erofs(image: str) -> int:
    """Return a detached mount of the image itself: from the file where the kernel can (6.12, real file systems)."""
    try:
        return _make_mount("erofs", [("ro", None), ("source", os.path.abspath(image))], MOUNT_ATTR_RDONLY)
    except OSError as error:
        if error.errno != errno.ENOTBLK:
            raise
    with _loop_device(image) as device:
        return _make_mount("erofs", [("ro", None), ("source", device)], MOUNT_ATTR_RDONLY)


def _overlay(lower: int, data: Sequence[int], attributes: int) -> int:
    """Return a detached overlay mount; its layers go in as descriptors (6.13), or as the magic links to them."""
    last: OSError | None = None
    for layer in (lambda fd: fd, "/proc/self/fd/{}".format):
        layers = [("lowerdir+", layer(lower)), *(("datadir+", layer(fd)) for fd in data)]
        try:
            return _make_mount("overlay", [("metacopy", "on"), ("redirect_dir", "on"), *layers], attributes)
        except OSError as error:
            last = error
    raise last or AssertionError("no form of layers was tried")


def _make_mount(fstype: str, parameters: Sequence[Parameter], attributes: int) -> int:
    """Return the descriptor of a new detached mount."""
    with _closing(_syscall(_SYS_FSOPEN, fstype.encode(), _FSOPEN_CLOEXEC)) as context:
        try:
            for name, value in parameters:
                _set(context, name, value)
            _syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        except OSError as error:
            raise OSError(error.errno, f"{fstype}: {error.strerror}: {_said(context)}") from None
        return _syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes)


def _set(context: int, name: str, value: str | int | None) -> None:
    key = name.encode()
    if value is None:
        _syscall(_SYS_FSCONFIG, context, _FSCONFIG_SET_FLAG, key, None, 0)
    elif isinstance(value, int):
        _syscall(_SYS_FSCONFIG, context, _FSCONFIG_SET_FD, key, None, value)
    else:
        _syscall(_SYS_FSCONFIG, context, _FSCONFIG_SET_STRING, key, os.fsencode(value), 0)


def _said(context: int) -> str:
    """Return the kernel's messages about a file system context, each of which is one read."""
    messages = []
    with contextlib.suppress(OSError):  # ENODATA: that was all
        while message := os.read(context, _LOG_SIZE):
            messages.append(message.decode(errors="replace").strip())
    return "; ".join(messages)


def _move_mount(mount: int, mountpoint: str) -> None:
    _syscall(_SYS_MOVE_MOUNT, mount, b"", _AT_FDCWD, os.fsencode(mountpoint), _MOVE_MOUNT_F_EMPTY_PATH)


@contextlib.contextmanager
def _loop_device(image: str) -> Iterator[str]:
    """Give a loop device of the image; the kernel releases it with its last user, which is the mount made of it."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_closing(os.open(image, os.O_RDONLY | os.O_CLOEXEC)))
        control = stack.enter_context(_closing(os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)))
        for _ in range(_LOOP_TRIES):
            path = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            device = stack.enter_context(_closing(os.open(path, os.O_RDONLY | os.O_CLOEXEC)))
            try:
                fcntl.ioctl(
                    device, _LOOP_CONFIGURE, _LOOP_CONFIG.pack(file, 0, _LO_FLAGS_READ_ONLY | _LO_FLAGS_AUTOCLEAR)
                )
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                continue
            yield path
            return
        raise OSError(errno.EBUSY, "no loop device stays free for long enough")


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    # An int becomes a C long: without that, ctypes would pass 32 bits and leave the register's upper half undefined.
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *words))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
