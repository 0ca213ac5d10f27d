"""`cfsfuse mk` into a store: by several builders at once, of another user, full, read-only, damaged."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest

from integration.mounts import (
    CFSFUSE,
    ORDINARY,
    SELF,
    flip,
    mount_in_private_namespace,
    needs_root,
    noise,
    require_composefs,
)
from integration.oracles import builds, disk
from integration.oracles.nodes import Node

if TYPE_CHECKING:
    from collections.abc import Iterator

    from integration.oracles.builds import Done

BIG = "large/0"
_BUILDERS = 4


class Place:
    """A directory with a source in it, and where its image and its objects go."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.source, self.image, self.store = (os.path.join(path, name) for name in ("source", "image.cfs", "store"))

    def mk(self, *options: str, **more: object) -> Done:
        """Build, and print the digest."""
        arguments = ("--digest-store", self.store, "--print-digest", *options, self.source, self.image)
        return builds.mk(*arguments, **more)  # type: ignore[arg-type]  # as it is called

    def object_of(self, name: str) -> str:
        """Return the path of the object that the content of a file of the source becomes."""
        with open(os.path.join(self.source, name), "rb") as file:
            return builds.object_name(file.read())


@pytest.fixture
def place() -> Iterator[Place]:
    with builds.scratch() as path:
        made = Place(path)
        builds.sample(made.source, small=100, large=3)
        yield made


# What a build makes --------------------------------------------------------------------------------------------------


def test_objects_are_the_references(place: Place) -> None:
    theirs = os.path.join(place.path, "theirs")
    expected = require_composefs().mkcomposefs(
        "--digest-store", theirs, "--print-digest", place.source, os.path.join(place.path, "theirs.cfs")
    )
    assert place.mk().out == expected
    found = builds.check_store(place.store)
    assert {name: size for name, size in found.items() if not name.startswith(".")} == builds.files_of(theirs)
    large = {name for name, size in builds.files_of(theirs).items() if size > builds.WHOLE_FILE_MAX}
    assert {name.removeprefix(".merkle/") for name in found if name.startswith(".")} == large
    assert len(large) == 3


def test_trees_can_be_left_out(place: Place) -> None:
    digest = place.mk("--no-merkle").digest
    assert not os.path.exists(os.path.join(place.store, ".merkle"))
    assert place.mk().digest == digest
    assert os.path.exists(os.path.join(place.store, ".merkle"))


def test_second_build_adds_nothing(place: Place) -> None:
    digest = place.mk().digest
    before = stats_of(place.store)
    assert place.mk().digest == digest
    assert stats_of(place.store) == before


def stats_of(store: str) -> dict[str, tuple[int, int]]:
    """Return inode and time of every file of a store."""
    found = {}
    for name in builds.files_of(store):
        status = os.lstat(os.path.join(store, name))
        found[name] = status.st_ino, status.st_ctime_ns
    return found


def test_builds_without_a_store(place: Place) -> None:
    digest = place.mk().digest
    assert builds.mk("--print-digest-only", place.source).digest == digest
    shutil.rmtree(place.store)
    done = builds.mk(place.source, place.image)
    assert (done.code, done.out) == (0, b"")
    assert sorted(os.listdir(place.path)) == ["image.cfs", "source"]


def test_standard_output_and_descriptors(place: Place) -> None:
    digest = place.mk().digest
    with open(place.image, "rb") as file:
        expected = file.read()
    assert builds.mk(place.source, "-").out == expected
    dumped = subprocess.run([CFSFUSE, "dump", place.image], capture_output=True, check=True).stdout
    assert builds.mk("--from-file", "-", "-", stdin=dumped).out == expected
    with open(os.path.join(place.path, "passed on"), "w+b") as file:
        done = builds.mk("--from-file", "-", f"/proc/self/fd/{file.fileno()}", stdin=dumped, pass_fds=(file.fileno(),))
        assert done.code == 0, done
        file.seek(0)
        assert file.read() == expected
    again = builds.mk("--from-file", "--print-digest-only", "/dev/stdin", stdin=dumped)
    assert again.digest == digest


# Several at once -----------------------------------------------------------------------------------------------------


def test_builders_at_once(place: Place) -> None:
    """They build the same and parts of it into one store; each is right, and so is the store."""
    parts = ("", "", "small", "large")
    alone = [builds.mk("--print-digest-only", os.path.join(place.source, part)).digest for part in parts]
    running = [
        subprocess.Popen(
            [
                *(CFSFUSE, "mk", "--digest-store", place.store, "--print-digest"),
                *(os.path.join(place.source, part), f"{place.image}.{number}"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number, part in enumerate(parts)
    ]
    said = [process.communicate(timeout=builds.TIMEOUT) for process in running]
    assert [process.returncode for process in running] == [0] * _BUILDERS, said
    assert [out.decode().strip() for out, _ in said] == alone
    found = builds.check_store(place.store)
    shutil.rmtree(place.store)
    place.mk()
    assert found == builds.files_of(place.store)


def test_abandoned_staging_directory_goes_and_foreign_files_stay(place: Place) -> None:
    abandoned = ".cfsfuse-0123456789abcdef.tmp"
    builds.write_files(place.store, {f"{abandoned}/ab/half": b"half", "README": b"not ours", ".tmpABCDEF": b"either"})
    assert place.mk().code == 0
    assert {name for name in os.listdir(place.store) if len(name) > 2} == {"README", ".tmpABCDEF", ".merkle"}


# Damaged stores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small/3/94", BIG])
def test_existing_object_is_measured_on_request(place: Place, name: str) -> None:
    digest = place.mk().digest
    damage(os.path.join(place.store, place.object_of(name)), 70)
    assert place.mk().digest == digest  # its size is right
    assert place.mk("--verify-existing").digest == digest
    builds.check_store(place.store)


def damage(path: str, offset: int) -> None:
    """Change a byte of a file that nobody may write."""
    builds.set_mode(path, 0o644)
    flip(path, offset)


def test_wrong_tree_is_replaced_on_request(place: Place) -> None:
    digest = place.mk().digest
    damage(os.path.join(place.store, ".merkle", place.object_of(BIG)), 4000)
    assert place.mk("--verify-existing").digest == digest
    builds.check_store(place.store)


@pytest.mark.parametrize("instead", ["shorter", "symlink", "fifo"])
def test_what_is_no_such_object_is_replaced(place: Place, instead: str) -> None:
    digest = place.mk().digest
    path = os.path.join(place.store, place.object_of("small/3/94"))
    os.unlink(path)
    elsewhere = os.path.join(place.path, "elsewhere")
    builds.write_files(place.path, {"elsewhere": b"untouched"})
    if instead == "shorter":
        builds.write_files(place.store, {place.object_of("small/3/94"): b"short"})
    elif instead == "symlink":
        os.symlink(elsewhere, path)
    else:
        os.mkfifo(path)
    assert place.mk().digest == digest
    builds.check_store(place.store)
    with open(elsewhere, "rb") as file:
        assert file.read() == b"untouched"


@pytest.mark.parametrize("instead", ["file", "symlink", "directory"])
def test_what_stands_in_the_way_is_named(place: Place, instead: str) -> None:
    name = place.object_of("small/3/94")
    elsewhere = os.path.join(place.path, "elsewhere")
    os.mkdir(elsewhere)
    if instead == "file":
        builds.write_files(place.store, {name[:2]: b"no directory"})
    elif instead == "symlink":
        os.mkdir(place.store)
        os.symlink(elsewhere, os.path.join(place.store, name[:2]))
    else:
        os.makedirs(os.path.join(place.store, name))
    before = builds.files_of(place.store)
    said = place.mk().refused(4)
    assert os.path.join(place.store, name[:2]) in said
    assert_untouched(place, before)
    assert os.listdir(elsewhere) == []


def assert_untouched(place: Place, files: dict[str, int]) -> None:
    """Assert that a failed build has published nothing, and left nothing."""
    assert not os.path.exists(place.image)
    assert builds.files_of(place.store) == files
    assert [name for name in os.listdir(place.store) if name.startswith(".cfsfuse")] == []


# Stores that take nothing --------------------------------------------------------------------------------------------

# $1 is the store, $2 options of mount(8); the rest is the command. What the store holds afterwards comes as lines.
_IN_TMPFS = """
mkdir -p "$1" && mount -t tmpfs -o size=3m tmpfs "$1" && mkdir "$1/ab" && echo kept >"$1/ab/kept"
[ -z "$2" ] || mount -o "$2" "$1"
store=$1; shift 2
"$@" >/dev/null; code=$?
find "$store" -mindepth 1 -printf '%P %s\\n'
exit $code
"""


def in_tmpfs(place: Place, options: str = "", image: str | None = None) -> Done:
    """Build into a store that is a file system of 3 MiB with a file in it; the output is what it has afterwards."""
    wrapper = (*mount_in_private_namespace(), "sh", "-c", _IN_TMPFS, "sh", place.store, options)
    done = subprocess.run(
        [*wrapper, CFSFUSE, "mk", "--digest-store", place.store, place.source, image or place.image],
        capture_output=True,
        timeout=builds.TIMEOUT,
        check=False,
    )
    return builds.Done(done.returncode, done.stdout, done.stderr.decode(errors="replace"))


@needs_root
def test_full_file_system(place: Place) -> None:
    done = in_tmpfs(place)
    assert "No space left on device" in done.refused(4)
    assert place.store in done.err
    assert sorted(done.out.decode().split("\n")) == ["", "ab 60", "ab/kept 5"]
    assert not os.path.exists(place.image)


@needs_root
def test_read_only_file_system(place: Place) -> None:
    done = in_tmpfs(place, "remount,ro")
    assert "Read-only file system" in done.refused(4)
    assert sorted(done.out.decode().split("\n")) == ["", "ab 60", "ab/kept 5"]
    assert not os.path.exists(place.image)


@needs_root
def test_no_room_for_the_image(place: Place) -> None:
    """Objects fit, the image does not: it does not appear, not even in part."""
    shutil.rmtree(place.source)
    builds.write_files(place.source, {f"{number}": b"" for number in range(120)})
    for number in range(120):
        os.setxattr(f"{place.source}/{number}", "trusted.large", noise(30_000, str(number)))
    done = in_tmpfs(place, image=os.path.join(place.store, "image.cfs"))
    assert "No space left on device" in done.refused(4)
    assert sorted(done.out.decode().split("\n")) == ["", "ab 60", "ab/kept 5"]


def test_store_that_the_user_may_not_write(place: Place) -> None:
    builds.write_files(place.store, {"ab/kept": b"kept"})
    builds.set_mode(place.path, 0o777)  # for the image
    builds.set_mode(place.store, 0o555)
    said = place.mk(user=ORDINARY).refused(4)
    assert place.store in said
    assert "Permission denied" in said
    assert_untouched(place, {"ab/kept": 4})
    builds.set_mode(place.store, 0o755)


def test_store_that_the_user_may_not_read_in_part(place: Place) -> None:
    """Nothing can be said of the objects in a directory that is closed: its name is given."""
    place.mk()
    os.unlink(place.image)
    closed = os.path.join(place.store, place.object_of("small/3/94")[:2])
    for path in (place.path, place.store):
        builds.set_mode(path, 0o777)  # so that the rest is possible
    builds.set_mode(closed, 0)
    before = builds.files_of(place.store)
    done = place.mk(user=ORDINARY)
    builds.set_mode(closed, 0o755)
    assert "Permission denied" in done.refused(4)
    assert place.store in done.err
    after = builds.files_of(place.store)
    assert {name: size for name, size in after.items() if name in before} == before
    assert after.keys() - before.keys() <= {name for name in after if name.startswith(os.path.basename(closed))}


# Ordinary users ------------------------------------------------------------------------------------------------------


def test_ordinary_user_builds_what_is_readable(place: Place) -> None:
    expected = place.mk().digest
    shutil.rmtree(place.store)
    os.unlink(place.image)
    builds.set_mode(place.path, 0o777)  # for what is made there
    assert place.mk(user=ORDINARY).digest == expected
    builds.check_store(place.store)
    assert os.lstat(place.image).st_uid == ORDINARY.uid


def test_unreadable_file_is_named(place: Place) -> None:
    builds.set_mode(place.path, 0o777)  # for what would be made there
    path = os.path.join(place.source, "small/3/94")
    builds.set_mode(path, 0)
    if SELF.uid == 0:
        os.chown(path, 0, 0)
    said = place.mk(user=ORDINARY).refused(4)
    assert f"{path}: permission denied" in said.lower()
    assert not os.path.exists(place.image)
    assert not os.path.exists(place.store)


@needs_root
def test_device_nodes_are_built_by_everybody(place: Place) -> None:
    """Only making them takes a privilege. What whiteouts become is the reference's choice."""
    top = os.path.join(place.path, "devices")
    kinds = {b"null": (stat.S_IFCHR, 0x103), b"disk": (stat.S_IFBLK, 0x800), b"gone": (stat.S_IFCHR, 0)}
    nodes = [Node((), stat.S_IFDIR | 0o755)]
    nodes += [Node((name,), kind | 0o644, rdev=rdev) for name, (kind, rdev) in kinds.items()]
    nodes += [Node((b"fifo",), stat.S_IFIFO | 0o600), Node((b"socket",), stat.S_IFSOCK | 0o600)]
    disk.make(nodes, top)
    for options in ((), ("--skip-devices",)):
        expected = require_composefs().mkcomposefs(*options, "--print-digest-only", top)
        for user in (SELF, ORDINARY):
            assert builds.mk(*options, "--print-digest-only", top, user=user).out == expected
