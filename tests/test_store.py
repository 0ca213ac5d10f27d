"""The writing side of an object store: whole objects or none, whatever fails and whoever else is at work."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from cfsfuse.builder import contents, hashing, staging, store
from cfsfuse.builder.hashing import Hasher
from cfsfuse.builder.scan import Options, scan
from cfsfuse.builder.staging import Staging
from cfsfuse.builder.store import StoreWriter, Summary
from cfsfuse.errors import SourceError, StoreError
from cfsfuse.fstype import LOCAL
from cfsfuse.objects import WHOLE_FILE_MAX
from cfsfuse.verity import ioctl
from cfsfuse.verity.digest import SHA256
from cfsfuse.verity.merkle import content_digest
from tests.support import HERE, leaving_nothing, random_bytes, tree_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ROOT = os.path.dirname(HERE)
SMALL = random_bytes(1000)
LARGE = random_bytes(WHOLE_FILE_MAX + 5000)
# Since Python 3.12 forking warns where threads run, and the one that pytest's faulthandler_timeout starts counts.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
is_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let workers start for the smallest tree; let no test leave a descriptor or a process, or wait for ever."""
    monkeypatch.setattr(contents, "_WORTH_WORKERS", 0)
    monkeypatch.setattr(staging, "file_system_type", lambda _fd: next(iter(LOCAL)))
    with leaving_nothing(60):
        yield


@pytest.fixture(params=[1, 2], ids=["here", "workers"])
def options(request: pytest.FixtureRequest) -> Options:
    return Options(processes=request.param)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a directory of 20 contents: three below 65 bytes, one that two files have, two that have trees."""
    path = tmp_path / "source"
    for number in range(20):
        folder = path / str(number % 3)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / str(number)).write_bytes(random_bytes(60 + 30 * number if number > 2 else 10, number))
    (path / "same").write_bytes(random_bytes(60 + 30 * 5, 5))
    (path / "large").write_bytes(LARGE)
    (path / "larger").write_bytes(LARGE + b"r")
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "store"


def name_of(content: bytes) -> str:
    digest = content_digest(SHA256, content).hex()
    return f"{digest[:2]}/{digest[2:]}"


def put(base: Path, content: bytes, name: str | None = None) -> Path:
    """Put an object into a store by hand."""
    path = base / (name or name_of(content))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def build(source: Path, base: Path, options: Options, **how: bool) -> Summary:
    with StoreWriter(str(base), **how) as writer:
        scan(str(source), options, writer)
        writer.publish()
    return writer.summary


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def files(base: Path) -> dict[str, bytes]:
    """Return everything in a store that is no directory, by path."""
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(base) for name in names]
    return {os.path.relpath(path, base): read(path) for path in paths}


def check_whole(base: Path) -> int:
    """Check that what has a final name is right; return how many objects there are."""
    found = files(base)
    for name, content in found.items():
        if name.startswith(".cfsfuse"):
            continue
        if name.startswith(".merkle/"):
            assert content == tree_of(found[name.removeprefix(".merkle/")])[0]
        else:
            assert name == name_of(content)
    return sum(not name.startswith(".") for name in found)


def leftovers(base: Path) -> list[str]:
    return [name for name in os.listdir(base) if name.startswith(".cfsfuse")]


def expected_of(source: Path) -> dict[str, bytes]:
    """Return what a store holds after a build into it."""
    contents = {content for content in files(source).values() if len(content) > 64}
    objects = {name_of(content): content for content in contents}
    trees = {
        ".merkle/" + name: tree_of(content)[0] for name, content in objects.items() if len(content) > WHOLE_FILE_MAX
    }
    return objects | trees


def test_a_build_fills_the_store(source: Path, base: Path, options: Options) -> None:
    summary = build(source, base, options)
    expected = expected_of(source)
    assert files(base) == expected
    objects = [content for name, content in expected.items() if not name.startswith(".")]
    assert (summary.new_objects, summary.new_bytes) == (len(objects), sum(map(len, objects)))
    assert (summary.reused_objects, summary.repaired_objects, summary.new_trees) == (0, 0, 2)
    assert {stat.S_IMODE(os.stat(base / name).st_mode) for name in expected} == {0o444}
    assert {stat.S_IMODE(os.stat(base / name).st_mode) for name in (".", expected.popitem()[0][:10])} == {0o755}


def test_a_second_build_uses_it_again(source: Path, base: Path, options: Options) -> None:
    first = build(source, base, options)
    before = {name: os.stat(base / name) for name in files(base)}
    summary = build(source, base, options)
    assert (summary.new_objects, summary.new_bytes, summary.new_trees) == (0, 0, 0)
    assert (summary.reused_objects, summary.reused_bytes) == (first.new_objects, first.new_bytes)
    assert {name: os.stat(base / name).st_ino for name in files(base)} == {n: s.st_ino for n, s in before.items()}


def test_nothing_is_visible_before_it_is_published(source: Path, base: Path) -> None:
    with StoreWriter(str(base)) as writer:
        scan(str(source), Options(processes=2), writer)
        assert [name for name in os.listdir(base) if not name.startswith(".cfsfuse")] == []
        assert len(leftovers(base)) == 1
        assert stat.S_IMODE(os.stat(base / leftovers(base)[0]).st_mode) == 0o700
        writer.publish()
        assert check_whole(base) == writer.summary.new_objects
    assert leftovers(base) == []


def test_what_is_not_published_leaves_nothing(source: Path, tmp_path: Path) -> None:
    base = tmp_path / "made" / "for" / "this"
    with StoreWriter(str(base)) as writer:
        scan(str(source), Options(processes=1), writer)
    assert not (tmp_path / "made").exists()


def test_a_store_with_nothing_in_it_is_there_all_the_same(tmp_path: Path) -> None:
    with StoreWriter(str(tmp_path / "made" / "for") + "/this/") as writer:
        writer.publish()
    assert os.listdir(tmp_path / "made" / "for" / "this") == []


def test_contents_from_memory(base: Path) -> None:
    with StoreWriter(str(base)) as writer:
        for content in (b"", b"x", SMALL, SMALL, bytearray(LARGE), memoryview(LARGE)[:WHOLE_FILE_MAX]):
            assert writer.add(content) == ("sha256", content_digest(SHA256, content))
        writer.publish()
        writer.add(b"later")
        writer.publish()
    assert check_whole(base) == 6
    assert (writer.summary.new_objects, writer.summary.new_trees) == (6, 1)


@pytest.mark.parametrize("content", [b"", SMALL, LARGE])
def test_contents_from_open_files(base: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with StoreWriter(str(base)) as writer, open(tmp_path / "file", "rb") as file:
        assert writer.add_file(file.fileno()) == ("sha256", content_digest(SHA256, content))
        writer.publish()
    assert check_whole(base) == 1


@pytest.mark.parametrize("content", [SMALL, LARGE])
@pytest.mark.parametrize("at", ["first", "last"])
def test_an_open_file_that_changes_is_no_object(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, at: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    chunks = hashing.chunks

    def change(*arguments: object) -> Iterator[memoryview]:
        if at == "first":
            os.truncate(path, 10)
        yield from chunks(*arguments)  # type: ignore[arg-type]  # as they come
        time.sleep(0.02)  # a tick of the clock that times of files come from
        path.chmod(0o600)

    monkeypatch.setattr(store, "chunks", change)
    monkeypatch.setattr(hashing, "chunks", change)
    with StoreWriter(str(base)) as writer, open(path, "rb") as file:
        with pytest.raises(SourceError, match="what it is called: it has changed"):
            writer.add_file(file.fileno(), b"what it is called")
        writer.add(b"other")
        writer.publish()
    assert list(files(base)) == [name_of(b"other")]


@pytest.mark.parametrize("how", ["copy_file_range", "nothing copied", "unsupported"])
def test_large_files_are_copied_somehow(base: Path, source: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    real = os.copy_file_range
    ranges = {
        "copy_file_range": lambda source, target, _count, *at: real(source, target, 100_000, *at),
        "nothing copied": lambda *_: 0,
        "unsupported": refuse,
    }
    monkeypatch.setattr(os, "copy_file_range", ranges[how])
    build(source, base, Options(processes=1))
    assert files(base) == expected_of(source)


def test_a_disk_that_is_full_while_a_file_is_copied(
    base: Path, source: Path, monkeypatch: pytest.MonkeyPatch, options: Options
) -> None:
    """It is not tried in another way, which would go on where there is room for it."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(StoreError, match="No space left on device"):
        build(source, base, options)
    assert not base.exists()


@pytest.mark.parametrize("verity", ["none", "enabled"])
def test_a_copy_is_measured(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verity: str) -> None:
    """A file that is written through a mapping changes without a trace in its times, once that page is dirty."""
    if verity == "none":
        monkeypatch.setattr(ioctl, "enable", refused)
    else:
        Verity(monkeypatch)  # which measures nothing
    path = tmp_path / "file"
    path.write_bytes(LARGE)
    copy = store._copy
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[5000] ^= 1

        def change(source: int, target: int, size: int) -> None:
            before = os.stat(path)
            mapping[5000] ^= 1
            copy(source, target, size)
            assert os.stat(path).st_mtime_ns == before.st_mtime_ns

        monkeypatch.setattr(store, "_copy", change)
        with StoreWriter(str(base)) as writer:
            with pytest.raises(SourceError, match="it has changed while it was read"):
                writer.add_file(file.fileno())
            writer.add(SMALL)
            writer.publish()
    assert files(base) == {name_of(SMALL): SMALL}


def refused(_fd: int) -> None:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def test_a_large_file_that_changes_while_it_is_measured(
    base: Path, source: Path, monkeypatch: pytest.MonkeyPatch, options: Options
) -> None:
    measure = hashing.measure_file

    def change(*arguments: object) -> bytes:
        digest = measure(*arguments)  # type: ignore[arg-type]  # as they come
        time.sleep(0.02)  # a tick of the clock that times of files come from
        (source / "large").chmod(0o600)
        return digest

    monkeypatch.setattr(store, "measure_file", change)
    (source / "larger").unlink()
    with pytest.raises(SourceError, match="large: it has changed while it was read"):
        build(source, base, options)


def test_objects_are_readable_by_all_and_directories_as_the_umask_says(
    base: Path, source: Path, options: Options
) -> None:
    before = os.umask(0o077)
    try:
        build(source, base, options)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(os.stat(base / name).st_mode) for name in files(base)} == {0o444}
    assert {stat.S_IMODE(os.stat(folder).st_mode) for folder, _, _ in os.walk(base)} == {0o700}


def test_the_store_may_be_a_symlink(base: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    base.symlink_to("elsewhere", target_is_directory=True)
    with StoreWriter(str(base)) as writer:
        writer.add(SMALL)
        writer.publish()
    assert check_whole(tmp_path / "elsewhere") == 1


# Trees


def test_trees_may_be_left_out(base: Path, source: Path) -> None:
    summary = build(source, base, Options(processes=1), trees=False)
    assert summary.new_trees == 0
    assert not (base / ".merkle").exists()


def test_a_missing_tree_is_recorded_for_an_object_that_exists(base: Path, source: Path, options: Options) -> None:
    build(source, base, options, trees=False)
    summary = build(source, base, options)
    assert (summary.new_objects, summary.new_trees) == (0, 2)
    assert files(base) == expected_of(source)


@pytest.mark.parametrize("damage", ["size", "symlink", "content"])
def test_a_wrong_tree_is_replaced(base: Path, source: Path, tmp_path: Path, damage: str) -> None:
    build(source, base, Options(processes=1))
    path = base / ".merkle" / name_of(LARGE)
    tree = path.read_bytes()
    path.unlink()
    if damage == "symlink":
        (tmp_path / "tree").write_bytes(tree)
        path.symlink_to(tmp_path / "tree")
    else:
        path.write_bytes(tree[:-1] if damage == "size" else bytes(len(tree)))
    summary = build(source, base, Options(processes=1), verify_existing=damage == "content")
    assert summary.new_trees == 1
    assert not path.is_symlink()
    assert path.read_bytes() == tree
    assert check_whole(base)


# What the store has already


@pytest.mark.parametrize("wrong", ["size", "empty", "symlink", "fifo"])
@pytest.mark.parametrize("content", [SMALL, LARGE])
def test_anything_else_in_the_place_of_an_object_is_replaced(
    base: Path, tmp_path: Path, wrong: str, content: bytes
) -> None:
    path = put(base, content + b"more" if wrong == "size" else b"", name_of(content))
    if wrong in ("symlink", "fifo"):
        path.unlink()
    if wrong == "symlink":
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    elif wrong == "fifo":
        os.mkfifo(path)
    with StoreWriter(str(base)) as writer:
        writer.add(content)
        writer.publish()
    assert (writer.summary.new_objects, writer.summary.repaired_objects) == (0, 1)
    assert writer.summary.repaired_bytes == len(content)
    assert not path.is_symlink()
    assert check_whole(base) == 1


@pytest.mark.parametrize("content", [SMALL, LARGE])
@pytest.mark.parametrize("what", ["an object", "a tree"])
def test_a_directory_in_the_place_of_an_object_is_an_error(base: Path, content: bytes, what: str) -> None:
    (base / (".merkle" if what == "a tree" else "") / name_of(content)).mkdir(parents=True)
    with StoreWriter(str(base)) as writer:
        if what == "a tree" and content == SMALL:
            writer.add(content)
            return
        with pytest.raises(
            StoreError, match=f"{name_of(content)}: object store: is a directory, in the place of {what}"
        ):
            writer.add(content)


def test_existing_objects_are_believed_unless_they_shall_be_verified(
    base: Path, source: Path, options: Options
) -> None:
    build(source, base, options)
    damaged = [name_of(LARGE), name_of(random_bytes(60 + 30 * 5, 5))]
    right = files(base)
    for name in damaged:
        (base / name).chmod(0o644)
        (base / name).write_bytes(bytes(len(right[name])))
    summary = build(source, base, options)
    assert (summary.new_objects, summary.repaired_objects) == (0, 0)
    assert files(base) != right
    summary = build(source, base, options, verify_existing=True)
    assert (summary.new_objects, summary.repaired_objects, summary.new_trees) == (0, 2, 0)
    assert summary.repaired_bytes == len(LARGE) + 60 + 30 * 5
    assert summary.reused_objects == len([name for name in right if not name.startswith(".")]) - 2
    assert files(base) == right


def test_the_kernel_is_asked_for_what_it_enforces(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(base, SMALL)
    put(base, b"wrong", name_of(b"right"))
    for content, known in ((SMALL, SMALL), (b"right", b"wrong")):
        measured = ioctl.Measured("sha256", content_digest(SHA256, known))
        monkeypatch.setattr(ioctl, "measure", lambda _fd, measured=measured: measured)
        monkeypatch.setattr(store, "measure_file", lambda *_: pytest.fail("read although the kernel knows"))
        with StoreWriter(str(base), verify_existing=True) as writer:
            writer.add(content)
        assert writer.summary.repaired_objects == (content != known)


# fs-verity


class Verity:
    """A file system that has fs-verity, as far as a test can tell."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.errors: list[int] = []
        self.error = 0
        self.tries = self.enabled = 0
        self.claimed: bytes | None = None
        monkeypatch.setattr(ioctl, "enable", self.enable)
        monkeypatch.setattr(ioctl, "measure", self.measure)

    def enable(self, fd: int) -> None:
        """Check what the kernel would, and that nobody can have the file open for writing."""
        self.tries += 1
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        assert flags & os.O_ACCMODE == os.O_RDONLY
        status = os.fstat(fd)
        assert status.st_mode & stat.S_IWUSR, "the owner may not write, so the owner may not enable"
        for other in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(int(other)), status):
                    assert fcntl.fcntl(int(other), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        number = self.errors.pop(0) if self.errors else self.error
        if number:
            raise OSError(number, os.strerror(number))
        self.enabled += 1

    def measure(self, _fd: int) -> ioctl.Measured | None:
        return None if self.claimed is None else ioctl.Measured("sha256", self.claimed)


@pytest.fixture
def verity(monkeypatch: pytest.MonkeyPatch) -> Verity:
    return Verity(monkeypatch)


def test_fs_verity_is_enabled_on_every_new_object(base: Path, source: Path, verity: Verity) -> None:
    summary = build(source, base, Options(processes=1))
    assert summary.has_verity
    assert verity.enabled == summary.new_objects + 1  # the probe
    assert {stat.S_IMODE(os.stat(base / name).st_mode) for name in files(base)} == {0o444}
    assert build(source, base, Options(processes=2)).has_verity


REASONS = {
    errno.EOPNOTSUPP: "this kernel has none, or the file system does not have it enabled",
    errno.ENOTTY: "this type of file system has none",
    errno.EPERM: "Operation not permitted",
}


@pytest.mark.parametrize("number", REASONS)
def test_where_it_cannot_be_enabled_the_summary_says_why(
    base: Path, source: Path, verity: Verity, options: Options, number: int
) -> None:
    verity.error = number
    summary = build(source, base, options)
    assert not summary.has_verity
    assert summary.verity_problem == REASONS[number]
    assert verity.tries == 1
    assert files(base) == expected_of(source)


def test_what_only_an_object_shows_is_remembered_as_well(
    base: Path, source: Path, verity: Verity, options: Options
) -> None:
    verity.errors = [0, errno.EFBIG]
    verity.error = errno.EFBIG
    summary = build(source, base, options)
    assert summary.verity_problem == os.strerror(errno.EFBIG)
    assert files(base) == expected_of(source)
    assert {stat.S_IMODE(os.stat(base / name).st_mode) for name in files(base)} == {0o444}


def test_a_descriptor_that_a_thread_has_forked_away_is_waited_for(
    base: Path, verity: Verity, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    verity.errors = [0, errno.ETXTBSY, errno.ETXTBSY]
    with StoreWriter(str(base)) as writer:
        writer.add(SMALL)
    assert writer.summary.has_verity
    assert len(pauses) == 2


def test_a_descriptor_that_stays_is_not_waited_for_forever(
    base: Path, verity: Verity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    verity.errors = [0]
    verity.error = errno.ETXTBSY
    with StoreWriter(str(base)) as writer:
        writer.add(SMALL)
        verity.error = 0
        writer.add(b"the next one")
    assert writer.summary.verity_problem == os.strerror(errno.ETXTBSY)
    assert verity.enabled == 2  # the probe, and the next one


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_is_no_lack_of_fs_verity(base: Path, verity: Verity, number: int) -> None:
    verity.errors = [0, number]
    with StoreWriter(str(base)) as writer:
        with pytest.raises(StoreError, match=os.strerror(number)):
            writer.add(SMALL)
        writer.publish()
    assert files(base) == {}


def test_what_the_kernel_measures_is_what_was_hashed(base: Path, source: Path, verity: Verity) -> None:
    verity.claimed = b"\xab" * 32
    with StoreWriter(str(base)) as writer, open(source / "large", "rb") as file:
        with pytest.raises(SourceError, match="it has changed while it was read"):
            writer.add_file(file.fileno())
        writer.publish()
    assert files(base) == {}


# Builds that fail


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a directory with little space: a small tmpfs for root, else one where files may not be large."""
    path = tmp_path / "disk"
    path.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, b"size=1m") == 0:
        yield path
        assert libc.umount2(os.fsencode(path), 2) == 0
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    yield path
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_publishes_nothing(source: Path, small_disk: Path, options: Options) -> None:
    base = small_disk / "store"
    put(base, SMALL)
    with pytest.raises(StoreError, match=rf"{base}: object store: (No space left on device|File too large)$"):
        build(source, base, options)
    assert files(base) == {name_of(SMALL): SMALL}
    assert leftovers(base) == []


def test_a_file_that_did_not_fit_is_not_published_later(small_disk: Path) -> None:
    base = small_disk / "store"
    with StoreWriter(str(base)) as writer:
        with pytest.raises(StoreError):
            writer.add(random_bytes(5 << 20))
        writer.add(SMALL)
        writer.publish()
    assert files(base) == {name_of(SMALL): SMALL}


def test_an_error_of_the_source_publishes_nothing(
    source: Path, base: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(base, SMALL)
    file = Hasher.file

    def vanish(self: Hasher, directory: int, expected: tuple[bytes, int], *more: object) -> object:
        if expected[0] == b"12":
            os.unlink(source / "0" / "12")
        return file(self, directory, expected, *more)  # type: ignore[arg-type]  # as they come

    monkeypatch.setattr(Hasher, "file", vanish)
    with StoreWriter(str(base)) as writer:
        with pytest.raises(SourceError, match="0/12: it has vanished"):
            scan(str(source), options, writer)
        with pytest.raises(StoreError, match="has failed; nothing is published"):
            writer.publish()
    assert files(base) == {name_of(SMALL): SMALL}


@is_root
def test_a_read_only_store(tmp_path: Path, base: Path) -> None:
    put(base, SMALL)
    libc = ctypes.CDLL(None, use_errno=True)
    bind, remount = 4096, 4096 | 32 | 1  # include/uapi/linux/mount.h: MS_BIND, MS_REMOUNT, MS_RDONLY
    if libc.mount(os.fsencode(base), os.fsencode(base), None, bind, None):
        pytest.skip("may not mount")
    try:
        assert libc.mount(None, os.fsencode(base), None, remount, None) == 0
        for path in (base, base / "below"):
            with (
                pytest.raises(StoreError, match=rf"{path}: object store: Read-only file system$"),
                StoreWriter(str(path)),
            ):
                pass
    finally:
        assert libc.umount2(os.fsencode(base), 2) == 0
    assert files(base) == {name_of(SMALL): SMALL}


@pytest.mark.parametrize("place", ["store", "above"])
def test_a_store_that_is_no_directory(tmp_path: Path, place: str) -> None:
    (tmp_path / place).write_bytes(b"a file")
    path = tmp_path / place / "below" if place == "above" else tmp_path / place
    with pytest.raises(StoreError, match=rf"{path}: object store: Not a directory$"), StoreWriter(str(path)):
        pass
    assert (tmp_path / place).read_bytes() == b"a file"


def test_a_disk_that_fails_at_the_end_publishes_nothing(
    source: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_fd: int) -> int:
        ctypes.set_errno(errno.EIO)
        return -1

    monkeypatch.setattr(staging, "_syncfs", fail)
    with pytest.raises(StoreError, match=rf"{base}: object store: Input/output error"):
        build(source, base, Options(processes=1))
    assert not base.exists()


def test_what_another_build_has_named_is_on_the_disk_before_it_is_relied_on(
    source: Path, base: Path, monkeypatch: pytest.MonkeyPatch, options: Options
) -> None:
    synced: list[int] = []

    def sync(fd: int) -> int:
        synced.append(fd)
        return 0

    monkeypatch.setattr(staging, "_syncfs", sync)
    for expected in (2, 1):  # before and after the names are given, and with nothing new
        build(source, base, options)
        assert len(synced) == expected
        synced.clear()
    with StoreWriter(str(base)) as writer:
        writer.publish()
    assert synced == []


def test_without_syncfs_everything_is_synced(source: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_fd: int) -> int:
        ctypes.set_errno(errno.ENOSYS)
        return -1

    synced: list[bool] = []
    monkeypatch.setattr(staging, "_syncfs", missing)
    monkeypatch.setattr(os, "sync", lambda: synced.append(True))
    build(source, base, Options(processes=1))
    assert len(synced) == 2


# What somebody plants in a store


@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("what", ["xx", ".merkle", ".merkle/xx"])
def test_planted_symlinks_lead_nowhere(base: Path, tmp_path: Path, what: str, when: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    path = base / what.replace("xx", name_of(LARGE)[:2])
    path.parent.mkdir(parents=True)
    with StoreWriter(str(base)) as writer:
        if when == "between":
            writer.add(LARGE)
        path.symlink_to(outside, target_is_directory=True)
        act: Callable[[], object] = writer.publish if when == "between" else functools.partial(writer.add, LARGE)
        with pytest.raises(StoreError, match=rf"{path}: object store: is a symbolic link"):
            act()
    assert os.listdir(outside) == []
    assert leftovers(base) == []


def test_a_directory_that_becomes_a_symlink_between_two_objects(base: Path, tmp_path: Path) -> None:
    """What it leads to is not believed to be in the store."""
    prefix = name_of(SMALL)[:2]
    other = next(content for content in map(b"%d".__mod__, range(100_000)) if name_of(content)[:2] == prefix)
    put(base, SMALL)
    put(tmp_path / "outside", other)
    with StoreWriter(str(base)) as writer:
        writer.add(SMALL)
        (base / prefix).rename(tmp_path / "moved")
        (base / prefix).symlink_to(tmp_path / "outside" / prefix, target_is_directory=True)
        with pytest.raises(StoreError, match=f"{prefix}: object store: is a symbolic link"):
            writer.add(other)


@pytest.mark.parametrize("how", ["mode", "content", pytest.param("owner", marks=is_root)])
def test_a_staging_directory_that_is_swapped_as_it_is_made(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    base.mkdir()
    mkdir = os.mkdir
    swapped: list[Path] = []

    def swap(path: str | bytes, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        mkdir(path, mode, dir_fd=dir_fd)
        if dir_fd is None or swapped:
            return
        swapped.append(base / os.fsdecode(path))
        swapped[0].rename(tmp_path / "ours")
        mkdir(swapped[0], 0o700)
        if how == "mode":
            swapped[0].chmod(0o770)
        elif how == "owner":
            os.chown(swapped[0], 65534, -1)
        else:
            (swapped[0] / name_of(SMALL)[:2]).symlink_to(tmp_path, target_is_directory=True)

    monkeypatch.setattr(os, "mkdir", swap)
    with pytest.raises(StoreError, match="staging directory is not this user's alone"), StoreWriter(str(base)):
        pass
    assert swapped


def test_a_writer_that_is_not_open_does_nothing(base: Path) -> None:
    def check() -> None:
        acts: list[Callable[[], object]] = [
            writer.publish,
            lambda: writer.add(SMALL),
            lambda: writer.add(LARGE),
            lambda: writer.descriptors,
        ]
        for act in acts:
            with pytest.raises(StoreError, match="is not open for writing"):
                act()

    writer = StoreWriter(str(base))
    check()
    with writer:
        place = writer._staging
    assert (place.store, place.directory) == (-1, -1)
    fd = os.open("/", os.O_RDONLY)  # it may get the number of one that has been closed
    place.remove()
    os.fstat(fd)
    os.close(fd)
    check()


def test_a_file_where_a_directory_belongs(base: Path) -> None:
    put(base, b"a file", name_of(SMALL)[:2])
    with StoreWriter(str(base)) as writer, pytest.raises(StoreError, match="object store: is no directory"):
        writer.add(SMALL)


# Other builds


def test_two_builds_find_the_same_missing(base: Path, source: Path) -> None:
    with StoreWriter(str(base)) as one, StoreWriter(str(base)) as other:
        assert len(leftovers(base)) == 2
        for writer in (one, other):
            scan(str(source), Options(processes=2), writer)
        one.publish()
        assert files(base).items() >= expected_of(source).items()
        other.publish()
        other.add(b"something else")
        other.publish()
    assert one.summary.new_objects == other.summary.new_objects - 1
    assert check_whole(base) == other.summary.new_objects


def test_builds_of_overlapping_contents_at_once(base: Path) -> None:
    """All in the same directories of the store, several times over."""
    errors: list[Exception] = []

    def run(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(4):
                with StoreWriter(str(base)) as writer:
                    for number in chance.sample(range(200), 60):
                        writer.add(b"%d" % number)
                    writer.publish()
        except Exception as error:  # noqa: BLE001 - to be shown by the test
            errors.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert check_whole(base) > 150
    assert leftovers(base) == []


def test_a_directory_that_another_build_replaces_while_it_is_empty(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two builds find a directory missing; one makes it, the other puts its own in that place."""
    prefix = name_of(SMALL)[:2]
    move_files = staging._move_files
    replaced: list[bool] = []

    def replace(source: int, target: int) -> None:
        if not replaced:
            (base / prefix).rmdir()
            replaced.append(True)
        move_files(source, target)

    monkeypatch.setattr(staging, "_move_files", replace)
    with StoreWriter(str(base)) as writer:
        writer.add(SMALL)
        (base / prefix).mkdir()
        writer.publish()
    assert replaced
    assert check_whole(base) == 1


def test_directories_that_another_build_makes_just_before_us(
    base: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StoreWriter(str(base)) as other:
        other.add(LARGE)
        other.add(LARGE + b"other")
        with StoreWriter(str(base)) as writer:
            scan(str(source), Options(processes=1), writer)
            other.publish()
            missing = [".merkle", name_of(LARGE)[:2]]
            real = staging.is_directory

            def not_yet(parent: int, name: bytes, label: str) -> bool:
                if name.decode() in missing:
                    missing.remove(name.decode())
                    return False
                return real(parent, name, label)

            monkeypatch.setattr(staging, "is_directory", not_yet)
            writer.publish()
    assert missing == []
    assert files(base).items() > expected_of(source).items()


# Builds that were killed


NAME = ".cfsfuse-0123456789abcdef.tmp"


def test_what_a_killed_build_has_left_is_removed(base: Path) -> None:
    left = base / NAME
    put(left, b"unfinished", "ab/cd")
    put(left, b"unfinished", ".merkle/ab/cd")
    put(left, b"unfinished", "tree-17")
    (left / "link").symlink_to(base.parent, target_is_directory=True)
    (base.parent / "precious").write_bytes(b"precious")
    with StoreWriter(str(base)):
        assert not left.exists()
    assert (base.parent / "precious").exists()


def test_what_is_left_by_a_build_that_dies_during_ours_is_removed_at_the_end(base: Path) -> None:
    left = base / NAME
    left.mkdir(parents=True)
    lock = os.open(left, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with StoreWriter(str(base)):
        assert left.exists()
        os.close(lock)
    assert not left.exists()


def test_where_locks_may_be_unseen_only_what_is_old_is_removed(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "file_system_type", lambda _fd: 0x6969)  # include/uapi/linux/magic.h: NFS
    left = base / NAME
    left.mkdir(parents=True)
    with StoreWriter(str(base)):
        assert left.exists()
        os.utime(left, (0, time.time() - 25 * 3600))
    assert not left.exists()


def test_what_only_looks_like_it_is_left_alone(base: Path, tmp_path: Path) -> None:
    names = [NAME + "x", ".cfsfuse-0123.tmp", ".tmpAbCdEf", "cfsfuse-0123456789abcdef.tmp", "file"]
    for name in names:
        put(base, b"", name)
    outside = tmp_path / "outside"
    put(outside, b"precious", "file")
    (base / NAME).symlink_to(outside, target_is_directory=True)
    (base / NAME.replace("0", "f")).write_bytes(b"a file")
    with StoreWriter(str(base)) as writer:
        writer.publish()
    assert sorted(os.listdir(base)) == sorted([*names, NAME, NAME.replace("0", "f")])
    assert (outside / "file").exists()


def test_a_build_that_is_at_work_keeps_its_directory(base: Path, source: Path) -> None:
    with StoreWriter(str(base)) as one:
        one.add(SMALL)
        with StoreWriter(str(base)):
            pass
        one.publish()
    assert check_whole(base) == 1


def test_a_build_whose_parent_is_dead_is_at_work_while_a_worker_is(base: Path) -> None:
    """The lock is the workers' as well."""
    with StoreWriter(str(base)) as writer:
        pid = os.fork()
        if not pid:
            time.sleep(60)
            os._exit(0)
        name = leftovers(base)[0]
        os.close(writer._staging.directory)
        try:
            with StoreWriter(str(base)):
                assert name in leftovers(base)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        with StoreWriter(str(base)):
            assert name not in leftovers(base)
        writer._staging.directory = os.open("/", os.O_RDONLY)  # something to close


@pytest.mark.parametrize("step", ["made", "opened", "locked"])
def test_a_staging_directory_that_is_taken_for_abandoned_is_made_anew(
    base: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Another build removes it, or is about to, at each moment before it is locked."""
    taken: list[str] = []
    open_file, lock = os.open, staging._lock

    def remove() -> None:
        if not taken:
            taken.extend(leftovers(base))
            (base / taken[0]).rmdir()

    def opening(path: str | bytes, flags: int, *more: int, **where: int) -> int:
        if isinstance(path, bytes) and path.startswith(b".cfsfuse") and step == "made":
            remove()
        return open_file(path, flags, *more, **where)

    def locking(fd: int) -> None:
        if step == "opened":
            remove()
        if step == "locked" and not taken:
            taken.extend(leftovers(base))
            other = open_file(base / taken[0], os.O_RDONLY)
            fcntl.flock(other, fcntl.LOCK_EX)
            try:
                lock(fd)
            finally:
                os.close(other)
        lock(fd)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(staging, "_lock", locking)
    with StoreWriter(str(base)) as writer:
        assert taken
        writer.add(SMALL)
        writer.publish()
    assert files(base) == {name_of(SMALL): SMALL}


def test_where_directories_cannot_be_locked_none_is_abandoned(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_fd: int, _how: int) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with StoreWriter(str(base)) as one, StoreWriter(str(base)) as other:
        assert len(leftovers(base)) == 2
        for writer in (one, other):
            writer.add(SMALL)
            writer.publish()
    assert files(base) == {name_of(SMALL): SMALL}


def test_staging_directories_that_never_stay(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_lock", lambda _fd: (base / leftovers(base)[0]).rmdir())
    with pytest.raises(StoreError, match="somebody removes each staging directory"):
        Staging(str(base))


SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from cfsfuse.builder import contents
from cfsfuse.builder.scan import Options, scan
from cfsfuse.builder.store import StoreWriter
contents._WORTH_WORKERS = 0
rename, left = os.rename, int(sys.argv[4])
def killing(*arguments, **more):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*arguments, **more)
print("ready", flush=True)
with StoreWriter(sys.argv[3]) as writer:
    scan(sys.argv[2], Options(processes=2), writer)
    os.rename = killing
    writer.publish()
"""


@contextlib.contextmanager
def building(source: Path, base: Path, renames: int = 0) -> Iterator[subprocess.Popen[str]]:
    """Run a build in a process of its own, which kills itself at that rename."""
    command = [sys.executable, "-c", SCRIPT, ROOT, str(source), str(base), str(renames)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


def check_after_kill(source: Path, base: Path) -> None:
    """Check that a killed build has left nothing wrong, and that the next one is as if it had not been."""
    expected = expected_of(source)
    if base.exists():
        for name, content in files(base).items():
            assert name.startswith(".cfsfuse") or content == expected[name]
    build(source, base, Options(processes=1))
    assert files(base) == expected


@pytest.mark.parametrize("renames", [1, 2, 17])
def test_a_build_that_is_killed_while_it_publishes(source: Path, base: Path, renames: int) -> None:
    """All trees get their names by one rename, and then the objects by one for each directory."""
    with building(source, base, renames) as process:
        assert process.wait() == -signal.SIGKILL
    published = [name for name in os.listdir(base) if not name.startswith(".cfsfuse")]
    assert len(published) == renames - 1
    assert renames == 1 or ".merkle" in published
    check_after_kill(source, base)


def test_a_build_that_is_killed_at_any_moment(source: Path, base: Path) -> None:
    chance = random.Random(3)
    for number in range(200):
        (source / f"more {number}").write_bytes(random_bytes(5000, 1000 + number))
    for _ in range(5):
        with building(source, base) as process:
            time.sleep(chance.random() * 0.08)
            process.kill()
        wait_for_workers(base)
    check_after_kill(source, base)


def wait_for_workers(base: Path) -> None:
    """Wait until no process of a killed build has its staging directory locked any more."""
    for name in leftovers(base) if base.exists() else []:
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(base / name, os.O_RDONLY)
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.close(fd)


def test_store_below_a_dangling_symlink(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(StoreError, match="Not a directory"), StoreWriter(str(tmp_path / "link/store")):
        pass
    with pytest.raises(StoreError, match="No such file"), StoreWriter("/proc/cfsfuse-store"):
        pass


def test_store_in_new_directories_goes_again_without_content(tmp_path: Path) -> None:
    with StoreWriter(str(tmp_path / "a/../b/c/")):
        assert (tmp_path / "b/c").is_dir()
    assert not (tmp_path / "b").exists()
