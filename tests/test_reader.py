"""The reader on the reference images: every look-up equals the listing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cfsfuse.erofs.image import Nid
from cfsfuse.errors import ImageError, PathNotFound
from cfsfuse.tree import Directory, External, Inline
from tests import imagemaker as im
from tests.support import VECTORS, python_image, reader_of, sample, vector

if TYPE_CHECKING:
    from cfsfuse.erofs.reader import Reader

IMAGES = [*VECTORS, "python"]


def reader_for(name: str) -> Reader:
    return reader_of(python_image("python.cfs") if name == "python" else vector(f"{name}.cfs.gz"))


@pytest.mark.parametrize("name", IMAGES)
def test_every_lookup_equals_the_listing(name: str) -> None:
    reader = reader_for(name)
    parents = {b"/": reader.root}
    for path, inode in reader.walk():
        if inode.is_directory:
            parents[path] = inode
        base, _, entry = path.rpartition(b"/")
        if entry:
            assert reader.lookup(parents[base or b"/"], entry) == inode
        assert reader.resolve(path) == inode
    for directory in parents.values():
        listing = [entry for entry, _ in reader.entries(directory)]
        assert listing == sorted(listing)
        assert len(set(listing)) == len(listing)
        for absent in (b"\1", b"~absent", b"\xff" * 255, *(entry + b"\1" for entry in listing[::50])):
            assert reader.lookup(directory, absent) is None


@pytest.mark.parametrize("name", IMAGES)
def test_blocks_of_a_directory_are_its_listing(name: str) -> None:
    reader = reader_for(name)
    for _, inode in reader.walk():
        if inode.is_directory:
            names, index = [], 0
            while block := reader.block(inode, index):
                names += [entry[0] for entry in block]
                index += 1
            hidden = set(names) - {entry for entry, _ in reader.entries(inode)}
            assert names == sorted(names)
            assert not hidden or inode == reader.root


@pytest.mark.parametrize("name", IMAGES)
def test_path_of_a_node_leads_to_it(name: str) -> None:
    reader = reader_for(name)
    for path, inode in list(reader.walk())[1::97]:
        found = reader.paths_of({inode.nid}).get(inode.nid)
        assert found is not None
        assert reader.resolve(found).nid == inode.nid
        assert path
    assert reader.paths_of({Nid(reader.root.nid + 1)}).get(Nid(reader.root.nid + 1)) is None


@pytest.mark.parametrize("name", IMAGES)
def test_paths_of_many_nodes_are_those_of_each(name: str) -> None:
    reader = reader_for(name)
    nids = {inode.nid for _, inode in list(reader.walk())[::13]}
    absent = Nid(reader.root.nid + 1)
    found = reader.paths_of({*nids, absent})
    assert found.keys() == nids
    assert all(reader.resolve(path).nid == nid for nid, path in found.items())
    assert reader.paths_of(set()) == {}


@pytest.mark.parametrize("name", IMAGES)
def test_sizes_are_those_of_contents(name: str) -> None:
    reader = reader_for(name)
    for _, inode in reader.walk():
        node = reader.node(inode)
        if isinstance(node, Inline):
            assert len(node.content) == node.stat.size
        elif isinstance(node, External):
            assert node.path
        assert isinstance(node, Directory) == inode.is_directory


def test_paths_are_resolved_without_following_links() -> None:
    reader = reader_of(sample())
    assert reader.resolve(b"") == reader.resolve(b"/") == reader.resolve(b"//.//") == reader.root
    assert reader.resolve(b"dir/name-000-") == reader.resolve(b"/dir//./name-000-")
    assert reader.resolve(b"/link").is_symlink
    for absent in (b"/nothing", b"/plain/below", b"/link/below", b"/00", b"/dir/name", b"/n" * 4000):
        with pytest.raises(PathNotFound):
            reader.resolve(absent)


def test_walk_starts_anywhere() -> None:
    reader = reader_of(sample())
    start = reader.resolve(b"/compact dir")
    assert [path for path, _ in reader.walk(b"/compact dir", start=start)] == [
        b"/compact dir",
        b"/compact dir/deep",
        b"/compact dir/deep/er",
    ]
    plain = reader.resolve(b"/plain")
    assert list(reader.walk(b"/plain", start=plain)) == [(b"/plain", plain)]


def test_depth_costs_no_stack() -> None:
    entry = im.directory()
    for _ in range(3000):
        entry = im.directory({b"d": entry})
    reader = reader_of(im.make(entry))
    assert sum(1 for _ in reader.walk()) == 3001
    deepest = max(reader.walk(), key=lambda pair: len(pair[0]))[1]
    assert reader.paths_of({deepest.nid}).get(deepest.nid) == b"/d" * 3000


def test_cycles_end() -> None:
    made = im.make(im.directory({b"a": im.directory({b"b": im.directory({b"c": im.file(b"x")})})}))
    inner = made.at(b"a/b")
    made.patch_dirent(inner, 2, "nid", made.at(b"a").nid)
    made.patch_dirent(inner, 2, "file_type", 2)
    reader = reader_of(made)
    with pytest.raises(ImageError, match="reached twice"):
        list(reader.walk())
    assert reader.paths_of({Nid(reader.root.nid + 1)}).get(Nid(reader.root.nid + 1)) is None


def test_directory_operations_need_a_directory() -> None:
    reader = reader_of(sample())
    plain = reader.resolve(b"/plain")
    with pytest.raises(ImageError, match="i_mode"):
        reader.lookup(plain, b"x")
    with pytest.raises(ImageError, match="i_mode"):
        list(reader.entries(plain))
    with pytest.raises(ImageError, match="i_mode"):
        reader.block(plain, 0)


def test_hard_links_are_one_inode_with_its_link_count() -> None:
    reader = reader_of(sample())
    assert reader.resolve(b"/one") == reader.resolve(b"/two")
    assert reader.node(reader.resolve(b"/one")).stat.nlink == 2
