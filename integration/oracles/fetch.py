"""The reference tools of composefs, mkcomposefs and composefs-info, from Debian packages: unpacked, not installed.

`python -m integration.oracles.fetch` fetches them and prints their versions. They exist in sid only, so they come with
sid's own C library and run through its loader. The mirror is the one that this machine's apt is set up with; what has
been downloaded stays in $XDG_CACHE_HOME/cfsfuse-oracles.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import glob
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

import platformdirs

if TYPE_CHECKING:
    from collections.abc import Iterator

_SUITE = "sid"
_PACKAGES = ("composefs", "libcomposefs1", "libc6", "libssl3t64", "libzstd1", "zlib1g")
_KEYRINGS = ("debian-archive-keyring.gpg", "debian-archive-keyring.pgp")
_COMPLETE = "versions"  # the file that is written last
_APT_TIMEOUT = 120  # seconds
_TOOL_TIMEOUT = 600  # seconds; a whole system's directory takes a minute


class OracleUnavailable(Exception):
    """The reference tools cannot be had here; the text says why."""


class ToolFailed(AssertionError):
    """A reference tool ended with an error; the text is what it said."""


@dataclass(frozen=True, slots=True)
class Composefs:
    """The C tools of composefs below `root`; `versions` maps the Debian packages to their versions."""

    root: str
    versions: dict[str, str]

    def mkcomposefs(self, *arguments: str, stdin: bytes = b"") -> bytes:
        """Run mkcomposefs and return what it prints."""
        return self._run("mkcomposefs", *arguments, stdin=stdin)

    def composefs_info(self, *arguments: str) -> bytes:
        """Run composefs-info and return what it prints."""
        return self._run("composefs-info", *arguments)

    def command(self, tool: str) -> list[str]:
        """Return the words that run `tool`."""
        loader = self._only("usr/lib*/ld-linux*.so*")
        libraries = os.path.dirname(self._only("usr/lib/*/libcomposefs.so.1"))
        return [loader, "--library-path", libraries, os.path.join(self.root, "usr/bin", tool)]

    def _run(self, tool: str, *arguments: str, stdin: bytes = b"") -> bytes:
        command = [*self.command(tool), *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, timeout=_TOOL_TIMEOUT, check=False)
        if done.returncode:
            said = done.stderr.decode(errors="replace") or f"status {done.returncode}"
            raise ToolFailed(f"{tool} {' '.join(arguments)}: {said}")
        return done.stdout

    def _only(self, pattern: str) -> str:
        return min(glob.glob(os.path.join(self.root, pattern)))


@functools.cache
def composefs() -> Composefs:
    """Return the tools, downloaded when they are not kept from an earlier run; raise OracleUnavailable."""
    cache = os.path.join(platformdirs.user_cache_dir("cfsfuse-oracles"))
    root = os.path.join(cache, "composefs-" + os.uname().machine)
    try:
        with _locked(cache):
            if not os.path.exists(os.path.join(root, _COMPLETE)):
                _fetch(cache, root)
    except (OSError, subprocess.SubprocessError) as error:
        raise OracleUnavailable(f"cannot get {', '.join(_PACKAGES)} of {_SUITE}: {_reason(error)}") from None
    with open(os.path.join(root, _COMPLETE), encoding="ascii") as file:
        return Composefs(root, dict(line.split() for line in file))


@contextlib.contextmanager
def _locked(cache: str) -> Iterator[None]:
    """Let one process at a time into the cache."""
    os.makedirs(cache, exist_ok=True)
    with open(os.path.join(cache, "lock"), "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(cache: str, root: str) -> None:
    """Download and unpack into a folder that gets the name `root` once it is complete."""
    for left in glob.glob(os.path.join(cache, ".partial-*")):  # of a run that was interrupted: we hold the lock
        shutil.rmtree(left)
    partial = tempfile.mkdtemp(prefix=".partial-", dir=cache)
    try:
        debs, unpacked = os.path.join(partial, "debs"), os.path.join(partial, "root")
        os.makedirs(debs)
        apt = _Apt(os.path.join(partial, "apt"))
        apt.get("update")
        apt.get("download", *_PACKAGES, cwd=debs)
        versions = [_unpack(deb, unpacked) for deb in sorted(glob.glob(os.path.join(debs, "*.deb")))]
        with open(os.path.join(unpacked, _COMPLETE), "w", encoding="ascii") as file:
            file.writelines(f"{line}\n" for line in versions)
        shutil.rmtree(root, ignore_errors=True)
        os.rename(unpacked, root)
    finally:
        shutil.rmtree(partial)


def _unpack(deb: str, into: str) -> str:
    subprocess.run(["dpkg-deb", "-x", deb, into], check=True, capture_output=True)
    show = ["dpkg-deb", "-W", "--showformat=${Package} ${Version}", deb]
    return subprocess.run(show, check=True, capture_output=True, text=True).stdout


class _Apt:
    """apt on another suite, with all its state below `state`: nothing of the machine's own is touched."""

    def __init__(self, state: str) -> None:
        lists, cache = os.path.join(state, "lists"), os.path.join(state, "cache")
        os.makedirs(os.path.join(lists, "partial"))
        os.makedirs(os.path.join(cache, "archives/partial"))
        sources = os.path.join(state, "sources.list")
        with open(sources, "w", encoding="ascii") as file:
            file.write(f"deb [signed-by={_keyring()}] {_mirror()} {_SUITE} main\n")
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
        command = ["apt-get", "-qq", *self._options, *words]
        subprocess.run(command, cwd=cwd, check=True, capture_output=True, timeout=_APT_TIMEOUT)


def _mirror() -> str:
    """Return the address of the Debian mirror that apt is configured with."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    mirrors = [address for address in found if address.rstrip("/").endswith("/debian")]
    if not mirrors:
        raise OracleUnavailable("apt is configured with no Debian mirror")
    return mirrors[0]


def _keyring() -> str:
    paths = [os.path.join("/usr/share/keyrings", name) for name in _KEYRINGS]
    found = next(filter(os.path.exists, paths), None)
    if found is None:
        raise OracleUnavailable(f"{paths[0]}: not there; install debian-archive-keyring")
    return found


def _reason(error: OSError | subprocess.SubprocessError) -> str:
    said = error.stderr if isinstance(error, subprocess.CalledProcessError) else b""
    text = said.decode(errors="replace") if isinstance(said, bytes) else said
    return f"{error} {' '.join(text.split())}".strip()


def main() -> int:
    """Fetch the tools and print what they are."""
    try:
        tools = composefs()
    except OracleUnavailable as error:
        print(f"oracles: {error}", file=sys.stderr)
        return 4
    for package, version in tools.versions.items():
        print(f"{package} {version} ({_SUITE})")
    print(" ".join(tools.command("mkcomposefs")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
