"""The calls of mounting, as far as they need no privilege: errors, what the kernel says to them, the retries."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING

import pytest

from cfsfuse.mount import syscalls
from cfsfuse.mount.syscalls import Context, call, closing, loop_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

Word = int | bytes | None
SET_FLAG, SET_STRING, SET_FD, CREATE = 0, 1, 5, 6  # enum fsconfig_command


class Kernel:
    """Answers the system calls of a context: all succeed but those that `refuse` names, with messages to read."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, tuple[Word, ...]]] = []
        self.refuse: Callable[[tuple[Word, ...]], int] = lambda _arguments: 0
        self.messages: list[bytes] = []
        self.closed: list[int] = []

    def call(self, number: int, *arguments: Word) -> int:
        self.calls.append((number, arguments))
        refused = self.refuse(arguments)
        if refused:
            raise OSError(refused, os.strerror(refused))
        return 1000 + len(self.calls)

    def read(self, fd: int, size: int) -> bytes:
        assert fd == 1001
        if not self.messages:
            raise OSError(errno.ENODATA, "No data available")
        return self.messages.pop(0)[:size]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    made = Kernel()
    with monkeypatch.context() as patch:
        patch.setattr(syscalls, "call", made.call)
        patch.setattr(os, "read", made.read)
        patch.setattr(os, "close", made.closed.append)
        yield made


def test_a_call_that_fails_raises() -> None:
    with pytest.raises(OSError, match=r"^.Errno 22. Invalid argument$"):
        call(434, -1, 0)  # pidfd_open(2)


def test_every_wrapper_raises() -> None:
    calls: list[Callable[[], None]] = [
        lambda: syscalls.move_mount(-1, "/nowhere"),
        lambda: syscalls.set_idmap(-1, 1 << 20),
        lambda: syscalls.old_mount("none", "/nowhere/at all", "tmpfs", 0, ""),
        lambda: syscalls.umount("/nowhere/at all"),
    ]
    for failing in calls:
        with pytest.raises(OSError, match="Errno") as caught:
            failing()
        assert caught.value.errno in (errno.EBADF, errno.ENOENT, errno.EPERM, errno.ENOSYS)


def test_parameters_of_a_context(kernel: Kernel) -> None:
    with Context("overlay") as context:
        context.set("ro")
        context.set("source", "a,b:c\\d \udcff")
        context.set("lowerdir+", 7)
        assert context.mount(5) == 1006
    assert kernel.calls == [
        (430, (b"overlay", 1)),
        (431, (1001, SET_FLAG, b"ro", None, 0)),
        (431, (1001, SET_STRING, b"source", b"a,b:c\\d \xff", 0)),
        (431, (1001, SET_FD, b"lowerdir+", None, 7)),
        (431, (1001, CREATE, None, None, 0)),
        (432, (1001, 1, 5)),
    ]
    assert kernel.closed == [1001]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "verity=on"),
        ([b"e overlay: Unknown parameter 'verity'\n"], "overlay: Unknown parameter 'verity'"),
        ([b"w careful", b"e no\n"], "careful; no"),
        ([b"i kept as it is"], "i kept as it is"),
        ([b"e \xff"], "\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_what_the_kernel_says_is_part_of_the_error(messages: list[bytes], said: str, kernel: Kernel) -> None:
    with Context("overlay") as context:
        kernel.messages = messages
        kernel.refuse = lambda _arguments: errno.EINVAL
        with pytest.raises(OSError, match="Invalid argument") as caught:
            context.set("verity", "on")
        assert caught.value.errno == errno.EINVAL
        assert caught.value.strerror == f"Invalid argument (overlay: {said})"
        assert messages == []
    assert kernel.closed == [1001]


def test_an_error_of_which_there_is_nothing_to_say(kernel: Kernel) -> None:
    with Context("erofs") as context:
        kernel.refuse = lambda arguments: errno.ENOTBLK if arguments[1] == CREATE else 0
        with pytest.raises(OSError, match="Block device required") as caught:
            context.mount(1)
    assert caught.value.strerror == "Block device required"


def test_whether_a_context_reads_its_parameters(kernel: Kernel) -> None:
    with Context("overlay") as context:
        assert context.takes_anything()
        kernel.refuse = lambda _arguments: errno.EINVAL
        assert not context.takes_anything()


def test_a_map_of_owners_is_set_by_descriptor(kernel: Kernel) -> None:
    syscalls.set_idmap(7, 8)
    ((number, (mount, path, flags, attributes, size)),) = kernel.calls
    assert (number, mount, path, flags, size) == (442, 7, b"", 0x1000, 32)
    assert isinstance(attributes, bytes)
    assert struct.unpack("<QQQQ", attributes) == (0x100000, 0, 0, 8)


def test_closing_is_done_after_an_error_as_well(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_PATH)
    with pytest.raises(RuntimeError), closing(fd):
        raise RuntimeError
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


class Loops:
    """Loop devices that others take first, `taken` times."""

    def __init__(self, taken: int) -> None:
        self.taken = taken
        self.asked = 0
        self.configured: list[bytes] = []

    def open(self, path: str, _flags: int) -> int:
        assert path.startswith("/dev/loop")
        return os.memfd_create(path.replace("/", "-"))

    def ioctl(self, _fd: int, _request: int, argument: bytes | None = None) -> int:
        if argument is None:
            self.asked += 1
            return self.asked
        self.configured.append(argument)
        if len(self.configured) <= self.taken:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return 0


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loops]:
    made = Loops(0)
    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", made.open)
        patch.setattr(fcntl, "ioctl", made.ioctl)
        yield made
    assert os.listdir("/proc/self/fd") == before


def test_a_loop_device_is_read_only_and_goes_by_itself(loops: Loops) -> None:
    with loop_device(9) as path:
        assert path == "/dev/loop1"
    (configured,) = loops.configured
    assert len(configured) == 304  # struct loop_config
    assert struct.unpack_from("=II", configured) == (9, 0)
    # LO_FLAGS_READ_ONLY and LO_FLAGS_AUTOCLEAR, at lo_flags of struct loop_info64
    assert struct.unpack_from("=I", configured, 8 + 52) == (1 | 4,)


def test_a_loop_device_that_somebody_else_takes(loops: Loops) -> None:
    loops.taken = 3
    with loop_device(9) as path:
        assert path == "/dev/loop4"


def test_loop_devices_that_somebody_else_always_takes(loops: Loops) -> None:
    loops.taken = 10**6
    with pytest.raises(OSError, match="no loop device stays free for long enough"):
        loop_device(9).__enter__()
    assert loops.asked < 1000
