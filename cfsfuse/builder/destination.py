"""Where an image goes: a file that appears whole under its name, a stream that takes it as it comes, or nowhere."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING, NamedTuple, Protocol

from cfsfuse.access import LINKS_MAX
from cfsfuse.atomic import opened_directory, published
from cfsfuse.errors import HostError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cfsfuse.verity.digest import Bytes

    Write = Callable[[Bytes], object]
    Publish = Callable[[], object] | None

STANDARD_OUTPUT = "-"
_MODE = 0o666  # less the umask: the mode that fopen(3) makes files with
_PROC = "/proc"
# What is wrong with the path; everything else is for the host to put right.
_WRONG_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


class Destination(Protocol):
    """Where an image goes."""

    def opened(self, publish: Publish = None) -> contextlib.AbstractContextManager[Write]:
        """Yield what takes the bytes of the image; it is there when the block ends well. Raises HostError.

        `publish` is called before anybody can see the image, and as late as that allows: for what the image needs, and
        what nobody needs without it.
        """
        ...


class Nowhere:
    """For those who want the digest alone."""

    @contextlib.contextmanager
    def opened(self, publish: Publish = None) -> Iterator[Write]:
        if publish:
            publish()
        yield len


class NewFile(NamedTuple):
    """A file that is made anew, whatever has its name now; `label` is the path that was asked for."""

    directory: str
    name: str
    label: str

    @contextlib.contextmanager
    def opened(self, publish: Publish = None) -> Iterator[Write]:
        with (
            _named(self.label),
            opened_directory(self.directory) as directory,
            published(directory, os.fsencode(self.name), _MODE) as fd,
        ):
            yield _writer(fd)
            os.fsync(fd)  # a full disk may show here, when there is still nothing to take back
            if publish:
                publish()


class Stream(NamedTuple):
    """A descriptor that is written to as it is: a pipe, a device, a file that somebody else holds open.

    Its reader may use the image before it is whole.
    """

    fd: int
    label: str

    @contextlib.contextmanager
    def opened(self, publish: Publish = None) -> Iterator[Write]:
        if publish:
            publish()
        with _named(self.label):
            is_file = self.fd != 1 and stat.S_ISREG(os.fstat(self.fd).st_mode)
            if not is_file:
                yield _writer(self.fd)
                return
            os.ftruncate(self.fd, 0)
            try:
                yield _writer(self.fd)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(self.fd, 0)
                raise


@contextlib.contextmanager
def destination(path: str | None) -> Iterator[Destination]:
    """Yield where the image called `path` goes: `-` is standard output, None is nowhere.

    Symbolic links are followed as fopen(3) would, also one to a file that is not there yet. What exists and is no
    regular file, and what /proc names (`/proc/self/fd/3`, a descriptor that somebody passes on), is opened here and
    written to as it is. Raises UsageError or HostError, with nothing changed.
    """
    if path is None:
        yield Nowhere()
        return
    if path == STANDARD_OUTPUT:
        yield _stream(1, "standard output")
        return
    with _named(path):
        new_file = _new_file(path)
        # Without O_TRUNC: what is there may stay until there is something better.
        fd = -1 if new_file else os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY)
    if new_file:
        yield new_file
        return
    try:
        yield _stream(fd, path)
    finally:
        with _named(path):
            os.close(fd)


def _stream(fd: int, label: str) -> Stream:
    if os.isatty(fd):
        raise UsageError(f"{label}: is a terminal, which an image is not for; name a file, or redirect it")
    return Stream(fd, label)


def _new_file(path: str) -> NewFile | None:
    """Return the file to make for `path`, whatever it is now; None for what has to be written to as it is."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        status = None
    if status is not None and stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    if status is not None and not stat.S_ISREG(status.st_mode):
        return None
    directory, name = _place(path)
    if _is_proc(directory):
        return None
    _check_writable(path, directory, os.R_OK | os.W_OK | os.X_OK)  # read, for fsync
    if status is not None:  # a file that may not be written shall not be replaced either
        _check_writable(path, path, os.W_OK)
    return NewFile(directory, name, path)


def _place(path: str) -> tuple[str, str]:
    """Return the directory, without symbolic links, and the name in it that a file opened as `path` has.

    os.path.realpath would go on where a link of /proc names a descriptor: to a file that may have another name by now.
    """
    for _ in range(LINKS_MAX):
        parent, name = os.path.split(path)
        directory = os.path.realpath(parent or os.curdir)
        if not os.path.isdir(directory) or name in ("", os.curdir, os.pardir):
            raise OSError(errno.ENOENT, f"{parent or name}: no such directory")
        path = os.path.join(directory, name)
        if _is_proc(directory) or not os.path.islink(path):
            return directory, name
        path = os.path.join(directory, os.readlink(path))
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _is_proc(directory: str) -> bool:
    return directory == _PROC or directory.startswith(_PROC + "/")


def _check_writable(label: str, path: str, mode: int) -> None:
    if not os.access(path, mode, effective_ids=True):
        read_only = os.statvfs(path).f_flag & os.ST_RDONLY
        why = "on a read-only file system" if read_only else "not readable and writable for this user"
        raise HostError(f"{label}: cannot write the image: {path} is {why}")


@contextlib.contextmanager
def _named(label: str) -> Iterator[None]:
    """Turn an OSError of the block into UsageError or HostError with the name of the file."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        kind = UsageError if error.errno in _WRONG_PATH else HostError
        raise kind(f"{label}: cannot write the image: {error.strerror}") from None


def _writer(fd: int) -> Write:
    def write(data: Bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]

    return write
