"""Nodes, and nodes in their places: what a reader gives and a builder takes, without a word about EROFS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cfsfuse.erofs.overlay import Digest


class Stat(NamedTuple):
    """What stat(2) says of a node. `mode` has the type bits; `size` is in bytes; `mtime_ns` may be negative."""

    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the tree; `xattrs` are in the order of the image."""

    stat: Stat
    xattrs: dict[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Directory(Node):
    """A directory; its children are asked of the reader."""


@dataclass(frozen=True, slots=True)
class Symlink(Node):
    """A symbolic link to `target`, which may be any bytes but NUL."""

    target: bytes


@dataclass(frozen=True, slots=True)
class Device(Node):
    """A device, fifo or socket: a node without content."""


@dataclass(frozen=True, slots=True)
class Inline(Node):
    """A regular file whose content is in the image."""

    content: bytes


@dataclass(frozen=True, slots=True)
class Sparse(Node):
    """A regular file of zeros: it has a size, but no object."""


@dataclass(frozen=True, slots=True)
class External(Node):
    """A regular file whose content is an object.

    `path` is the object's path below a base directory, without the leading slash; it need not be the digest. It is None
    when the image gives no path that can be used: stat works then, opening fails.
    """

    path: bytes | None
    digest: Digest | None


class Entry:
    """A node in its place; `children` are a directory's by name, and empty for everything else.

    A tree is the entry of its root. It is made by filling `children`; nodes themselves do not change.
    """

    __slots__ = ("children", "node")

    def __init__(self, node: Node, children: Mapping[bytes, Entry | Link] | None = None) -> None:
        self.node = node
        self.children: dict[bytes, Entry | Link] = dict(children or {})


class Link(NamedTuple):
    """A further name of a file, a hard link: `target` stands elsewhere in the same tree, and is no directory."""

    target: Entry
