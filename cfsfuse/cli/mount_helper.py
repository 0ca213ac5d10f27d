"""`mount.cfsfuse IMAGE MOUNTPOINT -o OPTIONS`: what mount(8) runs for `mount -t cfsfuse` and for fstab."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cfsfuse import __version__
from cfsfuse.cli import mount as mount_verb
from cfsfuse.cli.main import Parser, guard, open_standard_streams

if TYPE_CHECKING:
    from collections.abc import Sequence


def make_parser() -> Parser:
    """Return the parser: that of `cfsfuse mount`, and the flags with which mount(8) calls its helpers."""
    parser = Parser(
        prog="mount.cfsfuse",
        description="Mount a composefs image, every block verified: the helper of mount(8) for -t cfsfuse.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mount_verb.configure(parser)
    parser.add_argument("--version", action="version", version=f"mount.cfsfuse {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("-s", "--sloppy", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-n", "--no-mtab", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-v", "--verbose", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-t", "--types", metavar="TYPE", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the helper and return its exit code."""
    open_standard_streams()
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    return guard(lambda: mount_verb.run(parsed), debug=parsed.debug, program=parser.prog)
