"""stat, extended attributes, link targets, and what statvfs(3) says of the whole."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cfsfuse.contract.observe import Failure, attempt, opened, stat_fields
from cfsfuse.erofs.ondisk import NAME_MAX

if TYPE_CHECKING:
    from cfsfuse.contract.entries import Entry
    from cfsfuse.contract.observe import Observations


def check_stat(path: bytes, _: Entry) -> Observations:
    """Every field of lstat(2), twice: the second answer may come from a cache."""
    first = stat_fields("st_", attempt(os.lstat, path))
    return first | stat_fields("again st_", attempt(os.lstat, path))


def check_stat_open(path: bytes, _: Entry) -> Observations:
    """fstat(2) of a descriptor, which goes by the inode and not by the name."""
    with opened(path, os.O_PATH) as fd:
        return {"open": fd} if isinstance(fd, Failure) else stat_fields("fd st_", attempt(os.fstat, fd))


def check_xattrs(path: bytes, _: Entry) -> Observations:
    """Every listed xattr and its value; the order of a listing means nothing, a name that stands twice does."""
    names = attempt(os.listxattr, path, follow_symlinks=False)
    if not isinstance(names, list):
        return {"listxattr": names}
    values = {f"getxattr {name!r}": attempt(os.getxattr, path, name, follow_symlinks=False) for name in names}
    return {"listxattr": sorted(names), **values}


_ABSENT_XATTRS = (
    *("user.absent", "trusted.absent", "security.absent", "system.absent", "unknown.absent", "absent", ".", "absent."),
    *("user.", "trusted.", "security.", "system.", "userx", "user", "btrfs.absent", "os2.absent", "afs.absent"),
    *("system.posix_acl_access", "system.posix_acl_default", "system.posix_acl_access.x", "system.nfs4_acl"),
    *("security.capability", "security.selinux", "security.ima", "security.evm", "system.richacl"),
    *(f"trusted.overlay.{name}" for name in ("redirect", "metacopy", "opaque", "origin", "whiteout", "whiteouts")),
    *(f"trusted.overlay.overlay.{name}" for name in ("redirect", "metacopy", "opaque", "whiteout", "whiteouts")),
    *(f"user.overlay.{name}" for name in ("redirect", "metacopy", "opaque", "whiteout", "whiteouts", "overlay.opaque")),
    *("trusted.overlay.", "trusted.overlay", "trusted.overlay.overlay.", "user.overlay."),
    *("user." + "n" * (NAME_MAX - 5), "user." + "n" * (NAME_MAX - 4), "trusted.overlay." + "n" * (NAME_MAX - 16)),
    *("", "USER.absent", "user.absent\udcff"),
)


def check_xattrs_absent(path: bytes, entry: Entry) -> Observations:
    """Names that are probably absent, in every name space, and those that overlayfs keeps for itself."""
    if not entry.sampled:
        return {}
    return {name: attempt(os.getxattr, path, name, follow_symlinks=False) for name in _ABSENT_XATTRS}


def check_readlink(path: bytes, _: Entry) -> Observations:
    """The target of every link, and the failure on everything else."""
    return {"target": attempt(os.readlink, path)}


def check_statfs(path: bytes, entry: Entry) -> Observations:
    """statvfs(3) of the mount."""
    if not entry.is_root:
        return {}
    answer = os.statvfs(path)
    fields = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_namemax")
    return {field: getattr(answer, field) for field in fields} | {"f_flag": answer.f_flag}
