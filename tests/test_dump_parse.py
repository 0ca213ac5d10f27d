"""composefs-dump(5) text becomes the tree that it describes, or an error that says what is wrong and where."""

from __future__ import annotations

import csv
import gc
import io
import os
import re
import tracemalloc
from typing import TYPE_CHECKING, BinaryIO, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfsfuse.dump import line, parse
from cfsfuse.dumpparser import FIELDS, LINE_MAX, PAYLOAD_MAX, XATTRS_TEXT_MAX
from cfsfuse.erofs.contents import FILE_MAX
from cfsfuse.erofs.overlay import Digest
from cfsfuse.erofs.writer import INLINE_MAX
from cfsfuse.errors import DumpError
from cfsfuse.tree import Device, Directory, Entry, External, Inline, Link, Node, Stat, Symlink
from tests.support import HERE, python_image, time_limit, vector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

MALFORMED = os.path.join(HERE, "data", "malformed-dumps")
VECTORS = (
    *("corners.dump", "corners.redump", "whiteouts.dump", "whiteouts.redump"),
    *("random-11.dump", "random-12.dump", "random-12.redump", "random-13.dump"),
)
ROOT = b"/ 0 40755 2 0 0 0 0.0 - - -\n"
DIRECTORY = Directory(Stat(0o40755, 2, 0, 0, 0, 0, 0), {})
TYPES = (0o10000, 0o20000, 0o40000, 0o60000, 0o100000, 0o120000, 0o140000)


def parsed(text: bytes) -> Entry:
    return parse(io.BytesIO(text))


def failure(text: bytes) -> DumpError:
    with pytest.raises(DumpError) as caught:
        parsed(text)
    return caught.value


def found(root: Entry, path: bytes) -> Entry | Link:
    entry: Entry | Link = root
    for name in path.split(b"/")[1:] if path != b"/" else ():
        assert isinstance(entry, Entry)
        entry = entry.children[name]
    return entry


def only_node(text: bytes) -> Node:
    """Return the node of a line, given without its path."""
    (entry,) = parsed(ROOT + b"/p " + text).children.values()
    assert isinstance(entry, Entry)
    return entry.node


def placed(root: Entry) -> Iterator[tuple[bytes, Entry | Link]]:
    """Yield the paths and entries of a tree, parents first."""
    left: list[tuple[bytes, Entry | Link]] = [(b"/", root)]
    while left:
        path, entry = left.pop()
        yield path, entry
        if isinstance(entry, Entry):
            left += reversed([(path.rstrip(b"/") + b"/" + name, child) for name, child in entry.children.items()])


def dumped(root: Entry) -> Iterator[bytes]:
    """Yield the dump of a tree."""
    paths = {entry: path for path, entry in placed(root) if isinstance(entry, Entry)}
    for path, entry in placed(root):
        if isinstance(entry, Link):
            yield line(path, entry.target.node, paths[entry.target])
        else:
            yield line(path, entry.node)


# What is accepted


def regular(size: int, content: bytes) -> Inline:
    return Inline(Stat(0o100644, 1, 0, 0, 0, size, 0), {}, content)


def external(path: bytes | None, digest: Digest | None = None) -> External:
    return External(Stat(0o100644, 1, 0, 0, 0, 5, 0), {}, path, digest)


def symlink(target: bytes) -> Symlink:
    return Symlink(Stat(0o120777, 1, 0, 0, 0, len(target), 0), {}, target)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"5 100644 1 0 0 0 0.0 - hello -", regular(5, b"hello")),
        (b"5 100644 1 0 0 0 0.0 a/b hello " + b"ab" * 32, regular(5, b"hello")),
        (b"1 100644 1 0 0 0 0.0 - \\x2d -", regular(1, b"-")),
        (b"6 100644 1 0 0 0 0.0 - \\\\\\n\\r\\t\\x00\\xfF -", regular(6, b"\\\n\r\t\0\xff")),
        (b"2 100644 1 0 0 0 0.0 - \t\xff -", regular(2, b"\t\xff")),
        (b"%d 100644 1 0 0 0 0.0 - %s -" % (INLINE_MAX, b"c" * INLINE_MAX), regular(INLINE_MAX, b"c" * INLINE_MAX)),
        (b"0 100644 1 0 0 0 0.0 - - -", regular(0, b"")),
        (b"0 100644 1 0 0 0 0.0 -  -", regular(0, b"")),
        (b"0 100644 1 0 0 0 0.0 a/b - " + b"ab" * 32, regular(0, b"")),
        (b"5 100644 1 0 0 0 0.0 - - -", external(None)),
        (b"5 100644 1 0 0 0 0.0  - -", external(None)),
        (b"5 100644 1 0 0 0 0.0 a/b - -", external(b"a/b")),
        (b"5 100644 1 0 0 0 0.0 /a/b - -", external(b"/a/b")),
        (b"5 100644 1 0 0 0 0.0 \\x2d - -", external(b"-")),
        (b"5 100644 1 0 0 0 0.0 -- - -", external(b"--")),
        (b"5 100644 1 0 0 0 0.0 %s - -" % (b"p" * PAYLOAD_MAX), external(b"p" * PAYLOAD_MAX)),
        (b"5 100644 1 0 0 0 0.0 a - " + b"aB" * 32, external(b"a", Digest("sha256", b"\xab" * 32))),
        (b"5 100644 1 0 0 0 0.0 a - " + b"\\x61B" * 32, external(b"a", Digest("sha256", b"\xab" * 32))),
        (b"5 100644 1 0 0 0 0.0 - - " + b"cd" * 64, external(None, Digest("sha512", b"\xcd" * 64))),
        (b"6 120777 1 0 0 0 0.0 target - -", symlink(b"target")),
        (b"99 120777 1 0 0 0 0.0 /a\\x20b - " + b"ab" * 32, symlink(b"/a b")),
        (b"0 120777 1 0 0 0 0.0 \\x2d - -", symlink(b"-")),
        (b"4 120777 1 0 0 0 0.0 %s text -" % (b"t" * PAYLOAD_MAX), symlink(b"t" * PAYLOAD_MAX)),
        (b"9 40755 7 0 0 0 0.0 pay - -", Directory(Stat(0o40755, 7, 0, 0, 0, 9, 0), {})),
        (b"9 20644 1 0 0 259 0.0 - - -", Device(Stat(0o20644, 1, 0, 0, 259, 9, 0), {})),
        (b"0 60644 1 0 0 4294967295 0.0 - - -", Device(Stat(0o60644, 1, 0, 0, 0xFFFFFFFF, 0, 0), {})),
        (b"9 10644 1 0 0 259 0.0 - - -", Device(Stat(0o10644, 1, 0, 0, 0, 9, 0), {})),
        (b"9 140644 1 0 0 259 0.0 - - -", Device(Stat(0o140644, 1, 0, 0, 0, 9, 0), {})),
        (b"0 00107777 1 0 0 5 0.0 - - -", Inline(Stat(0o107777, 1, 0, 0, 0, 0, 0), {}, b"")),
        (
            b"18446744073709551615 40000 4294967295 4294967295 0%s 007 0.0 - - -" % (b"0" * 5000),
            Directory(Stat(0o40000, 0xFFFFFFFF, 0xFFFFFFFF, 0, 0, (1 << 64) - 1, 0), {}),
        ),
    ],
    ids=lambda value: value[:40].decode("latin-1") if isinstance(value, bytes) else type(value).__name__,
)
def test_nodes(text: bytes, expected: Node) -> None:
    assert only_node(text) == expected
    assert type(only_node(text)) is type(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"0.0", 0),
        (b"1.7", 1_000_000_007),
        (b"001.007", 1_000_000_007),
        (b"1.999999999", 1_999_999_999),
        (b"-1.0", -1_000_000_000),
        (b"-5.7", -4_999_999_993),
        (b"-0.7", 7),
        (b"9223372036854775807.999999999", (1 << 63) * 10**9 - 1),
        (b"-9223372036854775808.0", -(1 << 63) * 10**9),
    ],
)
def test_times(text: bytes, expected: int) -> None:
    node = only_node(b"0 10644 1 0 0 0 %s - - -" % text)
    assert node.stat.mtime_ns == expected
    assert only_node(line(b"/p", node).removeprefix(b"/p ")) == node


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", {}),
        (b" ", {}),
        (b" user.a=", {b"user.a": b""}),
        (b" user.a=1 ", {b"user.a": b"1"}),
        (b" user.a=1 user.b=2", {b"user.a": b"1", b"user.b": b"2"}),
        (b" user.a=1 user.b=2 user.a=3", {b"user.a": b"3", b"user.b": b"2"}),
        (b" user\\x3d\\x20=\\x00=\\\\=", {b"user= ": b"\0=\\="}),
        (b" " + b"n" * 255 + b"=", {b"n" * 255: b""}),
        (b" u=" + b"v" * 32747, {b"u": b"v" * 32747}),  # what an image takes, with the name and all that counts
    ],
    ids=lambda value: str(value)[:40],
)
def test_xattrs(text: bytes, expected: dict[bytes, bytes]) -> None:
    assert only_node(b"0 10644 1 0 0 0 0.0 - - -" + text).xattrs == expected


def test_paths() -> None:
    names = [b"a b", b"...", b"-", b"\\", b"\n", b"\xff" * 255, b"c"]
    root = parsed(
        ROOT
        + b"".join(line(b"/" + name, DIRECTORY) for name in names)
        + b"".join(line(b"/%s/%s" % (name, name), DIRECTORY) for name in reversed(names))
        + b"/raw\t\xe9 0 40755 2 0 0 0 0.0 - - -\n"
        + b"/c\\x2fescaped 0 40755 2 0 0 0 0.0 - - -"
    )
    assert list(root.children) == [*names, b"raw\t\xe9"]
    for name in names[:-1]:
        assert list(cast("Entry", root.children[name]).children) == [name]
    assert list(cast("Entry", root.children[b"c"]).children) == [b"c", b"escaped"]


def test_a_new_entry_is_seen_wherever_the_last_one_was() -> None:
    """The parser keeps the last entry's directory at hand."""
    paths = [b"/a", b"/b", b"/a/x", b"/b/x", b"/a/y", b"/c", b"/a/x/z", b"/a/x/w"]
    root = parsed(ROOT + b"".join(line(path, DIRECTORY) for path in paths))
    assert {path for path, _ in placed(root)} == {b"/", *paths}


@pytest.mark.parametrize("last", [b"\n", b""])
def test_the_last_newline_may_be_missing(last: bytes) -> None:
    assert parsed(ROOT + b"/p 2 100644 1 0 0 0 0.0 - ab -" + last).children
    assert only_node(b"0 10644 1 0 0 0 0.0 - - - user.a=1" + last).xattrs == {b"user.a": b"1"}


def test_equal_xattrs_are_kept_once() -> None:
    text = b" 0 10644 1 0 0 0 0.0 - - - security.selinux=label\\x00\n"
    one, two = parsed(ROOT + b"/a" + text + b"/b" + text).children.values()
    assert isinstance(one, Entry)
    assert isinstance(two, Entry)
    assert one.node.xattrs is two.node.xattrs


# Hard links


FILE = b"/f 1 100644 2 0 0 0 0.0 - x -\n"
FOLDER = b"/d 0 40755 2 0 0 0 0.0 - - -\n"


def link(path: bytes, target: bytes) -> bytes:
    return b"%s 0 @100644 1 0 0 0 0.0 %s - -\n" % (path, target)


@pytest.mark.parametrize(
    ("text", "links"),
    [
        (FILE + link(b"/l", b"/f"), [b"/l"]),
        (link(b"/l", b"/f") + FILE, [b"/l"]),
        (FOLDER + link(b"/d/l", b"/f") + FILE, [b"/d/l"]),
        (link(b"/l", b"/k") + FILE + link(b"/k", b"/f"), [b"/l", b"/k"]),
        (FILE + link(b"/k", b"/f") + link(b"/l", b"/k"), [b"/l", b"/k"]),
        (link(b"/l", b"/k") + link(b"/k", b"/m") + link(b"/m", b"/f") + FILE, [b"/l", b"/k", b"/m"]),
        (link(b"/m", b"/f") + link(b"/k", b"/m") + link(b"/l", b"/k") + FILE, [b"/l", b"/k", b"/m"]),
        (link(b"/l", b"\\x2ff") + FILE.removesuffix(b"\n"), [b"/l"]),
        (FILE + b"/l size @0140000 n u g r m /f c d x", [b"/l"]),
        (FILE + b"/l  @20000      /f    = \\q=", [b"/l"]),
    ],
)
def test_hard_links(text: bytes, links: list[bytes]) -> None:
    root = parsed(ROOT + text)
    target = root.children[b"f"]
    assert isinstance(target, Entry)
    for path in links:
        assert found(root, path) == Link(target)


def test_long_chains_of_hard_links() -> None:
    """Neither recursion nor a second walk over what is known."""
    count = 20_000
    forward = b"".join(link(b"/%d" % number, b"/%d" % (number + 1)) for number in range(count))
    backward = b"".join(link(b"/b%d" % (number + 1), b"/b%d" % number) for number in range(count))
    with time_limit(20):
        root = parsed(ROOT + forward + FILE.replace(b"/f", b"/%d" % count) + link(b"/b0", b"/0") + backward)
    assert {child for child in root.children.values() if isinstance(child, Link)} == {
        Link(cast("Entry", root.children[b"%d" % count]))
    }


def test_looking_for_targets_leaves_the_place_of_entries() -> None:
    """A target that is not there yet, in a directory that is there or not."""
    text = ROOT + FOLDER + link(b"/d/l", b"/d/e/e/f") + FILE + link(b"/k", b"/d/e/f") + line(b"/e", DIRECTORY)
    text += line(b"/d/e", DIRECTORY) + link(b"/e/l", b"/d/e/f") + line(b"/e/e", DIRECTORY) + line(b"/d/e/e", DIRECTORY)
    text += FILE.replace(b"/f", b"/d/e/f") + FILE.replace(b"/f", b"/d/e/e/f")
    root = parsed(text)
    assert {path for path, _ in placed(root)} == {text_line.split(b" ")[0] for text_line in text.splitlines()}
    assert found(root, b"/d/l") == Link(cast("Entry", found(root, b"/d/e/e/f")))
    assert found(root, b"/k") == found(root, b"/e/l") == Link(cast("Entry", found(root, b"/d/e/f")))


def test_a_target_may_be_as_long_as_any_path() -> None:
    path = b""
    text = ROOT
    for _ in range(30):
        path += b"/" + b"n" * 255
        text += line(path, DIRECTORY)
    text += line(path + b"/f", regular(1, b"x")) + link(b"/l", path + b"/f")
    root = parsed(text)
    assert root.children[b"l"] == Link(cast("Entry", found(root, path + b"/f")))


# What is refused. A caret stands before the byte that the error is to name.


@pytest.mark.parametrize(
    ("text", "field", "reason"),
    [
        # fields
        (b"^", "path", "the line is empty"),
        (b"^\n/p 0 40755 2 0 0 0 0.0 - - -", "path", "the line is empty"),
        (b"/p^", "size", "missing"),
        (b"/p ^", "mode", "missing"),
        (b"/p 0 40755 2 0 0 0 0.0 - -^", "digest", "missing"),
        (b"/p 0 40755 2 0 0 0 0.0 - -^\n", "digest", "missing"),
        (b"/p 0 40755 2 0 0 0 0.0 - - ^", "digest", "hexadecimal"),
        (b"/p ^ 0 40755 2 0 0 0 0.0 - - -", "size", "not a decimal number"),
        (b"/p 0 40755 2 0 0 0 0.0 - - - ^ user.a=1", "xattrs", "KEY=VALUE"),
        (b"/p\t0\t40755\t2\t0\t0\t0\t0.0\t-\t-\t-^", "size", "missing"),
        (b"/p^\0 0 40755 2 0 0 0 0.0 - - -", "path", "NUL"),
        (b"/p 0 40755 2 0 0 0 0.0 - ^\0 -", "content", "NUL"),
        (b"/p 0 40755 2 0 0 0 0.0 - - - a=b c=^\0", "xattrs", "NUL"),
        (b"/p 0 @100644 2 0 0 0 0.0 /f - - junk^\0", "xattrs", "NUL"),
        (b"^\0", "path", "NUL"),
        # escapes
        (b"/p^\\ 0 40755 2 0 0 0 0.0 - - -", "path", "escape"),
        (b"/p\\\\^\\q 0 40755 2 0 0 0 0.0 - - -", "path", "escape"),
        (b"/p^\\x 0 40755 2 0 0 0 0.0 - - -", "path", "escape"),
        (b"/p^\\x2 0 40755 2 0 0 0 0.0 - - -", "path", "escape"),
        (b"/p^\\x2g 0 40755 2 0 0 0 0.0 - - -", "path", "escape"),
        (b"/p^\\X20 0 40755 2 0 0 0 0.0 - - -", "path", "escape"),
        (b"/p^\\040 0 40755 2 0 0 0 0.0 - - -", "path", "escape"),
        (b"/p^\\u0041 0 40755 2 0 0 0 0.0 - - -", "path", "escape"),
        (b"/p^\\N{BELL} 0 40755 2 0 0 0 0.0 - - -", "path", "escape"),
        (b"/p 1 120777 2 0 0 0 0.0 \\x41^\\a - -", "payload", "escape"),
        (b"/p 1 100644 2 0 0 0 0.0 - ^\\' -", "content", "escape"),
        (b"/p 1 100644 2 0 0 0 0.0 - - ^\\", "digest", "escape"),
        (b"/p 0 40755 2 0 0 0 0.0 - - - user.a=1 us\\t^\\er=1", "xattrs", "escape"),
        (b"/p 0 40755 2 0 0 0 0.0 - - - user.a=1 user.b=\\n^\\1", "xattrs", "escape"),
        (b"/p ^\\x30 40755 2 0 0 0 0.0 - - -", "size", "not a decimal number"),
        # path
        (b"^p 0 40755 2 0 0 0 0.0 - - -", "path", "not an absolute path"),
        (b"^d/p 0 40755 2 0 0 0 0.0 - - -", "path", "not an absolute path"),
        (b"^ 0 40755 2 0 0 0 0.0 - - -", "path", "not an absolute path"),
        (b"^- 0 40755 2 0 0 0 0.0 - - -", "path", "not an absolute path"),
        (b"^/ 0 40755 2 0 0 0 0.0 - - -", "path", "earlier line, too"),
        (b"^/d 0 40755 2 0 0 0 0.0 - - -", "path", "earlier line, too"),
        (b"^/d/f 0 40755 2 0 0 0 0.0 - - -", "path", "earlier line, too"),
        (b"^/d/f 0 @100644 2 0 0 0 0.0 /f - -", "path", "earlier line, too"),
        (b"^/l 0 40755 2 0 0 0 0.0 - - -", "path", "earlier line, too"),
        (b"^//p 0 40755 2 0 0 0 0.0 - - -", "path", "empty name"),
        (b"^/d//p 0 40755 2 0 0 0 0.0 - - -", "path", "empty name"),
        (b"^/d/ 0 40755 2 0 0 0 0.0 - - -", "path", "empty name"),
        (b"^/p/ 0 40755 2 0 0 0 0.0 - - -", "path", "empty name"),
        (b"^// 0 40755 2 0 0 0 0.0 - - -", "path", "empty name"),
        (b"^/. 0 40755 2 0 0 0 0.0 - - -", "path", r"empty name, \. or \.\."),
        (b"^/d/.. 0 40755 2 0 0 0 0.0 - - -", "path", r"empty name, \. or \.\."),
        (b"^/d/./p 0 40755 2 0 0 0 0.0 - - -", "path", r"empty name, \. or \.\."),
        (b"^/d/../p 0 40755 2 0 0 0 0.0 - - -", "path", r"empty name, \. or \.\."),
        (b"^/d/%s 0 40755 2 0 0 0 0.0 - - -" % (b"n" * 256), "path", "256 bytes; 255"),
        (b"^/%s/p 0 40755 2 0 0 0 0.0 - - -" % (b"n" * 256), "path", "256 bytes; 255"),
        (b"^/p/q 0 40755 2 0 0 0 0.0 - - -", "path", "in no directory of an earlier line"),
        (b"^/d/p/q 0 40755 2 0 0 0 0.0 - - -", "path", "in no directory of an earlier line"),
        (b"^/f/p 0 40755 2 0 0 0 0.0 - - -", "path", "in no directory of an earlier line"),
        (b"^/l/p 0 40755 2 0 0 0 0.0 - - -", "path", "in no directory of an earlier line"),
        (b"^/f/p/q 0 40755 2 0 0 0 0.0 - - -", "path", "in no directory of an earlier line"),
        (b"^/p\\x00 0 40755 2 0 0 0 0.0 - - -", "path", "NUL"),
        # numbers
        *(
            (b"/p ^%s 40755 2 0 0 0 0.0 - - -" % number, "size", "not a decimal number")
            for number in (b"-1", b"+1", b"1_0", b"\t1", b"1\r", b"0x1", b"1.", b"\xd9\xa1", b"-", b"\x85")
        ),
        (b"/p ^18446744073709551616 40755 2 0 0 0 0.0 - - -", "size", "more than 18446744073709551615"),
        (b"/p ^%s 40755 2 0 0 0 0.0 - - -" % (b"9" * 9999), "size", "more than 18446744073709551615"),
        (b"/p 0 40755 ^4294967296 0 0 0 0.0 - - -", "nlink", "more than 4294967295"),
        (b"/p 0 40755 2 ^4294967296 0 0 0.0 - - -", "uid", "more than 4294967295"),
        (b"/p 0 40755 2 0 ^4294967296 0 0.0 - - -", "gid", "more than 4294967295"),
        (b"/p 0 40755 2 0 0 ^4294967296 0.0 - - -", "rdev", "more than 4294967295"),
        (b"/p 0 40755 ^x 0 0 0 0.0 - - -", "nlink", "not a decimal number"),
        (b"/p 0 40755 2 ^-1 0 0 0.0 - - -", "uid", "not a decimal number"),
        (b"/p 0 40755 2 1 ^ 0 0.0 - - -", "gid", "not a decimal number"),
        (b"/p 0 40755 2 1 0 ^? 0.0 - - -", "rdev", "not a decimal number"),
        *(
            (b"/p 0 ^%s 2 0 0 0 0.0 - - -" % mode, "mode", "octal number of a file type")
            for mode in (b"", b"-", b"755", b"0", b"40788", b"0o40755", b"+40755", b"4_0755", b"240755", b"170000")
        ),
        *((b"/p 0 ^%o 2 0 0 0 0.0 - - -" % (kind << 12), "mode", "file type") for kind in (0, 3, 5, 7, 9, 11, 13, 15)),
        (b"/p 0 ^%s 2 0 0 0 0.0 - - -" % (b"7" * 9999), "mode", "file type"),
        *(
            (b"/p 0 40755 2 0 0 0 ^%s - - -" % time, "mtime", "SECONDS.NANOSECONDS")
            for time in (b"", b"0", b"0.", b".0", b"-.0", b"+1.0", b"--1.0", b"1.-1", b"1.0.0", b"1,0", b"1.0_0", b"-")
        ),
        (b"/p 0 40755 2 0 0 0 0.^1000000000 - - -", "mtime", "more than 999999999"),
        (b"/p 0 40755 2 0 0 0 ^9223372036854775808.0 - - -", "mtime", "more than 9223372036854775807"),
        (b"/p 0 40755 2 0 0 0 -^9223372036854775809.0 - - -", "mtime", "more than 9223372036854775808"),
        # payload, content, digest
        (b"/p 0 120777 2 0 0 0 0.0 ^- - -", "payload", "needs a target"),
        (b"/p 0 120777 2 0 0 0 0.0 ^ - -", "payload", "needs a target"),
        (b"/p 0 120777 2 0 0 0 0.0 ^a\\x00b - -", "payload", "NUL"),
        (b"/p 5 100644 2 0 0 0 0.0 ^a\\x00b - -", "payload", "NUL"),
        (b"/p 0 120777 2 0 0 0 0.0 ^%s - -" % (b"t" * 4096), "payload", "4096 bytes; 4095"),
        (b"/p 5 100644 2 0 0 0 0.0 ^%s - -" % (b"t" * 4096), "payload", "4096 bytes; 4095"),
        *(
            (b"/p 4 %o 2 0 0 0 0.0 x ^hello -" % (kind | 0o644), "content", "5 bytes, where size says 4")
            for kind in TYPES
        ),
        (b"/p 1 100644 2 0 0 0 0.0 - ^ -", "content", "0 bytes, where size says 1"),
        (b"/p 5001 100644 2 0 0 0 0.0 - ^%s -" % (b"c" * 5001), "content", "5001 bytes; 5000"),
        *(
            (b"/p 1 %o 2 0 0 0 0.0 x - ^%s" % (kind | 0o644, digest), "digest", "64 nor 128 hexadecimal")
            for kind in TYPES
            for digest in (b"ab", b"ab" * 31, b"ab" * 32 + b"a", b"gg" * 32, b"ab" * 48, b"ab" * 65, b"\\x2d", b"\xff")
        ),
        (b"/p 0 40755 2 0 0 0 0.0 - - ^-\r\n", "digest", "hexadecimal"),
        # xattrs
        (b"/p 0 40755 2 0 0 0 0.0 - - - ^user.a", "xattrs", "KEY=VALUE"),
        (b"/p 0 40755 2 0 0 0 0.0 - - - user.a=1 ^user.b", "xattrs", "KEY=VALUE"),
        (b"/p 0 40755 2 0 0 0 0.0 - - - user.a=1 ^ user.b=1", "xattrs", "KEY=VALUE"),
        (b"/p 0 40755 2 0 0 0 0.0 - - - user.a=1 ^ ", "xattrs", "KEY=VALUE"),
        (b"/p 0 40755 2 0 0 0 0.0 - - - ^ ", "xattrs", "KEY=VALUE"),
        (b"/p 0 40755 2 0 0 0 0.0 - - - ^=1", "xattrs", "KEY=VALUE"),
        (b"/p 0 40755 2 0 0 0 0.0 - - - a=\\n ^%s=1" % (b"n" * 256), "xattrs", "1 to 255 bytes"),
        (b"/p 0 40755 2 0 0 0 0.0 - - - ^user\\x00=1", "xattrs", "NUL"),
        (b"/p 0 40755 2 0 0 0 0.0 - - - ^u=%s" % (b"v" * (XATTRS_TEXT_MAX - 1)), "xattrs", "65536 bytes; 65535"),
        (b"/p 0 40755 2 0 0 0 0.0 - - - ^u=%s" % (b"v" * 32748), "xattrs", "xattrs of 32768 bytes"),
        (b"/p ^9007199254740993 100644 1 0 0 0 0.0 - - -", "size", "a file of 9007199254740993 bytes"),
        # hard links
        (b"/p 0 @^ 2 0 0 0 0.0 /f - -", "mode", "octal number of a file type"),
        (b"/p 0 @^644 2 0 0 0 0.0 /f - -", "mode", "octal number of a file type"),
        (b"/p 0 @^@100644 2 0 0 0 0.0 /f - -", "mode", "octal number of a file type"),
        (b"/p 0 ^@40755 2 0 0 0 0.0 /f - -", "mode", "a directory cannot be a hard link"),
        (b"/ 0 ^@100644 2 0 0 0 0.0 /f - -", "mode", "octal number of a file type"),
        (b"/p 0 @100644 2 0 0 0 0.0 ^- - -", "payload", "needs the absolute path"),
        (b"/p 0 @100644 2 0 0 0 0.0 ^ - -", "payload", "needs the absolute path"),
        (b"/p 0 @100644 2 0 0 0 0.0 ^f - -", "payload", "needs the absolute path"),
        (b"/p 0 @100644 2 0 0 0 0.0 ^/f\\x00 - -", "payload", "NUL"),
        (b"/p 0 @100644 2 0 0 0 0.0 /f -^", "digest", "missing"),
        (b"/p size @100644 2 0 0 0 0.0 ^/missing - -", "payload", "not in the dump"),
        (b"/p size @100644 2 0 0 0 0.0 ^//f - -", "payload", "not in the dump"),
        (b"/p size @100644 2 0 0 0 0.0 ^/d//f - -", "payload", "not in the dump"),
        (b"/p size @100644 2 0 0 0 0.0 ^/f/ - -", "payload", "not in the dump"),
        (b"/p size @100644 2 0 0 0 0.0 ^/l/f - -", "payload", "not in the dump"),
        (b"/p size @100644 2 0 0 0 0.0 ^/d - -", "payload", "is a directory"),
        (b"/p size @100644 2 0 0 0 0.0 ^/ - -", "payload", "is a directory"),
        (b"/p size @100644 2 0 0 0 0.0 ^/q - -\n/q 0 40755 2 0 0 0 0.0 - - -", "payload", "is a directory"),
        (b"/p size @100644 2 0 0 0 0.0 ^/p - -", "payload", "leads back to itself"),
        (link(b"/p", b"/q") + link(b"/q", b"^/p"), "payload", "leads back to itself"),
        (link(b"/o", b"/p") + link(b"/p", b"/q") + link(b"/q", b"^/p"), "payload", "leads back to itself"),
        (link(b"/p", b"/q") + link(b"/q", b"^/missing"), "payload", "not in the dump"),
        (link(b"/p", b"^/missing") + link(b"/q", b"/p"), "payload", "not in the dump"),
    ],
    ids=lambda value: value[:60].decode("latin-1") if isinstance(value, bytes) else "",
)
def test_errors_name_their_place(text: bytes, field: str, reason: str) -> None:
    before = ROOT + FOLDER + FILE.replace(b"/f", b"/d/f") + FILE + link(b"/l", b"/f")
    before_caret = (before + text[: text.index(b"^")]).split(b"\n")
    error = failure(before + text.replace(b"^", b"").removesuffix(b"\n") + b"\n")
    assert (error.field, error.line, error.column) == (field, len(before_caret), len(before_caret[-1]) + 1)
    assert re.search(reason, error.reason)


@pytest.mark.parametrize(
    ("text", "where", "reason"),
    [
        (b"", (1, 1, "path"), "the dump has no entries"),
        (b"\n", (1, 1, "path"), "the line is empty"),
        (ROOT + b"\n", (2, 1, "path"), "the line is empty"),
        (ROOT + ROOT, (2, 1, "path"), "earlier line, too"),
        (FILE, (1, 1, "path"), "the first entry is not /"),
        (link(b"/p", b"/f") + ROOT, (1, 1, "path"), "the first entry is not /"),
        (FILE.replace(b"/f", b"/a/b"), (1, 1, "path"), "the first entry is not /"),
        (b"/ 0 100644 1 0 0 0 0.0 - - -", (1, 5, "mode"), "the root is not a directory"),
        (b"/ 3 120777 1 0 0 0 0.0 tgt - -", (1, 5, "mode"), "the root is not a directory"),
    ],
)
def test_errors_of_the_root(text: bytes, where: tuple[int, int, str], reason: str) -> None:
    error = failure(text)
    assert (error.line, error.column, error.field) == where
    assert reason in error.reason


def test_the_message_is_one_short_line() -> None:
    """A path can be megabytes long."""
    error = failure(ROOT + b"/" + b"n" * 100_000 + b"/\\n 0 40755 2 0 0 0 0.0 - - -")
    error.file = "x.dump"
    assert str(error) == "x.dump: line 2, column 1, path: holds a name of 100000 bytes; 255 are possible"


def malformed() -> list[dict[str, str]]:
    with open(os.path.join(MALFORMED, "expected.tsv"), encoding="ascii") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_every_malformed_file_is_expected() -> None:
    assert sorted(row["name"] for row in malformed()) == sorted(set(os.listdir(MALFORMED)) - {"expected.tsv"})


@pytest.mark.parametrize("row", malformed(), ids=lambda row: row["name"])
def test_malformed_files(row: dict[str, str]) -> None:
    with open(os.path.join(MALFORMED, row["name"]), "rb") as file, pytest.raises(DumpError) as caught:
        parse(file)
    error = caught.value
    assert (error.line, error.column, error.field) == (int(row["line"]), int(row["column"]), row["field"])


# Long lines, deep trees, many entries


class Lines(io.RawIOBase):
    """A file that is made as it is read."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._lines = iter(lines)

    def readline(self, size: int | None = -1, /) -> bytes:
        found = next(self._lines, b"")
        assert size is not None
        assert len(found) <= size
        return found


def parsed_lines(lines: Iterable[bytes]) -> Entry:
    return parse(cast("BinaryIO", Lines(lines)))


def measured(run: Callable[[], object]) -> int:
    """Return the most memory that was in use at a time during a run, in bytes."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_line_may_have_16_mib() -> None:
    text = link(b"/l", b"/f").removesuffix(b"\n") + b" "
    longest = text + b"x" * (LINE_MAX - len(text))
    assert parsed(ROOT + FILE + longest + b"\n").children.keys() == {b"f", b"l"}
    assert parsed(ROOT + FILE + longest).children.keys() == {b"f", b"l"}
    for last in (b"\n", b"", b"\n/p"):
        error = failure(ROOT + FILE + longest + b"x" + last)
        assert (error.line, error.column, error.field) == (3, LINE_MAX + 1, "line")
        assert "16777216" in error.reason


def test_a_line_without_end_is_not_read_to_its_end() -> None:
    class Endless(io.RawIOBase):
        def readline(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            assert 0 < size < 17 << 20
            return b"\xff" * size

    with pytest.raises(DumpError, match="longer than"):
        parse(cast("BinaryIO", Endless()))


@pytest.mark.parametrize(
    "unit", [b"/aa", b"\\n", b"\\\\", b"\\xff", b"/", b" ", b"a=b ", b"=", b"\\", b"@", b"9", b"\xff"]
)
@pytest.mark.parametrize("start", [b"", b"/p 0 40755 2 0 0 0 0.0 ", b"/p 0 40755 2 0 0 0 0.0 - - - ", b"/p "])
def test_long_lines_of_anything_are_refused_soon(start: bytes, unit: bytes) -> None:
    text = start + unit * ((4 << 20) // len(unit))
    with time_limit(10):
        failure(ROOT + text)


def test_deep_trees() -> None:
    def lines() -> Iterator[bytes]:
        yield ROOT
        for depth in range(1, 5001):
            yield b"%s 0 40755 2 0 0 0 0.0 - - -\n" % (b"/d" * depth)
        for depth in range(5000, 0, -1):
            yield b"%s/f 0 100644 2 0 0 0 0.0 - - -\n" % (b"/d" * depth)

    with time_limit(60):
        root = parsed_lines(lines())
    depth = 0
    entry = root
    while isinstance(below := entry.children.get(b"d"), Entry):
        entry = below
        depth += 1
        assert b"f" in entry.children
    assert depth == 5000


def test_paths_are_not_kept() -> None:
    """The text is of 40 MB, of which the names are 0.2 MB."""
    name = b"/" + b"d" * 255

    def lines() -> Iterator[bytes]:
        yield ROOT
        for depth in range(1, 401):
            yield b"%s 0 40755 2 0 0 0 0.0 - - -\n" % (name * depth)
        yield b"%s/f 0 100644 2 0 0 0 0.0 - - -\n" % (name * 400)
        for number in range(150):
            yield link(b"/%d" % number, name * 400 + b"/f")

    assert measured(lambda: parsed_lines(lines())) < 2 << 20


def test_memory_of_an_entry() -> None:
    count = 20_000

    def lines() -> Iterator[bytes]:
        yield ROOT
        for number in range(count):
            path = b"%02x/%062x" % (number % 256, number)
            digest = b"%064x" % number
            yield b"/file-%06d %d 100644 1 0 0 0 %d.%d %s - %s\n" % (number, number, number, number, path, digest)

    assert measured(lambda: parsed_lines(lines())) < 950 * count


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("text", [ROOT, b""])
def test_the_garbage_collector_is_as_before(text: bytes, enabled: bool) -> None:  # noqa: FBT001 - a parameter of the test
    was_enabled = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        if text:
            parsed(text)
        else:
            failure(text)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()


# There and back


def canonical(text: bytes) -> bytes:
    """Return the line of a file as it is to come back, worked out in another way than the parser does."""
    fields = text.removesuffix(b"\n").split(b" ")
    path, size, mode, nlink, uid, gid, rdev, mtime, payload, content, digest = fields[:11]
    xattrs = dict(pair.split(b"=", 1) for pair in fields[11:])
    kind = int(mode, 8) & 0o170000
    is_external = kind == 0o100000 and size != b"0" and content == b"-"
    if kind == 0o120000:
        size = b"%d" % len(re.sub(rb"\\(x..|.)", b"?", payload))
    if kind != 0o120000 and not (is_external and payload):
        payload = b"-"
    if kind != 0o100000 or not content:
        content = b"-"
    if not is_external:
        digest = b"-"
    if kind not in (0o20000, 0o60000):
        rdev = b"0"
    fields = [path, size, mode, nlink, uid, gid, rdev, mtime, payload, content, digest]
    return b" ".join(fields + [name + b"=" + value for name, value in xattrs.items()]) + b"\n"


def comes_back(text: bytes) -> None:
    """Check that every line of a dump is in its tree, and nothing else."""
    back = {text_line.split(b" ")[0]: text_line for text_line in dumped(parsed(text))}
    for given_line in text.splitlines(keepends=True):
        fields = given_line.split(b" ")
        got = back.pop(fields[0])
        if fields[2].startswith(b"@"):
            assert got.split(b" ")[2].startswith(b"@")
            assert got.split(b" ")[8] == fields[8]
        else:
            assert got == canonical(given_line)
    assert not back


@pytest.mark.parametrize("name", VECTORS)
def test_the_vectors_come_back(name: str) -> None:
    comes_back(vector(f"{name}.gz"))


def test_the_real_image_comes_back() -> None:
    comes_back(python_image(".dump"))


names = st.one_of(
    st.binary(min_size=1, max_size=255),
    st.text("ab.-\\x2fn= ", min_size=1, max_size=8).map(str.encode),
).map(lambda name: re.sub(rb"[/\0]", b"_", name))
names = names.filter(lambda name: name not in (b".", b".."))
targets = st.binary(min_size=1, max_size=300).map(lambda target: target.replace(b"\0", b"-"))
u32 = st.one_of(st.just(0), st.integers(0, (1 << 32) - 1))
attributes = st.dictionaries(
    st.binary(min_size=1, max_size=255).map(lambda name: name.replace(b"\0", b"=")), st.binary(max_size=300), max_size=3
)
digests = st.one_of(
    st.none(),
    st.binary(min_size=32, max_size=32).map(lambda value: Digest("sha256", value)),
    st.binary(min_size=64, max_size=64).map(lambda value: Digest("sha512", value)),
)


@st.composite
def nodes(draw: st.DrawFn, types: tuple[int, ...] = TYPES) -> Node:
    kind = draw(st.sampled_from(types))
    nlink, uid, gid, rdev = (draw(u32) for _ in range(4))
    size = draw(st.integers(1, FILE_MAX))
    mtime_ns = draw(st.one_of(st.just(0), st.integers(-(10**9) << 63, ((10**9) << 63) - 1)))
    target = draw(targets)
    content = draw(st.binary(max_size=100))
    is_inline = kind == 0o100000 and draw(st.booleans())
    if kind == 0o120000:
        size = len(target)
    if is_inline:
        size = len(content)
    if kind not in (0o20000, 0o60000):
        rdev = 0
    stat = Stat(kind | draw(st.integers(0, 0o7777)), nlink, uid, gid, rdev, size, mtime_ns)
    xattrs = draw(attributes)
    if is_inline:
        return Inline(stat, xattrs, content)
    if kind == 0o100000:
        return External(stat, xattrs, draw(st.one_of(st.none(), targets)), draw(digests))
    if kind == 0o120000:
        return Symlink(stat, xattrs, target)
    return Directory(stat, xattrs) if kind == 0o40000 else Device(stat, xattrs)


@st.composite
def trees(draw: st.DrawFn) -> Entry:
    root = Entry(draw(nodes((0o40000,))))
    directories = [root]
    files: list[Entry] = []
    for _ in range(draw(st.integers(0, 12))):
        directory = draw(st.sampled_from(directories))
        name = draw(names)
        if name in directory.children:
            continue
        target = draw(st.sampled_from([None, *files]))
        if target is not None:
            directory.children[name] = Link(target)
            continue
        entry = Entry(draw(nodes()))
        directory.children[name] = entry
        (directories if isinstance(entry.node, Directory) else files).append(entry)
    return root


def shape(root: Entry) -> dict[bytes, object]:
    """Return the nodes of a tree by path, and the paths that links lead to."""
    paths = {entry: path for path, entry in placed(root) if isinstance(entry, Entry)}
    return {path: paths[entry.target] if isinstance(entry, Link) else entry.node for path, entry in placed(root)}


@given(trees())
@settings(max_examples=100, deadline=None)
def test_random_trees_come_back(root: Entry) -> None:
    text = b"".join(dumped(root))
    back = parsed(text)
    assert shape(back) == shape(root)
    assert b"".join(dumped(back)) == text


@given(trees(), st.data())
@settings(max_examples=50, deadline=None)
def test_lines_may_stand_in_any_order_below_their_directories(root: Entry, data: st.DataObject) -> None:
    lines = sorted(dumped(root), key=lambda text: text.split(b" ")[0].count(b"/"))[1:]
    first = line(b"/", root.node)
    order = sorted(data.draw(st.permutations(lines)), key=lambda text: text.split(b" ")[0].count(b"/"))
    assert shape(parsed(first + b"".join(order))) == shape(root)


# Whatever else


def survives(text: bytes) -> None:
    """Check that a text is a tree, or an error whose place exists."""
    error = None
    try:
        parsed(text)
    except DumpError as raised:
        error = raised
    if error is not None:
        lines = text.split(b"\n")
        assert 1 <= error.line <= len(lines)
        assert 1 <= error.column <= len(lines[error.line - 1]) + 1
        assert error.field in FIELDS
        assert str(error).isprintable()


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=300, deadline=None)
def test_random_bytes(text: bytes, rooted: bool) -> None:  # noqa: FBT001 - hypothesis passes it by position
    survives(ROOT + text if rooted else text)


words = st.sampled_from(
    [
        *(
            b"/",
            b"/p",
            b"/d",
            b"/d/q",
            b"p",
            b"-",
            b"",
            b"0",
            b"1",
            b"40755",
            b"100644",
            b"120777",
            b"20644",
            b"@100644",
        ),
        *(
            b"0.0",
            b"-1.1",
            b"x",
            b"ab" * 32,
            b"ab" * 64,
            b"\\x2d",
            b"\\",
            b"\\x0",
            b"\0",
            b"user.a=1",
            b"=",
            b"a=",
            b"\n",
        ),
        *(b"9" * 20, b"\xff", b"\r", b"\t", b"_", b"+1", b"1_0", b"\xd9\xa0"),
    ]
)


@given(st.lists(st.lists(words, min_size=10, max_size=13), max_size=4))
@settings(max_examples=300, deadline=None)
def test_random_fields(lines: list[list[bytes]]) -> None:
    survives(ROOT + b"\n".join(b" ".join(fields) for fields in lines))


@given(trees(), st.data())
@settings(max_examples=150, deadline=None)
def test_mutated_dumps(root: Entry, data: st.DataObject) -> None:
    text = bytearray(b"".join(dumped(root)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        end = at + data.draw(st.sampled_from([0, 0, 1, 1, 1, 5, 1000]))
        text[at:end] = data.draw(st.one_of(st.just(b""), words, st.sampled_from([b" ", b"/", b"@", b"\\"])))
    survives(bytes(text))
