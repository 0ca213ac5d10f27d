"""Merkle trees of fs-verity: geometry, building, and checking data against a tree that nobody trusts.

A leaf is the hash of a 4096-byte block of data, the last one padded with zeros. Hashes are packed into hash blocks of
4096 bytes, level above level, up to a single one; its hash is the root hash. A recorded tree is the sequence of hash
blocks, top level first: the layout of `fsverity digest --out-merkle-tree` and of the kernel.
https://docs.kernel.org/filesystems/fsverity.html#merkle-tree
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeAlias

from cfsfuse.errors import TreeMismatch
from cfsfuse.lru import Lru
from cfsfuse.verity.digest import BLOCK_SIZE, Algorithm, Bytes, SideBySide, file_digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

WriteTree = Callable[[int, bytes], object]


class TreeBytes(Protocol):
    """Gives the recorded bytes of a tree, which nobody trusts; BlockingIOError with wait=False when it would wait."""

    def __call__(self, offset: int, length: int, *, wait: bool = True) -> bytes: ...


class Geometry:
    """Where the hash blocks of a file's tree are. Level 0 holds the hashes of the data blocks."""

    __slots__ = ("algorithm", "data_blocks", "level_blocks", "level_starts", "per_block", "size", "tree_size")

    def __init__(self, algorithm: Algorithm, size: int) -> None:
        """Lay out the tree of a file of `size` bytes."""
        self.algorithm = algorithm
        self.size = size
        self.per_block = BLOCK_SIZE // algorithm.size
        self.data_blocks = _blocks(size)
        self.level_blocks: list[int] = []
        count = self.data_blocks
        while count > 1:
            count = -(-count // self.per_block)
            self.level_blocks.append(count)
        start = 0
        self.level_starts = [0] * len(self.level_blocks)
        for level in reversed(range(len(self.level_blocks))):
            self.level_starts[level] = start
            start += self.level_blocks[level]
        self.tree_size = start * BLOCK_SIZE

    def offset(self, level: int, index: int) -> int:
        """Return where hash block `index` of `level` is in the tree, in bytes."""
        return (self.level_starts[level] + index) * BLOCK_SIZE


def leaf_hashes(algorithm: Algorithm, data: Bytes) -> bytes:
    """Return the hashes of the 4096-byte blocks of `data`, one after the other; the last block is padded."""
    view = memoryview(data)
    if algorithm.side_by_side is not None:
        by_lanes = _by_lanes(algorithm.side_by_side, len(view))
        if by_lanes:
            return algorithm.side_by_side.hashes(view[:by_lanes]) + _hashes(algorithm, view[by_lanes:])
    return _hashes(algorithm, view)


def _by_lanes(side_by_side: SideBySide, size: int) -> int:
    """Return how many of `size` bytes are better hashed side by side; the rest is a few blocks behind full rounds."""
    blocks = _blocks(size)
    rest = blocks % side_by_side.lanes
    return size if rest >= side_by_side.least or not rest else (blocks - rest) * BLOCK_SIZE


def _hashes(algorithm: Algorithm, view: memoryview) -> bytes:
    new = algorithm.new
    whole = len(view) & -BLOCK_SIZE
    hashes = [new(view[at : at + BLOCK_SIZE]).digest() for at in range(0, whole, BLOCK_SIZE)]
    if whole < len(view):
        hashes.append(new(bytes(view[whole:]).ljust(BLOCK_SIZE, b"\0")).digest())
    return b"".join(hashes)


def content_digest(algorithm: Algorithm, content: Bytes) -> bytes:
    """Return the fs-verity digest of `content`, which is held in memory."""
    size = len(content)
    if 0 < size <= BLOCK_SIZE:  # most files
        return file_digest(algorithm, size, algorithm.new(bytes(content).ljust(BLOCK_SIZE, b"\0")).digest())
    hashes = leaf_hashes(algorithm, content) if size else bytes(algorithm.size)
    while len(hashes) > algorithm.size:
        hashes = leaf_hashes(algorithm, hashes)
    return file_digest(algorithm, size, hashes)


def build(geometry: Geometry, chunks: Iterable[Bytes], write: WriteTree | None = None) -> bytes:
    """Return the root hash of data that comes in `chunks` of whole blocks (the last may end anywhere).

    `write` takes the hash blocks as they are full: byte offset in the tree, and 4096 bytes. Memory is one hash block a
    level, whatever the size of the data.
    """
    builder = _Builder(geometry, write)
    for chunk in chunks:
        builder.add(leaf_hashes(geometry.algorithm, chunk))
    return builder.root_hash()


def digest_of(algorithm: Algorithm, size: int, chunks: Iterable[Bytes], write: WriteTree | None = None) -> bytes:
    """Return the fs-verity digest of `size` bytes that come in `chunks` of whole blocks; `write` is as for `build`."""
    return file_digest(algorithm, size, build(Geometry(algorithm, size), chunks, write))


class _Builder:
    """Packs hashes into hash blocks, level by level; behind the top level comes the root hash."""

    def __init__(self, geometry: Geometry, write: WriteTree | None) -> None:
        self._geometry = geometry
        self._write = write
        self._levels = len(geometry.level_blocks)
        self._pending = [bytearray() for _ in range(self._levels + 1)]
        self._written = [0] * self._levels

    def add(self, hashes: bytes) -> None:
        """Add hashes of data blocks."""
        position = 0
        while position < len(hashes):
            room = BLOCK_SIZE - len(self._pending[0])
            self._pending[0] += hashes[position : position + room]
            position += room
            for level in range(self._levels):
                if len(self._pending[level]) < BLOCK_SIZE:
                    break
                self._flush(level)

    def root_hash(self) -> bytes:
        """Write what is not full yet, and return the root hash."""
        for level in range(self._levels):
            if self._pending[level]:
                self._flush(level)
        return bytes(self._pending[-1]) or bytes(self._geometry.algorithm.size)

    def _flush(self, level: int) -> None:
        block = bytes(self._pending[level]).ljust(BLOCK_SIZE, b"\0")
        self._pending[level].clear()
        if self._write is not None:
            self._write(self._geometry.offset(level, self._written[level]), block)
        self._written[level] += 1
        self._pending[level + 1] += self._geometry.algorithm.new(block).digest()


HashBlocks: TypeAlias = Lru[tuple[bytes, int, int, int], bytes]
"""Verified hash blocks by digest and size of the file, level and index: those two say what is in them.

Each covers 512 KiB of data (sha256); having it anew costs a read of 4096 bytes and a hash.
"""


class VerifiedTree:
    """A recorded tree from which only verified hash blocks are used.

    What `read` gives is not trusted: a hash block is used once its hash is what its parent says, and the top one once
    the digest made from it is the expected one.
    """

    def __init__(self, geometry: Geometry, digest: bytes, read: TreeBytes, kept: HashBlocks) -> None:
        """Use the tree that `read` gives for the file of `geometry` whose fs-verity digest is `digest`.

        `kept` is where verified hash blocks are kept, those of other trees too.
        """
        self.geometry = geometry
        self.digest = digest
        self._read = read
        self._kept = kept

    def hash_block(self, level: int, index: int, *, wait: bool = True) -> bytes:
        """Return a verified hash block; raise TreeMismatch when the recorded one is wrong."""
        key = (self.digest, self.geometry.size, level, index)
        block = self._kept.get(key)
        if block is None:
            block = self._read(self.geometry.offset(level, index), BLOCK_SIZE, wait=wait)
            if not self._is_genuine(level, index, block, wait=wait):
                raise TreeMismatch(level, index)
            self._kept.put(key, block)
        return block

    def wrong_block(self, first: int, data: Bytes, expected: bytes | None = None) -> tuple[int, bytes, bytes] | None:
        """Check `data`, which starts at block `first`; return index, expected and found hash of the first wrong block.

        `data` ends at a block boundary or at the file's end; `expected` are its leaves, when the caller has them.
        """
        hash_size = self.geometry.algorithm.size
        found = leaf_hashes(self.geometry.algorithm, data)
        if expected is None:
            expected = self.leaves(first, len(found) // hash_size)
        if found == expected:
            return None
        at = next(
            at for at in range(0, len(found), hash_size) if found[at : at + hash_size] != expected[at : at + hash_size]
        )
        return first + at // hash_size, expected[at : at + hash_size], found[at : at + hash_size]

    def leaves(self, first: int, count: int, *, wait: bool = True) -> bytes:
        """Return the verified hashes of `count` data blocks from `first`."""
        if not count:
            return b""
        per_block, hash_size = self.geometry.per_block, self.geometry.algorithm.size
        index, slot = divmod(first, per_block)
        if slot + count <= per_block:
            return self.hash_block(0, index, wait=wait)[slot * hash_size : (slot + count) * hash_size]
        last = (first + count - 1) // per_block
        hashes = b"".join(self.hash_block(0, at, wait=wait) for at in range(index, last + 1))
        return hashes[slot * hash_size : (slot + count) * hash_size]

    def _is_genuine(self, level: int, index: int, block: bytes, *, wait: bool) -> bool:
        """Return whether `block` is hash block `index` of `level`, going by the level above."""
        algorithm = self.geometry.algorithm
        found = algorithm.new(block).digest()
        if level + 1 == len(self.geometry.level_blocks):
            return file_digest(algorithm, self.geometry.size, found) == self.digest
        parent, slot = divmod(index, self.geometry.per_block)
        above = self.hash_block(level + 1, parent, wait=wait)
        return found == above[slot * algorithm.size : (slot + 1) * algorithm.size]


def salvage(
    geometry: Geometry,
    digest: bytes,
    trees: Sequence[TreeBytes],
    read: TreeBytes,
    write: WriteTree,
) -> bool:
    """Put together the hash blocks that one of `trees` has right; return whether the top one is among them.

    For a damaged tree of a damaged file: the recorded tree and the one built from the data are each wrong somewhere,
    and what either has right still verifies everything else. `write` takes the right hash blocks, `read` gives them
    back; what is wrong everywhere stays unwritten.
    """
    algorithm = geometry.algorithm
    top = len(geometry.level_blocks) - 1
    for level in range(top, -1, -1):
        for index in range(geometry.level_blocks[level]):
            parent, slot = divmod(index, geometry.per_block)
            at = 0 if level == top else geometry.offset(level + 1, parent) + slot * algorithm.size
            expected = digest if level == top else read(at, algorithm.size)
            for block in _candidates(geometry, level, index, trees):
                found = algorithm.new(block).digest()
                if (file_digest(algorithm, geometry.size, found) if level == top else found) == expected:
                    write(geometry.offset(level, index), block)
                    break
            else:
                if level == top:
                    return False
    return True


def _candidates(geometry: Geometry, level: int, index: int, trees: Sequence[TreeBytes]) -> Iterator[bytes]:
    """Yield what hash block `index` of `level` may be: as each tree has it, or remade from the level below."""
    for read in trees:
        yield read(geometry.offset(level, index), BLOCK_SIZE)
    if level:
        first = index * geometry.per_block
        count = min(geometry.per_block, geometry.level_blocks[level - 1] - first)
        for read in trees:
            hashes = leaf_hashes(geometry.algorithm, read(geometry.offset(level - 1, first), count * BLOCK_SIZE))
            yield hashes.ljust(BLOCK_SIZE, b"\0")


def _blocks(size: int) -> int:
    return -(-size // BLOCK_SIZE)
