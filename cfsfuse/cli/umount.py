"""`cfsfuse umount`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsfuse.mount.unmount import unmount

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="where the image is mounted")
    parser.add_argument("-l", "--lazy", action="store_true", help="unmount a mount in use: hide it now, end it later")


def run(arguments: argparse.Namespace) -> int:
    unmount(arguments.mountpoint, lazy=arguments.lazy)
    return 0
