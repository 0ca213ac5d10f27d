"""A whole Debian as the root of a command, for an ordinary user: its own tools find nothing wrong with it.

debootstrap(8) makes it once, of the suite and from the mirror that this machine's apt is set up with; it stays beside
the oracles in $XDG_CACHE_HOME/cfsfuse-oracles.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from typing import TYPE_CHECKING

import platformdirs
import pytest

from integration.debian import Unavailable, keyring, locked, mirror, reason
from integration.mounts import CFSFUSE, ORDINARY, SELF, mount_in_private_namespace, require
from integration.test_run import Place, Tree, prepared, snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

_SCRIPTS = "/usr/share/debootstrap/scripts"
_BOOTSTRAP_TIMEOUT = 1500  # seconds; a minute and some megabytes where the mirror is near
_DOCUMENT = "usr/share/doc/dpkg/copyright"
_PROGRAM = "usr/bin/dpkg-split"

SCRIPT = """
import os, sys
total = 0
for folder, _, names in os.walk("/usr/lib"):
    for name in names:
        path = os.path.join(folder, name)
        if not os.path.islink(path):
            with open(path, "rb") as file:
                total += len(file.read())
print(os.getuid(), sys.prefix, total)
"""


def suite() -> str:
    """Return the suite that apt is set up with: its updates and the like are suites as well, but no whole ones."""
    command = ["apt-get", "indextargets", "--format", "$(CODENAME)"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    known = [name for name in names if os.path.exists(os.path.join(_SCRIPTS, name))]
    if not known:
        raise Unavailable("apt is configured with no suite that debootstrap knows")
    return known[0]


def bootstrap(cache: str, root: str, name: str) -> None:
    """Make the system in a folder that gets the name `root` once it is complete."""
    partial = tempfile.mkdtemp(prefix=".partial-", dir=cache)
    try:
        made = os.path.join(partial, "root")
        options = ["--variant=minbase", "--include=python3-minimal", f"--keyring={keyring()}"]
        command = [require("debootstrap"), *options, name, made, mirror()]
        # It mounts /proc in there: in a namespace of its own nothing of that can stay.
        subprocess.run(
            [*mount_in_private_namespace(), *command], check=True, capture_output=True, timeout=_BOOTSTRAP_TIMEOUT
        )
        os.rename(made, root)
    finally:
        shutil.rmtree(partial)


def debian() -> str:
    """Return the directory of the system, made when it is not kept from an earlier run; skip where it cannot be."""
    if SELF.uid != 0:
        pytest.skip("debootstrap: needs root")
    for program in ("debootstrap", "apt-get"):
        require(program)
    cache = platformdirs.user_cache_dir("cfsfuse-oracles")
    try:
        name = suite()
        root = os.path.join(cache, f"debian-{name}-{os.uname().machine}")
        with locked(cache):
            if not os.path.exists(root):
                bootstrap(cache, root, name)
    except (OSError, subprocess.SubprocessError, Unavailable) as error:
        said = error if isinstance(error, Unavailable) else reason(error)
        pytest.skip(f"debootstrap: {said}")
    return root


@pytest.fixture(scope="module")
def system(workspace: str) -> Iterator[Tree]:
    """An image of it that everybody can read."""
    source = debian()
    directory = os.path.join(workspace, "debian")
    made = Tree(os.path.join(directory, "image.cfs"), os.path.join(directory, "store"), source)
    os.mkdir(directory)
    subprocess.run([CFSFUSE, "mk", f"--digest-store={made.store}", source, made.image], check=True, capture_output=True)
    subprocess.run(["chmod", "-R", "a+rX", directory], check=True)
    before = snapshot(made.image, made.store)
    yield made
    assert snapshot(made.image, made.store) == before
    shutil.rmtree(directory)


@pytest.fixture
def place(system: Tree) -> Iterator[Place]:
    with prepared(ORDINARY, system) as made:
        yield made


MODES = pytest.mark.parametrize("options", ["", "noverity", "backend=fuse"], ids=["default", "noverity", "fuse"])


@MODES
def test_its_programs_run(place: Place, options: str) -> None:
    assert place.sh(". /etc/os-release; echo $ID; id -u; command -v apt-get", options=options) == (
        "debian\n0\n/usr/bin/apt-get\n"
    )
    done = place.run("--root", "--", "python3", "-c", SCRIPT, options=options)
    assert (done.returncode, done.stderr) == (0, "")
    library = os.path.join(place.tree.source, "usr/lib")
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(library) for name in names]
    total = sum(os.stat(path).st_size for path in paths if not os.path.islink(path))
    assert done.stdout == f"0 /usr {total}\n"


@MODES
def test_its_packages_are_as_they_were_made(place: Place, options: str) -> None:
    done = place.run("--root", "--", "dpkg", "--verify", options=options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


CHANGES = f"""
set -e
rm /{_DOCUMENT}; echo other >>/{_PROGRAM}; mkdir /srv/new; echo new >/srv/new/file
dpkg --verify
cat /srv/new/file; test ! -e /{_DOCUMENT}
"""


@MODES
def test_what_is_changed_is_noticed_and_forgotten(place: Place, options: str) -> None:
    before = snapshot(place.tree.image, place.tree.store)
    assert len(before) > 1000
    done = place.run("--root", "--writable", "--", "sh", "-c", CHANGES, options=options)
    assert (done.returncode, done.stderr) == (0, "")
    *found, last = done.stdout.splitlines()
    assert sorted(line.split()[-1] for line in found) == [f"/{_PROGRAM}", f"/{_DOCUMENT}"]
    assert {line.split()[0] for line in found} == {"??5??????", "missing"}
    assert last == "new"
    assert snapshot(place.tree.image, place.tree.store) == before
    assert place.sh("dpkg --verify; ls /srv", "--writable", options=options) == ""
