"""cfsfuse's mount and the kernel's own of the same image are the same, for every user who looks."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import select
import signal
import stat
import warnings
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import pytest

from cfsfuse.errors import printable
from integration import contract, kernel
from integration.conftest import ROOT, Account, deadline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from integration.conftest import FuseMount, Mounter
    from integration.images import TestImage

CHECK_SECONDS = 60
_SHOWN = 20
_MISSING = re.compile(r"ERROR (?P<path>/.*): object \S.*: not in any base directory$")

IMAGES = ("python", "corners", "whiteouts", "random-12", "ostree", "ostree-noverity")
# Variants for what depends on the objects; the rest would be the same again.
VARIANTS = ("python-split", "corners-filled", "random-12-filled")
VARIANT_CHECKS = ("stat", "content", "pread", "direct", "read-ways", "open")
# Who mounts, who looks. A mount by an ordinary user is for that user alone.
VIEWS = (("root", "root"), ("root", "user"), ("user", "user"))


class Subject(NamedTuple):
    """An image, who mounts it, and who looks."""

    image: str
    mounting: str
    looking: str

    def __str__(self) -> str:
        return f"{self.image}, mounted by {self.mounting}, seen by {self.looking}"


class Pair(NamedTuple):
    """The mount that is tested and the kernel's, of one image, and the user who looks.

    `entries` are those that root sees in the kernel's; `missing` the files whose objects it does not find either, as a
    log names them.
    """

    mount: FuseMount
    oracle: str
    looking: Account
    entries: list[contract.Entry]
    missing: frozenset[str]


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, images_at: Callable[[str], TestImage], workspace: str) -> Iterator[Pair]:
    """Both mounts of the image that the test is for."""
    subject: Subject = request.param
    if os.getuid() != 0:
        pytest.skip("needs root: the kernel mount is the oracle")
    accounts = {"root": ROOT, "user": request.getfixturevalue("ordinary") if "user" in subject else ROOT}
    image = images_at(subject.image)
    mounter: Mounter = request.getfixturevalue("mounter")
    oracle = os.path.join(workspace, "oracle")
    os.makedirs(oracle, exist_ok=True)
    with _kernel_mount(image, oracle), mounter.mounted(image, accounts[subject.mounting]) as mount:
        entries = list(contract.walk(os.fsencode(oracle)))
        missing = _missing(oracle, entries)
        mount.log.claims = _claim(missing)
        yield Pair(mount, oracle, accounts[subject.looking], entries, missing)


@contextlib.contextmanager
def _kernel_mount(image: TestImage, mountpoint: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(kernel.mounted(image.path, image.base_directories, mountpoint))
        except OSError as error:
            pytest.skip(f"this kernel cannot mount composefs: {error}")
        yield


def _missing(oracle: str, entries: list[contract.Entry]) -> frozenset[str]:
    """Return the files, as a log names them, whose objects the kernel does not find either."""
    found = []
    for entry in entries:
        if entry.is_regular:
            try:
                os.close(os.open(os.fsencode(oracle) + entry.path, os.O_RDONLY))
            except FileNotFoundError:
                found.append(printable(entry.path))
    return frozenset(found)


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


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("pair", _subjects(IMAGES), indirect=True, scope="module", ids=str)
def test_is_as_the_kernel_has_it(pair: Pair, check: str) -> None:
    _hold(pair, check)


@pytest.mark.parametrize("check", VARIANT_CHECKS)
@pytest.mark.parametrize("pair", _subjects(VARIANTS, [VIEWS[0], VIEWS[-1]]), indirect=True, scope="module", ids=str)
def test_contents_are_as_the_kernel_has_them(pair: Pair, check: str) -> None:
    _hold(pair, check)


def _hold(pair: Pair, check: str) -> None:
    found, observed = _look(check, pair)
    assert pair.mount.log.new_complaints() == []
    assert not found, f"{len(found)} differences:\n" + "\n".join(found[:_SHOWN])
    # A check that looks at nothing would pass on anything.
    assert observed or check == "special", "nothing was observed"


def _look(check: str, pair: Pair) -> tuple[list[str], int]:
    """Hold `check` in a child process, as the user who looks; return what differs and how much was observed."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # faulthandler's watchdog is a thread, about which fork warns from Python 3.12 on; the child does not need it.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os.close(reading)
        _look_in_child(check, pair, writing)
    os.close(writing)
    try:
        answer = _read_all(reading)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    assert answer.endswith(b"]"), f"the child ended with status {os.waitstatus_to_exitcode(status)}: {answer!r}"
    found, observed = json.loads(answer)
    return found, observed


def _look_in_child(check: str, pair: Pair, writing: int) -> NoReturn:
    try:
        _become(pair.looking)
        mount, oracle = os.fsencode(pair.mount.path), os.fsencode(pair.oracle)
        for root in (mount, oracle):
            contract.require_read_only(root)
        counts: list[int] = []
        found = [str(each) for each in contract.differences(check, mount, oracle, _chosen(pair), counts.append)]
        answer = json.dumps([found, sum(counts)])
    except BaseException as error:  # noqa: BLE001  # the parent fails the test with it
        answer = f"{type(error).__name__}: {error}"
    with contextlib.suppress(BaseException), os.fdopen(writing, "wb") as pipe:
        pipe.write(answer.encode("utf-8", "backslashreplace"))
    os._exit(0)


def _become(account: Account) -> None:
    os.setgroups([])
    os.setresgid(account.gid, account.gid, account.gid)
    os.setresuid(account.uid, account.uid, account.uid)


def _chosen(pair: Pair) -> list[contract.Entry]:
    """Return what to look at: everything, but of thousands of files without objects, each searched for, a few."""
    return [entry for entry in pair.entries if entry.sampled or printable(entry.path) not in pair.missing]


def _read_all(fd: int) -> bytes:
    left = deadline(CHECK_SECONDS)
    chunks: list[bytes] = []
    while select.select([fd], [], [], left())[0]:
        chunk = os.read(fd, 1 << 20)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)
    raise AssertionError(f"no answer within {CHECK_SECONDS} s: the mount hangs")


@pytest.fixture(scope="module")
def kernel_mounts(images_at: Callable[[str], TestImage], workspace: str) -> Iterator[tuple[bytes, bytes]]:
    """The kernel's mounts of two images that have little in common."""
    if os.getuid() != 0:
        pytest.skip("needs root: the kernel mount is the oracle")
    with contextlib.ExitStack() as stack:
        paths = [os.path.join(workspace, f"kernel-{name}") for name in ("corners", "random-12")]
        for path, name in zip(paths, ("corners", "random-12"), strict=True):
            os.mkdir(path)
            stack.enter_context(_kernel_mount(images_at(name), path))
        yield os.fsencode(paths[0]), os.fsencode(paths[1])


# What is left of statfs is the same for all of the kernel's mounts.
@pytest.mark.parametrize("check", sorted(contract.CHECKS.keys() - {"statfs"}))
def test_check_can_fail(kernel_mounts: tuple[bytes, bytes], check: str) -> None:
    oracle, other = kernel_mounts
    entries = [entry for entry in contract.walk(oracle) if entry.sampled]
    assert list(contract.differences(check, oracle, oracle, entries)) == []
    assert any(contract.differences(check, other, oracle, entries))


def test_planted_difference_is_found(
    kernel_mounts: tuple[bytes, bytes], images_at: Callable[[str], TestImage], mounter: Mounter
) -> None:
    with mounter.mounted(images_at("corners"), ROOT, ["uid=4242"]) as mount:
        entries = [entry for entry in contract.walk(kernel_mounts[0]) if entry.sampled]
        found = list(contract.differences("stat", os.fsencode(mount.path), kernel_mounts[0], entries))
    assert {(difference.what, difference.found) for difference in found} == {("st_uid", 4242), ("again st_uid", 4242)}
    assert len(found) == 2 * len(entries)


def test_writable_mount_is_refused(workspace: str) -> None:
    with pytest.raises(ValueError, match="not a read-only mount"):
        contract.require_read_only(os.fsencode(workspace))


def test_the_contract_looks_at_every_kind_of_entry(kernel_mounts: tuple[bytes, bytes]) -> None:
    """What the suite proves is bounded by what is in its images."""
    kinds = {stat.S_IFMT(entry.mode) for entry in contract.walk(kernel_mounts[0])}
    kinds_of_linux = {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK}
    assert kinds == kinds_of_linux
