"""What keeps a column from being measured."""

from __future__ import annotations


class Failure(Exception):
    """A mount, an unmount or a workload that fails, or takes too long; one line. The other columns go on."""
