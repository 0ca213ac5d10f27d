"""Base directories: what an object is, and what is not one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from cfsfuse.basedirs import BaseDirectories
from cfsfuse.errors import ObjectError, ObjectMissing, ObjectUnusable, UsageError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    (folder / "ab").mkdir(parents=True)
    (folder / "ab/file").write_bytes(b"0123456789")
    return folder


@pytest.mark.parametrize("make", [lambda _: None, lambda path: path.write_bytes(b"")], ids=["missing", "a file"])
def test_base_directory_that_is_none_names_the_remedy(tmp_path: Path, make: object) -> None:
    assert callable(make)
    make(tmp_path / "base")
    with pytest.raises(UsageError, match=r"base: base directory: .*basedir="):
        BaseDirectories([str(tmp_path / "base")])


def test_descriptor_reads_exactly_and_closes_when_dropped(base: Path) -> None:
    directories = BaseDirectories([str(base)])
    descriptor = directories.open(b"ab/file")
    assert bytes(descriptor.read(b"ab/file", 2, 5)) == b"23456"
    assert bytes(descriptor.read(b"ab/file", 2, 0)) == b""
    with pytest.raises(ObjectUnusable, match="has nothing at byte 10"):
        descriptor.read(b"ab/file", 8, 5)
    assert b"".join(map(bytes, descriptor.chunks(b"ab/file", 10, 4))) == b"0123456789"
    fd = descriptor.fd
    assert not os.get_inheritable(fd)
    del descriptor
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_trap_store_that_is_covered_or_moved_afterwards_is_still_the_same(base: Path) -> None:
    """So a store below the mountpoint is the one underneath, and the daemon never waits for itself."""
    directories = BaseDirectories([str(base)])
    base.rename(base.with_name("moved"))
    base.mkdir()
    assert directories.open(b"ab/file").signature.st_size == 10


@pytest.mark.parametrize("name", ["fifo", "directory", "socket"])
def test_special_file_is_no_object(base: Path, name: str) -> None:
    path = base / "ab" / name
    if name == "fifo":
        os.mkfifo(path)
    elif name == "directory":
        path.mkdir()
    else:
        os.mknod(path, 0o140600)
    directories = BaseDirectories([str(base)])
    with pytest.raises(ObjectUnusable, match="not a regular file"):
        directories.open(f"ab/{name}".encode())
    assert directories.exists(f"ab/{name}".encode())


def test_reasons_say_what_is_wrong_with_the_path(base: Path) -> None:
    (base / "ab/link").symlink_to("file")
    directories = BaseDirectories([str(base)])
    with pytest.raises(ObjectUnusable, match="symlink"):
        directories.open(b"ab/link")
    with pytest.raises(ObjectUnusable, match="leads out of the base directory"):
        directories.open(b"../base/ab/file")


def test_existence(base: Path) -> None:
    directories = BaseDirectories([str(base)])
    assert directories.exists(b"ab/file")
    assert not directories.exists(b"ab/none")
    with pytest.raises(ObjectMissing):
        directories.open(b"ab/none")


def test_recorded_trees_are_named_for_people(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    places = list(BaseDirectories([str(base), str(other)]).recorded_trees(b"ab/file"))
    assert [place.path for place in places] == [b".merkle/ab/file"] * 2
    assert [place.label for place in places] == [f"{base}/.merkle/ab/file", f"{other}/.merkle/ab/file"]


@pytest.mark.parametrize("path", [b"ab/file/", b"ab/file/x", b"ab/" + b"n" * 256, b"ab/\xff\xfe", b"ab/fi\nle"])
def test_odd_paths_are_errors_of_the_object(base: Path, path: bytes) -> None:
    with pytest.raises(ObjectError) as caught:
        BaseDirectories([str(base)]).open(path)
    assert caught.value.path == path
    assert len(str(caught.value).splitlines()) == 1
