"""`cfsfuse bench`: the speed of each backend, and of other programs, side by side."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from typing import TYPE_CHECKING

from cfsfuse.atomic import opened_directory, published
from cfsfuse.bench import caches, figures, report
from cfsfuse.bench.columns import backends, check_names, check_options, peer
from cfsfuse.bench.inputs import FULL, QUICK, has_recorded_tree, pick
from cfsfuse.bench.machine import describe
from cfsfuse.bench.mounting import scratch_directory
from cfsfuse.bench.run import Run, Task
from cfsfuse.bench.workloads import WORKLOADS
from cfsfuse.cli import common
from cfsfuse.errors import HostError, UsageError
from cfsfuse.imagefile import naming
from cfsfuse.mount.ladder import reader_of
from cfsfuse.mount.options import AUTO
from cfsfuse.mount.plan import Backend
from cfsfuse.mount.probe import Host
from cfsfuse.objects import WHOLE_FILE_MAX
from cfsfuse.processes import Started, adopting
from cfsfuse.verification import Verification

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from cfsfuse.bench.run import Step
    from cfsfuse.erofs.reader import Reader
    from cfsfuse.mount.options import MountOptions

_ROWS = "".join(f"  {name:<8} {workload.summary}\n" for name, workload in WORKLOADS.items())
_EPILOG = f"""\
Every backend that works here and every peer mount the same image in turns, round by round; the table has the medians,
and how many times the first peer's they are, or without a peer those of the first column. A backend that cannot verify
on this host is measured without, and its column says so, unless -o verity is given. Mount options are those of cfsfuse
mount; rw and upperdir= are not for a benchmark.

A peer is any program that mounts. Its command is split into words as a shell does, but no shell runs it; {{image}},
{{basedir}} and {{mountpoint}} are replaced. It has to return when the mount is there, and may leave a server in the
background, which ends with the mount. A peer that fails, hangs, or mounts something else is killed with all that it has
started, and named; the rest goes on.

Only root, outside of user namespaces, can drop the kernel's caches. For others the rows are not called cold but new
mount, and only files are read that every user may read.

rows:
{_ROWS}"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    common.add_image(parser)
    parser.add_argument(
        "-o", "--options", metavar="OPTIONS", action="append", default=[], help="mount options; basedir= is needed"
    )
    parser.add_argument(
        "--backend",
        action="append",
        default=[],
        choices=[backend.value for backend in Backend],
        help="measure this one, instead of all that work here; may be given several times",
    )
    parser.add_argument(
        "--peer",
        metavar="NAME=COMMAND",
        action="append",
        default=[],
        help="measure this program, too, see below; may be given several times",
    )
    parser.add_argument("--rounds", metavar="N", type=int, help="how often each row is measured (3; with --quick 1)")
    parser.add_argument("--rows", metavar="ROWS", default=",".join(WORKLOADS), help="which ones, as a,b,c (all)")
    parser.add_argument("--quick", action="store_true", help="do less of everything: rough figures, in a minute or so")
    parser.add_argument(
        "--patience",
        metavar="SECONDS",
        type=float,
        default=600.0,
        help="how long a row may take before it counts as hanging (600); a mount, too, but a minute at most",
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="write the figures there as bars, in SVG, readable without colour"
    )
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    text = ",".join(arguments.options)
    options = check_options(text)
    named = arguments.backend or [name for name in (options.backend,) if name != AUTO]
    peers = [peer(given) for given in arguments.peer]
    check_names(peers)
    _check(arguments)
    reader = reader_of(arguments.image, options.digest)
    started = Started()
    with common.terminable(), scratch_directory() as scratch:
        columns = backends(text, named, Host(reader, options.basedir).look, scratch.log)
        drops = caches.can_drop()
        with naming(arguments.image):
            inputs = pick(reader(), QUICK if arguments.quick else FULL, for_everybody=not drops)
        task = Task(
            image=arguments.image,
            basedir=options.basedir,
            columns=[*columns.chosen, *peers],
            inputs=inputs,
            workloads=_workloads(arguments.rows),
            rounds=arguments.rounds or (1 if arguments.quick else 3),
            patience=arguments.patience,
            drops=drops,
        )
        machine = describe()
        with adopting(), _progress() as shown:
            measured = Run(task, scratch, started, *shown)
            measured.all()
    remarks = list(_remarks(task, options, reader()))
    done = report.Report(task, measured.results, measured.failed, columns.left_out, text, machine, remarks)
    _require_figures(done)
    _publish(done, arguments)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise an error for what would come up only when all is measured, or in every column."""
    if arguments.rounds is not None and arguments.rounds < 1:
        raise UsageError(f"--rounds {arguments.rounds}: must be at least 1")
    if not 0 < arguments.patience < float("inf"):
        raise UsageError(f"--patience {arguments.patience:g}: must be a number of seconds above 0")
    _workloads(arguments.rows)
    for program, package in (("find", "findutils"), ("ls", "coreutils")):
        if shutil.which(program) is None:
            raise HostError(f"{program}: not found; install the package {package}")
    if arguments.plot is not None:
        folder = os.path.dirname(os.path.abspath(arguments.plot))
        if os.path.isdir(arguments.plot) or not os.path.isdir(folder):
            raise UsageError(f"--plot {arguments.plot}: must name a file in a directory that is there")
        if not os.access(folder, os.W_OK):
            raise HostError(f"--plot {arguments.plot}: {folder} is not writable for this user")


def _workloads(text: str) -> list[str]:
    """Return the workloads of --rows, in the order of the table."""
    given = [name for name in text.split(",") if name]
    unknown = sorted(set(given) - set(WORKLOADS))
    if unknown or not given:
        raise UsageError(f"--rows {text}: must be some of {','.join(WORKLOADS)}")
    return [name for name in WORKLOADS if name in given]


def _remarks(task: Task, options: MountOptions, reader: Reader) -> Iterator[str]:
    """Yield what makes figures other than one may think."""
    if not task.drops:
        yield (
            "The kernel's caches cannot be dropped here (only root can, outside of user namespaces): "
            'rows are of a "new mount", not cold.'
        )
    large = task.inputs.large
    if large is None or large.size <= WHOLE_FILE_MAX or not {"large", "random"} & set(task.workloads):
        return
    if options.verification is not Verification.OFF and not has_recorded_tree(reader, options.basedir, large):
        yield (
            "The store has no recorded Merkle tree (.merkle/) of the large file: what verifies in user space computes "
            "it when the file is first opened; cfsfuse mk records them."
        )


def _require_figures(done: report.Report) -> None:
    if done.reference is None:
        reasons = [f"{name}: {reason}" for name, reason in {**done.left_out, **done.failed}.items()]
        raise HostError(f"nothing could be measured: {'; '.join(reasons)}")


def _publish(done: report.Report, arguments: argparse.Namespace) -> None:
    if arguments.plot is not None:
        folder, name = os.path.split(os.path.abspath(arguments.plot))
        with (
            opened_directory(os.path.realpath(folder)) as directory,
            published(directory, os.fsencode(name)) as fd,
            open(fd, "w", encoding="utf-8", closefd=False) as file,
        ):
            file.write(figures.svg(done))
    with common.output():
        print(json.dumps(_document(done), indent=1) if arguments.json else report.table(done))


def _document(done: report.Report) -> dict[str, object]:
    large = done.task.inputs.large
    paths = common.json_text("image", os.fsencode(done.task.image))
    return paths | (common.json_text("large_file", large.path) if large else {}) | report.document(done)


def _say(text: str) -> None:
    print(f"cfsfuse bench: {text}", file=sys.stderr, flush=True)


def _say_step(step: Step) -> None:
    if step.figures:
        _say(f"{step.done}/{step.total}: {step.what}: {step.figures}")


@contextlib.contextmanager
def _progress() -> Iterator[tuple[Callable[[Step], None], Callable[[str], None]]]:
    """Yield what shows a step, and what shows a warning: on a terminal below and above a bar, elsewhere as lines."""
    if not sys.stderr.isatty():
        yield _say_step, _say
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    # Refreshed when there is news: rich's own thread would run beside what is measured, and while processes are forked.
    with Bar(*columns, console=console, transient=True, auto_refresh=False, redirect_stdout=False) as bar:
        task = bar.add_task("", total=None)

        def show(step: Step) -> None:
            bar.update(task, completed=step.done, total=step.total, description=step.what, refresh=True)

        yield show, lambda text: console.print(f"cfsfuse bench: {text}", markup=False, highlight=False, soft_wrap=True)
