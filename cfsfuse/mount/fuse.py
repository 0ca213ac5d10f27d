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
from cfsfuse.fuse.protocol import check_root
from cfsfuse.mount import daemon
from cfsfuse.mount.fusemount import check_device, permitted
from cfsfuse.mount.layers import Stack, opened_layers
from cfsfuse.mount.mountpoint import check_mountpoint, claimed
from cfsfuse.mount.places import tree_cache
from cfsfuse.mount.plan import Backend, is_stacked
from cfsfuse.mount.serving import Serving
from cfsfuse.mount.watcher import watched
from cfsfuse.objects import ObjectStore
from cfsfuse.trees import TreeStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cfsfuse.erofs.reader import Reader
    from cfsfuse.mount.fusemount import FuseOptions
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
    check_root(image.reader.root.nid)
    foreground = serving is Serving.FOREGROUND
    log = os.path.abspath(options.log) if options.log else None
    with contextlib.ExitStack() as stack:
        # Opened before anything is mounted: a store below the mountpoint is the one underneath.
        directories = BaseDirectories(options.basedir)
        how: FuseOptions | Stack
        if is_stacked(backend, options):
            how = Stack(stack.enter_context(opened_layers(options)), has_data=backend is Backend.OVERLAY)
        else:
            how = permitted(image.path, options)

        def serve(ready: Callable[[], None]) -> None:
            daemon.log_to(log, foreground=foreground)
            _raise_descriptor_limit()
            # Only the process that serves pays for the import of trio and what needs it. What it allocates lives on:
            # looking for cycles in it meanwhile would take a quarter of the time. The session turns the collector on.
            gc.disable()
            with _no_search_for_pthread():
                from cfsfuse.mount import sessions

            store = ObjectStore(directories, TreeStore(directories, tree_cache()), options.verification)
            with watched(mountpoint) as watch:
                sessions.run(image.reader, store, options, how, sessions.Place(mountpoint, watch, ready))

        claim = stack.enter_context(claimed(mountpoint))
        check_mountpoint(mountpoint)
        if foreground:
            serve(functools.partial(fcntl.flock, claim, fcntl.LOCK_UN))
        else:
            daemon.launch(serve, [*image.not_ours, claim], tied=serving is Serving.TIED)


@contextlib.contextmanager
def _no_search_for_pthread() -> Iterator[None]:
    """Answer at once where a library is that trio 0.33 looks for at its import, to give its threads names.

    Where there is no cache of libraries that search runs the compiler, which takes longer than the rest of a mount.
    """
    original = ctypes.util.find_library
    ctypes.util.find_library = lambda name: "libpthread.so.0" if name == "pthread" else original(name)
    try:
        yield
    finally:
        ctypes.util.find_library = original


def _raise_descriptor_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
