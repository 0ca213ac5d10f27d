"""Mutated images: an ImageError or an answer; never another exception, a hang, or much memory."""

from __future__ import annotations

import contextlib
import faulthandler
import gzip
import hashlib
import os
import resource
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfsfuse.errors import ImageError
from tests import imagemaker as im
from tests.support import BAD, exercise, python_image, sample, shared, time_limit, vector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MEMORY = 64 << 20
SECONDS = 20
INTERESTING = (0, 1, 2, 3, 4, 5, 12, 0x1F, 0x20, 0x40, 0x7F, 0x80, 0xFE, 0xFF)
WHOLE_FIELDS = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0\x10\0\0", b"\x24\0\0\0")


@contextlib.contextmanager
def memory_limit(extra: int) -> Iterator[None]:
    """Let the process have `extra` bytes more address space than it has; beyond that, MemoryError."""
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def survives(content: bytes) -> None:
    """Check one image; whatever is found wrong is kept as a file, for the folder of malformed images."""
    try:
        with memory_limit(MEMORY), time_limit(SECONDS), contextlib.suppress(ImageError):
            exercise(content)
    except Exception:
        keep(content)
        raise


def keep(content: bytes) -> None:
    os.makedirs(BAD, exist_ok=True)
    name = f"found-{hashlib.sha256(content).hexdigest()[:12]}.cfs.gz"
    with open(os.path.join(BAD, name), "wb") as file:
        file.write(gzip.compress(content, mtime=0))


def small() -> bytes:
    """Return an image in which nearly every byte means something."""
    root = im.directory(
        {
            b"a": im.file(b"a", xattrs={b"user.a": b"1"}, shared={b"user.b": b"2"}),
            b"b": im.external(10000, b"aa/b", b"\1" * 32),
            b"c": im.symlink(b"a"),
            b"d": im.directory({b"e": im.file(b"e", compact=True), b"f": im.directory()}),
            b"g": im.file(b"g" * 5000),
            b"h": im.escaped_whiteout(),
        }
    )
    return im.make(root).content()


SOURCES: dict[str, Callable[[], bytes]] = {
    "small": small,
    "sample": lambda: sample().content(),
    "python.cfs": lambda: python_image("python.cfs"),
    "random-12": lambda: vector("random-12.cfs.gz"),
    "whiteouts": lambda: vector("whiteouts.cfs.gz"),
}
# How many of the profile's examples each image gets: walking whiteouts takes thirty times as long as the small one.
SHARES = {"small": 4.0, "sample": 1.0, "python.cfs": 1.5, "random-12": 0.7, "whiteouts": 0.15}


def meaningful(content: bytes) -> list[int]:
    """Return the offsets of the 32-byte slots that mean something: not the zeros that fill up blocks."""
    return [at for at in range(0, len(content), 32) if any(content[at : at + 32])]


class Mutations:
    """Changes to an image: a few bytes, mostly where they mean something, and perhaps a cut."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        slots = meaningful(content)
        near = [at for at in slots if at < 16 * 1024]
        slot = st.sampled_from(near) | st.sampled_from(slots)
        place = st.builds(int.__add__, slot, st.integers(0, 31)) | st.integers(0, len(content) - 1)
        byte = st.sampled_from(INTERESTING) | st.integers(0, 255)
        value = byte.map(lambda number: bytes([number])) | st.sampled_from(WHOLE_FIELDS) | slot
        self.patches = st.lists(st.tuples(place, value), min_size=1, max_size=6)
        self.length = st.just(len(content)) | st.integers(0, len(content))

    def apply(self, patches: list[tuple[int, bytes | int]], length: int) -> bytes:
        """Write each patch; a number stands for the 32 bytes there, which go to the start of a slot."""
        data = bytearray(self.content)
        for at, value in patches:
            if isinstance(value, int):
                data[at & -32 : (at & -32) + 32] = self.content[value : value + 32]
            else:
                data[at : at + len(value)] = value
        return bytes(data[:length])


def run(name: str, profile: str) -> None:
    mutations = Mutations(SOURCES[name]())
    base = settings.get_profile(profile)

    @settings(base, max_examples=max(1, int(base.max_examples * SHARES[name])))
    @given(mutations.patches, mutations.length)
    def check(patches: list[tuple[int, bytes | int]], length: int) -> None:
        survives(mutations.apply(patches, length))

    check()


@pytest.mark.parametrize("name", SOURCES)
def test_mutated_images_give_an_answer_or_an_image_error(name: str) -> None:
    run(name, "ci")


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", SOURCES)
def test_many_mutated_images(name: str) -> None:
    faulthandler.cancel_dump_traceback_later()  # dumping the stack of a thread that runs can crash Python 3.11
    run(name, "long")


@pytest.mark.parametrize("name", SOURCES)
def test_unchanged_images_have_no_errors(name: str) -> None:
    assert exercise(SOURCES[name]()) == []


def test_every_cut_of_a_small_image() -> None:
    content = small()
    assert len(content) < 16384
    for length in [*range(1500), *range(1500, len(content), 7)]:
        with contextlib.suppress(ImageError):
            exercise(content[:length])


def test_every_byte_of_the_first_inodes_changed() -> None:
    content = small()
    for at in [*range(16), *range(1024, 1024 + 128), *range(1152, 1152 + 800)]:
        for value in (0x00, 0xFF, content[at] ^ 0x01, content[at] ^ 0x80):
            with contextlib.suppress(ImageError):
                exercise(content[:at] + bytes([value]) + content[at + 1 :])


@pytest.mark.parametrize("kept", sorted(os.listdir(BAD)) if os.path.isdir(BAD) else [])
def test_kept_images_stay_harmless(kept: str) -> None:
    with gzip.open(os.path.join(BAD, kept)) as file:
        survives(file.read())


def test_the_cut_of_a_real_image_at_each_block() -> None:
    shared("images", "python-image.tar.gz")
    content = python_image("python.cfs")
    for length in range(0, len(content), 4096):
        with pytest.raises(ImageError):
            exercise(content[:length])
