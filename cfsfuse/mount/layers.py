"""The directories that overlayfs takes besides the image: those of contents, and those of what is written."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.errors import UsageError
from cfsfuse.mount.syscalls import closing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cfsfuse.mount.options import MountOptions


class Layers(NamedTuple):
    """Descriptors of directories; `upper` and `work` come together, or not at all."""

    data: list[int]
    upper: int | None
    work: int | None


class Stack(NamedTuple):
    """What stands on a layer of ours: `layers`, from which overlayfs takes contents, if it does, and what is written.

    With `has_data` our layer is metadata alone; without, it has verified contents as well.
    """

    layers: Layers
    has_data: bool


@contextlib.contextmanager
def opened_layers(options: MountOptions) -> Iterator[Layers]:
    """Yield the directories that `options` name; raise UsageError for what overlayfs would not take, or should not."""
    with contextlib.ExitStack() as stack:

        def opened(path: str, what: str) -> int:
            try:
                fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise UsageError(f"{path}: {what}: {error.strerror}") from None
            return stack.enter_context(closing(fd))

        data = [opened(path, "base directory") for path in options.basedir]
        if options.upperdir is None or options.workdir is None:
            yield Layers(data, None, None)
            return
        upper, work = opened(options.upperdir, "upperdir"), opened(options.workdir, "workdir")
        _check_writable_layer(options, upper, work, data)
        yield Layers(data, upper, work)


def _check_writable_layer(options: MountOptions, upper: int, work: int, data: list[int]) -> None:
    if os.fstat(upper).st_dev != os.fstat(work).st_dev:
        raise UsageError(f"workdir={options.workdir}: not on the file system of upperdir={options.upperdir}")
    if _is_inside(upper, work) or _is_inside(work, upper):
        raise UsageError(f"workdir={options.workdir}: must stand beside upperdir={options.upperdir}, in no part of it")
    for path, fd in zip(options.basedir, data, strict=True):
        for name, directory in (("upperdir", upper), ("workdir", work)):
            if _is_inside(directory, fd):
                raise UsageError(f"{name}: inside the object store {path}, which a mount must leave as it is")


def _is_inside(directory: int, above: int) -> bool:
    """Return whether `directory` is `above` or below it."""
    with contextlib.ExitStack() as stack:
        at = directory
        while True:
            here = os.fstat(at)
            if os.path.samestat(here, os.fstat(above)):
                return True
            at = stack.enter_context(closing(os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at)))
            if os.path.samestat(here, os.fstat(at)):
                return False
