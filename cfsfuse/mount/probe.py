"""What this host has: tried out, not concluded from version numbers. Each problem comes with what would put it right.

What a try changes, it changes in a child process with a mount namespace of its own, so nothing of it is left. What only
some tries need is imported there: a kernel mount takes less time than that.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from cfsfuse.errors import CfsError, HostError
from cfsfuse.mount import namespaces, overlayfs, syscalls
from cfsfuse.mount.layers import Layers
from cfsfuse.mount.options import MountOptions
from cfsfuse.mount.plan import UNTRIED, Fact
from cfsfuse.mount.syscalls import Context, closing
from cfsfuse.privilege import has_no_new_privileges, has_sys_admin

if TYPE_CHECKING:
    from collections.abc import Callable

    from cfsfuse.erofs.reader import Reader
    from cfsfuse.mount.trial import Trial

NOT_LOOKED_AT = "depends on the store: name an image and its basedir"
_CONTENT = b"overlayfs shows this file"
_ALL_WELL = b"\0"
_IN_NAMESPACE = "in a user namespace, as cfsfuse run does"


class Host:
    """Looks at each fact once, when somebody asks.

    `reader` gives the image whose objects, below the directories `basedir`, are meant; without one there are none.
    Where nobody is told of it (`tells`), and overlayfs can do it, no trial mount is made: the mount itself is one.
    """

    def __init__(
        self, reader: Callable[[], Reader] | None = None, basedir: tuple[str, ...] = (), *, tells: bool = True
    ) -> None:
        self._reader = reader
        self._basedir = basedir
        self._tells = tells
        self._known: dict[Fact, str | None] = {}

    def look(self, fact: Fact) -> str | None:
        """Return what is wrong with a fact and what would put it right; None when nothing is."""
        if fact not in self._known:
            try:
                self._known[fact] = self._find_out(fact)
            except OSError as error:
                self._known[fact] = f"cannot be tried out: {error.strerror}"
        return self._known[fact]

    def _find_out(self, fact: Fact) -> str | None:
        if fact is Fact.OBJECTS_VERITY:
            return self._objects()
        if fact is Fact.KERNEL_VIEW and not self._tells and overlayfs.appends_layers():
            return None
        return _TRIES[fact]()

    def _objects(self) -> str | None:
        if self._reader is None:
            return NOT_LOOKED_AT
        from cfsfuse.mount.sample import problem_of_objects

        return problem_of_objects(self._reader(), self._basedir)


def _mount() -> str | None:
    if not has_sys_admin():
        return f"needs CAP_SYS_ADMIN: run as root, or {_IN_NAMESPACE}"
    try:
        with Context("tmpfs") as context:
            os.close(context.mount(syscalls.ATTR_RDONLY))
    except OSError as error:
        return f"this container forbids mounting: {error.strerror}; in namespaces of its own cfsfuse run may do it"
    return None


def _overlay_verity() -> str | None:
    try:
        with Context("overlay") as context:
            if context.takes_anything():
                return overlayfs.NO_VERITY
            context.set("verity", "on")
    except OSError as error:
        if error.errno == errno.ENODEV:
            return "this kernel has no overlayfs: modprobe overlay"
        if error.errno == errno.EPERM:
            return UNTRIED + Fact.MOUNT.value
        return overlayfs.NO_VERITY if error.errno == errno.EINVAL else f"overlayfs: {error.strerror}"
    return None


def _user_overlay() -> str | None:
    """Let overlayfs show a directory, keeping its own xattrs where no privilege is needed for them."""
    return _try_user_overlay(lambda _: None, "that needs Linux 6.15")


def _user_overlay_data() -> str | None:
    """Let it follow a redirect in such an xattr to a data-only layer."""

    def read(mount: int) -> None:
        with closing(os.open("file", os.O_RDONLY | os.O_CLOEXEC, dir_fd=mount)) as fd:
            if os.read(fd, len(_CONTENT) + 1) != _CONTENT:
                raise OSError(errno.EIO, "shows an empty file")

    return _try_user_overlay(read, "that needs Linux 6.16")


def _try_user_overlay(look: Callable[[int], None], needs: str) -> str | None:
    if _mount() is not None:
        return UNTRIED + Fact.MOUNT.value
    try:
        with Context("tmpfs") as context, closing(context.mount(0)) as scratch:
            lower, data = (_made_directory(name, scratch) for name in ("lower", "data"))
            with closing(lower), closing(data):
                _make_redirected_file(lower, data)
                parameters = {"userxattr": None}
                with overlayfs.above(lower, Layers([data], None, None), parameters, MountOptions(), None) as mount:
                    look(mount)
    except overlayfs.TooOldError:
        return f"overlayfs of this kernel does not take descriptors; {needs}"
    except OSError as error:
        return f"overlayfs: {error.strerror}; {needs}"
    return None


def _made_directory(name: str, parent: int) -> int:
    os.mkdir(name, dir_fd=parent)
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=parent)


def _make_redirected_file(lower: int, data: int) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    with closing(os.open("object", flags, 0o644, dir_fd=data)) as fd:
        os.write(fd, _CONTENT)
    with closing(os.open("file", flags, 0o644, dir_fd=lower)) as fd:
        os.ftruncate(fd, len(_CONTENT))
        os.setxattr(fd, "user.overlay.metacopy", b"")
        os.setxattr(fd, "user.overlay.redirect", b"/object")


def _kernel_view() -> str | None:
    """Let the kernel show a tree with one file, and read that."""
    return _try_kernel(lambda trial: trial.read())


def _full_view() -> str | None:
    """Let the kernel show a tree, where overlayfs is old, and look whether that is all of it, and nothing else."""
    return None if overlayfs.appends_layers() else _try_kernel(lambda trial: trial.look())


def _try_kernel(look: Callable[[Trial], None]) -> str | None:
    if _erofs() is not None:
        return UNTRIED + Fact.EROFS.value
    import tempfile

    from cfsfuse.mount.trial import Trial

    with tempfile.TemporaryDirectory(prefix="cfsfuse-probe-") as directory:
        trial = Trial(directory)
        return _in_child(lambda: look(trial))


def _erofs() -> str | None:
    """Return why EROFS cannot be mounted at all; without a source, the kernel gets no further than to tell."""
    try:
        with Context("erofs") as context:
            os.close(context.mount(syscalls.ATTR_RDONLY))
    except OSError as error:
        return _NO_EROFS.get(error.errno or 0)
    return None


_NO_EROFS = {
    errno.ENODEV: "this kernel has no EROFS: modprobe erofs",
    errno.EPERM: "only root outside of user namespaces may mount EROFS",
}


def _in_child(run: Callable[[], None]) -> str | None:
    """Run in a child process, whose namespaces go with it; return what it raises, as text."""
    from cfsfuse.processes import fork

    reading, writing = os.pipe()
    pid = fork()
    if pid == 0:
        os.close(reading)
        try:
            run()
            os.write(writing, _ALL_WELL)
        except (CfsError, OSError) as error:
            os.write(writing, str(error).encode(errors="backslashreplace"))
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    if said == _ALL_WELL:
        return None
    return said.decode() or "the process that tried it has crashed"


def _device() -> str | None:
    from cfsfuse.mount.fusemount import check_device

    try:
        check_device()
    except HostError as error:
        return str(error)
    return None


def _fuse_mount() -> str | None:
    import shutil

    if has_sys_admin():
        return _mount()
    if shutil.which("fusermount3") is None:
        return "fusermount3: not found; install the package fuse3"
    if has_no_new_privileges():
        return f"fusermount3 has no privileges here (no_new_privs): mount outside, or {_IN_NAMESPACE}"
    return None


def _namespaces() -> str | None:
    return _in_child(namespaces.enter)


_TRIES = {
    Fact.EROFS: _erofs,
    Fact.MOUNT: _mount,
    Fact.KERNEL_VIEW: _kernel_view,
    Fact.FULL_VIEW: _full_view,
    Fact.USER_OVERLAY: _user_overlay,
    Fact.USER_OVERLAY_DATA: _user_overlay_data,
    Fact.OVERLAY_VERITY: _overlay_verity,
    Fact.FUSE: _device,
    Fact.FUSE_MOUNT: _fuse_mount,
    Fact.NAMESPACES: _namespaces,
}
