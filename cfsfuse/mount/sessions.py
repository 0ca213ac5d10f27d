"""The ways in which a server of ours shows a tree: as a FUSE mount, or as a layer below an overlay mount."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import TYPE_CHECKING

from cfsfuse.erofs import overlay
from cfsfuse.erofs.reader import Reader
from cfsfuse.errors import HostError
from cfsfuse.mount import fusemount, overlayfs, syscalls
from cfsfuse.mount.mountinfo import mount_at
from cfsfuse.mount.syscalls import closing
from cfsfuse.mount.unmount import take_away

if TYPE_CHECKING:
    from collections.abc import Callable

    from cfsfuse.mount.layers import Layers
    from cfsfuse.mount.mountinfo import Mount
    from cfsfuse.mount.options import MountOptions
    from cfsfuse.vfs import Vfs


class Life:
    """Announces our mount, and tells it from another one that may stand in its place later."""

    def __init__(self, mountpoint: str, watch: Callable[[Mount], None], ready: Callable[[], None]) -> None:
        self.mountpoint = mountpoint
        self.attach: Callable[[], None] | None = None
        """What mounts, if that has to wait for the server: overlayfs looks at its layers when it is made."""
        self._watch = watch
        self._ready = ready
        self._mount: Mount | None = None

    async def begins(self) -> None:
        """Announce the mount, which has been made or is made here."""
        if self.attach is not None:
            import trio

            # Abandoned at a signal: with the server's end, the kernel's questions to it come to theirs.
            await trio.to_thread.run_sync(self.attach, abandon_on_cancel=True)
        self._mount = mount_at(self.mountpoint)
        if self._mount is None:
            raise HostError(f"{self.mountpoint}: unmounted by somebody before it could be used")
        self._watch(self._mount)
        self._ready()

    def ends(self) -> bool:
        """Return whether what is mounted there may be ours."""
        if self._mount is None:
            return self.attach is None
        return mount_at(self.mountpoint) == self._mount


class LibFuse:
    """A FUSE mount made and served by libfuse, through pyfuse3."""

    def __init__(self, image_path: str, options: MountOptions) -> None:
        """Raise HostError for what this host lacks or forbids."""
        self._options = options
        self._of_libfuse = fusemount.permitted(image_path, options).as_text()

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


class Plain:
    """A FUSE mount served by ourselves."""

    def __init__(self, image_path: str, options: MountOptions) -> None:
        """Raise HostError for what this host lacks or forbids."""
        self._options = options
        self._how = fusemount.permitted(image_path, options)

    def reader(self, reader: Reader) -> Reader:
        """Return what reads the image as this session shows it."""
        return reader

    def serve(self, vfs: Vfs, life: Life) -> None:
        """Mount, and serve until the end of the mount."""
        with fusemount.mounted(life.mountpoint, self._how) as device:
            _serve(device, vfs, self._options, life)


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
        with closing(os.open(fusemount.DEVICE, os.O_RDWR | os.O_CLOEXEC)) as device:
            life.attach = functools.partial(self._attach, fusemount.detached(device), life.mountpoint)
            _serve(device, vfs, self._options, life, below_overlay=bool(self._layers.data))

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


def _serve(device: int, vfs: Vfs, options: MountOptions, life: Life, *, below_overlay: bool = False) -> None:
    """Serve until the end of the mount, and unmount what is still ours: lazily, so a mount in use goes away as well."""
    import trio

    from cfsfuse.fuse import server

    served = server.Server(device, vfs, uid=options.uid, gid=options.gid, below_overlay=below_overlay)
    try:
        trio.run(functools.partial(server.serve, served, poll=options.poll * 1e-6, life=life))
    finally:
        if life.ends():
            with contextlib.suppress(HostError):
                take_away(life.mountpoint, lazy=True)
