"""`cfsfuse run`: the tree for one command, at a place or as its root, for whoever runs it; and nothing left of it.

The tree is made of this host's own programs.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest

from integration.mounts import (
    CFSFUSE,
    ORDINARY,
    SELF,
    Stage,
    User,
    both_users,
    digest_of,
    eventually,
    flip,
    mount_in_private_namespace,
    noise,
    require,
    running,
    stage,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

USAGE, BAD, IMPOSSIBLE, NOT_EXECUTABLE, NOT_FOUND = 2, 3, 4, 126, 127
GREETING = "from the image\n"
LARGE = noise(300_000, "run")
PROGRAMS = (
    "sh",
    "cat",
    "chmod",
    "false",
    "grep",
    "id",
    "ls",
    "mkdir",
    "mv",
    "rm",
    "seq",
    "sleep",
    "stat",
    "touch",
    "true",
)
DIRECTORIES = ("proc", "dev", "sys", "tmp", "etc", "usr/bin", "usr/lib", "usr/lib64", "usr/sbin")
_LIBRARY = re.compile(r"(/\S+) \(0x")
_MODULES = "import sys; print(*(m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)), sep='\\n')"


class Tree(NamedTuple):
    """An image, its object store, and the directory that it was made from."""

    image: str
    store: str
    source: str


# The trees ------------------------------------------------------------------------------------------------------------


def copy(path: str, root: str) -> None:
    """Copy a file of the host to the place of its name in `root`, where /bin and /lib are those of /usr."""
    place = f"{root}/{path}" if path.startswith("/usr/") else f"{root}/usr/{path}"
    if not os.path.exists(place):
        os.makedirs(os.path.dirname(place), exist_ok=True)
        shutil.copy(path, place)


def copy_program(path: str, root: str) -> None:
    copy(path, root)
    listed = subprocess.run([require("ldd"), path], capture_output=True, text=True, check=False).stdout
    for library in _LIBRARY.findall(listed):
        copy(library, root)


def copy_python(root: str) -> None:
    """Copy the interpreter, and of its library what it loads by itself."""
    python = os.path.realpath(sys.executable)
    copy_program(python, root)
    listed = subprocess.run([python, "-IS", "-c", _MODULES], capture_output=True, text=True, check=True).stdout
    for module in listed.split():
        copy(module, root)
    library = sysconfig.get_path("stdlib")  # which it knows by these two
    copy(os.path.join(library, "os.py"), root)
    os.makedirs(os.path.join(f"{root}/{library}", "lib-dynload"), exist_ok=True)


def make_source(root: str) -> None:
    for name in DIRECTORIES:
        os.makedirs(os.path.join(root, name))
    for name in ("bin", "lib", "lib64", "sbin"):
        os.symlink(f"usr/{name}", os.path.join(root, name))
    for program in PROGRAMS:
        copy_program(require(program), root)
    copy_python(root)
    for name, content in (("greeting", GREETING.encode()), ("large", LARGE)):
        with open(os.path.join(root, "etc", name), "wb") as file:
            file.write(content)
    os.symlink("/etc", os.path.join(root, "link"))
    os.symlink("../../../../nowhere", os.path.join(root, "dangling"))


def make(directory: str, source: str) -> Tree:
    """Build an image that everybody can read."""
    made = Tree(os.path.join(directory, f"{os.path.basename(source)}.cfs"), os.path.join(directory, "store"), source)
    subprocess.run([CFSFUSE, "mk", f"--digest-store={made.store}", source, made.image], check=True, capture_output=True)
    subprocess.run(["chmod", "-R", "a+rX", directory], check=True)
    return made


@pytest.fixture(scope="session")
def tree(workspace: str) -> Tree:
    directory = os.path.join(workspace, "run")
    make_source(os.path.join(directory, "source"))
    return make(directory, os.path.join(directory, "source"))


@pytest.fixture(scope="session")
def bare(tree: Tree) -> Tree:
    """The same without a /sys, with a file as /dev, and with a /proc that leads out."""
    source = os.path.join(os.path.dirname(tree.source), "bare")
    shutil.copytree(tree.source, source, symlinks=True)
    for name in ("proc", "dev", "sys"):
        os.rmdir(os.path.join(source, name))
    os.symlink("../../../../../etc", os.path.join(source, "proc"))
    with open(os.path.join(source, "dev"), "w", encoding="ascii") as file:
        file.write("a file\n")
    return make(os.path.dirname(source), source)


class Place(NamedTuple):
    """A stage, and a tree to be run there."""

    stage: Stage
    tree: Tree

    def words(self, *words: str, options: str = "", tree: Tree | None = None) -> list[str]:
        """Return a whole command; `words` are those of `cfsfuse run` besides IMAGE and -o."""
        used = tree or self.tree
        given = f"basedir={used.store},log={self.stage.log}" + (f",{options}" if options else "")
        return [CFSFUSE, "run", "-o", given, used.image, *words]

    def run(self, *words: str, options: str = "", tree: Tree | None = None) -> subprocess.CompletedProcess[str]:
        """Run it to its end, and see that nothing of it is left: at once, and not only soon."""
        done = self.stage.run(*self.words(*words, options=options, tree=tree))
        assert self.stage.processes() == [], done
        self.check_clean()
        return done

    def sh(self, script: str, *words: str, options: str = "", tree: Tree | None = None) -> str:
        """Run a script in the tree as the root; return what it prints."""
        done = self.run("--root", *words, "--", "sh", "-c", script, options=options, tree=tree)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    def start(self, *words: str, wrapper: tuple[str, ...] = (), options: str = "") -> subprocess.Popen[str]:
        return self.stage.start(*wrapper, *self.words(*words, options=options))

    def fails(self, code: int, said: str, *words: str, options: str = "", tree: Tree | None = None) -> None:
        """Run what must end with `code` and one line that has the pattern `said`."""
        done = self.run(*words, options=options, tree=tree)
        assert (done.returncode, done.stdout) == (code, ""), done
        assert re.fullmatch(f"cfsfuse(?: run)?: {said}\n", done.stderr), done.stderr

    def check_clean(self) -> None:
        assert self.stage.mounts() == []
        # The import of trio has a file of its own there for a moment, which stays when the server is ended in it.
        assert [name for name in os.listdir(self.stage.environment["TMPDIR"]) if name.startswith("cfsfuse")] == []


@contextlib.contextmanager
def prepared(user: User | None, tree: Tree) -> Iterator[Place]:
    with stage(user) as made:
        made.environment["TMPDIR"] = made.directory("tmp")
        made.environment["PATH"] = "/usr/bin:/bin:/usr/sbin:/sbin"
        place = Place(made, tree)
        yield place
        eventually(made.is_clean, "an end of all processes")
        place.check_clean()


@pytest.fixture(params=[SELF if SELF.uid == 0 else None, ORDINARY], ids=["root", "ordinary"])
def place(request: pytest.FixtureRequest, tree: Tree) -> Iterator[Place]:
    """For what may differ between root, who needs no user namespace, and an ordinary user."""
    with prepared(request.param, tree) as made:
        yield made


@pytest.fixture
def ours(tree: Tree) -> Iterator[Place]:
    """For what does not; of an ordinary user, who needs more."""
    with prepared(ORDINARY, tree) as made:
        yield made


def snapshot(*paths: str) -> dict[str, tuple[int, int, int, str]]:
    """Return mode, size, time of change and content of all files there."""
    found = {}
    files = [path for path in paths if os.path.isfile(path)]
    files += [os.path.join(folder, name) for path in paths for folder, _, names in os.walk(path) for name in names]
    for name in files:
        status = os.stat(name)
        with open(name, "rb") as file:
            content = hashlib.sha256(file.read()).hexdigest()
        found[name] = (status.st_mode, status.st_size, status.st_ctime_ns, content)
    return found


# The tree -------------------------------------------------------------------------------------------------------------


def test_the_tree_is_the_root(place: Place) -> None:
    assert place.sh("cat /etc/greeting; pwd; id -u") == f"{GREETING}/\n0\n"
    assert place.sh("ls /").split() == sorted(os.listdir(place.tree.source))
    assert place.sh("cat /proc/self/comm; ls -d /dev/null /sys/kernel") == "cat\n/dev/null\n/sys/kernel\n"
    done = place.run("--root", "--", os.path.realpath(sys.executable), "-IS", "-c", "print(6 * 7)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "42\n", "")


def test_the_tree_is_at_a_place(place: Place) -> None:
    mountpoint = place.stage.mountpoint
    done = place.run("--at", mountpoint, "--", "cat", f"{mountpoint}/etc/greeting", place.stage.path + "/outside")
    assert (done.returncode, done.stdout) == (1, GREETING)
    assert os.listdir(mountpoint) == []
    with open(os.path.join(place.stage.path, "outside"), "w", encoding="ascii") as file:
        file.write("of the host\n")
    done = place.run("--at", mountpoint, "--", "cat", f"{mountpoint}/etc/greeting", file.name)
    assert (done.returncode, done.stdout) == (0, f"{GREETING}of the host\n")


def test_the_place_may_be_the_working_directory(ours: Place) -> None:
    done = ours.stage.run(*ours.words("--at", ".", "--", "cat", "etc/greeting"), cwd=ours.stage.mountpoint)
    assert (done.returncode, done.stdout) == (0, GREETING)


KINDS: dict[str, Callable[[list[str]], bool]] = {
    "kernel": lambda line: line[-3] == "overlay" and "userxattr" not in line[-1],
    "overlay": lambda line: line[-3] == "overlay" and "userxattr" in line[-1] and "datadir+" in line[-1],
    "fuse": lambda line: line[-3] == "fuse.cfsfuse",
}


def kind_of_root(place: Place, *words: str, options: str) -> str:
    """Return the backend that shows the root."""
    listed = place.sh("cat /proc/self/mountinfo", *words, options=options)
    line = next(words for words in map(str.split, listed.splitlines()) if words[4] == "/")
    return next(name for name, is_it in KINDS.items() if is_it(line))


def test_what_verifies_by_itself_is_fuse(place: Place) -> None:
    assert kind_of_root(place, options="") == "fuse"


@pytest.mark.parametrize(
    ("user", "backend"),
    [(SELF if SELF.uid == 0 else None, "kernel"), (ORDINARY, "overlay")],
    ids=["root-kernel", "ordinary-overlay"],
)
def test_what_need_not_verify_is_the_kernels(user: User | None, backend: str, tree: Tree) -> None:
    with prepared(user, tree) as place:
        named = place.run("--root", f"--backend={backend}", "--", "true", options="noverity")
        if named.returncode == IMPOSSIBLE:
            pytest.skip(named.stderr.strip())
        assert kind_of_root(place, options="noverity") == backend


def test_without_writable_nothing_changes(ours: Place) -> None:
    for options in ("", "noverity"):
        done = ours.run("--root", "--", "touch", "/etc/new", options=options)
        assert (done.returncode, done.stdout) == (1, "")
        assert "Read-only file system" in done.stderr


CHANGES = """
set -e
echo new >/etc/new; echo more >>/etc/greeting; rm /etc/large; mv /usr/bin/seq /usr/bin/moved
mkdir /etc/directory; chmod 600 /etc/greeting; rm /link; chmod 700 /usr
cat /etc/new /etc/greeting; ls /etc; /usr/bin/moved 2; stat -c %a /etc/greeting /usr
"""
CHANGED = f"new\n{GREETING}more\ndirectory\ngreeting\nnew\n1\n2\n600\n700\n"


@pytest.mark.parametrize("options", ["", "noverity", "backend=fuse"])
def test_what_is_written_is_forgotten(place: Place, options: str) -> None:
    before = snapshot(place.tree.image, place.tree.store)
    assert len(before) > len(PROGRAMS)
    assert place.sh(CHANGES, "--writable", options=options) == CHANGED
    assert snapshot(place.tree.image, place.tree.store) == before
    assert place.sh("cat /etc/greeting; ls /etc", "--writable", options=options) == f"{GREETING}greeting\nlarge\n"


def test_what_is_written_at_a_place_is_forgotten(place: Place) -> None:
    before = snapshot(place.tree.image, place.tree.store)
    script = 'cd "$0"; echo new >etc/greeting; rm etc/large; cat etc/greeting; ls etc'
    done = place.run("--at", place.stage.mountpoint, "--writable", "--", "sh", "-c", script, place.stage.mountpoint)
    assert (done.returncode, done.stdout, done.stderr) == (0, "new\ngreeting\n", "")
    assert snapshot(place.tree.image, place.tree.store) == before
    assert os.listdir(place.stage.mountpoint) == []


def test_what_is_written_may_be_kept(ours: Place) -> None:
    upper, work = (ours.stage.directory(name) for name in ("upper", "work"))
    options = f"upperdir={upper},workdir={work}"
    ours.sh("echo new >/etc/new", options=options)
    with open(os.path.join(upper, "etc/new"), encoding="ascii") as file:
        assert file.read() == "new\n"
    assert ours.sh("cat /etc/new", options=options) == "new\n"


@pytest.mark.parametrize("words", [(), ("--writable",)], ids=["read-only", "writable"])
def test_a_damaged_object_is_an_error_of_the_command(place: Place, words: tuple[str, ...]) -> None:
    store = os.path.join(place.stage.path, "damaged")
    shutil.copytree(place.tree.store, store)
    digest = digest_of(LARGE).hex()
    name = f"{digest[:2]}/{digest[2:]}"
    flip(os.path.join(store, name), 123_456)
    damaged = place.tree._replace(store=store)
    done = place.run("--root", *words, "--", "cat", "/etc/greeting", "/etc/large", tree=damaged)
    assert (done.returncode, done.stdout) == (1, GREETING)
    assert "Input/output error" in done.stderr
    done = place.run("--root", *words, "--", "sh", "-c", "echo more >>/etc/large", tree=damaged)
    assert done.returncode != 0  # neither is it copied to be changed
    place.stage.claim(f"object {name}: ", len(place.stage.log_lines()))


# What is to be seen besides it ----------------------------------------------------------------------------------------


def host_directory(place: Place) -> str:
    """Return a directory of the host with two files in it, which is the user's."""
    path = place.stage.directory("host")
    for name in ("one", "two"):
        with open(os.path.join(path, name), "w", encoding="ascii") as file:
            file.write(f"{name}\n")
        place.stage.give(file.name)
    return path


def test_binds(place: Place) -> None:
    host = host_directory(place)
    assert place.sh("cat /tmp/one; echo new >/tmp/new", "--bind", f"{host}:/tmp") == "one\n"
    assert sorted(os.listdir(host)) == ["new", "one", "two"]
    assert place.sh("cat /etc/greeting /etc/large", "--bind", f"{host}/two:/etc/greeting", "--bind",
                    f"{host}/one:/etc/large") == "two\none\n"  # fmt: skip
    words = ("--tmpfs", "/tmp", "--bind", host)  # a tmpfs takes the places that are missing
    if host.startswith("/tmp/"):
        assert place.sh(f"cat {host}/one", *words) == "one\n"


def test_binds_that_take_no_changes(ours: Place) -> None:
    host = host_directory(ours)
    done = ours.run("--root", "--bind-ro", f"{host}:/tmp", "--", "sh", "-c", "cat /tmp/one; echo new >/tmp/one")
    assert (done.returncode, done.stdout) == (2, "one\n")
    assert "Read-only file system" in done.stderr
    assert ours.sh("cat /tmp/one", "--bind", f"{host}:/tmp") == "one\n"


def test_binds_go_on_top_of_one_another_in_their_order(ours: Place, tree: Tree) -> None:
    words = ("--bind-ro", f"{tree.source}/usr:/tmp", "--bind", f"{tree.source}/etc:/tmp/bin")
    assert ours.sh("ls /tmp/bin", *words) == "greeting\nlarge\n"


def test_binds_at_places_that_are_not_in_the_image(ours: Place) -> None:
    host = host_directory(ours)
    words = ("--writable", "--bind", f"{host}:/a/new/place", "--bind-ro", f"{host}/two:/a/file", "--tmpfs", "/a/tmpfs")
    assert ours.sh("cat /a/new/place/one /a/file; ls -A /a/tmpfs", *words) == "one\ntwo\n"
    said = r"nothing can be mounted there: Read-only file system; it is not in the image: --writable lets it be made"
    for target in ("/etc/new/place", "/dangling"):
        ours.fails(USAGE, f"{target}: {said}", "--root", "--bind", f"{host}:{target}", "--", "true")
    ours.fails(USAGE, f"/new: {said}", "--root", "--tmpfs", "/new", "--", "true")


def test_no_link_leads_out_of_the_tree(ours: Place) -> None:
    host = host_directory(ours)
    assert ours.sh("ls /etc", "--bind", f"{host}:/link") == "one\ntwo\n"
    assert ours.sh("ls /nowhere; ls -d /dangling", "--writable", "--bind", f"{host}:/dangling") == (
        "one\ntwo\n/dangling\n"
    )
    assert ours.sh("ls /etc", "--bind", f"{host}:/tmp/../../../../etc") == "one\ntwo\n"
    assert not os.path.lexists("/nowhere")


def test_a_colon_in_a_bind(ours: Place) -> None:
    path = ours.stage.directory("a:b")
    with open(os.path.join(path, "file"), "w", encoding="ascii"):
        pass
    assert ours.sh("ls /tmp", "--bind", path.replace(":", r"\:") + ":/tmp") == "file\n"


def test_tmpfs(ours: Place) -> None:
    assert ours.sh("ls -A /etc; echo x >/etc/x; cat /etc/x", "--tmpfs", "/etc") == "x\n"
    assert ours.sh("ls /etc") == "greeting\nlarge\n"


def test_binds_that_cannot_be(ours: Place) -> None:
    path = ours.stage.path
    for words, said in (
        (["--bind", f"{path}/none:/tmp"], f"{path}/none: cannot be bound: No such file or directory"),
        (["--bind", f"{path}:/etc/greeting"], "/etc/greeting: a directory cannot be shown at a file"),
        (["--bind", f"{CFSFUSE}:/etc"], "/etc: a file cannot be shown at a directory"),
        (["--bind", f"{path}:/etc/greeting/x"], "/etc/greeting/x: nothing can be mounted there: Not a directory"),
        (["--tmpfs", "/etc/.."], r"/etc/\.\.: the root of the tree cannot be hidden: name a place below it"),
    ):
        ours.fails(USAGE, said, "--root", *words, "--", "true")


def test_what_the_image_has_no_place_for(ours: Place, bare: Tree) -> None:
    said = "".join(f"cfsfuse run: {path}: not in the image, and not to be seen\n" for path in ("/proc", "/dev", "/sys"))
    done = ours.run("--root", "--", "cat", "/proc/greeting", "/dev", tree=bare)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{GREETING}a file\n", said)
    done = ours.run("--root", "--writable", "--", "ls", "-d", "/sys/kernel", tree=bare)
    assert (done.returncode, done.stdout) == (0, "/sys/kernel\n")
    assert done.stderr == said[: said.index("cfsfuse run: /sys")]


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (["sh", "-c", "exit 42"], 42, ""),
        (["sh", "-c", "kill -KILL $$"], 128 + signal.SIGKILL, ""),
        (["none"], NOT_FOUND, "cfsfuse run: none: No such file or directory\n"),
        (["two\nlines"], NOT_FOUND, "cfsfuse run: two\\nlines: No such file or directory\n"),
        (["/etc/greeting"], NOT_EXECUTABLE, "cfsfuse run: /etc/greeting: Permission denied\n"),
    ],
)
def test_exit_status(ours: Place, command: list[str], code: int, said: str) -> None:
    done = ours.run("--root", "--", *command)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", said)


def test_words_of_the_command_are_its_own(ours: Place) -> None:
    for words in (["--", "--root", "-o", "--"], ["-h", "--writable"]):
        done = ours.run("--root", "--", "sh", "-c", 'printf "%s\\n" "$@"', "sh", *words)
        assert (done.returncode, done.stdout.splitlines()) == (0, words)


def test_streams_and_descriptors_are_the_callers(ours: Place) -> None:
    with open(ours.tree.image, "rb") as given:
        script = f"cat; echo error >&2; cat /proc/self/fd/{given.fileno()}"
        done = subprocess.run(
            [*ours.stage.user.prefix, *ours.words("--root", "--", "sh", "-c", script)],
            input=LARGE,
            capture_output=True,
            pass_fds=[given.fileno()],
            env=ours.stage.environment,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b"error\n")
        assert done.stdout == LARGE + given.read()


@pytest.mark.parametrize("closed", ["<&-", "<&- >&- 2>&-"])
def test_streams_may_be_closed(ours: Place, closed: str) -> None:
    path = os.path.join(ours.stage.path, "said")
    words = ours.words("--root", "--bind", f"{ours.stage.path}:/tmp", "--", "sh", "-c", "echo well >/tmp/said")
    done = ours.stage.run("sh", "-c", f'exec "$@" {closed}', "sh", *words)
    assert done.returncode == 0, done
    with open(path, encoding="ascii") as file:
        assert file.read() == "well\n"


def test_what_the_command_inherits(ours: Place) -> None:
    """Limits, signals and the environment are as for any command; a server of ours has others."""
    ours.stage.environment["OF_THE_CALLER"] = "a value"
    script = 'ulimit -S -n 500; umask 027; trap "" INT USR1; exec "$@"'
    shown = "ulimit -S -n; umask; echo $OF_THE_CALLER; grep SigIgn /proc/self/status; grep SigBlk /proc/self/status"
    done = ours.stage.run("sh", "-c", script, "sh", *ours.words("--root", "--", "sh", "-c", shown))
    ignored = 1 << signal.SIGINT - 1 | 1 << signal.SIGUSR1 - 1
    *others, sig_ign, sig_blk = done.stdout.splitlines()
    assert others == ["500", "0027", "a value"]
    # What is above is not ours to tell: whoever runs the tests may ignore signals of the C library's.
    assert int(sig_ign.split()[1], 16) & (1 << signal.SIGSYS) - 1 == ignored
    assert int(sig_blk.split()[1], 16) == 0


def test_where_the_command_starts(ours: Place) -> None:
    assert ours.sh("pwd", "--chdir", "/etc") == "/etc\n"
    done = ours.run("--at", ours.stage.mountpoint, "--", "pwd")
    assert done.stdout == f"{ours.stage.path}\n"
    done = ours.run("--at", ours.stage.mountpoint, "--chdir", f"{ours.stage.mountpoint}/etc", "--", "ls")
    assert done.stdout == "greeting\nlarge\n"
    ours.fails(USAGE, "--chdir /none: No such file or directory", "--root", "--chdir", "/none", "--", "true")


# Signals --------------------------------------------------------------------------------------------------------------


TRAPPING = 'trap "echo caught; exit 9" HUP INT QUIT USR1 USR2 TERM; echo ready; while :; do sleep 0.05; done'


def state(pid: int) -> str:
    """Return the letter for what a process does, proc(5)."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()[0]


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGQUIT]
)
def test_signals_reach_the_command(ours: Place, number: int) -> None:
    with running(ours.start("--root", "--", "sh", "-c", TRAPPING)) as process:
        assert first_line(process) == "ready\n"
        process.send_signal(number)
        assert process.communicate(timeout=20) == ("caught\n", "")
        assert process.returncode == 9
    with running(ours.start("--root", "--", "sh", "-c", "echo ready; exec sleep 60")) as process:
        assert first_line(process) == "ready\n"
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    assert ours.stage.processes() == []


def on_a_terminal(place: Place, script: str, *command: str) -> Iterator[tuple[str, Callable[[bytes], object]]]:
    """Run a script of a shell with job control on a terminal; yield what it says, and what types."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(place.stage.path)
        words = [*place.stage.user.prefix, "sh", "-m", "-c", script, "sh", *command]
        os.execvpe(words[0], words, place.stage.environment)  # noqa: S606 - as the tests' own Popen does
    try:
        with open(terminal, "r+b", buffering=0) as file, contextlib.suppress(OSError):  # EIO is its end
            while said := file.read(4096):
                yield said.decode(), file.write
    finally:
        os.waitpid(pid, 0)


@pytest.mark.parametrize("key", [b"\x03", b"\x1c"], ids=["INT", "QUIT"])
def test_the_command_gets_the_signals_of_its_terminal(ours: Place, key: bytes) -> None:
    command = ours.words("--root", "--", "sh", "-c", f"test -t 0 && test -t 1 && {TRAPPING}")
    seen = ""
    for said, write in on_a_terminal(ours, '"$@"; echo "status $?"', *command):
        seen += said
        if "ready" in said:
            write(key)
    assert seen.count("caught") == 1
    assert "status 9\r\n" in seen


def test_a_command_in_another_process_group_gets_what_is_typed_from_us(ours: Place) -> None:
    command = ours.words("--at", ours.stage.mountpoint, "--", require("setsid"), "sh", "-c", TRAPPING)
    seen = ""
    for said, write in on_a_terminal(ours, '"$@"; echo "status $?"', *command):
        seen += said
        if "ready" in said:
            write(b"\x03")
    assert seen.count("caught") == 1
    assert "status 9\r\n" in seen


def test_job_control(ours: Place) -> None:
    """Stopped and continued as any job is, with the server going on meanwhile."""
    script = "echo ready; sleep 1; cat /etc/greeting"
    seen = ""
    command = ours.words("--root", "--", "sh", "-c", script)
    for said, write in on_a_terminal(ours, '"$@"; echo "status $?"; sleep 0.2; fg >/dev/null; echo "end $?"', *command):
        seen += said
        if "ready" in said:
            write(b"\x1a")
    assert f"status {128 + signal.SIGTSTP}\r\n" in seen
    assert f"{GREETING.strip()}\r\nend 0\r\n" in seen.partition("status")[2]


MOMENTS = [0.12, 0.18, 0.25]  # seconds after its start: a mount takes about that


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGKILL])
def test_an_end_at_any_moment_leaves_nothing(ours: Place, number: int) -> None:
    for moment in MOMENTS:
        with running(ours.start("--root", "--writable", "--", "sleep", "60")) as process:
            time.sleep(moment)
            process.send_signal(number)
            said = process.communicate(timeout=20)[1]
            # Before the interpreter listens a signal has its own effect, of which a shell makes the same number.
            status = process.returncode if process.returncode >= 0 else 128 - process.returncode
            assert status == 128 + number
            assert "Traceback" not in said or number == signal.SIGINT  # the interpreter's own, while it starts
        eventually(ours.stage.is_clean, f"an end after {moment} s")
        ours.check_clean()


@pytest.mark.parametrize(
    ("options", "words"), [("", ()), ("noverity", ()), ("", ("--writable",))], ids=["fuse", "overlay", "writable"]
)
def test_when_it_is_killed_all_ends(place: Place, options: str, words: tuple[str, ...]) -> None:
    """The command, what that has started, and the mount: with nobody there who could take it away."""
    script = "sleep 300 & (sleep 300 & sleep 300) & trap '' TERM HUP; echo ready; sleep 300; true"
    with running(place.start("--root", *words, "--", "sh", "-c", script, options=options)) as process:
        assert first_line(process) == "ready\n"
        assert len(place.stage.processes()) >= 5
        process.kill()
        process.communicate(timeout=20)
    eventually(place.stage.is_clean, "an end of all")
    place.check_clean()


def test_what_the_command_leaves_running_ends_with_it(place: Place) -> None:
    script = "(trap '' HUP TERM; sleep 300 & sleep 300) >/dev/null 2>&1 & echo left; exit 5"
    done = place.run("--root", "--", "sh", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (5, "left\n", "")


def words_of(pid: int) -> str:
    with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
        return file.read().rstrip("\0").replace("\0", " ")


def worker(process: subprocess.Popen[str]) -> int:
    """Return the pid of the process that mounts."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children", encoding="ascii") as file:
        found = [int(word) for word in file.read().split()]
    return next(pid for pid in found if os.path.realpath(f"/proc/{pid}/exe") == os.path.realpath(sys.executable))


def test_when_the_process_that_mounts_is_killed_all_ends(place: Place) -> None:
    """And nothing else: neither what the caller has started before, nor what that leaves."""
    require("unshare")
    command = place.words(
        "--at", place.stage.mountpoint, "--", "sh", "-c", "(sleep 300 & sleep 300) & echo ready; wait"
    )
    script = 'unshare -Urm sleep 301 & (until test -e ready; do sleep 0.05; done; sleep 302 &) & exec "$@"'
    with running(place.stage.start("sh", "-c", script, "sh", *command)) as process:
        assert first_line(process) == "ready\n"
        place.stage.directory("ready")  # by now, orphans are adopted
        eventually(lambda: "sleep 302" in map(words_of, place.stage.processes()), "an orphan of the caller's")
        os.kill(worker(process), signal.SIGKILL)
        assert process.wait(20) == 128 + signal.SIGKILL
        left = place.stage.processes()
        assert sorted(map(words_of, left)) == ["sleep 301", "sleep 302"]
        for pid in left:
            os.kill(pid, signal.SIGKILL)


STUCK = """
import os, signal, sys
from cfsfuse.vfs import Vfs

def stuck(self, nid):
    while True:
        os.kill(os.getpid(), signal.SIGSTOP)

Vfs.readlink = stuck
from cfsfuse.cli.main import main
sys.exit(main())
"""


@pytest.mark.parametrize("words", [(), ("--writable",)], ids=["fuse", "writable"])
def test_a_command_that_hangs_in_its_server_can_be_ended(place: Place, words: tuple[str, ...]) -> None:
    """Nothing else ends a process that waits for the answer to a request than that of who has taken it."""
    script = 'echo ready; cat "$0"'
    command = place.words("--at", place.stage.mountpoint, *words, "--", "sh", "-c", script, place.stage.at("dangling"))
    with running(place.stage.start(sys.executable, "-c", STUCK, *command[1:])) as process:
        assert first_line(process) == "ready\n"
        eventually(lambda: "T" in map(state, place.stage.processes()), "a server that stops")
        process.terminate()
        assert process.communicate(timeout=8) == ("", "")
        assert process.returncode == 128 + signal.SIGTERM


def test_what_ends_before_the_command_is_no_zombie(ours: Place) -> None:
    script = 'for i in 1 2 3; do (sleep 0.1 &); done; sleep 0.4; grep -h ") Z $PPID " /proc/[0-9]*/stat; echo done'
    assert ours.run("--root", "--", "sh", "-c", script).stdout == "done\n"


def test_what_the_command_unmounts_itself(place: Place) -> None:
    script = 'umount -l "$TMPDIR"/cfsfuse-run-* && umount -l "$0"; exit 7'
    done = place.run("--at", place.stage.mountpoint, "--writable", "--", "sh", "-c", script, place.stage.mountpoint)
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")


@pytest.mark.parametrize("words", [("--at", "{mnt}"), ("--root", "--bind", "{path}:{path}", "--tmpfs", "/tmp")])
def test_what_the_host_unmounts_is_not_kept_busy(place: Place, words: tuple[str, ...]) -> None:
    """And nothing that is mounted for the command is seen by the host, which shares its mounts."""
    path = place.stage.path
    device = place.stage.directory("device")
    given = [word.format(mnt=place.stage.mountpoint, path=path) for word in words]
    inner = f"""
        cd /; touch {path}/ready
        for _ in $(seq 100); do grep -q " {device} " /proc/self/mountinfo || exit 0; sleep 0.05; done; exit 96
    """
    host = """
        mount --make-rshared / && mount -t tmpfs none "$1" || exit 99
        path=$0 device=$1; shift
        "$@" & until test -e "$path/ready"; do sleep 0.05; kill -0 $! || exit 98; done
        test $(grep -c " $path/" /proc/self/mountinfo) = 1 || { kill $!; exit 97; }
        umount "$device"; wait $!
    """
    wrapper = [*mount_in_private_namespace(), "sh", "-c", host, path, device]
    done = place.stage.run(*place.words(*given, "--", "sh", "-c", inner), wrapper=wrapper)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Several, and inside of others ----------------------------------------------------------------------------------------


def test_several_at_once(ours: Place) -> None:
    def one(number: int) -> str:
        script = f"rm /etc/large; echo {number} >/etc/greeting; sleep 0.2; cat /etc/greeting; ls /etc"
        done = ours.stage.run(*ours.words("--root", "--writable", "--", "sh", "-c", script))
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(4))) == [f"{number}\ngreeting\n" for number in range(4)]


def test_one_in_another(place: Place) -> None:
    inner = place.words("--root", "--writable", "--", "sh", "-c", "echo new >/etc/greeting; cat /etc/greeting")
    script = '"$@" && cat "$0/etc/greeting"'
    done = place.run("--at", place.stage.mountpoint, "--", "sh", "-c", script, place.stage.mountpoint, *inner)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"new\n{GREETING}", "")


@both_users
def test_in_a_user_namespace(user: User | None, tree: Tree) -> None:
    """Where the user is root already, as in a rootless container."""
    with prepared(user, tree) as place:
        words = place.words("--root", "--writable", "--", "sh", "-c", "rm /etc/large; ls /etc; id -u")
        done = place.stage.run(require("unshare"), "-Urm", *words)
        if "unshare" in done.stderr:
            pytest.skip(done.stderr.strip())
        assert (done.returncode, done.stdout, done.stderr) == (0, "greeting\n0\n", "")


def test_where_user_namespaces_are_forbidden(ours: Place) -> None:
    """In one of which the number of further ones is 0: the host keeps its own limit."""
    script = 'echo 0 >/proc/sys/user/max_user_namespaces || exit 99; exec setpriv --bounding-set=-all -- "$@"'
    words = ours.words("--root", "--", "true")
    done = ours.stage.run(require("unshare"), "-Ur", "sh", "-c", script, "sh", *words)
    if "unshare" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert (done.returncode, done.stdout) == (IMPOSSIBLE, "")
    assert done.stderr == (
        "cfsfuse: namespaces: no more may be made; "
        "the administrator has to change user.max_user_namespaces, which is 0\n"
    )


# Errors ---------------------------------------------------------------------------------------------------------------


def test_places_that_are_none(ours: Place) -> None:
    path = ours.stage.path
    ours.fails(USAGE, "/none: mountpoint: No such file or directory; create.*", "--at", "/none", "--", "true")
    ours.fails(USAGE, ".*: mountpoint is not a directory", "--at", ours.tree.image, "--", "true")
    for name in ("/", "/proc", "/dev", "/proc/../dev", "/proc/sys"):
        said = f"--at {os.path.normpath(name)}: would hide what the mount itself needs: .*"
        ours.fails(USAGE, said, "--at", name, "--", "true")
    assert sorted(os.listdir(path)) == ["cache", "mnt", "store", "tmp"]


def test_images_and_options_that_are_wrong(ours: Place) -> None:
    image, path = ours.tree.image, ours.stage.path
    wrong = ours.tree._replace(image=CFSFUSE)
    none = ours.tree._replace(image=f"{path}/none")
    ours.fails(BAD, ".*/none: image: cannot be opened: No such file or directory", "--root", "--", "true", tree=none)
    ours.fails(BAD, ".*: image: .*", "--root", "--", "true", tree=wrong)
    ours.fails(BAD, f"{image}: the image's .* not {'0' * 64} .*", "--root", "--", "true", options="digest=" + "0" * 64)
    said = "kernel backend: (only root outside of user namespaces may mount EROFS|this kernel has no EROFS: .*)"
    ours.fails(IMPOSSIBLE, said, "--root", "--backend=kernel", "--", "true", options="noverity")
    said = r"--writable and upperdir= are two places for what is written: give one of them"
    options = f"upperdir={path}/u,workdir={path}/w"
    ours.fails(USAGE, said, "--root", "--writable", "--", "true", options=options)
    ours.fails(USAGE, f"{path}/u: upperdir: No such file or directory", "--root", "--", "true", options=options)


def test_no_place_for_temporary_files(ours: Place) -> None:
    script = "import sys, tempfile; from cfsfuse.cli.main import main; tempfile.tempdir = '/none'; sys.exit(main())"
    done = ours.stage.run(sys.executable, "-c", script, *ours.words("--root", "--", "true")[1:])
    assert (done.returncode, done.stdout) == (IMPOSSIBLE, "")
    assert (
        done.stderr == "cfsfuse: no temporary directory: No such file or directory; name a place for it with TMPDIR\n"
    )
