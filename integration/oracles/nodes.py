r"""A tree as a list of nodes, each with its path: what the random trees and dumps of the tests are made of.

The same list can be a composefs-dump(5) text or a directory on disk. Its text is also how a case is kept in a file:
that of a directory is the dump of what is to be made, with contents of any length.

Reading and writing of the text are written here once more, apart from the code under test, and a text is spelt in
several ways: with as many escapes as possible, or as few.
"""

from __future__ import annotations

import enum
import re
import stat
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Path = tuple[bytes, ...]
"""The names from the root on; the root's is empty."""

_FIXED_FIELDS = 11
_XATTRS_TEXT_MAX = 65535  # bytes of a line's xattrs as they are written: the reference takes no more
_ESCAPE = re.compile(rb"\\(?:x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_ESCAPED = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"\\": b"\\"}
_SHORT = {value: b"\\" + key for key, value in _ESCAPED.items()}


class Node(NamedTuple):
    """A line of a dump. `mode` has the type bits; `link` is the path of the file that a hard link is a name of."""

    path: Path
    mode: int
    size: int = 0
    nlink: int = 1
    uid: int = 0
    gid: int = 0
    rdev: int = 0
    seconds: int = 0
    nanoseconds: int = 0
    payload: bytes | None = None
    content: bytes | None = None
    digest: bytes | None = None
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    link: Path | None = None

    @property
    def kind(self) -> int:
        return stat.S_IFMT(self.mode)

    @property
    def is_directory(self) -> bool:
        return self.kind == stat.S_IFDIR


class Spelling(enum.Enum):
    """Which bytes of a field are written as escapes."""

    AS_THE_TOOL = re.compile(rb"[^!-\[\]-~]")
    LITTLE = re.compile(rb"[\0\n \\]")
    ALL = re.compile(rb"[^/]", re.DOTALL)

    def escape(self, value: bytes) -> bytes:
        if value == b"-":
            return rb"\x2d"
        return self.value.sub(self._escaped_byte, value)

    def _escaped_byte(self, found: re.Match[bytes]) -> bytes:
        if self is Spelling.AS_THE_TOOL:
            return _SHORT.get(found[0]) or b"\\x%02x" % found[0][0]
        return b"\\x%02X" % found[0][0]


def text(nodes: Iterable[Node], spelling: Spelling = Spelling.AS_THE_TOOL) -> bytes:
    """Return the dump of `nodes`."""
    return b"".join(line(node, spelling) for node in nodes)


def line(node: Node, spelling: Spelling = Spelling.AS_THE_TOOL) -> bytes:
    """Return the line of a node, with its newline."""
    payload = node.payload if node.link is None else spelt(node.link)
    fields = [
        spelling.escape(spelt(node.path)),
        b"%d" % node.size,
        b"%s%o" % (b"" if node.link is None else b"@", node.mode),
        b"%d %d %d %d" % (node.nlink, node.uid, node.gid, node.rdev),
        b"%d.%d" % (node.seconds, node.nanoseconds),
        b"-" if payload is None else spelling.escape(payload),
        b"-" if node.content is None else spelling.escape(node.content),
        b"-" if node.digest is None else node.digest.hex().encode(),
    ]
    xattrs = b"".join(b" " + _xattr_text(xattr, spelling) for xattr in node.xattrs)
    if len(xattrs) > _XATTRS_TEXT_MAX:
        xattrs = b"".join(b" " + _xattr_text(xattr, Spelling.LITTLE) for xattr in node.xattrs)
    return b" ".join(fields) + xattrs + b"\n"


def spelt(path: Path) -> bytes:
    """Return a path with its slashes, as in an image."""
    return b"/" + b"/".join(path)


def _xattr_text(xattr: tuple[bytes, bytes], spelling: Spelling) -> bytes:
    return b"=".join(spelling.escape(part).replace(b"=", rb"\x3d") for part in xattr)


def read(dump: bytes) -> list[Node]:
    """Return the nodes of a dump that is known to be well-formed."""
    return [_node(row.split(b" ")) for row in dump.split(b"\n") if row]


def _node(fields: Sequence[bytes]) -> Node:
    path, size, mode, nlink, uid, gid, rdev, mtime, payload, content, digest = fields[:_FIXED_FIELDS]
    pointed = None if payload == b"-" else unescaped(payload)
    linked = mode.startswith(b"@")
    seconds, nanoseconds = mtime.split(b".")
    return Node(
        _path(unescaped(path)),
        int(mode.removeprefix(b"@"), 8),
        int(size),
        nlink=int(nlink),
        uid=int(uid),
        gid=int(gid),
        rdev=int(rdev),
        seconds=int(seconds),
        nanoseconds=int(nanoseconds),
        payload=None if linked else pointed,
        content=None if content == b"-" else unescaped(content),
        digest=None if digest == b"-" else bytes.fromhex(digest.decode()),
        xattrs=tuple(_xattr(field) for field in fields[_FIXED_FIELDS:]),
        link=_path(pointed) if linked and pointed is not None else None,
    )


def _xattr(field: bytes) -> tuple[bytes, bytes]:
    name, _, value = field.partition(b"=")
    return unescaped(name), unescaped(value)


def _path(whole: bytes) -> Path:
    return tuple(name for name in whole.split(b"/") if name)


def unescaped(field: bytes) -> bytes:
    """Return the bytes that a field of a dump stands for."""
    return _ESCAPE.sub(lambda found: bytes([int(found[1], 16)]) if found[1] else _ESCAPED[found[2]], field)


def without(nodes: Sequence[Node], dropped: Iterable[Path]) -> list[Node]:
    """Return the nodes without those at `dropped`, what is below them, and hard links to what is then missing."""
    gone = set(dropped)
    for node in nodes:  # a directory stands before what is in it
        if node.path and node.path[:-1] in gone:
            gone.add(node.path)
    while more := {node.path for node in nodes if node.link in gone} - gone:  # a link may be linked to, in its turn
        gone |= more
    return [node for node in nodes if node.path not in gone]
