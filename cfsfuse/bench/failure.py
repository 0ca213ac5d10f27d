"""What keeps a column from being measured."""

from __future__ import annotations

from cfsfuse.errors import printable


class ColumnFailed(Exception):
    """A mount, an unmount or a workload that fails, or takes too long; one line. The other columns go on.

    Programs that are measured may say anything: what a terminal or a picture cannot take is escaped here.
    """

    def __init__(self, text: str) -> None:
        super().__init__(printable(text.encode(errors="surrogateescape")))
