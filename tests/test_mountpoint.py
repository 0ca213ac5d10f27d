"""The directory to mount on: whether it will do, and who of two comes first."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING

import pytest

from cfsfuse.errors import HostError, UsageError
from cfsfuse.mount import mountpoint
from cfsfuse.mount.mountinfo import Mount
from cfsfuse.mount.mountpoint import check_mountpoint, claimed

if TYPE_CHECKING:
    from pathlib import Path


def is_locked(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def test_a_claim_keeps_others_out_as_long_as_it_is_held(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with claimed(str(tmp_path)) as claim:
        assert is_locked(tmp_path)
        assert not os.get_inheritable(claim)
    assert not is_locked(tmp_path)
    with pytest.raises(RuntimeError), claimed(str(tmp_path)):
        raise RuntimeError
    assert not is_locked(tmp_path)
    assert os.listdir("/proc/self/fd") == before


def test_the_end_of_a_claim_does_not_wait_for_a_copy_of_its_descriptor(tmp_path: Path) -> None:
    """A child has one as long as it lives."""
    with claimed(str(tmp_path)) as claim:
        copy = os.dup(claim)
    assert not is_locked(tmp_path)
    os.close(copy)


def failing_with(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str, flags: int) -> int:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "open", fail)


def test_a_directory_that_may_not_be_read_can_be_mounted_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_with(errno.EACCES, monkeypatch)
    with claimed(str(tmp_path)) as claim:
        assert os.readlink(f"/proc/self/fd/{claim}").startswith("/memfd:cfsfuse-claim")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOTCONN, "a dead mount is there, take it away with cfsfuse umount"),
        (errno.ENOENT, "create the directory first"),
    ],
)
def test_a_claim_names_the_remedy(number: int, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_with(number, monkeypatch)
    with pytest.raises(UsageError) as caught:
        claimed("/m").__enter__()
    assert str(caught.value) == f"/m: mountpoint: {os.strerror(number)}; {remedy}"


def test_a_directory_will_do(tmp_path: Path) -> None:
    check_mountpoint(str(tmp_path))
    (tmp_path / "not empty").write_bytes(b"")
    check_mountpoint(str(tmp_path))


def test_what_will_not_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match=f"^{tmp_path}/none: mountpoint: No such .*; create the directory first$"):
        check_mountpoint(f"{tmp_path}/none")
    with pytest.raises(UsageError, match=f"^{tmp_path}/file: mountpoint is not a directory$"):
        check_mountpoint(f"{tmp_path}/file")


@pytest.mark.parametrize(("fstype", "source"), [("fuse.cfsfuse", "/i.cfs"), ("overlay", "composefs")])
def test_an_image_is_there_already(fstype: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path)
    monkeypatch.setattr(mountpoint, "mount_at", lambda _path: Mount(path, fstype, source, "0:1"))
    with pytest.raises(UsageError, match=f"^{path}: {source} is mounted here already; cfsfuse umount {path}$"):
        check_mountpoint(path)


@pytest.mark.parametrize("fstype", ["overlay", "tmpfs", "erofs"])
def test_a_mount_of_something_else_will_do(fstype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path)
    monkeypatch.setattr(mountpoint, "mount_at", lambda _path: Mount(path, fstype, fstype, "0:1"))
    check_mountpoint(path)


def test_a_directory_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    monkeypatch.setattr(mountpoint, "has_sys_admin", lambda: False)
    with pytest.raises(HostError, match=r"not writable for this user, as fusermount3 demands$"):
        check_mountpoint(str(tmp_path))
    monkeypatch.setattr(mountpoint, "has_sys_admin", lambda: True)
    check_mountpoint(str(tmp_path))
