"""A directory, a dump or a tree → an image file, and its objects in a store: what `cfsfuse mk` and the API share.

What is cheap to check comes first, then the source is read, then the image is written and measured on its way. The
objects get their names before the image has its own: an image that is there has its objects.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse import collector
from cfsfuse.builder.destination import STANDARD_OUTPUT, NewFile, destination
from cfsfuse.builder.scan import Options, scan
from cfsfuse.builder.store import StoreWriter
from cfsfuse.dump import parse
from cfsfuse.erofs.writer import DEFAULT_VERSIONS, Versions, lay_out
from cfsfuse.errors import DumpError, HostError, SourceError, UsageError
from cfsfuse.tree import Link
from cfsfuse.verity.digest import BLOCK_SIZE, SHA256
from cfsfuse.verity.merkle import digest_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

    from cfsfuse.builder.destination import Destination, Write
    from cfsfuse.builder.scan import Progress
    from cfsfuse.builder.store import Summary
    from cfsfuse.erofs.writer import Layout
    from cfsfuse.tree import Entry

    Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Job:
    """What to build from the directory `source`, and where the image and the objects go: None is nowhere.

    `trees` records the Merkle trees of large objects, `verify_existing` measures the objects that the store has
    already.
    """

    source: str
    image: str | None = None
    store: str | None = None
    options: Options = field(default_factory=Options)
    versions: Versions = DEFAULT_VERSIONS
    trees: bool = True
    verify_existing: bool = False


class Built(NamedTuple):
    """An image that has been made: its fs-verity digest in hex, format version, size in bytes, and its tree.

    `objects` says what has been done in the store, if there was one.
    """

    digest: str
    version: int
    size: int
    root: Entry
    objects: Summary | None


def from_directory(job: Job, report: Report | None = None) -> Built:
    """Build as `job` says; `report` is told of the progress.

    Raises UsageError when nothing has been done yet; SourceError, StoreError, TreeError or HostError with nothing of
    this build left behind.
    """
    check_versions(job.versions)
    _check_places(job)
    with contextlib.ExitStack() as stack:
        stack.enter_context(collector.paused())
        target = stack.enter_context(destination(job.image))
        store = None
        if job.store is not None:
            store = stack.enter_context(StoreWriter(job.store, trees=job.trees, verify_existing=job.verify_existing))
        tree = scan(job.source, job.options, store, report, _outputs(job, target, store))
        return finish(tree, target, job.versions, store)


def _outputs(job: Job, target: Destination, store: StoreWriter | None) -> dict[tuple[int, int], str]:
    """Return the directories that are written to, which may be inside the source by a way that no path shows."""
    outputs = {}
    if isinstance(target, NewFile):
        outputs[_identity(target.directory)] = f"{job.image} would be written there, into its own source"
    if store is not None:
        outputs[_identity(store.descriptors[0])] = f"is the object store {job.store}; keep it outside of the source"
    return outputs


def _identity(directory: str | int) -> tuple[int, int]:
    status = os.stat(directory)
    return status.st_dev, status.st_ino


def from_tree(
    tree: Entry | Callable[[], Entry],
    image: str | None,
    versions: Versions = DEFAULT_VERSIONS,
    store: StoreWriter | None = None,
) -> Built:
    """Build the image of a tree; a callable gives it when all that is cheap has been checked.

    `store` has the contents of its files; they are published with the image.
    """
    check_versions(versions)
    with collector.paused(), destination(image) as target:
        return finish(tree() if callable(tree) else tree, target, versions, store)


def read_dump(file: BinaryIO, name: str) -> Entry:
    """Return the tree that the composefs-dump(5) text in `file` describes; errors call the file `name`."""
    try:
        return parse(file)
    except DumpError as error:
        error.file = name
        raise
    except OSError as error:
        raise HostError(f"{name}: {error.strerror}") from None


def check_versions(versions: Versions) -> None:
    """Raise UsageError for a format version that there is not."""
    versions.choose(has_whiteouts=False)


def finish(root: Entry, target: Destination, versions: Versions, store: StoreWriter | None) -> Built:
    """Write the image of a tree to `target`; the objects of `store` are published before the image is."""
    layout = lay_out(root, versions)
    with target.opened(None if store is None else store.publish) as write:
        digest = _write(layout, write)
    return Built(digest, layout.version, layout.size, root, None if store is None else store.summary)


def _write(layout: Layout, write: Write) -> str:
    """Write an image and return its digest."""

    def blocks() -> Iterator[memoryview]:
        rest = b""
        for piece in layout.pieces():
            write(piece)
            data = rest + piece
            whole = len(data) & -BLOCK_SIZE
            yield memoryview(data)[:whole]
            rest = data[whole:]

    return digest_of(SHA256, layout.size, blocks()).hex()


def count(root: Entry) -> Counter[int]:
    """Return how many nodes a tree has of each file type (S_IFMT), and as 0 how many further names of files."""
    counts: Counter[int] = Counter()
    pending = [root]
    while pending:
        entry = pending.pop()
        counts[stat.S_IFMT(entry.node.stat.mode)] += 1
        for child in entry.children.values():
            if isinstance(child, Link):
                counts[0] += 1
            else:
                pending.append(child)
    return counts


def _check_places(job: Job) -> None:
    """Raise UsageError where the source is none, or where building would change it."""
    if not job.source:
        raise UsageError("SOURCE is empty; name a directory")
    try:
        source = os.stat(job.source)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{job.source}: {error.strerror}; name the directory to build from") from None
    except OSError as error:
        raise SourceError(os.fsencode(job.source), str(error.strerror)) from None
    if not stat.S_ISDIR(source.st_mode):
        raise UsageError(f"{job.source}: not a directory; --from-file builds from a dump")
    if job.image is not None and job.image != STANDARD_OUTPUT and _is_inside(job.image, source):
        raise UsageError(f"{job.image}: the image would be inside its own source {job.source}; write it elsewhere")
    if job.store is not None and _is_inside(job.store, source):
        raise UsageError(f"{job.store}: the object store is inside the source {job.source}; keep it elsewhere")


def _is_inside(path: str, directory: os.stat_result) -> bool:
    """Return whether `path`, which need not exist, is `directory` or below it, by whatever name."""
    path = os.path.realpath(path)
    while True:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), directory):
                return True
        parent = os.path.dirname(path)
        if parent == path:
            return False
        path = parent
