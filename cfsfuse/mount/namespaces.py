"""Namespaces in which mounting is permitted: of mounts, and where that takes it of users, with the user as root.

user_namespaces(7), mount_namespaces(7).
"""

from __future__ import annotations

import contextlib
import errno
import os

from cfsfuse.errors import HostError
from cfsfuse.mount import syscalls
from cfsfuse.privilege import has_sys_admin

# What keeps an ordinary user from making a user namespace: a file of /proc/sys/kernel or user, and the value that does.
_OBSTACLES = {
    "user/max_user_namespaces": "0",
    "kernel/unprivileged_userns_clone": "0",
    "kernel/apparmor_restrict_unprivileged_userns": "1",
}
_ROOT_WITHOUT_CAPABILITY = (  # since Linux 5.12, user_namespaces(7)
    "namespaces: root needs CAP_SETFCAP to make them where it has no CAP_SYS_ADMIN: "
    "leave it one of them, or run as an ordinary user"
)


def enter(*, follow: bool = False) -> None:
    """Give this process mounts of its own, and the right to make some; raise HostError with what stands against it.

    With `follow`, those of the host come and go as they do there.
    """
    try:
        if not has_sys_admin():
            _enter_user_namespace()
        syscalls.unshare_mounts(follow=follow)
    except OSError as error:
        reason = "no more may be made" if error.errno == errno.ENOSPC else error.strerror
        raise HostError(f"namespaces: {reason}; {_remedy()}") from None


def _enter_user_namespace() -> None:
    uid, gid = os.geteuid(), os.getegid()
    syscalls.unshare_user()
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            try:
                os.write(file.fileno(), text.encode())
            except PermissionError:
                if uid == 0 and name == "uid_map":
                    raise HostError(_ROOT_WITHOUT_CAPABILITY) from None
                raise


def _remedy() -> str:
    """Return what would make user namespaces possible."""
    for name, value in _OBSTACLES.items():
        with contextlib.suppress(OSError), open(f"/proc/sys/{name}", encoding="ascii") as file:
            if file.read().strip() == value:
                return f"the administrator has to change {name.replace('/', '.')}, which is {value}"
    return "this container forbids them: allow user namespaces in it, or run outside"
