"""The values that were measured, and what is made of them: medians and ratios."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cfsfuse.bench.columns import Column

# Row key → name of the column → a value for each round.
Values = dict[str, dict[str, list[float]]]


@dataclass
class Results:
    """`values` are in the unit of the row; `processor` are the seconds of processor time of the servers meanwhile."""

    values: Values = field(default_factory=dict)
    processor: Values = field(default_factory=dict)

    def add(self, row: str, column: str, value: float, processor: float | None = None) -> None:
        """Add what a round has given; a column without a server has no processor time."""
        self.values.setdefault(row, {}).setdefault(column, []).append(value)
        if processor is not None:
            self.processor.setdefault(row, {}).setdefault(column, []).append(processor)

    def has(self, column: str) -> bool:
        """Return whether anything of a column was measured."""
        return any(column in row for row in self.values.values())


def medians(values: Values, row: str) -> dict[str, float]:
    """Return the median of each column in a row."""
    return {column: statistics.median(found) for column, found in values.get(row, {}).items()}


def ratios(values: dict[str, float], reference: str | None) -> dict[str, float]:
    """Return each value divided by that of the reference; nothing when that has none, or 0."""
    divisor = values.get(reference) if reference is not None else None
    return {column: value / divisor for column, value in values.items()} if divisor else {}


def reference_of(columns: Sequence[Column], results: Results) -> str | None:
    """Return the column that the ratios are to: of those measured the first peer, else the first."""
    measured = [column for column in columns if results.has(column.name)]
    measured.sort(key=lambda column: not column.is_peer)
    return measured[0].name if measured else None
