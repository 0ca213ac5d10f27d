"""Holding a mount against the kernel's own mount of the same image: each check in a child process, as who looks."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import warnings
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import pytest

from cfsfuse.contract.differences import differences
from cfsfuse.contract.entries import require_read_only
from cfsfuse.errors import printable
from integration import kernel
from integration.conftest import Account, deadline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cfsfuse.contract.entries import Entry
    from integration.images import TestImage

CHECK_SECONDS = 60
_SHOWN = 20


def become(account: Account) -> None:
    """Let this process be one of `account`."""
    os.setgroups([])
    os.setresgid(account.gid, account.gid, account.gid)
    os.setresuid(account.uid, account.uid, account.uid)


class Pair(NamedTuple):
    """The mount that is tested and the kernel's, of one image, and the user who looks, as `become` makes one.

    `entries` are those that root sees in the kernel's; `missing` the files whose objects it does not find either, as a
    log names them. `complaints` gives what the mount has logged since the last call and nobody claims.
    """

    mount: str
    oracle: str
    looking: Account
    entries: list[Entry]
    missing: frozenset[str]
    complaints: Callable[[], list[str]] = list
    become: Callable[[Account], None] = become


@contextlib.contextmanager
def oracle_mount(image: TestImage, mountpoint: str) -> Iterator[None]:
    """Let the kernel mount `image` for a while; skip where it cannot."""
    if os.getuid() != 0:
        pytest.skip("needs root: the kernel mount is the oracle")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(kernel.mounted(image.path, image.base_directories, mountpoint))
        except OSError as error:
            pytest.skip(f"this kernel cannot mount composefs: {error}")
        yield


def missing_objects(oracle: str, entries: list[Entry]) -> frozenset[str]:
    """Return the files, as a log names them, whose objects the kernel does not find either."""
    found = []
    for entry in entries:
        if entry.is_regular:
            try:
                os.close(os.open(os.fsencode(oracle) + entry.path, os.O_RDONLY))
            except FileNotFoundError:
                found.append(printable(entry.path))
    return frozenset(found)


def hold(pair: Pair, check: str) -> None:
    """Assert that a check observes the same on both mounts, and anything at all."""
    found, observed = _look(check, pair)
    assert pair.complaints() == []
    assert not found, f"{len(found)} differences:\n" + "\n".join(found[:_SHOWN])
    # A check that looks at nothing would pass on anything.
    assert observed or check == "special", "nothing was observed"


def _look(check: str, pair: Pair) -> tuple[list[str], int]:
    """Hold `check` in a child process, as the user who looks; return what differs and how much was observed."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # faulthandler's watchdog is a thread, about which fork warns from Python 3.12 on; the child does not need it.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os.close(reading)
        _look_in_child(check, pair, writing)
    os.close(writing)
    try:
        answer = _read_all(reading)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    assert answer.endswith(b"]"), f"the child ended with status {os.waitstatus_to_exitcode(status)}: {answer!r}"
    found, observed = json.loads(answer)
    return found, observed


def _look_in_child(check: str, pair: Pair, writing: int) -> NoReturn:
    try:
        pair.become(pair.looking)
        mount, oracle = os.fsencode(pair.mount), os.fsencode(pair.oracle)
        for root in (mount, oracle):
            require_read_only(root)
        counts: list[int] = []
        found = [str(each) for each in differences(check, mount, oracle, _chosen(pair), counts.append)]
        answer = json.dumps([found, sum(counts)])
    except BaseException as error:  # noqa: BLE001  # the parent fails the test with it
        answer = f"{type(error).__name__}: {error}"
    with contextlib.suppress(BaseException), os.fdopen(writing, "wb") as pipe:
        pipe.write(answer.encode("utf-8", "backslashreplace"))
    os._exit(0)


def _chosen(pair: Pair) -> list[Entry]:
    """Return what to look at: everything, but of thousands of files without objects, each searched for, a few."""
    return [entry for entry in pair.entries if entry.sampled or printable(entry.path) not in pair.missing]


def _read_all(fd: int) -> bytes:
    left = deadline(CHECK_SECONDS)
    chunks: list[bytes] = []
    while select.select([fd], [], [], left())[0]:
        chunk = os.read(fd, 1 << 20)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)
    raise AssertionError(f"no answer within {CHECK_SECONDS} s: the mount hangs")
