"""`cfsfuse run`."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from typing import TYPE_CHECKING

from cfsfuse.cli.doctor import explanation
from cfsfuse.cli.mount import add_backend, add_options, options_of
from cfsfuse.errors import UsageError, printable
from cfsfuse.mount import job, running
from cfsfuse.mount.options import split
from cfsfuse.mount.running import Layout, Listener
from cfsfuse.mount.tree_root import Bind

if TYPE_CHECKING:
    from cfsfuse.mount.plan import Backend, Verdict

_EXIT_STATUS = """\
exit status: that of COMMAND, 128 and the number of the signal that ended it; 127 when it is not found, 126 when it
cannot be executed; those of cfsfuse mount when the image cannot be mounted

What COMMAND leaves running is killed when it ends, for the tree goes.

"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="the composefs image")
    # PARSER alone leaves the options of COMMAND to it, and a -- among its arguments: "+" drops one or two of them.
    parser.add_argument(
        "command", metavar="COMMAND", nargs=argparse.PARSER, help="what to run, after --, with its arguments"
    )
    add_options(parser)
    add_backend(parser)
    parser.add_argument(
        "--explain", action="store_true", help="say on standard error why each backend is chosen or refused"
    )
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--at", metavar="DIR", help="let COMMAND see the tree at this existing directory")
    place.add_argument("--root", action="store_true", help="let it see the tree as /, with /proc, /dev and /sys")
    parser.add_argument(
        "--writable", action="store_true", help="let it change the tree; what it writes is kept in memory and forgotten"
    )
    show = r"with --root: show this file or directory of the host at DST; \: stands for a colon; may be repeated"
    for option, text in (("--bind", show), ("--bind-ro", "the same, but it takes no changes")):
        parser.add_argument(
            option,
            metavar="SRC[:DST]",
            action="append",
            dest="binds",
            type=functools.partial(_under, option),
            default=[],
            help=text,
        )
    parser.add_argument(
        "--tmpfs",
        metavar="DIR",
        action="append",
        default=[],
        help="with --root: an empty directory in memory, made before any --bind; may be repeated",
    )
    parser.add_argument("--chdir", metavar="DIR", help="start COMMAND there (default with --root: /)")
    parser.epilog = _EXIT_STATUS + (parser.epilog or "")


def _under(option: str, text: str) -> tuple[str, str]:
    """Return a value with its option: the order of both kinds of binds counts."""
    return option, text


def run(arguments: argparse.Namespace) -> int:
    command = arguments.command[arguments.command[0] == "--" :]
    if not (command and command[0]):
        raise UsageError("COMMAND is empty: name a program")
    layout = _layout(arguments)
    options = options_of(arguments)
    status = job.apart()
    if status is not None:
        return status
    listener = Listener(_warn, _explain if arguments.explain else None)
    return running.run(arguments.image, options, layout, command, listener)


def _layout(arguments: argparse.Namespace) -> Layout:
    if not arguments.root and (arguments.binds or arguments.tmpfs):
        raise UsageError("--bind, --bind-ro and --tmpfs are for a tree that is the root: give --root instead of --at")
    return Layout(
        at=None if arguments.root else os.path.abspath(arguments.at),
        writable=arguments.writable,
        binds=tuple(_bind(option, text) for option, text in arguments.binds),
        tmpfs=tuple(_absolute(path, "--tmpfs") for path in arguments.tmpfs),
        directory=arguments.chdir,
    )


def _bind(option: str, text: str) -> Bind:
    source, *target = split(text, ":")
    if not source or len(target) > 1:
        raise UsageError(f"{option} {text}: must be SRC or SRC:DST")
    source = os.path.abspath(source)
    return Bind(source, _absolute(target[0], option) if target else source, option == "--bind-ro")


def _absolute(path: str, option: str) -> str:
    if not path.startswith("/"):
        raise UsageError(f"{option} {path}: must be an absolute path in the tree")
    return path


def _explain(verdicts: list[Verdict], chosen: Backend | None) -> None:
    print(*explanation(verdicts, chosen), sep="\n", file=sys.stderr)


def _warn(text: str) -> None:
    print(f"cfsfuse run: {printable(os.fsencode(text))}", file=sys.stderr)
