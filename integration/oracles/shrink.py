"""Making a failing case small: parts are taken away as long as it fails."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from integration.oracles.nodes import Node, Path, without

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Fails = Callable[[Sequence[Node]], bool]


def shrink(nodes: Sequence[Node], fails: Fails, seconds: float = 30) -> list[Node]:
    """Return fewer and simpler nodes that fail as well, the best that was found within `seconds`."""
    end = time.monotonic() + seconds

    def still_fails(candidate: Sequence[Node]) -> bool:
        return time.monotonic() < end and fails(candidate)

    current = list(nodes)
    before: list[Node] = []
    while current != before and time.monotonic() < end:
        before = current
        current = _fewer(current, still_fails)
        current = _simpler(current, still_fails)
    return current


def _fewer(nodes: list[Node], fails: Fails) -> list[Node]:
    """Take away nodes, in ever smaller groups."""
    size = max(1, len(nodes) // 2)
    while True:
        at = 1  # the root stays
        while at < len(nodes):
            candidate = without(nodes, [node.path for node in nodes[at : at + size]])
            if fails(candidate):
                nodes = candidate
            else:
                at += size
        if size == 1:
            return _flatter(nodes, fails)
        size //= 2


def _flatter(nodes: list[Node], fails: Fails) -> list[Node]:
    """Take directories away from above what is in them."""
    at = 1
    while at < len(nodes):
        node = nodes[at]
        candidate = _renamed([*nodes[:at], *nodes[at + 1 :]], node.path, node.path[:-1])
        if node.is_directory and fails(candidate):
            nodes = candidate
        else:
            at += 1
    return nodes


def _simpler(nodes: list[Node], fails: Fails) -> list[Node]:
    """Make each node as plain as it can be."""
    at = 0
    while at < len(nodes):
        candidate = _first_that_fails(nodes, at, fails)
        if candidate is None:
            at += 1
        else:
            nodes = candidate
    return nodes


def _first_that_fails(nodes: list[Node], at: int, fails: Fails) -> list[Node] | None:
    """Return the nodes with one of them plainer."""
    for plainer in _plainer(nodes[at]):
        candidate = _replaced(nodes, at, plainer)
        if plainer != nodes[at] and fails(candidate):
            return candidate
    return None


def _replaced(nodes: list[Node], at: int, node: Node) -> list[Node]:
    return _renamed([*nodes[:at], node, *nodes[at + 1 :]], nodes[at].path, node.path)


def _renamed(nodes: list[Node], old: Path, new: Path) -> list[Node]:
    """Move what is below a node, and the links to it, along with it."""
    if old == new:
        return nodes
    size = len(old)

    def moved(path: Path) -> Path:
        return new + path[size:] if path[:size] == old else path

    return [
        node._replace(path=moved(node.path), link=None if node.link is None else moved(node.link)) for node in nodes
    ]


def _plainer(node: Node) -> Iterator[Node]:
    """Yield variants of a node, the plainest first."""
    yield node._replace(nlink=1, uid=0, gid=0, seconds=0, nanoseconds=0, xattrs=(), payload=None, digest=None)
    yield node._replace(nlink=1)
    yield node._replace(uid=0, gid=0)
    yield node._replace(seconds=0, nanoseconds=0)
    yield node._replace(payload=None)
    yield node._replace(digest=None)
    yield from _less_xattrs(node)
    yield from _less_content(node)
    if node.path:
        for name in filter(None, _shorter(node.path[-1])):
            yield node._replace(path=(*node.path[:-1], name))


def _less_xattrs(node: Node) -> Iterator[Node]:
    for count in (len(node.xattrs), len(node.xattrs) // 2, 1):
        for start in range(0, len(node.xattrs), max(1, count)):
            yield node._replace(xattrs=node.xattrs[:start] + node.xattrs[start + max(1, count) :])
    for number, (name, value) in enumerate(node.xattrs):
        for shorter in _shorter(value):
            yield node._replace(xattrs=(*node.xattrs[:number], (name, shorter), *node.xattrs[number + 1 :]))


def _less_content(node: Node) -> Iterator[Node]:
    if node.content is not None:
        for content in _shorter(node.content):
            yield node._replace(content=content, size=len(content))
    elif node.payload is not None:
        for payload in filter(None, _shorter(node.payload)):
            is_target = node.size == len(node.payload)
            yield node._replace(payload=payload, size=len(payload) if is_target else node.size)
    else:
        yield from (node._replace(size=size) for size in (0, 1, node.size // 2) if size < node.size)


def _shorter(value: bytes) -> Iterator[bytes]:
    """Yield shorter values, and one of the same length with plain bytes only."""
    for length in (0, 1, len(value) // 2, len(value) - 1):
        if 0 <= length < len(value):
            yield value[:length]
    if value.strip(b"x"):
        yield b"x" * len(value)
