"""Objects and Merkle trees that somebody has changed: what is wrong fails alone, all else reads on."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from cfsfuse.basedirs import RECORDED_TREES
from cfsfuse.verity.digest import ALGORITHMS
from cfsfuse.verity.merkle import Geometry, build
from integration.mounts import (
    BLOCK,
    Stage,
    digest_of,
    drop_caches,
    flip,
    noise,
    put_object,
    stage,
    wrong_blocks,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SHA256 = ALGORITHMS["sha256"]

_MAPPED_READ = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sys.stdout.buffer.write(mapped[int(sys.argv[2]) * 4096 : (int(sys.argv[2]) + 1) * 4096])
"""


@dataclass(frozen=True)
class Big:
    """An image with one file, `big`, and where everything that belongs to it is.

    `bad` is the block that tests change, at its byte `at`.
    """

    stage: Stage
    content: bytes
    name: str
    bad: int
    at: int = 1234

    @property
    def file(self) -> str:
        return self.stage.at("big")

    @property
    def object(self) -> str:
        return self.stage.object(self.name)

    @property
    def recorded(self) -> str:
        return self.stage.object(RECORDED_TREES.decode() + self.name)

    @property
    def cached(self) -> str:
        return f"{self.stage.cache}/cfsfuse/merkle/{self.name}"

    @property
    def geometry(self) -> Geometry:
        return Geometry(SHA256, len(self.content))

    def block(self, index: int) -> bytes:
        """Return a block of the file as it should be."""
        return self.content[index * BLOCK : (index + 1) * BLOCK]

    def flip(self, block: int | None = None) -> None:
        """Change a block of the object, or change it back."""
        flip(self.object, (self.bad if block is None else block) * BLOCK + self.at)

    def finding(self, block: int | None = None) -> str:
        """Return a pattern of the log's line for a block changed by `flip`."""
        index = self.bad if block is None else block
        expected, found = (SHA256.new(data).hexdigest() for data in (self.block(index), self.flipped(index)))
        return f"^ERROR /big: object {self.name}: hash of block {index}: expected {expected}, found {found}$"

    def flipped(self, block: int) -> bytes:
        """Return a block as `flip` leaves it."""
        content = bytearray(self.block(block))
        content[self.at] ^= 0x10
        return bytes(content)

    def wrong(self, *, direct: bool = False) -> dict[int, bytes | int]:
        """Read all of the file; return what is not as it should be, by block."""
        return wrong_blocks(self.file, self.content, direct=direct)


@contextlib.contextmanager
def stage_of(size: int, bad: int) -> Iterator[Big]:
    with stage() as made:
        recipe = made.recipe()
        content = noise(size, "big")
        name = recipe.file("/big", content)
        recipe.build(made.image)
        yield Big(made, content, name, bad)


@pytest.fixture
def huge() -> Iterator[Big]:
    """64 MiB: a tree of two levels, with 128 blocks in the lower one."""
    with stage_of(64 << 20, 12345) as made:
        yield made


@pytest.fixture
def big() -> Iterator[Big]:
    """As few blocks as show everything: a tree of two levels, with 8 blocks in the lower one."""
    with stage_of(4 << 20, 777) as made:
        yield made


def record(big: Big) -> str:
    """Record the tree, as fsverity(1) writes it or, where that is missing, as we do: the same bytes."""
    os.makedirs(os.path.dirname(big.recorded))
    if shutil.which("fsverity"):
        command = ["fsverity", "digest", "--compact", f"--out-merkle-tree={big.recorded}", big.object]
        subprocess.run(command, check=True, capture_output=True)
    else:
        with open(big.recorded, "wb") as file:
            os.ftruncate(file.fileno(), big.geometry.tree_size)
            build(big.geometry, [big.content], lambda at, block: os.pwrite(file.fileno(), block, at))
    return big.recorded


def let_cache(big: Big) -> str:
    """Let the first mount compute and cache the tree, while the object is good."""
    with big.stage.mounted(), open(big.file, "rb") as file:
        assert file.read(10) == big.content[:10]
    assert os.path.getsize(big.cached) == big.geometry.tree_size
    return big.cached


TREES = {"cached": let_cache, "recorded": record}
with_trees = pytest.mark.parametrize("make_tree", TREES.values(), ids=TREES)


def mapped_read(path: str, block: int) -> tuple[int, bytes]:
    """Read a block through mmap in a child; return how the child ended, and what it read."""
    done = subprocess.run([sys.executable, "-c", _MAPPED_READ, path, str(block)], capture_output=True, check=False)
    return done.returncode, done.stdout


def dd(path: str, block: int) -> tuple[int, bytes]:
    words = ["dd", f"if={path}", "bs=4096", f"skip={block}", "count=1", "status=none"]
    done = subprocess.run(words, capture_output=True, check=False)
    return done.returncode, done.stdout


@with_trees
def test_one_flipped_byte_costs_one_block(huge: Big, make_tree: Callable[[Big], str]) -> None:
    make_tree(huge)
    huge.flip()
    neighbours = (huge.bad - 1, huge.bad + 1)
    for remounted in range(2):
        drop_caches()
        with huge.stage.mounted():
            for block in neighbours:
                assert dd(huge.file, block) == (0, huge.block(block))
            assert dd(huge.file, huge.bad) == (1, b"")
            assert huge.wrong() == {huge.bad: errno.EIO}
            if remounted:  # a request for each block: once is enough
                assert huge.wrong(direct=True) == {huge.bad: errno.EIO}
            for block in neighbours:
                assert mapped_read(huge.file, block) == (0, huge.block(block))
            assert mapped_read(huge.file, huge.bad) == (-signal.SIGBUS, b"")
            assert dd(huge.file, huge.bad) == (1, b"")
        huge.stage.claim(huge.finding(), remounted + 1)


@pytest.mark.parametrize("block", [0, -1], ids=["first", "last"])
def test_a_block_at_the_edge_fails_alone(big: Big, block: int) -> None:
    record(big)
    index = block % big.geometry.data_blocks
    big.flip(index)
    with big.stage.mounted():
        assert big.wrong() == {index: errno.EIO}
    big.stage.claim(big.finding(index))


def test_a_last_block_that_is_not_full_fails_alone() -> None:
    with stage_of((2 << 20) + 1235, 512) as big:
        let_cache(big)
        with big.stage.mounted():
            assert big.wrong() == {}
        big.flip()
        with big.stage.mounted():
            assert big.wrong() == {big.bad: errno.EIO}
        expected, found = (SHA256.new(block.ljust(BLOCK, b"\0")).hexdigest() for block in last_block(big))
        big.stage.claim(f"^ERROR /big: .* block 512: expected {expected}, found {found}$")


def last_block(big: Big) -> tuple[bytes, bytes]:
    return big.block(big.bad), big.flipped(big.bad)


def test_large_requests_get_what_is_before_the_bad_block(big: Big) -> None:
    record(big)
    big.flip()
    with big.stage.mounted(), open(big.file, "rb", buffering=0) as file:
        assert file.read(len(big.content)) == big.content[: big.bad * BLOCK]
        with pytest.raises(OSError, match="Input/output error"):
            file.read(1)
    big.stage.claim(big.finding())


def test_without_any_tree_a_damaged_object_is_refused_as_a_whole(big: Big) -> None:
    big.flip()
    with big.stage.mounted():
        for _ in range(3):
            with pytest.raises(OSError, match="Input/output error"):
                open(big.file, "rb").close()
        assert not os.path.exists(big.cached)
        big.flip()
        assert big.wrong() == {}
        assert os.path.exists(big.cached)
    expected = big.name.replace("/", "")
    found = digest_of(
        big.content[: big.bad * BLOCK] + big.flipped(big.bad) + big.content[(big.bad + 1) * BLOCK :]
    ).hex()
    big.stage.claim(f"^ERROR /big: object {big.name}: fs-verity digest: expected {expected}, found {found}$")


def in_a_leaf_block(path: str) -> None:
    flip(path, 2 * BLOCK + 5)


def in_the_top_block(path: str) -> None:
    flip(path, 40)


def garbage(path: str) -> None:
    size = os.path.getsize(path)
    with open(path, "wb") as file:
        file.write(noise(size, "garbage"))


DAMAGES = {"leaf": in_a_leaf_block, "top": in_the_top_block, "garbage": garbage}
with_damages = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)


@with_damages
@with_trees
def test_a_corrupted_tree_is_ignored_and_replaced(
    big: Big, make_tree: Callable[[Big], str], damage: Callable[[str], None]
) -> None:
    tree = make_tree(big)
    with open(tree, "rb") as file:
        good = file.read()
    damage(tree)
    for _ in range(2):
        with big.stage.mounted():
            assert big.wrong() == {}
        big.stage.claim(rf"^WARNING {re.escape(tree)}: .*: it is ignored$")
        with open(tree, "rb") as file:
            assert file.read() == good


def test_one_flipped_byte_costs_one_block_beside_a_corrupted_tree(huge: Big) -> None:
    tree = record(huge)
    in_a_leaf_block(tree)
    huge.flip()
    for remounted in range(2):
        with huge.stage.mounted():
            assert huge.wrong() == {huge.bad: errno.EIO}
        huge.stage.claim(rf"^WARNING {re.escape(tree)}: ", remounted + 1)
        huge.stage.claim(huge.finding(), remounted + 1)


@with_trees
@pytest.mark.parametrize("damage", [in_a_leaf_block, in_the_top_block], ids=["leaf", "top"])
def test_a_corrupted_tree_of_a_corrupted_object(
    big: Big, make_tree: Callable[[Big], str], damage: Callable[[str], None]
) -> None:
    tree = make_tree(big)
    damage(tree)
    big.flip()
    with big.stage.mounted():
        assert big.wrong() == {big.bad: errno.EIO}
        assert big.wrong(direct=True) == {big.bad: errno.EIO}
        big.stage.claim(rf"^WARNING {re.escape(tree)}: ")
        big.stage.claim(big.finding())
        big.flip()
        assert big.wrong() == {}


def test_where_object_and_tree_are_damaged_together_only_that_group_fails(big: Big) -> None:
    """Neither says what is right there; the hash block is that of 128 blocks, and all the others read."""
    in_a_leaf_block(record(big))
    big.flip(130)
    group = range(128, 256)
    with big.stage.mounted():
        wrong = big.wrong()
        assert set(wrong.values()) == {errno.EIO}
        assert 130 in wrong
        assert set(wrong) <= set(group)
        big.stage.claim(rf"^WARNING {re.escape(big.recorded)}: ")
        big.flip(130)
        assert big.wrong() == {}
    assert all("/big: object" in line for line in big.stage.claim("^ERROR", len(big.stage.log_lines()) - 1))


def test_garbage_for_a_tree_of_a_corrupted_object(big: Big) -> None:
    garbage(record(big))
    big.flip()
    with big.stage.mounted(), pytest.raises(OSError, match="Input/output error"):
        open(big.file, "rb").close()
    big.stage.claim(rf"^WARNING {re.escape(big.recorded)}: ")
    big.stage.claim("^ERROR /big: object .*: fs-verity digest: expected")


def test_trees_of_the_wrong_size_and_kind_are_ignored(big: Big) -> None:
    with open(record(big), "ab") as file:
        file.write(b"x")
    os.makedirs(big.cached)
    with big.stage.mounted():
        assert big.wrong() == {}


def test_changes_while_mounted_are_noticed_and_forgotten(big: Big) -> None:
    """Of a file that has been read only in part, in place and by another file under its name."""
    record(big)
    with big.stage.mounted(), open(big.file, "rb", buffering=0) as held:
        assert held.read(BLOCK) == big.block(0)
        big.flip()
        assert big.wrong() == {big.bad: errno.EIO}
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(held.fileno(), BLOCK, big.bad * BLOCK)
        big.flip()
        assert os.pread(held.fileno(), BLOCK, big.bad * BLOCK) == big.block(big.bad)
        assert big.wrong() == {}
    big.stage.claim(big.finding())


def test_an_object_restored_by_another_file_reads_again_without_opening_anew(big: Big) -> None:
    record(big)
    big.flip()
    with big.stage.mounted(), open(big.file, "rb", buffering=0) as held:
        for _ in range(3):
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(held.fileno(), BLOCK, big.bad * BLOCK)
        with open(big.object + ".new", "wb") as file:
            file.write(big.content)
        os.rename(big.object + ".new", big.object)
        assert os.pread(held.fileno(), BLOCK, big.bad * BLOCK) == big.block(big.bad)
        assert big.wrong() == {}
    big.stage.claim(big.finding())


def test_each_finding_is_logged_once_for_each_file(big: Big) -> None:
    record(big)
    big.flip()
    with big.stage.mounted(), open(big.file, "rb", buffering=0) as held:
        for block in (big.bad, big.bad, big.bad + 100, big.bad):
            with contextlib.suppress(OSError):
                os.pread(held.fileno(), BLOCK, block * BLOCK)
        big.flip(big.bad + 100)
        drop_caches()
        with open(big.file, "rb", buffering=0) as other:
            for _ in range(2):
                with contextlib.suppress(OSError):
                    os.pread(other.fileno(), BLOCK, (big.bad + 101) * BLOCK)
                    os.pread(other.fileno(), BLOCK, (big.bad + 100) * BLOCK)
    big.stage.claim(big.finding())
    big.stage.claim(big.finding(big.bad + 100))


@pytest.fixture
def small() -> Iterator[Stage]:
    """An image with small files; `shared/a` and `shared/b` use one object."""
    with stage() as made:
        recipe = made.recipe()
        recipe.directory("/shared")
        for name in ("shared/a", "shared/b"):
            recipe.file(f"/{name}", CONTENTS[name])
        for name in ("kilobyte", "odd", "mebibyte"):
            recipe.file(f"/{name}", CONTENTS[name])
        recipe.build(made.image)
        yield made


CONTENTS = {
    "shared/a": noise(5000, "shared"),
    "shared/b": noise(5000, "shared"),
    "kilobyte": noise(1024),
    "odd": noise(100_001),
    "mebibyte": noise(1 << 20),
}


def failures(made: Stage) -> dict[str, int]:
    """Read everything; return the errno of what cannot be read, and fail on a wrong byte."""
    failed = {}
    for name, content in CONTENTS.items():
        try:
            with open(made.at(name), "rb") as file:
                assert file.read() == content, name
        except OSError as error:
            failed[name] = error.errno or 0
    return failed


@pytest.mark.parametrize("names", [("kilobyte",), ("odd",), ("mebibyte",), ("shared/a", "shared/b")])
def test_a_small_object_fails_for_exactly_the_files_that_use_it(small: Stage, names: tuple[str, ...]) -> None:
    content = CONTENTS[names[0]]
    object_name = put_object(small.store, content)
    path = small.object(object_name)
    flip(path, len(content) - 1)
    damaged = bytearray(content)
    damaged[-1] ^= 0x10
    digest = object_name.replace("/", "")
    finding = f"object {object_name}: fs-verity digest: expected {digest}, found {digest_of(damaged).hex()}$"
    for remounted in range(2):
        with small.mounted():
            assert failures(small) == dict.fromkeys(names, errno.EIO)
            assert failures(small) == dict.fromkeys(names, errno.EIO)
        for name in names:
            small.claim(f"^ERROR /{name}: {finding}", remounted + 1)
    flip(path, len(content) - 1)
    with small.mounted():
        assert failures(small) == {}


def test_a_small_object_that_is_restored_reads_again(small: Stage) -> None:
    path = small.object(put_object(small.store, CONTENTS["odd"]))
    flip(path, 50_000)
    with small.mounted():
        assert failures(small) == {"odd": errno.EIO}
        flip(path, 50_000)
        assert failures(small) == {}
        with open(path + ".bad", "wb") as file:
            file.write(noise(len(CONTENTS["odd"]), "bad"))
        os.rename(path + ".bad", path)
        # What has been verified may be served on; a wrong byte may not.
        assert set(failures(small).values()) <= {errno.EIO}
        put_object(small.store, CONTENTS["odd"])
        assert failures(small) == {}
    assert {
        line for line in small.claim("^ERROR /odd: object", len(small.log_lines())) if "expected" not in line
    } == set()


def test_objects_of_the_wrong_size_and_missing_ones(small: Stage) -> None:
    longer = small.object(put_object(small.store, CONTENTS["kilobyte"]))
    shorter = small.object(put_object(small.store, CONTENTS["mebibyte"]))
    missing = small.object(put_object(small.store, CONTENTS["odd"]))
    with open(longer, "ab") as file:
        file.write(b"\0")
    os.truncate(shorter, 4096)
    os.unlink(missing)
    with small.mounted():
        for _ in range(2):
            assert failures(small) == {"kilobyte": errno.EIO, "mebibyte": errno.EIO, "odd": errno.ENOENT}
    small.claim("^ERROR /kilobyte: object .*: 1025 bytes, but the image records 1024$")
    small.claim("^ERROR /mebibyte: object .*: 4096 bytes, but the image records 1048576$")
    small.claim("^ERROR /odd: object .*: not in any base directory$")


def test_a_big_object_truncated_while_mounted(big: Big) -> None:
    record(big)
    with big.stage.mounted(), open(big.file, "rb", buffering=0) as held:
        assert held.read(BLOCK) == big.block(0)
        os.truncate(big.object, 10 * BLOCK)
        assert os.pread(held.fileno(), BLOCK, 9 * BLOCK) in (big.block(9), b"")
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(held.fileno(), BLOCK, big.bad * BLOCK)
    # An error makes the next try look anew; whether the kernel tries again is its own affair.
    finding = f"^ERROR /big: object {big.name}: "
    big.stage.claim(rf"{finding}has nothing at byte \d+: it has been truncated$")
    size = len(big.content)
    big.stage.claim(f"{finding}{10 * BLOCK} bytes, but the image records {size}$", len(big.stage.unclaimed()))


def test_without_verification_the_bytes_are_those_of_the_object(big: Big) -> None:
    big.flip()
    with big.stage.mounted("noverity"):
        assert big.wrong() == {big.bad: big.flipped(big.bad)}


def test_where_verification_is_required_a_file_without_a_digest_is_refused() -> None:
    with stage() as made:
        recipe = made.recipe()
        content = noise(3000)
        recipe.file("/good", content)
        recipe.redirected("/unverifiable", put_object(made.store, content), content, digest=False)
        recipe.build(made.image)
        with made.mounted():
            for name in ("good", "unverifiable"):
                with open(made.at(name), "rb") as file:
                    assert file.read() == content
        with made.mounted("verity"):
            with open(made.at("good"), "rb") as file:
                assert file.read() == content
            with pytest.raises(OSError, match="Input/output error"):
                open(made.at("unverifiable"), "rb").close()
        made.claim("^ERROR /unverifiable: object .*: the image records no digest")
