"""Guests: Debian's cloud kernels under QEMU, emulated, with the host's root as theirs, and what they change forgotten.

`python -m integration.vm.guests KERNEL SCRIPT [DISK…]` runs a program in one.
What has been downloaded stays in $XDG_CACHE_HOME/cfsfuse-vm.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, NamedTuple

import platformdirs

from integration import debian
from integration.vm.initramfs import initramfs, with_script

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

KERNELS = {"5.10": "bullseye", "6.1": "bookworm", "6.12": "trixie", "newest": "sid"}
"""The suite that each kernel is from."""

_ARCHITECTURE = "x86_64"
_MOVING = "sid"
_CACHE = "cfsfuse-vm"
_METAPACKAGE = "linux-image-cloud-amd64"
_QEMU = "qemu-system-x86_64"
_QEMU_SUITE, _QEMU_PACKAGES = "bookworm-backports", ("qemu-system-x86", "qemu-system-common")
_QEMU_SINCE = 10  # guests crash at random in 7.2
# The options of virtiofsd, which has been written twice. Submounts are not announced: overlayfs would not show them.
_VIRTIOFSD = {
    "/usr/libexec/virtiofsd": (
        "--shared-dir=/",
        "--cache=always",
        "--sandbox=chroot",
        "--xattr",
        "--no-announce-submounts",
    ),
    "/usr/lib/qemu/virtiofsd": ("-o", "source=/,cache=always,sandbox=chroot,xattr"),
}
_FIRMWARE = ("/usr/share/qemu", "/usr/share/seabios")
_MEMORY = 1024  # MiB
_PROCESSORS = 2
_STATUS = re.compile(r"^guest-status (\d+)$", re.MULTILINE)
_TOLD = 3000  # characters of the console that are told about a guest that died
_END = 10  # seconds that a process gets to end


class Guest(NamedTuple):
    """What a guest is started from: the program, the kernel, its initramfs, and which packages the kernel is from."""

    qemu: str
    kernel: str
    initramfs: bytes
    packages: dict[str, str]


class Outcome(NamedTuple):
    """How a script has ended in a guest, and what it has printed."""

    status: int
    output: str


class GuestDied(Exception):
    """A guest ended, or was ended, before its script; the text is the last that it said."""


def guest(name: str) -> Guest:
    """Return one of KERNELS, downloaded when it is not there; raise debian.Unavailable where that cannot be."""
    if os.uname().machine != _ARCHITECTURE:
        raise debian.Unavailable(f"the guests are {_ARCHITECTURE}, and use this host's programs, which are not")
    cache = platformdirs.user_cache_dir(_CACHE)
    qemu = _qemu(cache)
    kernel = _kernel(KERNELS[name], cache)
    image = min(glob.glob(f"{kernel}/boot/vmlinuz*") + glob.glob(f"{kernel}/**/lib/modules/*/vmlinuz", recursive=True))
    return Guest(qemu, image, initramfs(kernel, _found("busybox")), debian.versions(kernel) or {})


def boot(guest: Guest, script: bytes, disks: Sequence[str] = (), seconds: float = 300) -> Outcome:
    """Run `script` as root in a guest with `disks` as /dev/vda and so on; raise GuestDied when it does not end.

    Nothing is left running, however this ends.
    """
    with tempfile.TemporaryDirectory(prefix="cfsfuse-vm-") as directory, contextlib.ExitStack() as stack:
        console, output = os.path.join(directory, "console"), os.path.join(directory, "output")
        initrd = os.path.join(directory, "initramfs")
        with open(initrd, "wb") as file:
            file.write(with_script(guest.initramfs, script))
        share = stack.enter_context(_sharing(directory))
        command = [*_machine(guest, share, [console, output], disks), "-initrd", initrd]
        process = stack.enter_context(_running(command, os.path.join(directory, "qemu")))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        text = _text(output)
        status = _STATUS.search(text)
        if status is None:
            logs = [console, *(os.path.join(directory, name) for name in ("qemu", "virtiofsd")), output]
            said = "\n".join(f"{os.path.basename(log)}: {_text(log)[-_TOLD:]}" for log in logs)
            raise GuestDied(f"exit {process.returncode}; None: it was ended after {seconds} s\n{said}")
        return Outcome(int(status[1]), text[: status.start()])


def _machine(guest: Guest, share: str, serials: Sequence[str], disks: Sequence[str]) -> list[str]:
    command = [guest.qemu, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    for directory in _FIRMWARE:
        command += ["-L", directory]
    # Not KVM, even where there is one: what is seen has to be the same everywhere.
    command += ["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(_PROCESSORS), "-m", str(_MEMORY)]
    command += ["-object", f"memory-backend-memfd,id=memory,size={_MEMORY}M,share=on", "-numa", "node,memdev=memory"]
    command += ["-chardev", f"socket,id=share,path={share}", "-device", "vhost-user-fs-pci,chardev=share,tag=root"]
    for path in serials:
        command += ["-serial", f"file:{path}"]
    for number, path in enumerate(disks):
        drive = f"if=none,id=disk{number},format=raw,cache=unsafe,file={path.replace(',', ',,')}"
        command += ["-drive", drive, "-device", f"virtio-blk-pci,drive=disk{number}"]
    return [*command, "-kernel", guest.kernel, "-append", "console=ttyS0 quiet panic=-1 mitigations=off"]


@contextlib.contextmanager
def _sharing(directory: str) -> Iterator[str]:
    """Share the host's root, read-only also if a guest wants it otherwise; yield the socket at which it is served."""
    path = os.path.join(directory, "share")
    read_only = ["unshare", "--mount", "sh", "-c", 'mount -o remount,bind,ro / && exec "$@"', "sh"]
    with contextlib.ExitStack() as stack:
        # The socket is made here, so that a guest can connect to it at once, and fails when the server has ended.
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path)
            listening.listen()
            command = [*read_only, *_virtiofsd(), f"--fd={listening.fileno()}"]
            stack.enter_context(_running(command, os.path.join(directory, "virtiofsd"), (listening.fileno(),)))
        yield path


def _virtiofsd() -> list[str]:
    for program, options in _VIRTIOFSD.items():
        if os.path.exists(program):
            return [program, *options]
    raise debian.Unavailable(f"{min(_VIRTIOFSD)}: not there; install virtiofsd")


@contextlib.contextmanager
def _running(command: Sequence[str], log: str, fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command as long as the block, and no longer than this process."""
    with open(log, "wb") as file:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=fds,
            process_group=0,  # the terminal's interrupt is for us, who end it
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def _qemu(cache: str) -> str:
    """Return the installed QEMU, or where that is too old, one of backports."""
    installed = _found(_QEMU)
    said = subprocess.run([installed, "--version"], check=True, capture_output=True, text=True).stdout
    version = re.search(r"version (\d+)", said)
    if version is not None and int(version[1]) >= _QEMU_SINCE:
        return installed
    root = os.path.join(cache, "qemu")
    if debian.versions(root) is None:
        with debian.suite(_QEMU_SUITE, cache) as apt:
            apt.unpack(_QEMU_PACKAGES, root)
    return os.path.join(root, "usr/bin", _QEMU)


def _kernel(suite: str, cache: str) -> str:
    """Return where a suite's kernel is unpacked. Which is the newest is asked each time; other suites hardly change."""
    root = os.path.join(cache, f"kernel-{suite}")
    known = debian.versions(root)
    if known is None or suite == _MOVING:
        with debian.suite(suite, cache) as apt:
            packages = _packages(apt)
            if known is None or set(packages) != set(known):
                apt.unpack(packages, root)
    return root


def _packages(apt: debian.Apt) -> list[str]:
    image = next(name for name in apt.depends(_METAPACKAGE) if name.startswith("linux-image-"))
    # From 7.x on that holds nothing itself.
    parts = [name for name in apt.depends(image) if name.startswith(("linux-binary-", "linux-modules-"))]
    return parts or [image]


def _found(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise debian.Unavailable(f"{program}: not installed; .ci/setup kernels does it")
    return path


def main() -> int:
    """Run a program in a guest, and end as it does."""
    parser = argparse.ArgumentParser(prog="python -m integration.vm.guests", description=main.__doc__)
    parser.add_argument("kernel", choices=KERNELS)
    parser.add_argument("script", help="a file, which is copied")
    parser.add_argument("disks", nargs="*", help="images of disks")
    parser.add_argument("--seconds", type=float, default=300, help="how long it may take (%(default)s)")
    arguments = parser.parse_args()
    with open(arguments.script, "rb") as file:
        script = file.read()
    try:
        outcome = boot(guest(arguments.kernel), script, arguments.disks, arguments.seconds)
    except (debian.Unavailable, GuestDied) as error:
        print(error, file=sys.stderr)
        return 4
    print(outcome.output, end="")
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
