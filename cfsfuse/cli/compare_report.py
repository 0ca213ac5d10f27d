"""What `cfsfuse compare` prints: findings and counts → lines for people, and values for programs. Pure."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cfsfuse.cli import common
from cfsfuse.contract.comparison import IMAGE
from cfsfuse.contract.differences import apart, short
from cfsfuse.contract.observe import ABSENT, Failure
from cfsfuse.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cfsfuse.contract.comparison import Comparison, Finding, Mounted
    from cfsfuse.mount.temporary import Attempt

SHOWN = 100  # differences that are printed; --json has all

_HEAD = ("check", "compared", "entries", "observations", "differ", "justified")


class Bounded:
    """The first so many findings, and how many there were."""

    def __init__(self, limit: int = SHOWN) -> None:
        self._limit = limit
        self.kept: list[Finding] = []
        self.total = 0

    def add(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self.total += 1
            if len(self.kept) < self._limit:
                self.kept.append(finding)

    def lines(self) -> Iterator[str]:
        """Yield a line for each difference by path, and one that says how many more there are."""
        for finding in self.kept:
            yield line(finding)
        if self.total > len(self.kept):
            yield f"… and {self.total - len(self.kept)} more differences; --json has all of them"


def line(finding: Finding) -> str:
    """Return a difference as text: path, field, and what each of the two has."""
    found, expected = apart(finding.difference.found, finding.difference.expected)
    what = finding.difference.what
    return (
        f"{printable(finding.difference.path or b'/')} {printable(os.fsencode(what))}: "
        f"{finding.pair.found} has {_text(what, found)}, {finding.pair.expected} has {_text(what, expected)}"
    )


def _text(what: str, value: object) -> str:
    if value == ABSENT:  # it may come from another process
        return "none"
    if isinstance(value, Failure):
        return value.name
    if what == "type" and isinstance(value, int):
        return common.type_name(value)
    if what.endswith("st_mode") and isinstance(value, int):
        return f"{value:07o}"
    if what.endswith("st_rdev") and isinstance(value, int):
        return f"{os.major(value)}:{os.minor(value)}"
    return printable(os.fsencode(short(value)))


def mounts(attempts: Iterable[Attempt], given: Iterable[Mounted]) -> Iterator[str]:
    """Yield a line for each mount: that it takes part, or why not."""
    for backend, mountpoint, problem in attempts:
        if mountpoint is None:
            yield f"{backend.value:8} not mounted: {_told(problem)}"
        else:
            yield f"{backend.value:8} mounted" + (f", not verifying: {_told(problem)}" if problem else "")
    for name, root in given:
        yield f"{name:8} mounted already: {printable(root)}"
    yield f"{IMAGE:8} what it says itself"


def _told(problem: str | None) -> str:
    return printable(os.fsencode(problem or ""))


def table(comparison: Comparison) -> Iterator[str]:
    """Yield the lines of the table, check by pair, and below it why differences are justified."""
    rows: list[tuple[str, ...]] = [_HEAD]
    for (check, (found, expected)), count in comparison.counts.items():
        numbers = (count.entries, count.observations, count.different, count.justified)
        rows.append((check, f"{found} – {expected}", *map(str, numbers)))  # noqa: RUF001 - a dash between two names
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, second, *rest = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), second[0].ljust(second[1]), *(cell.rjust(width) for cell, width in rest)]
        yield "  ".join(cells).rstrip()
    for number, (reason, times) in enumerate(comparison.reasons.items(), 1):
        where = reason.check.replace("*", "every check")
        yield f"[{number}] {reason.what.lstrip('*')} in {where}, {times} times: {reason.why}"
    if comparison.unread:
        yield f"contents not compared, for objects that are missing or may not be read: {comparison.unread} files"
    if comparison.too_long:
        yield f"not looked at, their paths being too long for system calls: {comparison.too_long} entries and all below"


def document(finding: Finding) -> dict[str, object]:
    """Return a difference as JSON has it: an errno as an object, null for what was not observed."""
    difference = finding.difference
    return {
        **common.json_text("path", difference.path or b"/"),
        "check": finding.check,
        **common.json_text("field", os.fsencode(difference.what)),
        "between": list(finding.pair),
        **_value("found", difference.found),
        **_value("expected", difference.expected),
    }


def _value(key: str, value: object) -> dict[str, object]:
    if value == ABSENT:
        return {key: None}
    if isinstance(value, Failure):
        return {key: {"errno": value.name}}
    if isinstance(value, bytes):
        return dict(common.json_text(key, value))
    if isinstance(value, int):
        return {key: value}
    return dict(common.json_text(key, os.fsencode(value if isinstance(value, str) else repr(value))))


def summary(comparison: Comparison) -> dict[str, object]:
    """Return the counts and what was justified, as JSON has them."""
    return {
        "entries": comparison.entries,
        "too_long": comparison.too_long,
        "contents_not_compared": comparison.unread,
        "compared": [
            {"check": check, "between": list(pair), **vars(count)} for (check, pair), count in comparison.counts.items()
        ],
        "justified": [
            {"check": reason.check, "field": reason.what, "why": reason.why, "times": times}
            for reason, times in comparison.reasons.items()
        ],
        "equal": comparison.are_equal,
    }
