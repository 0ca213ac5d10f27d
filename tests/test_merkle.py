"""Merkle geometry and trees, against fsverity(1) and against damage."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from cfsfuse.errors import TreeMismatch
from cfsfuse.lru import Lru
from cfsfuse.verity.digest import ALGORITHMS, SHA256, file_digest
from cfsfuse.verity.merkle import Geometry, VerifiedTree, build, content_digest, leaf_hashes, salvage
from tests.support import random_bytes, tree_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cfsfuse.verity.digest import Algorithm
    from cfsfuse.verity.merkle import HashBlocks

BLOCK = 4096
MIB = 1 << 20
SIZES = [0, 1, 4095, 4096, 4097, 128 * 4096 - 1, 128 * 4096, 128 * 4096 + 1, 129 * 4096, MIB - 1, MIB, MIB + 1]
# One block more than one hash block of hash blocks holds: three levels.
SPARSE = 128 * 128 * 4096 + 1

algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=list(ALGORITHMS))


def fsverity(path: Path, tree: Path, algorithm: Algorithm) -> str:
    if shutil.which("fsverity") is None:
        pytest.skip("fsverity is not installed (package fsverity)")
    command = [
        "fsverity",
        "digest",
        "--compact",
        f"--hash-alg={algorithm.name}",
        f"--out-merkle-tree={tree}",
        str(path),
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def chunks(path: Path, step: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while data := file.read(step):
            yield data


def build_file(path: Path, algorithm: Algorithm, step: int) -> tuple[bytes, str]:
    """Return the tree and the digest of a file read in pieces of `step` bytes."""
    geometry = Geometry(algorithm, path.stat().st_size)
    tree = bytearray(geometry.tree_size)

    def write(offset: int, block: bytes) -> None:
        assert len(block) == BLOCK
        tree[offset : offset + BLOCK] = block

    root_hash = build(geometry, chunks(path, step), write)
    return bytes(tree), file_digest(algorithm, geometry.size, root_hash).hex()


@algorithms
@pytest.mark.parametrize("size", SIZES)
def test_trees_and_digests_are_those_of_fsverity(tmp_path: Path, size: int, algorithm: Algorithm) -> None:
    path = tmp_path / "file"
    content = random_bytes(size, size)
    path.write_bytes(content)
    digest = fsverity(path, tmp_path / "tree", algorithm)
    recorded = (tmp_path / "tree").read_bytes()
    assert content_digest(algorithm, content).hex() == digest
    assert content_digest(algorithm, memoryview(content)).hex() == digest
    for step in (BLOCK, 7 * BLOCK, MIB, 1 << 30):
        assert build_file(path, algorithm, step) == (recorded, digest)


@algorithms
def test_tree_of_a_sparse_file_of_three_levels_is_that_of_fsverity(tmp_path: Path, algorithm: Algorithm) -> None:
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, SPARSE)
    digest = fsverity(path, tmp_path / "tree", algorithm)
    assert len(Geometry(algorithm, SPARSE).level_blocks) == 3
    assert build_file(path, algorithm, MIB) == ((tmp_path / "tree").read_bytes(), digest)


@algorithms
@pytest.mark.parametrize("size", [*SIZES, SPARSE, 1 << 40, (1 << 62) + 1])
def test_geometry_has_the_top_level_first_and_no_gaps(size: int, algorithm: Algorithm) -> None:
    geometry = Geometry(algorithm, size)
    at = 0
    for level in reversed(range(len(geometry.level_blocks))):
        below = geometry.level_blocks[level - 1] if level else geometry.data_blocks
        assert geometry.level_blocks[level] == -(-below // geometry.per_block)
        assert geometry.offset(level, 0) == at
        at = geometry.offset(level, geometry.level_blocks[level])
    assert geometry.tree_size == at
    if geometry.level_blocks:
        assert geometry.level_blocks[-1] == 1
    else:
        assert geometry.data_blocks <= 1


def test_leaf_hashes_pad_the_last_block() -> None:
    content = random_bytes(BLOCK + 1)
    expected = hashlib.sha256(content[:BLOCK]).digest() + hashlib.sha256(content[BLOCK:] + bytes(BLOCK - 1)).digest()
    assert leaf_hashes(SHA256, content) == expected
    assert leaf_hashes(SHA256, b"") == b""


class Tree:
    """A tree of several levels in memory, to be damaged."""

    def __init__(self, algorithm: Algorithm, blocks: int) -> None:
        self.content = random_bytes(blocks * BLOCK - 5, blocks)
        self.geometry = Geometry(algorithm, len(self.content))
        tree, root_hash = tree_of(self.content, algorithm)
        self.data = bytearray(tree)
        self.digest = file_digest(algorithm, len(self.content), root_hash)
        self.kept: HashBlocks = Lru(32)
        self.reads = 0
        self.waits: list[bool] = []

    def read(self, offset: int, length: int, *, wait: bool = True) -> bytes:
        self.reads += 1
        self.waits.append(wait)
        return bytes(self.data[offset : offset + length])

    def verified(self) -> VerifiedTree:
        return VerifiedTree(self.geometry, self.digest, self.read, self.kept)

    def damage(self, level: int, index: int, byte: int = 0) -> None:
        self.data[self.geometry.offset(level, index) + byte] ^= 0x40


@pytest.mark.parametrize(("name", "blocks"), [("sha256", 3), ("sha256", 130), ("sha512", 70)])
def test_every_flipped_block_is_found_and_no_other(name: str, blocks: int) -> None:
    algorithm = ALGORITHMS[name]
    tree = Tree(algorithm, blocks)
    verified = tree.verified()
    assert verified.wrong_block(0, tree.content) is None
    for block in range(blocks):
        damaged = bytearray(tree.content)
        at = min(block * BLOCK + 17 * block % BLOCK, len(damaged) - 1)
        damaged[at] ^= 1
        wrong = verified.wrong_block(0, damaged)
        assert wrong is not None
        assert wrong[0] == at // BLOCK == block
        assert wrong[1] == leaf_hashes(algorithm, tree.content[block * BLOCK : (block + 1) * BLOCK])
        assert wrong[2] == leaf_hashes(algorithm, damaged[block * BLOCK : (block + 1) * BLOCK])
        for first in (max(0, block - 1), block, block + 1):
            part = damaged[first * BLOCK : (first + 2) * BLOCK]
            assert (verified.wrong_block(first, part) is not None) == (first <= block)


@pytest.mark.parametrize("first", [0, 1, 126, 127, 128, 255, 256])
@pytest.mark.parametrize("count", [1, 2, 3, 128, 129, 130])
def test_data_across_hash_blocks_is_verified(first: int, count: int) -> None:
    tree = Tree(SHA256, 400)
    data = tree.content[first * BLOCK : (first + count) * BLOCK]
    verified = tree.verified()
    verified.leaves(first, count)
    reads = tree.reads
    assert verified.wrong_block(first, data) is None
    assert tree.reads == reads
    if data:
        wrong = verified.wrong_block(first, data[:-1] + bytes([data[-1] ^ 1]))
        assert wrong is not None
        assert wrong[0] == first + count - 1


@pytest.mark.parametrize(
    ("name", "level", "index"),
    [("sha256", 0, 0), ("sha256", 0, 3), ("sha256", 1, 0), ("sha512", 0, 5), ("sha512", 1, 0), ("sha512", 1, 1),
     ("sha512", 2, 0)],
)  # fmt: skip
@pytest.mark.parametrize("byte", [0, BLOCK - 1])
def test_damaged_hash_block_of_any_level_is_found(name: str, level: int, index: int, byte: int) -> None:
    algorithm = ALGORITHMS[name]
    tree = Tree(algorithm, 64 * 64 + 70 if name == "sha512" else 400)
    assert len(tree.geometry.level_blocks) == (3 if name == "sha512" else 2)
    tree.damage(level, index, byte)
    verified = tree.verified()
    below = tree.geometry.per_block ** (level + 1)
    with pytest.raises(TreeMismatch) as caught:
        verified.leaves(index * below, 1)
    assert (caught.value.level, caught.value.index) == (level, index)
    if level + 1 < len(tree.geometry.level_blocks) and index:
        verified.leaves(0, 1)  # what does not hang from it is fine
    # Nothing of a wrong block has been kept.
    tree.damage(level, index, byte)
    verified.leaves(index * below, 1)


def test_hash_blocks_of_another_place_are_not_accepted() -> None:
    tree = Tree(SHA256, 400)
    first, second = (slice(tree.geometry.offset(0, i), tree.geometry.offset(0, i + 1)) for i in range(2))
    tree.data[first], tree.data[second] = tree.data[second], tree.data[first]
    with pytest.raises(TreeMismatch):
        tree.verified().leaves(0, 1)


@pytest.mark.parametrize("change", [-1, 1, -4096])
def test_tree_of_a_file_of_another_size_is_not_accepted(change: int) -> None:
    tree = Tree(SHA256, 400)
    other = VerifiedTree(Geometry(SHA256, tree.geometry.size + change), tree.digest, tree.read, tree.kept)
    for _ in range(2):
        with pytest.raises(TreeMismatch):
            other.leaves(0, 1)
        tree.verified().leaves(0, 1)  # what is kept of the right size is none of the other's


def test_hash_blocks_are_kept_for_whoever_uses_the_same_tree() -> None:
    tree = Tree(SHA256, 128 * 3)
    tree.verified().leaves(0, 128 * 3)
    before = tree.reads
    assert before == 4
    tree.verified().leaves(0, 128 * 3)
    assert tree.reads == before


def test_hash_blocks_kept_are_bounded() -> None:
    tree = Tree(SHA256, 128 * 40)
    verified = tree.verified()
    for _ in range(2):
        for first in range(0, 128 * 40, 128):
            verified.leaves(first, 128)
    # One top block for all; the forty others do not all stay.
    assert 40 < tree.reads <= 2 * 40 + 2


class Salvage:
    """A recorded tree and one built from data that has been damaged since, and what can be saved of both."""

    def __init__(self, *, damaged_data: list[int], damaged_tree: list[tuple[int, int]]) -> None:
        self.tree = Tree(SHA256, 128 * 5)
        content = bytearray(self.tree.content)
        for block in damaged_data:
            content[block * BLOCK] ^= 1
        self.built = tree_of(bytes(content))[0]
        for level, index in damaged_tree:
            self.tree.damage(level, index)
        self.data = bytearray(len(self.built))
        self.saved = salvage(
            self.tree.geometry, self.tree.digest, [self.tree.read, self.read_built], self.read, self.write
        )

    def read_built(self, offset: int, length: int, *, wait: bool = True) -> bytes:
        assert wait
        return self.built[offset : offset + length]

    def read(self, offset: int, length: int, *, wait: bool = True) -> bytes:
        assert wait
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, block: bytes) -> None:
        self.data[offset : offset + len(block)] = block

    def readable(self) -> list[int]:
        """Return which of the five groups of 128 data blocks can be verified."""
        verified = VerifiedTree(self.tree.geometry, self.tree.digest, self.read, Lru(32))
        groups = []
        for group in range(5):
            first = group * 128
            try:
                wrong = verified.wrong_block(first, self.tree.content[first * BLOCK : (first + 128) * BLOCK])
            except TreeMismatch:
                continue
            assert wrong is None
            groups.append(group)
        return groups


@pytest.mark.parametrize(
    ("damaged_data", "damaged_tree", "saved", "readable"),
    [
        ([], [], True, [0, 1, 2, 3, 4]),
        ([7], [], True, [0, 1, 2, 3, 4]),
        ([], [(0, 0), (1, 0)], True, [0, 1, 2, 3, 4]),
        ([300], [(0, 0)], True, [0, 1, 2, 3, 4]),
        ([300], [(1, 0)], True, [0, 1, 2, 3, 4]),
        ([7], [(0, 0)], True, [1, 2, 3, 4]),
        ([7, 300], [(0, 0), (0, 1), (0, 4)], True, [1, 2, 3, 4]),
        ([300], [(0, 0), (1, 0)], False, []),
        ([0, 128, 256, 384, 512], [(0, i) for i in range(5)] + [(1, 0)], False, []),
    ],
    ids=[
        "nothing damaged", "data", "tree", "leaf here, data elsewhere", "top, data", "leaf and data in one group",
        "several", "top and leaf, data elsewhere", "everything",
    ],
)  # fmt: skip
def test_salvage_saves_what_either_tree_has_right(
    *,
    damaged_data: list[int],
    damaged_tree: list[tuple[int, int]],
    saved: bool,
    readable: list[int],
) -> None:
    case = Salvage(damaged_data=damaged_data, damaged_tree=damaged_tree)
    assert case.saved is saved
    if saved:
        assert case.readable() == readable


def test_salvage_remakes_the_top_from_a_sound_level_below() -> None:
    case = Salvage(damaged_data=[7], damaged_tree=[(1, 0)])
    assert case.saved
    assert case.readable() == [0, 1, 2, 3, 4]


def test_waiting_is_passed_on_to_the_reading_of_the_tree() -> None:
    tree = Tree(SHA256, 400)
    tree.verified().leaves(0, 1, wait=False)
    tree.kept.clear()
    tree.verified().leaves(0, 1)
    assert tree.waits == [False, False, True, True]
