"""Whether the kernel would verify the objects of a store, going by some of those that an image names."""

from __future__ import annotations

import contextlib
import itertools
import os
from typing import TYPE_CHECKING

from cfsfuse.basedirs import BaseDirectories
from cfsfuse.errors import ObjectError
from cfsfuse.tree import External
from cfsfuse.verity.ioctl import Absence, absence, measure

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cfsfuse.erofs.reader import Reader

_SAMPLE = 2048  # files in the reach of the sample of objects that are asked for their fs-verity


def problem_of_objects(reader: Reader, basedir: tuple[str, ...]) -> str | None:
    """Return why the kernel would not verify an object below the directories `basedir`; None when it would."""
    unknown, is_one_good = None, False
    with contextlib.closing(BaseDirectories(basedir)) as directories:
        for node in _sample(_with_digest(reader)):
            try:
                descriptor = directories.open(node.path or b"")
            except ObjectError as error:
                unknown = f"{error}; so nothing is known of fs-verity in the store"
                continue
            problem = _object_problem(descriptor.fd, node)
            if problem is not None:
                return problem
            is_one_good = True
    return None if is_one_good else unknown


def _with_digest(reader: Reader) -> Iterator[External]:
    for _, inode in reader.walk():
        node = reader.node(inode) if inode.is_regular else None
        if isinstance(node, External) and node.digest is not None and node.path is not None:
            yield node


def _sample(nodes: Iterable[External]) -> Iterator[External]:
    """Yield the first, second, fourth node and so on: a store is filled by tools, and mostly all of it alike."""
    for number, node in enumerate(itertools.islice(nodes, _SAMPLE), 1):
        if number & number - 1 == 0:
            yield node


def _object_problem(fd: int, node: External) -> str | None:
    path = os.fsdecode(node.path or b"")
    known = measure(fd)
    if known is None:
        return f"object {path} has no fs-verity: {_REMEDIES[absence(fd)]}; noverity does without"
    if node.digest is None or known.value != node.digest.value:
        return f"object {path} has another fs-verity digest than the image records"
    return None


_REMEDIES = {
    Absence.FILE: "enable it with fsverity(1), or fill the store anew with cfsfuse mk",
    Absence.FILE_SYSTEM: "its file system, or this kernel, has none; on ext4, tune2fs -O verity enables it for objects "
    "that are stored anew",
}
