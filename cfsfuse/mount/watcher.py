"""A process that outlives a killed daemon and takes its dead mount away.

fusermount3's own auto_unmount does not always: up to libfuse 3.14 at least it looks at the mount before the kernel has
declared it dead, takes that for somebody else's mount, and leaves it. And through fusermount3 root could not have `dev`
or `suid`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import TYPE_CHECKING

from cfsfuse.errors import HostError
from cfsfuse.mount.mountinfo import mount_at
from cfsfuse.privilege import has_sys_admin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cfsfuse.mount.mountinfo import Mount

# Reads which device is mounted before ours, which is ours, and then a line at the end. At the end of the file instead,
# the daemon has died: its mount is hidden at once, and goes when the last who uses it does, if it is still the topmost
# one there: another mount may have taken its place. When the daemon has died before it could say which is ours, it is
# one that has come since, for whoever mounts there has to wait. $1 is the mount point as mountinfo has it. A shell, for
# it costs a megabyte where a Python would cost ten.
_SCRIPT = """
trap "" INT TERM HUP QUIT
read -r before || exit 0
read -r device && read -r end && exit 0
top=none
while read -r id parent at root point rest; do
    [ "$point" = "$1" ] && top=$at
done </proc/self/mountinfo
shift
[ -n "$device" ] || [ "$top" = "$before" ] || device=$top
[ "$top" = "$device" ] && exec "$@"
"""


@contextlib.contextmanager
def watched(mountpoint: str) -> Iterator[Callable[[Mount], None]]:
    """Yield what tells the watcher of the mount: should this process be killed after that, it is unmounted."""
    unmount = ["umount", "-l"] if has_sys_admin() else ["fusermount3", "-u", "-z"]
    escaped = "".join(f"\\{ord(letter):03o}" if letter in " \t\n\\" else letter for letter in mountpoint)
    command = ["sh", "-c", _SCRIPT, "cfsfuse-watcher", escaped, *unmount, "--", mountpoint]
    try:
        watcher = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # or a Ctrl-\\ for a daemon in the foreground would end the watcher as well
        )
    except OSError as error:
        raise HostError(f"sh: cannot be started to watch over the mount: {error.strerror}") from None

    def say(text: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(watcher.stdin.fileno(), text.encode() + b"\n")  # type: ignore[union-attr]  # a pipe was asked for

    there = mount_at(mountpoint)
    say("none" if there is None else there.device)
    with watcher:
        try:
            yield lambda mount: say(mount.device)
        finally:
            say("")
            say("")
