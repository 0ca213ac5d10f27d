"""The images that the contract is held on, unpacked from the reference material beside the checkout.

Some of the vectors record digests of contents that nobody has: as they are, opening such a file fails. Filled, they
have contents invented here, which no digest fits: those are for mounts that verify nothing.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
import stat
import tarfile
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SHARED = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir, "shared"))

_CHUNK = 4096
_ESCAPE = re.compile(rb"\\(?:x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}


class ImageAbsent(Exception):
    """The material that an image comes from is not there; the text names it."""


class TestImage(NamedTuple):
    """An image file, its base directories, and the further mount options that it needs."""

    path: str
    base_directories: tuple[str, ...]
    options: tuple[str, ...] = ()


def unpack(name: str, into: str) -> TestImage:
    """Put the image `name` of IMAGES into the directory `into`, readable for everybody; raise ImageAbsent."""
    os.makedirs(into, mode=0o755)
    return IMAGES[name](into)


def unpack_archive(path: str, into: str) -> None:
    """Unpack an archive of the shared folder; raise ImageAbsent."""
    with tarfile.open(_shared(path)) as archive:
        archive.extraction_filter = getattr(tarfile, "tar_filter", None)  # Python 3.11.4 on; demanded by 3.12
        archive.extractall(into)  # noqa: S202  # our own material


def _python(into: str) -> TestImage:
    unpack_archive("images/python-image.tar.gz", into)
    return TestImage(os.path.join(into, "python.cfs"), (os.path.join(into, "objects"),))


def _python_split(into: str) -> TestImage:
    """The same with its objects in two base directories, where the second also has wrong ones of the first's names."""
    image = _python(into)
    first, second = image.base_directories[0], os.path.join(into, "more")
    for number, path in enumerate(sorted(_files(first))):
        target = os.path.join(second, os.path.relpath(path, first))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if number % 2:
            os.rename(path, target)
        else:
            with open(target, "wb") as file:
                file.write(b"not what the image means")
    return image._replace(base_directories=(first, second))


def _vector(name: str) -> Callable[[str], TestImage]:
    def without_objects(into: str) -> TestImage:
        image = TestImage(os.path.join(into, f"{name}.cfs"), (os.path.join(into, "objects"),))
        with gzip.open(_shared(f"vectors/{name}.cfs.gz")) as source, open(image.path, "wb") as target:
            shutil.copyfileobj(source, target)
        os.mkdir(image.base_directories[0])
        return image

    return without_objects


def _filled(name: str) -> Callable[[str], TestImage]:
    def with_invented_objects(into: str) -> TestImage:
        image = _vector(name)(into)
        sizes: dict[bytes, set[int]] = {}
        for redirect, size in _external(name):
            sizes.setdefault(redirect, set()).add(size)
        for redirect, found in sizes.items():
            if len(found) == 1:  # where files of several sizes share an object, none can be right: it stays missing
                _invent(os.path.join(os.fsencode(image.base_directories[0]), redirect), *found)
        return image._replace(options=("noverity",))

    return with_invented_objects


def _ostree(file: str) -> Callable[[str], TestImage]:
    def signed_repository(into: str) -> TestImage:
        unpack_archive("fixtures/ostree-signed-repos.tar.gz", into)
        return TestImage(os.path.join(into, file), (os.path.join(into, "repo-bare/objects"),))

    return signed_repository


def _external(name: str) -> Iterator[tuple[bytes, int]]:
    """Yield redirect and size of every file of a vector whose content is in an object, out of its composefs-dump(5).

    The reference text and not our own reader: what that misread would be missing from both views, unnoticed.
    """
    with gzip.open(_shared(f"vectors/{name}.dump.gz")) as dump:
        for line in dump:
            _, size, mode, _, _, _, _, _, payload, content = line.split(b" ")[:10]
            if not mode.startswith(b"@") and stat.S_ISREG(int(mode, 8)) and payload != b"-" and content == b"-":
                yield _unescaped(payload), int(size)


def _invent(path: bytes, size: int) -> None:
    """Write a file of `size` bytes that is hard to confuse with another one: each end tells path and place."""
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    with open(path, "wb") as file:
        file.truncate(size)
        for offset in {0, size // 3, max(0, size - _CHUNK)}:
            file.seek(offset)
            file.write(
                hashlib.shake_128(b"%d %s" % (offset, os.path.basename(path))).digest(min(_CHUNK, size - offset))
            )


def _unescaped(text: bytes) -> bytes:
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 16)]) if match[1] else _ESCAPES.get(match[2], match[2]), text)


def _files(top: str) -> Iterator[str]:
    for directory, _, names in os.walk(top):
        yield from (os.path.join(directory, name) for name in names)


def _shared(path: str) -> str:
    absolute = os.path.join(SHARED, path)
    if not os.path.exists(absolute):
        raise ImageAbsent(f"../shared/{path} is not there")
    return absolute


IMAGES: dict[str, Callable[[str], TestImage]] = {
    "python": _python,
    "python-split": _python_split,
    "corners": _vector("corners"),
    "corners-filled": _filled("corners"),
    "whiteouts": _vector("whiteouts"),
    "random-12": _vector("random-12"),
    "random-12-filled": _filled("random-12"),
    "ostree": _ostree("bare.cfs"),
    "ostree-noverity": _ostree("bare-nov.cfs"),
}
