"""Opening below a directory: both ways mean the same."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import stat
from typing import TYPE_CHECKING

import pytest

from cfsfuse import beneath
from cfsfuse.beneath import open_beneath, status_beneath
from tests.support import time_limit

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of files, and of ways out of it."""
    base = tmp_path / "base"
    (base / "a/b").mkdir(parents=True)
    (base / "file").write_bytes(b"file")
    (base / "a/b/deep").write_bytes(b"deep")
    (base / "a/link").symlink_to("b")
    (base / "up").symlink_to("..")
    (base / "absolute").symlink_to("/")
    (base / "inside").symlink_to("file")
    (base / "dangling").symlink_to("nothing")
    (base / "loop").symlink_to("loop")
    os.mkfifo(base / "fifo")
    (tmp_path / "secret").write_bytes(b"secret")
    return base


@pytest.fixture(params=["openat2", "walk", "forbidden"])
def directory(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Give a descriptor of the folder, with openat2, without it, and where a seccomp filter refuses it."""
    if request.param == "openat2":
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.close(open_beneath(fd, b"file"))
        finally:
            os.close(fd)
        if not beneath._openat2_works:
            pytest.skip("this kernel has no openat2")
    else:
        number = errno.ENOSYS if request.param == "walk" else errno.EPERM

        def refuse(*_: object) -> int:
            ctypes.set_errno(number)
            return -1

        monkeypatch.setattr(beneath, "_openat2_works", True)
        monkeypatch.setattr(beneath, "_syscall", refuse)
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def opened(directory: int, path: bytes) -> bytes:
    fd = open_beneath(directory, path)
    try:
        assert not os.get_inheritable(fd)
        return os.read(fd, 100)
    finally:
        os.close(fd)


def test_plain_files_open(directory: int) -> None:
    assert opened(directory, b"file") == b"file"
    assert opened(directory, b"a/b/deep") == b"deep"
    assert opened(directory, b"file") == b"file"


@pytest.mark.parametrize(
    ("path", "number"),
    [
        (b"../secret", errno.EXDEV),
        (b"a/../../secret", errno.EXDEV),
        (b"a/../file", errno.EXDEV),
        (b"/etc/passwd", errno.EXDEV),
        (b"", errno.EXDEV),
        (b"a//b/deep", errno.EXDEV),
        (b"./file", errno.EXDEV),
        (b"file/", errno.EXDEV),
        (b"file\0", errno.EXDEV),
        (b"a\0/b", errno.EXDEV),
        (b"up/secret", None),
        (b"absolute/etc/passwd", None),
        (b"a/link/deep", None),
        (b"inside", errno.ELOOP),
        (b"dangling", errno.ELOOP),
        (b"loop", errno.ELOOP),
        (b"none", errno.ENOENT),
        (b"none/none", errno.ENOENT),
        (b"file/none", errno.ENOTDIR),
        (b"n" * 256, errno.ENAMETOOLONG),
    ],
)
def test_everything_else_is_refused(directory: int, path: bytes, number: int | None) -> None:
    gc.collect()
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=r".") as caught:
        os.close(open_beneath(directory, path))
    if number is None:  # a symlink on the way: the walk calls it no directory
        assert caught.value.errno in (errno.ELOOP, errno.ENOTDIR)
    else:
        assert caught.value.errno == number
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_what_is_there_is_seen_without_being_opened(directory: int) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    kinds = {b"file": stat.S_IFREG, b"a": stat.S_IFDIR, b"a/link": stat.S_IFLNK, b"up": stat.S_IFLNK}
    for path, kind in {**kinds, b"fifo": stat.S_IFIFO, b"a/b/deep": stat.S_IFREG}.items():
        status = status_beneath(directory, path)
        assert stat.S_IFMT(status.st_mode) == kind
        assert status.st_ino == os.lstat(os.path.join(b"/proc/self/fd/%d" % directory, path)).st_ino
    for path in (b"up/secret", b"a/link/deep", b"a/../file", b"none", b"/etc"):
        with pytest.raises(OSError, match=r"."):
            status_beneath(directory, path)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_fifo_does_not_block(directory: int) -> None:
    with time_limit(5):
        os.close(open_beneath(directory, b"fifo"))


def test_mounts_are_not_crossed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.stat("/proc").st_dev == os.stat("/").st_dev:
        pytest.skip("/proc is no mount here")
    fd = os.open("/", os.O_PATH | os.O_DIRECTORY)
    try:
        for works in (True, False):
            monkeypatch.setattr(beneath, "_openat2_works", works)
            with pytest.raises(OSError, match=r".") as caught:
                open_beneath(fd, b"proc/version")
            assert caught.value.errno == errno.EXDEV
    finally:
        os.close(fd)


def test_without_waiting_it_opens_or_would_block(directory: int) -> None:
    try:
        fd = open_beneath(directory, b"file", wait=False)
    except BlockingIOError:
        return
    assert os.read(fd, 10) == b"file"
    os.close(fd)


def test_missing_call_is_asked_for_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def missing(*_: object) -> int:
        calls.append(1)
        ctypes.set_errno(errno.ENOSYS)
        return -1

    monkeypatch.setattr(beneath, "_openat2_works", True)
    monkeypatch.setattr(beneath, "_syscall", missing)
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        for _ in range(3):
            assert opened(fd, b"file") == b"file"
    finally:
        os.close(fd)
    assert len(calls) == 1
