"""What the workloads work on, picked from the image itself: the same for every column."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from cfsfuse.basedirs import BaseDirectories
from cfsfuse.erofs.ondisk import DataLayout
from cfsfuse.erofs.reader import DOTS
from cfsfuse.tree import External

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cfsfuse.erofs.inode import Inode
    from cfsfuse.erofs.reader import Reader

SMALL_SIZE = 64 << 10
LARGE_SIZE = 1 << 20
BLOCK = 4096
_DIRECTORIES = 100
_ABSENT = b".cfsfuse-bench-absent-"
_SEED = 0
_LIST, _READ = 0o5, 0o4  # mode bits of everybody: to list and enter a directory, to read a file

T = TypeVar("T")


class Extent(NamedTuple):
    """How much is done: small files read, absent names looked up, blocks read at random, seconds of idleness.

    `settle` is how many seconds the machine gets after its caches were dropped, and a server after its last request.
    """

    small: int = 4000
    absent: int = 20_000
    random: int = 4096
    idle: float = 5.0
    settle: float = 1.0


FULL = Extent()
QUICK = Extent(small=200, absent=2000, random=256, idle=0.5, settle=0.2)


class File(NamedTuple):
    """A regular file whose content is an object: its path in the image, with the leading slash, and its size."""

    path: bytes
    size: int


class Inputs(NamedTuple):
    """`names` are those of the root; `large` is None when no file has an object of LARGE_SIZE at least."""

    names: frozenset[bytes]
    small: list[File]
    large: File | None
    directories: list[bytes]
    extent: Extent


def pick(reader: Reader, extent: Extent, *, for_everybody: bool) -> Inputs:
    """Pick small files and directories, spread evenly over the image, and its largest file.

    `for_everybody` takes only what every user may read: who measures need not be root, and then gets no further.
    """
    small: list[File] = []
    directories: list[bytes] = []
    large: File | None = None
    for path, inode in _open_to_everybody(reader) if for_everybody else reader.walk():
        if inode.is_directory:
            directories.append(path)
        elif inode.is_regular and inode.layout is DataLayout.CHUNK_BASED:
            if 0 < inode.size <= SMALL_SIZE:
                small.append(File(path, inode.size))
            elif inode.size >= LARGE_SIZE and (large is None or inode.size > large.size) and _has_object(reader, inode):
                large = File(path, inode.size)
    names = frozenset(name for name, _ in reader.entries(reader.root) if name not in DOTS)
    small = [file for file in spread(small, extent.small) if _has_object(reader, reader.resolve(file.path))]
    return Inputs(names, small, large, spread(directories, _DIRECTORIES) or [b"/"], extent)


def _open_to_everybody(reader: Reader) -> Iterator[tuple[bytes, Inode]]:
    reachable: set[bytes] = set()
    for path, inode in reader.walk():
        if path == b"/" or os.path.dirname(path) in reachable:
            if inode.is_directory and inode.mode & _LIST == _LIST:
                reachable.add(path)
                yield path, inode
            elif not inode.is_directory and inode.mode & _READ:
                yield path, inode


def _has_object(reader: Reader, inode: Inode) -> bool:
    """Return whether a file's content is an object: those without one are zeros, however large."""
    node = reader.node(inode)
    return isinstance(node, External) and node.path is not None


def spread(items: Sequence[T], count: int) -> list[T]:
    """Return `count` of the items, every n-th; all when there are no more."""
    if len(items) <= count:
        return list(items)
    return [items[at * len(items) // count] for at in range(count)]


def absent_names(directories: Sequence[bytes], count: int) -> list[bytes]:
    """Return distinct paths that no image has, in turns in these directories."""
    return [b"%s/%s%d" % (directories[at % len(directories)].rstrip(b"/"), _ABSENT, at) for at in range(count)]


def random_offsets(size: int, count: int) -> list[int]:
    """Return offsets of `count` different whole blocks of a file in a shuffled order, always the same one."""
    blocks = size // BLOCK
    shuffled = random.Random(_SEED).sample(range(blocks), min(count, blocks))  # noqa: S311 - it guards nothing
    return [block * BLOCK for block in shuffled]


def has_recorded_tree(reader: Reader, basedir: Sequence[str], file: File) -> bool:
    """Return whether a Merkle tree stands beside the object of `file`, as `cfsfuse mk` records it."""
    node = reader.node(reader.resolve(file.path))
    if not isinstance(node, External) or node.path is None:
        return False
    directories = BaseDirectories(basedir)
    try:
        return any(os.path.exists(place.label) for place in directories.recorded_trees(node.path))
    finally:
        directories.close()
