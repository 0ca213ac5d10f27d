"""`cfsfuse compare`: an image mounted in every way that works here, and whether all of them show what it says."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.cli import common
from cfsfuse.cli.main import CHECK_FAILED, DONE
from cfsfuse.contract.checks import CHECKS
from cfsfuse.contract.comparison import DENSE, IMAGE, Mounted
from cfsfuse.contract.entries import SAMPLE
from cfsfuse.errors import HostError, UsageError, printable
from cfsfuse.mount.options import AUTO, parse, split
from cfsfuse.mount.plan import Backend

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from cfsfuse.contract.comparison import Comparison, Finding
    from cfsfuse.contract.image import Observer
    from cfsfuse.mount.options import MountOptions
    from cfsfuse.mount.temporary import Attempt

ALL = "all"
_OF_ERRORS = ("lookup", "xattrs-absent", "access")
DEFAULT = ("stat", "xattrs", "readlink", "names", "digest", *_OF_ERRORS)
_NAMES = [backend.value for backend in Backend]
_EVERY_ID = range(2**32 - 1)
_REFRESH, _LINES = 0.1, 10.0  # seconds between two reports of the progress: on a terminal, and as lines


class _Request(NamedTuple):
    """What is asked for: mount options, backends by name, mounts that are there, checks."""

    options: MountOptions
    named: list[str]
    given: list[Mounted]
    checks: list[str]
    sparsely: tuple[str, ...]
    patience: float


class _Shown(NamedTuple):
    """A comparison, the mounts that take part, or do not, and the seconds for which one may keep it waiting."""

    comparison: Comparison
    attempts: list[Attempt]
    given: list[Mounted]
    patience: float

    @contextlib.contextmanager
    def findings(self) -> Iterator[Iterator[Finding]]:
        """Yield what makes the comparison, with its progress on standard error; it ends with the block."""
        from cfsfuse.contract.watched import watched

        with (
            _progress(self.comparison) as progress,
            contextlib.closing(watched(self.comparison, self.patience, progress)) as findings,
        ):
            yield findings


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"""\
Whether an entry is there, and of which type, is always compared. Besides that, these checks are made unless others are
named: {", ".join(DEFAULT)}. All there are:
  {", ".join(list(CHECKS)[: len(CHECKS) // 2])},
  {", ".join(list(CHECKS)[len(CHECKS) // 2 :])}
"digest" reads every file as a whole. Errors are compared by {", ".join(_OF_ERRORS)}: unless they are named,
at the first {DENSE} entries, and then at every {SAMPLE}th. "modify", "open" and "special" try in earnest what a
read-only mount must refuse.

The mounts are compared with the first of them, and each with the image. A backend that cannot verify here is mounted
with noverity, unless -o verity is given: what it shows is compared with what the image records. Exits with 1 when
anything differs.
"""
    common.add_image(parser)
    parser.add_argument(
        "-o", "--options", metavar="OPTIONS", action="append", default=[], help="mount options, as for cfsfuse mount"
    )
    parser.add_argument(
        "--backend",
        choices=_NAMES,
        action="append",
        default=[],
        help="mount by this backend; may be given several times; default: every one that works here",
    )
    parser.add_argument(
        "--mounted",
        metavar="NAME=DIR",
        action="append",
        default=[],
        help="compare the read-only mount at DIR as well, whoever made it; may be given several times",
    )
    parser.add_argument(
        "--check",
        metavar="NAME",
        choices=[*CHECKS, ALL],
        action="append",
        default=[],
        help="make this check; may be given several times; all: every one",
    )
    parser.add_argument(
        "--patience",
        metavar="SECONDS",
        type=float,
        default=60.0,
        help="how long a mount may keep everything waiting before it counts as hanging, which is an error (60)",
    )
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from cfsfuse.basedirs import BaseDirectories
    from cfsfuse.contract.comparison import Comparison
    from cfsfuse.contract.image import ImageWitness
    from cfsfuse.imagefile import naming
    from cfsfuse.mount.ladder import reader_of
    from cfsfuse.mount.probe import Host
    from cfsfuse.mount.temporary import mounted, offers

    request = _request(arguments)
    reader = reader_of(arguments.image, request.options.digest)
    reader()
    sys.stdout.flush()
    with common.terminable(), contextlib.ExitStack() as stack:
        given = [_checked(each, request.patience) for each in request.given]
        offered = offers(request.options, Host(reader, request.options.basedir).look, request.named)
        attempts = stack.enter_context(mounted(arguments.image, offered, request.named))
        taking_part = [
            Mounted(a.backend.value, os.fsencode(a.mountpoint)) for a in attempts if a.mountpoint is not None
        ]
        taking_part += given
        if not taking_part:
            raise HostError("; ".join(f"{each.backend.value} backend: {each.problem}" for each in attempts))
        with naming(arguments.image), contextlib.closing(BaseDirectories(request.options.basedir)) as directories:
            witness = ImageWitness(reader(), directories.exists, _observer(request.options))
            comparison = Comparison(witness, taking_part, request.checks, request.sparsely)
            for name in arguments.check:
                if name != ALL and not comparison.is_made(name):
                    raise UsageError(f"--check {name}: the image says nothing of it, so it takes two mounts")
            with common.output():
                write = _write_json if arguments.json else _write_text
                write(arguments.image, _Shown(comparison, attempts, given, request.patience))
    return DONE if comparison.are_equal else CHECK_FAILED


def _request(arguments: argparse.Namespace) -> _Request:
    text = ",".join(arguments.options)
    options = parse(text)
    if not options.basedir:
        raise UsageError("no base directory: name the object store with -o basedir=")
    refused = [name for name in ("upperdir", "idmap") if getattr(options, name) is not None]
    refused += ["rw"] if "rw" in split(text, ",") else []
    if refused:
        raise UsageError(
            f"option {refused[0]}: not for a comparison, which takes read-only mounts of the image as it is"
        )
    named = list(dict.fromkeys([*arguments.backend, *([] if options.backend == AUTO else [options.backend])]))
    checks = arguments.check or DEFAULT
    if not 0 < arguments.patience < float("inf"):
        raise UsageError(f"--patience {arguments.patience:g}: must be a number of seconds above 0")
    chosen = [name for name in CHECKS if name in checks or ALL in checks]
    return _Request(
        options, named, _given(arguments.mounted), chosen, () if arguments.check else _OF_ERRORS, arguments.patience
    )


def _given(words: list[str]) -> list[Mounted]:
    """Return the mounts that are named; nobody has looked at them yet."""
    given: list[Mounted] = []
    for word in words:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise UsageError(f"--mounted {word}: give it a name and a directory, as NAME=DIR")
        if name in (IMAGE, *_NAMES, *(each.name for each in given)):
            raise UsageError(f"--mounted {word}: the name {name} is taken; choose another")
        given.append(Mounted(name, os.fsencode(path)))
    return given


def _checked(given: Mounted, patience: float) -> Mounted:
    """Return a mount by its real path, if that is a read-only one; a child looks, for the mount may hang."""
    from cfsfuse.contract.entries import require_read_only
    from cfsfuse.contract.watched import unanswered
    from cfsfuse.processes import Overdue, bounded

    def look() -> Mounted:
        root = os.path.realpath(given.root)
        require_read_only(root)
        if not os.path.isdir(root):
            raise UsageError(f"--mounted {given.name}={os.fsdecode(given.root)}: not a directory")
        return Mounted(given.name, root)

    try:
        return bounded(look, patience)
    except Overdue:
        raise unanswered(given.name, b"", patience) from None


def _observer(options: MountOptions) -> Observer:
    from cfsfuse.contract.image import Observer
    from cfsfuse.fuse.caller import sees_trusted

    ids = {kind: _ids(kind) for kind in ("uid", "gid")}
    return Observer(
        sees_all=sees_trusted(os.getpid()),
        has_all_ids=all(ranges == [_EVERY_ID] for ranges in ids.values()),
        uid=_seen("uid", ids["uid"], options.uid),
        gid=_seen("gid", ids["gid"], options.gid),
    )


def _ids(kind: str) -> list[range]:
    """Return the owners that this process can see; user_namespaces(7)."""
    with open(f"/proc/self/{kind}_map", encoding="ascii") as file:
        return [range(int(first), int(first) + int(count)) for first, _, count in map(str.split, file)]


def _seen(kind: str, ids: list[range], forced: int | None) -> Callable[[int], int]:
    """Return what makes of an owner in the image the one that this process gets to see, or of all the one `forced`."""
    with open(f"/proc/sys/kernel/overflow{kind}", encoding="ascii") as file:
        overflow = int(file.read())

    def seen(number: int) -> int:
        shown = number if forced is None else forced
        return shown if any(shown in each for each in ids) else overflow

    return seen


def _write_text(image: str, shown: _Shown) -> None:
    from cfsfuse.cli.compare_report import Bounded, mounts, table

    comparison = shown.comparison
    print(f"{printable(os.fsencode(image))}:")
    for text in mounts(shown.attempts, shown.given):
        print(f"  {text}")
    sys.stdout.flush()
    found = Bounded()
    with shown.findings() as findings:
        found.add(findings)
    print("", *table(comparison), "", *found.lines(), sep="\n")
    unread = ", but for contents that nobody could read" if comparison.unread else ""
    print(f"equal{unread}" if comparison.are_equal else f"{found.total} differences")


def _write_json(image: str, shown: _Shown) -> None:
    """Write one document, its differences as they are found: there may be any number of them."""
    from cfsfuse.cli.compare_report import document, summary

    comparison = shown.comparison
    head: dict[str, object] = {**common.json_text("image", os.fsencode(image))}
    head["mounts"] = [
        {"name": backend.value, "mounted": mountpoint is not None, "problem": problem}
        for backend, mountpoint, problem in shown.attempts
    ] + [{"name": name, **common.json_text("directory", root)} for name, root in shown.given]
    head["checks"] = comparison.checks
    out = sys.stdout.buffer
    out.write(json.dumps(head)[:-1].encode() + b',\n"differences": ')
    with shown.findings() as findings:
        out.writelines(common.json_list(map(document, findings)))
    out.write(b"," + json.dumps(summary(comparison), indent=2).encode()[1:] + b"\n")


@contextlib.contextmanager
def _progress(comparison: Comparison) -> Iterator[Callable[[int], None]]:
    """Yield what shows how many entries are done: on a terminal a bar, elsewhere a line now and then."""
    total = comparison.image.reader.image.super_block.inos
    if not sys.stderr.isatty():
        yield _paced(lambda done: print(f"compared {done} of about {total} entries", file=sys.stderr), _LINES)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, auto_refresh=False, redirect_stdout=False) as bar:
        task = bar.add_task("", total=total)
        yield _paced(lambda done: bar.update(task, completed=done, refresh=True), _REFRESH)


def _paced(show: Callable[[int], object], interval: float) -> Callable[[int], None]:
    """Return what shows a number every so many seconds, however often it is told one."""
    shown = time.monotonic()

    def tell(done: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= interval:
            shown = now
            show(done)

    return tell
