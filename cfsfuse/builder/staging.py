"""The directory in a store where a build gathers its objects, and how they get from there to their final names.

Nothing has a final name before it is whole, on the disk, and the build has succeeded. The directory is locked (flock)
by an open descriptor that the workers inherit: the lock lasts as long as any process of the build, however it ends. A
staging directory that is not locked has been left by a killed build, and whoever comes next removes it. Network file
systems may keep such locks to one machine: where it is not known to be local, it must be a day old as well.

"On the disk" is by syncfs(2): one call instead of an fsync for each file. It writes what everybody has yet to write on
that file system, so a build may wait for others; and before Linux 5.8 it does not tell of write errors.

Everything is relative to directory descriptors that are opened without following symlinks, and the staging directory is
believed to be ours when nobody else may write it: what somebody plants in a store cannot lead outside of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import re
import secrets
import stat
import time
from typing import TYPE_CHECKING

from cfsfuse.atomic import opened_directory
from cfsfuse.basedirs import RECORDED_TREES
from cfsfuse.errors import StoreError, printable
from cfsfuse.fstype import LOCAL, file_system_type

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TREES = RECORDED_TREES.rstrip(b"/")

_NAME = re.compile(r"\.cfsfuse-[0-9a-f]{16}\.tmp")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_LEVELS = 3  # of directories below a staging directory; anything deeper is not ours
_ABANDONED_AGE = 24 * 3600  # seconds since anything was put into it
_TRIES = 100  # for what another builder can get in the way of, now and then

_syncfs = ctypes.CDLL(None, use_errno=True).syncfs


def store_error(path: str, reason: str | None, below: bytes = b"") -> StoreError:
    """Return what to raise about the store at `path`, or about what is at `below` in it."""
    return StoreError(f"{printable(os.path.join(os.fsencode(path), below).rstrip(b'/'))}: object store: {reason}")


@contextlib.contextmanager
def store_errors(path: str) -> Iterator[None]:
    """Turn an OSError of the block into a StoreError about the store at `path`."""
    try:
        yield
    except OSError as error:
        raise store_error(path, error.strerror) from None


class Staging:
    """A new staging directory in the store `path`, which is made if it is missing; `remove` ends it.

    `store` and `directory` are descriptors of both, -1 after `remove`. Everything here raises StoreError.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._made: list[str] = []
        with contextlib.ExitStack() as undo, store_errors(path):
            undo.callback(self._remove_made)
            self._make_store()
            # The store may be a symlink: whoever builds has named it.
            self.store = os.open(path, _DIRECTORY)
            undo.callback(os.close, self.store)
            self._remove_abandoned()
            self._name, self.directory = self._create()
            undo.pop_all()

    def publish(self, *, relies: bool) -> None:
        """Give everything in the directory its final name, Merkle trees first.

        It is written to the disk before, and its names after. So is what this build `relies` on that was in the store:
        another builder may have given it its name, and not have come to the second. Interrupted, this leaves some of it
        published, each whole.
        """
        with store_errors(self.path):
            staged = os.listdir(self.directory)
            if staged or relies:
                _write_to_disk(self.store)
            if staged:
                for name in sorted(map(os.fsencode, staged), key=TREES.__ne__):
                    self._move(name)
                _write_to_disk(self.store)
            self._made.clear()

    def remove(self) -> None:
        """Remove the directory and what is still in it; and the store, if it was made for this and got nothing."""
        if self.store < 0:
            return
        with contextlib.suppress(OSError):
            _clear(self.directory)
            os.rmdir(self._name, dir_fd=self.store)
        # Once more at the end: a build that has been killed lately is locked until its last worker is dead.
        with contextlib.suppress(OSError):
            self._remove_abandoned()
        directory, store, self.directory, self.store = self.directory, self.store, -1, -1
        os.close(directory)
        os.close(store)
        self._remove_made()

    def _make_store(self) -> None:
        """Make the store and the directories above it, where they are missing."""
        missing = []
        at = self.path
        while not os.path.isdir(at):
            missing.append(at)
            above = os.path.dirname(at) or os.curdir
            if above == at:
                break
            at = above
        for path in reversed(missing):
            try:
                os.mkdir(path, 0o755)
                self._made.append(path)
            except FileExistsError:
                if not os.path.isdir(path):  # else another builder has just made it
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None

    def _remove_made(self) -> None:
        with contextlib.suppress(OSError):
            while self._made:
                os.rmdir(self._made.pop())

    def _create(self) -> tuple[bytes, int]:
        """Make a staging directory; return its name and a descriptor that holds its lock.

        Between making and locking it another builder may take it for abandoned, lock it and remove it. So it is ours
        when we have the lock and its name still leads to it. Whoever owns the store can put something else in its place
        in that time: hence the look at whose it is.
        """
        for _ in range(_TRIES):
            name = b".cfsfuse-%s.tmp" % secrets.token_hex(8).encode()
            os.mkdir(name, 0o700, dir_fd=self.store)
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                fd = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=self.store)
                try:
                    _lock(fd)
                    if os.path.samestat(os.stat(name, dir_fd=self.store, follow_symlinks=False), os.fstat(fd)):
                        _check_private(fd)
                        return name, fd
                except BaseException:
                    os.close(fd)
                    raise
                os.close(fd)
        raise OSError(errno.EBUSY, "somebody removes each staging directory as it is made")

    def _remove_abandoned(self) -> None:
        """Remove the staging directories that no process has locked, as far as this user may."""
        # Locks of a file system that others reach as well may be seen on this machine only.
        is_local = file_system_type(self.store) in LOCAL
        for name in filter(_NAME.fullmatch, os.listdir(self.store)):
            with contextlib.suppress(OSError), opened_directory(name, dir_fd=self.store) as directory:
                if not is_local and time.time() - os.fstat(directory).st_mtime < _ABANDONED_AGE:
                    continue
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _clear(directory)
                os.rmdir(name, dir_fd=self.store)

    def _move(self, name: bytes) -> None:
        """Publish one directory of the staging directory: one of objects, or that of all trees."""
        if name == TREES:
            label = os.path.join(self.path, os.fsdecode(name))
            _move_directory(self.directory, self.store, name, self.path, functools.partial(_move_directories, label))
        else:
            _move_directory(self.directory, self.store, name, self.path, _move_files)


def is_directory(parent: int, name: bytes, label: str) -> bool:
    """Return whether the directory descriptor `parent`, at the path `label`, has a directory `name`.

    Anything else under that name is a StoreError: a symlink would lead out of the store.
    """
    try:
        mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "no directory"
        raise store_error(label, f"is {kind}", name)
    return True


def _move_directory(source: int, target: int, name: bytes, label: str, move: Callable[[int, int], None]) -> None:
    """Move the directory `name` whole where `target` has none yet; where it has, `move` what is in it."""
    for _ in range(_TRIES):
        if not is_directory(target, name, label):
            try:
                os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # then another builder has just made it
                    raise
        # Not found: the directory was empty, and another builder that had found none has put its own in that place.
        with contextlib.suppress(FileNotFoundError):
            with opened_directory(name, dir_fd=source) as old, opened_directory(name, dir_fd=target) as new:
                move(old, new)
            return
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def _move_files(source: int, target: int) -> None:
    for name in os.listdir(source):
        os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)


def _move_directories(label: str, source: int, target: int) -> None:
    for name in os.listdir(source):
        _move_directory(source, target, os.fsencode(name), label, _move_files)


def _lock(fd: int) -> None:
    """Lock a new staging directory; BlockingIOError when somebody takes it for abandoned."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass  # NFS locks no directories: nobody can lock this one then, and so nobody takes it for abandoned


def _check_private(fd: int) -> None:
    """Raise OSError unless a staging directory is new, and this user's alone."""
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or status.st_mode & 0o077 or os.listdir(fd):
        raise OSError(errno.EPERM, "its new staging directory is not this user's alone; has somebody replaced it?")


def _write_to_disk(fd: int) -> None:
    """Wait until everything on the file system of `fd` is on the disk: one call instead of one for each file."""
    if _syncfs(fd):
        number = ctypes.get_errno()
        if number != errno.ENOSYS:
            raise OSError(number, os.strerror(number))
        os.sync()


def _clear(directory: int, levels: int = _LEVELS) -> None:
    """Remove what is in a directory, without following symlinks or going deeper than a staging directory does."""
    for name in os.listdir(directory):
        try:
            os.unlink(name, dir_fd=directory)
        except IsADirectoryError:
            if levels:
                with opened_directory(name, dir_fd=directory) as below:
                    _clear(below, levels - 1)
            os.rmdir(name, dir_fd=directory)
