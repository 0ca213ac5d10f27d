"""Running the command line inside the test, and images and stores on disk for it to work on."""

from __future__ import annotations

import os
import sys
import tarfile
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.cli.main import main
from cfsfuse.verity.digest import SHA256
from cfsfuse.verity.merkle import content_digest
from tests import imagemaker as im
from tests.support import shared

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import pytest

COMMAND = [sys.executable, "-m", "cfsfuse.cli.main"]


class Result(NamedTuple):
    """What a command did: exit code, standard output, standard error."""

    code: int
    out: bytes
    err: str


def run(capture: pytest.CaptureFixture[bytes], *arguments: object) -> Result:
    """Run `cfsfuse` with `arguments` in this process."""
    capture.readouterr()
    try:
        code = main([os.fspath(word) if isinstance(word, os.PathLike) else str(word) for word in arguments])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    out, err = capture.readouterr()
    return Result(code, out, err.decode())


def fails(capture: pytest.CaptureFixture[bytes], code: int, *arguments: object) -> str:
    """Run a command that must end with `code` and one line on standard error; return that line."""
    result = run(capture, *arguments)
    assert result.code == code, result.err
    assert result.err.count("\n") == 1, result.err
    assert result.err.startswith("cfsfuse")
    return result.err.rstrip("\n")


def write_image(path: Path, children: Mapping[bytes, im.Entry]) -> str:
    path.write_bytes(im.make(im.directory(children)).content())
    return str(path)


def add_object(base: Path, content: bytes, **fields: object) -> im.Entry:
    """Write an object below `base` and return an entry whose content it is."""
    digest = content_digest(SHA256, content)
    name = f"{digest.hex()[:2]}/{digest.hex()[2:]}"
    (base / name).parent.mkdir(parents=True, exist_ok=True)
    (base / name).write_bytes(content)
    return im.external(len(content), name.encode(), digest, **fields)


def unpack_python_image(folder: Path) -> Path:
    """Unpack the real image with its objects and return the folder that holds python.cfs."""
    with tarfile.open(shared("images", "python-image.tar.gz")) as archive:
        if hasattr(tarfile, "data_filter"):  # since Python 3.11.4
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(folder)  # noqa: S202 - our own reference data
    return next(folder.rglob("python.cfs")).parent
