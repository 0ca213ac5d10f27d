"""Base directories → open files: the only place where files are opened that an image names.

`wait=False` never waits for a disk: it raises BlockingIOError instead, and the caller asks again from a worker thread.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.beneath import open_beneath, would_block
from cfsfuse.errors import ObjectForbidden, ObjectMissing, ObjectUnusable, UsageError
from cfsfuse.fstype import LOCAL, file_system_type

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cfsfuse.verity.digest import Algorithm

RECORDED_TREES = b".merkle/"

# What an errno of open_beneath means for an object.
_REASONS = {
    errno.EXDEV: "its path leads out of the base directory, or has an empty, . or .. component",
    errno.ELOOP: "a symlink stands in its path",
    errno.ENXIO: "not a regular file",
}


class Signature(NamedTuple):
    """What changes when a file is written or replaced."""

    st_dev: int
    st_ino: int
    st_size: int
    st_mtime_ns: int
    st_ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Signature:
        """Return what of `status` changes."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class Key(NamedTuple):
    """What the image says of an object: path, size in bytes, algorithm and digest, which is empty when it has none.

    Two files of an image that agree in all of it share everything that is kept for them.
    """

    path: bytes
    size: int
    algorithm: Algorithm
    digest: bytes


class Descriptor:
    """An open regular file. It closes when nobody holds it, so a budget may drop one that a thread is reading from."""

    __slots__ = ("fd", "kernel_verifies", "signature")

    def __init__(self, fd: int, path: bytes) -> None:
        """Take over `fd`, which is named `path` in errors; raise ObjectUnusable when it is not a regular file."""
        self.fd = fd
        self.kernel_verifies = False
        if not stat.S_ISREG(self.look().st_mode):
            raise ObjectUnusable(path, "not a regular file")

    def look(self) -> os.stat_result:
        """Take the signature of the file as it is now."""
        status = os.fstat(self.fd)
        self.signature = Signature.of(status)
        return status

    def __del__(self) -> None:
        os.close(self.fd)

    def chunks(self, path: bytes, size: int, step: int = 1 << 20) -> Iterator[bytearray]:
        """Yield all of the file's `size` bytes in pieces of `step`, for hashing."""
        for offset in range(0, size, step):
            yield self.read(path, offset, min(step, size - offset))

    def read(self, path: bytes, offset: int, length: int, *, wait: bool = True) -> bytearray:
        """Return exactly `length` bytes at `offset`, in memory of our own; BlockingIOError with wait=False."""
        data = bytearray(length)
        rest = memoryview(data)
        while rest:
            count = self._preadv(path, rest, offset + length - len(rest), wait=wait)
            if not count:
                if not wait:  # Linux 5.10 says that, too, of what is still on its way from the disk
                    raise would_block()
                raise ObjectUnusable(path, f"has nothing at byte {offset + length - len(rest)}: it has been truncated")
            rest = rest[count:]
        return data

    def _preadv(self, path: bytes, buffer: memoryview, offset: int, *, wait: bool) -> int:
        try:
            return os.preadv(self.fd, [buffer], offset, 0 if wait else os.RWF_NOWAIT)
        except BlockingIOError:
            raise
        except OSError as error:
            if not wait and error.errno == errno.EOPNOTSUPP:  # a file system that cannot tell whether it would wait
                raise would_block() from None
            raise ObjectUnusable(path, f"read at byte {offset}: {error.strerror}") from None


class Place(NamedTuple):
    """Where a file may be: a directory descriptor and a path below it; `label` is the whole path, for people."""

    directory: int
    path: bytes
    label: str


class BaseDirectories:
    """The base directories, in the order in which they are searched, held open from the start.

    They are opened before anything is mounted: so an object store below the mountpoint is the one underneath, and the
    daemon can never wait for itself.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)
        self._fds: list[int] = []
        for path in self.paths:
            try:
                fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise UsageError(
                    f"{path}: base directory: {error.strerror}; name an object store with basedir="
                ) from None
            self._fds.append(fd)

    def open(self, path: bytes, *, wait: bool = True) -> Descriptor:
        """Return the first file at `path` below a base directory; errors as ObjectError, or BlockingIOError."""
        for directory in self._fds:
            try:
                return Descriptor(open_beneath(directory, path, wait=wait), path)
            except FileNotFoundError:
                continue
            except BlockingIOError:
                if wait:
                    raise ObjectUnusable(path, "a lease that somebody has on it keeps it from being opened") from None
                raise
            except PermissionError:
                raise ObjectForbidden(path) from None
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    raise
                raise ObjectUnusable(path, _REASONS.get(error.errno or 0, str(error.strerror))) from None
        raise ObjectMissing(path)

    def signature(self, path: bytes) -> Signature | None:
        """Return the signature of what stands at `path`, None when that cannot be seen; nothing is opened.

        The path may lead out of the base directory: this is good only to tell a file that has been opened before.
        """
        for directory in self._fds:
            try:
                return Signature.of(os.stat(path, dir_fd=directory, follow_symlinks=False))
            except FileNotFoundError:
                continue
            except OSError:
                return None
        return None

    def recorded_trees(self, path: bytes) -> Iterator[Place]:
        """Yield where the Merkle tree of the object at `path` may be recorded, in the order of the base directories."""
        for base, directory in zip(self.paths, self._fds, strict=True):
            tree = RECORDED_TREES + path
            yield Place(directory, tree, os.path.join(base, os.fsdecode(tree)))

    def exists(self, path: bytes) -> bool:
        """Return whether some base directory has a file at `path`, as far as this process can see."""
        try:
            self.open(path)
        except (ObjectMissing, ObjectForbidden):
            return False
        except ObjectUnusable:
            pass
        return True

    def are_local(self) -> bool:
        """Return whether all base directories are on disks of this machine, or in its memory."""
        return all(file_system_type(directory) in LOCAL for directory in self._fds)

    def close(self) -> None:
        """Let go of the directories: there are none any more."""
        while self._fds:
            os.close(self._fds.pop())
        self.paths.clear()

    def statvfs(self) -> os.statvfs_result | None:
        """Return the statvfs of the first base directory, None when there is none."""
        return os.fstatvfs(self._fds[0]) if self._fds else None
