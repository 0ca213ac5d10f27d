"""Options and what the host has → the backend: every row of the table, and what is looked at for it."""

from __future__ import annotations

import dataclasses

import pytest

from cfsfuse.errors import HostError
from cfsfuse.mount.options import parse
from cfsfuse.mount.plan import Backend, Fact, choose, judge

KERNEL, FUSE = Backend.KERNEL, Backend.FUSE
ROOT_WITHOUT_VERITY = frozenset(Fact) - {Fact.OVERLAY_VERITY, Fact.OBJECTS_VERITY}
ALL = frozenset(Fact)
ORDINARY = frozenset((Fact.FUSE, Fact.FUSE_MOUNT))
LAYERS = "upperdir=/u,workdir=/w"


class Facts:
    """A host that has some of the facts, and notes which are looked at."""

    def __init__(self, has: frozenset[Fact]) -> None:
        self._has = has
        self.seen: list[Fact] = []

    def look(self, fact: Fact) -> str | None:
        self.seen.append(fact)
        return None if fact in self._has else f"no {fact.value}"


def reason(backend: Backend, problem: Fact | str) -> str:
    text = f"no {problem.value}" if isinstance(problem, Fact) else problem
    return f"{backend.value} backend: {text}"


UID, GID = "uid= is not for it", "gid= is not for it"
PRIVATE = "noallow_other is not for it: such a mount is there for everybody"
SERVER = "--foreground is for a server, which it has not"
UPPER, IDMAP = "upperdir= is not for it", "idmap= is not for it"


@pytest.mark.parametrize(
    ("options", "has", "backend"),
    [
        ("noverity", ALL, KERNEL),
        ("noverity", ROOT_WITHOUT_VERITY, KERNEL),
        ("noverity", ALL - {Fact.MOUNT}, FUSE),
        ("noverity", ALL - {Fact.KERNEL_VIEW}, FUSE),
        ("noverity", ORDINARY, FUSE),
        ("noverity", frozenset((Fact.MOUNT, Fact.KERNEL_VIEW)), KERNEL),
        *(
            row
            for verifying in ("", "tryverity", "verity")
            for row in (
                (verifying, ALL, KERNEL),
                (verifying, ROOT_WITHOUT_VERITY, FUSE),
                (verifying, ALL - {Fact.OBJECTS_VERITY}, FUSE),
                (verifying, ALL - {Fact.OVERLAY_VERITY}, FUSE),
                (verifying, ALL - {Fact.KERNEL_VIEW}, FUSE),
                (verifying, ORDINARY, FUSE),
                (verifying, ALL - ORDINARY, KERNEL),
                (f"{verifying},backend=kernel", ALL, KERNEL),
                (f"{verifying},backend=fuse", ALL, FUSE),
                (f"{verifying},backend=fuse", ORDINARY, FUSE),
            )
        ),
        ("noverity,uid=0", ALL, FUSE),
        ("noverity,gid=0", ALL, FUSE),
        ("noverity,noallow_other", ALL, FUSE),
        ("noverity,allow_other", ALL, KERNEL),
        (f"noverity,{LAYERS}", ALL, KERNEL),
        (f"noverity,{LAYERS},ro", ALL, KERNEL),
        (LAYERS, ALL, KERNEL),
        ("noverity,idmap=/ns", ALL, KERNEL),
        (f"noverity,idmap=/ns,{LAYERS}", ROOT_WITHOUT_VERITY, KERNEL),
        ("noverity,nosuid,poll=0,statfs=image,log=/l", ALL, KERNEL),
    ],
)
def test_the_backend_is(options: str, has: frozenset[Fact], backend: Backend) -> None:
    assert choose(parse(options), Facts(has).look) is backend


@pytest.mark.parametrize(
    ("options", "has", "reasons"),
    [
        # One that is named is not replaced by another one, whatever that could do.
        ("backend=kernel", ROOT_WITHOUT_VERITY, [(KERNEL, Fact.OVERLAY_VERITY)]),
        ("backend=kernel", ALL - {Fact.OBJECTS_VERITY}, [(KERNEL, Fact.OBJECTS_VERITY)]),
        ("backend=kernel,verity", ALL - {Fact.OBJECTS_VERITY}, [(KERNEL, Fact.OBJECTS_VERITY)]),
        ("backend=kernel,noverity", ORDINARY, [(KERNEL, Fact.MOUNT)]),
        ("backend=kernel,noverity", ALL - {Fact.KERNEL_VIEW}, [(KERNEL, Fact.KERNEL_VIEW)]),
        ("backend=kernel,noverity,uid=1", ALL, [(KERNEL, UID)]),
        ("backend=kernel,noverity,gid=1", ALL, [(KERNEL, GID)]),
        ("backend=kernel,noverity,noallow_other", ALL, [(KERNEL, PRIVATE)]),
        (f"backend=fuse,{LAYERS}", ALL, [(FUSE, UPPER)]),
        ("backend=fuse,idmap=/ns", ALL, [(FUSE, IDMAP)]),
        ("backend=fuse", ALL - {Fact.FUSE}, [(FUSE, Fact.FUSE)]),
        ("backend=fuse", ALL - {Fact.FUSE_MOUNT}, [(FUSE, Fact.FUSE_MOUNT)]),
        # Nothing is possible: each says why, in one line.
        ("", frozenset(), [(KERNEL, Fact.MOUNT), (FUSE, Fact.FUSE)]),
        ("", ROOT_WITHOUT_VERITY - {Fact.FUSE}, [(KERNEL, Fact.OVERLAY_VERITY), (FUSE, Fact.FUSE)]),
        (LAYERS, ROOT_WITHOUT_VERITY, [(KERNEL, Fact.OVERLAY_VERITY), (FUSE, UPPER)]),
        (LAYERS, ORDINARY, [(KERNEL, Fact.MOUNT), (FUSE, UPPER)]),
        ("idmap=/ns", ALL - {Fact.OBJECTS_VERITY}, [(KERNEL, Fact.OBJECTS_VERITY), (FUSE, IDMAP)]),
        (f"noverity,uid=1,{LAYERS}", ALL, [(KERNEL, UID), (FUSE, UPPER)]),
        ("noverity,noallow_other,idmap=/ns", ALL, [(KERNEL, PRIVATE), (FUSE, IDMAP)]),
    ],
)
def test_there_is_none_because(options: str, has: frozenset[Fact], reasons: list[tuple[Backend, Fact | str]]) -> None:
    with pytest.raises(HostError) as caught:
        choose(parse(options), Facts(has).look)
    assert str(caught.value) == "; ".join(reason(*each) for each in reasons)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "backend"), [("noverity", FUSE), ("backend=kernel,noverity", KERNEL), ("backend=fuse", FUSE)]
)
def test_a_server_in_the_foreground_is_fuse_unless_the_kernel_is_named(options: str, backend: Backend) -> None:
    assert choose(parse(options), Facts(ALL).look, foreground=True) is backend


MOUNT_FACTS = [Fact.MOUNT, Fact.KERNEL_VIEW]
VERITY_FACTS = [Fact.MOUNT, Fact.OVERLAY_VERITY, Fact.OBJECTS_VERITY, Fact.KERNEL_VIEW]
FUSE_FACTS = [Fact.FUSE, Fact.FUSE_MOUNT]


@pytest.mark.parametrize(
    ("options", "has", "seen"),
    [
        ("noverity", ALL, MOUNT_FACTS),
        ("noverity", ORDINARY, [Fact.MOUNT, *FUSE_FACTS]),
        ("", ALL, VERITY_FACTS),
        ("", ROOT_WITHOUT_VERITY, [*VERITY_FACTS[:2], *FUSE_FACTS]),
        ("", ALL - {Fact.OBJECTS_VERITY}, [*VERITY_FACTS[:3], *FUSE_FACTS]),
        ("", ORDINARY, [Fact.MOUNT, *FUSE_FACTS]),
        ("uid=1", ALL, FUSE_FACTS),
        ("backend=fuse", ALL, FUSE_FACTS),
        ("backend=kernel,noverity", ALL, MOUNT_FACTS),
    ],
)
def test_no_more_is_looked_at_than_needed_and_the_cheap_first(
    options: str, has: frozenset[Fact], seen: list[Fact]
) -> None:
    facts = Facts(has)
    choose(parse(options), facts.look)
    assert facts.seen == seen


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ("backend=kernel", [Fact.MOUNT]),
        ("backend=kernel,uid=1", []),
        (f"backend=fuse,{LAYERS}", []),
        ("backend=fuse", [Fact.FUSE]),
        ("", [Fact.MOUNT, Fact.FUSE]),
    ],
)
def test_the_first_thing_that_is_wrong_is_enough(options: str, seen: list[Fact]) -> None:
    facts = Facts(frozenset())
    with pytest.raises(HostError):
        choose(parse(options), facts.look)
    assert facts.seen == seen


def test_judgement_tells_all_that_is_wrong() -> None:
    options = parse(f"uid=1,gid=2,noallow_other,idmap=/ns,{LAYERS}")
    kernel, fuse = judge(options, Facts(frozenset()).look, foreground=True)
    facts = [f"no {fact.value}" for fact in VERITY_FACTS]
    assert (kernel.backend, kernel.problems) == (KERNEL, [UID, GID, PRIVATE, SERVER, *facts])
    assert (fuse.backend, fuse.problems) == (FUSE, [UPPER, IDMAP, *(f"no {fact.value}" for fact in FUSE_FACTS)])


@pytest.mark.parametrize("name", ["auto", "kernel", "fuse"])
def test_judgement_of_a_backend_does_not_depend_on_which_is_named(name: str) -> None:
    options = dataclasses.replace(parse("noverity"), backend=name)
    assert [verdict.problems for verdict in judge(options, Facts(ALL).look)] == [[], []]


@pytest.mark.parametrize("options", ["", "verity", "tryverity", LAYERS, "idmap=/ns"])
def test_the_kernel_is_never_taken_to_verify_less(options: str) -> None:
    for has in (ALL - {Fact.OBJECTS_VERITY}, ALL - {Fact.OVERLAY_VERITY}):
        kernel, _ = judge(parse(options), Facts(has).look)
        assert kernel.problems
