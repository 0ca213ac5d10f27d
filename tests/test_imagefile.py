"""An image file that may change after it has been opened."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from cfsfuse.dump import dump
from cfsfuse.erofs.reader import Reader
from cfsfuse.errors import ImageDigestMismatch, ImageError
from cfsfuse.imagefile import open_image
from cfsfuse.verity.digest import ALGORITHMS
from cfsfuse.verity.merkle import content_digest
from tests.support import reader_of, sample, time_limit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image.cfs"
    path.write_bytes(sample().content())
    return path


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=list(ALGORITHMS))
def test_digest_is_checked(path: Path, algorithm: object) -> None:
    chosen = next(known for known in ALGORITHMS.values() if known is algorithm)
    digest = content_digest(chosen, path.read_bytes()).hex()
    assert open_image(str(path), digest).size == path.stat().st_size
    wrong = digest[:-1] + ("0" if digest[-1] != "0" else "1")
    with pytest.raises(ImageDigestMismatch) as caught:
        open_image(str(path), wrong)
    assert (caught.value.image, caught.value.expected, caught.value.found) == (str(path), wrong, digest)
    assert len(str(caught.value).splitlines()) == 1


def truncate(path: Path) -> None:
    os.truncate(path, 0)


def overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)


def delete(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    path.with_name("other").write_bytes(b"other")
    os.replace(path.with_name("other"), path)


@pytest.mark.parametrize("change", [truncate, overwrite, delete, replace])
def test_trap_nothing_that_happens_to_the_file_changes_the_image(path: Path, change: Callable[[Path], None]) -> None:
    image = open_image(str(path))
    expected = list(dump(reader_of(path.read_bytes())))
    change(path)
    assert list(dump(Reader(image))) == expected


def test_memory_of_the_image_is_sealed(path: Path) -> None:
    image = open_image(str(path))
    assert image.slice(0, 4, "magic").readonly
    with open("/proc/self/maps", encoding="ascii", errors="replace") as file:
        (line,) = [line for line in file if "cfsfuse-image" in line]
    assert line.split()[1].startswith("r--")


@pytest.mark.parametrize("name", ["missing", "directory", "fifo", "device", "empty", "loop"])
def test_file_that_is_no_image_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "directory":
        path.mkdir()
    elif name == "fifo":
        os.mkfifo(path)
    elif name == "device":
        path = path.with_name("null")
        path.symlink_to("/dev/null")
    elif name == "empty":
        path.write_bytes(b"")
    elif name == "loop":
        path.symlink_to(name)
    with time_limit(5), pytest.raises(ImageError) as caught:
        open_image(str(path))
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_error_inside_the_image_names_file_field_and_offset(path: Path) -> None:
    path.write_bytes(sample().patch("super block", "blkszbits", 9).content())
    with pytest.raises(ImageError) as caught:
        open_image(str(path))
    assert str(caught.value).startswith(f"{path}: blkszbits at byte 1036: 9")


def test_digest_is_checked_before_more_than_the_super_block_is_parsed(path: Path) -> None:
    content = sample().content()
    path.write_bytes(content[:1152].ljust(len(content), b"\xff"))
    with pytest.raises(ImageDigestMismatch):
        open_image(str(path), "0" * 64)
    path.write_bytes(b"not an image at all")
    with pytest.raises(ImageError, match="too few for an EROFS super block"):
        open_image(str(path), "0" * 64)


def test_no_descriptor_stays_open(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    images = [open_image(str(path)) for _ in range(10)]
    # mmap keeps a descriptor of its own for each mapping.
    assert len(os.listdir("/proc/self/fd")) <= before + len(images)
    del images
    assert len(os.listdir("/proc/self/fd")) <= before + 1
