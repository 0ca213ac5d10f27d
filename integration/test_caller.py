"""What a mount leaves alone: its caller's streams, descriptors and locks, and other people's mounts."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from cfsfuse.mount.mountinfo import mount_at
from integration.mounts import CFSFUSE, ORDINARY, SELF, Stage, eventually, needs_root, noise, stage

if TYPE_CHECKING:
    from collections.abc import Iterator

CONTENT = noise(50_000, "caller")
HELPER = os.path.join(os.path.dirname(sys.executable), "mount.cfsfuse")


def build(made: Stage) -> None:
    recipe = made.recipe()
    recipe.file("/file", CONTENT)
    recipe.build(made.image)


@pytest.fixture
def made() -> Iterator[Stage]:
    with stage(SELF) as ours:
        build(ours)
        yield ours


def read(made: Stage) -> bytes:
    with open(made.at("file"), "rb") as file:
        return file.read()


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_do_no_harm(made: Stage, closed: str) -> None:
    done = made.run("sh", "-c", f'exec "$@" {closed}', "sh", CFSFUSE, "mount", *made.words())
    assert done.returncode == 0, done
    assert read(made) == CONTENT
    made.unmount()


def test_descriptors_and_locks_of_the_caller_are_not_kept(made: Stage) -> None:
    lock = os.path.join(made.path, "lock")
    script = 'exec 9>"$0"; flock -n 9 || exit 99; exec "$@"'
    done = made.run("sh", "-c", script, lock, CFSFUSE, "mount", *made.words())
    assert done.returncode == 0, done
    with open(lock, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert read(made) == CONTENT
    made.unmount()


def test_of_two_who_mount_at_once_one_is_refused(made: Stage) -> None:
    starts = [made.start(CFSFUSE, "mount", *made.words()) for _ in range(3)]
    said = [start.communicate(timeout=60)[1] for start in starts]
    assert sorted(start.returncode for start in starts) == [0, 2, 2]
    assert sum("is mounted here already" in text for text in said) == 2
    assert made.mounts() == [made.mountpoint]
    made.unmount()


@needs_root
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_mount_that_took_our_place_stays(made: Stage, number: signal.Signals) -> None:
    daemon = made.mount()
    with open(made.at("file"), "rb") as held:
        assert made.run(CFSFUSE, "umount", "--lazy", made.mountpoint).returncode == 0
        subprocess.run(["mount", "-t", "tmpfs", "other", made.mountpoint], check=True)
        try:
            assert held.read(1) == CONTENT[:1]
            os.kill(daemon, number)
            eventually(lambda: not made.processes(), "the end of daemon and watcher")
            there = mount_at(made.mountpoint)
            assert there is not None
            assert there.fstype == "tmpfs"
        finally:
            subprocess.run(["umount", made.mountpoint], check=True)


def test_fake_mounts_nothing_and_a_namespace_is_refused(made: Stage) -> None:
    words = made.words("rw")
    done = made.run(HELPER, words[0], words[1], "-f", "-v", *words[2:])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert made.is_clean()
    done = made.run(HELPER, *words, "-N", "/proc/self/ns/mnt")
    assert done.returncode == 4
    assert "nsenter" in done.stderr
    assert made.is_clean()


@pytest.mark.parametrize("flag", ["dev", "suid"])
def test_an_ordinary_user_is_told_what_only_root_may(flag: str) -> None:
    with stage(ORDINARY) as made:
        build(made)
        done = made.run(CFSFUSE, "mount", *made.words(flag))
        assert done.returncode == 4
        assert f"{flag}: only root" in done.stderr
        assert made.is_clean()


@needs_root
def test_root_has_them_through_mount8_only_by_default(made: Stage) -> None:
    for command, expected in (([HELPER], False), ([CFSFUSE, "mount"], True)):
        done = made.run(*command, *made.words())
        assert done.returncode == 0, done
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            (options,) = [line.split()[5] for line in file if line.split()[4] == made.mountpoint]
        assert ("nosuid" in options.split(",")) is expected
        made.unmount()
