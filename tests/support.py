"""What several test modules need: the reference data, sample images, and walking all of an image."""

from __future__ import annotations

import contextlib
import csv
import functools
import gzip
import os
import random
import signal
import tarfile
from typing import TYPE_CHECKING

import pytest
import trio

from cfsfuse.basedirs import BaseDirectories
from cfsfuse.dump import dump
from cfsfuse.erofs.image import Image
from cfsfuse.erofs.overlay import Digest
from cfsfuse.erofs.reader import Reader
from cfsfuse.errors import ImageError, PathNotFound
from cfsfuse.objects import ObjectStore
from cfsfuse.tree import External, Stat
from cfsfuse.trees import TreeStore
from cfsfuse.verification import Verification
from cfsfuse.verity.digest import SHA256
from cfsfuse.verity.merkle import Geometry, build, content_digest
from tests import imagemaker as im

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import FrameType

    from cfsfuse.verity.digest import Algorithm
    from cfsfuse.vfs import Vfs

HERE = os.path.dirname(os.path.abspath(__file__))
SHARED = os.path.join(HERE, os.pardir, os.pardir, "shared")
BAD = os.path.join(HERE, "data", "bad")
VECTORS = ("corners", "whiteouts", "random-12")


def shared(*parts: str) -> str:
    """Return the path of a file of the reference data; skip the test, naming it, when it is absent."""
    path = os.path.join(SHARED, *parts)
    if not os.path.exists(path):
        pytest.skip(f"reference data absent: ../shared/{'/'.join(parts)}")
    return path


@functools.cache
def vector(name: str) -> bytes:
    with gzip.open(shared("vectors", name)) as file:
        return file.read()


def expected_rows() -> list[dict[str, str]]:
    """Return the lines of expected.tsv: what the C tool makes of each dump; none where the file is absent."""
    path = os.path.join(SHARED, "vectors", "expected.tsv")
    if not os.path.exists(path):
        return []
    with open(path, encoding="ascii") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@functools.cache
def expected(name: str) -> dict[str, str]:
    """Return the line of expected.tsv for the image that the C tool makes of `name` by default."""
    shared("vectors", "expected.tsv")
    rows = [row for row in expected_rows() if (row["name"], row["min_version"], row["max_version"]) == (name, "0", "1")]
    return rows[0]


@functools.cache
def python_image(suffix: str) -> bytes:
    """Return the member of the real image's archive, outside objects/, whose name ends in `suffix`."""
    with tarfile.open(shared("images", "python-image.tar.gz")) as archive:
        for member in archive:
            if member.name.endswith(suffix) and "objects/" not in member.name:
                file = archive.extractfile(member)
                assert file is not None
                return file.read()
    raise LookupError(suffix)


def reader_of(made: im.Made | bytes) -> Reader:
    return Reader(Image(made if isinstance(made, bytes) else made.content()))


def sample(version: int = 1) -> im.Made:
    """Return an image that has everything that EROFS can say in a composefs image, in little space."""
    linked = im.external(5000, b"aa/linked", b"\x11" * 32, nlink=2)
    children = {
        b"compact": im.file(b"small", compact=True, uid=1000, gid=1000),
        b"empty": im.file(),
        b"plain": im.file(b"p" * 5000, layout=im.PLAIN),
        b"tail": im.file(b"t" * 5000),
        b"whole": im.file(b"w" * 8192),
        b"old": im.file(b"o", mtime=-86400, mtime_nsec=999_999_999),
        b"far": im.file(b"f", mtime=1 << 40),
        b"sha512": im.external(1 << 33, b"bb/wide", b"\x22" * 64),
        b"unverified": im.external(7, b"cc/any name", None),
        b"sparse": im.file(layout=im.CHUNKED, size=1 << 20, i_u=31),
        b"one": linked,
        b"two": linked,
        b"link": im.symlink(b"target"),
        b"long link": im.symlink(b"l" * 4095),
        b"null": im.whiteout(i_u=0x103),
        b"block": im.Entry(0o60600, layout=im.PLAIN, i_u=0x801),
        b"fifo": im.Entry(0o10600, layout=im.PLAIN),
        b"socket": im.Entry(0o140600, layout=im.PLAIN),
        b"xattrs": im.file(
            b"x",
            xattrs={b"user.a": b"1", b"trusted.overlay.overlay.opaque": b"y", b"security.capability": b"\0\1"},
            shared={b"user.shared": b"s" * 30, b"trusted.b": b""},
        ),
        b"acl": im.file(b"", xattrs={b"system.posix_acl_access": b"\2\0\0\0"}, shared={b"user.shared": b"s" * 30}),
        b"gone": im.escaped_whiteout(),
        b"dir": im.directory(
            {b"name-%03d-%s" % (i, b"n" * (i % 40)): im.file(b"%d" % i) for i in range(250)},
            xattrs={b"trusted.overlay.overlay.whiteouts": b"", b"trusted.overlay.overlay.opaque": b"x"},
        ),
        b"compact dir": im.directory({b"deep": im.directory({b"er": im.directory()})}, compact=True),
    }
    root = im.directory({**im.hidden_whiteouts(), **children}, xattrs={b"trusted.overlay.opaque": b"y"})
    return im.make(root, version=version, flags=1, build_time=1_700_000_000, build_time_nsec=5)


def exercise(content: bytes) -> list[ImageError]:
    """Ask everything of an image; return the errors of single entries, raise the one that ends a whole walk."""
    reader = Reader(Image(content))
    errors: list[ImageError] = []

    def ask(question: Callable[[], object]) -> None:
        try:
            question()
        except ImageError as error:
            errors.append(error)
        except PathNotFound:
            pass  # a directory that is not sorted: what is listed there need not be found

    for path, inode in reader.walk():
        ask(lambda: reader.node(inode))  # noqa: B023 - called at once
        ask(lambda: reader.authored(inode))  # noqa: B023 - called at once
        ask(lambda: reader.xattrs(inode))  # noqa: B023 - called at once
        if inode.is_symlink:
            ask(lambda: reader.readlink(inode))  # noqa: B023 - called at once
        if inode.is_directory:
            ask(lambda: reader.lookup(inode, b"\0first"))  # noqa: B023 - called at once
            ask(lambda: reader.lookup(inode, b"\xfflast"))  # noqa: B023 - called at once
        ask(lambda: reader.resolve(path))  # noqa: B023 - called at once
    ask(lambda: sum(map(len, dump(reader))))
    return errors


@contextlib.contextmanager
def leaving_nothing(seconds: int) -> Iterator[None]:
    """Let the block leave no descriptor and no process, nor last longer than `seconds`."""
    before = set(os.listdir("/proc/self/fd"))
    with time_limit(seconds):
        yield
    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Fail when the block takes longer: a hang is a finding, not a reason to wait for the session's timeout."""

    def expire(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, expire)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)  # pytest-timeout uses the same timer
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)


async def reported(vfs: Vfs) -> None:
    """Wait until the errors of the answers so far are in the log: they are written after the answer."""
    with trio.fail_after(10):
        while vfs._is_reporting:  # noqa: ASYNC110 - a vfs tells nobody
            await trio.sleep(0.001)


def random_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def tree_of(content: bytes, algorithm: Algorithm = SHA256) -> tuple[bytes, bytes]:
    """Return the Merkle tree of `content` as it is recorded, and the root hash."""
    geometry = Geometry(algorithm, len(content))
    tree = bytearray(geometry.tree_size)

    def write(offset: int, block: bytes) -> None:
        tree[offset : offset + len(block)] = block

    step = 1 << 20
    root_hash = build(geometry, (content[at : at + step] for at in range(0, len(content), step)), write)
    return bytes(tree), root_hash


class Store:
    """Base directories in a temporary folder, filled by hand, and the object stores over them."""

    def __init__(self, folder: Path, bases: int = 1) -> None:
        self.bases = [folder / f"base{number}" for number in range(bases)]
        for base in self.bases:
            base.mkdir()
        self.cache = folder / "cache"

    def add(self, content: bytes, name: str = "ab/object", algorithm: Algorithm = SHA256, base: int = 0) -> External:
        """Write an object and return a node that it is the content of."""
        path = self.path(name, base)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return self.node(content, name, algorithm)

    @staticmethod
    def node(content: bytes, name: str | bytes = "ab/object", algorithm: Algorithm = SHA256) -> External:
        digest = Digest(algorithm.name, content_digest(algorithm, content))
        return node_of(len(content), name if isinstance(name, bytes) else name.encode(), digest)

    def path(self, name: str = "ab/object", base: int = 0) -> Path:
        return self.bases[base] / name

    def record_tree(self, content: bytes, name: str = "ab/object", algorithm: Algorithm = SHA256) -> Path:
        """Write the tree of an object where `mk` would, and return its path."""
        path = self.bases[0] / ".merkle" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tree_of(content, algorithm)[0])
        return path

    def cached_tree(self, node: External) -> Path:
        assert node.digest is not None
        name = node.digest.value.hex()
        return self.cache / name[:2] / name[2:]

    def open(
        self, verification: Verification = Verification.RECORDED, *, cache: str | None = "use the folder"
    ) -> ObjectStore:
        """Return a new object store: nothing that an earlier one kept."""
        directories = BaseDirectories([str(base) for base in self.bases])
        trees = TreeStore(directories, str(self.cache) if cache is not None else None)
        return ObjectStore(directories, trees, verification)


def node_of(size: int, path: bytes | None, digest: Digest | None = None) -> External:
    return External(Stat(0o100644, 1, 0, 0, 0, size, 0), {}, path, digest)


def put(store: Store, content: bytes, how: str) -> None:
    """Write the object anew, under its name or in place."""
    if how == "rename":
        store.path("ab/new").write_bytes(content)
        os.replace(store.path("ab/new"), store.path())
    else:
        store.path().write_bytes(content)


def flip(path: Path, offset: int) -> None:
    """Invert one byte of a file in place."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))
