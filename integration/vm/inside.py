"""What a kernel shows of cfsfuse: runs as root in a guest, and prints one JSON document, between two marks.

An image and its objects are put on the disk, which has fs-verity. Then each account mounts it, in each way that works
for it, and reads all files: cold, for what a kernel does when it has to wait for the disk differs more than all else.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import stat
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from cfsfuse.mount.mountinfo import COMPOSEFS_SOURCE, FUSE_TYPE, mount_at

if TYPE_CHECKING:
    from collections.abc import Iterator

BEGIN, END = "guest-document-begin", "guest-document-end"
VERIFICATIONS = ("noverity", "tryverity", "verity")
AUTO, KERNEL = "auto", "kernel"
# The kernel's mount, asked for by name. Where overlayfs merges image and store, what is beside the objects would show.
WITH_TREES, WITHOUT_TREES = "with trees", "without trees"

# The files that are tampered with, each in its own way. None of them is among those whose objects a mount asks for
# their fs-verity beforehand (mount/probe.py): what is tested is what holds when it is found out later.
BARE = "tampered/bare"
REPLACED = "tampered/replaced"
REPLACED_VERITY = "tampered/replaced-verity"

_CFSFUSE = os.path.join(os.path.dirname(sys.executable), "cfsfuse")
_PLACE = "/run/guest"
_DISK = f"{_PLACE}/disk"
_SOURCE, _STORE, _IMAGE = f"{_DISK}/source", f"{_DISK}/store", f"{_DISK}/image.cfs"
_DIGESTS = f"{_PLACE}/digests"  # of the files of the source, as JSON
_TEMPORARY = f"{_PLACE}/tmp"
_UID = 1000
_CYCLE = "cycle"
_COMPARE = ("compare", "--check=all", "--json")
_PATIENCE = 120  # seconds, for what takes some even when it is emulated
_STATE = re.compile(r"^  (\w+) +(chosen|possible)", re.MULTILINE)
_COMPLAINT = re.compile(r"\b(?:WARNING|BUG|Oops|Call Trace)\b")


class Account(NamedTuple):
    """Who mounts: the words that turn root into that account."""

    name: str
    prefix: tuple[str, ...]


_ORDINARY = ("setpriv", f"--reuid={_UID}", f"--regid={_UID}", "--clear-groups")
ACCOUNTS = (
    Account("root", ()),
    Account("namespace", (*_ORDINARY, "unshare", "--user", "--map-root-user", "--mount")),
    Account("ordinary", _ORDINARY),
)


class Cycle(TypedDict):
    """One mount: by which backends it was possible, what it was asked to be and became, and which files were wrong."""

    possible: list[str]
    chosen: str | None
    fstype: str | None
    said: str
    wrong: dict[str, str]
    unmounted: str


class Document(TypedDict):
    """All that is observed: by account, and then by verification and backend, where there are several."""

    kernel: str
    doctor: dict[str, dict[str, Any]]
    intact: dict[str, dict[str, dict[str, Cycle]]]
    named: dict[str, Cycle]
    tampered: dict[str, dict[str, Cycle]]
    compare: dict[str, dict[str, Any]]
    left: list[str]
    complaints: list[str]


def main() -> int:
    """Observe everything, or with arguments one mount, as the account that this is."""
    if sys.argv[1:2] == [_CYCLE]:
        print(json.dumps(_cycle(*sys.argv[2:])))
        return 0
    _prepare()
    document = _observe()
    print(BEGIN, json.dumps(document), END, sep="\n", flush=True)
    return 0


def _observe() -> Document:
    doctor = {who.name: _json(who, "doctor", "--json") for who in ACCOUNTS}
    intact = {who.name: {how: _each_way(who, how) for how in VERIFICATIONS} for who in ACCOUNTS}
    compare = {who.name: _json(who, *_COMPARE) for who in ACCOUNTS}
    named = {WITH_TREES: _cold(ACCOUNTS[0], "noverity", KERNEL)}
    with _without_trees():
        named[WITHOUT_TREES] = _cold(ACCOUNTS[0], "noverity", KERNEL)
        compare[WITHOUT_TREES] = _json(ACCOUNTS[0], *_COMPARE, f"--backend={KERNEL}", "--backend=fuse")
    _tamper()
    tampered = {
        how: {name: _cold(ACCOUNTS[0], how, name) for name in _ways(found[AUTO])}
        for how, found in intact["root"].items()
        if how != "noverity"
    }
    return {
        "kernel": platform.release(),
        "doctor": doctor,
        "intact": intact,
        "named": named,
        "tampered": tampered,
        "compare": compare,
        "left": list(_left()),
        "complaints": [line for line in _run("dmesg").splitlines() if _COMPLAINT.search(line)],
    }


# The guest, and what is in it


def _prepare() -> None:
    # What is on the host may be for root alone; here it is ours to change, and forgotten.
    os.chmod("/root", 0o711)  # noqa: S103  # an interpreter may be below it
    os.chmod("/dev/fuse", 0o666)  # noqa: S103  # as udev's rules make it
    with open("/etc/passwd", "a", encoding="ascii") as file:  # for fusermount3; the first entry counts
        file.write(f"guest:x:{_UID}:{_UID}::/:/bin/sh\n")
    for path in (_DISK, _TEMPORARY):
        os.makedirs(path)
    os.chmod(_TEMPORARY, 0o1777)  # noqa: S103  # as /tmp is
    os.environ["TMPDIR"] = _TEMPORARY
    for who in ACCOUNTS:
        for path in (_mountpoint(who), _home(who)):
            os.makedirs(path)
            os.chown(path, *((0, 0) if who.name == "root" else (_UID, _UID)))
    _run("mount", "/dev/vda", _DISK)
    _make_source()
    # mkcomposefs has none, but hard links are where the backends could differ.
    _run(_CFSFUSE, "mk", "--hard-links", f"--digest-store={_STORE}", _SOURCE, _IMAGE)
    with open(_DIGESTS, "w", encoding="ascii") as file:
        json.dump(dict(_digests(_SOURCE)), file)


def _make_source() -> None:
    """Make one of everything that a tree can hold, and that this file system can."""
    for name in ("", "deep/er", "many", "tampered"):
        os.makedirs(os.path.join(_SOURCE, name))
    sizes = {"empty": 0, "inline": 20, "block": 4096, "odd": 70_001, "whole": 1 << 20, "large": (3 << 20) + 5}
    sizes |= {f"many/{number}": 100 + number for number in range(40)}
    sizes |= {"deep/er/file": 5000, BARE: 9000, REPLACED: 10_000, REPLACED_VERITY: 11_000}
    for name, size in sizes.items():
        with open(os.path.join(_SOURCE, name), "wb") as file:
            file.write(_noise(name, size))
    os.link(f"{_SOURCE}/odd", f"{_SOURCE}/deep/link")
    os.symlink("../large", f"{_SOURCE}/deep/symlink")
    os.mkfifo(f"{_SOURCE}/fifo")
    os.mknod(f"{_SOURCE}/device", stat.S_IFCHR | 0o644, os.makedev(1, 7))
    os.mknod(f"{_SOURCE}/whiteout", stat.S_IFCHR, os.makedev(0, 0))
    for number, name in enumerate(("odd", "deep", "inline", "fifo")):
        os.setxattr(f"{_SOURCE}/{name}", "trusted.tested", b"t" * number)
        os.chown(f"{_SOURCE}/{name}", _UID, 54321)
    os.setxattr(f"{_SOURCE}/odd", "user.tested", b"\0\xff" * 50)


def _noise(seed: str, size: int) -> bytes:
    return hashlib.shake_128(seed.encode()).digest(size)


def _digests(top: str) -> Iterator[tuple[str, str]]:
    for directory, _, names in os.walk(top):
        for name in names:
            path = os.path.join(directory, name)
            if stat.S_ISREG(os.lstat(path).st_mode):
                yield os.path.relpath(path, top), _digest(path)


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _without_trees() -> Iterator[None]:
    """Take the recorded Merkle trees out of the store meanwhile."""
    inside, outside = f"{_STORE}/.merkle", f"{_DISK}/trees"
    os.rename(inside, outside)
    yield
    os.rename(outside, inside)


def _tamper() -> None:
    """Put other files in the place of objects: the same without fs-verity, and other bytes without and with it."""
    for name in (BARE, REPLACED, REPLACED_VERITY):
        with open(f"{_SOURCE}/{name}", "rb") as file:
            content = bytearray(file.read())
        digest = _run(_CFSFUSE, "measure", f"{_SOURCE}/{name}").strip()
        path = os.path.join(_STORE, digest[:2], digest[2:])
        os.unlink(path)
        content[0] ^= name != BARE
        with open(path, "xb") as file:
            file.write(content)
        if name == REPLACED_VERITY:
            _run("fsverity", "enable", path)


# A mount


def _each_way(who: Account, how: str) -> dict[str, Cycle]:
    """Mount by the backend that is chosen, and by each other one that is possible as well.

    The latter not for `tryverity`, which is `verity` where all files have a digest: emulation is slow.
    """
    found = {AUTO: _cold(who, how, AUTO)}
    others = found[AUTO]["possible"] if how != "tryverity" else []
    return found | {backend: _cold(who, how, backend) for backend in others}


def _ways(cycle: Cycle) -> list[str]:
    return [*filter(None, [cycle["chosen"]]), *cycle["possible"]]


def _cold(who: Account, how: str, backend: str) -> Cycle:
    """Mount, read and unmount in a process of the account, nothing of the disk being in memory."""
    _run("umount", _DISK)
    _run("mount", "/dev/vda", _DISK)
    with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
        file.write("3")
    begun = time.monotonic()
    options = f"basedir={_STORE},{how},backend={backend}"
    said = _as(who, sys.executable, "-m", "integration.vm.inside", _CYCLE, options, _mountpoint(who)).stdout
    found: Cycle = json.loads(said)
    chosen, wrong = found["chosen"], found["wrong"]
    print(f"{time.monotonic() - begun:5.1f} s: {who.name} {how} {backend}: {chosen} {wrong}", flush=True)
    return found


def _cycle(options: str, mountpoint: str) -> Cycle:
    with open(_DIGESTS, encoding="ascii") as file:
        expected: dict[str, str] = json.load(file)
    done = _done([_CFSFUSE, "mount", "--explain", _IMAGE, mountpoint, "-o", options])
    states = [(match[1], match[2]) for match in _STATE.finditer(done.stdout)]
    mount = mount_at(mountpoint)
    wrong = {} if mount is None else dict(_wrong(mountpoint, expected))
    unmounted = "" if mount is None else _done([_CFSFUSE, "umount", mountpoint]).stderr
    return {
        "possible": [name for name, state in states if state == "possible"],
        "chosen": next((name for name, state in states if state == "chosen"), None),
        "fstype": None if mount is None else mount.fstype,
        "said": done.stderr,
        "wrong": wrong,
        "unmounted": unmounted if mount_at(mountpoint) is None else f"is still mounted: {unmounted}",
    }


def _wrong(mountpoint: str, expected: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each file that cannot be read, or whose content is another one than expected."""
    for path, digest in expected.items():
        try:
            if _digest(os.path.join(mountpoint, path)) != digest:
                yield path, "other content"
        except OSError as error:
            yield path, errno.errorcode[error.errno or 0]


def _left() -> Iterator[str]:
    """Yield what is left of all mounts, some time after the last of them."""
    end = time.monotonic() + 5
    while (processes := list(_processes())) and time.monotonic() < end:
        time.sleep(0.1)
    yield from processes
    with open("/proc/self/mountinfo", encoding="ascii") as file:
        yield from (line.strip() for line in file if FUSE_TYPE in line or f" {COMPOSEFS_SOURCE} " in line)
    yield from _run("losetup", "--all").splitlines()
    yield from os.listdir(_TEMPORARY)
    _run("umount", _DISK)


def _processes() -> Iterator[str]:
    """Yield the command lines that name one of our files: a server's does, and that of its watcher."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            words = file.read().split("\0")
            if any(word.startswith(_PLACE) for word in words):
                yield " ".join(words)


# Commands


def _mountpoint(who: Account) -> str:
    return f"{_PLACE}/mount-{who.name}"


def _home(who: Account) -> str:
    return f"{_PLACE}/home-{who.name}"


def _json(who: Account, verb: str, *options: str) -> dict[str, Any]:
    done = _as(who, _CFSFUSE, verb, *options, _IMAGE, "-o", f"basedir={_STORE}", check=False)
    print(f"{who.name} {verb}: exit {done.returncode} {done.stderr}", flush=True)
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        found = {"problem": done.stderr}
    return found


def _as(who: Account, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = _done([*who.prefix, *command], os.environ | {"HOME": _home(who)})
    if check and done.returncode:
        raise RuntimeError(f"{who.name}: {command}: exit {done.returncode}: {done.stderr}")
    return done


def _done(command: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
        check=False,
    )


def _run(*command: str) -> str:
    return _as(ACCOUNTS[0], *command).stdout


if __name__ == "__main__":
    sys.exit(main())
