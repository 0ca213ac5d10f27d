"""A directory → the tree that mkcomposefs makes of it, and the contents of its files as objects of a store.

This process walks; workers read, hash and store (`contents.py`). The tree does not depend on who was faster: the walk
makes the entries, in the order of their names, and they are filled when the results come.

Everything is relative to descriptors: no path is too long, no depth too deep, and no symlink is followed but one that
is itself the source. Descriptors are bounded: of the directories on the way down the last few are open, and the way
back up is "..", believed when it leads to where the way down came from.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import stat
import sys
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING

from cfsfuse.builder.contents import Contents, Progress
from cfsfuse.builder.hashing import NO_XATTRS, Changed, Opener, read_xattrs, reason
from cfsfuse.errors import HostError, SourceError, UsageError, printable
from cfsfuse.tree import Device, Directory, Entry, Inline, Link, Sparse, Stat, Symlink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from cfsfuse.builder.store import StoreWriter
    from cfsfuse.tree import Node

__all__ = ["Options", "Progress", "Xattrs", "scan"]

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK | os.O_CLOEXEC
_OPEN_LEVELS = 64  # directories on the way down that are open
_PATH_MAX = 3800  # bytes of a directory's path that can be opened in one piece; PATH_MAX is 4096
_SIZE_MAX = 1 << 53  # bytes that an image can say of a file; a sparse file may have more, and hashing it would not end

_ENCODING = sys.getfilesystemencoding()
_NAME = itemgetter(0)

_UNREAD: Node = Sparse(Stat(0, 0, 0, 0, 0, 0, 0), NO_XATTRS)
"""Stands for the node of an entry that has not been read yet."""


class Xattrs(enum.Enum):
    """Which extended attributes are read: those whose names start with the value."""

    ALL = ""
    USER = "user."
    NONE = None


@dataclass(frozen=True, slots=True)
class Options:
    """How a directory becomes a tree; the defaults are those of mkcomposefs.

    `use_epoch` makes all times 0, `skip_devices` leaves out block and character devices. With `hard_links` the names
    of one file are one entry and links to it; without, each name is a file of its own. So many `processes` read and
    hash; 0 is as many as there are processors for this process.
    """

    use_epoch: bool = False
    skip_devices: bool = False
    xattrs: Xattrs = Xattrs.ALL
    hard_links: bool = False
    processes: int = 0


_DEFAULTS = Options()
_NOTHING: dict[tuple[int, int], str] = {}


def scan(
    source: str,
    options: Options = _DEFAULTS,
    store: StoreWriter | None = None,
    report: Callable[[Progress], None] | None = None,
    avoid: Mapping[tuple[int, int], str] = _NOTHING,
) -> Entry:
    """Return the tree of the directory `source`; contents that are not inlined are staged in `store`.

    `report` is told of the progress, several times a second and at the end. Raises UsageError when there is no such
    directory, or when one to `avoid` is met: by st_dev and st_ino, the reason. Raises SourceError when something in it
    cannot be read or changes meanwhile, StoreError, and HostError when a worker has been killed. After an error `store`
    publishes nothing.
    """
    root = _open_source(source)
    label = os.fsencode(source)
    processes = options.processes or len(os.sched_getaffinity(0))
    try:
        with Contents(root, label, options.xattrs.value, processes, store, report) as contents:
            walk = _Walk(root, label, options, contents, avoid)
            tree = walk.run()
            contents.finish()
            walk.link(tree)
            return tree
    except BaseException:
        if store is not None:
            store.fail()
        raise
    finally:
        os.close(root)


def _open_source(source: str) -> int:
    if not os.path.exists("/proc/self/fd"):
        raise HostError("/proc is not mounted: without it, the extended attributes of symbolic links cannot be read")
    try:
        return os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError as error:
        raise SourceError(os.fsencode(source), reason(error)) from None
    except OSError as error:
        raise UsageError(f"{source}: {error.strerror}") from None


class _Level:
    """A directory on the way down. Its descriptor is None while it is closed; `below` are directories still to enter.

    `path` is where it is below the source, None when that is too long to be opened in one piece.
    """

    __slots__ = ("below", "children", "device", "fd", "inode", "name", "path", "status")

    def __init__(self, name: bytes, path: bytes | None, fd: int, children: dict[bytes, Entry | Link]) -> None:
        self.status = os.fstat(fd)
        self.name = name
        self.path = path
        self.fd: int | None = fd
        self.device = self.status.st_dev
        self.inode = self.status.st_ino
        self.children = children
        self.below: list[tuple[bytes, Entry]] = []

    def open_fd(self) -> int:
        if self.fd is None:
            raise AssertionError("the last directories on the way down are open")
        return self.fd

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class _Walk:
    """Goes through the directory `root`, called `label` in errors, depth first."""

    def __init__(
        self, root: int, label: bytes, options: Options, contents: Contents, avoid: Mapping[tuple[int, int], str]
    ) -> None:
        self._root = root
        self._avoid = avoid
        self._label = label
        self._options = options
        self._contents = contents
        self._open = Opener(_DIRECTORY | os.O_NOFOLLOW)
        self._levels: list[_Level] = []
        self._linked: dict[tuple[int, int], Entry] = {}

    def run(self) -> Entry:
        """Return the tree. The entries of files with content may be filled later."""
        tree = Entry(_UNREAD)
        try:
            self._enter(b"", tree)
            while self._levels:
                level = self._levels[-1]
                if level.below:
                    self._enter(*level.below.pop())
                else:
                    self._leave()
        finally:
            for level in self._levels:
                level.close()
        return tree

    def link(self, tree: Entry) -> None:
        """Make links of all names but the first of each file that has several; first in the order of a dump."""
        names = {id(entry): 0 for entry in self._linked.values()}
        if not names:
            return
        for children, name, entry in _depth_first(tree):
            if id(entry) in names:
                names[id(entry)] += 1
                if names[id(entry)] > 1:
                    children[name] = Link(entry)
        for entry in self._linked.values():
            described = entry.node.stat._replace(nlink=names[id(entry)])
            entry.node = dataclasses.replace(entry.node, stat=described)

    def _enter(self, name: bytes, entry: Entry) -> None:
        """Read a directory: `name` in the one that is being read, or the source itself."""
        try:
            if self._levels:
                above = self._levels[-1]
                fd, path = self._open(name, above.open_fd()), _path_below(above.path, name)
            else:
                fd, path = self._open(b".", self._root), b""
        except OSError as error:
            raise self._error(error, name) from None
        level = _Level(name, path, fd, entry.children)
        self._levels.append(level)
        reason_to_avoid = self._avoid.get((level.device, level.inode))
        if reason_to_avoid is not None:
            raise UsageError(f"{printable(self._path())}: {reason_to_avoid}")
        if len(self._levels) > _OPEN_LEVELS:
            self._levels[-1 - _OPEN_LEVELS].close()
        try:
            entry.node = self._read(level, fd)
        except (OSError, Changed) as error:
            raise self._error(error) from None

    def _leave(self) -> None:
        """Go back up from a directory that is done, and open the one above when it has been closed."""
        level = self._levels.pop()
        above = self._levels[-1] if self._levels else None
        try:
            if above is not None and above.fd is None:
                above.fd = os.open(b"..", _DIRECTORY, dir_fd=level.open_fd())
                status = os.fstat(above.fd)
                if (status.st_dev, status.st_ino) != (above.device, above.inode):
                    raise self._error(Changed(), level.name)
        except OSError as error:
            raise self._error(error, level.name) from None
        finally:
            level.close()

    def _read(self, level: _Level, fd: int) -> Directory:
        """Make the entries of a directory, and return the node of itself."""
        self._list(level, fd)
        xattrs = read_xattrs(fd, self._options.xattrs.value)
        before, after = level.status, os.fstat(fd)
        if (before.st_mtime_ns, before.st_ctime_ns) != (after.st_mtime_ns, after.st_ctime_ns):
            raise Changed
        return Directory(self._described(after, nlink=2 + len(level.below)), xattrs)

    def _list(self, level: _Level, fd: int) -> None:
        """Make the entries of a directory, in the order of their names; its subdirectories are still to enter."""
        with os.scandir(fd) as listing:
            found = sorted([(item.name.encode(_ENCODING, "surrogateescape"), item) for item in listing], key=_NAME)
        name = b""
        try:
            for name, item in found:
                if item.is_dir(follow_symlinks=False):
                    entry = level.children[name] = Entry(_UNREAD)
                    level.below.append((name, entry))
                else:
                    self._add(level, fd, name, item.stat(follow_symlinks=False))
        except (OSError, Changed) as error:
            raise self._error(error, name) from None
        level.below.reverse()

    def _add(self, level: _Level, fd: int, name: bytes, status: os.stat_result) -> None:
        """Make the entry of something that is no directory."""
        kind = stat.S_IFMT(status.st_mode)
        if self._options.skip_devices and kind in (stat.S_IFBLK, stat.S_IFCHR):
            return
        entry = Entry(_UNREAD)
        if self._options.hard_links and status.st_nlink > 1:
            first = self._linked.setdefault((status.st_dev, status.st_ino), entry)
            if first is not entry:
                level.children[name] = first
                return
        level.children[name] = entry
        described = self._described(status)
        if kind == stat.S_IFREG and status.st_size:
            if status.st_size > _SIZE_MAX:
                raise SourceError(self._path(name), f"it has {status.st_size} bytes; an image takes 2^53")
            self._contents.add(level, name, status, entry, described)
            return
        xattrs = read_xattrs(b"/proc/self/fd/%d/%b" % (fd, name), self._options.xattrs.value)
        if kind == stat.S_IFREG:
            entry.node = Inline(described, xattrs, b"")
        elif kind == stat.S_IFLNK:
            entry.node = Symlink(described, xattrs, os.readlink(name, dir_fd=fd))
        elif kind == stat.S_IFDIR:
            raise Changed
        else:
            entry.node = Device(described, xattrs)
        # All this was by name, and once each: see that it was of the same thing, as it is with files that are opened.
        after = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if (status.st_ctime_ns, status.st_mtime_ns, status.st_ino, status.st_dev) != (
            after.st_ctime_ns,
            after.st_mtime_ns,
            after.st_ino,
            after.st_dev,
        ):
            raise Changed

    def _described(self, status: os.stat_result, nlink: int = 1) -> Stat:
        return Stat(
            status.st_mode,
            nlink,
            status.st_uid,
            status.st_gid,
            status.st_rdev,
            status.st_size,
            0 if self._options.use_epoch else status.st_mtime_ns,
        )

    def _error(self, error: OSError | Changed, name: bytes = b"") -> SourceError:
        """Return what to raise about `name` in the directory that is being read, or about that itself without one."""
        return SourceError(self._path(name), reason(error))

    def _path(self, name: bytes = b"") -> bytes:
        names = [level.name for level in self._levels[1:]]
        return os.path.join(self._label, *names, *([name] if name else []))


def _depth_first(tree: Entry) -> Iterator[tuple[dict[bytes, Entry | Link], bytes, Entry]]:
    """Yield every entry but the root: the children that it is one of, its name there, and itself."""
    pending = [(tree.children, list(tree.children)[::-1])]
    while pending:
        children, names = pending[-1]
        if not names:
            pending.pop()
            continue
        name = names.pop()
        entry = children[name]
        if isinstance(entry, Entry):
            yield children, name, entry
            if entry.children:
                pending.append((entry.children, list(entry.children)[::-1]))


def _path_below(path: bytes | None, name: bytes) -> bytes | None:
    if path is None or len(path) + len(name) >= _PATH_MAX:
        return None
    return os.path.join(path, name)
