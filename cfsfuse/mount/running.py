"""A command for which an image is mounted, and nobody else: in namespaces of its own, gone when it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import signal
import tempfile
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from cfsfuse.errors import CfsError, HostError, UsageError
from cfsfuse.mount import job, ladder, namespaces, syscalls, tree_root
from cfsfuse.mount.mountinfo import mount_at
from cfsfuse.mount.serving import Serving
from cfsfuse.mount.syscalls import Context, closing
from cfsfuse.mount.unmount import take_away
from cfsfuse.processes import adopting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cfsfuse.mount.job import Server
    from cfsfuse.mount.ladder import Tell
    from cfsfuse.mount.options import MountOptions
    from cfsfuse.mount.tree_root import Bind

    Warn = Callable[[str], None]

NOT_FOUND = 127
NOT_EXECUTABLE = 126
"""Exit codes of a command that cannot be started, as those of env(1) and the shells."""

_NEVER_HIDDEN = ("/", "/proc", "/dev")  # a server that opens /dev/null in its own tree waits for itself for ever
_USAGE, _IMPOSSIBLE = 2, 1  # how a child tells which error it has, besides its text
_PATIENCE = 10.0  # seconds for a server to end when its mount is gone: it takes a moment


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the tree is to be seen: `at` a directory, or for None as the root.

    In the root, `binds` are there, empty `tmpfs`, and the host's /proc, /dev and /sys. `writable` puts a layer on the
    tree that takes changes and is forgotten. The command starts in `directory`.
    """

    at: str | None = None
    writable: bool = False
    binds: tuple[Bind, ...] = ()
    tmpfs: tuple[str, ...] = ()
    directory: str | None = None


class Listener(NamedTuple):
    """Who is told what is left out, and what cannot be cleared up; and, if anybody, why a backend is chosen."""

    warn: Warn
    explain: Tell | None = None


def run(image: str, options: MountOptions, layout: Layout, command: Sequence[str], listener: Listener) -> int:
    """Run `command` and return its exit status; of one that a signal ends, 128 and the signal's number.

    When it ends, so do the processes that it has left: the tree goes. Raises a CfsError when the command cannot be
    started, with nothing mounted.
    """
    warn, explain = listener
    _check(options, layout)
    with contextlib.ExitStack() as stack:
        stack.enter_context(adopting())
        stack.enter_context(job.ended_by_signals())
        has_scratch = layout.at is None or layout.writable
        scratch = stack.enter_context(_scratch_directory(warn)) if has_scratch else ""
        namespaces.enter(follow=True)
        if has_scratch:
            stack.enter_context(_emptied(scratch))
        if layout.writable:
            options = options._replace(upperdir=_made(scratch, "upper"), workdir=_made(scratch, "work"))
        place = _made(scratch, "tree") if layout.at is None else layout.at
        path = os.path.realpath(place)
        ladder.mount(image, place, options, Serving.TIED, explain)
        servers = stack.enter_context(job.servers())
        stack.callback(_clear, path, servers, warn)
        return _run(command, place if layout.at is None else None, layout, warn)


def _check(options: MountOptions, layout: Layout) -> None:
    if layout.writable and options.upperdir is not None:
        raise UsageError("--writable and upperdir= are two places for what is written: give one of them")
    if layout.writable and options.read_only:
        raise UsageError("--writable and ro contradict each other: give one of them")
    if layout.at is not None and _is_needed(os.path.realpath(layout.at)):
        raise UsageError(f"--at {layout.at}: would hide what the mount itself needs: name another directory, or --root")


def _is_needed(path: str) -> bool:
    return path in _NEVER_HIDDEN or path.startswith("/proc/")


@contextlib.contextmanager
def _scratch_directory(warn: Warn) -> Iterator[str]:
    try:
        path = tempfile.mkdtemp(prefix="cfsfuse-run-")
    except OSError as error:
        raise HostError(f"no temporary directory: {error.strerror}; name a place for it with TMPDIR") from None
    try:
        yield path
    finally:
        try:
            os.rmdir(path)
        except FileNotFoundError:  # something that tidies up was quicker
            pass
        except OSError as error:  # the command has been there
            warn(f"{path}: cannot be removed: {error.strerror}")


@contextlib.contextmanager
def _emptied(directory: str) -> Iterator[None]:
    """Have a file system in memory in a directory, which leaves nothing."""
    try:
        with Context("tmpfs") as context, closing(context.mount(0)) as mount:
            syscalls.move_mount(mount, directory)
    except OSError as error:
        remedy = "allow it here, or use --at without --writable"
        raise HostError(f"no file system in memory: {error.strerror}; {remedy}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the command may have done it
            syscalls.umount(directory, syscalls.MNT_DETACH)


def _made(directory: str, name: str) -> str:
    path = os.path.join(directory, name)
    os.mkdir(path)
    return path


def _clear(path: str, servers: Sequence[Server], warn: Warn) -> None:
    """End what the command has left, take the tree away, and wait for the end of its servers.

    For that, since who runs this may want to remove the store. What does not end when it is killed hangs in a request
    to a server that is stuck, and ends when that does.
    """
    serving = {server.pid for server in servers if not server.has_ended()}
    hanging = job.end_children(serving.__contains__)
    _take_away(path)
    for server in servers:
        if not server.has_ended(0 if hanging else _PATIENCE):
            server.kill()
    for pid in job.end_children():
        warn(f"process {pid} does not end, although it has been killed")


def _take_away(path: str) -> None:
    """Unmount the tree, if it is still there; that asks nothing of a server."""
    with contextlib.suppress(CfsError, OSError):
        mounted = mount_at(path)
        if mounted is not None and mounted.is_composefs:
            take_away(path, lazy=True)


# --- The command ---


def _run(command: Sequence[str], root: str | None, layout: Layout, warn: Warn) -> int:
    reading, writing = os.pipe()
    with job.Signals() as signals, os.fdopen(reading, "rb") as pipe:
        pid = signals.fork()
        if pid == 0:
            _become(command, root, layout, warn, writing)
        os.close(writing)
        try:
            status = signals.attend(pid)
        finally:
            signals.ignore()  # it is too late for them, and they would interrupt the clearing up
        failure = pipe.read().decode(errors="surrogateescape")
    code = job.exit_status(status)
    if failure and code in (NOT_FOUND, NOT_EXECUTABLE):
        warn(failure)
    elif failure:
        raise (UsageError if code == _USAGE else HostError)(failure)
    return code


def _become(command: Sequence[str], root: str | None, layout: Layout, warn: Warn, writing: int) -> NoReturn:
    """Become the command; write what goes wrong."""
    status = _IMPOSSIBLE
    try:
        syscalls.die_with_parent(signal.SIGKILL)
        here = _working_directory()
        if root is not None:
            for warning in tree_root.enter(root, layout.binds, layout.tmpfs):
                warn(warning)
        _enter_directory(here, layout)
        status = NOT_EXECUTABLE
        os.execvp(command[0], list(command))  # noqa: S606 - what this is for
    except UsageError as error:
        status = _USAGE
        os.write(writing, os.fsencode(str(error)))
    except OSError as error:
        if status == NOT_EXECUTABLE and error.errno == errno.ENOENT:
            status = NOT_FOUND
        what = command[0] if status != _IMPOSSIBLE else error.filename or "the root"
        os.write(writing, os.fsencode(f"{what}: {error.strerror}"))
    except Exception as error:  # noqa: BLE001 - nobody else would tell
        os.write(writing, os.fsencode(str(error) or repr(error)))
    finally:
        os._exit(status)


def _working_directory() -> str | None:
    with contextlib.suppress(OSError):  # it has been removed
        return os.getcwd()
    return None


def _enter_directory(here: str | None, layout: Layout) -> None:
    """Go where the command is to start. `here` may be in the tree by now, and the working directory below it."""
    if layout.directory is not None:
        try:
            os.chdir(layout.directory)
        except OSError as error:
            raise UsageError(f"--chdir {layout.directory}: {error.strerror}") from None
    elif layout.at is not None and here is not None:
        with contextlib.suppress(OSError):
            os.chdir(here)
