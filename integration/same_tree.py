"""`python integration/same_tree.py SOURCE MOUNTED`: compare two directory trees, every byte and every stat field.

The size of a directory is left out: it belongs to the file system. So is the number of links: other names of a file may
be anywhere, and an image has each name as a file of its own. So are the times of access and of change, which nobody can
set, and security.selinux, which the kernel answers for each mount.
"""

from __future__ import annotations

import os
import stat
import sys
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_STEP = 1 << 20
_LABEL = "security.selinux"


def differences(source: str, mounted: str, seen: Counter[str]) -> Iterator[str]:
    """Yield a line for each difference, and count in `seen` what has been compared."""
    pending = [""]
    while pending:
        path = pending.pop()
        one, two = source + path, mounted + path
        status = os.lstat(one)
        for field, expected, found in zip(_FIELDS, _fields(one, status), _fields(two, os.lstat(two)), strict=True):
            if expected != found:
                yield f"{path or '/'}: {field}: {expected!r} in the source, {found!r} in the image"
        if stat.S_ISREG(status.st_mode):
            seen["files"] += 1
            seen["bytes"] += status.st_size
            if not _same_content(one, two):
                yield f"{path}: the contents differ"
        elif stat.S_ISDIR(status.st_mode):
            seen["directories"] += 1
            pending += [f"{path}/{name}" for name in os.listdir(one)]
        else:
            seen["others"] += 1


_FIELDS = ("mode", "uid", "gid", "mtime_ns", "device", "size", "target", "xattrs", "names")


def _fields(path: str, status: os.stat_result) -> tuple[object, ...]:
    is_directory = stat.S_ISDIR(status.st_mode)
    return (
        f"{status.st_mode:o}",
        status.st_uid,
        status.st_gid,
        status.st_mtime_ns,
        status.st_rdev,
        None if is_directory else status.st_size,
        os.readlink(path) if stat.S_ISLNK(status.st_mode) else None,
        {name: _xattr(path, name) for name in os.listxattr(path, follow_symlinks=False) if name != _LABEL},
        sorted(os.listdir(path)) if is_directory else None,
    )


def _xattr(path: str, name: str) -> bytes:
    return os.getxattr(path, name, follow_symlinks=False)


def _same_content(one: str, two: str) -> bool:
    with open(one, "rb") as first, open(two, "rb") as second:
        while piece := first.read(_STEP):
            if second.read(len(piece)) != piece:
                return False
        return not second.read(1)


def main(source: str, mounted: str) -> int:
    seen: Counter[str] = Counter()
    found = 0
    for line in differences(source, mounted, seen):
        print(line)
        found += 1
    what = "{files} files of {bytes} bytes, {directories} directories, {others} others".format_map(seen)
    print(f"{what}: {f'{found} differences' if found else 'all the same'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
