"""What the command line and the API both ask: a path as a process would look it up, contents in steps, digests."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cfsfuse.basedirs import Descriptor
from cfsfuse.errors import ObjectError, PathNotFound, UsageError, printable
from cfsfuse.tree import External, Inline, Sparse
from cfsfuse.verity.digest import SHA256
from cfsfuse.verity.ioctl import measure
from cfsfuse.verity.merkle import digest_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cfsfuse.erofs.inode import Inode
    from cfsfuse.erofs.reader import Reader
    from cfsfuse.objects import ObjectStore
    from cfsfuse.tree import Node
    from cfsfuse.verity.digest import Algorithm, Bytes

STEP = 1 << 20
LINKS_MAX = 40  # the kernel's MAXSYMLINKS


def resolve(reader: Reader, path: bytes, *, follow: bool) -> Inode:
    """Return the inode at `path`, as a process would see it whose root directory is the image's.

    Symbolic links on the way are followed, in the last component only with `follow`; no link leads out of the image.
    Raises PathNotFound, or UsageError when something on the way is no directory.
    """
    at = [reader.root]
    pending = path.split(b"/")[::-1]
    links = 0
    while pending:
        name = pending.pop()
        if not at[-1].is_directory:
            raise UsageError(f"{printable(path)}: not a directory on the way")
        if name == b"..":
            del at[max(1, len(at) - 1) :]
        elif name not in (b"", b"."):
            inode = reader.lookup(at[-1], name)
            if inode is None:
                raise PathNotFound(path)
            if not inode.is_symlink or not (pending or follow):
                at.append(inode)
                continue
            links += 1
            if links > LINKS_MAX:
                raise UsageError(f"{printable(path)}: too many levels of symbolic links")
            target = reader.readlink(inode)
            if target.startswith(b"/"):
                del at[1:]
            pending += target.split(b"/")[::-1]
    return at[-1]


def content(store: ObjectStore, node: Node) -> Iterator[Bytes]:
    """Yield the content of a regular file in steps of 1 MiB, verified as `store` is set to do."""
    size = node.stat.size
    if isinstance(node, Inline):
        yield node.content
    elif isinstance(node, Sparse):
        for offset in range(0, size, STEP):
            yield bytes(min(STEP, size - offset))
    elif isinstance(node, External):
        store.open(node)
        for offset in range(0, size, STEP):
            yield store.read(node, offset, STEP)


def measure_file(path: str, algorithm: Algorithm = SHA256) -> bytes:
    """Return the fs-verity digest of a regular file; raise UsageError where it cannot be read.

    The kernel is asked first: for a file with fs-verity it knows the digest.
    """
    name = os.fsencode(path)
    try:
        # O_NONBLOCK: a fifo must not stop us.
        descriptor = Descriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY), name)
        known = measure(descriptor.fd)
        if known is not None and known.algorithm == algorithm.name:
            return known.value
        size = descriptor.signature.st_size
        return digest_of(algorithm, size, descriptor.chunks(name, size))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ObjectError as error:
        raise UsageError(f"{path}: {error.reason}") from None
