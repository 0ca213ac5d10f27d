"""The ways in which a server of ours shows a tree: as a FUSE mount, or as a layer below an overlay mount.

Imported by the process that serves alone, before it mounts: what it needs later might be hidden by the mount.
"""

from __future__ import annotations

import contextlib
import functools
import os
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import trio

from cfsfuse.erofs import overlay
from cfsfuse.erofs.reader import Reader
from cfsfuse.errors import HostError
from cfsfuse.fuse.server import Server, serve
from cfsfuse.mount import fusemount, overlayfs, syscalls
from cfsfuse.mount.layers import Stack
from cfsfuse.mount.mountinfo import mount_at
from cfsfuse.mount.options import PYFUSE3
from cfsfuse.mount.syscalls import closing
from cfsfuse.mount.unmount import take_away
from cfsfuse.vfs import Vfs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cfsfuse.mount.fusemount import FuseOptions
    from cfsfuse.mount.mountinfo import Mount
    from cfsfuse.mount.options import MountOptions
    from cfsfuse.objects import ObjectStore


class Place(NamedTuple):
    """Where to mount, what tells the watcher of the mount, and who waits for it."""

    mountpoint: str
    watch: Callable[[Mount], None]
    ready: Callable[[], None]


def run(reader: Reader, store: ObjectStore, options: MountOptions, how: FuseOptions | Stack, place: Place) -> None:
    """Mount the image of `reader` at `place`, and serve until the end of the mount."""
    poll = options.poll * 1e-6
    of_store = options.statfs == "store"
    if isinstance(how, Stack):
        view = overlay.METADATA_LAYER if how.has_data else overlay.LAYER
        vfs = Vfs(Reader(reader.image, view), store, space_of_store=of_store)
        server = Server(vfs, uid=options.uid, gid=options.gid, prepares_xattrs=how.has_data)
        trio.run(functools.partial(serve, server, poll=poll, life=StackedLife(place, how, options)))
        return
    vfs = Vfs(reader, store, space_of_store=of_store)
    if options.session == PYFUSE3:
        from cfsfuse.fuse import operations, session

        adapter = operations.Operations(vfs, uid=options.uid, gid=options.gid)
        by_libfuse = functools.partial(session.serve, poll=poll, life=LifeOfLibFuse(place))
        trio.run(by_libfuse, adapter, place.mountpoint, how.as_text())
        return
    server = Server(vfs, uid=options.uid, gid=options.gid)
    trio.run(functools.partial(serve, server, poll=poll, life=PlainLife(place, how)))


class _Life:
    """The life of a mount of ours, which is told from another one that may stand in its place later."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._mount: Mount | None = None

    def has_mounted(self) -> None:
        """Remember the mount that has just been made, and let the watcher know it."""
        self._mount = mount_at(self._place.mountpoint)
        if self._mount is None:
            raise HostError(f"{self._place.mountpoint}: unmounted by somebody before it could be used")
        self._place.watch(self._mount)

    def unmount(self) -> None:
        """Unmount what is still ours; lazily, for it may be in use."""
        if self._mount is not None and mount_at(self._place.mountpoint) == self._mount:
            with contextlib.suppress(HostError):
                take_away(self._place.mountpoint, lazy=True)


class PlainLife(_Life):
    """The life of a FUSE mount."""

    def __init__(self, place: Place, how: FuseOptions) -> None:
        super().__init__(place)
        self._how = how

    @contextlib.contextmanager
    def mounted(self) -> Iterator[int]:
        """Mount, and yield the device on which requests come; unmount in the end."""
        with fusemount.mounted(self._place.mountpoint, self._how) as device:
            try:
                self.has_mounted()
                yield device
            finally:
                self.unmount()

    async def begins(self) -> None:
        """Announce the mount: it answers."""
        self._place.ready()


class StackedLife(_Life):
    """The life of an overlay mount above a FUSE mount that is attached nowhere, and goes with it.

    Overlayfs looks at its layers when it is made, so it is made in a thread, when the server already answers.
    """

    def __init__(self, place: Place, stack: Stack, options: MountOptions) -> None:
        super().__init__(place)
        self._layers = stack.layers if stack.has_data else stack.layers._replace(data=[])
        self._verity = overlayfs.VERITY[options.verification] if stack.has_data else None
        self._options = options
        self._layer = -1
        self._deciding = Lock()
        self._has_ended = False

    @contextlib.contextmanager
    def mounted(self) -> Iterator[int]:
        """Make our layer, and yield the device on which requests come; unmount what stands on it in the end."""
        with closing(os.open(fusemount.DEVICE, os.O_RDWR | os.O_CLOEXEC)) as device:
            self._layer = fusemount.detached(device)
            try:
                yield device
            finally:
                with self._deciding:
                    self._has_ended = True
                self.unmount()

    async def begins(self) -> None:
        """Mount, and announce it."""
        # Abandoned at a signal: with the server's end, the kernel's questions to it come to theirs.
        await trio.to_thread.run_sync(self._attach, abandon_on_cancel=True)
        self._place.ready()

    def _attach(self) -> None:
        """Mount. The layer is closed, so that the overlay mount alone keeps it, and with it the server, alive."""
        parameters = {"userxattr": None}
        try:
            with closing(self._layer) as layer:
                os.fstat(layer)  # overlayfs copies what the root's inode knows of itself, which is nothing before this
                with overlayfs.above(layer, self._layers, parameters, self._options, self._verity) as mount:
                    self._move(mount)
        except overlayfs.TooOldError:
            raise HostError("this kernel cannot put overlayfs together of descriptors: that needs Linux 6.7") from None
        except OSError as error:
            raise HostError(f"{self._place.mountpoint}: the kernel does not mount this: {error.strerror}") from None

    def _move(self, mount: int) -> None:
        with self._deciding:
            if not self._has_ended:
                syscalls.move_mount(mount, self._place.mountpoint)
                self.has_mounted()


class LifeOfLibFuse(_Life):
    """The life of a FUSE mount that libfuse makes, and unmounts."""

    async def begins(self) -> None:
        """Announce the mount."""
        self.has_mounted()
        self._place.ready()

    def ends(self) -> bool:
        """Return whether what is mounted there may be ours."""
        return self._mount is None or mount_at(self._place.mountpoint) == self._mount
