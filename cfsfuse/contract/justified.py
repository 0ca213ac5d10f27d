"""Differences that are right, and why."""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.contract.observe import ABSENT, Failure

if TYPE_CHECKING:
    from collections.abc import Callable

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


def justification(name: str, what: str, entry: Entry, found: object, expected: object) -> Justified | None:
    """Return which of JUSTIFIED a difference is; None for one that is wrong."""
    for known in JUSTIFIED:
        if (
            fnmatch.fnmatchcase(name, known.check)
            and fnmatch.fnmatchcase(what, known.what)
            and known.applies(entry, found, expected)
        ):
            return known
    return None
