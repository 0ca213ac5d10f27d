"""Builds by the real command, where to make them, and what a store must be after them."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import subprocess
import tempfile
from typing import TYPE_CHECKING, NamedTuple

import pytest

from cfsfuse.verity.digest import SHA256
from cfsfuse.verity.merkle import Geometry, build
from integration import kernel
from integration.images import SHARED
from integration.mounts import CFSFUSE, SELF, User, digest_of, noise, require, require_composefs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

TIMEOUT = 120  # seconds, for a build that takes one
WHOLE_FILE_MAX = 1 << 20  # an object of more has a Merkle tree beside it

_OBJECT = re.compile(r"[0-9a-f]{2}/[0-9a-f]{62}")
_TREE = re.compile(r"\.merkle/[0-9a-f]{2}/[0-9a-f]{62}")
_MEMORY = "/dev/shm"  # many small files cost little there
_ENOUGH = 1 << 29


def shared(path: str) -> str:
    """Return the path of reference material; skip the test, naming it, where it is absent."""
    absolute = os.path.join(SHARED, path)
    if not os.path.exists(absolute):
        pytest.skip(f"../shared/{path} is not there")
    return absolute


@contextlib.contextmanager
def scratch(*, in_memory: bool = True) -> Iterator[str]:
    """Yield a new directory that every user can enter; in memory, where this machine has such a place."""
    place = None
    if in_memory and os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > _ENOUGH:
        place = _MEMORY
    with tempfile.TemporaryDirectory(prefix="cfsfuse-build-", dir=place) as path:
        set_mode(path, 0o755)
        yield path


def set_mode(path: str, mode: int) -> None:
    """Change the permissions of a file that is there for the test."""
    os.chmod(path, mode)


class Done(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: bytes
    err: str

    @property
    def digest(self) -> str:
        """The digest that a build has printed; it must have done so, and nothing else."""
        assert self.code == 0, self
        assert re.fullmatch(rb"[0-9a-f]{64}\n", self.out), self
        return self.out.decode().strip()

    def refused(self, code: int) -> str:
        """Return the one line with which a build has ended in an error."""
        assert self.code == code, self
        lines = [line for line in self.err.splitlines() if "fs-verity is not enabled" not in line]
        assert len(lines) == 1, self
        assert lines[0].startswith("cfsfuse"), self
        return lines[0]


def mk(
    *arguments: str,
    user: User = SELF,
    wrapper: tuple[str, ...] = (),
    stdin: bytes = b"",
    cwd: str = "/",
    pass_fds: tuple[int, ...] = (),
) -> Done:
    """Run `cfsfuse mk`; `wrapper` stands before all of it and keeps the tests' own user."""
    done = subprocess.run(
        [*wrapper, *user.prefix, CFSFUSE, "mk", *arguments],
        input=stdin,
        capture_output=True,
        cwd=cwd,
        pass_fds=pass_fds,
        timeout=TIMEOUT,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr.decode(errors="replace"))


def write_files(top: str, files: Mapping[str, bytes]) -> None:
    """Write files of these contents below the directory `top`, which is made if need be."""
    for name, content in files.items():
        path = os.path.join(top, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)


def sample(top: str, *, small: int = 200, large: int = 4) -> None:
    """Make a source of `small` files, some alike, some inline, and of `large` ones, which get Merkle trees."""
    files = {f"small/{number % 7}/{number}": noise(10 + 37 * (number % 150), "s") for number in range(small)}
    files |= {f"large/{number}": noise(WHOLE_FILE_MAX + 4096 * 50 * number + 1, "l") for number in range(large)}
    write_files(top, files)
    os.symlink("small/0", os.path.join(top, "link"))


def files_of(store: str) -> dict[str, int]:
    """Return all files of a store, by their paths below it, with their sizes."""
    found = {}
    for folder, _, names in os.walk(store):
        for name in names:
            path = os.path.join(folder, name)
            found[os.path.relpath(path, store)] = os.lstat(path).st_size
    return found


def check_store(store: str) -> dict[str, int]:
    """Assert that everything under a final name is right, and that there is nothing else; return the files."""
    names = check_final_names(store)
    others = sorted(name for name in os.listdir(store) if not re.fullmatch(r"[0-9a-f]{2}|\.merkle", name))
    assert not others, others
    return names


def check_final_names(store: str) -> dict[str, int]:
    """Assert that each object has its digest, and each recorded tree is that of its object; return those files."""
    names = {name: size for name, size in files_of(store).items() if _OBJECT.fullmatch(name) or _TREE.fullmatch(name)}
    for name in names:
        if _OBJECT.fullmatch(name):
            _check_object(store, name)
        elif name.removeprefix(".merkle/") in names:
            with open(os.path.join(store, name), "rb") as file:
                assert file.read() == tree_of(_read(store, name.removeprefix(".merkle/"))), name
    return names


def _check_object(store: str, name: str) -> None:
    content = _read(store, name)
    assert digest_of(content).hex() == name.replace("/", ""), name
    mode = os.lstat(os.path.join(store, name)).st_mode
    assert mode & 0o7777 == 0o444, f"{name}: {mode:o}"


def _read(store: str, name: str) -> bytes:
    with open(os.path.join(store, name), "rb") as file:
        return file.read()


def tree_of(content: bytes) -> bytes:
    """Return the Merkle tree of `content` as it is recorded."""
    geometry = Geometry(SHA256, len(content))
    tree = bytearray(geometry.tree_size)

    def write(offset: int, block: bytes) -> None:
        tree[offset : offset + len(block)] = block

    build(geometry, (content[at : at + WHOLE_FILE_MAX] for at in range(0, len(content), WHOLE_FILE_MAX)), write)
    return bytes(tree)


def fsck(image: str) -> None:
    """Let fsck.erofs look at an image."""
    done = subprocess.run([require("fsck.erofs"), image], capture_output=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert b"<E>" not in done.stderr, done.stderr


@contextlib.contextmanager
def mounted_by_the_kernel(image: str, place: str, store: str | None = None) -> Iterator[str]:
    """Yield where the kernel has mounted an image, in the directory `place`; skip the test where it mounts none."""
    mountpoint, nothing = os.path.join(place, "mnt"), os.path.join(place, "no-objects")
    for directory in (mountpoint, nothing):
        os.makedirs(directory, exist_ok=True)
    refusal = _refusal_of_the_kernel()
    if refusal is not None:
        pytest.skip(f"this kernel cannot mount composefs: {refusal}")
    with kernel.mounted(image, [store or nothing], mountpoint):
        yield mountpoint


@functools.cache
def _refusal_of_the_kernel() -> str | None:
    """Return why the kernel does not mount the reference's image of an empty directory."""
    empty = require_composefs().mkcomposefs("--from-file", "-", "-", stdin=b"/ 0 40755 2 0 0 0 0.0 - - -\n")
    with scratch() as place:
        for directory in ("mnt", "objects"):
            os.mkdir(os.path.join(place, directory))
        write_files(place, {"image.cfs": empty})
        image, objects, mountpoint = (os.path.join(place, name) for name in ("image.cfs", "objects", "mnt"))
        try:
            with kernel.mounted(image, [objects], mountpoint):
                return None
        except OSError as error:
            return str(error)


def object_name(content: bytes) -> str:
    """Return the path below a store of the object of some content."""
    digest = digest_of(content).hex()
    return f"{digest[:2]}/{digest[2:]}"
