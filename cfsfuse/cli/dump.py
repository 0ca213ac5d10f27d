"""`cfsfuse dump`: to the byte what `composefs-info dump` prints."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING

from cfsfuse.cli import common
from cfsfuse.dump import dump

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    common.add_images(parser)


def run(arguments: argparse.Namespace) -> int:
    filters = common.check_filters(arguments.filter) if arguments.filter else None
    with common.output():
        for image in arguments.images:
            with common.opened(image) as reader:
                sys.stdout.buffer.writelines(dump(reader, functools.partial(common.walk, reader, filters)))
    return 0
