"""Where Merkle trees come from: recorded, cached, computed, or put together from damaged ones."""

from __future__ import annotations

import os
import stat
import threading
from typing import TYPE_CHECKING, NamedTuple

import pytest

from cfsfuse.errors import DigestMismatch, ObjectError
from cfsfuse.verity.digest import ALGORITHMS
from tests.support import Store, flip, put, random_bytes, time_limit, tree_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cfsfuse.objects import ObjectStore
    from cfsfuse.tree import External

BLOCK = 4096
BLOCKS = 128 * 3  # three groups that a hash block covers, and a top block over them
CONTENT = random_bytes(BLOCKS * BLOCK - 7)
RECORDED, CACHED = "recorded", "cached"
DAMAGED = "it is ignored"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def readable(objects: ObjectStore, node: External) -> list[int]:
    """Open, read every block by itself; return those that read, which must then be right."""
    objects.open(node)
    good = []
    for block in range(-(-node.stat.size // BLOCK)):
        try:
            data = bytes(objects.read(node, block * BLOCK, BLOCK))
        except ObjectError:
            continue
        assert data == CONTENT[block * BLOCK : (block + 1) * BLOCK]
        good.append(block)
    return good


def all_but(*blocks: int) -> list[int]:
    return [block for block in range(BLOCKS) if block not in blocks]


def place(store: Store, where: str) -> tuple[External, Path]:
    """Add the object with a right tree; return its node and where the tree is."""
    node = store.add(CONTENT)
    if where == RECORDED:
        return node, store.record_tree(CONTENT)
    path = store.cached_tree(node)
    path.parent.mkdir(parents=True)
    path.write_bytes(tree_of(CONTENT)[0])
    return node, path


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=list(ALGORITHMS))
def test_computed_tree_is_cached_as_fsverity_lays_it_out(store: Store, algorithm: object) -> None:
    chosen = next(known for known in ALGORITHMS.values() if known is algorithm)
    node = store.add(CONTENT, algorithm=chosen)
    assert readable(store.open(), node) == all_but()
    tree = store.cached_tree(node)
    assert tree.read_bytes() == tree_of(CONTENT, chosen)[0]
    assert [path.name for path in tree.parent.iterdir()] == [tree.name]
    assert stat.S_IMODE(store.cache.stat().st_mode) == 0o700


@pytest.mark.parametrize("where", [RECORDED, CACHED])
def test_tree_that_is_there_is_used_without_reading_the_object(store: Store, where: str) -> None:
    node, _ = place(store, where)
    flip(store.path(), 9 * BLOCK)  # a tree computed now would not have the digest
    assert readable(store.open(), node) == all_but(9)


def test_recorded_tree_is_preferred_and_nothing_is_cached(store: Store) -> None:
    node, _ = place(store, RECORDED)
    store.open().open(node)
    assert not store.cached_tree(node).exists()


def test_recorded_tree_of_any_base_directory_is_used(tmp_path: Path) -> None:
    store = Store(tmp_path, bases=2)
    node = store.add(CONTENT)
    path = store.bases[1] / ".merkle/ab/object"
    path.parent.mkdir(parents=True)
    path.write_bytes(tree_of(CONTENT)[0])
    flip(store.path(), 0)
    assert readable(store.open(cache=None), node) == all_but(0)


@pytest.mark.parametrize("where", [RECORDED, CACHED])
@pytest.mark.parametrize(
    "offset", [0, BLOCK, 2 * BLOCK + 100, 4 * BLOCK - 1], ids=["top", "first leaf", "middle leaf", "padding of a leaf"]
)
def test_damaged_tree_is_replaced_with_one_warning(
    store: Store, where: str, offset: int, claim: Callable[[str, int], list[str]]
) -> None:
    node, path = place(store, where)
    right = path.read_bytes()
    flip(path, offset)
    objects = store.open()
    assert readable(objects, node) == all_but()
    assert readable(objects, node) == all_but()
    (warning,) = claim(DAMAGED, 1)
    assert str(path) in warning
    assert path.read_bytes() == right
    assert readable(store.open(), node) == all_but()


@pytest.mark.parametrize("where", [RECORDED, CACHED])
@pytest.mark.parametrize("size", [0, BLOCK, 4 * BLOCK - 1, 5 * BLOCK])
def test_tree_of_another_size_is_ignored(store: Store, where: str, size: int) -> None:
    node, path = place(store, where)
    os.truncate(path, size)
    assert readable(store.open(), node) == all_but()


@pytest.mark.parametrize("where", [RECORDED, CACHED])
@pytest.mark.parametrize("kind", ["fifo", "directory", "symlink", "dangling"])
def test_tree_that_is_no_regular_file_is_ignored(store: Store, where: str, kind: str) -> None:
    node, path = place(store, where)
    os.replace(path, path.with_name("elsewhere"))
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("elsewhere" if kind == "symlink" else "/nowhere")
    with time_limit(20):
        assert readable(store.open(), node) == all_but()


@pytest.mark.parametrize("where", [RECORDED, CACHED])
def test_tree_of_another_object_is_replaced(store: Store, where: str, claim: Callable[[str, int], list[str]]) -> None:
    node, path = place(store, where)
    path.write_bytes(tree_of(random_bytes(len(CONTENT), 1))[0])
    assert readable(store.open(), node) == all_but()
    claim(DAMAGED, 1)
    assert path.read_bytes() == tree_of(CONTENT)[0]


@pytest.mark.parametrize("damage", [0, 2 * BLOCK])
def test_tree_damaged_while_open_is_noticed_or_not_needed(
    store: Store, damage: int, claim: Callable[[str, int], list[str]]
) -> None:
    node, path = place(store, RECORDED)
    objects = store.open()
    objects.open(node)
    assert bytes(objects.read(node, 0, BLOCK)) == CONTENT[:BLOCK]
    flip(path, damage)
    assert readable(objects, node) == all_but()
    claim(DAMAGED, 1 if damage else 0)


def test_tree_deleted_or_truncated_while_open(store: Store, claim: Callable[[str, int], list[str]]) -> None:
    node, path = place(store, RECORDED)
    objects = store.open()
    objects.open(node)
    os.truncate(path, BLOCK)
    assert readable(objects, node) == all_but()
    claim(DAMAGED, 1)
    path.unlink()
    assert readable(objects, node) == all_but()


class Case(NamedTuple):
    """A damaged block of data, damaged places in the tree, and the blocks that can be read all the same."""

    data: int
    tree: list[int]
    readable: list[int]


CASES = {
    "leaf over the damaged data": Case(5, [BLOCK], all_but(*range(128))),
    "leaf elsewhere": Case(200, [BLOCK], all_but(200)),
    "top": Case(200, [0], all_but(200)),
    "two leaves elsewhere": Case(5, [2 * BLOCK, 3 * BLOCK], all_but(5)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("where", [RECORDED, CACHED])
def test_damaged_tree_of_a_damaged_object_serves_what_either_proves(
    store: Store, where: str, case: Case, claim: Callable[[str, int], list[str]]
) -> None:
    node, path = place(store, where)
    for offset in case.tree:
        flip(path, offset)
    flip(store.path(), case.data * BLOCK)
    objects = store.open()
    for _ in range(2):
        assert readable(objects, node) == case.readable
    claim(DAMAGED, 1)


def test_nothing_can_be_told_of_a_damaged_object_without_a_tree(store: Store) -> None:
    node = store.add(CONTENT)
    flip(store.path(), 5)
    objects = store.open()
    for _ in range(3):
        with pytest.raises(DigestMismatch):
            objects.open(node)
    assert not store.cached_tree(node).exists()


@pytest.mark.parametrize("how", ["in place", "rename"])
def test_object_restored_after_salvaging_reads_whole(
    store: Store, how: str, claim: Callable[[str, int], list[str]]
) -> None:
    node, path = place(store, RECORDED)
    flip(path, BLOCK)
    flip(store.path(), 5 * BLOCK)
    objects = store.open()
    assert readable(objects, node) == all_but(*range(128))
    claim(DAMAGED, 1)
    put(store, CONTENT, how)
    readable(objects, node)  # an error may still be about the descriptor that was kept
    assert readable(objects, node) == all_but()


def test_no_cache_directory_computes_and_keeps_in_memory(store: Store) -> None:
    node = store.add(CONTENT)
    objects = store.open(cache=None)
    assert readable(objects, node) == all_but()
    flip(store.path(), 0)
    assert readable(objects, node) == all_but(0)
    assert not store.cache.exists()


def test_cache_that_cannot_be_made_is_said_once(store: Store, claim: Callable[[str, int], list[str]]) -> None:
    node = store.add(CONTENT)
    store.cache.write_bytes(b"in the way")
    assert readable(store.open(), node) == all_but()
    (warning,) = claim("no cache of Merkle trees", 1)
    assert str(store.cache) in warning


@pytest.mark.parametrize("obstacle", ["file", "symlink"])
def test_cache_with_something_in_the_way_still_reads(store: Store, tmp_path: Path, obstacle: str) -> None:
    node = store.add(CONTENT)
    store.cache.mkdir()
    (tmp_path / "outside").mkdir()
    if obstacle == "file":
        store.cached_tree(node).parent.write_bytes(b"")
    else:
        store.cached_tree(node).parent.symlink_to(tmp_path / "outside")
    assert readable(store.open(), node) == all_but()
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.parametrize("damage", [0, BLOCK])
def test_damaged_tree_that_cannot_be_replaced_is_computed_and_cached(
    store: Store, damage: int, claim: Callable[[str, int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    node, path = place(store, RECORDED)
    flip(path, damage)
    damaged = path.read_bytes()
    renamed: list[object] = []
    rename = os.rename

    def read_only(source: bytes, target: bytes, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        renamed.append(target)
        if target == b"object":
            raise OSError(30, "Read-only file system")
        rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "rename", read_only)
    objects = store.open()
    assert readable(objects, node) == all_but()
    assert readable(objects, node) == all_but()
    claim(DAMAGED, 1)
    assert path.read_bytes() == damaged
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["object"]
    assert store.cached_tree(node).read_bytes() == tree_of(CONTENT)[0]
    assert renamed[0] == b"object"


def test_what_needs_work_is_not_done_without_waiting(store: Store) -> None:
    node = store.add(CONTENT)
    objects = store.open()
    with pytest.raises(BlockingIOError):
        objects.open(node, wait=False)
    objects.open(node)
    objects.open(node, wait=False)


def test_many_threads_compute_one_tree(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    node = store.add(CONTENT)
    objects = store.open()
    failures: list[BaseException] = []
    reads: list[int] = []
    preadv = os.preadv

    def counted(*arguments: object) -> int:
        done = preadv(*arguments)  # type: ignore[arg-type]  # passed on as they are
        if done > 64 * BLOCK:
            reads.append(done)
        return done

    monkeypatch.setattr(os, "preadv", counted)
    start = threading.Barrier(8)

    def work() -> None:
        try:
            start.wait()
            objects.open(node)
            assert bytes(objects.read(node, 0, BLOCK)) == CONTENT[:BLOCK]
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sum(reads) <= len(CONTENT)
