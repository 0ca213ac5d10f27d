"""The reference tools of composefs, mkcomposefs and composefs-info, from Debian packages: unpacked, not installed.

`python -m integration.oracles.fetch` fetches them and prints their versions. They exist in sid only, so they come with
sid's own C library and run through its loader. The mirror is the one that this machine's apt is set up with; what has
been downloaded stays in $XDG_CACHE_HOME/cfsfuse-oracles.
"""

from __future__ import annotations

import functools
import glob
import os
import subprocess
import sys
from dataclasses import dataclass

import platformdirs

from integration import debian

_SUITE = "sid"
_PACKAGES = ("composefs", "libcomposefs1", "libc6", "libssl3t64", "libzstd1", "zlib1g")
_TOOL_TIMEOUT = 600  # seconds; a whole system's directory takes a minute


OracleUnavailable = debian.Unavailable
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
        if debian.versions(root) is None:
            with debian.suite(_SUITE, cache) as apt:
                if debian.versions(root) is None:  # another process may just have fetched them
                    apt.unpack(_PACKAGES, root)
    except (OSError, OracleUnavailable) as error:
        raise OracleUnavailable(f"cannot get {', '.join(_PACKAGES)}: {error}") from None
    return Composefs(root, debian.versions(root) or {})


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
