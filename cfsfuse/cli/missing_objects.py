"""`cfsfuse missing-objects`: to the byte what `composefs-info missing-objects` prints, with an exit code that tells."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsfuse.basedirs import BaseDirectories
from cfsfuse.cli import common, objects
from cfsfuse.cli.main import CHECK_FAILED, DONE

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Exits with 1 when an object is missing. Whether the others are right is for reading them to tell.\n"
    )
    common.add_images(parser)
    common.add_basedir(parser)
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    directories = BaseDirectories(common.base_directories(arguments))
    found = objects.needed(arguments.images, arguments.filter)
    missing = [item for item in found if not directories.exists(item.path)]
    objects.write(missing, as_json=arguments.json)
    return CHECK_FAILED if missing else DONE
