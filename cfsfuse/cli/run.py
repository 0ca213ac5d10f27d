"""`cfsfuse run`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from cfsfuse.cli.mount import add_backend, add_options, options_of
from cfsfuse.errors import UsageError
from cfsfuse.mount.options import split
from cfsfuse.mount.running import Bind, Layout
from cfsfuse.mount.running import run as run_command

if TYPE_CHECKING:
    import argparse

_EXIT_STATUS = """\
exit status: that of COMMAND, 128 and the number of the signal that ended it; 127 when it is not found, 126 when it
cannot be executed; those of cfsfuse mount when the image cannot be mounted

"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="the composefs image")
    parser.add_argument("command", metavar="COMMAND", nargs="+", help="what to run, after --, with its arguments")
    add_options(parser)
    add_backend(parser)
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--at", metavar="DIR", help="let COMMAND see the tree at this existing directory")
    place.add_argument("--root", action="store_true", help="let it see the tree as /, with /proc, /dev and /sys")
    parser.add_argument(
        "--writable", action="store_true", help="let it change the tree; what it writes is kept in memory and forgotten"
    )
    parser.add_argument(
        "--bind",
        metavar="SRC[:DST]",
        action="append",
        default=[],
        help=r"with --root: show this file or directory of the host at DST; \: stands for a colon; may be repeated",
    )
    parser.add_argument(
        "--bind-ro", metavar="SRC[:DST]", action="append", default=[], help="the same, but it takes no changes"
    )
    parser.add_argument(
        "--tmpfs",
        metavar="DIR",
        action="append",
        default=[],
        help="with --root: an empty directory in memory; may be repeated",
    )
    parser.add_argument("--chdir", metavar="DIR", help="start COMMAND there (default with --root: /)")
    parser.epilog = _EXIT_STATUS + (parser.epilog or "")


def run(arguments: argparse.Namespace) -> int:
    if not arguments.root and (arguments.bind or arguments.bind_ro or arguments.tmpfs):
        raise UsageError("--bind, --bind-ro and --tmpfs are for a tree that is the root: give --root instead of --at")
    layout = Layout(
        at=None if arguments.root else os.path.abspath(arguments.at),
        writable=arguments.writable,
        binds=tuple(_bind(text, read_only=False) for text in arguments.bind)
        + tuple(_bind(text, read_only=True) for text in arguments.bind_ro),
        tmpfs=tuple(_absolute(path, "--tmpfs") for path in arguments.tmpfs),
        directory=arguments.chdir,
    )
    return run_command(arguments.image, options_of(arguments), layout, arguments.command, _warn)


def _bind(text: str, *, read_only: bool) -> Bind:
    source, *target = split(text, ":")
    if len(target) > 1:
        raise UsageError(f"--bind {text}: must be SRC or SRC:DST")
    source = os.path.abspath(source)
    return Bind(source, _absolute(target[0], "--bind") if target else source, read_only)


def _absolute(path: str, option: str) -> str:
    if not path.startswith("/"):
        raise UsageError(f"{option} {path}: must be an absolute path in the tree")
    return path


def _warn(text: str) -> None:
    print(f"cfsfuse run: {text}", file=sys.stderr)
