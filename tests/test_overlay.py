"""The overlay convention: where contents are, what is escaped, what is hidden."""

from __future__ import annotations

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfsfuse.erofs.overlay import LAYER, METADATA_LAYER, MOUNTED, Digest, View, metacopy_digest, unescaped
from cfsfuse.erofs.xattr import Xattr
from cfsfuse.errors import ImageError, PathNotFound
from cfsfuse.tree import Device, External, Inline
from tests import imagemaker as im
from tests.support import reader_of, sample


def external_of(entry: im.Entry) -> External:
    reader = reader_of(im.make(im.directory({b"a": entry})))
    node = reader.node(reader.resolve(b"/a"))
    assert isinstance(node, External)
    return node


@pytest.mark.parametrize(("algorithm", "size"), [("sha256", 32), ("sha512", 64)])
def test_digest_comes_from_metacopy_and_path_from_redirect(algorithm: str, size: int) -> None:
    node = external_of(im.external(9, b"xx/any name.file", b"\x5a" * size))
    assert node.digest == Digest(algorithm, b"\x5a" * size)
    assert node.path == b"xx/any name.file"
    assert node.xattrs == {}


@pytest.mark.parametrize("value", [b"", b"\0\4\0\0", b"\0\4\0\1"])
def test_metacopy_without_digest(value: bytes) -> None:
    assert metacopy_digest(value) is None


@pytest.mark.parametrize("value", [b"\0", b"\0\4\0", b"\1\4\0\0", b"\0\5\0\0", b"\0\x24\0\2" + bytes(32), bytes(36)])
def test_malformed_metacopy(value: bytes) -> None:
    with pytest.raises(ImageError, match=r"trusted\.overlay\.metacopy"):
        metacopy_digest(value)


def test_redirect_that_is_not_absolute_gives_no_path() -> None:
    entry = im.external(9, None, None)
    assert external_of(entry).path is None
    entry.xattrs = {im.METACOPY: b"", im.REDIRECT: b"relative"}
    assert external_of(entry).path is None


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        (b"user.a", b"user.a"),
        (b"user.overlay.opaque", b"user.overlay.opaque"),
        (b"user.overlay.metacopy", b"user.overlay.metacopy"),
        (b"trusted.a", b"trusted.a"),
        (b"trusted.overlay", b"trusted.overlay"),
        (b"trusted.overlayx", b"trusted.overlayx"),
        (b"trusted.overlay.opaque", None),
        (b"trusted.overlay.metacopy", None),
        (b"trusted.overlay.redirect", None),
        (b"trusted.overlay.anything", None),
        (b"trusted.overlay.overlay.opaque", b"trusted.overlay.opaque"),
        (b"trusted.overlay.overlay.overlay.opaque", b"trusted.overlay.overlay.opaque"),
        (b"security.capability", b"security.capability"),
    ],
)
def test_escaping(stored: bytes, shown: bytes | None) -> None:
    assert unescaped(stored) == shown


PIECES = (b"user.", b"trusted.", b"security.", b"overlay.", b"overlay", b"redirect", b"metacopy", b"opaque", b"a", b".")
NAMES = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map(b"".join) | st.binary(min_size=1, max_size=40)
OWN, ESCAPED = b"user.overlay.", b"user.overlay.overlay."


def through_overlayfs(layer: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """Return the xattrs that overlayfs with `userxattr` shows of those in its layer."""
    return {
        OWN + name[len(ESCAPED) :] if name.startswith(ESCAPED) else name: value
        for name, value in layer.items()
        if name.startswith(ESCAPED) or not name.startswith(OWN)
    }


@pytest.mark.parametrize(
    ("stored", "in_layer", "in_metadata_layer"),
    [
        (b"user.a", b"user.a", b"user.a"),
        (b"user.overlay", b"user.overlay", b"user.overlay"),
        (b"user.overlay.opaque", b"user.overlay.overlay.opaque", b"user.overlay.overlay.opaque"),
        (b"user.overlay.overlay.a", b"user.overlay.overlay.overlay.a", b"user.overlay.overlay.overlay.a"),
        (b"user.overlay.", b"user.overlay.overlay.", b"user.overlay.overlay."),
        (b"trusted.overlay.redirect", None, b"user.overlay.redirect"),
        (b"trusted.overlay.metacopy", None, b"user.overlay.metacopy"),
        (b"trusted.overlay.opaque", None, b"user.overlay.opaque"),
        (b"trusted.overlay.overlay", None, b"user.overlay.overlay"),
        (b"trusted.overlay.overlay.opaque", b"trusted.overlay.opaque", b"trusted.overlay.opaque"),
        (b"trusted.overlay.overlay.overlay.a", b"trusted.overlay.overlay.a", b"trusted.overlay.overlay.a"),
        (b"security.capability", b"security.capability", b"security.capability"),
    ],
)
def test_names_in_a_layer(stored: bytes, in_layer: bytes | None, in_metadata_layer: bytes) -> None:
    assert (LAYER.shown(stored), METADATA_LAYER.shown(stored)) == (in_layer, in_metadata_layer)
    assert METADATA_LAYER.stored(in_metadata_layer) == stored
    if in_layer is not None:
        assert LAYER.stored(in_layer) == stored


@given(NAMES)
def test_every_name_that_is_shown_leads_back(name: bytes) -> None:
    """So no two are shown alike, and what is asked for is found."""
    for view in (MOUNTED, LAYER, METADATA_LAYER):
        shown = view.shown(name)
        assert view.stored(shown) == name if shown is not None else view is not METADATA_LAYER


@given(NAMES)
def test_every_name_that_can_be_asked_for_is_one_of_a_stored_name(asked: bytes) -> None:
    for view in (MOUNTED, METADATA_LAYER):
        assert view.shown(view.stored(asked)) == asked


XATTRS = st.lists(st.builds(Xattr, NAMES, st.binary(max_size=3), st.integers(0, 6)), max_size=12)


@given(XATTRS)
def test_overlayfs_above_a_layer_shows_what_the_kernel_mount_shows(stored: list[Xattr]) -> None:
    for view in (LAYER, METADATA_LAYER):
        assert through_overlayfs(view.xattrs(stored)) == MOUNTED.xattrs(stored)


@given(XATTRS)
def test_only_a_layer_of_metadata_has_overlayfs_own(stored: list[Xattr]) -> None:
    def own(view: View) -> dict[bytes, bytes]:
        return {name: value for name, value in view.xattrs(stored).items() if name.startswith(OWN)}

    assert all(name.startswith(ESCAPED) for name in own(LAYER))
    expected: dict[bytes, bytes] = {}
    for name, value, index in stored:
        if index and name.startswith(b"trusted.overlay.") and not name.startswith(b"trusted.overlay.overlay."):
            expected.setdefault(OWN + name[len(b"trusted.overlay.") :], value)
    assert {name: value for name, value in own(METADATA_LAYER).items() if not name.startswith(ESCAPED)} == expected


def test_trap_security_trusted_and_acl_xattrs_are_in_the_view() -> None:
    reader = reader_of(sample())
    assert reader.xattrs(reader.resolve(b"/xattrs")) == {
        b"user.a": b"1",
        b"trusted.overlay.opaque": b"y",
        b"security.capability": b"\0\1",
        b"user.shared": b"s" * 30,
        b"trusted.b": b"",
    }
    assert b"system.posix_acl_access" in reader.xattrs(reader.resolve(b"/acl"))


@pytest.mark.parametrize("version", [0, 1, 2])
def test_hidden_entries_of_the_root(version: int) -> None:
    reader = reader_of(sample(version))
    names = {name for name, _ in reader.entries(reader.root)}
    hidden = {b"%02x" % number for number in range(256)}
    assert not names & hidden
    assert not hidden & {path[1:] for path, _ in reader.walk()}
    assert all(reader.lookup(reader.root, name) is None for name in hidden)
    with pytest.raises(PathNotFound):
        reader.resolve(b"/00")
    assert reader.xattrs(reader.root) == {}
    assert {b"link", b"dir", b"null", b"."} < names


def test_entries_that_look_like_hidden_ones_but_are_not() -> None:
    names = {b"00": im.file(b"x"), b"aa": im.directory({b"bb": im.whiteout()}), b"ff": im.whiteout(i_u=0x103)}
    reader = reader_of(im.make(im.directory(names)))
    assert [name for name, _ in reader.entries(reader.root)] == [b".", b"..", b"00", b"aa", b"ff"]
    assert [name for name, _ in reader.entries(reader.resolve(b"/aa"))] == [b".", b".."]
    assert reader.lookup(reader.resolve(b"/aa"), b"bb") is None


def test_trap_escaped_whiteouts_are_empty_files() -> None:
    reader = reader_of(sample())
    inode = reader.resolve(b"/gone")
    node = reader.node(inode)
    assert isinstance(node, Inline)
    assert (node.content, node.stat.mode) == (b"", 0o100644)
    assert node.xattrs == {b"trusted.overlay.whiteout": b"", b"user.overlay.whiteout": b""}
    authored = reader.authored(inode)
    assert isinstance(authored, Device)
    assert stat.S_ISCHR(authored.stat.mode)
    assert (authored.stat.rdev, authored.xattrs) == (0, {})


def test_trap_empty_file_has_no_object() -> None:
    reader = reader_of(sample())
    node = reader.node(reader.resolve(b"/empty"))
    assert isinstance(node, Inline)
    assert node.content == b""
