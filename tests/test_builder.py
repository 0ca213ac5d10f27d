"""A directory → a tree: all that a directory can hold, what fails a build, and what a build leaves behind: nothing."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cfsfuse.builder import contents, hashing
from cfsfuse.builder import scan as builder
from cfsfuse.builder.contents import Contents
from cfsfuse.builder.hashing import Hasher
from cfsfuse.builder.scan import Options, Progress, Xattrs, scan
from cfsfuse.errors import HostError, SourceError, UsageError
from cfsfuse.tree import Device, Directory, Entry, External, Inline, Link, Symlink
from cfsfuse.verity.digest import SHA256
from cfsfuse.verity.merkle import content_digest
from tests.support import HERE, leaving_nothing, random_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cfsfuse.tree import Node

ROOT = os.path.dirname(HERE)
HERE_ONLY = Options(processes=1)
LARGE = (1 << 20) + 5000
# Since Python 3.12 forking warns where threads run, and the one that pytest's faulthandler_timeout starts counts.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

is_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let workers start for the smallest tree; let no test leave a descriptor or a process, or wait for ever."""
    monkeypatch.setattr(contents, "_WORTH_WORKERS", 0)
    with leaving_nothing(60):
        yield


@pytest.fixture(params=[1, 2], ids=["here", "workers"])
def options(request: pytest.FixtureRequest) -> Options:
    return Options(processes=request.param)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    return path


def flat(root: Entry) -> dict[bytes, Node | Link]:
    """Return the nodes of a tree by their paths, without a leading slash; a link as it is."""
    found: dict[bytes, Node | Link] = {b"": root.node}
    pending = [(b"", root)]
    while pending:
        path, entry = pending.pop()
        assert list(entry.children) == sorted(entry.children)
        for name, child in entry.children.items():
            below = os.path.join(path, name)
            found[below] = child if isinstance(child, Link) else child.node
            if isinstance(child, Entry):
                pending.append((below, child))
    return found


def nodes(path: Path, options: Options = HERE_ONLY) -> dict[bytes, Node]:
    """Return the nodes of a tree without links, by their paths."""
    found = flat(scan(str(path), options))
    return {path: node for path, node in found.items() if not isinstance(node, Link)}


def node(path: Path, name: str, options: Options = HERE_ONLY) -> Node:
    return nodes(path, options)[name.encode()]


def test_every_kind_of_file(source: Path, options: Options) -> None:
    (source / "dir" / "below").mkdir(parents=True)
    (source / "dir" / "other").mkdir()
    (source / "dir").chmod(0o2750)
    (source / "empty").touch(0o600)
    (source / "link").symlink_to("somewhere/else")
    os.mkfifo(source / "fifo", 0o640)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(source / "socket"))
    found = nodes(source, options)
    assert [(name, type(node)) for name, node in sorted(found.items())] == [
        (b"", Directory),
        (b"dir", Directory),
        (b"dir/below", Directory),
        (b"dir/other", Directory),
        (b"empty", Inline),
        (b"fifo", Device),
        (b"link", Symlink),
        (b"socket", Device),
    ]
    for name, described in found.items():
        status = os.lstat(source / os.fsdecode(name))
        expected = (status.st_mode, status.st_uid, status.st_gid, 0, status.st_size, status.st_mtime_ns)
        assert described.stat._replace(nlink=0) == (expected[0], 0, *expected[1:])
    assert [found[name].stat.nlink for name in (b"", b"dir", b"dir/below", b"empty", b"link")] == [3, 4, 2, 1, 1]
    link, empty = found[b"link"], found[b"empty"]
    assert isinstance(link, Symlink)
    assert link.target == b"somewhere/else"
    assert isinstance(empty, Inline)
    assert empty.content == b""


@pytest.mark.parametrize("size", [1, 64, 65, 4096, 4097, 1 << 20, (1 << 20) + 1, LARGE, 5 << 20])
def test_contents_are_inline_or_objects(source: Path, options: Options, size: int) -> None:
    content = random_bytes(size)
    (source / "file").write_bytes(content)
    found = node(source, "file", options)
    assert found.stat.size == size
    if size <= 64:
        assert isinstance(found, Inline)
        assert found.content == content
    else:
        assert isinstance(found, External)
        digest = content_digest(SHA256, content)
        assert found.digest == ("sha256", digest)
        assert found.path == f"{digest.hex()[:2]}/{digest.hex()[2:]}".encode()


def test_a_tree_does_not_depend_on_who_reads_it(source: Path) -> None:
    for number in range(400):
        folder = source / f"{number % 23:02}" / f"{number % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / str(number)).write_bytes(random_bytes(number * 37 % 9000, number))
    (source / "large").write_bytes(random_bytes(LARGE))
    expected = flat(scan(str(source), HERE_ONLY))
    for processes in (0, 2, 5):
        found = flat(scan(str(source), Options(processes=processes)))
        assert found == expected
        assert list(found) == list(expected)


def test_small_trees_start_no_workers(source: Path, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "_WORTH_WORKERS", 4 << 20)
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    (source / "one").write_bytes(random_bytes(100))
    (source / "two").write_bytes(random_bytes(LARGE))
    assert set(nodes(source, options)) == {b"", b"one", b"two"}


def test_beside_threads_there_are_no_workers(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    (source / "one").write_bytes(random_bytes(100))
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert set(nodes(source, Options(processes=2))) == {b"", b"one"}
    finally:
        done.set()
        thread.join()


def test_large_files_are_read_first(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "_WORTH_WORKERS", 1 << 30)
    for name, size in (("a", 100), ("b", LARGE), ("c", LARGE + 1)):
        (source / name).write_bytes(bytes(size))
    read: list[bytes] = []
    file = Hasher.file

    def note(self: Hasher, directory: int, expected: hashing.Expected, *more: object) -> object:
        read.append(expected[0])
        return file(self, directory, expected, *more)  # type: ignore[arg-type]  # as they come

    monkeypatch.setattr(Hasher, "file", note)
    scan(str(source), Options(processes=2))
    assert read == [b"c", b"b", b"a"]


@is_root
def test_devices(source: Path) -> None:
    numbers = {"null": (1, 3), "big": (259, 0x12345), "whiteout": (0, 0)}
    for name, (major, minor) in numbers.items():
        os.mknod(source / name, stat.S_IFCHR | 0o600, os.makedev(major, minor))
    os.mknod(source / "block", stat.S_IFBLK | 0o660, os.makedev(8, 1))
    os.mkfifo(source / "fifo")
    found = nodes(source)
    for name, (major, minor) in numbers.items():
        assert isinstance(found[name.encode()], Device)
        # include/linux/kdev_t.h: new_encode_dev
        assert found[name.encode()].stat.rdev == (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)
    assert stat.S_ISBLK(found[b"block"].stat.mode)
    assert set(nodes(source, Options(skip_devices=True))) == {b"", b"fifo"}


@pytest.mark.parametrize("mtime", [-1, 0, 999_999_999, 1_700_000_000_123_456_789, -86_400_000_000_001, 1 << 62])
def test_times_to_the_nanosecond(source: Path, mtime: int) -> None:
    (source / "file").touch()
    (source / "dir").mkdir()
    (source / "link").symlink_to("file")
    for name in ("file", "dir", "link"):
        os.utime(source / name, ns=(0, mtime), follow_symlinks=False)
    kept = os.stat(source / "file").st_mtime_ns  # a file system may not have the year 2100
    found = nodes(source)
    assert {found[name].stat.mtime_ns for name in (b"file", b"dir", b"link")} == {kept}
    assert {node.stat.mtime_ns for node in nodes(source, Options(use_epoch=True)).values()} == {0}


def test_names_of_any_bytes(source: Path, options: Options) -> None:
    names = [b"\xff\xfe", b"new\nline", "é".encode(), b"\xc3", b" ", b"-", b"\x01" * 255, b"z\x80", b"..."]
    for name in names:
        with open(os.path.join(os.fsencode(source), name), "wb") as file:
            file.write(b"c" * 100 + name)
    folder = os.path.join(os.fsencode(source), b"dir\xfd")
    os.mkdir(folder)
    os.symlink(b"\xfc target", os.path.join(folder, b"link\xfe"))
    found = nodes(source, options)
    assert set(found) == {b"", b"dir\xfd", b"dir\xfd/link\xfe", *names}
    link = found[b"dir\xfd/link\xfe"]
    assert isinstance(link, Symlink)
    assert link.target == b"\xfc target"
    for name in names:
        content = found[name]
        assert isinstance(content, External)
        assert content.digest == ("sha256", content_digest(SHA256, b"c" * 100 + name))


def test_the_longest_target(source: Path) -> None:
    target = b"t" * 4095
    os.symlink(target, os.path.join(os.fsencode(source), b"link"))
    found = node(source, "link")
    assert isinstance(found, Symlink)
    assert found.target == target
    assert found.stat.size == 4095


def set_xattr(path: Path, name: str, value: bytes) -> None:
    """Set an xattr, or skip the test where the file system or the user cannot."""
    try:
        os.setxattr(path, name, value, follow_symlinks=False)
    except OSError as error:
        pytest.skip(f"xattr {name}: {error.strerror}")


def test_xattrs_of_files_and_directories(source: Path, options: Options) -> None:
    for name in ("empty", "inline", "object", "large"):
        size = {"empty": 0, "inline": 10, "object": 1000, "large": LARGE}[name]
        (source / name).write_bytes(random_bytes(size))
        set_xattr(source / name, "user.name", name.encode())
        set_xattr(source / name, "user.empty", b"")
    (source / "dir").mkdir()
    set_xattr(source / "dir", "user.\udcff", b"\xfe" * 1000)
    (source / "none").write_bytes(b"none")
    found = nodes(source, options)
    for file in (b"empty", b"inline", b"object", b"large"):
        assert found[file].xattrs == {b"user.name": file, b"user.empty": b""}
    assert found[b"dir"].xattrs == {b"user.\xff": b"\xfe" * 1000}
    (source / "twin").write_bytes(b"twin")
    for name in ("user.name", "user.empty"):
        os.setxattr(source / "twin", name, os.getxattr(source / "object", name))
    again = nodes(source, options)
    assert again[b"twin"].xattrs is again[b"object"].xattrs, "equal ones are kept once"
    assert found[b"none"].xattrs == found[b""].xattrs == {}
    without = nodes(source, Options(xattrs=Xattrs.NONE, processes=options.processes))
    assert not any(node.xattrs for node in without.values())


@is_root
@pytest.mark.parametrize("kind", ["file", "link", "fifo", "socket", "device", "dir"])
def test_xattrs_of_everything_and_of_every_kind(source: Path, options: Options, kind: str) -> None:
    path = source / kind
    if kind == "file":
        path.write_bytes(random_bytes(100))
    elif kind == "link":
        path.symlink_to("nowhere")
    elif kind == "dir":
        path.mkdir()
    else:
        types = {"fifo": stat.S_IFIFO, "socket": stat.S_IFSOCK, "device": stat.S_IFCHR}
        os.mknod(path, types[kind] | 0o600, os.makedev(1, 3))
    set_xattr(path, "trusted.name", b"\0value")
    set_xattr(path, "security.any", kind.encode())
    if kind in ("file", "dir"):
        set_xattr(path, "user.name", b"user")
    with_user = {b"user.name": b"user"} if kind in ("file", "dir") else {}
    assert node(source, kind, options).xattrs == {
        b"trusted.name": b"\0value",
        b"security.any": kind.encode(),
        **with_user,
    }
    assert node(source, kind, Options(xattrs=Xattrs.USER)).xattrs == with_user


def test_acls(source: Path, options: Options) -> None:
    # include/uapi/linux/posix_acl_xattr.h: version 2; entries of tag, permissions, id
    entries = [
        (0x01, 6, 0xFFFFFFFF),
        (0x02, 4, 1000),
        (0x04, 4, 0xFFFFFFFF),
        (0x10, 4, 0xFFFFFFFF),
        (0x20, 0, 0xFFFFFFFF),
    ]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    (source / "file").write_bytes(random_bytes(70))
    (source / "dir").mkdir()
    set_xattr(source / "file", "system.posix_acl_access", acl)
    set_xattr(source / "dir", "system.posix_acl_default", acl)
    assert node(source, "file", options).xattrs == {b"system.posix_acl_access": acl}
    assert node(source, "dir", options).xattrs == {b"system.posix_acl_default": acl}


def test_a_file_system_without_xattrs_has_none(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    def unsupported(*_: object, **_more: object) -> list[str]:
        raise OSError(95, "Operation not supported")

    (source / "file").write_bytes(b"content")
    monkeypatch.setattr(os, "listxattr", unsupported)
    assert node(source, "file").xattrs == {}


def test_hard_links_are_files_of_their_own(source: Path, options: Options) -> None:
    (source / "one").write_bytes(random_bytes(100))
    os.link(source / "one", source / "two")
    found = nodes(source, options)
    assert found[b"one"] == found[b"two"]
    assert found[b"one"].stat.nlink == 1


def test_hard_links_are_kept_when_asked_for(source: Path, options: Options) -> None:
    """The entry stands where a walk through the names in order comes first; the others are links to it."""
    (source / "b" / "z").mkdir(parents=True)
    (source / "b" / "z" / "first").write_bytes(random_bytes(100))
    for name in ("b/zz", "c", "d/last", "outside"):
        (source / name).parent.mkdir(exist_ok=True)
        os.link(source / "b" / "z" / "first", source / name)
    os.rename(source / "outside", source.parent / "outside")
    os.symlink("target", source / "e")
    os.link(source / "e", source / "a", follow_symlinks=False)
    os.mkfifo(source / "fifo")
    os.link(source / "fifo", source.parent / "fifo")
    root = scan(str(source), Options(hard_links=True, processes=options.processes))
    found = flat(root)
    first = root.children[b"b"].children[b"z"].children[b"first"]  # type: ignore[union-attr]  # entries, if it is right
    assert isinstance(first, Entry)
    assert first.node.stat.nlink == 4
    assert isinstance(first.node, External)
    assert {name for name, node in found.items() if isinstance(node, Link)} == {b"b/zz", b"c", b"d/last", b"e"}
    assert all(found[name] == Link(first) for name in (b"b/zz", b"c", b"d/last"))
    assert found[b"e"] == Link(root.children[b"a"])  # type: ignore[arg-type]  # likewise
    for path, nlink in ((b"a", 2), (b"fifo", 1)):
        single = found[path]
        assert not isinstance(single, Link)
        assert single.stat.nlink == nlink


def deep(folder: bytes, depth: int, name: bytes) -> Iterator[int]:
    """Make directories in one another; yield a descriptor of each."""
    fd = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
        yield fd
    os.close(fd)


def remove_deep(folder: bytes, depth: int, name: bytes) -> None:
    """Undo `deep`, of whose directories only the last may hold files: shutil.rmtree is recursive."""
    fd = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    for _ in range(depth):
        for file in os.listdir(fd):
            with contextlib.suppress(IsADirectoryError):
                os.unlink(file, dir_fd=fd)
        above = os.open("..", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = above
        os.rmdir(name, dir_fd=fd)
    os.close(fd)


@pytest.mark.parametrize(("depth", "name", "processes"), [(3000, b"d", 2), (120, b"n" * 255, 1), (120, b"n" * 255, 2)])
def test_trees_deeper_than_path_max_with_few_descriptors(source: Path, depth: int, name: bytes, processes: int) -> None:
    folder = os.fsencode(source)
    content = random_bytes(100)
    for level, fd in enumerate(deep(folder, depth, name)):
        if level % 50 == 0 or level == depth - 1:
            with open(os.open(b"file", os.O_CREAT | os.O_WRONLY, dir_fd=fd), "wb") as file:
                file.write(content)
    os.mkdir(os.path.join(folder, b"zzz after"))
    (source / "zzz after" / "file").write_bytes(content)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 90, limits[1]))
    try:
        root = scan(str(source), Options(processes=processes))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        remove_deep(folder, depth, name)
    files = 0
    at = root
    for _ in range(depth):
        below = at.children[name]
        assert isinstance(below, Entry)
        at = below
        files += b"file" in at.children
    leaf = at.children[b"file"]
    assert isinstance(leaf, Entry)
    assert isinstance(leaf.node, External)
    assert leaf.node.digest == ("sha256", content_digest(SHA256, content))
    assert files == -(-(depth - 1) // 50) + 1
    assert isinstance(root.children[b"zzz after"], Entry)


def test_the_source_may_be_a_symlink_and_nothing_else(source: Path, tmp_path: Path) -> None:
    (source / "dir").mkdir()
    (source / "dir" / "secret").write_bytes(b"secret")
    (source / "inside").symlink_to("dir", target_is_directory=True)
    (tmp_path / "link").symlink_to(source, target_is_directory=True)
    assert isinstance(node(tmp_path / "link", "inside"), Symlink)


def test_a_relative_source(source: Path, monkeypatch: pytest.MonkeyPatch, options: Options) -> None:
    (source / "file").write_bytes(random_bytes(70))
    monkeypatch.chdir(source)
    assert set(flat(scan(".", options))) == {b"", b"file"}


@pytest.mark.parametrize("name", ["missing", "file", "file/below", "dangling", "n" * 300, "fifo"])
def test_no_directory_to_build_from(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UsageError, match=name):
        scan(str(tmp_path / name))


def test_without_proc_says_so(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "exists", lambda _path: False)
    with pytest.raises(HostError, match="/proc is not mounted"):
        scan(str(source))


# Sources that change meanwhile


def expect_failure(source: Path, options: Options, name: str, reason: str) -> None:
    with pytest.raises(SourceError, match=reason) as caught:
        scan(str(source), options)
    assert caught.value.path == os.fsencode(source / name)
    assert "\n" not in str(caught.value)


def let_the_clock_tick() -> None:
    """Wait until a change shows in the times of a file: many kernels take them from a clock of 10 ms at worst."""
    time.sleep(0.02)


def before_reading(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something after the walk has seen the files, and before they are opened."""
    file = Hasher.file

    def later(self: Hasher, *arguments: object) -> object:
        let_the_clock_tick()
        act()
        return file(self, *arguments)  # type: ignore[arg-type]  # as they come

    monkeypatch.setattr(Hasher, "file", later)


def rewrite(path: Path, content: bytes) -> None:
    """Write a file anew, and make believe that it is as old as before."""
    before = os.stat(path)
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def put(path: Path, make: Callable[[Path], object]) -> None:
    """Put something else in the place of a file; once, for both who read may come here."""
    if stat.S_ISREG(os.lstat(path).st_mode):
        path.unlink()
        make(path)


CHANGED = "it has changed while it was read"
ELSE = "it has become something else"
CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "size": (CHANGED, lambda path: rewrite(path, b"longer" * 400)),
    "shorter": (CHANGED, lambda path: rewrite(path, b"s" * 70)),
    "emptied": (CHANGED, lambda path: rewrite(path, b"")),
    "mtime": (CHANGED, os.utime),
    "ctime": (CHANGED, lambda path: path.chmod(0o600)),
    "inode": (CHANGED, lambda path: put(path, lambda path: path.write_bytes(b"x" * 1000))),
    "vanished": ("it has vanished while", Path.unlink),
    "symlink": (ELSE, lambda path: put(path, lambda path: path.symlink_to("/etc/passwd"))),
    "socket": (ELSE, lambda path: put(path, lambda path: os.mknod(path, stat.S_IFSOCK | 0o600))),
    "fifo": (CHANGED, lambda path: put(path, os.mkfifo)),
    "directory": (ELSE, lambda path: put(path, Path.mkdir)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_before_it_is_read(
    source: Path, monkeypatch: pytest.MonkeyPatch, options: Options, change: str
) -> None:
    reason, act = CHANGES[change]
    path = source / "dir" / "file"
    path.parent.mkdir()
    path.write_bytes(b"x" * 1000)
    before_reading(monkeypatch, lambda: act(path))
    with pytest.raises(SourceError, match=reason) as caught:
        scan(str(source), options)
    assert caught.value.path == os.fsencode(path)


@pytest.mark.parametrize("size", [40, 1000, LARGE])
def test_a_file_that_changes_while_it_is_read(
    source: Path, monkeypatch: pytest.MonkeyPatch, options: Options, size: int
) -> None:
    path = source / "file"
    path.write_bytes(b"x" * size)
    xattrs = hashing.read_xattrs

    def change(target: int | bytes, prefix: str | None) -> dict[bytes, bytes]:
        if isinstance(target, int) and stat.S_ISREG(os.fstat(target).st_mode):
            let_the_clock_tick()
            with open(path, "r+b") as file:
                file.write(b"y")
        return xattrs(target, prefix)

    monkeypatch.setattr(hashing, "read_xattrs", change)
    expect_failure(source, options, "file", "it has changed while it was read")


@pytest.mark.parametrize("kind", ["empty", "link", "fifo"])
@pytest.mark.parametrize("act", ["touch", "replace"])
def test_what_has_no_content_and_changes_while_it_is_read(
    source: Path, monkeypatch: pytest.MonkeyPatch, kind: str, act: str
) -> None:
    path = source / "node"
    make: dict[str, Callable[[], object]] = {
        "empty": path.touch,
        "link": lambda: path.symlink_to("somewhere"),
        "fifo": lambda: os.mkfifo(path),
    }
    make[kind]()
    xattrs = hashing.read_xattrs

    def change(target: int | bytes, prefix: str | None) -> dict[bytes, bytes]:
        if isinstance(target, bytes):
            let_the_clock_tick()
            if act == "replace":
                path.rename(source.parent / "old")
                make[kind]()
            else:
                os.utime(path, ns=(0, 0), follow_symlinks=False)
        return xattrs(target, prefix)

    monkeypatch.setattr(builder, "read_xattrs", change)
    expect_failure(source, HERE_ONLY, "node", "it has changed while it was read")


def test_a_large_file_that_is_cut_short_while_it_is_read(
    source: Path, monkeypatch: pytest.MonkeyPatch, options: Options
) -> None:
    (source / "file").write_bytes(b"x" * LARGE)
    before_reading(monkeypatch, lambda: os.truncate(source / "file", 5000))
    expect_failure(source, options, "file", "it has changed while it was read")


@pytest.mark.parametrize("act", ["add", "remove", "chmod"])
def test_a_directory_that_changes_while_it_is_read(source: Path, monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    (source / "dir").mkdir()
    (source / "dir" / "file").write_bytes(b"x" * 100)
    (source / "dir" / "other").touch()
    acts: dict[str, Callable[[], object]] = {
        "add": (source / "dir" / "new").touch,
        "remove": (source / "dir" / "other").unlink,
        "chmod": lambda: (source / "dir").chmod(0o700),
    }
    add = Contents.add

    def change(self: Contents, *arguments: object) -> None:
        let_the_clock_tick()
        acts[act]()
        add(self, *arguments)  # type: ignore[arg-type]  # as they come

    monkeypatch.setattr(Contents, "add", change)
    name = {"add": "dir", "remove": "dir/other", "chmod": "dir"}[act]
    expect_failure(source, HERE_ONLY, name, "has vanished" if act == "remove" else "has changed")


def test_a_directory_that_is_replaced_before_a_worker_comes(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "dir").mkdir()
    (source / "dir" / "file").write_bytes(b"x" * 100)
    batch = Hasher.batch

    def replace(self: Hasher, *arguments: object) -> object:
        os.rename(source / "dir", source / "moved")
        (source / "dir").symlink_to("/etc", target_is_directory=True)
        return batch(self, *arguments)  # type: ignore[arg-type]  # as they come

    monkeypatch.setattr(Hasher, "batch", replace)
    expect_failure(source, Options(processes=2), "dir", "it has changed")


def test_a_directory_that_becomes_a_symlink_is_not_followed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "dir").mkdir()
    (source / "file").touch()
    add = builder._Walk._add

    def replace(self: builder._Walk, *arguments: object) -> None:
        let_the_clock_tick()
        (source / "dir").rmdir()
        (source / "dir").symlink_to("/etc", target_is_directory=True)
        add(self, *arguments)  # type: ignore[arg-type]  # as they come

    monkeypatch.setattr(builder._Walk, "_add", replace)
    expect_failure(source, HERE_ONLY, "", "it has changed")


def test_a_directory_that_is_moved_elsewhere_is_not_left_upwards(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in deep(os.fsencode(source), 5, b"d"):
        pass
    (source / "d/d/d/d/d/file").touch()
    monkeypatch.setattr(builder, "_OPEN_LEVELS", 2)
    add = builder._Walk._add

    def move(self: builder._Walk, *arguments: object) -> None:
        add(self, *arguments)  # type: ignore[arg-type]  # as they come
        os.rename(source / "d/d/d", tmp_path / "moved")

    monkeypatch.setattr(builder._Walk, "_add", move)
    expect_failure(source, HERE_ONLY, "d/d/d", "it has changed")


# Sources that may not be read


def run(source: Path, code: str, *, drop: bool = True) -> subprocess.CompletedProcess[str]:
    """Run code that has `scan` and `source`, as an ordinary user if there is a choice."""
    script = (
        "import os, sys\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from cfsfuse import errors\n"
        "from cfsfuse.builder import contents, hashing, scan as builder, staging, store, workers\n"
        "from cfsfuse.builder.scan import *\n"
        "source = sys.argv[1]\n"
        f"if {drop} and os.geteuid() == 0:\n"
        "    os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "contents._WORTH_WORKERS = 0\n" + code
    )
    return subprocess.run(
        [sys.executable, "-c", script, str(source), ROOT], capture_output=True, text=True, timeout=60, check=False
    )


def open_to_all(path: Path) -> None:
    """Let everybody come to `path`, which pytest keeps private."""
    for parent in path.parents:
        if parent == parent.parent or parent.stat().st_uid != os.geteuid() or parent.stat().st_mode & 0o111 == 0o111:
            continue
        parent.chmod(parent.stat().st_mode | 0o711)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", ["inline", "object", "large", "directory", "not searchable"])
def test_what_may_not_be_read_fails_by_name(source: Path, kind: str, processes: int) -> None:
    open_to_all(source)
    source.chmod(0o755)
    path = source / "dir" / "secret"
    path.parent.mkdir()
    if kind == "directory":
        path.mkdir(mode=0)
    elif kind == "not searchable":
        path.mkdir()
        (path / "file").touch()
        path.chmod(0o644)
        path /= "file"
    else:
        path.write_bytes(b"x" * {"inline": 10, "object": 100, "large": LARGE}[kind])
        path.chmod(0)
    code = f"try: scan(source, Options(processes={processes}))\nexcept errors.SourceError as error: print(error)"
    done = run(source, code)
    if kind in ("directory", "not searchable"):
        (source / "dir" / "secret").chmod(0o700)
    assert (done.stdout, done.stderr) == (f"{path}: permission denied\n", "")


def test_a_source_that_may_not_be_read(source: Path) -> None:
    open_to_all(source)
    source.chmod(0)
    done = run(source, "try: scan(source)\nexcept errors.SourceError as error: print(error)")
    source.chmod(0o700)
    assert (done.stdout, done.stderr) == (f"{source}: permission denied\n", "")


def test_an_ordinary_user_builds_from_what_others_own(source: Path) -> None:
    """O_NOATIME is for owners; an empty file need not be readable."""
    open_to_all(source)
    source.chmod(0o755)
    (source / "one").write_bytes(b"x" * 1000)
    (source / "two").write_bytes(b"y" * LARGE)
    (source / "empty").touch(0)
    done = run(source, "for n in (1, 2): print(*scan(source, Options(processes=n)).children)")
    assert (done.stdout, done.stderr) == ("b'empty' b'one' b'two'\n" * 2, "")


def test_a_file_larger_than_any_image_takes_fails_before_it_is_read(
    source: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "_SIZE_MAX", 1 << 20)
    with open(source / "sparse", "wb") as file:
        file.truncate((1 << 20) + 1)
    monkeypatch.setattr(Hasher, "file", lambda *_: pytest.fail("it is read"))
    expect_failure(source, options, "sparse", "it has 1048577 bytes; an image takes 2")


# Processes


def test_progress_goes_up_to_the_whole(source: Path, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "_REPORT_INTERVAL", 0)
    monkeypatch.setattr(hashing, "_NOTE_STEP", 1 << 18)
    (source / "empty").touch()
    for number in range(300):
        (source / str(number)).write_bytes(bytes(number + 1))
    (source / "large").write_bytes(bytes(LARGE))
    reports: list[Progress] = []
    scan(str(source), options, None, reports.append)
    total = 300 * 301 // 2 + LARGE
    assert reports[-1] == Progress(301, total, 301, total, walking=False)
    assert reports == sorted(reports, key=lambda report: (report.bytes, report.total_bytes))
    assert len(reports) > 5  # the large file is not read in one step


def test_a_killed_worker_fails_the_build(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = os.getpid()

    def die() -> None:
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    (source / "file").write_bytes(b"x" * 1000)
    before_reading(monkeypatch, die)
    with pytest.raises(HostError, match=r"worker process \d+ was killed by SIGKILL; perhaps memory has run out"):
        scan(str(source), Options(processes=2))


def test_an_interrupted_build_ends_its_workers(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "file").write_bytes(b"x" * 1000)
    before_reading(monkeypatch, signal.pause)
    parent = os.getpid()
    dispatch = Contents._dispatch

    def interrupted(self: Contents, *, wait: bool = False) -> None:
        if wait:
            os.kill(parent, signal.SIGINT)
        dispatch(self, wait=wait)

    monkeypatch.setattr(Contents, "_dispatch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scan(str(source), Options(processes=2))


def test_a_failing_report_ends_the_build(source: Path, options: Options) -> None:
    class Stop(Exception):
        pass

    def stop(_progress: Progress) -> None:
        raise Stop

    (source / "file").write_bytes(b"x" * 1000)
    with pytest.raises(Stop):
        scan(str(source), options, None, stop)


def test_directory_to_avoid(tmp_path: Path) -> None:
    below = tmp_path / "a/b"
    below.mkdir(parents=True)
    status = below.stat()
    with pytest.raises(UsageError, match=r"/a/b: is the store"):
        scan(str(tmp_path), avoid={(status.st_dev, status.st_ino): "is the store"})
    assert scan(str(tmp_path), avoid={(status.st_dev, status.st_ino + 1): "is the store"}).children
