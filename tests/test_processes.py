"""Processes: whose they are, work in a child, signals put off."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from cfsfuse.errors import HostError, ImageError, PathNotFound
from cfsfuse.processes import Overdue, Started, adopting, bounded, processor_time, undisturbed, within, working

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextlib.contextmanager
def sleeping(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command or ("sleep", "1000"), stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


# Whose they are


def test_what_was_there_before_is_left_alone() -> None:
    with sleeping() as other:
        started = Started()
        assert started.living() == []
        with sleeping() as ours:
            assert started.living() == [ours.pid]
            assert started.end()
            assert started.living() == []
            assert ours.wait() in (0, -signal.SIGKILL), "it has been waited for"
        assert other.poll() is None


def test_what_others_start_is_left_alone() -> None:
    """Even when it becomes ours, its own parent having ended."""
    script = "sh -c 'echo $$; exec sleep 1000 >&-' & read -r _; exit 0"
    with adopting(), subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        started = Started()
        orphan = int(other.stdout.readline())
        assert started.living() == []
        other.communicate(b"\n")
        assert within(5, lambda: parent(orphan) == os.getpid())
        assert started.end()
        os.kill(orphan, signal.SIGKILL)  # it lives
        os.waitpid(orphan, 0)


def parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[1])


def test_all_that_is_below_is_found_and_ended() -> None:
    started = Started()
    with sleeping("sh", "-c", "sleep 1000 & echo; wait") as shell:
        assert shell.stdout is not None
        shell.stdout.readline()
        assert within(5, lambda: len(started.living()) == 2)
        with adopting():
            assert started.end()
    assert started.living() == []


def test_what_ends_by_itself_is_not_killed() -> None:
    started = Started()
    with sleeping("sleep", "0.2") as process:
        assert started.end(20)
        assert process.returncode in (None, 0)


# Work in a child


def sleep() -> None:
    time.sleep(60)


def test_work_gives_its_values_one_by_one() -> None:
    with working(lambda send: list(map(send, range(3)))) as worker:
        assert [worker.receive(20) for _ in range(3)] == [0, 1, 2]
        assert worker.receive(20) == [None] * 3
        with pytest.raises(EOFError):
            worker.receive(20)


def test_large_values_come_whole() -> None:
    assert bounded(lambda: bytes(5 << 20), 20) == bytes(5 << 20)


@pytest.mark.parametrize(
    "error",
    [
        HostError("as it is"),
        PathNotFound(b"/\xff"),
        ImageError("magic", "is wrong", 5),
        FileNotFoundError(2, "No such file or directory", "/absent"),
        ZeroDivisionError("division"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_come_as_they_are(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        bounded(fail, 20)
    assert str(caught.value) == str(error)
    assert vars(caught.value).keys() == vars(error).keys() | {"__notes__"}


def test_what_takes_too_long_is_ended() -> None:
    start = time.monotonic()
    with pytest.raises(Overdue):
        bounded(sleep, 0.2)
    assert time.monotonic() - start < 20
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_end_by_a_signal_is_an_error() -> None:
    with pytest.raises(EOFError):
        bounded(lambda: os.kill(os.getpid(), signal.SIGKILL), 20)


def test_a_worker_has_none_of_our_streams() -> None:
    def streams() -> list[str]:
        return [os.readlink(f"/proc/self/fd/{stream}") for stream in range(3)]

    assert bounded(streams, 20) == [os.devnull] * 3


def test_a_worker_ends_with_its_parent() -> None:
    reading, writing = os.pipe()

    def parent_that_dies() -> None:
        def hold(send: Callable[[object], None]) -> None:
            send(None)
            time.sleep(60)

        with working(hold) as worker:
            worker.receive(20)
            os.kill(os.getpid(), signal.SIGKILL)

    with open(reading, "rb") as pipe:
        with pytest.raises(EOFError):
            bounded(parent_that_dies, 20)
        os.close(writing)
        assert select.select([pipe], [], [], 20)[0], "nobody has its other end any more"
        assert pipe.read() == b""


# Signals


def test_signals_wait_until_the_block_has_run() -> None:
    done = []

    def work() -> None:
        with undisturbed():
            signal.raise_signal(signal.SIGINT)
            done.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["all of it"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_processor_time_is_told() -> None:
    assert processor_time(os.getpid()) == pytest.approx(time.process_time(), rel=0.1)
    with pytest.raises(OSError, match="Invalid argument"):
        processor_time(1 << 22)
