"""Two observations of the same → what differs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.contract.checks import CHECKS
from cfsfuse.contract.justified import justification
from cfsfuse.contract.observe import ABSENT
from cfsfuse.errors import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from cfsfuse.contract.entries import Entry
    from cfsfuse.contract.justified import Justified
    from cfsfuse.contract.observe import Observations


class Difference(NamedTuple):
    """An observation that is not the other's; `justified` is why it need not be."""

    path: bytes
    what: str
    found: object
    expected: object
    justified: Justified | None = None

    def __str__(self) -> str:
        found, expected = (short(value) for value in apart(self.found, self.expected))
        return f"{printable(self.path or b'/')} {short(self.what)}: {found}, but the oracle {expected}"


def differences(
    name: str, mount: bytes, oracle: bytes, entries: Iterable[Entry], count: Callable[[int], object] = lambda _: None
) -> Iterator[Difference]:
    """Make check `name` of `entries` on both mounts and yield what differs; `count` is told how much was observed.

    For tests, which hold each check on its own, as another user for example; `comparison` makes all in one walk.
    """
    check = CHECKS[name]
    for entry in entries:
        found = check(mount + entry.path, entry)
        expected = check(oracle + entry.path, entry)
        count(len(expected))
        yield from (each for each in apart_from(name, entry, found, expected) if each.justified is None)


def apart_from(name: str, entry: Entry, found: Observations, expected: Observations) -> Iterator[Difference]:
    """Yield what differs in the observations of check `name`, the justified included."""
    if found == expected:
        return
    for what in expected | found:
        pair = found.get(what, ABSENT), expected.get(what, ABSENT)
        if pair[0] != pair[1]:
            yield Difference(entry.path, what, *pair, justification(name, what, entry, *pair))


def apart(one: object, other: object) -> tuple[object, object]:
    """Return two values for people: of two lists only what the other has not, unless it is their order."""
    if not (isinstance(one, list) and isinstance(other, list)):
        return one, other
    alone = [each for each in one if each not in set(other)], [each for each in other if each not in set(one)]
    return alone if alone != ([], []) else (one, other)


def short(value: object) -> str:
    """Return a value as text that has room in a line."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 160 else f"{text[:80]}…{text[-60:]}"
