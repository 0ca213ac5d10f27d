"""tree → bytes: the same image, to the last byte, as mkcomposefs 1.0.8 writes.

An image is, from its start:

1. the composefs header, and the super block at byte 1024;
2. the inodes, breadth first and names in the order of bytes, each followed by its xattrs and by what of its contents
   stays inline: its *tail*. An inode starts at a slot of 32 bytes, whose number is its nid;
3. the shared xattrs: those that two inodes or more have, names and values in descending order;
4. from the next block on the contents that are not inline, in whole blocks and in the order of the inodes.

Layout rules. All of them are the reference's choice, and all of them show in the digest of an image:

- An inode is compact when its numbers fit and its mtime is the earliest of all, which is the super block's build time.
- The contents of a directory or of an inline file go into whole blocks, but for their end when that is at most half a
  block long: the tail. A directory's block is full when the next name does not fit.
- A tail does not cross a block's end. Where it would, the inode moves up by whole slots until the tail starts in the
  next block. A tail that does not fit even then (of more than 4064 bytes: the chunk map of a file of petabytes)
  becomes a block.
- A symlink's target is a tail, and is moved so that the inode is in the same block. If both together are a block or
  longer, the target becomes a block.
- A file whose content is an object is a hole: a map of chunks that are all null, as few as possible. One chunk of at
  most 2^43 bytes is one index.
- An inode names its first 128 shared xattrs by reference, in the order of their names; all others are inline.

What overlayfs needs besides, `overlay.py` knows: redirects, digests, whiteouts, and the mark of the root.
"""

from __future__ import annotations

import stat
from collections import Counter
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.erofs import ondisk, overlay, xattr
from cfsfuse.erofs.contents import FILE_MAX, Content, Hole, Names, Nothing, SymlinkTarget
from cfsfuse.erofs.inode import NSEC_PER_SEC
from cfsfuse.erofs.ondisk import BLOCK_SIZE
from cfsfuse.errors import TreeError, UsageError, printable
from cfsfuse.tree import Device, Directory, Entry, External, Inline, Link, Node, Sparse, Stat, Symlink

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

INLINE_MAX = 5000  # bytes of content in an image; more has to be an object

_SHARED_MAX = 128  # references to shared xattrs in one inode
# Limits of the reference for what the author of a tree gives an inode, under the names that the author gave: what
# `overlay.py` adds comes on top. The bytes are counted generously.
XATTR_NAME_MAX = 255
XATTRS_MAX = 32767
_SLOT = 1 << ondisk.INODE_SLOT_BITS
_PIECE = 1 << 18  # bytes that `Layout.pieces` yields at a time, at least
_DOTS = (b".", b"..")
_SELINUX = b"security.selinux"
_MTIME_MIN, _MTIME_MAX = -(NSEC_PER_SEC << 63), (NSEC_PER_SEC << 63) - 1  # nanoseconds
_DEVICE_TYPES = (ondisk.FILE_TYPES[stat.S_IFCHR], ondisk.FILE_TYPES[stat.S_IFBLK])
_ACLS = (ondisk.XATTR_PREFIXES[2], ondisk.XATTR_PREFIXES[3])

_REGULAR = (stat.S_IFREG,)
_KINDS: dict[type[Node], tuple[int, ...]] = {
    Directory: (stat.S_IFDIR,),
    Symlink: (stat.S_IFLNK,),
    Device: (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK),
    Inline: _REGULAR,
    Sparse: _REGULAR,
    External: _REGULAR,
}

_Xattr = tuple[bytes, bytes]
_NO_XATTRS: dict[bytes, bytes] = {}
_NO_CHILDREN: dict[bytes, _Inode] = {}


class Versions(NamedTuple):
    """The format versions that an image may have: `minimum`, unless the tree is better off with one up to `maximum`.

    Version 1 marks the directories of whiteouts in one more way, and is taken for trees that have any.
    """

    minimum: int = 0
    maximum: int = 1

    def choose(self, *, has_whiteouts: bool) -> int:
        """Return the version of an image; raise UsageError for versions that there are not."""
        for version in self:
            if version not in (0, 1):
                raise UsageError(f"format version {version}: there are 0 and 1")
        return self.maximum if has_whiteouts and self.maximum > self.minimum else self.minimum


DEFAULT_VERSIONS = Versions()


def weight_of(xattrs: dict[bytes, bytes]) -> int:
    """Return how many bytes xattrs count, of XATTRS_MAX."""
    each = 2 * ondisk.XATTR_ENTRY.size - 1
    bytes_of_pairs = sum(each + len(name) + len(value) for name, value in xattrs.items())
    return ondisk.XATTR_IBODY_HEADER.size + bytes_of_pairs if xattrs else 0


def write(root: Entry, versions: Versions = DEFAULT_VERSIONS) -> Iterator[bytes]:
    """Yield the image of the tree below `root` in pieces; raise TreeError, before the first, for what cannot be."""
    return lay_out(root, versions).pieces()


def lay_out(root: Entry, versions: Versions = DEFAULT_VERSIONS) -> Layout:
    """Return the layout of the image of the tree below `root`; raise TreeError for what no image can hold."""
    inodes, whiteouts = _breadth_first(root)
    version = versions.choose(has_whiteouts=bool(whiteouts))
    for inode in whiteouts:
        inode.parent.xattrs |= overlay.directory_marks(version)
    inodes[0].xattrs |= overlay.ROOT_MARKS
    return Layout(inodes, version)


class Layout:
    """Where everything goes in an image of format `version`: `size` bytes in all."""

    def __init__(self, inodes: list[_Inode], version: int) -> None:
        self.version = version
        self._inodes = inodes
        self._earliest = min(inode.mtime_ns for inode in inodes)
        self._has_acl = any(name in inode.xattrs for inode in inodes if inode.xattrs for name in _ACLS)
        shared = _shared_xattrs(inode.sorted_xattrs() for inode in inodes)
        self._shared_xattrs = b"".join(xattr.entry(*pair) for pair in shared)
        self._inodes_end = self._place(_references(shared))
        self._blocks_start = _round_up(self._inodes_end + len(self._shared_xattrs), BLOCK_SIZE)
        self.size = self._blocks_start + BLOCK_SIZE * sum(inode.contents.blocks for inode in inodes)

    def _place(self, references: dict[_Xattr, int]) -> int:
        """Give every inode its place, and return where the last one ends, in bytes."""
        position = ondisk.SUPER_OFFSET + ondisk.SUPER_BLOCK.size
        for inode in self._inodes:
            inode.settle(self._earliest, references)
            position = inode.place(position)
        return _round_up(position, _SLOT)

    def pieces(self) -> Iterator[bytes]:
        """Yield the bytes of the image, in order."""
        piece = bytearray()
        for part in self._parts():
            piece += part
            if len(piece) >= _PIECE:
                yield bytes(piece)
                piece.clear()
        yield bytes(piece)

    def _parts(self) -> Iterator[bytes]:
        head = self._head()
        yield head
        position = len(head)
        # A reference counts words of 4 bytes from the start of the block in which the shared xattrs start.
        first_reference = self._inodes_end % BLOCK_SIZE // ondisk.XATTR_ALIGN
        block = self._blocks_start // BLOCK_SIZE
        for number, inode in enumerate(self._inodes):
            yield bytes(inode.offset - position)
            encoded = inode.encode(number, block, first_reference)
            yield encoded
            block += inode.contents.blocks
            position = inode.offset + len(encoded)
        yield bytes(self._inodes_end - position)
        yield self._shared_xattrs
        yield bytes(self._blocks_start - self._inodes_end - len(self._shared_xattrs))
        for inode in self._inodes:
            if inode.contents.blocks:
                yield inode.contents.block_bytes()

    def _head(self) -> bytes:
        """Return everything up to the end of the super block."""
        header = ondisk.ComposefsHeader(
            magic=ondisk.COMPOSEFS_MAGIC,
            version=ondisk.COMPOSEFS_HEADER_VERSION,
            flags=ondisk.COMPOSEFS_FLAG_HAS_ACL if self._has_acl else 0,
            composefs_version=self.version,
        )
        seconds, nanoseconds = divmod(self._earliest, NSEC_PER_SEC)
        super_block = ondisk.SuperBlock(
            magic=ondisk.SUPER_MAGIC,
            feature_compat=ondisk.FEATURE_COMPAT_MTIME | ondisk.FEATURE_COMPAT_XATTR_FILTER,
            blkszbits=ondisk.BLOCK_BITS,
            root_nid=self._inodes[0].nid,
            inos=len(self._inodes),
            build_time=seconds,
            build_time_nsec=nanoseconds,
            blocks=self.size // BLOCK_SIZE,
            xattr_blkaddr=self._inodes_end // BLOCK_SIZE,
        )
        return ondisk.HEADER.pack(*header).ljust(ondisk.SUPER_OFFSET, b"\0") + ondisk.SUPER_BLOCK.pack(*super_block)


class _Inode:
    """An inode on its way into the image.

    `size` is what its author gave it, or that of its contents; `offset` is where it starts, in bytes. `children` are a
    directory's, with the dots and the hidden names. The xattrs are a dictionary while they are collected, then a sorted
    list, then bytes: memory is for one of these at a time.
    """

    __slots__ = (
        "_gid",
        "_inline_xattrs",
        "_is_compact",
        "_name",
        "_name_filter",
        "_references",
        "_sorted_xattrs",
        "_uid",
        "children",
        "contents",
        "file_type",
        "mode",
        "mtime_ns",
        "nlink",
        "offset",
        "parent",
        "rdev",
        "size",
        "xattrs",
    )

    def __init__(self, node: Node, name: bytes = b"", parent: _Inode | None = None) -> None:
        self._name = name
        self.parent = parent or self
        self.mode, self.nlink, self._uid, self._gid, self.rdev, self.size, self.mtime_ns = node.stat
        self._check(node)
        self.file_type = ondisk.FILE_TYPES[self.mode & 0o170000]
        if node.xattrs:
            self._check_xattrs(node.xattrs)
        self.xattrs = overlay.stored_xattrs(node.xattrs)
        self.contents = self._contents_of(node)
        self.children = {} if self.is_directory else _NO_CHILDREN

    def _check(self, node: Node) -> None:
        if self.mode & 0o170000 not in _KINDS[type(node)] or self.mode >> 16:
            raise self.error(f"mode {self.mode:o} is not that of a {type(node).__name__}")
        small = self.nlink | self.rdev | self._uid | self._gid
        if small >> 32 or self.size >> 64 or not _MTIME_MIN <= self.mtime_ns <= _MTIME_MAX:
            raise self.error(f"a number does not fit in an inode: {node.stat}")

    def _check_xattrs(self, xattrs: dict[bytes, bytes]) -> None:
        for name in xattrs:
            if not 0 < len(name) <= XATTR_NAME_MAX or b"\0" in name:
                raise self.error(f"an xattr's name has 1 to {XATTR_NAME_MAX} bytes, and no NUL: {printable(name)}")
        weight = weight_of(xattrs)
        if weight > XATTRS_MAX:
            raise self.error(f"xattrs of {weight} bytes; an image takes {XATTRS_MAX}")

    def _contents_of(self, node: Node) -> Nothing:
        if isinstance(node, External):
            if not self.size:
                return Nothing()
            self.xattrs |= overlay.external_marks(node.path, node.digest)
            return self._hole()
        if isinstance(node, Inline):
            self.size = len(node.content)
            if self.size > INLINE_MAX:
                raise self.error(f"{self.size} bytes of inline content; an image takes {INLINE_MAX}")
            return Content(node.content)
        if isinstance(node, Symlink):
            self.size = len(node.target)
            if not 0 < self.size <= ondisk.SYMLINK_MAX or b"\0" in node.target:
                raise self.error(f"a symlink's target has 1 to {ondisk.SYMLINK_MAX} bytes, and no NUL")
            return SymlinkTarget(node.target)
        return self._hole() if isinstance(node, Sparse) and self.size else Nothing()

    def _hole(self) -> Hole:
        if self.size > FILE_MAX:
            raise self.error(f"a file of {self.size} bytes; an image takes {FILE_MAX}")
        return Hole(self.size)

    @property
    def nid(self) -> int:
        return self.offset >> ondisk.INODE_SLOT_BITS

    @property
    def is_directory(self) -> bool:
        return self.mode & 0o170000 == stat.S_IFDIR

    @property
    def is_whiteout(self) -> bool:
        return self.rdev == 0 and self.mode & 0o170000 == stat.S_IFCHR

    def escape_whiteout(self) -> None:
        """Become what stands for a whiteout of the content: an empty regular file with marks."""
        self.mode = stat.S_IFREG | stat.S_IMODE(self.mode)
        self.file_type = ondisk.FILE_TYPES[stat.S_IFREG]
        self.size = 0
        self.xattrs |= overlay.WHITEOUT_MARKS

    def path(self) -> bytes:
        """Return the path of the inode, for messages."""
        names = []
        at = self
        while at is not at.parent:
            names.append(at._name)
            at = at.parent
        return b"/" + b"/".join(reversed(names))

    def error(self, reason: str) -> TreeError:
        return TreeError(self.path(), reason)

    def sorted_xattrs(self) -> list[_Xattr]:
        """Return the xattrs, now that all are known, in their order."""
        self._sorted_xattrs = sorted(self.xattrs.items())
        self.xattrs = _NO_XATTRS
        return self._sorted_xattrs

    def settle(self, earliest: int, shared: dict[_Xattr, int]) -> None:
        """Settle the form of the inode, and which of its xattrs are where."""
        if self.is_directory:
            self.contents = Names(sorted(self.children), self.children)
            self.size = self.contents.size
        is_small = self.size <= 0xFFFFFFFF and self.nlink <= 0xFFFF and self._uid <= 0xFFFF and self._gid <= 0xFFFF
        self._is_compact = is_small and self.mtime_ns == earliest
        references: list[int] = []
        inline = []
        for pair in self._sorted_xattrs:
            if pair in shared and len(references) < _SHARED_MAX:
                references.append(shared[pair])
            else:
                inline.append(xattr.entry(*pair))
        self._references = tuple(references)
        self._inline_xattrs = b"".join(inline)
        self._name_filter = xattr.name_filter(tuple([name for name, _ in self._sorted_xattrs]))
        self._sorted_xattrs = []

    def place(self, position: int) -> int:
        """Take the first place from byte `position` on that the layout rules allow; return where the inode ends."""
        start = _round_up(position, _SLOT)
        form = ondisk.INODE_COMPACT if self._is_compact else ondisk.INODE_EXTENDED
        fixed = form.size + self._xattrs_size()
        if isinstance(self.contents, SymlinkTarget):
            start = self._place_symlink(start, fixed)
        else:
            start = self._place_tail(start, fixed)
        self.offset = start
        return start + fixed + self.contents.tail

    def _place_symlink(self, start: int, fixed: int) -> int:
        total = fixed + self.contents.tail
        if total >= BLOCK_SIZE:
            self.contents.spill()
        is_split = start // BLOCK_SIZE != (start + total - 1) // BLOCK_SIZE
        return _round_up(start, BLOCK_SIZE) if is_split else start

    def _place_tail(self, start: int, fixed: int) -> int:
        room = BLOCK_SIZE - (start + fixed) % BLOCK_SIZE
        if self.contents.tail <= room:
            return start
        moved = start + _round_up(room, _SLOT)
        if self.contents.tail <= BLOCK_SIZE - (moved + fixed) % BLOCK_SIZE:
            return moved
        self.contents.spill()
        return _round_up(start, BLOCK_SIZE)

    def _xattrs_size(self) -> int:
        if not (self._references or self._inline_xattrs):
            return 0
        return ondisk.XATTR_IBODY_HEADER.size + 4 * len(self._references) + len(self._inline_xattrs)

    def encode(self, number: int, block: int, first_reference: int) -> bytes:
        """Return inode `number` with its xattrs and its tail; `block` is where its blocks start."""
        contents = self.contents
        i_format = contents.layout << ondisk.I_FORMAT_LAYOUT_SHIFT
        xattrs_size = self._xattrs_size()
        # The header counts as one, whatever its size.
        icount = (xattrs_size - ondisk.XATTR_IBODY_HEADER.size) // 4 + 1 if xattrs_size else 0
        i_u = self.rdev if self.file_type in _DEVICE_TYPES else contents.i_u(block)
        if self._is_compact:
            inode = ondisk.INODE_COMPACT.pack(
                i_format, icount, self.mode, self.nlink, contents.size, i_u, number, self._uid, self._gid
            )
        else:
            i_format |= ondisk.I_FORMAT_EXTENDED
            mtime = divmod(self.mtime_ns, NSEC_PER_SEC)
            inode = ondisk.INODE_EXTENDED.pack(
                i_format, icount, self.mode, contents.size, i_u, number, self._uid, self._gid, *mtime, self.nlink
            )
        return b"".join((inode, self._encoded_xattrs(first_reference), contents.tail_bytes()))

    def _encoded_xattrs(self, first_reference: int) -> bytes:
        if not (self._references or self._inline_xattrs):
            return b""
        header = ondisk.XATTR_IBODY_HEADER.pack(self._name_filter, len(self._references))
        references = b"".join((first_reference + at).to_bytes(4, "little") for at in self._references)
        return header + references + self._inline_xattrs


def _breadth_first(root: Entry) -> tuple[list[_Inode], list[_Inode]]:
    """Return all inodes in the order of the image, and those of them that are whiteouts of the content."""
    top = _Inode(root.node)
    if not top.is_directory:
        raise top.error("the root is no directory")
    placed = {root: top}
    inodes = [top]
    entries = [root]
    links: list[tuple[_Inode, bytes, Entry]] = []
    whiteouts = []
    for inode, entry in zip(inodes, entries, strict=True):  # both grow meanwhile
        if not inode.is_directory:
            if entry.children:
                raise inode.error("only directories have children")
            continue
        hidden = _hidden(root) if inode is top else {}
        children = hidden | entry.children
        for name in sorted(children):
            child = children[name]
            _check_name(inode, name)
            if isinstance(child, Link):
                links.append((inode, name, child.target))
                continue
            found = _Inode(child.node, name, inode)
            if child in placed:
                raise found.error("stands in the tree twice; a further name of a file is a Link")
            placed[child] = found
            inodes.append(found)
            entries.append(child)
            inode.children[name] = found
            if found.is_whiteout and name not in hidden:
                found.escape_whiteout()
                whiteouts.append(found)
        inode.nlink = 2 + sum(child.is_directory for child in inode.children.values())
        inode.children |= {b".": inode, b"..": inode.parent}
    for directory, name, target in links:
        directory.children[name] = _linked(directory, name, placed.get(target))
    return inodes, whiteouts


def _check_name(directory: _Inode, name: bytes) -> None:
    if not 0 < len(name) <= ondisk.NAME_MAX or name in _DOTS or b"/" in name or b"\0" in name:
        raise directory.error(f"{printable(name)} is no file name: of 1 to {ondisk.NAME_MAX} bytes, no slash, no NUL")


def _linked(directory: _Inode, name: bytes, target: _Inode | None) -> _Inode:
    if target is None or target.is_directory:
        where = directory.path().rstrip(b"/") + b"/" + name
        raise TreeError(where, "a hard link to " + ("what is not in the tree" if target is None else "a directory"))
    return target


def _hidden(root: Entry) -> dict[bytes, Entry | Link]:
    """Return whiteouts for the names of object directories, 00 to ff, as far as the root has nothing there.

    They hide the object store on kernels whose overlayfs has no data-only layers.
    """
    status = root.node.stat
    node = Device(
        Stat(stat.S_IFCHR | 0o644, 1, status.uid, status.gid, 0, 0, status.mtime_ns),
        {name: value for name, value in root.node.xattrs.items() if name == _SELINUX},
    )
    names = (b"%02x" % number for number in range(256))
    return {name: Entry(node) for name in names if name not in root.children}


def _shared_xattrs(lists: Iterable[list[_Xattr]]) -> list[_Xattr]:
    """Return the xattrs that stand in the image once, for several inodes, in their order."""
    counts: Counter[_Xattr] = Counter()
    for xattrs in lists:
        counts.update(xattrs)
    several = (pair for pair, count in counts.items() if count > 1)
    return sorted(several, key=lambda pair: (pair[0], len(pair[1]), pair[1]), reverse=True)


def _references(shared: list[_Xattr]) -> dict[_Xattr, int]:
    """Return where each of the shared xattrs is, in words of 4 bytes from the first."""
    sizes = (len(xattr.entry(*pair)) // ondisk.XATTR_ALIGN for pair in shared)
    return dict(zip(shared, accumulate(sizes, initial=0), strict=False))


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
