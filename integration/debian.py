"""Debian packages of any suite: downloaded and unpacked, not installed.

The mirror is the one that this machine's apt is set up with. Nothing of the machine's own apt is touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import re
import shutil
import subprocess
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_KEYRINGS = ("debian-archive-keyring.gpg", "debian-archive-keyring.pgp")
_COMPLETE = "versions"  # the file that is written last
_TIMEOUT = 300  # seconds, for each call of apt


class Unavailable(Exception):
    """Packages cannot be had here; the text says which, and why."""


@contextlib.contextmanager
def suite(name: str, cache: str) -> Iterator[Apt]:
    """Yield apt on a suite, its lists just downloaded, with the folder `cache` to itself; raise Unavailable."""
    with locked(cache):
        for left in glob.glob(os.path.join(cache, ".partial-*")):  # of a run that was interrupted: we hold the lock
            shutil.rmtree(left)
        state = tempfile.mkdtemp(prefix=".partial-", dir=cache)
        try:
            apt = Apt(name, state)
            apt.get("update")
            yield apt
        except (OSError, subprocess.SubprocessError) as error:
            raise Unavailable(f"packages of {name}: {reason(error)}") from None
        finally:
            shutil.rmtree(state)


@contextlib.contextmanager
def locked(cache: str) -> Iterator[None]:
    """Let one process at a time into the cache."""
    os.makedirs(cache, exist_ok=True)
    with open(os.path.join(cache, "lock"), "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def versions(root: str) -> dict[str, str] | None:
    """Return the packages that were unpacked into `root`, with their versions; None when that is not complete."""
    try:
        with open(os.path.join(root, _COMPLETE), encoding="ascii") as file:
            return dict(line.split() for line in file)
    except FileNotFoundError:
        return None


class Apt:
    """apt on another suite, with all its state below `state`."""

    def __init__(self, name: str, state: str) -> None:
        self._state = state
        lists, cache = os.path.join(state, "lists"), os.path.join(state, "cache")
        os.makedirs(os.path.join(lists, "partial"))
        os.makedirs(os.path.join(cache, "archives/partial"))
        sources = os.path.join(state, "sources.list")
        with open(sources, "w", encoding="ascii") as file:
            file.write(f"deb [signed-by={keyring()}] {mirror()} {name} main\n")
        settings = {
            "Dir::State::Lists": lists,
            "Dir::Etc::SourceList": sources,
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::Cache": cache,
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
        }
        self._options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]

    def get(self, *words: str, cwd: str | None = None) -> None:
        self._run("apt-get", "-qq", *words, cwd=cwd)

    def depends(self, package: str) -> list[str]:
        """Return the names of the packages that `package` depends on."""
        return re.findall(r"^ *\|?Depends: (\S+)$", self._run("apt-cache", "depends", package), re.MULTILINE)

    def unpack(self, packages: Iterable[str], root: str) -> None:
        """Download packages and unpack them into a folder that gets the name `root` once it is complete."""
        debs, unpacked = os.path.join(self._state, "debs"), os.path.join(self._state, "root")
        os.makedirs(debs)
        self.get("download", *packages, cwd=debs)
        found = [_unpack(deb, unpacked) for deb in sorted(glob.glob(os.path.join(debs, "*.deb")))]
        with open(os.path.join(unpacked, _COMPLETE), "w", encoding="ascii") as file:
            file.writelines(f"{line}\n" for line in found)
        shutil.rmtree(root, ignore_errors=True)
        os.rename(unpacked, root)

    def _run(self, program: str, *words: str, cwd: str | None = None) -> str:
        command = [program, *self._options, *words]
        done = subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=_TIMEOUT)
        return done.stdout


def _unpack(deb: str, into: str) -> str:
    subprocess.run(["dpkg-deb", "-x", deb, into], check=True, capture_output=True)
    show = ["dpkg-deb", "-W", "--showformat=${Package} ${Version}", deb]
    return subprocess.run(show, check=True, capture_output=True, text=True).stdout


def mirror() -> str:
    """Return the address of the Debian mirror that apt is configured with."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    mirrors = [address for address in found if address.rstrip("/").endswith("/debian")]
    if not mirrors:
        raise Unavailable("apt is configured with no Debian mirror")
    return mirrors[0]


def keyring() -> str:
    """Return the file with the keys that sign Debian's archives."""
    paths = [os.path.join("/usr/share/keyrings", name) for name in _KEYRINGS]
    found = next(filter(os.path.exists, paths), None)
    if found is None:
        raise Unavailable(f"{paths[0]}: not there; install debian-archive-keyring")
    return found


def reason(error: OSError | subprocess.SubprocessError) -> str:
    """Return an error with what the failed command has said, on one line."""
    said = error.stderr if isinstance(error, subprocess.CalledProcessError) else b""
    text = said.decode(errors="replace") if isinstance(said, bytes) else said
    return f"{error} {' '.join(text.split())}".strip()
