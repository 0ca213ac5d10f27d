"""The public Python API: images read and walked, built, measured, mounted. docs/api.md shows all of it at work.

What is named in `__all__` stays; the modules below may change. Errors are those of `cfsfuse.errors`, each a CfsError. A
path or name in an image is bytes, for it may be any bytes; where one is asked for, text does as well, and is encoded as
os.fsencode does. Nothing here prints, and importing it imports neither trio nor pyfuse3.
"""

from __future__ import annotations

import dataclasses
import io
import os
import stat
import subprocess
import sys
from typing import TYPE_CHECKING, BinaryIO, TypedDict

from cfsfuse import access
from cfsfuse.basedirs import BaseDirectories
from cfsfuse.builder import image as builder
from cfsfuse.builder.hashing import INLINE_MAX, Changed, reason
from cfsfuse.builder.image import Built, Job
from cfsfuse.builder.scan import Options, Progress, Xattrs
from cfsfuse.builder.store import StoreWriter, object_path
from cfsfuse.dump import dump as dump_image
from cfsfuse.dump import line
from cfsfuse.erofs.overlay import Digest
from cfsfuse.erofs.reader import DOTS, Reader
from cfsfuse.erofs.writer import DEFAULT_VERSIONS, Versions
from cfsfuse.errors import CfsError, HostError, SourceError, TreeError, UsageError, printable
from cfsfuse.imagefile import naming
from cfsfuse.imagefile import open_image as read_image_file
from cfsfuse.mount.places import tree_cache
from cfsfuse.mount.unmount import unmount
from cfsfuse.objects import ObjectStore
from cfsfuse.tree import Device, Directory, Entry, External, Inline, Link, Node, Sparse, Stat, Symlink
from cfsfuse.trees import TreeStore
from cfsfuse.verification import Verification
from cfsfuse.verity.digest import ALGORITHMS, SHA256
from cfsfuse.verity.merkle import content_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import TracebackType
    from typing import Self, Unpack

    from cfsfuse.erofs.image import Nid
    from cfsfuse.erofs.inode import Inode
    from cfsfuse.verity.digest import Bytes

    Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]

__all__ = [
    "Built",
    "CfsError",
    "Device",
    "Digest",
    "Directory",
    "Entry",
    "External",
    "Image",
    "Inline",
    "Link",
    "Mount",
    "Node",
    "Options",
    "Progress",
    "Sparse",
    "Stat",
    "StoreWriter",
    "Symlink",
    "Verification",
    "Versions",
    "Xattrs",
    "build",
    "device",
    "directory",
    "dump",
    "file",
    "link",
    "measure",
    "mount",
    "open_image",
    "parse_dump",
    "symlink",
    "walk",
]

DEFAULT_OPTIONS = Options()


# Reading


def open_image(
    path: Path,
    *,
    basedirs: Iterable[Path] = (),
    digest: str | None = None,
    verification: Verification = Verification.RECORDED,
) -> Image:
    """Return the image in a file; raise ImageError when it is none.

    With `digest`, the hex of an fs-verity digest, raise ImageDigestMismatch unless the image has it. `basedirs` are
    where its objects are, searched in this order; `verification` says which files are verified.
    """
    name = os.fsdecode(path)
    with naming(name):
        reader = Reader(read_image_file(name, digest and digest.lower()))
    directories = BaseDirectories([os.fsdecode(directory) for directory in basedirs])
    return Image(name, reader, directories, verification)


class Image:
    """An image, held in memory: nothing that happens to its file changes it. A context manager, closed at the end.

    Nodes are as the kernel's composefs mount shows them. Methods raise ImageError where the image is malformed,
    PathNotFound for a path that it has not, and ObjectError where the content of a file is not what it records.
    """

    def __init__(self, name: str, reader: Reader, directories: BaseDirectories, verification: Verification) -> None:
        self.name = name
        self._reader = reader
        # Without objects there is nothing to cache, and no reason to make the directory of the cache.
        trees = TreeStore(directories, tree_cache() if directories.paths else None)
        self._store = ObjectStore(directories, trees, verification)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the base directories and what has been opened below them. Contents cannot be read any more."""
        self._store.close()

    @property
    def version(self) -> int:
        """The format version of the image."""
        return int(self._reader.image.header.composefs_version)

    def lookup(self, path: Path, *, follow: bool = True) -> Node:
        """Return the node at `path`; symbolic links are followed inside the image, at its end only with `follow`."""
        with naming(self.name):
            return self._reader.node(self._inode(path, follow=follow))

    def children(self, path: Path = "/") -> Iterator[tuple[bytes, Node]]:
        """Yield name and node of everything in a directory, in the order of the names' bytes."""
        with naming(self.name):
            inode = self._inode(path)
            if not inode.is_directory:
                raise UsageError(f"{printable(os.fsencode(path))}: not a directory")
            for name, child in self._reader.entries(inode):
                if name not in DOTS:
                    yield name, self._reader.node(child)

    def walk(self, path: Path = "/") -> Iterator[tuple[bytes, Node]]:
        """Yield path and node of everything at and below `path`, depth first, in the order of the names' bytes."""
        with naming(self.name):
            start = self._inode(path, follow=False)
            for found, inode in self._reader.walk(os.fsencode(path), start=start):
                yield found, self._reader.node(inode)

    def read(self, path: Path) -> bytes:
        """Return the content of a regular file, verified."""
        return b"".join(self.chunks(path))

    def chunks(self, path: Path) -> Iterator[Bytes]:
        """Yield the content of a regular file in pieces of at most 1 MiB, each verified before it is given out."""
        with naming(self.name):
            inode = self._inode(path)
            if not inode.is_regular:
                raise UsageError(f"{printable(os.fsencode(path))}: not a regular file")
            yield from access.content(self._store, self._reader.node(inode))

    def dump(self) -> Iterator[bytes]:
        """Yield the image as composefs-dump(5), a line a node, each with its newline."""
        with naming(self.name):
            yield from dump_image(self._reader)

    def tree(self) -> Entry:
        """Return the whole tree, to be changed and built again: the one that `parse_dump` makes of the dump."""
        with naming(self.name):
            return _tree(self._reader)

    def _inode(self, path: Path, *, follow: bool = True) -> Inode:
        return access.resolve(self._reader, os.fsencode(path), follow=follow)


def _tree(reader: Reader) -> Entry:
    root = Entry(reader.authored(reader.root))
    made: dict[Nid, Entry] = {reader.root.nid: root}
    above = [(0, root)]  # length of the path, and entry, of the directories on the way to where the walk is
    for path, inode in reader.walk():
        at = path.rfind(b"/")
        while above[-1][0] > at:
            above.pop()
        if inode.nid in made:  # the root itself, or a further name: the walk meets no other directory twice
            if path != b"/":
                above[-1][1].children[path[at + 1 :]] = Link(made[inode.nid])
            continue
        entry = made[inode.nid] = Entry(reader.authored(inode))
        above[-1][1].children[path[at + 1 :]] = entry
        if inode.is_directory:
            above.append((len(path), entry))
    return root


def measure(path: Path, algorithm: str = "sha256") -> str:
    """Return the fs-verity digest of a file in hex: of an image, what `digest=` takes; of an object, its name."""
    if algorithm not in ALGORITHMS:
        raise UsageError(f"{algorithm}: not an algorithm of fs-verity; there are {' and '.join(ALGORITHMS)}")
    return access.measure_file(os.fsdecode(path), ALGORITHMS[algorithm]).hex()


# Building


def build(  # noqa: PLR0913 - all but the first two are by name
    source: Path | Entry,
    image: Path | None = None,
    *,
    store: Path | StoreWriter | None = None,
    options: Options = DEFAULT_OPTIONS,
    versions: Versions = DEFAULT_VERSIONS,
    trees: bool = True,
    verify_existing: bool = False,
    report: Callable[[Progress], None] | None = None,
) -> Built:
    """Build the image of the directory or the tree `source`: the same, to the byte, as mkcomposefs makes.

    It appears as the file `image` when it is whole, or not at all; None makes no file, and tells the digest. Contents
    of a directory go to the object store at the path `store`, as `trees` and `verify_existing` say; those of a tree are
    in its `StoreWriter` already, and are published. `report` is told of the progress of reading a directory.
    """
    name = None if image is None else os.fsdecode(image)
    if isinstance(source, Entry):
        if store is not None and not isinstance(store, StoreWriter):
            raise UsageError("store: a tree has its contents in a StoreWriter; a path is for building from a directory")
        return builder.from_tree(source, name, versions, store)
    if isinstance(store, StoreWriter):
        raise UsageError("store: a directory is built into a store by its path; a StoreWriter is for a tree")
    store_path = None if store is None else os.fsdecode(store)
    job = Job(os.fsdecode(source), name, store_path, options, versions, trees, verify_existing)
    return builder.from_directory(job, report)


class Attributes(TypedDict, total=False):
    """What can be said of every node: permission bits, owner, nanoseconds since 1970, extended attributes."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: Mapping[bytes, bytes]


def directory(children: Mapping[str | bytes, Entry | Link] | None = None, **attributes: Unpack[Attributes]) -> Entry:
    """Return a directory. Its link count is that of its subdirectories now: make what is in it first."""
    names = {os.fsencode(name): child for name, child in (children or {}).items()}
    below = sum(1 for child in names.values() if isinstance(child, Entry) and isinstance(child.node, Directory))
    return Entry(Directory(*_common(stat.S_IFDIR | 0o755, attributes, nlink=2 + below)), names)


def file(
    content: bytes | bytearray | memoryview | BinaryIO,
    store: StoreWriter | None = None,
    **attributes: Unpack[Attributes],
) -> Entry:
    """Return a regular file: up to 64 bytes are in the image itself, more is an object, and put into `store`.

    Without a store the object has to come from elsewhere. A file that is open may be of any size, and needs a store;
    SourceError says that it cannot be read, or changes meanwhile.
    """
    if not isinstance(content, bytes | bytearray | memoryview):
        return _open_file(content, store, attributes)
    content = bytes(content)
    status, xattrs = _common(stat.S_IFREG | 0o644, attributes, size=len(content))
    if len(content) <= INLINE_MAX:
        return Entry(Inline(status, xattrs, content))
    digest = store.add(content) if store is not None else Digest(SHA256.name, content_digest(SHA256, content))
    return Entry(External(status, xattrs, object_path(digest.value), digest))


def _open_file(content: BinaryIO, store: StoreWriter | None, attributes: Attributes) -> Entry:
    try:
        fd = content.fileno()
        before = os.fstat(fd)
    except (AttributeError, OSError, ValueError):
        raise UsageError("content: neither bytes nor an open file of this system; io.BytesIO has getvalue()") from None
    if not stat.S_ISREG(before.st_mode):
        raise UsageError("content: not a regular file")
    named = getattr(content, "name", fd)
    name = b"descriptor %d" % fd if isinstance(named, int) else os.fsencode(named)
    size = before.st_size
    if size <= INLINE_MAX:
        try:
            entry = file(os.pread(fd, size, 0), None, **attributes)
        except OSError as error:
            raise SourceError(name, reason(error)) from None
    elif store is None:
        raise UsageError("content: an open file needs a store to go to")
    else:
        digest = store.add_file(fd, name)
        status, xattrs = _common(stat.S_IFREG | 0o644, attributes, size=size)
        entry = Entry(External(status, xattrs, object_path(digest.value), digest))
    after = os.fstat(fd)
    # Its size is from here, its content from there: they belong together only when nothing has happened in between.
    if (size, before.st_mtime_ns, before.st_ctime_ns) != (after.st_size, after.st_mtime_ns, after.st_ctime_ns):
        raise SourceError(name, reason(Changed()))
    return entry


def symlink(target: str | bytes, **attributes: Unpack[Attributes]) -> Entry:
    """Return a symbolic link."""
    to = os.fsencode(target)
    return Entry(Symlink(*_common(stat.S_IFLNK | 0o777, attributes, size=len(to)), to))


def device(kind: int, rdev: int = 0, **attributes: Unpack[Attributes]) -> Entry:
    """Return a device, fifo or socket: `kind` is S_IFCHR, S_IFBLK, S_IFIFO or S_IFSOCK, `rdev` is of os.makedev.

    A character device 0:0 is a whiteout: it hides what an overlay mount has below the image.
    """
    return Entry(Device(*_common(kind | 0o644, attributes, rdev=rdev)))


def link(entry: Entry) -> Link:
    """Return a further name for a file of the same tree, and count it."""
    status = entry.node.stat
    entry.node = dataclasses.replace(entry.node, stat=status._replace(nlink=status.nlink + 1))
    return Link(entry)


def _common(mode: int, attributes: Attributes, **fields: int) -> tuple[Stat, dict[bytes, bytes]]:
    """Return the stat and the xattrs of a node; the permission bits of `mode` are the default."""
    status = Stat(
        mode=stat.S_IFMT(mode) | attributes.get("mode", stat.S_IMODE(mode)),
        nlink=1,
        uid=attributes.get("uid", 0),
        gid=attributes.get("gid", 0),
        rdev=0,
        size=0,
        mtime_ns=attributes.get("mtime_ns", 0),
    )
    return status._replace(**fields), dict(attributes.get("xattrs", {}))


# Dumps


def parse_dump(dump: BinaryIO | bytes, name: str = "dump") -> Entry:
    """Return the tree that a composefs-dump(5) describes; raise DumpError, which says where `name` is malformed."""
    return builder.read_dump(io.BytesIO(dump) if isinstance(dump, bytes) else dump, name)


def walk(root: Entry) -> Iterator[tuple[bytes, Entry | Link]]:
    """Yield path and entry of everything in a tree, depth first, in the order of the names' bytes.

    Raises TreeError for an entry that stands in it twice, as one does that is in itself.
    """
    met: set[Entry] = set()
    pending: list[tuple[bytes, Entry | Link]] = [(b"/", root)]
    while pending:
        path, entry = pending.pop()
        if isinstance(entry, Entry):
            if entry in met:
                raise TreeError(path, "stands in the tree twice; a further name of a file is a Link")
            met.add(entry)
        yield path, entry
        if isinstance(entry, Entry):
            base = path.rstrip(b"/")
            pending += [(base + b"/" + name, child) for name, child in sorted(entry.children.items(), reverse=True)]


def dump(root: Entry) -> Iterator[bytes]:
    """Yield a tree as composefs-dump(5), a line a node, each with its newline; raise TreeError for what is none."""
    linked = {id(entry.target) for _, entry in walk(root) if isinstance(entry, Link)}
    paths = {id(entry): path for path, entry in walk(root) if id(entry) in linked}
    for path, entry in walk(root):
        if isinstance(entry, Entry):
            yield line(path, entry.node)
        elif id(entry.target) in paths:
            yield line(path, entry.target.node, paths[id(entry.target)])
        else:
            raise TreeError(path, "a hard link to what is not in the tree")


# Mounting


def mount(  # noqa: PLR0913 - all but the first two are by name
    image: Path,
    mountpoint: Path,
    *,
    basedirs: Iterable[Path],
    digest: str | None = None,
    verification: Verification = Verification.RECORDED,
    options: str = "",
) -> Mount:
    """Mount an image, by a process of its own that outlives this one, and return when the mount can be used.

    `options` are further ones of `cfsfuse mount`, separated by commas. Raises the CfsError that says why not.
    """
    name = os.fsdecode(image)
    # Here, for the error that says more than the command's exit code; the command reads the image again.
    Reader(read_image_file(name, digest and digest.lower()))
    words = [f"basedir={_escaped(os.fsdecode(path))}" for path in basedirs]
    words += [f"digest={digest}"] if digest is not None else []
    words += [verification.value, *([options] if options else [])]
    # A process that is forked from one with threads, as this one may be, must not do more than start a program.
    script = f"import sys; sys.path[:] = {sys.path!r}; from cfsfuse.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "mount", "-o", ",".join(words), "--", name, os.fsdecode(mountpoint)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        reason = os.fsdecode(done.stderr).strip().removeprefix("cfsfuse: ")
        raise (UsageError if done.returncode == 2 else HostError)(reason)
    return Mount(os.path.realpath(os.fsdecode(mountpoint)))


class Mount:
    """A mount at `mountpoint`. A context manager, which unmounts at the end."""

    def __init__(self, mountpoint: str) -> None:
        self.mountpoint = mountpoint

    def unmount(self, *, lazy: bool = False) -> None:
        """Unmount; `lazy` hides a mount in use now and ends it when its last user goes. Otherwise HostError."""
        unmount(self.mountpoint, lazy=lazy)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        # An error may well hold a file of the mount open: it shall not be hidden by another one about that.
        self.unmount(lazy=error is not None)


def _escaped(path: str) -> str:
    return path.replace(":", "\\:").replace(",", "\\,")
