"""Going to the background, and only then saying that all is well."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from cfsfuse.errors import CfsError, HostError
from cfsfuse.mount import syscalls
from cfsfuse.mount.places import log_file
from cfsfuse.processes import fork

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

log = logging.getLogger(__name__)


_SYSLOG = "/dev/log"
_READY = b"\0"


def launch(serve: Callable[[Callable[[], None]], object], not_ours: Iterable[int], *, tied: bool = False) -> None:
    """Run `serve` in a child process; return when it calls its argument, raise HostError with its reason otherwise.

    The parent waits on a pipe. The child is a session of its own. It closes `not_ours` at once, and the standard
    streams when it is ready: whoever reads from them, or waits for a lock on them, must not wait for the mount's end.
    With `tied` it unmounts when this process ends.
    """
    reading, writing = os.pipe()
    us = os.getpid()
    pid = fork()
    if pid == 0:

        def begin(ready: Callable[[], None]) -> None:
            os.close(reading)
            if tied:
                syscalls.die_with_parent(signal.SIGTERM)
                if os.getppid() != us:
                    raise HostError("the process that mounts has ended")
            for fd in not_ours:
                os.close(fd)
            serve(ready)

        _child(begin, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    if said == _READY:
        return
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    raise HostError(
        said.decode("utf-8", "replace") or f"the daemon ended with status {code} before the mount was usable"
    )


def _child(serve: Callable[[Callable[[], None]], object], writing: int) -> NoReturn:
    announced = False
    null = os.open(os.devnull, os.O_RDWR)  # now: the mount may hide it

    def ready() -> None:
        nonlocal announced
        sys.stdout.flush()
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        os.close(null)
        os.chdir("/")  # a daemon must not keep the file system busy that it was started from
        try:
            os.write(writing, _READY)
        except BrokenPipeError:
            raise HostError("the process that mounts has ended before the mount was usable") from None
        os.close(writing)
        announced = True

    def say(text: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(writing, text.encode(errors="backslashreplace"))

    status = 1
    try:
        os.setsid()
        serve(ready)
        status = 0
    except CfsError as error:
        if not announced:
            say(str(error))
        else:
            log.error("%s", error)  # noqa: TRY400 - the message says all of it
    except BaseException as error:
        log.exception("the daemon ends")
        if not announced:
            say(f"unexpected error: {error!r}")
    finally:
        logging.shutdown()
        os._exit(status)


def log_to(path: str | None, *, foreground: bool) -> None:
    """Send the log to the file `path`; without one to standard error in the foreground, else to the system's log.

    Where no system log listens, a file in the user's log directory takes it; where that cannot be, a word on standard
    error says so, and nothing keeps the log.
    """
    is_named = path is not None
    unwritable = None
    handler: logging.Handler
    style = "%(asctime)s %(levelname)s %(message)s"
    if path is None and foreground:
        handler = logging.StreamHandler()
    elif path is None and os.path.exists(_SYSLOG):
        from logging.handlers import SysLogHandler  # a kernel mount needs none of this

        handler = SysLogHandler(_SYSLOG)
        handler.ident = f"cfsfuse[{os.getpid()}]: "
        style = "%(message)s"
    else:
        try:
            if path is None:
                path = log_file()
                os.makedirs(os.path.dirname(path), exist_ok=True)
            handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            unwritable = f"{path}: cannot write the log: {error.strerror}; name another file with -o log="
            if is_named:
                raise HostError(unwritable) from None
            handler = logging.StreamHandler()  # which a daemon closes when it is ready: so much for that
    logging.basicConfig(level=logging.INFO, handlers=[handler], format=style)
    if unwritable is not None:
        log.warning("%s", unwritable)
