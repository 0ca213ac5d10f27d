"""The writing side of an object store: contents in, objects at `xx/rest` of their digest, when all of them are there.

Objects are regular files of mode 0444, with fs-verity where the file system has it. The Merkle trees of those above
WHOLE_FILE_MAX bytes are recorded beside them, for readers that verify blocks (`trees.py`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from cfsfuse.basedirs import RECORDED_TREES
from cfsfuse.beneath import open_beneath, status_beneath
from cfsfuse.builder.hashing import Changed, chunks, measure_file, reason
from cfsfuse.builder.staging import Staging, is_directory, store_error, store_errors
from cfsfuse.erofs.overlay import Digest
from cfsfuse.errors import SourceError
from cfsfuse.objects import WHOLE_FILE_MAX
from cfsfuse.verity import ioctl
from cfsfuse.verity.digest import SHA256
from cfsfuse.verity.merkle import Geometry, content_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cfsfuse.verity.digest import Bytes

# What was done with an object, as numbers that go through `marshal`. NOTHING: this build has staged it already, for
# another file. TREE is added when a Merkle tree has been staged.
NOTHING, NEW, REUSED, REPAIRED = range(4)
TREE = 4

_FICLONE = 0x40049409  # include/uapi/linux/fs.h, _IOW(0x94, 9, int)
_COPY_STEP = 1 << 30
# copy_file_range(2) does not work here, or not between these two files; anything else is a disk that fails or is full.
_NO_COPY_FILE_RANGE = frozenset(
    (errno.ENOSYS, errno.EXDEV, errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL, errno.EBADF, errno.ETXTBSY)
)
_DISK_ERRORS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOMEM))
_NO_VERITY = {
    errno.ENOTTY: "this type of file system has none",
    errno.EOPNOTSUPP: "this kernel has none, or the file system does not have it enabled",
}
# The next file will fare no better after these. After others it may: one is too large, one is still open elsewhere.
_NO_VERITY_HERE = frozenset((*_NO_VERITY, errno.EPERM, errno.EACCES, errno.EINVAL))
_BUSY_TRIES = 100
_BUSY_PAUSE = 0.01  # seconds
_MODE = 0o444  # of objects and trees, whatever the umask; directories are as it says
_MODE_OF_OWNER = 0o600  # enabling fs-verity takes write permission on the file


def object_path(digest: bytes) -> bytes:
    """Return where the object of a digest is below a store, as mkcomposefs names it."""
    return digest.hex("/", 31).encode()  # a slash before the last 31 bytes of 32


@dataclass
class Summary:
    """What a build has done with a store. Objects are counted once each, however many files have their content.

    `verity_problem` says why the new objects have no fs-verity; it is None when they have it.
    """

    new_objects: int = 0
    new_bytes: int = 0
    reused_objects: int = 0
    reused_bytes: int = 0
    repaired_objects: int = 0
    repaired_bytes: int = 0
    new_trees: int = 0
    verity_problem: str | None = None

    @property
    def has_verity(self) -> bool:
        """Whether fs-verity is enabled on all objects that this build has made."""
        return self.verity_problem is None


class Stager:
    """Puts objects into a staging directory. Each process of a build has a copy of it, on the same two descriptors."""

    def __init__(self, staging: Staging, *, trees: bool, verify: bool) -> None:
        self._path = staging.path
        self._store = staging.store
        self._staging = staging.directory
        self._trees = trees
        self._verify = verify
        self._verified: set[bytes] = set()  # digests of objects that are right
        self._enables = True
        self.verity_problem: str | None = None  # why there is an object without fs-verity
        with store_errors(self._path):
            self._probe_verity()

    def add(self, digest: bytes, content: Bytes) -> int:
        """Stage `content` as the object of its digest, unless the store has it; return what was done."""
        path = object_path(digest)
        with store_errors(self._path):
            done = self._existing(path, digest, len(content))
            if done != REUSED and not self._stage(path, digest, lambda fd: _write(fd, content)):
                done = NOTHING
        return done

    def add_file(
        self, source: int, size: int, check: Callable[[], None], note: Callable[[int], None] | None = None
    ) -> tuple[bytes, int]:
        """Stage the file `source` of `size` bytes, more than WHOLE_FILE_MAX; return its digest, and what was done.

        It is hashed first, so what the store has already is not copied. `check` raises when the file is not any more
        what it was. That does not show what is written through a mapping, which may leave the times of a file alone: so
        a copy is measured itself. `note` is told of bytes that have been read.
        """
        with self._scratch() as (tree, write):
            digest = measure_file(source, size, write, note)
            check()
            path = object_path(digest)
            with store_errors(self._path):
                done = self._existing(path, digest, size)
                if done != REUSED and not self._stage(path, digest, lambda fd: _copy(source, fd, size), size):
                    return digest, NOTHING
                if tree is not None and not self._has_tree(path, tree, Geometry(SHA256, size).tree_size):
                    self._stage_tree(path)
                    done += TREE
        return digest, done

    def _existing(self, path: bytes, digest: bytes, size: int) -> int:
        """Return REUSED when the store has the object, NEW when it has none, REPAIRED when it has something wrong."""
        status = self._status(path)
        if status is None:
            return NEW
        if stat.S_ISDIR(status.st_mode):
            raise store_error(self._path, "is a directory, in the place of an object", path)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            return REPAIRED
        return REUSED if not self._verify or self._is_right(path, digest, size) else REPAIRED

    def _status(self, path: bytes) -> os.stat_result | None:
        """Return what the store has at `path`, None for nothing. StoreError when a directory on the way is none."""
        try:
            return status_beneath(self._store, path)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                names = path.split(b"/")
                for count in range(1, len(names)):
                    is_directory(self._store, b"/".join(names[:count]), self._path)
            raise

    def _is_right(self, path: bytes, digest: bytes, size: int) -> bool:
        """Return whether an object of the store has its digest, as the kernel says or as it is read."""
        if digest not in self._verified:
            try:
                with _opened(self._store, path) as fd:
                    known = ioctl.measure(fd)
                    if (known.value if known is not None else measure_file(fd, size)) != digest:
                        return False
            except (OSError, Changed):
                return False
            self._verified.add(digest)
        return True

    def _stage(self, path: bytes, digest: bytes, fill: Callable[[int], None], copied: int = 0) -> bool:
        """Make an object with what `fill` writes; return False when this build has it already.

        Of bytes in memory, the digest is known to be theirs. What is `copied`, so many bytes, is measured.
        """
        try:
            fd = self._create(path)
        except FileExistsError:
            return False
        try:
            try:
                fill(fd)
                if not self._enables:
                    os.fchmod(fd, _MODE)
            finally:
                os.close(fd)
            if self._enables or copied:
                self._seal(path, digest, copied)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(path, dir_fd=self._staging)
            raise
        return True

    def _create(self, path: bytes) -> int:
        # Whole paths are safe here, unlike in the store: nobody else can put anything into the staging directory.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(path, flags, _MODE_OF_OWNER, dir_fd=self._staging)
        except FileNotFoundError:
            self._make_directory(path.rpartition(b"/")[0])
            return os.open(path, flags, _MODE_OF_OWNER, dir_fd=self._staging)

    def _make_directory(self, path: bytes) -> None:
        """Make a directory of the staging directory, and the one above it; other workers do the same."""
        parent = path.rpartition(b"/")[0]
        if parent:
            self._make_directory(parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o755, dir_fd=self._staging)

    def _probe_verity(self) -> None:
        """Find out with a file of no consequence whether fs-verity can be enabled here."""
        name = b"probe"
        try:
            os.close(self._create(name))
            with _opened(self._staging, name) as fd:
                self._enable(fd)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._staging)

    def _seal(self, path: bytes, digest: bytes, copied: int) -> None:
        """Enable fs-verity on an object, and believe the kernel about what it is; else read what has been copied."""
        with _opened(self._staging, path) as fd:
            if self._enables:
                self._enable(fd)
                os.fchmod(fd, _MODE)
            known = ioctl.measure(fd)
            if known is not None:
                measured = known.value
            elif copied:
                measured = measure_file(fd, copied)
            else:
                measured = digest
        if measured != digest:
            raise Changed

    def _enable(self, fd: int) -> None:
        """Enable fs-verity, or remember why not; where no file can have it, do not try again."""
        number: int | None = None
        for _ in range(_BUSY_TRIES):
            try:
                ioctl.enable(fd)
                return
            except OSError as error:
                number = error.errno
                if number in _DISK_ERRORS:
                    raise
            if number != errno.ETXTBSY:
                break
            # A thread of this process that is just starting a program has a copy of every descriptor for a moment.
            time.sleep(_BUSY_PAUSE)
        self._enables = number not in _NO_VERITY_HERE
        self.verity_problem = _NO_VERITY.get(number or 0) or os.strerror(number or 0)

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[tuple[int | None, Callable[[int, bytes], object] | None]]:
        """Yield a file of the staging directory for a Merkle tree, and what writes to it; None when none is wanted."""
        if not self._trees:
            yield None, None
            return
        with store_errors(self._path):
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(_scratch_name(), flags, _MODE_OF_OWNER, dir_fd=self._staging)

        def write(offset: int, block: bytes) -> None:
            with store_errors(self._path):
                _write(fd, block, offset)

        try:
            yield fd, write
        finally:
            os.close(fd)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(_scratch_name(), dir_fd=self._staging)

    def _has_tree(self, path: bytes, tree: int, size: int) -> bool:
        """Return whether the store has the tree already."""
        status = self._status(RECORDED_TREES + path)
        if status is None:
            return False
        if stat.S_ISDIR(status.st_mode):
            raise store_error(self._path, "is a directory, in the place of a tree", RECORDED_TREES + path)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            return False
        return not self._verify or self._is_same(RECORDED_TREES + path, tree, size)

    def _is_same(self, path: bytes, tree: int, size: int) -> bool:
        """Return whether the store's file at `path` is, byte for byte, the file `tree`."""
        try:
            with _opened(self._store, path) as fd:
                return all(one == other for one, other in zip(chunks(fd, size), chunks(tree, size), strict=True))
        except (OSError, Changed):
            return False

    def _stage_tree(self, path: bytes) -> None:
        self._make_directory(RECORDED_TREES + path[:2])
        name = _scratch_name()
        os.chmod(name, _MODE, dir_fd=self._staging)
        os.rename(name, RECORDED_TREES + path, src_dir_fd=self._staging, dst_dir_fd=self._staging)


class StoreWriter:
    """A build into the object store `path`, which is made if it is missing. A context manager, for one thread.

    Nothing is visible before `publish`, and without it nothing stays. Any number of builds may go on in one store.
    `trees` records the Merkle trees of large objects. An object that exists with the right size is used again;
    `verify_existing` measures it, and replaces it when it is wrong. Raises StoreError, also before it is entered and
    after it is left.
    """

    def __init__(self, path: str, *, trees: bool = True, verify_existing: bool = False) -> None:
        self.path = path
        self.summary = Summary()
        self._options = {"trees": trees, "verify": verify_existing}
        self._reused: set[bytes] = set()
        self._trees: set[bytes] = set()
        self._has_failed = False
        self._open: tuple[Staging, Stager] | None = None

    def __enter__(self) -> Self:
        staging = Staging(self.path)
        try:
            self._open = staging, Stager(staging, **self._options)
        except BaseException:
            staging.remove()
            raise
        self.count_verity(self.stager.verity_problem)
        return self

    def __exit__(self, *_: object) -> None:
        staging, self._open = self._staging, None
        staging.remove()

    @property
    def stager(self) -> Stager:
        """What puts objects into this build, here or in a worker."""
        return self._parts()[1]

    @property
    def _staging(self) -> Staging:
        return self._parts()[0]

    def _parts(self) -> tuple[Staging, Stager]:
        if self._open is None:
            raise store_error(self.path, "is not open for writing: no build into it is going on")
        return self._open

    def add(self, content: Bytes) -> Digest:
        """Stage `content`, and return the digest that it has as an object."""
        if len(content) > WHOLE_FILE_MAX:
            with store_errors(self.path), open(os.memfd_create("content"), "wb", buffering=0) as file:
                _write(file.fileno(), content)
                return self.add_file(file.fileno())
        digest = content_digest(SHA256, content)
        self.count(digest, len(content), self.stager.add(digest, content))
        return Digest(SHA256.name, digest)

    def add_file(self, fd: int, name: bytes = b"file") -> Digest:
        """Stage all of an open file, from its beginning; return its digest. Raises SourceError, calling it `name`."""
        before = os.fstat(fd)

        def check() -> None:
            after = os.fstat(fd)
            if (before.st_size, before.st_mtime_ns, before.st_ctime_ns) != (
                after.st_size,
                after.st_mtime_ns,
                after.st_ctime_ns,
            ):
                raise Changed

        try:
            if before.st_size <= WHOLE_FILE_MAX:
                content = b"".join(bytes(chunk) for chunk in chunks(fd, before.st_size))
                check()
                return self.add(content)
            digest, done = self.stager.add_file(fd, before.st_size, check)
        except (OSError, Changed) as error:
            raise SourceError(name, reason(error)) from None
        self.count(digest, before.st_size, done)
        return Digest(SHA256.name, digest)

    def publish(self) -> None:
        """Give every object that has been staged its name. StoreError when a build has failed: it may be unfinished."""
        if self._has_failed:
            raise store_error(self.path, "a build into it has failed; nothing is published")
        self._staging.publish(relies=bool(self._reused))

    @property
    def descriptors(self) -> tuple[int, int]:
        """What a worker process must keep open: the stager works with it, and it holds the lock."""
        return self._staging.store, self._staging.directory

    def fail(self) -> None:
        """See that nothing is published any more: a worker may have been stopped in the middle of an object."""
        self._has_failed = True

    def count(self, digest: bytes, size: int, done: int) -> None:
        """Enter into the summary what a stager, here or in another process, has done."""
        summary = self.summary
        if done >= TREE:
            done -= TREE
            summary.new_trees += digest not in self._trees
            self._trees.add(digest)
        if done == NEW:
            summary.new_objects += 1
            summary.new_bytes += size
        elif done == REPAIRED:
            summary.repaired_objects += 1
            summary.repaired_bytes += size
        elif done == REUSED and digest not in self._reused:
            self._reused.add(digest)
            summary.reused_objects += 1
            summary.reused_bytes += size
        self.count_verity(self.stager.verity_problem)

    def count_verity(self, problem: str | None) -> None:
        """Remember the first reason why there is an object without fs-verity."""
        self.summary.verity_problem = self.summary.verity_problem or problem


@contextlib.contextmanager
def _opened(directory: int, path: bytes) -> Iterator[int]:
    """Yield a read-only descriptor of a file below a directory descriptor."""
    fd = open_beneath(directory, path)
    try:
        yield fd
    finally:
        os.close(fd)


def _scratch_name() -> bytes:
    return b"tree-%d" % os.getpid()


def _write(fd: int, data: Bytes, offset: int = 0) -> None:
    done = os.pwrite(fd, data, offset)
    if done < len(data):  # the disk is about to be full, which the next call says
        rest = memoryview(data)[done:]
        while rest:
            offset += done
            done = os.pwrite(fd, rest, offset)
            rest = rest[done:]


def _copy(source: int, target: int, size: int) -> None:
    """Copy `size` bytes into an empty file: shared if the file system can, else copied by it, else by us."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(target, _FICLONE, source)
        return
    done = 0
    try:
        while done < size:
            count = os.copy_file_range(source, target, min(_COPY_STEP, size - done), done, done)
            if not count:  # some file systems say so without having copied anything
                break
            done += count
    except OSError as error:
        if error.errno not in _NO_COPY_FILE_RANGE:
            raise
    if done < size:
        done = 0
        for chunk in chunks(source, size):
            _write(target, chunk, done)
            done += len(chunk)
