"""Files of a source directory → digests, contents and xattrs, and on the way into a store. What the workers do.

A file is opened once. Up to WHOLE_FILE_MAX bytes it is read once, into memory, and those bytes are hashed and stored.
After all that has been done with a file it is looked at again: it must still be what it was when the walk found it.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from cfsfuse.errors import SourceError, StoreError
from cfsfuse.objects import WHOLE_FILE_MAX
from cfsfuse.verity.digest import SHA256
from cfsfuse.verity.merkle import content_digest, digest_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cfsfuse.builder.store import Stager
    from cfsfuse.verity.merkle import WriteTree

INLINE_MAX = 64  # bytes; the builder of the reference inlines as much

# The types that follow are plain tuples and lists: they go through `marshal`.
Expected = tuple[bytes, int, int, int, int, int]
"""Name, and st_size, st_mtime_ns, st_ctime_ns, st_ino, st_dev as the walk saw them."""

Group = tuple[bytes, int, int, list[Expected]]
"""A directory by its path below the source, its st_dev and st_ino, and files in it."""

Batch = list[Group]

Found = tuple[bytes, "dict[bytes, bytes] | None", int]
"""Content of a file to be inlined, else its digest; its xattrs or None; what the store did, a number of `store`."""

SOURCE, STORE = range(2)

Failure = tuple[int, bytes, str]
"""Whose error it is: SOURCE with the path and the reason, or STORE with an empty path and the whole message."""

Outcome = tuple[list[Found], "Failure | None", "str | None"]
"""A Found for each file of a batch; what has failed; why there is an object without fs-verity."""

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_STEP = 1 << 18  # bytes at once of a large file: they stay in the processor's cache from reading to hashing
_NOTE_STEP = 1 << 26  # bytes of a large file from one note of progress to the next

NO_XATTRS: dict[bytes, bytes] = {}
"""The xattrs of every node that has none: most nodes of most trees."""


class Changed(Exception):
    """A file is not what it was."""

    def __init__(self) -> None:
        super().__init__("it has changed while it was read")


def reason(error: OSError | Changed) -> str:
    """Return what an error of opening or reading means for somebody who builds from that file."""
    if isinstance(error, Changed):
        return str(error)
    if error.errno in (errno.EACCES, errno.EPERM):
        return "permission denied"
    if error.errno in (errno.ENOENT, errno.ESTALE):
        return "it has vanished while the directory was read"
    if error.errno in (errno.ELOOP, errno.ENXIO, errno.ENOTDIR, errno.EISDIR):
        return "it has become something else while the directory was read"
    return error.strerror or str(error)


def read_xattrs(target: int | bytes, prefix: str | None) -> dict[bytes, bytes]:
    """Return those xattrs of a descriptor, or of a path (not followed), that start with `prefix`; for None none."""
    if prefix is None:
        return NO_XATTRS
    follow = isinstance(target, int)
    try:
        names = os.listxattr(target, follow_symlinks=follow)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return NO_XATTRS
        raise
    if not names:
        return NO_XATTRS
    try:
        return {
            os.fsencode(name): os.getxattr(target, name, follow_symlinks=follow)
            for name in names
            if name.startswith(prefix)
        }
    except OSError as error:
        if error.errno == errno.ENODATA:
            raise Changed from None
        raise


def chunks(fd: int, size: int, note: Callable[[int], None] | None = None) -> Iterator[memoryview]:
    """Yield the `size` bytes of a file, in memory that the next ones reuse; raise Changed when there are fewer.

    `note` is told from time to time how many more bytes have been read.
    """
    buffer = memoryview(bytearray(_STEP))
    noted = 0
    for offset in range(0, size, _STEP):
        piece = buffer[: min(_STEP, size - offset)]
        done = 0
        while done < len(piece):
            count = os.preadv(fd, [piece[done:]], offset + done)
            if not count:
                raise Changed
            done += count
        yield piece
        if note is not None and offset - noted >= _NOTE_STEP:
            note(offset - noted)
            noted = offset


def measure_file(
    fd: int, size: int, write: WriteTree | None = None, note: Callable[[int], None] | None = None
) -> bytes:
    """Return the digest of a file of `size` bytes; `write` takes its Merkle tree. Raises OSError or Changed."""
    return digest_of(SHA256, size, chunks(fd, size, note), write)


class Opener:
    """Opens names relative to directory descriptors with the same flags, without a trace in their times of access."""

    def __init__(self, flags: int) -> None:
        self._flags = flags | os.O_NOATIME

    def __call__(self, name: bytes, directory: int) -> int:
        try:
            return os.open(name, self._flags, dir_fd=directory)
        except PermissionError:
            if not self._flags & os.O_NOATIME:
                raise
        fd = os.open(name, self._flags & ~os.O_NOATIME, dir_fd=directory)
        # O_NOATIME is for owners. Somebody else's file seldom comes alone: do not try again.
        self._flags &= ~os.O_NOATIME
        return fd


class Hasher:
    """Reads files of the directory `root`, called `source` in errors, into `stager`'s store if there is one."""

    def __init__(self, root: int, source: bytes, xattr_prefix: str | None, stager: Stager | None) -> None:
        self._root = root
        self._source = source
        self._xattr_prefix = xattr_prefix
        self._stager = stager
        self._open = Opener(_FLAGS)

    def work(self, batch: Batch, note: Callable[[int], None]) -> Outcome:
        """Return what `batch` does, and errors too, as a worker may."""
        found: list[Found] = []
        problem = None
        failure: Failure | None = None
        try:
            found = self.batch(batch, note)
        except SourceError as source:
            failure = SOURCE, source.path, source.reason
        except StoreError as store:
            failure = STORE, b"", str(store)
        if self._stager is not None:
            problem = self._stager.verity_problem
        return found, failure, problem

    def batch(self, batch: Batch, note: Callable[[int], None]) -> list[Found]:
        """Return what the files of a batch are; raise SourceError or StoreError."""
        found: list[Found] = []
        for path, device, inode, files in batch:
            name = b""
            try:
                directory = self._open_directory(path, device, inode)
                try:
                    for file in files:
                        name = file[0]
                        found.append(self.file(directory, file, note))
                finally:
                    os.close(directory)
            except (OSError, Changed) as error:
                whole = os.path.join(self._source, path, name) if name else os.path.join(self._source, path)
                raise SourceError(whole, reason(error)) from None
        return found

    def file(self, directory: int, expected: Expected, note: Callable[[int], None] | None = None) -> Found:
        """Return what a file in the directory descriptor is; raise OSError, Changed or StoreError."""
        name, size = expected[:2]
        fd = self._open(name, directory)
        try:
            xattrs = read_xattrs(fd, self._xattr_prefix)

            def check() -> None:
                found = os.fstat(fd)
                if expected[1:] != (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev):
                    raise Changed

            if size <= WHOLE_FILE_MAX:
                content = _read(fd, size)
                check()
                if len(content) < size:
                    raise Changed
            elif self._stager is None:
                digest = measure_file(fd, size, None, note)
                check()
                return digest, xattrs or None, 0
            else:
                digest, done = self._stager.add_file(fd, size, check, note)
                return digest, xattrs or None, done
        finally:
            os.close(fd)
        if size <= INLINE_MAX:
            return content, xattrs or None, 0
        digest = content_digest(SHA256, content)
        return digest, xattrs or None, self._stager.add(digest, content) if self._stager is not None else 0

    def _open_directory(self, path: bytes, device: int, inode: int) -> int:
        """Open a directory of the source; raise Changed when the path leads elsewhere than it did for the walk."""
        fd = os.open(path or b".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._root)
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != (device, inode):
            os.close(fd)
            raise Changed
        return fd


def _read(fd: int, size: int) -> bytes:
    """Return the first `size` bytes of a file, fewer when it has fewer."""
    content = os.read(fd, size)
    while len(content) < size:
        more = os.read(fd, size - len(content))
        if not more:
            break
        content += more
    return content
