"""`cfsfuse measure`: to the byte what `composefs-info measure-file` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsfuse.access import measure_file
from cfsfuse.cli import common
from cfsfuse.verity.digest import ALGORITHMS

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "The kernel is asked first: for a file with fs-verity it knows the digest.\n"
    parser.add_argument("files", metavar="FILE", nargs="+", help="a regular file")
    parser.add_argument("--algorithm", choices=list(ALGORITHMS), default="sha256", help="default: sha256")


def run(arguments: argparse.Namespace) -> int:
    with common.output():
        for path in arguments.files:
            print(measure_file(path, ALGORITHMS[arguments.algorithm]).hex())
    return 0
