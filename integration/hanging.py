"""A FUSE server that reads every request and answers none: what asks it anything hangs, and SIGKILL does not help."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from cfsfuse.mount import syscalls
from cfsfuse.mount.mountinfo import mount_at

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Mounts at its last argument, is ready when the command returns, and leaves the server in the background. Only
# FUSE_INIT, opcode 26, is answered; include/uapi/linux/fuse.h. Needs CAP_SYS_ADMIN. The server prints its pid.
SCRIPT = """
import ctypes, os, struct, sys
fuse = os.open("/dev/fuse", os.O_RDWR)
data = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
assert ctypes.CDLL(None).mount(b"hanging", os.fsencode(sys.argv[-1]), b"fuse.hanging", ctypes.c_ulong(1), data) == 0
ready, done = os.pipe()
pid = os.fork()
if pid:
    os.close(done)
    os.read(ready, 1)
    print(pid)
    sys.exit()
os.setsid()
null = os.open("/dev/null", os.O_RDWR)
for stream in range(3):
    os.dup2(null, stream)
while True:
    request = os.read(fuse, 1 << 17)
    _, opcode, unique = struct.unpack_from("<IIQ", request)
    if opcode == 26:
        answer = struct.pack("<IIIIHHIIH34x", 7, 31, 0, 0, 12, 9, 4096, 1, 0)
        os.write(fuse, struct.pack("<IiQ", 16 + len(answer), 0, unique) + answer)
        os.close(done)
"""


@contextlib.contextmanager
def hanging(mountpoint: str) -> Iterator[int]:
    """Have a mount that hangs for a while; yield the pid of its server."""
    command = [sys.executable, "-c", SCRIPT, mountpoint]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=30, check=True)
    server = int(done.stdout)
    try:
        yield server
    finally:
        os.kill(server, signal.SIGKILL)
        if mount_at(mountpoint) is not None:
            syscalls.umount(mountpoint, syscalls.MNT_DETACH)


def anybody_waits(pids: Iterable[int]) -> bool:
    """Return whether one of the processes waits for the answer of a FUSE server; proc_pid_wchan(5), for root."""
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/wchan", encoding="ascii") as file:
            if file.read() == "request_wait_answer":
                return True
    return False
