"""`_lanes.c` against hashlib, for each kind of vector registers that this processor has."""

from __future__ import annotations

import hashlib
import mmap
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

# Not pytest.importorskip: where the tests run there is a C compiler, and the lanes are not to be missing unnoticed.
from cfsfuse.verity._lanes import LANES, SHA_INSTRUCTIONS, VARIANTS, sha256_blocks
from cfsfuse.verity.digest import ALGORITHMS, BLOCK_SIZE, SHA256, Bytes, SideBySide, least_side_by_side
from cfsfuse.verity.merkle import content_digest, leaf_hashes

variants = pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=VARIANTS)


def one_by_one(data: bytes) -> bytes:
    blocks = [data[at : at + BLOCK_SIZE].ljust(BLOCK_SIZE, b"\0") for at in range(0, len(data), BLOCK_SIZE)]
    return b"".join(hashlib.sha256(block).digest() for block in blocks)


@variants
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 15 * 4096, 16 * 4096 - 1, 16 * 4096, 16 * 4096 + 1, 1 << 20])
def test_equals_hashlib(variant: int, size: int) -> None:
    data = Random(size).randbytes(size)
    assert sha256_blocks(data, variant) == one_by_one(data)


@given(data=st.binary(max_size=64), size=st.integers(0, 40 * BLOCK_SIZE), variant=st.integers(0, len(VARIANTS) - 1))
def test_equals_hashlib_for_any_size(data: bytes, size: int, variant: int) -> None:
    content = (data * (size // max(1, len(data)) + 1))[:size]
    assert sha256_blocks(content, variant) == one_by_one(content)


@variants
def test_each_block_has_its_own_digest(variant: int) -> None:
    data = b"".join(bytes([number]) * BLOCK_SIZE for number in range(35))
    digests = sha256_blocks(data, variant)
    assert len({digests[at : at + 32] for at in range(0, len(digests), 32)}) == 35
    for number in range(35):
        assert digests[32 * number : 32 * number + 32] == hashlib.sha256(bytes([number]) * BLOCK_SIZE).digest()


@variants
def test_takes_any_buffer_at_any_address(variant: int) -> None:
    data = Random(1).randbytes(20 * BLOCK_SIZE + 77)
    expected = one_by_one(data[13:])
    mapped = mmap.mmap(-1, len(data))
    mapped[:] = data
    buffers: list[Bytes] = [bytearray(data[13:]), memoryview(data)[13:], memoryview(mapped)[13:]]
    assert [sha256_blocks(buffer, variant) for buffer in buffers] == [expected] * 3


def test_works_in_several_threads() -> None:
    contents = [Random(seed).randbytes(1 << 20) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(sha256_blocks, contents * 4)) == [one_by_one(content) for content in contents] * 4


def test_refuses_what_is_no_buffer() -> None:
    with pytest.raises(TypeError):
        sha256_blocks("text")  # type: ignore[arg-type]  # that is the point
    with pytest.raises(BufferError):
        sha256_blocks(memoryview(bytes(8 * BLOCK_SIZE))[::2])
    for variant in (-1, len(VARIANTS), 1 << 32):
        with pytest.raises(IndexError):
            sha256_blocks(b"", variant)


@pytest.mark.parametrize(
    ("variants", "has_sha", "least"),
    [
        (("avx512", "avx2", "plain"), False, 3),
        (("avx512", "avx2", "plain"), True, 10),
        (("avx2", "plain"), False, 9),
        (("avx2", "plain"), True, None),
        (("plain",), False, None),
        (("plain",), True, None),
    ],
)
def test_is_used_where_it_is_faster(variants: tuple[str, ...], least: int | None, *, has_sha: bool) -> None:
    assert least_side_by_side(variants, has_sha=has_sha) == least


def test_the_algorithm_has_it() -> None:
    least = least_side_by_side(VARIANTS, has_sha=bool(SHA_INSTRUCTIONS))
    assert SHA256.side_by_side == (None if least is None else (sha256_blocks, LANES, least))
    assert ALGORITHMS["sha512"].side_by_side is None


@pytest.mark.parametrize("least", [3, 9, 16])
@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 4, 8, 9, 15, 16, 17, 18, 19, 24, 25, 32, 33, 35])
@pytest.mark.parametrize("tail", [0, 1, 4095])
def test_leaves_are_the_same_either_way(least: int, blocks: int, tail: int) -> None:
    data = Random(blocks).randbytes(max(0, blocks * BLOCK_SIZE - tail))
    taken: list[int] = []

    def hashes(part: Bytes) -> bytes:
        taken.append(-(-len(part) // BLOCK_SIZE))
        return sha256_blocks(part)

    algorithm = SHA256._replace(side_by_side=SideBySide(hashes, 16, least))
    assert leaf_hashes(algorithm, data) == one_by_one(data)
    by_lanes = blocks if blocks % 16 in range(least, 16) else blocks - blocks % 16
    assert taken == ([by_lanes] if by_lanes else [])


def test_does_without() -> None:
    """Where it could not be compiled, hashlib does it all."""
    content = Random(2).randbytes(300_000)
    program = """if True:
        import sys
        sys.modules["cfsfuse.verity._lanes"] = None
        from cfsfuse.verity.digest import SHA256
        from cfsfuse.verity.merkle import content_digest
        assert SHA256.side_by_side is None
        print(content_digest(SHA256, sys.stdin.buffer.read()).hex())"""
    done = subprocess.run([sys.executable, "-c", program], input=content, capture_output=True, check=True)
    assert done.stdout.decode().strip() == content_digest(SHA256, content).hex()
