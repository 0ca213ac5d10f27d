"""Contents of regular files, by every way that leads to them."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from typing import TYPE_CHECKING

from cfsfuse.contract.observe import CHUNK, WHOLE_MAX, Failure, attempt, opened, stat_fields
from cfsfuse.verity.digest import ALGORITHMS, SHA256
from cfsfuse.verity.merkle import content_digest, digest_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cfsfuse.contract.entries import Entry
    from cfsfuse.contract.observe import Observations
    from cfsfuse.verity.digest import Algorithm

_SHORT = 64  # bytes of a content that is shown itself
_LENGTHS = (1, 7, 4095, 4096, 4097, 10000, 131072 + 1)


def check_digest(path: bytes, entry: Entry) -> Observations:
    """The fs-verity digest of all bytes of a regular file, in one reading, and short ones themselves."""
    if not entry.is_regular:
        return {}
    with opened(path, os.O_RDONLY) as fd:
        if isinstance(fd, Failure):
            return {"open": fd, "digest": fd}
        size = os.fstat(fd).st_size
        if size <= CHUNK:
            return told(attempt(os.read, fd, CHUNK + 1), entry.measure)
        if entry.measure is None and size > WHOLE_MAX:
            return {"digest of the ends": attempt(_digest_of_ends, fd, size)}
        return {"digest": attempt(_measured, fd, size, ALGORITHMS[entry.measure or SHA256.name])}


def told(content: object, measure: str | None = None) -> Observations:
    """Return what `check_digest` says of a content that is in memory, or of the Failure to read it."""
    if not isinstance(content, bytes):
        return {"digest": content}
    digest: Observations = {"digest": content_digest(ALGORITHMS[measure or SHA256.name], content).hex()}
    return digest | {"content": content} if len(content) <= _SHORT else digest


def told_of_zeros(size: int) -> Observations:
    """Return what `check_digest` says of a file of zeros for which no `measure` is given."""
    if size > WHOLE_MAX:
        return {"digest of the ends": hashlib.sha256(bytes(2 * CHUNK)).hexdigest()}
    if size <= CHUNK:
        return told(bytes(size))
    zeros = bytes(CHUNK)
    chunks = (zeros[: size - offset] for offset in range(0, size, CHUNK))
    return {"digest": digest_of(SHA256, size, chunks).hex()}


def check_content(path: bytes, entry: Entry) -> Observations:
    """The bytes of a regular file from its start to its end, by read(2) and mmap(2), and its stat fields when open."""
    if not entry.is_regular:
        return {}
    with opened(path, os.O_RDONLY) as fd:
        if isinstance(fd, Failure):
            return {"open": fd}
        size = os.fstat(fd).st_size
        seen = stat_fields("open st_", attempt(os.fstat, fd))
        if size <= WHOLE_MAX:
            seen["read"] = attempt(_digest_of_reads, fd)
        # A page that cannot be read is a SIGBUS, which would end whoever looks.
        seen["mmap"] = attempt(_digest_of_mapping, fd, size) if _is_whole(fd, size) else "not mapped: cannot be read"
        seen["position"] = attempt(os.lseek, fd, 0, os.SEEK_CUR)
        seen["seek to end"] = attempt(os.lseek, fd, 0, os.SEEK_END)
    return seen


def check_pread(path: bytes, entry: Entry) -> Observations:
    """Reads at odd places, of odd lengths, across the end and behind it."""
    if not entry.is_regular:
        return {}
    with opened(path, os.O_RDONLY) as fd:
        if isinstance(fd, Failure):
            return {"open": fd}
        offsets = _offsets(os.fstat(fd).st_size)
        lengths = _LENGTHS if entry.sampled else _LENGTHS[:2]
        return {
            f"{length} at {offset}": _summary(attempt(os.pread, fd, length, offset))
            for offset in offsets
            for length in lengths
        }


def check_direct(path: bytes, entry: Entry) -> Observations:
    """O_DIRECT, with the alignment that it asks for."""
    if not entry.is_regular or not entry.sampled:
        return {}
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, 16 * mmap.PAGESIZE) as buffer:
        if isinstance(fd, Failure):
            return {"open": fd}
        offsets = {offset & -mmap.PAGESIZE for offset in _offsets(os.fstat(fd).st_size) if offset >= 0}
        return {f"at {offset}": _direct(fd, buffer, offset) for offset in sorted(offsets)}


def check_read_ways(path: bytes, entry: Entry) -> Observations:
    """Other ways to the bytes, on what has a size: sendfile, copy_file_range, scattered reads, holes, read-ahead."""
    if not entry.is_regular or not entry.sampled:
        return {}
    with opened(path, os.O_RDONLY) as fd, _scratch() as target:
        if isinstance(fd, Failure):
            return {"open": fd}
        buffers = [bytearray(3), bytearray(4096), bytearray(5)]
        return {
            "preadv": (attempt(os.preadv, fd, buffers, 1), [_summary(bytes(buffer)) for buffer in buffers]),
            "sendfile": (attempt(os.sendfile, target, fd, 2, 70000), _summary(os.pread(target, 70000, 0))),
            "data": attempt(os.lseek, fd, 0, os.SEEK_DATA),
            "data behind the end": attempt(os.lseek, fd, 1 << 60, os.SEEK_DATA),
            "hole": attempt(os.lseek, fd, 0, os.SEEK_HOLE),
            "advice": attempt(os.posix_fadvise, fd, 0, 0, os.POSIX_FADV_WILLNEED),
            "write": attempt(os.write, fd, b"x"),
            "truncate": attempt(os.ftruncate, fd, 0),
            "sync": attempt(os.fsync, fd),
        }


def _measured(fd: int, size: int, algorithm: Algorithm) -> str:
    """Return the fs-verity digest of what is read; or how much that is, when it is not what the file says."""
    offset = 0

    def chunks() -> Iterator[bytes]:
        nonlocal offset
        while offset < size and (chunk := os.pread(fd, CHUNK, offset)):
            offset += len(chunk)
            yield chunk[: size - offset + len(chunk)]
            if len(chunk) < CHUNK:
                return

    digest = digest_of(algorithm, size, chunks()).hex()
    more = os.pread(fd, 1, offset)
    return digest if offset == size and not more else f"of {size} bytes, {offset}{' and more' if more else ''} are read"


def _digest_of_ends(fd: int, size: int) -> str:
    return hashlib.sha256(os.pread(fd, CHUNK, 0) + os.pread(fd, CHUNK, size - CHUNK)).hexdigest()


def _is_whole(fd: int, size: int) -> bool:
    """Return whether all can be read that `_digest_of_mapping` looks at."""
    ends = [(0, size)] if size <= WHOLE_MAX else [(0, CHUNK), (size - CHUNK, CHUNK)]
    return all(attempt(_read, fd, offset, length) == length for offset, length in ends)


def _read(fd: int, offset: int, length: int) -> int:
    return len(os.pread(fd, length, offset))


def _digest_of_reads(fd: int) -> str:
    digest = hashlib.sha256()
    while chunk := os.read(fd, CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _digest_of_mapping(fd: int, size: int) -> str | None:
    """Return the digest of the file as mapped; of a large one only of its ends. None for an empty one."""
    if not size:
        return None
    with mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as mapping:
        if size <= WHOLE_MAX:
            return hashlib.sha256(mapping).hexdigest()
        return hashlib.sha256(mapping[:CHUNK] + mapping[-CHUNK:]).hexdigest()


def _direct(fd: int, buffer: mmap.mmap, offset: int) -> object:
    length = attempt(os.preadv, fd, [buffer], offset)
    return _summary(buffer[:length]) if isinstance(length, int) else length


def _offsets(size: int) -> list[int]:
    """Return places in and around a file of `size` bytes."""
    places = (0, 1, 4095, 4096, 4097, 131071, size // 3, size // 2, size - 4096, size - 4095, size - 1)
    inside = sorted({place for place in places if 0 <= place < size})
    return [-1, *inside, size, size + 1, size + 4096, size + (1 << 33)]


def _summary(value: object) -> object:
    """Return short bytes as they are and long ones as length and digest, so that a difference can be read."""
    if isinstance(value, bytes) and len(value) > 16:
        return len(value), hashlib.sha256(value).hexdigest()
    return value


@contextlib.contextmanager
def _scratch() -> Iterator[int]:
    fd = os.memfd_create("contract")
    try:
        yield fd
    finally:
        os.close(fd)
