"""The directories of overlayfs: what is refused, and that all is closed again."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from cfsfuse.errors import UsageError
from cfsfuse.mount.layers import opened_layers
from cfsfuse.mount.options import MountOptions

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with two object stores and two directories to write in."""
    for name in ("store/inside", "more", "upper", "work"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def options(place: Path, *, upper: str | None = None, work: str | None = None) -> MountOptions:
    """Return options with both stores; `upper` and `work` are below `place`."""
    basedir = (str(place / "store"), str(place / "more"))
    return MountOptions(basedir=basedir, upperdir=upper and str(place / upper), workdir=work and str(place / work))


def is_path(fd: int, path: Path) -> bool:
    return os.path.samestat(os.fstat(fd), path.stat())


def test_base_directories_in_their_order(place: Path) -> None:
    with opened_layers(options(place)) as layers:
        assert (layers.upper, layers.work) == (None, None)
        assert len(layers.data) == 2
        assert is_path(layers.data[0], place / "store")
        assert is_path(layers.data[1], place / "more")


def test_directories_to_write_in(place: Path) -> None:
    with opened_layers(options(place, upper="upper", work="work")) as layers:
        assert layers.upper is not None
        assert layers.work is not None
        assert is_path(layers.upper, place / "upper")
        assert is_path(layers.work, place / "work")


def test_descriptors_are_not_inherited(place: Path) -> None:
    with opened_layers(options(place, upper="upper", work="work")) as layers:
        for fd in (*layers.data, layers.upper, layers.work):
            assert fd is not None
            assert not os.get_inheritable(fd)


@pytest.mark.parametrize("name", ["none", "file", "loop"])
@pytest.mark.parametrize("what", ["base directory", "upperdir", "workdir"])
def test_what_is_no_directory(place: Path, name: str, what: str) -> None:
    (place / "file").write_bytes(b"")
    (place / "loop").symlink_to("loop")
    wrong = str(place / name)
    chosen = {
        "base directory": MountOptions(basedir=(str(place / "more"), wrong)),
        "upperdir": options(place, upper=name, work="work"),
        "workdir": options(place, upper="upper", work=name),
    }
    reason = {"none": "No such file", "file": "Not a directory", "loop": "Too many levels"}[name]
    with pytest.raises(UsageError, match=f"^{wrong}: {what}: {reason}"), opened_layers(chosen[what]):
        pass


def test_workdir_on_another_file_system(place: Path) -> None:
    chosen = MountOptions(basedir=(str(place / "store"),), upperdir=str(place / "upper"), workdir="/proc/self")
    with pytest.raises(UsageError, match=r"^workdir=/proc/self: not on the file system of upperdir=.*/upper$"):
        opened_layers(chosen).__enter__()


@pytest.mark.parametrize(
    ("upper", "work", "refused", "store"),
    [
        ("store", "work", "upperdir", "store"),
        ("store/inside", "work", "upperdir", "store"),
        ("upper", "store/inside", "workdir", "store"),
        ("upper", "more", "workdir", "more"),
        ("link", "work", "upperdir", "store"),
        ("upper", "link", "workdir", "store"),
        ("upper/../store/inside/..", "work", "upperdir", "store"),
    ],
)
def test_no_change_gets_into_the_store(place: Path, upper: str, work: str, refused: str, store: str) -> None:
    (place / "link").symlink_to("store/inside")
    expected = f"^{refused}: inside the object store {place / store}, which a mount must leave as it is$"
    with pytest.raises(UsageError, match=expected):
        opened_layers(options(place, upper=upper, work=work)).__enter__()


@pytest.mark.parametrize(
    ("upper", "work"), [("upper", "upper"), ("upper", "upper/below"), (".", "work"), ("work", ".")]
)
def test_one_of_the_two_inside_the_other(place: Path, upper: str, work: str) -> None:
    """Overlayfs would say no more than EINVAL."""
    (place / "upper/below").mkdir()
    with pytest.raises(UsageError, match=r"^workdir=.*: must stand beside upperdir=.*, in no part of it$"):
        opened_layers(options(place, upper=upper, work=work)).__enter__()


def test_a_store_that_is_named_by_a_symlink(place: Path) -> None:
    (place / "link").symlink_to("store")
    chosen = MountOptions(
        basedir=(str(place / "link"),), upperdir=str(place / "store/inside"), workdir=str(place / "work")
    )
    with pytest.raises(UsageError, match=r"^upperdir: inside the object store .*/link,"):
        opened_layers(chosen).__enter__()


def test_beside_or_around_the_store_is_no_matter_of_ours(place: Path) -> None:
    """What a store is inside of, overlayfs judges by itself."""
    (place / "store-2").mkdir()
    (place / "upper/store").mkdir()
    with opened_layers(options(place, upper="store-2", work="work")):
        pass
    around = options(place, upper="upper", work="work")
    with opened_layers(around._replace(basedir=(str(place / "upper/store"),))):
        pass
