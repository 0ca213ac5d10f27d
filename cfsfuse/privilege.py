"""CAP_SYS_ADMIN: who has it, as /proc says. proc(5), capabilities(7)."""

from __future__ import annotations

_CAP_SYS_ADMIN = 21  # include/uapi/linux/capability.h


def has_sys_admin(process: int | str = "self") -> bool:
    """Return whether a process has CAP_SYS_ADMIN in its user namespace; OSError when it cannot be looked at."""
    with open(f"/proc/{process}/status", encoding="ascii", errors="replace") as file:
        effective = next(line.split()[1] for line in file if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> _CAP_SYS_ADMIN & 1)
