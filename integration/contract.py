"""The contract: one map of checks, each held against any mount with another mount of the same image as the oracle.

A check looks at one entry of one mount and returns what it observes, by name: it knows nothing of the other mount, nor
of what is right. `differences` makes the same observations on both and yields those that differ and are not in
`JUSTIFIED`. So a check cannot be wrong, only blind, and a call that fails is as good an observation as one that
succeeds: its errno is what is compared.

`python -m integration.contract MOUNT ORACLE [CHECK…]` does the same by hand.

Modifying calls are made in earnest, and must fail: both mounts must be read-only, which is checked first.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import fcntl
import fnmatch
import hashlib
import itertools
import mmap
import os
import socket
import stat
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

Observations = dict[str, object]

_NAME_MAX = 255
_CHUNK = 1 << 20
# A larger file is read in samples: the vectors have sparse ones of a terabyte.
_WHOLE_MAX = 16 << 20
# Of a larger directory only every so manieth child is looked at by the checks that cost much for each entry.
_CROWDED = 100
_SAMPLE = 29

_libc = ctypes.CDLL(None, use_errno=True)


class Entry(NamedTuple):
    """An entry as the oracle has it: path below the root (the root's is empty), mode, sorted names of its children.

    `sampled` says that the entry belongs to those which costly checks look at.
    """

    path: bytes
    mode: int
    children: tuple[bytes, ...] = ()
    sampled: bool = True

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_regular(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        return stat.S_ISLNK(self.mode)

    @property
    def is_root(self) -> bool:
        return not self.path


Check = Callable[[bytes, Entry], Observations]
"""Path of an entry on the mount looked at, and the entry → observations; none where the check does not apply."""


class Failure(NamedTuple):
    """The errno, by name, with which a call failed."""

    name: str

    def __repr__(self) -> str:
        return self.name


class Difference(NamedTuple):
    """An observation that is not the oracle's."""

    path: bytes
    what: str
    found: object
    expected: object

    def __str__(self) -> str:
        found, expected = _short(self.found), _short(self.expected)
        return f"{_short(self.path or b'/')} {_short(self.what)}: {found}, but the oracle {expected}"


ABSENT = Failure("not observed")


def differences(
    name: str, mount: bytes, oracle: bytes, entries: Iterable[Entry], count: Callable[[int], object] = lambda _: None
) -> Iterator[Difference]:
    """Make check `name` of `entries` on both mounts and yield what differs; `count` is told how much was observed."""
    check = CHECKS[name]
    for entry in entries:
        found = check(mount + entry.path, entry)
        expected = check(oracle + entry.path, entry)
        count(len(expected))
        for what in expected | found:
            pair = found.get(what, ABSENT), expected.get(what, ABSENT)
            if pair[0] != pair[1] and not is_justified(name, what, entry, *pair):
                yield Difference(entry.path, what, *pair)


def walk(root: bytes) -> Iterator[Entry]:
    """Yield every entry below `root`, itself first, without following links."""
    stack = [(b"", True)]
    while stack:
        path, sampled = stack.pop()
        mode = os.lstat(root + path).st_mode
        children = tuple(sorted(os.listdir(root + path))) if stat.S_ISDIR(mode) else ()
        yield Entry(path, mode, children, sampled)
        crowded = len(children) > _CROWDED
        for number, child in enumerate(children):
            stack.append((path + b"/" + child, not crowded or number % _SAMPLE == 0))


def require_read_only(root: bytes) -> None:
    """Raise ValueError unless the mount at `root` refuses every change by itself."""
    if not os.statvfs(root).f_flag & os.ST_RDONLY:
        raise ValueError(f"{os.fsdecode(root)}: not a read-only mount, and the contract tries to change it")


def attempt(call: Callable[..., object], *arguments: object, **named: object) -> object:
    """Return what `call` returns, or the Failure."""
    try:
        return call(*arguments, **named)
    except OSError as error:
        return _failure(error)


# stat, xattrs, links ------------------------------------------------------------------------------------------------

_STAT_FIELDS = ("mode", "nlink", "uid", "gid", "rdev", "size", "ino", "blocks", "blksize", "dev")
_TIME_FIELDS = ("atime_ns", "mtime_ns", "ctime_ns")


def check_stat(path: bytes, _: Entry) -> Observations:
    """Every field of lstat(2), twice: the second answer may come from a cache."""
    first = _stat_fields("st_", attempt(os.lstat, path))
    return first | _stat_fields("again st_", attempt(os.lstat, path))


def check_stat_open(path: bytes, _: Entry) -> Observations:
    """fstat(2) of a descriptor, which goes by the inode and not by the name."""
    with _opened(path, os.O_PATH) as fd:
        return {"open": fd} if isinstance(fd, Failure) else _stat_fields("fd st_", attempt(os.fstat, fd))


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
    *("user." + "n" * (_NAME_MAX - 5), "user." + "n" * (_NAME_MAX - 4), "trusted.overlay." + "n" * (_NAME_MAX - 16)),
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


# Listing and looking up ---------------------------------------------------------------------------------------------


class Dirent(NamedTuple):
    """A record of getdents64(2): struct linux_dirent64."""

    name: bytes
    ino: int
    kind: int
    offset: int


_DIRENT = struct.Struct("=QqHB")
_DIRENT_BUFFER = 32768
_SMALL_BUFFER = 288  # just enough for the longest name: a call gives few entries, and must go on behind them
_NO_BUFFER = 20  # too small for any entry


def check_listing(path: bytes, entry: Entry) -> Observations:
    """What getdents64(2) says: names, their order, inode numbers and types, in large and small pieces."""
    if not entry.is_directory:
        return {}
    with _opened(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        if isinstance(fd, Failure):
            return {"open": fd}
        listed = list(_dirents(fd))
        os.lseek(fd, 0, os.SEEK_SET)
        again = [dirent.name for dirent in _dirents(fd, _SMALL_BUFFER)]
        os.lseek(fd, 0, os.SEEK_SET)
        seen: Observations = {f"{dirent.name!r} d_ino, d_type": (dirent.ino, dirent.kind) for dirent in listed}
        seen["order"] = [dirent.name for dirent in listed]
        seen["in small pieces"] = again
        seen["buffer too small"] = attempt(_getdents, fd, _NO_BUFFER)
        seen["at the end"] = attempt(lambda: (list(_dirents(fd)), _getdents(fd, _DIRENT_BUFFER))[1])
    return seen


def check_listing_restarted(path: bytes, entry: Entry) -> Observations:
    """Telldir and seekdir: a listing that goes on at a place where an earlier one, of another descriptor, was."""
    if not entry.is_directory:
        return {}
    with _opened(path, os.O_RDONLY | os.O_DIRECTORY) as first, _opened(path, os.O_RDONLY | os.O_DIRECTORY) as second:
        if isinstance(first, Failure) or isinstance(second, Failure):
            return {"open": first}
        listed = list(_dirents(first))
        seen: Observations = {}
        for index in _places(len(listed)):
            for which, fd in (("same", first), ("other", second)):
                os.lseek(fd, listed[index].offset, os.SEEK_SET)
                seen[f"behind entry {index}, {which} descriptor"] = [dirent.name for dirent in _dirents(fd)]
    return seen


def check_lookup(path: bytes, entry: Entry) -> Observations:
    """Names that are absent: before, after and between all others, hidden ones, too long ones; and odd ones."""
    if entry.is_symlink or not (entry.sampled or entry.is_directory):
        return {}  # what is behind a link would be looked up: somewhere else on the host
    if not entry.is_directory:
        return {f"/{name!r}": _looked_up(path, name) for name in (b"", b".", b"absent")}
    names = itertools.chain(_ODD_NAMES, _HIDDEN_NAMES if entry.is_root else _HIDDEN_NAMES[:2], _neighbours(entry))
    return {repr(name): _looked_up(path, name) for name in dict.fromkeys(names)}


def check_names(path: bytes, entry: Entry) -> Observations:
    """Each child by name, as the first thing after a listing of its parent: the answer may come from that."""
    if not entry.is_directory:
        return {}
    listed = attempt(os.listdir, path)
    return {"listed": sorted(listed)} | _inodes(path, entry) if isinstance(listed, list) else {"listed": listed}


# Something that sorts before the first entry of every directory, and something behind the last; the lengths around that
# of the longest name that there may be.
_ODD_NAMES = (
    *(b"\x01", b" ", b"!", b"-", b"0", b"@", b"A", b"_", b"a", b"m", b"~", b"\x7f", b"\x80", b"\xc3", b"\xff"),
    *(b"\x01" * _NAME_MAX, b"\xff" * _NAME_MAX, b"n" * _NAME_MAX, b"n" * (_NAME_MAX + 1), b"n" * 5000),
    *(b".", b"..", b"...", b"./.", b"./", b"absent/", b"absent/x"),
)
_HIDDEN_NAMES = tuple(b"%02x" % number for number in range(256))


def _neighbours(entry: Entry) -> Iterator[bytes]:
    """Yield names just behind and just before each child, in the order of bytes."""
    for number, child in enumerate(entry.children):
        if len(entry.children) <= _CROWDED or number % _SAMPLE == 0:
            yield (child + b"\x01")[:_NAME_MAX]
            yield child[:-1]
            yield child[:-1] + bytes([child[-1] - 1 or 1]) + b"\xff" * (_NAME_MAX - len(child))


def _looked_up(path: bytes, name: bytes) -> object:
    if name in (b"..", b"") and not os.path.isdir(path):
        return attempt(os.lstat, path + b"/" + name)
    if name == b"..":
        return None  # of the root, that is the host's
    return attempt(lambda: os.lstat(path + b"/" + name).st_ino)


def _inodes(path: bytes, entry: Entry) -> Observations:
    return {repr(child): attempt(lambda child=child: os.lstat(path + b"/" + child).st_ino) for child in entry.children}


def _places(count: int) -> list[int]:
    """Return some indices below `count`: the ends, and places in the middle."""
    return sorted({place for place in (0, 1, count // 3, count // 2, count - 2, count - 1) if 0 <= place < count})


def _dirents(fd: int, size: int = _DIRENT_BUFFER) -> Iterator[Dirent]:
    while data := _getdents(fd, size):
        position = 0
        while position < len(data):
            ino, offset, length, kind = _DIRENT.unpack_from(data, position)
            name = data[position + _DIRENT.size : position + length]
            yield Dirent(name[: name.index(b"\0")], ino, kind, offset)
            position += length


def _getdents(fd: int, size: int) -> bytes:
    buffer = ctypes.create_string_buffer(size)
    length = _checked(_libc.getdents64(fd, buffer, ctypes.c_size_t(size)))
    return buffer.raw[:length]


# Contents -----------------------------------------------------------------------------------------------------------

_LENGTHS = (1, 7, 4095, 4096, 4097, 10000, 131072 + 1)


def check_content(path: bytes, entry: Entry) -> Observations:
    """The bytes of a regular file from its start to its end, by read(2) and mmap(2), and its stat fields when open."""
    if not entry.is_regular:
        return {}
    with _opened(path, os.O_RDONLY) as fd:
        if isinstance(fd, Failure):
            return {"open": fd}
        size = os.fstat(fd).st_size
        seen = _stat_fields("open st_", attempt(os.fstat, fd))
        if size <= _WHOLE_MAX:
            seen["read"] = attempt(_digest_of_reads, fd)
        seen["mmap"] = attempt(_digest_of_mapping, fd, size)
        seen["position"] = attempt(os.lseek, fd, 0, os.SEEK_CUR)
        seen["seek to end"] = attempt(os.lseek, fd, 0, os.SEEK_END)
    return seen


def check_pread(path: bytes, entry: Entry) -> Observations:
    """Reads at odd places, of odd lengths, across the end and behind it."""
    if not entry.is_regular:
        return {}
    with _opened(path, os.O_RDONLY) as fd:
        if isinstance(fd, Failure):
            return {"open": fd}
        offsets = _offsets(os.fstat(fd).st_size)
        lengths = _LENGTHS if entry.sampled else _LENGTHS[:2]
        return {
            f"{length} at {offset}": _summary(attempt(os.pread, fd, length, offset))
            for offset in offsets
            for length in lengths
        }


def check_direct(path: bytes, entry: Entry) -> Observations:
    """O_DIRECT, with the alignment that it asks for."""
    if not entry.is_regular or not entry.sampled:
        return {}
    with _opened(path, os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, 16 * mmap.PAGESIZE) as buffer:
        if isinstance(fd, Failure):
            return {"open": fd}
        offsets = {offset & -mmap.PAGESIZE for offset in _offsets(os.fstat(fd).st_size) if offset >= 0}
        return {f"at {offset}": _direct(fd, buffer, offset) for offset in sorted(offsets)}


def check_read_ways(path: bytes, entry: Entry) -> Observations:
    """Other ways to the bytes, on what has a size: sendfile, copy_file_range, scattered reads, holes, read-ahead."""
    if not entry.is_regular or not entry.sampled:
        return {}
    with _opened(path, os.O_RDONLY) as fd, _scratch() as target:
        if isinstance(fd, Failure):
            return {"open": fd}
        buffers = [bytearray(3), bytearray(4096), bytearray(5)]
        return {
            "preadv": (attempt(os.preadv, fd, buffers, 1), [_summary(bytes(buffer)) for buffer in buffers]),
            "sendfile": (attempt(os.sendfile, target, fd, 2, 70000), _summary(os.pread(target, 70000, 0))),
            "data": attempt(os.lseek, fd, 0, os.SEEK_DATA),
            "data behind the end": attempt(os.lseek, fd, 1 << 60, os.SEEK_DATA),
            "hole": attempt(os.lseek, fd, 0, os.SEEK_HOLE),
            "advice": attempt(os.posix_fadvise, fd, 0, 0, os.POSIX_FADV_WILLNEED),
            "write": attempt(os.write, fd, b"x"),
            "truncate": attempt(os.ftruncate, fd, 0),
            "sync": attempt(os.fsync, fd),
        }


def _digest_of_reads(fd: int) -> str:
    digest = hashlib.sha256()
    while chunk := os.read(fd, _CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _digest_of_mapping(fd: int, size: int) -> str | None:
    """Return the digest of the file as mapped; of a large one only of its ends. None for an empty one."""
    if not size:
        return None
    with mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as mapping:
        if size <= _WHOLE_MAX:
            return hashlib.sha256(mapping).hexdigest()
        return hashlib.sha256(mapping[:_CHUNK] + mapping[-_CHUNK:]).hexdigest()


def _direct(fd: int, buffer: mmap.mmap, offset: int) -> object:
    length = attempt(os.preadv, fd, [buffer], offset)
    return _summary(buffer[:length]) if isinstance(length, int) else length


def _offsets(size: int) -> list[int]:
    """Return places in and around a file of `size` bytes."""
    places = (0, 1, 4095, 4096, 4097, 131071, size // 3, size // 2, size - 4096, size - 4095, size - 1)
    inside = sorted({place for place in places if 0 <= place < size})
    return [-1, *inside, size, size + 1, size + 4096, size + (1 << 33)]


def _summary(value: object) -> object:
    """Return short bytes as they are and long ones as length and digest, so that a difference can be read."""
    if isinstance(value, bytes) and len(value) > 16:
        return len(value), hashlib.sha256(value).hexdigest()
    return value


@contextlib.contextmanager
def _scratch() -> Iterator[int]:
    fd = os.memfd_create("contract")
    try:
        yield fd
    finally:
        os.close(fd)


# Opening and permissions --------------------------------------------------------------------------------------------

_OPEN_FLAGS = {
    "read": os.O_RDONLY,
    "write": os.O_WRONLY,
    "read and write": os.O_RDWR,
    "append": os.O_WRONLY | os.O_APPEND,
    "truncate": os.O_WRONLY | os.O_TRUNC,
    "read and truncate": os.O_RDONLY | os.O_TRUNC,
    "create": os.O_WRONLY | os.O_CREAT,
    "create to read": os.O_RDONLY | os.O_CREAT,
    "create exclusively": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
    "directory": os.O_RDONLY | os.O_DIRECTORY,
    "directory to write": os.O_WRONLY | os.O_DIRECTORY,
    "unnamed": os.O_RDWR | os.O_TMPFILE,
    "no access time": os.O_RDONLY | os.O_NOATIME,
    "direct": os.O_RDONLY | os.O_DIRECT,
    "synchronous": os.O_RDONLY | os.O_SYNC,
    "path": os.O_PATH,
}


def check_open(path: bytes, entry: Entry) -> Observations:
    """Every kind of open(2) of every kind of entry; never one that waits for a fifo's other end, or follows a link."""
    return {name: _open_result(path, flags) for name, flags in _OPEN_FLAGS.items() if entry.sampled or name == "read"}


def check_special(path: bytes, entry: Entry) -> Observations:
    """What fifos and sockets do: those of a read-only file system work, for whoever may write to them."""
    if stat.S_ISFIFO(entry.mode):
        return {"through the fifo": attempt(_through_fifo, path)}
    if stat.S_ISSOCK(entry.mode):
        return {"connect": attempt(_connected, path)}
    return {}


_ACCESS_MODES = {
    "F": os.F_OK,
    "R": os.R_OK,
    "W": os.W_OK,
    "X": os.X_OK,
    "RW": os.R_OK | os.W_OK,
    "RX": os.R_OK | os.X_OK,
    "WX": os.W_OK | os.X_OK,
}
_AT_FDCWD = -100  # include/uapi/linux/fcntl.h
_AT_SYMLINK_NOFOLLOW = 0x100


def check_access(path: bytes, entry: Entry) -> Observations:
    """access(2) in every mode, with its errno: read-only is told apart from forbidden. And entering a directory."""
    modes = _ACCESS_MODES if entry.sampled else ("R", "X")
    seen = {name: attempt(_access, path, _ACCESS_MODES[name]) for name in modes}
    if entry.is_directory:
        seen["enter"] = attempt(lambda: os.lstat(path + b"/.").st_ino)
        seen["list"] = attempt(lambda: len(os.listdir(path)))
    return seen


def check_locks(path: bytes, entry: Entry) -> Observations:
    """Advisory locks, which programs such as databases take before they read."""
    if not entry.is_regular or not entry.sampled:
        return {}
    with _opened(path, os.O_RDONLY) as fd:
        if isinstance(fd, Failure):
            return {"open": fd}
        return {
            "flock shared": attempt(fcntl.flock, fd, fcntl.LOCK_SH | fcntl.LOCK_NB),
            "flock exclusive": attempt(fcntl.flock, fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
            "lockf shared": attempt(fcntl.lockf, fd, fcntl.LOCK_SH | fcntl.LOCK_NB),
            "lockf exclusive": attempt(fcntl.lockf, fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
        }


def _access(path: bytes, mode: int) -> None:
    # os.access would keep the errno to itself.
    _checked(_libc.faccessat(_AT_FDCWD, path, mode, _AT_SYMLINK_NOFOLLOW))


def _open_result(path: bytes, flags: int) -> object:
    with _opened(path, flags) as fd:
        return fd if isinstance(fd, Failure) else fcntl.fcntl(fd, fcntl.F_GETFL)


def _through_fifo(path: bytes) -> bytes | Failure:
    with _opened(path, os.O_RDONLY) as reading, _opened(path, os.O_WRONLY) as writing:
        if isinstance(reading, Failure):
            return reading
        if isinstance(writing, Failure):
            return writing
        os.write(writing, b"through")
        return os.read(reading, 64)


def _connected(path: bytes) -> None:
    # By descriptor, because an address has room for 108 bytes of path only.
    with _opened(path, os.O_PATH) as fd, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.connect(f"/proc/self/fd/{fd}")


# Changing -----------------------------------------------------------------------------------------------------------

_ACL = struct.pack("<IHHIHHIHHI", 2, 1, 7, 0xFFFFFFFF, 4, 5, 0xFFFFFFFF, 0x20, 5, 0xFFFFFFFF)


def check_modify(path: bytes, entry: Entry) -> Observations:
    """Every call that would change an entry: each must fail, and with the errno that the oracle has for it."""
    if not entry.sampled:
        return {}
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
        "create inside": _open_result(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL),
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


# The whole ----------------------------------------------------------------------------------------------------------


def check_statfs(path: bytes, entry: Entry) -> Observations:
    """statvfs(3) of the mount."""
    if not entry.is_root:
        return {}
    answer = os.statvfs(path)
    fields = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_namemax")
    return {field: getattr(answer, field) for field in fields} | {"f_flag": answer.f_flag}


CHECKS: dict[str, Check] = {
    "stat": check_stat,
    "stat-open": check_stat_open,
    "xattrs": check_xattrs,
    "xattrs-absent": check_xattrs_absent,
    "readlink": check_readlink,
    "listing": check_listing,
    "listing-restarted": check_listing_restarted,
    "lookup": check_lookup,
    "names": check_names,
    "content": check_content,
    "pread": check_pread,
    "direct": check_direct,
    "read-ways": check_read_ways,
    "open": check_open,
    "special": check_special,
    "access": check_access,
    "locks": check_locks,
    "modify": check_modify,
    "statfs": check_statfs,
}


class Justified(NamedTuple):
    """Differences that are right: of an observation of a check, named by shell patterns, where `applies` says so."""

    check: str
    what: str
    why: str
    applies: Callable[[Entry, object, object], bool] = lambda _entry, _found, _expected: True


def _refused_as_invalid(_: Entry, found: object, expected: object) -> bool:
    return expected == Failure("EINVAL") and (found is ABSENT or not isinstance(found, Failure))


def _only_here(_: Entry, __: object, expected: object) -> bool:
    return expected is ABSENT


_BLOCKS = (
    "the kernel tells the blocks that the image records, until a file is opened for the first time, and from then on "
    "those of its object: fewer when that is sparse or compressed, more when its file system needs some for itself"
)
_DIRECT = (
    "EROFS refuses O_DIRECT on content in the image when it is mounted from a file, and not when it is mounted from a "
    "block device: the kernel has no one answer"
)


def _of_content(entry: Entry, found: object, expected: object) -> bool:
    return entry.is_regular and isinstance(found, int) and isinstance(expected, int)


JUSTIFIED = (
    Justified("*", "*st_dev", "each mount has a device number of its own"),
    Justified("*", "*st_blocks", _BLOCKS, _of_content),
    Justified("statfs", "f_b*", "the space of the object store, which can run full, says more than an image's: 0 free"),
    Justified("statfs", "f_*f*", "likewise the number of inodes; EROFS reports -1 and less"),
    Justified("read-ways", "hole", "the holes of an object are no part of the image: zeros as good", _of_content),
    Justified("direct", "open", _DIRECT, _refused_as_invalid),
    Justified("open", "direct", _DIRECT, _refused_as_invalid),
    Justified("direct", "at *", _DIRECT, _only_here),
)


def is_justified(name: str, what: str, entry: Entry, found: object, expected: object) -> bool:
    """Return whether a difference is one of those in JUSTIFIED."""
    return any(
        fnmatch.fnmatchcase(name, known.check)
        and fnmatch.fnmatchcase(what, known.what)
        and known.applies(entry, found, expected)
        for known in JUSTIFIED
    )


# Tools --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: bytes, flags: int) -> Iterator[int | Failure]:
    """Open `path` for the time being, without waiting and without following a link; the Failure where that fails."""
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        yield _failure(error)
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _failure(error: OSError) -> Failure:
    return Failure(errno.errorcode.get(error.errno or 0, str(error)))


def _stat_fields(prefix: str, status: object) -> Observations:
    if not isinstance(status, os.stat_result):
        return {prefix: status}
    return {prefix + name: getattr(status, "st_" + name) for name in (*_STAT_FIELDS, *_TIME_FIELDS)}


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 160 else f"{text[:80]}…{text[-60:]}"


def main() -> int:
    """Hold the checks named on the command line, or all, and print what differs."""
    parser = argparse.ArgumentParser(description="Hold the contract against a mount.")
    parser.add_argument("mount", type=os.fsencode)
    parser.add_argument("oracle", type=os.fsencode)
    parser.add_argument("check", nargs="*", choices=[*CHECKS, []], default=[])
    options = parser.parse_args()
    for root in (options.mount, options.oracle):
        require_read_only(root)
    failed = False
    for name in options.check or CHECKS:
        for difference in differences(name, options.mount, options.oracle, walk(options.oracle)):
            print(f"{name}: {difference}")
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
