"""A command for which an image is mounted, and nobody else: in namespaces of its own, gone when it ends.

Where mounting is not permitted, a user namespace is made first, in which the user is root: user_namespaces(7).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import signal
import stat
import tempfile
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from cfsfuse.errors import CfsError, HostError, UsageError
from cfsfuse.mount import ladder, syscalls
from cfsfuse.mount.daemon import Serving
from cfsfuse.mount.syscalls import Context, closing
from cfsfuse.mount.unmount import unmount
from cfsfuse.privilege import has_sys_admin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cfsfuse.mount.options import MountOptions

NOT_FOUND = 127
NOT_EXECUTABLE = 126
"""Exit codes of a command that cannot be started, as those of env(1) and the shells."""

_HOST_TREES = ("/proc", "/dev", "/sys")
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_OF_THE_TERMINAL = (signal.SIGINT, signal.SIGQUIT)  # the command gets them itself

# What keeps an ordinary user from making a user namespace: a file of /proc/sys/kernel or user, and the value that does.
_OBSTACLES = {
    "user/max_user_namespaces": "0",
    "kernel/unprivileged_userns_clone": "0",
    "kernel/apparmor_restrict_unprivileged_userns": "1",
}


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

    `warn` is told of what is left out. Raises a CfsError when the command cannot be started, with nothing mounted.
    """
    if layout.writable and options.upperdir is not None:
        raise UsageError("--writable and upperdir= are two places for what is written: give one of them")
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(_scratch_directory())
        _enter_namespaces()
        if layout.at is None or layout.writable:
            stack.enter_context(_emptied(scratch))
        if layout.writable:
            options = dataclasses.replace(options, upperdir=_made(scratch, "upper"), workdir=_made(scratch, "work"))
        place = _made(scratch, "tree") if layout.at is None else layout.at
        ladder.mount(image, place, options, Serving.TIED)
        stack.callback(_unmount, place)
        return _run(command, place if layout.at is None else None, layout, warn)


@contextlib.contextmanager
def _scratch_directory() -> Iterator[str]:
    path = tempfile.mkdtemp(prefix="cfsfuse-run-")
    try:
        yield path
    finally:
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


def _unmount(place: str) -> None:
    with contextlib.suppress(CfsError):  # the command may have done it
        unmount(place, lazy=True)


# --- Namespaces ---


def _enter_namespaces() -> None:
    """Give this process mounts of its own, and the right to make some."""
    try:
        if not has_sys_admin():
            _enter_user_namespace()
        syscalls.unshare_mounts()
    except OSError as error:
        raise HostError(f"namespaces: {error.strerror}; {_remedy()}") from None


def _enter_user_namespace() -> None:
    uid, gid = os.geteuid(), os.getegid()
    syscalls.unshare_user()
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _remedy() -> str:
    """Return what would make user namespaces possible."""
    for name, value in _OBSTACLES.items():
        with contextlib.suppress(OSError), open(f"/proc/sys/{name}", encoding="ascii") as file:
            if file.read().strip() == value:
                return f"the administrator has to change {name.replace('/', '.')}, which is {value}"
    return "this container forbids them: allow user namespaces in it, or run outside"


# --- The command ---


def _run(command: Sequence[str], root: str | None, layout: Layout, warn: Callable[[str], None]) -> int:
    reading, writing = os.pipe()
    with _signals_for_the_command() as forward_to:
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            _become(command, root, layout, writing)
        forward_to(pid)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            *warnings, failure = pipe.read().decode(errors="backslashreplace").split("\n")
        for warning in warnings:
            warn(warning)
        _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if failure and code in (NOT_FOUND, NOT_EXECUTABLE):
        warn(failure)
    elif failure:
        raise HostError(failure)
    return code if code >= 0 else 128 - code


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
    """Become the command; write what goes wrong, warnings as lines before it."""
    status = 1
    try:
        syscalls.die_with_parent(signal.SIGKILL)
        for number in (*_FORWARDED, *_OF_THE_TERMINAL):
            if signal.getsignal(number) is not signal.SIG_IGN or number in _OF_THE_TERMINAL:
                signal.signal(number, signal.SIG_DFL)
        if root is not None:
            for warning in _enter_root(root, layout):
                os.write(writing, f"{warning}\n".encode(errors="backslashreplace"))
        if layout.directory is not None:
            os.chdir(layout.directory)
        status = NOT_EXECUTABLE
        os.execvp(command[0], list(command))  # noqa: S606 - what this is for
    except OSError as error:
        if status == NOT_EXECUTABLE and error.errno == errno.ENOENT:
            status = NOT_FOUND
        what = command[0] if status != 1 else error.filename or "the root"
        os.write(writing, f"{what}: {error.strerror}".encode(errors="backslashreplace"))
    except CfsError as error:
        os.write(writing, str(error).encode(errors="backslashreplace"))
    finally:
        os._exit(status)


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
    for mount, bind in bound:
        _attach(mount, bind.target)
    for path in layout.tmpfs:
        with Context("tmpfs") as context:
            _attach(context.mount(syscalls.ATTR_NOSUID | syscalls.ATTR_NODEV), path)


def _opened(bind: Bind) -> int:
    try:
        mount = syscalls.open_tree(bind.source)
        if bind.read_only:
            syscalls.set_read_only(mount)
    except OSError as error:
        raise UsageError(f"{bind.source}: cannot be bound: {error.strerror}") from None
    return mount


def _has_directory(path: str) -> bool:
    """Return whether a directory is there; where changes are taken it is made."""
    with contextlib.suppress(OSError):
        os.mkdir(path)
    return os.path.isdir(path)


def _attach(mount: int, target: str) -> None:
    """Attach a mount in the tree, at a place that is made where the tree takes changes."""
    try:
        if not os.path.lexists(target):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            if stat.S_ISDIR(os.fstat(mount).st_mode):
                os.mkdir(target)
            else:
                os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
        syscalls.move_mount(mount, target)
    except OSError as error:
        hint = "; it is not in the image: --writable lets it be made" if error.errno == errno.EROFS else ""
        raise UsageError(f"{target}: nothing can be mounted there: {error.strerror}{hint}") from None
