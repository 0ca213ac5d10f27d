"""`cfsfuse bench`: real runs, peers that do all kinds of wrong, and nothing left behind by any end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import stat
import sys
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from cfsfuse.bench.run import rows
from cfsfuse.bench.workloads import WORKLOADS, Unit
from cfsfuse.privilege import has_sys_admin
from integration.hanging import SCRIPT, anybody_waits
from integration.mounts import (
    CFSFUSE,
    ORDINARY,
    SELF,
    Stage,
    User,
    both_users,
    eventually,
    needs_root,
    require,
    running,
    stage,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from integration.images import TestImage

DONE, USAGE, BAD, IMPOSSIBLE = 0, 2, 3, 4
TIMEOUT = 100  # seconds for a run that takes ten on an idle machine
KEYS = [row.key for _, row in rows(list(WORKLOADS))]
REFUSED = "kernel backend: only root outside of user namespaces may mount EROFS"

# Mounts as it is told, and then takes the server's breath away: everything hangs that asks it anything.
STOPPED = """
import os, signal, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        words = open(f"/proc/{pid}/cmdline", "rb").read().split(bytes(1))
        served = any(os.readlink(entry.path) == "/dev/fuse" for entry in os.scandir(f"/proc/{pid}/fd"))
    except OSError:
        continue
    if served and os.fsencode(sys.argv[-1]) in words:
        os.kill(int(pid), signal.SIGSTOP)
"""


class Ended(NamedTuple):
    """What a run has come to."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found


class Bench:
    """Runs the benchmark on the python image as the user of a stage, its temporary directories in there."""

    def __init__(self, made: Stage, image: TestImage) -> None:
        self.stage = made
        self.image = image
        made.environment["TMPDIR"] = made.path

    def words(self, *options: str, mount: str = "") -> list[str]:
        basedir = ":".join(self.image.base_directories)
        text = ",".join(filter(None, (f"basedir={basedir}", mount)))
        return [CFSFUSE, "bench", self.image.path, "-o", text, "--quick", *options]

    def run(self, *options: str, mount: str = "") -> Ended:
        """Run to the end, which leaves nothing."""
        with running(self.stage.start(*self.words(*options, mount=mount))) as process:
            out, err = process.communicate(timeout=TIMEOUT)
        self.assert_nothing_left()
        return Ended(process.returncode, out, err)

    def assert_nothing_left(self) -> None:
        assert self.stage.is_clean(), (self.stage.mounts(), self.stage.processes())
        assert not [name for name in os.listdir(self.stage.path) if name.startswith("cfsfuse-")]
        assert not os.path.exists(os.path.join(self.stage.cache, "cfsfuse")), "the user's cache is left alone"


@contextlib.contextmanager
def bench_of(user: User | None, images_at: Callable[[str], TestImage]) -> Iterator[Bench]:
    with stage(user) as made:
        yield Bench(made, images_at("python"))


@pytest.fixture
def bench(images_at: Callable[[str], TestImage]) -> Iterator[Bench]:
    with bench_of(SELF, images_at) as made:
        yield made


# What is measured


@needs_root
def test_all_rows_as_root(bench: Bench) -> None:
    plot = os.path.join(bench.stage.path, "plot.svg")
    done = bench.run("--backend", "fuse", "--backend", "kernel", "--json", "--plot", plot)
    assert done.code == DONE, done.err
    document = done.document
    assert [column["name"] for column in document["columns"]] == ["kernel", "fuse"]
    assert document["reference"] == "kernel"
    assert [row["key"] for row in document["rows"]] == KEYS
    assert document["image"] == bench.image.path
    assert document["machine"]["kernel"] == os.uname().release
    for row in document["rows"]:
        unit, found = row["unit"], row["columns"]
        assert set(found) == ({"kernel", "fuse"} if unit == Unit.SECONDS.value else {"fuse"}), row
        assert all(len(values["samples"]) == 1 for values in found.values())
        if unit == Unit.SECONDS.value:
            assert all(values["median"] > 0 for values in found.values())
            assert found["kernel"]["processor_samples"] is None
            assert len(found["fuse"]["processor_samples"]) == 1
            assert found["kernel"]["ratio"] == 1
    by_key = {row["key"]: row for row in document["rows"]}
    assert 10 < by_key["memory"]["columns"]["fuse"]["median"] < 200
    assert by_key["absent"]["columns"]["fuse"]["processor_median"] > 0
    assert by_key["walk-cold"]["cold"] == document["caches_dropped"]
    root = ET.parse(plot).getroot()  # noqa: S314 - our own
    assert sum(element.get("class") == "bar" for element in root.iter()) >= 2 * len(KEYS) - 2
    assert stat.S_IMODE(os.stat(plot).st_mode) == 0o644


@both_users
def test_the_backends_that_work_here(user: User | None, images_at: Callable[[str], TestImage]) -> None:
    with bench_of(user, images_at) as bench:
        done = bench.run("--rows", "mount,large,absent", mount="noverity")
        assert done.code == DONE, done.err
        table = done.out.splitlines()
        assert max(map(len, table)) <= 100
        heads = table[3].split()
        assert "fuse" in heads
        if user == SELF and has_sys_admin():
            assert heads[0] == "kernel"
        else:
            assert "kernel" not in heads
            assert re.search(r"^kernel: not measured: only root outside of user namespaces", done.out, re.MULTILINE)
            assert done.out.count("cannot be dropped") == 1
            assert "cold," not in done.out
            assert "\nlarge file, new mount " in done.out
        assert re.search(r"^large file again +\d", done.out, re.MULTILINE)
        assert "round 1/1, absent, fuse: absent names" in done.err


@needs_root
def test_a_backend_that_cannot_verify_says_so(bench: Bench) -> None:
    done = bench.run("--rows", "mount", "--backend", "kernel", "--json")
    assert done.code == DONE, done.err
    (column,) = done.document["columns"]
    assert "fs-verity" in column["unverified"]
    refused = bench.run("--backend", "kernel", mount="verity")
    assert (refused.code, refused.out) == (IMPOSSIBLE, "")
    assert re.fullmatch(r"cfsfuse: kernel backend: .*fs-verity.*\n", refused.err)


def test_a_backend_that_is_named_but_impossible(images_at: Callable[[str], TestImage]) -> None:
    with bench_of(ORDINARY, images_at) as bench:
        done = bench.run("--backend", "fuse", "--backend", "kernel")
        assert done == Ended(IMPOSSIBLE, "", f"cfsfuse: {REFUSED}\n")


def test_no_backend_at_all(images_at: Callable[[str], TestImage]) -> None:
    with bench_of(ORDINARY, images_at) as bench:
        bench.stage.environment["PATH"] = os.path.dirname(CFSFUSE) + ":" + bench.stage.directory("bin")
        for program in ("find", "ls", "setpriv"):
            os.symlink(require(program), os.path.join(bench.stage.path, "bin", program))
        done = bench.run("--rows", "mount")
        assert (done.code, done.out) == (IMPOSSIBLE, "")
        assert re.fullmatch(
            r"cfsfuse: nothing could be measured: kernel: .*fuse: fusermount3: not found; .*\n", done.err
        )


def test_digest_is_checked(bench: Bench) -> None:
    done = bench.run("--backend", "fuse", mount=f"digest={'0' * 64}")
    assert (done.code, done.out) == (BAD, "")
    assert "not " + "0" * 64 in done.err


# Peers


def words(*command: str) -> str:
    return " ".join(f"'{word}'" for word in command)


def good_peer(bench: Bench) -> str:
    return words(CFSFUSE, "mount", "--backend", "fuse", "-o", "basedir={basedir}", "{image}", "{mountpoint}")


def test_peers_that_do_wrong_are_named_and_the_rest_goes_on(bench: Bench) -> None:
    mounting = [CFSFUSE, "mount", "--backend", "fuse", "-o", "basedir={basedir}"]
    other = os.path.join(bench.stage.path, "other.cfs")
    recipe = bench.stage.recipe()
    recipe.inline("/else", b"something else")
    recipe.build(other)
    peers = {
        "good": good_peer(bench),
        "fails": words("sh", "-c", "echo no luck >&2; exit 7", "{mountpoint}"),
        "hangs": words("sh", "-c", "sleep 1000 & setsid sleep 1000", "{mountpoint}"),
        "nothing": words("true", "{mountpoint}"),
        "absent": words("/not-there", "{mountpoint}"),
        "else": words(*mounting, other, "{mountpoint}"),
        "busy": words(
            "sh", "-c", '"$@" && cd "$0" && (sleep 1000 &)', "{mountpoint}", *mounting, "{image}", "{mountpoint}"
        ),
        "lingers": words("sh", "-c", '"$@" && (sleep 1000 &)', "sh", *mounting, "{image}", "{mountpoint}"),
        "stopped": words(sys.executable, "-c", STOPPED, *mounting, "{image}", "{mountpoint}"),
    }
    options = [f"--peer={name}={command}" for name, command in peers.items()]
    done = bench.run("--backend", "fuse", "--rows", "mount,small", "--patience", "3", "--json", *options)
    assert done.code == DONE, done.err
    document = done.document
    failed = {column["name"]: column["failed"] for column in document["columns"]}
    expected = {
        "fuse": None,
        "good": None,
        "fails": "its command ends with status 7: no luck",
        "hangs": "its command does not return within 3 s",
        "nothing": "its command ends well, but has mounted nothing at the mount point",
        "absent": "/not-there: cannot be started: No such file or directory",
        "else": "it has mounted something else: the names in its root are not those of the image",
        "lingers": None,
        "busy": "does not unmount within 3 s",
        "stopped": "ls of its root does not end within 3 s",
    }
    assert failed == {name: reason and f"looking at {name}: {reason}" for name, reason in expected.items()}
    for name, reason in expected.items():
        assert (f"{name}: given up: {reason}" in done.err) == (reason is not None)
    assert document["reference"] == "good"
    assert [set(row["columns"]) for row in document["rows"]] == [{"fuse", "good", "lingers"}] * 3
    assert done.err.count("lingers: its server does not end within 3 s of the unmount: killed") == 4


def test_a_peer_that_hangs_in_the_middle_of_a_row(bench: Bench) -> None:
    """It is the third mount that hangs: one to look at it, one to rehearse."""
    count = os.path.join(bench.stage.path, "count")
    stopped = f'echo >>"{count}"; test "$(wc -l <"{count}")" = 3 || exec "$@"; exec "$0" -c "$STOPPED" "$@"'
    bench.stage.environment["STOPPED"] = STOPPED
    command = words("sh", "-c", stopped, sys.executable) + " " + good_peer(bench)
    done = bench.run("--backend", "fuse", "--rows", "mount,absent", "--patience", "3", "--json", f"--peer=p={command}")
    assert done.code == DONE, done.err
    failed = {column["name"]: column["failed"] for column in done.document["columns"]}
    assert failed["fuse"] is None
    assert failed["p"] == "round 1/1, mount, p: ls of its root does not end within 3 s"
    assert [set(row["columns"]) for row in done.document["rows"]] == [{"fuse"}] * 2


@needs_root
def test_a_peer_whose_server_answers_nothing(bench: Bench) -> None:
    """What has asked it cannot be killed: it ends with the server."""
    peer = words(sys.executable, "-c", SCRIPT, "{mountpoint}")
    done = bench.run("--backend", "fuse", "--rows", "mount", "--patience", "3", "--json", f"--peer=mute={peer}")
    assert done.code == DONE, done.err
    failed = {column["name"]: column["failed"] for column in done.document["columns"]}
    assert failed == {"fuse": None, "mute": "looking at mute: ls of its root does not end within 3 s"}


@needs_root
def test_an_interrupt_while_a_peer_answers_nothing(bench: Bench) -> None:
    peer = words(sys.executable, "-c", SCRIPT, "{mountpoint}")
    with running(bench.stage.start(*bench.words("--backend", "fuse", "--rows", "mount", f"--peer=mute={peer}"))) as run:
        eventually(lambda: anybody_waits(bench.stage.processes()), "a process that hangs")
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=TIMEOUT)
    assert run.returncode == 128 + signal.SIGTERM
    bench.assert_nothing_left()


def test_words_of_a_peer_reach_no_terminal_as_they_are(bench: Bench) -> None:
    plot = os.path.join(bench.stage.path, "plot.svg")
    script = "import os; os.write(2, bytes((27, 93, 7, 1))); os._exit(7)"
    command = words(sys.executable, "-c", script, "{mountpoint}")
    done = bench.run("--backend", "fuse", "--rows", "mount", f"--peer=loud={command}", "--plot", plot)
    assert done.code == DONE, done.err
    said = r"its command ends with status 7: \x1b]\x07\x01"
    assert said in done.err
    assert not set("\x1b\x07\x01") & set(done.err + done.out)
    assert said in "".join(ET.parse(plot).getroot().itertext())  # noqa: S314 - our own


def test_processes_of_others_are_left_alone(bench: Bench) -> None:
    command = bench.words("--backend", "fuse", "--rows", "mount", f"--peer=fails={words('false', '{mountpoint}')}")
    with running(bench.stage.start("sh", "-c", 'sleep 1000 >&- 2>&- & echo $!; exec "$@"', "sh", *command)) as process:
        out, err = process.communicate(timeout=TIMEOUT)
        assert process.returncode == DONE, err
        os.kill(int(out.split()[0]), signal.SIGKILL)  # it lives
    eventually(bench.stage.is_clean, "an end without leftovers")


def test_nothing_measured_is_an_error(bench: Bench) -> None:
    bench.image = bench.image._replace(base_directories=(bench.stage.store,))
    done = bench.run("--backend", "fuse", "--rows", "small")
    assert (done.code, done.out) == (IMPOSSIBLE, "")
    assert re.search(r"^cfsfuse: nothing could be measured: fuse: .*No such file or directory$", done.err, re.MULTILINE)


# Interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("backend", ["fuse", pytest.param("kernel", marks=needs_root)])
def test_an_interrupt_leaves_nothing(bench: Bench, backend: str, number: signal.Signals) -> None:
    plot = os.path.join(bench.stage.path, "plot.svg")
    command = bench.words("--backend", backend, "--rounds", "1000", "--plot", plot, mount="noverity")
    with running(bench.stage.start(*command)) as process:
        eventually(bench.stage.mounts, "a mount")
        process.send_signal(number)
        out, _ = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out) == (128 + number, "")
    assert not os.path.exists(plot)
    bench.assert_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_a_peer_hangs(bench: Bench, number: signal.Signals) -> None:
    mounting = [CFSFUSE, "mount", "--backend", "fuse", "-o", "basedir={basedir}", "{image}", "{mountpoint}"]
    stopped = words(sys.executable, "-c", STOPPED, *mounting)
    command = bench.words("--backend", "fuse", "--rows", "mount", f"--peer=stopped={stopped}")
    with running(bench.stage.start(*command)) as process:
        eventually(lambda: _is_stopped(bench), "a server that is stopped")
        process.send_signal(number)
        process.send_signal(number)  # a second one does not keep it from clearing up
        process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + number
    bench.assert_nothing_left()


def _is_stopped(bench: Bench) -> bool:
    for pid in bench.stage.processes():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
            if file.read().rpartition(b")")[2].split()[0] == b"T":
                return True
    return False
