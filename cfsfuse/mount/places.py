"""Where the files of this user are that nobody named: XDG base directories."""

from __future__ import annotations

import os

_NAME = "cfsfuse"


def tree_cache() -> str:
    """Return the directory of computed Merkle trees."""
    import platformdirs  # a kernel mount needs none of this

    return os.path.join(platformdirs.user_cache_dir(_NAME), "merkle")


def log_file() -> str:
    """Return the file that takes the log where no system log does."""
    import platformdirs

    return os.path.join(platformdirs.user_log_dir(_NAME), "cfsfuse.log")
