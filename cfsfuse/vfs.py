"""The read-only file system: the tree of a reader, the bytes of an object store. It knows nothing of pyfuse3.

Metadata is in memory and never waits, so its methods are plain. What may need a disk is tried without waiting first,
and when it would wait, one of a bounded number of worker threads does it; unless the disk is known to be faster than
that (`pace.py`). The hashing comes back to the event loop, where it is faster than in a second thread.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

import trio

from cfsfuse.erofs.image import Nid
from cfsfuse.erofs.ondisk import FT_CHRDEV, FT_DIR, NAME_MAX
from cfsfuse.erofs.reader import DOTS
from cfsfuse.errors import ImageError, ObjectError, printable
from cfsfuse.lru import Lru
from cfsfuse.pace import Pace
from cfsfuse.tree import External, Inline, Sparse
from cfsfuse.trees import TreeNeeded

if TYPE_CHECKING:
    from collections.abc import Callable

    from cfsfuse.erofs.inode import Inode
    from cfsfuse.erofs.reader import Reader
    from cfsfuse.objects import Loaded, ObjectStore
    from cfsfuse.tree import Node
    from cfsfuse.verity.digest import Bytes

log = logging.getLogger(__name__)

T = TypeVar("T")

_DISK_THREADS = 16
_TREE_THREADS = 2
_NODE_BUDGET = 4 << 20  # bytes
_NODE_OVERHEAD = 1000  # bytes that a node costs besides its content and xattrs
_KEPT_NAMES = 32768  # about 100 bytes each
_XATTRS_BUDGET = 2 << 20  # bytes
_XATTRS_OVERHEAD = 600  # bytes that an inode's xattrs cost besides their values
_REPORTS = 4096
_LONGEST_SEARCH = 5.0  # seconds; an error is logged without its path then


class Listing(NamedTuple):
    """What a directory block shows: names and inodes, the nids of subdirectories, and whether it is the last block."""

    entries: list[tuple[bytes, Inode]]
    subdirectories: list[Nid]
    is_last: bool


class Space(NamedTuple):
    """The fields of statvfs(3) that a file system answers."""

    f_bsize: int
    f_frsize: int
    f_blocks: int
    f_bfree: int
    f_bavail: int
    f_files: int
    f_ffree: int
    f_favail: int
    f_namemax: int


class Vfs:
    """The file system of one image. Inodes are named by nid, open files too: nothing is kept for them."""

    def __init__(self, reader: Reader, store: ObjectStore, *, space_of_store: bool = True) -> None:
        """Serve `reader`; statfs tells the space of the object store, or else that of the image, which is full."""
        self.reader = reader
        self.root = reader.root
        self.in_flight = 0
        self._space_of_store = space_of_store
        self._store = store
        self._disk = trio.CapacityLimiter(_DISK_THREADS)
        self._trees = trio.CapacityLimiter(_TREE_THREADS)
        self._pace = Pace(may_be_fast=store.is_local)
        self._names: Lru[int, dict[bytes, Nid]] = Lru(_KEPT_NAMES)
        self._xattrs: Lru[int, dict[bytes, bytes]] = Lru(_XATTRS_BUDGET)
        self._nodes: Lru[Nid, Node] = Lru(_NODE_BUDGET)
        self._reported: Lru[tuple[Nid, str], bool] = Lru(_REPORTS)
        self._findings: list[tuple[Nid, str]] = []
        self._is_reporting = False

    def inode(self, nid: int) -> Inode:
        """Return the inode of `nid`."""
        return self.reader.inode(Nid(nid))

    def lookup(self, parent: int, name: bytes) -> Inode | None:
        """Return what `name` is in the directory `parent`, None when it is absent.

        Small directories are read once and kept: most look-ups are of names that are not there, and many.
        """
        names = self._names.get(parent)
        if names is None:
            directory = self.inode(parent)
            if self.reader.block_count(directory) > 1:
                return self.reader.lookup(directory, name)
            names = {known: nid for known, nid, _ in self.reader.block(directory, 0)}
            self._names.put(parent, names, len(names) + 1)
        nid = names.get(name)
        inode = None if nid is None else self.reader.inode(nid)
        return None if inode is None or inode.is_whiteout else inode

    def listing(self, directory: int, block: int) -> Listing:
        """Return what directory block `block` shows; nothing behind the last block.

        Of `..` only the number and the type are right: nobody gets to see more of it.
        """
        parent = self.inode(directory)
        dirents = self.reader.block(parent, block)
        # In one go, which is faster; all but those of the directory itself and its parent.
        inodes = iter(self.reader.inodes([nid for name, nid, _ in dirents if name not in DOTS]))
        entries = [(name, parent.numbered(nid) if name in DOTS else next(inodes)) for name, nid, _ in dirents]
        if any(kind == FT_CHRDEV for _, _, kind in dirents):
            entries = [entry for entry in entries if not entry[1].is_whiteout]
        subdirectories = [nid for name, nid, kind in dirents if kind == FT_DIR and name not in DOTS]
        return Listing(entries, subdirectories, is_last=block + 1 >= self.reader.block_count(parent))

    def readlink(self, nid: int) -> bytes:
        """Return the target of a symbolic link."""
        return self.reader.readlink(self.inode(nid))

    def xattr(self, nid: int, name: bytes) -> bytes | None:
        """Return the value of an xattr, None when the inode has none of that name."""
        known = self._xattrs.get(nid)
        if known is None:
            inode = self.inode(nid)
            if self.reader.surely_lacks(inode, name):
                return None
            known = self._keep_xattrs(inode)
        return known.get(name)

    def prepare_xattrs(self, nid: int) -> None:
        """Read the xattrs of an inode that somebody will ask for: overlayfs asks for three of each file."""
        if self._xattrs.get(nid) is None:
            self._keep_xattrs(self.inode(nid))

    def _keep_xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        xattrs = self.reader.xattrs(inode)
        self._xattrs.put(inode.nid, xattrs, _XATTRS_OVERHEAD + sum(map(len, xattrs.values())))
        return xattrs

    def xattrs(self, nid: int) -> dict[bytes, bytes]:
        """Return the xattrs of an inode, as the kernel mount shows them to root."""
        return self.node(nid).xattrs

    def node(self, nid: int) -> Node:
        """Return the node of `nid`; the last ones asked for are kept."""
        node = self._nodes.get(Nid(nid))
        if node is None:
            node = self.reader.node(self.inode(nid))
            self._nodes.put(Nid(nid), node, _cost(node))
        return node

    def statfs(self) -> Space:
        """Return the space of the store's file system (what a desktop should warn about), or of the image."""
        super_block = self.reader.image.super_block
        store = self._store.statvfs() if self._space_of_store else None
        if store is None:
            return Space(4096, 4096, super_block.blocks, 0, 0, super_block.inos, 0, 0, NAME_MAX)
        return Space(
            store.f_bsize,
            store.f_frsize,
            store.f_blocks,
            store.f_bfree,
            store.f_bavail,
            store.f_files,
            store.f_ffree,
            store.f_favail,
            NAME_MAX,
        )

    async def open(self, nid: int) -> None:
        """Check that a regular file can be read; raise the ObjectError that says why not."""
        if not self.open_now(nid):
            await self.read_later(nid, 0, 0)

    def open_now(self, nid: int) -> bool:
        """Do what `open` does if no thread is needed for it; return whether that was so."""
        node = self.node(nid)
        if not isinstance(node, External):
            return True
        # Looked at, not opened anew: that is as good. It counts for the pace, as all that may have waited for the disk.
        if self._pace.is_fast and self._pace.timed(functools.partial(self._store.is_known_good, node)):
            return True
        return self._object_now(nid, node, 0, 0) is not None

    async def read(self, nid: int, offset: int, length: int) -> Bytes:
        """Return verified bytes of a regular file, fewer than `length` only at its end."""
        data = self.read_now(nid, offset, length)
        return await self.read_later(nid, offset, length) if data is None else data

    def read_now(self, nid: int, offset: int, length: int) -> Bytes | None:
        """Return what `read` does, None when a thread is needed for it."""
        node = self.node(nid)
        if isinstance(node, External):
            return self._object_now(nid, node, offset, length)
        if isinstance(node, Inline):
            return memoryview(node.content)[offset : offset + length]
        if isinstance(node, Sparse):
            return bytes(max(0, min(length, node.stat.size - offset)))
        raise ImageError("i_mode", f"nid {nid} is read, but is no regular file: {node.stat.mode:o}")

    def _object_now(self, nid: int, node: External, offset: int, length: int) -> Bytes | None:
        """Read an object without a thread, None when that cannot be; length 0 does what opening it demands."""
        try:
            if self._pace.is_fast:  # to try without waiting first costs more than it saves
                loaded = self._load_timed(node, offset, length)
            else:
                load = functools.partial(self._store.load, node, offset, length, wait=False)
                loaded = _unless(BlockingIOError, load)
            return None if loaded is None else self._store.finish(loaded, offset, length)
        except ObjectError as error:
            self._report(nid, error)
            raise

    async def read_later(self, nid: int, offset: int, length: int) -> Bytes:
        """Return what `read_now` has not, waiting for it in a thread; length 0 does what opening demands."""
        node = cast("External", self.node(nid))  # only what is in an object has to be waited for
        try:
            loaded = await self._in_thread(functools.partial(self._load_timed, node, offset, length), self._disk)
            if loaded is None:
                # A tree has to be computed: that may take minutes, and must not take the threads of everybody else.
                load = functools.partial(self._store.load, node, offset, length)
                loaded = await self._in_thread(load, self._trees)
            return self._store.finish(loaded, offset, length)
        except ObjectError as error:
            self._report(nid, error)
            raise

    def _load_timed(self, node: External, offset: int, length: int) -> Loaded | None:
        """Load what has to be waited for, and note the disk's pace; None when a tree has to be computed first."""
        load = functools.partial(self._store.load, node, offset, length, compute=False)
        return _unless(TreeNeeded, functools.partial(self._pace.timed, load))

    async def _in_thread(self, load: Callable[[], T], limiter: trio.CapacityLimiter) -> T:
        self.in_flight += 1
        try:
            # Abandoned when the mount ends: nobody is to wait for a tree, or for a disk that hangs.
            return await trio.to_thread.run_sync(load, abandon_on_cancel=True, limiter=limiter)
        finally:
            self.in_flight -= 1

    def _report(self, nid: int, error: ObjectError) -> None:
        """Log an error once for each file and finding, with a path that the file has in the image.

        Looking for paths takes a walk through all directories, so it is done after the answer, and once for all
        findings that have come up by then.
        """
        key = (Nid(nid), str(error))
        if self._reported.get(key) is None:
            self._reported.put(key, True)
            self._findings.append(key)
            if not self._is_reporting:
                self._is_reporting = True
                trio.lowlevel.spawn_system_task(self._log_findings)

    async def _log_findings(self) -> None:
        # Shielded for a moment: what has been found is to be said even when the mount ends meanwhile.
        with trio.CancelScope(shield=True):
            while self._findings:
                findings, self._findings = self._findings, []
                search = functools.partial(self.reader.paths_of, {nid for nid, _ in findings})
                paths: dict[Nid, bytes] = {}
                with trio.move_on_after(_LONGEST_SEARCH):
                    paths = await trio.to_thread.run_sync(search, abandon_on_cancel=True, limiter=self._disk)
                for nid, text in findings:
                    log.error("%s: %s", printable(paths.get(nid, b"?")), text)
        self._is_reporting = False


def _cost(node: Node) -> int:
    content = len(node.content) if isinstance(node, Inline) else 0
    return _NODE_OVERHEAD + content + sum(map(len, node.xattrs.values()))


def _unless(refusal: type[Exception], load: Callable[[], Loaded]) -> Loaded | None:
    """Load, and return None for `refusal`, whose traceback must not outlive this: it holds descriptors open."""
    try:
        return load()
    except refusal:
        return None
