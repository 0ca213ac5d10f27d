"""Whom the program believes that the kernel verifies a file."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING

import pytest

from cfsfuse.fstype import HAS_VERITY, LOCAL, file_system_type
from cfsfuse.verity import ioctl
from cfsfuse.verity.digest import SHA256
from cfsfuse.verity.ioctl import Measured, enable, measure
from cfsfuse.verity.merkle import content_digest

if TYPE_CHECKING:
    from pathlib import Path

_FUSE = 0x65735546
_CLAIMED = b"\xab" * 32


@pytest.fixture
def claiming(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let whoever is asked for a digest claim one."""

    def claim(_fd: int, _request: int, argument: bytearray) -> int:
        argument[:] = (1).to_bytes(2, "little") + (32).to_bytes(2, "little") + _CLAIMED.ljust(64, b"\0")
        return 0

    monkeypatch.setattr(fcntl, "ioctl", claim)


@pytest.mark.usefixtures("claiming")
@pytest.mark.parametrize("kind", [_FUSE, 0x6969, 0x794C7630, 0])
def test_trap_a_fuse_server_is_not_believed(kind: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ioctl, "file_system_type", lambda _fd: kind)
    with open(tmp_path / "file", "wb") as file:
        assert measure(file.fileno()) is None


@pytest.mark.usefixtures("claiming")
@pytest.mark.parametrize("kind", sorted(HAS_VERITY))
def test_a_file_system_with_verity_is(kind: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ioctl, "file_system_type", lambda _fd: kind)
    with open(tmp_path / "file", "wb") as file:
        assert measure(file.fileno()) == Measured("sha256", _CLAIMED)


def test_a_file_without_verity_has_no_digest(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with open(tmp_path / "file", "rb") as file:
        assert measure(file.fileno()) is None
    assert content_digest(SHA256, b"content") != _CLAIMED


def test_type_of_a_file_system() -> None:
    fd = os.open("/proc", os.O_PATH)
    try:
        assert file_system_type(fd) == 0x9FA0
    finally:
        os.close(fd)
    assert HAS_VERITY < LOCAL
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        file_system_type(-1)


def test_what_enable_asks_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fsverity_enable_arg: version 1, SHA-256 (1), blocks of 4096 bytes, no salt, no signature."""
    asked: list[tuple[int, int, bytes]] = []
    monkeypatch.setattr(fcntl, "ioctl", lambda *arguments: asked.append(arguments))
    enable(17)
    argument = b"".join(number.to_bytes(4, "little") for number in (1, 1, 4096)).ljust(128, b"\0")
    assert asked == [(17, 1 << 30 | 128 << 16 | ord("f") << 8 | 133, argument)]


def test_enable_on_what_cannot_have_it() -> None:
    read, write = os.pipe()
    try:
        with pytest.raises(OSError, match=os.strerror(errno.ENOTTY)):
            enable(read)
    finally:
        os.close(read)
        os.close(write)
