"""The examples of docs/api.md, mounts included, in a process of their own as an ordinary program would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from cfsfuse import api
from cfsfuse.errors import HostError, UsageError
from cfsfuse.mount.mountinfo import mount_at

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DOCUMENT = os.path.join(ROOT, "docs", "api.md")


@pytest.fixture
def place(tmp_path: Path, fuse_device: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to work in, with an image that has one object, and nothing kept outside."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(b"content " * 20)
    (tmp_path / "mnt,:").mkdir()
    api.build(tmp_path / "tree", tmp_path / "image", store=tmp_path / "objects:,")
    return tmp_path


def test_all_examples_of_the_documentation(tmp_path: Path, fuse_device: None) -> None:
    with open(DOCUMENT, encoding="utf-8") as file:
        blocks = re.findall(r"^```python( mount)?\n(.*?)^```$", file.read(), re.MULTILINE | re.DOTALL)
    assert any(mounts for mounts, _ in blocks)
    script = "\n".join(text for _, text in blocks)
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", script]
    environment = {**os.environ, "PYTHONPATH": ROOT, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert mount_at(str(tmp_path / "mnt")) is None


def test_a_mount_goes_with_its_block(place: Path) -> None:
    with api.mount(place / "image", place / "mnt,:", basedirs=[place / "objects:,"]) as mounted:
        assert (place / "mnt,:" / "file").read_bytes() == b"content " * 20
        assert mount_at(mounted.mountpoint) is not None
        with pytest.raises(UsageError, match="mounted here already"):
            api.mount(place / "image", place / "mnt,:", basedirs=[place / "objects:,"])
    assert mount_at(mounted.mountpoint) is None


def test_a_mount_in_use(place: Path) -> None:
    mounted = api.mount(place / "image", place / "mnt,:", basedirs=[place / "objects:,"], options="uid=7")
    with open(place / "mnt,:" / "file", "rb") as file:
        assert os.fstat(file.fileno()).st_uid == 7
        with pytest.raises(HostError, match="in use"):
            mounted.unmount()
    mounted.unmount()
    assert mount_at(mounted.mountpoint) is None


def test_an_error_is_not_hidden_by_a_mount_in_use(place: Path) -> None:
    held: list[BinaryIO] = []

    def fail_with_an_open_file() -> None:
        with api.mount(place / "image", place / "mnt,:", basedirs=[place / "objects:,"]):
            held.append(open(place / "mnt,:" / "file", "rb"))  # noqa: SIM115 - closed below
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_with_an_open_file()
    assert mount_at(os.path.realpath(place / "mnt,:")) is None
    held[0].close()
