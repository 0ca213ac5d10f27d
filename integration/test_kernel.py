"""The kernel backend: the same view as the kernel's own mount, every option, and nothing left behind by any failure."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import pytest

from cfsfuse.contract import justified
from cfsfuse.contract.checks import CHECKS
from cfsfuse.contract.entries import walk
from cfsfuse.errors import CfsError, HostError, UsageError
from cfsfuse.fstype import file_system_type
from cfsfuse.mount import kernel, syscalls
from cfsfuse.mount.mountinfo import mount_at
from cfsfuse.mount.options import MountOptions
from cfsfuse.mount.plan import Fact
from cfsfuse.mount.probe import Host
from cfsfuse.mount.unmount import unmount
from cfsfuse.verification import Verification
from integration.conftest import ROOT
from integration.holding import Pair, hold, missing_objects, oracle_mount
from integration.mounts import (
    CFSFUSE,
    ORDINARY,
    SELF,
    Stage,
    User,
    digest_of,
    eventually,
    noise,
    running,
    stage,
    wait_mounted,
)
from integration.test_contract import IMAGES, VARIANT_CHECKS, VARIANTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from integration.images import TestImage

USAGE, BAD, IMPOSSIBLE = 2, 3, 4
CONTENT = noise(10_000, "kernel backend")
SHIFT = 100_000  # what an idmap adds to the owners
_TMPFS = 0x01021994  # TMPFS_MAGIC in include/uapi/linux/magic.h
KERNEL = ("noverity", "backend=kernel")


@pytest.fixture(scope="module", autouse=True)
def _able(workspace: str, images_at: Callable[[str], TestImage]) -> None:
    """Skip all of it, by name, for who is not root, and where the oracle cannot mount either."""
    mountpoint = os.path.join(workspace, "able")
    os.makedirs(mountpoint, exist_ok=True)
    with oracle_mount(images_at("python"), mountpoint):
        pass


@contextlib.contextmanager
def image(user: User | None = SELF) -> Iterator[Stage]:
    with stage(user) as made:
        recipe = made.recipe()
        recipe.directory("/dir")
        recipe.file("/dir/file", CONTENT)
        recipe.inline("/inline", b"in the image\n")
        recipe.build(made.image)
        yield made


@pytest.fixture
def made() -> Iterator[Stage]:
    with image() as stage_of_image:
        yield stage_of_image


def read(made: Stage, name: str = "dir/file", mountpoint: str | None = None) -> bytes:
    with open(os.path.join(mountpoint or made.mountpoint, name), "rb") as file:
        return file.read()


@contextlib.contextmanager
def mounted(made: Stage, *options: str, image: str | None = None, mountpoint: str | None = None) -> Iterator[str]:
    """Let the kernel mount for a while, by the command, and take it away by the command."""
    where = mountpoint or made.mountpoint
    done = made.run(CFSFUSE, "mount", *made.words(*KERNEL, *options, image=image, mountpoint=mountpoint))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert made.processes() == []
    there = mount_at(where)
    assert there is not None
    assert (there.fstype, there.source) == ("overlay", "composefs")
    yield where
    done = made.run(CFSFUSE, "umount", where)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert mount_at(where) is None
    eventually(lambda: loop_devices(made) == [], "the release of loop devices")


def refused(made: Stage, code: int, pattern: str, *options: str, **words: str) -> None:
    """Assert that a mount ends with `code` and the one line `pattern`, and leaves nothing behind."""
    done = made.run(CFSFUSE, "mount", *made.words(*options, **words))
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert re.fullmatch(f"cfsfuse: {pattern}\n", done.stderr), done.stderr
    assert made.is_clean()
    eventually(lambda: loop_devices(made) == [], "the release of loop devices")


def loop_devices(made: Stage) -> list[str]:
    """Return the files behind loop devices that may be this stage's: below it, or in memory."""
    found = []
    for name in os.listdir("/sys/block"):
        with contextlib.suppress(OSError), open(f"/sys/block/{name}/loop/backing_file", encoding="utf-8") as file:
            found.append(file.read().strip())
    ours = (made.path, made.environment.get("SHM", made.path), "/memfd:cfsfuse-image")
    return [path for path in found if path.startswith(ours)]


# The contract ---------------------------------------------------------------------------------------------------------

SUBJECTS = list(itertools.product(IMAGES, ("root", "user")))


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, images_at: Callable[[str], TestImage], workspace: str) -> Iterator[Pair]:
    """The mount of the kernel backend and the oracle's, of the image and for the user that the test is for."""
    name, looking = request.param
    account = ROOT if looking == "root" else request.getfixturevalue("ordinary")
    source = images_at(name)
    oracle, ours = (os.path.join(workspace, place) for place in ("kernel-oracle", "kernel-ours"))
    for path in (oracle, ours):
        os.makedirs(path, exist_ok=True)
    options = MountOptions(basedir=source.base_directories, verification=Verification.OFF)
    with oracle_mount(source, oracle):
        kernel.mount(source.path, ours, options)
        try:
            entries = list(walk(os.fsencode(oracle)))
            yield Pair(ours, oracle, account, entries, missing_objects(oracle, entries))
        finally:
            unmount(ours)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("pair", SUBJECTS, indirect=True, scope="module", ids="-".join)
def test_is_as_the_oracle_has_it(pair: Pair, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the differences that FUSE is allowed, only those are left that two mounts of the kernel's always have."""
    unavoidable = [known for known in justified.JUSTIFIED if known.what in ("*st_dev", "*st_blocks")]
    monkeypatch.setattr(justified, "JUSTIFIED", unavoidable)
    hold(pair, check)


@pytest.mark.parametrize("check", VARIANT_CHECKS)
@pytest.mark.parametrize("pair", [(name, "root") for name in VARIANTS], indirect=True, scope="module", ids="-".join)
def test_contents_are_as_the_oracle_has_them(pair: Pair, check: str) -> None:
    hold(pair, check)


# Options --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def on_tmpfs(made: Stage) -> Iterator[str]:
    """Yield a directory on a tmpfs, from where EROFS cannot be mounted without a loop device; skip where none is."""
    try:
        path = tempfile.mkdtemp(prefix="cfsfuse-", dir="/dev/shm")
    except OSError as error:
        pytest.skip(f"/dev/shm: {error}")
    try:
        fd = os.open(path, os.O_RDONLY)
        kind = file_system_type(fd)
        os.close(fd)
        if kind != _TMPFS:
            pytest.skip("/dev/shm is no tmpfs")
        made.environment["SHM"] = path
        yield path
    finally:
        shutil.rmtree(path)


def test_an_image_in_a_file(made: Stage) -> None:
    with mounted(made):
        assert read(made) == CONTENT
        assert read(made, "inline") == b"in the image\n"
        assert sorted(os.listdir(made.mountpoint)) == ["dir", "inline"]


def test_an_image_on_tmpfs(made: Stage) -> None:
    with on_tmpfs(made) as path:
        copy = shutil.copy(made.image, path)
        with mounted(made, image=copy):
            assert read(made) == CONTENT


def test_digest(made: Stage) -> None:
    """What is mounted is a copy of the bytes that were measured: what happens to the file later changes nothing."""
    with open(made.image, "rb") as file:
        data = file.read()
    right = [digest_of(data).hex().upper(), digest_of(data, "sha512").hex()]
    for digest in right:
        with mounted(made, f"digest={digest}"):
            os.truncate(made.image, 0)
            assert read(made, "inline") == b"in the image\n"
            assert read(made) == CONTENT
        with open(made.image, "wb") as file:
            file.write(data)
    reason = f"{made.image}: the image's fs-verity digest is {right[0].lower()}, not {'0' * 64} as asked for by digest="
    refused(made, BAD, reason, *KERNEL, f"digest={'0' * 64}")


def test_base_directories_are_searched_in_order(made: Stage) -> None:
    first, last = made.directory("first"), made.directory("last")
    digest = digest_of(CONTENT).hex()
    os.mkdir(f"{first}/{digest[:2]}")
    with open(f"{first}/{digest[:2]}/{digest[2:]}", "wb") as file:
        file.write(noise(len(CONTENT), "another"))
    with mounted(made, f"basedir={last}:{made.store}:{first}"):
        assert read(made) == CONTENT
    with mounted(made, f"basedir={first}:{made.store}"):
        assert read(made) == noise(len(CONTENT), "another")


ODD = ["a b", "a,b", "a:b", "a\\b", "ä ö", "nl\nnl", "'quoted\"", "byte\udcff", "%s #"]


@pytest.mark.parametrize("name", ODD)
def test_paths_of_any_name(made: Stage, name: str) -> None:
    store, upper, work, mountpoint = (made.directory(f"{name}.{kind}") for kind in ("store", "upper", "work", "mnt"))
    shutil.copytree(made.store, store, dirs_exist_ok=True)
    odd = os.path.join(made.path, name)
    os.rename(made.image, odd)
    options = [f"{key}={escaped(path)}" for key, path in (("basedir", store), ("upperdir", upper), ("workdir", work))]
    with mounted(made, *options, image=odd, mountpoint=mountpoint):
        assert read(made, mountpoint=mountpoint) == CONTENT
        with open(os.path.join(mountpoint, name), "wb") as file:
            file.write(b"new")
    assert os.listdir(upper) == [name]


def escaped(path: str) -> str:
    """Return a path as an option has it; only in basedir a colon has a meaning."""
    escaped_path = path.replace(",", "\\,")
    return escaped_path.replace(":", "\\:") if path.endswith(".store") else escaped_path


def test_what_is_written_is_in_upperdir(made: Stage) -> None:
    upper, work = made.directory("upper"), made.directory("work")
    before = tree(made.store)
    layers = (f"upperdir={upper}", f"workdir={work}")
    with mounted(made, *layers):
        with open(made.at("new"), "wb") as file:
            file.write(b"new")
        with open(made.at("dir/file"), "r+b") as file:
            file.write(b"changed")
        os.unlink(made.at("inline"))
    assert sorted(os.listdir(upper)) == ["dir", "inline", "new"]
    assert tree(made.store) == before
    with mounted(made, *layers, "ro"):
        assert read(made) == b"changed" + CONTENT[7:]
        assert sorted(os.listdir(made.mountpoint)) == ["dir", "new"]
        with pytest.raises(OSError, match="Read-only file system"):
            os.unlink(made.at("new"))
    with mounted(made):
        assert read(made) == CONTENT


def tree(top: str) -> dict[str, tuple[int, int]]:
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(top) for name in names]
    return {path: (os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths}


def test_flags_of_the_mount(made: Stage) -> None:
    for options, expected in (
        ((), {"ro", "nosuid", "nodev"}),
        (("suid", "dev", "noexec"), {"ro", "noexec"}),
        ((f"upperdir={made.directory('u')}", f"workdir={made.directory('w')}"), {"rw", "nosuid", "nodev"}),
    ):
        with mounted(made, *options):
            assert flags(made.mountpoint) & {"ro", "rw", "nosuid", "nodev", "noexec"} == expected


def flags(mountpoint: str) -> set[str]:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        line = next(line for line in file if line.split(" ")[4] == mountpoint)
    return set(line.split(" ")[5].split(","))


@contextlib.contextmanager
def user_namespace() -> Iterator[str]:
    """Yield the path of a user namespace that maps owners to others, SHIFT higher."""
    # Without the stage's mark, by which its daemons are found.
    with running(subprocess.Popen(["unshare", "--user", "sleep", "60"], stderr=subprocess.PIPE, text=True)) as process:
        path = f"/proc/{process.pid}/ns/user"

        def is_there() -> bool:
            if process.poll() is not None:
                pytest.skip(f"unshare --user: {process.communicate()[1].strip()}")
            return os.readlink(path) != os.readlink("/proc/self/ns/user")

        eventually(is_there, "a user namespace")
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{process.pid}/{name}", "w", encoding="ascii") as file:
                file.write(f"0 {SHIFT} 65536")
        yield path


def test_owners_are_mapped(made: Stage) -> None:
    with user_namespace() as namespace, mounted(made, f"idmap={namespace}"):
        for name in ("", "dir", "dir/file", "inline"):
            status = os.lstat(made.at(name))
            assert (status.st_uid, status.st_gid) == (SHIFT, SHIFT)
        assert read(made) == CONTENT
    with mounted(made):
        assert os.lstat(made.at("dir/file")).st_uid == 0


# Bad input ------------------------------------------------------------------------------------------------------------


def test_an_idmap_that_is_no_user_namespace(made: Stage) -> None:
    for path in ("/proc/self/ns/mnt", made.image, made.store, "/dev/null"):
        expected = f"idmap={path}: not a user namespace; name one as /proc/PID/ns/user"
        refused(made, USAGE, expected, *KERNEL, f"idmap={path}")
    refused(made, USAGE, "idmap=/none: No such file or directory", *KERNEL, "idmap=/none")


def test_the_user_namespace_of_the_mount_maps_nothing(made: Stage) -> None:
    expected = "idmap=: the kernel does not map owners so: Operation not permitted; .*"
    refused(made, IMPOSSIBLE, expected, *KERNEL, "idmap=/proc/self/ns/user")


def test_layers_that_overlayfs_does_not_take(made: Stage) -> None:
    upper, work, inside = made.directory("upper"), made.directory("work"), os.path.join(made.store, "inside")
    os.mkdir(inside)
    for lacking, given in (("workdir", "upperdir"), ("upperdir", "workdir")):
        refused(made, USAGE, f"option {lacking}= is missing: .*", *KERNEL, f"{given}={upper}")
    store = f"{made.store}, which a mount must leave as it is"
    layers = [f"upperdir={inside}", f"workdir={work}"]
    refused(made, USAGE, f"upperdir: inside the object store {store}", *KERNEL, *layers)
    layers = [f"upperdir={upper}", f"workdir={inside}"]
    refused(made, USAGE, f"workdir: inside the object store {store}", *KERNEL, *layers)
    layers = [f"upperdir={upper}", f"workdir={made.path}/none"]
    refused(made, USAGE, f"{made.path}/none: workdir: No such file or directory", *KERNEL, *layers)
    with on_tmpfs(made) as other:
        expected = f"workdir={other}: not on the file system of upperdir={upper}"
        refused(made, USAGE, expected, *KERNEL, f"upperdir={upper}", f"workdir={other}")
    assert (os.listdir(upper), os.listdir(inside)) == ([], [])


def test_a_workdir_inside_upperdir(made: Stage) -> None:
    upper, inside = made.directory("upper"), made.directory("upper/inside")
    expected = f"workdir={inside}: must stand beside upperdir={upper}, in no part of it"
    refused(made, USAGE, expected, *KERNEL, f"upperdir={upper}", f"workdir={inside}")


def test_what_only_overlayfs_refuses(made: Stage) -> None:
    """All that was mounted for it is gone; tmpfs may have no place for the xattrs of an upper layer, proc has none."""
    expected = f"{made.mountpoint}: the kernel does not mount this: .*"
    refused(made, IMPOSSIBLE, expected, *KERNEL, "upperdir=/proc/sys", "workdir=/proc/tty")


def test_images_that_are_none(made: Stage) -> None:
    missing = f"{made.path}/missing"
    refused(made, BAD, f"{missing}: image: cannot be opened: No such file or directory", *KERNEL, image=missing)
    refused(made, BAD, f"{made.store}: image: not a regular file", *KERNEL, image=made.store)
    os.truncate(made.image, os.path.getsize(made.image) // 2)
    refused(made, BAD, f"{made.image}: .*truncated.*", *KERNEL)
    with open(made.image, "wb") as file:
        file.write(noise(100_000))
    refused(made, BAD, f"{made.image}: .*not an EROFS image", *KERNEL)


def test_base_directories_and_mountpoints_that_are_none(made: Stage) -> None:
    none = f"{made.path}/none"
    for path, reason in ((none, "No such file or directory"), (made.image, "Not a directory")):
        refused(made, USAGE, f"{path}: base directory: {reason}.*", *KERNEL, f"basedir={made.store}:{path}")
    refused(made, USAGE, f"{none}: mountpoint: No such .*; create the directory first", *KERNEL, mountpoint=none)
    refused(made, USAGE, f"{made.image}: mountpoint is not a directory", *KERNEL, mountpoint=made.image)
    refused(made, USAGE, "backend=fast: must be auto, kernel, overlay or fuse", "backend=fast")


@pytest.mark.parametrize("verification", ["tryverity", "verity"])
def test_verification_that_the_kernel_cannot_give(made: Stage, verification: str) -> None:
    digest = digest_of(CONTENT).hex()
    # Of a kernel before 6.6, or of objects; on a file system with fs-verity as well, for nobody has enabled it.
    expected = f"kernel backend: (object {digest[:2]}/{digest[2:]} has no fs-verity: .*|overlayfs .*)"
    refused(made, IMPOSSIBLE, expected, "backend=kernel", verification)


def test_options_that_need_a_server(made: Stage) -> None:
    for option in ("uid=1", "gid=1", "noallow_other"):
        refused(made, IMPOSSIBLE, f"kernel backend: {option.partition('=')[0]}.* is not for it.*", *KERNEL, option)


def test_an_ordinary_user() -> None:
    with image(ORDINARY) as made:
        refused(made, IMPOSSIBLE, "kernel backend: only root outside of user namespaces may mount EROFS", *KERNEL)


def test_mounting_twice_is_refused(made: Stage) -> None:
    already = f"cfsfuse: {made.mountpoint}: .* is mounted here already; cfsfuse umount {made.mountpoint}\n"
    with mounted(made):
        for backend in ("kernel", "fuse"):
            done = made.run(CFSFUSE, "mount", *made.words("noverity", f"backend={backend}"))
            assert (done.returncode, done.stdout) == (USAGE, "")
            assert re.fullmatch(already, done.stderr)
        assert made.mounts() == [made.mountpoint]
    with made.mounted():
        done = made.run(CFSFUSE, "mount", *made.words(*KERNEL))
        assert done.returncode == USAGE
        assert re.fullmatch(already, done.stderr)


def test_two_who_mount_at_once(made: Stage) -> None:
    words = [CFSFUSE, "mount", *made.words(*KERNEL)]
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(running(made.start(*words))) for _ in range(3)]
        said = [process.communicate(timeout=60)[1] for process in started]
    assert sorted(process.returncode for process in started) == [0, USAGE, USAGE]
    assert sum("mounted here already" in each for each in said) == 2
    assert made.mounts() == [made.mountpoint]
    assert made.run(CFSFUSE, "umount", made.mountpoint).returncode == 0


def test_a_mount_in_use(made: Stage) -> None:
    with mounted(made):
        with open(made.at("dir/file"), "rb"):
            done = made.run(CFSFUSE, "umount", made.mountpoint)
            assert done.returncode == IMPOSSIBLE
            assert re.fullmatch(
                f"cfsfuse: {made.mountpoint}: in use by .*; end that first, or use --lazy\n", done.stderr
            )
        assert read(made) == CONTENT
    done = made.run(CFSFUSE, "umount", made.mountpoint)
    assert (done.returncode, done.stderr) == (USAGE, f"cfsfuse: {made.mountpoint}: nothing is mounted here\n")


def test_the_helper_of_mount(made: Stage) -> None:
    helper = os.path.join(os.path.dirname(sys.executable), "mount.cfsfuse")
    done = made.run(helper, *made.words(*KERNEL, "noexec"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert read(made) == CONTENT
    assert flags(made.mountpoint) & {"ro", "nosuid", "nodev", "noexec"} == {"ro", "noexec"}
    assert made.run("umount", made.mountpoint).returncode == 0
    done = made.run(helper, *made.words("backend=kernel"))
    assert (done.returncode, done.stderr.count("\n")) == (IMPOSSIBLE, 1)
    assert done.stderr.startswith("mount.cfsfuse: kernel backend: ")


# What is left behind --------------------------------------------------------------------------------------------------


class Place:
    """In-process mounts of a stage, whose temporary files go to a directory of its own."""

    def __init__(self, made: Stage, image_path: str, options: MountOptions, temporary: str) -> None:
        self.made = made
        self.image = image_path
        self.options = options
        self.temporary = temporary
        self._descriptors = self._open()

    def mount(self) -> None:
        kernel.mount(self.image, self.made.mountpoint, self.options)

    def check_and_unmount(self) -> None:
        try:
            assert read(self.made) == CONTENT
            assert self.made.mounts() == [self.made.mountpoint]
        finally:
            unmount(self.made.mountpoint)

    def check_nothing_left(self) -> None:
        assert self.made.mounts() == []
        assert os.listdir(self.temporary) == []
        assert self._open() == self._descriptors
        eventually(lambda: loop_devices(self.made) == [], "the release of loop devices")

    def _open(self) -> list[str]:
        # The names alone would not tell one that was closed from another that was opened in its place.
        found = []
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):
                found.append(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        return found


def _from_file(made: Stage, stack: contextlib.ExitStack) -> tuple[str, MountOptions]:
    return made.image, MountOptions()


def _from_tmpfs(made: Stage, stack: contextlib.ExitStack) -> tuple[str, MountOptions]:
    return shutil.copy(made.image, stack.enter_context(on_tmpfs(made))), MountOptions()


def _with_digest(made: Stage, stack: contextlib.ExitStack) -> tuple[str, MountOptions]:
    with open(made.image, "rb") as file:
        return made.image, MountOptions(digest=digest_of(file.read()).hex())


def _with_layers(made: Stage, stack: contextlib.ExitStack) -> tuple[str, MountOptions]:
    namespace = stack.enter_context(user_namespace())
    return made.image, MountOptions(
        upperdir=made.directory("upper"), workdir=made.directory("work"), idmap=namespace, read_only=True
    )


KINDS = {"file": _from_file, "tmpfs": _from_tmpfs, "digest": _with_digest, "layers": _with_layers}


def _newest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the kernel as it is."""


def _keeping_parameters_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let overlayfs look as before 6.5."""
    monkeypatch.setattr(syscalls.Context, "takes_anything", lambda _context: True)


def _without_data_only_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let overlayfs look as before 6.5, and refuse what it refused then."""
    _keeping_parameters_unread(monkeypatch)
    original = syscalls.old_mount

    def refusing(source: str, target: str, fstype: str, flags_of_mount: int, data: str) -> None:
        if "::" in data:
            raise OSError(errno.EINVAL, "Invalid argument")
        original(source, target, fstype, flags_of_mount, data)

    monkeypatch.setattr(syscalls, "old_mount", refusing)


def _without_the_new_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernel look as before 5.2."""

    def missing(number: int, *_arguments: object) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(syscalls, "call", missing)


AGES = {
    "newest": _newest,
    "before-6.5": _keeping_parameters_unread,
    "without-data-only": _without_data_only_layers,
    "before-5.2": _without_the_new_calls,
}
# A kernel without the new calls cannot map owners.
COMBINATIONS = [pair for pair in itertools.product(KINDS, AGES) if pair != ("layers", "before-5.2")]


@pytest.fixture
def place(request: pytest.FixtureRequest, made: Stage, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A place whose parameter is the kind of mount and the age of the kernel."""
    kind, age = request.param
    temporary = made.directory("tmp")
    monkeypatch.setattr(tempfile, "tempdir", temporary)
    with contextlib.ExitStack() as stack:
        path, options = KINDS[kind](made, stack)
        options = options._replace(basedir=(made.store,), verification=Verification.OFF)
        AGES[age](monkeypatch)
        yield Place(made, path, options, temporary)


every_kind = pytest.mark.parametrize("place", COMBINATIONS, indirect=True, ids="-".join)


@every_kind
def test_mounts_leave_nothing_behind(place: Place) -> None:
    for _ in range(100):
        place.mount()
        place.check_and_unmount()
    place.check_nothing_left()


@pytest.mark.slow
@pytest.mark.timeout(900)
@every_kind
def test_a_thousand_mounts_leave_nothing_behind(place: Place) -> None:
    for _ in range(1000):
        place.mount()
        place.check_and_unmount()
    place.check_nothing_left()


def test_nothing_of_the_store_shows(made: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without data-only layers, whose store is merged with the image: the directories of objects are hidden there."""
    options = MountOptions(basedir=(made.store,), verification=Verification.OFF)
    place = Place(made, made.image, options, made.directory("tmp"))
    monkeypatch.setattr(tempfile, "tempdir", place.temporary)
    _without_data_only_layers(monkeypatch)
    place.mount()
    place.check_and_unmount()
    # A directory that both have would be merged: it hides nothing.
    for name in (".merkle", "dir"):
        os.mkdir(f"{made.store}/{name}")
        with pytest.raises(HostError, match=re.escape(f"{made.store}/{name} would show in the tree")):
            place.mount()
        os.rmdir(f"{made.store}/{name}")
    place.check_nothing_left()


@pytest.mark.parametrize(("age", "merged"), [("newest", False), ("before-6.5", False), ("without-data-only", True)])
def test_a_merged_view_is_told(monkeypatch: pytest.MonkeyPatch, age: str, *, merged: bool) -> None:
    AGES[age](monkeypatch)
    host = Host()
    assert host.look(Fact.KERNEL_VIEW) is None
    problem = host.look(Fact.FULL_VIEW)
    assert (problem is not None and problem.startswith("overlayfs of this kernel merges image and store")) is merged


def test_a_hidden_xattr_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before 6.7. What `look` sees is in a child of this process."""
    _keeping_parameters_unread(monkeypatch)

    def hidden(*_: object) -> bytes:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "getxattr", hidden)
    assert (Host().look(Fact.FULL_VIEW) or "").startswith("overlayfs of this kernel hides xattrs")


def test_a_hundred_mounts_by_turns(made: Stage) -> None:
    """In one process, which has the same descriptors afterwards, whatever became of each mount."""
    options = MountOptions(basedir=(made.store,), verification=Verification.OFF)
    place = Place(made, made.image, options, made.directory("tmp"))
    for number in range(100):
        place.options = options._replace(digest="0" * 64 if number % 3 == 2 else None)
        if place.options.digest:
            with pytest.raises(CfsError):
                place.mount()
        else:
            place.mount()
            with pytest.raises(UsageError, match="mounted here already"):
                place.mount()
            place.check_and_unmount()
    place.check_nothing_left()


# A failure at each call -----------------------------------------------------------------------------------------------

# Without clearing up (close, rmdir, umount): what cannot be taken away stays, and the kernel has no reason to refuse.
CALLS: list[tuple[Any, str]] = [
    (syscalls, "call"),
    (syscalls, "old_mount"),
    (fcntl, "ioctl"),
    (fcntl, "fcntl"),
    (fcntl, "flock"),
    (mmap, "mmap"),
    (tempfile, "mkdtemp"),
    (os, "open"),
    (os, "fstat"),
    (os, "stat"),
    (os, "pread"),
    (os, "sendfile"),
    (os, "memfd_create"),
]


class Saboteur:
    """Lets one of the calls fail that mounting makes, and notes which."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.count = 0
        self.failed = ""
        self._fails_at = -1
        self._number = 0

    @contextlib.contextmanager
    def at_work(self, fails_at: int = -1, number: int = 0) -> Iterator[None]:
        """Let call `fails_at`, counted from 0, fail with the errno `number`; without one, only count them."""
        self.count, self.failed, self._fails_at, self._number = 0, "", fails_at, number
        with self._monkeypatch.context() as patch:
            for module, name in CALLS:
                patch.setattr(module, name, self._wrapped(name, getattr(module, name)))
            yield

    def _wrapped(self, name: str, original: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            # Unlocking is clearing up.
            if name == "flock" and arguments[1] == fcntl.LOCK_UN:
                return original(*arguments, **named)
            self.count += 1
            if self.count - 1 == self._fails_at:
                self.failed = f"{name}{arguments}"
                raise OSError(self._number, os.strerror(self._number))
            return original(*arguments, **named)

        return call


def is_done_without(call: str, number: int, mountpoint: str) -> bool:
    """Return whether a mount may come about although `call` has failed with the errno `number`."""
    refusals = (
        f"open('{mountpoint}'",  # not readable: then there is no lock
        "ioctl(",  # fs-verity that is forbidden, or not there: then the digest is computed
    )
    always = (
        "b'noacl'",  # not known to the kernel
        "b'no such parameter'",  # as it must be
        f"memfd_create('cfsfuse-image', {os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | 8})",  # MFD_NOEXEC_SEAL, since 6.3
    )
    return any(text in call for text in always) or (number == errno.EPERM and call.startswith(refusals))


@every_kind
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM, errno.EPERM], ids=errno.errorcode.get)
def test_a_failure_at_any_call_leaves_nothing(place: Place, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    saboteur = Saboteur(monkeypatch)
    with saboteur.at_work():
        place.mount()
    place.check_and_unmount()
    calls = saboteur.count
    assert calls > 10
    for fails_at in range(calls):
        with saboteur.at_work(fails_at, number):
            failure = attempt(place.mount)
        if failure is None:
            assert is_done_without(saboteur.failed, number, place.made.mountpoint), saboteur.failed
            place.check_and_unmount()
        else:
            assert isinstance(failure, CfsError), (saboteur.failed, failure)
            assert "\n" not in str(failure)
        place.check_nothing_left()


def attempt(call: Callable[[], None]) -> str | Exception | None:
    """Return what `call` raises, without the frames that hold what they have opened."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - the kind of it is what the caller looks at
        return error.with_traceback(None)
    return None


# The ladder -----------------------------------------------------------------------------------------------------------


def explained(made: Stage, *options: str) -> list[str]:
    """Mount with --explain and return what is said of the kernel, overlay and FUSE backends."""
    done = made.run(CFSFUSE, "mount", "--explain", *made.words("backend=auto", *options))
    assert (done.returncode, done.stderr) == (0, "")
    return split_explanation(done.stdout)


def split_explanation(text: str) -> list[str]:
    lines = text.splitlines()
    assert [line.split()[0] for line in lines] == ["kernel", "overlay", "fuse"]
    return lines


NO_VERITY = "(object .* has no fs-verity: .*|overlayfs .*)"  # of a kernel before 6.6, or of objects
OVERLAY_POSSIBLE = "  overlay  (possible|refused: overlayfs.*; that needs Linux 6.16)"


def test_auto_of_root_without_verification_is_the_kernel(made: Stage) -> None:
    first, second, third = explained(made, "noverity")
    assert (first, third) == ("  kernel   chosen", "  fuse     possible")
    assert re.fullmatch(OVERLAY_POSSIBLE, second)
    there = mount_at(made.mountpoint)
    assert there is not None
    assert there.fstype == "overlay"
    assert made.processes() == []
    assert made.run(CFSFUSE, "umount", made.mountpoint).returncode == 0


def test_auto_of_root_with_verification_is_fuse_where_objects_have_no_verity(made: Stage) -> None:
    first, second, third = explained(made)
    assert re.fullmatch(f"  kernel   refused: {NO_VERITY}", first)
    assert re.fullmatch(f"  overlay  refused: {NO_VERITY}", second)
    assert third == "  fuse     chosen"
    there = mount_at(made.mountpoint)
    assert there is not None
    assert there.fstype == "fuse.cfsfuse"
    made.unmount()


def test_auto_of_an_ordinary_user_is_fuse() -> None:
    with image(ORDINARY) as made:
        first, second, third = explained(made, "noverity")
        assert first.startswith("  kernel   refused: only root outside of user namespaces may mount EROFS")
        assert second.startswith("  overlay  refused: needs CAP_SYS_ADMIN: ")
        assert third == "  fuse     chosen"
        made.unmount()


def test_a_refusal_is_explained_too(made: Stage) -> None:
    done = made.run(CFSFUSE, "mount", "--explain", *made.words("backend=kernel"))
    assert (done.returncode, done.stderr.count("\n")) == (IMPOSSIBLE, 1)
    first, second, third = split_explanation(done.stdout)
    assert first.startswith("  kernel   refused: ")
    assert re.fullmatch(f"  overlay  refused: {NO_VERITY}", second)
    assert third == "  fuse     possible"
    assert made.is_clean()


def test_a_server_in_the_foreground_is_explained_before_it_serves(made: Stage) -> None:
    words = [CFSFUSE, "mount", "-f", "--explain", *made.words("backend=auto")]
    with running(made.start(*words)) as process:
        assert process.stdout is not None
        refusal = "  kernel   refused: --foreground is for a server, which it has not; "
        assert process.stdout.readline().startswith(refusal)
        assert process.stdout.readline().startswith("  overlay  refused: ")
        assert process.stdout.readline() == "  fuse     chosen\n"
        wait_mounted(process, made.mountpoint)
        assert read(made) == CONTENT
        made.unmount()
        assert process.wait(20) == 0


def test_backend_of_the_command_line_counts_more_than_the_option(made: Stage) -> None:
    done = made.run(CFSFUSE, "mount", "--backend=kernel", *made.words("noverity", "backend=fuse"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    there = mount_at(made.mountpoint)
    assert there is not None
    assert there.fstype == "overlay"
    assert made.run(CFSFUSE, "umount", made.mountpoint).returncode == 0


def doctor(made: Stage, *wrapper: str, options: tuple[str, ...] = ()) -> dict[str, str]:
    """Return what the doctor says of each fact."""
    done = made.run(*wrapper, CFSFUSE, "doctor", *options)
    if done.returncode and wrapper:
        pytest.skip(f"{wrapper[0]}: {done.stderr.strip()}")
    assert (done.returncode, done.stderr) == (0, "")
    facts, *promises = done.stdout.split("\n\n")
    assert facts.startswith(f"Linux {os.uname().release}\n")
    assert [promise.partition(" (")[0] for promise in promises] == [
        "Mounts verified",
        "Mounts verified, all of it",
        "Mounts not verified",
    ]
    assert made.is_clean()
    return dict(re.split(r"\s{2,}(?=yes|no: |depends )", line.strip(), maxsplit=1) for line in facts.splitlines()[1:])


MOUNT, VIEW, OBJECTS = "mounts without a helper", "kernel mounts of composefs images", "objects with fs-verity"
FUSE, FUSE_MOUNTS, USER_OVERLAY = "/dev/fuse", "FUSE mounts", "overlayfs with user.* xattrs"


def test_doctor_of_root(made: Stage) -> None:
    facts = doctor(made)
    assert [facts[name] for name in (MOUNT, VIEW, FUSE, FUSE_MOUNTS)] == ["yes"] * 4
    assert facts[OBJECTS].startswith("depends on the store: ")
    facts = doctor(made, options=(made.image, "-o", f"basedir={made.store}"))
    assert facts[OBJECTS].startswith("no: object ")


def test_doctor_in_json(made: Stage) -> None:
    done = made.run(CFSFUSE, "doctor", "--json", made.image, "-o", f"basedir={made.store}")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert list(document) == ["kernel", "facts", "backends"]
    assert document["kernel"] == os.uname().release
    facts = [
        "erofs",
        "mount",
        "kernel_view",
        "full_view",
        "user_overlay",
        "user_overlay_data",
        "overlay_verity",
        "objects_verity",
    ]
    assert list(document["facts"]) == [*facts, "fuse", "fuse_mount", "namespaces"]
    assert document["facts"]["kernel_view"] is None
    assert document["facts"]["objects_verity"].startswith("object ")
    assert list(document["backends"]) == ["tryverity", "verity", "noverity"]
    data = document["facts"]["user_overlay_data"]
    assert document["backends"]["noverity"] == {"kernel": [], "overlay": [] if data is None else [data], "fuse": []}
    for verifying in ("tryverity", "verity"):
        for stacked in ("kernel", "overlay"):
            assert document["facts"]["objects_verity"] in document["backends"][verifying][stacked]
        assert document["backends"][verifying]["fuse"] == []


def test_doctor_with_bad_input(made: Stage) -> None:
    for words, code, said in (
        ([made.image], USAGE, "no base directory: name the object store of the image with -o basedir="),
        (["/none", "-o", f"basedir={made.store}"], BAD, "/none: image: cannot be opened: No such file or directory"),
        (["-o", "nonsense"], USAGE, "unknown option 'nonsense'; see cfsfuse mount --help"),
    ):
        done = made.run(CFSFUSE, "doctor", *words)
        assert (done.returncode, done.stdout) == (code, "")
        assert done.stderr.partition(": ")[2] == f"{said}\n"


@pytest.mark.parametrize("user", [SELF, ORDINARY], ids=["root", "ordinary"])
def test_doctor_in_a_user_namespace(user: User) -> None:
    with image(user) as made:
        facts = doctor(made, "unshare", "--user", "--map-root-user", "--mount")
        assert facts[MOUNT] == facts[FUSE] == facts[FUSE_MOUNTS] == facts[USER_OVERLAY] == "yes"
        assert facts["EROFS mounts"] == "no: only root outside of user namespaces may mount EROFS"
        assert facts[VIEW] == "no: cannot be tried without EROFS mounts"


def test_doctor_of_an_ordinary_user() -> None:
    with image(ORDINARY) as made:
        facts = doctor(made)
        assert facts[MOUNT].startswith("no: needs CAP_SYS_ADMIN: ")
        assert facts[VIEW].startswith("no: ")
        assert facts[USER_OVERLAY].startswith("no: ")
        assert facts[FUSE] == facts[FUSE_MOUNTS] == "yes"
