"""Inodes of both forms, and flat data."""

from __future__ import annotations

import pytest

from cfsfuse.errors import ImageError
from cfsfuse.tree import Inline, Sparse, Symlink
from tests import imagemaker as im
from tests.support import reader_of, sample

NANO = 1_000_000_000


def test_compact_inode_has_the_build_time_of_the_image() -> None:
    entry = im.file(b"x", compact=True, uid=1000, gid=65534, nlink=3)
    reader = reader_of(im.make(im.directory({b"a": entry}), build_time=-5, build_time_nsec=7))
    inode = reader.resolve(b"/a")
    assert inode.mtime_ns == -5 * NANO + 7
    assert (inode.mode, inode.nlink, inode.uid, inode.gid, inode.size) == (0o100644, 3, 1000, 65534, 1)


@pytest.mark.parametrize(
    ("seconds", "nanoseconds"),
    [(0, 0), (-1, 999_999_999), (-(1 << 40), 1), (1 << 31, 0), (1 << 33, 123_456_789), (1 << 45, 999_999_999)],
)
def test_trap_mtime_keeps_nanoseconds_before_1970_and_after_2038(seconds: int, nanoseconds: int) -> None:
    entry = im.file(b"x", mtime=seconds, mtime_nsec=nanoseconds)
    reader = reader_of(im.make(im.directory({b"a": entry}), build_time=5))
    node = reader.node(reader.resolve(b"/a"))
    assert node.stat.mtime_ns == seconds * NANO + nanoseconds


def test_extended_inode_has_wide_fields() -> None:
    entry = im.external(1 << 40, b"aa/b", None, uid=0xFFFFFFFE, gid=70000, nlink=100_000)
    reader = reader_of(im.make(im.directory({b"a": entry})))
    status = reader.node(reader.resolve(b"/a")).stat
    assert (status.size, status.uid, status.gid, status.nlink) == (1 << 40, 0xFFFFFFFE, 70000, 100_000)


def test_nid_is_the_place_in_the_image() -> None:
    made = sample()
    reader = reader_of(made)
    assert reader.root.nid == made.root.nid
    assert reader.resolve(b"/dir/name-007-nnnnnnn").nid == made.at(b"dir/name-007-nnnnnnn").nid
    assert reader.resolve(b"/one").nid == reader.resolve(b"/two").nid


@pytest.mark.parametrize("layout", [im.PLAIN, im.INLINE])
@pytest.mark.parametrize("size", [1, 64, 4032, 4095, 4096, 4097, 8191, 8192, 8193, 20_000])
def test_flat_data_of_any_size(layout: int, size: int) -> None:
    """A full last block of FLAT_INLINE stands behind the inode as well: nblocks - 1 in fs/erofs/data.c."""
    content = bytes(range(256)) * 80
    entry = im.file(content[:size], layout=layout)
    reader = reader_of(im.make(im.directory({b"a": im.file(b"1"), b"b": entry, b"c": im.file(b"2" * 5000)})))
    node = reader.node(reader.resolve(b"/b"))
    assert isinstance(node, Inline)
    assert node.content == content[:size]


def test_data_across_the_end_of_a_block_is_not_inline() -> None:
    """The kernel refuses it: "inline data cross block boundary"."""
    made = im.make(im.directory({b"a": im.file(b"x" * 2000), b"b": im.file(b"y" * 3000)}))
    entry = made.at(b"a")
    made.patch(entry, "i_size", 3500)  # now reaches from behind the inode into the next block
    reader = reader_of(made)
    with pytest.raises(ImageError):
        reader.node(reader.resolve(b"/a"))


def test_symlinks_short_and_long() -> None:
    for target in (b"a", b"t" * 60, b"t" * 4000, b"t" * 4095, "ümläut/\n".encode(), b"\xff"):
        entry = im.symlink(target)
        reader = reader_of(im.make(im.directory({b"link": entry})))
        node = reader.node(reader.resolve(b"/link"))
        assert isinstance(node, Symlink)
        assert node.target == reader.readlink(reader.resolve(b"/link")) == target
        assert node.stat.size == len(target)


def test_symlink_in_a_plain_block() -> None:
    reader = reader_of(im.make(im.directory({b"link": im.symlink(b"t" * 300, layout=im.PLAIN)})))
    assert reader.readlink(reader.resolve(b"/link")) == b"t" * 300


def test_devices_have_numbers_and_nothing_else_does() -> None:
    reader = reader_of(sample())
    assert reader.node(reader.resolve(b"/null")).stat.rdev == 0x103
    assert reader.node(reader.resolve(b"/block")).stat.rdev == 0x801
    for path in (b"/fifo", b"/socket", b"/sha512", b"/plain", b"/dir"):
        assert reader.node(reader.resolve(path)).stat.rdev == 0


def test_file_of_holes_alone_is_zeros() -> None:
    reader = reader_of(sample())
    node = reader.node(reader.resolve(b"/sparse"))
    assert isinstance(node, Sparse)
    assert node.stat.size == 1 << 20


@pytest.mark.parametrize(("size", "blocks"), [(0, 0), (1, 8), (4096, 8), (4097, 16), (1 << 33, 1 << 24)])
def test_trap_st_blocks_is_eight_for_every_started_block(size: int, blocks: int) -> None:
    reader = reader_of(im.make(im.directory({b"a": im.external(size, b"aa/b", None)})))
    assert reader.resolve(b"/a").blocks == blocks


def test_trap_directory_size_is_that_of_erofs() -> None:
    made = sample()
    reader = reader_of(made)
    assert reader.resolve(b"/dir").size == len(made.at(b"dir").data) > 8192
    assert reader.root.size == len(made.root.data)
