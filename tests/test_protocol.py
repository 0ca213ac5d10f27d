"""The layouts of the FUSE protocol, held against the kernel's own header where it is installed."""

from __future__ import annotations

import os
import re
import struct
from typing import TYPE_CHECKING, NamedTuple

import pytest

from cfsfuse.fuse import protocol
from cfsfuse.fuse.protocol import InitFlag, Opcode, OpenFlag

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADER = "/usr/include/linux/fuse.h"
_STRUCT = re.compile(r"struct (fuse_\w+) \{(.*?)\n\};", re.DOTALL)
_FIELD = re.compile(r"(?:u?int(\d+)_t|struct (\w+))\s+(\w+)(?:\[(\d*)\])?;")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)

ATTR = (
    *("ino", "size", "blocks", "atime", "mtime", "ctime", "atimensec", "mtimensec", "ctimensec", "mode", "nlink"),
    *("uid", "gid", "rdev", "blksize", "flags"),
)
ENTRY = (
    *("nodeid", "generation", "entry_valid", "attr_valid", "entry_valid_nsec", "attr_valid_nsec"),
    *(f"attr.{name}" for name in ATTR),
)
DIRENT = ("ino", "off", "namelen", "type")
STRUCTS = {
    "fuse_in_header": (protocol.IN_HEADER, ("len", "opcode", "unique", "nodeid", "uid", "gid", "pid")),
    "fuse_out_header": (protocol.OUT_HEADER, ("len", "error", "unique")),
    "fuse_init_out": (
        protocol.INIT_OUT,
        (
            *("major", "minor", "max_readahead", "flags", "max_background", "congestion_threshold", "max_write"),
            *("time_gran", "max_pages"),
        ),
    ),
    "fuse_read_in": (protocol.READ_IN, ("fh", "offset", "size", "read_flags")),
    "fuse_open_out": (protocol.OPEN_OUT, ("fh", "open_flags")),
    "fuse_getxattr_in": (protocol.GETXATTR_IN, ("size",)),
    "fuse_getxattr_out": (protocol.GETXATTR_OUT, ("size",)),
    "fuse_attr_out": (protocol.ATTR_OUT, ("attr_valid", "attr_valid_nsec", "dummy", *(f"attr.{n}" for n in ATTR))),
    "fuse_entry_out": (protocol.ENTRY_OUT, ENTRY),
    "fuse_dirent": (protocol.DIRENT, DIRENT),
    "fuse_direntplus": (
        protocol.DIRENTPLUS,
        (*(f"entry_out.{name}" for name in ENTRY), *(f"dirent.{name}" for name in DIRENT)),
    ),
    "fuse_kstatfs": (
        protocol.KSTATFS,
        ("blocks", "bfree", "bavail", "files", "ffree", "bsize", "namelen", "frsize"),
    ),
}


class Field(NamedTuple):
    """Where a field is in a structure, and how many bytes it has."""

    offset: int
    size: int


class Header:
    """What the kernel's header says of structures and numbers."""

    def __init__(self, text: str) -> None:
        text = _COMMENT.sub("", text)
        self._bodies = dict(_STRUCT.findall(text))
        self.numbers = {name: int(value) for name, value in re.findall(r"(FUSE_\w+)\s*= (\d+),", text)}
        self.flags = {name: 1 << int(bit) for name, bit in re.findall(r"#define (F\w+)\s+\(1(?:ULL)? << (\d+)\)", text)}

    def fields(self, name: str) -> dict[str, Field]:
        """Return the fields of a structure, those of one inside it with its name before theirs."""
        return dict(self._walk(name, 0, ""))

    def size(self, name: str) -> int:
        last = max(self.fields(name).values())
        return last.offset + last.size

    def _walk(self, name: str, offset: int, prefix: str) -> Iterator[tuple[str, Field]]:
        for bits, inner, field, count in _FIELD.findall(self._bodies[name]):
            if inner:
                yield from self._walk(inner, offset, f"{prefix}{field}.")
                offset += self.size(inner)
                continue
            size = int(bits) // 8 * int(count or 1)
            yield prefix + field, Field(offset, size)
            offset += size


@pytest.fixture(scope="module")
def header() -> Header:
    if not os.path.exists(HEADER):
        pytest.skip(f"{HEADER}: not installed")
    with open(HEADER, encoding="utf-8") as file:
        return Header(file.read())


def laid_out(layout: struct.Struct) -> list[Field]:
    """Return where a layout has its values."""
    found, offset = [], 0
    for count, code in re.findall(r"(\d*)([a-zA-Z])", layout.format):
        size = struct.calcsize("=" + code)
        if code == "x":
            offset += int(count or 1)
            continue
        for _ in range(int(count or 1)):
            found.append(Field(offset, size))
            offset += size
    return found


@pytest.mark.parametrize("name", STRUCTS)
def test_layouts_are_the_kernels(header: Header, name: str) -> None:
    layout, names = STRUCTS[name]
    fields = header.fields(name)
    expected = [fields[each] for each in names]
    found = laid_out(layout)[: len(expected)]  # of later versions, the rest of padding has names
    assert found == expected
    assert layout.size == header.size(name)


def test_what_is_read_of_init_is_at_its_beginning(header: Header) -> None:
    """The kernel's message has grown, and may grow."""
    fields = header.fields("fuse_init_in")
    expected = [fields[name] for name in ("major", "minor", "max_readahead", "flags")]
    assert laid_out(protocol.INIT_IN) == expected
    assert protocol.INIT_IN.size <= header.size("fuse_init_in")


def test_opcodes_are_the_kernels(header: Header) -> None:
    assert {opcode.name: opcode.value for opcode in Opcode} == {
        opcode.name: header.numbers[f"FUSE_{opcode.name}"] for opcode in Opcode
    }


@pytest.mark.parametrize(("flags", "prefix"), [(InitFlag, "FUSE_"), (OpenFlag, "FOPEN_")])
def test_flags_are_the_kernels(header: Header, flags: type[InitFlag | OpenFlag], prefix: str) -> None:
    assert {flag.name: flag.value for flag in flags} == {
        flag.name: header.flags[f"{prefix}{flag.name}"] for flag in flags
    }


def test_a_difference_would_be_found(header: Header) -> None:
    assert header.fields("fuse_attr_out")["attr.mode"] == Field(16 + 60, 4)
    assert laid_out(struct.Struct("=Q2xIq")) == [
        Field(0, 8),
        Field(10, 4),
        Field(14, 8),
    ]
    assert (header.size("fuse_entry_out"), header.size("fuse_kstatfs")) == (128, 80)
