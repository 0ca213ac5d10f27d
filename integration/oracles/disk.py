"""Trees of nodes as directories on disk: `python -m integration.oracles.disk CASE.tree DIRECTORY` makes a kept one."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from typing import TYPE_CHECKING

from integration.oracles.nodes import Node, Path, read

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_NSEC_PER_SEC = 1_000_000_000
# What a file system says to an xattr that it cannot hold, or this user may not set. Then there is one less in the case.
_REFUSALS = (errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.ENOSPC, errno.E2BIG, errno.ERANGE, errno.EINVAL)


def make(nodes: Iterable[Node], top: str) -> None:
    """Make a tree below the new directory `top`. Owners and devices need root, and are left as they come without."""
    made = list(nodes)
    for node in made:
        _create(node, _place(top, node.path), top)
    for node in reversed(made):  # what is made in a directory changes its time
        if node.link is None:
            _dress(node, _place(top, node.path))


def _place(top: str, path: Path) -> bytes:
    return b"/".join((os.fsencode(top), *path))


def _create(node: Node, place: bytes, top: str) -> None:
    if node.link is not None:
        os.link(_place(top, node.link), place, follow_symlinks=False)
    elif node.is_directory:
        os.mkdir(place)
    elif node.kind == stat.S_IFLNK:
        os.symlink(node.payload or b"", place)
    elif node.kind == stat.S_IFREG:
        with open(place, "xb") as file:
            file.write(node.content or b"")
    else:
        os.mknod(place, node.kind | 0o600, node.rdev)


def _dress(node: Node, place: bytes) -> None:
    if os.geteuid() == 0:
        _chown(place, node.uid, node.gid)
    if node.kind != stat.S_IFLNK:
        os.chmod(place, stat.S_IMODE(node.mode))
    for name, value in node.xattrs:
        with _unless_refused():
            os.setxattr(place, name, value, follow_symlinks=False)
    time = node.seconds * _NSEC_PER_SEC + node.nanoseconds
    os.utime(place, ns=(time, time), follow_symlinks=False)


def _chown(place: bytes, uid: int, gid: int) -> None:
    # The highest number means "leave it".
    os.chown(place, min(uid, 0xFFFFFFFE), min(gid, 0xFFFFFFFE), follow_symlinks=False)


@contextlib.contextmanager
def _unless_refused() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise


def main() -> int:
    """Make the tree of a kept case."""
    if len(sys.argv) != 3:
        print("usage: python -m integration.oracles.disk CASE.tree DIRECTORY", file=sys.stderr)
        return 2
    with open(sys.argv[1], "rb") as file:
        make(read(file.read()), sys.argv[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
