"""What a mount, or a reader of objects, promises."""

from __future__ import annotations

import enum


class Verification(enum.Enum):
    """How much is verified; the values are the mount options."""

    OFF = "noverity"
    RECORDED = "tryverity"
    REQUIRED = "verity"
