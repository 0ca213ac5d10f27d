"""The xattrs of an inode as they stand in the image, inline ones first, then shared ones.

https://docs.kernel.org/filesystems/erofs.html#extended-attributes. What of them a user sees is `overlay.py`'s business.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from cfsfuse.erofs import ondisk
from cfsfuse.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cfsfuse.erofs.image import Image
    from cfsfuse.erofs.inode import Inode


_LONGEST_PREFIX_FIRST = sorted(ondisk.XATTR_PREFIXES.items(), key=lambda item: -len(item[1]))


class Xattr(NamedTuple):
    """A full name, such as b"user.mime_type", its value, and the name index under which it is stored."""

    name: bytes
    value: bytes
    name_index: int


def xattrs(image: Image, inode: Inode) -> Iterator[Xattr]:
    """Yield the xattrs of `inode` in the order in which the kernel looks at them: inline, then shared."""
    if not inode.xattr_offset:
        return
    offset = inode.xattr_offset
    _, shared_count = image.unpack(ondisk.XATTR_IBODY_HEADER, offset, "xattr body header")
    shared = offset + ondisk.XATTR_IBODY_HEADER.size
    position = shared + 4 * shared_count
    if position > inode.data_offset:
        raise ImageError("h_shared_count", f"{shared_count} do not fit in the inode's xattrs", offset)
    while position + ondisk.XATTR_ENTRY.size <= inode.data_offset:
        xattr, position = _entry(image, position)
        if position > inode.data_offset:
            raise ImageError("xattr entry", "reaches beyond the inode's xattrs", position)
        yield xattr
    ids = image.slice(shared, 4 * shared_count, "h_shared_xattrs")
    for at in range(0, 4 * shared_count, 4):
        yield _entry(image, image.xattr_offset + 4 * int.from_bytes(ids[at : at + 4], "little"))[0]


def surely_absent(image: Image, inode: Inode, name: bytes) -> bool:
    """Return whether `inode` has no xattr `name`, as far as its name filter tells, if the image has filters.

    The filter is a Bloom filter of one hash: bit xxh32(suffix, seed + index) % 32 is set when no xattr has that hash.
    """
    if not inode.xattr_offset:
        return True
    name_filter, _ = image.unpack(ondisk.XATTR_IBODY_HEADER, inode.xattr_offset, "xattr body header")
    has_filter = image.super_block.feature_compat & ondisk.FEATURE_COMPAT_XATTR_FILTER
    return bool(has_filter and name_filter >> _stored_name(name).filter_bit & 1)


@functools.lru_cache(maxsize=256)  # most inodes of an image have the same few names
def name_filter(names: tuple[bytes, ...]) -> int:
    """Return the name filter of an inode whose xattrs have these names."""
    bits = 0xFFFFFFFF
    for name in names:
        bits &= ~(1 << _stored_name(name).filter_bit)
    return bits


def entry(name: bytes, value: bytes) -> bytes:
    """Return an xattr as it stands in the image, padded."""
    stored = _stored_name(name)
    head = ondisk.XATTR_ENTRY.pack(len(stored.suffix), stored.name_index, len(value))
    return b"".join((head, stored.suffix, value, bytes(-(len(stored.suffix) + len(value)) % ondisk.XATTR_ALIGN)))


class _StoredName(NamedTuple):
    name_index: int
    suffix: bytes
    filter_bit: int


@functools.lru_cache(maxsize=256)  # likewise
def _stored_name(name: bytes) -> _StoredName:
    index, prefix = next((index, prefix) for index, prefix in _LONGEST_PREFIX_FIRST if name.startswith(prefix))
    suffix = name[len(prefix) :]
    return _StoredName(index, suffix, xxhash.xxh32_intdigest(suffix, ondisk.XATTR_FILTER_SEED + index) & 31)


def _entry(image: Image, offset: int) -> tuple[Xattr, int]:
    """Return the xattr entry at `offset`, and where the next one would start."""
    name_len, index, value_size = image.unpack(ondisk.XATTR_ENTRY, offset, "xattr entry")
    prefix = ondisk.XATTR_PREFIXES.get(index)
    if prefix is None:
        raise ImageError("e_name_index", f"{index} is not one of composefs", offset)
    start = offset + ondisk.XATTR_ENTRY.size
    body = bytes(image.slice(start, name_len + value_size, "xattr entry"))
    end = start + name_len + value_size
    return Xattr(prefix + body[:name_len], body[name_len:], index), end + -end % ondisk.XATTR_ALIGN
