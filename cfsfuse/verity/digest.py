"""fs-verity digests: the descriptor over a root hash, and the measure of whole contents.

https://docs.kernel.org/filesystems/fsverity.html#fs-verity-descriptor
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Bytes = bytes | bytearray | memoryview | mmap.mmap

BLOCK_SIZE = 4096
_LOG_BLOCK_SIZE = 12

# version, hash_algorithm, log_blocksize, salt_size, (0), data_size, root_hash, salt, (reserved)
DESCRIPTOR = struct.Struct("<BBBBIQ64s32s144x")
if DESCRIPTOR.size != 256:
    raise AssertionError("struct fsverity_descriptor has 256 bytes")


class SideBySide(NamedTuple):
    """A function that hashes up to `lanes` blocks in the time of one, and from how many on that is worth it.

    It takes data, and gives the hashes of its blocks, one after the other; the last block is padded with zeros.
    """

    hashes: Callable[[Bytes], bytes]
    lanes: int
    least: int


class Algorithm(NamedTuple):
    """A hash algorithm of fs-verity: its hashlib name, number in the kernel, digest size in bytes and constructor.

    `side_by_side` is there where it is faster than one block after the other.
    """

    name: str
    number: int
    size: int
    new: Callable[[Bytes], hashlib._Hash]
    side_by_side: SideBySide | None = None


# Kind of vector registers, and whether the processor has SHA instructions → for how many blocks hashlib takes as long
# as the lanes for 16. µs at 2.5 GHz: 27 for those with AVX-512, 92 with AVX2; 11 for a block by hashlib, with SHA 3.
_WORTH = {("avx512", False): 3, ("avx512", True): 10, ("avx2", False): 9}


def least_side_by_side(variants: Sequence[str], *, has_sha: bool) -> int | None:
    """Return from how many blocks on `_lanes.c` is faster than hashlib, None for never."""
    return _WORTH.get((variants[0], has_sha))


def _sha256_side_by_side() -> SideBySide | None:
    try:
        from cfsfuse.verity._lanes import LANES, SHA_INSTRUCTIONS, VARIANTS, sha256_blocks
    except ImportError:  # it could not be compiled: hashlib does it all
        return None
    least = least_side_by_side(VARIANTS, has_sha=bool(SHA_INSTRUCTIONS))
    return None if least is None else SideBySide(sha256_blocks, LANES, least)


ALGORITHMS = {
    "sha256": Algorithm("sha256", 1, 32, hashlib.sha256, _sha256_side_by_side()),
    "sha512": Algorithm("sha512", 2, 64, hashlib.sha512),
}
SHA256 = ALGORITHMS["sha256"]


def file_digest(algorithm: Algorithm, size: int, root_hash: bytes) -> bytes:
    """Return the fs-verity digest of a file of `size` bytes whose Merkle tree has `root_hash`."""
    return algorithm.new(DESCRIPTOR.pack(1, algorithm.number, _LOG_BLOCK_SIZE, 0, 0, size, root_hash, b"")).digest()
