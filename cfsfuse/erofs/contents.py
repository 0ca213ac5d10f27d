"""What inodes hold, as a writer splits it: whole blocks, and a tail that stays inline, behind the inode.

The rules are the reference's choice, as all of `writer.py`'s are: they show in the digest of an image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from cfsfuse.erofs.ondisk import (
    BLOCK_BITS,
    BLOCK_SIZE,
    CHUNK_FORMAT_BLKBITS_MASK,
    DIRENT,
    NULL_CHUNK,
    DataLayout,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

TAIL_MAX = BLOCK_SIZE // 2  # bytes of a directory or of a file that stay inline; a longer rest fills a block
CHUNKS_MAX = 1024  # a chunk map fits in a block
FILE_MAX = CHUNKS_MAX << BLOCK_BITS + CHUNK_FORMAT_BLKBITS_MASK  # bytes: 2^53


class Named(Protocol):
    """What a name stands for: an inode that has its place by the time the dirent is written."""

    @property
    def nid(self) -> int: ...

    @property
    def file_type(self) -> int: ...


class Nothing:
    """The contents of a device, of a fifo, of an empty file: none.

    `size` is in bytes, `blocks` and `tail` say how much of it is in whole blocks, and how many bytes are inline.
    """

    __slots__ = ("blocks", "size", "tail")

    def __init__(self, size: int = 0) -> None:
        self.size = size
        self.blocks = self.tail = 0

    @property
    def layout(self) -> DataLayout:
        return DataLayout.FLAT_INLINE if self.tail else DataLayout.FLAT_PLAIN

    def _split(self, blocks: int, rest: int) -> None:
        self.blocks, self.tail = (blocks + 1, 0) if rest > TAIL_MAX else (blocks, rest)

    def i_u(self, block: int) -> int:
        """Return the `i_u` of the inode, given the first block that is free."""
        return block if self.blocks else 0

    def spill(self) -> None:
        """Move the tail into a block of its own."""
        self.blocks, self.tail = self.blocks + 1, 0

    def tail_bytes(self) -> bytes:
        """Return what is inline."""
        return b""

    def block_bytes(self) -> bytes:
        """Return what is in blocks, padded to them."""
        return b""


class Content(Nothing):
    """The content of an inline file."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        super().__init__(len(data))
        self._data = data
        self._split(*divmod(len(data), BLOCK_SIZE))

    def tail_bytes(self) -> bytes:
        return self._data[self.size - self.tail :]

    def block_bytes(self) -> bytes:
        return self._data[: self.size - self.tail].ljust(self.blocks * BLOCK_SIZE, b"\0")


class SymlinkTarget(Content):
    """The target of a symlink: a tail of any length, until it spills."""

    __slots__ = ()

    def _split(self, blocks: int, rest: int) -> None:
        self.tail = blocks * BLOCK_SIZE + rest


class Hole(Nothing):
    """The content of a file that is elsewhere: a map of null chunks, as few as the format allows."""

    __slots__ = ("format",)

    def __init__(self, size: int) -> None:
        bits = min(max((size - 1).bit_length(), BLOCK_BITS), BLOCK_BITS + CHUNK_FORMAT_BLKBITS_MASK)
        self.size = size
        self.format = bits - BLOCK_BITS
        self.blocks = 0
        self.tail = len(NULL_CHUNK) * -(-size >> bits)

    @property
    def layout(self) -> DataLayout:
        return DataLayout.CHUNK_BASED

    def i_u(self, block: int) -> int:
        # The reference stores the format, which is 16 bits wide, over the address, of which the upper half stays.
        return super().i_u(block) & 0xFFFF0000 | self.format

    def tail_bytes(self) -> bytes:
        return NULL_CHUNK * (self.tail // len(NULL_CHUNK))

    def block_bytes(self) -> bytes:
        return NULL_CHUNK * CHUNKS_MAX * self.blocks


class Names(Nothing):
    """The dirents of a directory, of all `names` in the order of bytes.

    A name starts a new block when it does not fit in the last one together with its dirent.
    """

    __slots__ = ("_blocks", "_named")

    def __init__(self, names: Iterable[bytes], named: Mapping[bytes, Named]) -> None:
        super().__init__()
        self._named = named
        self._blocks: list[list[bytes]] = [[]]
        filled = 0
        for name in names:
            filled += DIRENT.size + len(name)
            if filled > BLOCK_SIZE:
                self._blocks.append([])
                filled = DIRENT.size + len(name)
            self._blocks[-1].append(name)
        self._split(len(self._blocks) - 1, filled)
        self.size = self.blocks * BLOCK_SIZE + self.tail

    def tail_bytes(self) -> bytes:
        return self._dirents(self._blocks[-1]) if self.tail else b""

    def block_bytes(self) -> bytes:
        return b"".join(self._dirents(names).ljust(BLOCK_SIZE, b"\0") for names in self._blocks[: self.blocks])

    def _dirents(self, names: list[bytes]) -> bytes:
        offset = DIRENT.size * len(names)
        dirents = []
        for name in names:
            named = self._named[name]
            dirents.append(DIRENT.pack(named.nid, offset, named.file_type))
            offset += len(name)
        return b"".join(dirents + names)
