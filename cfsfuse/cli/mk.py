"""`cfsfuse mk`: to the byte what `mkcomposefs` writes, by the same options."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
import time
from typing import TYPE_CHECKING

from cfsfuse import collector
from cfsfuse.builder.destination import STANDARD_OUTPUT
from cfsfuse.builder.image import Job, count, from_directory, from_tree, read_dump
from cfsfuse.builder.scan import Options, Xattrs
from cfsfuse.cli import common
from cfsfuse.erofs.writer import Versions
from cfsfuse.errors import HostError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import BinaryIO

    from cfsfuse.builder.image import Built, Report
    from cfsfuse.builder.scan import Progress
    from cfsfuse.builder.store import Summary

_EPILOG = """\
The image is the same, to the last byte, as mkcomposefs 1.0.8 makes from the same source by the same options. It appears
under its name when it is whole, or not at all; what exists and is no regular file, and /proc/self/fd/N, is written to
as it is. On standard output the digest follows the image. Symbolic links below SOURCE are never followed. A file that
changes while it is read fails the build.

Files of more than 64 bytes become objects of the store, named after their fs-verity digest; the store serves any number
of images, and several builders at once. Without --digest-store the image is made alone. fs-verity is enabled on
the objects where the file system can.

In a dump, a digest of 128 digits is kept, as sha512; mkcomposefs makes 64 digits, sha256, of it.

examples:
  cfsfuse mk --digest-store=objects --print-digest tree image.cfs  an image of the directory tree; its digest is printed
  cfsfuse dump image.cfs | cfsfuse mk --from-file - copy.cfs  the same image again, out of its dump
  cfsfuse mk --print-digest-only tree  what the digest would be; nothing is written
"""

_STANDARD_INPUT = "-"
# A dump says all of it itself, and has no contents to store. mkcomposefs takes these as well, and does nothing.
_FOR_DIRECTORIES = (
    "digest_store",
    "use_epoch",
    "skip_devices",
    "skip_xattrs",
    "user_xattrs",
    "hard_links",
    "verify_existing",
    "no_merkle",
)
# Seconds between two reports of the progress: on a terminal, and as lines.
_REFRESH = 0.1
_LINES = 10.0


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} [options] SOURCE IMAGE"
    parser.epilog = _EPILOG
    parser.add_argument("source", metavar="SOURCE", help="the directory to build from; with --from-file, the dump")
    image = parser.add_argument("image", metavar="IMAGE", help="the file to write; - is standard output")
    parser.add_argument("--digest-store", metavar="DIR", help="store the contents here, as objects for basedir=")
    parser.add_argument("--print-digest", action="store_true", help="print the fs-verity digest of the image")
    parser.add_argument(
        "--print-digest-only",
        action=_WithoutImage,
        image=image,
        help="print it, and write no image: IMAGE is left out",
    )
    parser.add_argument("--use-epoch", action="store_true", help="make all times of modification 0")
    parser.add_argument("--skip-devices", action="store_true", help="leave block and character devices out")
    xattrs = parser.add_mutually_exclusive_group()
    xattrs.add_argument("--skip-xattrs", action="store_true", help="leave extended attributes out")
    xattrs.add_argument("--user-xattrs", action="store_true", help="leave them out but for those of user.*")
    parser.add_argument("--from-file", action="store_true", help="SOURCE is a composefs-dump(5), - is standard input")
    parser.add_argument(
        "--min-version", metavar="N", type=int, help="the format version; default: 0, also when only the other is given"
    )
    parser.add_argument(
        "--max-version",
        metavar="N",
        type=int,
        help="the highest to raise it to for a tree with whiteouts; default: 1, or 0 when only the other is given",
    )
    parser.add_argument(
        "--threads", metavar="N", type=_positive, default=0, help="worker processes; default: as many as processors"
    )
    parser.add_argument(
        "--hard-links", action="store_true", help="keep hard links, which mkcomposefs makes files of their own"
    )
    parser.add_argument(
        "--verify-existing", action="store_true", help="measure the objects that are there already, and repair them"
    )
    parser.add_argument(
        "--no-merkle", action="store_true", help="record no Merkle trees of large objects in the store's .merkle"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document about what has been done")


class _WithoutImage(argparse.Action):
    """Makes an operand dispensable. Were it optional from the start, options could not stand between the operands."""

    def __init__(self, image: argparse.Action, **more: object) -> None:
        super().__init__(nargs=0, default=False, **more)  # type: ignore[arg-type]  # those of add_argument
        self._image = image

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002 - argparse fixes the parameters
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,  # noqa: ARG002 - likewise
        option_string: str | None = None,  # noqa: ARG002 - likewise
    ) -> None:
        self._image.required = False
        setattr(namespace, self.dest, True)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    began = time.monotonic()
    _check(arguments)
    with collector.paused(), common.terminable():
        built = _from_file(arguments) if arguments.from_file else _from_directory(arguments)
        # The tree lives to the end of the process. To look for cycles in it now, and again at exit, would take longer
        # than to write the image.
        gc.freeze()
    with common.output():
        if arguments.json:
            print(json.dumps(_document(built, time.monotonic() - began), indent=2))
        elif arguments.print_digest or arguments.print_digest_only:
            print(built.digest)
    _remark(arguments, built)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.print_digest_only and arguments.image is not None:
        raise UsageError("--print-digest-only writes no image: leave IMAGE out")
    if arguments.json and arguments.image == STANDARD_OUTPUT:
        raise UsageError("--json: standard output has the image already; name a file for it")
    for name, value in (("IMAGE", arguments.image), ("--digest-store", arguments.digest_store)):
        if value == "":
            raise UsageError(f"{name} is empty; give it a path")


def _remark(arguments: argparse.Namespace, built: Built) -> None:
    """Say what somebody may have expected to be otherwise."""
    if arguments.from_file:
        given = ["--" + name.replace("_", "-") for name in _FOR_DIRECTORIES if getattr(arguments, name)]
        if given:
            _say(f"without effect, as a dump says it all and has no contents: {', '.join(given)}")
    store = built.objects
    if store is not None and store.verity_problem is not None and store.new_objects + store.repaired_objects:
        _say(f"fs-verity is not enabled on the objects: {store.verity_problem}")


def _versions(arguments: argparse.Namespace) -> Versions:
    """Return the format versions: as in mkcomposefs, the one that is not given is 0 when the other one is."""
    minimum, maximum = arguments.min_version, arguments.max_version
    return Versions() if minimum is maximum is None else Versions(minimum or 0, maximum or 0)


def _from_directory(arguments: argparse.Namespace) -> Built:
    xattrs = Xattrs.NONE if arguments.skip_xattrs else Xattrs.USER if arguments.user_xattrs else Xattrs.ALL
    options = Options(
        use_epoch=arguments.use_epoch,
        skip_devices=arguments.skip_devices,
        xattrs=xattrs,
        hard_links=arguments.hard_links,
        processes=arguments.threads,
    )
    job = Job(
        source=arguments.source,
        image=arguments.image,
        store=arguments.digest_store,
        options=options,
        versions=_versions(arguments),
        trees=not arguments.no_merkle,
        verify_existing=arguments.verify_existing,
    )
    with _progress() as report:
        return from_directory(job, report)


def _from_file(arguments: argparse.Namespace) -> Built:
    with _opened_dump(arguments.source) as (file, name):
        return from_tree(lambda: read_dump(file, name), arguments.image, _versions(arguments))


@contextlib.contextmanager
def _opened_dump(path: str) -> Iterator[tuple[BinaryIO, str]]:
    """Yield a dump and its name in errors."""
    if path == _STANDARD_INPUT:
        yield sys.stdin.buffer, "standard input"
        return
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below: only opening it is the user's mistake
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UsageError(f"{path}: {error.strerror}; --from-file builds from a file with a dump") from None
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}") from None
    with file:
        yield file, path


def _document(built: Built, seconds: float) -> dict[str, object]:
    """Return what --json prints: sizes in bytes."""
    counts = count(built.root)
    links = {"hard link": counts.pop(0)} if 0 in counts else {}
    entries = {common.type_name(kind): number for kind, number in sorted(counts.items())} | links
    return {
        "digest": built.digest,
        "version": built.version,
        "size": built.size,
        "entries": entries,
        "objects": None if built.objects is None else _objects(built.objects),
        "seconds": round(seconds, 3),
    }


def _objects(summary: Summary) -> dict[str, object]:
    return {
        "new": {"count": summary.new_objects, "bytes": summary.new_bytes},
        "reused": {"count": summary.reused_objects, "bytes": summary.reused_bytes},
        "repaired": {"count": summary.repaired_objects, "bytes": summary.repaired_bytes},
        "trees": summary.new_trees,
        "fsverity": summary.has_verity,
        "fsverity_problem": summary.verity_problem,
    }


def _say(text: str) -> None:
    print(f"cfsfuse mk: {text}", file=sys.stderr)


@contextlib.contextmanager
def _progress() -> Iterator[Report]:
    """Yield what shows the progress: on a terminal a line that is kept up to date, elsewhere a line now and then."""
    if not sys.stderr.isatty():
        yield _Paced(lambda progress, seconds: _say(_line(progress, seconds)), _LINES)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.fields[files]} files"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    # Refreshed when there is news: rich's own thread would run while worker processes are forked.
    with Bar(*columns, console=Console(stderr=True), transient=True, auto_refresh=False, redirect_stdout=False) as bar:
        task = bar.add_task("", total=None, files=0)

        def show(progress: Progress, _seconds: float) -> None:
            total = None if progress.walking else progress.total_bytes
            bar.update(task, completed=progress.bytes, total=total, files=progress.files, refresh=True)

        yield _Paced(show, _REFRESH)


class _Paced:
    """Shows the progress every so many seconds, however often it is told of it."""

    def __init__(self, show: Callable[[Progress, float], None], interval: float) -> None:
        self._show = show
        self._interval = interval
        self._began = self._shown = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._shown >= self._interval:
            self._shown = now
            self._show(progress, now - self._began)


def _line(progress: Progress, seconds: float) -> str:
    """Return the progress after so many seconds as text."""
    rate = progress.bytes / seconds
    done = f"{progress.files} of {progress.total_files} files, {_size(progress.bytes)} of {_size(progress.total_bytes)}"
    text = f"{done}, {_size(rate)}/s"
    if progress.walking:
        return f"{text}; still looking for more"
    return f"{text}, {(progress.total_bytes - progress.bytes) / rate:.0f} s left" if rate else text


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
