"""`cfsfuse stat`: everything that an image says of an entry."""

from __future__ import annotations

import datetime as dt
import json
import os
import stat
import sys
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.access import resolve
from cfsfuse.cli import common
from cfsfuse.dump import escape_listing
from cfsfuse.erofs.inode import NSEC_PER_SEC
from cfsfuse.tree import External, Symlink

if TYPE_CHECKING:
    import argparse

    from cfsfuse.erofs.inode import Inode
    from cfsfuse.tree import Node

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


class Entry(NamedTuple):
    """What is shown: the path as it was asked for, the inode and the node as the kernel mount shows it."""

    path: bytes
    inode: Inode
    node: Node


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "A symbolic link at the end of PATH is shown itself; those on the way are followed inside the image.\n"
    )
    common.add_image(parser)
    parser.add_argument("path", metavar="PATH", help="an entry of the image")
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    path = os.fsencode(arguments.path)
    with common.opened(arguments.image) as reader:
        inode = resolve(reader, path, follow=False)
        entry = Entry(path, inode, reader.node(inode))
    text = json.dumps(_document(entry), indent=2).encode() + b"\n" if arguments.json else b"".join(_lines(entry))
    with common.output():
        sys.stdout.buffer.write(text)
    return 0


def _lines(entry: Entry) -> list[bytes]:
    _, inode, node = entry
    mode = f"{stat.S_IMODE(inode.mode):04o} {stat.filemode(inode.mode)}"
    fields: list[tuple[str, bytes]] = [
        ("path", escape_listing(entry.path)),
        ("type", common.type_name(inode.mode).encode()),
        ("size", b"%d" % inode.size),
        ("blocks", b"%d" % inode.blocks),
        ("inode", b"%d" % inode.nid),
        ("links", b"%d" % inode.nlink),
        ("mode", mode.encode()),
        ("uid", b"%d" % inode.uid),
        ("gid", b"%d" % inode.gid),
        ("modified", _time(inode.mtime_ns).encode()),
    ]
    if inode.is_device:
        fields.append(("device", b"%d:%d" % common.device_numbers(inode.rdev)))
    if isinstance(node, Symlink):
        fields.append(("target", escape_listing(node.target)))
    if isinstance(node, External):
        fields.append(("object", b"-" if node.path is None else escape_listing(node.path)))
        fields.append(("digest", (_digest(node) or "-").encode()))
    fields += [("xattr", escape_listing(name) + b"=" + escape_listing(value)) for name, value in node.xattrs.items()]
    return [b"%9s: %s\n" % (name.encode(), value) for name, value in fields]


def _document(entry: Entry) -> dict[str, object]:
    _, inode, node = entry
    document: dict[str, object] = {
        **common.json_text("path", entry.path),
        "type": common.type_name(inode.mode),
        "size": inode.size,
        "blocks": inode.blocks,
        "inode": inode.nid,
        "links": inode.nlink,
        "mode": f"{stat.S_IMODE(inode.mode):04o}",
        "uid": inode.uid,
        "gid": inode.gid,
        "mtime_ns": inode.mtime_ns,
    }
    if inode.is_device:
        document["device"] = list(common.device_numbers(inode.rdev))
    if isinstance(node, Symlink):
        document |= common.json_text("target", node.target)
    if isinstance(node, External):
        document |= {"object": None} if node.path is None else common.json_text("object", node.path)
        document["digest"] = _digest(node)
    xattrs = [common.json_text("name", name) | common.json_text("value", value) for name, value in node.xattrs.items()]
    return document | {"xattrs": xattrs}


def _digest(node: External) -> str | None:
    return f"{node.digest.algorithm}:{node.digest.value.hex()}" if node.digest else None


def _time(mtime_ns: int) -> str:
    """Return a time as date(1) writes it, or as seconds since 1970 where the calendar ends."""
    seconds, nanoseconds = divmod(mtime_ns, NSEC_PER_SEC)
    try:
        moment = _EPOCH + dt.timedelta(seconds=seconds)
    except OverflowError:
        return f"@{seconds}.{nanoseconds:09}"
    return f"{moment:%Y-%m-%d %H:%M:%S}.{nanoseconds:09} +0000"
