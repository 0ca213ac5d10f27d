"""`cfsfuse mount`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsfuse.mount.ladder import mount
from cfsfuse.mount.options import BACKENDS, parse
from cfsfuse.mount.serving import Serving

if TYPE_CHECKING:
    import argparse

    from cfsfuse.mount.options import MountOptions
    from cfsfuse.mount.plan import Backend, Verdict

OPTION_HELP = """\
mount options (-o, separated by commas; \\, and \\: stand for a comma and a colon in a path):
  basedir=DIR[:DIR]   where the objects are; searched in this order
  digest=HEX          the fs-verity digest that the image must have
  verity              fail to open files whose entry records no digest
  tryverity           verify the files whose entry records a digest (the default)
  noverity            verify nothing
  allow_other         let other users in; the default for root (noallow_other)
  uid=N, gid=N        show every file as owned by this user, by this group
  statfs=store|image  the free space that df shows: of the object store (default), or none
  backend=NAME        auto (default): the first of kernel, overlay and fuse that keeps the promise; or one of them
  upperdir=DIR, workdir=DIR
                      a tree that takes changes, in upperdir; ro: it does not
  idmap=FILE          a kernel mount with owners mapped as in this user namespace (/proc/PID/ns/user)
  log=FILE            write the log there; without it the system's log has it, or where there is none
                      ~/.local/state/cfsfuse/log/cfsfuse.log
  session=NAME        who speaks FUSE: native (default), or libfuse through pyfuse3
  poll=US             after a request wait that long for the next without sleeping (100 µs; 0: never)
  nosuid, suid, nodev, dev, noexec, exec are the kernel's (nosuid,nodev unless root says otherwise); ro, rw and those of
  fstab are accepted

files:
  ~/.cache/cfsfuse/merkle   Merkle trees of large objects, never trusted; may be deleted at any time
"""


def configure(parser: argparse.ArgumentParser) -> None:
    add_operands(parser)
    parser.add_argument(
        "-f", "--foreground", action="store_true", help="serve through FUSE in the foreground, log to standard error"
    )
    add_backend(parser)
    parser.add_argument("--explain", action="store_true", help="say also why each backend is chosen or refused")


def add_operands(parser: argparse.ArgumentParser) -> None:
    """Add what `mount.cfsfuse` takes as well."""
    parser.add_argument("image", metavar="IMAGE", help="the composefs image")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="an existing directory")
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `-o`, with the help of it."""
    parser.epilog = OPTION_HELP
    parser.add_argument(
        "-o", "--options", metavar="OPTIONS", action="append", default=[], help="mount options, see below"
    )


def add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=BACKENDS, help="how to mount: as -o backend=")


def options_of(arguments: argparse.Namespace) -> MountOptions:
    """Return what -o and --backend ask for."""
    options = parse(",".join(arguments.options))
    return options if arguments.backend is None else options._replace(backend=arguments.backend)


def run(arguments: argparse.Namespace) -> int:
    options = options_of(arguments)
    tell = _explain if arguments.explain else None
    serving = Serving.FOREGROUND if arguments.foreground else Serving.BACKGROUND
    mount(arguments.image, arguments.mountpoint, options, serving, tell)
    return 0


def _explain(verdicts: list[Verdict], chosen: Backend | None) -> None:
    from cfsfuse.cli import common
    from cfsfuse.cli.doctor import explanation

    with common.output():  # flushed in the end: a daemon would have what is not written yet as well
        print(*explanation(verdicts, chosen), sep="\n")
