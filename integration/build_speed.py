"""Speed of building, beside mkcomposefs: `python -m integration.build_speed /usr --scratch DIRECTORY`.

Both builders do the same in turns, in one run, each round beginning with the other one, and must come to the same
digest. The figures are medians over the rounds; processor time is that of all processes. Before anything is measured
the source is read once, so its files are in the page cache, and before each measurement what is to be written back has
been. Memory is measured in a run of its own, which is not timed: the most that all processes of a builder had together
at one moment, with what they share counted once for each (RSS) and once for all (PSS).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.bench import machine
from integration.oracles import fetch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_OURS, _PEER = "cfsfuse", "mkcomposefs"
_MEMORY_LIMIT = 300.0  # MiB
_MEMORY_INTERVAL = 0.02  # seconds
_KIB_FIELDS = {"Rss": 0, "Pss": 1}
_TIMEOUT = 3600.0


class BenchError(Exception):
    """What makes the figures impossible or worthless; one line."""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Places(NamedTuple):
    """What is built from, and where the rest is. `dump` and `image` are those of the source."""

    source: str
    scratch: str
    dump: str
    image: str

    def store(self, builder: str) -> str:
        return os.path.join(self.scratch, f"store-{builder}")

    def output(self, builder: str) -> str:
        return os.path.join(self.scratch, f"image-{builder}.cfs")


class Builder(NamedTuple):
    """A program: its name, the words that build, and those that print an image's dump."""

    name: str
    mk: list[str]
    dump: list[str]


class Row(NamedTuple):
    """A line of the table: what it is, the most that the ratio may be, its command, and what comes before each run."""

    summary: str
    limit: float
    command: Callable[[Builder, Places], list[str]]
    prepare: Callable[[Builder, Places], None] = lambda _builder, _places: None


class Sample(NamedTuple):
    """One measurement, in seconds: by the clock, and of processor time."""

    seconds: float
    processor: float


class Memory(NamedTuple):
    """The most that all processes of a run had together, in MiB."""

    rss: float
    pss: float


def _digest_only(builder: Builder, places: Places) -> list[str]:
    return [*builder.mk, "--print-digest-only", places.source]


def _into_store(builder: Builder, places: Places) -> list[str]:
    options = ["--digest-store", places.store(builder.name), "--print-digest"]
    return [*builder.mk, *options, places.source, places.output(builder.name)]


def _from_file(builder: Builder, places: Places) -> list[str]:
    return [*builder.mk, "--from-file", "--print-digest", places.dump, places.output(builder.name)]


def _dump(builder: Builder, places: Places) -> list[str]:
    return [*builder.dump, places.image]


def _empty_store(builder: Builder, places: Places) -> None:
    shutil.rmtree(places.store(builder.name), ignore_errors=True)


def _full_store(builder: Builder, places: Places) -> None:
    if not os.path.exists(places.store(builder.name)):
        _output(_into_store(builder, places))


ROWS = {
    "digest": Row("digest only, of cached files", 1.3, _digest_only),
    "empty": Row("into an empty store", 1.3, _into_store, _empty_store),
    "full": Row("into a full store", 1.5, _into_store, _full_store),
    "from-file": Row("--from-file, of the source's dump", 4, _from_file),
    "dump": Row("dump of the source's image", 4, _dump),
}


# Measuring -----------------------------------------------------------------------------------------------------------


def measure(command: list[str]) -> tuple[Sample, bytes]:
    """Run a command, and return what it took and what it has printed."""
    with tempfile.TemporaryFile() as out:
        before = os.times()
        start = time.perf_counter()
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, timeout=_TIMEOUT, check=False)
        seconds = time.perf_counter() - start
        after = os.times()
        if done.returncode:
            raise BenchError(f"{' '.join(command)}: ended with status {done.returncode}")
        out.seek(0)
        processor = after.children_user + after.children_system - before.children_user - before.children_system
        return Sample(seconds, processor), out.read()


def _output(command: list[str]) -> bytes:
    return measure(command)[1]


def measure_memory(command: list[str]) -> Memory:
    """Run a command and look all the time at what its processes have."""
    peaks = [0.0, 0.0]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    ) as process:
        end = threading.Event()

        def watch() -> None:
            while not end.wait(_MEMORY_INTERVAL):
                totals = _memory_of_session(process.pid)
                peaks[:] = map(max, peaks, totals)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            process.wait(_TIMEOUT)
        finally:
            end.set()
            thread.join()
    return Memory(*peaks)


def _memory_of_session(session: int) -> list[float]:
    totals = [0.0, 0.0]
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has just ended
            if os.getsid(int(pid)) != session:
                continue
            with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
                for line in file:
                    name, _, rest = line.partition(":")
                    if name in _KIB_FIELDS:
                        totals[_KIB_FIELDS[name]] += int(rest.split()[0]) / 1024
    return totals


# Running -------------------------------------------------------------------------------------------------------------


class Results(NamedTuple):
    """Row → builder → values."""

    samples: dict[str, dict[str, list[Sample]]]
    memory: dict[str, dict[str, Memory]]


def run(names: list[str], builders: list[Builder], places: Places, rounds: int) -> Results:
    """Measure the rows, and compare what the builders say."""
    results = Results({}, {})
    for number in range(rounds):
        for name in names:
            said = {}
            for builder in builders if number % 2 == 0 else reversed(builders):
                row = ROWS[name]
                row.prepare(builder, places)
                os.sync()
                sample, said[builder.name] = measure(row.command(builder, places))
                results.samples.setdefault(name, {}).setdefault(builder.name, []).append(sample)
                say(f"round {number + 1}/{rounds}, {name}, {builder.name}: {sample.seconds:.2f} s")
            if len(set(said.values())) != 1:
                raise BenchError(f"{name}: the builders differ: {_differing(said)}")
    for name in names:
        for builder in builders:
            ROWS[name].prepare(builder, places)
            results.memory.setdefault(name, {})[builder.name] = measure_memory(ROWS[name].command(builder, places))
    return results


def _differing(said: dict[str, bytes]) -> str:
    return ", ".join(f"{name} {text[:64].decode(errors='replace')!r}" for name, text in said.items())


@contextlib.contextmanager
def prepared(source: str, scratch: str, peer: Builder) -> Iterator[Places]:
    """Yield the places in a new directory below `scratch`, when the source has been read."""
    with tempfile.TemporaryDirectory(prefix="build-speed-", dir=scratch) as folder:
        places = Places(
            os.path.abspath(source), folder, *(os.path.join(folder, name) for name in ("dump", "image.cfs"))
        )
        _output([*peer.mk, places.source, places.image])
        with open(places.dump, "wb") as file:
            file.write(_output([*peer.dump, places.image]))
        yield places


# The table -----------------------------------------------------------------------------------------------------------


def table(results: Results) -> str:
    """Return medians, ratios and memory as text."""
    titles = ("", "cfsfuse s", "mkcomposefs s", "ratio", "must be", "from-to", "cpu s", "cpu s", "RSS MiB", "PSS MiB")
    lines = [titles, *(_line(name, results) for name in results.samples)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _line(name: str, results: Results) -> tuple[str, ...]:
    row, samples, memory = ROWS[name], results.samples[name], results.memory[name]
    seconds, processor = (
        {builder: statistics.median(sample[at] for sample in values) for builder, values in samples.items()}
        for at in (0, 1)
    )
    ratio = seconds[_OURS] / seconds[_PEER]
    spread = [sample.seconds for sample in samples[_OURS]]
    return (
        row.summary,
        f"{seconds[_OURS]:.2f}",
        f"{seconds[_PEER]:.2f}",
        f"{ratio:.2f}",
        f"<= {row.limit:g} {'ok' if ratio <= row.limit else 'MISSED'}",
        f"{min(spread):.2f}-{max(spread):.2f}",
        f"{processor[_OURS]:.2f}",
        f"{processor[_PEER]:.2f}",
        f"{memory[_OURS].rss:.0f} / {memory[_PEER].rss:.0f}",
        f"{memory[_OURS].pss:.0f} / {memory[_PEER].pss:.0f}",
    )


def memory_line(results: Results) -> str:
    most = max((memory[_OURS] for memory in results.memory.values()), key=lambda memory: memory.rss)
    verdict = "ok" if most.rss <= _MEMORY_LIMIT else "MISSED"
    return (
        f"memory: at most {most.rss:.0f} MiB RSS, {most.pss:.0f} MiB PSS; RSS must be <= {_MEMORY_LIMIT:g}: {verdict}"
    )


# The command line ----------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    described = "\n".join(f"  {name:<10} {row.summary}" for name, row in ROWS.items())
    parser = argparse.ArgumentParser(
        prog="python -m integration.build_speed",
        description="Measure cfsfuse mk and mkcomposefs in turns; print medians and ratios.",
        epilog=f"rows:\n{described}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="DIRECTORY", help="what to build from")
    parser.add_argument("--scratch", metavar="DIRECTORY", help="where two stores fit (default: that of tempfile)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--rows", default=",".join(ROWS), help="which ones, separated by commas (default: all)")
    parser.add_argument("--threads", type=int, default=2, help="of mkcomposefs (default: %(default)s)")
    parser.add_argument("--options", default="", help="further options of cfsfuse mk, separated by spaces")
    parser.add_argument("--json", metavar="FILE", help="write all values there")
    arguments = parser.parse_args()
    unknown = set(arguments.rows.split(",")) - set(ROWS)
    if unknown or arguments.rounds < 1:
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}" if unknown else "--rounds must be at least 1")
    return arguments


def bench(arguments: argparse.Namespace) -> None:
    tools = fetch.composefs()
    program = os.path.join(os.path.dirname(sys.executable), "cfsfuse")
    ours = Builder(_OURS, [program, "mk", *arguments.options.split()], [program, "dump"])
    mkcomposefs = [*tools.command("mkcomposefs"), f"--threads={arguments.threads}"]
    peer = Builder(_PEER, mkcomposefs, [*tools.command("composefs-info"), "dump"])
    host = machine.describe()
    say(", ".join(f"{name} {value}" for name, value in host.items()))
    names = [name for name in ROWS if name in arguments.rows.split(",")]
    with prepared(arguments.source, arguments.scratch or tempfile.gettempdir(), peer) as places:
        results = run(names, [ours, peer], places, arguments.rounds)
    print(table(results))
    print(memory_line(results))
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"host": host, "seconds": results.samples, "memory_mib": results.memory}, file, indent=1)


def main() -> int:
    """Run the benchmark."""
    try:
        bench(parse_arguments())
    except KeyboardInterrupt:
        return 130
    except (BenchError, fetch.OracleUnavailable, OSError, subprocess.SubprocessError) as error:
        say(f"build_speed: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
