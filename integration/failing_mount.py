"""Mounts as `cfsfuse mount` does behind its probes, while one of the system calls of mounting fails.

A process of its own, for the server is forked from it: arguments are the number of the call, counted from 0, its errno,
image, mountpoint, backend, options. Prints as JSON how many calls there were, which one failed, and what was said then.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
from typing import TYPE_CHECKING

from cfsfuse.erofs.reader import Reader
from cfsfuse.errors import CfsError
from cfsfuse.imagefile import open_image
from cfsfuse.mount import fuse, syscalls
from cfsfuse.mount.options import parse
from cfsfuse.mount.plan import Backend
from cfsfuse.mount.serving import Serving

if TYPE_CHECKING:
    from collections.abc import Callable

# Without umount, which is clearing up: what cannot be taken away stays.
_CALLS = ("call", "old_mount")


class _Calls:
    """Counts the calls of this process and of the server together, and lets one of them fail."""

    def __init__(self, fails_at: int, number: int) -> None:
        self._fails_at = fails_at
        self._number = number
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)

    @property
    def count(self) -> int:
        return int.from_bytes(self._shared[:4], "little")

    @property
    def failed(self) -> str:
        return self._shared[4:].rstrip(b"\0").decode()

    def install(self) -> None:
        for name in _CALLS:
            setattr(syscalls, name, self._wrapped(name, getattr(syscalls, name)))

    def _wrapped(self, name: str, original: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            count = self.count
            self._shared[:4] = (count + 1).to_bytes(4, "little")
            if count == self._fails_at:
                text = f"{name}{arguments}".encode()[:1000]
                self._shared[4 : 4 + len(text)] = text
                raise OSError(self._number, os.strerror(self._number))
            return original(*arguments)

        return call


def main(fails_at: str, number: str, *words: str) -> None:
    image, mountpoint, backend, options = words
    calls = _Calls(int(fails_at), int(number))
    calls.install()
    opened = fuse.Opened(image, Reader(open_image(image, None)), [])
    said = None
    try:
        fuse.mount(opened, mountpoint, parse(options), Backend(backend), Serving.BACKGROUND)
    except CfsError as error:
        said = str(error)
    print(json.dumps({"count": calls.count, "failed": calls.failed, "said": said}))


main(*sys.argv[1:])
