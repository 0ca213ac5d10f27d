"""Differences that are right, and why."""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.contract.observe import ABSENT, Failure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cfsfuse.contract.entries import Entry


class Justified(NamedTuple):
    """Differences that are right: of an observation of a check, named by shell patterns, where `applies` says so."""

    check: str
    what: str
    why: str
    applies: Callable[[Entry, object, object], bool] = lambda _entry, _found, _expected: True


def _refused_as_invalid(_: Entry, found: object, expected: object) -> bool:
    return expected == Failure("EINVAL") and (found is ABSENT or not isinstance(found, Failure))


def _only_here(_: Entry, __: object, expected: object) -> bool:
    return expected is ABSENT


_BLOCKS = (
    "the kernel tells the blocks that the image records, until a file is opened for the first time, and from then on "
    "those of its object: fewer when that is sparse or compressed, more when its file system needs some for itself"
)
_DIRECT = (
    "EROFS refuses O_DIRECT on content in the image when it is mounted from a file, and not when it is mounted from a "
    "block device: the kernel has no one answer"
)


def _of_content(entry: Entry, found: object, expected: object) -> bool:
    return entry.is_regular and isinstance(found, int) and isinstance(expected, int)


def _is_bare(_: Entry, found: object, expected: object) -> bool:
    return (found, expected) == (Failure("EINVAL"), Failure("ENODATA"))


JUSTIFIED: tuple[Justified, ...] = (
    Justified("*", "*st_dev", "each mount has a device number of its own"),
    Justified("*", "*st_blocks", _BLOCKS, _of_content),
    Justified("statfs", "f_b*", "the space of the object store, which can run full, says more than an image's: 0 free"),
    Justified("statfs", "f_*f*", "likewise the number of inodes; EROFS reports -1 and less"),
    Justified("read-ways", "hole", "the holes of an object are no part of the image: zeros as good", _of_content),
    Justified("direct", "open", _DIRECT, _refused_as_invalid),
    Justified("open", "direct", _DIRECT, _refused_as_invalid),
    Justified("direct", "at *", _DIRECT, _only_here),
)

BETWEEN_BACKENDS: tuple[Justified, ...] = (
    Justified(
        "xattrs-absent",
        "user.overlay.",
        "the kernel refuses the bare prefix of a name space that overlayfs keeps for itself, as that of `overlay` does",
        _is_bare,
    ),
)
"""What may differ besides that from one backend to another, either way, as docs/backends.md has it."""


def justification(name: str, what: str, entry: Entry, found: object, expected: object) -> Justified | None:
    """Return which of JUSTIFIED a difference is; None for one that is wrong."""
    return _first(JUSTIFIED, name, what, lambda known: known.applies(entry, found, expected))


def between_backends(name: str, what: str, entry: Entry, one: object, other: object) -> Justified | None:
    """Return why two values may differ of which none is the oracle's; None when it is wrong."""
    return justification(name, what, entry, other, one) or _first(
        BETWEEN_BACKENDS,
        name,
        what,
        lambda known: known.applies(entry, one, other) or known.applies(entry, other, one),
    )


def _first(among: Iterable[Justified], name: str, what: str, applies: Callable[[Justified], bool]) -> Justified | None:
    for known in among:
        if fnmatch.fnmatchcase(name, known.check) and fnmatch.fnmatchcase(what, known.what) and applies(known):
            return known
    return None
