"""The first file system of a guest, a cpio archive: busybox, modules of a kernel, and `init` beside this file.

https://docs.kernel.org/driver-api/early-userspace/buffer-format.html
"""

from __future__ import annotations

import glob
import lzma
import os
import re
import stat
from typing import NamedTuple

_INIT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "init")
_DIRECTORIES = ("bin", "changes", "dev", "host", "modules", "proc", "root", "sys")
# What a guest needs of its kernel: its devices, its root, its disk, and what is tested. The first is asked for by
# others, by name, at run time: no dependency of theirs tells.
_MODULES = ("crc32c_generic", "virtio_pci", "virtio_blk", "virtiofs", "fuse", "overlay", "loop", "erofs", "ext4")
_MODULE_NAME = re.compile(r"(?P<name>.+)\.ko(?P<packed>\.\w+)?")
_DEPENDS = re.compile(rb"\0depends=([^\0]*)")
_SOFT_DEPENDS = re.compile(rb"\0softdep=pre: ([^\0]*?)(?: post:[^\0]*)?(?=\0)")
_ALIGNMENT = 4


class _Entry(NamedTuple):
    path: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def initramfs(kernel: str, busybox: str) -> bytes:
    """Return the archive for the kernel whose packages are unpacked at `kernel`."""
    entries = [_Entry(path, stat.S_IFDIR | 0o755) for path in _DIRECTORIES]
    entries.append(_Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)))
    entries += [_executable("bin/busybox", _content(busybox)), _executable("init", _content(_INIT))]
    # In this order they load: init takes them as the names sort.
    for number, (name, module) in enumerate(_modules(kernel).items()):
        entries.append(_Entry(f"modules/{number:02}-{name}", stat.S_IFREG | 0o644, module))
    return _archive(entries)


def with_script(archive: bytes, script: bytes) -> bytes:
    """Return an archive that has `script` as well: the kernel unpacks one archive after the other."""
    return archive + _archive([_executable("script", script)])


def _executable(path: str, content: bytes) -> _Entry:
    return _Entry(path, stat.S_IFREG | 0o755, content)


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _modules(kernel: str) -> dict[str, bytes]:
    """Return the modules to load, each after those that it needs. What is no file is built in, or is not there."""
    files = _module_files(kernel)
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in ordered or name not in files:
            return
        module = _unpacked(files[name])
        for found in (*_DEPENDS.findall(module), *_SOFT_DEPENDS.findall(module)):
            for needed in re.split(r"[ ,]+", found.decode()):
                add(_plain(needed))
        ordered[name] = module

    for name in _MODULES:
        add(name)
    return ordered


def _module_files(kernel: str) -> dict[str, str]:
    files = {}
    for path in glob.glob(os.path.join(kernel, "**/lib/modules/**/*.ko*"), recursive=True):
        match = _MODULE_NAME.fullmatch(os.path.basename(path))
        if match is not None:
            files[_plain(match["name"])] = path
    return files


def _plain(name: str) -> str:
    return name.replace("-", "_")


def _unpacked(path: str) -> bytes:
    content = _content(path)
    return lzma.decompress(content) if path.endswith(".xz") else content


def _archive(entries: list[_Entry]) -> bytes:
    archive = bytearray()
    for number, entry in enumerate([*entries, _Entry("TRAILER!!!", 0)], 1):
        name = entry.path.encode() + b"\0"
        sizes = (len(entry.content), 0, 0, *entry.device, len(name), 0)
        fields = (number, entry.mode, 0, 0, 1, 0, *sizes)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields)
        for part in (name, entry.content):
            archive += part
            archive += bytes(-len(archive) % _ALIGNMENT)
    return bytes(archive)
