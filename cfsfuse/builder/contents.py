"""Entries whose files have yet to be read → the same entries with their nodes: here, or by workers.

What the walk has found waits here until a worker has time, so the walk goes on while files are hashed. Large files go
first and alone: the last ones to finish are then small, and no worker sits idle while another has much to do.
"""

from __future__ import annotations

import functools
import heapq
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

from cfsfuse.builder.hashing import INLINE_MAX, NO_XATTRS, SOURCE, Hasher
from cfsfuse.builder.store import object_path
from cfsfuse.builder.workers import Workers
from cfsfuse.erofs.overlay import Digest
from cfsfuse.errors import SourceError, StoreError
from cfsfuse.objects import WHOLE_FILE_MAX
from cfsfuse.tree import External, Inline
from cfsfuse.verity.digest import SHA256

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from cfsfuse.builder.hashing import Batch, Expected, Outcome
    from cfsfuse.builder.store import StoreWriter
    from cfsfuse.tree import Entry, Stat

_BATCH_FILES = 128
_BATCH_BYTES = 2 << 20
_WORTH_WORKERS = 4 << 20  # bytes: hashing fewer takes less time than starting and ending workers
_FILE_COST = 8192  # bytes that take as long to hash as a file takes to be opened and looked at
_XATTRS_KEPT = 512  # different dictionaries of xattrs
_REPORT_INTERVAL = 0.1  # seconds


class Progress(NamedTuple):
    """How far a scan is: files whose content has been read, and their bytes, of those that have been found so far."""

    files: int
    bytes: int
    total_files: int
    total_bytes: int
    walking: bool


class Place(Protocol):
    """A directory of the source: its path below it, None when that is too long to open, and which directory it is."""

    path: bytes | None
    fd: int | None
    device: int
    inode: int


class _Job:
    """Files to be read together, of one directory or several, and the entries that they are for."""

    __slots__ = ("entries", "groups", "noted", "place", "size")

    def __init__(self) -> None:
        self.groups: Batch = []
        self.place: Place | None = None  # of the last group
        self.entries: list[tuple[Entry, Stat]] = []
        self.size = 0
        self.noted = 0  # bytes of it that have been reported as read

    def add(self, place: Place, expected: Expected, entry: Entry, described: Stat) -> None:
        if self.place is not place:
            self.place = place
            self.groups.append((place.path or b"", place.device, place.inode, []))
        self.groups[-1][3].append(expected)
        self.entries.append((entry, described))
        self.size += expected[1]


class Contents:
    """Reads files below the descriptor `root`, called `source` in errors, into `store` if there is one.

    A context manager: workers end with it. With one process, everything is read by this one as it is added. Where
    threads run it is read by this one as well, at the end: a lock that one of them holds is held in a fork for ever.
    Nodes that have the same xattrs share one dictionary of them.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - what a scan is asked for
        self,
        root: int,
        source: bytes,
        xattr_prefix: str | None,
        processes: int,
        store: StoreWriter | None,
        report: Callable[[Progress], None] | None,
    ) -> None:
        self._root = root
        self._processes = processes
        self._store = store
        self._report = report
        self._hasher = Hasher(root, source, xattr_prefix, None if store is None else store.stager)
        self._workers: Workers[_Job] | None = None
        self._job = _Job()  # the one that is being put together
        self._small: deque[_Job] = deque()
        self._large: list[tuple[int, int, _Job]] = []  # a heap: size below zero, then the order of finding
        self._waiting = 0
        self._objects: dict[bytes, tuple[bytes, Digest]] = {}
        self._xattrs = functools.lru_cache(_XATTRS_KEPT)(_dictionary)
        self._next_report = 0.0
        self._files = self._bytes = self._total_files = self._total_bytes = 0
        self._is_walking = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._workers is not None:
            self._workers.close()

    def add(self, place: Place, name: bytes, status: os.stat_result, entry: Entry, described: Stat) -> None:
        """Have the file `name` in the directory `place` read; its entry gets a node that has the stat `described`.

        `status` is what the file must still be. Raises OSError or Changed when it is read here and now; of others what
        `finish` raises.
        """
        size = status.st_size
        expected = name, size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev
        self._total_files += 1
        self._total_bytes += size
        if self._processes == 1 or place.path is None:
            self._read_now(place, expected, entry, described)
            return
        self._waiting += size + _FILE_COST
        if size > WHOLE_FILE_MAX:
            job = _Job()
            job.add(place, expected, entry, described)
            heapq.heappush(self._large, (-size, self._total_files, job))
            self._dispatch()
            return
        self._job.add(place, expected, entry, described)
        if len(self._job.entries) >= _BATCH_FILES or self._job.size >= _BATCH_BYTES:
            self._complete_job()
            self._dispatch()

    def finish(self) -> None:
        """Wait until everything is read. Raises SourceError, StoreError, or HostError when a worker has died."""
        self._is_walking = False
        self._complete_job()
        self._dispatch()
        if self._workers is None:
            while (job := self._next()) is not None:
                self._take(job, self._hasher.work(job.groups, functools.partial(self._note, job)))
        else:
            while self._large or self._small or not self._workers.is_idle:
                self._dispatch(wait=True)
        self._tell(at_once=True)

    def _complete_job(self) -> None:
        if self._job.entries:
            self._small.append(self._job)
            self._job = _Job()

    def _next(self) -> _Job | None:
        if self._large:
            return heapq.heappop(self._large)[2]
        return self._small.popleft() if self._small else None

    def _dispatch(self, *, wait: bool = False) -> None:
        """Give the workers what they have room for, and take what they have ready; with `wait`, wait for something."""
        if self._workers is None:
            if self._waiting < _WORTH_WORKERS or threading.active_count() > 1:
                return
            keep = (self._root, *(() if self._store is None else self._store.descriptors))
            self._workers = Workers(self._processes, self._hasher.work, keep)
        self._submit(self._workers)
        for job, is_result, value in self._workers.collect(wait=wait):
            if is_result:
                self._take(job, value)
            else:
                self._note(job, value)
        self._submit(self._workers)

    def _submit(self, workers: Workers[_Job]) -> None:
        while workers.has_room and (job := self._next()) is not None:
            workers.submit(job, job.groups, long=job.size > WHOLE_FILE_MAX)

    def _read_now(self, place: Place, expected: Expected, entry: Entry, described: Stat) -> None:
        if place.fd is None:
            raise AssertionError("the directory that is being listed is open")
        job = _Job()
        job.add(place, expected, entry, described)
        found = self._hasher.file(place.fd, expected, functools.partial(self._note, job))
        self._take(job, ([found], None, None))

    def _take(self, job: _Job, outcome: Outcome) -> None:
        """Fill the entries of a job with what has been found of it."""
        found, failure, verity_problem = outcome
        if failure is not None:
            whose, path, why = failure
            raise SourceError(path, why) if whose == SOURCE else StoreError(why)
        for (entry, described), (payload, some_xattrs, done) in zip(job.entries, found, strict=True):
            xattrs = NO_XATTRS if some_xattrs is None else self._xattrs(tuple(some_xattrs.items()))
            if described.size <= INLINE_MAX:
                entry.node = Inline(described, xattrs, payload)
                continue
            entry.node = External(described, xattrs, *self._object(payload))
            if self._store is not None:
                self._store.count(payload, described.size, done)
        if self._store is not None:
            self._store.count_verity(verity_problem)
        self._files += len(job.entries)
        self._note(job, job.size - job.noted)

    def _object(self, digest: bytes) -> tuple[bytes, Digest]:
        """Return the path and the digest of an object: the same for all files that have its content."""
        known = self._objects.get(digest)
        if known is None:
            known = self._objects[digest] = object_path(digest), Digest(SHA256.name, digest)
        return known

    def _note(self, job: _Job, count: int) -> None:
        """Take note that so many more bytes of a job have been read."""
        job.noted += count
        self._bytes += count
        self._tell()

    def _tell(self, *, at_once: bool = False) -> None:
        if self._report is None:
            return
        now = time.monotonic()
        if at_once or now >= self._next_report:
            self._next_report = now + _REPORT_INTERVAL
            self._report(Progress(self._files, self._bytes, self._total_files, self._total_bytes, self._is_walking))


def _dictionary(items: tuple[tuple[bytes, bytes], ...]) -> dict[bytes, bytes]:
    return dict(items)
