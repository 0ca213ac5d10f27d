"""Directory listings, prepared once and kept, and prepared ahead of the question while nobody asks for anything.

A walk alternates between the client's work and the server's. Whoever lists a directory mostly goes on with what is
below it, in the order of the listing; so that is prepared while the client is still busy with what it has just got.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from cfsfuse.lru import Lru

if TYPE_CHECKING:
    from collections.abc import Callable

    from cfsfuse.erofs.image import Nid
    from cfsfuse.erofs.inode import Inode
    from cfsfuse.vfs import Listing, Vfs

_KEPT_ENTRIES = 16384  # about 500 bytes each
# How many entries are prepared before they are asked for: a few for whoever lists a directory, and more and more while
# a walk goes the way that was foreseen. When it asks for the last of them, as many have been prepared behind that, and
# as many been asked for meanwhile; all these are newer, and have to fit in what is kept.
_LEAST_AHEAD, _MOST_AHEAD = 64, _KEPT_ENTRIES // 4
_FAILURE = 8  # entries, as which a directory block counts that cannot be prepared
# How much of the way is known at most: 40 bytes a subdirectory, 3 MiB if an image makes the most of it.
_STAGES, _SUBDIRECTORIES = 16, 4096
_NEAR = 16  # subdirectories that a walk may leave out and still be followed

Answer = TypeVar("Answer")
Entries = list[tuple[bytes, "Inode"]]


class Prepared(NamedTuple, Generic[Answer]):
    """A session's form of what a directory block shows, and whether the directory has no block behind it.

    `cost` is what it takes to keep, in entries.
    """

    answer: Answer
    subdirectories: list[Nid]
    is_last: bool
    cost: int


class _Stage:
    """A directory on the way that a walk is expected to take: what of it, and of what is below, is still ahead."""

    __slots__ = ("block", "directory", "listing", "subdirectories")

    def __init__(self, directory: int, block: int = 0) -> None:
        self.directory = directory
        self.block: int | None = block
        """The next directory block to prepare, None behind the last one."""
        self.listing: Listing | None = None
        """What that block shows, once it has been read."""
        self.subdirectories: deque[int] = deque()

    def pass_block(self, block: int, prepared: Prepared[Any] | None) -> None:
        """Go on behind directory block `block`; without what it shows, the directory's way ends there."""
        self.listing = None
        self.block = None if prepared is None or prepared.is_last else block + 1
        if prepared is not None:
            self.subdirectories += prepared.subdirectories[: _SUBDIRECTORIES - len(self.subdirectories)]


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
        self._stages: list[_Stage] = []
        self._window = _LEAST_AHEAD
        self._unasked: dict[tuple[int, int], int] = {}
        self._unasked_cost = 0

    def get(self, directory: int, block: int) -> Prepared[Answer]:
        """Return the listing of directory block `block`."""
        prepared = self._kept.get((directory, block))
        if prepared is None:
            return self._get_unforeseen(self._turn_to(directory, block), block)
        cost = self._unasked.pop((directory, block), 0)
        self._unasked_cost -= cost
        self._window = min(self._window + 2 * cost, _MOST_AHEAD)
        return prepared

    def work_ahead(self) -> bool:
        """Do a part of what will probably be asked for; return whether there was something to do.

        That is at most half the work of a directory block. It comes to an end by itself, whatever the directories of a
        hostile image contain: what it prepares counts until somebody asks for it, and so does a failure.
        """
        while self._stages and self._unasked_cost < self._window:
            stage = self._stages[-1]
            if stage.block is not None:
                self._prepare_ahead(stage, stage.block)
                return True
            if not stage.subdirectories:
                self._stages.pop()
                continue
            below = _Stage(stage.subdirectories.popleft())
            if not stage.subdirectories:
                self._stages.pop()  # so a chain of directories has one stage, however deep it is
            self._push(below)
        return False

    def _prepare_ahead(self, stage: _Stage, block: int) -> None:
        """Read the directory block, or make its answer: a request that comes meanwhile does not wait for both."""
        key = (stage.directory, block)
        known = self._kept.get(key)
        if known is not None or key in self._unasked:
            # Where a directory is known from its beginning on, so is the way through it, to who has asked for it.
            stage.pass_block(block, known if block else None)
            return
        prepared = None
        try:
            if stage.listing is None:
                stage.listing = self._vfs.listing(stage.directory, block)
                return
            prepared = self._make(stage.directory, block, stage.listing)
        except Exception:  # noqa: BLE001, S110 - whoever asks for it will be told
            pass
        stage.pass_block(block, prepared)
        self._unasked[key] = prepared.cost if prepared else _FAILURE
        self._unasked_cost += self._unasked[key]

    def _get_unforeseen(self, stage: _Stage, block: int) -> Prepared[Answer]:
        prepared = None
        try:
            listing = self._vfs.listing(stage.directory, block) if stage.listing is None else stage.listing
            prepared = self._make(stage.directory, block, listing)
        finally:
            stage.pass_block(block, prepared)
        return prepared

    def _turn_to(self, directory: int, block: int) -> _Stage:
        """Return the stage of a directory block that was not prepared ahead, to go on from there.

        The walk has been faster, or has left something out. Or it is another one: then what was prepared may be in
        vain, and as little is prepared for the new one as for whoever lists one directory. Of several walks at once one
        is followed, now this and now that.
        """
        self._unasked.clear()
        self._unasked_cost = 0
        for at in reversed(range(len(self._stages))):
            stage = self._stages[at]
            if (stage.directory, stage.block) == (directory, block):
                del self._stages[at + 1 :]
                return stage
            if directory in islice(stage.subdirectories, _NEAR):
                del self._stages[at + 1 :]
                while stage.subdirectories.popleft() != directory:
                    pass
                break
        else:
            self._window = _LEAST_AHEAD
        return self._push(_Stage(directory, block))

    def _push(self, stage: _Stage) -> _Stage:
        if self._stages:
            self._stages[-1].listing = None  # it would be in memory for as long as the way above it takes
        self._stages.append(stage)
        del self._stages[:-_STAGES]
        return stage

    def _make(self, directory: int, block: int, listing: Listing) -> Prepared[Answer]:
        answer = self._prepare(listing.entries, block * self._cookies + 1)
        # A hostile image may call directories what is hidden, so that they are no entries.
        cost = max(len(listing.entries), len(listing.subdirectories)) + 1
        prepared = Prepared(answer, listing.subdirectories, listing.is_last, cost)
        self._kept.put((directory, block), prepared, prepared.cost)
        return prepared
