"""What a caller of the file system may see, beyond what the kernel checks by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsfuse.privilege import has_sys_admin

if TYPE_CHECKING:
    from collections.abc import Iterable

_WHOLE_ID_RANGE = ["0", "0", "4294967295"]


def visible_names(names: Iterable[bytes], pid: int) -> list[bytes]:
    """Return those of the `names` of xattrs that process `pid` may list."""
    names = list(names)
    if any(name.startswith(b"trusted.") for name in names) and not sees_trusted(pid):
        return [name for name in names if not name.startswith(b"trusted.")]
    return names


def sees_trusted(pid: int) -> bool:
    """Return whether process `pid` has CAP_SYS_ADMIN in the initial user namespace, and so sees `trusted.*` xattrs.

    The kernel guards getxattr itself, but leaves listxattr to the file system; overlayfs asks the same question.
    """
    try:
        with open(f"/proc/{pid}/uid_map", encoding="ascii") as file:
            if file.read().split() != _WHOLE_ID_RANGE:
                return False
        return has_sys_admin(pid)
    except (OSError, StopIteration, IndexError):
        return False  # it has ended, or is of another pid namespace
