"""Directory listings, prepared once and kept, and prepared ahead of the question while nobody asks for anything.

A walk alternates between the client's work and the server's. Whoever lists a directory mostly goes on with its first
subdirectory, so that is prepared while the client is still busy with what it has just got.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from cfsfuse.lru import Lru

if TYPE_CHECKING:
    from collections.abc import Callable

    from cfsfuse.erofs.image import Nid
    from cfsfuse.erofs.inode import Inode
    from cfsfuse.vfs import Vfs

_KEPT_ENTRIES = 16384  # about 500 bytes each
_AHEAD = 64  # directories; what is prepared ahead must not drive out what is being listed

Answer = TypeVar("Answer")
Entries = list[tuple[bytes, "Inode"]]


class Prepared(NamedTuple, Generic[Answer]):
    """A session's form of what a directory block shows, and whether the directory has no block behind it."""

    answer: Answer
    subdirectories: list[Nid]
    is_last: bool


class Listings(Generic[Answer]):
    """The listings of a `Vfs`, in the form in which a session answers them."""

    def __init__(self, vfs: Vfs, prepare: Callable[[Entries, int], Answer], cookies: int) -> None:
        """`prepare` makes the answer for entries (name and inode), the first of which has the cookie that it is given.

        The cookie of an entry is the index of its directory block times `cookies`, plus its place there counted from 1:
        where a listing goes on behind it. So a listing goes on anywhere at no cost.
        """
        self._vfs = vfs
        self._prepare = prepare
        self._cookies = cookies
        self._kept: Lru[tuple[int, int], Prepared[Answer]] = Lru(_KEPT_ENTRIES)
        self._ahead: list[int] = []

    def get(self, directory: int, block: int) -> Prepared[Answer]:
        """Return the listing of directory block `block`."""
        prepared = self._kept.get((directory, block)) or self._make(directory, block)
        if prepared.subdirectories:
            self._ahead += reversed(prepared.subdirectories)
            del self._ahead[:-_AHEAD]
        return prepared

    def work_ahead(self) -> bool:
        """Prepare a directory block that will probably be asked for, in 50 µs or so; return whether there was one."""
        while self._ahead:
            directory = self._ahead.pop()
            if self._kept.get((directory, 0)) is None:
                with contextlib.suppress(Exception):  # whoever asks for it will be told
                    self._make(directory, 0)
                return True
        return False

    def _make(self, directory: int, block: int) -> Prepared[Answer]:
        entries, subdirectories, is_last = self._vfs.listing(directory, block)
        prepared = Prepared(self._prepare(entries, block * self._cookies + 1), subdirectories, is_last)
        self._kept.put((directory, block), prepared, len(entries) + 1)
        return prepared
