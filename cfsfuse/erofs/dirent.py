"""Directory data → names and nids, whole or by binary search.

A directory is a sequence of 4096-byte blocks, each with its dirents first and their names behind them; names are sorted
by bytes over the whole directory. https://docs.kernel.org/filesystems/erofs.html#directories
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.erofs import ondisk
from cfsfuse.erofs.inode import Inode, data_block
from cfsfuse.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cfsfuse.erofs.image import Image, Nid

_DIRENT_SIZE = ondisk.DIRENT.size
_new = tuple.__new__  # a NamedTuple's own constructor takes twice as long


class Dirent(NamedTuple):
    """A name in a directory. `.` and `..` are dirents like any other."""

    name: bytes
    nid: Nid
    file_type: int


def dirents(image: Image, directory: Inode) -> Iterator[Dirent]:
    """Yield every dirent of `directory` in the order of the disk, which is that of the names' bytes."""
    for index in range(directory.size + 4095 >> 12):
        yield from block(image, directory, index) or ()


def block(image: Image, directory: Inode, index: int) -> list[Dirent] | None:
    """Return the dirents of directory block `index`, None behind the last block."""
    if index >= directory.size + 4095 >> 12:
        return None
    return parse_block(bytes(data_block(image, directory, index)), directory)


def parse_block(data: bytes, directory: Inode) -> list[Dirent]:
    """Return the dirents of one directory block; raise ImageError when the block is malformed."""
    count = _count(data, directory)
    table = list(ondisk.DIRENT.iter_unpack(data[: count * _DIRENT_SIZE]))
    ends = [start for _, start, _ in table[1:]]
    ends.append(_end_of_last_name(data, table[-1][1]))
    texts = [data[start:end] for (_, start, _), end in zip(table, ends, strict=True)]
    lengths = [*map(len, texts)]
    # All names together are what stands behind the dirents when they follow one another without gaps: one comparison
    # instead of several checks a name. Any other order of names is foreign, or an attempt at something.
    names = b"".join(texts)
    if names != data[count * _DIRENT_SIZE : ends[-1]] or not 0 < min(lengths) <= max(lengths) <= ondisk.NAME_MAX:
        raise ImageError("nameoff", f"names overlap, or are too long, in directory nid {directory.nid}")
    if b"/" in names or b"\0" in names:
        raise ImageError("dirent name", f"a slash or a NUL in directory nid {directory.nid}")
    return [_new(Dirent, (text, nid, kind)) for text, (nid, _, kind) in zip(texts, table, strict=True)]


def find(image: Image, directory: Inode, name: bytes) -> Nid | None:
    """Return the nid of `name` in `directory`, or None: one binary search over blocks, one look into a block."""
    low, high = 0, (directory.size + 4095 >> 12) - 1
    # The last block whose first name is not after `name`; when even the first block's is, low stays 0 and the look
    # into that block finds nothing.
    while low < high:
        middle = (low + high + 1) // 2
        if _first_name(bytes(data_block(image, directory, middle)), directory) <= name:
            low = middle
        else:
            high = middle - 1
    if high < 0:
        return None
    data = bytes(data_block(image, directory, low))
    # Most look-ups are for names that are not there: no occurrence of the bytes, no such name.
    if name not in data:
        return None
    return next((nid for entry, nid, _ in parse_block(data, directory) if entry == name), None)


def _count(data: bytes, directory: Inode) -> int:
    """Return how many dirents a block has: the first name starts behind the last dirent."""
    if len(data) < _DIRENT_SIZE:
        raise ImageError("dirent", f"block of {len(data)} bytes in directory nid {directory.nid}")
    nameoff = int.from_bytes(data[8:10], "little")
    if nameoff % _DIRENT_SIZE or not _DIRENT_SIZE <= nameoff < len(data):
        raise ImageError("nameoff", f"{nameoff} of the first dirent in directory nid {directory.nid}")
    return nameoff // _DIRENT_SIZE


def _first_name(data: bytes, directory: Inode) -> bytes:
    count = _count(data, directory)
    start = count * _DIRENT_SIZE
    end = int.from_bytes(data[20:22], "little") if count > 1 else _end_of_last_name(data, start)
    return data[start:end]


def _end_of_last_name(data: bytes, start: int) -> int:
    """Return where the last name ends: at its first NUL or at the block's end."""
    end = data.find(b"\0", start)
    return len(data) if end < 0 else end
