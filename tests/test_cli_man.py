"""The manual pages are those of the parsers, and say everything that the parsers take."""

from __future__ import annotations

import argparse
import os

from cfsfuse.cli import common, man
from cfsfuse.cli.main import make_parser
from tests.support import HERE

DIRECTORY = os.path.join(HERE, os.pardir, "docs", "man")
PAGES = man.pages()


def test_pages_are_up_to_date() -> None:
    assert sorted(os.listdir(DIRECTORY)) == sorted(PAGES)
    for name, text in PAGES.items():
        with open(os.path.join(DIRECTORY, name), encoding="utf-8") as file:
            assert file.read() == text, f"{name}: run python -m cfsfuse.cli.man docs/man"


def test_each_verb_and_option_is_in_a_page() -> None:
    for verb, parser in common.subparsers(make_parser()).items():
        page = PAGES[f"cfsfuse-{verb}.1"].replace("\\-", "-")
        assert f"\\fB{verb}\\fR" in PAGES["cfsfuse.1"].replace("\\-", "-")
        for action in common.actions(parser):
            for word in action.option_strings or [str(action.metavar)]:
                assert action.help == argparse.SUPPRESS or word in page


def test_operands_that_may_be_several_are_shown_so() -> None:
    for name, operand in (("run", "COMMAND"), ("ls", "IMAGE")):
        assert f"\\fI{operand}\\fR\\&...\n" in PAGES[f"cfsfuse-{name}.1"]
    assert "\\fIIMAGE\\fR\n" in PAGES["cfsfuse-run.1"]


def test_mount_options_and_exit_codes_are_in_the_pages() -> None:
    for page in (PAGES["cfsfuse-mount.1"], PAGES["mount.cfsfuse.8"]):
        assert all(f"\\fB{option}" in page for option in ("basedir=", "digest=", "verity", "noverity", "allow_other"))
    for page in PAGES.values():
        assert page.index("EXIT CODES") > page.index(".SH OPTIONS")


def test_no_line_is_taken_for_a_request() -> None:
    for page in PAGES.values():
        requests = {line.split()[0] for line in page.splitlines() if line.startswith((".", "'"))}
        assert requests <= {".TH", ".SH", ".TP", ".PP", ".B", ".BR", ".nf", ".fi"}
        assert page.isascii()
