"""An ordinary user who is root in namespaces of their own, as `unshare -Urm` makes them, or a rootless container."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from cfsfuse.contract.observe import checked
from integration.mounts import ORDINARY, SELF, eventually, require, running

if TYPE_CHECKING:
    from collections.abc import Iterator

    from integration.conftest import Account

_HOLDER = "cat"  # ends with its input, which is ours
_SUBORDINATES = 1 << 20  # the first of them, and how many: more than the images have owners
_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000  # include/uapi/linux/sched.h


class Inside:
    """A user namespace whose root is an ordinary user, and a mount namespace of it.

    `idmap` is a user namespace for a kernel mount whose owners are to look the same from inside as in the image.
    """

    def __init__(self, pid: int, idmap: str) -> None:
        """`pid` is that of a process inside."""
        self._pid = pid
        self.idmap = idmap
        entering = (require("nsenter"), "--target", str(pid), "--mount")
        self.user = ORDINARY._replace(prefix=(*entering, "--user", "--"))
        self.real_root = SELF._replace(prefix=(*entering, "--"))

    def become(self, _: Account) -> None:
        """Let this process, which is root's and has one thread, be one of the user's inside."""
        os.setgroups([])  # may be forbidden inside
        for kind, flag in (("user", _CLONE_NEWUSER), ("mnt", _CLONE_NEWNS)):
            fd = os.open(f"/proc/{self._pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
            checked(ctypes.CDLL(None, use_errno=True).setns(fd, flag))
            os.close(fd)
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)


@contextlib.contextmanager
def namespaces(*, has_subordinates: bool) -> Iterator[Inside]:
    """Yield namespaces, with all that is mounted in them gone in the end; skip, by name, where they cannot be made.

    They have root alone, or, with subordinate ids, as a rootless container has them, others as well.
    """
    if SELF.uid != 0:
        pytest.skip("needs root")
    with _namespaces() as large:
        for kind in ("uid", "gid"):
            with open(f"/proc/{large}/{kind}_map", "w", encoding="ascii") as file:
                file.write(f"0 {getattr(ORDINARY, kind)} 1\n1 {_SUBORDINATES} {_SUBORDINATES}")
        idmap = f"/proc/{large}/ns/user"
        if has_subordinates:
            yield Inside(large, idmap)
            return
        with _namespaces("--map-root-user") as pid:
            yield Inside(pid, idmap)


@contextlib.contextmanager
def _namespaces(*options: str) -> Iterator[int]:
    """Yield the pid of a process of the ordinary user's in namespaces of its own."""
    unshare = (require("unshare"), "--user", *options, "--mount", "--propagation", "private")
    command = [*ORDINARY.prefix, *unshare, _HOLDER]
    pipe = subprocess.PIPE
    with running(subprocess.Popen(command, cwd="/", stdin=pipe, stderr=pipe, text=True)) as process:

        def is_there() -> bool:
            if process.poll() is not None:
                pytest.skip(f"unshare --user --mount: {process.communicate()[1].strip()}")
            with open(f"/proc/{process.pid}/comm", encoding="ascii") as file:
                return file.read().strip() == _HOLDER

        eventually(is_there, "namespaces")
        yield process.pid
