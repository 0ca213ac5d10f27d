"""Mounts made by the real command, and the places in which tests make them.

A `Stage` is a temporary directory with an object store, a mountpoint, a cache and a log. Its processes carry a mark
in their environment, so that one left behind is found, whatever it is; a stage that is left asserts that none is, that
nothing stays mounted, and that every warning in the log was claimed by the test.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import mmap
import os
import re
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import pytest

from cfsfuse.mount.mountinfo import mount_at
from cfsfuse.verity.digest import ALGORITHMS
from cfsfuse.verity.merkle import content_digest
from integration.oracles import fetch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

T = TypeVar("T")

BLOCK = 4096
PATIENCE = 20.0  # seconds until a condition that must come true has failed to
CFSFUSE = os.path.join(os.path.dirname(sys.executable), "cfsfuse")
WATCHER = b"cfsfuse-watcher"  # the name by which the watcher's shell is called
_MARK = "CFSFUSE_STAGE"
_CPUCLOCK_SCHED = 2  # include/linux/posix-timers_types.h; clock_getcpuclockid(3) makes a clock of it and a pid
_OCTAL = re.compile(rb"\\([0-7]{3})")
_LOG_LINE = re.compile(r"[-\d]+ [:,\d]+ (?P<level>[A-Z]+) (?P<text>.*)")


class User(NamedTuple):
    """Who runs a command: ids, and the words that turn root into this user."""

    uid: int
    gid: int
    prefix: tuple[str, ...]


SELF = User(os.geteuid(), os.getegid(), ())
ORDINARY = (
    User(1000, 1000, ("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--")) if SELF.uid == 0 else SELF
)
both_users = pytest.mark.parametrize(
    "user",
    [pytest.param(SELF if SELF.uid == 0 else None, id="root"), pytest.param(ORDINARY, id="ordinary")],
)
"""Runs a test as root and as an ordinary user; what this run cannot be is skipped by `stage`, by name."""

needs_root = pytest.mark.skipif(SELF.uid != 0, reason="needs root")


def eventually(condition: Callable[[], T], what: str, seconds: float = PATIENCE) -> T:
    """Return the first true value of `condition`, asked again and again; fail, naming `what`, when none comes."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            pytest.fail(f"{what}: not within {seconds} s")
        time.sleep(0.01)
    return value


def require_composefs() -> fetch.Composefs:
    """Return the C tools of composefs; skip the test, by name, where they cannot be had."""
    try:
        return fetch.composefs()
    except fetch.OracleUnavailable as error:
        pytest.skip(f"mkcomposefs: {error}")


def require(program: str) -> str:
    """Return the path of a program; skip the test, by name, where it is missing."""
    path = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"{program}: not installed")
    return path


def require_fuse() -> None:
    """Skip the test, by name, where /dev/fuse cannot be opened."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        pytest.skip(f"/dev/fuse: {error.strerror}")


def digest_of(data: bytes | bytearray, algorithm: str = "sha256") -> bytes:
    """Return the fs-verity digest of `data`."""
    return _digest_of(bytes(data), algorithm)


@functools.lru_cache(maxsize=256)
def _digest_of(data: bytes, algorithm: str) -> bytes:
    return content_digest(ALGORITHMS[algorithm], data)


@functools.lru_cache(maxsize=64)
def noise(size: int, seed: str = "") -> bytes:
    """Return bytes of which no two blocks are the same, always those of `seed`."""
    return hashlib.shake_128(f"{seed}:{size}".encode()).digest(size)


def flip(path: str, offset: int) -> None:
    """Change one bit of the byte at `offset`, in place."""
    with open(path, "r+b", buffering=0) as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x10]))


def drop_caches() -> None:
    """Make the kernel forget clean pages and inodes; only root can."""
    with contextlib.suppress(OSError), open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
        file.write("3")


class Recipe:
    """A dump in the making, and the objects that it needs: what no directory on this machine could hold."""

    def __init__(self, store: str, *, root: str = "") -> None:
        """Put objects into the directory `store`; `root` replaces the line of the root directory."""
        self.store = store
        self.lines = [root or "/ 4096 40755 2 0 0 0 0.0 - - -"]

    def directory(self, path: str, *, mode: int = 0o755, mtime: str = "0.0", xattrs: Sequence[str] = ()) -> None:
        self._add(path, f"4096 {stat.S_IFDIR | mode:o} 2 0 0 0 {mtime} - - -", xattrs)

    def file(self, path: str, data: bytes, *, mode: int = 0o644, mtime: str = "0.0", xattrs: Sequence[str] = ()) -> str:
        """Add a file whose content is an object; return the object's path below the store."""
        name = put_object(self.store, data)
        digest = name.replace("/", "")
        self._add(path, f"{len(data)} {stat.S_IFREG | mode:o} 1 0 0 0 {mtime} {name} - {digest}", xattrs)
        return name

    def redirected(self, path: str, to: str, data: bytes, *, digest: bool = True) -> None:
        """Add a file that redirects to any path; nothing is put there."""
        value = digest_of(data).hex() if digest else "-"
        self._add(path, f"{len(data)} 100644 1 0 0 0 0.0 {escape(to.encode())} - {value}")

    def inline(self, path: str, data: bytes, *, mtime: str = "0.0", xattrs: Sequence[str] = ()) -> None:
        content = escape(data) if data else "-"
        self._add(path, f"{len(data)} 100644 1 0 0 0 {mtime} - {content} -", xattrs)

    def device(self, path: str, mode: int, rdev: int = 0) -> None:
        self._add(path, f"0 {mode:o} 1 0 0 {rdev} 0.0 - - -")

    def symlink(self, path: str, target: bytes) -> None:
        self._add(path, f"{len(target)} 120777 1 0 0 0 0.0 {escape(target)} - -")

    def build(self, image: str, *options: str) -> str:
        """Let mkcomposefs make the image; return its path."""
        text = "".join(f"{line}\n" for line in self.lines).encode()
        require_composefs().mkcomposefs(*options, "--from-file", "-", image, stdin=text)
        return image

    def _add(self, path: str, fields: str, xattrs: Sequence[str] = ()) -> None:
        self.lines.append(" ".join([escape(path.encode()), fields, *xattrs]))


def escape(text: bytes) -> str:
    """Return `text` as a field of a dump."""
    plain = set(b"/._") | {byte for byte in range(128) if chr(byte).isalnum()}
    return "".join(chr(byte) if byte in plain else f"\\x{byte:02x}" for byte in text)


def put_object(store: str, data: bytes) -> str:
    """Store `data` as an object; return its path below the store."""
    digest = digest_of(data).hex()
    name = f"{digest[:2]}/{digest[2:]}"
    path = os.path.join(store, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
    return name


class Stage:
    """A place for mounts of one user; made by `stage`."""

    def __init__(self, path: str, user: User) -> None:
        self.path = path
        self.user = user
        self.store = os.path.join(path, "store")
        self.mountpoint = os.path.join(path, "mnt")
        self.cache = os.path.join(path, "cache")
        self.log = os.path.join(path, "log")
        self.image = os.path.join(path, "image.cfs")
        self.mark = secrets.token_hex(8)
        self.environment = {
            **os.environ,
            "HOME": path,
            "XDG_CACHE_HOME": self.cache,
            "XDG_STATE_HOME": os.path.join(path, "state"),
            "PYTHONDONTWRITEBYTECODE": "1",
            _MARK: self.mark,
        }
        self._claimed: list[str] = []
        for directory in (self.store, self.mountpoint, self.cache):
            os.mkdir(directory)
        self.give(path, self.store, self.mountpoint, self.cache)

    def give(self, *paths: str) -> None:
        """Make the stage's user the owner."""
        for path in paths:
            os.chown(path, self.user.uid, self.user.gid)

    def directory(self, name: str) -> str:
        """Return a new directory in this stage."""
        path = os.path.join(self.path, name)
        os.mkdir(path)
        self.give(path)
        return path

    def at(self, name: str) -> str:
        """Return the path of `name` below the mountpoint."""
        return os.path.join(self.mountpoint, name)

    def object(self, name: str) -> str:
        """Return the path of an object in the store."""
        return os.path.join(self.store, name)

    def recipe(self) -> Recipe:
        return Recipe(self.store)

    def run(
        self, *command: str, wrapper: Sequence[str] = (), cwd: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as the stage's user; `wrapper` stands before all of it and keeps the tests' own user."""
        return subprocess.run(
            [*wrapper, *self.user.prefix, *command],
            env=self.environment,
            cwd=cwd or self.path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            check=False,
        )

    def start(self, *command: str, cwd: str | None = None) -> subprocess.Popen[str]:
        """Start a command as the stage's user."""
        return subprocess.Popen(
            [*self.user.prefix, *command],
            env=self.environment,
            cwd=cwd or self.path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def mount(self, *options: str, image: str | None = None, mountpoint: str | None = None) -> int:
        """Mount and return the daemon's pid; without a basedir option the stage's store is the base directory."""
        before = set(self.processes())
        done = self.run(CFSFUSE, "mount", *self.words(*options, image=image, mountpoint=mountpoint))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done
        new = [pid for pid in self.daemons() if pid not in before]
        assert len(new) == 1, f"one daemon is expected, these are there: {new}"
        return new[0]

    def words(self, *options: str, image: str | None = None, mountpoint: str | None = None) -> list[str]:
        """Return the arguments of `cfsfuse mount` for this stage; through FUSE, unless a backend option is given."""
        chosen = list(options)
        if not any(option.startswith("backend=") for option in chosen):
            chosen.append("backend=fuse")
        if not any(option.startswith("basedir=") for option in chosen):
            chosen.append(f"basedir={self.store}")
        if not any(option.startswith("log=") for option in chosen):
            chosen.append(f"log={self.log}")
        return [image or self.image, mountpoint or self.mountpoint, "-o", ",".join(chosen)]

    def unmount(self, mountpoint: str | None = None) -> None:
        """Unmount by `cfsfuse umount` and assert that all went well and the daemon has ended."""
        before = len(self.processes())
        done = self.run(CFSFUSE, "umount", mountpoint or self.mountpoint)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done
        assert mount_at(mountpoint or self.mountpoint) is None
        # The watcher as well: it ends before the daemon does.
        eventually(lambda: len(self.processes()) <= before - 2, "the daemon's end")

    @contextlib.contextmanager
    def mounted(self, *options: str, image: str | None = None) -> Iterator[int]:
        """Mount for a while; yield the daemon's pid."""
        yield self.mount(*options, image=image)
        self.unmount()

    def processes(self) -> list[int]:
        """Return the living processes that descend from this stage, as long as we may look at them."""
        mark = f"{_MARK}={self.mark}".encode()
        return [pid for pid in _pids() if mark in _environment(pid)]

    def daemons(self) -> list[int]:
        """Return those of the processes that are not watchers."""
        return [pid for pid in self.processes() if WATCHER not in _command_line(pid)]

    def watchers(self) -> list[int]:
        """Return the processes that wait for the death of a daemon."""
        return [pid for pid in self.processes() if WATCHER in _command_line(pid)]

    def mounts(self) -> list[str]:
        """Return the mountpoints in this stage."""
        with open("/proc/self/mountinfo", "rb") as file:
            found = [os.fsdecode(_OCTAL.sub(_byte, line.split(b" ")[4])) for line in file]
        return [mountpoint for mountpoint in found if mountpoint.startswith(self.path + "/")]

    def is_clean(self) -> bool:
        """Return whether nothing is mounted and no process is left."""
        return not self.mounts() and not self.processes()

    def log_lines(self) -> list[str]:
        """Return the log's lines of warnings and errors, and whatever else stands there that is not a line of it."""
        if not os.path.exists(self.log):
            return []
        found = []
        with open(self.log, encoding="utf-8") as file:
            for line in file:
                match = _LOG_LINE.fullmatch(line.rstrip("\n"))
                if match is None or match["level"] not in ("INFO", "DEBUG"):
                    found.append(f"{match['level']} {match['text']}" if match else line.rstrip("\n"))
        return found

    def claim(self, pattern: str, count: int = 1) -> list[str]:
        """Assert that the log has `count` lines that match `pattern`, and claim them: others fail the test."""

        def matching() -> list[str]:
            return [line for line in self.log_lines() if re.search(pattern, line)]

        if count:
            eventually(lambda: len(matching()) >= count, f"{count} lines of the log with {pattern!r}")
        assert len(matching()) == count, "\n".join(self.log_lines())
        self._claimed += matching()
        return matching()

    def unclaimed(self) -> list[str]:
        """Return the lines of the log that no test has claimed."""
        left = self.log_lines()
        for line in set(self._claimed):
            left = [other for other in left if other != line]
        return left

    def show_log(self) -> None:
        """Print the end of the log: pytest shows it when the test fails."""
        print("\n".join(self.log_lines()[-50:]))

    def clear(self) -> None:
        """Take away whatever is still there, by force."""
        for mountpoint in reversed(self.mounts()):
            subprocess.run(["fusermount3", "-uz", mountpoint], check=False, capture_output=True)
            if SELF.uid == 0:
                subprocess.run(["umount", "-l", mountpoint], check=False, capture_output=True)
        for pid in self.processes():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def stage(user: User | None = SELF) -> Iterator[Stage]:
    """Yield a stage for `user`; assert afterwards that it is as clean as the test found it."""
    if user is None:
        pytest.skip("needs root")
    with contextlib.ExitStack() as stack:
        if user.uid and SELF.uid == 0:
            require("setpriv")
            stack.enter_context(device_mode(0o666))
        require_fuse()
        path = os.path.realpath(tempfile.mkdtemp(prefix="cfsfuse-"))
        stack.callback(shutil.rmtree, path, ignore_errors=True)
        os.chmod(path, 0o755)  # noqa: S103 - the stage's user has to get in
        made = Stage(path, user)
        stack.callback(made.clear)
        stack.callback(made.show_log)
        yield made
        for mountpoint in made.mounts():
            made.unmount(mountpoint)
        eventually(made.is_clean, f"an end without leftovers in {path}")
        assert made.unclaimed() == []


@contextlib.contextmanager
def device_mode(mode: int) -> Iterator[None]:
    """Give /dev/fuse another mode for a while; root only."""
    before = stat.S_IMODE(os.stat("/dev/fuse").st_mode)
    os.chmod("/dev/fuse", mode)
    try:
        yield
    finally:
        os.chmod("/dev/fuse", before)


@contextlib.contextmanager
def running(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Kill a process at the end, if it still runs, and wait for it."""
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def wait_mounted(process: subprocess.Popen[str], mountpoint: str) -> None:
    """Wait until something is mounted at `mountpoint`; fail at once when `process` has ended."""

    def is_there() -> bool:
        if process.poll() is not None:
            pytest.fail(f"ended with {process.returncode} before the mount was there: {process.communicate()}")
        return mount_at(mountpoint) is not None

    eventually(is_there, f"a mount at {mountpoint}")


def read_blocks(path: str, *, direct: bool = False) -> Iterator[tuple[int, bytes | int]]:
    """Yield index and content of each block of a file, or the errno of reading it."""
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    try:
        buffer = mmap.mmap(-1, BLOCK)  # aligned, as O_DIRECT demands
        for index in range(-(-os.fstat(fd).st_size // BLOCK)):
            try:
                count = os.preadv(fd, [buffer], index * BLOCK)
                yield index, buffer[:count]
            except OSError as error:
                yield index, error.errno or 0
        buffer.close()
    finally:
        os.close(fd)


def wrong_blocks(path: str, expected: bytes, *, direct: bool = False) -> dict[int, bytes | int]:
    """Return what was read of the blocks of a file that are not as `expected`."""
    assert os.stat(path).st_size == len(expected)
    return {
        index: found
        for index, found in read_blocks(path, direct=direct)
        if found != expected[index * BLOCK : (index + 1) * BLOCK]
    }


def resident(pid: int) -> int:
    """Return the resident memory of a process, in bytes."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def processor_time(pid: int) -> float:
    """Return the processor time that a process has used, in seconds, to the nanosecond; ended threads count."""
    return time.clock_gettime(~pid << 3 | _CPUCLOCK_SCHED)


@functools.cache
def mount_in_private_namespace() -> tuple[str, ...]:
    """Return the words before a command that give it mounts of its own; skip, by name, where that is not possible."""
    words = (require("unshare"), "--mount", "--propagation", "private")
    done = subprocess.run([*words, "true"], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"unshare --mount: {done.stderr.decode(errors='replace').strip()}")
    return words


def _byte(octal: re.Match[bytes]) -> bytes:
    return bytes([int(octal[1], 8)])


def _pids() -> Iterable[int]:
    return map(int, filter(str.isdigit, os.listdir("/proc")))


def _environment(pid: int) -> list[bytes]:
    """Return the environment of a process; nothing for those that have ended or are not ours to look at."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read().split(b"\0")
    except OSError:
        return []


def _command_line(pid: int) -> list[bytes]:
    """Return the words of a process; nothing for those that have ended."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().split(b"\0")
    except OSError:
        return []
