"""`python -m cfsfuse.cli.man OUTDIR`: the manual pages, from the parsers, so that no option is missing in them.

The same parsers give the same bytes: there is no date in a page. Format: man(7).
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
import textwrap
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.cli import common, mount_helper
from cfsfuse.cli.main import EXIT_CODE_TEXT, make_parser

if TYPE_CHECKING:
    from collections.abc import Iterator

_DEEP = " " * 10
_ITEM = re.compile(r"  (\S.*?)  +(\S.*)")


class Page(NamedTuple):
    """A page: the name and section of the manual, and the parser that it describes."""

    name: str
    section: int
    parser: argparse.ArgumentParser

    @property
    def file_name(self) -> str:
        return f"{self.name}.{self.section}"


def pages() -> dict[str, str]:
    """Return the text of each page by its file name."""
    main = make_parser()
    verbs = [Page(f"cfsfuse-{name}", 1, verb) for name, verb in common.subparsers(main).items()]
    every = [Page("cfsfuse", 1, main), *verbs, Page("mount.cfsfuse", 8, mount_helper.make_parser())]
    return {page.file_name: "\n".join(_page(page, every)) + "\n" for page in every}


def _page(page: Page, every: list[Page]) -> Iterator[str]:
    parser = page.parser
    description = parser.description or ""
    yield f'.TH {page.name.upper()} {page.section} "" "cfsfuse" "composefs in user space"'
    yield from (".SH NAME", _line(f"{page.name} - {_summary(description)}"))
    yield from (".SH SYNOPSIS", ".nf", f".B {_text(_usage(parser))}", ".fi")
    yield from (".SH DESCRIPTION", _line(description))
    yield from _arguments(page)
    if page.name != "cfsfuse":  # its epilog are the exit codes
        yield from _epilog(parser.epilog or "", ".SH DETAILS")
    yield from _epilog(EXIT_CODE_TEXT, "")
    others = sorted(f".BR {_text(other.name)} ({other.section})" for other in every if other is not page)
    yield from (".SH SEE ALSO", " ,\n".join(others))


def _arguments(page: Page) -> Iterator[str]:
    options = [action for action in common.actions(page.parser) if action.help != argparse.SUPPRESS]
    operands = [action for action in options if not action.option_strings]
    if operands:
        yield ".SH OPERANDS" if page.name != "cfsfuse" else ".SH VERBS"
    for action in operands:
        yield from _verbs(page.parser) if isinstance(action.choices, dict) else _item(_operand(action), action.help)
    yield ".SH OPTIONS"
    for action in options:
        if action.option_strings:
            yield from _item(_option(action), action.help)


def _verbs(parser: argparse.ArgumentParser) -> Iterator[str]:
    for name, verb in common.subparsers(parser).items():
        yield from _item(f"\\fB{_text(name)}\\fR", f"{verb.description} See cfsfuse-{name}(1).")


def _operand(action: argparse.Action) -> str:
    return f"\\fI{_text(str(action.metavar))}\\fR" + ("\\&..." if action.nargs in ("+", argparse.PARSER) else "")


def _option(action: argparse.Action) -> str:
    value = ""
    if action.nargs != 0:
        choices = "|".join(map(str, action.choices or ()))
        value = f" \\fI{_text(str(action.metavar or choices))}\\fR"
    return ", ".join(f"\\fB{_text(option)}\\fR{value}" for option in action.option_strings)


def _item(term: str, text: str | None) -> Iterator[str]:
    yield from (".TP", term, _line(text or ""))


def _epilog(text: str, heading: str) -> Iterator[str]:
    """Yield an epilog: a line that ends in a colon is a heading, `  term  text` an item, anything else running text.

    Deeply indented lines go on with what stands above them, which may be a term alone.
    """
    lines = text.splitlines()
    is_running = False
    for line, following in itertools.zip_longest(lines, lines[1:], fillvalue=""):
        item = _ITEM.fullmatch(line)
        was_running, is_running = is_running, False
        if line.startswith(_DEEP):
            yield _line(line.strip())
        elif item:
            yield from _item(f"\\fB{_text(item[1])}\\fR", item[2])
        elif line.startswith("  ") and following.startswith(_DEEP):
            yield from (".TP", f"\\fB{_text(line.strip())}\\fR")
        elif line.endswith(":"):
            head, bracket, rest = line[:-1].partition(" (")
            yield f".SH {_text(head.upper())}"
            if bracket:
                yield _line(f"({rest}")
            heading = ""
        else:
            is_running = bool(line)
            yield from [heading] if heading else [".PP"] if line.startswith("  ") and not was_running else []
            yield _line(line.strip())
            heading = ""


def _usage(parser: argparse.ArgumentParser) -> str:
    """Return the usage on one line: where argparse breaks it depends on the width of the terminal."""
    return " ".join(parser.format_usage().removeprefix("usage: ").split())


def _summary(description: str) -> str:
    return description[:1].lower() + description[1:].rstrip(".")


def _line(text: str) -> str:
    """Return running text in lines of a good length; one that starts with a dot or a quote would be a request."""
    lines = textwrap.wrap(_text(text), 78, break_long_words=False, break_on_hyphens=False)
    return "\n".join(f"\\&{line}" if line[0] in ".'" else line for line in lines)


def _text(text: str) -> str:
    """Return text with what roff would take for something else escaped; a hyphen is one that can be copied."""
    return (
        text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("…", "\\&...").replace("µ", "\\(mc")
    )


def main(directory: str) -> None:
    os.makedirs(directory, exist_ok=True)
    for name, text in pages().items():
        with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
            file.write(text)


if __name__ == "__main__":
    main(sys.argv[1])
