"""Processes that work for this one: jobs go out, results come back, and nobody outlives anybody.

Hashing needs processes, two hashing threads are slower than one. They are forked: what the work needs is there already,
descriptors and locks included, and starting one costs a millisecond. This process has no thread for them; it submits
jobs and collects results when it likes, so it can do its own work meanwhile and is never forked with a thread running
that is ours. Whoever has threads running had better not fork: locks that they hold are held in a worker for ever.

concurrent.futures.ProcessPoolExecutor will not do. It forks beside threads of its own, cannot stop work that has begun,
lets its processes outlive a parent that is killed, with the store's lock in their hands, and gives them every
descriptor that is open, or none.

Jobs and results are what `marshal` can carry: numbers, bytes, strings, tuples, lists, dictionaries, None.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import marshal
import os
import select
import signal
import socket
import struct
import traceback
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from cfsfuse.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    Value = Any  # one that marshal can carry
    Note = Callable[[Value], None]
    Work = Callable[[Value, Note], Value]

Ticket = TypeVar("Ticket")

_HEADER = struct.Struct("<QB")  # length of what follows, in bytes, and its kind
_RESULT, _NOTE, _CRASH = range(3)
_RECEIVE = 1 << 18
_AHEAD = 2  # jobs that a worker has at once: it goes on with the second while the first one's result is looked at
_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h

_prctl = ctypes.CDLL(None, use_errno=True).prctl


class Answer(NamedTuple, Generic[Ticket]):
    """What a worker says of the job that was submitted with `ticket`: its result, or before that a note on the way."""

    ticket: Ticket
    is_result: bool
    value: Value


class Workers(Generic[Ticket]):
    """Up to `count` processes that each run `work(job, note)` for one job after the other. A context manager.

    They are started as there is work for them. `note` sends something ahead of the result. `work` must not raise; when
    it does, that is a RuntimeError here, with its traceback. Of the open descriptors a worker keeps those in `keep`,
    and standard input, output and error.
    """

    def __init__(self, count: int, work: Work, keep: Collection[int] = ()) -> None:
        self._count = count
        self._work = work
        self._keep = keep
        self._workers: list[_Worker[Ticket]] = []
        self._poll = select.poll()

    def __enter__(self) -> Workers[Ticket]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, whatever they are doing, and wait for that."""
        for worker in self._workers:
            worker.kill()
        while self._workers:
            self._workers.pop().wait()

    @property
    def is_idle(self) -> bool:
        """Whether all results have been collected."""
        return not any(worker.tickets for worker in self._workers)

    @property
    def has_room(self) -> bool:
        """Whether another job may be submitted now."""
        return len(self._workers) < self._count or any(worker.has_room for worker in self._workers)

    def submit(self, ticket: Ticket, job: Value, *, long: bool = False) -> None:
        """Give a job to the worker that has least to do. No other waits behind a `long` one. May raise HostError."""
        worker = min(self._workers, key=lambda worker: (not worker.has_room, len(worker.tickets)), default=None)
        if worker is None or (worker.tickets and len(self._workers) < self._count):
            worker = self._start() or worker
        if worker is None:
            raise HostError("cannot start a worker process: there are too many processes; one thread needs none")
        worker.tickets.append((ticket, long))
        worker.send(marshal.dumps(job))
        self._watch(worker)

    def _start(self) -> _Worker[Ticket] | None:
        """Start another worker; None when there can be no more than there are."""
        known = len(self._workers)
        try:
            worker: _Worker[Ticket] = _Worker()
            # Known before there is a process: whatever interrupts this, `close` ends it.
            self._workers.append(worker)
            worker.start(self._work, self._keep)
        except OSError:
            for failed in self._workers[known:]:
                failed.kill()
            del self._workers[known:]
            self._count = known
            return None
        self._poll.register(worker.socket, select.POLLIN)
        return worker

    def collect(self, *, wait: bool) -> Iterator[Answer[Ticket]]:
        """Yield what the workers have answered; with `wait`, wait for something. HostError when one is dead."""
        by_fd = {worker.socket.fileno(): worker for worker in self._workers}
        for fd, event in self._poll.poll(None if wait else 0):
            worker = by_fd[fd]
            if event & select.POLLOUT:
                worker.flush()
                self._watch(worker)
            if event & ~select.POLLOUT:
                yield from worker.receive()

    def _watch(self, worker: _Worker[Ticket]) -> None:
        self._poll.modify(worker.socket, select.POLLIN | (select.POLLOUT if worker.unsent else 0))


class _Worker(Generic[Ticket]):
    """One process, as its parent sees it."""

    def __init__(self) -> None:
        self.tickets: deque[tuple[Ticket, bool]] = deque()  # of its jobs, and whether they are long
        self.unsent = bytearray()
        self._received = bytearray()
        self.pid = 0
        self.socket, self._theirs = socket.socketpair()

    def start(self, work: Work, keep: Collection[int]) -> None:
        parent = os.getpid()
        # Until a worker has its own handlers, a signal would have it run on as a second parent.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            with self._theirs:
                self.pid = os.fork()
                if not self.pid:
                    _live(self._theirs, parent, mask, work, keep)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.socket.setblocking(False)

    @property
    def has_room(self) -> bool:
        return len(self.tickets) < _AHEAD and not any(long for _, long in self.tickets)

    def send(self, job: bytes) -> None:
        self.unsent += _HEADER.pack(len(job), _RESULT) + job
        self.flush()

    def flush(self) -> None:
        """Send what fits now: to wait for a worker that waits for us would be for ever."""
        # A dead worker is noticed when its answer is asked for.
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while self.unsent:
                del self.unsent[: self.socket.send(self.unsent)]

    def receive(self) -> Iterator[Answer[Ticket]]:
        """Yield the answers that have come whole."""
        try:
            data = self.socket.recv(_RECEIVE)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if not data:
            raise self._death()
        self._received += data
        while len(self._received) >= _HEADER.size:
            length, kind = _HEADER.unpack_from(self._received)
            end = _HEADER.size + length
            if len(self._received) < end:
                break
            value = marshal.loads(self._received[_HEADER.size : end])  # noqa: S302 - our own process wrote it
            del self._received[:end]
            if kind == _CRASH:
                raise RuntimeError(f"in a worker process:\n{value}")
            if kind == _NOTE:
                yield Answer(self.tickets[0][0], False, value)
            else:
                yield Answer(self.tickets.popleft()[0], True, value)

    def kill(self) -> None:
        self.socket.close()
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        self._status()

    def _status(self) -> int:
        """Return the wait status of the process, once it has ended."""
        pid, self.pid = self.pid, 0
        try:
            return os.waitpid(pid, 0)[1] if pid else 0
        except ChildProcessError:  # SIGCHLD is ignored in this program, so the kernel keeps no status
            return 0

    def _death(self) -> HostError:
        pid = self.pid
        code = os.waitstatus_to_exitcode(self._status())
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        hint = "; perhaps memory has run out" if code == -signal.SIGKILL else ""
        return HostError(f"worker process {pid} {how}{hint}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most of the real-time signals have none
        return f"signal {number}"


def _live(channel: socket.socket, parent: int, mask: set[int], work: Work, keep: Collection[int]) -> None:
    """Be a worker, to the end of this process."""
    code = 1
    try:
        _detach({channel.fileno(), *keep}, parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _serve(channel, work)
        code = 0
    except BrokenPipeError:  # the parent does not listen any more
        pass
    except BaseException:  # noqa: BLE001 - nothing may get past this: the parent's code would run on, twice
        with contextlib.suppress(OSError):
            _send(channel, _CRASH, traceback.format_exc())
    finally:
        os._exit(code)


def _detach(keep: set[int], parent: int) -> None:
    """Part from the parent: its signals, its descriptors, its garbage, but not its death."""
    signal.set_wakeup_fd(-1)
    # A terminal sends SIGINT to all of us; the parent knows what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup(1) is for all of us
            signal.signal(number, signal.SIG_DFL)
    # What is garbage here was the parent's: finalizers would close descriptors that have other owners now.
    gc.disable()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    # A descriptor that somebody has open for writing here keeps fs-verity from being enabled on that file there.
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in keep:
            with contextlib.suppress(OSError):  # the one that listed the directory
                os.close(fd)


def _serve(channel: socket.socket, work: Work) -> None:
    """Work until the parent closes the channel."""
    channel.setblocking(True)

    def note(value: Value) -> None:
        _send(channel, _NOTE, value)

    while header := _receive(channel, _HEADER.size):
        length, _ = _HEADER.unpack(header)
        job = marshal.loads(_receive(channel, length))  # noqa: S302 - our own process wrote it
        _send(channel, _RESULT, work(job, note))


def _send(channel: socket.socket, kind: int, value: Value) -> None:
    data = marshal.dumps(value)
    channel.sendall(_HEADER.pack(len(data), kind) + data)


def _receive(channel: socket.socket, length: int) -> bytes:
    """Return exactly `length` bytes, or none when the parent has closed the channel."""
    return channel.recv(length, socket.MSG_WAITALL)
