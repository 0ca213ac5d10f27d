"""A tree as composefs-dump(5) text, to the byte as `composefs-info dump` prints it.

One line a node: path, size, mode in octal, nlink, uid, gid, rdev, mtime, payload, content, digest, xattrs.
https://github.com/composefs/composefs/blob/main/man/composefs-dump.md
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cfsfuse.erofs.inode import NSEC_PER_SEC
from cfsfuse.erofs.ondisk import INODE_SLOT_BITS
from cfsfuse.tree import External, Inline, Node, Symlink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cfsfuse.erofs.image import Image, Nid
    from cfsfuse.erofs.inode import Inode
    from cfsfuse.erofs.reader import Reader

    Walk = Callable[[], Iterator[tuple[bytes, Inode]]]

# Bytes that are not printed as they are: isgraph(3) of the C locale, less the backslash, and = in xattrs.
_UNSAFE = re.compile(rb"[^!-\[\]-~]")
_UNSAFE_IN_XATTR = re.compile(rb"[^!-<>-\[\]-~]")
_UNSAFE_IN_LISTING = re.compile(rb"[^ -\[\]-~]")
_NAMED = {b"\\": rb"\\", b"\n": rb"\n", b"\r": rb"\r", b"\t": rb"\t"}


def dump(reader: Reader, walk: Walk | None = None) -> Iterator[bytes]:
    """Yield the dump of an image, a line a node, each with its newline; `walk` gives the entries, by default all."""
    walk = walk or reader.walk
    names = _FirstNames(reader.image, walk)
    for path, inode in walk():
        link = None if inode.is_directory else names.earlier(path, inode)
        yield line(path, reader.authored(inode), link)


class SeenNids:
    """The nids met so far, a bit for each inode slot of the image: a million files cost 128 KiB or so."""

    def __init__(self, image: Image) -> None:
        self._bits = bytearray((image.size >> INODE_SLOT_BITS + 3) + 1)

    def add(self, nid: Nid) -> bool:
        """Add the nid of an inode that could be read; return whether it had been met before."""
        byte, bit = nid >> 3, 1 << (nid & 7)
        known = bool(self._bits[byte] & bit)
        self._bits[byte] |= bit
        return known


class _FirstNames:
    """The first path of each file that has several.

    Only those whose nlink says so are kept. An image whose nlink is wrong costs another walk, and the paths of all.
    """

    def __init__(self, image: Image, walk: Walk) -> None:
        self._walk = walk
        self._seen: SeenNids | None = SeenNids(image)
        self._paths: dict[Nid, bytes] = {}

    def earlier(self, path: bytes, inode: Inode) -> bytes | None:
        """Return the path under which `inode` was met before `path`, None when it was not."""
        if inode.nlink == 1 and self._seen is not None:
            if not self._seen.add(inode.nid):
                return None
            self._seen = None
            for other, found in self._walk():
                self._paths.setdefault(found.nid, other)
        first = self._paths.setdefault(inode.nid, path)
        return None if first == path else first


def line(path: bytes, node: Node, link: bytes | None = None) -> bytes:
    """Return the line of `node` at `path`; `link` is the path of an earlier name of the same file."""
    status = node.stat
    seconds, nanoseconds = divmod(status.mtime_ns, NSEC_PER_SEC)
    content = node.content if isinstance(node, Inline) else b""
    digest = node.digest if isinstance(node, External) else None
    fields = [
        escape(path),
        b"%d" % status.size,
        b"%s%o" % (b"@" if link is not None else b"", status.mode),
        b"%d %d %d %d" % (status.nlink, status.uid, status.gid, status.rdev),
        b"%d.%d" % (seconds, nanoseconds),
        _optional(payload(node) if link is None else link),
        _optional(content or None),
        digest.value.hex().encode() if digest else b"-",
    ]
    fields += [
        escape(name, _UNSAFE_IN_XATTR) + b"=" + escape(value, _UNSAFE_IN_XATTR) for name, value in node.xattrs.items()
    ]
    return b" ".join(fields) + b"\n"


def payload(node: Node) -> bytes | None:
    """Return where a node points: the target of a link, or the path of an object."""
    if isinstance(node, Symlink):
        return node.target
    return node.path if isinstance(node, External) else None


def escape(text: bytes, unsafe: re.Pattern[bytes] = _UNSAFE) -> bytes:
    r"""Return `text` with the bytes that `unsafe` matches written as `\n`, `\\` or `\xHH`."""
    return unsafe.sub(lambda match: _NAMED.get(match[0]) or b"\\x%02x" % match[0][0], text)


def escape_listing(text: bytes) -> bytes:
    """Return `text` escaped as `composefs-info ls` does: spaces stay."""
    return escape(text, _UNSAFE_IN_LISTING)


def _optional(text: bytes | None) -> bytes:
    if text is None:
        return b"-"
    return rb"\x2d" if text == b"-" else escape(text)
