"""What a caller of the file system may see, beyond what the kernel checks by itself."""

from __future__ import annotations

_CAP_SYS_ADMIN = 21
_WHOLE_ID_RANGE = ["0", "0", "4294967295"]


def sees_trusted(pid: int) -> bool:
    """Return whether process `pid` has CAP_SYS_ADMIN in the initial user namespace, and so sees `trusted.*` xattrs.

    The kernel guards getxattr itself, but leaves listxattr to the file system; overlayfs asks the same question.
    """
    try:
        with open(f"/proc/{pid}/uid_map", encoding="ascii") as file:
            if file.read().split() != _WHOLE_ID_RANGE:
                return False
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            effective = next(line.split()[1] for line in file if line.startswith("CapEff:"))
    except (OSError, StopIteration, IndexError):
        return False  # it has ended, or is of another pid namespace
    return bool(int(effective, 16) >> _CAP_SYS_ADMIN & 1)
