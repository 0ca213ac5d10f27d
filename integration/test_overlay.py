"""The overlay backend, and FUSE below an overlay that takes changes: the same view, the same life, nothing left."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

import pytest

from cfsfuse.contract import justified
from cfsfuse.contract.checks import CHECKS
from cfsfuse.contract.entries import walk
from cfsfuse.contract.justified import Justified
from cfsfuse.contract.observe import FORBIDDEN, Failure
from cfsfuse.mount.options import SESSIONS
from integration.conftest import ROOT, Account, Log
from integration.holding import Pair, hold, missing_objects, oracle_mount
from integration.inside import Inside, namespaces
from integration.mounts import (
    CFSFUSE,
    ORDINARY,
    SELF,
    Stage,
    User,
    digest_of,
    drop_caches,
    eventually,
    flip,
    noise,
    put_object,
    running,
    stage,
    wait_mounted,
)
from integration.test_contract import _MISSING, IMAGES, VARIANT_CHECKS, VARIANTS, _claim
from integration.test_kernel import IMPOSSIBLE, USAGE, explained

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cfsfuse.contract.entries import Entry
    from integration.conftest import Mounter
    from integration.images import TestImage

OVERLAY = ("backend=overlay", "noverity")
CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONTENT = noise(10_000, "overlay backend")

# The contract ---------------------------------------------------------------------------------------------------------


def _is_special(entry: Entry, found: object, _: object) -> bool:
    return found == FORBIDDEN and not (entry.is_regular or entry.is_directory or entry.is_symlink)


def _has_no_acls(_: Entry, found: object, expected: object) -> bool:
    return (found, expected) == (Failure("ENOTSUP"), Failure("ENODATA"))


def _is_refused(_: Entry, found: object, expected: object) -> bool:
    return found == Failure("EINVAL") and isinstance(expected, bytes)


_BARE = (
    "the VFS refuses the bare prefix of a name space that overlayfs keeps for itself, which is this one by `userxattr`"
)
_ACL = (
    "a mount of a user namespace has no form for an ACL about ids that this does not map; FUSE then refuses all of it"
)
_NO_ACLS = "FUSE of a user namespace has ACLs only if the server asks for them, and of an image without any it does not"
_OWNER = (
    "nobody may write to what belongs to ids that the mount's user namespace does not map, a socket or pipe included"
)

# Two mounts of the kernel's always differ in the first ones; statfs is told by our server, through overlayfs, too.
OF_OVERLAY = (
    *(known for known in justified.JUSTIFIED if known.what in ("*st_dev", "*st_blocks") or known.check == "statfs"),
    *(known for known in justified.JUSTIFIED if known.check in ("direct", "open")),
    Justified("xattrs-absent", "user.overlay.", _BARE),
)
OF_FUSE = justified.JUSTIFIED
OF_USER_NAMESPACE = (Justified("xattrs-absent", "system.posix_acl_*", _NO_ACLS, _has_no_acls),)
OF_UNMAPPED_IDS = (
    Justified("xattrs*", "*system.posix_acl_*", _ACL, _is_refused),
    *(Justified(check, "*", _OWNER, _is_special) for check in ("open", "special", "access")),
)


class Held(NamedTuple):
    """Two mounts, and all that is right although it differs."""

    pair: Pair
    known: tuple[Justified, ...]

    def hold(self, check: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(justified, "JUSTIFIED", self.known)
            hold(self.pair, check)


@pytest.fixture(scope="module")
def held(request: pytest.FixtureRequest, images_at: Callable[[str], TestImage], workspace: str) -> Iterator[Held]:
    """The mount of the overlay backend and the oracle's, of the image and for the user that the test is for."""
    name, looking = request.param
    account = ROOT if looking == "root" else request.getfixturevalue("ordinary")
    mounter: Mounter = request.getfixturevalue("mounter")
    image = images_at(name)
    oracle = os.path.join(workspace, "overlay-oracle")
    os.makedirs(oracle, exist_ok=True)
    with oracle_mount(image, oracle), mounter.mounted(image, ROOT, OVERLAY) as mount:
        entries = list(walk(os.fsencode(oracle)))
        missing = missing_objects(oracle, entries)
        yield Held(Pair(mount.path, oracle, account, entries, missing, mount.log.new_complaints), OF_OVERLAY)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "held", list(itertools.product(IMAGES, ("root", "user"))), indirect=True, scope="module", ids="-".join
)
def test_is_as_the_kernel_has_it(held: Held, check: str) -> None:
    held.hold(check)


@pytest.mark.parametrize("check", VARIANT_CHECKS)
@pytest.mark.parametrize("held", [(name, "root") for name in VARIANTS], indirect=True, scope="module", ids="-".join)
def test_contents_are_as_the_kernel_has_them(held: Held, check: str) -> None:
    held.hold(check)


# The contract, in a user namespace ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone() -> Iterator[Inside]:
    with namespaces(has_subordinates=False) as made:
        yield made


@pytest.fixture(scope="module")
def rootless() -> Iterator[Inside]:
    with namespaces(has_subordinates=True) as made:
        yield made


@pytest.fixture(scope="module")
def held_inside(
    request: pytest.FixtureRequest, images_at: Callable[[str], TestImage], workspace: str
) -> Iterator[Held]:
    """A mount that was made inside, and the oracle's, seen from inside; its owners are mapped as those inside are."""
    name, kind, backend = request.param
    inside: Inside = request.getfixturevalue(kind)
    image = images_at(name)
    outside = os.path.join(workspace, "oracle-outside")
    os.makedirs(outside, exist_ok=True)
    basedir = f"basedir={':'.join(image.base_directories)}"
    chosen = OVERLAY if backend == "overlay" else ("backend=fuse", f"session={backend}", *image.options)
    known = OF_OVERLAY if backend == "overlay" else OF_FUSE
    known += OF_USER_NAMESPACE + (OF_UNMAPPED_IDS if kind == "alone" else ())
    with oracle_mount(image, outside), stage(inside.user) as made:
        entries = list(walk(os.fsencode(outside)))
        missing = missing_objects(outside, entries)
        oracle = made.directory("oracle")
        options = f"backend=kernel,noverity,idmap={inside.idmap},{basedir}"
        subprocess.run([*inside.real_root.prefix, CFSFUSE, "mount", image.path, oracle, "-o", options], check=True)
        made.mount(*chosen, basedir, image=image.path)
        log = Log(made.log)
        log.claims = _claim(missing)
        account = Account(inside.user.uid, inside.user.gid)
        pair = Pair(made.mountpoint, oracle, account, entries, missing, log.new_complaints, inside.become)
        yield Held(pair, known)
        made.unmount()
        assert log.new_complaints() == []
        made.claim(_MISSING.pattern, sum(bool(_MISSING.search(line)) for line in made.log_lines()))
        subprocess.run([*inside.real_root.prefix, "umount", oracle], check=True)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "held_inside",
    list(itertools.product(IMAGES, ("alone", "rootless"), ("overlay", *SESSIONS))),
    indirect=True,
    scope="module",
    ids="-".join,
)
def test_is_as_the_kernel_has_it_in_a_user_namespace(held_inside: Held, check: str) -> None:
    held_inside.hold(check)


@pytest.mark.parametrize("check", VARIANT_CHECKS)
@pytest.mark.parametrize(
    "held_inside",
    list(itertools.product(VARIANTS, ("alone",), ("overlay", *SESSIONS))),
    indirect=True,
    scope="module",
    ids="-".join,
)
def test_contents_are_as_the_kernel_has_them_in_a_user_namespace(held_inside: Held, check: str) -> None:
    held_inside.hold(check)


# The life of a mount --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def image(user: User | None = SELF) -> Iterator[Stage]:
    with stage(user) as made:
        recipe = made.recipe()
        for directory in ("/dir", "/away", "/away/empty"):
            recipe.directory(directory)
        recipe.file("/dir/file", CONTENT)
        recipe.file("/away/file", noise(5000))
        recipe.file("/other", b"other")
        recipe.redirected("/no-digest", put_object(made.store, noise(3000)), noise(3000), digest=False)
        recipe.inline("/inline", b"in the image\n")
        recipe.build(made.image)
        yield made


def read(made: Stage, name: str = "dir/file", mountpoint: str | None = None) -> bytes:
    with open(os.path.join(mountpoint or made.mountpoint, name), "rb") as file:
        return file.read()


EVERY_KIND = ("overlay", "overlay-writable", "fuse-writable")
WRITABLE = EVERY_KIND[1:]
every_kind = pytest.mark.parametrize("kind", EVERY_KIND)
every_writable = pytest.mark.parametrize("kind", WRITABLE)


@pytest.fixture(params=["root", "alone"])
def made(request: pytest.FixtureRequest) -> Iterator[Stage]:
    """An image of a few files, and the user, with the privileges of mounting, whose stage it is."""
    user = SELF if request.param == "root" else request.getfixturevalue("alone").user
    with image(None if user.uid == SELF.uid != 0 else user) as stage_of_image:
        stage_of_image.give(stage_of_image.image, *_paths(stage_of_image.store))
        yield stage_of_image


def _paths(top: str) -> list[str]:
    return [os.path.join(folder, name) for folder, _, names in os.walk(top) for name in (".", *names)]


def options_of(made: Stage, kind: str) -> tuple[str, ...]:
    """Return the options of a mount of this kind, with an upper layer in the stage if it has one."""
    backend, _, writable = kind.partition("-")
    chosen: tuple[str, ...] = (f"backend={backend}", *(["noverity"] if backend == "overlay" else []))
    if writable:
        layers = [os.path.join(made.path, name) for name in ("upper", "work")]
        for path in layers:
            if not os.path.exists(path):
                made.directory(os.path.basename(path))
        chosen += (f"upperdir={layers[0]}", f"workdir={layers[1]}")
    return chosen


def succeeds(made: Stage, script: str) -> str:
    """Run a shell script at the mountpoint, as the stage's user, and return what it prints."""
    done = made.run("sh", "-ec", f"cd {shlex.quote(made.mountpoint)}\n{script}", cwd="/")
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def kind_of_mount(made: Stage) -> str:
    """Return what stat(1) calls the file system at the mountpoint."""
    return succeeds(made, "stat --file-system --format=%T .").strip()


def sum_of_file(made: Stage) -> str:
    return succeeds(made, "sha256sum <dir/file").split()[0]


SUM = hashlib.sha256(CONTENT).hexdigest()


@every_kind
def test_unmounting_ends_the_daemon(made: Stage, kind: str) -> None:
    for _ in range(3):
        with made.mounted(*options_of(made, kind)):
            assert kind_of_mount(made) == "overlayfs"
            assert sum_of_file(made) == SUM
            assert succeeds(made, "cat inline") == "in the image\n"
        assert made.is_clean()
        assert succeeds(made, "ls") == ""


@every_kind
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_unmounts(made: Stage, kind: str, number: signal.Signals) -> None:
    """The last is for the watcher: whether it succeeds must not depend on who is first."""
    for _ in range(3):
        daemon = made.mount(*options_of(made, kind))
        assert sum_of_file(made) == SUM
        os.kill(daemon, number)
        eventually(lambda: not made.processes(), "the end of all processes")
        assert succeeds(made, "ls") == ""


@every_kind
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_unmounts_what_is_in_use(kind: str, number: signal.Signals) -> None:
    with image() as made:
        daemon = made.mount(*options_of(made, kind))
        # What is served by a daemon that has gone cannot even be closed.
        with contextlib.suppress(OSError), open(made.at("dir/file"), "rb"):
            os.kill(daemon, number)
            eventually(made.is_clean, "the end of mount and processes")
        assert os.listdir(made.mountpoint) == []


@every_kind
def test_a_mount_in_use_is_not_unmounted(kind: str) -> None:
    with image() as made:
        daemon = made.mount(*options_of(made, kind))
        with open(made.at("dir/file"), "rb"):
            done = made.run(CFSFUSE, "umount", made.mountpoint)
            assert (done.returncode, done.stdout) == (IMPOSSIBLE, "")
            said = f"cfsfuse: {made.mountpoint}: in use by .*; end that first, or use --lazy\n"
            assert re.fullmatch(said, done.stderr)
        assert made.daemons() == [daemon]
        assert read(made) == CONTENT
        made.unmount()


@every_kind
def test_a_lazily_unmounted_mount_serves_its_last_user(kind: str) -> None:
    with image() as made:
        made.mount(*options_of(made, kind))
        with open(made.at("dir/file"), "rb", buffering=0) as file:
            assert made.run(CFSFUSE, "umount", "--lazy", made.mountpoint).returncode == 0
            assert os.listdir(made.mountpoint) == []
            drop_caches()
            assert file.read(100) == CONTENT[:100]
            assert len(made.daemons()) == 1
        eventually(made.is_clean, "the daemon's end")


@every_kind
@pytest.mark.parametrize("ending", ["SIGTERM", "umount"])
def test_in_the_foreground(kind: str, ending: str) -> None:
    with image() as made:
        words = made.words(*options_of(made, kind))
        with running(made.start(CFSFUSE, "mount", "-f", *words)) as process:
            wait_mounted(process, made.mountpoint)
            assert read(made) == CONTENT
            if ending == "umount":
                assert made.run(CFSFUSE, "umount", made.mountpoint).returncode == 0
            else:
                process.terminate()
            assert (process.communicate(timeout=20), process.returncode) == (("", ""), 0)
        eventually(made.is_clean, "the end of mount and processes")


@every_kind
def test_two_mounts_of_an_image_at_once(kind: str) -> None:
    with image() as made:
        second = made.directory("second")
        made.mount(*options_of(made, kind))
        made.mount("backend=overlay", "noverity", mountpoint=second)
        already = made.run(CFSFUSE, "mount", *made.words("backend=overlay", "noverity", mountpoint=second))
        assert already.returncode == USAGE
        assert already.stderr.endswith(f"is mounted here already; cfsfuse umount {second}\n")
        assert read(made) == read(made, mountpoint=second) == CONTENT
        made.unmount()
        assert read(made, mountpoint=second) == CONTENT
        made.unmount(second)


def test_space_of_the_file_system(made: Stage) -> None:
    fields = "stat --file-system --format='%b %c %l' ."
    store = made.run("sh", "-c", f"cd {made.store} && {fields}").stdout
    with made.mounted(*options_of(made, "overlay")):
        assert succeeds(made, fields) == store
    with made.mounted(*options_of(made, "overlay"), "statfs=image"):
        blocks, _, longest = succeeds(made, fields).split()
        assert 0 < int(blocks) < 100
        assert longest == "255"
    with made.mounted(*options_of(made, "fuse-writable"), "statfs=image"):
        assert succeeds(made, fields).split()[0] == store.split()[0]  # what is written has that of upperdir


# Changes --------------------------------------------------------------------------------------------------------------

CHANGES = """
echo new >new
mkdir made && echo below >made/below
mv dir/file dir/moved && chmod 600 dir/moved && touch -d @5 dir/moved
printf changed >>other
ln -s new link
rm inline
rm -r away
"""
LOOK = r"find . -mindepth 1 ! -type d -printf '%P %y %m %s %l\n' | sort; stat --format='%Y %a' dir/moved; cat other"
SEEN = f"""\
dir/moved f 600 {len(CONTENT)}{" "}
link l 777 3 new
made/below f 644 6{" "}
new f 644 4{" "}
no-digest f 644 3000{" "}
other f 644 12{" "}
5 600
otherchanged"""


@contextlib.contextmanager
def untouched(made: Stage) -> Iterator[None]:
    """Assert that image and store stay as they are, to the last byte and time."""

    def state() -> dict[str, tuple[int, int, bytes]]:
        found = {}
        for path in (made.image, *_paths(made.store)):
            status = os.stat(path)
            with contextlib.suppress(IsADirectoryError), open(path, "rb") as file:
                found[path] = (status.st_mode, status.st_mtime_ns, file.read())
        return found

    before = state()
    assert before
    yield
    assert state() == before


@every_writable
def test_changes_are_in_upperdir_alone(made: Stage, kind: str) -> None:
    options = options_of(made, kind)
    with untouched(made):
        with made.mounted(*options):
            succeeds(made, CHANGES)
            assert succeeds(made, LOOK) == SEEN
            assert succeeds(made, "sha256sum <dir/moved").split()[0] == SUM
        assert sorted(os.listdir(f"{made.path}/upper")) == ["away", "dir", "inline", "link", "made", "new", "other"]
        with made.mounted(*options):
            assert succeeds(made, LOOK) == SEEN
        with made.mounted(*options, "ro"):
            assert succeeds(made, LOOK) == SEEN
            for change in ("rm new", "chmod 700 dir", "touch dir/moved", ": >file", "mv other others"):
                done = made.run("sh", "-c", f"cd {made.mountpoint}; {change}")
                assert (done.returncode != 0, "Read-only file system" in done.stderr) == (True, True)
        with made.mounted("backend=fuse"):
            assert sum_of_file(made) == SUM
            assert succeeds(made, "ls") == "away\ndir\ninline\nno-digest\nother\n"


def test_what_is_below_changes_through_fuse_is_verified() -> None:
    with image() as made:
        name = digest_of(CONTENT).hex()
        options = options_of(made, "fuse-writable")
        flip(made.object(f"{name[:2]}/{name[2:]}"), 5000)
        with made.mounted(*options):
            with pytest.raises(OSError, match="Input/output error"):
                read(made)
            with pytest.raises(OSError, match="Input/output error"):
                os.truncate(made.at("dir/file"), 100)
            assert not os.path.exists(f"{made.path}/upper/dir/file")
            os.unlink(made.at("dir/file"))
            with open(made.at("dir/file"), "wb") as file:
                file.write(b"another")
            assert read(made) == b"another"
        made.claim(r"ERROR /dir/file: object .*: fs-verity digest: ")


def test_verity_holds_below_changes_through_fuse() -> None:
    with image() as made:
        with made.mounted(*options_of(made, "fuse-writable"), "verity"):
            assert read(made) == CONTENT
            with pytest.raises(OSError, match="Input/output error"):
                read(made, "no-digest")
            os.unlink(made.at("no-digest"))
        made.claim(r"ERROR /no-digest: ")


def test_a_flipped_byte_is_shown_without_verification() -> None:
    """The contents of the overlay backend come from the store itself."""
    with image() as made:
        name = digest_of(CONTENT).hex()
        flip(made.object(f"{name[:2]}/{name[2:]}"), 5000)
        with made.mounted(*options_of(made, "overlay")):
            assert [at for at, byte in enumerate(read(made)) if byte != CONTENT[at]] == [5000]


# The choice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("who", "options", "chosen", "kind"),
    [
        ("root", ("noverity",), "kernel", "overlayfs"),
        ("root", (), "fuse", "fuseblk"),
        ("root", ("noverity", "uid=0"), "overlay", "overlayfs"),
        ("root", ("noverity", "noallow_other"), "fuse", "fuseblk"),
        ("alone", ("noverity",), "overlay", "overlayfs"),
        ("alone", (), "fuse", "fuseblk"),
        ("rootless", ("noverity",), "overlay", "overlayfs"),
        ("user", ("noverity",), "fuse", "fuseblk"),
        ("user", (), "fuse", "fuseblk"),
    ],
)
def test_auto_chooses_the_first_that_keeps_the_promise(
    request: pytest.FixtureRequest, who: str, options: tuple[str, ...], chosen: str, kind: str
) -> None:
    """None of the objects here has fs-verity, so that only FUSE verifies."""
    known = {"root": SELF, "user": ORDINARY}
    user = known[who] if who in known else request.getfixturevalue(who).user
    with image(user) as made:
        lines = explained(made, *options)
        assert [line.split()[0] for line in lines if line.endswith(" chosen")] == [chosen]
        assert kind_of_mount(made) == kind
        assert sum_of_file(made) == SUM
        if chosen == "kernel":
            assert made.processes() == []
            assert made.run(CFSFUSE, "umount", made.mountpoint).returncode == 0
        else:
            made.unmount()


@every_writable
def test_what_only_overlayfs_refuses(kind: str) -> None:
    """Layers where nothing can be written: the server is there already, and has to go."""
    with image() as made:
        backend, *rest = options_of(made, kind)[:2]
        verification = rest if rest == ["noverity"] else []
        words = made.words(backend, *verification, "upperdir=/proc/sys", "workdir=/proc/tty")
        done = made.run(CFSFUSE, "mount", *words)
        assert (done.returncode, done.stdout) == (IMPOSSIBLE, "")
        assert re.fullmatch(f"cfsfuse: {made.mountpoint}: the kernel does not mount this: .*\n", done.stderr)
        eventually(made.is_clean, "the end of the server")


# A failure at each system call ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EIO, errno.EPERM], ids=errno.errorcode.get)
@pytest.mark.parametrize("kind", [*EVERY_KIND, "fuse"])
def test_a_failure_at_any_system_call_leaves_nothing(kind: str, number: int) -> None:
    with image() as made:
        options = options_of(made, kind)
        backend = options[0].removeprefix("backend=")
        words = made.words(*options)
        calls, fails_at = 1, -1
        while fails_at < calls:
            script = [sys.executable, "-m", "integration.failing_mount", str(fails_at), str(number)]
            done = made.run(*script, *words[:2], backend, words[3], cwd=CHECKOUT)
            assert (done.returncode, done.stderr) == (0, ""), done
            told = json.loads(done.stdout)
            if told["said"] is None:
                # Overlayfs is asked for what it must refuse; everything else is needed.
                assert fails_at == -1 or "no such parameter" in told["failed"], told
                calls = told["count"]
                assert read(made) == CONTENT
                made.unmount()
            else:
                assert "\n" not in told["said"]
                assert os.strerror(number) in told["said"], told
            eventually(made.is_clean, f"an end without leftovers after {told}")
            fails_at += 1
        assert calls > (0 if kind == "fuse" else 10)
