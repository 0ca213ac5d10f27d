"""Mounts for a while: one by each backend, in directories of their own, and nothing left of them whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.errors import HostError, UsageError
from cfsfuse.mount.daemon import Serving
from cfsfuse.mount.ladder import mount
from cfsfuse.mount.mountinfo import mount_at
from cfsfuse.mount.plan import Backend, judge
from cfsfuse.mount.unmount import unmount
from cfsfuse.objects import Verification

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from cfsfuse.mount.options import MountOptions
    from cfsfuse.mount.plan import Fact

_PATIENCE = 10.0  # seconds that a server has for its end
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
    found = []
    for backend in Backend:
        if named and backend.value not in named:
            continue
        offer = _offer(backend, replace(options, backend=backend.value), look)
        if named and offer.options is None:
            raise HostError(f"{backend.value} backend: {offer.problem}")
        found.append(offer)
    return found


def _offer(backend: Backend, options: MountOptions, look: Callable[[Fact], str | None]) -> Offer:
    problem = _problem(backend, options, look)
    if problem is None:
        return Offer(backend, options, None)
    unverified = replace(options, verification=Verification.OFF)
    if options.verification is not Verification.REQUIRED and _problem(backend, unverified, look) is None:
        return Offer(backend, unverified, problem)
    return Offer(backend, None, problem)


def _problem(backend: Backend, options: MountOptions, look: Callable[[Fact], str | None]) -> str | None:
    verdict = next(each for each in judge(options, look) if each.backend is backend)
    return "; ".join(verdict.problems) or None


@contextlib.contextmanager
def mounted(image: str, offered: Collection[Offer], named: Collection[str] = ()) -> Iterator[list[Attempt]]:
    """Mount by each of what is `offered`, for as long as the block runs.

    A backend that fails in spite of all probes is an Attempt with its reason; HostError when it is one of those
    `named`. Standard output must be flushed before: the servers are forked from this process.
    """
    stack = contextlib.ExitStack()
    try:
        with undisturbed():
            directory = os.path.realpath(tempfile.mkdtemp(prefix="cfsfuse-compare-"))
            stack.callback(_remove, directory)
            stack.callback(_await_servers)
        yield [_attempt(image, offer, directory, stack, named) for offer in offered]
    finally:
        # All of it, however often somebody interrupts that.
        with undisturbed():
            stack.close()


def _attempt(image: str, offer: Offer, directory: str, stack: contextlib.ExitStack, named: Collection[str]) -> Attempt:
    if offer.options is None:
        return Attempt(offer.backend, None, offer.problem)
    mountpoint = os.path.join(directory, offer.backend.value)
    options = replace(offer.options, log=offer.options.log or f"{mountpoint}.log")
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


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let signals that end a program wait until the block has run. Servers forked in it set handlers of their own."""
    came: list[int] = []
    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _take_away(mountpoint: str) -> None:
    """Unmount what is there, in use or not; a server that has died may have been tidied up after already."""
    with contextlib.suppress(UsageError):
        if mount_at(mountpoint) is not None:
            try:
                unmount(mountpoint)
            except HostError:
                unmount(mountpoint, lazy=True)


def _await_servers() -> None:
    """Wait for the end of all child processes; kill what takes too long."""
    with contextlib.suppress(ChildProcessError):
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.01)
        for pid in _children():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
        return [int(pid) for pid in file.read().split()]


def _remove(directory: str) -> None:
    """Remove the directory with its mount points and logs. Never what is below a mount point: it may be mounted."""
    try:
        for entry in list(os.scandir(directory)):
            (os.rmdir if entry.is_dir(follow_symlinks=False) else os.unlink)(entry.path)
        os.rmdir(directory)
    except OSError as error:
        raise HostError(f"{error.filename}: cannot be removed: {error.strerror}; unmount what is there") from None
