"""Objects → verified bytes, over real temporary stores."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

import pytest

from cfsfuse.erofs.overlay import Digest
from cfsfuse.errors import DigestMismatch, ObjectError, ObjectForbidden, ObjectMissing, ObjectUnusable
from cfsfuse.objects import WHOLE_FILE_MAX
from cfsfuse.verification import Verification
from cfsfuse.verity.digest import ALGORITHMS
from tests.support import HERE, Store, flip, node_of, put, random_bytes, time_limit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cfsfuse.objects import ObjectStore
    from cfsfuse.tree import External

BLOCK = 4096
LARGE = random_bytes((1 << 20) + 3 * BLOCK + 100)
SMALL = random_bytes(10_000)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def read_all(objects: ObjectStore, node: External, step: int = 1 << 17) -> bytes:
    objects.open(node)
    return b"".join(bytes(objects.read(node, at, step)) for at in range(0, node.stat.size, step))


def wrong_blocks(objects: ObjectStore, node: External, content: bytes) -> list[int | None]:
    """Read every block by itself; return those that fail, the others having been right."""
    wrong: list[int | None] = []
    for at in range(0, node.stat.size, BLOCK):
        try:
            data = bytes(objects.read(node, at, BLOCK))
        except DigestMismatch as error:
            wrong.append(error.block)
        else:
            assert data == content[at : at + BLOCK]
    return wrong


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=list(ALGORITHMS))
@pytest.mark.parametrize(
    "size", [0, 1, 4095, 4096, 4097, 100_000, WHOLE_FILE_MAX - 1, WHOLE_FILE_MAX, WHOLE_FILE_MAX + 1, 1_500_000]
)
def test_object_reads_as_it_is(store: Store, size: int, algorithm: str) -> None:
    content = random_bytes(size, size)
    node = store.add(content, algorithm=ALGORITHMS["sha256"] if algorithm == "sha256" else ALGORITHMS["sha512"])
    assert read_all(store.open(), node) == content


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("verification", Verification)
def test_any_part_reads_as_it_is(store: Store, content: bytes, verification: Verification) -> None:
    node = store.add(content)
    objects = store.open(verification)
    size = len(content)
    for offset in (0, 1, 4095, 4096, 5000, 8192, size - 4097, size - 1, size, size + 1, size + 5000, 1 << 60):
        for length in (0, 1, 4096, 4097, 9000, size, 1 << 30):
            assert bytes(objects.read(node, offset, length)) == content[offset : offset + length]


def test_flipped_byte_of_a_small_object_fails_at_open(store: Store) -> None:
    node = store.add(SMALL)
    flip(store.path(), 5000)
    objects = store.open()
    with pytest.raises(DigestMismatch) as caught:
        objects.open(node)
    assert node.digest is not None
    assert (caught.value.path, caught.value.expected) == (b"ab/object", node.digest.value)
    with pytest.raises(DigestMismatch):
        objects.read(node, 0, 10)


@pytest.mark.parametrize("tree", ["recorded", "cached"])
@pytest.mark.parametrize("offset", [0, 4095, 4096, 300_000, len(LARGE) - 1])
def test_flipped_byte_of_a_large_object_fails_in_its_block_alone(store: Store, offset: int, tree: str) -> None:
    node = store.add(LARGE)
    if tree == "recorded":
        store.record_tree(LARGE)
    else:
        store.open().open(node)
        assert store.cached_tree(node).exists()
    flip(store.path(), offset)
    objects = store.open()
    objects.open(node)
    assert wrong_blocks(objects, node, LARGE) == [offset // BLOCK]
    with pytest.raises(DigestMismatch):
        objects.read(node, 0, len(LARGE))


def test_flip_while_open_fails_in_its_block_alone_and_is_mended_by_restoring(store: Store) -> None:
    node = store.add(LARGE)
    objects = store.open()
    assert read_all(objects, node) == LARGE
    flip(store.path(), 50_000)
    assert wrong_blocks(objects, node, LARGE) == [50_000 // BLOCK]
    flip(store.path(), 50_000)
    assert wrong_blocks(objects, node, LARGE) == []


@pytest.mark.parametrize("how", ["rename", "in place"])
def test_large_object_damaged_before_its_first_opening_fails_until_it_is_restored(store: Store, how: str) -> None:
    node = store.add(LARGE)
    flip(store.path(), 50_000)
    objects = store.open()
    for _ in range(2):
        with pytest.raises(DigestMismatch) as caught:
            objects.open(node)
        assert caught.value.block is None
    put(store, LARGE, how)
    assert read_all_after_a_failure(objects, node) == LARGE


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("verification", Verification)
@pytest.mark.parametrize("size", [0, 4096, -1, 1, 100_000], ids="{:+}".format)
def test_object_of_another_size_fails_at_open(
    store: Store, content: bytes, verification: Verification, size: int
) -> None:
    node = store.add(content)
    os.truncate(store.path(), size if size in (0, 4096) else len(content) + size)
    with pytest.raises(ObjectUnusable, match=f"the image records {len(content)}"):
        store.open(verification).open(node)


@pytest.mark.parametrize("verification", Verification)
def test_object_truncated_while_open_fails_where_it_ends(store: Store, verification: Verification) -> None:
    node = store.add(LARGE)
    objects = store.open(verification)
    objects.open(node)
    os.truncate(store.path(), 8192)
    assert bytes(objects.read(node, 0, 8192)) == LARGE[:8192]
    with pytest.raises(ObjectError):
        objects.read(node, 8192, BLOCK)


@pytest.mark.parametrize("how", ["rename", "in place"])
@pytest.mark.parametrize("verification", Verification)
def test_object_truncated_while_open_is_mended_by_restoring(store: Store, verification: Verification, how: str) -> None:
    node = store.add(LARGE)
    objects = store.open(verification)
    objects.open(node)
    os.truncate(store.path(), 8192)
    with pytest.raises(ObjectError):
        objects.read(node, 8192, BLOCK)
    put(store, LARGE, how)
    assert bytes(objects.read(node, 8192, BLOCK)) == LARGE[8192 : 8192 + BLOCK]
    assert read_all(objects, node) == LARGE


def as_fifo(store: Store) -> None:
    os.mkfifo(store.path())


def as_directory(store: Store) -> None:
    store.path().mkdir()


def as_symlink(store: Store) -> None:
    store.path("ab/real").write_bytes(SMALL)
    store.path().symlink_to("real")


def as_dangling_symlink(store: Store) -> None:
    store.path().symlink_to("/nowhere")


def as_file_below_symlink(store: Store) -> None:
    store.path("ab").rmdir()
    store.path("real").mkdir()
    store.path("real/object").write_bytes(SMALL)
    store.path("ab").symlink_to("real")


def as_file_below_file(store: Store) -> None:
    store.path("ab").rmdir()
    store.path("ab").write_bytes(b"")


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("verification", Verification)
@pytest.mark.parametrize(
    "spoil", [as_fifo, as_directory, as_symlink, as_dangling_symlink, as_file_below_symlink, as_file_below_file]
)
def test_trap_object_that_is_no_regular_file_is_unusable(
    store: Store, spoil: Callable[[Store], None], verification: Verification, *, wait: bool
) -> None:
    node = store.add(SMALL)
    store.path().unlink()
    spoil(store)
    with time_limit(10), pytest.raises((ObjectUnusable, BlockingIOError)) as caught:
        store.open(verification).open(node, wait=wait)
    assert not wait or caught.type is ObjectUnusable


@pytest.mark.parametrize(
    "path",
    [b"../secret", b"ab/../../secret", b"/etc/passwd", b"", b"ab//object", b"./ab/object", b"ab/.", b"..", b"/",
     b"ab/object\0", b"ab/object\0/x", b"\0", b"ab/object/", b"ab/" + b"n" * 300, b"ab/" * 2000 + b"object"],
)  # fmt: skip
@pytest.mark.parametrize("verification", [Verification.OFF, Verification.RECORDED])
def test_trap_path_that_leads_out_of_the_store_is_refused(
    store: Store, tmp_path: Path, path: bytes, verification: Verification
) -> None:
    (tmp_path / "secret").write_bytes(SMALL)
    store.add(SMALL)
    with pytest.raises(ObjectError):
        store.open(verification).read(Store.node(SMALL, path), 0, 10)


def test_node_without_a_path_fails_at_open(store: Store) -> None:
    with pytest.raises(ObjectUnusable, match="redirect"):
        store.open().open(node_of(10, None))


def test_base_directories_are_searched_in_order(tmp_path: Path) -> None:
    store = Store(tmp_path, bases=3)
    second = store.add(SMALL, "aa/second", base=1)
    both = store.add(SMALL, "aa/both", base=1)
    store.add(b"x" * len(SMALL), "aa/both", base=2)
    third = store.add(LARGE, "bb/third", base=2)
    objects = store.open()
    assert read_all(objects, second) == SMALL
    assert read_all(objects, both) == SMALL
    assert read_all(objects, third) == LARGE
    with pytest.raises(ObjectMissing) as caught:
        objects.open(Store.node(SMALL, b"aa/none"))
    assert caught.value.path == b"aa/none"


def test_no_base_directory_has_nothing(tmp_path: Path) -> None:
    objects = Store(tmp_path, bases=0).open()
    assert objects.statvfs() is None
    with pytest.raises(ObjectMissing):
        objects.open(Store.node(SMALL))


def test_space_is_that_of_the_first_base_directory(store: Store) -> None:
    space = store.open().statvfs()
    assert space is not None
    assert space.f_blocks == os.statvfs(store.bases[0]).f_blocks


UNREADABLE = """
import os, sys
from pathlib import Path
from cfsfuse.errors import ObjectForbidden
from tests.support import Store
store = Store(Path(sys.argv[1]))
node = store.add(b"content")
os.chmod(store.path(), 0)
if os.geteuid() == 0:
    os.chmod(sys.argv[1], 0o755)
    os.setresuid(65534, 65534, 65534)
try:
    store.open(cache=None).open(node)
except ObjectForbidden as error:
    print(error)
"""


def in_subprocess(script: str, *arguments: str) -> str:
    """Run `script` with this checkout on its path; return what it prints."""
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(HERE)}
    command = [sys.executable, "-W", "error", "-c", script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_unreadable_object_is_forbidden() -> None:
    # Not below pytest's own temporary directory: the user that the script becomes has to be let in.
    with tempfile.TemporaryDirectory() as folder:
        assert in_subprocess(UNREADABLE, folder) == "object ab/object: permission denied\n"
    assert issubclass(ObjectForbidden, ObjectError)


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
def test_verity_required_refuses_a_file_without_digest(store: Store, content: bytes) -> None:
    store.add(content)
    node = node_of(len(content), b"ab/object")
    with pytest.raises(ObjectUnusable, match="verity is required"):
        store.open(Verification.REQUIRED).open(node)
    assert read_all(store.open(), node) == content
    assert read_all(store.open(Verification.OFF), node) == content


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
def test_noverity_reads_what_is_there(store: Store, content: bytes) -> None:
    node = store.add(content)
    flip(store.path(), 5000)
    assert read_all(store.open(Verification.OFF), node) == store.path().read_bytes() != content


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("how", ["rename", "in place"])
def test_replaced_and_restored_object(store: Store, content: bytes, how: str) -> None:
    node = store.add(content)
    objects = store.open()
    assert read_all(objects, node) == content
    for _ in range(3):
        put(store, random_bytes(len(content), 1), how)
        with contextlib.suppress(ObjectError):
            assert read_all(objects, node) == content
        put(store, content, how)
        assert read_all_after_a_failure(objects, node) == content


def read_all_after_a_failure(objects: ObjectStore, node: External) -> bytes:
    """Read; the first error may still be about the descriptor that was kept of the object before."""
    try:
        return read_all(objects, node)
    except DigestMismatch:
        return read_all(objects, node)


def test_deleted_object_reads_on_from_its_descriptor(store: Store) -> None:
    node = store.add(LARGE)
    objects = store.open()
    objects.open(node)
    store.path().unlink()
    assert read_all(objects, node) == LARGE
    with pytest.raises(ObjectMissing):
        store.open().open(node)


def test_changed_small_object_is_noticed_when_opened_again(store: Store) -> None:
    node = store.add(SMALL)
    objects = store.open()
    objects.open(node)
    flip(store.path(), 0)
    with pytest.raises(DigestMismatch):
        objects.open(node)


def test_small_object_is_known_good_until_something_happens_to_it(tmp_path: Path) -> None:
    store = Store(tmp_path, bases=2)
    node = store.add(SMALL, base=1)
    objects = store.open()
    assert not objects.is_known_good(node)
    objects.open(node)
    assert objects.is_known_good(node)
    assert not objects.is_known_good(node_of(len(SMALL), b"ab/object", Digest("sha256", bytes(32))))
    assert not objects.is_known_good(node_of(len(SMALL), None, node.digest))
    # What stands in the first base directory is what would be opened, whatever it is.
    store.path().parent.mkdir()
    store.path().symlink_to(store.path(base=1))
    assert not objects.is_known_good(node)
    store.path().unlink()
    assert objects.is_known_good(node)
    store.path().parent.rmdir()
    store.path().parent.write_bytes(b"")
    assert not objects.is_known_good(node)
    store.path().parent.unlink()
    flip(store.path(base=1), 0)
    assert not objects.is_known_good(node)
    flip(store.path(base=1), 0)
    objects.open(node)
    assert objects.is_known_good(node)
    store.path(base=1).unlink()
    assert not objects.is_known_good(node)


def test_large_object_is_never_known_good(store: Store) -> None:
    """It may be verified in part only, and has to be open."""
    node = store.add(LARGE)
    objects = store.open()
    assert read_all(objects, node) == LARGE
    assert not objects.is_known_good(node)


def test_two_digests_of_one_object_share_nothing(store: Store) -> None:
    node = store.add(SMALL)
    other = node_of(len(SMALL), b"ab/object", Digest("sha256", bytes(32)))
    objects = store.open()
    assert read_all(objects, node) == SMALL
    with pytest.raises(DigestMismatch):
        objects.read(other, 0, 10)
    assert read_all(objects, node) == SMALL


def opened_before(store: Store, content: bytes) -> tuple[External, ObjectStore]:
    """Return a node and a store that knows its tree, but has nothing of its content."""
    node = store.add(content)
    store.record_tree(content)
    objects = store.open()
    if content is LARGE:
        objects.read(node, 0, 1)
    return node, objects


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("answer", ["would block", "not supported", "part of it", "nothing"])
def test_file_that_is_not_in_memory_is_not_waited_for(
    store: Store, content: bytes, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What preadv2 says of a cold file, of a file system without RWF_NOWAIT, of a file partly cold; and Linux 5.10."""
    node, objects = opened_before(store, content)
    preadv = os.preadv

    def cold(fd: int, buffers: list[bytearray], offset: int, flags: int = 0) -> int:
        if not flags & os.RWF_NOWAIT:
            return preadv(fd, buffers, offset, flags)
        if answer == "part of it" and offset == 0:
            return preadv(fd, [memoryview(buffers[0])[:BLOCK]], offset)
        if answer == "nothing":
            return 0
        number = errno.EOPNOTSUPP if answer == "not supported" else errno.EAGAIN
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", cold)
    for _ in range(2):
        with pytest.raises(BlockingIOError):
            objects.read(node, 0, len(content), wait=False)
    assert bytes(objects.read(node, 0, len(content))) == content


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
def test_really_cold_file_is_not_waited_for(store: Store, content: bytes) -> None:
    node, objects = opened_before(store, content)
    fd = os.open(store.path(), os.O_RDONLY)
    try:
        # A fast disk may have the answer before the kernel looks: then once more.
        for _ in range(50):
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            try:
                assert bytes(objects.read(node, 0, len(content), wait=False)) == content
            except BlockingIOError:
                break
            node, objects = Store.node(content), store.open()
            objects.read(node, 0, 1 if content is LARGE else 0)
        else:
            pytest.skip("this file system keeps every file in memory, or its disk is faster than a look")
    finally:
        os.close(fd)
    assert bytes(objects.read(node, 0, len(content))) == content


MANY_OBJECTS = """
import os, resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))
from tests.support import Store, random_bytes
store = Store(Path(sys.argv[1]))
contents = [random_bytes((1 << 20) + 1, seed) for seed in range(3)]
nodes = []
for number in range(200):
    content = contents[number % 3]
    name = f"ab/{number}"
    path = store.path(name)
    path.parent.mkdir(exist_ok=True)
    if number < 3:
        path.write_bytes(content)
        store.record_tree(content, name)
    else:
        os.link(store.path(f"ab/{number % 3}"), path)
        os.link(store.bases[0] / ".merkle/ab" / str(number % 3), store.bases[0] / ".merkle" / name)
    nodes.append(Store.node(content, name))
objects = store.open(cache=None)
for turn in range(2):
    for number, node in enumerate(nodes):
        objects.open(node)
        assert bytes(objects.read(node, 4096, 8192)) == contents[number % 3][4096:12288]
print(len(os.listdir("/proc/self/fd")))
"""


def test_trap_more_large_objects_than_descriptors(tmp_path: Path) -> None:
    assert int(in_subprocess(MANY_OBJECTS, str(tmp_path))) < 160


def test_descriptors_of_others_are_made_room_for(store: Store) -> None:
    nodes = [store.add(random_bytes((1 << 20) + 1, seed), f"ab/{seed}") for seed in range(6)]
    objects = store.open(cache=None)
    for node in nodes:
        objects.open(node)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd"))) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
    taken = []
    try:
        try:
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        except OSError as error:
            assert error.errno == errno.EMFILE  # noqa: PT017 - the last one is meant to fail
        small = Store.node(b"late", b"ab/late")
        objects_path = store.path("ab/late")
        os.close(taken.pop())
        objects_path.write_bytes(b"late")
        taken.append(os.open(os.devnull, os.O_RDONLY))
        assert bytes(objects.read(small, 0, 4)) == b"late"
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_contents_of_small_objects_stay_within_a_budget(store: Store) -> None:
    tree = [store.add(random_bytes(900_000, seed), f"ab/{seed}") for seed in range(40)]
    with open("/proc/self/statm", encoding="ascii") as file:
        before = int(file.read().split()[1])
    objects = store.open()
    for node in tree:
        assert len(read_all(objects, node)) == 900_000
    with open("/proc/self/statm", encoding="ascii") as file:
        after = int(file.read().split()[1])
    assert (after - before) * resource.getpagesize() < 28 << 20
