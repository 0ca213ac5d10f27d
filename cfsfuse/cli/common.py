"""What several verbs need: images opened with their name in errors, JSON, output, an end by signal.

JSON has no bytes. A name or value is text where its bytes are UTF-8; where they are not, the text has U+FFFD for what
is wrong, and a second key with `_base64` behind its name has the exact bytes. So nothing is lost, and no program has to
cope with lone surrogates.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import stat
import sys
from typing import TYPE_CHECKING, NoReturn

from cfsfuse.erofs.reader import Reader
from cfsfuse.errors import HostError, ObjectMissing, UsageError
from cfsfuse.imagefile import naming, open_image

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator

    from cfsfuse.erofs.inode import Inode
    from cfsfuse.objects import ObjectStore

_TYPE_NAMES = {
    stat.S_IFREG: "regular file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def add_image(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="the composefs image")


def add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="a composefs image")
    parser.add_argument(
        "--filter",
        metavar="NAME",
        action="append",
        default=[],
        help="only the top-level entry NAME and what is below it; may be given several times",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON document; what is not UTF-8 stands under a second key, ending in _base64, too",
    )


def add_basedir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--basedir",
        metavar="DIR[:DIR]",
        action="append",
        default=[],
        help=r"where the objects are, searched in this order; may be given several times; \: stands for a colon",
    )


def add_store(parser: argparse.ArgumentParser) -> None:
    add_basedir(parser)
    parser.add_argument("--noverity", action="store_true", help="do not verify the objects")


@contextlib.contextmanager
def opened(path: str) -> Iterator[Reader]:
    """Yield the reader of the image at `path`, which is named in the errors that come up while it is read."""
    with naming(path):
        yield Reader(open_image(path))


def base_directories(arguments: argparse.Namespace) -> list[str]:
    """Return the paths given with --basedir."""
    from cfsfuse.mount.options import split

    return [path for text in arguments.basedir for path in split(text, ":") if path]


def open_store(arguments: argparse.Namespace) -> ObjectStore:
    """Return the object store that --basedir and --noverity ask for, with the cache of trees that mounts use."""
    from cfsfuse.basedirs import BaseDirectories
    from cfsfuse.mount.places import tree_cache
    from cfsfuse.objects import ObjectStore
    from cfsfuse.trees import TreeStore
    from cfsfuse.verification import Verification

    directories = BaseDirectories(base_directories(arguments))
    trees = TreeStore(directories, tree_cache())
    return ObjectStore(directories, trees, Verification.OFF if arguments.noverity else Verification.RECORDED)


@contextlib.contextmanager
def wanting_store(arguments: argparse.Namespace) -> Iterator[None]:
    """Say what to do when an object is missing because no object store has been named at all."""
    try:
        yield
    except ObjectMissing as error:
        if base_directories(arguments):
            raise
        raise UsageError(f"{error}: name the object store with --basedir=") from None


def check_filters(names: Iterable[str]) -> list[bytes]:
    """Return the names given with --filter as bytes, in the order in which an image has them."""
    for name in names:
        if "/" in name:
            raise UsageError(f"--filter {name}: must be the name of a top-level entry, without a slash")
    return sorted({os.fsencode(name) for name in names} - {b"", b".", b".."})


def walk(reader: Reader, filters: list[bytes] | None) -> Iterator[tuple[bytes, Inode]]:
    """Yield path and inode of all entries; with `filters` only those top-level entries are looked up and read."""
    if filters is None:
        yield from reader.walk()
        return
    yield b"/", reader.root
    for name in filters:
        inode = reader.lookup(reader.root, name)
        if inode is not None:
            yield from reader.walk(b"/" + name, start=inode)


@contextlib.contextmanager
def output() -> Iterator[None]:
    """Flush standard output at the end; raise HostError when it takes no more, for the want of space for example."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # What is still buffered would fail again when the interpreter flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise HostError(f"standard output: {error.strerror}") from None


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end us as an exception does, so that nothing stays behind; nohup(1) stays in force."""

    def end(number: int, _frame: object) -> NoReturn:
        for later in before:
            signal.signal(later, signal.SIG_IGN)  # a second one would interrupt the clearing up
        raise SystemExit(128 + number)

    heard = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def type_name(mode: int) -> str:
    """Return what kind of file `mode` says that it is."""
    return _TYPE_NAMES.get(stat.S_IFMT(mode), f"file of unknown type {stat.S_IFMT(mode):o}")


def device_numbers(rdev: int) -> tuple[int, int]:
    """Return the major and the minor number in what an inode records, the kernel's `new_encode_dev`."""
    return rdev >> 8 & 0xFFF, rdev & 0xFF | rdev >> 12 & 0xFFF00


def actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return what `parser` takes, for what is made from parsers: argparse has no public way to it."""
    return parser._actions  # noqa: SLF001


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of the verbs by name."""
    return next(action.choices for action in actions(parser) if isinstance(action.choices, dict))


def json_text(key: str, value: bytes) -> dict[str, str]:
    """Return `value` under `key` as text, with its exact bytes beside it when they are not UTF-8."""
    text = value.decode("utf-8", "replace")
    if text.encode() == value:
        return {key: text}
    return {key: text, key + "_base64": base64.b64encode(value).decode()}


def json_list(items: Iterable[object]) -> Iterator[bytes]:
    """Yield a JSON array in pieces, an item a line: a list of any length is never in memory."""
    separator = b"["
    for item in items:
        yield separator + b"\n" + json.dumps(item).encode()
        separator = b","
    yield b"[]\n" if separator == b"[" else b"\n]\n"
