"""Merkle trees of large objects: recorded beside the store, cached, or computed. Trusted never, checked always.

A store records trees as `.merkle/` + object path below the base directory; the cache has them by digest. Both are
files of hash blocks as fs-verity lays them out (`verity/merkle.py`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import tempfile
import threading
from typing import TYPE_CHECKING

from cfsfuse.atomic import published
from cfsfuse.basedirs import Descriptor, Key, Place, Signature
from cfsfuse.beneath import open_beneath, would_block
from cfsfuse.errors import DigestMismatch, ObjectUnusable, TreeMismatch, printable
from cfsfuse.lru import Lru
from cfsfuse.verity.digest import file_digest
from cfsfuse.verity.merkle import Geometry, VerifiedTree, build, salvage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cfsfuse.basedirs import BaseDirectories
    from cfsfuse.verity.merkle import HashBlocks

log = logging.getLogger(__name__)

_KEPT_TREES = 128
_KEPT_HASH_BLOCKS = 2048  # of 4096 bytes, of all trees
_KEPT_VERDICTS = 1024


class TreeFile:
    """The bytes of a recorded, cached or computed tree. Nothing of them is to be believed."""

    def __init__(self, fd: int, place: Place | None = None) -> None:
        self._file = Descriptor(fd, b"tree")
        self.place = place
        # Of a tree put together from damaged ones: the object that it was made for. It cannot get better before that
        # does.
        self.salvaged_from: Signature | None = None

    @classmethod
    def open(cls, place: Place, size: int) -> TreeFile | None:
        """Open the tree at `place`, None when there is none of `size` bytes."""
        try:
            tree = cls(open_beneath(place.directory, place.path), place)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            return None
        except ObjectUnusable:
            return None
        return tree if tree._file.signature.st_size == size else None

    @classmethod
    def scratch(cls, directory: str | None) -> TreeFile:
        """Return an empty tree without a name, in `directory` if that can be: a terabyte's has eight gigabytes.

        Elsewhere it is in the directory of temporary files, which may be in memory.
        """
        for place in (directory, None):
            with contextlib.suppress(OSError), tempfile.TemporaryFile(buffering=0, dir=place) as file:
                return cls(os.dup(file.fileno()))
        with tempfile.TemporaryFile(buffering=0) as file:
            return cls(os.dup(file.fileno()))

    def read(self, offset: int, length: int, *, wait: bool = True) -> bytes:
        """Return the bytes at `offset`; zeros stand for what is not there, which no hash will match."""
        try:
            return bytes(self._file.read(b"tree", offset, length, wait=wait))
        except ObjectUnusable:
            return bytes(length)

    def write(self, offset: int, block: bytes) -> None:
        os.pwrite(self._file.fd, block, offset)

    def publish(self, place: Place, size: int) -> None:
        """Make a copy at `place`; raise OSError when that cannot be."""
        parent, _, name = place.path.rpartition(b"/")
        directory = open_beneath(place.directory, parent)
        try:
            with published(directory, name) as fd:
                done = 0
                while count := os.sendfile(fd, self._file.fd, done, size - done):
                    done += count
        finally:
            os.close(directory)

    def __str__(self) -> str:
        return printable(os.fsencode(self.place.label)) if self.place else "computed tree"


class TreeNeeded(BlockingIOError):
    """A tree has to be computed, which takes as long as reading the whole object."""


class TreeStore:
    """The trees that verify large objects; `cache` is the directory of computed ones, None for no cache."""

    def __init__(self, directories: BaseDirectories, cache: str | None) -> None:
        self._directories = directories
        self._cache = cache
        self._cache_fd = _open_cache(cache)
        self._trees: Lru[Key, tuple[VerifiedTree, TreeFile]] = Lru(_KEPT_TREES)
        self._hash_blocks: HashBlocks = Lru(_KEPT_HASH_BLOCKS)
        self._damaged: Lru[Key, dict[str, TreeFile]] = Lru(_KEPT_TREES)
        # The digest of an object for which no tree could be made: that stays true until the object changes.
        self._hopeless: Lru[Key, tuple[Signature, bytes]] = Lru(_KEPT_VERDICTS)
        self._disowning = threading.Lock()
        self._computing = threading.Lock()

    def clear(self) -> None:
        """Give back the descriptors of all trees that nobody is reading from."""
        self._trees.clear()
        self._damaged.clear()

    def close(self) -> None:
        """Let go of everything, the cache too."""
        self.clear()
        if self._cache_fd is not None:
            os.close(self._cache_fd)
            self._cache_fd = None

    def prepare(
        self, key: Key, descriptor: Descriptor, blocks: range, *, wait: bool, compute: bool
    ) -> tuple[VerifiedTree, bytes]:
        """Return the tree of an object, and the verified hashes of its data blocks `blocks`.

        Raises DigestMismatch or ObjectUnusable when no tree has them; with wait=False BlockingIOError when a disk has
        to be waited for, and without `compute` TreeNeeded when a tree has to be computed.
        """
        looked = False
        while True:
            tree, file = self._trees.get(key) or self._find(key, descriptor, wait=wait, compute=compute)
            try:
                return tree, tree.leaves(blocks.start, len(blocks), wait=wait)
            except TreeMismatch as mismatch:
                if not looked:  # once: somebody who writes all the time shall not keep us here
                    descriptor.look()
                    looked = True
                if file.salvaged_from == descriptor.signature:
                    # Without a block number, so that all its blocks are one finding in the log.
                    reason = (
                        f"it is damaged, and so is hash block {mismatch.index} of level {mismatch.level} of its tree"
                    )
                    raise ObjectUnusable(key.path, reason) from None
                self._disown(key, file, mismatch)

    def _find(self, key: Key, descriptor: Descriptor, *, wait: bool, compute: bool) -> tuple[VerifiedTree, TreeFile]:
        """Return a tree whose top block is right, unless that of the same file is known already; or compute one."""
        hopeless = self._hopeless.get(key)
        if hopeless is not None and hopeless[0] == descriptor.signature:
            raise DigestMismatch(key.path, None, key.digest, hopeless[1])
        if not wait:
            raise would_block()
        geometry = Geometry(key.algorithm, key.size)
        for place in self._places(key):
            file = None if place.label in (self._damaged.get(key) or ()) else TreeFile.open(place, geometry.tree_size)
            if file is None:
                continue
            tree = VerifiedTree(geometry, key.digest, file.read, self._hash_blocks)
            try:
                tree.hash_block(len(geometry.level_blocks) - 1, 0)
            except TreeMismatch as mismatch:
                self._disown(key, file, mismatch)
                continue
            self._trees.put(key, (tree, file))
            return tree, file
        if not compute:
            raise TreeNeeded(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return self._compute(key, descriptor)

    def _disown(self, key: Key, file: TreeFile, mismatch: TreeMismatch) -> None:
        """Use a damaged tree no more, and say so once; the next best is looked for."""
        with self._disowning:
            damaged = self._damaged.get(key) or {}
            if file.salvaged_from is None and str(file) not in damaged:
                log.warning("%s: %s: it is ignored", file, mismatch)
                self._damaged.put(key, damaged | {file.place.label if file.place else str(file): file})
            self._trees.drop(key)

    def _compute(self, key: Key, descriptor: Descriptor) -> tuple[VerifiedTree, TreeFile]:
        """Return, and keep, a tree built from the object, or what can be put together of that and damaged ones.

        One thread at a time: who needs the same tree shall not compute it too, and by hashlib two threads are slower.
        """
        with self._computing:
            kept = self._trees.get(key)
            if kept is not None:
                return kept  # another thread has just done it
            geometry = Geometry(key.algorithm, key.size)
            try:
                file = self._build(key, descriptor, geometry, list((self._damaged.get(key) or {}).values()))
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    raise
                # No space for temporary files, most likely.
                raise ObjectUnusable(key.path, f"its Merkle tree cannot be computed: {error.strerror}") from None
            tree = VerifiedTree(geometry, key.digest, file.read, self._hash_blocks)
            self._trees.put(key, (tree, file))
            return tree, file

    def _build(self, key: Key, descriptor: Descriptor, geometry: Geometry, damaged: list[TreeFile]) -> TreeFile:
        """Build the tree, and publish it where a damaged one is or else in the cache."""
        built = TreeFile.scratch(self._cache)
        root_hash = build(geometry, descriptor.chunks(key.path, key.size), built.write)
        found = file_digest(key.algorithm, key.size, root_hash)
        if found != key.digest:
            return self._salvage(key, descriptor, geometry, [*damaged, built] if damaged else [], found)
        self._publish(built, [file.place for file in damaged if file.place] + self._cached(key), geometry.tree_size)
        self._damaged.drop(key)
        return built

    def _salvage(
        self, key: Key, descriptor: Descriptor, geometry: Geometry, trees: list[TreeFile], found: bytes
    ) -> TreeFile:
        """Return the hash blocks that either of `trees` has right; raise DigestMismatch when nothing can be told."""
        file = TreeFile.scratch(self._cache)
        if not salvage(geometry, key.digest, [tree.read for tree in trees], file.read, file.write):
            self._hopeless.put(key, (descriptor.signature, found))
            raise DigestMismatch(key.path, None, key.digest, found)
        file.salvaged_from = descriptor.signature
        return file

    def _publish(self, built: TreeFile, places: list[Place], size: int) -> None:
        for place in places:
            try:
                if place.directory == self._cache_fd:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(os.path.dirname(place.path), 0o700, dir_fd=self._cache_fd)
                built.publish(place, size)
            except OSError as error:
                log.debug("%s: cannot keep the tree here: %s", place.label, error.strerror)
            else:
                return

    def _places(self, key: Key) -> Iterator[Place]:
        yield from self._directories.recorded_trees(key.path)
        yield from self._cached(key)

    def _cached(self, key: Key) -> list[Place]:
        """Return where the tree is in the cache: `xx/rest` of the digest, as objects are in a store."""
        if self._cache_fd is None or self._cache is None:
            return []
        name = key.digest.hex()
        path = os.path.join(name[:2], name[2:])
        return [Place(self._cache_fd, path.encode(), os.path.join(self._cache, path))]


def _open_cache(cache: str | None) -> int | None:
    if cache is None:
        return None
    try:
        os.makedirs(cache, 0o700, exist_ok=True)
        return os.open(cache, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        log.warning("%s: no cache of Merkle trees: %s", cache, error.strerror)
        return None
