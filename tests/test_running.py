"""`cfsfuse run`, as far as it needs no privilege: what is asked for, the life of the command, what is said."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Self

import pytest

from cfsfuse.errors import HostError, UsageError
from cfsfuse.mount import job, namespaces, running, syscalls, tree_root
from cfsfuse.mount.job import Server
from cfsfuse.mount.options import MountOptions, parse
from cfsfuse.mount.running import NOT_EXECUTABLE, NOT_FOUND, Layout, Listener
from cfsfuse.mount.tree_root import Bind
from cfsfuse.processes import adopting
from tests.cli_support import fails, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

HERE = Layout(at="/anywhere")  # for what is not about the tree
STORE = ("-o", "basedir=/store")


# What is asked for ----------------------------------------------------------------------------------------------------


class Asked:
    """What the command line has asked for, in place of doing it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[bytes]) -> None:
        self._capture = capture
        self.image = ""
        self.options = MountOptions()
        self.layout = HERE
        self.command: Sequence[str] = ()
        monkeypatch.setattr(job, "apart", lambda: None)
        monkeypatch.setattr(running, "run", self._take)

    def _take(
        self,
        image: str,
        options: MountOptions,
        layout: Layout,
        command: Sequence[str],
        listener: Listener,
    ) -> int:
        self.image, self.options, self.layout, self.command = image, options, layout, command
        listener.warn("two\nlines")
        return 42

    def by(self, *words: str) -> Layout:
        result = run(self._capture, "run", *words)
        assert (result.code, result.out, result.err) == (42, b"", "cfsfuse run: two\\nlines\n")
        return self.layout

    def refused(self, *words: str) -> str:
        return fails(self._capture, 2, "run", *words)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]) -> Asked:
    return Asked(monkeypatch, capsysbinary)


def test_the_plain_cases(asked: Asked) -> None:
    assert asked.by("image", *STORE, "--root", "--", "true") == Layout()
    assert (asked.image, asked.command, asked.options.basedir) == ("image", ["true"], ("/store",))
    assert asked.by("--at", "/mnt", "--backend", "fuse", "image", "true") == Layout(at="/mnt")
    assert asked.options.backend == "fuse"


def test_everything(asked: Asked) -> None:
    words = ("--root", "--writable", "--tmpfs", "/a", "--tmpfs", "/b", "--chdir", "/c", "image", "--", "true")
    assert asked.by(*words) == Layout(None, writable=True, tmpfs=("/a", "/b"), directory="/c")


def test_a_relative_place_is_one_of_the_caller(asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert asked.by("--at", "mnt", "image", "--", "true") == Layout(at=str(tmp_path / "mnt"))
    layout = asked.by("--root", "--bind", "a", "--bind", "../b:/c", "image", "--", "true")
    assert layout.binds == (Bind(f"{tmp_path}/a", f"{tmp_path}/a"), Bind(str(tmp_path.parent / "b"), "/c"))


@pytest.mark.parametrize(
    ("option", "text", "bind"),
    [
        ("--bind", "/a", Bind("/a", "/a")),
        ("--bind", "/a:/b", Bind("/a", "/b")),
        ("--bind-ro", "/a", Bind("/a", "/a", read_only=True)),
        ("--bind-ro", "/a:/b/../c", Bind("/a", "/b/../c", read_only=True)),
        ("--bind", r"/a\:b:/c", Bind("/a:b", "/c")),
        ("--bind", r"/a:/b\:c", Bind("/a", "/b:c")),
        ("--bind", "/a b,c", Bind("/a b,c", "/a b,c")),
        ("--bind", "/a/", Bind("/a", "/a")),
    ],
)
def test_a_bind(asked: Asked, option: str, text: str, bind: Bind) -> None:
    assert asked.by("--root", option, text, "image", "--", "true").binds == (bind,)


def test_binds_of_both_kinds_keep_their_order(asked: Asked) -> None:
    words = ("--bind-ro", "/a", "--bind", "/b", "--bind-ro", "/c")
    assert [bind.source for bind in asked.by("--root", *words, "image", "--", "true").binds] == ["/a", "/b", "/c"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bind", "/a:b"], "--bind b: must be an absolute path in the tree"),
        (["--bind-ro", "/a:b"], "--bind-ro b: must be an absolute path in the tree"),
        (["--bind", "/a:"], "--bind : must be an absolute path in the tree"),
        (["--bind", ""], "--bind : must be SRC or SRC:DST"),
        (["--bind", ":/a"], "--bind :/a: must be SRC or SRC:DST"),
        (["--bind-ro", "/a:/b:/c"], "--bind-ro /a:/b:/c: must be SRC or SRC:DST"),
        (["--tmpfs", "a"], "--tmpfs a: must be an absolute path in the tree"),
        (["--tmpfs", ""], "--tmpfs : must be an absolute path in the tree"),
        (["-o", "nonsense"], "unknown option 'nonsense'; see cfsfuse mount --help"),
    ],
)
def test_what_cannot_be_asked_for(asked: Asked, words: list[str], said: str) -> None:
    assert asked.refused("--root", *words, "image", "--", "true") == f"cfsfuse: {said}"


@pytest.mark.parametrize("words", [["--bind", "/a"], ["--bind-ro", "/a"], ["--tmpfs", "/a"]])
def test_what_is_for_a_root_only(asked: Asked, words: list[str]) -> None:
    said = "--bind, --bind-ro and --tmpfs are for a tree that is the root: give --root instead of --at"
    assert asked.refused("--at", "/mnt", *words, "image", "--", "true") == f"cfsfuse: {said}"


def test_a_place_is_needed_and_one_is_enough(asked: Asked) -> None:
    assert "one of the arguments --at --root is required" in asked.refused("image", "--", "true")
    assert "not allowed with argument" in asked.refused("--at", "/mnt", "--root", "image", "--", "true")


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["--", "ls", "-l"], ["ls", "-l"]),
        (["ls", "-l", "--root"], ["ls", "-l", "--root"]),
        (["--", "ls", "--", "a"], ["ls", "--", "a"]),
        (["ls", "--", "a", "--"], ["ls", "--", "a", "--"]),
        (["--", "a b", "", "\udcff"], ["a b", "", "\udcff"]),
        (["--", "cfsfuse", "run", "-h", "--", "ls", "--"], ["cfsfuse", "run", "-h", "--", "ls", "--"]),
    ],
)
def test_words_of_the_command_are_its_own(asked: Asked, words: list[str], command: list[str]) -> None:
    asked.by("--root", *STORE, "image", *words)
    assert asked.command == command
    if words[0] == "--":
        asked.by("image", "--root", *STORE, *words)
        assert asked.command == command


def test_a_command_is_needed(asked: Asked) -> None:
    for words in ([], ["--"]):
        assert "required: COMMAND" in asked.refused("--root", "image", *words)
    assert asked.refused("--root", "image", "--", "") == "cfsfuse: COMMAND is empty: name a program"


# What contradicts itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "layout", "said"),
    [
        (
            "upperdir=/u,workdir=/w",
            Layout(writable=True),
            "--writable and upperdir= are two places for what is written",
        ),
        ("ro", Layout(writable=True), "--writable and ro contradict each other"),
        ("", Layout(at="/"), "--at /: would hide what the mount itself needs"),
        ("", Layout(at="/dev"), "--at /dev: would hide what the mount itself needs"),
        ("", Layout(at="/tmp/../proc"), "--at /tmp/../proc: would hide what the mount itself needs"),
        ("", Layout(at="/proc/self/fd"), "--at /proc/self/fd: would hide what the mount itself needs"),
    ],
)
def test_contradictions_are_told_before_anything_is_done(
    options: str, layout: Layout, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "adopting", None)
    with pytest.raises(UsageError, match=f"^{said}"):
        running.run("image", parse(options), layout, ["true"], Listener(print))


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.EPERM, "Operation not permitted"), (errno.ENOSPC, "no more may be made"), (errno.ENOSYS, "Function not")],
)
def test_namespaces_that_cannot_be_made(number: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(namespaces, "has_sys_admin", lambda: False)
    monkeypatch.setattr(syscalls, "unshare_user", fail)
    monkeypatch.setattr(namespaces, "_OBSTACLES", {"kernel/none": "0", "kernel/ostype": "Linux"})
    remedy = "the administrator has to change kernel.ostype, which is Linux"
    with pytest.raises(HostError, match=f"^namespaces: {said}.*; {remedy}$"):
        namespaces.enter()
    monkeypatch.setattr(namespaces, "_OBSTACLES", {"kernel/none": "0", "kernel/ostype": "another"})
    with pytest.raises(HostError, match=r"; this container forbids them: allow user namespaces in it, or run outside$"):
        namespaces.enter()


# The command ----------------------------------------------------------------------------------------------------------


def outcome(*command: str, layout: Layout = HERE) -> tuple[int, list[str]]:
    """Run a command without any tree; return its status, and the warnings."""
    warnings: list[str] = []
    with job.ended_by_signals():
        return running._run(command, None, layout, warnings.append), warnings


@pytest.mark.parametrize(
    ("command", "status", "warnings"),
    [
        (["true"], 0, []),
        (["sh", "-c", "exit 3"], 3, []),
        (["sh", "-c", "exit 126"], NOT_EXECUTABLE, []),
        (["sh", "-c", "kill -HUP $$"], 128 + signal.SIGHUP, []),
        (["no such program"], NOT_FOUND, ["no such program: No such file or directory"]),
        (["/dev/null"], NOT_EXECUTABLE, ["/dev/null: Permission denied"]),
        (["/\udcff"], NOT_FOUND, ["/\udcff: No such file or directory"]),
    ],
)
def test_exit_status(command: list[str], status: int, warnings: list[str]) -> None:
    assert outcome(*command) == (status, warnings)


def test_no_failure_is_silent() -> None:
    """Not even one that Python has before the kernel does."""
    status, warnings = outcome("")
    assert (status, len(warnings)) == (NOT_EXECUTABLE, 1)


def test_where_it_starts(tmp_path: Path) -> None:
    script = f'test "$PWD" = {tmp_path} && exit 5'
    assert outcome("sh", "-c", script, layout=Layout(at="/anywhere", directory=str(tmp_path))) == (5, [])
    with pytest.raises(UsageError, match=f"^--chdir {tmp_path}/none: No such file or directory$"):
        outcome("true", layout=Layout(at="/anywhere", directory=f"{tmp_path}/none"))


def test_what_it_is_told_of_signals(tmp_path: Path) -> None:
    """Those that the caller ignores stay so; those that Python alone ignores do not."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        assert outcome("sh", "-c", f"cat /proc/self/status >{tmp_path}/status") == (0, [])
    finally:
        signal.signal(signal.SIGUSR1, before)
    fields = dict(line.split(":\t") for line in (tmp_path / "status").read_text().splitlines() if ":\t" in line)
    ignored = {number for number in signal.Signals if int(fields["SigIgn"], 16) >> number - 1 & 1}
    assert signal.SIGUSR1 in ignored
    assert not ignored & {signal.SIGPIPE, signal.SIGXFSZ}
    assert int(fields["SigBlk"], 16) == 0


def test_no_signal_is_lost_between_fork_and_exec(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = os.fork

    def fork_and_be_hit() -> int:
        pid = fork()
        if pid == 0:
            signal.raise_signal(signal.SIGUSR1)
        return pid

    monkeypatch.setattr(os, "fork", fork_and_be_hit)
    with job.ended_by_signals(), job.Signals() as signals:
        pid = signals.fork()
        if pid == 0:
            os._exit(0)
        assert os.waitstatus_to_exitcode(signals.attend(pid)) == -signal.SIGUSR1


def waiting(signals: job.Signals, *defaults: int) -> int:
    """Return the pid of a child that waits for a signal."""
    pid = signals.fork()
    if pid == 0:
        for number in defaults:
            signal.signal(number, signal.SIG_DFL)
        signal.pause()
        os._exit(99)
    return pid


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGINT, signal.SIGQUIT])
def test_a_signal_that_comes_early_waits_for_the_command(number: int) -> None:
    """One that is sent, and not typed, is passed on whatever its number."""
    before = signal.getsignal(number)
    with job.Signals() as signals:
        signal.raise_signal(number)
        assert os.waitstatus_to_exitcode(signals.attend(waiting(signals))) == -number
    assert signal.getsignal(number) is before


def test_a_signal_that_the_caller_ignores_is_not_passed_on() -> None:
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        with job.Signals() as signals:
            signal.raise_signal(signal.SIGUSR2)
            signal.raise_signal(signal.SIGUSR1)
            assert os.waitstatus_to_exitcode(signals.attend(waiting(signals, signal.SIGUSR2))) == -signal.SIGUSR1
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_signal_that_comes_too_late_does_not_interrupt_the_clearing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it change the status."""
    attend = job.Signals.attend

    def attend_and_be_hit(signals: job.Signals, pid: int) -> int:
        status = attend(signals, pid)
        signal.raise_signal(signal.SIGTERM)
        return status

    monkeypatch.setattr(job.Signals, "attend", attend_and_be_hit)
    with job.ended_by_signals():
        assert running._run(["sh", "-c", "exit 3"], None, HERE, print) == 3
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# The processes around it ----------------------------------------------------------------------------------------------


def status_of(work: Callable[[], int]) -> int:
    """Return the status of a child process that does some work."""
    status = job.apart()
    if status is None:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return status


def test_the_status_of_the_process_that_does_the_work() -> None:
    assert status_of(lambda: 7) == 7


def test_the_status_when_that_process_is_killed() -> None:
    def work() -> int:
        signal.raise_signal(signal.SIGTERM)
        return 7

    assert status_of(work) == 128 + signal.SIGTERM


def test_a_caller_that_wants_to_hear_nothing_of_its_children() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert status_of(lambda: 7) == 7
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_what_is_left_is_killed() -> None:
    """Whoever has started it, and only that."""

    def work() -> int:
        with adopting(), subprocess.Popen(["cat"], stdin=subprocess.PIPE) as server:
            script = "(trap '' TERM; sleep 60 & sleep 60) & sleep 60 &"
            subprocess.run(["sh", "-c", script], check=True, stdout=subprocess.DEVNULL)
            count = len(job.children())
            hanging = job.end_children(lambda pid: pid == server.pid, 20)
            left = job.children()
            return 7 if count >= 3 and not hanging and left == [server.pid] and server.poll() is None else 8

    assert status_of(work) == 7


def test_what_does_not_end_is_waited_for_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> int:
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
            monkeypatch.setattr(os, "kill", lambda *_: None)
            return 7 if job.end_children(seconds=0.05) == [process.pid] else 8

    assert status_of(work) == 7


def test_what_ends_before_the_command_is_no_zombie() -> None:
    def work() -> int:
        script = 'for i in 1 2 3; do ( sleep 0.1 & ); done; sleep 0.4; grep -c ") Z $PPID " /proc/[0-9]*/stat'
        with adopting():
            status, _ = outcome("sh", "-c", f"{script} | grep -q ':[1-9]'")
        return 7 if status == 1 else 8  # grep has found none

    assert status_of(work) == 7


def test_the_end_of_a_server_is_known_when_it_has_been_reaped() -> None:
    with (
        subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process,
        syscalls.closing(os.pidfd_open(process.pid)) as fd,
    ):
        server = Server(process.pid, fd)
        assert not server.has_ended()
        process.communicate()
        assert server.has_ended()
        server.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT])
def test_a_signal_ends_it_as_an_exception_does(number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught, job.ended_by_signals():
        signal.raise_signal(number)
    assert caught.value.code == 128 + number
    assert signal.getsignal(number) is before


def test_a_signal_ends_a_server_that_has_no_handlers_yet_by_itself() -> None:
    with job.ended_by_signals():
        pid = os.fork()
        if pid == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


@pytest.mark.parametrize(("patience", "hanging"), [(0.05, []), (60, [1])], ids=["late", "stuck"])
def test_a_server_that_does_not_end_is_killed(
    patience: float, hanging: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, when what has been killed hangs in it."""
    said: list[str] = []
    monkeypatch.setattr(running, "_PATIENCE", patience)
    monkeypatch.setattr(job, "end_children", lambda *_: hanging)
    with subprocess.Popen(["sleep", "60"]) as process, syscalls.closing(os.pidfd_open(process.pid)) as fd:
        running._clear("/", [Server(process.pid, fd)], said.append)  # nothing of ours is mounted there
        assert process.wait(20) == -signal.SIGKILL
    assert said == [f"process {pid} does not end, although it has been killed" for pid in hanging]


# What is written, and forgotten ---------------------------------------------------------------------------------------


class Scratch:
    """In place of a Context for a file system in memory."""

    error: OSError | None = None

    def __init__(self, _: str) -> None:
        if self.error is not None:
            raise self.error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def mount(self, _: int) -> int:
        return os.open("/", os.O_PATH)


def test_a_failure_in_clearing_up_is_no_failure(
    tmp_path: Path, moved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(running, "Context", Scratch)
    monkeypatch.setattr(syscalls, "umount", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said: list[str] = []
    with running._scratch_directory(said.append) as path, running._emptied(path):
        assert moved == [path]
        (tmp_path / path / "left").touch()
    assert said == [f"{path}: cannot be removed: Directory not empty"]


def test_no_file_system_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scratch, "error", OSError(errno.ENODEV, os.strerror(errno.ENODEV)))
    monkeypatch.setattr(running, "Context", Scratch)
    monkeypatch.setattr(tree_root, "Context", Scratch)
    said = "No such device; allow it here, or use --at without --writable"
    with pytest.raises(HostError, match=f"^no file system in memory: {said}$"), running._emptied("/nowhere"):
        pass
    with pytest.raises(HostError, match=r"^--tmpfs /a: No such device; use --bind with an empty directory instead$"):
        tree_root._empty("/a")


# Places in the tree ---------------------------------------------------------------------------------------------------


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The places where something has been mounted, had it been possible."""
    places: list[str] = []
    monkeypatch.setattr(syscalls, "move_mount", lambda _, place: places.append(place))
    return places


@pytest.fixture
def sources(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """Descriptors of a directory and of a file."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source/file").touch()
    with (
        syscalls.closing(os.open(tmp_path / "source", os.O_PATH)) as directory,
        syscalls.closing(os.open(tmp_path / "source/file", os.O_PATH)) as file,
    ):
        yield directory, file


def test_places_that_are_there(tmp_path: Path, moved: list[str], sources: tuple[int, int]) -> None:
    directory, file = sources
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("directory")
    tree_root._attach(directory, f"{tmp_path}/directory")
    tree_root._attach(file, f"{tmp_path}/file")
    tree_root._attach(directory, f"{tmp_path}/link")
    assert moved == [f"{tmp_path}/{name}" for name in ("directory", "file", "directory")]
    for mount, name, said in (
        (file, "link", "a file cannot be shown at a directory"),
        (directory, "file", "a directory cannot be shown at a file"),
        (directory, "file/below", "nothing can be mounted there: Not a directory"),
    ):
        with pytest.raises(UsageError, match=f"^{tmp_path}/{name}: {said}$"):
            tree_root._attach(mount, f"{tmp_path}/{name}")
    with pytest.raises(UsageError, match=r"^/tmp/\.\.: the root of the tree cannot be hidden: name a place below it$"):
        tree_root._attach(directory, "/tmp/..")


def test_places_that_are_made(tmp_path: Path, moved: list[str], sources: tuple[int, int]) -> None:
    directory, file = sources
    (tmp_path / "dangling").symlink_to("made")
    tree_root._attach(directory, f"{tmp_path}/a/b/directory")
    tree_root._attach(file, f"{tmp_path}/a/c/file")
    tree_root._attach(file, f"{tmp_path}/dangling")
    assert moved == [f"{tmp_path}/{name}" for name in ("a/b/directory", "a/c/file", "made")]
    assert (tmp_path / "a/b/directory").is_dir()
    assert all((tmp_path / name).is_file() for name in ("a/c/file", "made"))


def test_a_place_that_cannot_be_made(
    tmp_path: Path, moved: list[str], sources: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "makedirs", fail)
    said = "Read-only file system; it is not in the image: --writable lets it be made"
    with pytest.raises(UsageError, match=f"^{tmp_path}/new: nothing can be mounted there: {said}$"):
        tree_root._attach(sources[0], f"{tmp_path}/new")
    assert moved == []


def test_a_place_for_what_is_the_hosts(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("directory")
    found = {
        name: tree_root._has_directory(f"{tmp_path}/{name}") for name in ("directory", "file", "link", "new", "a/b")
    }
    assert found == {"directory": True, "file": False, "link": False, "new": True, "a/b": False}


def test_nothing_of_an_event_loop_is_imported() -> None:
    script = "import sys, cfsfuse.cli.run; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert "cfsfuse" in loaded.stdout.split()
    assert not set(loaded.stdout.split()) & {"trio", "pyfuse3", "rich", "shtab", "asyncio", "cryptography"}
