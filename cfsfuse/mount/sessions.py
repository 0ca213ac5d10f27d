"""The two ways in which a server of ours shows a tree: as a FUSE mount, or as a layer below an overlay mount."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import stat
from typing import TYPE_CHECKING

from cfsfuse.erofs import overlay
from cfsfuse.erofs.reader import Reader
from cfsfuse.errors import HostError, printable
from cfsfuse.mount import overlayfs, syscalls
from cfsfuse.mount.mountinfo import mount_at
from cfsfuse.mount.syscalls import Context, closing
from cfsfuse.privilege import has_sys_admin

if TYPE_CHECKING:
    from collections.abc import Callable

    from cfsfuse.mount.layers import Layers
    from cfsfuse.mount.mountinfo import Mount
    from cfsfuse.mount.options import MountOptions
    from cfsfuse.vfs import Vfs

_DEVICE = "/dev/fuse"
_FUSE_CONF = "/etc/fuse.conf"


class Life:
    """Announces our mount, and tells it from another one that may stand in its place later."""

    def __init__(self, mountpoint: str, watch: Callable[[Mount], None], ready: Callable[[], None]) -> None:
        self.mountpoint = mountpoint
        self._watch = watch
        self._ready = ready
        self._mount: Mount | None = None

    async def begins(self) -> None:
        """Announce the mount, which has been made."""
        self._mount = mount_at(self.mountpoint)
        if self._mount is None:
            raise HostError(f"{self.mountpoint}: unmounted by somebody before it could be used")
        self._watch(self._mount)
        self._ready()

    def ends(self) -> bool:
        """Return whether what is mounted there may be ours."""
        return self._mount is None or mount_at(self.mountpoint) == self._mount


class Plain:
    """A FUSE mount, made by libfuse."""

    def __init__(self, image_path: str, options: MountOptions) -> None:
        """Raise HostError for what this host lacks or forbids."""
        self._options = options
        self._of_libfuse = _libfuse_options(image_path, options)

    def reader(self, reader: Reader) -> Reader:
        """Return what reads the image as this session shows it."""
        return reader

    def serve(self, vfs: Vfs, life: Life) -> None:
        """Mount, and serve until the end of the mount."""
        import trio

        from cfsfuse.fuse import operations, session

        adapter = operations.Operations(vfs, uid=self._options.uid, gid=self._options.gid)
        run = functools.partial(session.serve, poll=self._options.poll * 1e-6, life=life)
        trio.run(run, adapter, life.mountpoint, self._of_libfuse)


class Stacked:
    """A layer that is mounted nowhere, below an overlay mount.

    With `has_data` the server shows metadata alone, and overlayfs takes the contents from the object store by itself;
    without, the server gives verified contents as well, and overlayfs takes what is written.
    """

    def __init__(self, layers: Layers, options: MountOptions, *, has_data: bool) -> None:
        self._options = options
        self._layers = layers if has_data else layers._replace(data=[])
        self._view = overlay.METADATA_LAYER if has_data else overlay.LAYER
        self._verity = overlayfs.VERITY[options.verification] if has_data else None

    def reader(self, reader: Reader) -> Reader:
        """Return what reads the image as this session shows it."""
        return Reader(reader.image, self._view)

    def serve(self, vfs: Vfs, life: Life) -> None:
        """Mount, and serve until the end of the mount."""
        import trio

        from cfsfuse.fuse import server

        with closing(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)) as device:
            stacked = _StackedLife(life, functools.partial(self._attach, _detached(device), life.mountpoint))
            options = self._options
            served = server.Server(device, vfs, uid=options.uid, gid=options.gid, below_overlay=bool(self._layers.data))
            try:
                trio.run(functools.partial(server.serve, served, poll=options.poll * 1e-6, life=stacked))
            finally:
                stacked.unmount()

    def _attach(self, layer: int, mountpoint: str) -> None:
        """Mount; `layer` is closed, so that the overlay mount alone keeps it, and with it the server, alive."""
        parameters = {"userxattr": None}
        try:
            os.fstat(layer)  # overlayfs copies what the root's inode knows of itself, which is nothing before this
            with closing(layer), overlayfs.above(layer, self._layers, parameters, self._options, self._verity) as mount:
                syscalls.move_mount(mount, mountpoint)
        except overlayfs.TooOldError:
            raise HostError("this kernel cannot put overlayfs together of descriptors: that needs Linux 6.7") from None
        except OSError as error:
            raise HostError(f"{mountpoint}: the kernel does not mount this: {error.strerror}") from None


class _StackedLife:
    """The life of a mount that is made when the server below it runs already: overlayfs looks at its layers."""

    def __init__(self, life: Life, attach: Callable[[], None]) -> None:
        self._life = life
        self._attach = attach
        self._is_attached = False

    async def begins(self) -> None:
        import trio

        # Abandoned at a signal: with the server's end, the kernel's questions come to theirs.
        await trio.to_thread.run_sync(self._attach, abandon_on_cancel=True)
        self._is_attached = True
        await self._life.begins()

    def ends(self) -> bool:
        return self._is_attached and self._life.ends()

    def unmount(self) -> None:
        """Unmount what is still ours; lazily, so a mount in use goes away as well."""
        if self.ends():
            with contextlib.suppress(OSError):
                syscalls.umount(self._life.mountpoint, syscalls.UMOUNT_NOFOLLOW | syscalls.MNT_DETACH)


def _detached(device: int) -> int:
    """Return a FUSE mount that is attached nowhere; overlayfs checks all permissions above it."""
    parameters = {
        "source": "cfsfuse",
        "subtype": "cfsfuse",
        "fd": str(device),
        "rootmode": f"{stat.S_IFDIR:o}",
        "user_id": str(os.geteuid()),
        "group_id": str(os.getegid()),
    }
    try:
        with Context("fuse") as context:
            for key, value in parameters.items():
                context.set(key, value)
            return context.mount(syscalls.ATTR_RDONLY | syscalls.ATTR_NOSUID | syscalls.ATTR_NODEV)
    except OSError as error:
        raise HostError(f"{_DEVICE}: the kernel makes no FUSE mount: {error.strerror}") from None


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


def _conf_allows_other() -> bool:
    try:
        with open(_FUSE_CONF, encoding="utf-8", errors="replace") as file:
            return any(line.strip() == "user_allow_other" for line in file)
    except OSError:
        return False


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
