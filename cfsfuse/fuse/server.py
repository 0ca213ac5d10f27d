"""A session that speaks the kernel's FUSE protocol itself, on a descriptor of /dev/fuse.

pyfuse3 cannot be told to let the kernel keep listings, nor for which directory or file a request without an open one
is; and each request costs it twice the processor time.

Requests are answered one after the other by plain functions. Only what has to wait for a disk becomes a task.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import functools
import logging
import os
import stat
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

import trio

from cfsfuse.erofs.inode import NSEC_PER_SEC
from cfsfuse.erofs.ondisk import NAME_MAX
from cfsfuse.erofs.reader import DOTS
from cfsfuse.errors import CfsError, HostError, ImageError
from cfsfuse.fuse import protocol
from cfsfuse.fuse.answers import COOKIES, DEVICE_MASK, FOREVER, Reports, errno_of, errno_of_absent_xattr
from cfsfuse.fuse.caller import visible_names
from cfsfuse.fuse.life import SIGNALS, settle_memory, stop_on_signal
from cfsfuse.fuse.listings import Entries, Listings
from cfsfuse.fuse.polling import RequestWaiter
from cfsfuse.fuse.protocol import InitFlag, Opcode, OpenFlag

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from contextlib import AbstractContextManager

    from cfsfuse.erofs.image import Nid
    from cfsfuse.erofs.inode import Inode
    from cfsfuse.verity.digest import Bytes
    from cfsfuse.vfs import Vfs

log = logging.getLogger(__name__)

_WANTED = (
    InitFlag.ASYNC_READ
    | InitFlag.DO_READDIRPLUS
    | InitFlag.ASYNC_DIO
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.MAX_PAGES
    | InitFlag.CACHE_SYMLINKS
    | InitFlag.NO_OPENDIR_SUPPORT
    | InitFlag.EXPLICIT_INVAL_DATA
)
_MAX_PAGES = 256
_MAX_BACKGROUND = 64  # reads ahead that the kernel sends before it waits for answers
_MAX_WRITE = 4096  # there are no writes; a small one keeps the buffer of a request small
_REQUEST_SIZE = protocol.MIN_READ_BUFFER + _MAX_WRITE
_new = tuple.__new__


class Request(NamedTuple):
    """What a handler has to know of a request; `body` is what its opcode has behind the header."""

    nid: int
    body: bytes
    unique: int
    pid: int


class _Records(NamedTuple):
    """What a directory block shows: the records, joined; where each of them ends, after a 0; files to prepare for."""

    records: bytes
    ends: list[int]
    files: list[Nid]


Answer: TypeAlias = "Bytes | int | None"
"""The body of an answer, or the errno of a failure; None when the answer comes later, or not at all."""


class Server:
    """Serves a `Vfs` to the kernel. A node's id is its nid, only that of the root is 1."""

    def __init__(
        self, vfs: Vfs, *, uid: int | None = None, gid: int | None = None, prepares_xattrs: bool = False
    ) -> None:
        """`uid` and `gid` replace every owner when given.

        `prepares_xattrs` says that who lists a directory will ask for the xattrs of its files, as overlayfs does.
        """
        self.agreed = trio.Event()
        """Kernel and server have agreed on how to speak, or will not any more."""
        self._fd = -1
        self._failure: HostError | None = None
        self._prepares_xattrs = prepares_xattrs
        self._ahead: list[Nid] = []
        self._vfs = vfs
        self._uid = uid
        self._gid = gid
        self._root = vfs.root.nid
        self._listings = Listings(vfs, self._prepare, COOKIES)
        self._report = Reports().report
        self._later: trio.Nursery | None = None
        self._opens_directories = False
        protocol.check_root(self._root)
        self._handlers: dict[int, Callable[[Request], Answer]] = {
            Opcode.INIT: self._init,
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._getattr,
            Opcode.READLINK: self._readlink,
            Opcode.OPENDIR: self._opendir,
            Opcode.READDIRPLUS: self._readdirplus,
            Opcode.OPEN: self._open,
            Opcode.READ: self._read,
            Opcode.GETXATTR: self._getxattr,
            Opcode.LISTXATTR: self._listxattr,
            Opcode.STATFS: self._statfs,
            **dict.fromkeys((Opcode.RELEASE, Opcode.RELEASEDIR, Opcode.DESTROY), _done),
            **dict.fromkeys((Opcode.FORGET, Opcode.BATCH_FORGET), _ignore),
        }

    async def run(self, fd: int, poll: float) -> None:
        """Answer the requests that come on `fd`, a descriptor of /dev/fuse, until the mount has gone.

        `poll` is in seconds. Raises HostError when the kernel is too old.
        """
        self._fd = fd
        os.set_blocking(fd, False)
        waiter = RequestWaiter(poll, self._is_idle, self._work_ahead)
        async with trio.open_nursery() as self._later:
            while self._failure is None and (data := await waiter.request(fd, self._receive)):
                self._serve(data)
            self._later.cancel_scope.cancel()
        self.agreed.set()
        if self._failure is not None:
            raise self._failure

    def _receive(self) -> bytes | None:
        """Return a request, nothing when the mount has gone, None when there is none yet."""
        try:
            return os.read(self._fd, _REQUEST_SIZE)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return b""
            if error.errno in (errno.EAGAIN, errno.EINTR, errno.ENOENT):  # the last: whoever asked has gone
                return None
            raise

    def _serve(self, data: bytes) -> None:
        _, opcode, unique, nid, _, _, pid, _, _ = _unpack_header(data)
        handler = self._handlers.get(opcode, _refuse)
        if nid == protocol.ROOT_ID:
            nid = self._root
        try:
            answer = handler(_new(Request, (nid, data[_BODY:], unique, pid)))
        except CfsError as error:
            answer = self._errno(error)
        except Exception:  # one bad inode must not unmount the rest
            log.exception("unexpected error in %s of nid %d", Opcode(opcode).name, nid)
            answer = errno.EIO
        if answer is not None:
            self._reply(unique, answer)

    def _errno(self, error: CfsError) -> int:
        if isinstance(error, ImageError):
            self._report(error)
        return errno_of(error)

    def _reply(self, unique: int, answer: Bytes | int) -> None:
        try:
            if isinstance(answer, int):
                os.write(self._fd, _pack_header(_HEADER, -answer, unique))
            else:
                os.writev(self._fd, (_pack_header(_HEADER + len(answer), 0, unique), answer))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV):  # whoever asked has gone, or the mount
                return
            # One answer that the kernel does not take must not unmount the rest.
            log.exception("unexpected error in an answer")
            with contextlib.suppress(OSError):
                os.write(self._fd, _pack_header(_HEADER, -errno.EIO, unique))

    def _answer_later(self, request: Request, what: str, answer: Callable[[], Awaitable[Bytes]]) -> None:
        async def run() -> None:
            try:
                found: Bytes | int = await answer()
            except CfsError as error:
                found = self._errno(error)
            except Exception:
                log.exception("unexpected error in %s of nid %d", what, request.nid)
                found = errno.EIO
            self._reply(request.unique, found)

        if self._later is not None:
            self._later.start_soon(run)

    def _is_idle(self) -> bool:
        return self._vfs.in_flight == 0

    def _work_ahead(self) -> bool:
        """Prepare something that will probably be asked for; return whether there was something."""
        if not self._ahead:
            return self._listings.work_ahead()
        with contextlib.suppress(Exception):  # whoever asks for it will be told
            self._vfs.prepare_xattrs(self._ahead.pop())
        return True

    # --- The handlers, in the order of the protocol's opcodes ---

    def _lookup(self, request: Request) -> Answer:
        name = request.body[:-1]
        if len(name) > NAME_MAX:
            return errno.ENAMETOOLONG
        inode = self._vfs.lookup(request.nid, name)
        return _ABSENT if inode is None else protocol.ENTRY_OUT.pack(*self._entry(inode))

    def _getattr(self, request: Request) -> Answer:
        return protocol.ATTR_OUT.pack(FOREVER, 0, 0, *self._entry(self._vfs.inode(request.nid))[_ATTRIBUTES:])

    def _readlink(self, request: Request) -> Answer:
        return self._vfs.readlink(request.nid)

    def _open(self, request: Request) -> Answer:
        if self._vfs.open_now(request.nid):
            return _OPENED

        async def opened() -> bytes:
            await self._vfs.read_later(request.nid, 0, 0)
            return _OPENED

        self._answer_later(request, "OPEN", opened)
        return None

    def _read(self, request: Request) -> Answer:
        _, offset, size, _ = protocol.READ_IN.unpack_from(request.body)
        data = self._vfs.read_now(request.nid, offset, size)
        if data is None:
            self._answer_later(request, "READ", functools.partial(self._vfs.read_later, request.nid, offset, size))
        return data

    def _statfs(self, _: Request) -> Answer:
        space = self._vfs.statfs()
        return protocol.KSTATFS.pack(
            space.f_blocks,
            space.f_bfree,
            space.f_bavail,
            space.f_files,
            space.f_ffree,
            space.f_bsize,
            space.f_namemax,
            space.f_frsize,
        )

    def _getxattr(self, request: Request) -> Answer:
        (size,) = protocol.GETXATTR_IN.unpack_from(request.body)
        name = request.body[protocol.GETXATTR_IN.size : -1]
        value = self._vfs.xattr(request.nid, name)
        return errno_of_absent_xattr(name) if value is None else _fitting(value, size)

    def _listxattr(self, request: Request) -> Answer:
        (size,) = protocol.GETXATTR_IN.unpack_from(request.body)
        names = visible_names(self._vfs.xattrs(request.nid), request.pid)
        return _fitting(b"".join(name + b"\0" for name in names), size)

    def _init(self, request: Request) -> Answer:
        major, minor, max_readahead, flags = protocol.INIT_IN.unpack_from(request.body)
        if (major, minor) < protocol.OLDEST:
            self._failure = HostError(f"FUSE {major}.{minor} of this kernel is too old: that needs Linux 3.15")
            return errno.EPROTO
        self.agreed.set()
        wanted = _WANTED | (InitFlag.POSIX_ACL if self._vfs.reader.image.has_acl else 0)
        self._opens_directories = not flags & InitFlag.NO_OPENDIR_SUPPORT
        return protocol.INIT_OUT.pack(
            *protocol.SPOKEN,
            max_readahead,
            flags & wanted,
            _MAX_BACKGROUND,
            _MAX_BACKGROUND * 3 // 4,
            _MAX_WRITE,
            1,
            _MAX_PAGES,
        )

    def _opendir(self, _: Request) -> Answer:
        # ENOSYS once, and the kernel never asks again, and keeps the listings.
        return _DIRECTORY_OPENED if self._opens_directories else errno.ENOSYS

    def _readdirplus(self, request: Request) -> Answer:
        _, offset, size, _ = protocol.READ_IN.unpack_from(request.body)
        block, skip = divmod(offset, COOKIES)
        pieces = []
        while True:
            prepared = self._listings.get(request.nid, block)
            records, ends, files = prepared.answer
            self._ahead = files[::-1]
            first = min(skip, len(ends) - 1)
            last = bisect.bisect_right(ends, ends[first] + size) - 1
            pieces.append(records[ends[first] : ends[last]])
            if prepared.is_last or last < len(ends) - 1:
                return b"".join(pieces)
            size -= ends[last] - ends[first]
            block, skip = block + 1, 0

    def _prepare(self, entries: Entries, cookie: int) -> _Records:
        records = []
        for at, (name, inode) in enumerate(entries, cookie):
            # Of the directory itself and its parent, zeros say that only the number and the type are told.
            entry = _NO_ENTRY if name in DOTS else self._entry(inode)
            length = len(name)
            record = _pack_direntplus(*entry, inode.nid, at, length, inode.mode >> _TYPE_SHIFT)
            records.append(record + name + _PADDING[-length & 7])
        ends = [*accumulate(map(len, records), initial=0)]
        files = [inode.nid for _, inode in entries if inode.is_regular] if self._prepares_xattrs else []
        return _Records(b"".join(records), ends, files)

    def _entry(self, inode: Inode) -> tuple[int, ...]:
        nid, mode, nlink, uid, gid, size, mtime_ns, _, i_u, _, _ = inode
        if nid <= protocol.ROOT_ID:
            raise ImageError("dirent nid", f"{nid} stands for the root, or for nothing, in FUSE")
        blocks = (size + 4095 >> 12) << 3
        s, ns = divmod(mtime_ns, NSEC_PER_SEC)
        owner = uid if self._uid is None else self._uid
        group = gid if self._gid is None else self._gid
        rdev = i_u if mode & DEVICE_MASK == stat.S_IFCHR else 0
        # Plain values in one tuple, without another call: a walk makes one for each entry.
        return (
            nid, 0, FOREVER, FOREVER, 0, 0,
            nid, size, blocks, s, s, s, ns, ns, ns,
            mode, nlink, owner, group, rdev, 4096, 0,
        )  # fmt: skip


_ABSENT = protocol.ENTRY_OUT.pack(0, 0, FOREVER, *[0] * 19)
_NO_ENTRY = (0,) * 22
_ATTRIBUTES = 6  # in an entry, behind its number and the timeouts
_PADDING = [bytes(size) for size in range(8)]
_OPENED = protocol.OPEN_OUT.pack(0, OpenFlag.KEEP_CACHE, 0)
_DIRECTORY_OPENED = protocol.OPEN_OUT.pack(0, OpenFlag.KEEP_CACHE | OpenFlag.CACHE_DIR, 0)
_BODY = protocol.IN_HEADER.size
_HEADER = protocol.OUT_HEADER.size
_unpack_header = protocol.IN_HEADER.unpack_from
_pack_header = protocol.OUT_HEADER.pack
_pack_direntplus = protocol.DIRENTPLUS.pack
_TYPE_SHIFT = 12  # the type in st_mode is above the permissions, in a dirent alone


def _done(_: Request) -> Answer:
    return b""


def _ignore(_: Request) -> Answer:
    return None  # the kernel wants no answer, and nothing is kept for an inode


def _refuse(_: Request) -> Answer:
    return errno.ENOSYS  # of most requests the kernel learns by that never to make them again


def _fitting(value: bytes, size: int) -> Answer:
    """Answer a request for an xattr, or for a list of them, that has room for `size` bytes; 0 asks for the size."""
    if not size:
        return protocol.GETXATTR_OUT.pack(len(value))
    return value if len(value) <= size else errno.ERANGE


class Life(Protocol):
    """What the one who mounts does for a session."""

    def mounted(self) -> AbstractContextManager[int]:
        """Mount, and give the device on which requests come; unmount in the end what is still this mount."""

    async def begins(self) -> None:
        """Announce the mount, or make it first where that takes answers. Raises a CfsError when that fails."""


async def serve(server: Server, *, poll: float, life: Life) -> None:
    """Mount, and serve until the mount has gone, or until SIGINT or SIGTERM; `poll` is in seconds.

    Raises the CfsError for which the mount cannot be made, or does not come to life.
    """
    failures: list[CfsError] = []
    begun = trio.Event()
    # First of all the signals: one that comes while the mount is made must not leave it.
    with trio.open_signal_receiver(*SIGNALS) as signals, life.mounted() as device:
        async with trio.open_nursery() as nursery:
            stop = nursery.cancel_scope.cancel

            async def run() -> None:
                with _noted(failures):
                    await server.run(device, poll)
                await begun.wait()  # a mount that fails takes the device's with it, and says why a little later
                stop()

            nursery.start_soon(stop_on_signal, signals, stop)
            nursery.start_soon(run)
            settle_memory()
            await server.agreed.wait()
            with _noted(failures):
                await life.begins()
            begun.set()
            if failures:
                stop()
    if failures:
        raise failures[0]


@contextlib.contextmanager
def _noted(failures: list[CfsError]) -> Iterator[None]:
    """Note a CfsError instead of raising it: out of a nursery it would come in a group."""
    try:
        yield
    except CfsError as error:
        failures.append(error)
