"""`cfsfuse ls`: to the byte what `composefs-info ls` prints."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from cfsfuse.cli import common
from cfsfuse.dump import FirstNames, escape, escape_listing, payload
from cfsfuse.tree import Directory, Symlink

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from cfsfuse.erofs.reader import Reader
    from cfsfuse.tree import Node


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """\
A directory ends in a slash, "->" stands before the target of a symbolic link, "@" before the path of an object. Further
names of a file that has been listed already stand alone.
"""
    common.add_images(parser)
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    filters = common.check_filters(arguments.filter) if arguments.filter else None
    with common.output():
        if arguments.json:
            items = (item for image in arguments.images for item in _items(image, filters))
            sys.stdout.buffer.writelines(common.json_list(items))
            return 0
        for image in arguments.images:
            with common.opened(image) as reader:
                sys.stdout.buffer.writelines(_line(path, node) for path, node in _nodes(reader, filters))
    return 0


def _nodes(reader: Reader, filters: list[bytes] | None) -> Iterator[tuple[bytes, Node | None]]:
    """Yield path and node of everything but the root; None for a further name of a file."""
    names = FirstNames()
    for path, inode in common.walk(reader, filters):
        first = names.meet(path, inode)
        if path != b"/":
            yield path, reader.authored(inode) if first is None else None


def _line(path: bytes, node: Node | None) -> bytes:
    pointer = None if node is None else payload(node)
    text = escape_listing(path)
    if isinstance(node, Directory):
        return text + b"/\t\n"
    if pointer is None:
        return text + b"\n"
    return b"%s\t%s %s\n" % (text, b"->" if isinstance(node, Symlink) else b"@", escape(pointer))


def _items(image: str, filters: list[bytes] | None) -> Iterator[dict[str, str]]:
    with common.opened(image) as reader:
        for path, node in _nodes(reader, filters):
            item = {"image": image, **common.json_text("path", path)}
            if node is None:
                yield item | {"type": "link"}
                continue
            pointer = payload(node)
            item["type"] = common.type_name(node.stat.mode)
            if pointer is not None:
                item |= common.json_text("target" if isinstance(node, Symlink) else "object", pointer)
            yield item
