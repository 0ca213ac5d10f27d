"""Backends to hold against the contract, and the care that each mount needs: it comes up, its log is clean, it goes.

A mount that hangs, or that a failed test leaves behind, must not take the machine with it: every wait here is bounded,
and what does not end by itself is detached and killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import pytest

from cfsfuse.mount.mountinfo import mount_at
from integration import images, kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from integration.images import TestImage

PATIENCE = 30  # seconds, for what takes well below one: only a hang or a very slow machine gets there

_ORDINARY_UID = 1000  # some of the images have ACLs that name it
_FUSE_DEVICE = "/dev/fuse"
_PR_SET_CHILD_SUBREAPER = 36  # include/uapi/linux/prctl.h
_BAD_LEVELS = re.compile(r"^\S+ \S+ (WARNING|ERROR|CRITICAL) ", re.MULTILINE)


class Account(NamedTuple):
    """A user to run as."""

    uid: int
    gid: int

    @property
    def is_root(self) -> bool:
        return self.uid == 0

    def identity(self) -> dict[str, object]:
        """Return the arguments of subprocess that make a process one of this account."""
        if self.uid == os.getuid():
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": []}

    def run(self, *command: str) -> bytes:
        """Run a command as this user and return what it prints."""
        done = subprocess.run(
            command,
            check=True,
            capture_output=True,
            cwd="/",
            timeout=PATIENCE,
            **self.identity(),  # type: ignore[call-overload]  # arguments of its own, by name
        )
        return bytes(done.stdout)


ROOT = Account(0, 0)


class MountFailed(Exception):
    """The mount command ended with an error; the text is what it said."""

    def __init__(self, status: int, said: str) -> None:
        self.status = status
        self.said = said
        super().__init__(f"exit {status}: {said}")


class Log:
    """The log file of a daemon. What is worse than information has to be claimed by the test that means to cause it.

    Errors are written after the answer, so a line may come after the check that causes it: `claims` is asked about each
    line, whenever it comes.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.claims: Callable[[str], bool] = lambda _line: False
        self._seen = 0

    def new_complaints(self) -> list[str]:
        """Return the warnings and errors since the last call that nobody claims."""
        with open(self.path, encoding="utf-8", errors="replace") as file:
            file.seek(self._seen)
            text = file.read()
            self._seen = file.tell()
        return [line for line in text.splitlines() if _BAD_LEVELS.match(line) and not self.claims(line)]


@dataclass
class FuseMount:
    """A mount of cfsfuse at `path` through FUSE, made by `account`."""

    path: str
    account: Account
    log: Log
    home: str
    processes: list[int] = field(default_factory=list)

    def mount(self, image: TestImage, options: Sequence[str] = ()) -> None:
        """Run `cfsfuse mount`, as a user would, and return when it has; raise MountFailed with what it says."""
        basedir = "basedir=" + ":".join(image.base_directories)
        text = ",".join(["backend=fuse", basedir, f"log={self.log.path}", *image.options, *options])
        with _adopting():
            done = self._cfsfuse("mount", image.path, self.path, "-o", text)
        if done.returncode:
            raise MountFailed(done.returncode, done.stderr)
        self.processes = _processes_about(self.path)
        assert mount_at(self.path) is not None
        assert done.stderr == ""

    def unmount(self) -> None:
        """Run `cfsfuse umount` and check that nothing of the mount is left, and that the daemon ended well."""
        done = self._cfsfuse("umount", self.path)
        assert (done.returncode, done.stderr) == (0, "")
        assert mount_at(self.path) is None
        statuses = [_wait_for(pid) for pid in self.processes]
        self.processes = []
        assert 0 in statuses, f"exit statuses {statuses}: the daemon's is not among them, or is not 0"
        assert all(status in (0, None) for status in statuses), f"exit statuses {statuses}"

    def destroy(self) -> None:
        """Take away what is left, whatever state it is in."""
        for pid in {*self.processes, *_processes_about(self.path)}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if mount_at(self.path) is not None:
            kernel.detach(self.path)
        for pid in self.processes:
            _wait_for(pid)

    def _cfsfuse(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        # In a file: through a pipe, a process that is left with it would keep us waiting.
        with tempfile.TemporaryFile("w+") as said:
            done = subprocess.run(
                [sys.executable, "-m", "cfsfuse.cli.main", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                cwd="/",
                env={"PATH": os.environ["PATH"], "HOME": self.home},
                timeout=PATIENCE,
                check=False,
                **self.account.identity(),  # type: ignore[call-overload]  # arguments of its own, by name
            )
            said.seek(0)
            return subprocess.CompletedProcess(done.args, done.returncode, "", said.read())


def _processes_about(path: str) -> list[int]:
    """Return the processes that name the mountpoint `path` on their command line: the daemon, and its watcher."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
            if os.fsencode(path) in file.read().split(b"\0"):
                found.append(int(pid))
    return found


def _wait_for(pid: int) -> int | None:
    """Wait until a process has ended; return its exit status, None when it is not, or no longer, ours to ask."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        ready, _, _ = select.select([fd], [], [], PATIENCE)
        assert ready, f"process {pid} is still there after {PATIENCE} s"
    finally:
        os.close(fd)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return None


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """Become the parent of the daemon when its own ends: only a parent learns an exit status."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        # Others start daemons as well, and see them gone only if nobody keeps them as zombies.
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture(scope="session")
def workspace() -> Iterator[str]:
    """A directory that every user can enter, which pytest's own are not."""
    path = os.path.realpath(tempfile.mkdtemp(prefix="cfsfuse-integration-"))
    os.chmod(path, 0o755)  # noqa: S103  # that is its purpose
    yield path
    # What is still mounted here must not be emptied along with the directory.
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        left = [line for line in file if path in line]
    assert not left, left
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def images_at(workspace: str) -> Callable[[str], TestImage]:
    """Return the image of that name, unpacked at its first use; skips where its material is absent."""
    unpacked: dict[str, TestImage] = {}

    def get(name: str) -> TestImage:
        if name not in unpacked:
            try:
                unpacked[name] = images.unpack(name, os.path.join(workspace, "image", name))
            except images.ImageAbsent as absent:
                pytest.skip(f"image {name}: {absent}")
        return unpacked[name]

    return get


@pytest.fixture(scope="session")
def fuse_device() -> Iterator[None]:
    """/dev/fuse, usable for everybody as distributions have it, if we may; skips where there is none."""
    try:
        mode = stat.S_IMODE(os.stat(_FUSE_DEVICE).st_mode)
    except FileNotFoundError:
        pytest.skip(f"{_FUSE_DEVICE} is not there")
    if os.getuid() == 0:
        os.chmod(_FUSE_DEVICE, 0o666)  # noqa: S103  # as udev's rules make it
    elif not os.access(_FUSE_DEVICE, os.R_OK | os.W_OK):
        pytest.skip(f"{_FUSE_DEVICE} is forbidden for this user")
    yield
    if os.getuid() == 0:
        os.chmod(_FUSE_DEVICE, mode)


@pytest.fixture(scope="session")
def ordinary(workspace: str, fuse_device: None) -> Account:
    """An ordinary user who can run this cfsfuse; skips, with the reason, where there is none."""
    if shutil.which("fusermount3") is None:
        pytest.skip("fusermount3 is not there: an ordinary user cannot mount")
    if os.getuid() != 0:
        return Account(os.getuid(), os.getgid())
    account = _ordinary_account()
    try:
        account.run(sys.executable, "-c", "import cfsfuse.fuse.session, cfsfuse.cli.main")
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"") or str(error).encode()
        pytest.skip(f"user {account.uid} cannot run {sys.executable}: {said.decode().strip().splitlines()[-1]}")
    return account


def _ordinary_account() -> Account:
    # fusermount3 needs a name for its user, so it has to be one of the system's.
    try:
        entry = pwd.getpwuid(_ORDINARY_UID)
    except KeyError:
        entry = pwd.getpwnam("nobody")
    return Account(entry.pw_uid, entry.pw_gid)


class Mounter:
    """Makes mounts in a workspace, and keeps those that are up."""

    def __init__(self, workspace: str) -> None:
        self._workspace = workspace
        self._count = 0
        self.live: list[FuseMount] = []

    @contextlib.contextmanager
    def mounted(self, image: TestImage, account: Account, options: Sequence[str] = ()) -> Iterator[FuseMount]:
        """Mount `image` as `account`, and check at the end that it goes away in order."""
        mount = self._prepare(account)
        try:
            mount.mount(image, options)
            self.live.append(mount)
            yield mount
            assert mount.log.new_complaints() == []
            mount.unmount()
            assert mount.log.new_complaints() == []
        finally:
            if mount in self.live:
                self.live.remove(mount)
            mount.destroy()

    def _prepare(self, account: Account) -> FuseMount:
        self._count += 1
        home = os.path.join(self._workspace, f"mount-{self._count}")
        mount = FuseMount(os.path.join(home, "mnt"), account, Log(os.path.join(home, "log")), home)
        os.makedirs(mount.path)
        with open(mount.log.path, "w", encoding="ascii"):
            pass
        for path in (home, mount.path, mount.log.path):
            os.chown(path, account.uid, account.gid)
        return mount


@pytest.fixture(scope="session")
def mounter(workspace: str, fuse_device: None) -> Mounter:
    """What makes mounts."""
    return Mounter(workspace)


@pytest.fixture(autouse=True)
def _clean_logs(request: pytest.FixtureRequest) -> Iterator[None]:
    """A complaint in the log of any mount fails the test during which it came, unless the test has claimed it."""
    yield
    if "mounter" in request.fixturenames:
        complaints = {mount.path: mount.log.new_complaints() for mount in request.getfixturevalue("mounter").live}
        assert not any(complaints.values()), {path: lines[:10] for path, lines in complaints.items() if lines}


def deadline(seconds: float = PATIENCE) -> Callable[[], float]:
    """Return a function that gives the seconds left, 0 at the end."""
    end = time.monotonic() + seconds
    return lambda: max(0.0, end - time.monotonic())
