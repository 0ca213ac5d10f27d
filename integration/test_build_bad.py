"""`cfsfuse mk` with bad input, or on sources that will not hold still: one line that names it, and nothing is made."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from cfsfuse.errors import DumpError
from integration.mounts import CFSFUSE, ORDINARY, noise, require_composefs
from integration.oracles import builds, compare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from integration.oracles.builds import Done

ROOT_LINE = b"/ 4096 40755 2 0 0 0 0.0 - - -\n"
FILE = b"/a 5 100644 1 0 0 0 0.0 - hello -\n"
_BIG = 96 << 20
_LEVELS, _NAME = 40, b"\xff" * 250  # of a path more than twice as long as PATH_MAX


@pytest.fixture
def place() -> Iterator[str]:
    with builds.scratch() as path:
        yield path


@pytest.fixture
def source(place: str) -> str:
    path = os.path.join(place, "source")
    builds.sample(path, small=20, large=1)
    return path


def build(source: str, place: str, *options: str) -> Done:
    """Build with image and store in `place`."""
    store, image = os.path.join(place, "store"), os.path.join(place, "image.cfs")
    return builds.mk("--digest-store", store, *options, source, image)


def assert_nothing_made(place: str) -> None:
    assert not {"store", "image.cfs"} & set(os.listdir(place))
    assert not [name for name in os.listdir(place) if name.startswith(".")]


# Sources and targets -------------------------------------------------------------------------------------------------


def test_source_is_missing(place: str) -> None:
    missing = os.path.join(place, "missing")
    assert missing in build(missing, place).refused(2)
    assert_nothing_made(place)


def test_source_is_no_directory(place: str) -> None:
    builds.write_files(place, {"file": b"x"})
    assert "file: not a directory" in build(os.path.join(place, "file"), place).refused(2).lower()
    assert_nothing_made(place)


@pytest.mark.parametrize(
    "image", ["source/image.cfs", "source/small/image.cfs", "link/image.cfs", "source/../source/x"]
)
def test_image_inside_the_source(place: str, source: str, image: str) -> None:
    os.symlink("source/small", os.path.join(place, "link"))
    before = builds.files_of(source)
    path = os.path.join(place, image)
    assert path in builds.mk(source, path).refused(2)
    assert builds.files_of(source) == before


def test_store_inside_the_source(place: str, source: str) -> None:
    before = builds.files_of(source)
    store = os.path.join(source, "store")
    said = builds.mk("--digest-store", store, source, os.path.join(place, "image.cfs")).refused(2)
    assert store in said
    assert builds.files_of(source) == before
    assert_nothing_made(place)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root: a bind mount")
@pytest.mark.parametrize(("output", "arguments"), [("image", ()), ("store", ("--digest-store",))])
def test_output_inside_the_source_by_a_bind_mount(
    place: str, source: str, output: str, arguments: tuple[str, ...]
) -> None:
    elsewhere = os.path.join(place, "elsewhere")
    os.mkdir(elsewhere)
    before = builds.files_of(source)
    subprocess.run(["mount", "--bind", os.path.join(source, "small"), elsewhere], check=True)
    try:
        path = os.path.join(elsewhere, output)
        words = [*arguments, path, source, os.path.join(place, "image")] if arguments else [source, path]
        assert path in builds.mk(*words).refused(2)
    finally:
        subprocess.run(["umount", elsewhere], check=True)
    assert builds.files_of(source) == before


def test_image_in_a_missing_directory(place: str, source: str) -> None:
    image = os.path.join(place, "missing/image.cfs")
    assert image in builds.mk(source, image).refused(2)
    assert os.listdir(place) == ["source"]


def test_existing_image_stays_when_the_build_fails(place: str, source: str) -> None:
    image = os.path.join(place, "image.cfs")
    assert builds.mk(source, image).code == 0
    status = os.stat(image)
    builds.set_mode(place, 0o777)  # so that nothing but the source is in the way
    builds.set_mode(image, 0o666)
    closed = os.path.join(source, "small/1")
    builds.set_mode(closed, 0)
    said = builds.mk(source, image, user=ORDINARY).refused(4)
    builds.set_mode(closed, 0o755)
    assert closed in said
    assert (os.stat(image).st_ino, os.stat(image).st_size) == (status.st_ino, status.st_size)


@pytest.mark.parametrize("option", ["--min-version=2", "--max-version=-1", "--min-version=x"])
def test_versions_that_there_are_not(place: str, source: str, option: str) -> None:
    build(source, place, option).refused(2)
    assert_nothing_made(place)


def test_xattr_options_conflict(place: str, source: str) -> None:
    build(source, place, "--skip-xattrs", "--user-xattrs").refused(2)
    assert_nothing_made(place)


# Names and paths -----------------------------------------------------------------------------------------------------


def test_tree_deeper_than_a_path(place: str) -> None:
    """The reference cannot read contents there; but it can make the image of our image's dump."""
    top = os.path.join(place, "deep")
    with deep(top) as bottom:
        for name, content in {
            b"inline": b"x",
            b"object": b"o" * 100,
            b"large": noise(builds.WHOLE_FILE_MAX + 1),
        }.items():
            with open(os.open(name, os.O_WRONLY | os.O_CREAT, dir_fd=bottom), "wb") as file:
                file.write(content)
        os.symlink(b"target", b"link", dir_fd=bottom)
        os.mkfifo(b"fifo", dir_fd=bottom)
    image, store = os.path.join(place, "image.cfs"), os.path.join(place, "store")
    digest = builds.mk("--digest-store", store, "--print-digest", top, image).digest
    assert len(builds.check_store(store)) == 3  # with the large one's tree
    dumped = subprocess.run([CFSFUSE, "dump", image], capture_output=True, check=True).stdout
    assert max(len(line.split(b" ")[0]) for line in dumped.splitlines()) > 2 * 4096
    expected = require_composefs().mkcomposefs("--from-file", "--print-digest-only", "-", stdin=dumped)
    assert digest == expected.decode().strip()
    builds.fsck(image)


@contextlib.contextmanager
def deep(top: str) -> Iterator[int]:
    """Yield a descriptor of a directory below the new one `top` that no path leads to in one piece."""
    os.mkdir(top)
    descriptor = os.open(top, os.O_RDONLY)
    try:
        for _ in range(_LEVELS):
            os.mkdir(_NAME, dir_fd=descriptor)
            below = os.open(_NAME, os.O_RDONLY, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        yield descriptor
    finally:
        os.close(descriptor)


def test_names_that_are_not_utf8(place: str) -> None:
    top = os.fsencode(os.path.join(place, "names"))
    os.makedirs(top + b"/\xff\xfe")
    with open(top + b"/\xff\xfe/\xe9\n", "wb") as file:
        file.write(b"content" * 20)
    os.symlink(b"\x80", top + b"/\x81")
    expected = require_composefs().mkcomposefs("--print-digest-only", os.fsdecode(top))
    assert builds.mk("--print-digest-only", os.fsdecode(top)).out == expected
    os.chmod(top + b"/\xff\xfe/\xe9\n", 0)
    said = builds.mk("--print-digest-only", os.fsdecode(top), user=ORDINARY).refused(4)
    assert rf"{os.fsdecode(top)}/\xff\xfe/\xe9\n" in said.replace(r"\\", "\\")


def test_source_and_image_names_that_are_not_utf8(place: str) -> None:
    source, image = (os.path.join(place, os.fsdecode(name)) for name in (b"\xff source", b"\xff image"))
    builds.write_files(source, {"file": b"x" * 100})
    digest = builds.mk("--print-digest", source, image).digest
    assert builds.mk("--print-digest-only", source).digest == digest
    assert os.path.exists(image)


# Sources that change -------------------------------------------------------------------------------------------------


def test_file_that_grows_meanwhile(place: str) -> None:
    with open(big_file(place), "ab", buffering=0) as file, repeatedly(lambda: file.write(b"more")):
        done = build(os.path.join(place, "source"), place)
    assert file.name in done.refused(4)
    assert_nothing_made(place)


def test_file_that_is_rewritten_meanwhile(place: str) -> None:
    with open(big_file(place), "r+b", buffering=0) as file, repeatedly(lambda: os.pwrite(file.fileno(), noise(64), 7)):
        done = build(os.path.join(place, "source"), place)
    assert file.name in done.refused(4)
    assert_nothing_made(place)


def big_file(place: str) -> str:
    """Make a source of a file that takes a while to read; return the file's path."""
    path = os.path.join(place, "source/big")
    builds.write_files(os.path.dirname(path), {"big": b"", "small": b"s" * 1000})
    with open(path, "wb") as file:
        file.writelines(noise(1 << 20, str(number % 3)) for number in range(_BIG >> 20))
    return path


@contextlib.contextmanager
def repeatedly(change: Callable[[], object]) -> Iterator[None]:
    """Make a change every millisecond for as long as the block takes."""
    end = threading.Event()

    def work() -> None:
        while not end.wait(0.001):
            change()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def test_files_that_come_and_go_meanwhile(place: str) -> None:
    """A file is in the image, or it is not, or the build says that it has vanished."""
    source = os.path.join(place, "source")
    builds.sample(source, small=500, large=0)
    coming = [os.path.join(source, f"small/{number % 7}/coming-{number}") for number in range(40)]

    def come_and_go() -> None:
        for path in coming:
            builds.write_files(os.path.dirname(path), {os.path.basename(path): b"c" * 5000})
        for path in coming:
            os.unlink(path)

    failed = 0
    with repeatedly(come_and_go):
        for _ in range(3):
            done = build(source, place)
            if done.code:
                assert re.search(r"/source/small/\d(/coming-\d+)?: ", done.refused(4)), done
                failed += 1
            shutil.rmtree(os.path.join(place, "store"), ignore_errors=True)
    print(f"{failed} of 3 builds failed")


# Dumps ---------------------------------------------------------------------------------------------------------------

# Text, and line, column and field of what is wrong with it.
BAD_DUMPS = {
    "empty": (b"", 1, 1, "path"),
    "no root": (FILE, 1, 1, "path"),
    "two roots": (ROOT_LINE + ROOT_LINE, 2, 1, "path"),
    "cut off": (ROOT_LINE + b"/a 5 100644 1 0", 2, 16, "gid"),
    "relative path": (ROOT_LINE + b"a 5 100644 1 0 0 0 0.0 - hello -\n", 2, 1, "path"),
    "dots": (ROOT_LINE + b"/.. 5 100644 1 0 0 0 0.0 - hello -\n", 2, 1, "path"),
    "parent missing": (ROOT_LINE + b"/x/a 5 100644 1 0 0 0 0.0 - hello -\n", 2, 1, "path"),
    "same twice": (ROOT_LINE + FILE + FILE, 3, 1, "path"),
    "long name": (ROOT_LINE + b"/" + b"n" * 256 + FILE[2:], 2, 1, "path"),
    "escape": (ROOT_LINE + FILE.replace(b"hello", rb"he\q1"), 2, 29, "content"),
    "size": (ROOT_LINE + FILE.replace(b" 5 ", b" 5x "), 2, 4, "size"),
    "content of another size": (ROOT_LINE + FILE.replace(b"hello", b"hell"), 2, 27, "content"),
    "mode": (ROOT_LINE + FILE.replace(b"100644", b"999999"), 2, 6, "mode"),
    "owner": (ROOT_LINE + FILE.replace(b" 1 0 ", b" 1 -1 "), 2, 15, "uid"),
    "time": (ROOT_LINE + FILE.replace(b"0.0", b"0,0"), 2, 21, "mtime"),
    "digest": (ROOT_LINE + FILE.replace(b"hello -", b"- abc"), 2, 29, "digest"),
    "xattr": (ROOT_LINE[:-1] + b" user.a\n", 1, 32, "xattrs"),
    "link into nowhere": (
        ROOT_LINE + FILE.replace(b"100644", b"@100644").replace(b"- hello", b"/b -"),
        2,
        26,
        "payload",
    ),
    "link to a directory": (
        ROOT_LINE + b"/d 0 40755 2 0 0 0 0.0 - - -\n/a 0 @100644 1 0 0 0 0.0 /d - -\n",
        3,
        26,
        "payload",
    ),
    "no target": (ROOT_LINE + b"/a 0 120777 1 0 0 0 0.0 - - -\n", 2, 25, "payload"),
    "NUL": (ROOT_LINE + FILE.replace(b"hello", b"he\0lo"), 2, 29, "content"),
}


@pytest.mark.parametrize("name", BAD_DUMPS)
def test_malformed_dump(name: str) -> None:
    text, line, column, field = BAD_DUMPS[name]
    with pytest.raises(DumpError) as caught:
        compare.tree_of(text)
    assert (caught.value.line, caught.value.column, caught.value.field) == (line, column, field)
    assert caught.value.reason


@pytest.mark.parametrize("name", ["empty", "size", "NUL"])
def test_command_tells_what_is_malformed(place: str, name: str) -> None:
    text, line, column, field = BAD_DUMPS[name]
    said = builds.mk("--from-file", "-", os.path.join(place, "image.cfs"), stdin=text).refused(3)
    assert re.fullmatch(rf"cfsfuse.*: line {line}, column {column}, {field}: \S.*", said), said
    assert os.listdir(place) == []


def test_malformed_dump_in_a_file_is_named(place: str) -> None:
    builds.write_files(place, {"bad.dump": ROOT_LINE + FILE.replace(b" 5 ", b" x ")})
    path = os.path.join(place, "bad.dump")
    said = builds.mk("--from-file", path, os.path.join(place, "image.cfs")).refused(3)
    assert f"{path}: line 2, column 4, size: " in said
    assert os.listdir(place) == ["bad.dump"]


@pytest.mark.parametrize("size", [2**53 + 1, 2**64 - 1])
def test_sizes_that_no_image_holds(place: str, size: int) -> None:
    text = ROOT_LINE + b"/a %d 100644 1 0 0 0 0.0 ab/cd - -\n" % size
    said = builds.mk("--from-file", "-", os.path.join(place, "image.cfs"), stdin=text).refused(3)
    assert "line 2, column 4, size: a file of " in said
    assert str(size) in said
    assert os.listdir(place) == []


@pytest.mark.parametrize("size", [2**48 + 1, 2**53])
def test_sizes_that_are_as_good_as_any(place: str, size: int) -> None:
    text = ROOT_LINE + b"/a %d 100644 1 0 0 0 0.0 ab/cd - -\n" % size
    assert compare.dump_difference(require_composefs(), text) is None
    image = os.path.join(place, "image.cfs")
    assert builds.mk("--from-file", "-", image, stdin=text).code == 0
    assert stat.S_IMODE(os.stat(image).st_mode) == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_dump_is_missing(place: str) -> None:
    missing = os.path.join(place, "missing.dump")
    assert missing in builds.mk("--from-file", missing, os.path.join(place, "image.cfs")).refused(2)
    assert os.listdir(place) == []


def test_options_of_directories_have_no_effect_on_dumps(place: str) -> None:
    """The reference takes them, too."""
    arguments = ("--use-epoch", "--from-file", "--print-digest-only", "-")
    expected = require_composefs().mkcomposefs(*arguments, stdin=ROOT_LINE + FILE)
    assert builds.mk(*arguments, stdin=ROOT_LINE + FILE).out == expected
