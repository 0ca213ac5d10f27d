"""Domain errors: data and one line of text."""

from __future__ import annotations

import pytest

from cfsfuse import errors
from cfsfuse.errors import CfsError

EXAMPLES: list[CfsError] = [
    errors.UsageError("option x"),
    errors.HostError("/dev/fuse: not there"),
    errors.ImageError("i_size", "too big", 1152),
    errors.ImageError("image", "empty file"),
    errors.PathNotFound(b"/a\nb\xff"),
    errors.ImageDigestMismatch("/x.cfs", "00", "01"),
    errors.ObjectError(b"aa/b", "bad"),
    errors.ObjectMissing(b"aa/b\n"),
    errors.ObjectForbidden(b"aa/b"),
    errors.ObjectUnusable(b"aa/\x1b[1m", "not a regular file"),
    errors.DigestMismatch(b"aa/b", 3, b"\1", b"\2"),
    errors.DigestMismatch(b"aa/b", None, b"\1", b"\2"),
    errors.TreeMismatch(1, 2),
    errors.DumpError(3, 14, "size", "not a number"),
    errors.TreeError(b"/a\n", "a file too large"),
    errors.SourceError(b"/usr/\xff", "permission denied"),
    errors.StoreError("/store: object store: Read-only file system"),
]


def subclasses(kind: type[CfsError] = CfsError) -> list[type[CfsError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in subclasses(child))]


def test_every_error_has_an_example() -> None:
    ours = {kind for kind in subclasses() if kind.__module__ == "cfsfuse.errors"}
    assert {type(error) for error in EXAMPLES} == ours - {CfsError}


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_text_is_one_printable_line(error: CfsError) -> None:
    assert str(error)
    assert str(error).isprintable()


def test_errors_carry_their_data() -> None:
    error = errors.DigestMismatch(b"aa/b", 3, b"\x01", b"\x02")
    assert (error.path, error.block, error.expected, error.found) == (b"aa/b", 3, b"\1", b"\2")
    assert str(error) == "object aa/b: hash of block 3: expected 01, found 02"
    assert str(errors.DigestMismatch(b"aa/b", None, b"\1", b"\2")) == (
        "object aa/b: fs-verity digest: expected 01, found 02"
    )


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (b"plain", "plain"),
        ("ümläut".encode(), "ümläut"),
        (b"with space", "with space"),
        (b"new\nline", r"new\nline"),
        (b"\xff\xfe", r"\xff\xfe"),
        (b"\x1b[31m", r"\x1b[31m"),
        ("\u202e".encode(), r"\u202e"),
    ],
)
def test_paths_are_safe_to_print(path: bytes, text: str) -> None:
    assert errors.printable(path) == text
