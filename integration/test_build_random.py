"""Images of random trees and random dumps are those of mkcomposefs, to the last byte; earlier finds are tried again.

Each run takes other cases; it prints the seed, and CFSFUSE_SEED brings the same again. A case that fails is made small
and kept: see `integration.oracles.compare`.
"""

from __future__ import annotations

import contextlib
import os
import random
import stat
from typing import TYPE_CHECKING

import pytest

from cfsfuse.errors import CfsError
from integration.mounts import SELF, needs_root, require_composefs
from integration.oracles import builds, compare, disk, generate
from integration.oracles.nodes import Node, Spelling, read, text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from _pytest.mark import ParameterSet

    from integration.oracles.fetch import Composefs

QUICK_DUMPS, ALL_DUMPS = 35, 400
QUICK_TREES, ALL_TREES = 15, 150
QUICK_DAMAGED, ALL_DAMAGED = 5, 100
_DAMAGED_AT_ONCE = 20
# Of the cases so manieth are also led back from the image's dump, and mounted by the kernel.
REPEATED_EVERY, MOUNTED_EVERY = 3, 5
# The shorter ones more often.
SPELLINGS = (Spelling.AS_THE_TOOL, Spelling.AS_THE_TOOL, Spelling.LITTLE, Spelling.LITTLE, Spelling.ALL)
REFUSAL = "Numerical result out of range"
WHITEOUT = b"trusted.overlay.whiteout"


def cases(quick: int, all_of_them: int) -> list[int | ParameterSet]:
    """Return the numbers of cases; those beyond `quick` are for the long run."""
    slow = [pytest.param(number, marks=pytest.mark.slow) for number in range(quick, all_of_them)]
    return [*range(quick), *slow]


@pytest.fixture(scope="module")
def seed(request: pytest.FixtureRequest) -> str:
    """What the cases of this run come from."""
    chosen = os.environ.get("CFSFUSE_SEED") or str(random.SystemRandom().randrange(1 << 32))
    plugins = request.config.pluginmanager
    with plugins.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nrandom cases: CFSFUSE_SEED={chosen}")
    return chosen


@pytest.fixture(scope="module")
def tools() -> Composefs:
    return require_composefs()


@pytest.fixture(scope="module")
def place() -> Iterator[str]:
    """A directory for trees and images; a case there costs little."""
    with builds.scratch() as path:
        yield path


def generator(seed: str, kind: str, number: int) -> random.Random:
    return random.Random(f"{seed}/{kind}/{number}")


def random_dump(seed: str, number: int) -> tuple[list[Node], Spelling]:
    rng = generator(seed, "dump", number)
    return generate.dump(rng), rng.choice(SPELLINGS)


@pytest.mark.parametrize("number", cases(QUICK_DUMPS, ALL_DUMPS))
def test_dump(seed: str, number: int, tools: Composefs, place: str) -> None:
    nodes, spelling = random_dump(seed, number)
    with refusals_accounted_for():
        compare.check_dump(tools, f"{seed}-{number}", nodes, spelling)
        image = compare.image_of(compare.tree_of(text(nodes, spelling)))
        builds.fsck(written(place, image))
        if number % REPEATED_EVERY == 0:
            repeats_itself(tools, image, nodes)


@pytest.mark.parametrize("number", cases(QUICK_TREES, ALL_TREES))
def test_tree(seed: str, number: int, tools: Composefs, place: str) -> None:
    nodes = generate.tree(generator(seed, "tree", number), privileged=SELF.uid == 0)
    with refusals_accounted_for():
        compare.check_tree(tools, f"{seed}-{number}", nodes, place)


@needs_root
@pytest.mark.parametrize("number", cases(QUICK_DUMPS // MOUNTED_EVERY, ALL_DUMPS // MOUNTED_EVERY))
def test_kernel_mounts(seed: str, number: int, place: str) -> None:
    nodes, spelling = random_dump(seed, number)
    # Where an owner is -1, which stands for none, the kernel gives nobody access.
    nodes = [node._replace(uid=node.uid & 0x7FFFFFFF, gid=node.gid & 0x7FFFFFFF) for node in nodes]
    path = written(place, compare.image_of(compare.tree_of(text(nodes, spelling))))
    with builds.mounted_by_the_kernel(path, place) as mountpoint:
        # Not all that a dump can say of a file is something that overlayfs can open; that is the dump's business.
        names = {node.path[0] for node in nodes if len(node.path) == 1}
        assert set(os.listdir(os.fsencode(mountpoint))) == names


@contextlib.contextmanager
def refusals_accounted_for() -> Iterator[None]:
    """Let the reference refuse what it should not: a whiteout that has by itself an xattr by which it is marked."""
    try:
        yield
    except compare.Refused as refusal:
        if REFUSAL not in str(refusal):
            raise


def written(place: str, image: bytes) -> str:
    path = os.path.join(place, "image.cfs")
    with open(path, "wb") as file:
        file.write(image)
    return path


def repeats_itself(tools: Composefs, image: bytes, nodes: list[Node]) -> None:
    """Dump → image → dump says the same again, and the image of the dump is the reference's."""
    first = compare.dump_of(image)
    again = compare.image_of(compare.tree_of(first))
    assert again == compare.reference(tools, ("--from-file", "-"), first)
    if not moves_whiteouts(nodes):
        assert compare.dump_of(again) == first


def moves_whiteouts(nodes: list[Node]) -> bool:
    """Return whether a dump tells of whiteouts that were none, or in other directories: of those it has no marks.

    A file that has by itself the xattr by which an image marks a whiteout is one, from the first dump on; and what was
    a further name of one may come first in a dump.
    """
    if any(name == WHITEOUT for node in nodes for name, _ in node.xattrs):
        return True
    has_whiteouts = any(node.kind == stat.S_IFCHR and node.rdev == 0 for node in nodes)
    return has_whiteouts and any(node.link is not None for node in nodes)


@pytest.mark.slow
def test_block_addresses_of_more_than_16_bits(tools: Composefs, place: str) -> None:
    """A map of chunks in a block at such an address keeps half of it in its inode, as the reference has it."""
    path = os.path.join(place, "large.dump")
    with open(path, "wb") as file:
        file.write(b"/ 0 40755 2 0 0 0 1.0 - - -\n")
        line = b"/%06x 4096 100644 1 0 0 0 1.0 - " + b"x" * 4096 + b" -\n"
        file.writelines(line % number for number in range(1 << 16))
        file.write(b"/z %d 100644 1 0 0 0 1.0 - - -\n" % (1 << 53))
    arguments = ("--from-file", "--print-digest-only", path)
    assert builds.mk(*arguments).out == tools.mkcomposefs(*arguments)


# The cases themselves ------------------------------------------------------------------------------------------------


def test_dumps_have_everything() -> None:
    """What the comparisons prove is bounded by what is in the cases."""
    nodes = [node for number in range(60) for node in random_dump("everything", number)[0]]
    kinds = {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK}
    assert {node.kind for node in nodes} == kinds
    assert any(node.kind == stat.S_IFCHR and not node.rdev and len(node.path) == 1 for node in nodes)
    assert {len(node.path[-1]) for node in nodes if node.path} >= {1, 255}
    assert {byte for node in nodes for name in node.path for byte in name} == set(range(1, 256)) - {ord("/")}
    names = {name for node in nodes for name, _ in node.xattrs}
    spaces = (b"user.", b"trusted.", b"security.", b"system.posix_acl_access", b"system.posix_acl_default", b"btrfs.x")
    assert all(any(name.startswith(space) for name in names) for space in (*spaces, b"trusted.overlay.overlay."))
    assert max(len(node.xattrs) for node in nodes) > 128
    assert max(sum(map(len, (*dict(node.xattrs), *dict(node.xattrs).values()))) for node in nodes) > 32_000
    assert max(node.size for node in nodes if node.kind == stat.S_IFREG) == 1 << 53
    assert {len(node.content) for node in nodes if node.content is not None} >= {0, 1, 64, 65, 4096, 5000}
    assert {len(node.payload or b"") for node in nodes if node.kind == stat.S_IFLNK and not node.link} >= {1, 4095}
    for field in ("nlink", "uid", "gid"):
        assert {65535, 65536, 2**32 - 1} <= {getattr(node, field) for node in nodes}
    assert min(node.seconds for node in nodes) < -(2**32) < 2**62 < max(node.seconds for node in nodes)
    places = {node.path: at for at, node in enumerate(nodes)}
    assert {places[node.link] < places[node.path] for node in nodes if node.link in places} == {True, False}


def test_difference_is_found_and_kept_and_made_small(
    tools: Composefs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [Node((), 0o40755), *(Node((b"%03d" % number,), 0o100644, nlink=number) for number in range(100))]
    nodes[70] = nodes[70]._replace(xattrs=((b"user.wrong", b"x" * 100), (b"user.right", b"")))
    image_of = compare.image_of
    monkeypatch.setattr(compare, "image_of", lambda *made: image_of(*made).replace(b"wrong", b"WRONG"))
    monkeypatch.setattr(compare, "FAILURES", str(tmp_path))
    with pytest.raises(AssertionError, match=r"(?s)user.WRONG.* instead of .*user.wrong.*with 2 of its 101 nodes"):
        compare.check_dump(tools, "planted", nodes, Spelling.AS_THE_TOOL)
    assert (tmp_path / "planted.dump").read_bytes() == text(nodes)
    small = b"/ 0 40755 1 0 0 0 0.0 - - -\n/x 0 100644 1 0 0 0 0.0 - - - user.wrong=\n"
    assert (tmp_path / "small-planted.dump").read_bytes() == small


def test_kept_text_is_read_again() -> None:
    for number in range(5):
        nodes, spelling = random_dump("again", number)
        assert read(text(nodes, spelling)) == nodes


# Earlier finds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", compare.corpus(".dump"))
def test_earlier_find(name: str, tools: Composefs) -> None:
    with open(os.path.join(compare.CORPUS, name), "rb") as file:
        difference = compare.dump_difference(tools, file.read())
    assert difference is None, difference


@needs_root
@pytest.mark.parametrize("name", compare.corpus(".tree"))
def test_earlier_find_on_disk(name: str, tools: Composefs, place: str) -> None:
    with open(os.path.join(compare.CORPUS, name), "rb") as file:
        nodes = read(file.read())
    top = os.path.join(place, name)
    disk.make(nodes, top)
    difference = compare.tree_difference(tools, top)
    assert difference is None, difference


# Damaged dumps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", cases(QUICK_DAMAGED, ALL_DAMAGED))
def test_damaged_dump(seed: str, number: int, tools: Composefs) -> None:
    """Of a text with an error we say so, or make of it what the reference does: never anything else."""
    rng = generator(seed, "damage", number)
    nodes = generate.dump(rng)[:12]
    whole = text(nodes, rng.choice(SPELLINGS))
    for _ in range(_DAMAGED_AT_ONCE):
        damaged = damage(rng, whole)
        try:
            image = compare.image_of(compare.tree_of(damaged))
        except CfsError:
            continue
        try:
            expected = compare.reference(tools, ("--from-file", "-"), damaged)
        except compare.Refused as refusal:
            if REFUSAL in str(refusal):  # its count of xattr bytes runs below zero for some whiteouts
                continue
            path = compare.keep(f"{seed}-{number}-damaged.dump", damaged)
            pytest.fail(f"taken, but not by the reference: {refusal}\nkept as {path}")
        if image != expected:
            path = compare.keep(f"{seed}-{number}-damaged.dump", damaged)
            pytest.fail(f"{compare.describe(image, expected)}\nkept as {path}")


def damage(rng: random.Random, whole: bytes) -> bytes:
    """Return a text with something wrong in it."""
    at = rng.randrange(len(whole))
    length = rng.choice((0, 1, 1, 5, 100))
    other = rng.choice(
        (b"", b" ", b"\n", b"-", b"@", b"\\", b"\\x", b"/", b"=", b"0", b"9", b"\0", b".", b"..", b"\xff")
    )
    if rng.random() < 0.3:
        lines = whole.splitlines(keepends=True)
        rng.shuffle(lines)
        return b"".join(lines[: rng.randint(1, len(lines))])
    return whole[:at] + other + whole[at + length :]
