"""In a sandbox of bubblewrap: what `mount`, `run` and `doctor` do there, or say.

It takes all capabilities, and what privileges could be gained by set-user-ID programs; of devices it has what it is
given. An ordinary user may still make a user namespace in it, unless it forbids that, too.
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from integration.mounts import CFSFUSE, ORDINARY, SELF, Stage, User, noise, require, stage

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

IMPOSSIBLE = 4
CONTENT = noise(10_000, "sandbox")
DEVICE = ("--dev-bind", "/dev/fuse", "/dev/fuse")
NO_NAMESPACES = ("--unshare-user", "--disable-userns")

NO_ADMIN = "needs CAP_SYS_ADMIN: "
NO_EROFS = "only root outside of user namespaces may mount EROFS"
NO_PRIVILEGES = "fusermount3 has no privileges here (no_new_privs): "
NO_DEVICE = "/dev/fuse: not there; "
NO_ROOT = "cfsfuse: namespaces: root needs CAP_SETFCAP to make them where it has no CAP_SYS_ADMIN: "
FORBIDDEN = (
    "cfsfuse: namespaces: no more may be made; "
    "this container forbids them: allow user namespaces in it, or run outside\n"
)


class Sandbox(NamedTuple):
    """A sandbox, as the words before a command, and a stage with an image for it."""

    words: tuple[str, ...]
    stage: Stage

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `cfsfuse`, and see that nothing is left of it."""
        done = self.stage.run(*self.words, CFSFUSE, *words)
        assert self.stage.is_clean(), done
        return done

    def mount(self, *options: str) -> str:
        """Run `cfsfuse mount`, which must not be possible; return the line that says why."""
        done = self.run("mount", *self.stage.words("backend=auto", *options))
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (IMPOSSIBLE, "", 1), done
        return done.stderr

    def run_command(self, *words: str, options: str = "") -> subprocess.CompletedProcess[str]:
        given = f"basedir={self.stage.store},log={self.stage.log}" + options
        return self.run("run", self.stage.image, "-o", given, *words)

    def doctor(self) -> dict[str, Any]:
        """Return what `cfsfuse doctor` finds."""
        done = self.run("doctor", "--json", self.stage.image, "-o", f"basedir={self.stage.store}")
        assert (done.returncode, done.stderr) == (0, ""), done
        return dict(json.loads(done.stdout))


@contextlib.contextmanager
def sandbox(user: User | None, *options: str) -> Iterator[Sandbox]:
    """Yield a sandbox of `user`; skip, by name, where bubblewrap is missing or cannot make it."""
    words = (require("bwrap"), "--bind", "/", "/", "--dev", "/dev", *options, "--cap-drop", "ALL", "--")
    with stage(user) as made:
        tried = made.run(*words, "true")
        if tried.returncode:
            pytest.skip(f"bwrap {' '.join(options)}: {tried.stderr.strip()}")
        recipe = made.recipe()
        recipe.file("/file", CONTENT)
        recipe.build(made.image)
        yield Sandbox(words, made)


USERS = pytest.mark.parametrize("user", [SELF if SELF.uid == 0 else None, ORDINARY], ids=["root", "ordinary"])
KINDS = pytest.mark.parametrize(
    "options",
    [DEVICE, (), (*DEVICE, *NO_NAMESPACES), NO_NAMESPACES],
    ids=["device", "nothing", "device-no-namespaces", "nothing-no-namespaces"],
)


@USERS
@KINDS
def test_mount_says_why_not(user: User | None, options: tuple[str, ...]) -> None:
    """Each backend that there is, with its own reason: of those that could be tried, none is passed over in silence."""
    with sandbox(user, *options) as made:
        for verification in ("tryverity", "noverity"):
            said = made.mount(verification)
            reasons = dict(re.findall(r"(kernel|overlay|fuse) backend: (.*?)(?=; \w+ backend: |\n)", said))

            assert reasons["overlay"].startswith(NO_ADMIN if "/dev/fuse" in options else NO_DEVICE)
            assert reasons["fuse"].startswith(NO_PRIVILEGES if "/dev/fuse" in options else NO_DEVICE)


@USERS
@KINDS
def test_doctor_says_the_same(user: User | None, options: tuple[str, ...]) -> None:
    with sandbox(user, *options) as made:
        found = made.doctor()
        facts = found["facts"]
        assert facts["mount"].startswith(NO_ADMIN)
        assert facts["kernel_view"] is not None
        assert facts["fuse_mount"].startswith(NO_PRIVILEGES)
        if "/dev/fuse" in options:
            assert facts["fuse"] is None
        else:
            assert facts["fuse"].startswith(NO_DEVICE)
        for backends in found["backends"].values():
            assert list(backends) == ["kernel", "overlay", "fuse"]
            assert all(backends.values())  # problems with each of them
            assert (facts["fuse"] in backends["fuse"]) == ("/dev/fuse" not in options)


@pytest.mark.parametrize("options", ["", ",noverity"])
def test_run_needs_the_device_alone(options: str) -> None:
    with sandbox(ORDINARY, *DEVICE) as made:
        done = made.run_command("--at", made.stage.mountpoint, "--", "cat", made.stage.at("file"), options=options)
        assert (done.returncode, done.stderr) == (0, "")
        script = 'cat "$0" | wc -c; rm "$0"; echo new >"$0"; cat "$0"'
        words = ("--at", made.stage.mountpoint, "--writable", "--", "sh", "-c", script, made.stage.at("file"))
        done = made.run_command(*words, options=options)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{len(CONTENT)}\nnew\n", "")


def test_run_as_root_needs_one_capability_more() -> None:
    """To let root of a user namespace be root outside takes CAP_SETFCAP: with it, it does."""
    with sandbox(SELF if SELF.uid == 0 else None, *DEVICE) as made:
        done = made.run_command("--at", made.stage.mountpoint, "--", "true")
        assert (done.returncode, done.stdout) == (IMPOSSIBLE, "")
        assert done.stderr.startswith(NO_ROOT)
        able = made._replace(words=(*made.words[:-1], "--cap-add", "CAP_SETFCAP", "--"))
        done = able.run_command("--at", made.stage.mountpoint, "--", "ls", made.stage.mountpoint)
        assert (done.returncode, done.stdout, done.stderr) == (0, "file\n", "")


@pytest.mark.parametrize("options", ["", ",noverity"])
def test_run_without_the_device(options: str) -> None:
    with sandbox(ORDINARY) as made:
        done = made.run_command("--at", made.stage.mountpoint, "--", "true", options=options)
        assert (done.returncode, done.stdout) == (IMPOSSIBLE, "")
        missing = re.escape(NO_DEVICE) + "[^;]*"
        expected = f"cfsfuse: kernel backend: .*; overlay backend: {missing}; fuse backend: {missing}\n"
        assert re.fullmatch(expected, done.stderr), done.stderr


@USERS
@pytest.mark.parametrize("options", [(*DEVICE, *NO_NAMESPACES), NO_NAMESPACES], ids=["device", "nothing"])
def test_run_where_namespaces_are_forbidden(user: User | None, options: tuple[str, ...]) -> None:
    with sandbox(user, *options) as made:
        for words in (("--root",), ("--at", made.stage.mountpoint), ("--root", "--writable")):
            done = made.run_command(*words, "--", "true")
            assert (done.returncode, done.stdout, done.stderr) == (IMPOSSIBLE, "", FORBIDDEN)
