"""fs-verity digests: known values, and what the kernel is asked."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from cfsfuse.verity.digest import ALGORITHMS, SHA256
from cfsfuse.verity.ioctl import measure
from cfsfuse.verity.merkle import content_digest
from tests.support import VECTORS, expected, python_image, vector

if TYPE_CHECKING:
    from pathlib import Path

# Of `fsverity digest --compact`.
KNOWN = {
    ("sha256", b""): "3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95",
    ("sha256", b"hello\n"): "9c76eecc7b76fcb46199cb27b90cf59a660e10575bb0412128905129d5b1c2aa",
    ("sha512", b""): "ccf9e5aea1c2a64efa2f2354a6024b90dffde6bbc017825045dce374474e13d1"
    "0adb9dadcc6ca8e17a3c075fbd31336e8f266ae6fa93a6c3bed66f9e784e5abf",
}


@pytest.mark.parametrize("name", VECTORS)
def test_images_have_the_digests_that_the_reference_records(name: str) -> None:
    image = vector(f"{name}.cfs.gz")
    line = expected(name)
    assert len(image) == int(line["bytes"])
    assert content_digest(SHA256, image).hex() == line["fsverity_sha256"]


def test_real_image_has_its_recorded_digest() -> None:
    recorded = python_image("digest").split()[0].decode()
    assert content_digest(SHA256, python_image("python.cfs")).hex() == recorded


@pytest.mark.parametrize(("name", "content"), KNOWN)
def test_known_digests(name: str, content: bytes) -> None:
    assert content_digest(ALGORITHMS[name], content).hex() == KNOWN[name, content]


def test_algorithms_differ_in_number_and_size() -> None:
    assert {(a.name, a.number, a.size) for a in ALGORITHMS.values()} == {("sha256", 1, 32), ("sha512", 2, 64)}


def test_kernel_measures_nothing_of_an_ordinary_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    fd = os.open(path, os.O_RDONLY)
    try:
        assert measure(fd) is None
    finally:
        os.close(fd)
    reading, writing = os.pipe()
    try:
        assert measure(reading) is None
    finally:
        os.close(reading)
        os.close(writing)
