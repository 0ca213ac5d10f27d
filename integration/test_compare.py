"""`cfsfuse compare`: what is equal is found equal, each planted difference is found by name, and nothing is left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from cfsfuse.mount.mountinfo import mount_at
from integration import kernel
from integration.hanging import anybody_waits, hanging
from integration.holding import oracle_mount
from integration.mounts import (
    CFSFUSE,
    ORDINARY,
    Stage,
    User,
    both_users,
    digest_of,
    eventually,
    flip,
    needs_root,
    noise,
    running,
    stage,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from integration.images import TestImage

DIFFERENT, USAGE, BAD, IMPOSSIBLE = 1, 2, 3, 4
CONTENT = noise(10_000, "compare")
LARGE = noise(20 << 20, "compare")  # larger than what checks read as a whole of their own accord
ENTRIES = [
    "/ 4096 40755 3 0 0 0 0.0 - - -",
    "/device 0 20600 1 0 0 261 0.0 - - -",
    "/dir 4096 40755 2 0 0 0 0.0 - - -",
    "/dir/inline 6 100644 1 0 0 0 7.123456789 - inline - user.kept=one user.other=two",
    "/link 6 120777 1 0 0 0 0.0 target - -",
]


def build(made: Stage, entries: list[str], image: str | None = None) -> str:
    """Let mkcomposefs make an image of `entries` and two files with objects."""
    recipe = made.recipe()
    recipe.lines = [*entries]
    recipe.file("/file", CONTENT)
    recipe.file("/large", LARGE)
    return recipe.build(image or made.image)


@pytest.fixture
def made() -> Iterator[Stage]:
    with stage() as place:
        place.environment["TMPDIR"] = place.directory("tmp")
        build(place, ENTRIES)
        yield place
        assert os.listdir(place.environment["TMPDIR"]) == []


def compare(made: Stage, *words: str, options: str = "noverity") -> subprocess.CompletedProcess[str]:
    return made.run(CFSFUSE, "compare", made.image, "-o", f"basedir={made.store},{options}", *words)


def document(made: Stage, code: int, *words: str) -> dict[str, Any]:
    """Run a comparison that must end with `code`; return its JSON."""
    done = compare(made, "--json", *words)
    assert (done.returncode, done.stderr) == (code, ""), done
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# Equal ----------------------------------------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("name", ["python", "python-split", "corners", "whiteouts", "random-12", "ostree"])
def test_kernel_fuse_and_image_are_equal(
    name: str, images_at: Callable[[str], TestImage], workspace: str, fuse_device: None
) -> None:
    image = images_at(name)
    mountpoint = os.path.join(workspace, "compare-able")
    os.makedirs(mountpoint, exist_ok=True)
    with oracle_mount(image, mountpoint):
        pass
    words = ("-o", "noverity,basedir=" + ":".join(image.base_directories), "--backend", "kernel", "--backend", "fuse")
    command = [CFSFUSE, "compare", image.path, *words, "--json"]
    done = subprocess.run(command, capture_output=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.fullmatch(rb"(compared \d+ of about \d+ entries\n)*", done.stderr)
    found = json.loads(done.stdout)
    assert (found["equal"], found["differences"]) == (True, [])
    assert [mount["name"] for mount in found["mounts"] if mount["mounted"]] == ["kernel", "fuse"]
    counts = {(row["check"], *row["between"]): row["observations"] for row in found["compared"]}
    checks = ("entries", "stat", "xattrs", "names", "digest")
    pairs = (("fuse", "kernel"), ("kernel", "image"), ("fuse", "image"))
    assert all(counts[check, *pair] for check in checks for pair in pairs), counts
    assert all(counts[check, "fuse", "kernel"] for check in ("lookup", "xattrs-absent", "access")), counts


@needs_root
def test_every_check_can_be_asked_for(made: Stage) -> None:
    found = document(made, 0, "--check", "all", "--backend", "kernel", "--backend", "fuse")
    assert {"modify", "open", "statfs", "content"} <= {row["check"] for row in found["compared"]}
    assert found["justified"]


@both_users
def test_what_an_ordinary_user_may_not_see_is_no_difference(user: User | None) -> None:
    with stage(user) as made:
        extra = [
            "/private 4096 40700 2 0 0 0 0.0 - - -",
            "/private/file 3 100600 1 0 0 0 0.0 - abc -",
            "/secret 3 100600 1 0 0 0 0.0 - abc - trusted.secret=one user.secret=two",
        ]
        build(made, [*ENTRIES, *extra])
        done = compare(made, "--backend", "fuse")
        assert (done.returncode, done.stderr) == (0, "")
        assert re.search(
            r"^equal(, but for contents that nobody could read)?\Z", done.stdout.rstrip("\n"), re.MULTILINE
        )


def test_a_backend_that_cannot_verify_is_compared_all_the_same(made: Stage) -> None:
    done = compare(made, options="tryverity")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^  kernel +(mounted(, not verifying: .+)?|not mounted: .+)$", done.stdout, re.MULTILINE)
    assert re.search(r"^  fuse +mounted$", done.stdout, re.MULTILINE)


# Planted differences --------------------------------------------------------------------------------------------------


class Planted(NamedTuple):
    """A difference: what an altered dump has instead of a line, and how it is to be told: path, field, both values."""

    line: str
    instead: str | None
    path: str
    field: str
    found: object
    expected: object


_INLINE = ENTRIES[3]
PLANTED = {
    "xattr missing": Planted(
        _INLINE, _INLINE.replace(" user.kept=one", ""), "/dir/inline", "getxattr 'user.kept'", None, "one"
    ),
    "xattr changed": Planted(
        _INLINE, _INLINE.replace("kept=one", "kept=ONE"), "/dir/inline", "getxattr 'user.kept'", "ONE", "one"
    ),
    "nlink": Planted(_INLINE, _INLINE.replace("100644 1 ", "100644 7 "), "/dir/inline", "st_nlink", 7, 1),
    "entry missing": Planted(_INLINE, None, "/dir/inline", "type", {"errno": "ENOENT"}, stat.S_IFREG),
    "nanosecond": Planted(
        _INLINE, _INLINE.replace("456789", "456788"), "/dir/inline", "st_mtime_ns", 7_123456788, 7_123456789
    ),
    "owner": Planted(_INLINE, _INLINE.replace(" 1 0 0 0 7", " 1 5 0 0 7"), "/dir/inline", "st_uid", 5, 0),
    "mode": Planted(_INLINE, _INLINE.replace("100644", "100645"), "/dir/inline", "st_mode", 0o100645, 0o100644),
    "content": Planted(_INLINE, _INLINE.replace(" inline ", " inlinE "), "/dir/inline", "content", "inlinE", "inline"),
    "link target": Planted(ENTRIES[4], ENTRIES[4].replace("target", "Target"), "/link", "target", "Target", "target"),
    "device": Planted(ENTRIES[1], ENTRIES[1].replace("261", "262"), "/device", "st_rdev", 262, 261),
    "type": Planted(ENTRIES[4], ENTRIES[4].replace("120777", "100777"), "/link", "type", stat.S_IFREG, stat.S_IFLNK),
}


@contextlib.contextmanager
def doctored(made: Stage, image: str, store: str) -> Iterator[list[str]]:
    """Let the kernel mount another image or store; yield the words that make it part of a comparison with ours."""
    place = made.directory("doctored")
    with kernel.mounted(image, [store], place):
        yield ["--backend", "kernel", "--mounted", f"doctored={place}"]


def told(found: dict[str, Any]) -> dict[tuple[str, str, str], tuple[object, object]]:
    """Return the differences of the doctored mount: whom it was compared with, path, field → both values."""
    return {
        (each["between"][1], each["path"], each["field"]): (each["found"], each["expected"])
        for each in found["differences"]
        if each["between"][0] == "doctored"
    }


@needs_root
@pytest.mark.parametrize("name", PLANTED)
def test_altered_image_is_found(made: Stage, name: str) -> None:
    planted = PLANTED[name]
    entries = [planted.instead if line == planted.line else line for line in ENTRIES]
    altered = build(made, [line for line in entries if line is not None], os.path.join(made.path, "altered.cfs"))
    with doctored(made, altered, made.store) as words:
        found = document(made, DIFFERENT, *words)
        text = compare(made, *words)
    for other in ("kernel", "image"):
        assert told(found)[other, planted.path, planted.field] == (planted.found, planted.expected)
    # What changes the place of an inode changes inode numbers elsewhere; nothing else is said of what was left alone.
    others = {
        path for _, path, field in told(found) if "st_ino" not in field and not field.startswith(("b'", "listed"))
    }
    assert others <= {planted.path, os.path.dirname(planted.path)}
    assert not [each for each in found["differences"] if each["between"][0] == "kernel"]
    assert text.returncode == DIFFERENT
    assert f"\n{planted.path} {planted.field}: doctored has " in text.stdout


@needs_root
@pytest.mark.parametrize(("path", "content"), [("/file", CONTENT), ("/large", LARGE)])
def test_swapped_byte_is_found(made: Stage, path: str, content: bytes) -> None:
    store = shutil.copytree(made.store, os.path.join(made.path, "other"))
    digest = digest_of(content).hex()
    flip(os.path.join(store, digest[:2], digest[2:]), len(content) // 2)
    swapped = bytearray(content)
    swapped[len(content) // 2] ^= 0x10
    with doctored(made, made.image, store) as words:
        found = document(made, DIFFERENT, *words)
    pair = (digest_of(swapped).hex(), digest)
    assert told(found) == {("kernel", path, "digest"): pair, ("image", path, "digest"): pair}


@needs_root
def test_truncated_object_is_found(made: Stage) -> None:
    store = shutil.copytree(made.store, os.path.join(made.path, "other"))
    digest = digest_of(LARGE).hex()
    os.truncate(os.path.join(store, digest[:2], digest[2:]), len(LARGE) - 5000)
    with doctored(made, made.image, store) as words:
        found = document(made, DIFFERENT, *words)
    assert {key[1:] for key in told(found)} >= {("/large", "digest")}
    assert {key[1] for key in told(found)} == {"/large"}


@needs_root
def test_wrong_errno_is_found(made: Stage) -> None:
    store = shutil.copytree(made.store, os.path.join(made.path, "other"))
    digest = digest_of(CONTENT).hex()
    os.unlink(os.path.join(store, digest[:2], digest[2:]))
    with doctored(made, made.image, store) as words:
        found = document(made, DIFFERENT, *words)
    enoent = {"errno": "ENOENT"}
    assert told(found) == {
        ("kernel", "/file", "open"): (enoent, None),
        ("kernel", "/file", "digest"): (enoent, digest),
        ("image", "/file", "digest"): (enoent, digest),
    }


@needs_root
def test_object_that_is_missing_everywhere_is_no_difference(made: Stage) -> None:
    digest = digest_of(CONTENT).hex()
    os.unlink(made.object(f"{digest[:2]}/{digest[2:]}"))
    assert document(made, 0, "--backend", "kernel", "--backend", "fuse")["equal"]


def test_contents_that_nobody_can_read_are_told(made: Stage) -> None:
    """A base directory that is not the right one makes all of them equal: nothing is there."""
    done = made.run(CFSFUSE, "compare", made.image, "-o", f"basedir={made.directory('empty')},noverity")
    assert (done.returncode, done.stderr) == (0, "")
    told = re.search(r"^contents not compared, for objects .*: (\d+) files$", done.stdout, re.MULTILINE)
    assert told is not None
    assert int(told[1]) > 0
    assert done.stdout.endswith("\nequal, but for contents that nobody could read\n")


def test_check_that_takes_two_is_refused_with_one(made: Stage) -> None:
    done = compare(made, "--backend", "fuse", "--check", "modify")
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert done.stderr == "cfsfuse: --check modify: the image says nothing of it, so it takes two mounts\n"


def test_damaged_object_is_found_where_it_is_refused(made: Stage) -> None:
    digest = digest_of(CONTENT).hex()
    flip(made.object(f"{digest[:2]}/{digest[2:]}"), 5000)
    done = compare(made, "--backend", "fuse", options="tryverity")
    assert done.returncode == DIFFERENT
    assert f"\n/file digest: fuse has EIO, image has {digest}\n" in done.stdout


@needs_root
def test_hidden_entry_that_is_shown_is_found(made: Stage) -> None:
    """EROFS alone shows what overlayfs takes for the absence of a name."""
    place = made.directory("doctored")
    mount = kernel._erofs(made.image)
    kernel._move_mount(mount, place)
    os.close(mount)
    try:
        found = document(made, DIFFERENT, "--backend", "kernel", "--mounted", f"doctored={place}")
    finally:
        kernel._unmount(place)
    for other in ("kernel", "image"):
        assert told(found)[other, "/00", "type"] == (stat.S_IFCHR, {"errno": "ENOENT"})


@needs_root
def test_link_in_the_place_of_a_directory_is_never_followed(made: Stage) -> None:
    outside = made.directory("outside")
    with open(os.path.join(outside, "inline"), "w", encoding="ascii") as file:
        file.write("untouched")
    before = os.stat(os.path.join(outside, "inline")), os.stat(outside)
    entries = [line for line in ENTRIES if not line.startswith("/dir")]
    entries.append(f"/dir {len(outside)} 120777 1 0 0 0 0.0 {outside} - -")
    altered = build(made, entries, os.path.join(made.path, "altered.cfs"))
    with doctored(made, altered, made.store) as words:
        found = document(made, DIFFERENT, *words, "--check", "all")
    assert told(found)["kernel", "/dir", "type"] == (stat.S_IFLNK, stat.S_IFDIR)
    assert told(found)["kernel", "/dir/inline", "type"] == ({"errno": "ENOENT"}, stat.S_IFREG)
    assert (os.stat(os.path.join(outside, "inline")), os.stat(outside)) == before
    assert os.listdir(outside) == ["inline"]


@needs_root
def test_mount_below_that_takes_changes_is_not_changed(made: Stage) -> None:
    outside = made.directory("outside")
    with open(os.path.join(outside, "inline"), "w", encoding="ascii") as file:
        file.write("untouched")
    with doctored(made, made.image, made.store) as words:
        below = os.path.join(made.path, "doctored", "dir")
        subprocess.run(["mount", "--bind", outside, below], check=True)
        try:
            found = document(made, DIFFERENT, *words, "--check", "modify", "--check", "open")
        finally:
            kernel._unmount(below)
    assert "/dir/inline" in {path for _, path, _ in told(found)}
    assert os.listdir(outside) == ["inline"]
    with open(os.path.join(outside, "inline"), encoding="ascii") as file:
        assert file.read() == "untouched"


@needs_root
def test_report_for_people_is_bounded(made: Stage) -> None:
    entries = [*ENTRIES, *(f"/dir/{number} 0 100644 1 0 0 0 0.0 - - -" for number in range(300))]
    build(made, entries)
    altered = build(made, [line.replace(" 0.0 ", " 1.0 ") for line in entries], os.path.join(made.path, "altered.cfs"))
    with doctored(made, altered, made.store) as words:
        found = document(made, DIFFERENT, *words)
        text = compare(made, *words)
    total = len(found["differences"])
    assert total > 600
    assert f"\n… and {total - 100} more differences; --json has all of them\n{total} differences\n" in text.stdout


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "pattern"),
    [
        ([], USAGE, "no base directory.*"),
        (["-o", "basedir=STORE,upperdir=a,workdir=b"], USAGE, "option upperdir: .*"),
        (["-o", "basedir=STORE,rw"], USAGE, "option rw: .*"),
        (["-o", "basedir=STORE,idmap=/proc/self/ns/user"], USAGE, "option idmap: .*"),
        (["-o", "basedir=STORE,unheard-of"], USAGE, ".*unheard-of.*"),
        (["-o", "basedir=STORE", "--backend", "none"], USAGE, ".*--backend.*"),
        (["-o", "basedir=STORE", "--check", "none"], USAGE, ".*--check.*"),
        (["-o", "basedir=STORE", "--mounted", "name"], USAGE, "--mounted name: .*NAME=DIR"),
        (["-o", "basedir=STORE", "--mounted", "fuse=STORE"], USAGE, "--mounted .*: the name fuse is taken.*"),
        (["-o", "basedir=STORE", "--mounted", "image=STORE"], USAGE, "--mounted .*: the name image is taken.*"),
        (["-o", "basedir=STORE", "--mounted", "other=STORE"], USAGE, ".*not a read-only mount.*"),
        (["-o", "basedir=STORE", "--mounted", "other=/absent"], USAGE, "/absent: No such file or directory"),
        (["-o", f"basedir=STORE,digest={'0' * 64}"], BAD, ".*digest.*"),
        (["-o", "basedir=/absent"], USAGE, ".*/absent.*"),
        (["-o", "basedir=STORE,verity", "--backend", "kernel"], IMPOSSIBLE, "kernel backend: .*"),
    ],
)
def test_bad_input_ends_in_one_line(made: Stage, words: list[str], code: int, pattern: str) -> None:
    given = [word.replace("STORE", made.store) for word in words]
    done = made.run(CFSFUSE, "compare", made.image, *given)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert re.fullmatch(f"cfsfuse( compare)?: {pattern}\n", done.stderr), done.stderr
    assert made.is_clean()


def test_bad_images_are_refused(made: Stage) -> None:
    for content in (b"", b"no image"):
        with open(made.image, "wb") as file:
            file.write(content)
        done = compare(made)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (BAD, "", 1), done
    os.unlink(made.image)
    assert compare(made).returncode == BAD


def test_named_backend_that_is_impossible() -> None:
    with stage(ORDINARY) as made:
        build(made, ENTRIES)
        done = compare(made, "--backend", "kernel")
        assert (done.returncode, done.stdout) == (IMPOSSIBLE, "")
        assert re.fullmatch(
            "cfsfuse: kernel backend: only root outside of user namespaces may mount EROFS\n", done.stderr
        )
        others = compare(made)
        assert others.returncode == 0
        assert re.search("^  kernel +not mounted: only root outside of user namespaces", others.stdout, re.MULTILINE)


# Ends -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def long() -> Iterator[Stage]:
    """A stage with an image that takes long to be compared."""
    with stage() as place:
        place.environment["TMPDIR"] = place.directory("tmp")
        build(place, [*ENTRIES, *(f"/dir/{number} 0 100644 1 0 0 0 0.0 - - -" for number in range(20_000))])
        yield place


def started(made: Stage, *words: str) -> subprocess.Popen[str]:
    return made.start(CFSFUSE, "compare", made.image, "-o", f"basedir={made.store},noverity", *words)


def assert_nothing_is_left(made: Stage) -> None:
    """At once: the command waits for what it has started."""
    assert made.mounts() == []
    assert made.processes() == []
    assert os.listdir(made.environment["TMPDIR"]) == []


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=str
)
def test_interrupted_comparison_leaves_nothing(long: Stage, number: signal.Signals, code: int) -> None:
    with running(started(long, "--check", "all")) as process:
        eventually(lambda: any(path.endswith("/fuse") for path in long.mounts()), "a mount through FUSE")
        time.sleep(0.3)
        process.send_signal(number)
        time.sleep(0.02)  # while it clears up: whoever interrupts it again shall not keep it from that
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert process.returncode == code, out
        assert re.fullmatch("(compared .*\n)*", err)
    assert_nothing_is_left(long)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_comparison_may_be_interrupted_at_any_moment(long: Stage, number: signal.Signals) -> None:
    for hundredths in range(5, 95, 6):
        with running(started(long)) as process:
            time.sleep(hundredths / 100)
            process.send_signal(number)
            process.communicate(timeout=30)
        assert process.returncode != 0
        assert_nothing_is_left(long)


def test_mount_that_dies_is_a_clear_error(long: Stage) -> None:
    daemon = long.mount()
    with running(started(long, "--backend", "fuse", "--mounted", f"other={long.mountpoint}", "--check", "all")) as run:
        eventually(lambda: any(path.endswith("/fuse") for path in long.mounts()), "a mount through FUSE")
        time.sleep(0.5)
        os.kill(daemon, signal.SIGKILL)
        _, err = run.communicate(timeout=60)
    assert run.returncode == IMPOSSIBLE
    assert re.fullmatch(r"(compared .*\n)*cfsfuse: other: the mount has gone.*, so mount and compare again\n", err), err
    eventually(lambda: mount_at(long.mountpoint) is None, "the end of the dead mount")
    assert_nothing_is_left(long)


@needs_root
def test_mount_that_hangs_is_a_clear_error(made: Stage) -> None:
    place = made.directory("hanging")
    with hanging(place):
        done = compare(made, "--backend", "fuse", "--mounted", f"mute={place}", "--patience", "1")
        assert (done.returncode, done.stdout) == (IMPOSSIBLE, "")
        assert re.fullmatch("cfsfuse: mute: no answer within 1 s when / was looked at: .*--patience\n", done.stderr)
    eventually(lambda: not made.processes(), "the end of what has hung in the server")
    assert_nothing_is_left(made)


@needs_root
def test_mount_that_hangs_may_be_interrupted(made: Stage) -> None:
    place = made.directory("hanging")
    with hanging(place), running(started(made, "--backend", "fuse", "--mounted", f"mute={place}")) as process:
        eventually(lambda: anybody_waits(made.processes()), "a process that hangs")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=10)
        assert (process.returncode, out, err) == (143, "", "")
    eventually(lambda: not made.processes(), "the end of what has hung in the server")
    assert_nothing_is_left(made)


def test_own_server_that_stops_is_a_clear_error(long: Stage) -> None:
    with running(started(long, "--backend", "fuse", "--check", "all", "--patience", "2")) as process:
        eventually(lambda: any(path.endswith("/fuse") for path in long.mounts()), "a mount through FUSE")
        time.sleep(1)
        (server,) = [pid for pid in long.daemons() if holds_device(pid)]
        os.kill(server, signal.SIGSTOP)
        _, err = process.communicate(timeout=30)
    assert process.returncode == IMPOSSIBLE
    assert re.fullmatch(r"(compared .*\n)*cfsfuse: fuse: no answer within 2 s when /\S* was looked at: .*\n", err), err
    assert_nothing_is_left(long)


def holds_device(pid: int) -> bool:
    names = os.listdir(f"/proc/{pid}/fd")
    return any(os.path.realpath(f"/proc/{pid}/fd/{name}") == "/dev/fuse" for name in names)


def test_processes_of_others_are_left_alone(made: Stage) -> None:
    command = [CFSFUSE, "compare", made.image, "-o", f"basedir={made.store},noverity", "--backend", "fuse"]
    with running(made.start("sh", "-c", 'sleep 1000 >&- 2>&- & echo $!; exec "$@"', "sh", *command)) as process:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        os.kill(int(out.split()[0]), signal.SIGKILL)  # it lives
    eventually(lambda: not made.processes(), "the end of the other process")
    assert_nothing_is_left(made)


def test_any_bytes_may_name_the_image(made: Stage) -> None:
    made.image = os.fsdecode(os.fsencode(made.path) + b"/odd\xff.cfs")
    build(made, ENTRIES)
    done = compare(made, "--backend", "fuse")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{made.path}/odd\\xff.cfs:\n")


def test_reader_that_goes_leaves_nothing(made: Stage) -> None:
    with running(made.start(CFSFUSE, "compare", made.image, "-o", f"basedir={made.store},noverity", "--json")) as run:
        assert run.stdout is not None
        run.stdout.close()
        assert run.wait(timeout=60) == 141
    assert_nothing_is_left(made)
