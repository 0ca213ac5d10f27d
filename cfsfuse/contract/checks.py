"""The one map of checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsfuse.contract import changing, contents, metadata, names, opening

if TYPE_CHECKING:
    from cfsfuse.contract.entries import Check

CHECKS: dict[str, Check] = {
    "stat": metadata.check_stat,
    "stat-open": metadata.check_stat_open,
    "xattrs": metadata.check_xattrs,
    "xattrs-absent": metadata.check_xattrs_absent,
    "readlink": metadata.check_readlink,
    "listing": names.check_listing,
    "listing-restarted": names.check_listing_restarted,
    "lookup": names.check_lookup,
    "names": names.check_names,
    "digest": contents.check_digest,
    "content": contents.check_content,
    "pread": contents.check_pread,
    "direct": contents.check_direct,
    "read-ways": contents.check_read_ways,
    "open": opening.check_open,
    "special": opening.check_special,
    "access": opening.check_access,
    "locks": opening.check_locks,
    "modify": changing.check_modify,
    "statfs": metadata.check_statfs,
}
