"""`cfsfuse measure`: to the byte what `composefs-info measure-file` prints."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cfsfuse.basedirs import Descriptor
from cfsfuse.cli import common
from cfsfuse.errors import ObjectError, UsageError
from cfsfuse.verity.digest import ALGORITHMS, file_digest
from cfsfuse.verity.ioctl import measure
from cfsfuse.verity.merkle import Geometry, build

if TYPE_CHECKING:
    import argparse

    from cfsfuse.verity.digest import Algorithm


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "The kernel is asked first: for a file with fs-verity it knows the digest.\n"
    parser.add_argument("files", metavar="FILE", nargs="+", help="a regular file")
    parser.add_argument("--algorithm", choices=list(ALGORITHMS), default="sha256", help="default: sha256")


def run(arguments: argparse.Namespace) -> int:
    with common.output():
        for path in arguments.files:
            print(_measure(path, ALGORITHMS[arguments.algorithm]).hex())
    return 0


def _measure(path: str, algorithm: Algorithm) -> bytes:
    name = os.fsencode(path)
    try:
        # O_NONBLOCK: a fifo must not stop us.
        descriptor = Descriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY), name)
        known = measure(descriptor.fd)
        if known is not None and known.algorithm == algorithm.name:
            return known.value
        size = descriptor.signature.st_size
        return file_digest(algorithm, size, build(Geometry(algorithm, size), descriptor.chunks(name, size)))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ObjectError as error:
        raise UsageError(f"{path}: {error.reason}") from None
