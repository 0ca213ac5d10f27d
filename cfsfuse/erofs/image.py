"""The bytes of an image, its super block, and what makes an EROFS image an acceptable composefs image."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, NewType

from cfsfuse.erofs import ondisk
from cfsfuse.errors import ImageError

if TYPE_CHECKING:
    import mmap

_unpack_extended = ondisk.INODE_EXTENDED.unpack_from

Nid = NewType("Nid", int)
"""Node number: the inode's place in the metadata area in slots of 32 bytes, and `st_ino` in the kernel mount."""


class Image:
    """An EROFS image in memory.

    `slice`, `unpack` and `extended_inode` are the only ways to its bytes, and all check bounds: no other code may
    index the buffer, because every offset and length in the image is hostile until checked.
    """

    __slots__ = ("_buffer", "header", "meta_offset", "root_nid", "size", "super_block", "xattr_offset")

    def __init__(self, buffer: bytes | memoryview | mmap.mmap, *, size: int | None = None) -> None:
        """Parse the super block of `buffer`; raise ImageError when it is not EROFS that we can read.

        With `size`, `buffer` is the beginning of an image of that many bytes, of which only the super block is looked
        at.
        """
        self._buffer = memoryview(buffer).toreadonly()
        self.size = self._buffer.nbytes if size is None else size
        if self.size == 0:
            raise ImageError("image", "empty file")
        if self.size < ondisk.SUPER_OFFSET + ondisk.SUPER_BLOCK.size:
            raise ImageError(
                "image", f"{self.size} bytes are too few for an EROFS super block: truncated, or not an image"
            )
        self.header = ondisk.ComposefsHeader(*self.unpack(ondisk.HEADER, 0, "composefs header"))
        self.super_block = ondisk.SuperBlock(*self.unpack(ondisk.SUPER_BLOCK, ondisk.SUPER_OFFSET, "super block"))
        self._check_super_block()
        self.root_nid = Nid(self.super_block.root_nid)
        self.meta_offset = self.super_block.meta_blkaddr << ondisk.BLOCK_BITS
        self.xattr_offset = self.super_block.xattr_blkaddr << ondisk.BLOCK_BITS

    def slice(self, offset: int, length: int, field: str) -> memoryview:
        """Return `length` bytes at `offset`, or raise ImageError naming `field`. There is no other way to the bytes."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ImageError(field, f"{length} bytes reach beyond the image's {self.size} bytes", offset)
        return self._buffer[offset : offset + length]

    def unpack(self, layout: struct.Struct, offset: int, field: str) -> tuple[Any, ...]:
        """Unpack `layout` at `offset`: `slice` for fixed layouts, without the cost of making a view."""
        if offset + layout.size > self.size:  # never negative: every address is a sum of unsigned fields
            raise ImageError(field, f"{layout.size} bytes reach beyond the image's {self.size} bytes", offset)
        return layout.unpack_from(self._buffer, offset)

    def extended_inode(self, offset: int) -> tuple[int, ...]:
        """Unpack an inode at `offset` in its extended form, the usual one; a compact one shows in its `i_format`.

        Listing a large tree asks this for each entry, hence the short cut. Behind a compact inode at the very end of
        the image zeros are read.
        """
        try:
            return _unpack_extended(self._buffer, offset)
        except (struct.error, OverflowError):
            rest = self.slice(offset, ondisk.INODE_COMPACT.size, "inode")
            if rest[0] & ondisk.I_FORMAT_EXTENDED:
                raise ImageError("inode", "its extended form reaches beyond the image", offset) from None
            return _unpack_extended(bytes(rest).ljust(ondisk.INODE_EXTENDED.size, b"\0"))

    def block(self, address: int, length: int, field: str) -> memoryview:
        """Return the first `length` bytes of the block at `address`."""
        return self.slice(address << ondisk.BLOCK_BITS, length, field)

    @property
    def has_acl(self) -> bool:
        """Whether the image says that some entry has a POSIX ACL."""
        return bool(self.header.flags & ondisk.COMPOSEFS_FLAG_HAS_ACL)

    def require_composefs(self) -> None:
        """Raise ImageError unless this EROFS image is one of composefs: the parser's limits are checked before this."""
        header = self.header
        if header.magic != ondisk.COMPOSEFS_MAGIC:
            raise ImageError("composefs magic", f"{header.magic:#x}: an EROFS image, but not one of composefs", 0)
        if header.version != ondisk.COMPOSEFS_HEADER_VERSION:
            raise ImageError("composefs header version", f"{header.version} is not supported", 4)
        if header.composefs_version not in ondisk.COMPOSEFS_VERSIONS:
            raise ImageError("composefs_version", f"{header.composefs_version} is newer than this program", 12)

    def _check_super_block(self) -> None:
        block = self.super_block
        at = ondisk.SUPER_OFFSET
        if block.magic != ondisk.SUPER_MAGIC:
            raise ImageError("super block magic", f"{block.magic:#x}: not an EROFS image", at)
        if block.blkszbits != ondisk.BLOCK_BITS:
            raise ImageError("blkszbits", f"{block.blkszbits}: composefs uses blocks of 4096 bytes (12)", at + 12)
        if block.blocks << ondisk.BLOCK_BITS > self.size:
            raise ImageError(
                "blocks", f"{block.blocks} of 4096 bytes, but the image has {self.size} bytes: truncated", at + 36
            )
        if block.dirblkbits != 0:
            raise ImageError(
                "dirblkbits", f"{block.dirblkbits}: directory blocks must be of the block size (0)", at + 90
            )
        foreign = block.feature_incompat & ~int(ondisk.FeatureIncompat.CHUNKED_FILE)
        if foreign:
            names = ondisk.FeatureIncompat(foreign).name or f"{foreign:#x}"
            raise ImageError(
                "feature_incompat", f"{names}: compressed or otherwise foreign EROFS, not composefs", at + 80
            )
        if block.available_compr_algs:
            raise ImageError("available_compr_algs", f"{block.available_compr_algs:#x}: compressed EROFS", at + 84)
        if block.extra_devices:
            raise ImageError("extra_devices", f"{block.extra_devices}: data on other devices", at + 86)
