"""A build that is killed, at any moment, leaves nothing half made under a final name, and nothing in the way.

The whole process group is killed with SIGKILL: nothing that the builder would do about it can help.
"""

from __future__ import annotations

import filecmp
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest

from integration.mounts import CFSFUSE, eventually
from integration.oracles import builds

if TYPE_CHECKING:
    from collections.abc import Iterator

QUICK, ALL = 5, 25  # for each place
# Of the time of a build: before, it is starting Python; the last moments are behind the end, now and then.
_FIRST, _LAST = 0.3, 1.1
_MOMENTS = [pytest.param(number, marks=[pytest.mark.slow] if number >= QUICK else []) for number in range(ALL)]


class Whole(NamedTuple):
    """A build that nobody has disturbed: of what, where its image and store are, its digest, how long it took."""

    place: str
    source: str
    image: str
    store: str
    digest: str
    seconds: float


@pytest.fixture(scope="module", params=["memory", "disk"])
def whole(request: pytest.FixtureRequest) -> Iterator[Whole]:
    """The build that all others are to lead to. In memory it is hashing that takes time, on a disk it is writing."""
    with builds.scratch(in_memory=request.param == "memory") as place:
        source, image, store = (os.path.join(place, name) for name in ("source", "image.cfs", "store"))
        builds.sample(source, small=300, large=5)
        digest, took = "", []
        for _ in range(2):  # the first has to read the program
            shutil.rmtree(store, ignore_errors=True)
            start = time.monotonic()
            digest = builds.mk("--digest-store", store, "--print-digest", source, image).digest
            took.append(time.monotonic() - start)
        yield Whole(place, source, image, store, digest, min(took))


@pytest.mark.parametrize("number", _MOMENTS)
def test_killed_build(whole: Whole, number: int) -> None:
    """What is there is right, and the next build leads to the same as if nothing had happened."""
    share = (number + random.SystemRandom().random()) / (QUICK if number < QUICK else ALL)
    moment = whole.seconds * (_FIRST + (_LAST - _FIRST) * share)
    with tempfile.TemporaryDirectory(dir=whole.place) as place:
        image, store = os.path.join(place, "image.cfs"), os.path.join(place, "store")
        ended = killed_after(moment, "--digest-store", store, whole.source, image)
        print(f"killed after {moment:.4f} s, where a build takes {whole.seconds:.4f}; it had ended: {ended}")
        found = builds.check_final_names(store) if os.path.exists(store) else {}
        assert found.items() <= builds.files_of(whole.store).items()
        if os.path.exists(image):  # an image that is there is whole, and has its objects
            assert filecmp.cmp(image, whole.image, shallow=False)
            assert found == builds.files_of(whole.store)
        assert builds.mk("--digest-store", store, "--print-digest", whole.source, image).digest == whole.digest
        assert builds.check_store(store) == builds.files_of(whole.store)
        assert filecmp.cmp(image, whole.image, shallow=False)


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT], ids=lambda by: by.name)
def test_interrupted_build_leaves_nothing(whole: Whole, by: signal.Signals) -> None:
    with tempfile.TemporaryDirectory(dir=whole.place) as place:
        image, store = os.path.join(place, "image.cfs"), os.path.join(place, "store")
        builds.write_files(store, {"ab/kept": b"x"})
        with started("--digest-store", store, whole.source, image) as process:
            eventually(lambda: len(os.listdir(store)) > 1, "a staging directory")
            os.killpg(process.pid, by)
            said = process.communicate(timeout=builds.TIMEOUT)[1]
        assert said == b""
        assert process.returncode in (-by, 128 + by)
        assert builds.files_of(store) == {"ab/kept": 1}
        assert os.listdir(store) == ["ab"]
        assert os.listdir(place) == ["store"]


def killed_after(seconds: float, *arguments: str) -> bool:
    """Start a build and kill all of its processes after so many seconds; return whether it had ended by then."""
    with started(*arguments) as process:
        try:
            process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=builds.TIMEOUT)
            return False
    return True


def started(*arguments: str) -> subprocess.Popen[bytes]:
    """Start a build, in a process group of its own."""
    return subprocess.Popen(
        [CFSFUSE, "mk", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
