"""What a host is found to have: each problem with its remedy, looked for once, in a way that leaves nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import tempfile
from typing import TYPE_CHECKING

import pytest

from cfsfuse.api import open_image
from cfsfuse.errors import HostError
from cfsfuse.mount import fusemount, kernel, overlayfs, probe, sample, syscalls
from cfsfuse.mount.plan import Fact
from cfsfuse.mount.probe import Host
from cfsfuse.mount.syscalls import Context
from cfsfuse.mount.trial import Trial
from cfsfuse.verity.digest import SHA256
from cfsfuse.verity.ioctl import Absence, Measured
from cfsfuse.verity.merkle import content_digest
from tests import imagemaker as im
from tests.cli_support import add_object
from tests.support import reader_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from cfsfuse.mount.layers import Layers


def refusing(number: int, *, at: str = "__init__") -> type[syscalls.Context]:
    """Return a kind of context whose method `at` fails."""

    class Refusing(syscalls.Context):
        def __init__(self, _fstype: str) -> None:
            if at == "__init__":
                raise OSError(number, os.strerror(number))
            self._fd = os.memfd_create("context")

        def set(self, _key: str, _value: str | int | None = None) -> None:
            if at == "takes_anything":
                return
            raise OSError(number, os.strerror(number))

        def mount(self, _attributes: int) -> int:
            raise OSError(number, os.strerror(number))

    return Refusing


def test_a_fact_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["wrong", None]
    monkeypatch.setitem(probe._TRIES, Fact.MOUNT, lambda: answers.pop(0))
    host = Host()
    assert [host.look(Fact.MOUNT) for _ in range(3)] == ["wrong"] * 3
    good = Host()
    assert [good.look(Fact.MOUNT) for _ in range(3)] == [None] * 3


@pytest.mark.parametrize("fact", set(Fact) - {Fact.OBJECTS_VERITY}, ids=lambda fact: fact.name)
def test_a_try_that_fails_otherwise_is_a_problem_and_no_end(fact: Fact, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str | None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setitem(probe._TRIES, fact, fail)
    assert Host().look(fact) == "cannot be tried out: Too many open files"


def test_no_place_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """FUSE needs none: the mount goes on with that."""
    monkeypatch.setattr(probe, "_erofs", lambda: None)
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere/at all")
    assert Host().look(Fact.KERNEL_VIEW) == "cannot be tried out: No such file or directory"


@pytest.mark.parametrize(
    ("number", "at", "problem"),
    [
        (errno.ENODEV, "__init__", "this kernel has no overlayfs: modprobe overlay"),
        (errno.EPERM, "__init__", "cannot be tried without mounts without a helper"),
        (errno.ENOMEM, "__init__", "overlayfs: Cannot allocate memory"),
        (errno.EINVAL, "set", overlayfs.NO_VERITY),
        (0, "takes_anything", overlayfs.NO_VERITY),
    ],
)
def test_overlayfs_that_does_not_verify(number: int, at: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "Context", refusing(number, at=at))
    assert Host().look(Fact.OVERLAY_VERITY) == problem


@pytest.mark.parametrize(
    ("number", "problem"),
    [
        (errno.ENODEV, "this kernel has no EROFS: modprobe erofs"),
        (errno.EPERM, "only root outside of user namespaces may mount EROFS"),
    ],
)
def test_no_erofs(number: int, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for at in ("__init__", "mount"):
        monkeypatch.setattr(probe, "Context", refusing(number, at=at))
        assert Host().look(Fact.EROFS) == problem
        assert Host().look(Fact.KERNEL_VIEW) == "cannot be tried without EROFS mounts"


class Overlay:
    """Stands for overlayfs above a lower and a data-only layer that lie in a temporary folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self.content = b""
        self.parameters: list[Mapping[str, str | None]] = []
        self.failure: Exception | None = None
        (folder / "scratch").mkdir()
        (folder / "view").mkdir()

        class Tmpfs(refusing(errno.EPERM)):  # type: ignore[misc]  # a class made at run time
            def __init__(self, fstype: str) -> None:
                assert fstype == "tmpfs"
                self._fd = os.memfd_create("context")

            def mount(self, _attributes: int) -> int:
                return os.open(folder / "scratch", os.O_RDONLY)

        monkeypatch.setattr(probe, "Context", Tmpfs)
        monkeypatch.setattr(overlayfs, "above", self._above)

    @contextlib.contextmanager
    def _above(self, lower: int, layers: Layers, parameters: Mapping[str, str | None], *_rest: object) -> Iterator[int]:
        self.parameters.append(parameters)
        assert os.listdir(lower) == ["file"]
        assert [os.listdir(data) for data in layers.data] == [["object"]]
        if self.failure is not None:
            raise self.failure
        (self._folder / "view/file").write_bytes(self.content)
        with syscalls.closing(os.open(self._folder / "view", os.O_RDONLY)) as view:
            yield view


@pytest.fixture
def overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Overlay]:
    made = Overlay(tmp_path, monkeypatch)
    before = os.listdir("/proc/self/fd")
    yield made
    assert os.listdir("/proc/self/fd") == before


def test_overlayfs_of_users(overlay: Overlay, tmp_path: Path) -> None:
    """With and without a redirect to follow; what is to be shown is not what lies in the layer."""
    overlay.content = probe._CONTENT
    assert Host().look(Fact.USER_OVERLAY_DATA) is None
    file = tmp_path / "scratch/lower/file"
    assert file.read_bytes() == bytes(len(probe._CONTENT))
    assert (os.getxattr(file, "user.overlay.metacopy"), os.getxattr(file, "user.overlay.redirect")) == (b"", b"/object")
    assert (tmp_path / "scratch/data/object").read_bytes() == probe._CONTENT
    assert overlay.parameters == [{"userxattr": None}]


def test_overlayfs_of_users_that_follows_no_redirect(overlay: Overlay, tmp_path: Path) -> None:
    overlay.content = bytes(len(probe._CONTENT))
    assert Host().look(Fact.USER_OVERLAY_DATA) == "overlayfs: shows an empty file; that needs Linux 6.16"
    shutil.rmtree(tmp_path / "scratch")
    (tmp_path / "scratch").mkdir()
    assert Host().look(Fact.USER_OVERLAY) is None


@pytest.mark.parametrize(
    ("fact", "needs"), [(Fact.USER_OVERLAY, "Linux 6.15"), (Fact.USER_OVERLAY_DATA, "Linux 6.16")], ids=str
)
@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (OSError(errno.EPERM, "Operation not permitted"), "overlayfs: Operation not permitted"),
        (OSError(errno.EINVAL, "Invalid argument"), "overlayfs: Invalid argument"),
        (overlayfs.TooOldError(), "overlayfs of this kernel does not take descriptors"),
    ],
    ids=repr,
)
def test_overlayfs_that_is_not_for_users(
    overlay: Overlay, fact: Fact, needs: str, failure: Exception, said: str
) -> None:
    overlay.failure = failure
    assert Host().look(fact) == f"{said}; that needs {needs}"


@pytest.mark.parametrize("fact", [Fact.USER_OVERLAY, Fact.USER_OVERLAY_DATA])
def test_no_scratch_directory_for_overlayfs(fact: Fact, monkeypatch: pytest.MonkeyPatch) -> None:
    for at in ("__init__", "mount"):
        monkeypatch.setattr(probe, "Context", refusing(errno.EPERM, at=at))
        assert Host().look(fact) == "cannot be tried without mounts without a helper"


def test_mounting_that_is_not_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "has_sys_admin", lambda: False)
    assert str(Host().look(Fact.MOUNT)).startswith("needs CAP_SYS_ADMIN: ")
    monkeypatch.setattr(probe, "has_sys_admin", lambda: True)
    monkeypatch.setattr(probe, "Context", refusing(errno.EPERM))
    assert str(Host().look(Fact.MOUNT)).startswith("this container forbids mounting: Operation not permitted; ")


def test_mounts_of_fuse_need_a_helper_or_privileges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "has_sys_admin", lambda: True)
    monkeypatch.setenv("PATH", "")
    assert Host().look(Fact.FUSE_MOUNT) is None
    monkeypatch.setattr(probe, "has_sys_admin", lambda: False)
    assert Host().look(Fact.FUSE_MOUNT) == "fusermount3: not found; install the package fuse3"
    monkeypatch.setattr(shutil, "which", lambda _name: "/usr/bin/fusermount3")
    monkeypatch.setattr(probe, "has_no_new_privileges", lambda: False)
    assert Host().look(Fact.FUSE_MOUNT) is None
    monkeypatch.setattr(probe, "has_no_new_privileges", lambda: True)
    assert "no_new_privs" in str(Host().look(Fact.FUSE_MOUNT))


def test_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise HostError("/dev/fuse: not there")

    monkeypatch.setattr(fusemount, "check_device", missing)
    assert Host().look(Fact.FUSE) == "/dev/fuse: not there"
    monkeypatch.setattr(fusemount, "check_device", lambda: None)
    assert Host().look(Fact.FUSE) is None


# What is tried in a child ---------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda: None, None),
        (raising(HostError("no, \udcff")), "no, \\udcff"),
        (raising(OSError(errno.EIO, "Input/output error")), "[Errno 5] Input/output error"),
        (raising(ZeroDivisionError()), "the process that tried it has crashed"),
        (raising(SystemExit(0)), "the process that tried it has crashed"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "the process that tried it has crashed"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_says_how_it_went(run: Callable[[], None], said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A try that crashes has not shown that all is well."""
    monkeypatch.setattr(syscalls, "unshare_mounts", lambda: None)
    before = os.listdir("/proc/self/fd")
    assert probe._in_child(run) == said
    assert os.listdir("/proc/self/fd") == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_nothing_is_tried_outside_of_a_mount_namespace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried: list[str] = []
    monkeypatch.setattr(syscalls, "unshare_mounts", raising(OSError(errno.EPERM, "Operation not permitted")))
    monkeypatch.setattr(kernel, "mount", lambda *_: tried.append("mount"))
    with pytest.raises(OSError, match="Operation not permitted"):
        Trial(str(tmp_path)).read()
    assert tried == []


def test_the_trial_is_what_the_reader_shows(tmp_path: Path) -> None:
    """The image of the trial is a right one, so that what it says of a kernel is right."""
    Trial(str(tmp_path))
    with open_image(tmp_path / "image", basedirs=[tmp_path / "objects"]) as image:
        assert image.read("/file") == b"the kernel shows this file"


@pytest.mark.parametrize(
    ("fact", "tells", "has", "trials"),
    [
        (Fact.KERNEL_VIEW, True, True, 1),
        (Fact.KERNEL_VIEW, True, False, 1),
        (Fact.KERNEL_VIEW, False, True, 0),
        (Fact.KERNEL_VIEW, False, False, 1),
        (Fact.FULL_VIEW, True, True, 0),
        (Fact.FULL_VIEW, True, False, 1),
        (Fact.FULL_VIEW, False, True, 0),
        (Fact.FULL_VIEW, False, False, 1),
    ],
)
def test_a_trial_is_made(
    monkeypatch: pytest.MonkeyPatch,
    fact: Fact,
    trials: int,
    *,
    tells: bool,
    has: bool,
) -> None:
    """Where somebody is told, or overlayfs is old: else the mount that follows says the same."""
    tried: list[str] = []
    monkeypatch.setattr(probe, "_erofs", lambda: None)
    monkeypatch.setattr(overlayfs, "appends_layers", lambda: has)
    monkeypatch.setattr(probe, "_in_child", lambda _: tried.append("trial"))
    assert Host(tells=tells).look(fact) is None
    assert len(tried) == trials


@pytest.mark.parametrize("age", ["6.7", "6.5", "5.10", "none"])
def test_overlayfs_takes_layers_one_by_one(monkeypatch: pytest.MonkeyPatch, age: str) -> None:
    class Overlay(Context):
        """Takes what overlayfs of that age does."""

        def __init__(self, _fstype: str) -> None:
            if age == "none":
                raise OSError(errno.ENODEV, "No such device")
            self._fd = os.memfd_create("context")

        def set(self, key: str, value: str | int | None = None) -> None:
            assert value is not None
            if age == "5.10" or (age == "6.7" and key in ("lowerdir+", "datadir+")):
                return
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(overlayfs, "Context", Overlay)
    assert overlayfs.appends_layers() is (age == "6.7")


# The objects ----------------------------------------------------------------------------------------------------------


MISSING = im.external(1, b"bb/missing", b"\x11" * 32)


class Store:
    """A store of objects of which some have fs-verity, by the path of the object."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.enforced: dict[int, bytes] = {}
        self.absence = Absence.FILE
        self.asked = 0
        monkeypatch.setattr(sample, "measure", self._measure)
        monkeypatch.setattr(sample, "absence", lambda _fd: self.absence)

    def add(self, content: bytes, enforced: bytes | None) -> im.Entry:
        """Add an object for which the kernel enforces the digest of the content `enforced`; return an entry of it."""
        entry = add_object(self.path, content)
        if enforced is not None:
            name = content_digest(SHA256, content).hex()
            inode = (self.path / name[:2] / name[2:]).stat().st_ino
            self.enforced[inode] = content_digest(SHA256, enforced)
        return entry

    def problem(self, **files: im.Entry) -> str | None:
        """Return what is wrong with the objects of an image of `files`."""
        reader = reader_of(im.make(im.directory({name.encode(): entry for name, entry in files.items()})))
        return Host(lambda: reader, (str(self.path),)).look(Fact.OBJECTS_VERITY)

    def _measure(self, fd: int) -> Measured | None:
        self.asked += 1
        value = self.enforced.get(os.fstat(fd).st_ino)
        return None if value is None else Measured("sha256", value)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    return Store(tmp_path, monkeypatch)


def test_objects_that_the_kernel_verifies(store: Store) -> None:
    assert store.problem(a=store.add(b"a", b"a"), b=store.add(b"b", b"b")) is None
    assert store.asked == 2


@pytest.mark.parametrize(
    ("absence", "remedy"),
    [(Absence.FILE, "enable it with fsverity"), (Absence.FILE_SYSTEM, "tune2fs -O verity enables it")],
)
def test_an_object_without_verity(store: Store, absence: Absence, remedy: str) -> None:
    store.absence = absence
    name = content_digest(SHA256, b"b").hex()
    problem = store.problem(a=store.add(b"a", b"a"), b=store.add(b"b", None))
    assert problem is not None
    assert problem.startswith(f"object {name[:2]}/{name[2:]} has no fs-verity: ")
    assert remedy in problem


def test_an_object_with_verity_of_something_else(store: Store) -> None:
    assert "another fs-verity digest" in str(store.problem(a=store.add(b"a", b"other")))


def test_what_says_nothing_about_the_kernel(store: Store) -> None:
    """Files without a digest or in the image, and a missing object beside one that is there."""
    unverified = im.external(1, b"aa/none", None)
    assert store.problem(a=unverified, c=im.file(b"inline"), d=im.symlink(b"a")) is None
    assert store.problem() is None
    assert store.problem(a=MISSING, b=store.add(b"b", b"b")) is None


def test_a_store_whose_objects_are_not_there(store: Store) -> None:
    """Filled later, it may have objects that the kernel refuses."""
    problem = "object bb/missing: not in any base directory; so nothing is known of fs-verity in the store"
    assert store.problem(a=MISSING, b=im.file(b"inline")) == problem


def test_only_some_of_many_objects_are_asked(store: Store) -> None:
    files = {f"f{index:03}": store.add(b"%d" % index, b"%d" % index) for index in range(50)}
    assert store.problem(**files) is None
    assert 0 < store.asked < 20


def test_objects_that_cannot_be_asked(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    entry = store.add(b"a", b"a")
    monkeypatch.setattr(sample, "measure", fail)
    assert store.problem(a=entry) == "cannot be tried out: Input/output error"


def test_no_descriptor_of_the_store_is_left_open(store: Store) -> None:
    good, bad = store.add(b"a", b"a"), store.add(b"b", None)
    before = os.listdir("/proc/self/fd")
    store.problem(a=good)
    store.problem(a=bad)
    assert os.listdir("/proc/self/fd") == before


def test_without_an_image_there_are_no_objects() -> None:
    assert Host().look(Fact.OBJECTS_VERITY) == probe.NOT_LOOKED_AT
