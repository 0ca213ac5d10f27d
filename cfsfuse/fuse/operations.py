"""pyfuse3's operations over a `Vfs`: conversions, prepared answers, and the one table of errno."""

from __future__ import annotations

import errno
import functools
import logging
import stat
from typing import TYPE_CHECKING, Any, TypeVar

import pyfuse3
from pyfuse3 import EntryAttributes, FUSEError

from cfsfuse.erofs.ondisk import NAME_MAX
from cfsfuse.errors import CfsError, ImageError
from cfsfuse.fuse.answers import COOKIES, DEVICE_MASK, FOREVER, Reports, errno_of, errno_of_absent_xattr
from cfsfuse.fuse.caller import visible_names
from cfsfuse.fuse.listings import Entries, Listings
from cfsfuse.fuse.protocol import check_root

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from pyfuse3 import FileHandleT, FileNameT, FlagT, InodeT, ReaddirToken, RequestContext, StatvfsData, XAttrNameT

    from cfsfuse.erofs.inode import Inode
    from cfsfuse.vfs import Vfs

log = logging.getLogger(__name__)

Handler = TypeVar("Handler", bound="Callable[..., Awaitable[Any]]")


def guarded(handler: Handler) -> Handler:
    """Turn domain errors into an errno, and everything unexpected into EIO and a traceback in the log.

    pyfuse3 ends the whole session for any exception but FUSEError: one bad inode must not unmount the rest.
    """

    @functools.wraps(handler)
    async def answer(self: Operations, *arguments: Any) -> Any:  # noqa: ANN401 - as pyfuse3 and the handler have it
        try:
            return await handler(self, *arguments)
        except FUSEError:
            raise
        except CfsError as error:
            if isinstance(error, ImageError):
                self.report(error)
            raise FUSEError(errno_of(error)) from None
        except Exception:
            log.exception("unexpected error in %s%r", handler.__name__, arguments)
            raise FUSEError(errno.EIO) from None

    return answer  # type: ignore[return-value]  # the wrapper takes and returns what the handler does


class Operations(pyfuse3.Operations):
    """The adapter. Inode numbers are nids, except that FUSE calls the root 1; a handle of an open file is its nid."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, vfs: Vfs, *, uid: int | None = None, gid: int | None = None) -> None:
        """Serve `vfs`; `uid` and `gid` replace every owner when given."""
        super().__init__()
        self._vfs = vfs
        self._uid = uid
        self._gid = gid
        self._root = vfs.root.nid
        self.enable_acl = vfs.reader.image.has_acl
        self._listings = Listings(vfs, self._prepare, COOKIES)
        self.work_ahead = self._listings.work_ahead
        self.report = Reports().report
        check_root(self._root)
        self._absent = EntryAttributes()
        self._absent.entry_timeout = FOREVER

    @guarded
    async def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> EntryAttributes:
        if len(name) > NAME_MAX:
            raise FUSEError(errno.ENAMETOOLONG)
        inode = self._vfs.lookup(self._nid(parent_inode), name)
        return self._absent if inode is None else self._attributes(inode)

    @guarded
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return self._attributes(self._vfs.inode(self._nid(inode)))

    @guarded
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        return pyfuse3.FileNameT(self._vfs.readlink(self._nid(inode)))

    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        return pyfuse3.FileHandleT(self._nid(inode))

    @guarded
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        reply = pyfuse3.readdir_reply
        block, skip = divmod(start_id, COOKIES)
        while True:
            prepared = self._listings.get(fh, block)
            for name, attributes, cookie in prepared.answer[skip:]:
                if not reply(token, name, attributes, cookie):
                    return
            if prepared.is_last:
                return
            block, skip = block + 1, 0

    async def releasedir(self, fh: FileHandleT) -> None:
        pass

    @guarded
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> pyfuse3.FileInfo:
        nid = self._nid(inode)
        await self._vfs.open(nid)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(nid), keep_cache=True)

    @guarded
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        return await self._vfs.read(fh, off, size)  # type: ignore[return-value]  # any contiguous buffer will do

    async def flush(self, fh: FileHandleT) -> None:
        # ENOSYS once, and the kernel never asks again: closing a file costs one request less.
        raise FUSEError(errno.ENOSYS)

    async def release(self, fh: FileHandleT) -> None:
        pass

    @guarded
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        value = self._vfs.xattr(self._nid(inode), name)
        if value is None:
            raise FUSEError(errno_of_absent_xattr(name))
        return value

    @guarded
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        return [pyfuse3.XAttrNameT(name) for name in visible_names(self._vfs.xattrs(self._nid(inode)), ctx.pid)]

    @guarded
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        space = self._vfs.statfs()
        answer = pyfuse3.StatvfsData()
        for field, value in space._asdict().items():
            setattr(answer, field, value)
        return answer

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        pass  # nothing is kept for an inode

    def is_idle(self) -> bool:
        """Return whether no request is under way."""
        return self._vfs.in_flight == 0

    def _nid(self, inode: int) -> int:
        return self._root if inode == pyfuse3.ROOT_INODE else inode

    def _prepare(self, entries: Entries, cookie: int) -> list[tuple[bytes, EntryAttributes, int]]:
        attributes = self._attributes
        return [(name, attributes(inode), at) for at, (name, inode) in enumerate(entries, cookie)]

    def _attributes(self, inode: Inode) -> EntryAttributes:
        nid, mode, nlink, uid, gid, size, mtime_ns, _, i_u, _, _ = inode
        if nid <= pyfuse3.ROOT_INODE:
            raise ImageError("dirent nid", f"{nid} stands for the root, or for nothing, in FUSE")
        answer = EntryAttributes()
        answer.st_ino = nid
        answer.st_mode = mode
        answer.st_nlink = nlink
        answer.st_uid = uid if self._uid is None else self._uid
        answer.st_gid = gid if self._gid is None else self._gid
        answer.st_size = size
        answer.st_blocks = (size + 4095 >> 12) << 3
        answer.st_atime_ns = answer.st_mtime_ns = answer.st_ctime_ns = mtime_ns
        answer.entry_timeout = answer.attr_timeout = FOREVER
        if mode & DEVICE_MASK == stat.S_IFCHR:
            answer.st_rdev = i_u
        return answer
