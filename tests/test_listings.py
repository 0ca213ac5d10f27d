"""Listings that are prepared ahead: which, in which order, and how many."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from cfsfuse.erofs.image import Nid
from cfsfuse.errors import ImageError
from cfsfuse.fuse import listings
from cfsfuse.fuse.listings import Entries, Listings
from cfsfuse.vfs import Listing, Vfs

if TYPE_CHECKING:
    from cfsfuse.erofs.inode import Inode

COOKIES = 4096
AN_INODE = cast("Inode", None)  # nothing here looks at one


class Tree:
    """Directories by number, each with its blocks, which are lists of subdirectories; it notes what is read of them."""

    def __init__(self, blocks: dict[int, list[list[int]]], *, files: int = 0, hidden: bool = False) -> None:
        self._blocks = blocks
        self._hidden = hidden
        self._files = files
        self.read: list[tuple[int, int]] = []

    def listing(self, directory: int, block: int) -> Listing:
        self.read.append((directory, block))
        if directory not in self._blocks:
            raise ImageError("i_mode", "no directory")
        blocks = self._blocks[directory]
        subdirectories = [Nid(below) for below in blocks[block]]
        names = [] if self._hidden else [*subdirectories, *range(self._files)]
        return Listing([(b"%d" % name, AN_INODE) for name in names], subdirectories, is_last=block + 1 == len(blocks))


def prepare(entries: Entries, _cookie: int) -> list[bytes]:
    return [name for name, _ in entries]


def listings_of(tree: Tree) -> Listings[list[bytes]]:
    return Listings(cast("Vfs", tree), prepare, COOKIES)


def exhaust(ahead: Listings[list[bytes]], most: int = 10000) -> None:
    """Let all be prepared that would be if nobody ever asked for anything."""
    for _ in range(most):
        assert ahead._unasked_cost == sum(ahead._unasked.values())
        if not ahead.work_ahead():
            return
    raise AssertionError("it goes on for ever")


# 1 has 2 and 3 in its first block, 4 in its second, 7 in its third; 2 has 5 and 6.
BLOCKS: dict[int, list[list[int]]] = {1: [[2, 3], [4], [7]], 2: [[5, 6]]} | {at: [[]] for at in (3, 4, 5, 6, 7)}
WAY = [(1, 0), (1, 1), (1, 2), (2, 0), (5, 0), (6, 0), (3, 0), (4, 0), (7, 0)]
LEAF = 20


def test_what_a_walk_asks_for_is_read_in_its_order() -> None:
    tree = Tree(BLOCKS)
    ahead = listings_of(tree)
    ahead.get(1, 0)
    exhaust(ahead)
    assert tree.read == WAY


@pytest.mark.parametrize("steps", range(6))
def test_a_walk_reads_nothing_twice_however_far_ahead_the_server_is(steps: int) -> None:
    tree = Tree(BLOCKS)
    ahead = listings_of(tree)
    for directory, block in WAY:
        assert ahead.get(directory, block).is_last is (directory != 1 or block == 2)
        ahead.get(directory, block)  # a listing is asked for once more, for its end
        for _ in range(steps):
            ahead.work_ahead()
    assert tree.read == WAY


def test_the_answer_is_the_same_prepared_ahead_or_not() -> None:
    ahead, behind = listings_of(Tree(BLOCKS, files=2)), listings_of(Tree(BLOCKS, files=2))
    ahead.get(1, 0)
    exhaust(ahead)
    for directory, block in WAY:
        assert ahead.get(directory, block) == behind.get(directory, block)
    assert ahead.get(2, 0).answer == [b"5", b"6", b"0", b"1"]


def test_nothing_is_prepared_before_anybody_asks() -> None:
    assert not listings_of(Tree(BLOCKS)).work_ahead()


@pytest.mark.parametrize(
    ("asked", "read"), [([(3, 0)], [(4, 0), (7, 0)]), ([(2, 0), (4, 0)], [(7, 0)])],
    ids=["does not go into 2", "goes into 2, but not below it"],
)  # fmt: skip
def test_a_walk_that_leaves_something_out_is_followed(
    asked: list[tuple[int, int]], read: list[tuple[int, int]]
) -> None:
    """As `find -prune` does: what it leaves out is not read, what comes behind it is."""
    tree = Tree(BLOCKS)
    ahead = listings_of(tree)
    first = [(1, 0), (1, 1), (1, 2), *asked]
    for directory, block in first:
        ahead.get(directory, block)
    exhaust(ahead)
    assert tree.read == first + read


def test_a_directory_that_is_known_in_part_is_gone_through() -> None:
    tree = Tree(BLOCKS)
    ahead = listings_of(tree)
    ahead.get(1, 1)
    ahead._stages.clear()  # it is a while ago
    ahead.get(1, 0)
    exhaust(ahead)
    assert tree.read == [(1, 1), (1, 0), *WAY[2:]]


def test_of_two_walks_the_one_that_asks_is_followed() -> None:
    tree = Tree(BLOCKS | {10: [[11]], 11: [[]]})
    ahead = listings_of(tree)
    ahead.get(1, 0)
    ahead.get(10, 0)
    ahead.get(1, 1)
    exhaust(ahead)
    assert tree.read == [(1, 0), (10, 0), *WAY[1:]]


def test_walks_at_once_get_what_they_ask_for() -> None:
    tree = Tree(BLOCKS | {at + 100: [[below + 100 for below in one] for one in all_] for at, all_ in BLOCKS.items()})
    ahead, behind = listings_of(tree), listings_of(tree)
    for directory, block in WAY:
        for first in (0, 100):
            assert ahead.get(directory + first, block) == behind.get(directory + first, block)
            ahead.work_ahead()


def test_after_another_walk_the_first_way_is_still_known() -> None:
    tree = Tree({**BLOCKS, 10: [[11]], 11: [[]]})
    ahead = listings_of(tree)
    ahead.get(1, 0)
    ahead.get(10, 0)
    exhaust(ahead)
    assert tree.read == [(1, 0), (10, 0), (11, 0), *WAY[1:]]


def test_a_directory_that_cannot_be_read_is_told_to_who_asks_and_does_not_end_the_way() -> None:
    tree = Tree({1: [[2, 3]], 3: [[]]})  # there is no 2
    ahead = listings_of(tree)
    ahead.get(1, 0)
    exhaust(ahead)
    assert tree.read == [(1, 0), (2, 0), (3, 0)]
    for _ in range(2):
        with pytest.raises(ImageError):
            ahead.get(2, 0)
        exhaust(ahead)
    assert tree.read == [(1, 0), (2, 0), (3, 0), (2, 0), (2, 0)]


def test_directories_that_cannot_be_read_are_not_tried_for_long() -> None:
    tree = Tree({1: [[*range(2, 3000)]]})
    ahead = listings_of(tree)
    ahead.get(1, 0)
    exhaust(ahead)
    assert len(tree.read) < 20


def test_names_of_one_directory_are_not_all_tried() -> None:
    """Thousands of names of one directory, which cannot be read: one attempt."""
    tree = Tree({1: [[2] * 3000]})
    ahead = listings_of(tree)
    ahead.get(1, 0)
    exhaust(ahead)
    assert tree.read == [(1, 0), (2, 0)]


def test_a_cycle_ends() -> None:
    tree = Tree({1: [[2]], 2: [[1, 2]]})
    ahead = listings_of(tree)
    ahead.get(1, 0)
    exhaust(ahead)
    assert tree.read == [(1, 0), (2, 0)]


def test_a_deep_tree_takes_few_stages() -> None:
    depth = 3000
    tree = Tree({at: [[at + 1]] for at in range(depth)} | {depth: [[]]})
    ahead = listings_of(tree)
    for at in range(depth):
        ahead.get(at, 0)
        ahead.work_ahead()
        assert len(ahead._stages) <= 2


def test_what_is_foreseen_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever lists one directory after the other without any order leaves no more than so many stages."""
    monkeypatch.setattr(listings, "_STAGES", 10)
    monkeypatch.setattr(listings, "_SUBDIRECTORIES", 5)
    ahead = listings_of(Tree({at: [[1000, 1001, 1002], [1003, 1004, 1005], [1006]] for at in range(100)}))
    for at in range(100):
        for block in range(3):
            ahead.get(at, block)
            assert len(ahead._stages[-1].subdirectories) == min(5, 3 * block + 3)
    assert len(ahead._stages) == 10


def test_a_listing_that_is_half_prepared_is_not_kept_for_another_walk() -> None:
    ahead = listings_of(Tree({at: [[1000 + at]] for at in range(100)} | {1000 + at: [[]] for at in range(100)}))
    for at in range(100):
        ahead.get(at, 0)
        ahead.work_ahead()
    assert [stage.listing for stage in ahead._stages[:-1]] == [None] * (len(ahead._stages) - 1)


def test_what_a_hostile_image_hides_counts_too() -> None:
    """Whiteouts, for example, whose dirents call them directories."""
    assert listings_of(Tree({1: [[*range(2, 300)]]}, hidden=True)).get(1, 0).cost == 299


def wide(count: int) -> Tree:
    """A directory of that many, each of which takes twenty entries to keep."""
    return Tree({0: [[*range(1, count)]], **{at: [[]] for at in range(1, count)}}, files=LEAF - 1)


def test_more_is_prepared_the_longer_a_walk_keeps_to_its_way_but_no_more_than_fits() -> None:
    """And so none of its questions but the first has to wait for the image to be read."""
    tree = wide(3000)
    ahead = listings_of(tree)
    unasked = []
    for at in range(3000):
        read = len(tree.read)
        for _ in range(2):  # the second time for its end
            ahead.get(at, 0)
        assert len(tree.read) == read + (at == 0)
        exhaust(ahead)
        unasked.append(len(tree.read) - at - 1)
    assert unasked[0] == -(-listings._LEAST_AHEAD // LEAF)
    assert unasked[10] > 2 * unasked[0]
    assert max(unasked) == -(-listings._MOST_AHEAD // LEAF)
    assert tree.read == [(at, 0) for at in range(3000)]


def test_another_walk_begins_with_little() -> None:
    """Whoever lists a directory here and there does not have a thousand others prepared each time."""
    tree = wide(3000)
    ahead = listings_of(tree)
    for at in range(100):
        ahead.get(at, 0)
        exhaust(ahead)
    tree.read.clear()
    ahead.get(2900, 0)
    exhaust(ahead)
    assert len(tree.read) <= 1 + -(-listings._LEAST_AHEAD // LEAF)
