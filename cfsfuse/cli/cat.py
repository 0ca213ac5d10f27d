"""`cfsfuse cat`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from cfsfuse.access import content, resolve
from cfsfuse.cli import common
from cfsfuse.errors import ObjectError, UsageError, printable

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Symbolic links are followed inside the image. Nothing is printed of a block that is not right.\n"
    common.add_image(parser)
    parser.add_argument("path", metavar="PATH", help="a regular file in the image")
    common.add_store(parser)


def run(arguments: argparse.Namespace) -> int:
    path = os.fsencode(arguments.path)
    store = common.open_store(arguments)
    with common.opened(arguments.image) as reader, common.wanting_store(arguments):
        inode = resolve(reader, path, follow=True)
        if not inode.is_regular:
            kind = common.type_name(inode.mode)
            raise UsageError(f"{printable(path)}: is a {kind}, not a regular file")
        pieces = content(store, reader.node(inode))
        try:
            with common.output():
                for piece in pieces:
                    sys.stdout.buffer.write(piece)
        except ObjectError as error:
            error.file = path
            raise
    return 0
