"""Making FUSE mounts: what this host permits, and the mount itself, by the system calls or through fusermount3.

The device comes first, the mount refers to it: mount_fuse(8), include/uapi/linux/fuse.h. fusermount3, which has the
privilege that a user lacks, opens the device itself and hands it over a socket.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import subprocess
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.errors import HostError, printable
from cfsfuse.mount import overlayfs, syscalls
from cfsfuse.mount.mountinfo import FUSE_TYPE
from cfsfuse.mount.syscalls import Context
from cfsfuse.privilege import has_sys_admin

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cfsfuse.mount.options import MountOptions

DEVICE = "/dev/fuse"
_FUSE_CONF = "/etc/fuse.conf"
_SOCKET_VARIABLE = "_FUSE_COMMFD"


class FuseOptions(NamedTuple):
    """How a FUSE mount is made: what it shows as its source, who is let in, and the flags of the user."""

    source: str
    allow_other: bool
    flags: tuple[str, ...]

    def as_text(self) -> list[str]:
        """Return them as libfuse and fusermount3 spell them."""
        source = self.source.replace("\\", "\\\\").replace(",", "\\,")
        others = ["allow_other"] if self.allow_other else []
        return ["ro", "default_permissions", "subtype=cfsfuse", f"fsname={source}", *others, *self.flags]


def permitted(image_path: str, options: MountOptions) -> FuseOptions:
    """Return how to mount; raise HostError for what this host lacks or forbids."""
    privileged = has_sys_admin()
    if not privileged and shutil.which("fusermount3") is None:
        raise HostError("fusermount3: not found; an ordinary user needs it to mount: install the package fuse3")
    # As root the kernel mount can be used by everybody, so can this one; an ordinary user has to ask for it.
    allow_other = privileged if options.allow_other is None else options.allow_other
    forbidden = [flag for flag in options.flags if flag in ("dev", "suid")]
    if forbidden and not privileged:
        raise HostError(f"{forbidden[0]}: only root may mount with it")
    if allow_other and not privileged and not _conf_allows_other():
        raise HostError(
            f"allow_other: {_FUSE_CONF} does not permit it; the administrator has to write user_allow_other there"
        )
    source = printable(os.fsencode(os.path.abspath(image_path))).encode("ascii", "backslashreplace").decode()
    return FuseOptions(source, allow_other, options.flags)


def check_device() -> None:
    """Raise HostError unless this process may use FUSE's device."""
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise HostError(
            f"{DEVICE}: not there; load the kernel's module (modprobe fuse), or let this container have it, "
            "or do without: cfsfuse extract"
        ) from None
    except PermissionError:
        raise HostError(
            f"{DEVICE}: permission denied; the administrator has to make it usable: chmod 666 {DEVICE}"
        ) from None
    except OSError as error:
        raise HostError(f"{DEVICE}: {error.strerror}; this kernel or container has no FUSE") from None


@contextlib.contextmanager
def mounted(mountpoint: str, chosen: FuseOptions) -> Iterator[int]:
    """Make a FUSE mount and yield its device, which is closed at the end; unmounting it is the caller's."""
    device = _mount(mountpoint, chosen) if has_sys_admin() else _fusermount(mountpoint, chosen)
    with syscalls.closing(device):
        yield device


def detached(device: int) -> int:
    """Return a FUSE mount that is attached nowhere; overlayfs checks all permissions above it."""
    parameters = {"source": "cfsfuse", "subtype": "cfsfuse", **_parameters(device)}
    try:
        with Context("fuse") as context:
            for key, value in parameters.items():
                context.set(key, value)
            context.set("ro")  # else the kernel asks for a new access time after each listing and each link
            return context.mount(syscalls.ATTR_RDONLY | syscalls.ATTR_NOSUID | syscalls.ATTR_NODEV)
    except OSError as error:
        raise HostError(f"{DEVICE}: the kernel makes no FUSE mount: {error.strerror}") from None


def _parameters(device: int) -> dict[str, str]:
    return {
        "fd": str(device),
        "rootmode": f"{stat.S_IFDIR:o}",
        "user_id": str(os.geteuid()),
        "group_id": str(os.getegid()),
    }


def _mount(mountpoint: str, chosen: FuseOptions) -> int:
    device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    words = [f"{key}={value}" for key, value in _parameters(device).items()]
    words += ["default_permissions", *(["allow_other"] if chosen.allow_other else [])]
    attributes = overlayfs.attributes(chosen.flags, read_only=True)
    try:
        syscalls.old_mount(chosen.source, mountpoint, FUSE_TYPE, attributes, ",".join(words))
    except OSError as error:
        os.close(device)
        raise HostError(f"{mountpoint}: the kernel does not mount this: {error.strerror}") from None
    return device


def _fusermount(mountpoint: str, chosen: FuseOptions) -> int:
    ours, its = socket.socketpair()
    with ours, its:
        done = subprocess.run(
            ["fusermount3", "-o", ",".join(chosen.as_text()), "--", mountpoint],
            env={**os.environ, _SOCKET_VARIABLE: str(its.fileno())},
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        its.close()
        _, devices, _, _ = socket.recv_fds(ours, 1, 1)
    if done.returncode or not devices:
        said = " ".join(done.stderr.split()) or f"fusermount3 ended with status {done.returncode}"
        raise HostError(f"{mountpoint}: {said}")
    os.set_inheritable(devices[0], False)
    return devices[0]


def _conf_allows_other() -> bool:
    try:
        with open(_FUSE_CONF, encoding="utf-8", errors="replace") as file:
            return any(line.strip() == "user_allow_other" for line in file)
    except OSError:
        return False
