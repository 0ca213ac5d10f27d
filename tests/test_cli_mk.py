"""`cfsfuse mk`: its options, what it prints, its errors, and that nothing stays behind when it fails."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from cfsfuse.builder import image as builder
from cfsfuse.builder.scan import Progress
from cfsfuse.builder.store import StoreWriter
from cfsfuse.cli import main as command
from cfsfuse.cli import mk
from cfsfuse.errors import StoreError
from cfsfuse.imagefile import open_image
from cfsfuse.verity.digest import SHA256
from cfsfuse.verity.merkle import content_digest
from tests.cli_support import COMMAND, fails, run
from tests.support import expected, expected_rows, random_bytes, vector

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli_support import Result

Capture = pytest.CaptureFixture[bytes]

no_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
EMPTY_DUMP = b"/ 4096 40755 2 0 0 0 0.0 - - -\n"


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory of some files, with two names for one of them."""
    top = tmp_path / "tree"
    (top / "sub").mkdir(parents=True)
    (top / "small").write_bytes(b"small")
    (top / "sub" / "file").write_bytes(b"content " * 20)
    (top / "sub" / "large").write_bytes(random_bytes((1 << 20) + 5))
    (top / "twin").write_bytes(b"content " * 20)
    os.link(top / "sub" / "file", top / "linked")
    (top / "link").symlink_to("small")
    os.mkfifo(top / "fifo")
    for path in (*top.rglob("*"), top):
        os.utime(path, ns=(0, 1_700_000_000_123_456_789), follow_symlinks=False)
    return top


def left(folder: Path) -> list[str]:
    """Return the names in a folder but those that the test itself made."""
    return sorted(set(os.listdir(folder)) - {"tree", "cache", "dump"})


def objects(store: Path) -> list[str]:
    found = [os.path.relpath(os.path.join(where, name), store) for where, _, names in os.walk(store) for name in names]
    return sorted(found)


def succeeds(capture: Capture, *arguments: object) -> Result:
    """Run `cfsfuse mk`, which may say no more than that there is no fs-verity here."""
    result = run(capture, "mk", *arguments)
    assert result.code == 0, result.err
    assert all("fs-verity" in line for line in result.err.splitlines())
    assert result.err.count("\n") <= 1
    return result


def digest_of(path: Path) -> str:
    return content_digest(SHA256, path.read_bytes()).hex()


# What comes out


@pytest.mark.parametrize("row", expected_rows(), ids=lambda row: "-".join(list(row.values())[:3]))
def test_dumps_become_the_images_of_the_reference_tool(
    row: dict[str, str], tmp_path: Path, capfdbinary: Capture
) -> None:
    (tmp_path / "dump").write_bytes(vector(f"{row['name']}.dump.gz"))
    versions = ["--min-version", row["min_version"], f"--max-version={row['max_version']}"]
    result = run(capfdbinary, "mk", "--from-file", tmp_path / "dump", "--print-digest", *versions, tmp_path / "image")
    assert result == (0, row["fsverity_sha256"].encode() + b"\n", "")
    content = (tmp_path / "image").read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (int(row["bytes"]), row["sha256"])


def test_a_directory_becomes_an_image_and_objects(tree: Path, tmp_path: Path, capfdbinary: Capture) -> None:
    image, store = tmp_path / "image", tmp_path / "objects"
    result = succeeds(capfdbinary, "--digest-store", store, "--print-digest", tree, image)
    assert result.out == digest_of(image).encode() + b"\n"
    contents = [(tree / "twin").read_bytes(), (tree / "sub" / "large").read_bytes()]
    names = [content_digest(SHA256, content).hex() for content in contents]
    expected_names = [f"{name[:2]}/{name[2:]}" for name in names]
    assert objects(store) == sorted([*expected_names, f".merkle/{expected_names[1]}"])
    for name, content in zip(expected_names, contents, strict=True):
        assert (store / name).read_bytes() == content
    basedir = ["--basedir", store]
    assert run(capfdbinary, "cat", image, "/sub/large", *basedir).out == contents[1]
    assert run(capfdbinary, "cat", image, "/linked", *basedir).out == contents[0]
    assert run(capfdbinary, "ls", image).out.count(b"\n") == 8
    assert left(tmp_path) == ["image", "objects"]


def test_without_a_store_the_image_is_the_same(tree: Path, tmp_path: Path, capfdbinary: Capture) -> None:
    succeeds(capfdbinary, tree, tmp_path / "alone")
    succeeds(capfdbinary, "--digest-store=" + str(tmp_path / "objects"), "--threads=1", tree, tmp_path / "image")
    assert (tmp_path / "alone").read_bytes() == (tmp_path / "image").read_bytes()


def test_digest_only(tree: Path, tmp_path: Path, capfdbinary: Capture) -> None:
    succeeds(capfdbinary, tree, tmp_path / "image")
    result = succeeds(capfdbinary, "--print-digest-only", tree)
    assert result.out == digest_of(tmp_path / "image").encode() + b"\n"
    assert left(tmp_path) == ["image"]
    # As in mkcomposefs, the store is filled all the same.
    assert succeeds(capfdbinary, tree, "--print-digest-only", "--digest-store", tmp_path / "objects").out == result.out
    assert len(objects(tmp_path / "objects")) == 3


def test_standard_output_takes_the_image(tree: Path, tmp_path: Path, capfdbinary: Capture) -> None:
    succeeds(capfdbinary, tree, tmp_path / "image")
    content = (tmp_path / "image").read_bytes()
    assert succeeds(capfdbinary, tree, "-").out == content
    # As in mkcomposefs, the digest follows the image.
    line = digest_of(tmp_path / "image").encode() + b"\n"
    assert succeeds(capfdbinary, "--print-digest", tree, "-").out == content + line


def test_options_stand_anywhere(tree: Path, tmp_path: Path, capfdbinary: Capture) -> None:
    succeeds(capfdbinary, tree, "--use-epoch", tmp_path / "image", "--print-digest")
    assert b"modified: 1970-01-01 00:00:00.000000000" in run(capfdbinary, "stat", tmp_path / "image", "/small").out
    assert left(tmp_path) == ["image"]


@pytest.mark.parametrize(
    ("options", "version"),
    [
        ([], 1),
        (["--min-version=0"], 0),
        (["--max-version=0"], 0),
        (["--max-version=1"], 1),
        (["--min-version=1"], 1),
        (["--min-version=1", "--max-version=0"], 1),
        (["--min-version=0", "--max-version=1"], 1),
    ],
)
def test_versions_default_as_in_the_reference_tool(
    options: list[str], version: int, tmp_path: Path, capfdbinary: Capture
) -> None:
    (tmp_path / "dump").write_bytes(EMPTY_DUMP + b"/gone 0 20000 1 0 0 0 0.0 - - -\n")
    succeeds(capfdbinary, "--from-file", *options, tmp_path / "dump", tmp_path / "image")
    assert open_image(str(tmp_path / "image")).header.composefs_version == version


def test_what_is_left_out(tree: Path, tmp_path: Path, capfdbinary: Capture) -> None:
    try:
        os.setxattr(tree / "small", "user.test", b"1")
    except OSError:
        pytest.skip("no xattrs here")
    for option, shown in (("--skip-devices", True), ("--skip-xattrs", False), ("--user-xattrs", True)):
        succeeds(capfdbinary, option, tree, tmp_path / "image")
        assert (b"user.test" in run(capfdbinary, "stat", tmp_path / "image", "/small").out) is shown
        # A fifo is no device: mkcomposefs keeps it as well.
        assert b"/fifo\n" in run(capfdbinary, "ls", tmp_path / "image").out


def test_hard_links_are_kept_when_asked_for(tree: Path, tmp_path: Path, capfdbinary: Capture) -> None:
    def is_linked(*options: str) -> bool:
        succeeds(capfdbinary, *options, tree, tmp_path / "image")
        texts = [run(capfdbinary, "stat", "--json", tmp_path / "image", path).out for path in ("linked", "sub/file")]
        one, two = (json.loads(text)["inode"] for text in texts)
        return bool(one == two)

    assert not is_linked()
    assert is_linked("--hard-links")


def test_merkle_trees_are_left_out_when_asked_for(tree: Path, tmp_path: Path, capfdbinary: Capture) -> None:
    succeeds(capfdbinary, "--no-merkle", "--digest-store", tmp_path / "objects", tree, tmp_path / "image")
    assert not (tmp_path / "objects" / ".merkle").exists()


def test_existing_objects_are_reused_or_repaired(tree: Path, tmp_path: Path, capfdbinary: Capture) -> None:
    store = tmp_path / "objects"

    def build(*options: str) -> Any:  # noqa: ANN401 - JSON
        result = succeeds(capfdbinary, "--json", *options, "--digest-store", store, tree, tmp_path / "image")
        return json.loads(result.out)["objects"]

    large, small = (1 << 20) + 5, 160
    assert build()["new"] == {"count": 2, "bytes": large + small}
    again = build()
    assert again["new"]["count"] == again["repaired"]["count"] == again["trees"] == 0
    assert again["reused"] == {"count": 2, "bytes": large + small}
    content = (tree / "twin").read_bytes()
    name = content_digest(SHA256, content).hex()
    damaged = store / name[:2] / name[2:]
    damaged.chmod(0o644)
    damaged.write_bytes(content.upper())  # of the right size: only measuring it tells
    assert build()["repaired"]["count"] == 0
    assert damaged.read_bytes() == content.upper()
    assert build("--verify-existing")["repaired"] == {"count": 1, "bytes": small}
    assert damaged.read_bytes() == content


def test_json_tells_what_has_been_done(tree: Path, tmp_path: Path, capfdbinary: Capture) -> None:
    arguments = ["--json", "--hard-links", "--print-digest", "--digest-store", tmp_path / "objects"]
    document = json.loads(succeeds(capfdbinary, *arguments, tree, tmp_path / "image").out)
    assert document["digest"] == digest_of(tmp_path / "image")
    assert document["size"] == (tmp_path / "image").stat().st_size
    assert document["version"] == 0
    assert document["entries"] == {
        "directory": 2,
        "regular file": 4,
        "symbolic link": 1,
        "fifo": 1,
        "hard link": 1,
    }
    assert document["objects"]["trees"] == 1
    assert document["objects"]["fsverity"] is (document["objects"]["fsverity_problem"] is None)
    assert document["seconds"] > 0
    document = json.loads(succeeds(capfdbinary, "--json", "--print-digest-only", tree).out)
    assert document["objects"] is None


# Dumps


def test_a_dump_on_standard_input(tmp_path: Path) -> None:
    command = [*COMMAND, "mk", "--from-file", "--print-digest-only", "-"]
    done = subprocess.run(command, input=vector("corners.dump.gz"), capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().strip() == expected("corners")["fsverity_sha256"]
    done = subprocess.run(
        command, input=EMPTY_DUMP + b"/a 0 nonsense 1 0 0 0 0.0 - - -\n", capture_output=True, check=False
    )
    assert done.returncode == 3
    assert done.stderr.startswith(b"cfsfuse: standard input: line 2, column 6, mode: ")
    assert done.stderr.count(b"\n") == 1


def test_what_an_image_dumps_becomes_it_again(tree: Path, tmp_path: Path, capfdbinary: Capture) -> None:
    succeeds(capfdbinary, tree, tmp_path / "image")
    (tmp_path / "dump").write_bytes(run(capfdbinary, "dump", tmp_path / "image").out)
    succeeds(capfdbinary, "--from-file", tmp_path / "dump", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "image").read_bytes()


@pytest.mark.parametrize(
    "text", [b"", b"nonsense", EMPTY_DUMP * 2, b"/a 0 100644 1 0 0 0 0.0 - - -\n", EMPTY_DUMP[:-3]]
)
def test_bad_dumps_are_told_with_their_place(text: bytes, tmp_path: Path, capfdbinary: Capture) -> None:
    (tmp_path / "dump").write_bytes(text)
    line = fails(capfdbinary, 3, "mk", "--from-file", tmp_path / "dump", tmp_path / "image")
    assert line.startswith(f"cfsfuse: {tmp_path / 'dump'}: line ")
    assert left(tmp_path) == []


def test_a_dump_that_no_image_can_hold(tmp_path: Path, capfdbinary: Capture) -> None:
    (tmp_path / "dump").write_bytes(EMPTY_DUMP + b"/huge %d 100644 1 0 0 0 0.0 a/b - -\n" % (1 << 60))
    line = fails(capfdbinary, 3, "mk", "--from-file", tmp_path / "dump", tmp_path / "image")
    assert "line 2, column 7, size: a file of" in line
    assert left(tmp_path) == []


def test_options_without_effect_on_a_dump_are_told(tmp_path: Path, capfdbinary: Capture) -> None:
    (tmp_path / "dump").write_bytes(EMPTY_DUMP)
    options = ["--digest-store", tmp_path / "objects", "--use-epoch", "--threads=2"]
    result = run(capfdbinary, "mk", "--from-file", *options, tmp_path / "dump", tmp_path / "image")
    assert result.code == 0
    assert result.err.count("\n") == 1
    assert result.err.endswith(": --digest-store, --use-epoch\n")
    assert left(tmp_path) == ["image"]


# Mistakes


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["tree"], "required: IMAGE"),
        ([], "required: SOURCE, IMAGE"),
        (["tree", "image", "more"], "unrecognized arguments: more"),
        (["--print-digest-only", "tree", "image"], "leave IMAGE out"),
        (["--skip-xattrs", "--user-xattrs", "tree", "image"], "not allowed with"),
        (["--threads=0", "tree", "image"], "--threads: '0' is not a number from 1 on"),
        (["--threads=two", "tree", "image"], "--threads"),
        (["--min-version=2", "tree", "image"], "format version 2: there are 0 and 1"),
        (["--max-version=-1", "tree", "image"], "format version -1"),
        (["--min-version=", "tree", "image"], "--min-version"),
        (["--json", "tree", "-"], "standard output has the image already"),
        (["absent", "image"], "absent: No such file or directory"),
        (["", "image"], "SOURCE is empty"),
        (["tree/small", "image"], "not a directory; --from-file"),
        (["tree", ""], "IMAGE is empty"),
        (["--digest-store=", "tree", "image"], "--digest-store is empty"),
        (["tree", "absent/image"], "absent: no such directory"),
        (["tree", "tree"], "inside its own source"),
        (["tree", "tree/image"], "tree/image: the image would be inside its own source tree"),
        (["tree", "alias/new"], "inside its own source"),
        (["--digest-store=alias/sub/objects/new", "tree", "image"], "object store is inside the source"),
        (["--digest-store=tree", "--print-digest-only", "tree"], "object store is inside the source"),
        (["--from-file", "absent", "image"], "absent: No such file or directory"),
        (["--from-file", "tree", "image"], "tree: Is a directory; --from-file"),
    ],
)
def test_a_wrong_command_line(words: list[str], reason: str, tree: Path, tmp_path: Path, capfdbinary: Capture) -> None:
    (tmp_path / "alias").symlink_to("tree/sub")
    before = sorted(tree.rglob("*"))
    line = fails(capfdbinary, 2, "mk", *words)
    assert reason in line
    assert left(tmp_path) == ["alias"]
    assert sorted(tree.rglob("*")) == before


def test_a_store_that_is_none(tree: Path, tmp_path: Path, capfdbinary: Capture) -> None:
    (tmp_path / "objects").write_bytes(b"")
    line = fails(capfdbinary, 4, "mk", "--digest-store", tmp_path / "objects", tree, tmp_path / "image")
    assert str(tmp_path / "objects") in line
    assert left(tmp_path) == ["objects"]


@no_root
def test_what_this_user_may_not_do(tree: Path, tmp_path: Path, capfdbinary: Capture) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    assert "writable for this user" in fails(capfdbinary, 4, "mk", tree, closed / "image")
    store = closed / "objects"
    assert str(store) in fails(capfdbinary, 4, "mk", "--digest-store", store, tree, tmp_path / "image")
    (tree / "small").chmod(0)
    line = fails(capfdbinary, 4, "mk", "--digest-store", tmp_path / "objects", tree, tmp_path / "image")
    assert f"{tree / 'small'}: permission denied" in line
    tree.chmod(0)
    assert str(tree) in fails(capfdbinary, 4, "mk", tree, tmp_path / "image")
    tree.chmod(0o755)
    assert left(tmp_path) == ["closed"]


def test_a_file_that_changes_while_it_is_read(
    tree: Path, tmp_path: Path, capfdbinary: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is looked at again after it has been read, so one that always differs never passes."""
    fstat = os.fstat

    def changing(fd: int) -> os.stat_result:
        found = fstat(fd)
        changed = list(found)
        changed[stat.ST_SIZE] += 1
        return os.stat_result(changed) if stat.S_ISREG(found.st_mode) else found

    monkeypatch.setattr(os, "fstat", changing)
    line = fails(capfdbinary, 4, "mk", tree, tmp_path / "image")
    assert "has changed while it was read" in line
    assert left(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_told_in_one_line(tree: Path, capfdbinary: Capture) -> None:
    assert "No space left on device" in fails(capfdbinary, 4, "mk", tree, "/dev/full")
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*COMMAND, "mk", str(tree), "-"], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 4
    assert done.stderr == b"cfsfuse: standard output: cannot write the image: No space left on device\n"


def test_a_reader_that_goes_away_ends_the_command_quietly(tree: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*COMMAND, "mk", str(tree), "-"], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_leaves_nothing(
    number: signal.Signals, tree: Path, tmp_path: Path, capfdbinary: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        os.kill(os.getpid(), number)

    # When all objects are staged, and none is published.
    monkeypatch.setattr(builder, "lay_out", interrupted)
    result = run(capfdbinary, "mk", "--digest-store", tmp_path / "objects", tree, tmp_path / "image")
    assert (result.code, result.out) == (128 + number, b"")
    assert result.err.count("\n") == 0
    assert left(tmp_path) == []


def test_an_interrupt_while_the_program_starts(capfdbinary: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_verbs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "make_parser", interrupted)
    assert run(capfdbinary, "mk") == (130, b"", "")


def test_an_image_that_cannot_be_written_publishes_no_object(
    tree: Path, tmp_path: Path, capfdbinary: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def full(fd: int, data: bytes) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").startswith(f"{tmp_path}/.image."):
            raise OSError(28, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr(os, "write", full)
    line = fails(capfdbinary, 4, "mk", "--digest-store", tmp_path / "objects", tree, tmp_path / "image")
    assert line.endswith("image: cannot write the image: No space left on device")
    assert left(tmp_path) == []


def test_objects_that_cannot_be_published_leave_no_image(
    tree: Path, tmp_path: Path, capfdbinary: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_to_publish(_store: StoreWriter) -> None:
        raise StoreError("objects: no space left")

    monkeypatch.setattr(StoreWriter, "publish", fails_to_publish)
    line = fails(capfdbinary, 4, "mk", "--digest-store", tmp_path / "objects", tree, tmp_path / "image")
    assert line.endswith("objects: no space left")
    assert left(tmp_path) == []
    result = run(capfdbinary, "mk", "--digest-store", tmp_path / "objects", tree, "-")
    assert (result.code, result.out) == (4, b"")


def test_an_image_that_the_disk_does_not_take_publishes_no_object(
    tree: Path, tmp_path: Path, capfdbinary: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def full(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").startswith(f"{tmp_path}/.image."):
            raise OSError(28, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)
    line = fails(capfdbinary, 4, "mk", "--digest-store", tmp_path / "objects", tree, tmp_path / "image")
    assert line.endswith("image: cannot write the image: No space left on device")
    assert left(tmp_path) == []


def test_objects_get_their_names_before_the_image(
    tree: Path, tmp_path: Path, capfdbinary: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, image = tmp_path / "objects", tmp_path / "image"
    seen: list[tuple[bool, list[str]]] = []  # before each rename in this process: is there an image, and which objects
    rename = os.rename

    def recorded(source: bytes, target: bytes, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        if os.fsencode(target) == b"image":
            seen.append((image.exists(), [name for name in objects(store) if not name.startswith(".tmp")]))
        rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "rename", recorded)
    succeeds(capfdbinary, "--digest-store", store, tree, image)
    assert seen == [(False, objects(store))]
    assert len(objects(store)) == 3


# Progress


def progress(files: int, size: int, *, walking: bool) -> Progress:
    return Progress(files=files, bytes=size, total_files=100, total_bytes=10**9, walking=walking)


def test_progress_on_a_terminal(
    tree: Path, tmp_path: Path, capfdbinary: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(mk, "_REFRESH", 0)
    result = run(capfdbinary, "mk", "--print-digest-only", tree)
    assert (result.code, len(result.out)) == (0, 65)
    assert "5 files" in result.err


def test_progress_elsewhere_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    with mk._progress() as report:
        report(progress(1, 1000, walking=True))
    assert said.getvalue() == ""
    monkeypatch.setattr(mk, "_LINES", 0)
    with mk._progress() as report:
        report(progress(10, 5 * 10**8, walking=True))
        report(progress(20, 6 * 10**8, walking=False))
    first, second = said.getvalue().splitlines()
    assert first.startswith("cfsfuse mk: 10 of 100 files, 500.0 MB of 1.00 GB, ")
    assert first.endswith("still looking for more")
    assert second.endswith(" s left")
