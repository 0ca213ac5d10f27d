"""The verbs that print: their bytes, their exit codes, and one line on standard error for each mistake."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from cfsfuse.cli import common
from cfsfuse.cli.main import VERBS, make_parser
from cfsfuse.verity.digest import ALGORITHMS
from cfsfuse.verity.merkle import content_digest
from tests import imagemaker as im
from tests.cli_support import COMMAND, add_object, fails, run, unpack_python_image, write_image
from tests.support import VECTORS, random_bytes, sample, vector

if TYPE_CHECKING:
    from pathlib import Path

    from cfsfuse.verity.digest import Algorithm

Capture = pytest.CaptureFixture[bytes]


def vector_image(folder: Path, name: str) -> str:
    path = folder / f"{name}.cfs"
    path.write_bytes(vector(f"{name}.cfs.gz"))
    return str(path)


@pytest.fixture
def sample_image(tmp_path: Path) -> str:
    path = tmp_path / "sample.cfs"
    path.write_bytes(sample().content())
    return str(path)


@pytest.mark.parametrize("name", VECTORS)
def test_dump_is_that_of_the_reference_tool(name: str, tmp_path: Path, capfdbinary: Capture) -> None:
    result = run(capfdbinary, "dump", vector_image(tmp_path, name))
    assert (result.code, result.err) == (0, "")
    assert result.out == vector(f"{name}.redump.gz")


def test_dump_of_the_real_image(tmp_path: Path, capfdbinary: Capture) -> None:
    folder = unpack_python_image(tmp_path)
    dump = next(folder.glob("*.dump"))
    assert run(capfdbinary, "dump", folder / "python.cfs").out == dump.read_bytes()


def test_several_images_follow_one_another(tmp_path: Path, capfdbinary: Capture) -> None:
    one = write_image(tmp_path / "1", {b"a": im.file(b"1"), b"b": im.directory()})
    two = write_image(tmp_path / "2", {b"c": im.symlink(b"a b")})
    assert run(capfdbinary, "ls", one, two).out == b"/a\n/b/\t\n/c\t-> a\\x20b\n"
    assert run(capfdbinary, "dump", one, two).out.count(b"/ ") == 2


def test_ls_shows_objects_and_escapes_names(tmp_path: Path, capfdbinary: Capture) -> None:
    linked = im.external(5, b"aa/b c", b"\1" * 32, nlink=2)
    image = write_image(tmp_path / "i", {b"a\nb \xff": linked, b"c": linked, b"d": im.escaped_whiteout()})
    assert run(capfdbinary, "ls", image).out == b"/a\\nb \\xff\t@ aa/b\\x20c\n/c\n/d\n"


def test_a_further_name_is_told_even_when_nlink_is_wrong(tmp_path: Path, capfdbinary: Capture) -> None:
    linked = im.file(b"x", nlink=1)
    image = write_image(tmp_path / "i", {b"a": linked, b"b": im.file(b"y"), b"c": linked})
    assert b"\n/c 1 @100644 1 0 0 0 0.0 /a x -\n" in run(capfdbinary, "dump", image).out


def test_filter_takes_top_level_entries_alone(tmp_path: Path, capfdbinary: Capture) -> None:
    inner = {b"a": im.file(), b"b": im.file()}
    image = write_image(tmp_path / "i", {b"a": im.directory(inner), b"b": im.directory(inner), b"c": im.file()})
    result = run(capfdbinary, "ls", "--filter", "c", "--filter", "a", "--filter", "absent", "--filter", "..", image)
    assert result.out == b"/a/\t\n/a/a\n/a/b\n/c\n"
    assert run(capfdbinary, "dump", "--filter", "absent", image).out.count(b"\n") == 1
    assert "top-level" in fails(capfdbinary, 2, "ls", "--filter", "a/b", image)


def test_objects_are_sorted_and_each_is_named_once(tmp_path: Path, capfdbinary: Capture) -> None:
    one = write_image(tmp_path / "1", {b"a": im.external(1, b"bb/2", b"\1" * 32), b"b": im.external(1, b"aa/1", None)})
    two = write_image(tmp_path / "2", {b"a": im.external(1, b"aa/1", None), b"b": im.external(1, b"aa/0", None)})
    assert run(capfdbinary, "objects", one, two).out == b"aa/0\naa/1\nbb/2\n"
    items = json.loads(run(capfdbinary, "objects", "--json", one).out)
    assert items == [
        {"path": "aa/1", "size": 1},
        {"path": "bb/2", "size": 1, "digest": "sha256:" + "01" * 32},
    ]


def test_missing_objects_are_told_by_the_exit_code(tmp_path: Path, capfdbinary: Capture) -> None:
    base = tmp_path / "with:colon"
    entries = {b"a": add_object(base, b"a" * 100), b"b": im.external(1, b"zz/absent", b"\1" * 32)}
    image = write_image(tmp_path / "i", entries)
    option = "--basedir=" + str(base).replace(":", "\\:")
    result = run(capfdbinary, "missing-objects", option, image)
    assert (result.code, result.out) == (1, b"zz/absent\n")
    assert len(run(capfdbinary, "missing-objects", image).out.splitlines()) == 2
    other = tmp_path / "other" / "zz"
    other.mkdir(parents=True)
    (other / "absent").write_bytes(b"1")
    result = run(capfdbinary, "missing-objects", option + ":" + str(tmp_path / "other"), "--json", image)
    assert (result.code, json.loads(result.out)) == (0, [])


def test_json_loses_no_byte(tmp_path: Path, capfdbinary: Capture) -> None:
    image = write_image(
        tmp_path / "i", {b"a\xff\n": im.symlink(b"\xfe"), "ä".encode(): im.file(xattrs={b"user.x": b"\0\xff"})}
    )
    first, second = json.loads(run(capfdbinary, "ls", "--json", image).out)
    assert base64.b64decode(first["path_base64"]) == b"/a\xff\n"
    assert base64.b64decode(first["target_base64"]) == b"\xfe"
    assert second == {"image": image, "path": "/ä", "type": "regular file"}
    document = json.loads(run(capfdbinary, "stat", "--json", image, "/ä").out)
    assert document["xattrs"] == [{"name": "user.x", "value": "\0\ufffd", "value_base64": "AP8="}]


def test_stat_shows_everything(sample_image: str, capfdbinary: Capture) -> None:
    text = run(capfdbinary, "stat", sample_image, "/sha512").out.decode()
    fields = dict(line.strip().split(": ", 1) for line in text.splitlines())
    assert fields["object"] == "bb/wide"
    assert fields["digest"] == "sha512:" + "22" * 64
    assert (fields["type"], fields["mode"], fields["size"]) == ("regular file", "0644 -rw-r--r--", str(1 << 33))
    assert fields["modified"].startswith("1970-01-01 00:00:00.000000000")
    assert b"target: target\n" in run(capfdbinary, "stat", sample_image, "link").out
    assert b"device: 8:1\n" in run(capfdbinary, "stat", sample_image, "/block").out
    assert b"1969-12-30 23:59:59.999999999" not in run(capfdbinary, "stat", sample_image, "/old").out
    assert b"1969-12-31 00:00:00.999999999 +0000" in run(capfdbinary, "stat", sample_image, "/old").out
    assert b"modified: @1099511627776.000000000\n" in run(capfdbinary, "stat", sample_image, "/far").out
    assert b"xattr: security.capability=\\x00\\x01\n" in run(capfdbinary, "stat", sample_image, "/xattrs").out
    assert b"xattr: trusted.overlay.opaque=y\n" in run(capfdbinary, "stat", sample_image, "/xattrs").out


def test_links_are_followed_inside_the_image_alone(tmp_path: Path, capfdbinary: Capture) -> None:
    entries = {
        b"etc": im.directory({b"passwd": im.file(b"inside")}),
        b"absolute": im.symlink(b"/etc/passwd"),
        b"out": im.symlink(b"../../../../etc/./passwd"),
        b"dir": im.symlink(b"etc"),
        b"chain": im.symlink(b"dir/../absolute"),
        b"loop": im.symlink(b"loop"),
        b"ping": im.symlink(b"/pong/x"),
        b"pong": im.symlink(b"ping"),
        b"dangling": im.symlink(b"nowhere"),
    }
    image = write_image(tmp_path / "i", entries)
    for path in ("/etc/passwd", "absolute", "out", "dir/passwd", "dir/../etc/passwd", "chain", "../../etc/passwd"):
        assert run(capfdbinary, "cat", image, path) == (0, b"inside", "")
    assert "too many levels of symbolic links" in fails(capfdbinary, 2, "cat", image, "/loop")
    assert "too many levels of symbolic links" in fails(capfdbinary, 2, "cat", image, "/ping")
    assert "not in the image" in fails(capfdbinary, 2, "cat", image, "/dangling")
    assert "directory" in fails(capfdbinary, 2, "cat", image, "/dir")
    assert "not a directory" in fails(capfdbinary, 2, "cat", image, "/etc/passwd/")
    assert b"type: symbolic link\n" in run(capfdbinary, "stat", image, "/loop").out
    assert b"type: directory\n" in run(capfdbinary, "stat", image, "/dir/").out


def test_cat_gives_verified_bytes(tmp_path: Path, capfdbinary: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = tmp_path / "objects"
    content = random_bytes(3_000_001)
    entries = {b"large": add_object(base, content), b"sparse": im.file(layout=im.CHUNKED, size=5000, i_u=31)}
    image = write_image(tmp_path / "i", entries)
    assert run(capfdbinary, "cat", image, "/large", "--basedir", base).out == content
    assert run(capfdbinary, "cat", image, "/sparse").out == bytes(5000)
    path = next(path for path in base.rglob("*") if path.is_file())
    path.write_bytes(content[:2_500_000] + b"!" + content[2_500_001:])
    result = run(capfdbinary, "cat", image, "/large", "--basedir", base, "--noverity")
    assert (result.code, len(result.out)) == (0, len(content))
    result = run(capfdbinary, "cat", image, "/large", "--basedir", base)
    assert result.code == 3
    assert content.startswith(result.out)
    assert result.err.startswith("cfsfuse: /large: object ")
    line = fails(capfdbinary, 2, "cat", image, "/large")
    assert line.endswith(": not in any base directory: name the object store with --basedir=")
    (tmp_path / "none").mkdir()
    line = fails(capfdbinary, 3, "cat", image, "/large", "--basedir", tmp_path / "none")
    assert line.endswith(": not in any base directory")
    assert "base directory" in fails(capfdbinary, 2, "cat", image, "/large", "--basedir", tmp_path / "absent")


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=lambda algorithm: algorithm.name)
@pytest.mark.parametrize("size", [0, 1, 4096, 4097, (1 << 20) + 1])
def test_measure(algorithm: Algorithm, size: int, tmp_path: Path, capfdbinary: Capture) -> None:
    path = tmp_path / "file"
    path.write_bytes(random_bytes(size))
    result = run(capfdbinary, "measure", "--algorithm", algorithm.name, path, path)
    line = content_digest(algorithm, random_bytes(size)).hex().encode() + b"\n"
    assert result == (0, 2 * line, "")


def test_measure_takes_regular_files_alone(tmp_path: Path, capfdbinary: Capture) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "not a regular file" in fails(capfdbinary, 2, "measure", tmp_path / "fifo")
    assert "not a regular file" in fails(capfdbinary, 2, "measure", tmp_path)
    assert "No such file" in fails(capfdbinary, 2, "measure", tmp_path / "absent")


@pytest.mark.parametrize("verb", ["ls", "dump", "objects", "missing-objects", "stat", "cat", "extract"])
def test_bad_images_are_named(verb: str, tmp_path: Path, capfdbinary: Capture) -> None:
    more = ["/x"] if verb in ("stat", "cat") else [str(tmp_path / "dest")] if verb == "extract" else []
    made = im.make(im.directory({b"x": im.directory({b"y": im.file()})}))
    images = {
        "absent": None,
        "empty": b"",
        "short": made.content()[:1140],
        "text": b"text" * 2000,
        "directory with a cycle": made.patch_dirent(made.at(b"x"), 2, "nid", made.root.nid).content(),
    }
    for name, content in images.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        if verb in ("stat", "cat") and "cycle" in name:
            continue
        line = fails(capfdbinary, 3, verb, path, *more)
        assert line.count(str(path)) == 1, line
    assert not (tmp_path / "dest").exists()


def test_a_reader_that_goes_away_ends_the_command_quietly(tmp_path: Path) -> None:
    image = write_image(tmp_path / "i", {b"%05d" % number: im.file() for number in range(20000)})
    with subprocess.Popen([*COMMAND, "ls", image], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"/00000\n"
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_told_in_one_line(sample_image: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, "dump", sample_image], stdout=full, stderr=subprocess.PIPE, check=False, timeout=60
        )
    assert (done.returncode, done.stderr) == (4, b"cfsfuse: standard output: No space left on device\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_verb(shell: str, capfdbinary: Capture) -> None:
    result = run(capfdbinary, "completion", shell)
    assert (result.code, result.err) == (0, "")
    assert all(verb.encode() in result.out for verb in VERBS)


def test_completion_for_an_unknown_shell(capfdbinary: Capture) -> None:
    assert "invalid choice" in fails(capfdbinary, 2, "completion", "fish")


def test_each_verb_has_help(capfdbinary: Capture) -> None:
    assert set(common.subparsers(make_parser())) == set(VERBS)
    for verb in VERBS:
        result = run(capfdbinary, verb, "--help")
        assert (result.code, result.err) == (0, "")
        assert VERBS[verb].summary[1:].encode() in result.out
