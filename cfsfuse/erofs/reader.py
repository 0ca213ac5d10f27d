"""nid → node: the image as a tree, read lazily. Opening an image costs the same for 10 and for 1,000,000 entries.

Nothing recurses, so the depth of a hostile image costs no stack; nothing is kept, so its breadth costs no memory.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from cfsfuse.erofs import dirent, ondisk, overlay
from cfsfuse.erofs.inode import Inode, check_holes, flat_data, read_inode, read_inodes
from cfsfuse.erofs.ondisk import DataLayout
from cfsfuse.erofs.xattr import surely_absent, xattrs
from cfsfuse.errors import ImageError, PathNotFound
from cfsfuse.tree import Device, Directory, External, Inline, Node, Sparse, Stat, Symlink

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cfsfuse.erofs.dirent import Dirent
    from cfsfuse.erofs.image import Image, Nid
    from cfsfuse.erofs.xattr import Xattr

DOTS = (b".", b"..")


class Room:
    """How many dirents an image has room for, counted down by whoever goes through its directories.

    Directories that share blocks, which nobody writes, could keep a walk busy for days.
    """

    def __init__(self, image: Image) -> None:
        self._left = image.size // ondisk.DIRENT.size

    def take(self) -> None:
        """Count a dirent; raise ImageError when there are too many."""
        self._left -= 1
        if self._left < 0:
            raise ImageError("dirent", "directories have more entries than the image has room for: they share blocks")


class Reader:
    """The tree of a composefs image, as the kernel composefs mount shows it.

    `authored` alone differs: it gives a node as composefs-dump(5) writes it.
    """

    def __init__(self, image: Image, view: overlay.View = overlay.MOUNTED) -> None:
        """Check that `image` is acceptable as composefs and that its root is a directory; xattrs are as `view` has."""
        image.require_composefs()
        self.image = image
        self._view = view
        self.root = self.inode(image.root_nid)
        if not self.root.is_directory:
            raise ImageError("root_nid", f"nid {image.root_nid} is not a directory")

    def inode(self, nid: Nid) -> Inode:
        """Return the inode of `nid`."""
        return read_inode(self.image, nid)

    def inodes(self, nids: Iterable[Nid]) -> list[Inode]:
        """Return the inodes of `nids`, in less time than one by one."""
        return read_inodes(self.image, nids)

    def lookup(self, directory: Inode, name: bytes) -> Inode | None:
        """Return the inode that `name` has in `directory`, None when it has none that a mount would show."""
        nid = dirent.find(self.image, self._directory(directory), name)
        if nid is None:
            return None
        inode = read_inode(self.image, nid)
        return None if inode.is_whiteout else inode

    def entries(self, directory: Inode) -> Iterator[tuple[bytes, Inode]]:
        """Yield name and inode of what `directory` shows, in the order of the names' bytes, `.` and `..` included."""
        for name, nid, _ in dirent.dirents(self.image, self._directory(directory)):
            inode = read_inode(self.image, nid)
            if not inode.is_whiteout:
                yield name, inode

    def block(self, directory: Inode, index: int) -> list[Dirent]:
        """Return the dirents of directory block `index`, hidden ones included; none behind the last block."""
        return dirent.block(self.image, self._directory(directory), index)

    def block_count(self, directory: Inode) -> int:
        """Return how many blocks `directory` has."""
        return dirent.block_count(directory)

    def walk(self, path: bytes = b"/", *, start: Inode | None = None) -> Iterator[tuple[bytes, Inode]]:
        """Yield path and inode of the directory `start` and all below it, depth first, names in the order of bytes.

        Raises ImageError when a directory is met twice: composefs has no hard links to directories, so it is a cycle.
        """
        top = start or self.root
        seen = {top.nid}
        room = Room(self.image)
        yield path, top
        # One path is kept, and how much of it each level has: a path for each would cost the square of a hostile depth.
        base = path.rstrip(b"/")
        stack = [(len(base), self.entries(top))] if top.is_directory else []
        while stack:
            _, children = stack[-1]
            name, inode = next(children, (b"", None))
            room.take()
            if inode is None:
                stack.pop()
                base = base[: stack[-1][0]] if stack else base
            elif name not in DOTS:
                child = base + b"/" + name
                yield child, inode
                if inode.is_directory:
                    if inode.nid in seen:
                        raise ImageError("dirent nid", f"directory nid {inode.nid} is reached twice: a cycle")
                    seen.add(inode.nid)
                    base = child
                    stack.append((len(base), self.entries(inode)))

    def paths_of(self, nids: set[Nid]) -> dict[Nid, bytes]:
        """Return a path that leads to each of `nids`, as far as there is one: a search through all directories."""
        above: dict[Nid, tuple[Nid, bytes]] = {self.root.nid: (self.root.nid, b"")}
        stack = [self.root.nid]
        room = Room(self.image)
        while stack and not nids <= above.keys():
            at = stack.pop()
            for name, found, file_type in dirent.dirents(self.image, self._directory(self.inode(at))):
                room.take()
                if name in DOTS or found in above:
                    continue
                if file_type == ondisk.FT_DIR:
                    stack.append(found)
                if file_type == ondisk.FT_DIR or found in nids:
                    above[found] = (at, name)
        return {nid: path_from(nid, above) for nid in nids if nid in above}

    def resolve(self, path: bytes) -> Inode:
        """Return the inode at `path`, following no symlink; raise PathNotFound."""
        inode = self.root
        for name in path.split(b"/"):
            if name in (b"", b"."):
                continue
            found = self.lookup(inode, name) if inode.is_directory else None
            if found is None:
                raise PathNotFound(path)
            inode = found
        return inode

    def xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        """Return the xattrs that the view shows to root."""
        return self._view.xattrs(xattrs(self.image, inode))

    def surely_lacks(self, inode: Inode, name: bytes) -> bool:
        """Return whether `inode` has no xattr `name`: the usual answer, and mostly found without reading any."""
        return surely_absent(self.image, inode, self._view.stored(name))

    def readlink(self, inode: Inode) -> bytes:
        """Return the target of a symbolic link."""
        if inode.layout is DataLayout.CHUNK_BASED or not 0 < inode.size <= ondisk.SYMLINK_MAX:
            raise ImageError("symlink", f"nid {inode.nid}: {inode.size} bytes in layout {inode.layout.name}")
        target = flat_data(self.image, inode)
        # The kernel shows a link up to its first NUL, but reports the full size: no writer makes one.
        if b"\0" in target:
            raise ImageError("symlink", f"nid {inode.nid}: the target has a NUL byte")
        return target

    def node(self, inode: Inode) -> Node:
        """Return the node of `inode` as the kernel mount shows it, with its content or where that is."""
        stored = list(xattrs(self.image, inode))
        return self._node(inode, stored, self._view.xattrs(stored))

    def authored(self, inode: Inode) -> Node:
        """Return the node of `inode` as composefs-dump(5) writes it: an escaped whiteout is a 0:0 device again."""
        stored = list(xattrs(self.image, inode))
        plain = overlay.authored_xattrs(stored, is_regular=inode.is_regular)
        if inode.is_regular and any(name == overlay.ESCAPED_WHITEOUT for name, _, _ in stored):
            mode = stat.S_IFCHR | stat.S_IMODE(inode.mode)
            return Device(_stat(inode)._replace(mode=mode, size=0), plain)
        return self._node(inode, stored, plain)

    def _node(self, inode: Inode, stored: list[Xattr], shown: dict[bytes, bytes]) -> Node:
        status = _stat(inode)
        if inode.is_directory:
            return Directory(status, shown)
        if inode.is_symlink:
            return Symlink(status, shown, self.readlink(inode))
        if not inode.is_regular:
            return Device(status, shown)
        metacopy, redirect = overlay.whereabouts(stored)
        if metacopy is not None:
            path = redirect[1:] if redirect.startswith(b"/") else None
            return External(status, shown, path, overlay.metacopy_digest(metacopy))
        if inode.layout is DataLayout.CHUNK_BASED:
            check_holes(self.image, inode)
            return Sparse(status, shown)
        return Inline(status, shown, flat_data(self.image, inode))

    def _directory(self, inode: Inode) -> Inode:
        """Return `inode` when it is a directory whose data can be read as one."""
        if not inode.is_directory or inode.layout is DataLayout.CHUNK_BASED:
            raise ImageError("i_mode", f"nid {inode.nid} is used as a directory: {inode.mode:o} {inode.layout.name}")
        return inode


def _stat(inode: Inode) -> Stat:
    return Stat(inode.mode, inode.nlink, inode.uid, inode.gid, inode.rdev, inode.size, inode.mtime_ns)


def path_from(nid: Nid, above: dict[Nid, tuple[Nid, bytes]]) -> bytes:
    """Return the path of `nid`, given the parent and the name of it and of all above; the root is its own parent."""
    names = []
    parent, name = above[nid]
    while nid != parent:
        names.append(name)
        nid = parent
        parent, name = above[nid]
    return b"/" + b"/".join(reversed(names))
