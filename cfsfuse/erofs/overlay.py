"""The overlay convention: how an EROFS image says where contents are, and what of it a mount shows.

The kernel composefs mount is overlayfs over the EROFS image and the objects. overlayfs keeps its own data in
`trusted.overlay.*`: `redirect` and `metacopy` say where the content of a file is and what its digest is. An xattr of
the content that has such a name is stored escaped, as `trusted.overlay.overlay.*`.
https://docs.kernel.org/filesystems/overlayfs.html, sections "Metadata only copy up" and "Nesting overlayfs mounts".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cfsfuse.erofs.xattr import Xattr

PREFIX = b"trusted.overlay."
ESCAPED_PREFIX = PREFIX + b"overlay."
REDIRECT = PREFIX + b"redirect"
METACOPY = PREFIX + b"metacopy"
ESCAPED_WHITEOUT = ESCAPED_PREFIX + b"whiteout"
ESCAPED_WHITEOUTS = ESCAPED_PREFIX + b"whiteouts"
USER_PREFIX = b"user.overlay."
ESCAPED_USER_PREFIX = USER_PREFIX + b"overlay."
USER_WHITEOUT = USER_PREFIX + b"whiteout"
USER_WHITEOUTS = USER_PREFIX + b"whiteouts"
# What the writer adds to mark whiteouts for both kinds of overlay mounts; the author of the tree did not write these.
_MARKS = frozenset((ESCAPED_WHITEOUTS, USER_WHITEOUT, USER_WHITEOUTS))

# The name index 0 stores a name whole. The kernel's EROFS has no handler for it, so no mount shows such an xattr.
_UNHANDLED_INDEX = 0

DIGEST_SIZES = {1: ("sha256", 32), 2: ("sha512", 64)}
_METACOPY_HEADER = 4
_METACOPY_HEADS = {
    algorithm: bytes((0, _METACOPY_HEADER + size, 0, number)) for number, (algorithm, size) in DIGEST_SIZES.items()
}


class Digest(NamedTuple):
    """An fs-verity digest: the algorithm's hashlib name, and 32 or 64 bytes."""

    algorithm: str
    value: bytes


class View(NamedTuple):
    """Under which names a mount shows xattrs: `shown` of a stored name, None when it is hidden, and `stored` back."""

    shown: Callable[[bytes], bytes | None]
    stored: Callable[[bytes], bytes]

    def xattrs(self, stored: Iterable[Xattr]) -> dict[bytes, bytes]:
        """Return the xattrs that are shown to root, in order; of a name that stands twice, the first."""
        visible: dict[bytes, bytes] = {}
        for name, value, index in stored:
            if index == _UNHANDLED_INDEX:
                continue
            name_shown = self.shown(name)
            if name_shown is not None:
                visible.setdefault(name_shown, value)
        return visible


def authored_xattrs(stored: Iterable[Xattr], *, is_regular: bool) -> dict[bytes, bytes]:
    """Return the xattrs as the author of the tree had them: those of composefs-dump(5), in order."""
    authored: dict[bytes, bytes] = {}
    for name, value, _ in stored:
        if name in _MARKS or (name == ESCAPED_WHITEOUT and is_regular):
            continue
        plain = unescaped(name)
        if plain is not None:
            authored[plain] = value
    return authored


def whereabouts(stored: Iterable[Xattr]) -> tuple[bytes | None, bytes]:
    """Return the values of metacopy, None when the file has its own content, and of redirect."""
    own = {name: value for name, value, _ in stored if name in (METACOPY, REDIRECT)}
    return own.get(METACOPY), own.get(REDIRECT, b"")


ROOT_MARKS = {PREFIX + b"opaque": b"y"}
"""What the root has: nothing of a layer below is to be seen through it."""

WHITEOUT_MARKS = {ESCAPED_WHITEOUT: b"", USER_WHITEOUT: b""}
"""What makes an empty regular file stand for a whiteout of the content, for both kinds of overlay mounts."""


def directory_marks(version: int) -> dict[bytes, bytes]:
    """Return what the directory of such a whiteout has, in an image of format `version`."""
    marks = {ESCAPED_WHITEOUTS: b"", USER_WHITEOUTS: b""}
    return marks | {ESCAPED_PREFIX + b"opaque": b"x", b"user.overlay.opaque": b"x"} if version else marks


def external_marks(path: bytes | None, digest: Digest | None) -> dict[bytes, bytes]:
    """Return what says where the content of a file is: the object's path, and its digest as far as it is recorded."""
    metacopy = _METACOPY_HEADS[digest.algorithm] + digest.value if digest else b""
    return {METACOPY: metacopy, REDIRECT: b"/" + path} if path else {METACOPY: metacopy}


def stored_xattrs(authored: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """Return xattrs of the content under the names by which the image has them; the result is the caller's own."""
    return {stored(name): value for name, value in authored.items()} if authored else {}


def stored(shown: bytes) -> bytes:
    """Return the name under which an xattr that is shown as `shown` stands in the image."""
    return ESCAPED_PREFIX + shown[len(PREFIX) :] if shown.startswith(PREFIX) else shown


def unescaped(name: bytes) -> bytes | None:
    """Return the name under which a stored xattr is shown, or None for those that are overlayfs' own."""
    if not name.startswith(PREFIX):
        return name
    if name.startswith(ESCAPED_PREFIX):
        return PREFIX + name[len(ESCAPED_PREFIX) :]
    return None


def _escaped(name: bytes) -> bytes | None:
    plain = unescaped(name)
    is_taken = plain is not None and plain.startswith(USER_PREFIX)
    return ESCAPED_USER_PREFIX + name[len(USER_PREFIX) :] if is_taken else plain


def _escaped_or_renamed(name: bytes) -> bytes:
    shown = _escaped(name)
    return USER_PREFIX + name[len(PREFIX) :] if shown is None else shown


def _stored_in_layer(name: bytes) -> bytes:
    if name.startswith(ESCAPED_USER_PREFIX):
        return USER_PREFIX + name[len(ESCAPED_USER_PREFIX) :]
    return PREFIX + name[len(USER_PREFIX) :] if name.startswith(USER_PREFIX) else stored(name)


MOUNTED = View(unescaped, stored)
"""What the kernel mount shows."""

LAYER = View(_escaped, _stored_in_layer)
"""What overlayfs with `userxattr` has to find in a layer with contents in order to show that: xattrs of the content
that have the name of one of its own, `user.overlay.*`, are escaped."""

METADATA_LAYER = View(_escaped_or_renamed, _stored_in_layer)
"""The same for a layer without contents: where they are say the image's `trusted.overlay.*`, as `user.overlay.*`."""


def metacopy_digest(value: bytes) -> Digest | None:
    """Return the digest in the value of `trusted.overlay.metacopy`, None when it records none.

    The layout is the kernel's `struct ovl_metacopy`: version 0, length of the whole, flags 0, digest algorithm, digest.
    """
    if not value:
        return None
    if len(value) < _METACOPY_HEADER or value[0] != 0 or value[1] != len(value) or value[2] != 0:
        raise ImageError(METACOPY.decode(), f"malformed: {value[:8].hex()}… of {len(value)} bytes")
    if len(value) == _METACOPY_HEADER:
        return None
    algorithm, size = DIGEST_SIZES.get(value[3], ("", 0))
    if len(value) != _METACOPY_HEADER + size:
        raise ImageError(METACOPY.decode(), f"digest algorithm {value[3]} with {len(value) - _METACOPY_HEADER} bytes")
    return Digest(algorithm, value[_METACOPY_HEADER:])
