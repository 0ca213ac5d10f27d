"""What is measured: each workload is an entry of WORKLOADS.

A workload runs on a mount of its own, once for each of its rows of seconds; the second of them finds what the first has
left in the caches. It runs in a child process that was forked: files are read by a loop of open, read until the end,
close. That is the tightest reader at hand: tar to /dev/null reads nothing, tar into a pipe puts a third process on the
processors that reader and server share, and whatever has to be started is first read back from the disk after the
caches were dropped. Its own cost is a few microseconds a file, the same for all, and it checks the number of bytes.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.bench.failure import ColumnFailed
from cfsfuse.bench.inputs import BLOCK, LARGE_SIZE, absent_names, random_offsets
from cfsfuse.bench.processes import processor_time

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cfsfuse.bench.inputs import File, Inputs
    from cfsfuse.bench.mounting import Mounted

_BUFFER = 1 << 20
_FORBIDDEN = ": Permission denied"


class Unit(Enum):
    """What the values of a row are."""

    SECONDS = "s"
    PROCESSOR = "s of processor time"
    MEMORY = "MiB"


class Row(NamedTuple):
    """A line of the table. `cold`: the caches are dropped before, or where that is not allowed, the mount is new."""

    key: str
    title: str
    unit: Unit = Unit.SECONDS
    cold: bool = False

    def titled(self, *, drops: bool) -> str:
        """Return the title; `drops` says whether caches are dropped here: what is not cold is not called so."""
        return f"{self.title}, {'cold' if drops else 'new mount'}" if self.cold else self.title


class Sample(NamedTuple):
    """One measurement: seconds on the clock, and seconds of processor time that the servers used meanwhile."""

    seconds: float
    processor: float


class Workload(NamedTuple):
    """What is done on a new mount, `run` for each row of seconds or processor time.

    `rehearsed` is preceded by the same on a mount that does not count: image, programs and objects are in memory then.
    `once`: in the first round only.
    """

    summary: str
    rows: tuple[Row, ...]
    run: Callable[[Inputs, Mounted], Sample]
    lacks: Callable[[Inputs], str | None] = lambda _inputs: None
    rehearsed: bool = False
    once: bool = False

    @property
    def is_cold(self) -> bool:
        return any(row.cold for row in self.rows)


def ready(_: Inputs, there: Mounted) -> Sample:
    """Take the time that the mount took; the processor time is that of the server, without the command's."""
    return Sample(there.ready, processor_time(there.servers))


def walk(_: Inputs, there: Mounted) -> Sample:
    """Let find(1) look at everything. What this user may not list is the same for all."""
    environment = os.environ | {"LC_ALL": "C"}
    command = ["find", there.mountpoint, "-ls"]
    with timed(there) as sample:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, check=False)
    said = os.fsdecode(done.stderr).split("\n")[:-1]
    wrong = [line for line in said if not line.endswith(_FORBIDDEN)]
    if wrong or (done.returncode and not said):
        raise ColumnFailed(wrong[0] if wrong else f"find ends with status {done.returncode}")
    return sample()


def read_small(inputs: Inputs, there: Mounted) -> Sample:
    return _read_files(inputs.small, there)


def read_large(inputs: Inputs, there: Mounted) -> Sample:
    return _read_files(_large(inputs), there)


def read_at_random(inputs: Inputs, there: Mounted) -> Sample:
    (file,) = _large(inputs)
    path = os.fsencode(there.mountpoint) + file.path
    offsets = random_offsets(file.size, inputs.extent.random)
    buffers = [bytearray(BLOCK)]
    with timed(there) as sample:
        fd = os.open(path, os.O_RDONLY)
        total = sum(os.preadv(fd, buffers, offset) for offset in offsets)
        os.close(fd)
    _check_total(total, len(offsets) * BLOCK)
    return sample()


def look_up_absent(inputs: Inputs, there: Mounted) -> Sample:
    """Look for names that are not there: distinct ones, in directories that the kernel knows already."""
    base = os.fsencode(there.mountpoint)
    for directory in inputs.directories:
        os.stat(base + directory)
    names = [base + name for name in absent_names(inputs.directories, inputs.extent.absent)]
    with timed(there) as sample:
        found = sum(os.access(name, os.F_OK) for name in names)
    if found:
        raise ColumnFailed(f"{found} of the names that should be absent are there")
    return sample()


def do_nothing(inputs: Inputs, there: Mounted) -> Sample:
    time.sleep(inputs.extent.settle)  # the end of the last request is not idleness
    with timed(there) as sample:
        time.sleep(inputs.extent.idle)
    return sample()


def check(inputs: Inputs, there: Mounted) -> tuple[()]:
    """Raise ColumnFailed unless it is this image that is mounted there, as far as a glance tells."""
    base = os.fsencode(there.mountpoint)
    if set(os.listdir(base)) != inputs.names:
        raise ColumnFailed("it has mounted something else: the names in its root are not those of the image")
    for file in [*inputs.small[:10], *_large(inputs)]:
        try:
            size = os.lstat(base + file.path).st_size
        except FileNotFoundError:
            size = None
        if size != file.size:
            raise ColumnFailed(f"it has mounted something else: {os.fsdecode(file.path)} is not as in the image")
    return ()


def _lacks_small(inputs: Inputs) -> str | None:
    return None if inputs.small else "the image has no small file whose content is an object"


def _lacks_large(inputs: Inputs) -> str | None:
    return None if inputs.large else f"the image has no file of {LARGE_SIZE >> 20} MiB or more"


WORKLOADS = {
    "mount": Workload(
        "mount until ls of the root answers", (Row("mount", "mount until ready"),), ready, rehearsed=True
    ),
    "walk": Workload(
        "find -ls of everything, twice; the server's memory after it",
        (
            Row("walk-cold", "walk", cold=True),
            Row("walk-again", "walk again"),
            Row("memory", "memory after the walk", Unit.MEMORY),
        ),
        walk,
    ),
    "small": Workload(
        "read small files spread over the image, twice",
        (Row("small-cold", "small files", cold=True), Row("small-again", "small files again")),
        read_small,
        _lacks_small,
    ),
    "large": Workload(
        "read the largest file, twice",
        (Row("large-cold", "large file", cold=True), Row("large-again", "large file again")),
        read_large,
        _lacks_large,
    ),
    "random": Workload(
        "read blocks of 4 KiB of it in a shuffled order, its object in memory, the mount new",
        (Row("random", "random reads, new mount"),),
        read_at_random,
        _lacks_large,
        rehearsed=True,
    ),
    "absent": Workload(
        "look up names that are not there", (Row("absent", "absent names"),), look_up_absent, rehearsed=True
    ),
    "idle": Workload(
        "do nothing, in the first round only", (Row("idle", "idle", Unit.PROCESSOR),), do_nothing, once=True
    ),
}


def _large(inputs: Inputs) -> list[File]:
    return [] if inputs.large is None else [inputs.large]


def _read_files(files: Sequence[File], there: Mounted) -> Sample:
    base = os.fsencode(there.mountpoint)
    paths = [base + file.path for file in files]
    buffers = [bytearray(_BUFFER)]
    total = 0
    with timed(there) as sample:
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            while count := os.readv(fd, buffers):
                total += count
            os.close(fd)
    _check_total(total, sum(file.size for file in files))
    return sample()


def _check_total(total: int, expected: int) -> None:
    if total != expected:
        raise ColumnFailed(f"{total} bytes read where the image has {expected}")


@contextlib.contextmanager
def timed(there: Mounted) -> Iterator[Callable[[], Sample]]:
    """Measure a block; what is yielded gives the sample once the block has ended."""
    samples: list[Sample] = []
    processor = processor_time(there.servers)
    start = time.perf_counter()
    yield lambda: samples[0]
    seconds = time.perf_counter() - start
    samples.append(Sample(seconds, processor_time(there.servers) - processor))
