"""fs-verity digests: the descriptor over a root hash, and the measure of whole contents.

https://docs.kernel.org/filesystems/fsverity.html#fs-verity-descriptor
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from cfsfuse.verity.merkle import Bytes

BLOCK_SIZE = 4096
_LOG_BLOCK_SIZE = 12

# version, hash_algorithm, log_blocksize, salt_size, (0), data_size, root_hash, salt, (reserved)
DESCRIPTOR = struct.Struct("<BBBBIQ64s32s144x")
if DESCRIPTOR.size != 256:
    raise AssertionError("struct fsverity_descriptor has 256 bytes")


class Algorithm(NamedTuple):
    """A hash algorithm of fs-verity: its hashlib name, number in the kernel, digest size in bytes and constructor."""

    name: str
    number: int
    size: int
    new: Callable[[Bytes], hashlib._Hash]


ALGORITHMS = {
    "sha256": Algorithm("sha256", 1, 32, hashlib.sha256),
    "sha512": Algorithm("sha512", 2, 64, hashlib.sha512),
}
SHA256 = ALGORITHMS["sha256"]


def file_digest(algorithm: Algorithm, size: int, root_hash: bytes) -> bytes:
    """Return the fs-verity digest of a file of `size` bytes whose Merkle tree has `root_hash`."""
    return algorithm.new(DESCRIPTOR.pack(1, algorithm.number, _LOG_BLOCK_SIZE, 0, 0, size, root_hash, b"")).digest()
