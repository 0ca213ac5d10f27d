"""What other composefs servers fell into, as far as it takes a mount to show it."""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import os
import socket
import stat
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from integration.mounts import (
    BLOCK,
    ORDINARY,
    SELF,
    Recipe,
    Stage,
    digest_of,
    drop_caches,
    needs_root,
    noise,
    processor_time,
    put_object,
    stage,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECRET = b"not of this store\n" * 100


@pytest.fixture
def made() -> Iterator[Stage]:
    with stage() as made_stage:
        yield made_stage


@contextlib.contextmanager
def mounted(made: Stage, recipe: Recipe, *options: str) -> Iterator[int]:
    recipe.build(made.image)
    with made.mounted(*options) as daemon:
        yield daemon


def errno_of(action: Callable[..., object], *arguments: object) -> int:
    """Return the errno that `action` fails with, 0 when it does not."""
    try:
        action(*arguments)
    except OSError as error:
        return error.errno or 0
    return 0


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


@pytest.mark.parametrize("count", [1, 100, 5000])
def test_absent_names_before_between_and_behind_all_others(made: Stage, count: int) -> None:
    """The C server loops for ever for a name that sorts before the first one of a directory with a full block."""
    recipe = made.recipe()
    recipe.directory("/dir")
    for index in range(count):
        recipe.inline(f"/dir/name{index:050}", b"x")
    with mounted(made, recipe):
        absent = ["!", "\x01", "-", "-.", "...", "a", "name", f"name{0:049}", f"name{count:050}", "z", "\U0010ffff"]
        for name in absent:
            done = subprocess.run(
                ["stat", made.at(f"dir/{name}")], capture_output=True, text=True, timeout=20, check=False
            )
            assert done.returncode == 1
            assert "No such file or directory" in done.stderr
        for index in {0, count // 2, count - 1}:
            assert read(made.at(f"dir/name{index:050}")) == b"x"


REDIRECTS = ["../secret", "a/../../secret", "./../secret", "link", "linkdir/secret", "xx/../link", "/absolute", "loop"]


@pytest.mark.parametrize("digest", [True, False], ids=["digest", "no digest"])
def test_redirects_do_not_leave_the_store(made: Stage, digest: bool) -> None:  # noqa: FBT001 - a parameter of pytest
    """Even where the content is the right one: which file was opened is what counts."""
    outside = made.directory("outside")
    for path in (f"{made.path}/secret", f"{outside}/secret", f"{made.path}/absolute"):
        with open(path, "wb") as file:
            file.write(SECRET)
    os.makedirs(made.object("a"))
    os.makedirs(made.object("xx"))
    os.symlink("../secret", made.object("link"))
    os.symlink(outside, made.object("linkdir"))
    os.symlink("loop", made.object("loop"))
    recipe = made.recipe()
    for index, to in enumerate(REDIRECTS):
        target = f"{made.path}/absolute" if to == "/absolute" else to
        recipe.redirected(f"/file{index}", target, SECRET, digest=digest)
    recipe.file("/good", SECRET)
    with mounted(made, recipe):
        for index, to in enumerate(REDIRECTS):
            assert errno_of(read, made.at(f"file{index}")) == errno.EIO, to
            assert os.stat(made.at(f"file{index}")).st_size == len(SECRET)
            assert read(made.at("good")) == SECRET
    for index in range(len(REDIRECTS)):
        made.claim(f"^ERROR /file{index}: object ")


def make_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)


def make_device(path: str) -> None:
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))


KINDS: dict[str, Callable[[str], None]] = {
    "fifo": os.mkfifo,
    "directory": os.mkdir,
    "socket": make_socket,
    "device": make_device,
}


@pytest.mark.parametrize("kind", KINDS)
def test_objects_that_are_no_regular_files(made: Stage, kind: str) -> None:
    """Opening does not block, and neither do the files beside it."""
    if kind == "device" and SELF.uid != 0:
        pytest.skip("making a device needs root")
    recipe = made.recipe()
    recipe.file("/good", SECRET)
    KINDS[kind](made.object("odd"))
    names = []
    for size in (1000, 2 << 20):
        names += [f"file{size}", f"unverified{size}"]
        recipe.redirected(f"/file{size}", "odd", noise(size))
        recipe.redirected(f"/unverified{size}", "odd", noise(size), digest=False)
    with mounted(made, recipe):
        for name in names:
            start = time.monotonic()
            assert errno_of(read, made.at(name)) == errno.EIO
            assert time.monotonic() - start < 10
            assert read(made.at("good")) == SECRET
    for name in names:
        made.claim(f"^ERROR /{name}: object odd: not a regular file$")


SIZES = [1, 64, 65, 4095, 4096, 4097, 100_000, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (1 << 20) + BLOCK]


def test_reads_with_offsets_past_the_end_and_direct(made: Stage) -> None:
    contents = {f"inline{size}": noise(size) for size in SIZES if size <= 4096}
    contents |= {f"object{size}": noise(size) for size in SIZES}
    recipe = made.recipe()
    for name, content in contents.items():
        (recipe.inline if name.startswith("inline") else recipe.file)(f"/{name}", content)
    with mounted(made, recipe):
        for name, content in contents.items():
            size = len(content)
            places = {0, 1, 63, size // 2, size - 1, size, size + 1, size + 100_000, size & -BLOCK}
            for flags in (0, os.O_DIRECT):
                fd = os.open(made.at(name), os.O_RDONLY | flags)
                for offset in sorted(places):
                    if flags and offset % BLOCK:
                        continue
                    assert direct_read(fd, 2 * BLOCK, offset) == content[offset : offset + 2 * BLOCK], (name, offset)
                assert direct_read(fd, len(content) + BLOCK & -BLOCK, 0) == content
                os.close(fd)


def direct_read(fd: int, length: int, offset: int) -> bytes:
    """Read into aligned memory, as O_DIRECT demands."""
    with mmap.mmap(-1, max(length, BLOCK)) as buffer:
        view = memoryview(buffer)[:length]
        with view:
            count = os.preadv(fd, [view], offset)
        return buffer[:count]


def test_empty_files(made: Stage) -> None:
    recipe = made.recipe()
    recipe.inline("/empty", b"")
    with mounted(made, recipe, "verity"):
        assert os.stat(made.at("empty")).st_size == 0
        assert read(made.at("empty")) == b""
        fd = os.open(made.at("empty"), os.O_RDONLY | os.O_DIRECT)
        assert direct_read(fd, BLOCK, 0) == b""
        assert os.pread(fd, 100, 100) == b""
        os.close(fd)


TIMES = {
    "epoch": (0, 0),
    "nanosecond": (0, 1),
    "precise": (1_700_000_000, 123_456_789),
    "before 1970": (-1, 0),
    "1900": (-2_208_988_800, 999_999_999),
    "last of 32 bits": (2**31 - 1, 999_999_999),
    "2038": (2**31, 0),
    "2106": (2**32 + 5, 1),
    "2500": (16_725_225_600, 500_000_000),
}


def test_times_before_1970_after_2038_and_their_nanoseconds(made: Stage) -> None:
    recipe = made.recipe()
    for name, (seconds, nanoseconds) in TIMES.items():
        recipe.inline(f"/{name}", b"x", mtime=f"{seconds}.{nanoseconds}")
        recipe.directory(f"/{name} dir", mtime=f"{seconds}.{nanoseconds}")
    with mounted(made, recipe):
        for name, (seconds, nanoseconds) in TIMES.items():
            for path in (name, f"{name} dir"):
                status = os.stat(made.at(path))
                expected = seconds * 10**9 + nanoseconds
                assert (status.st_mtime_ns, status.st_atime_ns, status.st_ctime_ns) == (expected,) * 3, path


def test_blocks_sizes_and_free_space(made: Stage) -> None:
    recipe = made.recipe()
    recipe.directory("/dir")
    for size in SIZES:
        recipe.file(f"/dir/{size}", noise(size))
    recipe.symlink("/link", b"dir/1")
    with mounted(made, recipe):
        for size in SIZES:
            status = os.stat(made.at(f"dir/{size}"))
            assert (status.st_size, status.st_blocks) == (size, -(-size // BLOCK) * 8)
        assert os.stat(made.at("dir")).st_size > 0
        assert os.stat(made.at("dir")).st_blocks > 0
        assert os.lstat(made.at("link")).st_size == 5
        expected = sum(-(-size // BLOCK) * 4 for size in SIZES)
        used = subprocess.run(["du", "-sk", made.at("dir")], capture_output=True, text=True, check=True).stdout
        assert expected <= int(used.split()[0]) <= expected + 8
        space = os.statvfs(made.mountpoint)
        assert 0 not in (space.f_bsize, space.f_frsize, space.f_blocks, space.f_bavail, space.f_files, space.f_namemax)


ATTRIBUTES = {
    "user.note": b"text",
    "security.capability": bytes.fromhex("0100000200040000000000000000000000000000"),
    "security.selinux": b"system_u:object_r:bin_t:s0\0",
    "trusted.secret": b"\0\1\2",
    "trusted.overlay.opaque": b"y",
    "trusted.overlay.redirect": b"elsewhere",
    "user.overlay.opaque": b"x",
    "user.empty": b"",
}


def attributes() -> list[str]:
    return [f"{name}=" + "".join(f"\\x{byte:02x}" for byte in value) for name, value in ATTRIBUTES.items()]


@needs_root
def test_all_attributes_are_there(made: Stage) -> None:
    recipe = made.recipe()
    recipe.file("/file", SECRET, xattrs=attributes())
    recipe.inline("/inline", b"x", xattrs=attributes())
    recipe.directory("/dir", xattrs=attributes())
    with mounted(made, recipe):
        for name in ("file", "inline", "dir"):
            path = made.at(name)
            assert {key: os.getxattr(path, key) for key in os.listxattr(path)} == ATTRIBUTES
            assert errno_of(os.getxattr, path, "user.absent") == errno.ENODATA
            assert errno_of(os.getxattr, path, "trusted.overlay.metacopy") == errno.ENODATA
        if ORDINARY != SELF:
            names = subprocess.run(
                [
                    *ORDINARY.prefix,
                    sys.executable,
                    "-c",
                    "import os, sys; print(*os.listxattr(sys.argv[1]))",
                    made.at("file"),
                ],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()
            assert set(names) == {name for name in ATTRIBUTES if not name.startswith("trusted.")}


@needs_root
def test_whiteouts_of_the_content_are_shown_and_internal_ones_are_not(made: Stage) -> None:
    recipe = made.recipe()
    recipe.directory("/layer")
    recipe.device("/layer/deleted", stat.S_IFCHR | 0o640)
    recipe.device("/layer/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    recipe.inline("/layer/kept", b"x")
    recipe.inline("/ab", b"an object directory has such a name")
    with mounted(made, recipe):
        assert sorted(os.listdir(made.mountpoint)) == ["ab", "layer"]
        assert read(made.at("ab")) == b"an object directory has such a name"
        for name in ("00", "aa", "ff"):
            assert errno_of(os.lstat, made.at(name)) == errno.ENOENT
        assert sorted(os.listdir(made.at("layer"))) == ["deleted", "kept", "null"]
        status = os.lstat(made.at("layer/deleted"))
        assert (status.st_mode, status.st_size) == (stat.S_IFREG | 0o640, 0)
        assert {"trusted.overlay.whiteout", "user.overlay.whiteout"} <= set(os.listxattr(made.at("layer/deleted")))
        assert {"trusted.overlay.whiteouts", "user.overlay.whiteouts"} <= set(os.listxattr(made.at("layer")))
        assert read(made.at("layer/deleted")) == b""
        null = os.lstat(made.at("layer/null"))
        assert (stat.S_ISCHR(null.st_mode), null.st_rdev) == (True, os.makedev(1, 3))


def cost(daemon: int, action: Callable[[], object]) -> float:
    """Return the daemon's processor time for `action`: what other processes do does not count."""
    before = processor_time(daemon)
    action()
    return processor_time(daemon) - before


def count_existing(paths: list[str]) -> int:
    return sum(map(os.path.lexists, paths))


def list_into(names: list[str], path: str) -> None:
    names += os.listdir(path)


def test_lookups_and_listings_of_a_directory_with_100_000_entries(made: Stage) -> None:
    """A look-up costs about the same as in a small directory, and so does each entry of a listing."""
    recipe = made.recipe()
    sizes = {"small": 2_000, "big": 100_000}
    for directory, count in sizes.items():
        recipe.directory(f"/{directory}")
        recipe.lines += [f"/{directory}/{index:06} 0 100644 1 0 0 0 0.0 - - -" for index in range(count)]
    with mounted(made, recipe, "poll=0") as daemon:
        lookup, listing = {}, {}
        for directory, count in sizes.items():
            absent = [made.at(f"{directory}/{index * (count // 1000):06}x") for index in range(1000)]
            assert not any(map(os.path.lexists, absent[:10]))
            lookup[directory] = cost(daemon, functools.partial(count_existing, absent))
        drop_caches()
        for directory, count in sizes.items():
            names: list[str] = []
            listing[directory] = cost(daemon, functools.partial(list_into, names, made.at(directory)))
            assert len(names) == count
            assert sorted(names) == [f"{index:06}" for index in range(count)]
        print(lookup, listing)
        assert lookup["big"] < 5 * lookup["small"]
        assert listing["big"] / sizes["big"] < 5 * listing["small"] / sizes["small"]
        assert read(made.at("big/099999")) == b""


def test_a_listing_goes_on_where_it_was_left(made: Stage) -> None:
    """Reading a directory in the smallest portions, and from a place that was told before."""
    recipe = made.recipe()
    names = [f"{index:03}" + "n" * 200 for index in range(500)]
    recipe.directory("/dir")
    for name in names:
        recipe.inline(f"/dir/{name}", b"")
    with mounted(made, recipe):
        seen: list[str] = []
        with os.scandir(made.at("dir")) as entries:
            for entry in entries:
                if not seen:
                    assert len(os.listdir(made.at("dir"))) == 500
                seen.append(entry.name)
        assert seen == names
        fd = os.open(made.at("dir"), os.O_RDONLY | os.O_DIRECTORY)
        assert sorted(os.listdir(fd)) == names
        os.lseek(fd, 0, os.SEEK_SET)
        assert sorted(os.listdir(fd)) == names
        os.close(fd)


def test_deep_paths_and_long_names(made: Stage) -> None:
    recipe = made.recipe()
    path = ""
    for _ in range(15):
        path += "/" + "d" * 255
        recipe.directory(path)
    recipe.inline(f"{path}/{'f' * 200}", b"deep")
    with mounted(made, recipe), contextlib.ExitStack() as stack:
        fd = None
        for name in (made.mountpoint, *("d" * 255 for _ in range(15))):
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
            stack.callback(os.close, fd)
        file = os.open("f" * 200, os.O_RDONLY, dir_fd=fd)
        stack.callback(os.close, file)
        assert os.read(file, 100) == b"deep"
        assert errno_of(functools.partial(os.stat, "g" * 255, dir_fd=fd)) == errno.ENOENT
        assert errno_of(functools.partial(os.stat, "g" * 256, dir_fd=fd)) == errno.ENAMETOOLONG


def test_names_of_any_bytes(made: Stage) -> None:
    recipe = made.recipe()
    names = [b"new\nline", b"tab\t", b"\xff\xfe", b"back\\slash", b"quote'\"", b" ", b"-", "ä".encode(), b"\x01"]
    for index, name in enumerate(names):
        escaped = "".join(f"\\x{byte:02x}" for byte in name)
        recipe.lines.append(f"/{escaped} 1 100644 1 0 0 0 0.0 - {index} -")
    with mounted(made, recipe):
        assert sorted(os.listdir(os.fsencode(made.mountpoint))) == sorted(names)
        for index, name in enumerate(names):
            assert (
                read(os.path.join(os.fsencode(made.mountpoint), name).decode(errors="surrogateescape")) == b"%d" % index
            )


def test_hard_links_share_an_inode(made: Stage) -> None:
    recipe = made.recipe()
    name = put_object(made.store, SECRET)
    digest = digest_of(SECRET).hex()
    recipe.lines.append(f"/first {len(SECRET)} 100644 2 0 0 0 0.0 {name} - {digest}")
    recipe.lines.append("/second 0 @100644 2 0 0 0 0.0 /first - -")
    with mounted(made, recipe):
        first, second = os.stat(made.at("first")), os.stat(made.at("second"))
        assert (first.st_ino, first.st_nlink) == (second.st_ino, 2)
        assert read(made.at("second")) == SECRET


def test_objects_that_do_not_have_the_name_of_their_digest(made: Stage) -> None:
    """As those of ostree and of containers' storage."""
    recipe = made.recipe()
    os.makedirs(made.object("ab"))
    with open(made.object("ab/name.file"), "wb") as file:
        file.write(SECRET)
    recipe.redirected("/file", "ab/name.file", SECRET)
    recipe.redirected("/wrong", "ab/name.file", SECRET[::-1])
    with mounted(made, recipe):
        assert read(made.at("file")) == SECRET
        assert errno_of(read, made.at("wrong")) == errno.EIO
    made.claim("^ERROR /wrong: object ab/name.file: fs-verity digest")
