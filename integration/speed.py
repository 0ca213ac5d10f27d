"""Speed, beside a peer: `python -m integration.speed --image I --basedir O --peer 'C {image} {basedir} {mountpoint}'`.

Both servers mount the same image in turns, in one run, so that a ratio compares what the machine did within a minute.
The figures are medians over the rounds. A cold pass comes after: mount, sync, drop the caches, a fixed settling time
(dropping the caches also makes the kernel forget inodes, which the server has to hear of). An "again" pass follows on
the same mount. Every workload is an entry of `WORKLOADS`.

Files are read by a loop of open, read until the end, close in this very process. It is the tightest reader at hand:
tar to /dev/null reads nothing, tar into a pipe puts a third process on the processors that reader and server share,
and whatever has to be started is first read back from the disk after the caches were dropped. Its own cost is a few
microseconds a file, the same for both servers, and it can check the number of bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

from cfsfuse.atomic import opened_directory, published
from cfsfuse.basedirs import BaseDirectories
from cfsfuse.erofs.ondisk import DataLayout
from cfsfuse.erofs.reader import Reader
from cfsfuse.errors import CfsError
from cfsfuse.imagefile import open_image
from cfsfuse.mount.mountinfo import mount_at
from cfsfuse.mount.options import split
from cfsfuse.objects import WHOLE_FILE_MAX
from cfsfuse.tree import External
from cfsfuse.verity.digest import ALGORITHMS, file_digest
from cfsfuse.verity.merkle import Geometry, build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SMALL_FILES = 4000
SMALL_SIZE = 64 << 10
ABSENT_NAMES = 20_000
_ABSENT_DIRECTORIES = 100
_BUFFER = 1 << 20
_TIMEOUT = 60.0  # seconds for a mount, an unmount, the end of a server
_WALK_TIMEOUT = 900.0
_TICK = 1 / os.sysconf("SC_CLK_TCK")
_OURS = "cfsfuse"
_PEER = "peer"


class BenchError(Exception):
    """What makes the figures impossible or worthless; one line."""


# --- What is measured ---


class Store(NamedTuple):
    """An image and its base directories, spelled as the mount option `basedir=` has them."""

    image: str
    basedir: str


class Inputs(NamedTuple):
    """What the workloads work on, the same for both servers; paths are relative to the mount point.

    `small` are pairs of path and size; `idle` is in seconds; `big` is a pair too.
    """

    small: list[tuple[bytes, int]]
    big: tuple[bytes, int]
    idle: float


class Mounted(NamedTuple):
    """A mount: where, the process that serves it, and the seconds from the start of the command to an answer."""

    mountpoint: str
    pid: int
    ready: float


class Sample(NamedTuple):
    """One measurement: seconds on the clock, and seconds of processor time that the server used meanwhile."""

    seconds: float
    processor: float


class Row(NamedTuple):
    """A line of the table, and the most that must-hold 8 lets it be, of the ratio or of our own figure."""

    name: str
    limit: float | None = None
    of: Literal["ratio", "seconds", "processor"] = "ratio"


class Workload(NamedTuple):
    """A mount, and on it `run` once for each of `rows`.

    `drop` says when the caches are dropped; "never" is preceded by a mount that does not count, so that image and
    programs are in memory. `big` takes the image with the big file. `memory` is read at the end. `once`: in the first
    round only.
    """

    summary: str
    rows: tuple[Row, ...]
    run: Callable[[Inputs, Mounted], Sample]
    drop: Literal["never", "before mount", "after mount"] = "after mount"
    big: bool = False
    memory: bool = False
    once: bool = False


def ready(_: Inputs, mounted: Mounted) -> Sample:
    """Take the time that the mount took; the processor time is that of the daemon, without the command's."""
    return Sample(mounted.ready, processor_time(mounted.pid))


def walk(_: Inputs, mounted: Mounted) -> Sample:
    command = ["find", mounted.mountpoint, "-ls"]
    with timed(mounted) as sample:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=_WALK_TIMEOUT, check=False)
    if done.returncode:
        raise BenchError(f"find ended with status {done.returncode}")
    return sample()


def read_small(inputs: Inputs, mounted: Mounted) -> Sample:
    return read_files(inputs.small, mounted)


def read_big(inputs: Inputs, mounted: Mounted) -> Sample:
    return read_files([inputs.big], mounted)


def look_up_absent(inputs: Inputs, mounted: Mounted) -> Sample:
    """Look for names that are not there: distinct ones, in turn in directories that the kernel knows already."""
    base = os.fsencode(mounted.mountpoint)
    directories = list(dict.fromkeys(os.path.dirname(base + path) for path, _ in inputs.small))
    directories = directories[:: -(-len(directories) // _ABSENT_DIRECTORIES)]
    for directory in directories:
        os.stat(directory)
    names = [b"%s/absent-%d" % (directories[at % len(directories)], at) for at in range(ABSENT_NAMES)]
    with timed(mounted) as sample:
        found = sum(os.access(name, os.F_OK) for name in names)
    if found:
        raise BenchError(f"{found} of the names that should be absent are there")
    return sample()


def idle(inputs: Inputs, mounted: Mounted) -> Sample:
    time.sleep(1)  # the end of the last request is not idleness
    with timed(mounted) as sample:
        time.sleep(inputs.idle)
    return sample()


WORKLOADS = {
    "ready": Workload("mount until ls of the root answers", (Row("ready", 0.35, "seconds"),), ready, drop="never"),
    "ready-cold": Workload(
        "the same, image and programs not in memory", (Row("ready cold"),), ready, drop="before mount"
    ),
    "walk": Workload("find -ls of everything", (Row("walk cold", 1.1), Row("walk again", 2.2)), walk, memory=True),
    "small": Workload(
        f"read {SMALL_FILES} files of at most {SMALL_SIZE >> 10} KiB, spread evenly over the image",
        (Row("small files cold", 1.3), Row("small files again", 1.5)),
        read_small,
    ),
    "big": Workload(
        "read one big file, its Merkle tree recorded",
        (Row("big file cold", 1.3), Row("big file again")),
        read_big,
        big=True,
    ),
    "absent": Workload(
        f"look up {ABSENT_NAMES} distinct absent names", (Row("absent names", 1.3),), look_up_absent, drop="never"
    ),
    "idle": Workload(
        "do nothing, in the first round only", (Row("idle", 0, "processor"),), idle, drop="never", once=True
    ),
}
# MiB of the server after the walk: field of /proc/PID/status → the most that it may be.
MEMORY: dict[str, float | None] = {"VmRSS": 90, "RssAnon": None, "RssFile": None, "RssShmem": None}


def read_files(files: Sequence[tuple[bytes, int]], mounted: Mounted) -> Sample:
    """Read files to their ends; raise BenchError when one of them does not have its size."""
    base = os.fsencode(mounted.mountpoint)
    paths = [base + path for path, _ in files]
    buffer = bytearray(_BUFFER)
    buffers = [buffer]
    total = 0
    with timed(mounted) as sample:
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            while count := os.readv(fd, buffers):
                total += count
            os.close(fd)
    if total != sum(size for _, size in files):
        raise BenchError(f"{total} bytes read where the image has {sum(size for _, size in files)}")
    return sample()


@contextlib.contextmanager
def timed(mounted: Mounted) -> Iterator[Callable[[], Sample]]:
    """Measure a block; what is yielded gives the sample once the block has ended."""
    samples: list[Sample] = []
    processor = processor_time(mounted.pid)
    start = time.perf_counter()
    yield lambda: samples[0]
    seconds = time.perf_counter() - start
    samples.append(Sample(seconds, processor_time(mounted.pid) - processor))


# --- What /proc says of a server ---


def processor_time(pid: int) -> float:
    """Return the seconds of processor time that a process has used, in user mode and in the kernel; all its threads."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK  # utime and stime: fields 14 and 15 of proc(5)


def memory_of(pid: int) -> dict[str, float]:
    """Return the resident memory of a process in MiB, and its parts."""
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line)
    return {name: int(fields[name].split()[0]) / 1024 for name in MEMORY}


def servers_of(mountpoint: str) -> list[int]:
    """Return the processes that hold /dev/fuse and name the mount point on their command line.

    fusermount3, which waits there for the end of an auto_unmount mount, is none of them.
    """
    return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _serves(pid, os.fsencode(mountpoint))]


def _serves(pid: int, mountpoint: bytes) -> bool:
    base = f"/proc/{pid}"
    with contextlib.suppress(OSError):  # it has ended, or is not ours to look at
        with open(f"{base}/cmdline", "rb") as file:
            words = file.read()
        with open(f"{base}/comm", "rb") as file:
            helper = file.read().startswith(b"fusermount")
        if mountpoint in words and not helper:
            return any(_link(entry.path) == "/dev/fuse" for entry in os.scandir(f"{base}/fd"))
    return False


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


# --- Mounting and unmounting ---

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off interrupts to the end of a block that would otherwise leave a mount or a process behind."""
    pending: list[int] = []
    for number in _INTERRUPTS:
        signal.signal(number, lambda which, _: pending.append(which))
    try:
        yield
    finally:
        for number in _INTERRUPTS:
            signal.signal(number, _interrupt)
    if pending:
        raise KeyboardInterrupt


class Server(NamedTuple):
    """A program that mounts: its name, and its command, a template with {image}, {basedir} and {mountpoint}.

    The command returns once the mount is there and leaves the server in the background.
    """

    name: str
    command: list[str]

    def command_for(self, store: Store, mountpoint: str) -> list[str]:
        values = {"{image}": store.image, "{basedir}": store.basedir, "{mountpoint}": mountpoint}
        words = self.command
        for placeholder, value in values.items():
            words = [word.replace(placeholder, value) for word in words]
        return words


@contextlib.contextmanager
def mounted_by(server: Server, store: Store, scratch: str) -> Iterator[Mounted]:
    """Mount for the length of the block. Whatever happens, nothing stays mounted and no server stays behind."""
    mountpoint = os.path.join(scratch, "mnt")
    # No tree comes from the user's cache, and none goes there.
    environment = os.environ | {"XDG_CACHE_HOME": os.path.join(scratch, "cache")}
    command: subprocess.Popen[bytes] | None = None
    try:
        start = time.perf_counter()
        # In a session of its own: an interrupt must not hit a mount half made, which we could not take away.
        with uninterrupted():
            command = subprocess.Popen(
                server.command_for(store, mountpoint),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        if command.wait(_TIMEOUT):
            raise BenchError(f"{server.name}: the mount command ended with status {command.returncode}")
        subprocess.run(["ls", mountpoint], stdout=subprocess.DEVNULL, timeout=_TIMEOUT, check=True)
        seconds = time.perf_counter() - start
        if mount_at(mountpoint) is None:
            raise BenchError(f"{server.name}: the mount command has mounted nothing at {mountpoint}")
        found = servers_of(mountpoint)
        if len(found) != 1:
            raise BenchError(f"{server.name}: {len(found)} processes seem to serve {mountpoint}: {found}")
        yield Mounted(mountpoint, found[0], seconds)
    finally:
        with uninterrupted():
            if command is not None:
                _end(command, mountpoint)
            show_log(scratch)


def _end(command: subprocess.Popen[bytes], mountpoint: str) -> None:
    """Unmount and wait for the server's end; what will not go is detached and killed."""
    try:
        command.wait(_TIMEOUT)
    except subprocess.TimeoutExpired:
        command.kill()
        command.wait()
    pids = servers_of(mountpoint)
    clean = _within(_TIMEOUT, lambda: mount_at(mountpoint) is None or _unmount(mountpoint))
    if clean and _within(_TIMEOUT, lambda: not any(map(_lives, pids))):
        return
    say(f"{mountpoint}: does not unmount cleanly: detached, and {pids} killed")
    _unmount(mountpoint, "-l" if os.geteuid() == 0 else "-z")
    for pid in filter(_lives, pids):
        os.kill(pid, signal.SIGKILL)


def _unmount(mountpoint: str, *flags: str) -> bool:
    command = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
    done = subprocess.run([*command, *flags, mountpoint], capture_output=True, timeout=_TIMEOUT, check=False)
    return done.returncode == 0


def _lives(pid: int) -> bool:
    """Return whether a process still runs; one that its parent has yet to wait for does not."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Return whether `condition` comes true in so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def log_path(scratch: str) -> str:
    return os.path.join(scratch, "log")


def show_log(scratch: str) -> None:
    """Show what cfsfuse has logged, and forget it: a warning may explain a figure, or make it worthless."""
    path = log_path(scratch)
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                say(f"log: {line.rstrip()}")
        os.unlink(path)


def drop_caches(settle: float) -> None:
    """Write back and drop what the kernel has cached (root only), let it settle, and load find again."""
    os.sync()
    if os.geteuid() == 0:
        with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
            file.write("3")
    # The first of them would otherwise pay for reading the program, and for nothing else.
    for program in ("find", "ls"):
        subprocess.run([program, "--version"], stdout=subprocess.DEVNULL, check=True)
    time.sleep(settle)


# --- Inputs ---


def small_files(reader: Reader) -> list[tuple[bytes, int]]:
    """Return SMALL_FILES paths and sizes: small files whose content is an object, every n-th in walking order."""
    candidates = [
        (path, inode.size)
        for path, inode in reader.walk()
        if inode.is_regular and inode.layout is DataLayout.CHUNK_BASED and 0 < inode.size <= SMALL_SIZE
    ]
    if len(candidates) < SMALL_FILES:
        say(f"only {len(candidates)} files of at most {SMALL_SIZE} bytes are in the image")
        return candidates
    return [candidates[at * len(candidates) // SMALL_FILES] for at in range(SMALL_FILES)]


def record_tree(store: Store, reader: Reader, path: bytes) -> None:
    """Record the Merkle tree of the object of `path` beside the store unless it is there, and say so."""
    node = reader.node(reader.resolve(path))
    if not isinstance(node, External) or node.path is None or node.digest is None:
        raise BenchError(f"{os.fsdecode(path)}: not a file whose content is an object with a digest")
    if node.stat.size <= WHOLE_FILE_MAX:
        return
    directories = BaseDirectories(split(store.basedir, ":"))
    descriptor = directories.open(node.path)
    geometry = Geometry(ALGORITHMS[node.digest.algorithm], node.stat.size)
    place = next(directories.recorded_trees(node.path))
    if os.path.exists(place.label):
        say(f"{place.label}: recorded already")
        return
    tree = bytearray(geometry.tree_size)

    def write(offset: int, block: bytes) -> None:
        tree[offset : offset + len(block)] = block

    root_hash = build(geometry, descriptor.chunks(node.path, node.stat.size), write)
    if file_digest(geometry.algorithm, node.stat.size, root_hash) != node.digest.value:
        raise BenchError(f"{os.fsdecode(path)}: its object does not have the digest that the image records")
    parent, name = os.path.split(os.fsencode(place.label))
    os.makedirs(parent, exist_ok=True)
    with opened_directory(parent) as directory, published(directory, name) as fd, open(fd, "wb", closefd=False) as file:
        file.write(tree)
    say(f"{place.label}: written, {len(tree)} bytes of Merkle tree")


def prepare(store: Store, big: Store | None, big_file: str, idle_seconds: float) -> Inputs:
    """Look into the images with our own reader."""
    small = small_files(Reader(open_image(store.image)))
    if not small:
        raise BenchError(f"{store.image}: has no small files that are objects")
    say(f"{len(small)} small files, {sum(size for _, size in small)} bytes")
    path, size = b"", 0
    if big is not None:
        reader = Reader(open_image(big.image))
        path = b"/" + os.fsencode(big_file).lstrip(b"/")
        size = reader.resolve(path).size
        record_tree(big, reader, path)
    return Inputs(small, (path, size), idle_seconds)


# --- Running ---


class Results(NamedTuple):
    """Row → server → one value a round; `memory` is in MiB."""

    samples: dict[str, dict[str, list[Sample]]]
    memory: dict[str, dict[str, list[float]]]


class Run(NamedTuple):
    """What a run is made of; `scratch` is a directory of its own, `settle` in seconds."""

    servers: list[Server]
    store: Store
    big: Store | None
    inputs: Inputs
    scratch: str
    settle: float

    def rounds(self, names: Sequence[str], count: int) -> Results:
        """Run workloads `count` times, the servers in turns, each round beginning with the other one."""
        results = Results({}, {})
        for number in range(count):
            for name in names:
                if number and WORKLOADS[name].once:
                    continue
                for server in self.servers if number % 2 == 0 else reversed(self.servers):
                    said = self.measure(WORKLOADS[name], server, results)
                    say(f"round {number + 1}/{count}, {name}, {server.name}: {said}")
        return results

    def measure(self, workload: Workload, server: Server, results: Results) -> str:
        """Run a workload on a fresh mount of a server, add to `results`, and return the figures for a progress line."""
        store = self.big if workload.big and self.big is not None else self.store
        if workload.drop == "never":
            with mounted_by(server, store, self.scratch):
                pass
        elif workload.drop == "before mount":
            drop_caches(self.settle)
        said = []
        with mounted_by(server, store, self.scratch) as mounted:
            if workload.drop == "after mount":
                drop_caches(self.settle)
            for row in workload.rows:
                sample = workload.run(self.inputs, mounted)
                results.samples.setdefault(row.name, {}).setdefault(server.name, []).append(sample)
                said.append(f"{row.name} {sample.seconds:.3f} s ({sample.processor:.2f} s of processor)")
            for field, value in memory_of(mounted.pid).items() if workload.memory else ():
                results.memory.setdefault(field, {}).setdefault(server.name, []).append(value)
                said.append(f"{field} {value:.1f} MiB")
        return ", ".join(said)


# --- The table ---


def table(results: Results) -> str:
    """Return medians and ratios as text."""
    heading = (
        "row",
        "cfsfuse s",
        "peer s",
        "ratio",
        "must be",
        "cfsfuse cpu",
        "peer cpu",
        "ratio",
        "cfsfuse from-to",
        "peer from-to",
    )
    lines: list[tuple[str, ...]] = [heading]
    for workload in WORKLOADS.values():
        lines += [_sample_line(row, results.samples[row.name]) for row in workload.rows if row.name in results.samples]
    text = _aligned(lines)
    if results.memory:
        lines = [("memory after the walk", "cfsfuse MiB", "peer MiB", "ratio", "must be")]
        lines += [_memory_line(name, results.memory[name]) for name in MEMORY]
        text += "\n\n" + _aligned(lines)
    return text


def _sample_line(row: Row, samples: dict[str, list[Sample]]) -> tuple[str, ...]:
    seconds = {name: statistics.median(sample.seconds for sample in values) for name, values in samples.items()}
    processor = {name: statistics.median(sample.processor for sample in values) for name, values in samples.items()}
    figure = {"ratio": _quotient(seconds), "seconds": seconds[_OURS], "processor": processor[_OURS]}[row.of]
    return (
        row.name,
        _number(seconds[_OURS], 3),
        _number(seconds.get(_PEER), 3),
        _number(None if row.of == "processor" else _quotient(seconds), 2),
        _verdict(figure, row.limit, {"ratio": "", "seconds": " s", "processor": " cpu"}[row.of]),
        _number(processor[_OURS], 2),
        _number(processor.get(_PEER), 2),
        _number(_quotient(processor), 2),
        _spread(samples[_OURS]),
        _spread(samples.get(_PEER)),
    )


def _memory_line(field: str, values: dict[str, list[float]]) -> tuple[str, ...]:
    medians = {name: statistics.median(found) for name, found in values.items()}
    return (
        field,
        _number(medians[_OURS], 1),
        _number(medians.get(_PEER), 1),
        _number(_quotient(medians), 2),
        _verdict(medians[_OURS], MEMORY[field], " MiB"),
    )


def _quotient(values: dict[str, float]) -> float | None:
    return values[_OURS] / values[_PEER] if values.get(_PEER) else None


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _spread(samples: list[Sample] | None) -> str:
    seconds = [sample.seconds for sample in samples or ()]
    return f"{min(seconds):.3f}-{max(seconds):.3f}" if seconds else "-"


def _verdict(value: float | None, limit: float | None, unit: str) -> str:
    if limit is None:
        return ""
    return f"<= {limit:g}{unit}" + ("" if value is None else " ok" if value <= limit else " MISSED")


def _aligned(lines: Sequence[tuple[str, ...]]) -> str:
    """Return lines of cells as columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def as_json(results: Results, host: dict[str, Any]) -> dict[str, Any]:
    """Return all values, for a program to read."""
    rows = {
        row: {name: [sample._asdict() for sample in values] for name, values in samples.items()}
        for row, samples in results.samples.items()
    }
    return {"host": host, "rows": rows, "memory_mib": results.memory}


def describe_host() -> dict[str, Any]:
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "processors": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "caches_dropped": os.geteuid() == 0,
    }


# --- The command line ---


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    described = "\n".join(f"  {name:<11} {workload.summary}" for name, workload in WORKLOADS.items())
    parser = argparse.ArgumentParser(
        prog="python -m integration.speed",
        description="Measure cfsfuse and a peer in turns, on the same images; print medians and ratios.",
        epilog=f"rows:\n{described}\n\nOnly root can drop the caches: for others, cold means freshly mounted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--image", required=True, help="the image, with thousands of small files")
    parser.add_argument("--basedir", required=True, help="its base directories, as in the mount option")
    parser.add_argument("--big-image", help="an image with a big file")
    parser.add_argument("--big-basedir", help="its base directories; the Merkle tree is recorded in the first")
    parser.add_argument("--big-file", default="f100", help="path of the big file in that image (default: %(default)s)")
    parser.add_argument(
        "--peer", metavar="COMMAND", help="mounts {image} with {basedir} at {mountpoint}, and returns; no shell"
    )
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--rows", default=",".join(WORKLOADS), help="which ones, separated by commas (default: all)")
    parser.add_argument("--idle", type=float, default=60, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--settle", type=float, default=1, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write all values there")
    parser.add_argument("-o", "--options", default="", help="further mount options of cfsfuse")
    arguments = parser.parse_args()
    unknown = set(arguments.rows.split(",")) - set(WORKLOADS)
    if unknown or arguments.rounds < 1:
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}" if unknown else "--rounds must be at least 1")
    if (arguments.big_image is None) != (arguments.big_basedir is None):
        parser.error("--big-image and --big-basedir go together")
    return arguments


def servers(arguments: argparse.Namespace, scratch: str) -> list[Server]:
    options = ",".join(filter(None, ("basedir={basedir}", f"log={log_path(scratch)}", arguments.options)))
    program = os.path.join(os.path.dirname(sys.executable), "cfsfuse")
    found = [Server(_OURS, [program, "mount", "{image}", "{mountpoint}", "-o", options])]
    if arguments.peer:
        found.append(Server(_PEER, shlex.split(arguments.peer)))
    return found


def bench(arguments: argparse.Namespace, scratch: str) -> None:
    os.mkdir(os.path.join(scratch, "mnt"))
    store = Store(os.path.abspath(arguments.image), arguments.basedir)
    big = Store(os.path.abspath(arguments.big_image), arguments.big_basedir) if arguments.big_image else None
    names = [name for name in WORKLOADS if name in arguments.rows.split(",")]
    if big is None and "big" in names:
        say("big: left out, as there is no --big-image")
        names.remove("big")
    host = describe_host()
    say(", ".join(f"{name} {value}" for name, value in host.items()))
    if not host["caches_dropped"]:
        say("not root: the caches are not dropped; cold means freshly mounted")
    inputs = prepare(store, big, arguments.big_file, arguments.idle)
    run = Run(servers(arguments, scratch), store, big, inputs, scratch, arguments.settle)
    results = run.rounds(names, arguments.rounds)
    print(table(results))
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(as_json(results, host), file, indent=1)


def main() -> int:
    """Run the benchmark; an error or an interrupt leaves nothing mounted."""
    arguments = parse_arguments()
    for number in _INTERRUPTS:
        signal.signal(number, _interrupt)
    # realpath: the mount table and the servers' command lines have to agree on the name.
    with tempfile.TemporaryDirectory(prefix="cfsfuse-speed-", ignore_cleanup_errors=True) as scratch:
        try:
            bench(arguments, os.path.realpath(scratch))
        except KeyboardInterrupt:
            return 130
        except (BenchError, CfsError, OSError, subprocess.SubprocessError) as error:
            say(f"speed: {error}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
