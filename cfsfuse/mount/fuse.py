"""Mounting with a server of ours: what the host must have, the file system put together, the daemon."""

from __future__ import annotations

import contextlib
import ctypes.util
import fcntl
import functools
import gc
import os
import resource
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.basedirs import BaseDirectories
from cfsfuse.mount import daemon
from cfsfuse.mount.daemon import Serving
from cfsfuse.mount.fusemount import check_device
from cfsfuse.mount.layers import opened_layers
from cfsfuse.mount.mountpoint import check_mountpoint, claimed
from cfsfuse.mount.options import PYFUSE3
from cfsfuse.mount.places import tree_cache
from cfsfuse.mount.plan import Backend
from cfsfuse.mount.sessions import LibFuse, Life, Plain, Stacked
from cfsfuse.mount.watcher import watched
from cfsfuse.objects import ObjectStore
from cfsfuse.trees import TreeStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cfsfuse.erofs.reader import Reader
    from cfsfuse.mount.options import MountOptions


class Opened(NamedTuple):
    """An image that is open, its path, and the descriptors that the caller of this process had open."""

    path: str
    reader: Reader
    not_ours: list[int]


def mount(image: Opened, mountpoint: str, options: MountOptions, backend: Backend, serving: Serving) -> None:
    """Mount the image and return when the mount is usable; in the foreground, return when it is unmounted.

    Raises a CfsError, with nothing mounted and no process left.
    """
    mountpoint = os.path.realpath(mountpoint)
    check_device()
    foreground = serving is Serving.FOREGROUND
    log = os.path.abspath(options.log) if options.log else None
    with contextlib.ExitStack() as stack:
        # Opened before anything is mounted: a store below the mountpoint is the one underneath.
        directories = BaseDirectories(options.basedir)
        session: LibFuse | Plain | Stacked
        if backend is Backend.OVERLAY or options.upperdir is not None:
            layers = stack.enter_context(opened_layers(options))
            session = Stacked(layers, options, has_data=backend is Backend.OVERLAY)
        else:
            session = (LibFuse if options.session == PYFUSE3 else Plain)(image.path, options)

        def serve(ready: Callable[[], None]) -> None:
            daemon.log_to(log, foreground=foreground)
            _raise_descriptor_limit()
            # Only the process that serves pays for the import of trio and what needs it. What it allocates lives on:
            # looking for cycles in it meanwhile would take a quarter of the time. The session turns the collector on.
            gc.disable()
            with _no_search_for_libraries():
                from cfsfuse.vfs import Vfs

            store = ObjectStore(directories, TreeStore(directories, tree_cache()), options.verification)
            vfs = Vfs(session.reader(image.reader), store, space_of_store=options.statfs == "store")
            with watched(mountpoint) as watch:
                session.serve(vfs, Life(mountpoint, watch, ready))

        claim = stack.enter_context(claimed(mountpoint))
        check_mountpoint(mountpoint)
        if foreground:
            serve(functools.partial(fcntl.flock, claim, fcntl.LOCK_UN))
        else:
            daemon.launch(serve, [*image.not_ours, claim], tied=serving is Serving.TIED)


@contextlib.contextmanager
def _no_search_for_libraries() -> Iterator[None]:
    """Answer the one question for a library that an import asks: trio's, for the one that names its threads.

    Where there is no cache of libraries the search runs the compiler, which takes longer than the rest of a mount.
    """
    original = ctypes.util.find_library
    ctypes.util.find_library = "lib{}.so.0".format
    try:
        yield
    finally:
        ctypes.util.find_library = original


def _raise_descriptor_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
