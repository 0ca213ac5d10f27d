"""What can go wrong, in the terms of the field.

The classes carry data and a sentence for people; they know neither errno nor exit codes. `fuse.answers` turns them
into an errno and `cli.main` into an exit code, each in one table.
"""

from __future__ import annotations


class CfsError(Exception):
    """Every error that cfsfuse raises on purpose."""


class UsageError(CfsError):
    """The command line or an option is wrong; nothing has been done."""


class HostError(CfsError):
    """What was asked for is not possible on this host; the text says what would make it possible."""


class ImageError(CfsError):
    """The image is not one that cfsfuse serves.

    `field` names the on-disk field as the kernel spells it, `offset` is where it stands, in bytes from the start of
    the image; `image` is the path of the image file, set by whoever knows it.
    """

    def __init__(self, field: str, reason: str, offset: int | None = None) -> None:
        self.field = field
        self.reason = reason
        self.offset = offset
        self.image: str | None = None
        super().__init__(field, reason, offset)

    def __str__(self) -> str:
        where = "" if self.offset is None else f" at byte {self.offset}"
        prefix = "" if self.image is None else f"{self.image}: "
        return f"{prefix}{self.field}{where}: {self.reason}"


class PathNotFound(CfsError):
    """The image has no such entry."""

    def __init__(self, path: bytes) -> None:
        self.path = path
        super().__init__(f"{printable(path)}: not in the image")


class ImageDigestMismatch(CfsError):
    """The image's fs-verity digest is not the one asked for."""

    def __init__(self, image: str, expected: str, found: str) -> None:
        self.image = image
        self.expected = expected
        self.found = found
        super().__init__(f"{image}: the image's fs-verity digest is {found}, not {expected} as asked for by digest=")


class ObjectError(CfsError):
    """An object cannot give the bytes that the image promises. `path` is its path below a base directory.

    `file` is the path in the image of a file whose content it is, set by whoever knows it.
    """

    def __init__(self, path: bytes, reason: str) -> None:
        self.path = path
        self.reason = reason
        self.file: bytes | None = None
        super().__init__(path, reason)

    def __str__(self) -> str:
        prefix = "" if self.file is None else f"{printable(self.file)}: "
        return f"{prefix}object {printable(self.path)}: {self.reason}"


class ObjectMissing(ObjectError):
    """The object is in none of the base directories."""

    def __init__(self, path: bytes) -> None:
        super().__init__(path, "not in any base directory")


class ObjectForbidden(ObjectError):
    """The object exists, but this process may not read it."""

    def __init__(self, path: bytes) -> None:
        super().__init__(path, "permission denied")


class ObjectUnusable(ObjectError):
    """The object is not a regular file of the recorded size, or has no digest where one is required."""


class DigestMismatch(ObjectError):
    """The object's bytes are not those whose digest the image records.

    `block` is the index of the 4096-byte block that is wrong, or None when only the whole is known to be.
    """

    def __init__(self, path: bytes, block: int | None, expected: bytes, found: bytes) -> None:
        self.block = block
        self.expected = expected
        self.found = found
        part = "fs-verity digest" if block is None else f"hash of block {block}"
        super().__init__(path, f"{part}: expected {expected.hex()}, found {found.hex()}")


class TreeMismatch(CfsError):
    """A block of a recorded or cached Merkle tree does not hash to what its parent says."""

    def __init__(self, level: int, index: int) -> None:
        self.level = level
        self.index = index
        super().__init__(f"Merkle tree: hash block {index} of level {level} is wrong")


class DumpError(CfsError):
    """A composefs-dump(5) text is malformed; `line` and `column` count from 1, the column in bytes of the line."""

    def __init__(self, line: int, column: int, field: str, reason: str) -> None:
        self.line = line
        self.column = column
        self.field = field
        self.reason = reason
        self.file: str | None = None
        super().__init__(line, column, field, reason)

    def __str__(self) -> str:
        prefix = "" if self.file is None else f"{self.file}: "
        return f"{prefix}line {self.line}, column {self.column}, {self.field}: {self.reason}"


class TreeError(CfsError):
    """A tree holds what no image can: a file too large, too many xattrs. `path` is where in the tree."""

    def __init__(self, path: bytes, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"{_shortened(printable(path))}: {_shortened(reason)}")


class SourceError(CfsError):
    """A file of the directory that is built from cannot be read, or has changed meanwhile. `path` is its whole path."""

    def __init__(self, path: bytes, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"{printable(path)}: {reason}")


class StoreError(CfsError):
    """The object store cannot be written."""


def _shortened(text: str) -> str:
    """Return a text without its middle, if it is too long for a line that somebody reads."""
    return text if len(text) <= 200 else f"{text[:120]}…{text[-79:]}"


def printable(path: bytes) -> str:
    """Return a path of any bytes as text that is safe to print on one line."""
    text = path.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
