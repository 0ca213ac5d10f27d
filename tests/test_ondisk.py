"""Layouts: our constants against the images of the test's own maker, which shares nothing with them."""

from __future__ import annotations

import struct

import pytest

from cfsfuse.erofs import ondisk
from cfsfuse.erofs.image import Image
from tests import imagemaker as im

STRUCTURES = {"header": (ondisk.HEADER, 0), "super block": (ondisk.SUPER_BLOCK, 1024)}


@pytest.mark.parametrize("name", [name for name in im.FIELDS["super block"] if name != "magic"])
def test_every_field_of_the_super_block_is_read_where_the_kernel_has_it(name: str) -> None:
    made = im.make(im.directory())
    before = Image(made.content()).super_block
    offset, layout = im.FIELDS["super block"][name]
    value = 1 << 8 * struct.calcsize(layout) - 2 | 1
    data = made.patch("super block", name, value).content()
    block = ondisk.SuperBlock(*ondisk.SUPER_BLOCK.unpack_from(data, 1024))
    assert getattr(block, name) == value
    assert block._replace(**{name: getattr(before, name)}) == before
    assert struct.unpack_from(layout, data, 1024 + offset) == (value,)


@pytest.mark.parametrize("name", list(im.FIELDS["header"]))
def test_every_field_of_the_composefs_header(name: str) -> None:
    data = im.make(im.directory()).patch("header", name, 0x12345678).content()
    assert getattr(ondisk.ComposefsHeader(*ondisk.HEADER.unpack_from(data)), name) == 0x12345678


def test_constants_are_those_of_the_kernel() -> None:
    assert (ondisk.SUPER_MAGIC, ondisk.COMPOSEFS_MAGIC) == (0xE0F5E1E2, 0xD078629A)
    assert (ondisk.SUPER_OFFSET, ondisk.BLOCK_SIZE, ondisk.XATTR_FILTER_SEED) == (1024, 4096, 0x25BBE08F)
    assert [layout.value for layout in ondisk.DataLayout] == [0, 1, 2, 3, 4]
