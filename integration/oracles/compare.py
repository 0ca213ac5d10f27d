"""An image of ours beside the reference's: where they differ, and what is kept of a case in which they do.

A case that fails is kept as a file, as it was and as small as it could be made, in build/failures or where
CFSFUSE_FAILURES says; the small one belongs into corpus/ once the error is found. `*.dump` is a composefs-dump(5) text,
`*.tree` one of a directory to be made on disk by `integration.oracles.disk`.
"""

from __future__ import annotations

import functools
import io
import itertools
import os
import tempfile
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from cfsfuse.builder.scan import Options, Xattrs, scan
from cfsfuse.dump import dump, parse
from cfsfuse.erofs.image import Image
from cfsfuse.erofs.reader import Reader
from cfsfuse.erofs.writer import Versions, write
from cfsfuse.errors import CfsError
from integration.oracles import disk
from integration.oracles.fetch import ToolFailed
from integration.oracles.nodes import Node, Spelling, text
from integration.oracles.shrink import shrink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cfsfuse.tree import Entry
    from integration.oracles.fetch import Composefs

HERE = os.path.dirname(os.path.abspath(__file__))
CORPUS = os.path.join(HERE, "corpus")
FAILURES = os.environ.get("CFSFUSE_FAILURES") or os.path.join(HERE, os.pardir, os.pardir, "build", "failures")
_SHOWN = 400


DEFAULT = Versions()
# In this process: starting others would take longer than reading so little.
ALONE = Options(processes=1)


class Run(NamedTuple):
    """Arguments of the reference, and what they are for us."""

    arguments: tuple[str, ...]
    versions: Versions = DEFAULT
    options: Options = ALONE


VERSION_RUNS = (
    Run(()),
    Run(("--min-version=0", "--max-version=0"), Versions(0, 0)),
    Run(("--min-version=0", "--max-version=1"), Versions(0, 1)),
    Run(("--min-version=1", "--max-version=1"), Versions(1, 1)),
)
TREE_RUNS = (
    *VERSION_RUNS,
    Run(("--use-epoch",), options=Options(processes=1, use_epoch=True)),
    Run(("--skip-devices",), options=Options(processes=1, skip_devices=True)),
    Run(("--skip-xattrs",), options=Options(processes=1, xattrs=Xattrs.NONE)),
    Run(("--user-xattrs",), options=Options(processes=1, xattrs=Xattrs.USER)),
    Run(
        ("--use-epoch", "--skip-devices", "--user-xattrs", "--min-version=1"),
        Versions(1, 0),
        Options(processes=1, use_epoch=True, skip_devices=True, xattrs=Xattrs.USER),
    ),
)


class Refused(Exception):
    """The reference makes no image of this; the text says why."""


# Making images


# A case is made several times in a row, with several options and for several checks.
@functools.lru_cache(maxsize=2)
def tree_of(dump_text: bytes) -> Entry:
    return parse(io.BytesIO(dump_text))


@functools.lru_cache(maxsize=3)
def image_of(tree: Entry, versions: Versions = DEFAULT) -> bytes:
    return b"".join(write(tree, versions))


def dump_of(image: bytes) -> bytes:
    return b"".join(dump(Reader(Image(image))))


# Comparing


def dump_difference(tools: Composefs, dump_text: bytes) -> str | None:
    """Return how our images of a dump differ from the reference's; raise Refused where it makes none."""
    try:
        tree = tree_of(dump_text)
    except CfsError as error:
        reference(tools, ("--from-file", "-"), dump_text)
        return f"refused, but not by the reference: {error}"
    return _first(_difference(run, tools, ("--from-file", "-"), tree, dump_text) for run in VERSION_RUNS)


def tree_difference(tools: Composefs, top: str) -> str | None:
    """Return how our images of a directory differ from the reference's; raise Refused where it makes none."""
    trees: dict[Options, Entry] = {}
    for run in TREE_RUNS:
        if run.options not in trees:
            trees[run.options] = scan(top, run.options)
    return _first(_difference(run, tools, (top,), trees[run.options]) for run in TREE_RUNS)


def _difference(run: Run, tools: Composefs, source: tuple[str, ...], tree: Entry, stdin: bytes = b"") -> str | None:
    expected = reference(tools, (*run.arguments, *source), stdin)
    try:
        found = image_of(tree, run.versions)
    except CfsError as error:
        return f"{run.arguments}: refused, but not by the reference: {error}"
    difference = describe(found, expected)
    return difference and f"{' '.join(run.arguments) or 'no options'}: {difference}"


def reference(tools: Composefs, arguments: tuple[str, ...], stdin: bytes = b"") -> bytes:
    """Return the reference's image; raise Refused where it makes none."""
    try:
        return tools.mkcomposefs(*arguments, "-", stdin=stdin)
    except ToolFailed as error:
        raise Refused(str(error)) from None


def _first(differences: Iterator[str | None]) -> str | None:
    return next(filter(None, differences), None)


def describe(found: bytes, expected: bytes) -> str | None:
    """Return how two images differ, in the terms of a dump where that shows it."""
    if found == expected:
        return None
    pairs = enumerate(itertools.zip_longest(found, expected))
    at = next(at for at, (one, other) in pairs if one != other)
    place = f"{len(found)} bytes instead of {len(expected)}, different from byte {at} on"
    lines = itertools.zip_longest(_dump_lines(found), _dump_lines(expected))
    return next((f"{place}; {_short(one)} instead of {_short(other)}" for one, other in lines if one != other), place)


def _dump_lines(content: bytes) -> Iterator[bytes]:
    try:
        yield from dump(Reader(Image(content)))
    except CfsError as error:
        yield str(error).encode()


def _short(line: bytes | None) -> str:
    shown = "nothing" if line is None else line.decode("ascii", "backslashreplace").rstrip("\n")
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN // 2]}…{shown[-_SHOWN // 2 :]}"


# Keeping


def check_dump(tools: Composefs, name: str, nodes: Sequence[Node], spelling: Spelling) -> None:
    """Compare a case that is a dump; keep it, and fail, where the images differ."""
    _check(name + ".dump", nodes, lambda case: dump_difference(tools, text(case, spelling)), spelling)


def check_tree(tools: Composefs, name: str, nodes: Sequence[Node], scratch: str) -> None:
    """Compare a case that is made below the directory `scratch`; keep it, and fail, where the images differ."""

    def difference(case: Sequence[Node]) -> str | None:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            top = os.path.join(folder, "top")
            disk.make(case, top)
            return tree_difference(tools, top)

    _check(name + ".tree", nodes, difference, Spelling.AS_THE_TOOL)


def _check(
    file: str, nodes: Sequence[Node], difference: Callable[[Sequence[Node]], str | None], spelling: Spelling
) -> None:
    found = difference(nodes)
    if found is not None:
        fail(file, nodes, difference, spelling, found)


def fail(
    file: str,
    nodes: Sequence[Node],
    difference: Callable[[Sequence[Node]], str | None],
    spelling: Spelling,
    found: str,
) -> NoReturn:
    """Keep a case as it is, then shrink it and keep that; raise AssertionError with both places."""
    path = keep(file, text(nodes, spelling))

    def fails(case: Sequence[Node]) -> bool:
        try:
            return difference(case) is not None
        except (Refused, OSError):  # no such tree can be made
            return False

    small = shrink(nodes, fails)
    less = keep("small-" + file, text(small, spelling))
    message = f"{found}\nkept as {path}\nwith {len(small)} of its {len(nodes)} nodes as {less}:\n{difference(small)}"
    raise AssertionError(message)


def keep(file: str, content: bytes) -> str:
    """Write a case into the folder of failures and return its path."""
    folder = os.path.abspath(FAILURES)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, file)
    with open(path, "wb") as kept:
        kept.write(content)
    return path


def corpus(suffix: str) -> list[str]:
    """Return the names of the cases of earlier finds."""
    return sorted(name for name in os.listdir(CORPUS) if name.endswith(suffix))
