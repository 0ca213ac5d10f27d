"""The tree as the root of a command, with what of the host is to be seen there."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.errors import HostError, UsageError
from cfsfuse.mount import syscalls
from cfsfuse.mount.syscalls import Context

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_HOST_TREES = ("/proc", "/dev", "/sys")


class Bind(NamedTuple):
    """What of the host is to be seen in the tree; paths are absolute."""

    source: str
    target: str
    read_only: bool = False


def enter(root: str, binds: Sequence[Bind], tmpfs: Sequence[str]) -> Iterator[str]:
    """Make the tree at `root` the root, with all that is to be seen there; yield warnings.

    Mounts go in when it is the root already: no symlink of the image leads out of it then.
    """
    syscalls.unshare_mounts(follow=True)
    host = [(syscalls.open_tree(path), path) for path in _HOST_TREES if os.path.isdir(path)]
    bound = [(_opened(bind), bind) for bind in binds]
    os.chdir(root)
    syscalls.pivot_root()
    for mount, path in host:
        if not _has_directory(path):
            yield f"{path}: not in the image, and not to be seen"
        else:
            syscalls.move_mount(mount, path)
    for path in tmpfs:
        _attach(_empty(path), path)
    for mount, bind in bound:
        _attach(mount, bind.target)


def _opened(bind: Bind) -> int:
    try:
        mount = syscalls.open_tree(bind.source)
        if bind.read_only:
            syscalls.set_read_only(mount)
    except OSError as error:
        raise UsageError(f"{bind.source}: cannot be bound: {error.strerror}") from None
    return mount


def _empty(path: str) -> int:
    try:
        with Context("tmpfs") as context:
            return context.mount(syscalls.ATTR_NOSUID | syscalls.ATTR_NODEV)
    except OSError as error:
        raise HostError(f"--tmpfs {path}: {error.strerror}; use --bind with an empty directory instead") from None


def _has_directory(path: str) -> bool:
    """Return whether a directory is there, and no link to one; where changes are taken it is made."""
    with contextlib.suppress(OSError):
        os.mkdir(path)
    return os.path.isdir(path) and not os.path.islink(path)


def _attach(mount: int, target: str) -> None:
    """Attach a mount in the tree, at a place that is made where the tree takes changes; links are those of the tree."""
    place = os.path.realpath(target)
    is_directory = stat.S_ISDIR(os.fstat(mount).st_mode)
    if place == "/":
        raise UsageError(f"{target}: the root of the tree cannot be hidden: name a place below it")
    try:
        if not os.path.lexists(place):
            _make(place, is_directory=is_directory)
        elif os.path.isdir(place) != is_directory:
            kinds = ("directory", "file") if is_directory else ("file", "directory")
            raise UsageError("{}: a {} cannot be shown at a {}".format(target, *kinds))
        syscalls.move_mount(mount, place)
    except OSError as error:
        reason = "Not a directory" if error.errno == errno.EEXIST else error.strerror
        hint = "; it is not in the image: --writable lets it be made" if error.errno == errno.EROFS else ""
        raise UsageError(f"{target}: nothing can be mounted there: {reason}{hint}") from None


def _make(place: str, *, is_directory: bool) -> None:
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if is_directory:
        os.mkdir(place)
    else:
        os.close(os.open(place, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
