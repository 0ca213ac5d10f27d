"""Options and what the host has → the backend of a mount. Pure: nothing is looked at here, `probe.py` does that.

The first backend of the ladder that can keep the promise asked for is taken. One that would verify less than that is
never taken: who wants it says `noverity`.
"""

from __future__ import annotations

from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.errors import HostError
from cfsfuse.mount.options import AUTO, PYFUSE3
from cfsfuse.verification import Verification

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from cfsfuse.mount.options import MountOptions


class Backend(Enum):
    """The ways to mount an image, the preferred first. docs/backends.md says what each needs and gives."""

    KERNEL = "kernel"
    OVERLAY = "overlay"
    FUSE = "fuse"


class Fact(Enum):
    """What a host may have, and how people call it."""

    EROFS = "EROFS mounts"
    MOUNT = "mounts without a helper"
    KERNEL_VIEW = "kernel mounts of composefs images"
    FULL_VIEW = "the same, nothing hidden or added"
    USER_OVERLAY = "overlayfs with user.* xattrs"
    USER_OVERLAY_DATA = "the same with data-only layers"
    OVERLAY_VERITY = "overlayfs that verifies"
    OBJECTS_VERITY = "objects with fs-verity"
    FUSE = "/dev/fuse"
    FUSE_MOUNT = "FUSE mounts"
    NAMESPACES = "namespaces, for cfsfuse run"


UNTRIED = "cannot be tried without "
"""How a problem begins that is none by itself, but follows from that of another fact."""


class Verdict(NamedTuple):
    """What keeps a backend from being taken: nothing, when there are no `problems`."""

    backend: Backend
    problems: list[str]


def judge(options: MountOptions, look: Callable[[Fact], str | None], *, foreground: bool = False) -> Iterator[Verdict]:
    """Yield a verdict for each backend, the preferred first, with all that speaks against it.

    `look` says what is wrong with a fact and what would put it right, None when nothing is.
    """
    for backend in Backend:
        yield Verdict(backend, list(problems(backend, options, look, foreground=foreground)))


def choose(
    options: MountOptions,
    look: Callable[[Fact], str | None],
    *,
    foreground: bool = False,
    failed: Mapping[Backend, str] = MappingProxyType({}),
) -> Backend:
    """Return the backend for `options`, looking at no more facts than needed; raise HostError when there is none.

    Those that have `failed`, in spite of all that was looked at, are told with the reason.
    """
    refused = []
    for backend in Backend:
        if options.backend in (AUTO, backend.value):
            found = problems(backend, options, look, foreground=foreground)
            problem = failed.get(backend) or next(found, None)
            if problem is None:
                return backend
            refused.append(f"{backend.value} backend: {problem}")
    raise HostError("; ".join(refused))


def problems(
    backend: Backend, options: MountOptions, look: Callable[[Fact], str | None], *, foreground: bool = False
) -> Iterator[str]:
    """Yield what speaks against a backend: first what costs the least to look at."""
    yield from (f"{name}= is not for it" for name in _CANNOT[backend] if getattr(options, name) is not None)
    if is_stacked(backend, options) and options.allow_other is False:
        yield "noallow_other is not for it: such a mount is there for everybody"
    if options.session == PYFUSE3 and is_stacked(backend, options):
        yield f"session={PYFUSE3} is not for it"
    if backend is Backend.KERNEL and foreground and options.backend == AUTO:
        yield "--foreground is for a server, which it has not"
    is_one_told = False
    for fact in _needs(backend, options):
        problem = look(fact)
        # What follows from a problem that is told needs no word of its own.
        if problem is not None and not (is_one_told and problem.startswith(UNTRIED)):
            is_one_told = True
            yield problem


_CANNOT = {Backend.KERNEL: ("uid", "gid"), Backend.OVERLAY: ("idmap",), Backend.FUSE: ("idmap",)}


def is_stacked(backend: Backend, options: MountOptions) -> bool:
    """Return whether the tree is shown by overlayfs: with FUSE, to take what is written."""
    return backend is not Backend.FUSE or options.upperdir is not None


def _needs(backend: Backend, options: MountOptions) -> Iterator[Fact]:
    """Yield the facts that a backend needs, in the order of what it costs to look at them."""
    if backend is Backend.KERNEL:
        yield Fact.EROFS
    else:
        yield Fact.FUSE
        yield Fact.MOUNT if is_stacked(backend, options) else Fact.FUSE_MOUNT
    if backend is Backend.FUSE:
        if options.upperdir is not None:
            yield Fact.USER_OVERLAY
        return
    if options.verification is not Verification.OFF:
        yield from (Fact.OVERLAY_VERITY, Fact.OBJECTS_VERITY)
    if backend is Backend.KERNEL:
        if options.backend != backend.value:  # who names it may have it with another view
            yield Fact.FULL_VIEW
        yield Fact.KERNEL_VIEW
    else:
        yield Fact.USER_OVERLAY_DATA
