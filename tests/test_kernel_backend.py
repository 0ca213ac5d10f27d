"""The kernel backend, as far as it needs no privilege: flags, forms of layers, what is refused before any mount."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, cast

import pytest

from cfsfuse.errors import CfsError, HostError, ImageDigestMismatch, ImageError, UsageError
from cfsfuse.mount import kernel, syscalls
from cfsfuse.mount.kernel import mount
from cfsfuse.mount.options import MountOptions, parse
from cfsfuse.mount.overlayfs import TooOldError, _set_layer, _set_verity
from cfsfuse.mount.overlayfs import attributes as attributes_of
from cfsfuse.verity import ioctl
from cfsfuse.verity.digest import SHA256
from cfsfuse.verity.ioctl import Measured
from cfsfuse.verity.merkle import content_digest
from tests.cli_support import write_image

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RDONLY, NOSUID, NODEV, NOEXEC = 1, 2, 4, 8  # include/uapi/linux/mount.h, MOUNT_ATTR_ and MS_ alike
LAYERS = "upperdir=/u,workdir=/w"


@pytest.mark.parametrize(
    ("options", "attributes"),
    [
        ("", RDONLY | NOSUID | NODEV),
        ("rw", RDONLY | NOSUID | NODEV),
        ("suid,dev", RDONLY),
        ("suid,dev,nosuid", RDONLY | NOSUID),
        ("nosuid,suid", RDONLY | NODEV),
        ("noexec", RDONLY | NOSUID | NODEV | NOEXEC),
        ("noexec,exec", RDONLY | NOSUID | NODEV),
        ("exec,noexec", RDONLY | NOSUID | NODEV | NOEXEC),
        ("noatime,sync,async,atime", RDONLY | NOSUID | NODEV),
        (LAYERS, NOSUID | NODEV),
        (f"{LAYERS},ro", RDONLY | NOSUID | NODEV),
        (f"ro,{LAYERS},rw,dev", NOSUID),
    ],
)
def test_flags_of_the_mount(options: str, attributes: int) -> None:
    """The last word counts, and without one a mount is nosuid and nodev."""
    parsed = parse(options)
    assert attributes_of(parsed.flags, read_only=not parsed.is_writable) == attributes


class Overlay:
    """A context of an overlayfs that refuses some parameters, by key and form of the value."""

    def __init__(self, refused: dict[tuple[str, type], int]) -> None:
        self._refused = refused
        self.taken: list[tuple[str, str | int | None]] = []

    def set(self, key: str, value: str | int | None = None) -> None:
        number = self._refused.get((key, type(value)))
        if number is not None:
            raise OSError(number, os.strerror(number))
        self.taken.append((key, value))


def overlay(refused: dict[tuple[str, type], int]) -> syscalls.Context:
    return cast("syscalls.Context", Overlay(refused))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP])
def test_a_layer_goes_in_as_a_descriptor_or_as_the_link_to_it(number: int) -> None:
    new, older = Overlay({}), Overlay({("datadir+", int): number})
    for made in (new, older):
        _set_layer(cast("syscalls.Context", made), "datadir+", 7)
    assert new.taken == [("datadir+", 7)]
    assert older.taken == [("datadir+", "/proc/self/fd/7")]


@pytest.mark.parametrize("key", ["lowerdir+", "datadir+", "upperdir", "workdir"])
def test_a_kernel_that_does_not_know_layers_one_by_one(key: str) -> None:
    """Only of `lowerdir+` does EINVAL say that; of the others it is about the directory."""
    refusing = overlay({(key, int): errno.EINVAL, (key, str): errno.EINVAL})
    with pytest.raises(TooOldError if key == "lowerdir+" else OSError):
        _set_layer(refusing, key, 7)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM, errno.EPERM])
def test_another_error_about_a_layer_is_told(number: int) -> None:
    at_once: dict[tuple[str, type], int] = {("lowerdir+", int): number}
    at_last: dict[tuple[str, type], int] = {("lowerdir+", int): errno.EINVAL, ("lowerdir+", str): number}
    for refused in (at_once, at_last):
        with pytest.raises(OSError, match=os.strerror(number)):
            _set_layer(overlay(refused), "lowerdir+", 7)


def test_a_kernel_that_does_not_verify() -> None:
    with pytest.raises(HostError, match=r"needs Linux 6\.6; noverity mounts without it"):
        _set_verity(overlay({("verity", str): errno.EINVAL}), "require")
    with pytest.raises(OSError, match="Input/output error"):
        _set_verity(overlay({("verity", str): errno.EIO}), "on")


# Before anything is mounted ------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with an image, a store, and a mountpoint; nothing may get as far as a system call of mounting."""

    def never(*_arguments: object) -> int:
        raise AssertionError("a system call of mounting was made")

    for name in ("call", "_checked"):
        monkeypatch.setattr(syscalls, name, never)
    for name in ("store", "mnt", "upper", "work"):
        (tmp_path / name).mkdir()
    write_image(tmp_path / "image", {})
    before = os.listdir("/proc/self/fd")
    yield tmp_path
    assert os.listdir("/proc/self/fd") == before


def refused(place: Path, kind: type[CfsError], pattern: str, image: str = "image", **options: str) -> None:
    chosen = MountOptions(basedir=(str(place / "store"),), **options)  # type: ignore[arg-type]  # str fields, by name
    with pytest.raises(kind, match=pattern):
        mount(str(place / image), str(place / "mnt"), chosen)


def test_images_that_are_none(place: Path) -> None:
    os.mkfifo(place / "fifo")
    (place / "empty").write_bytes(b"")
    (place / "text").write_bytes(b"text" * 10_000)
    refused(place, ImageError, "/none: image: cannot be opened: No such file", "none")
    for name in ("store", "fifo"):
        refused(place, ImageError, f"/{name}: image: not a regular file$", name)
    refused(place, ImageError, "/empty: .*empty file", "empty")
    refused(place, ImageError, "/text: .*not an EROFS image", "text")


def test_a_digest_that_the_image_does_not_have(place: Path) -> None:
    found = content_digest(SHA256, (place / "image").read_bytes()).hex()
    refused(place, ImageDigestMismatch, f"digest is {found}, not {'0' * 64} as", digest="0" * 64)


def test_a_digest_that_the_kernel_enforces_is_not_measured_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ioctl, "measure", lambda _fd: Measured("sha256", b"\x11" * 32))
    monkeypatch.setattr(kernel, "sealed_copy", None)
    refused(place, ImageDigestMismatch, f"digest is {'11' * 32}, not {'0' * 64} as", digest="0" * 64)


def test_what_is_no_user_namespace(place: Path) -> None:
    for name, reason in (
        (str(place / "none"), "No such file or directory"),
        (str(place / "store"), "not a user namespace; name one as /proc/PID/ns/user"),
        ("/proc/self/ns/mnt", "not a user namespace; name one as /proc/PID/ns/user"),
        ("/dev/null", "not a user namespace; name one as /proc/PID/ns/user"),
    ):
        refused(place, UsageError, f"^idmap={name}: {reason}$", idmap=name)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM])
@pytest.mark.parametrize("failing", ["measure", "opened_layers", "claimed", "check_mountpoint"])
def test_a_failure_of_the_host_is_one_of_ours(
    failing: str, number: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(ioctl if failing == "measure" else kernel, failing, fail)
    digest = content_digest(SHA256, (place / "image").read_bytes()).hex()
    refused(place, HostError, f"/mnt: the kernel does not mount this: {os.strerror(number)}$", digest=digest)
