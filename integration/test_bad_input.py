"""What a user can get wrong: one line that names the thing and the remedy, the documented exit code, nothing left."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from cfsfuse.erofs.ondisk import SUPER_OFFSET
from integration.mounts import (
    CFSFUSE,
    ORDINARY,
    SELF,
    Stage,
    User,
    both_users,
    digest_of,
    mount_in_private_namespace,
    needs_root,
    noise,
    require,
    stage,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

USAGE, BAD, IMPOSSIBLE = 2, 3, 4
CONTENT = noise(10_000, "bad input")
LARGE = noise(2 << 20, "bad input")

ordinary_of_root = pytest.mark.skipif(ORDINARY == SELF, reason="needs root")


@contextlib.contextmanager
def image(user: User | None = SELF) -> Iterator[Stage]:
    with stage(user) as made:
        recipe = made.recipe()
        recipe.file("/file", CONTENT)
        recipe.file("/large", LARGE)
        for index in range(300):  # so that there is something to cut off
            recipe.inline(f"/inline{index}", noise(60, str(index)))
        recipe.build(made.image)
        yield made


def assert_refused(
    made: Stage, code: int, pattern: str, *words: str, verb: str = "mount", wrapper: Sequence[str] = ()
) -> None:
    """Assert that a command ends with `code` and the one line `pattern`, and leaves nothing behind."""
    before = made.mounts()
    done = made.run(CFSFUSE, verb, *words, wrapper=wrapper)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert re.fullmatch(rf"cfsfuse(?: {verb})?: {pattern}\n", done.stderr), done.stderr
    assert made.mounts() == before
    assert made.processes() == []


@both_users
def test_image_missing(user: User | None) -> None:
    with image(user) as made:
        missing = f"{made.path}/missing.cfs"
        assert_refused(
            made, BAD, f"{missing}: image: cannot be opened: No such file or directory", *made.words(image=missing)
        )


def test_image_of_another_kind() -> None:
    with image() as made:
        fifo = f"{made.path}/fifo"
        os.mkfifo(fifo)
        for path in (made.store, fifo, "/dev/null"):
            assert_refused(made, BAD, f"{path}: image: not a regular file", *made.words(image=path))


@ordinary_of_root
def test_image_forbidden() -> None:
    with image(ORDINARY) as made:
        os.chmod(made.image, 0)
        assert_refused(made, BAD, f"{made.image}: image: cannot be opened: Permission denied", *made.words())


def test_image_empty() -> None:
    with image() as made:
        os.truncate(made.image, 0)
        assert_refused(made, BAD, f"{made.image}: .*empty file", *made.words())


@pytest.mark.parametrize("length", [1, 31, 32, 1023, 1024, 1100, 1151])
def test_image_truncated_before_the_end_of_its_super_block(length: int) -> None:
    with image() as made:
        os.truncate(made.image, length)
        assert_refused(made, BAD, f"{made.image}: .*{length} bytes are too few .*truncated.*", *made.words())


@pytest.mark.parametrize("part", [0.25, 0.5, 0.95])
def test_image_truncated_further_on(part: float) -> None:
    with image() as made:
        size = os.path.getsize(made.image)
        os.truncate(made.image, int(size * part))
        assert_refused(made, BAD, f"{made.image}: .*truncated.*", *made.words())


@both_users
def test_image_that_is_not_erofs(user: User | None) -> None:
    with image(user) as made:
        with open(made.image, "wb") as file:
            file.write(noise(100_000, "not erofs"))
        assert_refused(made, BAD, f"{made.image}: .*0x[0-9a-f]+: not an EROFS image", *made.words())
        assert_refused(made, BAD, "/etc/passwd: .*(not an EROFS image|too few.*)", *made.words(image="/etc/passwd"))


def erofs(made: Stage, *options: str) -> str:
    """Return an EROFS image of mkfs.erofs; skip where it cannot do that."""
    source = made.directory("source")
    with open(f"{source}/file", "wb") as file:
        file.write(b"compressible " * 100_000)
    path = f"{made.path}/erofs"
    done = subprocess.run([require("mkfs.erofs"), *options, path, source], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"mkfs.erofs {' '.join(options)}: {done.stderr.decode(errors='replace').strip()}")
    return path


def test_compressed_erofs() -> None:
    with image() as made:
        path = erofs(made, "-zlz4")
        assert_refused(made, BAD, f"{path}: .*compressed.*EROFS.*", *made.words(image=path))


def test_erofs_that_is_not_composefs() -> None:
    with image() as made:
        path = erofs(made)
        assert_refused(
            made, BAD, f"{path}: composefs magic.*: an EROFS image, but not one of composefs", *made.words(image=path)
        )


def test_image_with_a_newer_super_block() -> None:
    with image() as made:
        with open(made.image, "r+b") as file:
            file.seek(SUPER_OFFSET + 80)
            file.write(b"\xff\xff\xff\x7f")
        assert_refused(made, BAD, f"{made.image}: feature_incompat at byte 1104: .*", *made.words())


@both_users
def test_wrong_digest(user: User | None) -> None:
    with image(user) as made, open(made.image, "rb") as file:
        right = digest_of(file.read()).hex()
        wrong = digest_of(b"").hex()
        reason = f"the image's fs-verity digest is {right}, not {wrong} as asked for by digest="
        assert_refused(made, BAD, f"{made.image}: {reason}", *made.words(f"digest={wrong}"))
        with made.mounted(f"digest={right.upper()}"):
            pass


@pytest.mark.parametrize("digest", ["abc", "g" * 64, "a" * 63, "a" * 65, "sha256:" + "a" * 64, "é" * 64])
def test_malformed_digest(digest: str) -> None:
    with image() as made:
        assert_refused(
            made,
            USAGE,
            rf"digest={digest}: not an fs-verity digest \(64 or 128 hex.*\)",
            *made.words(f"digest={digest}"),
        )


@both_users
def test_base_directory_missing_or_a_file(user: User | None) -> None:
    with image(user) as made:
        for path, reason in ((f"{made.path}/none", "No such file or directory"), (made.image, "Not a directory")):
            expected = f"{path}: base directory: {reason}; .*basedir=.*"
            assert_refused(made, USAGE, expected, *made.words(f"basedir={made.store}:{path}"))


@both_users
def test_mountpoint_missing_or_a_file(user: User | None) -> None:
    with image(user) as made:
        missing = f"{made.path}/none"
        assert_refused(
            made, USAGE, f"{missing}: mountpoint: No such .*; create the directory.*", *made.words(mountpoint=missing)
        )
        assert_refused(made, USAGE, f"{made.image}: mountpoint is not a directory", *made.words(mountpoint=made.image))


@ordinary_of_root
def test_mountpoint_of_somebody_else() -> None:
    with image(ORDINARY) as made:
        os.chown(made.mountpoint, 0, 0)
        assert_refused(
            made, IMPOSSIBLE, f"{made.mountpoint}: mountpoint is not writable .*fusermount3.*", *made.words()
        )


@both_users
def test_mountpoint_busy(user: User | None) -> None:
    with image(user) as made:
        made.mount()
        before = made.processes()
        done = made.run(CFSFUSE, "mount", *made.words())
        expected = (
            f"cfsfuse: {made.mountpoint}: {made.image} is mounted here already; cfsfuse umount {made.mountpoint}\n"
        )
        assert (done.returncode, done.stdout, done.stderr) == (USAGE, "", expected)
        assert made.processes() == before
        assert made.mounts() == [made.mountpoint]


OPTIONS = {
    "nonsense": "unknown option 'nonsense'; see cfsfuse mount --help",
    "nonsense=5": "unknown option 'nonsense'; see cfsfuse mount --help",
    "verity,bäsedir=/x": "unknown option 'bäsedir'; see cfsfuse mount --help",
    "basedir": "option basedir needs a value: basedir=…",
    "basedir=": "option basedir= needs a value",
    "digest=": "option digest= needs a value",
    "uid=root": "uid=root: not a number from 0 to 4294967294",
    "uid=-1": "uid=-1: not a number from 0 to 4294967294",
    "gid=4294967295": "gid=4294967295: not a number from 0 to 4294967294",
    "poll=fast": "poll=fast: not a number from 0 to 10000",
    "poll=10001": "poll=10001: not a number from 0 to 10000",
    "statfs=disk": "statfs=disk: must be store or image",
    "verity=1": ".*verity.*",
    "allow_other=yes": ".*allow_other.*",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_unknown_options_and_values(option: str) -> None:
    with image() as made:
        assert_refused(made, USAGE, OPTIONS[option], *made.words(*option.split(",")))


def test_an_option_that_needs_a_kernel_mount() -> None:
    with image() as made:
        assert_refused(made, IMPOSSIBLE, "fuse backend: idmap= is not for it", *made.words("idmap=/proc/self/ns/user"))


def test_taking_changes_through_fuse_needs_privileges() -> None:
    with image(ORDINARY) as made:
        expected = "fuse backend: needs CAP_SYS_ADMIN: .*"
        assert_refused(made, IMPOSSIBLE, expected, *made.words("upperdir=/x", "workdir=/x"))


@needs_root
def test_layers_of_changes_through_fuse() -> None:
    with image() as made:
        upper, inside = made.directory("upper"), made.directory("upper/inside")
        for layers, expected in (
            (["upperdir=/none", "workdir=/none"], "/none: upperdir: No such file or directory"),
            (["upperdir=" + upper, "workdir=/none"], "/none: workdir: No such file or directory"),
            (["upperdir=" + upper, "workdir=" + inside], f"workdir={inside}: must stand beside upperdir={upper}, .*"),
            ([f"upperdir={made.store}", f"workdir={upper}"], f"upperdir: inside the object store {made.store}, .*"),
            ([f"upperdir={upper}"], "option workdir= is missing: .*"),
        ):
            assert_refused(made, USAGE, expected, *made.words(*layers))
        assert (os.listdir(upper), os.listdir(inside)) == (["inside"], [])


@pytest.mark.parametrize(
    "words", [[], ["image"], ["image", "mnt", "further"], ["--nonsense", "image", "mnt"], ["image", "mnt", "-o"]]
)
def test_wrong_command_lines(words: list[str]) -> None:
    with image() as made:
        assert_refused(made, USAGE, ".*; see cfsfuse (mount )?--help", *words)


def test_a_verb_that_does_not_exist() -> None:
    with image() as made:
        done = made.run(CFSFUSE, "moumt", made.image, made.mountpoint)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (USAGE, "", 1)
        assert "moumt" in done.stderr


def with_device(made: Stage, mode: int | None) -> list[str]:
    """Return the words that give a command a /dev/fuse of another mode, or none, in a mount namespace of its own.

    A whole /dev of our own: a single file cannot be hidden by a mount.
    """
    devices = made.directory("devices")
    for name in ("null", "zero", "urandom", "tty"):
        status = os.stat(f"/dev/{name}")
        os.mknod(f"{devices}/{name}", stat.S_IFCHR | 0o666, status.st_rdev)
        os.chmod(f"{devices}/{name}", 0o666)  # noqa: S103 - as they are in /dev
    if mode is not None:
        os.mknod(f"{devices}/fuse", stat.S_IFCHR, os.stat("/dev/fuse").st_rdev)
        os.chmod(f"{devices}/fuse", mode)
    script = 'mount --bind "$0" /dev && exec "$@"'
    return [*mount_in_private_namespace(), "sh", "-c", script, devices]


needs_namespace = pytest.mark.skipif(SELF.uid != 0, reason="needs root, for a mount namespace")


@needs_namespace
@both_users
def test_device_missing(user: User | None) -> None:
    with image(user) as made:
        expected = "fuse backend: /dev/fuse: not there; load the kernel's module .*"
        assert_refused(made, IMPOSSIBLE, expected, *made.words(), wrapper=with_device(made, None))


@needs_namespace
def test_device_forbidden() -> None:
    with image(ORDINARY) as made:
        expected = (
            "fuse backend: /dev/fuse: permission denied; the administrator has to make it usable: chmod 666 /dev/fuse"
        )
        assert_refused(made, IMPOSSIBLE, expected, *made.words(), wrapper=with_device(made, 0o600))


def without(made: Stage, program: str) -> None:
    """Give the stage a PATH in which `program` is missing."""
    programs = made.directory("programs")
    for name in ("sh", "env", "setpriv", "unshare"):
        path = shutil.which(name)
        if path is not None and name != program:
            os.symlink(path, f"{programs}/{name}")
    made.environment["PATH"] = programs


@ordinary_of_root
def test_fusermount_missing() -> None:
    with image(ORDINARY) as made:
        without(made, "fusermount3")
        expected = "fuse backend: fusermount3: not found; install the package fuse3"
        assert_refused(made, IMPOSSIBLE, expected, *made.words())


@pytest.mark.skipif(SELF.uid != 0, reason="needs root")
def test_root_needs_no_fusermount() -> None:
    with image() as made:
        path = made.environment["PATH"]
        without(made, "fusermount3")
        done = made.run(CFSFUSE, "mount", *made.words())
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        with open(made.at("file"), "rb") as file:
            assert file.read() == CONTENT
        made.environment["PATH"] = path
        made.unmount()


def with_conf(made: Stage, text: str) -> list[str]:
    """Return the words that give a command another fuse.conf."""
    path = f"{made.path}/fuse.conf"
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
    return [*mount_in_private_namespace(), "sh", "-c", 'mount --bind "$0" /etc/fuse.conf && exec "$@"', path]


ALLOW_OTHER = "allow_other: /etc/fuse.conf does not permit it; .*user_allow_other.*"


@needs_namespace
@pytest.mark.parametrize("text", ["", "#user_allow_other\n", "mount_max = 10\n", "user_allow_other = no\n"])
def test_allow_other_not_permitted(text: str) -> None:
    with image(ORDINARY) as made:
        assert_refused(made, IMPOSSIBLE, ALLOW_OTHER, *made.words("allow_other"), wrapper=with_conf(made, text))


@needs_namespace
def test_allow_other_permitted() -> None:
    """fusermount3 thinks so too; the mount is in the namespace and ends with it."""
    with image(ORDINARY) as made:
        wrapper = with_conf(made, "# comment\nuser_allow_other\n")
        read = f'"{CFSFUSE}" mount "$@" && cat "{made.at("file")}" | sha256sum; "{CFSFUSE}" umount "{made.mountpoint}"'
        done = made.run("sh", "-c", read, "sh", *made.words("allow_other"), wrapper=wrapper)
        assert (done.returncode, done.stderr) == (0, "")


@both_users
def test_log_not_writable(user: User | None) -> None:
    with image(user) as made:
        for path, reason in ((f"{made.path}/none/log", "No such file"), (made.store, "Is a directory")):
            expected = f"{path}: cannot write the log: {reason}.*; name another file with -o log="
            assert_refused(made, IMPOSSIBLE, expected, *made.words(f"log={path}"))


@ordinary_of_root
def test_log_forbidden() -> None:
    with image(ORDINARY) as made:
        with open(made.log, "w", encoding="ascii"):
            os.chmod(made.log, 0o600)
        assert_refused(made, IMPOSSIBLE, f"{made.log}: cannot write the log: Permission denied; .*", *made.words())
        os.unlink(made.log)


@both_users
def test_cache_that_cannot_be_written_is_done_without(user: User | None) -> None:
    with image(user) as made:
        os.rmdir(made.cache)
        with open(made.cache, "w", encoding="ascii"):
            pass
        for _ in range(2):
            made.mount()
            done = made.run("cmp", made.at("large"), made.object(name_of(LARGE)))
            assert (done.returncode, done.stderr) == (0, "")
            made.unmount()
        made.claim(f"^WARNING {made.cache}/cfsfuse/merkle: no cache of Merkle trees: ", 2)


@ordinary_of_root
def test_cache_that_belongs_to_somebody_else_is_done_without() -> None:
    with image(ORDINARY) as made:
        merkle = f"{made.cache}/cfsfuse/merkle"
        os.makedirs(merkle, 0o755)
        for path in (made.cache, f"{made.cache}/cfsfuse", merkle):
            os.chown(path, 0, 0)
        made.mount()
        done = made.run("cmp", made.at("large"), made.object(name_of(LARGE)))
        assert (done.returncode, done.stderr) == (0, "")
        made.unmount()
        assert os.listdir(merkle) == []


def name_of(data: bytes) -> str:
    digest = digest_of(data).hex()
    return f"{digest[:2]}/{digest[2:]}"


def test_debug_shows_a_traceback_and_nothing_else_does() -> None:
    with image() as made:
        done = made.run(CFSFUSE, "--debug", "mount", *made.words(image="/nowhere"))
        assert done.returncode != 0
        assert "Traceback" in done.stderr
        assert made.is_clean()


@pytest.mark.parametrize("words", [("mnt",), ("/nowhere",), ("image.cfs",)])
def test_umount_of_nothing(words: tuple[str, ...]) -> None:
    with image() as made:
        assert_refused(made, USAGE, f"{words[0]}: nothing is mounted here", *words, verb="umount")


def test_helper_of_mount_says_the_same() -> None:
    with image() as made:
        helper = os.path.join(os.path.dirname(sys.executable), "mount.cfsfuse")
        done = made.run(helper, *made.words(image="/nowhere"))
        assert (done.returncode, done.stdout) == (BAD, "")
        assert done.stderr == "mount.cfsfuse: /nowhere: image: cannot be opened: No such file or directory\n"
        assert made.is_clean()
