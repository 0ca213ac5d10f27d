"""A command for which an image is mounted, and nobody else: in namespaces of its own, gone when it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import resource
import select
import signal
import stat
import tempfile
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from cfsfuse.errors import CfsError, HostError, UsageError
from cfsfuse.mount import ladder, namespaces, syscalls
from cfsfuse.mount.daemon import Serving
from cfsfuse.mount.syscalls import Context, closing
from cfsfuse.mount.unmount import unmount

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cfsfuse.mount.options import MountOptions

NOT_FOUND = 127
NOT_EXECUTABLE = 126
"""Exit codes of a command that cannot be started, as those of env(1) and the shells."""

_HOST_TREES = ("/proc", "/dev", "/sys")
_NEVER_HIDDEN = ("/", "/proc", "/dev")  # a server that opens /dev/null in its own tree waits for itself for ever
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_OF_THE_TERMINAL = (signal.SIGINT, signal.SIGQUIT)  # the command gets them itself
_OF_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)  # which it ignores, but commands rely on
_ORPHANED = signal.SIGALRM  # tells the process that does the work that the one above it has been killed
_USAGE, _IMPOSSIBLE = 2, 1  # how a child tells which error it has, besides its text
_PATIENCE = 10  # seconds for a server to end when its mount is gone: it takes a moment


class Bind(NamedTuple):
    """What of the host is to be seen in the tree; paths are absolute."""

    source: str
    target: str
    read_only: bool = False


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


def run(image: str, options: MountOptions, layout: Layout, command: Sequence[str], warn: Callable[[str], None]) -> int:
    """Run `command` and return its exit status; of one that a signal ends, 128 and the signal's number.

    When it ends, so do the processes that it has left: the tree goes. `warn` is told of what is left out. Raises a
    CfsError when the command cannot be started, with nothing mounted.
    """
    _check(options, layout)
    syscalls.adopt_orphans()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)  # a server raises it
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ended_by_signals())
        has_scratch = layout.at is None or layout.writable
        scratch = stack.enter_context(_scratch_directory()) if has_scratch else ""
        namespaces.enter()
        if has_scratch:
            stack.enter_context(_emptied(scratch))
        if layout.writable:
            options = dataclasses.replace(options, upperdir=_made(scratch, "upper"), workdir=_made(scratch, "work"))
        place = _made(scratch, "tree") if layout.at is None else layout.at
        ladder.mount(image, place, options, Serving.TIED)
        servers = _children()
        stack.callback(_unmount, place, servers)
        stack.callback(_end_what_is_left, servers)
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        return _run(command, place if layout.at is None else None, layout, warn)


def apart() -> int | None:
    """Go on in a child process, returning None there; here return its exit status when it has ended.

    Should this process be killed, the child ends the command with all that it has started, and leaves nothing.
    """
    us = os.getpid()
    pid = os.fork()
    if pid == 0:
        signal.signal(_ORPHANED, _end)
        syscalls.die_with_parent(_ORPHANED)
        if os.getppid() != us:
            signal.raise_signal(_ORPHANED)
        return None
    with _signals_for_the_command() as forward_to:
        forward_to(pid)
        _, status = os.waitpid(pid, 0)
    return _exit_status(status)


def _end(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let signals end this process as an exception does, so that nothing stays behind.

    In a server that is forked meanwhile they have their default effect, until it has handlers of its own.
    """
    us = os.getpid()

    def end(number: int, frame: object) -> None:
        for later in before:
            signal.signal(later, signal.SIG_IGN)  # a second one would interrupt the clearing up
        if os.getpid() == us:
            _end(number, frame)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    before = {number: signal.signal(number, end) for number in _FORWARDED if _is_heard(number)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check(options: MountOptions, layout: Layout) -> None:
    if layout.writable and options.upperdir is not None:
        raise UsageError("--writable and upperdir= are two places for what is written: give one of them")
    if layout.writable and options.read_only:
        raise UsageError("--writable and ro contradict each other: give one of them")
    if layout.at is not None and os.path.realpath(layout.at) in _NEVER_HIDDEN:
        raise UsageError(f"--at {layout.at}: would hide what the mount itself needs: name another directory, or --root")


@contextlib.contextmanager
def _scratch_directory() -> Iterator[str]:
    try:
        path = tempfile.mkdtemp(prefix="cfsfuse-run-")
    except OSError as error:
        raise HostError(f"no temporary directory: {error.strerror}; name a place for it with TMPDIR") from None
    try:
        yield path
    finally:
        with contextlib.suppress(FileNotFoundError):  # something that tidies up was quicker
            os.rmdir(path)


@contextlib.contextmanager
def _emptied(directory: str) -> Iterator[None]:
    """Have a file system in memory in a directory, which leaves nothing."""
    with Context("tmpfs") as context, closing(context.mount(0)) as mount:
        syscalls.move_mount(mount, directory)
    try:
        yield
    finally:
        syscalls.umount(directory, syscalls.MNT_DETACH)


def _made(directory: str, name: str) -> str:
    path = os.path.join(directory, name)
    os.mkdir(path)
    return path


def _unmount(place: str, servers: Sequence[int]) -> None:
    """Take the tree away and wait for the end of its servers: who runs this may want to remove the store."""
    with contextlib.suppress(CfsError):  # the command may have done it
        unmount(place, lazy=True)
    for pid in servers:
        with closing(os.pidfd_open(pid)) as fd:
            if not select.select([fd], [], [], _PATIENCE)[0]:
                os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# --- Processes ---


def _children() -> list[int]:
    pid = os.getpid()
    with contextlib.suppress(OSError), open(f"/proc/self/task/{pid}/children", encoding="ascii") as file:
        return [int(word) for word in file.read().split()]
    return []


def _end_what_is_left(servers: Sequence[int]) -> None:
    """Kill the children that are no servers; when one ends its own children become ours, and their turn comes."""
    while left := set(_children()).difference(servers):
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        for pid in left:
            os.waitpid(pid, 0)


def _exit_status(status: int) -> int:
    """Return for a status of waitpid(2) the one that a shell would have."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


# --- The command ---


def _run(command: Sequence[str], root: str | None, layout: Layout, warn: Callable[[str], None]) -> int:
    reading, writing = os.pipe()
    heard = [number for number in (*_FORWARDED, *_OF_THE_TERMINAL) if _is_heard(number)]
    with _signals_for_the_command() as forward_to:
        pid = _fork_with_default_signals(heard)
        if pid == 0:
            os.close(reading)
            _become(command, root, layout, writing)
        forward_to(pid)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            *warnings, failure = pipe.read().decode(errors="surrogateescape").split("\0")
        for warning in warnings:
            warn(warning)
        _, status = os.waitpid(pid, 0)
    code = _exit_status(status)
    if failure and code in (NOT_FOUND, NOT_EXECUTABLE):
        warn(failure)
    elif failure:
        raise (UsageError if code == _USAGE else HostError)(failure)
    return code


def _fork_with_default_signals(heard: Sequence[int]) -> int:
    """Fork; no signal is lost to a handler of ours in the child, where those `heard` have their default effect."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    pid = os.fork()
    if pid == 0:
        for number in (*heard, *_OF_PYTHON):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


@contextlib.contextmanager
def _signals_for_the_command() -> Iterator[Callable[[int], None]]:
    """Leave the terminal's signals to the command and pass on others: until the process is known, they wait."""
    pids: list[int] = []
    early: list[int] = []

    def forward(number: int, _frame: object) -> None:
        if not pids:
            early.append(number)
        for pid in pids:
            os.kill(pid, number)

    def forward_to(pid: int) -> None:
        pids.append(pid)
        for number in early:
            os.kill(pid, number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED if _is_heard(number)}
    before |= {number: signal.signal(number, signal.SIG_IGN) for number in _OF_THE_TERMINAL if _is_heard(number)}
    try:
        yield forward_to
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_heard(number: int) -> bool:
    return signal.getsignal(number) is not signal.SIG_IGN


def _become(command: Sequence[str], root: str | None, layout: Layout, writing: int) -> NoReturn:
    """Become the command; write what goes wrong, warnings before it, each of them ended by a null byte."""
    status = _IMPOSSIBLE
    try:
        syscalls.die_with_parent(signal.SIGKILL)
        here = _working_directory()
        if root is not None:
            for warning in _enter_root(root, layout):
                os.write(writing, os.fsencode(warning) + b"\0")
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


def _enter_root(root: str, layout: Layout) -> Iterator[str]:
    """Make the tree at `root` the root, with all that is to be seen there; yield warnings.

    Mounts go in when it is the root already: no symlink of the image leads out of it then.
    """
    syscalls.unshare_mounts()
    host = [(syscalls.open_tree(path), path) for path in _HOST_TREES if os.path.isdir(path)]
    bound = [(_opened(bind), bind) for bind in layout.binds]
    os.chdir(root)
    syscalls.pivot_root()
    for mount, path in host:
        if not _has_directory(path):
            yield f"{path}: not in the image, and not to be seen"
        else:
            syscalls.move_mount(mount, path)
    for path in layout.tmpfs:
        with Context("tmpfs") as context:
            _attach(context.mount(syscalls.ATTR_NOSUID | syscalls.ATTR_NODEV), path)
    for mount, bind in bound:
        _attach(mount, bind.target)


def _opened(bind: Bind) -> int:
    try:
        mount = syscalls.open_tree(bind.source)
        if bind.read_only:
            syscalls.set_read_only(mount)
    except OSError as error:
        raise UsageError(f"{bind.source}: cannot be bound: {error.strerror}") from None
    return mount


def _has_directory(path: str) -> bool:
    """Return whether a directory is there, and no link to one; where changes are taken it is made."""
    with contextlib.suppress(OSError):
        os.mkdir(path)
    return os.path.isdir(path) and not os.path.islink(path)


def _attach(mount: int, target: str) -> None:
    """Attach a mount in the tree, at a place that is made where the tree takes changes; links are those of the tree."""
    place = os.path.realpath(target)
    is_directory = stat.S_ISDIR(os.fstat(mount).st_mode)
    if place == "/":
        raise UsageError(f"{target}: the root of the tree cannot be hidden: name a place below it")
    try:
        if not os.path.lexists(place):
            _make(place, is_directory=is_directory)
        elif os.path.isdir(place) != is_directory:
            kinds = ("directory", "file") if is_directory else ("file", "directory")
            raise UsageError("{}: a {} cannot be shown at a {}".format(target, *kinds))
        syscalls.move_mount(mount, place)
    except OSError as error:
        reason = "Not a directory" if error.errno == errno.EEXIST else error.strerror
        hint = "; it is not in the image: --writable lets it be made" if error.errno == errno.EROFS else ""
        raise UsageError(f"{target}: nothing can be mounted there: {reason}{hint}") from None


def _make(place: str, *, is_directory: bool) -> None:
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if is_directory:
        os.mkdir(place)
    else:
        os.close(os.open(place, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
