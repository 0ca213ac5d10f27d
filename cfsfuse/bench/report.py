"""What was measured, as a table that 100 columns can show, and as a document for programs."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.bench.results import medians, ratios, reference_of
from cfsfuse.bench.run import rows
from cfsfuse.bench.workloads import Unit
from cfsfuse.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cfsfuse.bench.columns import Column
    from cfsfuse.bench.results import Results
    from cfsfuse.bench.run import Task
    from cfsfuse.bench.workloads import Row, Workload

WIDTH = 100
UNVERIFIED = "noverity"
_VALUE, _RATIO = 7, 7  # widths of the two halves of a cell
_NOTHING = "-"


class Report(NamedTuple):
    """A run that has ended, and around it: the machine, the options as given, which backends were left out and why."""

    task: Task
    results: Results
    failed: dict[str, str]
    left_out: dict[str, str]
    options: str
    machine: dict[str, object]
    remarks: list[str]

    @property
    def reference(self) -> str | None:
        return reference_of(self.task.columns, self.results)


class Line(NamedTuple):
    """A row of figures: medians by column, and what they are to the reference. `lacking` says why there are none."""

    title: str
    values: dict[str, float]
    ratios: dict[str, float]
    lacking: str | None = None


class Section(NamedTuple):
    """Lines of one unit, under a heading."""

    heading: str
    lines: list[Line]


def sections(report: Report) -> list[Section]:
    """Return the medians: seconds, then what the servers used meanwhile, then memory and idleness."""
    chosen = rows(report.task.workloads)
    seconds = [(workload, row) for workload, row in chosen if row.unit is Unit.SECONDS]
    measured = [(workload, row) for workload, row in seconds if workload.lacks(report.task.inputs) is None]
    found = [
        Section("seconds", [_line(report, workload, row) for workload, row in seconds]),
        Section("processor time of the server, seconds", [_processor_line(report, row) for _, row in measured]),
    ]
    for unit, heading in (
        (Unit.PROCESSOR, f"processor time of the server in {report.task.inputs.extent.idle:g} s, seconds"),
        (Unit.MEMORY, "resident memory of the server, MiB"),
    ):
        found.append(Section(heading, [_line(report, workload, row) for workload, row in chosen if row.unit is unit]))
    return [section for section in found if any(line.values or line.lacking for line in section.lines)]


def _line(report: Report, workload: Workload, row: Row) -> Line:
    values = medians(report.results.values, row.key)
    title = row.titled(drops=report.task.drops)
    return Line(title, values, ratios(values, report.reference), workload.lacks(report.task.inputs))


def _processor_line(report: Report, row: Row) -> Line:
    values = medians(report.results.processor, row.key)
    return Line(row.titled(drops=report.task.drops), values, ratios(values, report.reference))


# The table ------------------------------------------------------------------------------------------------------------


def table(report: Report) -> str:
    """Return medians and ratios as text, in several blocks where the columns do not fit side by side."""
    said = _wrapped(notes(report))
    return "\n".join([*_wrapped(heading(report)), *_blocks(report), *([""] if said else []), *said])


def _wrapped(lines: list[str]) -> list[str]:
    return [textwrap.fill(line, WIDTH, subsequent_indent="  ", break_long_words=False) for line in lines]


def heading(report: Report) -> list[str]:
    """Return what was measured, where, how often."""
    machine, task = report.machine, report.task
    rounds = "one round" if task.rounds == 1 else f"medians of {task.rounds} rounds"
    to = "" if report.reference is None else f"; ratios (x) to {report.reference}"
    host = f"Linux {machine['kernel']}, {machine['processors']} x {machine['processor']}"
    return [
        f"{printable(task.image.encode(errors='surrogateescape'))}: {rounds}{to}",
        f"{host}, Python {machine['python']}, SHA-256: {machine['sha256']}",
    ]


def _blocks(report: Report) -> Iterator[str]:
    found = sections(report)
    first = max((len(line.title) for section in found for line in section.lines), default=0)
    for part in _side_by_side(report.task.columns, WIDTH - first):
        names = [column.name for column in part]
        yield ""
        yield _cells("", first, names, names)
        if any(column.unverified for column in part):
            yield _cells("", first, names, [UNVERIFIED if column.unverified else "" for column in part])
        for section in found:
            if any(line.lacking or line.values.keys() & set(names) for line in section.lines):
                yield section.heading
                yield from (_text(line, first, names) for line in section.lines)


def _side_by_side(columns: Sequence[Column], room: int) -> Iterator[list[Column]]:
    """Yield the columns in parts that fit into so many letters; one at least in each."""
    part: list[Column] = []
    left = room
    for column in columns:
        if part and left < _width(column.name) + 1:
            yield part
            part, left = [], room
        part.append(column)
        left -= _width(column.name) + 1
    if part:
        yield part


def _width(name: str) -> int:
    return max(_VALUE + _RATIO, len(name))


def _cells(title: str, first: int, names: Sequence[str], cells: Sequence[str]) -> str:
    aligned = (f" {cell:>{_width(name)}}" for name, cell in zip(names, cells, strict=True))
    return (title.ljust(first) + "".join(aligned)).rstrip()


def _text(line: Line, first: int, names: Sequence[str]) -> str:
    if line.lacking:
        return f"{line.title.ljust(first)}   {line.lacking}"
    return _cells(line.title, first, names, [figure(line, name) for name in names])


def figure(line: Line, name: str) -> str:
    """Return value and ratio of a column as the table has them."""
    value, ratio = line.values.get(name), line.ratios.get(name)
    shown = _NOTHING if value is None else number(value)
    return shown.rjust(_VALUE) + ("" if ratio is None else f"x{number(ratio, 2)}").rjust(_RATIO)


def number(value: float, most: int = 4) -> str:
    """Return a value with about four digits that count, and at most so many behind the point."""
    digits = 4 if value < 0.1 else 3 if value < 1 else 2 if value < 10 else 1 if value < 1000 else 0
    return f"{value:.{min(digits, most)}f}"


def notes(report: Report) -> list[str]:
    """Return what a reader has to know about the figures, a line each."""
    unverified: dict[str, list[str]] = {}
    for column in report.task.columns:
        if column.unverified:
            unverified.setdefault(column.unverified, []).append(column.name)
    said = [f"{', '.join(names)}: not verifying (noverity): {reason}" for reason, names in unverified.items()]
    said += [f"{name}: not measured: {reason}" for name, reason in report.left_out.items()]
    said += [f"{name}: given up: {reason}" for name, reason in report.failed.items()]
    said += report.remarks
    return said


# The document ---------------------------------------------------------------------------------------------------------


def document(report: Report) -> dict[str, object]:
    """Return everything, each sample as well, for JSON; but for the paths, which may be any bytes."""
    task = report.task
    return {
        "machine": report.machine,
        "options": report.options,
        "rounds": task.rounds,
        "caches_dropped": task.drops,
        "reference": report.reference,
        "columns": [_column(report, column) for column in task.columns],
        "left_out": report.left_out,
        "inputs": {
            "small_files": len(task.inputs.small),
            "small_bytes": sum(file.size for file in task.inputs.small),
            "large_bytes": task.inputs.large and task.inputs.large.size,
            **task.inputs.extent._asdict(),
        },
        "rows": [_row(report, workload, row) for workload, row in rows(task.workloads)],
        "remarks": report.remarks,
    }


def _column(report: Report, column: Column) -> dict[str, object]:
    return {
        "name": column.name,
        "is_peer": column.is_peer,
        "command": list(column.command),
        "unverified": column.unverified,
        "failed": report.failed.get(column.name),
    }


def _row(report: Report, workload: Workload, row: Row) -> dict[str, object]:
    line = _line(report, workload, row)
    values, processor = report.results.values.get(row.key, {}), report.results.processor.get(row.key, {})
    used = medians(report.results.processor, row.key)
    return {
        "key": row.key,
        "title": line.title,
        "unit": row.unit.value,
        "cold": row.cold and report.task.drops,
        "lacking": line.lacking,
        "columns": {
            name: {
                "samples": samples,
                "median": line.values[name],
                "ratio": line.ratios.get(name),
                "processor_samples": processor.get(name),
                "processor_median": used.get(name),
            }
            for name, samples in values.items()
        },
    }
