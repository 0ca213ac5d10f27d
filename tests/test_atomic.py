"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from cfsfuse.atomic import opened_directory, published

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    with opened_directory(str(tmp_path)) as fd:
        yield fd


def test_file_appears_at_the_end_of_the_block(directory: int, tmp_path: Path) -> None:
    with published(directory, b"name", 0o600) as fd:
        os.write(fd, b"whole")
        (temporary,) = os.listdir(tmp_path)
        assert temporary.startswith(".name.")
        assert temporary.endswith(".tmp")
    assert os.listdir(tmp_path) == ["name"]
    assert (tmp_path / "name").read_bytes() == b"whole"
    assert (tmp_path / "name").stat().st_mode & 0o777 == 0o600
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_content_is_on_the_disk_before_the_name_and_the_name_at_the_end(
    directory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: done.append("directory" if fd == directory else "content"))
    monkeypatch.setattr(os, "rename", lambda *_, **__: done.append("name"))
    with published(directory, b"name"):
        assert done == []
    assert done == ["content", "name", "directory"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_nothing_stays_behind_after_an_error(directory: int, tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "name").write_bytes(b"old")
    with pytest.raises(error), published(directory, b"name") as fd:  # noqa: PT012 - the block's end is what fails
        os.write(fd, b"half")
        raise error
    assert os.listdir(tmp_path) == ["name"]
    assert (tmp_path / "name").read_bytes() == b"old"


def test_file_that_is_there_is_replaced(directory: int, tmp_path: Path) -> None:
    (tmp_path / "name").write_bytes(b"old")
    with open(tmp_path / "name", "rb") as old:
        with published(directory, b"name") as fd:
            os.write(fd, b"new")
        assert old.read() == b"old"
    assert (tmp_path / "name").read_bytes() == b"new"


def test_name_that_cannot_be_taken_leaves_nothing(directory: int, tmp_path: Path) -> None:
    (tmp_path / "name").mkdir()
    with pytest.raises(IsADirectoryError), published(directory, b"name"):
        pass
    assert os.listdir(tmp_path) == ["name"]


def test_longest_name_has_room_for_the_temporary_one(directory: int, tmp_path: Path) -> None:
    with published(directory, b"n" * 255):
        pass
    assert os.listdir(tmp_path) == ["n" * 255]


def test_trap_no_child_process_inherits_a_writable_descriptor(directory: int) -> None:
    """With one open anywhere, FS_IOC_ENABLE_VERITY fails with ETXTBSY."""
    assert not os.get_inheritable(directory)
    with published(directory, b"name") as fd:
        assert not os.get_inheritable(fd)


def test_symlink_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(OSError, match=r"Not a directory|symbolic"), opened_directory(str(tmp_path / "link")):
        pass
