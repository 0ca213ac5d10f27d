"""What is mounted where."""

from __future__ import annotations

import builtins
import io
import os
from typing import TYPE_CHECKING, Any

import pytest

from cfsfuse.mount.mountinfo import Mount, mount_at, users

if TYPE_CHECKING:
    from pathlib import Path

MOUNTINFO = rb"""22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:28 / /mnt ro,nosuid shared:1 - fuse.cfsfuse /a.cfs ro,user_id=0
31 22 0:29 / /with\040space\134and\012line rw master:1 propagate_from:2 - fuse.cfsfuse /i\040m.cfs ro
32 30 0:30 / /mnt ro - tmpfs tmpfs rw
33 22 0:31 / /mnt/below ro - proc proc rw
"""


@pytest.fixture
def mountinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.open

    def fake(path: Any, *arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401 - passed on as it is
        if path == "/proc/self/mountinfo":
            return io.BytesIO(MOUNTINFO)
        return original(path, *arguments, **keywords)

    monkeypatch.setattr(builtins, "open", fake)


def test_topmost_mount_of_a_path(mountinfo: None) -> None:
    assert mount_at("/") == Mount("/", "ext4", "/dev/vda", "254:0")
    assert mount_at("/mnt") == Mount("/mnt", "tmpfs", "tmpfs", "0:30")
    assert mount_at("/with space\\and\nline") == Mount("/with space\\and\nline", "fuse.cfsfuse", "/i m.cfs", "0:29")
    assert mount_at("/mnt/below") is not None
    for path in ("/m", "/mnt/", "/mnt/none", ""):
        assert mount_at(path) is None


def test_mounts_of_images_are_told_from_others() -> None:
    ours = [("fuse.cfsfuse", "/a.cfs"), ("fuse.cfsfuse", "composefs"), ("overlay", "composefs")]
    others = [("overlay", "overlay"), ("erofs", "composefs"), ("fuse.other", "composefs")]
    assert [kind for kind in ours + others if Mount("/m", *kind, "0:1").is_composefs] == ours


def test_real_mountinfo_has_the_root() -> None:
    found = mount_at("/proc")
    assert found is not None
    assert found.fstype == "proc"


def test_users_of_a_directory_are_named(tmp_path: Path) -> None:
    folder = tmp_path.resolve()
    assert users(str(folder)) == []
    (folder / "file").write_bytes(b"x")
    with open(folder / "file", "rb"):
        (user,) = users(str(folder))
        assert user.endswith(f" ({os.getpid()})")
        assert users(str(folder) + "-other") == []
    assert users(str(folder)) == []
