"""Where an image goes: whole under its name or not at all, through links as fopen(3) would, or into what is there."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from typing import TYPE_CHECKING

import pytest

from cfsfuse.builder.destination import NewFile, Nowhere, Stream, destination
from cfsfuse.errors import HostError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

no_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")


def put(path: Path | str, *pieces: bytes) -> None:
    with destination(str(path)) as target, target.opened() as write:
        for piece in pieces:
            write(piece)


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


class Stop(Exception):
    """What goes wrong while an image is written."""


def stop_half_way(path: Path | str) -> None:
    with destination(str(path)) as target, target.opened() as write:
        write(b"half")
        raise Stop


def test_a_new_file_has_the_mode_that_fopen_gives(tmp_path: Path) -> None:
    with umask(0o027):
        put(tmp_path / "image", b"one", b"", b"two")
    assert (tmp_path / "image").read_bytes() == b"onetwo"
    assert stat.S_IMODE((tmp_path / "image").stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["image"]


def test_an_existing_file_is_replaced_when_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"old")
    with open(path, "rb") as held:
        with destination(str(path)) as target, target.opened() as write:
            write(b"new")
            assert path.read_bytes() == b"old"
        assert path.read_bytes() == b"new"
        assert held.read() == b"old"


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "image"
    for content in (None, b"old"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(Stop):
            stop_half_way(path)
        assert (path.read_bytes() if path.exists() else None) == content
        assert len(os.listdir(tmp_path)) == (0 if content is None else 1)


def test_looking_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"old")
    for name in ("image", "absent"):
        with destination(str(tmp_path / name)) as target:
            assert isinstance(target, NewFile)
    assert (tmp_path / "image").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["image"]


def test_a_new_file_is_on_the_disk_before_its_objects_are_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(fd: int) -> None:
        done.append("fsync " + os.path.basename(os.readlink(f"/proc/self/fd/{fd}")).split(".")[1])
        fsync(fd)

    def recorded_rename(source: bytes, target: bytes, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        done.append("rename " + os.fsdecode(target))
        rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    place = tmp_path / ".place."  # the name that is recorded of it: place
    place.mkdir()
    with destination(str(place / "image")) as target, target.opened(lambda: done.append("publish")) as write:
        write(b"image")
        assert done == []
    assert done == ["fsync image", "publish", "fsync image", "rename image", "fsync place"]


@pytest.mark.parametrize("call", ["fsync", "publish"])
def test_a_failure_between_writing_and_naming(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def fails(*_: object) -> None:
        raise OSError(5, "Input/output error")

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", fails)
    with (
        pytest.raises(HostError, match="image: cannot write the image: Input/output error"),
        destination(str(tmp_path / "image")) as target,
        target.opened(fails if call == "publish" else lambda: done.append("published")) as write,
    ):
        write(b"image")
    assert done == []
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("path", [None, "/proc/self/fd/{}"])
def test_what_is_read_as_it_comes_has_its_objects_before(path: str | None) -> None:
    fd = os.memfd_create("image")
    os.write(fd, b"old")
    found: list[bytes] = []
    with (
        destination(path and path.format(fd)) as target,
        target.opened(lambda: found.append(os.pread(fd, 9, 0))) as write,
    ):
        assert found == [b"old"]
        write(b"new")
    os.close(fd)


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "directory").symlink_to("real")
    (tmp_path / "real" / "one").symlink_to("../two")
    (tmp_path / "two").symlink_to(tmp_path / "directory" / "final")
    put(tmp_path / "directory" / "one", b"image")  # the file at the end is not there yet
    assert (tmp_path / "real" / "final").read_bytes() == b"image"
    assert (tmp_path / "two").is_symlink()
    assert (tmp_path / "real" / "one").is_symlink()
    put(tmp_path / "two", b"again")
    assert (tmp_path / "real" / "final").read_bytes() == b"again"


def test_names_of_any_bytes(tmp_path: Path) -> None:
    put(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n"), b"image")
    assert os.listdir(os.fsencode(tmp_path)) == [b"\xff\n"]


def test_a_descriptor_that_proc_names_is_written_to(tmp_path: Path) -> None:
    with open(tmp_path / "held", "w+b") as file:
        file.write(b"what was there, and is longer")
        file.flush()
        os.rename(tmp_path / "held", tmp_path / "renamed")
        put(f"/proc/self/fd/{file.fileno()}", b"image")
        file.seek(0)
        assert file.read() == b"image"
        (tmp_path / "link").symlink_to(f"/dev/fd/{file.fileno()}")
        put(tmp_path / "link", b"by a link")
        file.seek(0)
        assert file.read() == b"by a link"
    assert sorted(os.listdir(tmp_path)) == ["link", "renamed"]


def test_a_deleted_file_behind_a_descriptor(tmp_path: Path) -> None:
    fd = os.memfd_create("image")
    put(f"/proc/self/fd/{fd}", b"image")
    with pytest.raises(Stop):
        stop_half_way(f"/proc/self/fd/{fd}")
    assert os.fstat(fd).st_size == 0
    os.close(fd)


def test_a_fifo_and_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    read: list[bytes] = []
    thread = threading.Thread(target=lambda: read.append((tmp_path / "fifo").read_bytes()))
    thread.start()
    put(tmp_path / "fifo", b"image")
    thread.join(10)
    assert read == [b"image"]
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    put("/dev/null", b"image")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_full_device() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("/dev/full is not there")
    with pytest.raises(HostError, match="/dev/full: cannot write the image: No space left on device"):
        put("/dev/full", b"image")


def test_a_terminal_is_refused() -> None:
    master, slave = os.openpty()
    with pytest.raises(UsageError, match="is a terminal"):
        put(os.ttyname(slave), b"image")
    os.close(slave)
    os.close(master)


def test_standard_output_and_nowhere(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    put("-", b"ima", b"ge")
    assert capfdbinary.readouterr().out == b"image"
    with destination("-") as target:
        assert isinstance(target, Stream)
    with destination(None) as target, target.opened() as write:
        assert isinstance(target, Nowhere)
        write(b"image")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("absent/image", "no such directory"),
        ("file/image", "Not a directory"),
        ("image/", "such directory"),
        (".", "Is a directory"),
        ("", "such"),
        ("loop", "Too many levels"),
        ("n" * 256, "File name too long"),
    ],
)
def test_paths_that_no_file_can_have(path: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match=reason):
        put(path, b"image")
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


@no_root
def test_what_may_not_be_written_is_told_before(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    (tmp_path / "image").touch(mode=0o444)
    for path in ("closed/image", "image"):
        with pytest.raises(HostError, match="and writable for this user"), destination(str(tmp_path / path)):
            raise Stop
