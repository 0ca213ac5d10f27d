"""What has been built from a directory, and is mounted by the kernel, is that directory; /usr is one, too."""

from __future__ import annotations

import os
import random
import stat
from typing import TYPE_CHECKING

import pytest

from cfsfuse.builder.scan import Options, scan
from cfsfuse.contract.entries import walk
from cfsfuse.contract.metadata import check_readlink, check_xattrs
from integration.mounts import needs_root, require_composefs
from integration.oracles import builds, compare, disk, generate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cfsfuse.contract.entries import Entry as ContractEntry
    from cfsfuse.tree import Entry
    from integration.oracles.nodes import Node

QUICK, ALL = 4, 40
_NUMBERS = [pytest.param(number, marks=[pytest.mark.slow] if number >= QUICK else []) for number in range(ALL)]
_USR = "/usr"
_LONG = 1800  # seconds
_OVERLAY, _ESCAPE = b"trusted.overlay.", b"overlay."
_WHITEOUT = _OVERLAY + b"whiteout"
_XATTR_NAME_MAX = 255


@pytest.fixture
def place() -> Iterator[str]:
    with builds.scratch() as path:
        yield path


@needs_root
@pytest.mark.parametrize("number", _NUMBERS)
def test_mount_is_the_source(place: str, number: int) -> None:
    seed = os.environ.get("CFSFUSE_SEED") or str(random.SystemRandom().randrange(1 << 32))
    print(f"CFSFUSE_SEED={seed}")
    nodes = without_whiteouts(generate.tree(random.Random(f"{seed}/mount/{number}"), privileged=True))
    source, image, store = (os.path.join(place, name) for name in ("source", "image.cfs", "store"))
    disk.make(nodes, source)
    options = ("--hard-links",) if number % 2 else ()
    assert builds.mk("--digest-store", store, *options, source, image).code == 0
    builds.check_store(store)
    builds.fsck(image)
    with builds.mounted_by_the_kernel(image, place, store) as mountpoint:
        assert_same(source, mountpoint)
        if "--hard-links" in options:
            assert links_of(mountpoint) == links_of(source)


def without_whiteouts(nodes: list[Node]) -> list[Node]:
    """Return the nodes without what the kernel shows in another form than the source has it."""
    gone = {node.path for node in nodes if node.kind == stat.S_IFCHR and node.rdev == 0}
    kept = (node for node in nodes if node.path not in gone and node.link not in gone)
    return [node._replace(xattrs=tuple(xattr for xattr in node.xattrs if is_shown(xattr[0]))) for node in kept]


def is_shown(name: bytes) -> bool:
    """Return whether overlayfs shows an xattr as it is: that of its own name space must be escaped in an image."""
    if not name.startswith(_OVERLAY):
        return True
    return name not in (_OVERLAY, _WHITEOUT) and len(name) + len(_ESCAPE) <= _XATTR_NAME_MAX


def assert_same(source: str, mountpoint: str) -> None:
    """Assert that a mount has everything that the source has, and nothing else."""
    found, expected = (list(walk(os.fsencode(top))) for top in (mountpoint, source))
    assert [entry.path for entry in found] == [entry.path for entry in expected]
    for entry in expected:
        one, other = (everything_of(os.fsencode(top) + entry.path, entry) for top in (mountpoint, source))
        assert one == other, entry.path


def everything_of(path: bytes, entry: ContractEntry) -> dict[str, object]:
    """Return what an image keeps of a file."""
    status = os.lstat(path)
    kept = {name: getattr(status, f"st_{name}") for name in ("mode", "uid", "gid", "rdev", "mtime_ns")}
    if not entry.is_directory:
        kept["size"] = status.st_size
    kept |= check_xattrs(path, entry) | check_readlink(path, entry)
    if entry.is_regular:
        with open(path, "rb") as file:
            kept["content"] = file.read()
    return kept


def links_of(top: str) -> set[frozenset[bytes]]:
    """Return the names of each file that has several, below `top`."""
    names: dict[int, set[bytes]] = {}
    for entry in walk(os.fsencode(top)):
        if not entry.is_directory:
            names.setdefault(os.lstat(os.fsencode(top) + entry.path).st_ino, set()).add(entry.path)
    return {frozenset(paths) for paths in names.values() if len(paths) > 1}


@needs_root
def test_hard_links_are_kept_on_request(place: str) -> None:
    """Without the option each name becomes a file of its own, as the reference has it; with it, the names share one."""
    source, image = os.path.join(place, "source"), os.path.join(place, "image.cfs")
    builds.write_files(source, {"a/one": b"1" * 100, "b/two": b"2"})
    for name, target in {"b/more": "a/one", "a/again": "a/one", "c": "b/two"}.items():
        os.link(os.path.join(source, target), os.path.join(source, name))
    expected = require_composefs().mkcomposefs("--print-digest-only", source)
    assert builds.mk("--print-digest-only", source).out == expected
    assert builds.mk("--hard-links", source, image).code == 0
    with builds.mounted_by_the_kernel(image, place) as mountpoint:
        assert links_of(mountpoint) == links_of(source) != set()
        assert os.lstat(os.path.join(mountpoint, "a/one")).st_nlink == 3


# The largest directory at hand ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def usr() -> bytes:
    """The image of /usr."""
    return compare.image_of(scan(_USR, Options()))


@pytest.fixture(scope="module")
def usr_dump(usr: bytes) -> bytes:
    return compare.dump_of(usr)


@pytest.fixture(scope="module")
def usr_tree(usr_dump: bytes) -> Entry:
    return compare.tree_of(usr_dump)


@pytest.mark.slow
@pytest.mark.timeout(_LONG)
def test_usr_is_the_references(usr: bytes) -> None:
    assert compare.describe(usr, compare.reference(require_composefs(), (_USR,))) is None


@pytest.mark.slow
@pytest.mark.timeout(_LONG)
@pytest.mark.parametrize("run", compare.VERSION_RUNS, ids=lambda run: " ".join(run.arguments))
def test_dump_of_usr_leads_back(usr_dump: bytes, usr_tree: Entry, run: compare.Run) -> None:
    again = compare.image_of(usr_tree, run.versions)
    expected = compare.reference(require_composefs(), (*run.arguments, "--from-file", "-"), usr_dump)
    assert compare.describe(again, expected) is None
    assert compare.dump_of(again) == usr_dump


@pytest.mark.slow
@pytest.mark.timeout(_LONG)
def test_fsck_accepts_usr(usr: bytes, place: str) -> None:
    builds.write_files(place, {"usr.cfs": usr})
    builds.fsck(os.path.join(place, "usr.cfs"))


@needs_root
@pytest.mark.slow
@pytest.mark.timeout(_LONG)
def test_kernel_mounts_usr(usr: bytes, place: str) -> None:
    builds.write_files(place, {"usr.cfs": usr})
    with builds.mounted_by_the_kernel(os.path.join(place, "usr.cfs"), place) as mountpoint:
        assert sorted(os.listdir(mountpoint)) == sorted(os.listdir(_USR))
