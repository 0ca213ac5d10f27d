"""Mount options, as mount.composefs and fstab spell them: text → MountOptions. Nothing is looked at on the host."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from cfsfuse.errors import UsageError
from cfsfuse.verification import Verification

if TYPE_CHECKING:
    from collections.abc import Callable


AUTO = "auto"
NATIVE, PYFUSE3 = SESSIONS = ("native", "pyfuse3")
BACKENDS = (AUTO, "kernel", "overlay", "fuse")


class MountOptions(NamedTuple):
    """What a mount is asked for.

    `basedir` are the base directories in search order; `digest` is the expected fs-verity digest of the image in
    lower-case hex; `poll` is in microseconds, None means the default; `flags` go to the kernel as they are (nosuid,
    dev, noexec …). `upperdir` and `workdir` are those of overlayfs; `idmap` is the path of a user namespace;
    `backend` is one of BACKENDS, `session`, which says who speaks FUSE, of SESSIONS.
    """

    basedir: tuple[str, ...] = ()
    digest: str | None = None
    verification: Verification = Verification.RECORDED
    allow_other: bool | None = None
    uid: int | None = None
    gid: int | None = None
    statfs: str = "store"
    poll: int = 100
    log: str | None = None
    upperdir: str | None = None
    workdir: str | None = None
    idmap: str | None = None
    read_only: bool = False
    backend: str = AUTO
    session: str = NATIVE
    flags: tuple[str, ...] = ()

    @property
    def is_writable(self) -> bool:
        """Whether the tree takes changes: in an upper directory, unless `ro` is said."""
        return self.upperdir is not None and not self.read_only


# Handled by the kernel or fusermount3; a tree that takes no changes has no use for sync, and another one is overlayfs'.
_KERNEL_FLAGS = frozenset(("nosuid", "suid", "nodev", "dev", "noexec", "exec", "noatime", "atime", "sync", "async"))
# Said by mount(8) and fstab, with nothing to do: a mount without an upper directory never changes a time.
_IGNORED = frozenset(
    [
        "defaults",
        "auto",
        "noauto",
        "user",
        "nouser",
        "users",
        "group",
        "owner",
        "nofail",
        "_netdev",
        "default_permissions",
        "dirsync",
        "silent",
        "loud",
        "mand",
        "nomand",
        "relatime",
        "norelatime",
        "strictatime",
        "nostrictatime",
        "lazytime",
        "nolazytime",
        "diratime",
        "nodiratime",
    ]
)
_IGNORED_PREFIXES = ("x-", "X-", "comment=")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}|[0-9a-fA-F]{128}")


def parse(text: str) -> MountOptions:
    r"""Return the options in `text`, separated by commas; `\,` and `\:` are a comma and a colon in a path.

    Raises UsageError naming the option.
    """
    options = MountOptions()
    items = split(text, ",")
    said = [verification.value for verification in Verification if verification.value in items]
    if len(said) > 1:
        raise UsageError(f"{' and '.join(said)} contradict each other: give one of them")
    for item in items:
        if item and item not in _IGNORED and not item.startswith(_IGNORED_PREFIXES):
            options = _with(options, item)
    if (options.upperdir is None) != (options.workdir is None):
        lacking = "upperdir" if options.upperdir is None else "workdir"
        raise UsageError(f"option {lacking}= is missing: overlayfs needs upperdir= and workdir=, on one file system")
    return options


def split(text: str, separator: str) -> list[str]:
    r"""Split at `separator` where no backslash stands before it, and take that backslash away elsewhere."""
    parts = re.split(rf"(?<!\\){re.escape(separator)}", text)
    return [part.replace("\\" + separator, separator) for part in parts]


def _with(options: MountOptions, item: str) -> MountOptions:
    name, equals, value = item.partition("=")
    if item in _KERNEL_FLAGS:
        return options._replace(flags=(*options.flags, item))
    if not equals and item in _SWITCHES:
        return _SWITCHES[item](options)
    if equals and name in _VALUES:
        if not value:
            raise UsageError(f"option {name}= needs a value")
        return _VALUES[name](options, value)
    if name in _VALUES:
        raise UsageError(f"option {name} needs a value: {name}=…")
    if name in _SWITCHES or name in _KERNEL_FLAGS:
        raise UsageError(f"option {name} takes no value")
    raise UsageError(f"unknown option {name!r}; see cfsfuse mount --help")


def _basedir(options: MountOptions, value: str) -> MountOptions:
    return options._replace(basedir=options.basedir + tuple(path for path in split(value, ":") if path))


def _digest(options: MountOptions, value: str) -> MountOptions:
    if not _DIGEST.fullmatch(value):
        raise UsageError(f"digest={value}: not an fs-verity digest (64 or 128 hexadecimal digits)")
    return options._replace(digest=value.lower())


def _number(name: str, largest: int = 0xFFFFFFFE) -> Callable[[MountOptions, str], MountOptions]:
    def parse_number(options: MountOptions, value: str) -> MountOptions:
        if not value.isascii() or not value.isdigit() or int(value) > largest:
            raise UsageError(f"{name}={value}: not a number from 0 to {largest}")
        return options._replace(**{name: int(value)})  # type: ignore[arg-type]  # the names below are of int fields

    return parse_number


def _one_of(name: str, *choices: str) -> Callable[[MountOptions, str], MountOptions]:
    def parse_choice(options: MountOptions, value: str) -> MountOptions:
        if value not in choices:
            raise UsageError(f"{name}={value}: must be {', '.join(choices[:-1])} or {choices[-1]}")
        return options._replace(**{name: value})  # type: ignore[arg-type]  # the names below are of str fields

    return parse_choice


_SWITCHES: dict[str, Callable[[MountOptions], MountOptions]] = {
    "tryverity": lambda options: options._replace(verification=Verification.RECORDED),
    "verity": lambda options: options._replace(verification=Verification.REQUIRED),
    "noverity": lambda options: options._replace(verification=Verification.OFF),
    "allow_other": lambda options: options._replace(allow_other=True),
    "ro": lambda options: options._replace(read_only=True),
    "rw": lambda options: options._replace(read_only=False),
    "noallow_other": lambda options: options._replace(allow_other=False),
}
_VALUES: dict[str, Callable[[MountOptions, str], MountOptions]] = {
    "basedir": _basedir,
    "digest": _digest,
    "uid": _number("uid"),
    "gid": _number("gid"),
    "poll": _number("poll", 10_000),
    "statfs": _one_of("statfs", "store", "image"),
    "log": lambda options, value: options._replace(log=value),
    "backend": _one_of("backend", *BACKENDS),
    "session": _one_of("session", *SESSIONS),
    "upperdir": lambda options, value: options._replace(upperdir=value),
    "workdir": lambda options, value: options._replace(workdir=value),
    "idmap": lambda options, value: options._replace(idmap=value),
}
