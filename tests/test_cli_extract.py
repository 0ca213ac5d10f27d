"""`cfsfuse extract`: what it makes, what it leaves out, and that nothing stays behind when it fails."""

from __future__ import annotations

import errno
import os
import signal
import stat
import sys
from typing import TYPE_CHECKING

import pytest

from cfsfuse.cli import common, extract
from tests import imagemaker as im
from tests.cli_support import add_object, fails, run, unpack_python_image, write_image
from tests.support import random_bytes, sample

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Capture = pytest.CaptureFixture[bytes]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def listing(folder: Path) -> list[str]:
    """Return the names in a folder but those that the test itself made."""
    return sorted(set(os.listdir(folder)) - {"image", "objects", "cache"})


def has_xattrs(folder: Path) -> bool:
    try:
        os.setxattr(folder, b"user.test", b"")
    except OSError:
        return False
    return True


def test_the_real_image(tmp_path: Path, capfdbinary: Capture) -> None:
    folder = unpack_python_image(tmp_path / "image")
    dest = tmp_path / "dest"
    result = run(capfdbinary, "extract", folder / "python.cfs", dest, "--basedir", folder / "objects")
    assert (result.code, result.out) == (0, b"")
    assert result.err.count("\n") == 1
    assert listing(tmp_path) == ["dest"]
    with common.opened(str(folder / "python.cfs")) as reader:
        entries = {path: (inode, reader.node(inode)) for path, inode in reader.walk()}
    found = {b"/"} | {
        b"/" + os.path.relpath(os.path.join(where, name), os.fsencode(dest))
        for where, folders, files in os.walk(os.fsencode(dest))
        for name in folders + files
    }
    assert found == set(entries)
    for path, (inode, _) in entries.items():
        status = os.lstat(os.fsencode(dest) + path)
        assert status.st_mtime_ns == inode.mtime_ns, path
        assert inode.is_symlink or status.st_mode == inode.mode
        assert not inode.is_regular or status.st_size == inode.size
    # The images's own modules work.
    assert (dest / "json" / "decoder.py").read_bytes().startswith(b'"""Implementation of JSONDecoder')


def test_every_kind_of_entry(tmp_path: Path, capfdbinary: Capture) -> None:
    linked = add_object(tmp_path / "objects", b"linked" * 100, nlink=3)
    twice = im.symlink(b"/etc/passwd", nlink=2, mtime=-5)
    entries = {
        b"linked": linked,
        b"dir": im.directory({b"linked": linked, b"twice": twice}, mode=0o40555, mtime=7, mtime_nsec=8),
        b"twice": twice,
        b"setuid": im.file(b"s", mode=0o104711, xattrs={b"user.a": b"1", b"user.b": b""}),
        b"new\nline \xff": im.file(b"n"),
        b"large": add_object(tmp_path / "objects", random_bytes(2_500_000)),
        b"sparse": im.file(layout=im.CHUNKED, size=1 << 20, i_u=31),
        b"fifo": im.Entry(0o10620, layout=im.PLAIN),
        b"socket": im.Entry(0o140600, layout=im.PLAIN),
        b"z": linked,
    }
    image = write_image(tmp_path / "image", entries)
    dest = tmp_path / "dest"
    result = run(capfdbinary, "extract", "--basedir", tmp_path / "objects", image, dest)
    assert result.code == 0, result.err
    assert os.stat(dest / "linked").st_nlink == 3
    assert os.path.samefile(dest / "linked", dest / "dir" / "linked")
    assert os.path.samestat(os.lstat(dest / "twice"), os.lstat(dest / "dir" / "twice"))
    assert os.readlink(dest / "twice") == "/etc/passwd"
    assert os.lstat(dest / "twice").st_mtime_ns == -5_000_000_000
    assert os.stat(dest / "dir").st_mode == 0o40555
    assert os.stat(dest / "dir").st_mtime_ns == 7_000_000_008
    assert os.stat(dest / "setuid").st_mode == 0o104711
    assert (dest / os.fsdecode(b"new\nline \xff")).read_bytes() == b"n"
    assert (dest / "large").read_bytes() == random_bytes(2_500_000)
    assert (dest / "sparse").read_bytes() == bytes(1 << 20)
    assert stat.S_ISFIFO(os.stat(dest / "fifo").st_mode)
    assert stat.S_ISSOCK(os.stat(dest / "socket").st_mode)
    if has_xattrs(tmp_path):
        assert {name: os.getxattr(dest / "setuid", name) for name in ("user.a", "user.b")} == {
            "user.a": b"1",
            "user.b": b"",
        }
    assert listing(tmp_path) == ["dest"]


def test_what_is_not_permitted_is_counted_in_one_line(
    tmp_path: Path, capfdbinary: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "setxattr", refuse)
    monkeypatch.setattr(os, "mknod", refuse)
    entries = {b"a": im.file(xattrs={b"trusted.a": b"1", b"security.b": b""}), b"null": im.whiteout(i_u=0x103, nlink=2)}
    entries[b"zero"] = entries[b"null"]
    image = write_image(tmp_path / "image", entries)
    result = run(capfdbinary, "extract", image, tmp_path / "dest")
    assert result.code == 0
    assert result.err.endswith("left out: 2 extended attributes, 2 devices\n")
    assert result.err.count("\n") == 1
    assert os.listdir(tmp_path / "dest") == ["a"]
    result = run(capfdbinary, "extract", "--no-xattrs", image, tmp_path / "again")
    assert "extended attributes" not in result.err
    assert "only root may make" in fails(capfdbinary, 4, "extract", image, "null", tmp_path / "third")
    assert listing(tmp_path) == ["again", "dest"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: owners and devices")
def test_as_root_owners_and_devices_are_made(tmp_path: Path, capfdbinary: Capture) -> None:
    image = write_image(tmp_path / "image", {b"a": im.file(uid=12, gid=34), b"l": im.symlink(b"x", uid=5, gid=6)})
    assert run(capfdbinary, "extract", image, tmp_path / "dest").code == 0
    assert os.stat(tmp_path / "dest" / "a")[4:6] == (12, 34)
    assert os.lstat(tmp_path / "dest" / "l")[4:6] == (5, 6)
    assert run(capfdbinary, "extract", "--no-owner", image, tmp_path / "plain").code == 0
    assert os.stat(tmp_path / "plain" / "a")[4:6] == (0, 0)


def test_a_part_of_an_image(tmp_path: Path, capfdbinary: Capture) -> None:
    entries = {b"dir": im.directory({b"file": im.file(b"content")}), b"link": im.symlink(b"dir")}
    image = write_image(tmp_path / "image", entries)
    assert run(capfdbinary, "extract", image, "/dir", tmp_path / "dir").code == 0
    assert run(capfdbinary, "extract", image, "/link/file", tmp_path / "file").code == 0
    assert run(capfdbinary, "extract", image, "link", tmp_path / "link").code == 0
    assert (tmp_path / "dir" / "file").read_bytes() == (tmp_path / "file").read_bytes() == b"content"
    assert os.readlink(tmp_path / "link") == "dir"
    assert listing(tmp_path) == ["dir", "file", "link"]
    assert "not in the image" in fails(capfdbinary, 2, "extract", image, "/absent", tmp_path / "dest")


def test_dest_must_not_exist_or_be_an_empty_directory(tmp_path: Path, capfdbinary: Capture) -> None:
    image = write_image(tmp_path / "image", {b"a": im.file(b"1")})
    (tmp_path / "empty").mkdir()
    assert run(capfdbinary, "extract", image, tmp_path / "empty").code == 0
    assert (tmp_path / "empty" / "a").read_bytes() == b"1"
    (tmp_path / "new").mkdir()
    (tmp_path / "link").symlink_to("new")
    (tmp_path / "dangling").symlink_to("nowhere")
    for words in (["empty"], ["image"], ["link"], ["dangling"], ["a", "empty"], ["a", "new"]):
        *path, dest = words
        assert "exists already" in fails(capfdbinary, 2, "extract", image, *path, tmp_path / dest)
    assert "No such file" in fails(capfdbinary, 4, "extract", image, tmp_path / "absent" / "dest")
    assert "cannot be replaced" in fails(capfdbinary, 2, "extract", image, "/", "/")
    assert listing(tmp_path) == ["dangling", "empty", "link", "new"]
    assert os.listdir(tmp_path / "new") == []


def test_links_of_the_image_are_never_followed(tmp_path: Path, capfdbinary: Capture) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    made = im.make(im.directory({b"aa": im.symlink(os.fsencode(outside)), b"bb": im.directory({b"f": im.file(b"x")})}))
    # Two entries of one name: a link that leads out, and a directory that would be filled through it.
    content = made.content().replace(b"bb", b"aa")
    (tmp_path / "image").write_bytes(content)
    assert "names out of order" in fails(capfdbinary, 3, "extract", tmp_path / "image", tmp_path / "dest")
    assert os.listdir(outside) == []
    assert listing(tmp_path) == ["outside"]


def test_a_wrong_object_leaves_nothing(tmp_path: Path, capfdbinary: Capture) -> None:
    good, bad = add_object(tmp_path / "objects", b"good" * 100), add_object(tmp_path / "objects", b"bad" * 100)
    locked = im.directory({b"in": im.directory({b"good": good}, mode=0o40000)}, mode=0o40500)
    image = write_image(tmp_path / "image", {b"a": locked, b"b": bad})
    for path in (tmp_path / "objects").rglob("*"):
        if path.is_file() and path.read_bytes().startswith(b"bad"):
            path.write_bytes(b"BAD" * 100)
    line = fails(capfdbinary, 3, "extract", image, tmp_path / "dest", "--basedir", tmp_path / "objects")
    assert line.startswith("cfsfuse: /b: object ")
    assert "fs-verity digest" in line
    assert listing(tmp_path) == []
    result = run(capfdbinary, "extract", image, tmp_path / "dest", "--noverity", "--basedir", tmp_path / "objects")
    assert result.code == 0


def test_keep_going_leaves_out_and_names_what_is_wrong(tmp_path: Path, capfdbinary: Capture) -> None:
    good, bad = add_object(tmp_path / "objects", b"good" * 100), add_object(tmp_path / "objects", b"bad" * 100)
    missing = im.external(5, b"cc/missing", bytes(32))
    twice = im.external(5, b"dd/missing", bytes(32), nlink=2)
    below = im.directory({b"bad": bad, b"good": good, b"gone": missing})
    image = write_image(tmp_path / "image", {b"a": im.directory({b"below": below}), b"x": twice, b"y": twice})
    (path,) = (path for path in (tmp_path / "objects").rglob("*") if path.is_file() and path.stat().st_size == 300)
    path.write_bytes(b"BAD" * 100)

    result = run(capfdbinary, "extract", "-k", image, tmp_path / "dest", "--basedir", tmp_path / "objects")
    assert result.code == 3
    *lines, summary = result.err.splitlines()
    files = [line.removeprefix("cfsfuse extract: ").partition(": object ")[0] for line in lines]
    assert files == ["/a/below/bad", "/a/below/gone", "/x", "/y"]
    assert summary.endswith("; not verified and left out: 4 files")
    assert "1 files of 400 bytes" in summary
    assert os.listdir(tmp_path / "dest/a/below") == ["good"]
    assert os.listdir(tmp_path / "dest") == ["a"]

    # The path is that in the image, also where a part of it is extracted. A single file leaves nothing to go on with.
    result = run(capfdbinary, "extract", "-k", image, "/a/below", tmp_path / "part", "--basedir", tmp_path / "objects")
    assert result.err.startswith("cfsfuse extract: /a/below/bad: object ")
    line = fails(capfdbinary, 3, "extract", "-k", image, "/x", tmp_path / "x", "--basedir", tmp_path / "objects")
    assert line.startswith("cfsfuse: /x: object ")
    assert listing(tmp_path) == ["dest", "part"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupt_leaves_nothing(
    number: signal.Signals, code: int, tmp_path: Path, capfdbinary: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def content(*_arguments: object) -> Iterator[bytes]:
        yield b"some"
        os.kill(os.getpid(), number)
        yield b"more"

    monkeypatch.setattr(extract, "content", content)
    image = write_image(tmp_path / "image", {b"d": im.directory({b"f": im.file()}), b"z": im.file(b"zzzzzzzz")})
    before = signal.getsignal(signal.SIGTERM)
    result = run(capfdbinary, "extract", image, tmp_path / "dest")
    assert (result.code, result.err) == (code, "")
    assert listing(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_tree_deeper_than_any_path_may_be(tmp_path: Path, capfdbinary: Capture) -> None:
    depth = sys.getrecursionlimit() + 500
    linked = im.file(b"bottom", nlink=2)
    tree = im.directory({b"bottom": linked})
    for _ in range(depth):
        tree = im.directory({b"0123456789": tree})
    image = write_image(tmp_path / "image", {b"deep": tree, b"link": linked})
    result = run(capfdbinary, "extract", image, tmp_path / "dest")
    assert result.code == 0, result.err
    assert f"{depth + 2} directories, 1 further" in result.err
    assert os.stat(tmp_path / "dest" / "link").st_nlink == 2
    # Only what built it can take it away: the recursion of shutil.rmtree ends sooner.
    parent = os.open(tmp_path, os.O_RDONLY)
    extract.remove(parent, b"dest")
    os.close(parent)
    assert listing(tmp_path) == []


def test_progress_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: Capture) -> None:
    image = write_image(tmp_path / "image", {b"a": im.file(b"1"), b"b": im.file(b"2")})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    result = run(capfdbinary, "extract", image, tmp_path / "dest")
    assert result.code == 0
    assert "2 files" in result.err


def test_all_of_the_sample(tmp_path: Path, capfdbinary: Capture) -> None:
    (tmp_path / "image").write_bytes(sample().content())
    line = fails(capfdbinary, 2, "extract", tmp_path / "image", tmp_path / "dest")
    assert line.endswith(": not in any base directory: name the object store with --basedir=")
    assert listing(tmp_path) == []
