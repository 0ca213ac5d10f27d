"""The image as a witness: the names and values of the checks, without a mount."""

from __future__ import annotations

import hashlib
import stat
from typing import TYPE_CHECKING

import pytest

from cfsfuse.contract.contents import told_of_zeros
from cfsfuse.contract.entries import Entry
from cfsfuse.contract.image import UNTOLD, ImageWitness, Observer
from cfsfuse.contract.observe import CHUNK, WHOLE_MAX, Failure
from cfsfuse.verity.digest import ALGORITHMS, SHA256
from cfsfuse.verity.merkle import content_digest
from tests import imagemaker as im
from tests.support import reader_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cfsfuse.contract.observe import Observations

DIGEST = b"\x11" * 32


def witness(children: Mapping[bytes, im.Entry], observer: Observer | None = None) -> ImageWitness:
    reader = reader_of(im.make(im.directory(children)))
    return ImageWitness(reader, lambda path: path != b"aa/absent", observer)


def told(seen: ImageWitness, check: str, name: bytes, *children: bytes) -> Observations:
    inode = seen.reader.resolve(name)
    return seen.observe(check, inode, Entry(b"/" + name, inode.mode, children))


def test_stat_is_what_stat_says() -> None:
    seen = witness({b"f": im.file(b"abc", uid=5, gid=6, mtime=7, mtime_nsec=8)})
    inode = seen.reader.resolve(b"f")
    assert told(seen, "stat", b"f") == {
        "st_mode": stat.S_IFREG | 0o644,
        "st_nlink": 1,
        "st_uid": 5,
        "st_gid": 6,
        "st_rdev": 0,
        "st_size": 3,
        "st_ino": inode.nid,
        "st_atime_ns": 7_000_000_008,
        "st_mtime_ns": 7_000_000_008,
        "st_ctime_ns": 7_000_000_008,
    }


def test_owners_are_those_that_the_observer_sees() -> None:
    seen = witness({b"f": im.file(uid=5, gid=6)}, Observer(uid=lambda number: number + 100, gid=lambda _: 65534))
    assert (told(seen, "stat", b"f")["st_uid"], told(seen, "stat", b"f")["st_gid"]) == (105, 65534)


def test_xattrs_are_those_that_the_observer_sees() -> None:
    children = {
        b"f": im.file(b"x", xattrs={b"user.a": b"1", b"trusted.b": b"2", b"security.\xff": b"3"}),
        b"l": im.symlink(b"target", xattrs={b"user.a": b"1"}),
    }
    all_of_it = {
        "listxattr": ["security.\udcff", "trusted.b", "user.a"],
        "getxattr 'user.a'": b"1",
        "getxattr 'trusted.b'": b"2",
        "getxattr 'security.\\udcff'": b"3",
    }
    assert told(witness(children), "xattrs", b"f") == all_of_it
    less: Observations = {"listxattr": ["security.\udcff", "user.a"]}
    less |= {what: value for what, value in all_of_it.items() if what.startswith("get") and "trusted" not in what}
    assert told(witness(children, Observer(sees_all=False)), "xattrs", b"f") == less
    assert told(witness(children), "xattrs", b"l") == {
        "listxattr": ["user.a"],
        "getxattr 'user.a'": Failure("ENODATA"),
    }


def test_acl_is_told_only_where_its_owners_are_the_same() -> None:
    name = "system.posix_acl_access"
    children = {b"f": im.file(xattrs={name.encode(): b"acl"})}
    assert told(witness(children), "xattrs", b"f")[f"getxattr {name!r}"] == b"acl"
    seen = told(witness(children, Observer(has_all_ids=False)), "xattrs", b"f")
    assert seen == {"listxattr": [name], f"getxattr {name!r}": UNTOLD}


def test_names_are_all_that_anybody_has() -> None:
    seen = witness({b"d": im.directory({b"a": im.file(b"1"), b"hidden": im.whiteout()}), b"l": im.symlink(b"d")})
    number = seen.reader.resolve(b"d/a").nid
    assert told(seen, "names", b"d", b"a", b"hidden") == {
        "listed": [b"a"],
        "b'a'": number,
        "b'hidden'": Failure("ENOENT"),
    }
    assert told(seen, "listing", b"d") == {"b'a' d_ino, d_type": (number, 8)}
    assert told(seen, "readlink", b"l") == {"target": b"d"}
    assert told(seen, "names", b"l") == told(seen, "readlink", b"d") == told(seen, "digest", b"d") == {}


def test_contents() -> None:
    children = {
        b"inline": im.file(b"short"),
        b"longer": im.file(b"l" * 100),
        b"object": im.external(5000, b"aa/object", DIGEST),
        b"sha512": im.external(5000, b"aa/object", DIGEST * 2),
        b"no-digest": im.external(5000, b"aa/object"),
        b"missing": im.external(5000, b"aa/absent", DIGEST),
        b"no-path": im.external(5000, None, DIGEST),
    }
    seen = witness(children)
    assert told(seen, "digest", b"inline") == {
        "digest": content_digest(SHA256, b"short").hex(),
        "content": b"short",
    }
    assert told(seen, "digest", b"longer") == {"digest": content_digest(SHA256, b"l" * 100).hex()}
    assert told(seen, "digest", b"object") == {"digest": DIGEST.hex()}
    assert told(seen, "digest", b"missing") == {"digest": Failure("ENOENT")}
    assert told(seen, "digest", b"no-digest") == told(seen, "digest", b"no-path") == {}
    measures = {name: seen.measure(seen.reader.resolve(name)) for name in children}
    assert measures == {**dict.fromkeys(children, "sha256"), b"sha512": "sha512"}
    assert set(measures.values()) <= ALGORITHMS.keys()


@pytest.mark.parametrize("size", [0, 10, CHUNK, CHUNK + 1, WHOLE_MAX, WHOLE_MAX + 1, 1 << 40])
def test_zeros_are_told_in_bounded_time(size: int) -> None:
    seen = told_of_zeros(size)
    if size > WHOLE_MAX:
        assert seen == {"digest of the ends": hashlib.sha256(bytes(2 * CHUNK)).hexdigest()}
    else:
        assert seen["digest"] == content_digest(SHA256, bytes(size)).hex()
