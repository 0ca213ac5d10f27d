"""`cfsfuse mount`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from cfsfuse.cli.doctor import explanation
from cfsfuse.mount.ladder import mount
from cfsfuse.mount.options import BACKENDS, parse

if TYPE_CHECKING:
    import argparse

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
  backend=NAME        auto (default): the kernel where it keeps the promise, else FUSE; kernel; fuse
  upperdir=DIR, workdir=DIR
                      a kernel mount that takes changes, in upperdir; ro: it does not
  idmap=FILE          a kernel mount with owners mapped as in this user namespace (/proc/PID/ns/user)
  log=FILE            write the log there; without it the system's log has it, or where there is none
                      ~/.local/state/cfsfuse/log/cfsfuse.log
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
    parser.add_argument("--backend", choices=BACKENDS, help="how to mount: as -o backend=")
    parser.add_argument("--explain", action="store_true", help="say why each backend is chosen or refused")


def add_operands(parser: argparse.ArgumentParser) -> None:
    """Add what `mount.cfsfuse` takes as well."""
    parser.epilog = OPTION_HELP
    parser.add_argument("image", metavar="IMAGE", help="the composefs image")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="an existing directory")
    parser.add_argument(
        "-o", "--options", metavar="OPTIONS", action="append", default=[], help="mount options, see below"
    )


def run(arguments: argparse.Namespace) -> int:
    options = parse(",".join(arguments.options))
    if arguments.backend is not None:
        options = dataclasses.replace(options, backend=arguments.backend)
    tell = _explain if arguments.explain else None
    mount(arguments.image, arguments.mountpoint, options, foreground=arguments.foreground, tell=tell)
    return 0


def _explain(verdicts: list[Verdict], chosen: Backend | None) -> None:
    for line in explanation(verdicts, chosen):
        print(line, flush=True)  # a daemon would have what is not written yet as well
