"""Every call that would change something."""

from __future__ import annotations

import os
import stat
import struct
from typing import TYPE_CHECKING

from cfsfuse.contract.observe import NOT_TRIED, attempt, is_protected
from cfsfuse.contract.opening import open_result

if TYPE_CHECKING:
    from cfsfuse.contract.entries import Entry
    from cfsfuse.contract.observe import Observations

_ACL = struct.pack("<IHHIHHIHHI", 2, 1, 7, 0xFFFFFFFF, 4, 5, 0xFFFFFFFF, 0x20, 5, 0xFFFFFFFF)


def check_modify(path: bytes, entry: Entry) -> Observations:
    """Every call that would change an entry: each must fail, and with the errno that the oracle has for it."""
    if not entry.sampled:
        return {}
    if not is_protected(path):
        return {"modify": NOT_TRIED}
    seen = {
        "chown": attempt(os.chown, path, 1, 1, follow_symlinks=False),
        "chown to nobody else": attempt(os.chown, path, -1, -1, follow_symlinks=False),
        "utime": attempt(os.utime, path, (1, 1), follow_symlinks=False),
    }
    if not entry.is_root:  # the name of the root is in a directory outside of the mount
        seen |= _modify_name(path, path + b".contract-new")
    if not entry.is_symlink:  # these calls would follow it
        seen |= _modify_target(path) | _modify_inside(path, path + b"/contract-new")
    return seen | _modify_xattrs(path)


def _modify_name(path: bytes, beside: bytes) -> Observations:
    return {
        "unlink": attempt(os.unlink, path),
        "rmdir": attempt(os.rmdir, path),
        "rename": attempt(os.rename, path, beside),
        "rename to itself": attempt(os.rename, path, path),
        "rename onto it": attempt(os.rename, beside, path),
        "link": attempt(os.link, path, beside, follow_symlinks=False),
        "link onto it": attempt(os.link, path, path, follow_symlinks=False),
        "symlink": attempt(os.symlink, b"target", path),
        "mkdir": attempt(os.mkdir, path),
        "mkfifo": attempt(os.mkfifo, path),
        "mknod": attempt(os.mknod, path, stat.S_IFREG | 0o644),
    }


def _modify_target(path: bytes) -> Observations:
    return {
        "chmod": attempt(os.chmod, path, 0o777),
        "truncate": attempt(os.truncate, path, 0),
        "truncate to the same size": attempt(lambda: os.truncate(path, os.stat(path).st_size)),
        "utime now": attempt(os.utime, path),
    }


def _modify_inside(path: bytes, new: bytes) -> Observations:
    return {
        "rename into it": attempt(os.rename, path, new),
        "create inside": open_result(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL),
        "mkdir inside": attempt(os.mkdir, new),
        "symlink inside": attempt(os.symlink, b"target", new),
        "mkfifo inside": attempt(os.mkfifo, new),
        "unlink inside": attempt(os.unlink, new),
        "rmdir inside": attempt(os.rmdir, new),
        "rename inside": attempt(os.rename, new, new + b"-2"),
        "link inside": attempt(os.link, new, new + b"-2"),
    }


def _modify_xattrs(path: bytes) -> Observations:
    values = {
        **{f"{space}.contract": b"value" for space in ("user", "trusted", "security", "system", "unknown")},
        **{f"trusted.overlay.{name}": b"y" for name in ("opaque", "contract")},
        "system.posix_acl_access": _ACL,
        "system.posix_acl_default": _ACL,
        "security.capability": b"value",
        "contract": b"value",
    }
    seen: Observations = {}
    for name, value in values.items():
        for flags in (0, os.XATTR_CREATE, os.XATTR_REPLACE):
            seen[f"setxattr {name} {flags}"] = attempt(os.setxattr, path, name, value, flags, follow_symlinks=False)
        seen[f"removexattr {name}"] = attempt(os.removexattr, path, name, follow_symlinks=False)
    return seen
