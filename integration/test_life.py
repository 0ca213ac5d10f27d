"""The life of a mount: how it comes to be, what it survives, how it ends, and that nothing is left of it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

import cfsfuse
from cfsfuse.mount.mountinfo import mount_at
from integration.mounts import (
    CFSFUSE,
    ORDINARY,
    SELF,
    Stage,
    User,
    both_users,
    digest_of,
    eventually,
    mount_in_private_namespace,
    needs_root,
    noise,
    processor_time,
    require,
    running,
    stage,
    wait_mounted,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONTENT = noise(100_000, "life")
LARGE = noise(3 << 20, "life")
SUMS = [hashlib.sha256(data).hexdigest() for data in (CONTENT, LARGE, b"in the image\n")]


@contextlib.contextmanager
def image(user: User | None = SELF) -> Iterator[Stage]:
    """Yield a stage with an image of a few files."""
    with stage(user) as made:
        recipe = made.recipe()
        recipe.directory("/dir")
        recipe.file("/dir/file", CONTENT)
        recipe.file("/large", LARGE)
        recipe.inline("/inline", b"in the image\n")
        recipe.symlink("/link", b"dir/file")
        recipe.build(made.image)
        yield made


@pytest.fixture
def made() -> Iterator[Stage]:
    with image() as stage_of_image:
        yield stage_of_image


def assert_readable(made: Stage, mountpoint: str | None = None) -> None:
    """Read all of the image, as the stage's user."""
    where = mountpoint or made.mountpoint
    done = made.run("sha256sum", "--zero", f"{where}/link", f"{where}/large", f"{where}/inline")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.split("\0")[:-1]] == SUMS


@both_users
def test_killed_daemon_leaves_nothing(user: User | None) -> None:
    with image(user) as made:
        daemon = made.mount()
        assert_readable(made)
        for _ in range(5):  # whether the mount goes must not depend on who of the kernel's and our threads is first
            os.kill(daemon, signal.SIGKILL)
            eventually(made.is_clean, "the end of mount and processes", 5)
            assert os.listdir(made.mountpoint) == []
            daemon = made.mount()
        assert_readable(made)


def test_killed_daemon_leaves_no_mount_in_use(made: Stage) -> None:
    daemon = made.mount()
    with contextlib.suppress(OSError), open(made.at("large"), "rb", buffering=0) as file:
        os.kill(daemon, signal.SIGKILL)
        eventually(made.is_clean, "the end of mount and processes", 5)
        with pytest.raises(OSError, match="not connected"):
            os.pread(file.fileno(), 10, 2 << 20)


@both_users
def test_the_watcher_holds_nothing_and_is_not_missed(user: User | None) -> None:
    with image(user) as made:
        daemon = made.mount()
        (watcher,) = made.watchers()
        # Nothing of the daemon's but the other end of a pipe: neither the device, which would keep the mount alive, nor
        # a stream of ours.
        targets = [os.readlink(f"/proc/{watcher}/fd/{fd}") for fd in os.listdir(f"/proc/{watcher}/fd")]
        assert sorted(targets)[:2] == ["/dev/null", "/dev/null"]
        assert [target.partition(":")[0] for target in sorted(targets)[2:]] == ["pipe"]
        assert os.readlink(f"/proc/{watcher}/cwd") == "/"
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(watcher, number)
        assert_readable(made)
        assert made.watchers() == [watcher]
        os.kill(watcher, signal.SIGKILL)
        assert_readable(made)
        assert made.daemons() == [daemon]
        assert made.run(CFSFUSE, "umount", made.mountpoint).returncode == 0
        eventually(made.is_clean, "the daemon's end")


@both_users
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_unmounts(user: User | None, number: signal.Signals) -> None:
    with image(user) as made:
        daemon = made.mount()
        os.kill(daemon, number)
        eventually(made.is_clean, "the end of mount and processes")
        with open(made.log, encoding="utf-8") as file:
            assert f"INFO {number.name}: unmounting" in file.read()


@both_users
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_a_foreground_mount_with_0(user: User | None, number: signal.Signals) -> None:
    with image(user) as made, running(made.start(CFSFUSE, "mount", "-f", *made.words())) as process:
        wait_mounted(process, made.mountpoint)
        assert_readable(made)
        os.kill(process.pid, number)
        said = process.communicate(timeout=20)
        assert (process.returncode, said) == (0, ("", ""))
        eventually(made.is_clean, "the end of mount and processes")


@needs_root
@pytest.mark.parametrize("backend", ["fuse", "overlay"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_that_comes_with_the_mount_leaves_nothing(made: Stage, backend: str, number: signal.Signals) -> None:
    """Between the mount and its announcement, as near as it can be hit from outside."""
    words = [CFSFUSE, "mount", "--foreground", *made.words(f"backend={backend}", "noverity")]
    for _ in range(4):
        with running(made.start(*words)) as process:
            end = time.monotonic() + 20
            while mount_at(made.mountpoint) is None and time.monotonic() < end:
                pass
            assert mount_at(made.mountpoint) is not None
            process.send_signal(number)
            process.wait(20)
        eventually(made.is_clean, "the end of mount and processes")


@needs_root
def test_a_mount_that_hides_the_program_itself(made: Stage) -> None:
    """What the server imports, it has imported before."""
    package = os.path.dirname(cfsfuse.__file__)
    words = [made.image, package, "-o", f"backend=fuse,basedir={made.store},log={made.log}"]
    script = 'umask 0; "$@" && ls -A "$0" && umount -l "$0"'
    command = ["sh", "-c", script, package, CFSFUSE, "mount", *words]
    done = made.run(*command, wrapper=mount_in_private_namespace())
    assert (done.returncode, done.stderr) == (0, "")
    assert "inline" in done.stdout.split()
    eventually(lambda: not made.processes(), "the daemon's end")


def test_foreground_logs_to_standard_error(made: Stage) -> None:
    words = [made.image, made.mountpoint, "-o", f"backend=fuse,basedir={made.directory('empty')}"]
    with running(made.start(CFSFUSE, "mount", "--foreground", *words)) as process:
        wait_mounted(process, made.mountpoint)
        with pytest.raises(FileNotFoundError):
            open(made.at("dir/file"), "rb").close()
        made.unmount()
        _, said = process.communicate(timeout=20)
        assert process.returncode == 0
        assert re.fullmatch(r".* ERROR /dir/file: object .*: not in any base directory\n", said)


def test_signal_unmounts_a_mount_in_use(made: Stage) -> None:
    daemon = made.mount()
    fd = os.open(made.at("dir/file"), os.O_RDONLY)
    os.kill(daemon, signal.SIGTERM)
    eventually(made.is_clean, "the end of mount and processes")
    with contextlib.suppress(OSError):  # closing asks a file system that has gone
        os.close(fd)


@needs_root
def test_umount_8_ends_the_daemon() -> None:
    with image() as made:
        made.mount()
        assert made.run("umount", made.mountpoint).returncode == 0
        eventually(made.is_clean, "the daemon's end")


@both_users
@pytest.mark.parametrize("words", [(), ("--lazy",)])
def test_a_server_that_hangs_can_be_unmounted(user: User | None, words: tuple[str, ...]) -> None:
    with image(user) as made:
        daemon = made.mount()
        os.kill(daemon, signal.SIGSTOP)
        try:
            done = made.run(CFSFUSE, "umount", *words, made.mountpoint + "/")
            assert (done.returncode, done.stderr) == (0, "")
            assert mount_at(made.mountpoint) is None
        finally:
            os.kill(daemon, signal.SIGCONT)
        eventually(made.is_clean, "the daemon's end")


@both_users
def test_fusermount_ends_the_daemon(user: User | None) -> None:
    with image(user) as made:
        made.mount()
        assert made.run("fusermount3", "-u", made.mountpoint).returncode == 0
        eventually(made.is_clean, "the daemon's end")


@both_users
def test_a_mount_in_use_is_told_so(user: User | None) -> None:
    with image(user) as made:
        made.mount()
        user_of_it = made.start("sh", "-c", 'cd "$1/dir" && exec sleep 60', "sh", made.mountpoint)
        with running(user_of_it):
            where = f"/proc/{user_of_it.pid}/cwd"
            eventually(lambda: os.readlink(where) == f"{made.mountpoint}/dir", "a process in the mount")
            eventually(lambda: b"sleep" in cmdline(user_of_it.pid), "the process's program")
            done = made.run(CFSFUSE, "umount", made.mountpoint)
            expected = f"{made.mountpoint}: in use by sleep ({user_of_it.pid}); end that first, or use --lazy"
            assert (done.returncode, done.stdout) == (4, "")
            assert done.stderr == f"cfsfuse: {expected}\n"
            assert_readable(made)
            assert made.run(CFSFUSE, "umount", "--lazy", made.mountpoint).returncode == 0
            assert made.mounts() == []
            assert len(made.daemons()) > 1, "the mount lives as long as its user"
        eventually(made.is_clean, "the daemon's end")


def cmdline(pid: int) -> bytes:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()


def test_a_lazily_unmounted_file_reads_on(made: Stage) -> None:
    made.mount()
    with open(made.at("large"), "rb", buffering=0) as file:
        done = made.run(CFSFUSE, "umount", "-l", made.mountpoint)
        assert done.returncode == 0
        assert os.pread(file.fileno(), 1000, 2 << 20) == LARGE[2 << 20 :][:1000]
    eventually(made.is_clean, "the daemon's end")


@both_users
def test_a_second_mount_on_the_same_mountpoint_is_refused(user: User | None) -> None:
    with image(user) as made:
        made.mount()
        done = made.run(CFSFUSE, "mount", *made.words())
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(f"cfsfuse: {made.mountpoint}: .* mounted here already; cfsfuse umount .*\n", done.stderr)
        assert_readable(made)
        made.unmount()
        assert made.mounts() == []


def test_umount_of_what_is_not_ours(made: Stage) -> None:
    for mountpoint, reason in ((made.mountpoint, "nothing is mounted here"), ("/proc", "a mount of type proc")):
        done = made.run(CFSFUSE, "umount", mountpoint)
        assert done.returncode == 2
        assert re.fullmatch(f"cfsfuse: {mountpoint}: {reason}.*\n", done.stderr)


def test_an_ordinary_user_may_not_unmount_the_mount_of_another() -> None:
    if ORDINARY == SELF:
        pytest.skip("needs root")
    with image() as made:
        made.mount()
        done = subprocess.run(
            [*ORDINARY.prefix, CFSFUSE, "umount", made.mountpoint], capture_output=True, text=True, check=False
        )
        assert done.returncode == 4
        assert done.stderr.startswith(f"cfsfuse: {made.mountpoint}: cannot unmount: ")
        assert done.stderr.count("\n") == 1
        assert_readable(made)


@both_users
def test_many_mounts_at_once(user: User | None) -> None:
    with image(user) as made:
        mountpoints = [made.directory(f"mnt{index}") for index in range(4)]
        with contextlib.ExitStack() as stack:
            started = [
                stack.enter_context(running(made.start(CFSFUSE, "mount", *made.words(mountpoint=mountpoint))))
                for mountpoint in mountpoints
            ]
            for process in started:
                assert (process.communicate(timeout=30), process.returncode) == (("", ""), 0)
        assert sorted(made.mounts()) == mountpoints
        for mountpoint in mountpoints:
            assert_readable(made, mountpoint)


def test_mount_returns_when_the_mount_is_usable(made: Stage) -> None:
    for _ in range(3):
        made.mount()
        assert sorted(os.listdir(made.mountpoint)) == ["dir", "inline", "large", "link"]
        made.unmount()
        assert os.listdir(made.mountpoint) == []


def test_whoever_reads_our_output_sees_its_end(made: Stage) -> None:
    """The daemon holds no standard stream, nor the directory in which it was started."""
    daemon = made.mount()
    streams = {os.readlink(f"/proc/{daemon}/fd/{fd}") for fd in range(3)}
    assert streams == {"/dev/null"}
    assert os.readlink(f"/proc/{daemon}/cwd") == "/"
    assert os.getsid(daemon) == daemon


def test_the_daemons_reason_reaches_the_user() -> None:
    """A failure that only shows when the daemon mounts: fusermount3's own words."""
    if ORDINARY == SELF:
        pytest.skip("needs root")
    with image(ORDINARY) as made, open(os.path.join(made.path, "fuse.conf"), "w", encoding="ascii") as conf:
        conf.write("mount_max = 0\n")
        conf.flush()
        with_conf = ["sh", "-c", 'mount --bind "$0" /etc/fuse.conf && exec "$@"', conf.name]
        done = made.run(CFSFUSE, "mount", *made.words(), wrapper=[*mount_in_private_namespace(), *with_conf])
        assert (done.returncode, done.stdout) == (4, "")
        assert re.fullmatch(f"cfsfuse: {made.mountpoint}: fusermount3: too many FUSE filesystems.*\n", done.stderr)
        assert made.is_clean()


BREAK_VFS = """
import sys
from cfsfuse.vfs import Vfs

def broken(self, nid):
    raise RuntimeError("the moon is full")

Vfs.readlink = broken
from cfsfuse.cli.main import main
sys.exit(main())
"""


def test_an_unexpected_exception_costs_one_answer(made: Stage) -> None:
    """Not the session."""
    with running(made.start(sys.executable, "-c", BREAK_VFS, "mount", "-f", *made.words())) as process:
        wait_mounted(process, made.mountpoint)
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error") as caught:
                os.readlink(made.at("link"))
            assert caught.value.errno == errno.EIO
        with open(made.at("dir/file"), "rb") as file:
            assert file.read() == CONTENT
        assert process.poll() is None
        made.unmount()
        assert process.wait(20) == 0
    made.claim("^ERROR unexpected error in READLINK", 2)
    made.claim("^RuntimeError: the moon is full$", 2)
    made.claim("^Traceback", 2)
    made.claim("^  ", len([line for line in made.log_lines() if line.startswith("  ")]))


def overwrite(path: str) -> None:
    size = os.path.getsize(path)
    with open(path, "r+b") as file:
        file.write(noise(size, "overwritten"))


DISASTERS: dict[str, Callable[[str], None]] = {
    "truncated": lambda path: os.truncate(path, 0),
    "overwritten": overwrite,
    "deleted": os.unlink,
    "replaced": lambda path: os.rename(shutil.copy("/etc/passwd", path + ".new"), path),
}


@pytest.mark.parametrize("disaster", DISASTERS.values(), ids=DISASTERS)
def test_nothing_that_happens_to_the_image_changes_the_view(made: Stage, disaster: Callable[[str], None]) -> None:
    with made.mounted():
        disaster(made.image)
        assert_readable(made)
        assert sorted(os.listdir(made.mountpoint)) == ["dir", "inline", "large", "link"]
        assert os.readlink(made.at("link")) == "dir/file"


def test_store_and_image_below_the_mountpoint(made: Stage) -> None:
    """They are those underneath: the daemon does not wait for itself."""
    shutil.move(made.store, made.at("store"))
    shutil.move(made.image, made.at("image.cfs"))
    with made.mounted(f"basedir={made.at('store')}", image=made.at("image.cfs")):
        assert sorted(os.listdir(made.mountpoint)) == ["dir", "inline", "large", "link"]
        assert_readable(made)
    assert sorted(os.listdir(made.mountpoint)) == ["image.cfs", "store"]


def test_the_log_and_the_cache_below_the_mountpoint(made: Stage) -> None:
    made.environment["XDG_CACHE_HOME"] = made.at("cache")
    os.unlink(object_of(made, CONTENT))
    daemon = made.mount(f"log={made.at('log')}")
    with pytest.raises(FileNotFoundError):
        open(made.at("dir/file"), "rb").close()
    with open(made.at("large"), "rb") as file:
        assert file.read() == LARGE
    os.kill(daemon, signal.SIGTERM)
    eventually(made.is_clean, "the end of mount and processes")
    with open(made.at("log"), encoding="utf-8") as log:
        assert "ERROR /dir/file: object" in log.read()


def object_of(made: Stage, data: bytes) -> str:
    digest = digest_of(data).hex()
    return made.object(f"{digest[:2]}/{digest[2:]}")


@both_users
def test_relative_paths(user: User | None) -> None:
    with image(user) as made:
        done = made.run(CFSFUSE, "mount", "image.cfs", "mnt", "-o", "basedir=store,log=log")
        assert (done.returncode, done.stderr) == (0, "")
        assert_readable(made)
        with open(made.log, encoding="utf-8"):
            pass
        assert made.run(CFSFUSE, "umount", "mnt/").returncode == 0
        eventually(made.is_clean, "the daemon's end")


NAMES = ["a b", "a,b", "ä ö ü", "a\\b", "a:b", "'quoted'", "nl\nnl", "byte\udcff"]


@both_users
def test_image_and_mountpoint_of_any_name(user: User | None) -> None:
    with image(user) as made:
        mountpoints = []
        for name in NAMES:
            odd, mountpoint = os.path.join(made.path, name), made.directory(name + ".mnt")
            shutil.copy(made.image, odd)
            made.mount(image=odd, mountpoint=mountpoint)
            mountpoints.append(mountpoint)
        for mountpoint in mountpoints:
            assert_readable(made, mountpoint)
            done = made.run(CFSFUSE, "umount", mountpoint)
            assert (done.returncode, done.stderr) == (0, "")
        eventually(made.is_clean, "the end of mounts and processes")


def test_the_source_of_the_mount_is_the_image(made: Stage) -> None:
    odd = os.path.join(made.path, "a, b.cfs")
    shutil.copy(made.image, odd)
    with made.mounted(image=odd):
        there = mount_at(made.mountpoint)
        assert there is not None
        assert (there.fstype, there.source) == ("fuse.cfsfuse", odd)


@both_users
def test_base_directories_with_a_comma_and_a_colon(user: User | None) -> None:
    with image(user) as made:
        first = made.directory("first,1:a")
        digest = os.path.relpath(object_of(made, CONTENT), made.store)
        os.makedirs(os.path.dirname(os.path.join(first, digest)))
        os.rename(object_of(made, CONTENT), os.path.join(first, digest))
        escaped = first.replace(",", r"\,").replace(":", r"\:")
        made.mount(f"basedir={escaped}:{made.store}")
        assert_readable(made)


def test_base_directories_are_searched_in_order(made: Stage) -> None:
    """The first one that has the object is right or wrong for all."""
    first, last = made.directory("first"), made.directory("last")
    name = os.path.relpath(object_of(made, CONTENT), made.store)
    os.makedirs(os.path.join(first, os.path.dirname(name)))
    with open(os.path.join(first, name), "wb") as file:
        file.write(noise(len(CONTENT), "wrong"))
    with made.mounted(f"basedir={last}:{made.store}:{first}"):
        assert_readable(made)
    with made.mounted(f"basedir={last}", f"basedir={first}:{made.store}"):
        with pytest.raises(OSError, match="Input/output error"):
            open(made.at("dir/file"), "rb").close()
        with open(made.at("large"), "rb") as file:
            assert file.read() == LARGE
    made.claim("^ERROR /dir/file: object .*: fs-verity digest")


def mount_flags(mountpoint: str) -> set[str]:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        line = next(line for line in file if line.split(" ")[4] == mountpoint)
    return set(line.split(" ")[5].split(","))


def test_a_mount_is_read_only_nosuid_and_nodev(made: Stage) -> None:
    with made.mounted():
        assert {"ro", "nosuid", "nodev"} <= mount_flags(made.mountpoint)
        for action in (os.mkdir, os.unlink, lambda path: os.truncate(path, 0), lambda path: os.chmod(path, 0)):
            with pytest.raises(OSError, match="Read-only file system"):
                action(made.at("inline" if action is not os.mkdir else "new"))


@needs_root
def test_the_kernels_options() -> None:
    with image() as made:
        with made.mounted("nosuid", "nodev", "noexec", "nosuid"):
            assert {"ro", "nosuid", "nodev", "noexec"} <= mount_flags(made.mountpoint)
        with made.mounted("suid", "dev", "noexec", "noatime", "rw", "relatime", "x-systemd.automount"):
            flags = mount_flags(made.mountpoint)
            assert {"ro", "noexec"} <= flags
            assert not flags & {"nosuid", "nodev"}


def test_uid_and_gid(made: Stage) -> None:
    with made.mounted("uid=1234", "gid=4321"):
        for name in ("", "dir", "dir/file", "link"):
            status = os.lstat(made.at(name))
            assert (status.st_uid, status.st_gid) == (1234, 4321)
    with made.mounted("gid=77"):
        status = os.lstat(made.at("dir/file"))
        assert (status.st_uid, status.st_gid) == (0, 77)


def read_as(user: User, path: str) -> int:
    return subprocess.run([*user.prefix, "cat", path], capture_output=True, check=False).returncode


def test_other_users_are_let_in_by_root_unless_forbidden() -> None:
    if ORDINARY == SELF:
        pytest.skip("needs root")
    with image() as made:
        with made.mounted():
            assert read_as(ORDINARY, made.at("inline")) == 0
        with made.mounted("noallow_other"):
            assert read_as(ORDINARY, made.at("inline")) == 1
            assert read_as(SELF, made.at("inline")) == 0
    with image(ORDINARY) as made:
        made.mount()
        assert read_as(ORDINARY, made.at("inline")) == 0
        assert read_as(SELF, made.at("inline")) == 1


def test_permissions_are_checked() -> None:
    if ORDINARY == SELF:
        pytest.skip("needs root")
    with stage() as made:
        recipe = made.recipe()
        recipe.file("/private", CONTENT, mode=0o600)
        recipe.directory("/closed", mode=0o700)
        recipe.inline("/closed/inside", b"x")
        recipe.build(made.image)
        with made.mounted():
            for name in ("private", "closed/inside"):
                assert read_as(SELF, made.at(name)) == 0
                assert read_as(ORDINARY, made.at(name)) == 1


def test_statfs_tells_the_space_of_the_store_or_of_the_image(made: Stage) -> None:
    def df() -> tuple[int, int]:
        output = subprocess.run(
            ["df", "--block-size=1", "--output=size,avail", made.mountpoint], capture_output=True, text=True, check=True
        ).stdout
        size, available = output.splitlines()[1].split()
        return int(size), int(available)

    with made.mounted():
        store = os.statvfs(made.store)
        size, available = df()
        assert size == store.f_blocks * store.f_frsize
        assert abs(available - store.f_bavail * store.f_frsize) < 1 << 30
    with made.mounted("statfs=image"):
        assert df() == (os.path.getsize(made.image), 0)
        assert os.statvfs(made.mountpoint).f_namemax == 255


@contextlib.contextmanager
def helper_of_mount() -> Iterator[None]:
    """Put mount.cfsfuse where mount(8) looks for its helpers."""
    there = "/sbin/mount.cfsfuse"
    if os.path.lexists(there):
        yield
        return
    os.symlink(os.path.join(os.path.dirname(CFSFUSE), "mount.cfsfuse"), there)
    try:
        yield
    finally:
        os.unlink(there)


@needs_root
def test_mount_8_and_umount_8() -> None:
    with image() as made, helper_of_mount():
        options = f"basedir={made.store},log={made.log},uid=55,nosuid"
        words = ["mount", "-t", "cfsfuse", "-o", options, made.image, made.mountpoint]
        done = made.run(*words)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert_readable(made)
        assert os.stat(made.at("inline")).st_uid == 55
        again = made.run(*words)
        assert again.returncode != 0
        assert "mounted here already" in again.stderr
        assert made.run("umount", made.mountpoint).returncode == 0
        eventually(made.is_clean, "the daemon's end")


@needs_root
def test_a_line_of_fstab() -> None:
    with image() as made, helper_of_mount():
        table = os.path.join(made.path, "fstab")
        with open(table, "w", encoding="utf-8") as file:
            file.write(
                f"{made.image} {made.mountpoint} cfsfuse noauto,nofail,ro,basedir={made.store},log={made.log} 0 0\n"
            )
        done = made.run("mount", "--fstab", table, made.mountpoint)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert_readable(made)
        assert made.run("umount", made.mountpoint).returncode == 0


def use_heavily(made: Stage) -> None:
    for _ in range(5):
        subprocess.run(["find", made.mountpoint, "-ls"], check=True, stdout=subprocess.DEVNULL)
        assert_readable(made)


def idle_time(daemon: int, seconds: float) -> float:
    """Return the processor time that the daemon uses in `seconds`."""
    before = processor_time(daemon)
    time.sleep(seconds)
    return processor_time(daemon) - before


def comes_to_rest(daemon: int) -> None:
    """Wait until the worker threads have ended, as they do after ten seconds without work, and the last request too."""
    eventually(lambda: len(os.listdir(f"/proc/{daemon}/task")) == 1, "the end of the worker threads", 30)
    eventually(lambda: idle_time(daemon, 0.5) == 0, "rest")


def test_an_idle_mount_uses_no_processor_time(made: Stage) -> None:
    with made.mounted() as daemon:
        comes_to_rest(daemon)
        assert idle_time(daemon, 2.0) == 0
        use_heavily(made)
        time.sleep(0.2)
        assert idle_time(daemon, 2.0) < 0.005, "neither polls nor wakes up again and again"


@pytest.mark.slow
def test_an_idle_mount_uses_no_processor_time_for_a_minute(made: Stage) -> None:
    with made.mounted() as daemon:
        use_heavily(made)
        comes_to_rest(daemon)
        # The kernel may tell once what it has forgotten, when somebody drops caches; waking up each second costs more.
        assert idle_time(daemon, 60.0) < 0.001


@pytest.mark.parametrize(("processors", "poll"), [("one", "100"), ("all", "0"), ("all", "100"), ("all", "2000")])
def test_any_number_of_processors_and_time_of_polling(made: Stage, processors: str, poll: str) -> None:
    """On one, polling for the next request would keep away the process that makes it."""
    cpu = str(min(os.sched_getaffinity(0)))
    words = [require("taskset"), "-c", cpu] if processors == "one" else []
    with running(made.start(*words, CFSFUSE, "mount", "-f", *made.words(f"poll={poll}"))) as process:
        wait_mounted(process, made.mountpoint)
        for _ in range(3):
            assert made.run(*words, "cat", made.at("large"), made.at("dir/file")).returncode == 0
        assert_readable(made)
        time.sleep(0.2)
        assert idle_time(process.pid, 1.0) < 0.005
        made.unmount()
        assert process.wait(20) == 0
