"""cfsfuse's mount and the kernel's own of the same image are the same, for every user who looks."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import stat
from typing import TYPE_CHECKING, NamedTuple

import pytest

from cfsfuse.contract.checks import CHECKS
from cfsfuse.contract.differences import differences
from cfsfuse.contract.entries import require_read_only, walk
from cfsfuse.errors import UsageError
from integration.conftest import ROOT
from integration.holding import Pair, hold, missing_objects, oracle_mount

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from integration.conftest import Mounter
    from integration.images import TestImage

_MISSING = re.compile(r"ERROR (?P<path>/.*): object \S.*: not in any base directory$")

IMAGES = ("python", "corners", "whiteouts", "random-12", "ostree", "ostree-noverity")
# Variants for what depends on the objects; the rest would be the same again.
VARIANTS = ("python-split", "corners-filled", "random-12-filled")
VARIANT_CHECKS = ("stat", "digest", "content", "pread", "direct", "read-ways", "open")
# Who mounts, who looks. A mount by an ordinary user is for that user alone.
VIEWS = (("root", "root"), ("root", "user"), ("user", "user"))


class Subject(NamedTuple):
    """An image, who mounts it, who looks, and by which session."""

    image: str
    mounting: str
    looking: str
    session: str = "native"

    def __str__(self) -> str:
        return f"{self.image}, mounted by {self.mounting}, seen by {self.looking}, {self.session}"


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, images_at: Callable[[str], TestImage], workspace: str) -> Iterator[Pair]:
    """Both mounts of the image that the test is for."""
    subject: Subject = request.param
    accounts = {"root": ROOT, "user": request.getfixturevalue("ordinary") if "user" in subject else ROOT}
    image = images_at(subject.image)
    mounter: Mounter = request.getfixturevalue("mounter")
    oracle = os.path.join(workspace, "oracle")
    os.makedirs(oracle, exist_ok=True)
    session = f"session={subject.session}"
    with oracle_mount(image, oracle), mounter.mounted(image, accounts[subject.mounting], [session]) as mount:
        entries = list(walk(os.fsencode(oracle)))
        missing = missing_objects(oracle, entries)
        mount.log.claims = _claim(missing)
        yield Pair(mount.path, oracle, accounts[subject.looking], entries, missing, mount.log.new_complaints)


def _claim(missing: frozenset[str]) -> Callable[[str], bool]:
    """Return what claims the errors about objects that are really missing, each told once."""
    told = set()

    def claim(line: str) -> bool:
        match = _MISSING.search(line)
        if match is None or match["path"] not in missing or match["path"] in told:
            return False
        told.add(match["path"])
        return True

    return claim


def _subjects(names: Iterable[str], views: Iterable[tuple[str, str]] = VIEWS) -> list[Subject]:
    return [Subject(name, *view) for name, view in itertools.product(names, views)]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("pair", _subjects(IMAGES), indirect=True, scope="module", ids=str)
def test_is_as_the_kernel_has_it(pair: Pair, check: str) -> None:
    hold(pair, check)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "pair",
    [Subject(name, mounting, "user", "pyfuse3") for name in ("corners", "python") for mounting in ("root", "user")],
    indirect=True,
    scope="module",
    ids=str,
)
def test_pyfuse3_is_as_the_kernel_has_it(pair: Pair, check: str) -> None:
    hold(pair, check)


@pytest.mark.parametrize("check", VARIANT_CHECKS)
@pytest.mark.parametrize("pair", _subjects(VARIANTS, [VIEWS[0], VIEWS[-1]]), indirect=True, scope="module", ids=str)
def test_contents_are_as_the_kernel_has_them(pair: Pair, check: str) -> None:
    hold(pair, check)


@pytest.fixture(scope="module")
def kernel_mounts(images_at: Callable[[str], TestImage], workspace: str) -> Iterator[tuple[bytes, bytes]]:
    """The kernel's mounts of two images that have little in common."""
    with contextlib.ExitStack() as stack:
        paths = [os.path.join(workspace, f"kernel-{name}") for name in ("corners", "random-12")]
        for path, name in zip(paths, ("corners", "random-12"), strict=True):
            os.mkdir(path)
            stack.enter_context(oracle_mount(images_at(name), path))
        yield os.fsencode(paths[0]), os.fsencode(paths[1])


# What is left of statfs is the same for all of the kernel's mounts.
@pytest.mark.parametrize("check", sorted(CHECKS.keys() - {"statfs"}))
def test_check_can_fail(kernel_mounts: tuple[bytes, bytes], check: str) -> None:
    oracle, other = kernel_mounts
    entries = [entry for entry in walk(oracle) if entry.sampled]
    assert list(differences(check, oracle, oracle, entries)) == []
    assert any(differences(check, other, oracle, entries))


def test_planted_difference_is_found(
    kernel_mounts: tuple[bytes, bytes], images_at: Callable[[str], TestImage], mounter: Mounter
) -> None:
    with mounter.mounted(images_at("corners"), ROOT, ["uid=4242"]) as mount:
        entries = [entry for entry in walk(kernel_mounts[0]) if entry.sampled]
        found = list(differences("stat", os.fsencode(mount.path), kernel_mounts[0], entries))
    assert {(difference.what, difference.found) for difference in found} == {("st_uid", 4242), ("again st_uid", 4242)}
    assert len(found) == 2 * len(entries)


def test_writable_mount_is_refused(workspace: str) -> None:
    with pytest.raises(UsageError, match="not a read-only mount"):
        require_read_only(os.fsencode(workspace))


def test_the_contract_looks_at_every_kind_of_entry(kernel_mounts: tuple[bytes, bytes]) -> None:
    """What the suite proves is bounded by what is in its images."""
    kinds = {stat.S_IFMT(entry.mode) for entry in walk(kernel_mounts[0])}
    kinds_of_linux = {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK}
    assert kinds == kinds_of_linux
