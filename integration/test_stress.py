"""Many files at once, and many readers while objects change: never a wrong byte, never more memory or descriptors."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import random
import resource
import subprocess
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest

from integration.mounts import BLOCK, CFSFUSE, Stage, noise, put_object, require, resident, running, stage, wait_mounted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.synchronize import Event

FILES = 10_000
DESCRIPTORS = 1024
FEW_DESCRIPTORS = 256
READERS = 64
GROWTH = 6 << 20  # bytes: of caches that fill up at random, not of every file or error


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Let this process hold that many files open; the daemon has a limit of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < FILES + 200:
        pytest.skip(f"the hard limit of descriptors is {hard}, not {FILES + 200}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES + 200, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def limited_mount(made: Stage, limit: int) -> Iterator[int]:
    """Mount with a limit of descriptors that the daemon cannot raise; yield its pid."""
    words = [require("prlimit"), f"--nofile={limit}:{limit}", CFSFUSE, "mount", "-f", *made.words()]
    with running(made.start(*words)) as process:
        wait_mounted(process, made.mountpoint)
        yield process.pid
        made.unmount()
        assert process.wait(20) == 0


def test_ten_thousand_files_held_open(descriptors: None) -> None:
    hold_open(FILES, DESCRIPTORS)


def test_more_unverified_files_held_open_than_descriptors(descriptors: None) -> None:
    """Without a digest the daemon keeps descriptors of small files too, and so has to give some back."""
    hold_open(6 * FEW_DESCRIPTORS, FEW_DESCRIPTORS, digest=False)


def hold_open(count: int, limit: int, *, digest: bool = True) -> None:
    """Hold `count` small files open and read them all in another order than they were opened in."""
    with stage() as made:
        recipe = made.recipe()
        contents = [b"%d\n" % index * (20 + index % 50) for index in range(count)]
        for index, content in enumerate(contents):
            if index % 100 == 0:
                recipe.directory(f"/{index // 100}")
            recipe.redirected(f"/{index // 100}/{index}", put_object(made.store, content), content, digest=digest)
        recipe.build(made.image)
        with limited_mount(made, limit) as daemon, contextlib.ExitStack() as stack:
            fds = []
            for index in range(count):
                fds.append(os.open(made.at(f"{index // 100}/{index}"), os.O_RDONLY))
                stack.callback(os.close, fds[-1])
            order = list(range(count))
            random.Random(0).shuffle(order)
            for index in order:
                assert os.pread(fds[index], BLOCK, 0) == contents[index]
            assert len(os.listdir(f"/proc/{daemon}/fd")) < limit
            assert resident(daemon) < 150 << 20


def test_more_large_files_held_open_than_descriptors(descriptors: None) -> None:
    """Large ones need a descriptor for every block that is read, and their trees need some too."""
    count, size = FEW_DESCRIPTORS + 100, (1 << 20) + 1
    with stage() as made:
        recipe = made.recipe()
        for index in range(count):
            content = b"%08d" % index + bytes(size - 16) + b"%08d" % index
            recipe.redirected(f"/{index}", put_object(made.store, content), content)
        recipe.build(made.image)
        with limited_mount(made, FEW_DESCRIPTORS) as daemon, contextlib.ExitStack() as stack:
            fds = []
            for index in range(count):
                fds.append(os.open(made.at(str(index)), os.O_RDONLY))
                stack.callback(os.close, fds[-1])
            for index, fd in enumerate(fds):
                assert os.pread(fd, 8, 0) == os.pread(fd, 8, size - 8) == b"%08d" % index
            assert len(os.listdir(f"/proc/{daemon}/fd")) < FEW_DESCRIPTORS


class File(NamedTuple):
    """A file of the image under test: its name in the mount, its object, its content."""

    name: str
    object: str
    content: bytes


class Tally(NamedTuple):
    """What a reader saw: how many reads, names and errnos of those that failed, names of those that were wrong."""

    right: int
    failed: set[tuple[str, int]]
    wrong: set[str]


def files_of(made: Stage) -> tuple[list[File], list[File]]:
    """Build an image; return the files whose objects are to be changed, and those that are left alone."""
    recipe = made.recipe()
    groups: tuple[list[File], list[File]] = ([], [])
    for group, files in zip(("changed", "left"), groups, strict=True):
        recipe.directory(f"/{group}")
        for index in range(24):
            name = f"{group}/{index}"
            content = noise((3 << 20) + 5 if index % 6 == 0 else 2000 + index * 1500, name)
            files.append(File(name, made.object(recipe.file(f"/{name}", content)), content))
    recipe.build(made.image)
    return groups


def read_at_random(mountpoint: str, files: list[File], seed: int, stop: Event) -> Tally:
    """Read parts of files until `stop` is set, each anew and through the page cache or past it."""
    chance = random.Random(seed)
    tally = Tally(0, set(), set())
    right = 0
    while not stop.is_set():
        file = chance.choice(files)
        offset = chance.randrange(len(file.content))
        try:
            with open(os.path.join(mountpoint, file.name), "rb", buffering=0) as opened:
                if chance.random() < 0.5:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                length = chance.choice((100, 4096, 70_000))
                data = os.pread(opened.fileno(), length, offset)
        except OSError as error:
            tally.failed.add((file.name, error.errno or 0))
            continue
        right += 1
        if data != file.content[offset : offset + length]:
            tally.wrong.add(file.name)
    return tally._replace(right=right)


def reader(mountpoint: str, files: list[File], seed: int, stop: Event, results: multiprocessing.Queue[Tally]) -> None:
    results.put(read_at_random(mountpoint, files, seed, stop))


def replace_by_rename(file: File, content: bytes) -> None:
    with open(file.object + ".new", "wb") as new:
        new.write(content)
    os.rename(file.object + ".new", file.object)


def rewrite_in_place(file: File, content: bytes) -> None:
    with open(file.object, "r+b", buffering=0) as opened:
        opened.write(content)


def take_away(file: File, content: bytes) -> None:
    if content is file.content:
        replace_by_rename(file, content)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file.object)


def cut_short(file: File, content: bytes) -> None:
    if content is not file.content:
        os.truncate(file.object, len(content) // 2)
    else:
        rewrite_in_place(file, content)


CHANGES: tuple[Callable[[File, bytes], None], ...] = (replace_by_rename, rewrite_in_place, take_away, cut_short)


def change_at_random(files: list[File], stop: threading.Event) -> None:
    """Damage objects and restore them, until `stop` is set; leave them as they were."""
    chance = random.Random(1)
    while not stop.is_set():
        file, change = chance.choice(files), chance.choice(CHANGES)
        damaged = bytearray(file.content)
        for _ in range(5):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        change(file, bytes(damaged))
        stop.wait(0.005)
        change(file, file.content)
        stop.wait(0.005)


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(8, id="short"), pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(240)], id="long")],
)
def test_readers_while_objects_are_replaced_and_restored(seconds: int) -> None:
    with stage() as made:
        changed, left = files_of(made)
        context = multiprocessing.get_context("fork")
        stop_reading, stop_changing = context.Event(), threading.Event()
        results: multiprocessing.Queue[Tally] = context.Queue()
        daemon = made.mount()
        readers = [
            context.Process(
                target=reader, args=(made.mountpoint, changed + left, seed, stop_reading, results), daemon=True
            )
            for seed in range(READERS)
        ]
        for process in readers:
            process.start()
        changer = threading.Thread(target=change_at_random, args=(changed, stop_changing))
        changer.start()
        try:
            time.sleep(seconds / 3)
            before = resident(daemon)
            time.sleep(seconds * 2 / 3)
            after = resident(daemon)
        finally:
            stop_changing.set()
            changer.join()
            stop_reading.set()
        tallies = [results.get(timeout=30) for _ in readers]
        for process in readers:
            process.join(30)
        right = sum(tally.right for tally in tallies)
        failed = set().union(*(tally.failed for tally in tallies))
        print(f"{right} reads, {len(failed)} kinds of failure, {before >> 10} -> {after >> 10} KiB")
        assert set().union(*(tally.wrong for tally in tallies)) == set()
        assert {name for name, _ in failed} <= {file.name for file in changed}
        assert {number for _, number in failed} <= {errno.EIO, errno.ENOENT}
        assert right > READERS * seconds
        assert failed, "the changes were not noticed"
        assert after - before < GROWTH
        for file in changed + left:  # all is restored
            with open(made.at(file.name), "rb") as opened:
                assert opened.read() == file.content
        made.unmount()  # the last lines are written after the answers, but before the daemon's end
        assert all("/changed/" in line for line in made.claim(".", len(made.log_lines())))


def test_memory_does_not_grow_with_the_number_of_files_seen() -> None:
    with stage() as made:
        recipe = made.recipe()
        for directory in range(200):
            recipe.directory(f"/{directory}")
            for index in range(100):
                recipe.inline(f"/{directory}/{index}", b"%d" % index)
        recipe.build(made.image)
        with made.mounted() as daemon:

            def walk(first: int, last: int) -> int:
                paths = [made.at(str(directory)) for directory in range(first, last)]
                subprocess.run(["find", *paths, "-ls"], check=True, stdout=subprocess.DEVNULL)
                return resident(daemon)

            before = walk(0, 70)
            assert walk(70, 200) - before < GROWTH
            assert resident(daemon) < 90 << 20
