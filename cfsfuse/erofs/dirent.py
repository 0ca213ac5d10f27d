"""Directory data → names and nids, whole or by binary search.

A directory is a sequence of 4096-byte blocks, each with its dirents first and their names behind them; names are sorted
by bytes over the whole directory. https://docs.kernel.org/filesystems/erofs.html#directories
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

from cfsfuse.erofs import ondisk
from cfsfuse.erofs.image import Nid
from cfsfuse.erofs.inode import Inode, data_block
from cfsfuse.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cfsfuse.erofs.image import Image

_DIRENT_SIZE = ondisk.DIRENT.size


Dirent = tuple[bytes, "Nid", int]
"""Name, nid and file type of an entry. `.` and `..` are dirents like any other."""


def dirents(image: Image, directory: Inode) -> Iterator[Dirent]:
    """Yield every dirent of `directory` in the order of the disk, which is that of the names' bytes."""
    for index in range(block_count(directory)):
        yield from block(image, directory, index)


def block(image: Image, directory: Inode, index: int) -> list[Dirent]:
    """Return the dirents of directory block `index`; none behind the last block."""
    if index >= block_count(directory):
        return []
    return parse_block(bytes(data_block(image, directory, index)), directory)


def block_count(directory: Inode) -> int:
    """Return how many blocks the data of `directory` has, the last one counted however short it is."""
    return directory.size + 4095 >> 12


def parse_block(data: bytes, directory: Inode) -> list[Dirent]:
    """Return the dirents of one directory block; raise ImageError when the block is malformed."""
    names_start = _count(data, directory) * _DIRENT_SIZE
    nids, starts, kinds = zip(*ondisk.DIRENT.iter_unpack(data[:names_start]), strict=True)
    end = _end_of_last_name(data, starts[-1])
    # Each name ends where the next one starts. So when none is empty, none overlaps another, and all of them together
    # are the bytes from the first name to the last: a single look for what no name may hold.
    names = [data[start:stop] for start, stop in zip(starts, (*starts[1:], end), strict=True)]
    lengths = [*map(len, names)]
    if min(lengths) == 0 or max(lengths) > ondisk.NAME_MAX:
        raise ImageError("nameoff", f"a name is empty, or too long, in directory nid {directory.nid}")
    if any(map(operator.ge, names, names[1:])):
        raise ImageError("dirent name", f"names out of order in directory nid {directory.nid}")
    if b"/" in data[names_start:end] or b"\0" in data[names_start:end]:
        raise ImageError("dirent name", f"a slash or a NUL in directory nid {directory.nid}")
    return list(zip(names, nids, kinds, strict=True))


def find(image: Image, directory: Inode, name: bytes) -> Nid | None:
    """Return the nid of `name` in `directory`, or None: one binary search over blocks, one look into a block."""
    low, high = 0, block_count(directory) - 1
    # The last block whose first name is not after `name`; when even the first block's is, low stays 0 and the look
    # into that block finds nothing.
    while low < high:
        middle = (low + high + 1) // 2
        first = bytes(data_block(image, directory, middle))
        if _name(first, 0, _count(first, directory)) <= name:
            low = middle
        else:
            high = middle - 1
    if high < 0:
        return None
    data = bytes(data_block(image, directory, low))
    slot = _slot_of(data, name, _count(data, directory) * _DIRENT_SIZE)
    return None if slot is None else Nid(int.from_bytes(data[slot : slot + 8], "little"))


def _slot_of(data: bytes, name: bytes, names_start: int) -> int | None:
    """Return where in a directory block the dirent of `name` is.

    Searching for the bytes, and then for the dirent that points to them, is several times faster than comparing names:
    most look-ups are for names that are not there, and end with the first search.
    """
    at = data.find(name, names_start)
    while at >= 0:
        nameoff = at.to_bytes(2, "little")
        field = data.find(nameoff, 8, names_start)
        while field >= 0 and field % _DIRENT_SIZE != 8:
            field = data.find(nameoff, field + 1, names_start)
        if field >= 0 and _name(data, field // _DIRENT_SIZE, names_start // _DIRENT_SIZE) == name:
            return field - 8
        at = data.find(name, at + 1)
    return None


def _count(data: bytes, directory: Inode) -> int:
    """Return how many dirents a block has: the first name starts behind the last dirent."""
    if len(data) < _DIRENT_SIZE:
        raise ImageError("dirent", f"block of {len(data)} bytes in directory nid {directory.nid}")
    nameoff = int.from_bytes(data[8:10], "little")
    if nameoff % _DIRENT_SIZE or not _DIRENT_SIZE <= nameoff < len(data):
        raise ImageError("nameoff", f"{nameoff} of the first dirent in directory nid {directory.nid}")
    return nameoff // _DIRENT_SIZE


def _name(data: bytes, index: int, count: int) -> bytes:
    """Return the name of dirent `index` of a block with `count` of them."""
    at = index * _DIRENT_SIZE + 8
    start = int.from_bytes(data[at : at + 2], "little")
    if index + 1 < count:
        return data[start : int.from_bytes(data[at + _DIRENT_SIZE : at + _DIRENT_SIZE + 2], "little")]
    return data[start : _end_of_last_name(data, start)]


def _end_of_last_name(data: bytes, start: int) -> int:
    """Return where the last name ends: at its first NUL or at the block's end."""
    end = data.find(b"\0", start)
    return len(data) if end < 0 else end
