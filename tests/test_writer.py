"""The writer: the reference's bytes, each layout rule at its edge, and what no image can hold."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import stat
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfsfuse.dump import parse
from cfsfuse.erofs.contents import Hole
from cfsfuse.erofs.image import Image
from cfsfuse.erofs.ondisk import DataLayout
from cfsfuse.erofs.overlay import Digest
from cfsfuse.erofs.reader import Reader
from cfsfuse.erofs.writer import Versions, lay_out, write
from cfsfuse.errors import TreeError, UsageError
from cfsfuse.tree import Device, Directory, Entry, External, Inline, Link, Sparse, Stat, Symlink
from cfsfuse.verity.digest import SHA256
from cfsfuse.verity.merkle import content_digest
from tests.support import HERE, expected_rows, vector

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cfsfuse.erofs.inode import Inode

SECOND = 1_000_000_000
DIGEST = Digest("sha256", bytes(range(32)))
ROOT_OFFSET = 1152  # of the root inode: behind the super block
CORPUS = os.path.join(HERE, os.pardir, "integration", "oracles", "corpus")


def status(mode: int, size: int = 0, **fields: int) -> Stat:
    return Stat(mode, 1, 0, 0, 0, size, 0)._replace(**fields)


def directory(children: Mapping[bytes, Entry | Link] | None = None, **fields: int) -> Entry:
    return Entry(Directory(status(stat.S_IFDIR | 0o755, **fields), {}), children)


def inline(content: bytes = b"", xattrs: dict[bytes, bytes] | None = None, **fields: int) -> Entry:
    return Entry(Inline(status(stat.S_IFREG | 0o644, len(content), **fields), xattrs or {}, content))


def external(size: int, path: bytes | None = b"ab/cd", digest: Digest | None = DIGEST, **fields: int) -> Entry:
    return Entry(External(status(stat.S_IFREG | 0o644, size, **fields), {}, path, digest))


def symlink(target: bytes, **fields: int) -> Entry:
    return Entry(Symlink(status(stat.S_IFLNK | 0o777, **fields), {}, target))


def whiteout(**fields: int) -> Entry:
    return Entry(Device(status(stat.S_IFCHR | 0o600, **fields), {}))


def image(root: Entry, versions: Versions = Versions()) -> bytes:  # noqa: B008 - a NamedTuple does not change
    layout = lay_out(root, versions)
    data = b"".join(layout.pieces())
    assert len(data) == layout.size
    return data


def reader(root: Entry, versions: Versions = Versions()) -> Reader:  # noqa: B008 - likewise
    return Reader(Image(image(root, versions)))


def written(entry: Entry) -> tuple[Reader, Inode]:
    """Return the reader of an image with `entry` as its only file, and the inode of that."""
    found = reader(directory({b"f": entry}))
    return found, found.resolve(b"/f")


@pytest.mark.parametrize("row", expected_rows(), ids=lambda row: "-".join(list(row.values())[:3]))
def test_vectors(row: dict[str, str]) -> None:
    root = parse(io.BytesIO(vector(row["name"] + ".dump.gz")))
    data = image(root, Versions(int(row["min_version"]), int(row["max_version"])))
    assert len(data) == int(row["bytes"])
    assert hashlib.sha256(data).hexdigest() == row["sha256"]
    assert content_digest(SHA256, data).hex() == row["fsverity_sha256"]


def corpus_rows() -> list[dict[str, str]]:
    """Return what mkcomposefs 1.0.8 makes of the dumps of the corpus, one row for each pair of versions."""
    with open(os.path.join(CORPUS, "expected.tsv"), encoding="ascii") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.parametrize("row", corpus_rows(), ids=lambda row: "-".join(list(row.values())[:3]))
def test_corpus(row: dict[str, str]) -> None:
    with open(os.path.join(CORPUS, row["name"] + ".dump"), "rb") as file:
        data = image(parse(file), Versions(int(row["min_version"]), int(row["max_version"])))
    assert (len(data), hashlib.sha256(data).hexdigest()) == (int(row["bytes"]), row["sha256"])


def test_the_corpus_is_complete() -> None:
    dumps = {name.removesuffix(".dump") for name in os.listdir(CORPUS) if name.endswith(".dump")}
    assert dumps == {row["name"] for row in corpus_rows()}


def test_pieces_are_those_of_write() -> None:
    root = directory({b"%05d" % number: inline(b"x" * 60) for number in range(5000)})
    pieces = list(write(root))
    assert len(pieces) > 1
    assert b"".join(pieces) == image(root)


# Inodes


def test_inode_of_the_earliest_time_is_compact() -> None:
    found = reader(directory({b"f": inline(mtime_ns=1)}, mtime_ns=0))
    assert found.root.xattr_offset == ROOT_OFFSET + 32
    assert found.resolve(b"/f").mtime_ns == 1


@pytest.mark.parametrize(
    ("fields", "is_compact"),
    [
        ({}, True),
        ({"uid": 0xFFFF, "gid": 0xFFFF, "nlink": 0xFFFF}, True),
        ({"uid": 0x10000}, False),
        ({"gid": 0x10000}, False),
        ({"nlink": 0x10000}, False),
        ({"mtime_ns": 1}, False),
    ],
)
def test_form_of_an_inode(fields: dict[str, int], *, is_compact: bool) -> None:
    found, inode = written(inline(b"content", {}, **fields))
    start = found.image.meta_offset + inode.nid * 32
    assert inode.data_offset - start == (32 if is_compact else 64)
    status_of = found.node(inode).stat
    assert {name: getattr(status_of, name) for name in fields} == fields


@pytest.mark.parametrize(("size", "is_compact"), [((1 << 32) - 1, True), (1 << 32, False)])
def test_form_of_an_inode_by_its_size(size: int, *, is_compact: bool) -> None:
    found, inode = written(Entry(Sparse(status(stat.S_IFREG | 0o644, size), {})))
    assert inode.data_offset - found.image.meta_offset - inode.nid * 32 == (32 if is_compact else 64)
    assert inode.size == size


def test_size_that_a_device_is_given_counts_for_its_form_only() -> None:
    entry = Entry(Device(status(stat.S_IFIFO | 0o600, 1 << 32), {}))
    found, inode = written(entry)
    assert inode.data_offset - found.image.meta_offset - inode.nid * 32 == 64
    assert inode.size == 0


@pytest.mark.parametrize("mtime_ns", [-(1 << 63) * SECOND, -1, -SECOND, 0, (1 << 63) * SECOND - 1])
def test_times_from_end_to_end(mtime_ns: int) -> None:
    found, inode = written(inline(mtime_ns=mtime_ns))
    assert inode.mtime_ns == mtime_ns
    assert found.image.super_block.build_time == min(0, mtime_ns) // SECOND


def test_links_of_a_directory_are_counted() -> None:
    shown = reader(directory({b"d": directory(nlink=77), b"e": directory({b"f": directory()}), b"f": inline()}))
    assert [shown.resolve(path).nlink for path in (b"/", b"/d", b"/e", b"/e/f")] == [4, 2, 3, 2]


@pytest.mark.parametrize(
    "kind", [stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK], ids=["chr", "blk", "fifo", "sock"]
)
def test_devices(kind: int) -> None:
    rdev = 0x12345 if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
    found, inode = written(Entry(Device(status(kind | 0o600, rdev=rdev), {b"user.a": b"b"})))
    assert found.node(inode) == Device(status(kind | 0o600, rdev=rdev), {b"user.a": b"b"})


# Contents


@pytest.mark.parametrize(
    ("size", "blocks", "tail"),
    [(0, 0, 0), (1, 0, 1), (2048, 0, 2048), (2049, 1, 0), (4096, 1, 0), (4097, 1, 1), (5000, 1, 904)],
)
def test_inline_contents(size: int, blocks: int, tail: int) -> None:
    content = bytes(number % 251 for number in range(size))
    found, inode = written(inline(content))
    assert found.node(inode) == inline(content).node
    assert inode.layout is (DataLayout.FLAT_INLINE if tail else DataLayout.FLAT_PLAIN)
    assert found.image.size - lay_out(directory({b"f": inline(b"x" * tail)})).size == 4096 * blocks


@pytest.mark.parametrize("length", [1, 2048, 3900, 4000, 4064, 4065, 4095])
@pytest.mark.parametrize("before", [0, 1000, 2000])
def test_symlink_is_in_the_block_of_its_inode_or_in_its_own(length: int, before: int) -> None:
    target = bytes(65 + number % 26 for number in range(length))
    found = reader(directory({b"e": inline(b"x" * before), b"f": symlink(target)}))
    inode = found.resolve(b"/f")
    start = found.image.meta_offset + inode.nid * 32
    assert found.readlink(inode) == target
    assert inode.size == length
    if 32 + length >= 4096:
        assert inode.layout is DataLayout.FLAT_PLAIN
    else:
        assert inode.layout is DataLayout.FLAT_INLINE
        assert start // 4096 == (inode.data_offset + length - 1) // 4096


@pytest.mark.parametrize("count", range(1, 70))
def test_tails_do_not_cross_blocks(count: int) -> None:
    found = reader(directory({b"%03d" % number: inline(b"y" * (7 * number + 1)) for number in range(count)}))
    for _, inode in found.walk():
        if inode.layout is DataLayout.FLAT_INLINE:
            tail = inode.size % 4096
            assert inode.data_offset // 4096 == (inode.data_offset + tail - 1) // 4096


@pytest.mark.parametrize(
    ("size", "chunk_format", "chunks"),
    [
        (1, 0, 1),
        (4096, 0, 1),
        (4097, 1, 1),
        (1 << 43, 31, 1),
        ((1 << 43) + 1, 31, 2),
        (1 << 48, 31, 32),
        (1 << 52, 31, 512),
    ],
)
def test_holes(size: int, chunk_format: int, chunks: int) -> None:
    found, inode = written(external(size))
    assert (inode.size, inode.layout, inode.i_u & 0x1F) == (size, DataLayout.CHUNK_BASED, chunk_format)
    assert found.image.slice(inode.data_offset, 4 * chunks, "map") == b"\xff" * 4 * chunks
    assert found.node(inode) == external(size).node


def test_hole_keeps_the_upper_half_of_an_address() -> None:
    hole = Hole(1 << 53)
    assert hole.i_u(0x12345) == 31
    hole.spill()
    assert hole.i_u(0x12345) == 0x1001F


def test_chunk_map_that_fits_nowhere_becomes_a_block() -> None:
    entry = external(1 << 53, b"ab/cdef12")  # so long that the map would start between slots
    found, inode = written(entry)
    assert inode.nid * 32 % 4096 == 0
    assert found.image.slice(found.image.size - 4096, 4096, "map") == b"\xff" * 4096
    assert found.node(inode) == entry.node


def test_sparse_has_no_metacopy() -> None:
    entry = Entry(Sparse(status(stat.S_IFREG | 0o644, 1 << 20), {}))
    found, inode = written(entry)
    assert found.node(inode) == entry.node


@pytest.mark.parametrize("path", [None, b"ab/cd"])
@pytest.mark.parametrize("digest", [None, DIGEST, Digest("sha512", bytes(range(64)))])
def test_whereabouts_of_objects(path: bytes | None, digest: Digest | None) -> None:
    found, inode = written(external(77, path, digest))
    assert found.node(inode) == external(77, path, digest).node


def test_external_file_without_bytes_is_an_empty_file() -> None:
    found, inode = written(external(0))
    assert found.node(inode) == inline().node


# Directories


@pytest.mark.parametrize("count", [0, 1, 60, 61, 62, 170, 171, 400, 5000])
def test_directories_of_any_size(count: int) -> None:
    names = [b"%022d" % number for number in range(count)]
    found = reader(directory({b"d": directory({name: inline() for name in names})}))
    inode = found.resolve(b"/d")
    assert [name for name, _ in found.entries(inode)] == [b".", b"..", *names]
    assert all(found.lookup(inode, name) is not None for name in names)


def test_names_before_the_dots_and_of_any_bytes() -> None:
    names = [b"\1", b"!", b"-", b"..a", b".\xff", b"\xff" * 255, "ü".encode()]
    found = reader(directory({b"d": directory({name: inline() for name in names})}))
    assert [name for name, _ in found.entries(found.resolve(b"/d"))] == sorted([*names, b".", b".."])


def test_order_is_breadth_first() -> None:
    found = reader(directory({b"b": directory({b"y": inline(), b"x": inline()}), b"a": inline(), b"c": inline()}))
    paths = [b"/", b"/a", b"/b", b"/c", b"/b/x", b"/b/y"]
    nids = [found.resolve(path).nid for path in paths]
    assert nids == sorted(nids)


def test_hard_links_have_the_place_of_their_target() -> None:
    target = inline(b"here", nlink=2)
    found = reader(directory({b"a": Link(target), b"d": directory({b"t": target}), b"z": inline()}))
    assert found.resolve(b"/a") == found.resolve(b"/d/t")
    assert found.resolve(b"/z").nid < found.resolve(b"/a").nid


# Xattrs


def test_shared_xattrs_are_in_descending_order() -> None:
    several = {b"user.a": b"1", b"user.b": b"22", b"trusted.x": b""}
    found = reader(directory({b"f": inline(b"", several), b"g": inline(b"", several | {b"user.c": b"3"})}))
    area = bytes(found.image.slice(found.image.xattr_offset, 4096, "shared xattrs"))
    places = [area.index(text) for text in (b"b22", b"a1")]
    assert places == sorted(places)
    assert found.xattrs(found.resolve(b"/g")) == several | {b"user.c": b"3"}


def test_shared_xattrs_of_a_name_are_ordered_by_length_before_value() -> None:
    values = (b"9", b"10", b"11")
    files = {b"%s-%d" % (value, number): inline(b"", {b"user.a": value}) for value in values for number in range(2)}
    found = reader(directory(files))
    area = bytes(found.image.slice(found.image.xattr_offset, 4096, "shared xattrs"))
    places = [area.index(b"a" + value) for value in (b"11", b"10", b"9")]
    assert places == sorted(places)


def test_xattrs_up_to_the_limit() -> None:
    names = (b"user.a", b"user.bc")
    most = 32767 - 12 - sum(7 + len(name) for name in names)  # header; for each name twice an entry's 4 bytes, less one
    lay_out(directory({b"f": inline(b"", dict.fromkeys(names[:1], b"v" * most) | {names[1]: b""})}))
    with pytest.raises(TreeError, match="/f: xattrs of 32768 bytes; an image takes 32767"):
        lay_out(directory({b"f": inline(b"", dict.fromkeys(names[:1], b"v" * most) | {names[1]: b"v"})}))


def test_an_inode_refers_to_128_shared_xattrs_at_most() -> None:
    many = {b"user.%04d" % number: b"v" for number in range(300)}
    found = reader(directory({b"f": inline(b"", many), b"g": inline(b"", many)}))
    for path in (b"/f", b"/g"):
        inode = found.resolve(path)
        assert found.image.slice(inode.xattr_offset + 4, 1, "h_shared_count") == bytes([128])
        assert found.xattrs(inode) == many


def test_xattrs_of_overlayfs_are_escaped() -> None:
    own = {b"trusted.overlay.redirect": b"/x", b"trusted.overlay.overlay.y": b"z", b"user.overlay.opaque": b"y"}
    found, inode = written(inline(b"c", own))
    assert found.node(inode).xattrs == own


@pytest.mark.parametrize("name", [b"system.posix_acl_access", b"system.posix_acl_default"])
def test_flag_of_acls(name: bytes) -> None:
    assert image(directory({b"f": inline()}))[8] == 0
    assert image(directory({b"f": inline(b"", {name: b"\2\0\0\0"})}))[8] == 1


@given(st.dictionaries(st.binary(min_size=1, max_size=255).filter(lambda name: b"\0" not in name), st.binary()))
@settings(max_examples=50)
def test_any_xattrs(xattrs: dict[bytes, bytes]) -> None:
    xattrs = {b"user." + name[:250]: value for name, value in xattrs.items()}
    found, inode = written(inline(b"c", xattrs))
    assert found.xattrs(inode) == xattrs
    assert not any(found.surely_lacks(inode, name) for name in xattrs)


# What overlayfs needs


@pytest.mark.parametrize(("versions", "version"), [((0, 1), 1), ((0, 0), 0), ((1, 1), 1), ((1, 0), 1)])
def test_whiteouts(versions: tuple[int, int], version: int) -> None:
    root = directory({b"d": directory({b"w": whiteout(mtime_ns=5)})})
    found = reader(root, Versions(*versions))
    assert found.image.header.composefs_version == version
    node = found.node(found.resolve(b"/d/w"))
    assert isinstance(node, Inline)
    assert node.stat == status(stat.S_IFREG | 0o600, mtime_ns=5)
    assert node.xattrs == {b"trusted.overlay.whiteout": b"", b"user.overlay.whiteout": b""}
    marks = {b"trusted.overlay.whiteouts": b"", b"user.overlay.whiteouts": b""}
    marks |= {b"trusted.overlay.opaque": b"x", b"user.overlay.opaque": b"x"} if version else {}
    assert found.node(found.resolve(b"/d")).xattrs == marks
    assert found.authored(found.resolve(b"/d/w")) == whiteout(mtime_ns=5).node


def test_version_stays_without_whiteouts() -> None:
    assert [lay_out(directory(), Versions(*pair)).version for pair in ((0, 1), (0, 0), (1, 1))] == [0, 0, 1]


def test_hidden_names_of_the_root() -> None:
    root = Entry(Directory(status(stat.S_IFDIR, uid=3, gid=4, mtime_ns=9), {b"security.selinux": b"label\0"}))
    root.children[b"00"] = inline(b"mine")
    found = reader(root)
    names = [name for name, _, _ in found.block(found.root, 0) + found.block(found.root, 1)]
    assert sorted(set(names) - {b".", b".."}) == [b"%02x" % number for number in range(256)]
    assert [name for name, _ in found.entries(found.root)] == [b".", b"..", b"00"]
    hidden = found.inode(next(nid for name, nid, _ in found.block(found.root, 0) if name == b"01"))
    assert (hidden.mode, hidden.uid, hidden.gid, hidden.mtime_ns) == (stat.S_IFCHR | 0o644, 3, 4, 9)
    assert found.xattrs(hidden) == {b"security.selinux": b"label\0"}


def test_root_is_opaque() -> None:
    data = image(directory())
    assert b"overlay.opaquey" in data
    assert Reader(Image(data)).xattrs(Reader(Image(data)).root) == {}


# What cannot be


LONG = directory()


@pytest.mark.parametrize(
    ("root", "text"),
    [
        (inline(), "/: the root is no directory"),
        (directory({b"f": external((1 << 53) + 1)}), "/f: a file of 9007199254740993 bytes"),
        (directory({b"f": inline(b"x" * 5001)}), "/f: 5001 bytes of inline content"),
        (directory({b"f": symlink(b"")}), "/f: a symlink's target has 1 to 4095 bytes"),
        (directory({b"f": symlink(b"x" * 4096)}), "/f: a symlink's target"),
        (directory({b"f": symlink(b"x\0y")}), "/f: a symlink's target"),
        (directory({b"f": inline(uid=1 << 32)}), "/f: a number does not fit"),
        (directory({b"f": inline(gid=-1)}), "/f: a number does not fit"),
        (directory({b"f": inline(mtime_ns=(1 << 63) * SECOND)}), "/f: a number does not fit"),
        (directory({b"f": Entry(Inline(status(0o100644 | 1 << 16), {}, b""))}), "/f: mode 300644"),
        (directory({b"f": Entry(Inline(status(stat.S_IFDIR), {}, b""))}), "/f: mode 40000 is not that of a Inline"),
        (directory({b"f": inline(b"", {b"user.a": b"x" * 32768})}), "/f: xattrs of 32"),
        (directory({b"f": inline(b"", {b"": b""})}), "/f: an xattr's name"),
        (directory({b"f": inline(b"", {b"user.\0": b""})}), "/f: an xattr's name"),
        (directory({b"f": inline(b"", {b"x" * 256: b""})}), "/f: an xattr's name"),
        (directory({b"d": directory({b"a/b": inline()})}), "/d: a/b is no file name"),
        (directory({b"": inline()}), "/:  is no file name"),
        (directory({b"..": inline()}), "/: .. is no file name"),
        (directory({b"n" * 256: inline()}), "is no file name"),
        (directory({b"l": Link(inline())}), "/l: a hard link to what is not in the tree"),
        (directory({b"d": LONG, b"l": Link(LONG)}), "/l: a hard link to a directory"),
        (directory({b"a": LONG, b"b": LONG}), "/b: stands in the tree twice"),
    ],
)
def test_what_no_image_holds(root: Entry, text: str) -> None:
    with pytest.raises(TreeError) as caught:
        write(root)
    assert text in str(caught.value)


def test_what_is_said_of_long_paths_and_names_is_short() -> None:
    deep = directory({b"f": inline(b"", {b"x" * 10_000: b""})})
    for _ in range(5000):
        deep = directory({b"d": deep})
    with pytest.raises(TreeError) as caught:
        lay_out(deep)
    assert caught.value.path == b"/d" * 5000 + b"/f"
    assert str(caught.value).startswith("/d/d/")
    assert "d/f: an xattr's name has 1 to 255 bytes" in str(caught.value)
    assert len(str(caught.value)) <= 402


def test_children_of_a_file() -> None:
    entry = inline()
    entry.children[b"x"] = inline()
    with pytest.raises(TreeError, match="/f: only directories have children"):
        lay_out(directory({b"f": entry}))


def test_a_tree_that_contains_itself() -> None:
    root = directory()
    root.children[b"again"] = root
    with pytest.raises(TreeError, match="/again: stands in the tree twice"):
        lay_out(root)


@pytest.mark.parametrize("versions", [Versions(2, 2), Versions(0, 2), Versions(-1, 1)])
def test_versions_that_there_are_not(versions: Versions) -> None:
    with pytest.raises(UsageError, match="format version"):
        lay_out(directory(), versions)


def test_depth_costs_no_stack() -> None:
    root: Entry = inline(b"deep")
    for _ in range(5000):
        root = directory({b"d": root})
    found = reader(root)
    assert sum(1 for _ in found.walk()) == 5001
