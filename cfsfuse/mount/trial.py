"""A trial mount: an image with one file, whose content an object has, shown by the kernel."""

from __future__ import annotations

import os
import stat

from cfsfuse.erofs.writer import write
from cfsfuse.errors import HostError
from cfsfuse.mount import kernel, syscalls
from cfsfuse.mount.options import MountOptions
from cfsfuse.tree import Directory, Entry, External, Stat
from cfsfuse.verification import Verification

_CONTENT = b"the kernel shows this file"
_XATTR = b"trusted.overlay.trial"
_REMEDY = "--backend=kernel mounts it so"


class Trial:
    """What is to be mounted, in a directory of its own; this process gets a mount namespace of its own for it."""

    def __init__(self, directory: str) -> None:
        self._image, self._objects, self._mountpoint = (
            os.path.join(directory, name) for name in ("image", "objects", "mnt")
        )
        os.makedirs(os.path.join(self._objects, "aa"))
        os.mkdir(self._mountpoint)
        with open(os.path.join(self._objects, "aa/object"), "wb") as file:
            file.write(_CONTENT)
        with open(self._image, "wb") as file:
            file.writelines(write(_tree()))

    def read(self) -> None:
        """Read the file; raise HostError when that is not right."""
        self._mount()
        try:
            with open(os.path.join(self._mountpoint, "file"), "rb") as file:
                content = file.read()
        except OSError as error:
            raise HostError(f"this kernel's overlayfs does not follow a redirect: {error.strerror}") from None
        if content != _CONTENT:
            raise HostError("this kernel's overlayfs shows an empty file where it should follow a redirect")

    def look(self) -> None:
        """Look at the root and at an xattr; raise HostError when they are not the image's."""
        self._mount()
        if os.stat(self._mountpoint).st_nlink == 1:
            raise HostError(
                "overlayfs of this kernel merges image and store, and has other numbers of inodes and links, for "
                f"data-only layers need Linux 6.5; {_REMEDY}"
            )
        try:
            os.getxattr(os.path.join(self._mountpoint, "file"), _XATTR)
        except OSError:
            raise HostError(
                f"overlayfs of this kernel hides xattrs trusted.overlay.* of the image: that needs Linux 6.7; {_REMEDY}"
            ) from None

    def _mount(self) -> None:
        syscalls.unshare_mounts()
        options = MountOptions(basedir=(self._objects,), verification=Verification.OFF)
        kernel.mount(self._image, self._mountpoint, options)


def _tree() -> Entry:
    status = Stat(stat.S_IFREG | 0o644, 1, 0, 0, 0, len(_CONTENT), 0)
    file = External(status, {_XATTR: b"value"}, b"aa/object", None)
    return Entry(Directory(Stat(stat.S_IFDIR | 0o755, 2, 0, 0, 0, 0, 0), {}), {b"file": Entry(file)})
