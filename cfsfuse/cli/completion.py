"""`cfsfuse completion`: from the parser, by shtab."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from cfsfuse.cli import common

if TYPE_CHECKING:
    import argparse

_SHELLS = ("bash", "zsh", "tcsh")
_FILES = ("IMAGE", "FILE", "SOURCE")
_DIRECTORIES = ("MOUNTPOINT", "DEST", "OUTDIR", "DIR", "DIR[:DIR]")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """\
installation:
  bash  cfsfuse completion bash > ~/.local/share/bash-completion/completions/cfsfuse
  zsh   cfsfuse completion zsh > DIRECTORY/_cfsfuse, with a DIRECTORY of $fpath
  tcsh  cfsfuse completion tcsh > FILE, and "source FILE" in ~/.tcshrc
"""
    parser.add_argument("shell", metavar="SHELL", choices=_SHELLS, help=", ".join(_SHELLS))


def run(arguments: argparse.Namespace) -> int:
    import shtab

    from cfsfuse.cli.main import make_parser

    parser = make_parser()
    for action in (action for verb in common.subparsers(parser).values() for action in common.actions(verb)):
        if action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # the attribute that shtab looks for
        elif action.metavar in _DIRECTORIES:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    with common.output():
        sys.stdout.write(shtab.complete(parser, shell=arguments.shell))
    return 0
