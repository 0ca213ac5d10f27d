"""The image as a witness: what it says of an entry, under the names that the checks use.

It says nothing of devices, blocks and offsets, which are a mount's own.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.contract.contents import told, told_of_zeros
from cfsfuse.contract.observe import Failure
from cfsfuse.erofs.reader import DOTS
from cfsfuse.tree import External, Inline, Sparse
from cfsfuse.verity.digest import SHA256

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cfsfuse.contract.entries import Entry
    from cfsfuse.contract.observe import Observations
    from cfsfuse.erofs.inode import Inode
    from cfsfuse.erofs.reader import Reader
    from cfsfuse.tree import Node

_NOT_THERE = Failure("ENOENT")
_NO_DATA = Failure("ENODATA")
_ACLS = {"system.posix_acl_access", "system.posix_acl_default"}
UNTOLD = Failure("not told")
"""Stands for what the image does not tell although it has it."""


class Observer(NamedTuple):
    """Who looks at the mounts, as far as that decides what a right mount shows.

    `sees_all` is for root: xattrs of `trusted.*`, and every content. `uid` and `gid` give the number that a process
    gets to see for one that is in the image; `has_all_ids` says that each stands for itself, in ACLs as well.
    """

    sees_all: bool = True
    has_all_ids: bool = True
    uid: Callable[[int], int] = int
    gid: Callable[[int], int] = int


class ImageWitness:
    """What an image says, and whether the objects are there that it names."""

    def __init__(self, reader: Reader, exists: Callable[[bytes], bool], observer: Observer | None = None) -> None:
        """Tell of `reader`; `exists` says whether there is an object of a path."""
        self.reader = reader
        self.observer = observer or Observer()
        self._exists = exists
        self._tell = {
            "stat": self._stat,
            "xattrs": self._xattrs,
            "readlink": self._readlink,
            "listing": self._listing,
            "names": self._names,
            "digest": self._digest,
        }

    @property
    def checks(self) -> frozenset[str]:
        """The checks for which it has something to say."""
        return frozenset(self._tell)

    def children(self, directory: Inode) -> Iterator[tuple[bytes, Inode]]:
        """Yield what a mount shows in a directory."""
        return ((name, inode) for name, inode in self.reader.entries(directory) if name not in DOTS)

    def measure(self, inode: Inode) -> str | None:
        """Return by which digest the content of a file is told as a whole; None where there is none to be had."""
        node = self.reader.node(inode) if inode.is_regular else None
        if node is None or isinstance(node, Sparse):
            return None
        return node.digest.algorithm if isinstance(node, External) and node.digest else SHA256.name

    def observe(self, check: str, inode: Inode, entry: Entry) -> Observations:
        """Return what the image says of `inode` in a check; raises ImageError where it cannot be read."""
        return self._tell[check](inode, entry)

    def _stat(self, inode: Inode, _: Entry) -> Observations:
        return {
            "st_mode": inode.mode,
            "st_nlink": inode.nlink,
            "st_uid": self.observer.uid(inode.uid),
            "st_gid": self.observer.gid(inode.gid),
            "st_rdev": _device(inode.rdev),
            "st_size": inode.size,
            "st_ino": inode.nid,
            **dict.fromkeys(("st_atime_ns", "st_mtime_ns", "st_ctime_ns"), inode.mtime_ns),
        }

    def _xattrs(self, inode: Inode, _: Entry) -> Observations:
        # xattr(7): of what is neither file nor directory, the kernel lists user.* xattrs, and gives none of them.
        has_user = inode.is_regular or inode.is_directory
        shown: Observations = {
            os.fsdecode(name): value if has_user or not name.startswith(b"user.") else _NO_DATA
            for name, value in self.reader.xattrs(inode).items()
            if self.observer.sees_all or not name.startswith(b"trusted.")
        }
        if not self.observer.has_all_ids:
            shown |= dict.fromkeys(shown.keys() & _ACLS, UNTOLD)
        return {"listxattr": sorted(shown), **{f"getxattr {name!r}": value for name, value in shown.items()}}

    def _readlink(self, inode: Inode, _: Entry) -> Observations:
        return {"target": self.reader.readlink(inode)} if inode.is_symlink else {}

    def _listing(self, inode: Inode, _: Entry) -> Observations:
        return {
            f"{name!r} d_ino, d_type": (child.nid, stat.S_IFMT(child.mode) >> 12)
            for name, child in (self.children(inode) if inode.is_directory else ())
        }

    def _names(self, inode: Inode, entry: Entry) -> Observations:
        if not inode.is_directory:
            return {}
        children = {name: child.nid for name, child in self.children(inode)}
        numbers = {repr(name): children.get(name, _NOT_THERE) for name in entry.children}
        return {"listed": sorted(children), **numbers}

    def _digest(self, inode: Inode, _: Entry) -> Observations:
        return self._told(self.reader.node(inode)) if inode.is_regular else {}

    def _told(self, node: Node) -> Observations:
        if isinstance(node, Inline):
            return told(node.content)
        if isinstance(node, Sparse):
            return told_of_zeros(node.stat.size)
        if not isinstance(node, External) or node.path is None:
            return {}
        if not self._exists(node.path):
            return {"digest": _NOT_THERE}
        return {"digest": node.digest.value.hex()} if node.digest else {}


def _device(rdev: int) -> int:
    """Return the number that stat(2) gives for what an inode records, the kernel's `new_encode_dev`."""
    return os.makedev(rdev >> 8 & 0xFFF, rdev & 0xFF | rdev >> 12 & 0xFFF00)
