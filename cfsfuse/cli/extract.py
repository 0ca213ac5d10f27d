"""`cfsfuse extract`: a verified copy of a tree, without /dev/fuse.

Everything is built under a temporary name beside DEST and renamed at the end, so DEST is whole or absent. Entries are
made relative to the descriptor of their directory, and never by way of a path: depth has no limit, and no symbolic
link of the image is ever followed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from cfsfuse.access import content, resolve
from cfsfuse.atomic import opened_directory
from cfsfuse.cli import common
from cfsfuse.cli.main import BAD, DONE
from cfsfuse.erofs.reader import Room
from cfsfuse.errors import HostError, ImageError, ObjectError, UsageError
from cfsfuse.tree import Sparse, Symlink

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from cfsfuse.erofs.image import Nid
    from cfsfuse.erofs.inode import Inode
    from cfsfuse.erofs.reader import Reader
    from cfsfuse.objects import ObjectStore
    from cfsfuse.tree import Node, Stat

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# An ordinary user, a user namespace or the file system does not let an xattr or an owner be set. ENOSPC and E2BIG are
# what ext4 says of an xattr that is too large for it; a disk that is full fails soon enough elsewhere.
_NOT_PERMITTED = (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSPC, errno.E2BIG, errno.ERANGE)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} [options] IMAGE [PATH] DEST"
    parser.epilog = """\
Mode, time of modification and hard links are kept; the owner too when root extracts, and the set-user-ID and
set-group-ID bits of files with it. Extended attributes and devices
that may not be made here are left out, and counted in the summary.
"""
    common.add_image(parser)
    parser.add_argument("path", metavar="PATH", help="the entry of the image to extract, instead of all")
    parser.add_argument("dest", metavar="DEST", nargs="?", help="where to; it must not exist, or be an empty directory")
    common.add_store(parser)
    parser.add_argument(
        "-k",
        "--keep-going",
        action="store_true",
        help="leave out files whose content cannot be verified, name each, and exit with 3 in the end; "
        "otherwise the first one ends it, and nothing is extracted",
    )
    parser.add_argument("--no-xattrs", action="store_true", help="leave the extended attributes out")
    parser.add_argument("--no-owner", action="store_true", help="leave the owner to be whoever extracts")


def run(arguments: argparse.Namespace) -> int:
    path, dest = (arguments.path, arguments.dest) if arguments.dest is not None else ("/", arguments.path)
    store = common.open_store(arguments)
    chown = not arguments.no_owner and os.geteuid() == 0
    with common.opened(arguments.image) as reader, common.terminable(), _progress() as progress:
        inode = resolve(reader, os.fsencode(path), follow=False)
        extraction = Extraction(
            reader,
            store,
            progress,
            path=os.fsencode(path).rstrip(b"/"),
            chown=chown,
            with_xattrs=not arguments.no_xattrs,
            leave_out=_leave_out if arguments.keep_going else None,
        )
        try:
            with common.wanting_store(arguments):
                extract(extraction, inode, dest)
        except OSError as error:
            raise HostError(f"{dest}: cannot extract: {error.strerror}") from None
    print(f"cfsfuse extract: {extraction.done}", file=sys.stderr)
    return BAD if extraction.done.files_left_out else DONE


def _leave_out(error: ObjectError) -> None:
    print(f"cfsfuse extract: {error}", file=sys.stderr)


def extract(extraction: Extraction, inode: Inode, dest: str) -> None:
    """Make `inode`, with all below it, as `dest`; nothing stays behind when that fails."""
    parent_path, name = os.path.split(os.fsencode(os.path.abspath(dest)))
    with opened_directory(os.path.realpath(parent_path)) as parent:
        _check_destination(parent, name, dest, is_directory=inode.is_directory)
        temporary = b".%s.%s.tmp" % (name[:200], secrets.token_hex(8).encode())
        links = temporary + b".links"
        try:
            os.mkdir(links, 0o700, dir_fd=parent)
            with opened_directory(links, dir_fd=parent) as extraction.links:
                extraction.copy(inode, temporary, parent)
            if not inode.is_directory and not _exists(parent, temporary):
                raise HostError(f"{dest}: only root may make a {common.type_name(inode.mode)}")
            os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
        finally:
            remove(parent, temporary)
            remove(parent, links)


@dataclass
class Summary:
    """What has been made, and what has been left out because it is not permitted here."""

    files: int = 0
    directories: int = 0
    size: int = 0
    links: int = 0
    others: int = 0
    xattrs_skipped: int = 0
    owners_skipped: int = 0
    devices_skipped: int = 0
    files_left_out: int = 0

    def __str__(self) -> str:
        made = [
            f"{self.files} files of {self.size} bytes",
            f"{self.directories} directories",
            f"{self.links} further hard links",
            f"{self.others} others",
        ]
        skipped = [
            (self.xattrs_skipped, "extended attributes"),
            (self.owners_skipped, "owners"),
            (self.devices_skipped, "devices"),
        ]
        left_out = ", ".join(f"{count} {what}" for count, what in skipped if count)
        text = ", ".join(made) + (f"; not permitted here and left out: {left_out}" if left_out else "")
        return text + (f"; not verified and left out: {self.files_left_out} files" if self.files_left_out else "")


class Progress(Protocol):
    """Told of what has been done."""

    def __call__(self, done: Summary) -> None: ...


class _Level(NamedTuple):
    """A directory that is being filled: its path from the one above, its inode, and what of it is still to come."""

    path: bytes
    inode: Inode
    entries: Iterator[tuple[bytes, Inode]]


@dataclass
class Extraction:
    """One run: where the tree comes from, how much of it is copied, and what has been done so far.

    `path` is that of the top in the image. `leave_out` is told of each file that is left out because its content cannot
    be had; without it the first such file ends the extraction. `links` is a private directory that holds a name, the
    nid, of each file that has several: what a further name is linked to, however deep the first one is.
    """

    reader: Reader
    store: ObjectStore
    progress: Progress
    path: bytes
    chown: bool
    with_xattrs: bool
    leave_out: Callable[[ObjectError], None] | None = None
    links: int = -1
    done: Summary = field(default_factory=Summary)

    def copy(self, top: Inode, name: bytes, parent: int) -> None:
        """Make `top` as `name` in the directory descriptor `parent`, with all below it."""
        if not top.is_directory:
            try:
                self._make(top, name, parent)
            except ObjectError as error:
                error.file = self.path
                raise
            return
        seen: set[Nid] = set()
        at = self._enter(top, name, parent, seen)
        levels = [_Level(self.path, top, self.reader.entries(top))]
        room = Room(self.reader.image)
        try:
            while levels:
                name, inode = next(levels[-1].entries, (b"", None))
                room.take()
                if inode is None:
                    at = self._leave(levels, at, parent)
                elif name in (b".", b".."):
                    continue
                elif inode.is_directory:
                    below = self._enter(inode, name, at, seen)
                    os.close(at)
                    at = below
                    levels.append(_Level(name, inode, self.reader.entries(inode)))
                else:
                    self._make_or_leave_out(levels, inode, name, at)
        finally:
            if at != parent:
                os.close(at)

    def _enter(self, inode: Inode, name: bytes, parent: int, seen: set[Nid]) -> int:
        """Make a directory that only we may use for now, and return a descriptor of it."""
        if inode.nid in seen:
            raise ImageError("dirent nid", f"directory nid {inode.nid} is reached twice: a cycle")
        seen.add(inode.nid)
        os.mkdir(name, 0o700, dir_fd=parent)
        self.done.directories += 1
        return os.open(name, _OPEN_DIRECTORY, dir_fd=parent)

    def _leave(self, levels: list[_Level], at: int, parent: int) -> int:
        """Give a directory its attributes, now that nothing changes its time any more, and return one of its parent."""
        inode = levels.pop().inode
        # Opened first: the mode may forbid it. `..` is right, for nobody else can reach into the directories above.
        above = os.open(b"..", _OPEN_DIRECTORY, dir_fd=at) if levels else parent
        try:
            self._finish(at, self.reader.node(inode))
        except BaseException:
            if above != parent:
                os.close(above)
            raise
        os.close(at)
        return above

    def _make_or_leave_out(self, levels: list[_Level], inode: Inode, name: bytes, parent: int) -> None:
        try:
            self._make(inode, name, parent)
        except ObjectError as error:
            error.file = b"/".join([*(level.path for level in levels), name])
            if self.leave_out is None:
                raise
            os.unlink(name, dir_fd=parent)
            self.done.files_left_out += 1
            self.leave_out(error)

    def _make(self, inode: Inode, name: bytes, parent: int) -> None:
        """Make anything but a directory: a further link where the file is there already."""
        key = b"%d" % inode.nid
        if inode.nlink > 1 and _exists(self.links, key):
            os.link(key, name, src_dir_fd=self.links, dst_dir_fd=parent, follow_symlinks=False)
            self.done.links += 1
            return
        if inode.is_regular:
            self._make_file(self.reader.node(inode), name, parent)
        elif not self._make_special(self.reader.node(inode), name, parent):
            self.done.devices_skipped += 1
            return
        if inode.nlink > 1:
            os.link(name, key, src_dir_fd=parent, dst_dir_fd=self.links, follow_symlinks=False)
        self.progress(self.done)

    def _make_file(self, node: Node, name: bytes, parent: int) -> None:
        fd = os.open(name, _CREATE_FILE, 0o600, dir_fd=parent)
        try:
            if isinstance(node, Sparse):
                os.ftruncate(fd, node.stat.size)
            else:
                for piece in content(self.store, node):
                    _write(fd, memoryview(piece))
                    self.done.size += len(piece)
                    self.progress(self.done)
            self._finish(fd, node)
        finally:
            os.close(fd)
        self.done.files += 1

    def _make_special(self, node: Node, name: bytes, parent: int) -> bool:
        """Make a symbolic link, fifo, socket or device; return False when that is for root alone."""
        if isinstance(node, Symlink):
            os.symlink(node.target, name, dir_fd=parent)
        else:
            try:
                device = os.makedev(*common.device_numbers(node.stat.rdev))
                os.mknod(name, stat.S_IFMT(node.stat.mode) | 0o600, device, dir_fd=parent)
            except PermissionError:
                return False
        self.done.others += 1
        # Without a descriptor; the name is followed by nothing, and stands in a directory that is ours alone.
        self._finish_name(b"/proc/self/fd/%d/%s" % (parent, name), node)
        return True

    def _finish(self, fd: int, node: Node) -> None:
        """Set the attributes of an open file or directory.

        In this order: a new owner takes capabilities and the set-user-ID bit away, and user.* xattrs need a mode that
        lets them be written.
        """
        status = node.stat
        self._set_owner(fd, node)
        self._set_xattrs(fd, node)
        os.fchmod(fd, self._mode(status))
        _set_time(fd, status.mtime_ns)

    def _finish_name(self, path: bytes, node: Node) -> None:
        """Set the attributes of what has no descriptor: a symbolic link, which has no mode, or a special file."""
        self._set_owner(path, node)
        self._set_xattrs(path, node)
        if not isinstance(node, Symlink):
            os.chmod(path, self._mode(node.stat))
        _set_time(path, node.stat.mtime_ns)

    def _mode(self, status: Stat) -> int:
        """Return the mode to set: with another owner than the image's, set-user-ID would give away the wrong one."""
        mode = stat.S_IMODE(status.mode)
        return mode if self.chown or stat.S_ISDIR(status.mode) else mode & ~(stat.S_ISUID | stat.S_ISGID)

    def _set_owner(self, target: int | bytes, node: Node) -> None:
        if not self.chown:
            return
        uid, gid = node.stat.uid, node.stat.gid
        try:
            if isinstance(target, int):
                os.fchown(target, uid, gid)
            else:
                os.chown(target, uid, gid, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NOT_PERMITTED or stat.S_IMODE(node.stat.mode) & (stat.S_ISUID | stat.S_ISGID):
                raise
            self.done.owners_skipped += 1

    def _set_xattrs(self, target: int | bytes, node: Node) -> None:
        for name, value in node.xattrs.items() if self.with_xattrs else ():
            try:
                if isinstance(target, int):
                    os.setxattr(target, name, value)
                else:
                    os.setxattr(target, name, value, follow_symlinks=False)
            except OSError as error:
                if error.errno not in _NOT_PERMITTED:
                    raise
                self.done.xattrs_skipped += 1


def remove(parent: int, name: bytes) -> None:
    """Remove `name` in the directory descriptor `parent`, with all below it, however deep; it may be absent."""
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EPERM):
            raise
    else:
        return
    names = [name]
    at = _open_to_empty(name, parent)
    while names:
        below = _unlink_files(at)
        if below is not None:
            names.append(below)
            up, at = at, _open_to_empty(below, at)
        else:
            up, at = at, os.open(b"..", _OPEN_DIRECTORY, dir_fd=at) if len(names) > 1 else parent
            os.rmdir(names.pop(), dir_fd=at)
        os.close(up)


def _open_to_empty(name: bytes, parent: int) -> int:
    os.chmod(name, 0o700, dir_fd=parent)  # its final mode may keep us out
    return os.open(name, _OPEN_DIRECTORY, dir_fd=parent)


def _unlink_files(at: int) -> bytes | None:
    """Unlink the files of a directory up to the first directory in it; return that one's name."""
    with os.scandir(at) as entries:
        for entry in entries:
            name = os.fsencode(entry.name)
            if entry.is_dir(follow_symlinks=False):
                return name
            os.unlink(name, dir_fd=at)
    return None


def _check_destination(parent: int, name: bytes, dest: str, *, is_directory: bool) -> None:
    if not name or not _exists(parent, name):
        if not name:
            raise UsageError(f"{dest}: cannot be replaced; name a directory that is to be made")
        return
    try:
        with opened_directory(name, dir_fd=parent) as fd:
            is_empty = not os.listdir(fd)
    except OSError:
        is_empty = False
    if not is_directory or not is_empty:
        raise UsageError(f"{dest}: exists already; DEST must not exist, or be an empty directory for a directory")


def _exists(parent: int, name: bytes) -> bool:
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _write(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _set_time(target: int | bytes, mtime_ns: int) -> None:
    follow = isinstance(target, int)  # a descriptor cannot be told not to be followed
    os.utime(target, ns=(mtime_ns, mtime_ns), follow_symlinks=follow)


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """Yield what shows the progress: on a terminal a line, otherwise nothing."""
    if not sys.stderr.isatty():
        yield lambda _done: None
        return
    from rich.console import Console
    from rich.progress import DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.fields[files]} files"), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, files=0)
        yield lambda done: bar.update(task, completed=done.size, files=done.files)
