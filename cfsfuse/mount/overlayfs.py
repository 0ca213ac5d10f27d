"""Overlayfs above the metadata of an image: put together by the new mount calls, and attached when all is well.

Needs Linux 6.5. Layers go in as descriptors (6.13) or as magic links to them (6.7).
https://docs.kernel.org/filesystems/overlayfs.html
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from cfsfuse.errors import HostError
from cfsfuse.mount import syscalls
from cfsfuse.mount.mountinfo import COMPOSEFS_SOURCE
from cfsfuse.mount.syscalls import Context, closing
from cfsfuse.verification import Verification

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cfsfuse.mount.layers import Layers
    from cfsfuse.mount.options import MountOptions

VERITY = {Verification.OFF: None, Verification.RECORDED: "on", Verification.REQUIRED: "require"}
NO_VERITY = "overlayfs of this kernel does not verify: that needs Linux 6.6; noverity mounts without it"

_ATTRIBUTES = {
    "nosuid": syscalls.ATTR_NOSUID,
    "nodev": syscalls.ATTR_NODEV,
    "noexec": syscalls.ATTR_NOEXEC,
    "noatime": syscalls.ATTR_NOATIME,
}
_NO_DESCRIPTORS = (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP)  # as overlayfs of different ages says it


class TooOldError(Exception):
    """The kernel lacks a part of the new mount calls: fsopen(2) itself, or overlayfs' `lowerdir+`."""


def appends_layers() -> bool:
    """Return whether overlayfs takes layers one by one: since Linux 6.7, which also shows an image as it is."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        with Context("overlay") as context, closing(os.open("/", flags)) as layer:
            if context.takes_anything():
                return False
            for key in ("lowerdir+", "datadir+"):
                _set_layer(context, key, layer)
    except (OSError, TooOldError):
        return False
    return True


@contextlib.contextmanager
def above(
    lower: int, layers: Layers, parameters: Mapping[str, str | None], options: MountOptions, verity: str | None
) -> Iterator[int]:
    """Yield an overlay mount, attached nowhere, of `lower` and `layers`; all three are descriptors, as is it."""
    try:
        context = Context("overlay")
    except OSError as error:
        if error.errno == errno.ENOSYS:
            raise TooOldError from None
        raise
    with context:
        if context.takes_anything():
            raise TooOldError
        for key, layer in by_key(lower, layers):
            _set_layer(context, key, layer)
        context.set("source", COMPOSEFS_SOURCE)
        for key, value in parameters.items():
            context.set(key, value)
        if verity:
            _set_verity(context, verity)
        with closing(context.mount(attributes(options.flags, read_only=not options.is_writable))) as mount:
            yield mount


def by_key(lower: int, layers: Layers) -> Iterator[tuple[str, int]]:
    """Yield the parameters of overlayfs that are layers."""
    yield "lowerdir+", lower
    for fd in layers.data:
        yield "datadir+", fd
    if layers.upper is not None and layers.work is not None:
        yield "upperdir", layers.upper
        yield "workdir", layers.work


def _set_layer(context: Context, key: str, layer: int) -> None:
    """Add a layer, as a descriptor (6.13) or as the magic link to it (6.7)."""
    try:
        context.set(key, layer)
    except OSError as error:
        if error.errno not in _NO_DESCRIPTORS:
            raise
        try:
            context.set(key, f"/proc/self/fd/{layer}")
        except OSError as again:
            if again.errno == errno.EINVAL and key == "lowerdir+":
                raise TooOldError from None
            raise


def _set_verity(context: Context, verity: str) -> None:
    try:
        context.set("verity", verity)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise HostError(NO_VERITY) from None
        raise


def attributes(said: tuple[str, ...], *, read_only: bool) -> int:
    """Return the attributes of a mount: nosuid and nodev, unless something else is `said`."""
    flags = dict.fromkeys(("nosuid", "nodev"), True)
    for flag in said:
        flags[flag if flag in _ATTRIBUTES else "no" + flag] = flag in _ATTRIBUTES
    bits = sum(_ATTRIBUTES[flag] for flag, is_set in flags.items() if is_set and flag in _ATTRIBUTES)
    return bits | (syscalls.ATTR_RDONLY if read_only else 0)
