"""The rounds: every workload on every column, in turns."""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.bench import caches
from cfsfuse.bench.failure import ColumnFailed
from cfsfuse.bench.mounting import Place, mounted
from cfsfuse.bench.processes import bounded, resident_memory
from cfsfuse.bench.results import Results
from cfsfuse.bench.workloads import WORKLOADS, Sample, Unit, check
from cfsfuse.errors import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cfsfuse.bench.columns import Column
    from cfsfuse.bench.inputs import Inputs
    from cfsfuse.bench.mounting import Mounted, Scratch
    from cfsfuse.bench.workloads import Row, Workload
    from cfsfuse.processes import Started

_LOG_LINES = 20


class Step(NamedTuple):
    """Where a run is: `done` of `total` steps, what it is about to do, or has done with these `figures`."""

    done: int
    total: int
    what: str
    figures: str = ""


class Task(NamedTuple):
    """What a run is made of. `patience` is in seconds: how long a mount, an unmount and a row each may take.

    `drops`: the caches are dropped before cold rows.
    """

    image: str
    basedir: tuple[str, ...]
    columns: list[Column]
    inputs: Inputs
    workloads: list[str]
    rounds: int
    patience: float
    drops: bool


@dataclass
class Run:
    """A run under way. `tell` hears of each step, `warn` of what a user should know at once.

    `started` was made before anything was started, by a process that adopts orphans: what it has is ended.
    `failed` has, by name, the columns that were given up, and why: they would fail, or hang, in every row.
    """

    task: Task
    scratch: Scratch
    started: Started
    tell: Callable[[Step], None]
    warn: Callable[[str], None]
    results: Results = field(default_factory=Results)
    failed: dict[str, str] = field(default_factory=dict)

    def all(self) -> None:
        """Look at each column once, then measure round by round, each beginning at the other end of the columns."""
        steps = list(_steps(self.task))
        total = len(self.task.columns) + len(steps)
        for done, column in enumerate(self.task.columns):
            self._guarded(Step(done, total, f"looking at {column.name}"), column, self._look)
        for done, (number, name, column) in enumerate(steps, len(self.task.columns)):
            step = Step(done, total, f"round {number + 1}/{self.task.rounds}, {name}, {column.name}")
            if column.name not in self.failed:
                self._guarded(step, column, functools.partial(self._measure, WORKLOADS[name]))

    def _guarded(self, step: Step, column: Column, do: Callable[[Column], str]) -> None:
        self.tell(step)
        try:
            figures = do(column)
        except ColumnFailed as failure:
            self.failed[column.name] = f"{step.what}: {failure}"
            self.warn(f"{column.name}: given up: {failure} ({step.what})")
        else:
            self.tell(step._replace(done=step.done + 1, figures=figures))
        finally:
            self._show_log()

    def _look(self, column: Column) -> str:
        with self._mounted(column) as there:
            bounded(lambda: check(self.task.inputs, there), self.task.patience, self.started.end)
        return ""

    def _measure(self, workload: Workload, column: Column) -> str:
        """Run a workload on a new mount, keep its samples when all of it went well, and return them as text."""
        if workload.rehearsed:
            with self._mounted(column) as there:
                self._sample(workload, there)
        with self._mounted(column) as there:
            if workload.is_cold and self.task.drops:
                caches.drop(self.task.inputs.extent.settle)
            found = [(row, self._value(workload, row, there)) for row in workload.rows]
            served = bool(there.servers)
        said = []
        for row, sample in found:
            said.append(self._keep(row, column.name, sample, served=served))
        return ", ".join(filter(None, said))

    def _value(self, workload: Workload, row: Row, there: Mounted) -> Sample:
        if row.unit is Unit.MEMORY:
            return Sample(resident_memory(there.servers), 0)
        return self._sample(workload, there)

    def _sample(self, workload: Workload, there: Mounted) -> Sample:
        return Sample(*bounded(lambda: workload.run(self.task.inputs, there), self.task.patience, self.started.end))

    def _keep(self, row: Row, column: str, sample: Sample, *, served: bool) -> str:
        title = row.titled(drops=self.task.drops)
        if row.unit is Unit.SECONDS:
            self.results.add(row.key, column, sample.seconds, sample.processor if served else None)
            return f"{title} {sample.seconds:.4f} s"
        if not served:
            return ""
        value = sample.processor if row.unit is Unit.PROCESSOR else sample.seconds
        self.results.add(row.key, column, value)
        return f"{title} {value:.3f} {row.unit.value}"

    @contextlib.contextmanager
    def _mounted(self, column: Column) -> Iterator[Mounted]:
        place = Place(self.scratch.mountpoint(self.task.columns.index(column)), self.started)
        words = column.words(self.task.image, self.task.basedir, place.mountpoint)
        # No tree comes from the user's cache, and none goes there.
        environment = os.environ | column.environment | {"XDG_CACHE_HOME": self.scratch.cache}
        warn = functools.partial(self._warn_of, column)
        with mounted(words, environment, place, self.task.patience, warn) as there:
            yield there

    def _warn_of(self, column: Column, text: str) -> None:
        self.warn(f"{column.name}: {text}")

    def _show_log(self) -> None:
        """Show what cfsfuse has complained of, and forget it: that may explain a figure, or make it worthless."""
        with contextlib.suppress(FileNotFoundError):
            with open(self.scratch.log, encoding="utf-8", errors="surrogateescape") as file:
                lines = [line.rstrip() for line in file if " INFO " not in line]
            os.unlink(self.scratch.log)
            for line in lines[:_LOG_LINES]:
                self.warn(f"log: {printable(line.encode(errors='surrogateescape'))}")


def _steps(task: Task) -> Iterator[tuple[int, str, Column]]:
    for number in range(task.rounds):
        for name in task.workloads:
            workload = WORKLOADS[name]
            if workload.lacks(task.inputs) is None and not (number and workload.once):
                for column in task.columns if number % 2 == 0 else reversed(task.columns):
                    yield number, name, column


def rows(names: Sequence[str]) -> list[tuple[Workload, Row]]:
    """Return the rows of workloads."""
    return [(WORKLOADS[name], row) for name in names for row in WORKLOADS[name].rows]
