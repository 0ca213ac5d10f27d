"""What this process may do by itself."""

from __future__ import annotations

_CAP_SYS_ADMIN = 21  # include/uapi/linux/capability.h


def is_privileged() -> bool:
    """Return whether this process has CAP_SYS_ADMIN in its user namespace, and so may mount without help."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        effective = next(line.split()[1] for line in file if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> _CAP_SYS_ADMIN & 1)
