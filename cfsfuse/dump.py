"""A tree as composefs-dump(5) text, to the byte as `composefs-info dump` prints it; `parse` is the way back.

One line a node: path, size, mode in octal, nlink, uid, gid, rdev, mtime, payload, content, digest, xattrs.
https://github.com/composefs/composefs/blob/main/man/composefs-dump.md
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cfsfuse.dumpparser import parse
from cfsfuse.erofs.inode import NSEC_PER_SEC
from cfsfuse.erofs.reader import path_from
from cfsfuse.tree import External, Inline, Node, Symlink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cfsfuse.erofs.image import Nid
    from cfsfuse.erofs.inode import Inode
    from cfsfuse.erofs.reader import Reader

    Walk = Callable[[], Iterator[tuple[bytes, Inode]]]

__all__ = ["FirstNames", "dump", "escape", "escape_listing", "line", "parse", "payload"]

# Bytes that are not printed as they are: isgraph(3) of the C locale, less the backslash, and = in xattrs.
_UNSAFE = re.compile(rb"[^!-\[\]-~]")
_UNSAFE_IN_XATTR = re.compile(rb"[^!-<>-\[\]-~]")
_UNSAFE_IN_LISTING = re.compile(rb"[^ -\[\]-~]")
_NAMED = {b"\\": rb"\\", b"\n": rb"\n", b"\r": rb"\r", b"\t": rb"\t"}


def dump(reader: Reader, walk: Walk | None = None) -> Iterator[bytes]:
    """Yield the dump of an image, a line a node, each with its newline; `walk` gives the entries, by default all."""
    names = FirstNames()
    for path, inode in (walk or reader.walk)():
        first = names.meet(path, inode)
        yield line(path, reader.authored(inode), None if first is None else names.path(first))


class FirstNames:
    """The first name of each inode met in a walk, kept as name and parent: paths would cost the square of the depth."""

    def __init__(self) -> None:
        self._names: dict[Nid, tuple[Nid, bytes]] = {}
        self._ancestors: list[tuple[int, Nid]] = []  # of the last entry met: length of the path, and nid

    def meet(self, path: bytes, inode: Inode) -> Nid | None:
        """Take the next entry of the walk; return its nid when it has been met under another name."""
        parent_length = path.rfind(b"/")
        while self._ancestors and self._ancestors[-1][0] > parent_length:
            self._ancestors.pop()
        parent = self._ancestors[-1][1] if self._ancestors else inode.nid
        if inode.is_directory:
            self._ancestors.append((len(path) if path != b"/" else 0, inode.nid))
        elif inode.nid in self._names:
            return inode.nid
        self._names[inode.nid] = (parent, path[parent_length + 1 :])
        return None

    def path(self, nid: Nid) -> bytes:
        """Return the first path of an inode that has been met."""
        return path_from(nid, self._names)


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
