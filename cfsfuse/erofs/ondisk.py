"""On-disk layouts of EROFS and of the composefs header: field names and order as in the kernel's fs/erofs/erofs_fs.h.

Everything is little-endian. No input or output happens here, and nothing is judged: see `image.py` for what is
accepted. https://docs.kernel.org/filesystems/erofs.html#on-disk-details
"""

from __future__ import annotations

import stat
import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple

BLOCK_BITS = 12
BLOCK_SIZE = 1 << BLOCK_BITS
INODE_SLOT_BITS = 5  # a nid counts slots of 32 bytes
NAME_MAX = 255
FT_DIR = 2  # file_type of a dirent that names a directory
FT_CHRDEV = 3  # likewise of a character device, and so of a whiteout
FILE_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: FT_DIR,
    stat.S_IFCHR: FT_CHRDEV,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}
SYMLINK_MAX = 4095  # PATH_MAX of the kernel, less the final NUL

COMPOSEFS_MAGIC = 0xD078629A
COMPOSEFS_HEADER_VERSION = 1
COMPOSEFS_FLAG_HAS_ACL = 1
COMPOSEFS_VERSIONS = range(3)

SUPER_OFFSET = 1024
SUPER_MAGIC = 0xE0F5E1E2


class FeatureIncompat(IntFlag):
    """`feature_incompat` of the super block: what a reader must understand to read the image at all."""

    ZERO_PADDING = 0x01
    COMPR_CFGS_OR_BIG_PCLUSTER = 0x02
    CHUNKED_FILE = 0x04
    DEVICE_TABLE_OR_COMPR_HEAD2 = 0x08
    ZTAILPACKING = 0x10
    FRAGMENTS_OR_DEDUPE = 0x20
    XATTR_PREFIXES = 0x40
    ENCODED_48BIT = 0x80
    METABOX = 0x100


class DataLayout(IntEnum):
    """Bits 1 to 3 of `i_format`: where the data of an inode is."""

    FLAT_PLAIN = 0
    COMPRESSED_FULL = 1
    FLAT_INLINE = 2
    COMPRESSED_COMPACT = 3
    CHUNK_BASED = 4


I_FORMAT_EXTENDED = 0x01
I_FORMAT_LAYOUT_SHIFT = 1
I_FORMAT_LAYOUT_MASK = 0x07

CHUNK_FORMAT_BLKBITS_MASK = 0x1F
NULL_CHUNK = b"\xff" * 4  # EROFS_NULL_ADDR: the chunk is a hole

XATTR_PREFIXES = {
    0: b"",  # composefs: the name is stored whole
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}
XATTR_FILTER_SEED = 0x25BBE08F
FEATURE_COMPAT_MTIME = 0x02  # of feature_compat: i_mtime is an mtime; the kernel looks at neither
FEATURE_COMPAT_XATTR_FILTER = 0x04  # likewise: the name filters mean something
XATTR_ALIGN = 4


class ComposefsHeader(NamedTuple):
    """The first 32 bytes of a composefs image, before the EROFS super block."""

    magic: int
    version: int
    flags: int
    composefs_version: int


class SuperBlock(NamedTuple):
    """`struct erofs_super_block`, 128 bytes at byte 1024. Addresses (`*_blkaddr`) count blocks."""

    magic: int = 0
    checksum: int = 0
    feature_compat: int = 0
    blkszbits: int = 0
    sb_extslots: int = 0
    root_nid: int = 0
    inos: int = 0
    build_time: int = 0
    build_time_nsec: int = 0
    blocks: int = 0
    meta_blkaddr: int = 0
    xattr_blkaddr: int = 0
    uuid: bytes = bytes(16)
    volume_name: bytes = bytes(16)
    feature_incompat: int = 0
    available_compr_algs: int = 0
    extra_devices: int = 0
    devt_slotoff: int = 0
    dirblkbits: int = 0
    xattr_prefix_count: int = 0
    xattr_prefix_start: int = 0
    packed_nid: int = 0
    xattr_filter_reserved: int = 0


HEADER = struct.Struct("<IIII16x")
SUPER_BLOCK = struct.Struct("<IIIBBHQqIIII16s16sIHHHBBIQB23x")
# i_format, i_xattr_icount, i_mode, i_nlink, i_size, (i_reserved), i_u, i_ino, i_uid, i_gid, (i_reserved2)
INODE_COMPACT = struct.Struct("<HHHHI4xIIHH4x")
# i_format, i_xattr_icount, i_mode, (i_reserved), i_size, i_u, i_ino, i_uid, i_gid, i_mtime, i_mtime_nsec, i_nlink
INODE_EXTENDED = struct.Struct("<HHH2xQIIIIqII16x")
# nid, nameoff, file_type, (reserved)
DIRENT = struct.Struct("<QHBx")
# h_name_filter, h_shared_count, (h_reserved2); then h_shared_xattrs, each an u32
XATTR_IBODY_HEADER = struct.Struct("<IB7x")
# e_name_len, e_name_index, e_value_size; then the name and the value
XATTR_ENTRY = struct.Struct("<BBH")

for _layout, _size in (
    (HEADER, 32),
    (SUPER_BLOCK, 128),
    (INODE_COMPACT, 32),
    (INODE_EXTENDED, 64),
    (DIRENT, 12),
    (XATTR_IBODY_HEADER, 12),
    (XATTR_ENTRY, 4),
):
    if _layout.size != _size:  # a slip in a format string would misread every image
        raise AssertionError(f"{_layout.format} has {_layout.size} bytes, not {_size}")
