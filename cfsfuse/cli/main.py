"""`cfsfuse VERB …`: the verbs, the parsers, and the one table of exit codes."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from cfsfuse import __version__
from cfsfuse.errors import (
    CfsError,
    DumpError,
    HostError,
    ImageDigestMismatch,
    ImageError,
    ObjectError,
    PathNotFound,
    SourceError,
    StoreError,
    TreeError,
    UsageError,
    printable,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DONE = 0
CHECK_FAILED = 1
USAGE = 2
BAD = 3
IMPOSSIBLE = 4

EXIT_CODES: dict[type[CfsError], int] = {
    UsageError: USAGE,
    PathNotFound: USAGE,
    HostError: IMPOSSIBLE,
    ImageError: BAD,
    ImageDigestMismatch: BAD,
    ObjectError: BAD,
    # A dump is data as an image is; and a tree that no image can hold stays so on every host.
    DumpError: BAD,
    TreeError: BAD,
    # A source that may not be read, or does not hold still, and a store that takes nothing: the same command is right
    # once that is put in order.
    SourceError: IMPOSSIBLE,
    StoreError: IMPOSSIBLE,
}

EXIT_CODE_TEXT = """\
exit codes:
  0  done
  1  the check failed
  2  the command line is wrong
  3  the image, an object or the dump is bad
  4  not possible on this host (the message says what would make it possible)
"""


class Verb(NamedTuple):
    """A verb: its module in `cfsfuse.cli`, with `configure(parser)` and `run(arguments)`, and what it does."""

    module: str
    summary: str


VERBS = {
    "mk": Verb("mk", "build an image from a directory or a dump, to the byte as mkcomposefs does"),
    "mount": Verb("mount", "mount an image, every block verified"),
    "umount": Verb("umount", "unmount it again"),
    "run": Verb("run", "run a command with an image mounted for it alone, or as its root"),
    "ls": Verb("ls", "list the paths of images"),
    "dump": Verb("dump", "print images as composefs-dump(5)"),
    "objects": Verb("objects", "list the objects that images need"),
    "missing-objects": Verb("missing_objects", "list those that the base directories lack"),
    "cat": Verb("cat", "print a file of an image, verified"),
    "stat": Verb("stat", "show what an image says of a path"),
    "extract": Verb("extract", "copy a tree out of an image, verified, without mounting"),
    "measure": Verb("measure", "print the fs-verity digests of files"),
    "compare": Verb("compare", "mount an image in every way that works here, and compare what they show"),
    "doctor": Verb("doctor", "show what this host has for mounting images"),
    "bench": Verb("bench", "measure the speed of each way to mount an image, side by side"),
    "completion": Verb("completion", "print a completion script for a shell"),
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that ends in one line, as every other error does."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: that of the process) and return its exit code."""
    open_standard_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    verb = next((word for word in words if not word.startswith("-")), None)
    gc.disable()  # what imports allocate lives on: looking for cycles in it is a quarter of their time
    try:
        parser = make_parser([verb] if verb in VERBS else [])
    except KeyboardInterrupt:
        return 130
    gc.enable()
    parsed = parser.parse_args(words)
    return guard(lambda: int(parsed.run(parsed)), debug=parsed.debug, program=parser.prog)


def open_standard_streams() -> None:
    """Make descriptors 0 to 2 exist: a file with one of these numbers would be lost when a daemon lets go of them.

    A standard output that was closed takes nothing: who asked for output shall not be told that it went well.
    """
    for stream in range(3):
        try:
            os.fstat(stream)
        except OSError:  # it gets the lowest number that is free, which is this one
            os.set_inheritable(os.open(os.devnull, os.O_RDONLY if stream == 1 else os.O_RDWR), True)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 - as long as the process
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 - likewise
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115 - likewise


def make_parser(verbs: Sequence[str] | None = None) -> Parser:
    """Return the parser, with the options of `verbs` only: the others' modules are not imported. None means all."""
    parser = Parser(
        prog="cfsfuse",
        description="Build composefs images, mount them in user space, every block verified; inspect and extract them.",
        epilog=EXIT_CODE_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"cfsfuse {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(metavar="VERB", required=True)
    for name, verb in VERBS.items():
        subparser = subparsers.add_parser(
            name,
            help=verb.summary,
            description=verb.summary[0].upper() + verb.summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if verbs is None or name in verbs:
            module = importlib.import_module(f"cfsfuse.cli.{verb.module}")
            module.configure(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def guard(run: Callable[[], int], *, debug: bool, program: str) -> int:
    """Run a command; print a domain error as one line and return its exit code."""
    try:
        status = run()
        sys.stdout.flush()
    except CfsError as error:
        if debug:
            raise
        print(f"{program}: {printable(str(error).encode(errors='surrogateescape'))}", file=sys.stderr)
        return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), BAD)
    except OSError as error:
        # What standard output has not taken would fail once more when the interpreter flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):  # the reader has gone, as head(1) does
            return 141
        if debug:
            raise
        print(f"{program}: {error}", file=sys.stderr)
        return IMPOSSIBLE
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
