"""The public API: the examples of its documentation, and what they leave out."""

from __future__ import annotations

import io
import os
import re
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from cfsfuse import api
from cfsfuse.errors import (
    DumpError,
    HostError,
    ImageDigestMismatch,
    ImageError,
    ObjectMissing,
    ObjectUnusable,
    PathNotFound,
    SourceError,
    TreeError,
    UsageError,
)
from tests import imagemaker as im
from tests.cli_support import write_image
from tests.support import HERE, VECTORS, random_bytes, sample, vector

if TYPE_CHECKING:
    from pathlib import Path

DOCUMENT = os.path.join(HERE, os.pardir, "docs", "api.md")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def examples() -> list[str]:
    """Return the examples of the documentation that need no mount, each on the lines that it has there."""
    with open(DOCUMENT, encoding="utf-8") as file:
        text = file.read()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in found]


def test_the_examples_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "examples"
    place.mkdir()
    monkeypatch.chdir(place)
    assert len(examples()) > 5
    namespace: dict[str, object] = {}
    for example in examples():
        exec(compile(example, DOCUMENT, "exec"), namespace)  # noqa: S102 - our own documentation
    assert not [name for name in os.listdir(place / "objects") if name.endswith(".tmp")]


def test_the_documentation_names_everything() -> None:
    with open(DOCUMENT, encoding="utf-8") as file:
        text = file.read()
    assert [name for name in api.__all__ if name not in text] == []
    assert all(hasattr(api, name) for name in api.__all__)
    assert all(getattr(api, name).__doc__ for name in api.__all__)


def test_importing_it_imports_little() -> None:
    script = "import sys, cfsfuse.api; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"trio", "pyfuse3", "rich", "argparse", "asyncio", "cryptography"}


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "large").write_bytes(random_bytes(3 << 20))

    def use() -> None:
        api.build(tmp_path / "tree", tmp_path / "image", store=tmp_path / "objects", trees=False)
        with api.open_image(tmp_path / "image", basedirs=[tmp_path / "objects"]) as image:
            image.read("/large")

    use()
    before = os.listdir("/proc/self/fd")
    use()
    assert os.listdir("/proc/self/fd") == before


# Reading


@pytest.mark.parametrize("name", VECTORS)
def test_a_tree_out_of_an_image_is_that_of_its_dump(name: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(vector(f"{name}.cfs.gz"))
    with api.open_image(path) as image:
        text = b"".join(image.dump())
        root = image.tree()
    assert text == vector(f"{name}.redump.gz")
    assert b"".join(api.dump(root)) == text
    assert b"".join(api.dump(api.parse_dump(io.BytesIO(text)))) == text
    assert api.build(root).digest == api.build(api.parse_dump(text)).digest


def test_walks_start_anywhere(tmp_path: Path) -> None:
    image_path = tmp_path / "image"
    image_path.write_bytes(sample().content())
    with api.open_image(os.fsencode(image_path)) as image:
        assert image.version == 1
        paths = [path for path, _ in image.walk()]
        assert paths[0] == b"/"
        assert [path for path in paths if path.startswith(b"/dir")] == [path for path, _ in image.walk("/dir")]
        assert [path for path, _ in image.walk("/compact dir")][:2] == [b"/compact dir", b"/compact dir/deep"]
        assert [path for path, _ in image.walk(b"/link")] == [b"/link"]
        assert [name for name, _ in image.children("compact dir")] == [b"deep"]
        with pytest.raises(UsageError, match="not a directory"):
            list(image.children("/old"))
        with pytest.raises(PathNotFound):
            list(image.walk("/absent"))


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    large = random_bytes(3_000_001)
    base = tmp_path / "objects"
    base.mkdir()
    with api.StoreWriter(str(base)) as store:
        root = api.directory({"large": api.file(large, store), "small": api.file(b"small"), "l": api.symlink("large")})
        api.build(root, tmp_path / "image", store=store)
    with api.open_image(tmp_path / "image", basedirs=[base]) as image:
        assert image.read("/large") == image.read("l") == large
        assert [len(piece) for piece in image.chunks("/large")] == [1 << 20, 1 << 20, 3_000_001 - (2 << 20)]
        assert image.read(b"/small") == b"small"
        with pytest.raises(UsageError, match="not a regular file"):
            image.read("/")
    sparse = write_image(tmp_path / "i", {b"sparse": im.file(layout=im.CHUNKED, size=5000, i_u=31)})
    with api.open_image(sparse) as image:
        assert image.read("/sparse") == bytes(5000)


def test_verification_is_chosen(tmp_path: Path) -> None:
    base = tmp_path / "objects"
    (base / "aa").mkdir(parents=True)
    (base / "aa" / "wrong").write_bytes(b"12345")
    entries = {b"wrong": im.external(5, b"aa/wrong", b"\1" * 32), b"any": im.external(5, b"aa/wrong", None)}
    path = write_image(tmp_path / "image", entries)
    with api.open_image(path, basedirs=[base], verification=api.Verification.OFF) as image:
        assert image.read("/wrong") == b"12345"
    with (
        api.open_image(path, basedirs=[base], verification=api.Verification.REQUIRED) as image,
        pytest.raises(ObjectUnusable),
    ):
        image.read("/any")
    with api.open_image(path, basedirs=[base]) as image:
        assert image.read("/any") == b"12345"
        image.close()
        with pytest.raises(ObjectMissing):
            image.read("/any")


def test_images_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"text" * 2000)
    for name in ("text", "absent"):
        with pytest.raises(ImageError, match=f"{name}: "):
            api.open_image(tmp_path / name)
    with pytest.raises(ImageDigestMismatch):
        api.open_image(write_image(tmp_path / "image", {}), digest="AB" * 32)
    with pytest.raises(UsageError, match="base directory"):
        api.open_image(write_image(tmp_path / "image", {}), basedirs=["/absent"])


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_measure(algorithm: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    expected = {
        "sha256": "3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95",
        "sha512": "ccf9e5aea1c2a64efa2f2354a6024b90dffde6bbc017825045dce374474e13d1"
        "0adb9dadcc6ca8e17a3c075fbd31336e8f266ae6fa93a6c3bed66f9e784e5abf",
    }
    assert api.measure(tmp_path / "file", algorithm) == expected[algorithm]
    with pytest.raises(UsageError, match="md5: not an algorithm"):
        api.measure(tmp_path / "file", "md5")


# Building


def test_nodes_say_what_they_were_told(tmp_path: Path) -> None:
    hello = api.file(b"hello", uid=1, gid=2, mtime_ns=-1, mode=0o4750, xattrs={b"user.a": b"\0"})
    root = api.directory(
        {
            "a": hello,
            "b": api.directory({"c": api.link(hello)}, mode=0o1777),
            "d": api.symlink(b"to \xff", uid=3),
            "e": api.device(stat.S_IFBLK, os.makedev(8, 300), gid=6, mode=0o640),
            "f": api.device(stat.S_IFIFO),
        }
    )
    api.build(root, tmp_path / "image")
    with api.open_image(tmp_path / "image") as image:
        found = dict(image.walk())
    assert found[b"/"].stat.nlink == 3
    assert found[b"/a"] == found[b"/b/c"]
    assert found[b"/a"].stat == api.Stat(stat.S_IFREG | 0o4750, 2, 1, 2, 0, 5, -1)
    assert found[b"/a"].xattrs == {b"user.a": b"\0"}
    assert found[b"/b"].stat.mode == stat.S_IFDIR | 0o1777
    assert isinstance(found[b"/d"], api.Symlink)
    assert (found[b"/d"].target, found[b"/d"].stat.uid) == (b"to \xff", 3)
    assert found[b"/e"].stat.rdev == os.makedev(8, 300)
    assert stat.S_ISFIFO(found[b"/f"].stat.mode)


def test_files_of_any_size_come_from_open_files(tmp_path: Path) -> None:
    contents = {"empty": b"", "small": b"s" * 64, "middle": b"m" * 65, "large": random_bytes((1 << 20) + 1)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with api.StoreWriter(str(tmp_path / "objects")) as store:
        root = api.directory()
        for name in contents:
            with open(tmp_path / name, "rb") as opened:
                opened.seek(1)
                root.children[name.encode()] = api.file(opened, store, mode=0o600)
        built = api.build(root, tmp_path / "image", store=store)
    assert built.objects is not None
    assert (built.objects.new_objects, built.objects.new_trees) == (2, 1)
    with api.open_image(tmp_path / "image", basedirs=[tmp_path / "objects"]) as image:
        assert {name: image.read(name) for name in contents} == contents
        assert [type(node).__name__ for _, node in image.children()] == ["Inline", "External", "External", "Inline"]
    with open(tmp_path / "middle", "rb") as opened, pytest.raises(UsageError, match="needs a store"):
        api.file(opened)


@pytest.mark.parametrize("size", [5, 100])
def test_contents_may_be_any_bytes(size: int) -> None:
    content = b"x" * size
    expected = b"".join(api.dump(api.directory({"f": api.file(content)})))
    for same in (bytearray(content), memoryview(content), memoryview(content * 2)[::2]):
        assert b"".join(api.dump(api.directory({"f": api.file(same)}))) == expected


def test_contents_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "closed").touch()
    with open(tmp_path / "closed", "rb") as closed:
        pass
    for content in (io.BytesIO(b"x"), "text", closed):
        with pytest.raises(UsageError, match="content: neither bytes nor an open file"):
            api.file(content)  # type: ignore[arg-type]  # that is the point
    read, write = os.pipe()
    with open(read, "rb") as pipe, open(write, "wb"), pytest.raises(UsageError, match="not a regular file"):
        api.file(pipe)
    with open(tmp_path / "new", "wb") as unreadable:
        unreadable.write(b"x")
        unreadable.flush()
        with pytest.raises(SourceError, match="/new: Bad file descriptor"):
            api.file(unreadable)


def test_open_files_without_a_path(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"content")
    with open(fd, "rb") as opened:
        assert isinstance(opened.name, int)
        assert api.file(opened).node == api.file(b"content").node


@pytest.mark.parametrize("size", [5, 100])
def test_a_file_that_grows_while_it_is_added(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * size)
    fstat = os.fstat
    grown: list[int] = []  # the descriptors that saw the file as it was

    def grow(fd: int) -> os.stat_result:
        status = fstat(fd)
        if not grown and stat.S_ISREG(status.st_mode) and status.st_size == size:
            grown.append(fd)
            os.truncate(path, size + 1)
        return status

    with api.StoreWriter(str(tmp_path / "objects")) as store, open(path, "rb") as opened:
        monkeypatch.setattr(os, "fstat", grow)
        with pytest.raises(SourceError, match="file: it has changed while it was read"):
            api.file(opened, store)
    assert grown


def test_large_contents_need_no_store_to_be_named(tmp_path: Path) -> None:
    root = api.directory({"file": api.file(b"x" * 100)})
    assert api.build(root).objects is None
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(b"x" * 100)
    node = root.children[b"file"].node  # type: ignore[union-attr]  # no link
    built = api.build(tmp_path / "tree").root.children[b"file"].node  # type: ignore[union-attr]  # likewise
    assert isinstance(node, api.External)
    assert isinstance(built, api.External)
    assert (node.path, node.digest) == (built.path, built.digest)


def test_a_tree_that_no_image_can_hold_is_refused(tmp_path: Path) -> None:
    root = api.directory({"a": api.directory({"n" * 300: api.file(b"")})})
    with pytest.raises(TreeError, match="/a"):
        api.build(root, tmp_path / "image")
    assert os.listdir(tmp_path) == []


def test_a_tree_that_is_none_is_neither_walked_nor_dumped() -> None:
    root = api.directory()
    root.children[b"d"] = api.directory({"again": root})
    for use in (api.walk, api.dump):
        with pytest.raises(TreeError, match="/d/again: stands in the tree twice"):
            list(use(root))
    stray = api.directory({"l": api.link(api.file(b"elsewhere"))})
    assert len(list(api.walk(stray))) == 2
    with pytest.raises(TreeError, match="/l: a hard link to what is not in the tree"):
        list(api.dump(stray))


def test_contents_of_a_failed_build_are_not_published(tmp_path: Path) -> None:
    with api.StoreWriter(str(tmp_path / "objects")) as store:
        root = api.directory({"a" * 300: api.file(b"x" * 100, store)})
        with pytest.raises(TreeError):
            api.build(root, tmp_path / "image", store=store)
    assert os.listdir(tmp_path) == []


def test_stores_and_sources_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="StoreWriter"):
        api.build(api.directory(), store=tmp_path)
    with api.StoreWriter(str(tmp_path / "objects")) as store, pytest.raises(UsageError, match="by its path"):
        api.build(tmp_path, store=store)
    with pytest.raises(UsageError, match="format version 2"):
        api.build(tmp_path, versions=api.Versions(2, 2))


def test_progress_is_told(tmp_path: Path) -> None:
    source = tmp_path / "tree"
    source.mkdir()
    for number in range(300):
        (source / str(number)).write_bytes(b"x" * 1000)
    told: list[tuple[int, int]] = []
    api.build(source, report=lambda progress: told.append((progress.files, progress.bytes)))
    assert told[-1] == (300, 300_000)
    assert told == sorted(told)


def test_dumps_are_named(tmp_path: Path) -> None:
    with pytest.raises(DumpError, match=r"^some\.dump: line 1, column 9, size: "):
        api.parse_dump(b"nonsense\n", "some.dump")


# Mounting; integration/test_api.py mounts


def test_what_keeps_a_mount_from_being(tmp_path: Path) -> None:
    image = write_image(tmp_path / "image", {})
    with pytest.raises(ImageError):
        api.mount(tmp_path / "absent", tmp_path, basedirs=[tmp_path])
    with pytest.raises(ImageDigestMismatch):
        api.mount(image, tmp_path, basedirs=[tmp_path], digest="ab" * 32)
    with pytest.raises(UsageError, match="no base directory: name"):
        api.mount(image, tmp_path, basedirs=[])
    with pytest.raises(UsageError, match="unknown option 'nonsense'"):
        api.mount(image, tmp_path, basedirs=[tmp_path], options="nonsense")
    with pytest.raises((UsageError, HostError)):
        api.mount(image, tmp_path / "absent", basedirs=[f"{tmp_path}"])
