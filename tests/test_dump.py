"""The dump of an image equals what composefs-info prints, byte for byte."""

from __future__ import annotations

import tracemalloc

import pytest

from cfsfuse.dump import dump, escape, escape_listing, line
from cfsfuse.erofs.overlay import Digest
from cfsfuse.tree import Device, External, Inline, Stat, Symlink
from tests import imagemaker as im
from tests.support import VECTORS, python_image, reader_of, vector

STAT = Stat(0o100644, 1, 2, 3, 0, 5, 1_000_000_007)


@pytest.mark.parametrize("name", VECTORS)
def test_dump_of_the_vectors(name: str) -> None:
    found = list(dump(reader_of(vector(f"{name}.cfs.gz"))))
    assert found == vector(f"{name}.redump.gz").splitlines(keepends=True)


def test_dump_of_the_real_image() -> None:
    found = list(dump(reader_of(python_image("python.cfs"))))
    assert found == python_image(".dump").splitlines(keepends=True)


@pytest.mark.parametrize(
    ("node", "text"),
    [
        (Inline(STAT, {}, b"hello"), b"/p 5 100644 1 2 3 0 1.7 - hello -\n"),
        (Inline(STAT, {}, b""), b"/p 5 100644 1 2 3 0 1.7 - - -\n"),
        (Inline(STAT, {}, b"-"), b"/p 5 100644 1 2 3 0 1.7 - \\x2d -\n"),
        (Inline(STAT, {}, b"a b\\c\n"), b"/p 5 100644 1 2 3 0 1.7 - a\\x20b\\\\c\\n -\n"),
        (Symlink(STAT, {}, b"/t"), b"/p 5 100644 1 2 3 0 1.7 /t - -\n"),
        (Device(STAT, {}), b"/p 5 100644 1 2 3 0 1.7 - - -\n"),
        (External(STAT, {}, b"aa/b", None), b"/p 5 100644 1 2 3 0 1.7 aa/b - -\n"),
        (
            External(STAT, {b"user.a=b": b"c=d"}, b"aa/b", Digest("sha256", b"\xab" * 32)),
            b"/p 5 100644 1 2 3 0 1.7 aa/b - " + b"ab" * 32 + b" user.a\\x3db=c\\x3dd\n",
        ),
    ],
)
def test_lines(node: Inline, text: bytes) -> None:
    assert line(b"/p", node) == text


def test_hard_links_point_to_their_first_name() -> None:
    entry = im.file(b"x", nlink=2)
    lines = list(dump(reader_of(im.make(im.directory({b"a b": entry, b"c": entry})))))
    assert lines[1:] == [b"/a\\x20b 1 100644 2 0 0 0 0.0 - x -\n", b"/c 1 @100644 2 0 0 0 0.0 /a\\x20b x -\n"]


def test_deep_paths_of_a_hostile_image_are_not_all_kept() -> None:
    """Every line may be long, but they are not to be in memory together."""
    entry = im.directory({b"%d" % number: im.file(b"x", compact=True, nlink=2) for number in range(800)})
    for _ in range(800):
        entry = im.directory({b"d" * 255: entry})
    content = im.make(entry).content()
    assert len(content) < 1 << 20
    reader = reader_of(content)
    tracemalloc.start()
    try:
        assert sum(1 for _ in dump(reader)) == 1601
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


def test_escaping() -> None:
    every = bytes(range(256))
    escaped = escape(every)
    assert all(0x21 <= byte < 0x7F for byte in escaped)
    assert escape(b"=") == b"="
    assert escape(b"\\\n\r\t \x00\x7f\xff") == rb"\\\n\r\t\x20\x00\x7f\xff"
    assert escape_listing(b"a b\n") == rb"a b\n"
