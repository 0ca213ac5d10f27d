"""The file system without a session: reads, errors that are reported once, and what is under way."""

from __future__ import annotations

import functools
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from cfsfuse.basedirs import BaseDirectories, Descriptor
from cfsfuse.erofs.overlay import Digest
from cfsfuse.errors import CfsError, DigestMismatch, ImageError, ObjectError, ObjectMissing, ObjectUnusable
from cfsfuse.objects import WHOLE_FILE_MAX
from cfsfuse.tree import External
from cfsfuse.trees import TreeNeeded
from cfsfuse.verification import Verification
from cfsfuse.verity.digest import SHA256
from cfsfuse.verity.merkle import content_digest
from cfsfuse.vfs import Vfs
from tests import imagemaker as im
from tests.support import Store, flip, random_bytes, reader_of, reported, sample

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cfsfuse.erofs.dirent import Dirent
    from cfsfuse.erofs.image import Nid
    from cfsfuse.erofs.inode import Inode

LARGE = random_bytes((1 << 20) + 5000)
SMALL = random_bytes(9000)


def external(content: bytes, path: bytes, **fields: object) -> im.Entry:
    return im.external(len(content), path, content_digest(SHA256, content), **fields)


class Mounted:
    """A vfs over an image and a store of a few objects, and its nids by path."""

    def __init__(self, folder: Path, verification: Verification = Verification.RECORDED) -> None:
        self.store = Store(folder)
        self.store.add(LARGE, "aa/large")
        self.store.add(SMALL, "bb/small")
        entries = {
            b"large": external(LARGE, b"aa/large"),
            b"small": external(SMALL, b"bb/small"),
            b"missing": external(SMALL, b"cc/missing"),
            b"no path": im.external(5, None, bytes(32)),
            b"no digest": im.external(len(SMALL), b"bb/small", None),
            b"inline": im.file(b"0123456789"),
            b"empty": im.file(),
            b"sparse": im.file(layout=im.CHUNKED, size=10_000, i_u=31),
            b"link": im.symlink(b"target"),
            b"dir": im.directory({b"same": external(SMALL, b"bb/small")}),
        }
        self.made = im.make(im.directory(entries))
        self.vfs = Vfs(reader_of(self.made), self.store.open(verification))

    def nid(self, path: bytes) -> int:
        return self.made.at(path).nid

    async def read(self, path: bytes, offset: int = 0, length: int = 1 << 30) -> bytes:
        return bytes(await self.vfs.read(self.nid(path), offset, length))

    async def open(self, path: bytes) -> None:
        await self.vfs.open(self.nid(path))


@pytest.fixture
def mounted(tmp_path: Path) -> Mounted:
    return Mounted(tmp_path)


async def test_every_kind_of_file_reads(mounted: Mounted) -> None:
    for path, content in {
        b"large": LARGE,
        b"small": SMALL,
        b"no digest": SMALL,
        b"dir/same": SMALL,
        b"inline": b"0123456789",
        b"empty": b"",
        b"sparse": bytes(10_000),
    }.items():
        await mounted.open(path)
        assert await mounted.read(path) == content
        size = len(content)
        for offset, length in ((0, 1), (1, 5), (3, 4096), (size - 1, 10), (size, 1), (size + 1, 10), (1 << 62, 10)):
            offset = max(0, offset)  # noqa: PLW2901 - of the empty file
            assert await mounted.read(path, offset, length) == content[offset : offset + length]
    assert mounted.vfs.in_flight == 0


async def test_trap_inline_reads_mind_offset_and_end(mounted: Mounted) -> None:
    assert await mounted.read(b"inline", 3, 4) == b"3456"
    assert await mounted.read(b"inline", 8, 4096) == b"89"
    assert await mounted.read(b"inline", 10, 4096) == b""


async def test_trap_empty_file_opens_without_an_object(tmp_path: Path) -> None:
    mounted = Mounted(tmp_path, Verification.REQUIRED)
    await mounted.open(b"empty")
    assert await mounted.read(b"empty") == b""


@pytest.mark.parametrize("path", [b"dir", b"link"])
async def test_what_is_no_file_cannot_be_read(mounted: Mounted, path: bytes) -> None:
    with pytest.raises(ImageError, match="no regular file"):
        await mounted.read(path)


@pytest.mark.parametrize(
    ("path", "kind"), [(b"missing", ObjectMissing), (b"no path", ObjectUnusable)], ids=["missing", "no path"]
)
async def test_error_is_reported_once_with_the_path(
    mounted: Mounted, path: bytes, kind: type[CfsError], claim: Callable[[str, int], list[str]]
) -> None:
    for _ in range(3):
        with pytest.raises(kind):
            await mounted.open(path)
        await reported(mounted.vfs)
    (message,) = claim("object ", 1)
    assert message.startswith(f"/{path.decode()}: object ")
    assert mounted.vfs.in_flight == 0


async def test_mismatch_says_path_object_block_expected_and_found(
    mounted: Mounted, claim: Callable[[str, int], list[str]]
) -> None:
    await mounted.open(b"large")
    flip(mounted.store.path("aa/large"), 20_000)
    with pytest.raises(DigestMismatch) as caught:
        await mounted.read(b"large", 16384, 8192)
    with pytest.raises(DigestMismatch):
        await mounted.read(b"large", 16384, 8192)
    await reported(mounted.vfs)
    (message,) = claim("hash of block 4", 1)
    assert message == (
        "/large: object aa/large: hash of block 4: "
        f"expected {caught.value.expected.hex()}, found {caught.value.found.hex()}"
    )
    assert await mounted.read(b"large", 20480, 4096) == LARGE[20480:24576]


async def test_errors_are_logged_after_the_answers_all_by_one_search(
    mounted: Mounted, claim: Callable[[str, int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    searches: list[int] = []
    search = mounted.vfs.reader.paths_of

    def counted(nids: set[Nid]) -> dict[Nid, bytes]:
        searches.append(len(nids))
        return search(nids)

    monkeypatch.setattr(mounted.vfs.reader, "paths_of", counted)
    for path in (b"missing", b"no path", b"missing"):
        with pytest.raises(CfsError):
            await mounted.open(path)
    claim("object ", 0)
    await reported(mounted.vfs)
    claim("object ", 2)
    assert searches == [2]
    with pytest.raises(CfsError):
        await mounted.open(b"missing")
    await reported(mounted.vfs)
    assert searches == [2]


async def test_one_object_of_two_files_is_reported_for_each(
    mounted: Mounted, claim: Callable[[str, int], list[str]]
) -> None:
    flip(mounted.store.path("bb/small"), 0)
    for path in (b"small", b"dir/same"):
        with pytest.raises(DigestMismatch):
            await mounted.open(path)
    await reported(mounted.vfs)
    assert {message.split(":")[0] for message in claim("fs-verity digest", 2)} == {"/small", "/dir/same"}


async def test_verity_required_fails_at_open(tmp_path: Path, claim: Callable[[str, int], list[str]]) -> None:
    mounted = Mounted(tmp_path, Verification.REQUIRED)
    with pytest.raises(ObjectUnusable):
        await mounted.open(b"no digest")
    await reported(mounted.vfs)
    claim("verity is required", 1)


async def test_many_tasks_read_and_open_at_once(mounted: Mounted) -> None:
    contents = {b"large": LARGE, b"small": SMALL, b"inline": b"0123456789", b"no digest": SMALL}
    done = []

    async def work(seed: int) -> None:
        path, content = list(contents.items())[seed % 4]
        await mounted.open(path)
        offset = seed * 7919 % len(content)
        assert await mounted.read(path, offset, 70_000) == content[offset : offset + 70_000]
        done.append(seed)

    async with trio.open_nursery() as nursery:
        for seed in range(64):
            nursery.start_soon(work, seed)
    assert sorted(done) == list(range(64))
    assert mounted.vfs.in_flight == 0


class SlowStore:
    """An object store that always has to wait, until it is let go."""

    is_local = True

    def __init__(self) -> None:
        self.go = threading.Event()
        self.waiting = 0
        self.most = 0
        self.lock = threading.Lock()

    def load(self, node: External, offset: int, length: int, *, wait: bool = True, compute: bool = True) -> bytes:
        if not wait:
            raise BlockingIOError
        if not compute and length == 0 and node.stat.size > WHOLE_FILE_MAX:
            raise TreeNeeded
        with self.lock:
            self.waiting += 1
            self.most = max(self.most, self.waiting)
        assert self.go.wait(30)
        with self.lock:
            self.waiting -= 1
        return bytes(max(0, min(length, node.stat.size - offset)))

    @staticmethod
    def finish(loaded: bytes, *_: object) -> bytes:
        return loaded

    @staticmethod
    def is_known_good(_: External) -> bool:
        return False

    @staticmethod
    def statvfs() -> os.statvfs_result | None:
        return None


@pytest.fixture
def slow(mounted: Mounted) -> SlowStore:
    store = SlowStore()
    mounted.vfs = Vfs(reader_of(mounted.made), store)  # type: ignore[arg-type]  # has the methods that a vfs uses
    return store


async def test_metadata_and_inline_files_do_not_wait_for_disks(mounted: Mounted, slow: SlowStore) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(64):
            nursery.start_soon(mounted.read, b"small", 0, 100)
        await trio.testing.wait_all_tasks_blocked()
        assert mounted.vfs.in_flight == 64
        assert await mounted.read(b"inline") == b"0123456789"
        assert mounted.vfs.lookup(mounted.vfs.root.nid, b"small") is not None
        slow.go.set()
    assert mounted.vfs.in_flight == 0
    assert 0 < slow.most <= 16


async def test_a_fast_disk_is_waited_for_in_place(mounted: Mounted, slow: SlowStore) -> None:
    slow.go.set()
    mounted.vfs._pace._average = 0.0
    waiting: list[int] = []
    load = slow.load

    def noting(*arguments: Any, wait: bool = True, compute: bool = True) -> bytes:  # noqa: ANN401 - as they come
        done = load(*arguments, wait=wait, compute=compute)
        waiting.append(threading.get_ident())
        return done

    slow.load = noting  # type: ignore[method-assign,assignment]  # called with the same arguments
    assert await mounted.read(b"small", 0, 10) == bytes(10)
    await mounted.open(b"small")
    assert waiting == [threading.get_ident()] * 2
    # Opening a large file may have to compute its tree, however fast the disk is.
    await mounted.open(b"large")
    assert waiting.pop() != threading.get_ident()
    mounted.vfs._pace._average = 1.0
    assert await mounted.read(b"small", 0, 10) == bytes(10)
    assert waiting.pop() != threading.get_ident()
    assert mounted.vfs.in_flight == 0


async def test_on_a_fast_disk_a_small_file_that_is_opened_again_is_looked_at_only(
    mounted: Mounted, monkeypatch: pytest.MonkeyPatch, claim: Callable[[str, int], list[str]]
) -> None:
    mounted.vfs._pace._average = 0.0
    opened: list[bytes] = []
    original = BaseDirectories.open

    def counting(directories: BaseDirectories, path: bytes, *, wait: bool = True) -> Descriptor:
        opened.append(path)
        return original(directories, path, wait=wait)

    monkeypatch.setattr(BaseDirectories, "open", counting)
    for _ in range(3):
        await mounted.open(b"small")
    assert opened == [b"bb/small"]
    for path in (b"missing", b"no path", b"no digest"):
        for _ in range(2):
            if path == b"no digest":
                await mounted.open(path)
            else:
                with pytest.raises(ObjectError):
                    await mounted.open(path)
    flip(mounted.store.path("bb/small"), 100)
    with pytest.raises(DigestMismatch):
        await mounted.open(b"small")
    await reported(mounted.vfs)
    for problem in ("not in any base directory", "no usable path", "fs-verity digest"):
        claim(problem, 1)


async def test_trees_of_large_files_do_not_take_the_threads_of_reads(mounted: Mounted, slow: SlowStore) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(mounted.open, b"large")
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(20):
            while slow.waiting < 2:
                await trio.lowlevel.checkpoint()
        for _ in range(3):
            nursery.start_soon(mounted.read, b"small", 0, 100)
        with trio.fail_after(20):
            while slow.waiting < 5:
                await trio.lowlevel.checkpoint()
        assert slow.waiting == 5
        slow.go.set()
    assert mounted.vfs.in_flight == 0


async def test_cancelled_reads_leave_nothing_in_flight(mounted: Mounted, slow: SlowStore) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(mounted.read, b"small", 0, 100)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        slow.go.set()
    assert mounted.vfs.in_flight == 0
    assert await mounted.read(b"small", 0, 10) == bytes(10)


async def test_failing_thread_leaves_nothing_in_flight(mounted: Mounted, slow: SlowStore) -> None:
    def fail(*_: object, **__: object) -> bytes:
        raise ValueError("unexpected")

    slow.load = fail  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="unexpected"):
        await mounted.read(b"small")
    assert mounted.vfs.in_flight == 0


def test_metadata_needs_no_event_loop(tmp_path: Path) -> None:
    made = sample()
    vfs = Vfs(reader_of(made), Store(tmp_path).open())
    root = vfs.root.nid
    assert vfs.inode(root) == vfs.root
    assert vfs.lookup(root, b"00") is None
    found = vfs.lookup(root, b"xattrs")
    assert found is not None
    assert vfs.xattrs(found.nid)[b"user.a"] == b"1"
    assert vfs.readlink(made.at(b"long link").nid) == b"l" * 4095
    assert isinstance(vfs.node(made.at(b"sha512").nid), External)
    node = vfs.node(made.at(b"sha512").nid)
    assert isinstance(node, External)
    assert node.digest == Digest("sha512", b"\x22" * 64)


@pytest.mark.parametrize(("count", "parsed"), [(20, 1), (2000, 0)], ids=["one block", "several"])
def test_names_are_found_however_often_they_are_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, parsed: int
) -> None:
    """The names of a directory of one block are kept; of a larger one a single block says nothing of the others."""
    names = [b"name-%04d" % number for number in range(count)]
    made = im.make(im.directory({b"dir": im.directory({name: im.file(name) for name in names})}))
    vfs = Vfs(reader_of(made), Store(tmp_path).open())
    parent = made.at(b"dir").nid
    blocks: list[int] = []
    block = vfs.reader.block

    def noted(directory: Inode, index: int) -> list[Dirent]:
        blocks.append(index)
        return block(directory, index)

    monkeypatch.setattr(vfs.reader, "block", noted)
    for _ in range(3):
        for name in (names[0], names[count // 2], names[-1]):
            found = vfs.lookup(parent, name)
            assert found is not None
            assert found.nid == made.at(b"dir/" + name).nid
        for name in (b"a", b"name-0000a", b"z"):
            assert vfs.lookup(parent, name) is None
    assert len(blocks) == parsed


def test_trap_space_is_that_of_the_store_or_of_the_image_but_not_zero(tmp_path: Path) -> None:
    made = sample()
    store = Store(tmp_path)
    space = Vfs(reader_of(made), store.open()).statfs()
    there = os.statvfs(store.bases[0])
    assert (space.f_bsize, space.f_blocks, space.f_namemax) == (there.f_bsize, there.f_blocks, 255)
    image = Vfs(reader_of(made), store.open(), space_of_store=False).statfs()
    assert image.f_blocks * image.f_frsize == len(made.data)
    assert (image.f_bfree, image.f_bavail, image.f_ffree) == (0, 0, 0)
    assert image.f_files > 0


async def test_nodes_kept_are_bounded(tmp_path: Path) -> None:
    entries = {b"%05d" % number: im.file(b"x" * 2000) for number in range(6000)}
    made = im.make(im.directory(entries))
    vfs = Vfs(reader_of(made), Store(tmp_path).open())
    nodes = {vfs.node(entry.nid) is vfs.node(entry.nid) for entry in entries.values()}
    assert nodes == {True}
    first = made.at(b"00000").nid
    kept = vfs.node(first)
    for entry in entries.values():
        vfs.node(entry.nid)
    assert vfs.node(first) is not kept
    assert functools.reduce(max, (entry.nid for entry in entries.values())) > first
