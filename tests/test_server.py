"""The session that speaks the FUSE protocol itself, its requests made here: no mount, no device."""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import trio

from cfsfuse.erofs import overlay
from cfsfuse.erofs.image import Image, Nid
from cfsfuse.erofs.reader import Reader
from cfsfuse.errors import HostError, ImageError
from cfsfuse.fuse import protocol
from cfsfuse.fuse.protocol import InitFlag, Opcode, OpenFlag
from cfsfuse.fuse.server import Server
from cfsfuse.verity.digest import SHA256
from cfsfuse.verity.merkle import content_digest
from cfsfuse.vfs import Vfs
from tests import imagemaker as im
from tests.support import Store, flip, random_bytes, reported, sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LARGEST_RECORD = 128 + 24 + 256  # an entry, a dirent, a name of 255 bytes padded to eight
ROOT = 1
CONTENT = random_bytes(9000)
LARGE = random_bytes((1 << 20) + 5000)
# Written from the kernel's header, as is the rest of this module: a slip in the server's layouts is to show.
_ATTR = "=QQQQQQIIIIIIIIII"
_NAMES = "ino size blocks atime mtime ctime atimensec mtimensec ctimensec mode nlink uid gid rdev blksize flags"


class Attr(NamedTuple):
    """struct fuse_attr."""

    ino: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    atimensec: int
    mtimensec: int
    ctimensec: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    blksize: int
    flags: int


class Entry(NamedTuple):
    """An entry as LOOKUP answers it: struct fuse_entry_out."""

    nodeid: int
    generation: int
    entry_valid: int
    attr_valid: int
    attr: Attr


class Record(NamedTuple):
    """An entry of a listing: struct fuse_direntplus, and its name."""

    entry: Entry
    ino: int
    cookie: int
    kind: int
    name: bytes


def attr_of(data: bytes) -> Attr:
    return Attr(*struct.unpack(_ATTR, data))


def entry_of(data: bytes) -> Entry:
    nodeid, generation, entry_valid, attr_valid, *nanoseconds = struct.unpack_from("=QQQQII", data)
    assert nanoseconds == [0, 0]
    return Entry(nodeid, generation, entry_valid, attr_valid, attr_of(data[40:]))


def records(data: bytes) -> Iterator[Record]:
    while data:
        ino, cookie, length, kind = struct.unpack_from("=QQII", data, 128)
        yield Record(entry_of(data[:128]), ino, cookie, kind, data[152 : 152 + length])
        size = 152 + length + (-length & 7)
        assert len(data) >= size
        assert not any(data[152 + length : size])
        data = data[size:]


class Answer(NamedTuple):
    """What came back: the errno, 0 for none, and the body."""

    errno: int
    body: bytes


def packed(opcode: int, nid: int, body: bytes = b"", *, unique: int = 7, pid: int = 0) -> bytes:
    return struct.pack("=IIQQIIIHH", 40 + len(body), opcode, unique, nid, 0, 0, pid or os.getpid(), 0, 0) + body


class Served:
    """A server on one end of a socket, whose other end is the kernel's."""

    def __init__(self, made: im.Made, store: Store, *, layer: bool = False, **options: Any) -> None:  # noqa: ANN401
        self.made = made
        self.device, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kernel.settimeout(10)
        self.device.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        image = Image(made.content())
        reader = Reader(image, overlay.METADATA_LAYER if layer else overlay.MOUNTED)
        self.vfs = Vfs(reader, store.open())
        self.server = Server(self.vfs, **options)
        self.server._fd = self.device.fileno()

    def close(self) -> None:
        self.device.close()
        self.kernel.close()

    def nid(self, path: bytes) -> int:
        return self.made.at(path).nid if path.strip(b"/") else ROOT

    def ask(self, opcode: int, path: bytes | int = b"/", body: bytes = b"", *, pid: int = 0) -> Answer:
        """Make a request of a node, and return the answer, which must come at once."""
        nid = path if isinstance(path, int) else self.nid(path)
        self.server._serve(packed(opcode, nid, body, pid=pid))
        return self.answer()

    def answer(self, unique: int = 7) -> Answer:
        data = self.kernel.recv(1 << 21)
        size, error, of = struct.unpack_from("=IiQ", data)
        assert (size, of) == (len(data), unique)
        assert -4096 < error <= 0
        assert error == 0 or size == 16
        return Answer(-error, data[16:])

    def is_silent(self) -> bool:
        """Return whether no answer is there."""
        return select.select([self.kernel], [], [], 0)[0] == []

    def list(self, path: bytes | int, size: int) -> list[Record]:
        """Return a directory, asked for in pieces of up to `size` bytes."""
        found: list[Record] = []
        while True:
            body = reading(found[-1].cookie if found else 0, size)
            answer = self.ask(Opcode.READDIRPLUS, path, body)
            assert answer.errno == 0
            assert len(answer.body) <= size
            if not answer.body:
                return found
            found += records(answer.body)


def reading(offset: int, size: int) -> bytes:
    return struct.pack("=QQIIQII", 0, offset, size, 0, 0, 0, 0)


def sized(size: int, name: bytes = b"") -> bytes:
    return struct.pack("=II", size, 0) + name


def initial(flags: int, major: int = 7, minor: int = 38, max_readahead: int = 131072) -> bytes:
    return struct.pack("=IIII48x", major, minor, max_readahead, flags)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path)
    made.add(CONTENT, "bb/small")
    made.add(LARGE, "aa/large")
    return made


@pytest.fixture
def serving(store: Store) -> Iterator[Callable[..., Served]]:
    """What serves an image; closed in the end."""
    opened = []

    def serve(made: im.Made, **options: Any) -> Served:  # noqa: ANN401
        opened.append(Served(made, store, **options))
        return opened[-1]

    yield serve
    for each in opened:
        each.close()


@pytest.fixture
def served(serving: Callable[..., Served]) -> Served:
    return serving(sample())


def contents() -> im.Made:
    return im.make(
        im.directory(
            {
                b"small": im.external(len(CONTENT), b"bb/small", content_digest(SHA256, CONTENT)),
                b"large": im.external(len(LARGE), b"aa/large", content_digest(SHA256, LARGE)),
                b"missing": im.external(5, b"cc/missing", bytes(32)),
                b"inline": im.file(b"0123456789"),
                b"dir": im.directory(),
                b"link": im.symlink(b"target"),
            }
        )
    )


# INIT -----------------------------------------------------------------------------------------------------------------

EVERY_FLAG = 0xFFFFFFFF


def test_what_is_agreed_on(served: Served) -> None:
    assert served.ask(Opcode.OPENDIR).errno == errno.ENOSYS  # whatever came before INIT
    answer = served.ask(Opcode.INIT, 0, initial(EVERY_FLAG))
    assert len(answer.body) == 64
    major, minor, readahead, flags, background, threshold, max_write, granularity, pages = struct.unpack_from(
        "=IIIIHHIIH", answer.body
    )
    assert (major, minor, readahead) == (7, 31, 131072)
    assert not any(answer.body[34:])
    assert flags == (
        InitFlag.ASYNC_READ
        | InitFlag.DO_READDIRPLUS
        | InitFlag.ASYNC_DIO
        | InitFlag.PARALLEL_DIROPS
        | InitFlag.MAX_PAGES
        | InitFlag.CACHE_SYMLINKS
        | InitFlag.NO_OPENDIR_SUPPORT
        | InitFlag.EXPLICIT_INVAL_DATA
        | InitFlag.POSIX_ACL  # the sample has ACLs
    )
    assert 0 < threshold <= background
    assert max_write >= 4096
    assert granularity == 1
    assert pages == 256


@pytest.mark.parametrize("flags", [0, InitFlag.ASYNC_READ, InitFlag.MAX_PAGES | InitFlag.DO_READDIRPLUS, 1 << 31])
def test_nothing_is_agreed_on_that_the_kernel_does_not_offer(served: Served, flags: int) -> None:
    (agreed,) = struct.unpack_from("=I", served.ask(Opcode.INIT, 0, initial(flags)).body, 12)
    assert agreed & ~flags == 0
    assert agreed == flags & ~(1 << 31)


def test_acls_are_asked_for_where_an_image_has_some(serving: Callable[..., Served]) -> None:
    answer = serving(contents()).ask(Opcode.INIT, 0, initial(EVERY_FLAG))
    (agreed,) = struct.unpack_from("=I", answer.body, 12)
    assert not agreed & InitFlag.POSIX_ACL


@pytest.mark.parametrize(("major", "minor"), [(7, 23), (7, 31), (7, 45), (8, 0)])
def test_newer_kernels_are_told_what_is_spoken(served: Served, major: int, minor: int) -> None:
    answer = served.ask(Opcode.INIT, 0, initial(EVERY_FLAG, major, minor))
    assert struct.unpack_from("=II", answer.body) == (7, 31)


@pytest.mark.parametrize(("major", "minor"), [(7, 22), (6, 99), (0, 0)])
def test_a_kernel_that_is_too_old_is_refused(served: Served, major: int, minor: int) -> None:
    assert served.ask(Opcode.INIT, 0, initial(0, major, minor)).errno == errno.EPROTO
    with pytest.raises(HostError, match=f"FUSE {major}.{minor} of this kernel is too old"):
        trio.run(served.server.run, served.device.fileno(), 0.0)
    assert served.server.agreed.is_set()


def test_directories_are_opened_where_the_kernel_cannot_do_without(served: Served) -> None:
    """And listings are kept all the same."""
    served.ask(Opcode.INIT, 0, initial(InitFlag.NO_OPENDIR_SUPPORT))
    assert served.ask(Opcode.OPENDIR).errno == errno.ENOSYS
    served.ask(Opcode.INIT, 0, initial(0))
    answer = served.ask(Opcode.OPENDIR)
    assert struct.unpack("=QII", answer.body) == (0, OpenFlag.KEEP_CACHE | OpenFlag.CACHE_DIR, 0)


# What is no question --------------------------------------------------------------------------------------------------

KNOWN = {
    *(Opcode.LOOKUP, Opcode.GETATTR, Opcode.READLINK, Opcode.OPEN, Opcode.READ, Opcode.STATFS, Opcode.RELEASE),
    *(Opcode.GETXATTR, Opcode.LISTXATTR, Opcode.INIT, Opcode.RELEASEDIR, Opcode.DESTROY, Opcode.READDIRPLUS),
}
SILENT = {Opcode.FORGET, Opcode.BATCH_FORGET}


@pytest.mark.parametrize("opcode", [*(set(range(60)) - KNOWN - SILENT), 4096, 0xFFFFFFFF])
def test_what_is_unknown_is_refused_for_good(served: Served, opcode: int) -> None:
    """By ENOSYS, from which the kernel learns not to ask again: of writing, of locks, of interrupts."""
    assert served.ask(opcode, b"plain", b"x" * 100).errno == errno.ENOSYS
    assert served.ask(opcode, 0).errno == errno.ENOSYS


@pytest.mark.parametrize("opcode", SILENT)
def test_forgetting_is_not_answered(served: Served, opcode: int) -> None:
    for body in (struct.pack("=Q", 1), struct.pack("=II", 1, 0) + struct.pack("=QQ", served.nid(b"plain"), 1), b""):
        served.server._serve(packed(opcode, served.nid(b"plain"), body))
    assert served.is_silent()
    assert served.ask(Opcode.GETATTR).errno == 0


@pytest.mark.parametrize("opcode", [Opcode.RELEASE, Opcode.RELEASEDIR, Opcode.DESTROY])
def test_ends_are_answered_with_nothing(served: Served, opcode: int) -> None:
    assert served.ask(opcode, b"plain", bytes(24)) == Answer(0, b"")


# Nodes ----------------------------------------------------------------------------------------------------------------


def test_attributes_are_those_of_the_image(served: Served) -> None:
    def attr(path: bytes) -> Attr:
        answer = served.ask(Opcode.GETATTR, path, bytes(16))
        valid, nanoseconds, dummy = struct.unpack_from("=QII", answer.body)
        assert valid >= 86400
        assert (nanoseconds, dummy, len(answer.body)) == (0, 0, 104)
        found = attr_of(answer.body[16:])
        assert found.ino == served.made.at(path).nid if path != b"/" else served.made.root.nid
        assert (found.blksize, found.flags) == (4096, 0)
        assert found.atime == found.mtime == found.ctime
        assert found.atimensec == found.mtimensec == found.ctimensec
        return found

    old = attr(b"old")
    assert (old.mtime, old.mtimensec) == (-86400 & (1 << 64) - 1, 999_999_999)
    assert attr(b"far").mtime == 1 << 40
    compact = attr(b"compact")
    assert (compact.uid, compact.gid, compact.size, compact.blocks) == (1000, 1000, 5, 8)
    assert stat.S_ISREG(compact.mode)
    assert (attr(b"null").rdev, attr(b"block").rdev) == (0x103, 0x801)
    assert (attr(b"sha512").size, attr(b"sha512").blocks) == (1 << 33, 1 << 24)
    assert (attr(b"empty").size, attr(b"empty").blocks) == (0, 0)
    assert attr(b"one").nlink == 2
    for path in (b"one", b"dir", b"link", b"fifo", b"socket"):
        assert attr(path).rdev == 0
    root = attr(b"/")
    assert stat.S_ISDIR(root.mode)
    assert root.size == len(served.made.root.data)


def test_owner_is_replaced_when_asked(serving: Callable[..., Served]) -> None:
    for options, owner in (({"uid": 7, "gid": 0}, (7, 0)), ({"gid": 9}, (1000, 9)), ({}, (1000, 1000))):
        attr = attr_of(serving(sample(), **options).ask(Opcode.GETATTR, b"compact", bytes(16)).body[16:])
        assert (attr.uid, attr.gid) == owner


def test_lookup_finds_or_answers_a_negative_entry(served: Served) -> None:
    found = entry_of(served.ask(Opcode.LOOKUP, b"/", b"plain\0").body)
    assert found.nodeid == found.attr.ino == served.nid(b"plain")
    assert found.attr == attr_of(served.ask(Opcode.GETATTR, b"plain", bytes(16)).body[16:])
    assert found.entry_valid == found.attr_valid >= 86400
    for name in (b"absent", b"00", b"\xff", b"!", b"", b"plai", b"plainn"):
        absent = entry_of(served.ask(Opcode.LOOKUP, b"/", name + b"\0").body)
        assert absent.nodeid == 0
        assert absent.entry_valid >= 86400
    inner = entry_of(served.ask(Opcode.LOOKUP, b"dir", b"name-001-n\0").body)
    assert inner.nodeid == served.nid(b"dir/name-001-n")


def test_longest_name_is_looked_up_and_a_longer_one_refused(served: Served) -> None:
    assert served.ask(Opcode.LOOKUP, b"/", b"n" * 255 + b"\0").errno == 0
    assert served.ask(Opcode.LOOKUP, b"/", b"n" * 256 + b"\0").errno == errno.ENAMETOOLONG


def test_links(served: Served) -> None:
    assert served.ask(Opcode.READLINK, b"link").body == b"target"
    assert served.ask(Opcode.READLINK, b"long link").body == b"l" * 4095


def test_space_is_that_of_the_store(served: Served) -> None:
    answer = served.ask(Opcode.STATFS)
    blocks, bfree, bavail, files, ffree, bsize, namelen, frsize = struct.unpack_from("=QQQQQIII", answer.body)
    space = served.vfs.statfs()
    assert len(answer.body) == 80
    assert (blocks, files, bsize, frsize) == (space.f_blocks, space.f_files, space.f_bsize, space.f_frsize)
    assert blocks >= bfree >= bavail > 0
    assert files >= ffree
    assert namelen == 255


def test_what_is_asked_of_the_wrong_kind_is_an_error_and_no_end(
    served: Served, claim: Callable[[str, int], list[str]]
) -> None:
    assert served.ask(Opcode.LOOKUP, b"plain", b"x\0").errno == errno.EIO
    assert served.ask(Opcode.READLINK, b"plain").errno == errno.EIO
    assert served.ask(Opcode.READDIRPLUS, b"plain", reading(0, 4096)).errno == errno.EIO
    for opcode, body in ((Opcode.READ, reading(0, 4096)), (Opcode.GETATTR, bytes(16))):
        assert served.ask(opcode, (1 << 64) - 1, body).errno == errno.EIO
    assert served.ask(Opcode.READ, b"dir", reading(0, 4096)).errno == errno.EIO
    assert served.ask(Opcode.GETATTR).errno == 0
    assert claim("image: ", 4)  # the same of one node is told once


ACCEPTABLE = (0, errno.EIO, errno.ENODATA, errno.EOPNOTSUPP, errno.ENAMETOOLONG, errno.EINVAL, errno.EPROTO)


async def test_nothing_that_is_cut_short_or_odd_ends_the_session(
    served: Served, claim: Callable[[str, int], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    """Each is answered: what the kernel never sends is a question for the log, and no reason to unmount."""
    bodies = [b"", b"\0", b"x", bytes(3), bytes(7), bytes(8), bytes(15), bytes(24), b"\xff" * 40, b"\xff" * 12288]
    for opcode in KNOWN:
        for nid in (0, 1, 2, served.nid(b"plain"), served.nid(b"dir"), (1 << 64) - 1):
            for body in bodies:
                answer = served.ask(opcode, nid, body)
                assert answer.errno in ACCEPTABLE
    await reported(served.vfs)
    assert served.ask(Opcode.GETATTR).errno == 0
    logged = {record.getMessage().partition(" of nid")[0] for record in caplog.records}
    unexpected = {text for text in logged if text.startswith("unexpected error")}
    assert unexpected == {
        f"unexpected error in {name}" for name in ("READ", "READDIRPLUS", "GETXATTR", "LISTXATTR", "INIT")
    }
    caplog.clear()


# Listings -------------------------------------------------------------------------------------------------------------


def wide() -> im.Made:
    """Return an image with a directory of many blocks, of which some show nothing."""
    names = {b"%03d-%s" % (number, b"n" * (number * 7 % 252)): im.file(b"x") for number in range(400)}
    hidden = {b"2-%03d" % number: im.whiteout() for number in range(800)}
    return im.make(im.directory({b"dir": im.directory({**names, **hidden})}))


SIZES = [*range(LARGEST_RECORD, 700, 8), 1000, 4095, 4096, 4097, 8192, 32768, 131072]


@pytest.mark.parametrize("size", SIZES)
def test_a_listing_in_pieces_is_whole(serving: Callable[..., Served], size: int) -> None:
    served = serving(wide())
    reader = served.vfs.reader
    for path in (b"/", b"dir"):
        found = served.list(path, size)
        expected = list(reader.entries(reader.resolve(path)))
        assert [record.name for record in found] == [name for name, _ in expected]
        assert len({record.cookie for record in found}) == len(found)


def test_each_entry_of_a_listing_is_as_lookup_has_it(served: Served) -> None:
    for record in served.list(b"/", 4096):
        if record.name in (b".", b".."):
            assert record.entry == entry_of(bytes(128))
            assert (record.ino, record.kind) == (served.made.root.nid, 4)
        else:
            assert record.entry == entry_of(served.ask(Opcode.LOOKUP, b"/", record.name + b"\0").body)
            assert record.entry.nodeid == record.ino == record.entry.attr.ino
            assert record.kind == record.entry.attr.mode >> 12
    above = served.made.at(b"compact dir")
    dots = served.list(b"compact dir/deep", 4096)[:2]
    assert [record.ino for record in dots] == [served.nid(b"compact dir/deep"), above.nid]


def test_a_listing_goes_on_anywhere(served: Served) -> None:
    """Behind any entry, in any order: as telldir(3) and seekdir(3) have it."""
    whole = served.list(b"dir", 4096)
    for at, record in reversed(list(enumerate(whole))):
        answer = served.ask(Opcode.READDIRPLUS, b"dir", reading(record.cookie, 4096))
        names = [each.name for each in records(answer.body)]
        assert names == [each.name for each in whole[at + 1 : at + 1 + len(names)]]
        assert names or at == len(whole) - 1


@pytest.mark.parametrize("offset", [1 << 20, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_behind_the_end_is_nothing(served: Served, offset: int) -> None:
    for path in (b"/", b"dir", b"compact dir/deep/er"):
        assert served.ask(Opcode.READDIRPLUS, path, reading(offset, 4096)) == Answer(0, b"")


def test_a_listing_of_hidden_entries_alone_ends(serving: Callable[..., Served]) -> None:
    made = im.make(im.directory({b"!%04d" % number: im.whiteout() for number in range(1000)}))
    assert [record.name for record in serving(made).list(b"/", 4096)] == [b".", b".."]


def test_a_broken_inode_fails_its_directory_and_nothing_else(
    serving: Callable[..., Served], claim: Callable[[str, int], list[str]]
) -> None:
    broken = im.file(b"x")
    made = im.make(im.directory({b"good": im.file(b"g"), b"dir": im.directory({b"bad": broken})}))
    made.patch(broken, "i_mtime_nsec", 1_000_000_000)
    served = serving(made)
    assert served.ask(Opcode.GETATTR, broken.nid, bytes(16)).errno == errno.EIO
    assert served.ask(Opcode.LOOKUP, b"dir", b"bad\0").errno == errno.EIO
    assert served.ask(Opcode.READDIRPLUS, b"dir", reading(0, 4096)).errno == errno.EIO
    assert [record.name for record in served.list(b"/", 4096)] == [b".", b"..", b"dir", b"good"]
    claim("i_mtime_nsec", 1)


@pytest.mark.parametrize("nid", [0, 1])
def test_nid_that_fuse_cannot_tell_from_its_root_is_refused(
    serving: Callable[..., Served], nid: int, claim: Callable[[str, int], list[str]]
) -> None:
    made = im.make(im.directory({b"a": im.file(b"x")}))
    made.patch_dirent(made.root, 2, "nid", nid)
    served = serving(made)
    assert served.ask(Opcode.LOOKUP, b"/", b"a\0").errno == errno.EIO
    assert served.ask(Opcode.READDIRPLUS, b"/", reading(0, 4096)).errno == errno.EIO
    assert claim("image: ", 1)


# Extended attributes --------------------------------------------------------------------------------------------------


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
        (b"trusted.overlay.", errno.EINVAL),
        (b"trusted.overlay." + b"n" * 231, errno.ENODATA),
        (b"trusted.overlay." + b"n" * 232, errno.EOPNOTSUPP),
        (b"user." + b"n" * 10000, errno.ENODATA),
        (b"", errno.EOPNOTSUPP),
    ],
)
@pytest.mark.parametrize("path", [b"xattrs", b"plain", b"sha512", b"/"])
def test_absent_xattrs(served: Served, path: bytes, name: bytes, number: int) -> None:
    for size in (0, 1, 65536):
        assert served.ask(Opcode.GETXATTR, path, sized(size, name + b"\0")).errno == number


def test_xattrs_that_are_there(served: Served) -> None:
    expected = served.vfs.xattrs(served.nid(b"xattrs"))
    assert len(expected) >= 5
    for name, value in expected.items():
        body = name + b"\0"
        assert served.ask(Opcode.GETXATTR, b"xattrs", sized(0, body)) == Answer(0, sized(len(value)))
        for size in (len(value), len(value) + 1, 65536):
            if size:
                assert served.ask(Opcode.GETXATTR, b"xattrs", sized(size, body)) == Answer(0, value)
        if len(value) > 1:
            assert served.ask(Opcode.GETXATTR, b"xattrs", sized(len(value) - 1, body)).errno == errno.ERANGE


@pytest.mark.parametrize("sees_trusted", [True, False])
def test_names_of_xattrs(served: Served, sees_trusted: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    asked = []

    def sees(pid: int) -> bool:
        asked.append(pid)
        return sees_trusted

    monkeypatch.setattr("cfsfuse.fuse.caller.sees_trusted", sees)
    shown = [name for name in served.vfs.xattrs(served.nid(b"xattrs")) if sees_trusted or name[:8] != b"trusted."]
    text = b"".join(name + b"\0" for name in shown)
    assert served.ask(Opcode.LISTXATTR, b"xattrs", sized(0), pid=4711) == Answer(0, sized(len(text)))
    assert served.ask(Opcode.LISTXATTR, b"xattrs", sized(len(text)), pid=4711) == Answer(0, text)
    assert served.ask(Opcode.LISTXATTR, b"xattrs", sized(len(text) - 1), pid=4711).errno == errno.ERANGE
    assert set(asked) == {4711}
    assert served.ask(Opcode.LISTXATTR, b"plain", sized(0)) == Answer(0, sized(0))
    assert served.ask(Opcode.LISTXATTR, b"plain", sized(100)) == Answer(0, b"")


def test_a_layer_shows_what_overlayfs_needs(serving: Callable[..., Served]) -> None:
    served = serving(contents(), layer=True)
    digest = content_digest(SHA256, CONTENT)
    for name, value in ((b"redirect", b"/bb/small"), (b"metacopy", b"\0\x24\0\1" + digest)):
        answer = served.ask(Opcode.GETXATTR, b"small", sized(100, b"user.overlay." + name + b"\0"))
        assert answer == Answer(0, value)
        assert served.ask(Opcode.GETXATTR, b"small", sized(100, b"trusted.overlay." + name + b"\0")).errno
    for name in (b"redirect", b"metacopy", b"opaque"):
        answer = served.ask(Opcode.GETXATTR, b"inline", sized(100, b"user.overlay." + name + b"\0"))
        assert answer.errno == errno.ENODATA


def test_below_an_overlay_xattrs_are_prepared_behind_a_listing(
    serving: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of regular files alone, in the order of the listing; and only there."""
    for prepares in (True, False):
        served = serving(contents(), layer=True, prepares_xattrs=prepares)
        prepared: list[int] = []
        monkeypatch.setattr(served.vfs, "prepare_xattrs", prepared.append)
        served.list(b"/", 4096)
        while served.server._work_ahead():
            pass
        files = [served.nid(path) for path in (b"inline", b"large", b"missing", b"small")]
        assert prepared == (files if prepares else [])


def test_prepared_xattrs_are_answered_without_reading_the_image(
    serving: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serving(contents(), layer=True, prepares_xattrs=True)
    served.list(b"/", 4096)
    while served.server._work_ahead():
        pass

    def never(*_arguments: object) -> None:
        raise AssertionError("the image was read")

    monkeypatch.setattr(Image, "slice", never)
    for name in (b"redirect", b"metacopy", b"opaque"):
        answer = served.ask(Opcode.GETXATTR, b"small", sized(100, b"user.overlay." + name + b"\0"))
        assert answer.errno == (errno.ENODATA if name == b"opaque" else 0)


def test_what_cannot_be_prepared_is_told_to_who_asks(
    serving: Callable[..., Served], claim: Callable[[str, int], list[str]]
) -> None:
    broken = im.file(b"x", xattrs={b"user.a": b"1"})
    made = im.make(im.directory({b"bad": broken, b"good": im.file(b"g")}))
    made.patch_xattr(broken, "h_shared_count", 255)
    served = serving(made, prepares_xattrs=True)
    assert len(served.list(b"/", 4096)) == 4
    while served.server._work_ahead():
        pass
    assert served.ask(Opcode.GETXATTR, b"bad", sized(0, b"user.a\0")).errno == errno.EIO
    assert served.ask(Opcode.GETXATTR, b"good", sized(0, b"user.a\0")).errno == errno.ENODATA
    assert claim("image: ", 1)


# Contents, and the session itself -------------------------------------------------------------------------------------


class Session:
    """A running session, to which requests are sent as the kernel sends them."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._unique = 100

    def send(self, opcode: int, path: bytes, body: bytes = b"") -> int:
        self._unique += 2
        self._served.kernel.send(packed(opcode, self._served.nid(path), body, unique=self._unique))
        return self._unique

    async def answers(self, *uniques: int) -> dict[int, Answer]:
        """Return the answers to requests, in whatever order they come."""
        found: dict[int, Answer] = {}
        while len(found) < len(uniques):
            await trio.lowlevel.wait_readable(self._served.kernel)
            data = self._served.kernel.recv(1 << 21)
            size, error, unique = struct.unpack_from("=IiQ", data)
            assert size == len(data)
            assert unique in uniques
            assert unique not in found
            found[unique] = Answer(-error, data[16:])
        return found

    async def ask(self, opcode: int, path: bytes, body: bytes = b"") -> Answer:
        unique = self.send(opcode, path, body)
        return (await self.answers(unique))[unique]


async def converse(served: Served, talk: Callable[[Session], Any]) -> None:
    """Run the session for as long as `talk` does; the end of the mount ends it."""
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(served.server.run, served.device.fileno(), 0.0)
            await talk(Session(served))
            served.kernel.shutdown(socket.SHUT_WR)  # a request of no bytes, as the device has it for ENODEV


@pytest.mark.parametrize("waits", [False, True])
async def test_contents(serving: Callable[..., Served], waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    """Verified, at any place, whether or not a thread is needed for them."""
    served = serving(contents())
    if waits:
        monkeypatch.setattr(served.vfs, "open_now", lambda _nid: False)
        monkeypatch.setattr(served.vfs, "read_now", lambda _nid, _offset, _length: None)

    async def talk(session: Session) -> None:
        for path, content in ((b"small", CONTENT), (b"large", LARGE)):
            opened = await session.ask(Opcode.OPEN, path, bytes(8))
            assert struct.unpack("=QII", opened.body) == (0, OpenFlag.KEEP_CACHE, 0)
            for offset, size in ((0, 4096), (4090, 100), (len(content) - 5, 4096), (len(content), 4096), (1 << 62, 1)):
                answer = await session.ask(Opcode.READ, path, reading(offset, size))
                assert answer == Answer(0, content[offset : offset + size])
            whole = await session.ask(Opcode.READ, path, reading(0, 1 << 20))
            assert whole.body == content[: 1 << 20]

    await converse(served, talk)


async def test_requests_under_way_do_not_wait_for_one_another(
    serving: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serving(contents())
    gate, loaded = trio.Event(), served.vfs.read

    async def slow(nid: int, offset: int, length: int) -> Any:  # noqa: ANN401
        await gate.wait()
        return await loaded(nid, offset, length)

    def read_now(nid: int, *_arguments: int) -> bytes | None:
        return None if nid == served.nid(b"large") else b"now"

    monkeypatch.setattr(served.vfs, "read_later", slow)
    monkeypatch.setattr(served.vfs, "read_now", read_now)

    async def talk(session: Session) -> None:
        waiting = [session.send(Opcode.READ, b"large", reading(at * 4096, 4096)) for at in range(5)]
        assert (await session.ask(Opcode.READ, b"small", reading(0, 3))).body == b"now"
        assert (await session.ask(Opcode.GETATTR, b"small", bytes(16))).errno == 0
        monkeypatch.undo()
        gate.set()
        found = await session.answers(*waiting)
        assert [found[unique].body for unique in waiting] == [LARGE[at * 4096 : at * 4096 + 4096] for at in range(5)]

    await converse(served, talk)


@pytest.mark.parametrize("waits", [False, True])
async def test_errors_of_objects(
    serving: Callable[..., Served],
    store: Store,
    waits: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
    claim: Callable[[str, int], list[str]],
) -> None:
    served = serving(contents())
    flip(store.path("bb/small"), 100)
    if waits:
        monkeypatch.setattr(served.vfs, "open_now", lambda _nid: False)
        monkeypatch.setattr(served.vfs, "read_now", lambda *_arguments: None)

    async def talk(session: Session) -> None:
        assert (await session.ask(Opcode.OPEN, b"small", bytes(8))).errno == errno.EIO
        assert (await session.ask(Opcode.OPEN, b"missing", bytes(8))).errno == errno.ENOENT
        assert (await session.ask(Opcode.READ, b"small", reading(0, 1))).errno == errno.EIO
        assert (await session.ask(Opcode.OPEN, b"large", bytes(8))).errno == 0
        await reported(served.vfs)

    await converse(served, talk)
    claim("/small: ", 1)
    claim("/missing: ", 1)


async def test_an_unexpected_error_is_logged_and_the_session_lives(
    serving: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, claim: Callable[[str, int], list[str]]
) -> None:
    served = serving(contents())

    async def fail_later(*_arguments: object) -> bytes:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError

    def fail(*_arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(served.vfs, "readlink", fail)
    monkeypatch.setattr(served.vfs, "read_now", lambda *_arguments: None)
    monkeypatch.setattr(served.vfs, "read_later", fail_later)

    async def talk(session: Session) -> None:
        assert (await session.ask(Opcode.READLINK, b"link")).errno == errno.EIO
        assert (await session.ask(Opcode.READ, b"small", reading(0, 10))).errno == errno.EIO
        assert (await session.ask(Opcode.GETATTR, b"small", bytes(16))).errno == 0

    await converse(served, talk)
    claim("unexpected error in READLINK", 1)
    claim("unexpected error in READ of", 1)


async def test_the_end_of_the_mount_does_not_wait_for_a_disk(
    serving: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serving(contents())
    seen = []

    async def forever(*_arguments: object) -> None:
        seen.append("asked")
        try:
            await trio.sleep_forever()
        finally:
            seen.append("cancelled")

    monkeypatch.setattr(served.vfs, "read_now", lambda *_arguments: None)
    monkeypatch.setattr(served.vfs, "read_later", forever)

    async def talk(session: Session) -> None:
        session.send(Opcode.READ, b"small", reading(0, 10))
        while not seen:
            await session.ask(Opcode.GETATTR, b"small", bytes(16))

    await converse(served, talk)
    assert seen == ["asked", "cancelled"]


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENODEV])
def test_who_has_gone_is_no_error(served: Served, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an interrupted request nor a mount that went with it."""

    def gone(*_arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    for name in ("write", "writev"):
        monkeypatch.setattr(os, name, gone)
    served.server._serve(packed(Opcode.GETATTR, ROOT, bytes(16)))
    served.server._serve(packed(9999, ROOT))


def test_an_answer_that_the_kernel_does_not_take_costs_that_one(
    served: Served, claim: Callable[[str, int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", refuse)
        assert served.ask(Opcode.GETATTR, ROOT, bytes(16)).errno == errno.EIO
    claim("unexpected error in an answer", 1)
    assert served.ask(Opcode.GETATTR, ROOT, bytes(16)).errno == 0


@pytest.mark.parametrize(
    ("number", "received"), [(errno.ENODEV, b""), (errno.EAGAIN, None), (errno.EINTR, None), (errno.ENOENT, None)]
)
def test_what_the_device_may_say_instead_of_a_request(
    served: Served, number: int, received: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(_fd: int, size: int) -> bytes:
        assert size >= protocol.MIN_READ_BUFFER
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "read", read)
    assert served.server._receive() == received


def test_a_root_that_fuse_cannot_have_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = im.make(im.directory({b"a": im.file(b"x")}))
    vfs = Vfs(Reader(Image(made.content())), store.open())
    monkeypatch.setattr(vfs, "root", vfs.root._replace(nid=Nid(1)))
    with pytest.raises(ImageError, match="1 cannot be served through FUSE"):
        Server(vfs)
