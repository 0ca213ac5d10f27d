"""Mounting through FUSE: what the host must have, the file system put together, the daemon."""

from __future__ import annotations

import fcntl
import functools
import gc
import os
import resource
import shutil
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.basedirs import BaseDirectories
from cfsfuse.errors import HostError, printable
from cfsfuse.mount import daemon
from cfsfuse.mount.mountinfo import mount_at
from cfsfuse.mount.mountpoint import check_mountpoint, claimed
from cfsfuse.mount.places import tree_cache
from cfsfuse.mount.watcher import watched
from cfsfuse.objects import ObjectStore
from cfsfuse.privilege import has_sys_admin
from cfsfuse.trees import TreeStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from cfsfuse.erofs.reader import Reader
    from cfsfuse.mount.mountinfo import Mount
    from cfsfuse.mount.options import MountOptions

_DEVICE = "/dev/fuse"
_FUSE_CONF = "/etc/fuse.conf"


class Opened(NamedTuple):
    """An image that is open, its path, and the descriptors that the caller of this process had open."""

    path: str
    reader: Reader
    not_ours: list[int]


def mount(image: Opened, mountpoint: str, options: MountOptions, *, foreground: bool) -> None:
    """Mount the image and return when the mount is usable; in the foreground, return when it is unmounted.

    Raises a CfsError, with nothing mounted and no process left.
    """
    mountpoint = os.path.realpath(mountpoint)
    libfuse_options = _libfuse_options(image.path, options)
    _raise_descriptor_limit()
    # Opened before anything is mounted: a store below the mountpoint is the one underneath.
    directories = BaseDirectories(options.basedir)
    log = os.path.abspath(options.log) if options.log else None

    def serve(ready: Callable[[], None]) -> None:
        daemon.log_to(log, foreground=foreground)
        trees = TreeStore(directories, tree_cache())
        store = ObjectStore(directories, trees, options.verification)
        # Only the process that serves pays for the import of trio and pyfuse3. What it allocates lives on: looking for
        # cycles in it meanwhile would take a quarter of the time. The session turns the collector on again.
        gc.disable()
        import trio

        from cfsfuse.fuse import operations, session
        from cfsfuse.vfs import Vfs

        vfs = Vfs(image.reader, store, space_of_store=options.statfs == "store")
        adapter = operations.Operations(vfs, uid=options.uid, gid=options.gid)
        with watched(mountpoint) as watch:
            life = _Life(mountpoint, watch, ready)
            run = functools.partial(session.serve, poll=options.poll * 1e-6, life=life)
            trio.run(run, adapter, mountpoint, libfuse_options)

    with claimed(mountpoint) as claim:
        check_mountpoint(mountpoint)
        if foreground:
            serve(functools.partial(fcntl.flock, claim, fcntl.LOCK_UN))
        else:
            daemon.launch(serve, [*image.not_ours, claim])


class _Life:
    """Announces our mount, and tells it from another one that may stand in its place later."""

    def __init__(self, mountpoint: str, watch: Callable[[Mount], None], ready: Callable[[], None]) -> None:
        self._mountpoint = mountpoint
        self._watch = watch
        self._ready = ready
        self._mount: Mount | None = None

    def begins(self) -> None:
        self._mount = mount_at(self._mountpoint)
        if self._mount is None:
            raise HostError(f"{self._mountpoint}: unmounted by somebody before it could be used")
        self._watch(self._mount)
        self._ready()

    def is_mine(self) -> bool:
        return self._mount is None or mount_at(self._mountpoint) == self._mount


def _libfuse_options(image_path: str, options: MountOptions) -> list[str]:
    """Return libfuse's mount options; raise HostError for what this host lacks or forbids."""
    check_device()
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
    chosen = [
        "ro",
        "default_permissions",
        "subtype=cfsfuse",
        "fsname=" + source.replace("\\", "\\\\").replace(",", "\\,"),
    ]
    if allow_other:
        chosen.append("allow_other")
    return chosen + list(options.flags)


def check_device() -> None:
    """Raise HostError unless this process may use FUSE's device."""
    try:
        os.close(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise HostError(f"{_DEVICE}: not there; load the kernel's module: modprobe fuse") from None
    except PermissionError:
        raise HostError(
            f"{_DEVICE}: permission denied; the administrator has to make it usable: chmod 666 {_DEVICE}"
        ) from None
    except OSError as error:
        raise HostError(f"{_DEVICE}: {error.strerror}; this kernel or container has no FUSE") from None


def _conf_allows_other() -> bool:
    try:
        with open(_FUSE_CONF, encoding="utf-8", errors="replace") as file:
            return any(line.strip() == "user_allow_other" for line in file)
    except OSError:
        return False


def _raise_descriptor_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
