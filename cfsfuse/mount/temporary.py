"""Mounts for a while: one by each backend, in directories of their own, and nothing left of them whatever happens."""

from __future__ import annotations

import contextlib
import os
import tempfile
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.errors import HostError
from cfsfuse.mount.ladder import mount
from cfsfuse.mount.mountinfo import mount_at
from cfsfuse.mount.plan import Backend, choose, problems
from cfsfuse.mount.serving import Serving
from cfsfuse.mount.unmount import take_away
from cfsfuse.processes import Started, adopting, undisturbed
from cfsfuse.verification import Verification

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from cfsfuse.mount.options import MountOptions
    from cfsfuse.mount.plan import Fact

_PATIENCE = 10.0  # seconds that a server has for its end
_SHORT = 2.0  # the same where something has gone wrong, or somebody wants an end


class Offer(NamedTuple):
    """A backend, and the options by which it can mount; None where it cannot, for `problem`.

    With options, `problem` says why these do not verify although that was asked for.
    """

    backend: Backend
    options: MountOptions | None
    problem: str | None


class Attempt(NamedTuple):
    """A backend, where it has mounted the image, and what is to be said about it; None where it has not."""

    backend: Backend
    mountpoint: str | None
    problem: str | None


def offers(options: MountOptions, look: Callable[[Fact], str | None], named: Collection[str] = ()) -> list[Offer]:
    """Return how each backend of the ladder, or of those `named`, would mount for a look at it.

    One that lacks nothing but verification is offered without, unless `verity` is demanded: what is looked at is given
    to nobody. Raises HostError when one that is named cannot mount, with the reason and what would put it right.
    """
    is_demanded = options.verification is Verification.REQUIRED
    found = []
    for backend in Backend:
        if named and backend.value not in named:
            continue
        asked = options._replace(backend=backend.value) if named else options
        unverified = asked if is_demanded else asked._replace(verification=Verification.OFF)
        if named:
            choose(unverified, look)
        unmovable = "; ".join(problems(backend, unverified, look))
        if unmovable:
            found.append(Offer(backend, None, unmovable))
        else:
            unprovable = "; ".join(problems(backend, asked, look))
            taken = unverified if unprovable else asked
            found.append(Offer(backend, taken._replace(backend=backend.value), unprovable or None))
    return found


@contextlib.contextmanager
def mounted(image: str, offered: Collection[Offer], named: Collection[str] = ()) -> Iterator[list[Attempt]]:
    """Mount by each of what is `offered`, for as long as the block runs.

    A backend that fails in spite of all probes is an Attempt with its reason; HostError when it is one of those
    `named`. Standard output must be flushed before: the servers are forked from this process.
    """
    stack = contextlib.ExitStack()
    patience = _SHORT
    started = Started()
    try:
        with undisturbed():
            directory = os.path.realpath(tempfile.mkdtemp(prefix="cfsfuse-"))
            stack.enter_context(adopting())  # a server that is killed leaves one that watches over its mount
            stack.callback(_remove, directory)
            stack.callback(lambda: started.end(patience))
        yield [_attempt(image, offer, directory, stack, named) for offer in offered]
        patience = _PATIENCE
    finally:
        # All of it, however often somebody interrupts that.
        with undisturbed():
            stack.close()


def _attempt(image: str, offer: Offer, directory: str, stack: contextlib.ExitStack, named: Collection[str]) -> Attempt:
    if offer.options is None:
        return Attempt(offer.backend, None, offer.problem)
    mountpoint = os.path.join(directory, offer.backend.value)
    options = offer.options._replace(log=offer.options.log or f"{mountpoint}.log")
    try:
        # An interrupt in the middle would leave a server that mounts when nobody is there to unmount any more.
        with undisturbed():
            os.mkdir(mountpoint)
            stack.callback(_take_away, mountpoint)
            mount(image, mountpoint, options, Serving.TIED)
    except HostError as error:
        if named:
            raise
        return Attempt(offer.backend, None, str(error))
    return Attempt(offer.backend, mountpoint, offer.problem)


def _take_away(mountpoint: str) -> None:
    """Unmount what is there, in use or not, without asking its server; it may have been tidied up after already."""
    for lazy in (False, True):
        if mount_at(mountpoint) is not None:
            with contextlib.suppress(HostError):
                take_away(mountpoint, lazy=lazy)


def _remove(directory: str) -> None:
    """Remove the directory with its mount points and logs. Never what is below a mount point: it may be mounted."""
    try:
        for entry in list(os.scandir(directory)):
            (os.rmdir if entry.is_dir(follow_symlinks=False) else os.unlink)(entry.path)
        os.rmdir(directory)
    except OSError as error:
        raise HostError(f"{error.filename}: cannot be removed: {error.strerror}; unmount what is there") from None
