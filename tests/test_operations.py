"""The adapter to pyfuse3, its handlers called without a mount."""

from __future__ import annotations

import errno
import logging
import os
import stat
import types
from typing import TYPE_CHECKING, Any

import pytest

pyfuse3 = pytest.importorskip("pyfuse3")

from cfsfuse import errors  # noqa: E402
from cfsfuse.erofs.image import Image  # noqa: E402
from cfsfuse.fuse.answers import ERRNO  # noqa: E402
from cfsfuse.fuse.operations import Operations, guarded  # noqa: E402
from cfsfuse.vfs import Vfs  # noqa: E402
from tests import imagemaker as im  # noqa: E402
from tests.support import Store, reader_of, reported, sample  # noqa: E402
from tests.test_errors import EXAMPLES  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cfsfuse.errors import CfsError

CONTEXT: Any = types.SimpleNamespace(pid=os.getpid(), uid=0, gid=0, umask=0)
ROOT: Any = 1


class Served:
    """Operations over an image, called as pyfuse3 calls them."""

    def __init__(self, made: im.Made, folder: Path, **owner: int) -> None:
        self.made = made
        self.vfs = Vfs(reader_of(made), Store(folder).open())
        self.operations: Any = Operations(self.vfs, **owner)

    def nid(self, path: bytes) -> int:
        return self.made.at(path).nid if path.strip(b"/") else 1

    async def attributes(self, path: bytes) -> Any:  # noqa: ANN401 - an extension type
        return await self.operations.getattr(self.nid(path), CONTEXT)


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return Served(sample(), tmp_path)


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Give a function that lists a directory in pages of so many entries, as the kernel asks for it."""
    page: list[tuple[bytes, int, int]] = []
    room = 0

    def reply(_token: object, name: bytes, attributes: Any, cookie: int) -> bool:  # noqa: ANN401
        if len(page) == room:
            return False
        page.append((name, attributes.st_ino, cookie))
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)

    async def listing(operations: Any, nid: int, size: int) -> list[tuple[bytes, int, int]]:  # noqa: ANN401
        nonlocal room
        room = size
        handle = await operations.opendir(nid, CONTEXT)
        found: list[tuple[bytes, int, int]] = []
        while True:
            page.clear()
            await operations.readdir(handle, found[-1][2] if found else 0, None)
            if not page:
                await operations.releasedir(handle)
                return found
            found += page

    return listing


async def fails(call: Any) -> int:  # noqa: ANN401 - a coroutine of a handler
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await call
    number: int = caught.value.errno
    return number


def test_table_of_errno_has_every_error_that_a_handler_can_meet() -> None:
    # These end a mount before there is a handler.
    elsewhere = {errors.UsageError, errors.HostError, errors.ImageDigestMismatch}
    # These are the builder's.
    elsewhere |= {errors.DumpError, errors.TreeError, errors.SourceError, errors.StoreError}
    # Never raised as they are: the first is abstract, the second is always caught in trees.py.
    elsewhere |= {errors.ObjectError, errors.TreeMismatch}
    ours = {type(error) for error in EXAMPLES}
    assert set(ERRNO) == ours - elsewhere


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
async def test_every_domain_error_becomes_an_errno(
    served: Served, error: CfsError, claim: Callable[[str, int], list[str]]
) -> None:
    @guarded
    async def handler(_self: object) -> None:
        raise error

    for _ in range(2):  # an error of the image is logged once
        assert await fails(handler(served.operations)) == ERRNO.get(type(error), errno.EIO)
    claim("image: ", 1 if isinstance(error, errors.ImageError) else 0)


@pytest.mark.parametrize("error", [ValueError("odd"), OSError(5, "io"), MemoryError(), AssertionError(), KeyError(1)])
async def test_trap_unexpected_exception_is_logged_and_the_session_lives(
    error: Exception, claim: Callable[[str, int], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    @guarded
    async def handler(_self: object, argument: int) -> None:
        raise error

    assert await fails(handler(None, 7)) == errno.EIO
    claim("unexpected error in handler(7", 1)
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.exc_info is not None
    assert record.exc_info[1] is error


async def test_fuse_errors_pass(served: Served) -> None:
    @guarded
    async def handler(_self: object) -> None:
        raise pyfuse3.FUSEError(errno.ENOSYS)

    assert await fails(handler(served.operations)) == errno.ENOSYS
    assert await fails(served.operations.flush(1)) == errno.ENOSYS


async def test_attributes_are_those_of_the_image(served: Served) -> None:
    old = await served.attributes(b"old")
    assert (old.st_mtime_ns, old.st_ctime_ns, old.st_atime_ns) == (
        -86_399_000_000_001 - 1_000_000_000 + 1_000_000_000,
    ) * 3
    assert (await served.attributes(b"far")).st_mtime_ns == (1 << 40) * 1_000_000_000
    compact = await served.attributes(b"compact")
    assert (compact.st_uid, compact.st_gid, compact.st_size, compact.st_blocks) == (1000, 1000, 5, 8)
    assert stat.S_ISREG(compact.st_mode)
    assert (await served.attributes(b"null")).st_rdev == 0x103
    assert (await served.attributes(b"sha512")).st_size == 1 << 33
    assert (await served.attributes(b"one")).st_nlink == 2
    for path in (b"one", b"dir", b"link"):
        answer = await served.attributes(path)
        assert answer.st_ino == served.nid(path)
        assert answer.entry_timeout == answer.attr_timeout >= 86400
        assert answer.st_rdev == 0
    root = await served.attributes(b"/")
    assert stat.S_ISDIR(root.st_mode)
    assert root.st_size == len(served.made.root.data)


async def test_owner_is_replaced_when_asked(tmp_path: Path) -> None:
    served = Served(sample(), tmp_path, uid=7, gid=0)
    answer = await served.attributes(b"compact")
    assert (answer.st_uid, answer.st_gid) == (7, 0)


async def test_lookup_finds_or_answers_a_negative_entry(served: Served) -> None:
    found = await served.operations.lookup(ROOT, b"plain", CONTEXT)
    assert found.st_ino == served.nid(b"plain")
    for name in (b"absent", b"00", b"\xff", b"!"):
        absent = await served.operations.lookup(ROOT, name, CONTEXT)
        assert absent.st_ino == 0
        assert absent.entry_timeout >= 86400
    inner = await served.operations.lookup(served.nid(b"dir"), b"name-001-n", CONTEXT)
    assert inner.st_ino == served.nid(b"dir/name-001-n")


async def test_longest_name_is_looked_up_and_a_longer_one_refused(served: Served) -> None:
    assert (await served.operations.lookup(ROOT, b"n" * 255, CONTEXT)).st_ino == 0
    assert await fails(served.operations.lookup(ROOT, b"n" * 256, CONTEXT)) == errno.ENAMETOOLONG


async def test_lookup_in_a_file_is_an_error_and_no_crash(
    served: Served, claim: Callable[[str, int], list[str]]
) -> None:
    assert await fails(served.operations.lookup(served.nid(b"plain"), b"x", CONTEXT)) == errno.EIO
    claim("i_mode", 1)


@pytest.mark.parametrize("size", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("path", [b"/", b"dir", b"compact dir/deep/er"])
async def test_trap_listing_goes_on_where_it_was(
    served: Served, pages: Callable[..., Any], path: bytes, size: int
) -> None:
    found = await pages(served.operations, served.nid(path), size)
    names = [name for name, _, _ in found]
    reader = served.vfs.reader
    assert names == [name for name, _ in reader.entries(reader.resolve(path))]
    assert len({cookie for _, _, cookie in found}) == len(found)
    by_name = dict(reader.entries(reader.resolve(path)))
    assert all(nid == by_name[name].nid for name, nid, _ in found if name not in (b".", b".."))


async def test_trap_listing_in_pages_reads_no_block_for_every_page(
    tmp_path: Path, pages: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = im.file(b"x")
    made = im.make(im.directory(dict.fromkeys((b"name-%06d" % number for number in range(20_000)), entry)))
    served = Served(made, tmp_path)
    blocks = -(-len(made.root.data) // 4096)
    touched = []
    original = Image.slice

    def counted(image: Image, offset: int, length: int, field: str) -> memoryview:
        touched.append(length)
        return original(image, offset, length, field)

    monkeypatch.setattr(Image, "slice", counted)
    assert len(await pages(served.operations, 1, 7)) == 20_002
    assert len(touched) <= 3 * blocks


async def test_listing_of_hidden_entries_alone_ends(tmp_path: Path, pages: Callable[..., Any]) -> None:
    hidden = im.whiteout()
    root = im.directory({b"!%04d" % number: hidden for number in range(1000)})
    served = Served(im.make(root), tmp_path)
    assert [name for name, _, _ in await pages(served.operations, 1, 10)] == [b".", b".."]


async def test_links(served: Served, claim: Callable[[str, int], list[str]]) -> None:
    assert await served.operations.readlink(served.nid(b"link"), CONTEXT) == b"target"
    assert await served.operations.readlink(served.nid(b"long link"), CONTEXT) == b"l" * 4095


@pytest.mark.parametrize(
    ("name", "number"),
    [
        (b"user.none", errno.ENODATA),
        (b"trusted.none", errno.ENODATA),
        (b"trusted.overlay.metacopy", errno.ENODATA),
        (b"security.none", errno.ENODATA),
        (b"system.posix_acl_access", errno.ENODATA),
        (b"system.posix_acl_default", errno.ENODATA),
        (b"system.other", errno.EOPNOTSUPP),
        (b"unknown.name", errno.EOPNOTSUPP),
        (b"user", errno.EOPNOTSUPP),
        (b"user.", errno.EINVAL),
        (b"trusted.", errno.EINVAL),
        (b"security.", errno.EINVAL),
        (b"trusted.overlay.", errno.EINVAL),
        (b"trusted.overlay." + b"n" * 231, errno.ENODATA),
        (b"trusted.overlay." + b"n" * 232, errno.EOPNOTSUPP),
        (b"", errno.EOPNOTSUPP),
    ],
)
@pytest.mark.parametrize("path", [b"xattrs", b"plain", b"sha512", b"/"])
async def test_absent_xattrs(served: Served, path: bytes, name: bytes, number: int) -> None:
    assert await fails(served.operations.getxattr(served.nid(path), name, CONTEXT)) == number


async def test_xattrs_that_are_there(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    nid = served.nid(b"xattrs")
    expected = served.vfs.xattrs(nid)
    for name, value in expected.items():
        assert await served.operations.getxattr(nid, name, CONTEXT) == value
    for seen in (True, False):
        monkeypatch.setattr("cfsfuse.fuse.caller.sees_trusted", lambda _pid, seen=seen: seen)
        names = list(await served.operations.listxattr(nid, CONTEXT))
        assert names == [name for name in expected if seen or not name.startswith(b"trusted.")]


async def test_files_open_read_and_close(served: Served, claim: Callable[[str, int], list[str]]) -> None:
    info = await served.operations.open(served.nid(b"tail"), os.O_RDONLY, CONTEXT)
    assert info.keep_cache
    assert bytes(await served.operations.read(info.fh, 4990, 100)) == b"t" * 10
    await served.operations.release(info.fh)
    assert await fails(served.operations.open(served.nid(b"one"), os.O_RDONLY, CONTEXT)) == errno.ENOENT
    await reported(served.vfs)
    claim("not in any base directory", 1)


async def test_statfs_answers_all_fields(served: Served) -> None:
    answer = await served.operations.statfs(CONTEXT)
    assert answer.f_blocks > 0
    assert answer.f_bsize > 0
    assert answer.f_namemax == 255


async def test_broken_inode_is_an_error_of_its_own(
    tmp_path: Path, pages: Callable[..., Any], claim: Callable[[str, int], list[str]]
) -> None:
    broken = im.file(b"x")
    made = im.make(im.directory({b"good": im.file(b"g"), b"dir": im.directory({b"bad": broken})}))
    made.patch(broken, "i_mtime_nsec", 1_000_000_000)
    served = Served(made, tmp_path)
    assert await fails(served.operations.getattr(broken.nid, CONTEXT)) == errno.EIO
    assert await fails(served.operations.lookup(served.nid(b"dir"), b"bad", CONTEXT)) == errno.EIO
    assert stat.S_ISREG((await served.attributes(b"good")).st_mode)
    names = [name for name, _, _ in await pages(served.operations, 1, 10)]
    assert names == [b".", b"..", b"dir", b"good"]
    claim("i_mtime_nsec", 1)


@pytest.mark.parametrize("nid", [0, 1])
async def test_nid_that_fuse_cannot_tell_from_its_root_is_refused(
    tmp_path: Path, nid: int, claim: Callable[[str, int], list[str]]
) -> None:
    made = im.make(im.directory({b"a": im.file(b"x")}))
    made.patch_dirent(made.root, 2, "nid", nid)
    served = Served(made, tmp_path)
    assert await fails(served.operations.lookup(ROOT, b"a", CONTEXT)) == errno.EIO
    claim("image: ", 1)
