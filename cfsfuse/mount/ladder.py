"""Mounting an image by the backend that the options and the host allow: what `cfsfuse mount` does."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from cfsfuse.errors import HostError, UsageError
from cfsfuse.mount import kernel
from cfsfuse.mount.options import AUTO
from cfsfuse.mount.plan import Backend, choose, judge
from cfsfuse.mount.probe import Host
from cfsfuse.mount.serving import Serving, open_descriptors

if TYPE_CHECKING:
    from collections.abc import Callable

    from cfsfuse.erofs.reader import Reader
    from cfsfuse.mount.options import MountOptions
    from cfsfuse.mount.plan import Verdict

    Tell = Callable[[list[Verdict], Backend | None], None]


def mount(
    image: str,
    mountpoint: str,
    options: MountOptions,
    serving: Serving = Serving.BACKGROUND,
    tell: Tell | None = None,
) -> Backend:
    """Mount an image and return, when the mount is usable, by which backend; in the foreground, when it is unmounted.

    `tell` hears before that what speaks against each backend, and which one is taken, if any. Raises a CfsError, with
    nothing mounted and no process left.
    """
    not_ours = open_descriptors()
    if not options.basedir:
        raise UsageError("no base directory: name the object store with -o basedir=")
    if options.idmap is not None:
        kernel.check_user_namespace(options.idmap)
    reader = reader_of(image, options.digest)
    look = Host(reader, options.basedir, tells=tell is not None).look
    foreground = serving is Serving.FOREGROUND
    failed: dict[Backend, str] = {}
    while True:
        chosen = None
        try:
            chosen = choose(options, look, foreground=foreground, failed=failed)
        finally:
            if tell is not None and not failed:
                tell(list(judge(options, look, foreground=foreground)), chosen)
        try:
            if chosen is Backend.KERNEL:
                kernel.mount(image, mountpoint, options)
            else:
                from cfsfuse.mount import fuse

                fuse.mount(fuse.Opened(image, reader(), not_ours), mountpoint, options, chosen, serving)
        except HostError as error:
            # What was tried out has been possible, and this is not: the next backend may be.
            if options.backend != AUTO or chosen is Backend.FUSE:
                raise
            failed[chosen] = str(error)
        else:
            return chosen


def reader_of(image: str, digest: str | None) -> Callable[[], Reader]:
    """Return what opens an image, once, when somebody needs it; it must have `digest`, if that is given."""

    @functools.cache
    def reader() -> Reader:
        from cfsfuse.erofs.reader import Reader
        from cfsfuse.imagefile import naming, open_image

        with naming(image):
            return Reader(open_image(image, digest))

    return reader
