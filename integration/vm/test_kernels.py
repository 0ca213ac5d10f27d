"""Linux from 5.10 on: what cfsfuse gives with each kernel, where the disk has fs-verity and nothing is in memory."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from integration.debian import Unavailable
from integration.mounts import needs_root, require
from integration.vm import guests
from integration.vm.inside import (
    ACCOUNTS,
    AUTO,
    BARE,
    BEGIN,
    END,
    REPLACED,
    REPLACED_VERITY,
    VERIFICATIONS,
    WITH_TREES,
    WITHOUT_TREES,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from integration.vm.guests import Guest, Outcome
    from integration.vm.inside import Cycle, Document

_SECONDS = 1200  # for a guest, which takes five minutes on a slow machine
_DISK_SIZE = 256 << 20
_TOLD = 5000  # characters of the output that are told about a guest that has failed
_CHECKOUT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

pytestmark = [pytest.mark.slow, needs_root, pytest.mark.timeout(3 * _SECONDS)]

# The backends that each account can have, the one that is chosen first: without verification, and with it.
_FUSE = ("fuse", "fuse")
_WAYS = {
    "5.10": {"root": _FUSE, "namespace": _FUSE, "ordinary": _FUSE},
    "6.1": {"root": _FUSE, "namespace": _FUSE, "ordinary": _FUSE},
    "6.12": {"root": ("kernel fuse", "kernel fuse"), "namespace": _FUSE, "ordinary": _FUSE},
    "newest": {
        "root": ("kernel overlay fuse", "kernel overlay fuse"),
        "namespace": ("overlay fuse", "overlay fuse"),
        "ordinary": _FUSE,
    },
}
# What becomes of a kernel mount that is asked for by name, with trees in the store and without.
_REFUSED, _MERGED, _MOUNTED = (False, False), (False, True), (True, True)
_NAMED = {"5.10": _REFUSED, "6.1": _MERGED, "6.12": _MOUNTED, "newest": _MOUNTED}
# The checks that differ where it merges image and store, and is that old (docs/backends.md): in numbers of inodes and
# links, the order of listings, xattrs that overlayfs hides. Contents, link targets and errors are the same.
_OF_MERGING = {
    "stat",
    "stat-open",
    "names",
    "lookup",
    "access",
    "listing",
    "listing-restarted",
    "xattrs",
    "xattrs-absent",
}
# What becomes of files whose objects were tampered with. The kernel asks for fs-verity, user space for the right bytes.
_TAMPERED = {
    "kernel": {BARE: "EIO", REPLACED: "EIO", REPLACED_VERITY: "EIO"},
    "overlay": {BARE: "EIO", REPLACED: "EIO", REPLACED_VERITY: "EIO"},
    "fuse": {REPLACED: "EIO", REPLACED_VERITY: "EIO"},
}


@pytest.fixture(scope="module", params=guests.KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def document(kernel: str, tmp_path_factory: pytest.TempPathFactory) -> Document:
    """What is observed in a guest with this kernel; skips, by name, where there can be none."""
    try:
        guest = guests.guest(kernel)
        outcome = _observed(guest, str(tmp_path_factory.mktemp("disk") / "disk"))
    except Unavailable as error:
        pytest.skip(f"Linux {kernel}: {error}")
    _, begun, rest = outcome.output.partition(BEGIN)
    if outcome.status or not begun:
        pytest.fail(f"{guest.packages}: exit {outcome.status}: {outcome.output[-_TOLD:]}")
    found: Document = json.loads(rest.partition(END)[0])
    print(f"{guest.packages}: {found['kernel']}")
    return found


def _observed(guest: Guest, disk: str) -> Outcome:
    command = shlex.join([sys.executable, "-m", "integration.vm.inside"])
    script = f"#!/bin/sh\ncd {shlex.quote(_CHECKOUT)} && exec {command}\n"
    try:
        _make_disk(disk)
        return guests.boot(guest, script.encode(), [disk], _SECONDS)
    except guests.GuestDied as error:
        print(f"the guest is started again, for it has died: {error}")
    _make_disk(disk)
    return guests.boot(guest, script.encode(), [disk], _SECONDS)


def _make_disk(path: str) -> None:
    with open(path, "wb") as file:
        file.truncate(_DISK_SIZE)
    # Before Linux 6.3 fs-verity needs blocks as large as pages; mkfs makes them smaller on small disks.
    command = [require("mkfs.ext4"), "-q", "-F", "-b", "4096", "-O", "verity", path]
    subprocess.run(command, check=True, capture_output=True)


def _cycles(document: Document) -> Iterator[tuple[str, Cycle]]:
    for who, found in document["intact"].items():
        for how, ways in found.items():
            for backend, cycle in ways.items():
                yield f"{who} {how} {backend}", cycle


@pytest.mark.parametrize("who", [account.name for account in ACCOUNTS])
def test_backends(document: Document, kernel: str, who: str) -> None:
    for how in VERIFICATIONS:
        expected = _WAYS[kernel][who][how != "noverity"].split()
        chosen = document["intact"][who][how][AUTO]
        assert [chosen["chosen"], *chosen["possible"]] == expected, how
        possible = [name for name, problems in document["doctor"][who]["backends"][how].items() if not problems]
        assert possible == expected, how


def test_is_what_was_chosen(document: Document) -> None:
    types = {"kernel": "overlay", "overlay": "overlay", "fuse": "fuse.cfsfuse"}
    for name, cycle in _cycles(document):
        assert cycle["chosen"] is not None, (name, cycle["said"])
        assert cycle["fstype"] == types[cycle["chosen"]], name
        assert name.endswith((AUTO, cycle["chosen"]))


def test_cold_contents(document: Document) -> None:
    assert {name: cycle["wrong"] for name, cycle in _cycles(document) if cycle["wrong"]} == {}


def test_nothing_is_said(document: Document) -> None:
    said = {name: cycle["said"] + cycle["unmounted"] for name, cycle in _cycles(document)}
    assert {name: text for name, text in said.items() if text} == {}


def test_tampered_objects(document: Document, kernel: str) -> None:
    for how, found in document["tampered"].items():
        expected = {backend: _TAMPERED[backend] for backend in _WAYS[kernel]["root"][1].split()}
        assert {backend: cycle["wrong"] for backend, cycle in found.items()} == expected, how


@pytest.mark.parametrize("who", [account.name for account in ACCOUNTS])
def test_compare(document: Document, kernel: str, who: str) -> None:
    found = document["compare"][who]
    assert (found.get("problem"), found.get("differences")) == (None, [])
    assert found["equal"]
    # What cannot verify is compared all the same.
    mounted = [mount["name"] for mount in found["mounts"] if mount["mounted"]]
    assert mounted == _WAYS[kernel][who][0].split()


def test_kernel_by_name(document: Document, kernel: str) -> None:
    found = [document["named"][state] for state in (WITH_TREES, WITHOUT_TREES)]
    assert tuple(cycle["fstype"] == "overlay" for cycle in found) == _NAMED[kernel], found
    assert [cycle["wrong"] for cycle in found] == [{}, {}]
    if _NAMED[kernel] == _MERGED:
        assert ".merkle would show in the tree" in document["named"][WITH_TREES]["said"]


def test_compare_by_name(document: Document, kernel: str) -> None:
    found = document["compare"][WITHOUT_TREES]
    if _NAMED[kernel] == _REFUSED:
        assert found["problem"]
        return
    assert [mount["name"] for mount in found["mounts"] if mount["mounted"]] == ["kernel", "fuse"]
    different = {difference["check"] for difference in found["differences"]}
    assert different <= (_OF_MERGING if _NAMED[kernel] == _MERGED else set())


def test_nothing_is_left(document: Document) -> None:
    assert document["left"] == []


def test_kernel_does_not_complain(document: Document) -> None:
    assert document["complaints"] == []
