"""What a process may do, as /proc says. proc(5), capabilities(7), PR_SET_NO_NEW_PRIVS(2const)."""

from __future__ import annotations

_CAP_SYS_ADMIN = 21  # include/uapi/linux/capability.h


def has_sys_admin(process: int | str = "self") -> bool:
    """Return whether a process has CAP_SYS_ADMIN in its user namespace; OSError when it cannot be looked at."""
    return bool(int(_status("CapEff", process), 16) >> _CAP_SYS_ADMIN & 1)


def has_no_new_privileges() -> bool:
    """Return whether no program that this process starts gains anything from its set-user-ID bit."""
    return _status("NoNewPrivs") == "1"


def _status(field: str, process: int | str = "self") -> str:
    with open(f"/proc/{process}/status", encoding="ascii", errors="replace") as file:
        return next(line.split()[1] for line in file if line.startswith(f"{field}:"))
