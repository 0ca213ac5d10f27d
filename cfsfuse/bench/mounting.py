"""A mount for the length of a block, made by a command; whatever happens, nothing of it stays."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import tempfile
import time
from typing import IO, TYPE_CHECKING, NamedTuple

from cfsfuse.bench.failure import ColumnFailed
from cfsfuse.bench.processes import bounded, servers
from cfsfuse.mount import syscalls
from cfsfuse.mount.mountinfo import mount_at
from cfsfuse.privilege import has_sys_admin
from cfsfuse.processes import undisturbed, within

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from cfsfuse.processes import Started

MOUNT_PATIENCE = 60.0  # seconds, at most, for a mount
_END_PATIENCE = 10.0  # for an unmount, and then for the end of the server
_SHORT = 2.0  # for the same where something has gone wrong
_GRACE = 3.0  # for a mount command to end when it is to be given up: half a mount cannot be taken away
_LAST_WORDS = 400
_FORCED = syscalls.MNT_DETACH | 1  # MNT_FORCE, include/linux/fs.h: ends the requests that no server answers


class Place(NamedTuple):
    """Where to mount, an absolute path without symlinks; and what the benchmark has started, all of it for a mount."""

    mountpoint: str
    started: Started


class Mounted(NamedTuple):
    """A mount: where, the processes that serve it, and the seconds from the start of the command to an answer."""

    mountpoint: str
    servers: tuple[int, ...]
    ready: float


@contextlib.contextmanager
def mounted(
    command: list[str],
    environment: Mapping[str, str],
    place: Place,
    patience: float,
    warn: Callable[[str], None],
) -> Iterator[Mounted]:
    """Mount by `command`, which returns when the mount is there and leaves a server, if any, in the background.

    Raises ColumnFailed when it cannot be mounted or unmounted, each in so many seconds. A server that stays after a
    good unmount is killed, and `warn` told of it.
    """
    mountpoint = place.mountpoint
    process: subprocess.Popen[bytes] | None = None
    left = _SHORT  # who fails or is interrupted shall not keep us waiting
    problem = None
    with tempfile.TemporaryFile() as said:
        try:
            start = time.perf_counter()
            # In a session of its own: an interrupt must not hit a mount half made.
            with undisturbed():
                process = _start(command, environment, said)
            _wait(process, said, min(patience, MOUNT_PATIENCE))
            _list_root(mountpoint, min(patience, MOUNT_PATIENCE))
            seconds = time.perf_counter() - start
            if mount_at(mountpoint) is None:
                raise ColumnFailed("its command ends well, but has mounted nothing at the mount point")
            yield Mounted(mountpoint, servers(place.started), seconds)
            left = min(patience, _END_PATIENCE)
        finally:
            if process is not None:
                with undisturbed():
                    problem = _end(process, place, left, warn)
    if problem is not None:
        raise ColumnFailed(problem)


def _start(command: list[str], environment: Mapping[str, str], said: IO[bytes]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise ColumnFailed(f"{command[0]}: cannot be started: {error.strerror}") from None


def _wait(process: subprocess.Popen[bytes], said: IO[bytes], patience: float) -> None:
    # Popen.wait with a timeout looks now and then only: of 70 ms it makes 115.
    with syscalls.closing(os.pidfd_open(process.pid)) as ending:
        poll = select.poll()
        poll.register(ending, select.POLLIN)
        if not poll.poll(patience * 1000):
            raise ColumnFailed(f"its command does not return within {patience:g} s")
    status = process.wait()
    if status:
        said.seek(0)
        lines = os.fsdecode(said.read()).split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "without a word")
        raise ColumnFailed(f"its command ends with status {status}: {last[:_LAST_WORDS]}")


def _list_root(mountpoint: str, patience: float) -> None:
    # subprocess.run would wait for it without a bound once time is up, and what hangs in a server cannot be killed.
    listing = subprocess.Popen(
        ["ls", "--", mountpoint], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        _, said = listing.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        raise ColumnFailed(f"ls of its root does not end within {patience:g} s") from None
    finally:
        if listing.stderr is not None:
            listing.stderr.close()
    if listing.returncode:
        raise ColumnFailed(f"ls of its root: {os.fsdecode(said).strip()[:_LAST_WORDS]}")


def _end(process: subprocess.Popen[bytes], place: Place, patience: float, warn: Callable[[str], None]) -> str | None:
    """Unmount and wait for the server's end; detach and kill what does not go, and return what kept it from unmounting.

    A server outlives its unmount also where somebody has made a mount namespace meanwhile, which has a copy of the
    mount: that speaks against nobody's figures.
    """
    problem = None
    started = place.started
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        started.end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    if not within(patience, lambda: _is_unmounted(place.mountpoint)):
        problem = f"does not unmount within {patience:g} s"
    elif not within(patience, lambda: not started.living()):
        warn(f"its server does not end within {patience:g} s of the unmount: killed")
    started.end()
    # What hangs in a server that is not below us ends with the connection, which this takes away.
    within(_GRACE, lambda: _is_unmounted(place.mountpoint, lazy=True))
    started.end()
    return problem


def _is_unmounted(mountpoint: str, *, lazy: bool = False) -> bool:
    """Return whether nothing is mounted there, after an attempt to take away what is."""
    if mount_at(mountpoint) is not None:
        with contextlib.suppress(ColumnFailed):
            bounded(lambda: _unmount(mountpoint, lazy=lazy), _GRACE)
    return mount_at(mountpoint) is None


def _unmount(mountpoint: str, *, lazy: bool) -> tuple[()]:
    if has_sys_admin():
        syscalls.umount(mountpoint, syscalls.UMOUNT_NOFOLLOW | (_FORCED if lazy else 0))
    else:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", mountpoint]
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return ()


class Scratch(NamedTuple):
    """A temporary directory: a mount point for each column, a log, and a cache, for the user's is left alone."""

    path: str

    @property
    def log(self) -> str:
        return os.path.join(self.path, "log")

    @property
    def cache(self) -> str:
        return os.path.join(self.path, "cache")

    def mountpoint(self, column: int) -> str:
        """Return the path of a mount point, which is there."""
        path = os.path.join(self.path, f"mnt{column}")
        os.makedirs(path, exist_ok=True)
        return path


@contextlib.contextmanager
def scratch_directory() -> Iterator[Scratch]:
    """Yield a scratch directory, named as the mount table will name it; it is gone afterwards."""
    with contextlib.ExitStack() as stack:
        with undisturbed():
            scratch = Scratch(os.path.realpath(tempfile.mkdtemp(prefix="cfsfuse-bench-")))
            stack.callback(_remove, scratch)
        yield scratch


def _remove(scratch: Scratch) -> None:
    """Remove what we have put there, and no more: what a program has mounted is not ours to empty."""
    with undisturbed(), contextlib.suppress(OSError):
        for name in os.listdir(scratch.path):
            path = os.path.join(scratch.path, name)
            if path == scratch.cache:
                shutil.rmtree(path, ignore_errors=True)
            elif path == scratch.log:
                os.unlink(path)
            else:
                os.rmdir(path)
        os.rmdir(scratch.path)
