"""Who is measured: each backend that works here, by the command that users run, and other programs by theirs."""

from __future__ import annotations

import os
import re
import shlex
import sys
from typing import TYPE_CHECKING, NamedTuple

import cfsfuse
from cfsfuse.errors import UsageError, printable
from cfsfuse.mount.options import parse, split
from cfsfuse.mount.plan import Backend
from cfsfuse.mount.temporary import offers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cfsfuse.mount.options import MountOptions
    from cfsfuse.mount.plan import Fact

_NAME = re.compile(r"[\w.+-]{1,16}")  # as wide as a column of the table
_PLACEHOLDER = re.compile(r"\{(image|basedir|mountpoint)\}")
_DEFAULT = "tryverity"
_OFF = "noverity"


class Column(NamedTuple):
    """A program that mounts: `command` is a template with {image}, {basedir} and {mountpoint}.

    `environment` comes on top of our own. `unverified` says why this column verifies nothing although it was asked to;
    None when it does what it was asked.
    """

    name: str
    command: tuple[str, ...]
    environment: dict[str, str]
    is_peer: bool = False
    unverified: str | None = None

    def words(self, image: str, basedir: Sequence[str], mountpoint: str) -> list[str]:
        """Return the command for a mount; the base directories go in as the option `basedir=` has them."""
        joined = ":".join(os.path.abspath(path).replace(":", "\\:") for path in basedir)
        values = {"image": os.path.abspath(image), "basedir": joined, "mountpoint": mountpoint}
        return [self._filled(word, values) for word in self.command]

    def _filled(self, word: str, values: dict[str, str]) -> str:
        """Return a word of the command with its values: in ours a path may have the name of a placeholder in it."""
        if self.is_peer or _PLACEHOLDER.fullmatch(word):
            return _PLACEHOLDER.sub(lambda match: values[match[1]], word)
        return word


class Columns(NamedTuple):
    """Those to be measured, and why a backend is not among them."""

    chosen: list[Column]
    left_out: dict[str, str]


def check_options(text: str) -> MountOptions:
    """Return the options; raise UsageError for those that no benchmark takes."""
    options = parse(text)
    if options.upperdir is not None or "rw" in split(text, ","):
        raise UsageError("upperdir= and rw are not for bench: it measures mounts that nobody changes")
    if not options.basedir:
        raise UsageError("no base directory: name the object store with -o basedir=")
    return options


def backends(text: str, named: Sequence[str], look: Callable[[Fact], str | None], log: str) -> Columns:
    """Return a column for each backend that can mount with the options `text` here, or for each of those named.

    What cannot verify here is measured without, as no data goes to anybody, unless `verity` is asked for. Raises
    HostError when one that was named cannot mount at all.
    """
    columns = Columns([], {})
    for backend, options, problem in offers(check_options(text), look, named):
        told = None if problem is None else printable(os.fsencode(problem))
        if options is None:
            columns.left_out[backend.value] = str(told)
        else:
            columns.chosen.append(_ours(backend, text, log, told))
    return columns


def _ours(backend: Backend, text: str, log: str, unverified: str | None) -> Column:
    items = split(text, ",")
    if unverified is not None:
        items = [item for item in items if item != _DEFAULT] + [_OFF]
    if not any(item.startswith("log=") for item in items):
        items.append(f"log={log}")
    options = ",".join(item.replace(",", "\\,") for item in items if item)
    start = "import sys; from cfsfuse.cli.main import main; sys.exit(main())"  # as the console script has it
    program = [sys.executable, "-P", "-c", start, "mount", "--backend", backend.value]
    # The same code as ours, wherever that is; a directory of that name where we are is not asked.
    above = os.path.dirname(os.path.dirname(os.path.abspath(cfsfuse.__file__)))
    path = os.pathsep.join(filter(None, (above, os.environ.get("PYTHONPATH"))))
    command = (*program, "-o", options, "{image}", "{mountpoint}")
    return Column(backend.value, command, {"PYTHONPATH": path}, unverified=unverified)


def peer(text: str) -> Column:
    """Return the column that `NAME=command` describes; raise UsageError."""
    name, equals, command = text.partition("=")
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--peer {name}: the command cannot be split into words: {error}") from None
    if not equals or not any("{mountpoint}" in word for word in words):
        raise UsageError(f"--peer {text}: must be NAME='command with {{image}} {{basedir}} {{mountpoint}}'")
    if not _NAME.fullmatch(name):
        raise UsageError(f"--peer {name}: a name is made of at most 16 letters, digits, and -_+.")
    return Column(name, tuple(words), {}, is_peer=True)


def check_names(columns: Sequence[Column]) -> None:
    """Raise UsageError when two columns, or a peer and any backend, have one name."""
    names = [column.name for column in columns]
    reserved = {backend.value for backend in Backend}
    for column in columns:
        if names.count(column.name) > 1 or (column.is_peer and column.name in reserved):
            raise UsageError(f"--peer {column.name}: the name is taken; give it another one")
