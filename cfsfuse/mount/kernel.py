"""The kernel's own mount: EROFS shows the metadata, overlayfs above it the contents, from data-only layers.

Neither of the two is attached anywhere before all is well, so an error leaves nothing. Where the kernel is too old for
that, a temporary directory holds EROFS as long as overlayfs is being put together.

Needs: EROFS (5.4), overlayfs with `metacopy` (4.19); data-only layers (6.5) where there are, else the hidden entries of
the image's root do without; `verity` (6.6). https://docs.kernel.org/filesystems/overlayfs.html
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from typing import TYPE_CHECKING

from cfsfuse.erofs.ondisk import COMPOSEFS_FLAG_HAS_ACL
from cfsfuse.errors import HostError, ImageDigestMismatch, ImageError, UsageError
from cfsfuse.imagefile import beginning, check_digest, mapped, naming, sealed_copy
from cfsfuse.mount import overlayfs, syscalls
from cfsfuse.mount.layers import opened_layers
from cfsfuse.mount.mountinfo import COMPOSEFS_SOURCE
from cfsfuse.mount.mountpoint import check_mountpoint, claimed
from cfsfuse.mount.overlayfs import TooOldError
from cfsfuse.mount.syscalls import Context, closing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from cfsfuse.mount.layers import Layers
    from cfsfuse.mount.options import MountOptions

# What the image's xattrs need.
_PARAMETERS = {"metacopy": "on", "redirect_dir": "on"}
_NS_GET_NSTYPE = 0xB703  # include/uapi/linux/nsfs.h


def mount(image_path: str, mountpoint: str, options: MountOptions) -> None:
    """Mount the image; raise a CfsError, with nothing mounted and no loop device taken."""
    mountpoint = os.path.realpath(mountpoint)
    try:
        with contextlib.ExitStack() as stack:
            image = stack.enter_context(_image(image_path, options.digest))
            has_acl = bool(beginning(image).header.flags & COMPOSEFS_FLAG_HAS_ACL)
            layers = stack.enter_context(opened_layers(options))
            user_namespace = stack.enter_context(_user_namespace(options.idmap)) if options.idmap else None
            stack.enter_context(claimed(mountpoint))
            check_mountpoint(mountpoint)
            erofs = _Erofs(image, has_acl=has_acl, user_namespace=user_namespace)
            try:
                _mount(erofs, layers, mountpoint, options)
            except TooOldError:
                _mount_the_old_way(erofs, layers, mountpoint, options)
    except OSError as error:
        raise HostError(f"{mountpoint}: the kernel does not mount this: {error.strerror}") from None


@contextlib.contextmanager
def _image(path: str, digest: str | None) -> Iterator[int]:
    """Yield a descriptor of the image: of the file itself where that will do, else of a copy that nobody can change.

    A digest holds for the file itself when the kernel enforces it there.
    """
    with naming(path), closing(_open(path)) as fd:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ImageError("image", "not a regular file")
        beginning(fd).require_composefs()
        if digest is None:
            yield fd
            return
        from cfsfuse.verity.ioctl import measure

        measured = measure(fd)
        if measured is None:
            with closing(sealed_copy(fd, path)) as copy:
                check_digest(path, mapped(copy, path), digest)
                yield copy
        elif measured.value.hex() == digest:
            yield fd
        else:
            raise ImageDigestMismatch(path, digest, measured.value.hex())


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise ImageError("image", f"cannot be opened: {error.strerror}") from None


def check_user_namespace(path: str) -> None:
    """Raise UsageError when `path` is no user namespace."""
    with _user_namespace(path):
        pass


@contextlib.contextmanager
def _user_namespace(path: str) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UsageError(f"idmap={path}: {error.strerror}") from None
    with closing(fd):
        try:
            kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
        except OSError:
            kind = 0
        if kind != syscalls.CLONE_NEWUSER:
            raise UsageError(f"idmap={path}: not a user namespace; name one as /proc/PID/ns/user")
        yield fd


class _Erofs:
    """The EROFS mount of an image."""

    def __init__(self, image: int, *, has_acl: bool, user_namespace: int | None) -> None:
        self._image = image
        self._has_acl = has_acl
        self._user_namespace = user_namespace

    @contextlib.contextmanager
    def detached(self) -> Iterator[int]:
        """Yield the descriptor of a mount that is attached nowhere: from the file where the kernel can (6.12)."""
        try:
            mount = self._make(f"/proc/self/fd/{self._image}")
        except OSError as error:
            if error.errno != errno.ENOTBLK:
                raise
            with syscalls.loop_device(self._image) as device:
                mount = self._make(device)
        with closing(mount):
            if self._user_namespace is not None:
                self._map_owners(mount, self._user_namespace)
            yield mount

    def _map_owners(self, mount: int, user_namespace: int) -> None:
        try:
            syscalls.set_idmap(mount, user_namespace)
        except OSError as error:
            raise HostError(
                f"idmap=: the kernel does not map owners so: {error.strerror}; it takes neither the namespace in which "
                "the mount is made, nor one that maps nothing"
            ) from None

    def _make(self, source: str) -> int:
        with Context("erofs") as context:
            context.set("source", source)
            context.set("ro")
            if not self._has_acl:
                # A kernel without ACLs does not know the option, and does not need it.
                with contextlib.suppress(OSError):
                    context.set("noacl")
            return context.mount(syscalls.ATTR_RDONLY)

    @contextlib.contextmanager
    def attached(self) -> Iterator[int]:
        """Yield the descriptor of a mount at a temporary directory: it is there as long as the block runs."""
        with contextlib.ExitStack() as stack:
            import tempfile

            directory = tempfile.mkdtemp(prefix=".composefs.")
            stack.callback(os.rmdir, directory)
            self._attach(directory)
            stack.callback(syscalls.umount, directory, syscalls.MNT_DETACH)
            yield stack.enter_context(closing(os.open(directory, os.O_PATH | os.O_CLOEXEC)))

    def _attach(self, directory: str) -> None:
        try:
            with self.detached() as mount:
                syscalls.move_mount(mount, directory)
        except OSError as error:
            if error.errno != errno.ENOSYS or self._user_namespace is not None:
                raise
            with syscalls.loop_device(self._image) as device:
                syscalls.old_mount(device, directory, "erofs", syscalls.ATTR_RDONLY, "" if self._has_acl else "noacl")


def _mount(erofs: _Erofs, layers: Layers, mountpoint: str, options: MountOptions) -> None:
    try:
        _mount_above(erofs.detached(), layers, mountpoint, options)
    except OSError as error:
        if error.errno == errno.ENOSYS:
            raise TooOldError from None
        if error.errno != errno.EINVAL:
            raise
        # Overlayfs takes no layer that is attached nowhere before 6.15.
        _mount_above(erofs.attached(), layers, mountpoint, options)


def _mount_above(metadata: AbstractContextManager[int], layers: Layers, mountpoint: str, options: MountOptions) -> None:
    verity = overlayfs.VERITY[options.verification]
    with metadata as lower, overlayfs.above(lower, layers, _PARAMETERS, options, verity) as mount:
        syscalls.move_mount(mount, mountpoint)


def _check_nothing_shows(metadata: int, layers: Layers, basedir: tuple[str, ...]) -> None:
    """Raise HostError when the store has a name, at present, that the image's root does not hide.

    Without data-only layers the two are merged. What hides a name is an entry that is no directory: images have one for
    each directory of objects.
    """
    with _listed(metadata) as entries:
        hidden = {entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)}
    for path, fd in zip(basedir, layers.data, strict=True):
        with _listed(fd) as entries:
            shown = {entry.name for entry in entries} - hidden
        if shown:
            raise HostError(
                f"{os.path.join(path, min(shown))} would show in the tree: overlayfs of this kernel merges image and "
                "store, for data-only layers need Linux 6.5; --backend=fuse does without them"
            )


@contextlib.contextmanager
def _listed(directory: int) -> Iterator[Iterator[os.DirEntry[str]]]:
    """Yield what is in a directory, given by a descriptor that need not be good for reading."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    with closing(os.open(".", flags, dir_fd=directory)) as fd, os.scandir(fd) as entries:
        yield entries


def _mount_the_old_way(erofs: _Erofs, layers: Layers, mountpoint: str, options: MountOptions) -> None:
    """Mount by mount(2). The layers go in as magic links to descriptors, which need no escaping."""
    verity = overlayfs.VERITY[options.verification]
    attributes = overlayfs.attributes(options.flags, read_only=not options.is_writable)
    with erofs.attached() as lower:
        writable = "".join(
            f",{key}=/proc/self/fd/{fd}" for key, fd in overlayfs.by_key(lower, layers) if key[-1] != "+"
        )
        lowers = [f"/proc/self/fd/{fd}" for fd in (lower, *layers.data)]
        parameters = ",".join(f"{key}={value}" for key, value in _PARAMETERS.items())
        # Data-only layers since 6.5; `verity` since 6.6, and only with them.
        for separator in ("::", ":"):
            data = f"{parameters},lowerdir={separator.join(lowers)}{writable}"
            data += f",verity={verity}" if verity else ""
            try:
                syscalls.old_mount(COMPOSEFS_SOURCE, mountpoint, "overlay", attributes, data)
            except OSError as error:
                if error.errno != errno.EINVAL or separator == ":":
                    raise
                if verity:
                    raise HostError(overlayfs.NO_VERITY) from None
                _check_nothing_shows(lower, layers, options.basedir)
            else:
                return
