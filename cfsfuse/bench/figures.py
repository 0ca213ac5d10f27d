"""The table as a picture: horizontal bars in SVG, a group for each row.

Nothing depends on colour: each bar has its column's name before it, its figure behind it, and a hatch of its own. Bars
are to scale within their row only: rows differ by factors of thousands. Light or dark follows the reader's setting.
https://www.w3.org/TR/SVG2/
"""

from __future__ import annotations

import html
import textwrap
from typing import TYPE_CHECKING

from cfsfuse.bench.report import UNVERIFIED, heading, notes, number, sections

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cfsfuse.bench.report import Line, Report

_WIDTH = 900
_MARGIN = 16
_BAR_X, _BAR_MOST, _BAR_HEIGHT = 170, 520, 13
_LETTERS = 125  # of a line of text
_PITCH, _GAP, _LINE = 17, 9, 18  # from bar to bar, after a row, from line to line of text

# Tints that people tell apart who see few colours, and on them a hatch: one of a kind in any two neighbours.
_TINTS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_HATCHES = (
    "",
    "M-2,2 L2,-2 M0,8 L8,0 M6,10 L10,6",
    "M2,2 h2 v2 h-2 z M6,6 h2 v2 h-2 z",
    "M0,2 H8 M0,6 H8",
    "M0,4 H8 M4,0 V8",
    "M2,0 V8 M6,0 V8",
    "M-2,6 L2,10 M0,0 L8,8 M6,-2 L10,2",
)
_STYLE = """
text { font: 12px sans-serif; fill: #1a1a1a }
.strong { font-weight: bold }
.paper { fill: #ffffff }
.bar { stroke: #1a1a1a; stroke-width: 1 }
.hatch { stroke: #1a1a1a; stroke-width: 1; fill: none }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f0f0 }
  .paper { fill: #161616 }
  .bar { stroke: #f0f0f0 }
}
"""


def svg(report: Report) -> str:
    """Return the figures of a report as an SVG document."""
    labels = {
        column.name: f"{column.name} ({UNVERIFIED})" if column.unverified else column.name
        for column in report.task.columns
    }
    drawing = _Drawing(labels)
    for number_of_line, text in enumerate(heading(report)):
        drawing.text(text, strong=number_of_line == 0)
    for section in sections(report):
        drawing.space()
        drawing.text(section.heading, strong=True)
        for line in section.lines:
            drawing.row(line)
    drawing.space()
    for note in notes(report):
        for text in textwrap.wrap(note, _LETTERS, subsequent_indent="  "):
            drawing.text(text)
    return "\n".join(_document(report, drawing)) + "\n"


def _document(report: Report, drawing: _Drawing) -> Iterator[str]:
    height = drawing.y + _MARGIN
    title, description = (html.escape(text) for text in (f"Speed of mounts of {heading(report)[0]}", _told(report)))
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" role="img" aria-labelledby="bench-title bench-description">'
    )
    yield f'<title id="bench-title">{title}</title>'
    yield f'<desc id="bench-description">{description}</desc>'
    yield f"<style>{_STYLE}</style>"
    yield f"<defs>{''.join(_pattern(index) for index in range(len(drawing.labels)))}</defs>"
    yield f'<rect class="paper" width="{_WIDTH}" height="{height}"/>'
    yield from drawing.parts
    yield "</svg>"


def _told(report: Report) -> str:
    """Return the picture in words, for those who do not see it."""
    said = ["Horizontal bars in a group for each row; within a row their lengths are to scale, and shorter is better."]
    for section in sections(report):
        for line in section.lines:
            figures = ", ".join(f"{name} {number(value)}" for name, value in line.values.items())
            said.append(f"{section.heading}: {line.title}: {line.lacking or figures or 'nothing'}.")
    return " ".join(said)


def _pattern(index: int) -> str:
    tint, hatch = _TINTS[index % len(_TINTS)], _HATCHES[index % len(_HATCHES)]
    path = f'<path class="hatch" d="{hatch}"/>' if hatch else ""
    return (
        f'<pattern id="bench-{index}" width="8" height="8" patternUnits="userSpaceOnUse">'
        f'<rect width="8" height="8" fill="{tint}"/>{path}</pattern>'
    )


class _Drawing:
    """Elements from top to bottom; `y` is where the next one goes, `labels` what stands before a column's bars."""

    def __init__(self, labels: dict[str, str]) -> None:
        self.labels = labels
        self.parts: list[str] = []
        self.y = _MARGIN

    def space(self) -> None:
        self.y += _GAP

    def text(self, text: str, *, strong: bool = False) -> None:
        self._put(_MARGIN, text, 'class="strong"' if strong else "")
        self.y += _LINE

    def row(self, line: Line) -> None:
        """Draw the bars of a row under its title."""
        self.text(line.title)
        longest = max(line.values.values(), default=0)
        if line.lacking:
            self._put(_BAR_X, line.lacking)
            self.y += _PITCH
        for index, name in enumerate([] if line.lacking else self.labels):
            self._bar(index, name, line, longest)
        self.space()

    def _bar(self, index: int, name: str, line: Line, longest: float) -> None:
        self._put(_BAR_X - 8, self.labels[name], 'text-anchor="end"')
        value = line.values.get(name)
        if value is None:
            self._put(_BAR_X, "-")
        else:
            length = max(1.0, _BAR_MOST * value / longest) if longest else 1.0
            self.parts.append(
                f'<rect class="bar" x="{_BAR_X}" y="{self.y}" width="{length:.1f}" height="{_BAR_HEIGHT}" '
                f'fill="url(#bench-{index})"/>'
            )
            ratio = line.ratios.get(name)
            label = number(value) + ("" if ratio is None else f" (x{number(ratio, 2)})")
            self._put(_BAR_X + round(length) + 8, label)
        self.y += _PITCH

    def _put(self, x: int, text: str, attributes: str = "") -> None:
        if text:
            self.parts.append(f'<text x="{x}" y="{self.y + 11}" {attributes}>{html.escape(text)}</text>')
