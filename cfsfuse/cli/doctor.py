"""`cfsfuse doctor`: what this host has, tried out, and which backends that allows."""

from __future__ import annotations

import json
import platform
from typing import TYPE_CHECKING

from cfsfuse.cli import common
from cfsfuse.errors import UsageError
from cfsfuse.mount.ladder import reader_of
from cfsfuse.mount.options import parse
from cfsfuse.mount.plan import Fact, judge
from cfsfuse.mount.probe import NOT_LOOKED_AT, Host

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator

    from cfsfuse.mount.plan import Backend, Verdict

# What may be asked of a mount, and the options that ask for it.
_PROMISES = {"verified": "tryverity", "verified, all of it": "verity", "not verified": "noverity"}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Everything is tried out in namespaces of its own; nothing of it is left.\n"
    parser.add_argument("image", metavar="IMAGE", nargs="?", help="an image whose objects are looked at, too")
    parser.add_argument("-o", "--options", metavar="OPTIONS", action="append", default=[], help="basedir=, for IMAGE")
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    options = parse(",".join(arguments.options))
    if arguments.image is not None and not options.basedir:
        raise UsageError("no base directory: name the object store of the image with -o basedir=")
    reader = None if arguments.image is None else reader_of(arguments.image, options.digest)
    host = Host(reader, options.basedir)
    verdicts = {promise: list(judge(parse(option), host.look)) for promise, option in _PROMISES.items()}
    with common.output():
        if arguments.json:
            print(json.dumps(_document(host, verdicts), indent=2))
        else:
            print("\n".join(_lines(host, verdicts)))
    return 0


def _document(host: Host, verdicts: dict[str, list[Verdict]]) -> dict[str, object]:
    return {
        "kernel": platform.release(),
        "facts": {fact.name.lower(): host.look(fact) for fact in Fact},
        "backends": {
            _PROMISES[promise]: {verdict.backend.value: verdict.problems for verdict in found}
            for promise, found in verdicts.items()
        },
    }


def _lines(host: Host, verdicts: dict[str, list[Verdict]]) -> Iterator[str]:
    yield f"Linux {platform.release()}"
    for fact in Fact:
        problem = host.look(fact)
        answer = "yes" if problem is None else problem if problem == NOT_LOOKED_AT else f"no: {problem}"
        yield f"  {fact.value:34} {answer}"
    for promise, found in verdicts.items():
        yield ""
        yield f"Mounts {promise} (-o {_PROMISES[promise]}):"
        yield from explanation(found)


def explanation(verdicts: Iterable[Verdict], chosen: Backend | None = None) -> Iterator[str]:
    """Yield a line for each backend: whether it can be taken, whether it is `chosen`, and why not."""
    for backend, problems in verdicts:
        state = "chosen" if backend is chosen else "refused" if problems else "possible"
        if problems == [NOT_LOOKED_AT]:
            yield f"  {backend.value:8} {NOT_LOOKED_AT}"
        else:
            yield f"  {backend.value:8} {state}{': ' if problems else ''}{'; '.join(problems)}"
