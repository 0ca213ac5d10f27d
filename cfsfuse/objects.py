"""Objects → verified bytes.

A file up to WHOLE_FILE_MAX bytes is read and verified whole, once, into private memory and served from there. A
larger one is verified block by block against its Merkle tree (`trees.py`). Nothing here depends on how many files are
open: what an open file needs is found again from the node, so descriptors, contents and trees are kept within budgets
and dropped at will.

`wait=False` never waits for a disk: it raises BlockingIOError instead, and the caller asks again from a worker thread.
"""

from __future__ import annotations

import errno
import functools
import gc
import resource
from typing import TYPE_CHECKING, NamedTuple, Protocol

from cfsfuse.basedirs import BaseDirectories, Descriptor, Key, Signature
from cfsfuse.errors import DigestMismatch, ObjectError, ObjectUnusable
from cfsfuse.lru import Lru
from cfsfuse.verification import Verification
from cfsfuse.verity.digest import ALGORITHMS, BLOCK_SIZE
from cfsfuse.verity.ioctl import measure
from cfsfuse.verity.merkle import content_digest

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from cfsfuse.tree import External
    from cfsfuse.trees import TreeStore
    from cfsfuse.verity.digest import Bytes

WHOLE_FILE_MAX = 1 << 20
_CONTENT_BUDGET = 16 << 20  # bytes of verified small files
_CONTENT_OVERHEAD = 500  # bytes that an entry costs besides its content
_KNOWN_GOOD = 16384  # small objects remembered as verified; about 500 bytes each
_SPARE_DESCRIPTORS = 256  # of the limit, for everything that is not an object: trees, sockets, what a thread holds


class Load(Protocol):
    """How one kind of object is loaded."""

    def __call__(self, key: Key, offset: int, length: int, /, *, wait: bool) -> Loaded: ...


class Loaded(NamedTuple):
    """What a read took from the disk: `data` starts at byte `start` and may be given out after `check`."""

    data: Bytes
    start: int
    check: Callable[[], None] | None


class ObjectStore:
    """Verified bytes of the objects in the base directories."""

    def __init__(self, directories: BaseDirectories, trees: TreeStore, verification: Verification) -> None:
        self.verification = verification
        self._directories = directories
        self._trees = trees
        self._descriptors: Lru[Key, Descriptor] = Lru(_descriptor_budget())
        self._contents: Lru[Key, Bytes] = Lru(_CONTENT_BUDGET)
        self._known_good: Lru[Key, Signature] = Lru(_KNOWN_GOOD)

    @property
    def is_local(self) -> bool:
        """Whether all objects are on disks of this machine."""
        return self._directories.are_local()

    def close(self) -> None:
        """Let go of everything that is kept, of the trees and of the base directories."""
        self._descriptors.clear()
        self._contents.clear()
        self._known_good.clear()
        self._trees.close()
        self._directories.close()

    def statvfs(self) -> os.statvfs_result | None:
        """Return the statvfs of the first base directory's file system, None when there is none."""
        return self._directories.statvfs()

    def open(self, node: External, *, wait: bool = True) -> None:
        """Raise the ObjectError that reading `node` would, as far as that is known without reading it.

        A small file is verified here, whole, unless the very same object has been before. Of a large one the Merkle
        tree is found or computed.
        """
        self.read(node, 0, 0, wait=wait)

    def is_known_good(self, node: External) -> bool:
        """Return whether a small file has been verified and its object looks as it did then, which `open` demands.

        It takes half the time that `open` takes. It may wait for the disk.
        """
        if node.path is None:
            return False
        known = self._known_good.get(self._key(node))
        return known is not None and self._directories.signature(node.path) == known

    def read(self, node: External, offset: int, length: int, *, wait: bool = True) -> Bytes:
        """Return verified bytes of `node`, fewer than `length` only at the end of the file."""
        return self.finish(self.load(node, offset, length, wait=wait), offset, length)

    def load(self, node: External, offset: int, length: int, *, wait: bool = True, compute: bool = True) -> Loaded:
        """Do the input that a read needs; `finish` is the hashing. Length 0 loads what `open` has to look at.

        Without `compute`, TreeNeeded instead of computing a tree.
        """
        key = self._key(node)
        length = max(0, min(length, key.size - offset))
        load: Load
        if not self._verifies(node):
            load = self._load_unverified
        elif key.size <= WHOLE_FILE_MAX:
            load = self._load_whole
        else:
            load = functools.partial(self._load_blocks, compute=compute)
        try:
            return load(key, offset, length, wait=wait)
        except ObjectError:
            # The next try opens the object anew: it may be restored, under its name or in place.
            self._descriptors.drop(key)
            raise
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            # Give back all descriptors that nobody is reading from, also those in the tracebacks of errors; try again.
            self._descriptors.clear()
            self._trees.clear()
            gc.collect()
            return load(key, offset, length, wait=wait)

    def finish(self, loaded: Loaded, offset: int, length: int) -> Bytes:
        """Verify what `load` gave and return the part of it that was asked for; raise DigestMismatch."""
        data, start, check = loaded
        if check is not None:
            check()
        if start == offset and length >= len(data):
            return data
        return memoryview(data)[offset - start : offset - start + length]

    def _load_unverified(self, key: Key, offset: int, length: int, *, wait: bool) -> Loaded:
        return _unchecked(self._descriptor(key, wait=wait), key, offset, length, wait=wait)

    def _load_whole(self, key: Key, _offset: int, length: int, *, wait: bool) -> Loaded:
        content = self._contents.get(key) if length else None
        if content is not None:
            return Loaded(content, 0, None)
        # No descriptor is kept: the content is, and a changed object shall be noticed when the file is opened again.
        descriptor = self._fresh(key, wait=wait)
        if not length and self._known_good.get(key) == descriptor.signature:
            return Loaded(b"", 0, None)
        content = descriptor.read(key.path, 0, key.size, wait=wait)
        return Loaded(content, 0, functools.partial(self._check_whole, key, content, descriptor.signature))

    def _check_whole(self, key: Key, content: Bytes, signature: Signature) -> None:
        found = content_digest(key.algorithm, content)
        if found != key.digest:
            raise DigestMismatch(key.path, None, key.digest, found)
        self._known_good.put(key, signature)
        self._contents.put(key, content, len(content) + _CONTENT_OVERHEAD)

    def _load_blocks(self, key: Key, offset: int, length: int, *, wait: bool, compute: bool) -> Loaded:
        descriptor = self._descriptor(key, wait=wait)
        if descriptor.kernel_verifies:
            return _unchecked(descriptor, key, offset, length, wait=wait)
        start = offset & -BLOCK_SIZE
        end = min(offset + length + -(offset + length) % BLOCK_SIZE, key.size)
        count = -(-(end - start) // BLOCK_SIZE) if length else 0
        first = start // BLOCK_SIZE
        blocks = range(first, first + count)
        tree, leaves = self._trees.prepare(key, descriptor, blocks, wait=wait, compute=compute)
        if not length:
            return Loaded(b"", offset, None)
        data = descriptor.read(key.path, start, end - start, wait=wait)
        wrong = functools.partial(tree.wrong_block, first, data, leaves)
        return Loaded(data, start, functools.partial(self._check_blocks, key, wrong))

    def _check_blocks(self, key: Key, wrong_block: Callable[[], tuple[int, bytes, bytes] | None]) -> None:
        wrong = wrong_block()
        if wrong is not None:
            self._descriptors.drop(key)
            raise DigestMismatch(key.path, *wrong)

    def _verifies(self, node: External) -> bool:
        if self.verification is Verification.OFF:
            return False
        if node.digest is None and self.verification is Verification.REQUIRED:
            raise ObjectUnusable(node.path or b"", "the image records no digest for it, and verity is required")
        return node.digest is not None

    def _key(self, node: External) -> Key:
        if node.path is None:
            raise ObjectUnusable(b"", "the image records no usable path (trusted.overlay.redirect) for it")
        algorithm, digest = node.digest or ("sha256", b"")
        return Key(node.path, node.stat.size, ALGORITHMS[algorithm], digest)

    def _descriptor(self, key: Key, *, wait: bool) -> Descriptor:
        """Return an open descriptor of the object, kept or new."""
        descriptor = self._descriptors.get(key)
        if descriptor is None:
            descriptor = self._fresh(key, wait=wait)
            if key.digest:
                # Asked for each descriptor: a kept answer would be about a file that may have been replaced since.
                descriptor.kernel_verifies = measure(descriptor.fd) == (key.algorithm.name, key.digest)
            self._descriptors.put(key, descriptor)
        return descriptor

    def _fresh(self, key: Key, *, wait: bool) -> Descriptor:
        """Open the object anew and check that it is a regular file of the recorded size."""
        descriptor = self._directories.open(key.path, wait=wait)
        if descriptor.signature.st_size != key.size:
            raise ObjectUnusable(key.path, f"{descriptor.signature.st_size} bytes, but the image records {key.size}")
        return descriptor


def _unchecked(descriptor: Descriptor, key: Key, offset: int, length: int, *, wait: bool) -> Loaded:
    return Loaded(descriptor.read(key.path, offset, length, wait=wait), offset, None)


def _descriptor_budget() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(soft - _SPARE_DESCRIPTORS, 4096))
