"""Any number of mounts of an image, and the image itself, held against each other in one walk over all their entries.

The first mount is what the others are compared with; each is compared with the image, too, as far as that knows.
Differences are yielded as they are found, and all that is kept are counts and a number for each directory. Otherwise
memory is that of the largest directory, whose names are observed as a whole, and of the names beside the path.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.contract.checks import CHECKS
from cfsfuse.contract.differences import apart_from
from cfsfuse.contract.entries import SAMPLE, Entry, is_sample
from cfsfuse.contract.image import UNTOLD, ImageWitness
from cfsfuse.contract.justified import BETWEEN_BACKENDS, JUSTIFIED, between_backends
from cfsfuse.contract.observe import FORBIDDEN, Failure, attempt, failure
from cfsfuse.erofs.ondisk import NAME_MAX
from cfsfuse.errors import HostError, ImageError, printable
from cfsfuse.verity.digest import SHA256

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from cfsfuse.contract.differences import Difference
    from cfsfuse.contract.justified import Justified
    from cfsfuse.contract.observe import Observations
    from cfsfuse.erofs.image import Nid
    from cfsfuse.erofs.inode import Inode

IMAGE = "image"
ENTRIES = "entries"
"""What is looked at before all checks: whether an entry is there, and of which type."""

_NOT_THERE = Failure("ENOENT")
_NO_CONTENT = (_NOT_THERE, FORBIDDEN)
_PATH_MAX = 4096
_ALL_JUSTIFIED = (*JUSTIFIED, *BETWEEN_BACKENDS)
# Checks that are made `sparsely` look at so many entries first, and then at every so manieth.
DENSE = 1000


class Mounted(NamedTuple):
    """A mount that is looked at: what people call it, and where it is."""

    name: str
    root: bytes


class Pair(NamedTuple):
    """Who is compared with whom, by name."""

    found: str
    expected: str


class Finding(NamedTuple):
    """A difference that is not justified, the check that found it, and between whom."""

    check: str
    pair: Pair
    difference: Difference


@dataclass
class Count:
    """What has been compared in a check of a pair: entries, observations, and how many of these differ."""

    entries: int = 0
    observations: int = 0
    different: int = 0
    justified: int = 0


class Outcome(NamedTuple):
    """All that a comparison keeps; of the justified differences the number of each in _ALL_JUSTIFIED."""

    counts: dict[tuple[str, Pair], Count]
    reasons: dict[int, int]
    entries: int
    too_long: int
    unread: int


class _Place(NamedTuple):
    """A path to look at, its inode in the image if it has one, and which mounts have a directory above it."""

    path: bytes
    inode: Inode | None
    below: tuple[bool, ...]
    sampled: bool = True


class Comparison:
    """One run: who takes part, which checks are made, and what has come out so far."""

    def __init__(
        self, image: ImageWitness, mounts: Sequence[Mounted], checks: Sequence[str], sparsely: Collection[str] = ()
    ) -> None:
        """Compare `mounts` with each other and the image; those of the checks `sparsely` at a part of the entries."""
        self.image = image
        self.sparsely = frozenset(sparsely)
        self.mounts = list(mounts)
        self.checks = list(checks)
        first = self.mounts[0].name
        self.pairs = [Pair(mount.name, first) for mount in self.mounts[1:]]
        self.pairs += [Pair(mount.name, IMAGE) for mount in self.mounts]
        self.counts = {
            (check, pair): Count() for check in (ENTRIES, *self.checks) for pair in self.pairs if self._has(check, pair)
        }
        self.reasons: Counter[Justified] = Counter()
        self.entries = 0
        self.too_long = 0
        self.unread = 0
        """Files whose contents nobody could compare: their objects are missing, or may not be read."""
        self._devices: dict[str, int] = {}
        self._at: Callable[[str, bytes], object] = _nobody_asks
        self._longest = max(len(mount.root) for mount in self.mounts)

    @property
    def are_equal(self) -> bool:
        """Whether nothing differs, so far, that is not justified."""
        return not any(count.different for count in self.counts.values())

    @property
    def outcome(self) -> Outcome:
        """What has come out, as another process can take it over."""
        reasons = {_ALL_JUSTIFIED.index(reason): times for reason, times in self.reasons.items()}
        return Outcome(self.counts, reasons, self.entries, self.too_long, self.unread)

    @outcome.setter
    def outcome(self, other: Outcome) -> None:
        self.counts, reasons, self.entries, self.too_long, self.unread = other
        self.reasons = Counter({_ALL_JUSTIFIED[number]: times for number, times in reasons.items()})

    def findings(self, at: Callable[[str, bytes], object] | None = None) -> Iterator[Finding]:
        """Compare everything; `at` is told, before each look, at whom and at which path it is.

        Raises ImageError for an image that cannot be read, HostError when a mount is gone.
        """
        self._at = at or _nobody_asks
        for mount in self.mounts:
            self._at(mount.name, b"")
            status = attempt(os.lstat, mount.root)
            if isinstance(status, os.stat_result):
                self._devices[mount.name] = status.st_dev
        self._require_alive(b"")
        for place, entries in self._places():
            yield from self._look(place, entries)
            self.entries += 1
        self._require_alive(b"")

    def is_made(self, check: str) -> bool:
        """Return whether any two who take part can be compared in a check."""
        return any(made == check for made, _ in self.counts)

    def _has(self, check: str, pair: Pair) -> bool:
        return check == ENTRIES or pair.expected != IMAGE or check in self.image.checks

    # The walk -------------------------------------------------------------------------------------------------------

    def _places(self) -> Iterator[tuple[_Place, dict[str, Entry | Failure]]]:
        """Yield every path that anybody has, with the entry that each mount has there, or the Failure to find one."""
        seen: set[Nid] = set()
        stack = [iter([_Place(b"", self.image.reader.root, (True,) * len(self.mounts))])]
        while stack:
            place = next(stack[-1], None)
            if place is None:
                stack.pop()
                continue
            if self._longest + len(place.path) + NAME_MAX + 2 > _PATH_MAX:
                self.too_long += 1
                continue
            modes = [self._mode(mount, place.path, is_below) for mount, is_below in self._with(place.below)]
            children = self._image_children(place, seen)
            directories = tuple(isinstance(mode, int) and stat.S_ISDIR(mode) for mode in modes)
            names = self._names(place.path, directories, children)
            measure = SHA256.name if place.inode is None else self.image.measure(place.inode)
            yield (
                place,
                {
                    mount.name: Entry(place.path, mode, names, place.sampled, measure)
                    if isinstance(mode, int)
                    else mode
                    for mount, mode in zip(self.mounts, modes, strict=True)
                },
            )
            stack.append(self._below(place.path, names, children, directories))

    def _below(
        self, path: bytes, names: tuple[bytes, ...], children: dict[bytes, Nid], directories: tuple[bool, ...]
    ) -> Iterator[_Place]:
        """Yield the places of a directory one by one: there may be many, and a path is long."""
        for number, name in enumerate(names):
            nid = children.get(name)
            inode = None if nid is None else self.image.reader.inode(nid)
            yield _Place(path + b"/" + name, inode, directories, is_sample(number, len(names)))

    def _with(self, below: tuple[bool, ...]) -> Iterator[tuple[Mounted, bool]]:
        return zip(self.mounts, below, strict=True)

    def _mode(self, mount: Mounted, path: bytes, is_below: bool) -> int | Failure:  # noqa: FBT001 - of a place
        """Return the mode of an entry. Where nothing above it is a directory, a link could lead out of the mount."""
        if not is_below:
            return _NOT_THERE
        self._at(mount.name, path)
        try:
            return os.lstat(mount.root + path).st_mode
        except OSError as error:
            return failure(error)

    def _image_children(self, place: _Place, seen: set[Nid]) -> dict[bytes, Nid]:
        inode = place.inode
        if inode is None or not inode.is_directory:
            return {}
        if inode.nid in seen:
            raise ImageError("dirent nid", f"directory nid {inode.nid} is reached twice: a cycle")
        seen.add(inode.nid)
        return {name: child.nid for name, child in self.image.children(inode)}

    def _names(self, path: bytes, directories: tuple[bool, ...], children: dict[bytes, Nid]) -> tuple[bytes, ...]:
        names = set(children)
        for mount, is_directory in self._with(directories):
            if is_directory:
                self._at(mount.name, path)
                listed = attempt(os.listdir, mount.root + path)
                names.update(listed if isinstance(listed, list) else ())
        return tuple(sorted(names))

    # Looking --------------------------------------------------------------------------------------------------------

    def _look(self, place: _Place, entries: dict[str, Entry | Failure]) -> Iterator[Finding]:
        alike = []
        for pair in self.pairs:
            if pair.expected == IMAGE and entries[pair.found] == FORBIDDEN and not self.image.observer.sees_all:
                continue  # the image does not say who may look
            found, expected = self._type(pair.found, place, entries), self._type(pair.expected, place, entries)
            entry = next((each for each in entries.values() if isinstance(each, Entry)), Entry(place.path, 0))
            yield from self._compare(ENTRIES, pair, entry, {"type": found}, {"type": expected})
            if found == expected and isinstance(found, int):
                alike.append(pair)
        is_dense = self.entries < DENSE or self.entries % SAMPLE == 0
        for check in self.checks if alike else ():
            if is_dense or check not in self.sparsely:
                yield from self._check(check, place, entries, alike)

    @staticmethod
    def _type(name: str, place: _Place, entries: dict[str, Entry | Failure]) -> object:
        """Return the type bits of what is there, or the Failure."""
        if name == IMAGE:
            return _NOT_THERE if place.inode is None else stat.S_IFMT(place.inode.mode)
        entry = entries[name]
        return stat.S_IFMT(entry.mode) if isinstance(entry, Entry) else entry

    def _check(
        self, check: str, place: _Place, entries: dict[str, Entry | Failure], pairs: list[Pair]
    ) -> Iterator[Finding]:
        pairs = [pair for pair in pairs if self._has(check, pair)]
        looking = {name for pair in pairs for name in pair} - {IMAGE}
        seen: dict[str, Observations] = {}
        for mount in self.mounts:
            if mount.name in looking:
                self._at(mount.name, place.path)
                seen[mount.name] = _observed(check, mount, entries[mount.name])
        if check == "digest" and any(value in _NO_CONTENT for each in seen.values() for value in each.values()):
            self.unread += 1
        for pair in pairs:
            entry = entries[pair.found]
            if not isinstance(entry, Entry):
                continue
            found = seen[pair.found]
            if pair.expected == IMAGE:
                self._at(IMAGE, place.path)
                told = self.image.observe(check, place.inode, entry) if place.inode is not None else {}
                yield from self._compare(check, pair, entry, *self._in_common(check, found, told))
            else:
                yield from self._compare(check, pair, entry, found, seen[pair.expected])

    def _in_common(self, check: str, found: Observations, told: Observations) -> tuple[Observations, Observations]:
        """Return what a mount and the image both know; of xattrs all, so one that only one has counts."""
        unknown = {what for what, value in told.items() if value is UNTOLD}
        if not self.image.observer.sees_all:
            unknown |= {what for what, value in found.items() if value == FORBIDDEN}
        if unknown:
            found, told = ({w: v for w, v in each.items() if w not in unknown} for each in (found, told))
        if check == "xattrs" and not isinstance(found.get("listxattr"), Failure):
            return found, told
        both = found.keys() & told.keys()
        return {what: found[what] for what in both}, {what: told[what] for what in both}

    def _compare(
        self, check: str, pair: Pair, entry: Entry, found: Observations, expected: Observations
    ) -> Iterator[Finding]:
        count = self.counts[check, pair]
        if not (found or expected):
            return
        count.entries += 1
        count.observations += len(expected.keys() | found.keys())
        for difference in apart_from(check, entry, found, expected):
            reason = difference.justified or between_backends(
                check, difference.what, entry, difference.found, difference.expected
            )
            if reason is not None:
                count.justified += 1
                self.reasons[reason] += 1
                continue
            self._require_alive(entry.path)
            count.different += 1
            yield Finding(check, pair, difference)

    def _require_alive(self, path: bytes) -> None:
        """Raise HostError when a mount is no longer there: nothing that is seen in its place tells anything."""
        for mount in self.mounts:
            self._at(mount.name, path)
            status = attempt(os.lstat, mount.root)
            if not isinstance(status, os.stat_result) or status.st_dev != self._devices.get(mount.name):
                said = f": {status}" if isinstance(status, Failure) else ""
                raise HostError(
                    f"{mount.name}: the mount has gone{said}, at the latest when {printable(path or b'/')} was looked"
                    " at; its server has died or somebody has unmounted it, so mount and compare again"
                )


def _nobody_asks(_name: str, _path: bytes) -> None:
    pass


def _observed(check: str, mount: Mounted, entry: Entry | Failure) -> Observations:
    """Return what a check observes; a call that it does not expect to fail is an observation as well."""
    if isinstance(entry, Failure):
        return {"entry": entry}
    seen = attempt(CHECKS[check], mount.root + entry.path, entry)
    return seen if isinstance(seen, dict) else {"check": seen}
