"""xattrs as they stand in the image: inline and shared, and the name filter."""

from __future__ import annotations

import pytest

from cfsfuse.erofs.xattr import name_filter, xattrs
from tests import imagemaker as im
from tests.support import VECTORS, reader_of, vector


def of(entry: im.Entry) -> dict[bytes, bytes]:
    reader = reader_of(im.make(im.directory({b"a": entry, b"b": im.file(shared={b"user.other": b"o"})})))
    return reader.xattrs(reader.resolve(b"/a"))


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("kind", ["inline", "shared"])
def test_every_prefix_and_odd_lengths(kind: str, compact: bool) -> None:  # noqa: FBT001
    stored = {
        b"user.a": b"1",
        b"user.long-name" * 10: b"",
        b"trusted.x": b"v" * 5000,
        b"security.selinux": b"system_u:object_r:usr_t:s0\0",
        b"system.posix_acl_access": b"\2\0\0\0",
        b"system.posix_acl_default": b"\2\0\0\0",
        b"user.overlay.opaque": b"y",
    }
    for length in range(8):
        stored[b"user." + b"n" * (length + 2)] = b"v" * length
    entry = im.file(b"x", compact=compact)
    if kind == "inline":
        entry.xattrs = stored
    else:
        entry.shared = stored
    assert of(entry) == stored


def test_inline_ones_come_first() -> None:
    entry = im.file(b"x", xattrs={b"user.z": b"1"}, shared={b"user.a": b"2", b"user.b": b"3"})
    assert list(of(entry)) == [b"user.z", b"user.a", b"user.b"]


def test_name_that_stands_twice_has_its_first_value() -> None:
    assert of(im.file(b"x", xattrs={b"user.a": b"inline"}, shared={b"user.a": b"shared"})) == {b"user.a": b"inline"}


def test_shared_ones_are_shared() -> None:
    entries = {b"%d" % number: im.file(b"x", shared={b"user.a": b"v" * 3000}) for number in range(50)}
    made = im.make(im.directory(entries))
    assert len(made.data) < 32 * 1024
    reader = reader_of(made)
    assert all(reader.xattrs(reader.resolve(b"/" + name)) == {b"user.a": b"v" * 3000} for name in entries)


def test_inode_without_xattrs_has_none() -> None:
    assert of(im.file(b"x")) == {}
    reader = reader_of(im.make(im.directory()))
    assert list(xattrs(reader.image, reader.root)) == []


def test_name_index_zero_stores_the_whole_name_and_no_mount_shows_it() -> None:
    entry = im.file(b"x", xattrs={b"unknown.name": b"v"})
    reader = reader_of(im.make(im.directory({b"a": entry})))
    inode = reader.resolve(b"/a")
    assert reader.xattrs(inode) == {}
    assert reader.authored(inode).xattrs == {b"unknown.name": b"v"}


@pytest.mark.parametrize("name", VECTORS)
def test_name_filters_of_the_vectors_deny_nothing_that_is_there(name: str) -> None:
    reader = reader_of(vector(f"{name}.cfs.gz"))
    for _, inode in reader.walk():
        shown = reader.xattrs(inode)
        assert not any(reader.surely_lacks(inode, name) for name in shown)


def test_name_filter_tells_what_is_absent() -> None:
    entry = im.file(b"x", xattrs={b"user.a": b"1"}, name_filter=name_filter((b"user.a",)))
    reader = reader_of(im.make(im.directory({b"a": entry})).patch("super block", "feature_compat", 6))
    inode = reader.resolve(b"/a")
    assert reader.surely_lacks(inode, b"security.capability")
    assert not reader.surely_lacks(inode, b"user.a")


def test_name_filter_counts_only_in_an_image_that_says_it_has_filters() -> None:
    entry = im.file(b"x", xattrs={b"user.a": b"1"}, name_filter=0xFFFFFFFF)
    made = im.make(im.directory({b"a": entry})).patch("super block", "feature_compat", 2)
    reader = reader_of(made)
    assert not reader.surely_lacks(reader.resolve(b"/a"), b"user.a")
