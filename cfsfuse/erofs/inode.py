"""nid → inode: both on-disk forms, as one record.

https://docs.kernel.org/filesystems/erofs.html#inodes, struct erofs_inode_compact and erofs_inode_extended.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.erofs import ondisk
from cfsfuse.erofs.ondisk import DataLayout
from cfsfuse.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cfsfuse.erofs.image import Image, Nid

NSEC_PER_SEC = 1_000_000_000
_TYPES = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK)
# i_format → layout, for both forms of the inode; the compressed layouts are missing.
_FORMATS = {
    layout << ondisk.I_FORMAT_LAYOUT_SHIFT | form: layout
    for layout in (DataLayout.FLAT_PLAIN, DataLayout.FLAT_INLINE, DataLayout.CHUNK_BASED)
    for form in (0, ondisk.I_FORMAT_EXTENDED)
}
# The file type, beyond the 16 bits of i_format, and i_format → layout: one look tells whether both are known.
_LAYOUTS = {kind << 4 | i_format: layout for i_format, layout in _FORMATS.items() for kind in _TYPES}
_new = tuple.__new__


class Inode(NamedTuple):
    """An inode as it stands in the image; `i_u` is the block address, the device number or the chunk format.

    `mtime_ns` is in nanoseconds since 1970 and may be negative. `data_offset` is the byte behind the inode and its
    xattrs, where inline data starts; `xattr_offset` is 0 when there are none.
    """

    nid: Nid
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    layout: DataLayout
    i_u: int
    xattr_offset: int
    data_offset: int

    def numbered(self, nid: Nid) -> Inode:
        """Return the same inode under another number."""
        return _new(Inode, (nid, *self[1:]))

    @property
    def is_directory(self) -> bool:
        return self.mode & 0o170000 == stat.S_IFDIR

    @property
    def is_regular(self) -> bool:
        return self.mode & 0o170000 == stat.S_IFREG

    @property
    def is_symlink(self) -> bool:
        return self.mode & 0o170000 == stat.S_IFLNK

    @property
    def is_device(self) -> bool:
        return self.mode & 0o170000 in (stat.S_IFCHR, stat.S_IFBLK)

    @property
    def rdev(self) -> int:
        """Device number in the kernel's `new_encode_dev` form, which is also that of `st_rdev` for small numbers."""
        return self.i_u if self.is_device else 0

    @property
    def is_whiteout(self) -> bool:
        """A character device 0:0: overlayfs takes it as the absence of the name."""
        return self.i_u == 0 and self.mode & 0o170000 == stat.S_IFCHR

    @property
    def blocks(self) -> int:
        """`st_blocks` of the kernel mount: 8 units of 512 bytes for every started 4096 bytes."""
        return (self.size + 4095 >> 12) << 3


def read_inode(image: Image, nid: Nid) -> Inode:
    """Read the inode of `nid`; raise ImageError when it is not one that composefs writes."""
    return read_inodes(image, (nid,))[0]


def read_inodes(image: Image, nids: Iterable[Nid]) -> list[Inode]:
    """Read the inodes of `nids`; raise ImageError when one is not what composefs writes.

    Listing a large tree is mostly this loop: the order of its checks is that of their cost.
    """
    inodes: list[Inode] = []
    extended_inode, base, image_size = image.extended_inode, image.meta_offset, image.size
    for nid in nids:
        offset = base + (nid << ondisk.INODE_SLOT_BITS)
        i_format, icount, mode, size, i_u, _, uid, gid, seconds, nanoseconds, nlink = extended_inode(offset)
        after = offset + 64
        if not i_format & ondisk.I_FORMAT_EXTENDED:
            i_format, icount, mode, nlink, size, i_u, _, uid, gid = image.unpack(ondisk.INODE_COMPACT, offset, "inode")
            seconds, nanoseconds = image.super_block.build_time, image.super_block.build_time_nsec
            after = offset + 32
        layout = _LAYOUTS.get((mode & 0o170000) << 4 | i_format)
        if (
            layout is None
            or nanoseconds >= NSEC_PER_SEC
            or (size > image_size and _is_oversized(image, mode, layout, size))
        ):
            raise _bad_inode(offset, i_format, mode, nanoseconds, size)
        mtime_ns = seconds * NSEC_PER_SEC + nanoseconds
        xattr_offset = after if icount else 0
        data_offset = after + 8 + icount * 4 if icount else after
        # A NamedTuple's own constructor takes twice as long.
        inode = (nid, mode, nlink, uid, gid, size, mtime_ns, layout, i_u, xattr_offset, data_offset)
        inodes.append(_new(Inode, inode))
    return inodes


def _is_oversized(image: Image, mode: int, layout: DataLayout, size: int) -> bool:
    """Return whether the kernel could not hold `size`, or the data would have to be in the image and cannot be.

    So nothing is ever allocated, or looped over, by an unchecked size.
    """
    is_flat = layout is not DataLayout.CHUNK_BASED and stat.S_IFMT(mode) in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)
    return size >= 1 << 63 or (is_flat and size > image.size)


def _bad_inode(offset: int, i_format: int, mode: int, nanoseconds: int, size: int) -> ImageError:
    if i_format not in _FORMATS:
        layout = i_format >> ondisk.I_FORMAT_LAYOUT_SHIFT & ondisk.I_FORMAT_LAYOUT_MASK
        if layout in (DataLayout.COMPRESSED_FULL, DataLayout.COMPRESSED_COMPACT):
            name = DataLayout(layout).name
            return ImageError("i_format", f"data layout {name}: compressed files never appear in composefs", offset)
        return ImageError("i_format", f"{i_format:#x} is not a format of composefs", offset)
    if stat.S_IFMT(mode) not in _TYPES:
        return ImageError("i_mode", f"{mode:o} has no file type", offset)
    if nanoseconds >= NSEC_PER_SEC:
        return ImageError("i_mtime_nsec", f"{nanoseconds} is not below {NSEC_PER_SEC}", offset)
    return ImageError("i_size", f"{size} bytes do not fit in the image", offset)


def data_block(image: Image, inode: Inode, index: int) -> memoryview:
    """Return block `index` of the data of a flat inode: 4096 bytes, fewer for the last one.

    Blocks stand at the block address `i_u`; with FLAT_INLINE the last one, be it full or not, stands behind the inode
    and its xattrs, and does not reach into another block of the image.
    """
    start = index << ondisk.BLOCK_BITS
    length = min(ondisk.BLOCK_SIZE, inode.size - start)
    if inode.layout is DataLayout.FLAT_INLINE and start + ondisk.BLOCK_SIZE >= inode.size:
        if inode.data_offset % ondisk.BLOCK_SIZE + length > ondisk.BLOCK_SIZE:
            raise ImageError("inline data", f"{length} bytes cross the end of a block", inode.data_offset)
        return image.slice(inode.data_offset, length, "inline data")
    return image.block(inode.i_u + index, length, "raw_blkaddr")


def flat_data(image: Image, inode: Inode) -> bytes:
    """Return all data of a flat inode; its size has been checked against the image's."""
    return b"".join(data_block(image, inode, index) for index in range(inode.size + 4095 >> 12))


def check_holes(image: Image, inode: Inode) -> None:
    """Raise ImageError unless every chunk of a chunk-based inode is a hole, as composefs writes them.

    The chunk map has an entry of 4 bytes a chunk (struct erofs_inode_chunk_info). A chunk elsewhere in the image would
    be data that no digest covers.
    """
    if inode.i_u & 0xFFFF & ~ondisk.CHUNK_FORMAT_BLKBITS_MASK:
        raise ImageError("chunk format", f"{inode.i_u & 0xFFFF:#x} is not one of composefs", inode.data_offset)
    bits = ondisk.BLOCK_BITS + (inode.i_u & ondisk.CHUNK_FORMAT_BLKBITS_MASK)
    count = (inode.size + (1 << bits) - 1) >> bits
    offset = inode.data_offset + 3 & ~3
    if image.slice(offset, 4 * count, "chunk map") != b"\xff" * (4 * count):
        raise ImageError("chunk map", "a chunk points into the image; composefs files are holes there", offset)
