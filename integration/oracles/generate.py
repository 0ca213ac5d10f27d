"""Random trees, of everything that an image can hold, with a liking for the places where its layout has corners.

What is made is either a dump, or what a directory on this machine can hold; `dump` and `tree` give one each, always
the same for the same state of the generator.
"""

from __future__ import annotations

import stat
import struct
from typing import TYPE_CHECKING

from integration.oracles.nodes import Node, Path

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

BLOCK = 4096
INLINE_MAX = 5000
NAME_MAX = 255
TARGET_MAX = 4095
_DIRENT = 12
_DOTS = _DIRENT + 1 + _DIRENT + 2
_XATTR_NAME_MAX = 255
_XATTRS_MAX = 32767  # what the reference takes of one inode's, as it counts them
_XATTR_HEADER = 12
_XATTR_ENTRY = 7

# Tables that turn random bytes into text: a few printable bytes, and whatever a name may have.
_PLAIN = bytes(b"abcdefghijklmnopqrstuvwxyz012345._"[byte % 34] for byte in range(256))
_ANY = bytes(byte if byte not in b"\0/" else 0xE9 for byte in range(256))
_ODD_NAMES = (
    b"-",
    b" ",
    b"\n",
    b"\\",
    b"=",
    b"...",
    b".a",
    b"..a",
    b"\xff",
    b"\x01",
    b"\\x2d",
    b"a\tb\rc",
    b"\xc3\xa9",
)
_HIDDEN_NAMES = tuple(b"%02x" % number for number in range(256))

_NAME_SPACES = (b"user.", b"trusted.", b"security.", b"trusted.overlay.", b"trusted.overlay.overlay.", b"user.overlay.")
_XATTR_NAMES = (
    *(b"trusted.overlay." + name for name in (b"opaque", b"whiteout", b"whiteouts", b"redirect", b"metacopy", b"")),
    *(b"trusted.overlay.overlay." + name for name in (b"opaque", b"whiteout", b"whiteouts", b"overlay.x")),
    *(b"user.overlay." + name for name in (b"opaque", b"whiteout", b"whiteouts", b"redirect", b"metacopy")),
    *(b"security.selinux", b"security.capability", b"security.ima", b"user.x=y", b"user.a b", b"trusted.overlayx"),
)
# What only a dump can hold: names without a handler, and those that a prefix of another one could be taken for.
_STRANGE_XATTR_NAMES = (
    *(b"btrfs.x", b"os2.x", b"system.nfs4_acl", b"x", b"user", b"userx", b"trusted", b"=", b"-", b"\xff\xfe"),
    *(b"user.", b"trusted.", b"security.", b"system.posix_acl_access.x", b"system.posix_acl_defaults", b"system."),
)
_ACL_NAMES = (b"system.posix_acl_access", b"system.posix_acl_default")
_ACL_HEADER, _ACL_ENTRY = struct.Struct("<I"), struct.Struct("<HHI")
_ACL_VERSION, _ACL_NO_ID = 2, 0xFFFFFFFF
_CAPABILITY = struct.pack("<IIIII", 0x02000001, 0x2000, 0, 0, 0)  # struct vfs_cap_data: revision 2, effective

_IDS = (0, 1, 1000, 65534, 65535, 65536, 70000, 2**31, 2**32 - 1)
_SECONDS = (0, 1, -1, 1_700_000_000, 2**31 - 1, 2**31, 2**32, 2**34, -(2**31), -(2**40), 2**62, -(2**62), 2**63 - 1)
_NANOSECONDS = (0, 1, 123_456_789, 999_999_999)
_TAILS = (1, 31, 32, 33, 64, 65, 2047, 2048, 2049, 4032, 4064, 4065, 4095, 4096, 4097, 4999, INLINE_MAX)
_FILLED = (100, BLOCK // 2 - 1, BLOCK // 2, BLOCK // 2 + 1, BLOCK - 1, BLOCK)
_CONTENT_SIZES = (0, 1, 63, 64, 65, 4095, 4096, 4097, 8192, 70_000, 300_000)


def dump(rng: random.Random) -> list[Node]:
    """Return a tree that only a dump need be able to hold."""
    made = _Tree(rng, on_disk=False)
    features = rng.sample(_DUMP_FEATURES, rng.choice((1, 1, 2, 2, 3, 4)))
    for feature in features:
        feature(made)
    return made.in_some_order()


def tree(rng: random.Random, *, privileged: bool) -> list[Node]:
    """Return a tree that can be made on disk: by root, when `privileged`."""
    made = _Tree(rng, on_disk=True, privileged=privileged)
    features = rng.sample(_TREE_FEATURES, rng.choice((1, 2, 2, 3)))
    for feature in features:
        feature(made)
    return made.nodes


class _Tree:
    """A tree in the making. What its nodes have in common, such as their times, is chosen once for all of it."""

    def __init__(self, rng: random.Random, *, on_disk: bool, privileged: bool = True) -> None:
        self.rng = rng
        self.on_disk = on_disk
        self.privileged = privileged
        self.directories: list[Path] = [()]
        self._taken: set[Path] = {()}
        self._seconds = rng.choice(((1_700_000_000,), (0, 1_700_000_000), _SECONDS, None))
        self._nanoseconds = rng.choice(((0,), (123_456_789,), _NANOSECONDS))
        self._ids = rng.choice(((0,), (0, 1000), _IDS)) if privileged else (0,)
        self._odd_names = rng.random() < 0.5
        self._xattrs_at_all = rng.choice((0.0, 0.2, 0.9))
        self._xattr_pool = [self.xattr() for _ in range(rng.choice((1, 5, 30)))]
        self._contents = [self.content(rng.choice(_CONTENT_SIZES)) for _ in range(4)]
        self.nodes: list[Node] = [self._dressed(Node((), stat.S_IFDIR | self.permissions()), nlink=2)]

    # Nodes

    def add(self, path: Path, kind: int, **fields: object) -> Path:
        """Add a node of any owner, time and xattrs; `fields` say otherwise."""
        node = Node(path, kind | self.permissions())
        self.nodes.append(self._dressed(node, **fields))
        self._taken.add(path)
        if kind == stat.S_IFDIR:
            self.directories.append(path)
        return path

    def change(self, path: Path, **fields: object) -> None:
        """Change a node that has just been added."""
        at = next(at for at in reversed(range(len(self.nodes))) if self.nodes[at].path == path)
        self.nodes[at] = self.nodes[at]._replace(**fields)  # type: ignore[arg-type]  # as above

    def directory(self, parent: Path, name: bytes | None = None, **fields: object) -> Path:
        size = self.rng.choice((0, 4096, 2**40))
        return self.add(self.free(parent, name), stat.S_IFDIR, **{"size": size, "nlink": 2, **fields})

    def symlink(self, parent: Path, length: int | None = None, name: bytes | None = None) -> Path:
        target = self.text(length or self._length(TARGET_MAX), _ANY if self._odd_names else _PLAIN)
        if self.rng.random() < 0.02:
            target = b"-"
        return self.add(self.free(parent, name), stat.S_IFLNK, payload=target, size=len(target))

    def inline(self, parent: Path, length: int, name: bytes | None = None) -> Path:
        """Add a file whose content is in the image; a dump may record a path and a digest of it all the same."""
        content = b"-" if length == 1 else self.content(length)
        fields: dict[str, object] = {"content": content, "size": length}
        if not self.on_disk and self.rng.random() < 0.2:
            fields |= {"payload": self.text(20), "digest": self.rng.randbytes(32)}
        return self.add(self.free(parent, name), stat.S_IFREG, **fields)

    def external(self, parent: Path, size: int, name: bytes | None = None) -> Path:
        """Add a file whose content is an object, or that has a size and nothing else."""
        digest = self.rng.randbytes(32)
        usual = f"{digest.hex()[:2]}/{digest.hex()[2:]}".encode()
        long = self.text(self._length(TARGET_MAX), _ANY)
        payload = self.rng.choice((usual, usual, usual, long, b"-", b"any name", b"/absolute", None))
        recorded = digest if self.rng.random() < 0.8 else None
        return self.add(self.free(parent, name), stat.S_IFREG, size=size, payload=payload, digest=recorded)

    def stored(self, parent: Path, name: bytes | None = None) -> Path:
        """Add a file with content of any length to a tree on disk; some have the same."""
        if self.rng.random() < 0.3:
            content = self.rng.choice(self._contents)
        else:
            content = self.content(self.rng.choice(_CONTENT_SIZES[:-2]))
        return self.add(self.free(parent, name), stat.S_IFREG, content=content, size=len(content))

    def special(self, parent: Path, name: bytes | None = None) -> Path:
        kinds = [stat.S_IFIFO, stat.S_IFSOCK]
        if self.privileged:
            kinds += [stat.S_IFCHR, stat.S_IFBLK]
        kind = self.rng.choice(kinds)
        fields: dict[str, object] = {}
        if kind in (stat.S_IFCHR, stat.S_IFBLK):
            fields["rdev"] = self.rng.choice((1, 0x103, 0x801, 0xFFF00 | 3, 2**32 - 1, self.rng.getrandbits(32) | 1))
        if not self.on_disk and self.rng.random() < 0.1:
            fields["size"] = self.rng.choice((1, 2**32 - 1, 2**32, 2**40))
        return self.add(self.free(parent, name), kind, **fields)

    def whiteout(self, parent: Path, name: bytes | None = None) -> Path:
        size = 2**33 if not self.on_disk and self.rng.random() < 0.2 else 0
        return self.add(self.free(parent, name), stat.S_IFCHR, rdev=0, size=size)

    def hard_link(self, parent: Path, target: Node) -> None:
        node = Node(self.free(parent), target.mode, nlink=2, link=target.path)
        self._taken.add(node.path)
        # Anywhere behind its directory, which may be before its target.
        directory = next(at for at, other in enumerate(self.nodes) if other.path == parent)
        at = len(self.nodes) if self.on_disk else self.rng.randint(directory + 1, len(self.nodes))
        self.nodes.insert(at, node)

    def anything(self, parent: Path, name: bytes | None = None) -> Path:
        chosen = self.rng.random()
        if chosen < 0.15:
            return self.directory(parent, name)
        if chosen < 0.3:
            return self.symlink(parent, name=name)
        if chosen < 0.4:
            return self.special(parent, name)
        if self.on_disk:
            return self.stored(parent, name)
        if chosen < 0.7:
            return self.inline(parent, self.rng.choice((0, 1, 20, 64, 65, self._length(INLINE_MAX))), name)
        return self.external(parent, self.file_size(), name)

    def _dressed(self, node: Node, **fields: object) -> Node:
        choice = self.rng.choice
        nlink = 1 if self.on_disk or self.rng.random() < 0.9 else choice((0, 2, 65535, 65536, 2**32 - 1))
        node = node._replace(
            nlink=nlink,
            uid=choice(self._ids),
            gid=choice(self._ids),
            seconds=choice(self._seconds) if self._seconds else self.rng.randint(-(2**33), 2**34),
            nanoseconds=choice(self._nanoseconds),
        )
        if self.rng.random() < self._xattrs_at_all:
            node = node._replace(xattrs=self.some_xattrs(node.kind))
        return node._replace(**fields)  # type: ignore[arg-type]  # fields of Node, by name

    def in_some_order(self) -> list[Node]:
        """Return the nodes as they are, or in another order in which directories still precede what is in them."""
        if self.rng.random() < 0.5:
            return self.nodes
        keys = {node.path: self.rng.random() for node in self.nodes}
        for node in self.nodes:
            if node.path:
                keys[node.path] = max(keys[node.path], keys[node.path[:-1]])
        return sorted(self.nodes, key=lambda node: (keys[node.path], len(node.path)))

    # Names

    def free(self, parent: Path, name: bytes | None = None) -> Path:
        """Return the path of a new entry of `parent`."""
        while name is None or (*parent, name) in self._taken:
            name = self.name()
        return (*parent, name)

    def name(self) -> bytes:
        length = self._length(NAME_MAX)
        if not self._odd_names:
            return self.text(length, _PLAIN).replace(b".", b"_")
        name = self.rng.choice(_ODD_NAMES) if self.rng.random() < 0.1 else self.text(length, _ANY)
        return name if name not in (b".", b"..") else b"x"

    def _length(self, most: int) -> int:
        """Return a length from 1 to `most`, short ones and the longest being likelier."""
        chosen = self.rng.random()
        if chosen < 0.6:
            return self.rng.randint(1, min(20, most))
        return self.rng.randint(1, most) if chosen < 0.95 else most

    def text(self, length: int, alphabet: bytes = _PLAIN) -> bytes:
        return self.rng.randbytes(length).translate(alphabet)

    def content(self, length: int) -> bytes:
        if self.rng.random() < 0.3:
            return self.rng.randbytes(length)
        return (self.rng.randbytes(7) * (length // 7 + 1))[:length]

    def permissions(self) -> int:
        if self.on_disk and not self.privileged:
            return self.rng.choice((0o644, 0o755, 0o700, 0o1777)) | 0o700
        return self.rng.choice((0o644, 0o755, 0o4711, 0o7777, 0, self.rng.getrandbits(12)))

    def file_size(self) -> int:
        if self.rng.random() < 0.5:
            return self.rng.choice((0, 1, 65, 4095, 4096, 4097, 2**32 - 1, 2**32, 2**32 + 1))
        # Chunks are of up to 2^43 bytes, and a map has up to 1024 of them.
        power = 1 << self.rng.randint(0, 53)
        return min(2**53, max(0, power + self.rng.choice((-1, 0, 1))))

    # xattrs

    def some_xattrs(self, kind: int) -> tuple[tuple[bytes, bytes], ...]:
        """Return xattrs for a node: some of those that others have as well, some of its own."""
        pool = self._xattr_pool
        chosen = dict(self.rng.sample(pool, self.rng.randint(0, min(4, len(pool)))))
        chosen |= dict(self.xattr() for _ in range(self.rng.choice((0, 0, 1, 2))))
        if self.rng.random() < 0.1 and kind != stat.S_IFLNK:
            names = _ACL_NAMES if kind == stat.S_IFDIR else _ACL_NAMES[:1]
            chosen |= {name: self.acl() for name in names}
        return limited(chosen)

    def xattr(self) -> tuple[bytes, bytes]:
        """Return an xattr of any name space."""
        rng = self.rng
        chosen = rng.random()
        value = b"" if rng.random() < 0.2 else rng.randbytes(rng.choice((1, 4, 20, 33, 200)))
        if chosen < 0.5:
            space = rng.choice(_NAME_SPACES)
            length = self._length(_XATTR_NAME_MAX - len(space))
            name = space + self.text(length, _ANY if rng.random() < 0.3 else _PLAIN)
        elif chosen < 0.9 or self.on_disk:
            name = rng.choice(_XATTR_NAMES)
        else:
            name = rng.choice(_STRANGE_XATTR_NAMES)
        if self.on_disk and name == b"security.capability":
            value = _CAPABILITY
        return name, value

    def acl(self) -> bytes:
        """Return a valid ACL: entries in the order of their tags, a mask because there are named ones."""
        ids = sorted(self.rng.sample((0, 5, 1000, 70_000, 2**31), 2))
        user_obj, user, group_obj, group, mask, other = 1, 2, 4, 8, 16, 32
        entries = [
            (user_obj, _ACL_NO_ID),
            *((user, each) for each in ids),
            (group_obj, _ACL_NO_ID),
            (group, ids[0]),
            (mask, _ACL_NO_ID),
            (other, _ACL_NO_ID),
        ]
        least = 7 if self.on_disk and not self.privileged else 0  # who makes it has to be able to read it
        packed = (_ACL_ENTRY.pack(tag, self.rng.randint(least, 7), each) for tag, each in entries)
        return _ACL_HEADER.pack(_ACL_VERSION) + b"".join(packed)


def limited(xattrs: dict[bytes, bytes]) -> tuple[tuple[bytes, bytes], ...]:
    """Return as many xattrs as the reference takes of one inode."""
    left = _XATTRS_MAX - _XATTR_HEADER
    kept = []
    for name, value in xattrs.items():
        left -= _XATTR_ENTRY + len(name) + len(value)
        if left < 0:
            break
        kept.append((name, value))
    return tuple(kept)


# Features: what a case is made of. Each adds some entries below a directory of the tree.


def _scattered(made: _Tree) -> None:
    """Entries of every kind, in directories of any depth."""
    for _ in range(made.rng.choice((3, 20, 60, 150))):
        made.anything(made.rng.choice(made.directories[-8:]))


def _crowded(made: _Tree) -> None:
    """Many entries in a directory, now and then thousands, or in the root: its names hide the store's directories."""
    parent = () if made.rng.random() < 0.3 else made.directory((), b"many")
    count = made.rng.choice((200, 300, 400, 500, 1000, 1000 if made.on_disk else 4000))
    length = made.rng.choice((0, 10, 50, 240 if count < 1000 else 20))
    variety = made.rng.choice((0, 20, 100))  # the rest is alike
    for number in range(count):
        name = b"%x" % number + made.text(made.rng.randint(0, length))
        if number < variety:
            made.anything(parent, name)
        else:
            made.add(made.free(parent, name), stat.S_IFIFO if number % 3 else stat.S_IFREG)


def _filled_directories(made: _Tree) -> None:
    """Directories whose last block is about half full, where it goes inline, or about full."""
    for target in made.rng.sample(_FILLED, 5):
        parent = made.directory((), b"filled")
        for number, length in enumerate(_lengths_that_fill(made.rng, target)):
            made.add((*parent, (b"n%04d" % number).ljust(length, b"x")), stat.S_IFIFO)


def _lengths_that_fill(rng: random.Random, target: int) -> list[int]:
    """Return lengths of names, each of at least 5, that leave `target` bytes in the last block of a directory."""
    lengths: list[int] = []
    used = _DOTS
    for _ in range(rng.choice((0, 0, 1, 3))):
        while used + _DIRENT + (length := rng.randint(5, NAME_MAX)) <= BLOCK:
            lengths.append(length)
            used += _DIRENT + length
        lengths.append(length)
        used = _DIRENT + length
    while (room := target - used - _DIRENT) >= 5:
        # What is left must be enough for one more name, or for none.
        length = room if room <= NAME_MAX else rng.randint(5, min(NAME_MAX, room - _DIRENT - 5))
        lengths.append(length)
        used += _DIRENT + length
    return lengths


def _tails(made: _Tree) -> None:
    """Contents and targets of lengths around those at which they move, one behind the other."""
    parent = made.directory(())
    for _ in range(made.rng.choice((5, 20, 50))):
        length = made.rng.choice((*_TAILS, made.rng.randint(1, INLINE_MAX)))
        if made.on_disk or made.rng.random() < 0.4:
            made.symlink(parent, min(length, TARGET_MAX))
        else:
            made.inline(parent, length)


def _long_targets(made: _Tree) -> None:
    """Targets that fill a block together with their inode, or nearly, or a little more."""
    parent = made.directory(())
    for _ in range(made.rng.choice((4, 12, 30))):
        made.symlink(parent, made.rng.choice((4030, 4062, 4000, 4094)) + made.rng.randint(-2, 1))
        if made.rng.random() < 0.3:
            made.special(parent)
    # Behind one that ends with its block, one that fills a block; the inode is extended, then compact.
    for length in made.rng.choice(((), (4020, 4032, 4020, 4032), (4050, 4064, 4050, 4064))):
        path = made.symlink(parent, length, b"z%d" % len(made.nodes))
        made.change(path, xattrs=(), uid=0, gid=0)


def _much_shared(made: _Tree) -> None:
    """Inodes that share many xattrs: more than can be referred to."""
    parent = made.directory(())
    count = made.rng.choice((3, 127, 128, 129, 130, 200))
    names = {made.rng.choice(_NAME_SPACES) + b"%03d" % number: made.text(number % 9) for number in range(count)}
    for _ in range(made.rng.choice((2, 3, 20))):
        chosen = {name: value for name, value in names.items() if made.rng.random() < 0.97}
        made.add(made.free(parent), stat.S_IFREG, content=b"x", size=1, xattrs=limited(chosen))


def _heavy_xattrs(made: _Tree) -> None:
    """Extended attributes as large as they may be, alone or together, shared or not."""
    parent = made.directory(())
    for _ in range(made.rng.choice((1, 2, 5))):
        name = made.rng.choice(_NAME_SPACES) + made.text(made.rng.choice((1, 200)))
        # In a file whose content is an object, what the image adds comes on top.
        most = _XATTRS_MAX - _XATTR_HEADER - _XATTR_ENTRY - len(name)
        size = made.rng.choice((most, most - 1, most - 150, most // 2, 3000, 4096))
        xattrs = {name: made.text(1) * size}
        if made.rng.random() < 0.5:
            xattrs |= {b"user.%03d" % number: made.text(number % 50) for number in range(300)}
        for _ in range(made.rng.choice((1, 1, 2))):
            made.change(made.anything(parent), xattrs=limited(xattrs))


def _large_files(made: _Tree) -> None:
    """Sizes up to the largest, with maps of up to 1024 chunks, where they cross blocks and where they fill one."""
    parent = made.directory(())
    for _ in range(made.rng.choice((1, 5, 30))):
        chunks = made.rng.choice((1, 2, 3, 100, 511, 512, 513, 1000, 1015, 1016, 1017, 1023, 1024))
        made.external(parent, (chunks << 43) - made.rng.choice((0, 0, 1, 4096, (1 << 43) - 1)))


def _whiteouts(made: _Tree) -> None:
    """Devices 0:0 in directories that may say already what the writer would say of them."""
    if not made.privileged:
        return
    for _ in range(made.rng.choice((1, 4))):
        parent = made.rng.choice(((), made.rng.choice(made.directories), made.directory(())))
        for _ in range(made.rng.choice((1, 2, 10))):
            made.whiteout(parent, made.rng.choice((None, *_HIDDEN_NAMES[:3])))
        made.anything(parent)


def _hidden_names(made: _Tree) -> None:
    """Entries of the root whose names are those of the store's directories."""
    for name in made.rng.sample(_HIDDEN_NAMES, made.rng.choice((1, 16, 256))):
        if (name,) not in made._taken:
            made.anything((), name)


def _hard_links(made: _Tree) -> None:
    """Further names of files, before and behind them, and of further names."""
    _scattered(made)
    for _ in range(made.rng.choice((1, 5, 40))):
        targets = [node for node in made.nodes if not node.is_directory]
        if targets:
            made.hard_link(made.rng.choice(made.directories), made.rng.choice(targets))


def _deep(made: _Tree) -> None:
    """Directories in directories; a tree on disk stays below PATH_MAX, which the reference cannot cross."""
    path: Path = ()
    for _ in range(made.rng.choice((10, 100) if made.on_disk else (10, 100, 100, 300))):
        path = made.directory(path, made.text(made.rng.randint(1, 20)) + b"d")
    made.anything(path)


_DUMP_FEATURES: list[Callable[[_Tree], None]] = [
    _scattered,
    _crowded,
    _filled_directories,
    _tails,
    _long_targets,
    _much_shared,
    _heavy_xattrs,
    _large_files,
    _whiteouts,
    _hidden_names,
    _hard_links,
    _deep,
]
_TREE_FEATURES: list[Callable[[_Tree], None]] = [
    _scattered,
    _crowded,
    _filled_directories,
    _tails,
    _long_targets,
    _much_shared,
    _whiteouts,
    _hidden_names,
    _hard_links,
    _deep,
]
