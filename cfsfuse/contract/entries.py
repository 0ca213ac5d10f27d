"""The entries of a mount, which checks look at."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.contract.observe import Observations
from cfsfuse.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

# Of a larger directory only every so manieth child is looked at by the checks that cost much for each entry.
CROWDED = 100
SAMPLE = 29


class Entry(NamedTuple):
    """An entry: path below the root (the root's is empty), mode, sorted names of its children.

    `sampled` says that the entry belongs to those which costly checks look at. `measure` names the algorithm of the
    fs-verity digest by which all of its content is told, whatever its size; None where it may be too large for that.
    """

    path: bytes
    mode: int
    children: tuple[bytes, ...] = ()
    sampled: bool = True
    measure: str | None = None

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_regular(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        return stat.S_ISLNK(self.mode)

    @property
    def is_root(self) -> bool:
        return not self.path


Check = Callable[[bytes, Entry], Observations]
"""Path of an entry on the mount looked at, and the entry → observations; none where the check does not apply."""


def walk(root: bytes) -> Iterator[Entry]:
    """Yield every entry below `root`, itself first, without following links: what tests give to `differences`."""
    stack = [(b"", True)]
    while stack:
        path, sampled = stack.pop()
        mode = os.lstat(root + path).st_mode
        children = tuple(sorted(os.listdir(root + path))) if stat.S_ISDIR(mode) else ()
        yield Entry(path, mode, children, sampled)
        for number, child in enumerate(children):
            stack.append((path + b"/" + child, is_sample(number, len(children))))


def is_sample(number: int, count: int) -> bool:
    """Return whether child `number` of `count` is one of those that costly checks look at."""
    return count <= CROWDED or number % SAMPLE == 0


def require_read_only(root: bytes) -> None:
    """Raise UsageError unless the mount at `root` refuses every change by itself."""
    try:
        flags = os.statvfs(root).f_flag
    except OSError as error:
        raise UsageError(f"{os.fsdecode(root)}: {error.strerror}") from None
    if not flags & os.ST_RDONLY:
        raise UsageError(f"{os.fsdecode(root)}: not a read-only mount, and checks try to change it; mount it with ro")
