"""The super block, what is acceptable as composefs, and malformed images: each refused with the name of the field."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import tracemalloc
from typing import TYPE_CHECKING

import pytest

from cfsfuse.erofs.image import Image
from cfsfuse.erofs.reader import Reader
from cfsfuse.errors import ImageError
from tests import imagemaker as im
from tests.support import BAD, exercise, sample, time_limit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MIB = 1 << 20


def tree(**children: im.Entry) -> im.Made:
    return im.make(im.directory({name.encode(): child for name, child in children.items()}))


def super_block(name: str, value: int) -> bytes:
    return tree().patch("super block", name, value).content()


def shortened(made: im.Made) -> bytes:
    """Return an image without its last byte, and with a super block that claims no more blocks than are there."""
    return made.patch("super block", "blocks", (len(made.content()) - 1) // 4096).content()[:-1]


def header(name: str, value: int) -> bytes:
    return tree().patch("header", name, value).content()


def inode(entry: im.Entry, name: str, value: int) -> bytes:
    return tree(entry=entry).patch(entry, name, value).content()


def in_directory(index: int, name: str, value: int) -> bytes:
    made = tree(a=im.file(), b=im.directory())
    return made.patch_dirent(made.root, index, name, value).content()


def in_xattr(name: str, value: int) -> bytes:
    entry = im.file(xattrs={b"user.a": b"1"}, shared={b"user.b": b"2"})
    return tree(entry=entry).patch_xattr(entry, name, value).content()


def cycle() -> bytes:
    made = tree(a=im.file(), b=im.directory())
    return made.patch_dirent(made.root, 3, "nid", made.root.nid).content()


def twice() -> bytes:
    entry = im.directory()
    return tree(a=entry, b=entry).content()


def chunk_into_image() -> bytes:
    entry = im.external(5000, b"aa/b", None)
    entry.xattrs = {}
    made = tree(entry=entry)
    made.data[entry.data_offset : entry.data_offset + 4] = b"\1\0\0\0"
    return made.content()


def many_chunks() -> bytes:
    entry = im.file(layout=im.CHUNKED, size=5000, i_u=0)
    return tree(entry=entry).patch(entry, "i_size", 1 << 62).content()


def slash_in_name() -> bytes:
    return tree(**{"a/b": im.file()}).content()


def nul_in_name() -> bytes:
    return tree(**{"a\0b": im.file(), "c": im.file()}).content()


def metacopy_of(value: bytes) -> bytes:
    return tree(entry=im.file(layout=im.CHUNKED, size=9, i_u=31, xattrs={im.METACOPY: value})).content()


MALFORMED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "image"),
    "shorter than a super block": (lambda: tree().content()[:1151], "image"),
    "zeros": (lambda: bytes(8192), "super block magic"),
    "text": (lambda: b"#!/bin/sh\n" * 1000, "super block magic"),
    "truncated behind the super block": (lambda: tree().content()[:1152], "blocks"),
    "truncated in the root inode": (lambda: tree().content()[:1180], "blocks"),
    "truncated in the data": (lambda: tree(entry=im.file(b"x" * 8192)).content()[:-1], "blocks"),
    "ends behind the super block": (lambda: super_block("blocks", 0)[:1152], "inode"),
    "ends in the root inode": (lambda: super_block("blocks", 0)[:1180], "inode"),
    "ends in the data": (lambda: shortened(tree(entry=im.file(b"x" * 8192))), "raw_blkaddr"),
    "bad EROFS magic": (lambda: super_block("magic", 0xE0F5E1E3), "super block magic"),
    "blocks of 512 bytes": (lambda: super_block("blkszbits", 9), "blkszbits"),
    "blocks of 64 KiB": (lambda: super_block("blkszbits", 16), "blkszbits"),
    "large directory blocks": (lambda: super_block("dirblkbits", 1), "dirblkbits"),
    "zero padding, as compressed images have": (lambda: super_block("feature_incompat", 0x01), "feature_incompat"),
    "big pclusters": (lambda: super_block("feature_incompat", 0x02), "feature_incompat"),
    "device table": (lambda: super_block("feature_incompat", 0x08), "feature_incompat"),
    "fragments": (lambda: super_block("feature_incompat", 0x20), "feature_incompat"),
    "unknown feature": (lambda: super_block("feature_incompat", 0x80000000), "feature_incompat"),
    "compression algorithms": (lambda: super_block("available_compr_algs", 1), "available_compr_algs"),
    "extra devices": (lambda: super_block("extra_devices", 1), "extra_devices"),
    "metadata beyond the image": (lambda: super_block("meta_blkaddr", 0xFFFFFFFF), "inode"),
    "root beyond the image": (lambda: super_block("root_nid", 0xFFFF), "inode"),
    "no composefs header": (lambda: header("magic", 0), "composefs magic"),
    "unknown header version": (lambda: header("version", 2), "composefs header version"),
    "unknown composefs_version": (lambda: header("composefs_version", 3), "composefs_version"),
    "root is a file": (lambda: im.make(im.file(b"x")).content(), "root_nid"),
    "compressed inode, full": (lambda: inode(im.file(b"x"), "i_format", 1 << 1 | 1), "i_format"),
    "compressed inode, compact": (lambda: inode(im.file(b"x"), "i_format", 3 << 1 | 1), "i_format"),
    "unknown layout": (lambda: inode(im.file(b"x"), "i_format", 5 << 1 | 1), "i_format"),
    "unknown bits of i_format": (lambda: inode(im.file(b"x"), "i_format", 2 << 1 | 1 | 0x4000), "i_format"),
    "nanoseconds of a whole second": (lambda: inode(im.file(b"x"), "i_mtime_nsec", 1_000_000_000), "i_mtime_nsec"),
    "huge i_size of a file": (lambda: inode(im.file(b"x"), "i_size", 1 << 50), "i_size"),
    "huge i_size of a compact file": (lambda: inode(im.file(b"x", compact=True), "i_size", 0xFFFFFFFF), "i_size"),
    "huge i_size of a directory": (lambda: inode(im.directory(), "i_size", 1 << 50), "i_size"),
    "i_size that no kernel can hold": (lambda: inode(im.external(9, b"a", None), "i_size", 1 << 63), "i_size"),
    "data block beyond the image": (lambda: inode(im.file(b"x" * 5000), "i_u", 0x7FFFFFFF), "raw_blkaddr"),
    "directory of a few bytes": (lambda: inode(im.directory(), "i_size", 11), "dirent"),
    "dirent nameoff beyond the block": (lambda: in_directory(0, "nameoff", 4095), "nameoff"),
    "dirent nameoff of zero": (lambda: in_directory(0, "nameoff", 0), "nameoff"),
    "dirent nameoff between dirents": (lambda: in_directory(0, "nameoff", 13), "nameoff"),
    "second nameoff beyond the block": (lambda: in_directory(1, "nameoff", 0xFFFF), "nameoff"),
    "names that overlap": (lambda: in_directory(2, "nameoff", 48), "nameoff"),
    "dirent nid beyond the image": (lambda: in_directory(2, "nid", 1 << 40), "inode"),
    "dirent nid that overflows": (lambda: in_directory(2, "nid", (1 << 64) - 1), "inode"),
    "directory cycle": (cycle, "dirent nid"),
    "directory with two names": (twice, "dirent nid"),
    "slash in a name": (slash_in_name, "dirent name"),
    "name cut by a NUL": (nul_in_name, "dirent name"),
    "chunk map into the image": (chunk_into_image, "chunk map"),
    "chunk map beyond the image": (many_chunks, "chunk map"),
    "chunk indexes": (lambda: inode(im.file(layout=im.CHUNKED, size=9, i_u=31), "i_u", 0x3F), "chunk format"),
    "unknown chunk format": (lambda: inode(im.file(layout=im.CHUNKED, size=9, i_u=31), "i_u", 0x5F), "chunk format"),
    "chunk based directory": (lambda: inode(im.directory(), "i_format", 4 << 1 | 1), "i_mode"),
    "chunk based link": (lambda: inode(im.symlink(b"a"), "i_format", 4 << 1 | 1), "symlink"),
    "link of no length": (lambda: inode(im.symlink(b"a"), "i_size", 0), "symlink"),
    "link that is too long": (lambda: tree(entry=im.symlink(b"l" * 4096)).content(), "symlink"),
    "link with a NUL": (lambda: tree(entry=im.symlink(b"a\0b")).content(), "symlink"),
    "xattrs beyond the image": (lambda: inode(im.file(), "i_xattr_icount", 0xFFFF), "xattr"),
    "more shared xattrs than room": (lambda: in_xattr("h_shared_count", 255), "h_shared_count"),
    "xattr name beyond the inode's": (lambda: in_xattr("e_name_len", 255), "xattr entry"),
    "xattr value beyond the image": (lambda: in_xattr("e_value_size", 0xFFFF), "xattr entry"),
    "unknown xattr name index": (lambda: in_xattr("e_name_index", 9), "e_name_index"),
    "long xattr name prefix": (lambda: in_xattr("e_name_index", 0x80), "e_name_index"),
    "shared xattr beyond the image": (
        lambda: super_block_of_shared("xattr_blkaddr", 0xFFFFFFFF),
        "xattr entry",
    ),
    "metacopy of three bytes": (lambda: metacopy_of(b"\0\3\0"), "trusted.overlay.metacopy"),
    "metacopy of another version": (lambda: metacopy_of(b"\1\x24\0\1" + bytes(32)), "trusted.overlay.metacopy"),
    "metacopy with flags": (lambda: metacopy_of(b"\0\x24\1\1" + bytes(32)), "trusted.overlay.metacopy"),
    "metacopy of another length": (lambda: metacopy_of(b"\0\x23\0\1" + bytes(32)), "trusted.overlay.metacopy"),
    "metacopy of an unknown algorithm": (lambda: metacopy_of(b"\0\x24\0\3" + bytes(32)), "trusted.overlay.metacopy"),
    "metacopy of half a digest": (lambda: metacopy_of(b"\0\x14\0\1" + bytes(16)), "trusted.overlay.metacopy"),
}


def super_block_of_shared(name: str, value: int) -> bytes:
    return tree(entry=im.file(shared={b"user.b": b"2"})).patch("super block", name, value).content()


def first_error(content: bytes) -> ImageError:
    """Return what is wrong with an image: at opening, in the walk, or with one entry."""
    try:
        errors = exercise(content)
    except ImageError as error:
        return error
    assert errors, "nothing wrong was found"
    return errors[0]


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_image_is_refused_by_field(name: str) -> None:
    make, field = MALFORMED[name]
    content = make()
    tracemalloc.start()
    try:
        with time_limit(20):
            error = first_error(content)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert error.field.startswith(field), str(error)
    assert str(error).startswith(error.field)
    assert len(str(error).splitlines()) == 1
    assert peak < 64 * MIB


@pytest.mark.parametrize("name", sorted(name for name in os.listdir(BAD) if name.startswith("foreign")))
def test_foreign_erofs_image_is_refused(name: str) -> None:
    with gzip.open(os.path.join(BAD, name)) as file:
        content = file.read()
    with pytest.raises(ImageError) as caught:
        Reader(Image(content))
    assert caught.value.field in ("feature_incompat", "composefs magic", "blkszbits")


@pytest.mark.parametrize(
    ("options", "field"),
    [(["-zlz4"], "feature_incompat"), ([], "composefs magic"), (["-b512"], "blkszbits")],
    ids=["lz4", "plain", "blocks of 512"],
)
def test_image_of_mkfs_erofs_is_refused(tmp_path: Path, options: list[str], field: str) -> None:
    if shutil.which("mkfs.erofs") is None:
        pytest.skip("mkfs.erofs is not installed (package erofs-utils)")
    source = tmp_path / "source"
    source.mkdir()
    (source / "compressible").write_bytes(b"a" * 100_000)
    image = tmp_path / "image"
    command = ["mkfs.erofs", "--quiet", *options, str(image), str(source)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"this mkfs.erofs cannot: {' '.join(options)}: {made.stderr.splitlines()[0]}")
    with pytest.raises(ImageError) as caught:
        Reader(Image(image.read_bytes()))
    assert caught.value.field == field


def test_parsing_and_accepting_are_separate() -> None:
    foreign = header("magic", 0)
    image = Image(foreign)
    with pytest.raises(ImageError, match="composefs magic"):
        image.require_composefs()


@pytest.mark.parametrize("version", [0, 1, 2])
def test_every_composefs_version_is_accepted(version: int) -> None:
    image = Image(sample(version).content())
    image.require_composefs()
    assert image.header.composefs_version == version
    assert image.has_acl


def test_slice_refuses_what_lies_outside() -> None:
    image = Image(tree().content())
    assert bytes(image.slice(image.size - 4, 4, "end")) == bytes(image.slice(image.size - 4, 4, "end"))
    assert bytes(image.slice(image.size, 0, "nothing")) == b""
    for offset, length in ((image.size - 3, 4), (-1, 1), (0, -1), (image.size + 1, 0), (1 << 70, 1), (0, 1 << 70)):
        with pytest.raises(ImageError, match="some field") as caught:
            image.slice(offset, length, "some field")
        assert caught.value.offset == offset


def test_an_error_names_the_image_when_it_is_known() -> None:
    error = ImageError("i_size", "too much", 7)
    assert str(error) == "i_size at byte 7: too much"
    error.image = "/a/b.cfs"
    assert str(error) == "/a/b.cfs: i_size at byte 7: too much"


def test_view_of_the_image_is_read_only() -> None:
    buffer = bytearray(tree().content())
    view = Image(memoryview(buffer)).slice(0, 4, "magic")
    assert view.readonly
