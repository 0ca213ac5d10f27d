"""What mkcomposefs made of the recorded dumps, `cfsfuse mk` makes too; and a dump of an image leads back to it."""

from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import os
from typing import TYPE_CHECKING, NamedTuple

import pytest

from cfsfuse.contract.entries import walk
from cfsfuse.dump import dump
from cfsfuse.erofs.image import Image
from cfsfuse.erofs.reader import Reader
from cfsfuse.erofs.writer import Versions
from integration.images import SHARED, ImageAbsent, unpack_archive
from integration.mounts import digest_of, needs_root, require_composefs
from integration.oracles import builds, compare
from integration.test_ostree import DIGEST_KEY, Commit

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cfsfuse.tree import Entry
    from integration.oracles.fetch import Composefs


class Row(NamedTuple):
    """A line of expected.tsv."""

    name: str
    min_version: str
    max_version: str
    bytes: str
    sha256: str
    fsverity_sha256: str

    @property
    def versions(self) -> Versions:
        return Versions(int(self.min_version), int(self.max_version))

    @property
    def is_default(self) -> bool:
        return (self.min_version, self.max_version) == ("0", "1")

    @property
    def options(self) -> tuple[str, str]:
        return f"--min-version={self.min_version}", f"--max-version={self.max_version}"


def rows() -> list[Row]:
    """Return the lines of expected.tsv; none where the reference material is absent, which a test reports."""
    path = os.path.join(SHARED, "vectors/expected.tsv")
    if not os.path.exists(path):
        return []
    with open(path, encoding="ascii") as file:
        return [Row(**line) for line in csv.DictReader(file, delimiter="\t")]


ROWS = pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row.name}-{row.min_version}-{row.max_version}")
# The other versions are for the long run, but for the vector in which they differ most.
MOST_ROWS = pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=[] if row.is_default or row.name == "whiteouts" else [pytest.mark.slow])
        for row in rows()
    ],
    ids=lambda row: f"{row.name}-{row.min_version}-{row.max_version}",
)
DEFAULT_ROWS = pytest.mark.parametrize("row", [row for row in rows() if row.is_default], ids=lambda row: row.name)


@functools.cache
def vector(name: str) -> bytes:
    with gzip.open(builds.shared(f"vectors/{name}.dump.gz")) as file:
        return file.read()


@functools.cache
def tree(name: str) -> Entry:
    return compare.tree_of(vector(name))


@functools.cache
def image(name: str, versions: Versions) -> bytes:
    return compare.image_of(tree(name), versions)


@pytest.fixture(scope="module")
def tools() -> Composefs:
    return require_composefs()


@pytest.fixture(scope="module")
def place() -> Iterator[str]:
    with builds.scratch() as path:
        yield path


def test_there_are_vectors() -> None:
    builds.shared("vectors/expected.tsv")
    assert rows()


@ROWS
def test_is_the_recorded_image(row: Row) -> None:
    made = image(row.name, row.versions)
    assert len(made) == int(row.bytes)
    assert hashlib.sha256(made).hexdigest() == row.sha256
    assert digest_of(made).hex() == row.fsverity_sha256


@DEFAULT_ROWS
def test_command_makes_the_recorded_image_by_default(row: Row, tmp_path: Path) -> None:
    to = tmp_path / "image.cfs"
    done = builds.mk("--from-file", "--print-digest", "-", str(to), stdin=vector(row.name))
    assert done.digest == row.fsverity_sha256
    assert hashlib.sha256(to.read_bytes()).hexdigest() == row.sha256


# One option alone takes the other one's default along: it is 0.
@pytest.mark.parametrize("option", ["--min-version=0", "--max-version=0", "--min-version=1", "--max-version=1"])
def test_one_version_option_means_what_it_means_there(option: str, tools: Composefs) -> None:
    arguments = ("--from-file", "--print-digest-only", option, "-")
    text = b"/ 0 40755 2 0 0 0 0.0 - - -\n/whiteout 0 20644 1 0 0 0 0.0 - - -\n"
    assert builds.mk(*arguments, stdin=text).out == tools.mkcomposefs(*arguments, stdin=text)


@MOST_ROWS
def test_dump_leads_back(row: Row, tools: Composefs) -> None:
    """Image → dump → image is what the reference makes of that dump, and has the same dump again."""
    text = compare.dump_of(image(row.name, row.versions))
    again = compare.image_of(compare.tree_of(text), row.versions)
    assert again == compare.reference(tools, (*row.options, "--from-file", "-"), text)
    assert compare.dump_of(again) == text


@pytest.mark.parametrize("name", ["corners", "whiteouts", "random-12"])
def test_references_dump_leads_to_the_same_image(name: str, tools: Composefs) -> None:
    with gzip.open(builds.shared(f"vectors/{name}.redump.gz")) as file:
        text = file.read()
    made = compare.image_of(compare.tree_of(text))
    assert compare.describe(made, compare.reference(tools, ("--from-file", "-"), text)) is None


@ROWS
def test_fsck_accepts(row: Row, place: str) -> None:
    builds.fsck(_written(place, image(row.name, row.versions)))


@needs_root
@DEFAULT_ROWS
def test_kernel_mounts(row: Row, place: str) -> None:
    with builds.mounted_by_the_kernel(_written(place, image(row.name, row.versions)), place) as mountpoint:
        entries = walk(os.fsencode(mountpoint))
        assert sum(1 for _ in entries) == len(vector(row.name).splitlines())


def _written(place: str, made: bytes) -> str:
    builds.write_files(place, {"image.cfs": made})
    return os.path.join(place, "image.cfs")


# Real images --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The ostree fixture and the image of Python packages, unpacked."""
    folder = str(tmp_path_factory.mktemp("material"))
    for archive in ("fixtures/ostree-signed-repos.tar.gz", "images/python-image.tar.gz"):
        try:
            unpack_archive(archive, folder)
        except ImageAbsent as absent:
            pytest.skip(str(absent))
    return folder


def test_ostrees_image_is_made_from_its_dump(unpacked: str) -> None:
    commit = Commit(os.path.join(unpacked, "repo-bare"), "test")
    text = _dump_of_file(os.path.join(unpacked, "bare.cfs"))
    done = builds.mk("--from-file", "--print-digest-only", "-", stdin=text)
    assert done.digest == commit.metadata[DIGEST_KEY].hex()


@pytest.mark.parametrize("name", ["bare.cfs", "bare-nov.cfs", "python.cfs"])
def test_image_is_made_from_its_dump(unpacked: str, name: str) -> None:
    path = os.path.join(unpacked, name)
    with open(path, "rb") as file:
        expected = file.read()
    assert compare.describe(compare.image_of(compare.tree_of(_dump_of_file(path))), expected) is None


def _dump_of_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return b"".join(dump(Reader(Image(file.read()))))
