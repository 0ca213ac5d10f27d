"""fs-verity digests: the descriptor over a root hash, and the measure of whole contents.

https://docs.kernel.org/filesystems/fsverity.html#fs-verity-descriptor
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

Bytes = bytes | bytearray | memoryview | mmap.mmap

BLOCK_SIZE = 4096
_LOG_BLOCK_SIZE = 12

# version, hash_algorithm, log_blocksize, salt_size, (0), data_size, root_hash, salt, (reserved)
DESCRIPTOR = struct.Struct("<BBBBIQ64s32s144x")
if DESCRIPTOR.size != 256:
    raise AssertionError("struct fsverity_descriptor has 256 bytes")


class Algorithm(NamedTuple):
    """A hash algorithm of fs-verity: its hashlib name, number in the kernel, digest size in bytes and constructor.

    `new_side_by_side`, where it is faster, hashes many blocks at once: it takes data, and gives the hashes of its
    blocks, one after the other, the last block padded with zeros.
    """

    name: str
    number: int
    size: int
    new: Callable[[Bytes], hashlib._Hash]
    new_side_by_side: Callable[[Bytes], bytes] | None = None


def _sha256_side_by_side() -> Callable[[Bytes], bytes] | None:
    """Return the hash function of `_lanes.c` where it is faster than hashlib's.

    With SHA instructions hashlib takes 3 µs a block, without 11. The lanes take 2 with AVX-512, 6 with AVX2.
    """
    try:
        from cfsfuse.verity._lanes import SHA_INSTRUCTIONS, VARIANTS, sha256_blocks
    except ImportError:  # installed where no C compiler is: hashlib does it all
        return None
    is_faster = VARIANTS[0] == "avx512" or (VARIANTS[0] == "avx2" and not SHA_INSTRUCTIONS)
    return sha256_blocks if is_faster else None


ALGORITHMS = {
    "sha256": Algorithm("sha256", 1, 32, hashlib.sha256, _sha256_side_by_side()),
    "sha512": Algorithm("sha512", 2, 64, hashlib.sha512),
}
SHA256 = ALGORITHMS["sha256"]


def file_digest(algorithm: Algorithm, size: int, root_hash: bytes) -> bytes:
    """Return the fs-verity digest of a file of `size` bytes whose Merkle tree has `root_hash`."""
    return algorithm.new(DESCRIPTOR.pack(1, algorithm.number, _LOG_BLOCK_SIZE, 0, 0, size, root_hash, b"")).digest()
