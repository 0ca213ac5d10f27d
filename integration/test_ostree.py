"""From a signature to a file: an ostree commit that is signed, the image digest in it, the image mounted by it.

A commit is a GVariant of type (a{sv}aya(say)sstayay), and its metadata come first; its detached metadata are an a{sv}.
https://docs.gtk.org/glib/gvariant-specification-1.0.html
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from typing import TYPE_CHECKING

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from integration.conftest import ROOT, MountFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from integration.conftest import Account, Mounter
    from integration.images import TestImage

DIGEST_KEY = "ostree.composefs.digest.v0"
SIGNATURE_KEY = "ostree.sign.ed25519"


class Commit:
    """The commit that a branch of a repository is at: its bytes, and those of its detached metadata."""

    def __init__(self, repository: str, branch: str) -> None:
        self.checksum = _read(os.path.join(repository, "refs/heads", branch)).decode().strip()
        path = os.path.join(repository, "objects", self.checksum[:2], self.checksum[2:])
        self.data = _read(path + ".commit")
        self.metadata = dictionary(first_of_commit(self.data))
        self.detached = dictionary(_read(path + ".commitmeta"))

    def verify(self, key: bytes) -> None:
        """Raise InvalidSignature unless one of the signatures is made with `key`."""
        public = Ed25519PublicKey.from_public_bytes(key)
        for signature in array(self.detached[SIGNATURE_KEY]):
            try:
                public.verify(signature, self.data)
            except InvalidSignature:
                continue
            return
        raise InvalidSignature


# The part of GVariant that these need. A container of elements of variable size ends with their ends, each as wide as
# the container's own size demands.


def first_of_commit(data: bytes) -> bytes:
    """Return the first member of a tuple: its end stands last."""
    width = _offset_width(data)
    return data[: int.from_bytes(data[-width:], "little")]


def array(data: bytes, alignment: int = 1) -> list[bytes]:
    """Return the elements of an array of variable-sized elements."""
    if not data:
        return []
    width = _offset_width(data)
    table = int.from_bytes(data[-width:], "little")  # the end of the last element is where the ends begin
    ends = [int.from_bytes(data[at : at + width], "little") for at in range(table, len(data), width)]
    starts = [0, *(end + -end % alignment for end in ends[:-1])]
    return [data[start:end] for start, end in zip(starts, ends, strict=True)]


def dictionary(data: bytes) -> dict[str, bytes]:
    """Return an a{sv} with the values as serialised, their types left out."""
    return dict(_entry(entry) for entry in array(data, 8))


def _entry(data: bytes) -> tuple[str, bytes]:
    width = _offset_width(data)
    end_of_key = int.from_bytes(data[-width:], "little")
    variant = data[end_of_key + -end_of_key % 8 : -width]
    # A variant is its value, a zero byte, and its type.
    return data[: end_of_key - 1].decode(), variant[: variant.rindex(b"\0")]


def _offset_width(data: bytes) -> int:
    return next(width for width in (1, 2, 4, 8) if len(data) < 1 << 8 * width)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


@pytest.fixture(scope="module")
def fixture(images_at: Callable[[str], TestImage]) -> str:
    """The directory with the repositories, their images and the key."""
    return os.path.dirname(images_at("ostree").path)


@pytest.fixture(params=["repo-bare", "repo-bare-user"])
def repository(request: pytest.FixtureRequest, fixture: str) -> str:
    return os.path.join(fixture, request.param)


@pytest.fixture
def commit(repository: str) -> Commit:
    return Commit(repository, "test")


@pytest.fixture
def store(repository: str, images_at: Callable[[str], TestImage]) -> TestImage:
    """The image, with the objects of the repository that the test is for."""
    return images_at("ostree")._replace(base_directories=(os.path.join(repository, "objects"),))


@pytest.fixture(scope="module")
def key(fixture: str) -> bytes:
    return base64.b64decode(_read(os.path.join(fixture, "pub.b64")))


@pytest.fixture(params=["root", "user"])
def account(request: pytest.FixtureRequest) -> Account:
    if request.param == "root" and os.getuid() != 0:
        pytest.skip("needs root: mounts as root")
    return ROOT if request.param == "root" else request.getfixturevalue("ordinary")


def test_commit_is_what_its_name_says(commit: Commit) -> None:
    assert hashlib.sha256(commit.data).hexdigest() == commit.checksum


def test_signature_is_verified(commit: Commit, key: bytes) -> None:
    commit.verify(key)


def test_changed_commit_is_refused(commit: Commit, key: bytes) -> None:
    at = commit.data.index(commit.metadata[DIGEST_KEY])
    commit.data = commit.data[:at] + bytes([commit.data[at] ^ 1]) + commit.data[at + 1 :]
    with pytest.raises(InvalidSignature):
        commit.verify(key)


def test_other_key_is_refused(commit: Commit, key: bytes) -> None:
    with pytest.raises(InvalidSignature):
        commit.verify(bytes([key[0] ^ 1]) + key[1:])


def test_signed_digest_mounts_its_image(
    commit: Commit, key: bytes, store: TestImage, account: Account, mounter: Mounter
) -> None:
    commit.verify(key)
    digest = commit.metadata[DIGEST_KEY].hex()
    with mounter.mounted(store, account, [f"digest={digest}"]) as mount:
        assert account.run("cat", mount.path + "/usr/hello") == b"hello\n"
        assert account.run("cat", mount.path + "/usr/link") == b"hello\n"
        assert account.run("cat", mount.path + "/usr/empty") == b""
        assert len(account.run("cat", mount.path + "/usr/bin/xprog")) == 5000


def test_wrong_digest_is_refused(commit: Commit, store: TestImage, account: Account, mounter: Mounter) -> None:
    digest = commit.metadata[DIGEST_KEY]
    wrong = bytes([digest[0] ^ 1]) + digest[1:]
    _check_refusal(mounter, account, store, wrong, found=digest.hex())


def test_image_without_verity_is_another_one(
    commit: Commit, images_at: Callable[[str], TestImage], account: Account, mounter: Mounter
) -> None:
    _check_refusal(mounter, account, images_at("ostree-noverity"), commit.metadata[DIGEST_KEY], found="[0-9a-f]{64}")


def _check_refusal(mounter: Mounter, account: Account, image: TestImage, digest: bytes, found: str) -> None:
    with pytest.raises(MountFailed) as caught, mounter.mounted(image, account, [f"digest={digest.hex()}"]):
        pass
    assert caught.value.status == 3
    line = rf"cfsfuse: {re.escape(image.path)}: the image's fs-verity digest is {found}, not {digest.hex()} .*\n"
    assert re.fullmatch(line, caught.value.said), caught.value.said
