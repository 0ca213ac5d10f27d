"""Comparisons of plain directories, which stand for mounts here; what is printed of them; which backends take part."""

from __future__ import annotations

import json
import os
import signal
import stat
import time
import tracemalloc
from typing import TYPE_CHECKING

import pytest

from cfsfuse.cli.compare_report import Bounded, document, line, summary, table
from cfsfuse.contract.checks import CHECKS
from cfsfuse.contract.comparison import Comparison, Finding, Mounted, Pair
from cfsfuse.contract.contents import check_digest
from cfsfuse.contract.differences import Difference
from cfsfuse.contract.entries import Entry
from cfsfuse.contract.image import ImageWitness
from cfsfuse.contract.justified import between_backends
from cfsfuse.contract.observe import ABSENT, CHUNK, NOT_TRIED, Failure
from cfsfuse.contract.watched import watched
from cfsfuse.errors import HostError, ImageError
from cfsfuse.mount.options import parse
from cfsfuse.mount.plan import Backend, Fact
from cfsfuse.mount.temporary import offers
from cfsfuse.verification import Verification
from cfsfuse.verity.digest import SHA256
from cfsfuse.verity.merkle import content_digest
from tests import imagemaker as im
from tests.support import reader_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

IMAGE = {b"d": im.directory({b"f": im.file(b"content")}), b"l": im.symlink(b"d")}


def compare(*roots: Path, checks: Sequence[str] = ("readlink", "digest")) -> Comparison:
    witness = ImageWitness(reader_of(im.make(im.directory(IMAGE))), lambda _: True)
    return Comparison(witness, [Mounted(root.name, os.fsencode(root)) for root in roots], checks)


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, Path]:
    """Two directories that show what the image has."""
    one, other = tmp_path / "one", tmp_path / "other"
    for root in (one, other):
        (root / "d").mkdir(parents=True)
        (root / "d" / "f").write_bytes(b"content")
        (root / "l").symlink_to("d")
    return one, other


def found(comparison: Comparison) -> set[tuple[str, str, bytes, str]]:
    return {(*each.pair, each.difference.path, each.difference.what) for each in comparison.findings()}


def test_equal_ones(roots: tuple[Path, Path]) -> None:
    comparison = compare(*roots)
    assert found(comparison) == set()
    assert comparison.are_equal
    assert comparison.entries == 4
    assert comparison.counts["entries", Pair("other", "one")].entries == 4
    assert comparison.counts["digest", Pair("one", "image")].observations == 2


def test_entry_that_only_one_has_is_found(roots: tuple[Path, Path]) -> None:
    one, other = roots
    (other / "more").mkdir()
    (other / "more" / "below").touch()
    (one / "d" / "f").unlink()
    assert found(compare(one, other)) == {
        ("other", "one", b"/more", "type"),
        ("other", "image", b"/more", "type"),
        ("other", "one", b"/more/below", "type"),
        ("other", "image", b"/more/below", "type"),
        ("other", "one", b"/d/f", "type"),
        ("one", "image", b"/d/f", "type"),
    }


def test_nothing_is_looked_for_behind_a_link(roots: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = roots
    (other / "d" / "f").unlink()
    (other / "d").rmdir()
    (other / "d").symlink_to(one / "d")
    findings = {(each.pair, each.difference.path): each.difference for each in compare(one, other).findings()}
    assert findings[Pair("other", "one"), b"/d"].found == stat.S_IFLNK
    assert findings[Pair("other", "one"), b"/d/f"].found == Failure("ENOENT")


def test_content_that_differs_is_found(roots: tuple[Path, Path]) -> None:
    (roots[1] / "d" / "f").write_bytes(b"Content")
    assert found(compare(*roots)) == {
        ("other", which, b"/d/f", what) for which in ("one", "image") for what in ("digest", "content")
    }


def test_mount_that_goes_is_an_error(roots: tuple[Path, Path]) -> None:
    comparison = compare(*roots)
    os.rename(roots[1], roots[1].with_name("gone"))
    with pytest.raises(HostError, match="other: the mount has gone: ENOENT"):
        list(comparison.findings())


def test_cycle_in_the_image_is_an_error(roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = compare(*roots)
    root = comparison.image.reader.root
    monkeypatch.setattr(comparison.image, "children", lambda _: iter([(b"d", root)]))
    with pytest.raises(ImageError, match="reached twice"):
        list(comparison.findings())


def test_paths_too_long_for_system_calls_are_counted(roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cfsfuse.contract.comparison._PATH_MAX", len(str(roots[1])) + 260)
    comparison = compare(*roots)
    assert found(comparison) == set()
    assert comparison.too_long == 1
    assert list(table(comparison))[-1].endswith("1 entries and all below")


def test_large_directory_costs_no_path_for_each_name(tmp_path: Path) -> None:
    count, name = 5000, 200
    deep = tmp_path.joinpath(*["n" * 200] * 5)
    deep.mkdir(parents=True)
    for number in range(count):
        os.mkdir(deep / f"{number:0{name}}")
    comparison = compare(tmp_path, checks=())
    tracemalloc.start()
    for _ in comparison.findings():
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert comparison.entries > count
    assert peak < count * (3 * name), "the names twice and a bit, never the paths, which are six times as long"


def test_checks_are_made_sparsely_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cfsfuse.contract.comparison.DENSE", 10)
    one, other = tmp_path / "one", tmp_path / "other"
    for root in (one, other):
        root.mkdir()
        for number in range(90):
            (root / f"{number:02}").touch()
    witness = ImageWitness(reader_of(im.make(im.directory({}))), lambda _: True)
    mounts = [Mounted(root.name, os.fsencode(root)) for root in (one, other)]
    comparison = Comparison(witness, mounts, ["readlink", "access"], sparsely=["access"])
    list(comparison.findings())
    pair = Pair("other", "one")
    assert comparison.counts["readlink", pair].entries == 91
    assert comparison.counts["access", pair].entries == 10 + 3, "besides the first those at 29, 58 and 87"


# In a process of its own ----------------------------------------------------------------------------------------------


def test_watched_comparison_comes_to_the_same(roots: tuple[Path, Path]) -> None:
    (roots[1] / "d" / "f").write_bytes(b"Content")
    (roots[1] / "l").unlink()
    checks = ["stat-open", "readlink", "digest"]
    list(compare(*roots, checks=checks).findings())  # the first reading changes times of access, further ones do not
    alone, told = compare(*roots, checks=checks), compare(*roots, checks=checks)
    expected = list(alone.findings())
    entries: list[int] = []
    assert list(watched(told, 20, entries.append)) == expected
    assert (told.outcome, told.are_equal) == (alone.outcome, False)
    assert told.reasons == alone.reasons
    assert entries[-1] == 4
    assert list(table(told)) == list(table(alone))


def hang(path: bytes, _: Entry) -> dict[str, object]:
    if path.endswith(b"/other/d/f"):
        time.sleep(60)
    return {}


def test_mount_that_keeps_waiting_is_an_error(roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHECKS, "readlink", hang)
    start = time.monotonic()
    with pytest.raises(HostError, match=r"^other: no answer within 0.5 s when /d/f was looked at: .*--patience$"):
        list(watched(compare(*roots), 0.5))
    assert 0.4 < time.monotonic() - start < 20
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def work(path: bytes, _: Entry) -> dict[str, object]:
    end = time.process_time() + (1 if path.endswith(b"/other/d/f") else 0)
    while time.process_time() < end:
        pass
    return {}


def test_one_long_look_that_gets_on_is_no_error(roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHECKS, "readlink", work)
    assert list(watched(compare(*roots), 0.5)) == []


def die(_path: bytes, _: Entry) -> dict[str, object]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_comparison_that_is_killed_is_an_error(roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHECKS, "readlink", die)
    with pytest.raises(HostError, match=r"^the comparison was killed at / of one;"):
        list(watched(compare(*roots), 20))


def test_errors_of_a_watched_comparison_are_its_own(roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = compare(*roots)
    root = comparison.image.reader.root
    monkeypatch.setattr(comparison.image, "children", lambda _: iter([(b"d", root)]))
    with pytest.raises(ImageError, match="reached twice") as caught:
        list(watched(comparison, 20))
    assert caught.value.field == "dirent nid"


@pytest.mark.parametrize("values", [("EINVAL", "ENODATA"), ("ENODATA", "EINVAL")])
def test_known_difference_between_backends_has_a_reason(values: tuple[str, str]) -> None:
    one, other = map(Failure, values)
    entry = Entry(b"/f", stat.S_IFREG)
    assert between_backends("xattrs-absent", "user.overlay.", entry, one, other) is not None
    assert between_backends("xattrs-absent", "user.overlay.x", entry, one, other) is None
    assert between_backends("xattrs-absent", "user.overlay.", entry, one, Failure("EIO")) is None


@pytest.mark.parametrize("check", ["modify", "open"])
def test_what_is_not_read_only_is_never_changed(tmp_path: Path, check: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"kept")
    before = path.stat()
    seen = CHECKS[check](os.fsencode(path), Entry(b"/file", before.st_mode))
    assert set(seen.values()) == {NOT_TRIED}
    assert (path.stat(), path.read_bytes(), os.listdir(tmp_path)) == (before, b"kept", ["file"])


@pytest.mark.parametrize("size", [0, 1, 4096, CHUNK, CHUNK + 1, 17 << 20])
def test_all_of_a_content_is_measured(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    content = bytearray(size)
    path.write_bytes(content)
    entry = Entry(b"/file", stat.S_IFREG | 0o644, measure="sha256")
    first = check_digest(os.fsencode(path), entry)["digest"]
    assert first == content_digest(SHA256, content).hex()
    if size:
        content[size // 2] ^= 1
        path.write_bytes(content)
        assert check_digest(os.fsencode(path), entry)["digest"] == content_digest(SHA256, content).hex() != first


# What is printed ------------------------------------------------------------------------------------------------------


def finding(what: str, one: object, other: object, path: bytes = b"/p") -> Finding:
    return Finding("check", Pair("fuse", "kernel"), Difference(path, what, one, other))


@pytest.mark.parametrize(
    ("each", "text"),
    [
        (finding("st_nlink", 7, 1), "/p st_nlink: fuse has 7, kernel has 1"),
        (finding("st_mode", 0o100644, 0o40755), "/p st_mode: fuse has 0100644, kernel has 0040755"),
        (finding("st_rdev", os.makedev(1, 5), 0), "/p st_rdev: fuse has 1:5, kernel has 0:0"),
        (finding("type", stat.S_IFLNK, Failure("ENOENT")), "/p type: fuse has symbolic link, kernel has ENOENT"),
        (finding("getxattr 'a'", ABSENT, b"\xff"), r"/p getxattr 'a': fuse has none, kernel has b'\xff'"),
        (finding("listed", [b"a", b"b"], [b"a"]), "/p listed: fuse has [b'b'], kernel has []"),
        (finding("order", [b"a", b"b"], [b"b", b"a"]), "/p order: fuse has [b'a', b'b'], kernel has [b'b', b'a']"),
        (finding("target", "x\ny", 1, b""), r"/ target: fuse has x\ny, kernel has 1"),
    ],
)
def test_difference_is_one_line(each: Finding, text: str) -> None:
    assert line(each) == text


def test_report_is_bounded() -> None:
    report = Bounded(limit=2)
    report.add(finding("st_nlink", number, 0) for number in range(1, 6))
    assert (len(report.kept), report.total) == (2, 5)
    assert list(report.lines())[-1] == "… and 3 more differences; --json has all of them"
    one = Bounded(limit=1)
    one.add([finding("st_nlink", 1, 0)])
    assert list(one.lines()) == ["/p st_nlink: fuse has 1, kernel has 0"]


def test_json_loses_nothing() -> None:
    values = [
        finding("getxattr 'a'", b"\xff", ABSENT),
        finding("type", Failure("EIO"), 1),
        finding("order", [b"a"], "t"),
    ]
    found = [json.loads(json.dumps(document(each))) for each in values]
    assert (found[0]["found"], found[0]["found_base64"], found[0]["expected"]) == ("\ufffd", "/w==", None)
    assert (found[1]["found"], found[1]["expected"]) == ({"errno": "EIO"}, 1)
    assert (found[2]["found"], found[2]["expected"]) == ("[b'a']", "t")
    assert found[0]["between"] == ["fuse", "kernel"]


def test_table_says_why_once(roots: tuple[Path, Path]) -> None:
    comparison = compare(*roots, checks=["stat-open"])
    list(comparison.findings())
    lines = list(table(comparison))
    assert lines[0].split() == ["check", "compared", "entries", "observations", "differ", "justified"]
    assert len({text.index("other") for text in lines[1:2]}) == 1
    rows = [text.split() for text in lines if text.startswith("stat-open")]
    assert len(rows) == 1
    assert len([text for text in lines if text.startswith("[")]) == len(comparison.reasons)
    assert summary(comparison)["equal"] == comparison.are_equal


# Which backends -------------------------------------------------------------------------------------------------------

_VERITY = (Fact.OVERLAY_VERITY, Fact.OBJECTS_VERITY)


def lacking(*facts: Fact) -> dict[Fact, str]:
    return {fact: f"no {fact.value}" for fact in facts}


def test_what_cannot_verify_is_offered_without() -> None:
    kernel = offers(parse("basedir=/b"), lacking(*_VERITY).get)[0]
    assert kernel.backend is Backend.KERNEL
    assert kernel.options is not None
    assert kernel.options.verification is Verification.OFF
    assert kernel.problem is not None
    assert _VERITY[0].value in kernel.problem


def test_verity_is_not_given_up_when_it_is_demanded() -> None:
    kernel, *others = offers(parse("basedir=/b,verity"), lacking(*_VERITY).get)
    assert kernel.options is None
    assert others[-1].options is not None
    assert others[-1].options.verification is Verification.REQUIRED
    with pytest.raises(HostError, match=r"^kernel backend: no overlayfs that verifies"):
        offers(parse("basedir=/b,verity"), lacking(*_VERITY).get, ["kernel"])


def test_every_backend_is_named_in_its_options() -> None:
    found = offers(parse("basedir=/b"), lacking().get)
    assert [each.options and each.options.backend for each in found] == [backend.value for backend in Backend]
    assert [each.backend.value for each in offers(parse("basedir=/b"), lacking().get, ["fuse"])] == ["fuse"]


def test_named_backend_that_is_impossible_is_an_error() -> None:
    with pytest.raises(HostError, match=f"^fuse backend: no {Fact.FUSE.value}"):
        offers(parse("basedir=/b"), lacking(Fact.FUSE).get, ["fuse"])
    assert all(each.options is None for each in offers(parse("basedir=/b"), lacking(*Fact).get))


def test_a_merged_kernel_mount_is_for_who_names_it() -> None:
    (kernel,) = offers(parse("basedir=/b,noverity"), lacking(Fact.FULL_VIEW).get, ["kernel"])
    assert (kernel.options and kernel.options.backend, kernel.problem) == ("kernel", None)
    kernel = offers(parse("basedir=/b,noverity"), lacking(Fact.FULL_VIEW).get)[0]
    assert (kernel.options, kernel.problem) == (None, f"no {Fact.FULL_VIEW.value}")


def test_nothing_else_is_the_reason_where_more_than_verification_is_lacking() -> None:
    kernel = offers(parse("basedir=/b"), lacking(*_VERITY, Fact.KERNEL_VIEW).get)[0]
    assert (kernel.options, kernel.problem) == (None, f"no {Fact.KERNEL_VIEW.value}")
