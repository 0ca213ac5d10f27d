"""composefs-dump(5) text → tree: strict, a line at a time.

A line is a node: 11 fields separated by single spaces, then its xattrs as KEY=VALUE. What mkcomposefs 1.0.8 accepts and
what has one clear meaning is accepted and means the same; for everything else DumpError says where the text is wrong.
On purpose, one thing means more: a digest of 128 digits is sha512. mkcomposefs takes its first 32 bytes for sha256.
https://github.com/composefs/composefs/blob/main/man/composefs-dump.md
"""

from __future__ import annotations

import binascii
import bisect
import re
from functools import lru_cache, partial
from stat import S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG, S_IFSOCK
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse import collector
from cfsfuse.erofs.contents import FILE_MAX
from cfsfuse.erofs.inode import NSEC_PER_SEC
from cfsfuse.erofs.ondisk import NAME_MAX, SYMLINK_MAX
from cfsfuse.erofs.overlay import DIGEST_SIZES, Digest
from cfsfuse.erofs.writer import INLINE_MAX, XATTR_NAME_MAX, XATTRS_MAX, weight_of
from cfsfuse.errors import DumpError
from cfsfuse.tree import Device, Directory, Entry, External, Inline, Link, Node, Stat, Symlink

if TYPE_CHECKING:
    from typing import BinaryIO

    Children = dict[bytes, Entry | Link]

# Bytes of a line without its newline. The longest that makes sense has the paths of two names, thousands deep.
LINE_MAX = 16 << 20
# Limits of mkcomposefs, in bytes, beside those of images; that of all xattrs counts them as they are written, escapes
# and all.
PAYLOAD_MAX = SYMLINK_MAX
XATTRS_TEXT_MAX = 65535

FIELDS = ("path", "size", "mode", "nlink", "uid", "gid", "rdev", "mtime", "payload", "content", "digest", "xattrs")
_PATH, _SIZE, _MODE, _NLINK, _UID, _GID, _RDEV, _MTIME, _PAYLOAD, _CONTENT, _DIGEST, _XATTRS = range(12)

_U32_MAX = (1 << 32) - 1
_U64_MAX = (1 << 64) - 1
_S64_MAX = (1 << 63) - 1
_S_IFMT = 0o170000
_TYPES = frozenset((S_IFREG, S_IFDIR, S_IFLNK, S_IFCHR, S_IFBLK, S_IFIFO, S_IFSOCK))
_ALGORITHMS = {size: name for name, size in DIGEST_SIZES.values()}
_OCTAL = re.compile(rb"[0-7]+")
_TIME = re.compile(rb"(-?)([0-9]+)\.([0-9]+)")
_STEP = re.compile(rb"([^/]*)/")
_ESCAPE = re.compile(rb"\\([\\nrt]|x[0-9A-Fa-f]{2})?")
_BACKSLASH = ord("\\")  # to look for a number is faster than to look for a byte string
_NO_NAMES = frozenset((b"", b".", b".."))
_UNKNOWN = Device(Stat(0, 0, 0, 0, 0, 0, 0), {})
_new = tuple.__new__


def parse(file: BinaryIO) -> Entry:
    """Return the root of the tree that a dump describes; raise DumpError where it is malformed.

    Nodes that have the same xattrs share one dictionary of them.
    """
    tree = _Tree()
    with collector.paused():
        for number, line in enumerate(iter(partial(file.readline, LINE_MAX + 1), b""), 1):
            text = line.removesuffix(b"\n")
            if len(text) > LINE_MAX:
                raise DumpError(number, LINE_MAX + 1, "line", f"longer than {LINE_MAX} bytes")
            try:
                tree.add(number, text)
            except _Malformed as error:
                raise error.at(number, text) from None
        return tree.finish()


class _Malformed(Exception):
    """A field of the line at hand is wrong, from its byte `offset` on."""

    def __init__(self, field: int, reason: str, offset: int = 0) -> None:
        self.field = field
        self.reason = reason
        self.offset = offset
        super().__init__(field, reason, offset)

    def at(self, number: int, line: bytes) -> DumpError:
        """Return the error with its place; a missing field is missed where the line ends."""
        column = min(_column(line, self.field) + self.offset, len(line) + 1)
        return DumpError(number, column, FIELDS[self.field], self.reason)


class _Forward(NamedTuple):
    """A hard link whose target has not been met yet: its place in the tree, the target's path, and that one's place."""

    siblings: Children
    name: bytes
    target: bytes
    line: int
    column: int

    def error(self, reason: str) -> DumpError:
        return DumpError(self.line, self.column, FIELDS[_PAYLOAD], reason)


class _Way:
    """The way from the root to the directory of the last entry: most entries stand there, or not far from there.

    No other path is kept in memory; in a deep tree all together are far larger than the tree. Here, the path of a
    directory ends in a slash.
    """

    def __init__(self, root: Entry) -> None:
        self._path = b"/"
        self._ends = [1]  # in `_path`: where the path of each directory on the way ends
        self._directories = [root]

    def children(self, path: bytes) -> Children | None:
        """Return the children of the directory at an absolute path, or None when there is no such directory."""
        if path == self._path or self._go(path):
            return self._directories[-1].children
        return None

    def _go(self, path: bytes) -> bool:
        """Go back as far as necessary and then on to `path`; return whether it is there."""
        common = bisect.bisect_left(self._ends, True, key=lambda end: path[:end] != self._path[:end])
        del self._ends[common:], self._directories[common:]
        for step in _STEP.finditer(path, self._ends[-1]):
            entry = self._directories[-1].children.get(step[1])
            if not isinstance(entry, Entry) or not isinstance(entry.node, Directory):
                break
            self._ends.append(step.end())
            self._directories.append(entry)
        self._path = path[: self._ends[-1]]
        return self._path == path


class _Tree:
    """The tree as far as it has been read."""

    def __init__(self) -> None:
        self._root: Entry | None = None
        self._way = _Way(Entry(_UNKNOWN))  # of no use before there is a root
        # A link whose target is not known stands in the tree as a Link to an entry that is a key here.
        self._forward: dict[Entry, _Forward] = {}
        # Most lines repeat what earlier ones said.
        self._status = lru_cache(maxsize=4096)(_status)
        self._xattrs = lru_cache(maxsize=512)(_xattrs)

    def add(self, number: int, line: bytes) -> None:
        """Add what line `number` says."""
        fields = line.split(b" ", _XATTRS)
        if len(fields) < _XATTRS or 0 in line:
            raise _broken(fields)
        path = _string(_PATH, fields[_PATH])
        if not path.startswith(b"/"):
            raise _Malformed(_PATH, "not an absolute path")
        if path == b"/":
            self._plant(self._node(fields))
        elif self._root is None:
            raise _Malformed(_PATH, "the first entry is not /")
        elif fields[_MODE].startswith(b"@"):
            self._add_link(number, line, path, fields)
        else:
            siblings, name = self._slot(path)
            siblings[name] = Entry(self._node(fields))

    def finish(self) -> Entry:
        """Return the root when all lines have been added."""
        if self._root is None:
            raise DumpError(1, 1, FIELDS[_PATH], "the dump has no entries")
        for entry in tuple(self._forward):
            self._resolve(entry)
        return self._root

    def _node(self, fields: list[bytes]) -> Node:
        size = _number(_SIZE, fields[_SIZE], _U64_MAX)
        mode, nlink, uid, gid, rdev, mtime_ns = self._status(*fields[_MODE:_PAYLOAD])
        payload = _payload(fields[_PAYLOAD])
        content = _content(fields[_CONTENT], size)
        digest = _digest(fields[_DIGEST])
        xattrs = self._xattrs(*fields[_XATTRS:])
        kind = mode & _S_IFMT
        if kind == S_IFLNK:
            if not payload:
                raise _Malformed(_PAYLOAD, "a symbolic link needs a target")
            return Symlink(Stat(mode, nlink, uid, gid, rdev, len(payload), mtime_ns), xattrs, payload)
        # A NamedTuple's own constructor takes twice as long.
        stat = _new(Stat, (mode, nlink, uid, gid, rdev, size, mtime_ns))
        if kind == S_IFDIR:
            return Directory(stat, xattrs)
        if kind != S_IFREG:
            return Device(stat, xattrs)
        if content is None and size:
            if size > FILE_MAX:
                raise _Malformed(_SIZE, f"a file of {size} bytes; an image takes {FILE_MAX}")
            return External(stat, xattrs, payload or None, digest)
        return Inline(stat, xattrs, content or b"")

    def _plant(self, node: Node) -> None:
        if self._root is not None:
            raise _Malformed(_PATH, "stands in an earlier line, too")
        if not isinstance(node, Directory):
            raise _Malformed(_MODE, "the root is not a directory")
        self._root = Entry(node)
        self._way = _Way(self._root)

    def _slot(self, path: bytes) -> tuple[Children, bytes]:
        """Return where a new entry goes: the children of its directory, and its name."""
        end = path.rfind(b"/") + 1
        name = path[end:]
        siblings = self._way.children(path[:end])
        if siblings is None or name in siblings or name in _NO_NAMES or len(name) > NAME_MAX:
            raise _Malformed(_PATH, _objection(path, siblings))
        return siblings, name

    def _add_link(self, number: int, line: bytes, path: bytes, fields: list[bytes]) -> None:
        """Add a hard link: of its line nothing counts but path, mode and payload."""
        siblings, name = self._slot(path)
        if _mode(fields[_MODE][1:], 1) & _S_IFMT == S_IFDIR:
            raise _Malformed(_MODE, "a directory cannot be a hard link")
        target = _string(_PAYLOAD, fields[_PAYLOAD])
        if not target.startswith(b"/"):
            raise _Malformed(_PAYLOAD, "a hard link needs the absolute path of another entry")
        entry = Entry(_UNKNOWN)
        siblings[name] = Link(entry)
        self._forward[entry] = _Forward(siblings, name, target, number, _column(line, _PAYLOAD))
        known = self._target(target)
        if known is not None and known not in self._forward:
            self._resolve(entry)

    def _target(self, path: bytes) -> Entry | None:
        """Return the entry that a link to `path` means, as far as that is known."""
        if path == b"/":
            return self._root
        end = path.rfind(b"/") + 1
        found = (self._way.children(path[:end]) or {}).get(path[end:])
        return found.target if isinstance(found, Link) else found

    def _resolve(self, entry: Entry) -> None:
        """Give the link for which `entry` stands its real target, and so all links on the way there."""
        trail: dict[Entry, _Forward] = {}
        while link := self._forward.pop(entry, None):
            trail[entry] = link
            target = self._target(link.target)
            if target is None:
                raise link.error("the hard link's target is not in the dump")
            if target in trail:
                raise link.error("the hard link leads back to itself")
            if isinstance(target.node, Directory):
                raise link.error("the hard link's target is a directory")
            entry = target
        for link in trail.values():
            link.siblings[link.name] = Link(entry)


def _status(*fields: bytes) -> tuple[int, int, int, int, int, int]:
    """Return the values of mode, nlink, uid, gid, rdev and mtime; only devices have a device number."""
    mode = _mode(fields[0])
    owners = zip((_NLINK, _UID, _GID, _RDEV), fields[1:5], strict=True)
    nlink, uid, gid, rdev = (_number(field, text, _U32_MAX) for field, text in owners)
    is_device = mode & _S_IFMT in (S_IFBLK, S_IFCHR)
    return mode, nlink, uid, gid, rdev if is_device else 0, _mtime_ns(fields[5])


def _mode(text: bytes, offset: int = 0) -> int:
    mode = int(text, 8) if _OCTAL.fullmatch(text) else 0
    if mode & _S_IFMT not in _TYPES or mode > 0xFFFF:
        raise _Malformed(_MODE, "not the octal number of a file type and permissions", offset)
    return mode


def _mtime_ns(text: bytes) -> int:
    match = _TIME.fullmatch(text)
    if match is None:
        raise _Malformed(_MTIME, "not SECONDS.NANOSECONDS")
    sign, digits, fraction = match.groups()
    seconds = _number(_MTIME, digits, _S64_MAX + len(sign), len(sign))
    nanoseconds = _number(_MTIME, fraction, NSEC_PER_SEC - 1, match.start(3))
    return (-seconds if sign else seconds) * NSEC_PER_SEC + nanoseconds


def _number(field: int, text: bytes, most: int, offset: int = 0) -> int:
    """Return a decimal number; int() alone would take signs, blanks and underscores, and refuse thousands of zeros."""
    if not text.isdigit():
        raise _Malformed(field, "not a decimal number", offset)
    number = int(text if len(text) < 20 else text.lstrip(b"0")[:21] or b"0")
    if number > most:
        raise _Malformed(field, f"more than {most}", offset)
    return number


def _payload(text: bytes) -> bytes | None:
    if text == b"-":
        return None
    payload = _string(_PAYLOAD, text)
    if len(payload) > PAYLOAD_MAX:
        raise _Malformed(_PAYLOAD, f"{len(payload)} bytes; {PAYLOAD_MAX} are possible")
    return payload


def _content(text: bytes, size: int) -> bytes | None:
    if text == b"-":
        return None
    content = _unescaped(_CONTENT, text)
    if len(content) != size:
        raise _Malformed(_CONTENT, f"{len(content)} bytes, where size says {size}")
    if size > INLINE_MAX:
        raise _Malformed(_CONTENT, f"{size} bytes; {INLINE_MAX} are possible")
    return content


def _digest(text: bytes) -> Digest | None:
    if text == b"-":
        return None
    try:
        value = binascii.unhexlify(_unescaped(_DIGEST, text))
        return _new(Digest, (_ALGORITHMS[len(value)], value))
    except (binascii.Error, KeyError):
        raise _Malformed(_DIGEST, "neither 64 nor 128 hexadecimal digits") from None


def _xattrs(text: bytes = b"") -> dict[bytes, bytes]:
    """Return the xattrs of a line; of a name that stands twice, the last."""
    if len(text) > XATTRS_TEXT_MAX:
        raise _Malformed(_XATTRS, f"{len(text)} bytes; {XATTRS_TEXT_MAX} are possible")
    xattrs = {}
    offset = 0
    pairs = text.split(b" ")
    if not pairs[-1]:
        pairs.pop()  # no xattrs, or one space at the end of the line
    for pair in pairs:
        key, equals, value = pair.partition(b"=")
        name = _string(_XATTRS, key, offset)
        if not equals or not name or len(name) > XATTR_NAME_MAX:
            raise _Malformed(_XATTRS, f"not KEY=VALUE with a key of 1 to {XATTR_NAME_MAX} bytes", offset)
        xattrs[name] = _unescaped(_XATTRS, value, offset + len(key) + 1)
        offset += len(pair) + 1
    if weight_of(xattrs) > XATTRS_MAX:
        raise _Malformed(_XATTRS, f"xattrs of {weight_of(xattrs)} bytes; an image takes {XATTRS_MAX}")
    return xattrs


def _string(field: int, text: bytes, offset: int = 0) -> bytes:
    """Return a text that may not hold NUL; `text` stands at `offset` in its field."""
    string = _unescaped(field, text, offset)
    if 0 in string:
        raise _Malformed(field, "holds a NUL byte", offset)
    return string


def _unescaped(field: int, text: bytes, offset: int = 0) -> bytes:
    if _BACKSLASH not in text:
        return text
    for match in _ESCAPE.finditer(text):
        if match[1] is None:
            raise _Malformed(field, r"an escape other than \\, \n, \r, \t and \xHH", offset + match.start())
    return text.decode("unicode_escape").encode("latin-1")


def _objection(path: bytes, siblings: Children | None) -> str:
    """Return why there can be no entry at `path`, in a directory that has the children `siblings`."""
    for step in _STEP.finditer(path + b"/", 1):
        if step[1] in _NO_NAMES:
            return "holds an empty name, . or .."
        if len(step[1]) > NAME_MAX:
            return f"holds a name of {len(step[1])} bytes; {NAME_MAX} are possible"
    return "stands in no directory of an earlier line" if siblings is None else "stands in an earlier line, too"


def _broken(fields: list[bytes]) -> _Malformed:
    """Return what is wrong with a line that has too few fields, or a NUL byte."""
    for field, text in enumerate(fields):
        if 0 in text:
            return _Malformed(field, "holds a NUL byte", text.index(0))
    return _Malformed(_PATH, "the line is empty") if fields == [b""] else _Malformed(len(fields), "missing")


def _column(line: bytes, field: int) -> int:
    """Return where in the line a field starts, the first byte being 1."""
    return 1 + sum(len(text) + 1 for text in line.split(b" ", _XATTRS)[:field])
