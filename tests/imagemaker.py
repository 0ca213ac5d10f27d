"""Makes small EROFS images for tests: right ones, and wrong ones by patching named fields.

Written from the kernel's fs/erofs/erofs_fs.h alone and sharing nothing with the product, so that a slip in the
product's layouts shows.
"""

from __future__ import annotations

import stat
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

BLOCK = 4096
PLAIN, INLINE, CHUNKED = 0, 2, 4
_PREFIXES = (
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
)
_FIRST_INODE = 1152
REDIRECT = b"trusted.overlay.redirect"
METACOPY = b"trusted.overlay.metacopy"

# structure → field → offset in it, struct format
FIELDS: dict[str, dict[str, tuple[int, str]]] = {
    "header": {"magic": (0, "<I"), "version": (4, "<I"), "flags": (8, "<I"), "composefs_version": (12, "<I")},
    "super block": {
        "magic": (0, "<I"), "checksum": (4, "<I"), "feature_compat": (8, "<I"), "blkszbits": (12, "<B"),
        "sb_extslots": (13, "<B"), "root_nid": (14, "<H"), "inos": (16, "<Q"), "build_time": (24, "<q"),
        "build_time_nsec": (32, "<I"), "blocks": (36, "<I"), "meta_blkaddr": (40, "<I"), "xattr_blkaddr": (44, "<I"),
        "feature_incompat": (80, "<I"), "available_compr_algs": (84, "<H"), "extra_devices": (86, "<H"),
        "devt_slotoff": (88, "<H"), "dirblkbits": (90, "<B"), "packed_nid": (96, "<Q"),
    },
    "compact": {
        "i_format": (0, "<H"), "i_xattr_icount": (2, "<H"), "i_mode": (4, "<H"), "i_nlink": (6, "<H"),
        "i_size": (8, "<I"), "i_u": (16, "<I"), "i_ino": (20, "<I"), "i_uid": (24, "<H"), "i_gid": (26, "<H"),
    },
    "extended": {
        "i_format": (0, "<H"), "i_xattr_icount": (2, "<H"), "i_mode": (4, "<H"), "i_size": (8, "<Q"),
        "i_u": (16, "<I"), "i_ino": (20, "<I"), "i_uid": (24, "<I"), "i_gid": (28, "<I"), "i_mtime": (32, "<q"),
        "i_mtime_nsec": (40, "<I"), "i_nlink": (44, "<I"),
    },
    "dirent": {"nid": (0, "<Q"), "nameoff": (8, "<H"), "file_type": (10, "<B")},
    "xattr": {"h_name_filter": (0, "<I"), "h_shared_count": (4, "<B")},
    "xattr entry": {"e_name_len": (0, "<B"), "e_name_index": (1, "<B"), "e_value_size": (2, "<H")},
}  # fmt: skip


@dataclass(eq=False)
class Entry:
    """A file of any type. One that stands under two names is a hard link; `size` is for what has no data here."""

    mode: int
    data: bytes = b""
    children: dict[bytes, Entry] = field(default_factory=dict)
    xattrs: Mapping[bytes, bytes] = field(default_factory=dict)
    shared: Mapping[bytes, bytes] = field(default_factory=dict)
    layout: int = INLINE
    compact: bool = False
    size: int | None = None
    i_u: int = 0
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    mtime_nsec: int = 0
    nlink: int = 1
    name_filter: int = 0
    offset: int = 0  # of the inode in the image, once made
    data_offset: int = 0  # of the byte behind its xattrs
    block_offset: int = 0  # of its first data block, when it has one

    @property
    def nid(self) -> int:
        return self.offset // 32


def directory(children: Mapping[bytes, Entry] | None = None, **fields: object) -> Entry:
    made = Entry(stat.S_IFDIR | 0o755, children=dict(children or {}))
    made.nlink = 2 + sum(stat.S_ISDIR(child.mode) for child in made.children.values())
    return _with(made, fields)


def file(data: bytes = b"", **fields: object) -> Entry:
    return _with(Entry(stat.S_IFREG | 0o644, data, layout=INLINE if len(data) % BLOCK else PLAIN), fields)


def symlink(target: bytes, **fields: object) -> Entry:
    return _with(Entry(stat.S_IFLNK | 0o777, target), fields)


def whiteout(**fields: object) -> Entry:
    return _with(Entry(stat.S_IFCHR | 0o644, layout=PLAIN), fields)


def external(size: int, path: bytes | None, digest: bytes | None = None, **fields: object) -> Entry:
    """Return a file whose content is the object at `path`; the digest's length tells its algorithm."""
    xattrs = {METACOPY: metacopy(digest)}
    if path is not None:
        xattrs[REDIRECT] = b"/" + path
    return _with(Entry(stat.S_IFREG | 0o644, xattrs=xattrs, layout=CHUNKED, size=size, i_u=31), fields)


def metacopy(digest: bytes | None) -> bytes:
    return b"" if digest is None else bytes((0, 4 + len(digest), 0, {32: 1, 64: 2}[len(digest)])) + digest


def escaped_whiteout(**fields: object) -> Entry:
    """Return a whiteout that belongs to the content, as composefs stores it."""
    return file(b"", xattrs={b"trusted.overlay.overlay.whiteout": b"", b"user.overlay.whiteout": b""}, **fields)


def hidden_whiteouts() -> dict[bytes, Entry]:
    """Return the 256 entries of the root that hide the object directories; all are one inode here."""
    entry = whiteout(nlink=256)
    return {b"%02x" % number: entry for number in range(256)}


def _with(entry: Entry, fields: Mapping[str, object]) -> Entry:
    for name, value in fields.items():
        setattr(entry, name, value)
    return entry


class Made:
    """An image, and where in it each structure is."""

    def __init__(self, root: Entry) -> None:
        self.root = root
        self.data = bytearray()

    def content(self) -> bytes:
        return bytes(self.data)

    def at(self, path: bytes) -> Entry:
        entry = self.root
        for name in filter(None, path.split(b"/")):
            entry = entry.children[name]
        return entry

    def patch(self, where: str | Entry, name: str, value: int) -> Made:
        """Set a field of "header", "super block" or of an entry's inode."""
        if isinstance(where, Entry):
            return self._set("compact" if where.compact else "extended", where.offset, name, value)
        return self._set(where, 0 if where == "header" else 1024, name, value)

    def patch_xattr(self, entry: Entry, name: str, value: int) -> Made:
        """Set a field of an entry's xattr body header, or of its first inline xattr."""
        at = entry.offset + (32 if entry.compact else 64)
        if name in FIELDS["xattr"]:
            return self._set("xattr", at, name, value)
        return self._set("xattr entry", at + 12 + 4 * len(entry.shared), name, value)

    def patch_dirent(self, parent: Entry, index: int, name: str, value: int) -> Made:
        """Set a field of dirent `index` of the first block of a directory."""
        first = parent.block_offset or parent.data_offset
        return self._set("dirent", first + 12 * index, name, value)

    def _set(self, structure: str, at: int, name: str, value: int) -> Made:
        offset, layout = FIELDS[structure][name]
        struct.pack_into(layout, self.data, at + offset, value)
        return self


def make(root: Entry, *, version: int = 0, flags: int = 0, build_time: int = 0, build_time_nsec: int = 0) -> Made:
    """Return the image of the tree `root`: header, super block, inodes, shared xattrs, data blocks."""
    made = Made(root)
    order = list(_unique(root))
    listings = {id(entry): list(_packed(_names(entry))) for entry, _ in order if stat.S_ISDIR(entry.mode)}
    shared: dict[tuple[bytes, bytes], int] = {}
    at = _FIRST_INODE
    for entry, _ in order:
        if stat.S_ISDIR(entry.mode):
            *full, last = listings[id(entry)]
            entry.size = len(full) * BLOCK + sum(12 + len(name) for name in last)
            entry.layout = INLINE if entry.size % BLOCK else PLAIN
        at = _placed(entry, at)
        for pair in entry.shared.items():
            shared.setdefault(pair, 0)
    xattr_block = at = -(-at // BLOCK)
    pool = bytearray()
    for pair in shared:
        shared[pair] = len(pool) // 4
        pool += _xattr(*pair)
    at += -(-len(pool) // BLOCK)
    blocks = bytearray()
    metadata = bytearray(xattr_block * BLOCK)
    for entry, parent in order:
        if stat.S_ISDIR(entry.mode):
            entry.data = b"".join(_directory_data(entry, parent, listings[id(entry)]))
        head = entry.data[: len(entry.data) - _tail(entry)]
        if head:
            entry.block_offset = at * BLOCK + len(blocks)
            entry.i_u = at + len(blocks) // BLOCK
            blocks += head.ljust(len(head) + -len(head) % BLOCK, b"\0")
        record = _inode(entry, shared) + (entry.data[len(head) :] if entry.layout == INLINE else b"")
        metadata[entry.offset : entry.offset + len(record)] = record
    made.data = metadata + pool.ljust(len(pool) + -len(pool) % BLOCK, b"\0") + blocks
    struct.pack_into("<IIII", made.data, 0, 0xD078629A, 1, flags, version)
    for name, value in {
        "magic": 0xE0F5E1E2, "feature_compat": 6, "blkszbits": 12, "root_nid": root.nid, "inos": len(order),
        "build_time": build_time, "build_time_nsec": build_time_nsec, "blocks": len(made.data) // BLOCK,
        "xattr_blkaddr": xattr_block,
    }.items():  # fmt: skip
        made.patch("super block", name, value)
    return made


def _unique(root: Entry) -> Iterator[tuple[Entry, Entry]]:
    """Yield each entry once, breadth first, with its parent."""
    seen = {id(root)}
    queue = [(root, root)]
    for entry, parent in queue:
        yield entry, parent
        for child in entry.children.values():
            if id(child) not in seen:
                seen.add(id(child))
                queue.append((child, entry))


def _names(entry: Entry) -> list[bytes]:
    return sorted([b".", b"..", *entry.children])


def _packed(names: list[bytes]) -> Iterator[list[bytes]]:
    """Yield the names of each directory block."""
    block: list[bytes] = []
    room = BLOCK
    for name in names:
        if 12 + len(name) > room:
            yield block
            block, room = [], BLOCK
        block.append(name)
        room -= 12 + len(name)
    yield block


def _directory_data(entry: Entry, parent: Entry, blocks: list[list[bytes]]) -> Iterator[bytes]:
    children = {**entry.children, b".": entry, b"..": parent}
    for block in blocks:
        at = 12 * len(block)
        table = bytearray()
        for name in block:
            table += struct.pack("<QHBx", children[name].nid, at, _file_type(children[name].mode))
            at += len(name)
        data = bytes(table) + b"".join(block)
        yield data if block is blocks[-1] else data.ljust(BLOCK, b"\0")


def _file_type(mode: int) -> int:
    kinds = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFLNK)
    return kinds.index(stat.S_IFMT(mode)) + 1


def _placed(entry: Entry, at: int) -> int:
    """Give `entry` its place at or behind `at`, inline data within one block; return where it ends."""
    head = (32 if entry.compact else 64) + _xattrs_size(entry)
    tail = _tail(entry)
    while tail and (at + head) // BLOCK != (at + head + tail - 1) // BLOCK:
        at += 32
    entry.offset, entry.data_offset = at, at + head
    end = at + head + tail + 4 * _chunks(entry)
    return end + -end % 32


def _size(entry: Entry) -> int:
    return len(entry.data) if entry.size is None else entry.size


def _tail(entry: Entry) -> int:
    """Return how many bytes stand behind the inode: with INLINE the last block does, even a full one."""
    size = _size(entry)
    return (size - 1) % BLOCK + 1 if entry.layout == INLINE and size else 0


def _chunks(entry: Entry) -> int:
    if entry.layout != CHUNKED:
        return 0
    return -(-_size(entry) >> 12 + (entry.i_u & 31))


def _xattrs_size(entry: Entry) -> int:
    if not entry.xattrs and not entry.shared:
        return 0
    return 12 + 4 * len(entry.shared) + sum(len(_xattr(*pair)) for pair in entry.xattrs.items())


def _xattr(name: bytes, value: bytes) -> bytes:
    prefix, index = next(((prefix, index) for prefix, index in _PREFIXES if name.startswith(prefix)), (b"", 0))
    suffix = name[len(prefix) :]
    entry = struct.pack("<BBH", len(suffix), index, len(value)) + suffix + value
    return entry.ljust(len(entry) + -len(entry) % 4, b"\0")


def _inode(entry: Entry, shared: Mapping[tuple[bytes, bytes], int]) -> bytes:
    icount = (_xattrs_size(entry) - 12) // 4 + 1 if _xattrs_size(entry) else 0
    i_format = entry.layout << 1 | (not entry.compact)
    if entry.compact:
        record = struct.pack(
            "<HHHHI4xI4xHH4x",
            i_format, icount, entry.mode, entry.nlink, _size(entry), entry.i_u, entry.uid, entry.gid,
        )  # fmt: skip
    else:
        record = struct.pack(
            "<HHH2xQI4xIIqII16x",
            i_format, icount, entry.mode, _size(entry), entry.i_u, entry.uid, entry.gid, entry.mtime,
            entry.mtime_nsec, entry.nlink,
        )  # fmt: skip
    if icount:
        record += struct.pack("<IB7x", entry.name_filter, len(entry.shared))
        record += b"".join(struct.pack("<I", shared[pair]) for pair in entry.shared.items())
        record += b"".join(_xattr(*pair) for pair in entry.xattrs.items())
    return record + b"\xff" * (4 * _chunks(entry))
