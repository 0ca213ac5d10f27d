"""`cfsfuse objects`: to the byte what `composefs-info objects` prints, the objects of all images sorted."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.cli import common
from cfsfuse.tree import External

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator

    from cfsfuse.erofs.overlay import Digest


class Object(NamedTuple):
    """What an image says of an object; `path` is below a base directory, `size` is in bytes."""

    path: bytes
    size: int
    digest: Digest | None


def configure(parser: argparse.ArgumentParser) -> None:
    common.add_images(parser)
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    write(needed(arguments.images, arguments.filter), as_json=arguments.json)
    return 0


def needed(images: Iterable[str], filters: list[str]) -> list[Object]:
    """Return the objects that the images need, each once, in the order of their paths' bytes."""
    names = common.check_filters(filters) if filters else None
    found: dict[bytes, Object] = {}
    for image in images:
        for path, size, digest in _objects(image, names):
            if path not in found:
                found[path] = Object(path, size, digest)
    return [found[path] for path in sorted(found)]


def write(objects: Iterable[Object], *, as_json: bool) -> None:
    """Print the objects, one a line, or as one JSON document."""
    with common.output():
        if as_json:
            sys.stdout.buffer.writelines(common.json_list(map(_item, objects)))
        else:
            sys.stdout.buffer.writelines(item.path + b"\n" for item in objects)


def _objects(image: str, filters: list[bytes] | None) -> Iterator[Object]:
    with common.opened(image) as reader:
        for _, inode in common.walk(reader, filters):
            # Everything that has an object is a chunk-based regular file with xattrs, or an empty one.
            node = reader.authored(inode) if inode.is_regular and inode.xattr_offset else None
            if isinstance(node, External) and node.path is not None:
                yield Object(node.path, node.stat.size, node.digest)


def _item(item: Object) -> dict[str, object]:
    digest = {"digest": f"{item.digest.algorithm}:{item.digest.value.hex()}"} if item.digest else {}
    return {**common.json_text("path", item.path), "size": item.size, **digest}
