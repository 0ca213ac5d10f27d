"""Processes that work for this one: what goes there and back, and how they end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from cfsfuse.builder import workers as module
from cfsfuse.builder.workers import Answer, Workers
from cfsfuse.errors import HostError
from tests.support import HERE, time_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = os.path.dirname(HERE)
# Since Python 3.12 forking warns where threads run, and the one that pytest's faulthandler_timeout starts counts.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Let no test wait for ever, and leave no process behind."""
    with time_limit(30):
        yield
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def double(job: Any, _note: Callable[[Any], None]) -> Any:  # noqa: ANN401 - what marshal carries
    return job * 2


def all_answers(workers: Workers[Any]) -> list[Answer[Any]]:
    answers: list[Answer[Any]] = []
    while not workers.is_idle:
        answers += workers.collect(wait=True)
    return answers


def test_jobs_go_out_and_results_come_back() -> None:
    results = {}
    with Workers[int](3, double) as workers:
        for number in range(50):
            while not workers.has_room:
                results.update({answer.ticket: answer.value for answer in workers.collect(wait=True)})
            workers.submit(number, [number, b"x", "y", None, {b"k": b"v"}] if number == 7 else number)
        results.update({answer.ticket: answer.value for answer in all_answers(workers)})
    expected = {number: number * 2 for number in range(50)}
    assert results == expected | {7: [7, b"x", "y", None, {b"k": b"v"}] * 2}


def test_nothing_to_collect_does_not_wait() -> None:
    with Workers[int](1, double) as workers:
        assert list(workers.collect(wait=False)) == []
        assert workers.is_idle
        assert workers.has_room


def test_notes_come_before_the_result() -> None:
    def count(job: int, note: Callable[[Any], None]) -> str:
        for number in range(job):
            note(number)
        return "done"

    with Workers[str](1, count) as workers:
        workers.submit("ticket", 3)
        answers = all_answers(workers)
    assert answers == [("ticket", False, 0), ("ticket", False, 1), ("ticket", False, 2), ("ticket", True, "done")]


def test_a_worker_has_two_jobs_at_most_and_none_behind_a_long_one() -> None:
    with Workers[int](2, double) as workers:
        room = []
        for number in range(3):
            workers.submit(number, number, long=number == 0)
            room.append(workers.has_room)
        assert room == [True, True, False]
        assert len(all_answers(workers)) == 3
        assert workers.has_room


def test_none_waits_behind_a_long_job_that_has_waited_itself() -> None:
    with Workers[int](1, double) as workers:
        workers.submit(0, 0)
        workers.submit(1, 1, long=True)
        for answer in workers.collect(wait=True):
            assert not workers.has_room or answer.ticket == 1
        all_answers(workers)


def test_messages_larger_than_any_buffer_block_nobody() -> None:
    with Workers[int](2, double) as workers:
        for number in range(4):
            workers.submit(number, bytes([number]) * 3_000_000)
        answers = all_answers(workers)
    assert {answer.ticket: answer.value for answer in answers} == {n: bytes([n]) * 6_000_000 for n in range(4)}


def test_an_exception_in_a_worker_is_one_here_with_its_traceback() -> None:
    with Workers[int](1, double) as workers:
        workers.submit(0, None)
        with pytest.raises(RuntimeError, match=r"(?s)worker process.*double.*TypeError: unsupported"):
            all_answers(workers)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_worker_is_an_error(number: signal.Signals) -> None:
    def die(job: int, _note: Callable[[Any], None]) -> None:
        os.kill(os.getpid(), job)
        time.sleep(60)

    with Workers[int](2, die) as workers:
        workers.submit(0, int(number))
        with pytest.raises(HostError, match=rf"worker process \d+ was killed by {number.name}"):
            all_answers(workers)


def test_a_worker_killed_by_a_signal_without_a_name_is_an_error() -> None:
    with Workers[int](1, lambda job, _note: os.kill(os.getpid(), job)) as workers:
        workers.submit(0, signal.SIGRTMIN + 3)
        with pytest.raises(HostError, match=rf"was killed by signal {signal.SIGRTMIN + 3}$"):
            all_answers(workers)


def test_an_interrupt_while_a_worker_starts_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = os.fork

    def interrupted() -> int:
        pid = fork()
        if pid:
            # For this thread alone: others, of earlier tests, would take it although this one blocks it.
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        return pid

    monkeypatch.setattr(os, "fork", interrupted)
    with pytest.raises(KeyboardInterrupt), Workers[int](1, double) as workers:
        workers.submit(0, 0)


def test_a_worker_whose_parent_has_died_before_it_asked_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_prctl", lambda *_: 0)
    pid = os.fork()
    if not pid:
        try:
            module._detach({0, 1, 2}, os.getpid())  # this is not its parent
        finally:
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_a_signal_that_the_parent_ignores_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Workers[int](1, hang_up) as workers:
            workers.submit(0, 0)
            assert [answer.value for answer in workers.collect(wait=True)] == ["alive"]
    finally:
        signal.signal(signal.SIGHUP, before)


def hang_up(_job: Any, _note: Callable[[Any], None]) -> str:  # noqa: ANN401 - what marshal carries
    os.kill(os.getpid(), signal.SIGHUP)
    return "alive"


def test_a_worker_that_has_died_is_noticed_at_the_next_job() -> None:
    def leave(_job: int, _note: Callable[[Any], None]) -> None:
        os._exit(3)

    with Workers[int](1, leave) as workers:
        workers.submit(0, 0)
        workers.submit(1, 0)
        with pytest.raises(HostError, match="ended with exit code 3"):
            all_answers(workers)


def test_a_worker_ignores_what_the_terminal_sends_to_all() -> None:
    def interrupt(_job: int, _note: Callable[[Any], None]) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return "still here"

    with Workers[int](1, interrupt) as workers:
        workers.submit(0, 0)
        assert [answer.value for answer in all_answers(workers)] == ["still here"]


def test_the_parents_handlers_and_wakeup_are_not_a_workers() -> None:
    def look(_job: int, _note: Callable[[Any], None]) -> list[Any]:
        return [signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, signal.set_wakeup_fd(-1)]

    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    wakeup = signal.set_wakeup_fd(write)
    try:
        with Workers[int](1, look) as workers:
            workers.submit(0, 0)
            assert [answer.value for answer in all_answers(workers)] == [[True, -1]]
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, before)
        os.close(read)
        os.close(write)


def test_a_worker_keeps_only_the_descriptors_it_is_given() -> None:
    def descriptors(job: list[int], _note: Callable[[Any], None]) -> list[bool]:
        return [os.path.exists(f"/proc/self/fd/{fd}") for fd in job]

    read, write = os.pipe()
    try:
        with Workers[int](2, descriptors, [read]) as workers:
            for ticket in range(2):
                workers.submit(ticket, [read, write])
            assert [answer.value for answer in all_answers(workers)] == [[True, False]] * 2
    finally:
        os.close(read)
        os.close(write)


def test_the_end_waits_for_nobody() -> None:
    def sleep(_job: int, _note: Callable[[Any], None]) -> None:
        time.sleep(60)

    began = time.monotonic()
    with Workers[int](2, sleep) as workers:
        workers.submit(0, 0)
        workers.submit(1, 0)
    assert time.monotonic() - began < 5


def test_a_program_that_ignores_its_children_can_have_workers() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with Workers[int](1, double) as workers:
            workers.submit(0, 4)
            assert [answer.value for answer in all_answers(workers)] == [8]
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("possible", [0, 1])
def test_without_more_processes_those_that_are_there_do_the_work(
    monkeypatch: pytest.MonkeyPatch, possible: int
) -> None:
    fork = os.fork
    left = [None] * possible

    def limited() -> int:
        if not left:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        left.pop()
        return fork()

    monkeypatch.setattr(os, "fork", limited)
    with Workers[int](3, double) as workers:
        if not possible:
            with pytest.raises(HostError, match="cannot start a worker process"):
                workers.submit(0, 0)
            return
        for number in range(2):
            assert workers.has_room
            workers.submit(number, number)
        assert not workers.has_room
        assert sorted(answer.value for answer in all_answers(workers)) == [0, 2]


def test_workers_are_started_as_there_is_work(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = os.fork
    forks: list[int] = []
    parent = os.getpid()

    def counted() -> int:
        forks.append(parent)
        return fork()

    monkeypatch.setattr(os, "fork", counted)
    with Workers[int](5, double) as workers:
        assert forks == []
        for number in range(10):
            workers.submit(number, number)
            all_answers(workers)
    assert len(forks) == 1


def test_workers_die_with_their_parent() -> None:
    script = (
        "import os, time\n"
        "from cfsfuse.builder.workers import Workers\n"
        "def work(job, note):\n"
        "    note(os.getpid())\n"
        "    while True: pass\n"
        "with Workers(2, work) as workers:\n"
        "    for ticket in range(2): workers.submit(ticket, 0)\n"
        "    pids = []\n"
        "    while len(pids) < 2: pids += [answer.value for answer in workers.collect(wait=True)]\n"
        "    print(*pids, flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": ROOT}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    for pid in pids:
        while is_running(pid):
            time.sleep(0.005)


def is_running(pid: int) -> bool:
    """Return whether a process that may be nobody's child here runs."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0] != b"Z"
    return False
