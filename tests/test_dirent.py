"""Directories: every name is found, absent ones are not, and look-ups touch few blocks."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import pytest

from cfsfuse.erofs.image import Image
from cfsfuse.erofs.reader import Reader
from tests import imagemaker as im
from tests.support import reader_of, time_limit

if TYPE_CHECKING:
    from collections.abc import Iterable

MANY = 100_000


def flat(names: Iterable[bytes]) -> im.Made:
    """Return an image whose root has `names`, all of one inode."""
    entry = im.file(b"x")
    return im.make(im.directory({b"dir": im.directory(dict.fromkeys(names, entry))}))


def listed(reader: Reader, path: bytes) -> list[bytes]:
    return [name for name, _ in reader.entries(reader.resolve(path))]


@pytest.fixture(scope="module")
def many() -> bytes:
    return flat(b"%x-entry" % (number * 7) for number in range(MANY)).content()


@pytest.mark.parametrize("count", [0, 1, 2, 100, 170, 171, 172, 1000])
def test_every_name_is_found_and_no_neighbour_of_it(count: int) -> None:
    names = sorted(b"%05d" % (2 * number) for number in range(count))
    reader = reader_of(flat(names))
    directory = reader.resolve(b"/dir")
    assert listed(reader, b"/dir") == sorted([b".", b"..", *names])
    for name in names:
        found = reader.lookup(directory, name)
        assert found is not None
        assert found.is_regular
        for absent in (name[:-1], name + b"0", name[:-1] + b"\xff", b"%05d" % (int(name) + 1)):
            assert reader.lookup(directory, absent) is None


@pytest.mark.parametrize("count", [1, 400])
@pytest.mark.parametrize("name", [b"\x01", b"!", b"-", b"", b"\xff", b"~", b"n" * 255])
def test_trap_name_before_the_first_entry_or_behind_the_last(count: int, name: bytes) -> None:
    """A name that sorts before `.` in a directory with full blocks makes the C FUSE server loop for ever."""
    reader = reader_of(flat(b"name-%04d" % number for number in range(count)))
    with time_limit(5):
        assert reader.lookup(reader.resolve(b"/dir"), name) is None


def test_names_before_the_dots_are_found() -> None:
    names = [b"!", b"#", b"+a", b"-", b"\x01"] + [b"+%03d" % number for number in range(400)]
    reader = reader_of(flat(names))
    directory = reader.resolve(b"/dir")
    assert listed(reader, b"/dir").index(b".") > 400
    for name in names:
        assert reader.lookup(directory, name) is not None


def test_dots_are_the_directory_and_its_parent() -> None:
    reader = reader_of(flat([b"a"]))
    directory = reader.resolve(b"/dir")
    assert reader.lookup(directory, b".") == directory
    assert reader.lookup(directory, b"..") == reader.root


def test_names_of_any_bytes() -> None:
    rng = random.Random(3)
    alphabet = [byte for byte in range(1, 256) if byte != ord("/")]
    names = {bytes(rng.choices(alphabet, k=rng.randint(1, 255))) for _ in range(500)} - {b".", b".."}
    reader = reader_of(flat(names))
    directory = reader.resolve(b"/dir")
    assert listed(reader, b"/dir") == sorted([b".", b"..", *names])
    assert all(reader.lookup(directory, name) is not None for name in names)
    absent = {bytes(rng.choices(alphabet, k=rng.randint(1, 4))) for _ in range(500)} - names - {b".", b".."}
    assert not any(reader.lookup(directory, name) for name in absent)


def test_names_that_contain_other_names() -> None:
    names = [b"a" * length for length in range(1, 200)]
    reader = reader_of(flat(names))
    directory = reader.resolve(b"/dir")
    assert all(reader.lookup(directory, name) is not None for name in names)
    assert reader.lookup(directory, b"a" * 200) is None


class CountingImage(Image):
    """An image that counts the bytes asked of it."""

    __slots__ = ("touched",)

    def __init__(self, buffer: bytes) -> None:
        self.touched: list[tuple[int, int]] = []
        super().__init__(buffer)

    def slice(self, offset: int, length: int, field: str) -> memoryview:
        self.touched.append((offset, length))
        return super().slice(offset, length, field)


def test_trap_lookup_in_a_huge_directory_touches_few_blocks(many: bytes) -> None:
    image = CountingImage(many)
    reader = Reader(image)
    directory = reader.resolve(b"/dir")
    blocks = -(-directory.size // 4096)
    assert blocks > 450
    bound = math.ceil(math.log2(blocks)) + 2
    last = b"%x-entry" % (7 * MANY - 7)
    for name, there in ((b"0-entry", True), (b"9d1-entry", True), (last, True), (b"nope", False), (b"!", False)):
        image.touched.clear()
        assert (reader.lookup(directory, name) is not None) is there
        touched = [length for offset, length in image.touched if offset >= image.meta_offset + directory.nid * 32]
        assert sum(touched) <= bound * 4096
        assert len(touched) <= bound


def test_opening_touches_as_little_of_a_huge_image_as_of_a_small_one(many: bytes) -> None:
    costs = []
    for content in (many, flat([b"a"]).content()):
        image = CountingImage(content)
        Reader(image)
        costs.append([length for _, length in image.touched])
    assert costs[0] == costs[1]


def test_huge_directory_is_listed_block_by_block(many: bytes) -> None:
    image = CountingImage(many)
    reader = Reader(image)
    directory = reader.resolve(b"/dir")
    image.touched.clear()
    entries = reader.entries(directory)
    assert next(entries)[0] == b"."
    assert sum(length for _, length in image.touched) <= 4096
    assert sum(1 for _ in entries) == MANY + 1


def test_nothing_stands_behind_the_last_block(many: bytes) -> None:
    reader = Reader(Image(many))
    directory = reader.resolve(b"/dir")
    count = -(-directory.size // 4096)
    blocks = [reader.block(directory, index) or [] for index in range(count + 2)]
    assert blocks[count:] == [[], []]
    assert sum(map(len, blocks)) == MANY + 2
