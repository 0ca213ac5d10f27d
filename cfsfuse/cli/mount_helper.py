"""`mount.cfsfuse IMAGE MOUNTPOINT -o OPTIONS`: what mount(8) runs for `mount -t cfsfuse` and for fstab."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cfsfuse import __version__
from cfsfuse.cli import mount as mount_verb
from cfsfuse.cli.main import DONE, Parser, guard, open_standard_streams
from cfsfuse.errors import HostError
from cfsfuse.mount.ladder import mount
from cfsfuse.mount.options import parse
from cfsfuse.privilege import has_sys_admin

if TYPE_CHECKING:
    from collections.abc import Sequence


def make_parser() -> Parser:
    """Return the parser: that of `cfsfuse mount`, and the flags with which mount(8) calls its helpers."""
    parser = Parser(
        prog="mount.cfsfuse",
        description="Mount a composefs image, every block verified: the helper of mount(8) for -t cfsfuse.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mount_verb.add_operands(parser)
    parser.add_argument("--version", action="version", version=f"mount.cfsfuse {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("-f", "--fake", action="store_true", help="check the command line, but mount nothing")
    parser.add_argument("-s", "--sloppy", action="store_true", help="accepted for mount(8), without effect")
    parser.add_argument("-n", "--no-mtab", action="store_true", help="accepted for mount(8), without effect")
    parser.add_argument("-v", "--verbose", action="store_true", help="accepted for mount(8), without effect")
    parser.add_argument("-t", "--types", metavar="TYPE", help="accepted for mount(8), without effect")
    parser.add_argument("-N", "--namespace", metavar="NS", help="refused: enter the namespace with nsenter(1) instead")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the helper and return its exit code."""
    open_standard_streams()
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    return guard(lambda: run(parsed), debug=parsed.debug, program=parser.prog)


def run(arguments: argparse.Namespace) -> int:
    """Mount as mount(8) wants it: with `suid` and `dev` unless it says otherwise, which `cfsfuse mount` leaves out."""
    if arguments.namespace is not None:
        raise HostError("-N: enter the mount namespace with nsenter(1), and mount there")
    options = parse(",".join(arguments.options))
    if not arguments.fake:
        defaults = ("suid", "dev") if has_sys_admin() else ()
        options = options._replace(flags=(*defaults, *options.flags))
        mount(arguments.image, arguments.mountpoint, options)
    return DONE
