"""What of a benchmark is pure: who is measured, on which files, and what is made of the values."""

from __future__ import annotations

import os
import random
import signal
import time
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import pytest

from cfsfuse.bench import report
from cfsfuse.bench.columns import Column, backends, check_names, check_options, peer
from cfsfuse.bench.failure import ColumnFailed
from cfsfuse.bench.figures import svg
from cfsfuse.bench.inputs import BLOCK, QUICK, Extent, File, Inputs, absent_names, pick, random_offsets, spread
from cfsfuse.bench.processes import bounded, processor_time, resident_memory
from cfsfuse.bench.results import Results, medians, ratios, reference_of
from cfsfuse.bench.run import Task, rows
from cfsfuse.bench.workloads import WORKLOADS, Unit
from cfsfuse.erofs.image import Image
from cfsfuse.erofs.reader import Reader
from cfsfuse.errors import HostError, UsageError
from cfsfuse.mount.options import parse
from cfsfuse.mount.plan import Backend, Fact
from cfsfuse.verification import Verification
from tests import imagemaker as im
from tests.cli_support import fails, write_image
from tests.support import HERE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MIB = 1 << 20
VERITY = frozenset((Fact.OVERLAY_VERITY, Fact.OBJECTS_VERITY))
USAGE, BAD = 2, 3


def host(*lacking: Fact) -> Callable[[Fact], str | None]:
    return lambda fact: f"no {fact.value}" if fact in lacking else None


# Who is measured


def test_all_backends_that_work_are_measured_by_the_command_of_users() -> None:
    columns, left_out = backends("basedir=/o", [], host(), "/log")
    assert [column.name for column in columns] == [backend.value for backend in Backend]
    assert left_out == {}
    words = columns[0].words("/i", ("/o",), "/m")
    assert "from cfsfuse.cli.main import main" in words[3]
    assert words[4:] == ["mount", "--backend", "kernel", "-o", "basedir=/o,log=/log", "/i", "/m"]
    assert os.path.samefile(columns[0].environment["PYTHONPATH"].split(":")[0], os.path.join(HERE, os.pardir))
    assert not any(column.unverified for column in columns)


def test_one_that_cannot_verify_is_measured_without() -> None:
    columns, left_out = backends("basedir=/o,tryverity", [], host(*VERITY), "/log")
    reason = {column.name: column.unverified for column in columns}
    assert reason["fuse"] is None
    assert reason["kernel"] == f"no {Fact.OVERLAY_VERITY.value}; no {Fact.OBJECTS_VERITY.value}"
    assert left_out == {}
    options = {column.name: parse(column.command[-3]) for column in columns}
    assert options["kernel"].verification is Verification.OFF
    assert options["fuse"].verification is Verification.RECORDED


def test_who_says_verity_gets_it_or_nothing() -> None:
    columns, left_out = backends("basedir=/o,verity", [], host(*VERITY), "/log")
    assert [column.name for column in columns] == ["fuse"]
    assert f"no {Fact.OBJECTS_VERITY.value}" in left_out["kernel"]
    with pytest.raises(HostError, match=f"kernel backend: no {Fact.OVERLAY_VERITY.value}"):
        backends("basedir=/o,verity", ["kernel"], host(*VERITY), "/log")


def test_others_are_told_with_what_really_stops_them() -> None:
    columns, left_out = backends("basedir=/o", [], host(*VERITY, Fact.KERNEL_VIEW), "/log")
    assert "kernel" not in [column.name for column in columns]
    assert left_out["kernel"] == f"no {Fact.KERNEL_VIEW.value}"


def test_one_that_is_named_must_work() -> None:
    columns, left_out = backends("basedir=/o", ["fuse"], host(Fact.KERNEL_VIEW), "/log")
    assert ([column.name for column in columns], left_out) == (["fuse"], {})
    with pytest.raises(HostError, match=f"kernel backend: no {Fact.KERNEL_VIEW.value}"):
        backends("basedir=/o", ["kernel", "fuse"], host(Fact.KERNEL_VIEW), "/log")


def test_options_go_through_as_they_are() -> None:
    columns, _ = backends(r"basedir=/a\,b:/c\:d,log=/mine,uid=7", ["fuse"], host(), "/tmp/x,y/log")
    options = parse(columns[0].command[-3])
    assert (options.basedir, options.log, options.uid) == (("/a,b", "/c:d"), "/mine", 7)
    columns, _ = backends("basedir=/{image}", ["fuse"], host(), "/tmp/x,y/log")
    words = columns[0].words("/i", ("/{image}",), "/m")
    assert parse(words[-3]).basedir == ("/{image}",)
    assert parse(words[-3]).log == "/tmp/x,y/log"


def test_words_of_a_peer() -> None:
    column = peer("c='my program' -o basedir={basedir},x {image} {mountpoint} '{other}'")
    assert (column.name, column.is_peer) == ("c", True)
    assert column.words("/{basedir}", ("/a:b", "/c"), "/m") == [
        *("my program", "-o", r"basedir=/a\:b:/c,x", "/{basedir}", "/m", "{other}")
    ]


@pytest.mark.parametrize(
    "text",
    [
        "c",
        "=x {mountpoint}",
        "c=",
        "c=x {image}",
        "a b=x {mountpoint}",
        "seventeen-letters=x {mountpoint}",
        "c='x {mountpoint}",
    ],
)
def test_peers_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--peer"):
        peer(text)


@pytest.mark.parametrize("names", [("a", "a"), ("kernel",)])
def test_names_are_taken_once(names: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="the name is taken"):
        check_names([peer(f"{name}=x {{mountpoint}}") for name in names])


@pytest.mark.parametrize("text", ["basedir=/o,rw", "basedir=/o,upperdir=/u,workdir=/w", "noverity"])
def test_options_that_no_benchmark_takes(text: str) -> None:
    with pytest.raises(UsageError):
        check_options(text)


# On which files


def external(size: int, mode: int = 0o644) -> im.Entry:
    return im.external(size, b"aa/%d" % size, mode=0o100000 | mode)


def reader(children: dict[bytes, im.Entry]) -> Reader:
    return Reader(Image(im.make(im.directory(children)).content()))


TREE = {
    b"a": external(100),
    b"b": external(3 * MIB),
    b"c": external(5 * MIB, mode=0o600),
    b"inline": im.file(b"inline"),
    b"private": im.directory({b"in": external(200), b"huge": external(9 * MIB)}, mode=0o040700),
    b"public": im.directory({b"x": external(300), b"y": external(MIB - 1), b"link": im.symlink(b"x")}),
    b"zeros": im.file(size=20 * MIB, layout=im.CHUNKED, i_u=31),
}


def test_the_largest_file_with_an_object_is_large() -> None:
    found = pick(reader(TREE), QUICK, for_everybody=False)
    assert found.large == File(b"/private/huge", 9 * MIB)
    assert [file.path for file in found.small] == [b"/a", b"/private/in", b"/public/x"]
    assert found.directories == [b"/", b"/private", b"/public"]
    assert found.names == frozenset(TREE)


def test_an_ordinary_user_gets_what_everybody_may_read() -> None:
    found = pick(reader(TREE), QUICK, for_everybody=True)
    assert found.large == File(b"/b", 3 * MIB)
    assert [file.path for file in found.small] == [b"/a", b"/public/x"]
    assert found.directories == [b"/", b"/public"]


def test_an_image_without_large_or_small_files() -> None:
    found = pick(reader({b"y": external(MIB - 1)}), QUICK, for_everybody=False)
    assert (found.large, found.small) == (None, [])
    assert (
        WORKLOADS["large"].lacks(found) == WORKLOADS["random"].lacks(found) == "the image has no file of 1 MiB or more"
    )
    assert WORKLOADS["small"].lacks(found) is not None
    assert WORKLOADS["walk"].lacks(found) is None


def test_a_file_of_just_a_mebibyte_is_large() -> None:
    found = pick(reader({b"y": external(MIB)}), QUICK, for_everybody=False)
    assert found.large == File(b"/y", MIB)


def test_files_are_spread_evenly() -> None:
    assert spread(range(10), 5) == [0, 2, 4, 6, 8]
    assert spread(range(3), 5) == [0, 1, 2]
    assert len(set(spread(range(1001), 1000))) == 1000


def test_absent_names_are_distinct_and_absolute() -> None:
    names = absent_names([b"/", b"/a"], 5)
    assert len(set(names)) == 5
    assert {os.path.dirname(name) for name in names} == {b"/", b"/a"}


def test_random_offsets_are_shuffled_and_always_the_same() -> None:
    offsets = random_offsets(100 * BLOCK + 5, 1000)
    assert sorted(offsets) == list(range(0, 100 * BLOCK, BLOCK))
    random.seed(1)
    assert offsets == random_offsets(100 * BLOCK + 5, 1000) != sorted(offsets)
    assert len(random_offsets(100 * BLOCK, 7)) == 7


# What is made of the values


def column(name: str, *, is_peer: bool = False, unverified: str | None = None) -> Column:
    return Column(name, ("x",), {}, is_peer, unverified)


def test_medians_and_ratios() -> None:
    results = Results()
    for value in (5.0, 1.0, 2.0):
        results.add("row", "a", value)
        results.add("row", "b", value * 3, processor=value)
    found = medians(results.values, "row")
    assert found == {"a": 2.0, "b": 6.0}
    assert medians(results.processor, "row") == {"b": 2.0}
    assert ratios(found, "a") == {"a": 1.0, "b": 3.0}
    assert ratios(found, "c") == ratios(found, None) == ratios({"a": 0.0, "b": 1.0}, "a") == {}
    assert medians(results.values, "another") == {}


def test_reference_is_the_first_peer_or_else_the_first_column() -> None:
    ours, first, second = column("ours"), column("first", is_peer=True), column("second", is_peer=True)
    results = Results()
    assert reference_of([ours, first], results) is None
    results.add("row", "ours", 1.0)
    assert reference_of([ours, first, second], results) == "ours", "what was never measured is no reference"
    results.add("row", "second", 1.0)
    assert reference_of([ours, first, second], results) == "second"
    results.add("row", "first", 1.0)
    assert reference_of([ours, first, second], results) == "first"


COLUMNS = [column("kernel", unverified="objects are <plain>"), column("fuse"), column("peer", is_peer=True)]
LARGE = File(b"/big", 2 * MIB)


def sample_report(
    columns: list[Column] = COLUMNS, *, large: File | None = LARGE, drops: bool = True, names: list[str] | None = None
) -> report.Report:
    inputs = Inputs(frozenset((b"big",)), [File(b"/a", 1)], large, [b"/"], Extent())
    task = Task("/i & co", ("/o",), columns, inputs, names or list(WORKLOADS), 2, 60, drops)
    results = Results()
    value = 0.001
    for workload, row in rows(task.workloads):
        for col in columns if workload.lacks(inputs) is None else []:
            if row.unit is Unit.SECONDS or col.name != "kernel":
                for _ in range(2):
                    value *= 1.07
                    results.add(row.key, col.name, value, None if col.name == "kernel" else value / 3)
    machine: dict[str, object] = {
        "kernel": "6.1",
        "processors": 2,
        "processor": "P",
        "python": "3.11",
        "sha256": "hashlib",
    }
    return report.Report(task, results, {"gone": "it hangs"}, {"other": "no way"}, "basedir=/o", machine, ["A remark."])


def figures_of(done: report.Report) -> set[str]:
    return {
        report.number(value)
        for section in report.sections(done)
        for line in section.lines
        for value in line.values.values()
    }


def test_the_table_has_every_row_and_figure() -> None:
    done = sample_report()
    text = report.table(done)
    for _, row in rows(list(WORKLOADS)):
        assert f"\n{row.titled(drops=True)} " in text
    assert figures_of(done) <= set(text.split())
    assert "ratios (x) to peer" in text
    for note in ("kernel: not verifying (noverity): objects are <plain>", "gone: given up: it hangs"):
        assert note in text
    assert "other: not measured: no way" in text
    assert "A remark." in text
    header = text.splitlines()[3:5]
    assert header[0].split() == ["kernel", "fuse", "peer"]
    assert header[1].split() == ["noverity"]
    assert header[1].index("noverity") + len("noverity") == header[0].index("kernel") + len("kernel")


def test_ratios_of_the_table_are_to_the_peer() -> None:
    lines = [line for section in report.sections(sample_report()) for line in section.lines]
    assert all(line.ratios["peer"] == 1.0 for line in lines)
    walk = next(line for line in lines if line.title == "walk, cold")
    assert walk.ratios["fuse"] == pytest.approx(walk.values["fuse"] / walk.values["peer"])


@pytest.mark.parametrize("count", [1, 4, 5, 9, 20])
def test_the_table_fits_into_100_columns(count: int) -> None:
    columns = [column(f"name-of-16-chars{at:02}"[-16:], is_peer=True) for at in range(count)]
    text = report.table(sample_report(columns))
    assert max(map(len, text.splitlines())) <= report.WIDTH
    assert all(col.name in text for col in columns)


def test_five_columns_stand_side_by_side() -> None:
    names = ("kernel", "overlay", "fuse", "composefs-fuse", "mount.composefs")
    done = sample_report([column(name) for name in names])
    text = report.table(done)
    assert text.splitlines()[3].split() == list(names)
    assert text.count("mount until ready") == 2, "seconds, and processor time"


def test_what_is_not_cold_is_not_called_so() -> None:
    done = sample_report(drops=False)
    assert "cold" not in report.table(done)
    assert "walk, new mount" in report.table(done)
    assert not any(row["cold"] for row in report.document(done)["rows"])  # type: ignore[attr-defined]


def test_a_row_without_its_file_says_so() -> None:
    done = sample_report(large=None)
    reason = "the image has no file of 1 MiB or more"
    assert [line for line in report.table(done).splitlines() if reason in line and line.startswith("large file, cold")]
    assert reason in svg(done)
    lacking = {row["key"]: row["lacking"] for row in report.document(done)["rows"]}  # type: ignore[attr-defined]
    assert lacking["large-cold"] == lacking["large-again"] == lacking["random"] == reason
    assert lacking["walk-cold"] is None


def test_the_document_has_each_sample() -> None:
    done = sample_report()
    document = report.document(done)
    found = document["rows"]
    assert isinstance(found, list)
    assert [row["key"] for row in found] == [row.key for _, row in rows(list(WORKLOADS))]
    for row in found:
        for name, values in row["columns"].items():
            assert values["samples"] == done.results.values[row["key"]][name]
            assert len(values["samples"]) == 2
            assert values["median"] == pytest.approx(sum(values["samples"]) / 2)
    assert set(found[1]["columns"]) == {"kernel", "fuse", "peer"}
    assert found[1]["columns"]["kernel"]["processor_samples"] is None
    assert found[1]["columns"]["fuse"]["processor_median"] > 0
    assert document["left_out"] == {"other": "no way"}


SVG = "{http://www.w3.org/2000/svg}"


def test_the_picture_is_well_formed_and_has_every_figure() -> None:
    done = sample_report()
    root = ET.fromstring(svg(done))  # noqa: S314 - our own
    texts = [element.text or "" for element in root.iter(f"{SVG}text")]
    labels = {text.split(" (x")[0] for text in texts}
    assert figures_of(done) <= labels
    titles = [row.titled(drops=True) for _, row in rows(list(WORKLOADS))]
    assert set(titles) <= set(texts)
    assert {"kernel (noverity)", "fuse", "peer"} <= set(texts)
    bars = [element for element in root.iter(f"{SVG}rect") if element.get("class") == "bar"]
    assert len(bars) == sum(len(line.values) for section in report.sections(done) for line in section.lines)


def test_the_picture_can_be_heard_and_seen_without_colour() -> None:
    text = svg(sample_report())
    root = ET.fromstring(text)  # noqa: S314 - our own
    title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert title is not None
    assert description is not None
    assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
    assert "/i & co" in (title.text or "")
    assert "walk, cold: kernel" in (description.text or "")
    hatches = [path.get("d") if (path := p.find(f"{SVG}path")) is not None else "" for p in root.iter(f"{SVG}pattern")]
    assert len(set(hatches)) == len(COLUMNS)
    fills = {element.get("fill") for element in root.iter(f"{SVG}rect") if element.get("class") == "bar"}
    assert fills == {f"url(#{pattern.get('id')})" for pattern in root.iter(f"{SVG}pattern")}
    assert "prefers-color-scheme: dark" in text


def test_the_picture_is_well_formed_whatever_a_peer_says() -> None:
    done = sample_report()
    done.failed["loud"] = str(ColumnFailed("\x1b]0;t\x07 \udcff \ufffe\n"))
    text = svg(done)
    assert r"loud: given up: \x1b]0;t\x07 " in "".join(ET.fromstring(text).itertext())  # noqa: S314 - our own
    assert r"loud: given up: \x1b]0;t\x07 " in report.table(done)


def test_bars_are_to_scale_within_a_row() -> None:
    done = sample_report(names=["mount"])
    root = ET.fromstring(svg(done))  # noqa: S314 - our own
    widths = [float(e.get("width", "")) for e in root.iter(f"{SVG}rect") if e.get("class") == "bar"][:3]
    values = list(report.sections(done)[0].lines[0].values.values())
    assert [width / widths[2] for width in widths] == pytest.approx([value / values[2] for value in values], abs=0.001)


@pytest.mark.parametrize(
    ("value", "text"), [(0.00123, "0.0012"), (0.1234, "0.123"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1234")]
)
def test_numbers(value: float, text: str) -> None:
    assert report.number(value) == text


# Work that may hang


def test_work_in_a_child_gives_its_values() -> None:
    assert bounded(lambda: (1.5, os.getpid()), 20)[0] == 1.5
    assert bounded(lambda: (float(os.getpid()),), 20) != [os.getpid()]


def hang() -> tuple[()]:
    time.sleep(60)
    return ()


def missing() -> tuple[()]:
    os.stat("/not-there")
    return ()


def wrong() -> tuple[()]:
    raise ColumnFailed("as it is")


def crash() -> tuple[()]:
    os.kill(os.getpid(), signal.SIGKILL)
    return ()


@pytest.mark.parametrize(
    ("work", "seconds", "said"),
    [
        (hang, 0.2, "no end within 0.2 s"),
        (missing, 20, "/not-there: No such file or directory"),
        (wrong, 20, "as it is"),
        (crash, 20, "crashed"),
    ],
)
def test_work_in_a_child_fails(work: Callable[[], tuple[()]], seconds: float, said: str) -> None:
    start = time.monotonic()
    with pytest.raises(ColumnFailed, match=said):
        bounded(work, seconds)
    assert time.monotonic() - start < 20
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_what_a_process_uses() -> None:
    assert processor_time([os.getpid()]) == pytest.approx(time.process_time(), rel=0.1)
    assert 1 < resident_memory([os.getpid()]) < 10_000
    assert processor_time([]) == resident_memory([]) == 0
    with pytest.raises(ColumnFailed, match="its server has ended"):
        processor_time([1 << 22])


# The command line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rows", "walk,nothing"], "--rows walk,nothing: must be some of mount,walk"),
        (["--rows", ","], "--rows ,: must be some of"),
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--patience", "0"], "--patience 0: must be"),
        (["--patience", "nan"], "--patience nan: must be"),
        (["--plot", "/"], "--plot /: must name a file"),
        (["--plot", "/not-there/x.svg"], "--plot /not-there/x.svg: must name a file"),
        (["--peer", "x"], "--peer x: must be NAME="),
        (["--peer", "fuse=x {mountpoint}"], "--peer fuse: the name is taken"),
        (["-o", "rw"], "upperdir= and rw are not for bench"),
        (["--backend", "nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_bad_usage(capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path, options: list[str], said: str) -> None:
    image = write_image(tmp_path / "i", {})
    assert said in fails(capfdbinary, USAGE, "bench", image, "-o", f"basedir={tmp_path}", *options)


def test_no_base_directory(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert "no base directory" in fails(capfdbinary, USAGE, "bench", "/i")


def test_no_image(capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path) -> None:
    (tmp_path / "i").write_bytes(b"no image" * 1000)
    for name in ("i", "absent"):
        said = fails(capfdbinary, BAD, "bench", tmp_path / name, "-o", f"basedir={tmp_path}", "--backend", "fuse")
        assert f"{tmp_path}/{name}" in said
