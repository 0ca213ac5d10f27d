"""Names: listings, in whole and in pieces, and looking up what is there and what is not."""

from __future__ import annotations

import ctypes
import itertools
import os
import struct
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.contract.entries import is_sample
from cfsfuse.contract.observe import Failure, attempt, checked, libc, opened
from cfsfuse.erofs.ondisk import NAME_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cfsfuse.contract.entries import Entry
    from cfsfuse.contract.observe import Observations


class Dirent(NamedTuple):
    """A record of getdents64(2): struct linux_dirent64."""

    name: bytes
    ino: int
    kind: int
    offset: int


_DIRENT = struct.Struct("=QqHB")
_DIRENT_BUFFER = 32768
_SMALL_BUFFER = 288  # just enough for the longest name: a call gives few entries, and must go on behind them
_NO_BUFFER = 20  # too small for any entry


def check_listing(path: bytes, entry: Entry) -> Observations:
    """What getdents64(2) says: names, their order, inode numbers and types, in large and small pieces."""
    if not entry.is_directory:
        return {}
    with opened(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        if isinstance(fd, Failure):
            return {"open": fd}
        listed = list(_dirents(fd))
        os.lseek(fd, 0, os.SEEK_SET)
        again = [dirent.name for dirent in _dirents(fd, _SMALL_BUFFER)]
        os.lseek(fd, 0, os.SEEK_SET)
        seen: Observations = {f"{dirent.name!r} d_ino, d_type": (dirent.ino, dirent.kind) for dirent in listed}
        seen["order"] = [dirent.name for dirent in listed]
        seen["in small pieces"] = again
        seen["buffer too small"] = attempt(_getdents, fd, _NO_BUFFER)
        seen["at the end"] = attempt(lambda: (list(_dirents(fd)), _getdents(fd, _DIRENT_BUFFER))[1])
    return seen


def check_listing_restarted(path: bytes, entry: Entry) -> Observations:
    """Telldir and seekdir: a listing that goes on at a place where an earlier one, of another descriptor, was."""
    if not entry.is_directory:
        return {}
    with opened(path, os.O_RDONLY | os.O_DIRECTORY) as first, opened(path, os.O_RDONLY | os.O_DIRECTORY) as second:
        if isinstance(first, Failure) or isinstance(second, Failure):
            return {"open": first}
        listed = list(_dirents(first))
        seen: Observations = {}
        for index in _places(len(listed)):
            for which, fd in (("same", first), ("other", second)):
                os.lseek(fd, listed[index].offset, os.SEEK_SET)
                seen[f"behind entry {index}, {which} descriptor"] = [dirent.name for dirent in _dirents(fd)]
    return seen


def check_lookup(path: bytes, entry: Entry) -> Observations:
    """Names that are absent: before, after and between all others, hidden ones, too long ones; and odd ones."""
    if entry.is_symlink or not (entry.sampled or entry.is_directory):
        return {}  # what is behind a link would be looked up: somewhere else on the host
    if not entry.is_directory:
        return {f"/{name!r}": _looked_up(path, name) for name in (b"", b".", b"absent")}
    names = itertools.chain(_ODD_NAMES, _HIDDEN_NAMES if entry.is_root else _HIDDEN_NAMES[:2], _neighbours(entry))
    return {repr(name): _looked_up(path, name) for name in dict.fromkeys(names)}


def check_names(path: bytes, entry: Entry) -> Observations:
    """Each child by name, as the first thing after a listing of its parent: the answer may come from that."""
    if not entry.is_directory:
        return {}
    listed = attempt(os.listdir, path)
    return {"listed": sorted(listed)} | _inodes(path, entry) if isinstance(listed, list) else {"listed": listed}


# Something that sorts before the first entry of every directory, and something behind the last; the lengths around that
# of the longest name that there may be.
_ODD_NAMES = (
    *(b"\x01", b" ", b"!", b"-", b"0", b"@", b"A", b"_", b"a", b"m", b"~", b"\x7f", b"\x80", b"\xc3", b"\xff"),
    *(b"\x01" * NAME_MAX, b"\xff" * NAME_MAX, b"n" * NAME_MAX, b"n" * (NAME_MAX + 1), b"n" * 5000),
    *(b".", b"..", b"...", b"./.", b"./", b"absent/", b"absent/x"),
)
_HIDDEN_NAMES = tuple(b"%02x" % number for number in range(256))


def _neighbours(entry: Entry) -> Iterator[bytes]:
    """Yield names just behind and just before each child, in the order of bytes."""
    for number, child in enumerate(entry.children):
        if is_sample(number, len(entry.children)):
            yield (child + b"\x01")[:NAME_MAX]
            yield child[:-1]
            yield child[:-1] + bytes([child[-1] - 1 or 1]) + b"\xff" * (NAME_MAX - len(child))


def _looked_up(path: bytes, name: bytes) -> object:
    if name in (b"..", b"") and not os.path.isdir(path):
        return attempt(os.lstat, path + b"/" + name)
    if name == b"..":
        return None  # of the root, that is the host's
    return attempt(lambda: os.lstat(path + b"/" + name).st_ino)


def _inodes(path: bytes, entry: Entry) -> Observations:
    return {repr(child): attempt(lambda child=child: os.lstat(path + b"/" + child).st_ino) for child in entry.children}


def _places(count: int) -> list[int]:
    """Return some indices below `count`: the ends, and places in the middle."""
    return sorted({place for place in (0, 1, count // 3, count // 2, count - 2, count - 1) if 0 <= place < count})


def _dirents(fd: int, size: int = _DIRENT_BUFFER) -> Iterator[Dirent]:
    while data := _getdents(fd, size):
        position = 0
        while position < len(data):
            ino, offset, length, kind = _DIRENT.unpack_from(data, position)
            name = data[position + _DIRENT.size : position + length]
            yield Dirent(name[: name.index(b"\0")], ino, kind, offset)
            position += length


def _getdents(fd: int, size: int) -> bytes:
    buffer = ctypes.create_string_buffer(size)
    length = checked(libc.getdents64(fd, buffer, ctypes.c_size_t(size)))
    return buffer.raw[:length]
