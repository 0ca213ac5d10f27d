"""Options and what the host has → the backend: every row of the table, and what is looked at for it."""

from __future__ import annotations

import itertools

import pytest

from cfsfuse.errors import HostError
from cfsfuse.mount.options import parse
from cfsfuse.mount.plan import UNTRIED, Backend, Fact, choose, judge

KERNEL, OVERLAY, FUSE = Backend
ALL = frozenset(Fact)
VERITY = {Fact.OVERLAY_VERITY, Fact.OBJECTS_VERITY}
ROOT_WITHOUT_VERITY = ALL - VERITY
ORDINARY = frozenset((Fact.FUSE, Fact.FUSE_MOUNT))
ORDINARY_WITH_VERITY = ALL - {Fact.EROFS, Fact.MOUNT, Fact.KERNEL_VIEW}
NAMESPACE = ALL - {Fact.KERNEL_VIEW}
BEFORE_6_7 = ALL - {Fact.FULL_VIEW, Fact.OVERLAY_VERITY, Fact.USER_OVERLAY, Fact.USER_OVERLAY_DATA}
KERNEL_FACTS = [Fact.EROFS, Fact.FULL_VIEW, Fact.KERNEL_VIEW]
KERNEL_VERITY_FACTS = [Fact.EROFS, Fact.OVERLAY_VERITY, Fact.OBJECTS_VERITY, Fact.FULL_VIEW, Fact.KERNEL_VIEW]
BEFORE_6_16 = {Fact.USER_OVERLAY_DATA}
BEFORE_5_11 = {Fact.USER_OVERLAY, Fact.USER_OVERLAY_DATA}
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
IDMAP = "idmap= is not for it"


@pytest.mark.parametrize(
    ("options", "has", "backend"),
    [
        ("noverity", ALL, KERNEL),
        ("noverity", ROOT_WITHOUT_VERITY, KERNEL),
        ("noverity", frozenset(KERNEL_FACTS), KERNEL),
        ("noverity", BEFORE_6_7, FUSE),
        ("noverity,backend=kernel", BEFORE_6_7, KERNEL),
        ("noverity", NAMESPACE, OVERLAY),
        ("noverity", NAMESPACE - VERITY, OVERLAY),
        ("noverity", NAMESPACE - {Fact.FUSE_MOUNT, Fact.USER_OVERLAY}, OVERLAY),
        ("noverity", NAMESPACE - BEFORE_6_16, FUSE),
        ("noverity", NAMESPACE - BEFORE_5_11, FUSE),
        ("noverity", ALL - {Fact.EROFS, Fact.MOUNT}, FUSE),
        ("noverity", ORDINARY, FUSE),
        *(
            row
            for verifying in ("", "tryverity", "verity")
            for row in (
                (verifying, ALL, KERNEL),
                (verifying, ALL - ORDINARY, KERNEL),
                (verifying, NAMESPACE, OVERLAY),
                (verifying, NAMESPACE - BEFORE_6_16, FUSE),
                (verifying, ROOT_WITHOUT_VERITY, FUSE),
                (verifying, ALL - {Fact.OBJECTS_VERITY}, FUSE),
                (verifying, ALL - {Fact.OVERLAY_VERITY}, FUSE),
                (verifying, NAMESPACE - {Fact.OBJECTS_VERITY}, FUSE),
                (verifying, NAMESPACE - {Fact.OVERLAY_VERITY}, FUSE),
                (verifying, ORDINARY_WITH_VERITY, FUSE),
                (verifying, ORDINARY, FUSE),
                (f"{verifying},backend=kernel", ALL, KERNEL),
                (f"{verifying},backend=overlay", ALL, OVERLAY),
                (f"{verifying},backend=fuse", ALL, FUSE),
                (f"{verifying},backend=fuse", ORDINARY, FUSE),
            )
        ),
        ("noverity,backend=overlay", ROOT_WITHOUT_VERITY, OVERLAY),
        ("noverity,uid=0", ALL, OVERLAY),
        ("noverity,gid=0", ALL, OVERLAY),
        ("uid=0", ALL, OVERLAY),
        ("uid=0", ROOT_WITHOUT_VERITY, FUSE),
        ("noverity,uid=0", ALL - BEFORE_6_16, FUSE),
        ("noverity,noallow_other", ALL, FUSE),
        ("noverity,allow_other", ALL, KERNEL),
        ("noverity,allow_other", NAMESPACE, OVERLAY),
        (f"noverity,{LAYERS}", ALL, KERNEL),
        (f"noverity,{LAYERS},ro", ALL, KERNEL),
        (f"noverity,{LAYERS}", NAMESPACE, OVERLAY),
        (f"noverity,{LAYERS},uid=0", ALL, OVERLAY),
        (f"noverity,{LAYERS}", NAMESPACE - BEFORE_6_16, FUSE),
        (LAYERS, ALL, KERNEL),
        (LAYERS, NAMESPACE, OVERLAY),
        (LAYERS, ROOT_WITHOUT_VERITY, FUSE),
        (f"{LAYERS},ro", ROOT_WITHOUT_VERITY, FUSE),
        (LAYERS, NAMESPACE - VERITY - {Fact.FUSE_MOUNT}, FUSE),
        (f"{LAYERS},backend=fuse", ALL, FUSE),
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
        ("backend=kernel,noverity", ORDINARY, [(KERNEL, Fact.EROFS)]),
        ("backend=kernel,noverity", NAMESPACE, [(KERNEL, Fact.KERNEL_VIEW)]),
        ("backend=kernel,noverity,uid=1", ALL, [(KERNEL, UID)]),
        ("backend=kernel,noverity,gid=1", ALL, [(KERNEL, GID)]),
        ("backend=kernel,noverity,noallow_other", ALL, [(KERNEL, PRIVATE)]),
        ("backend=overlay", ROOT_WITHOUT_VERITY, [(OVERLAY, Fact.OVERLAY_VERITY)]),
        ("backend=overlay", ALL - {Fact.OBJECTS_VERITY}, [(OVERLAY, Fact.OBJECTS_VERITY)]),
        ("backend=overlay,verity", ALL - {Fact.OBJECTS_VERITY}, [(OVERLAY, Fact.OBJECTS_VERITY)]),
        ("backend=overlay,noverity", ORDINARY, [(OVERLAY, Fact.MOUNT)]),
        ("backend=overlay,noverity", ALL - {Fact.FUSE}, [(OVERLAY, Fact.FUSE)]),
        ("backend=overlay,noverity", ALL - BEFORE_6_16, [(OVERLAY, Fact.USER_OVERLAY_DATA)]),
        ("backend=overlay,noverity,idmap=/ns", ALL, [(OVERLAY, IDMAP)]),
        ("backend=overlay,noverity,noallow_other", ALL, [(OVERLAY, PRIVATE)]),
        ("backend=fuse,idmap=/ns", ALL, [(FUSE, IDMAP)]),
        ("backend=fuse", ALL - {Fact.FUSE}, [(FUSE, Fact.FUSE)]),
        ("backend=fuse", ALL - {Fact.FUSE_MOUNT}, [(FUSE, Fact.FUSE_MOUNT)]),
        (f"backend=fuse,{LAYERS}", ORDINARY, [(FUSE, Fact.MOUNT)]),
        (f"backend=fuse,{LAYERS}", ALL - BEFORE_5_11, [(FUSE, Fact.USER_OVERLAY)]),
        (f"backend=fuse,{LAYERS},noallow_other", ALL, [(FUSE, PRIVATE)]),
        # Nothing is possible: each says why, in one line.
        ("", frozenset(), [(KERNEL, Fact.EROFS), (OVERLAY, Fact.FUSE), (FUSE, Fact.FUSE)]),
        (
            "",
            ROOT_WITHOUT_VERITY - {Fact.FUSE},
            [(KERNEL, Fact.OVERLAY_VERITY), (OVERLAY, Fact.FUSE), (FUSE, Fact.FUSE)],
        ),
        (
            LAYERS,
            ROOT_WITHOUT_VERITY - BEFORE_5_11,
            [(KERNEL, Fact.OVERLAY_VERITY), (OVERLAY, Fact.OVERLAY_VERITY), (FUSE, Fact.USER_OVERLAY)],
        ),
        (LAYERS, ORDINARY, [(KERNEL, Fact.EROFS), (OVERLAY, Fact.MOUNT), (FUSE, Fact.MOUNT)]),
        (
            "idmap=/ns",
            ALL - {Fact.OBJECTS_VERITY},
            [(KERNEL, Fact.OBJECTS_VERITY), (OVERLAY, IDMAP), (FUSE, IDMAP)],
        ),
        (
            f"noverity,uid=1,{LAYERS}",
            ALL - BEFORE_5_11,
            [(KERNEL, UID), (OVERLAY, Fact.USER_OVERLAY_DATA), (FUSE, Fact.USER_OVERLAY)],
        ),
        ("noverity,noallow_other,idmap=/ns", ALL, [(KERNEL, PRIVATE), (OVERLAY, IDMAP), (FUSE, IDMAP)]),
    ],
)
def test_there_is_none_because(options: str, has: frozenset[Fact], reasons: list[tuple[Backend, Fact | str]]) -> None:
    with pytest.raises(HostError) as caught:
        choose(parse(options), Facts(has).look)
    assert str(caught.value) == "; ".join(reason(*each) for each in reasons)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "has", "backend"),
    [
        ("noverity", ALL, OVERLAY),
        ("", ALL, OVERLAY),
        ("", ROOT_WITHOUT_VERITY, FUSE),
        ("noverity", ALL - BEFORE_6_16, FUSE),
        ("backend=kernel,noverity", ALL, KERNEL),
        ("backend=overlay,noverity", ALL, OVERLAY),
        ("backend=fuse", ALL, FUSE),
    ],
)
def test_in_the_foreground_is_a_server_unless_the_kernel_is_named(
    options: str, has: frozenset[Fact], backend: Backend
) -> None:
    assert choose(parse(options), Facts(has).look, foreground=True) is backend


OVERLAY_FACTS = [Fact.FUSE, Fact.MOUNT, Fact.USER_OVERLAY_DATA]
OVERLAY_VERITY_FACTS = [Fact.FUSE, Fact.MOUNT, Fact.OVERLAY_VERITY, Fact.OBJECTS_VERITY, Fact.USER_OVERLAY_DATA]
FUSE_FACTS = [Fact.FUSE, Fact.FUSE_MOUNT]
WRITABLE_FUSE_FACTS = [Fact.FUSE, Fact.MOUNT, Fact.USER_OVERLAY]


@pytest.mark.parametrize(
    ("options", "has", "seen"),
    [
        ("noverity", ALL, KERNEL_FACTS),
        ("noverity", NAMESPACE, [*KERNEL_FACTS, *OVERLAY_FACTS]),
        ("noverity", BEFORE_6_7, [*KERNEL_FACTS[:2], *OVERLAY_FACTS, *FUSE_FACTS]),
        ("noverity", ORDINARY, [Fact.EROFS, *OVERLAY_FACTS[:2], *FUSE_FACTS]),
        ("", ALL, KERNEL_VERITY_FACTS),
        ("", NAMESPACE, [*KERNEL_VERITY_FACTS, *OVERLAY_VERITY_FACTS]),
        ("", ROOT_WITHOUT_VERITY, [*KERNEL_VERITY_FACTS[:2], *OVERLAY_VERITY_FACTS[:3], *FUSE_FACTS]),
        ("", ALL - {Fact.OBJECTS_VERITY}, [*KERNEL_VERITY_FACTS[:3], *OVERLAY_VERITY_FACTS[:4], *FUSE_FACTS]),
        ("", ORDINARY, [Fact.EROFS, *OVERLAY_FACTS[:2], *FUSE_FACTS]),
        ("uid=1", ROOT_WITHOUT_VERITY, [*OVERLAY_VERITY_FACTS[:3], *FUSE_FACTS]),
        ("noallow_other", ALL, FUSE_FACTS),
        ("backend=fuse", ALL, FUSE_FACTS),
        (f"backend=fuse,{LAYERS}", ALL, WRITABLE_FUSE_FACTS),
        ("backend=overlay,noverity", ALL, OVERLAY_FACTS),
        ("backend=overlay", ALL, OVERLAY_VERITY_FACTS),
        ("backend=kernel,noverity", ALL, [Fact.EROFS, Fact.KERNEL_VIEW]),
    ],
)
def test_no_more_is_looked_at_than_needed_and_the_cheap_first(
    options: str, has: frozenset[Fact], seen: list[Fact]
) -> None:
    facts = Facts(has)
    choose(parse(options), facts.look)
    assert facts.seen == seen


def test_what_follows_from_another_problem_is_not_told() -> None:
    def look(fact: Fact) -> str | None:
        return {Fact.EROFS: "no EROFS", Fact.KERNEL_VIEW: f"{UNTRIED}EROFS"}.get(fact)

    verdicts = {verdict.backend: verdict.problems for verdict in judge(parse("noverity"), look)}
    assert verdicts == {KERNEL: ["no EROFS"], OVERLAY: [], FUSE: []}
    lone = next(judge(parse("noverity"), {Fact.KERNEL_VIEW: f"{UNTRIED}EROFS"}.get))
    assert lone.problems == [f"{UNTRIED}EROFS"]


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ("backend=kernel", [Fact.EROFS]),
        ("backend=kernel,uid=1", []),
        ("backend=overlay", [Fact.FUSE]),
        ("backend=overlay,idmap=/ns", []),
        (f"backend=fuse,{LAYERS}", [Fact.FUSE]),
        ("backend=fuse,idmap=/ns", []),
        ("backend=fuse", [Fact.FUSE]),
        ("", [Fact.EROFS, Fact.FUSE, Fact.FUSE]),
    ],
)
def test_the_first_thing_that_is_wrong_is_enough(options: str, seen: list[Fact]) -> None:
    facts = Facts(frozenset())
    with pytest.raises(HostError):
        choose(parse(options), facts.look)
    assert facts.seen == seen


def needed(backend: Backend, *, verified: bool, writable: bool) -> set[Fact]:
    """Return what the table of backends says, without any order."""
    verity = VERITY if verified else set()
    return {
        KERNEL: set(KERNEL_FACTS) | verity,
        OVERLAY: {Fact.FUSE, Fact.MOUNT, Fact.USER_OVERLAY_DATA} | verity,
        FUSE: {Fact.FUSE, Fact.MOUNT, Fact.USER_OVERLAY} if writable else {Fact.FUSE, Fact.FUSE_MOUNT},
    }[backend]


@pytest.mark.parametrize("writable", [False, True], ids=["read-only", "writable"])
@pytest.mark.parametrize("verification", ["noverity", "tryverity", "verity"])
def test_every_set_of_facts_has_the_first_backend_that_needs_no_more(
    verification: str,
    writable: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    options = parse(f"{verification},{LAYERS}" if writable else verification)
    needs = {backend: needed(backend, verified=verification != "noverity", writable=writable) for backend in Backend}
    for count in range(len(Fact) + 1):
        for has in map(frozenset, itertools.combinations(Fact, count)):
            verdicts = {verdict.backend: verdict.problems for verdict in judge(options, Facts(has).look)}
            assert {backend: len(problems) for backend, problems in verdicts.items()} == {
                backend: len(facts - has) for backend, facts in needs.items()
            }
            possible = [backend for backend in Backend if needs[backend] <= has]
            if possible:
                assert choose(options, Facts(has).look) is possible[0]
            else:
                with pytest.raises(HostError):
                    choose(options, Facts(has).look)


def test_judgement_tells_all_that_is_wrong() -> None:
    options = parse(f"uid=1,gid=2,noallow_other,idmap=/ns,{LAYERS}")
    kernel, overlay, fuse = judge(options, Facts(frozenset()).look, foreground=True)
    assert (kernel.backend, kernel.problems) == (KERNEL, [UID, GID, PRIVATE, SERVER, *lacking(KERNEL_VERITY_FACTS)])
    assert (overlay.backend, overlay.problems) == (OVERLAY, [IDMAP, PRIVATE, *lacking(OVERLAY_VERITY_FACTS)])
    assert (fuse.backend, fuse.problems) == (FUSE, [IDMAP, PRIVATE, *lacking(WRITABLE_FUSE_FACTS)])


def lacking(facts: list[Fact]) -> list[str]:
    return [f"no {fact.value}" for fact in facts]


@pytest.mark.parametrize("has", [ALL, BEFORE_6_7])
@pytest.mark.parametrize("name", ["auto", "kernel", "overlay", "fuse"])
def test_judgement_of_a_backend_does_not_depend_on_which_other_is_named(name: str, has: frozenset[Fact]) -> None:
    named = judge(parse("noverity")._replace(backend=name), Facts(has).look)
    for verdict, expected in zip(named, judge(parse("noverity"), Facts(has).look), strict=True):
        if verdict.backend.value == name:  # who names the kernel may have it with the view that it has
            assert set(verdict.problems) == set(expected.problems) - {f"no {Fact.FULL_VIEW.value}"}
        else:
            assert verdict == expected


@pytest.mark.parametrize("options", ["", "verity", "tryverity", LAYERS, "idmap=/ns", "uid=0"])
def test_none_is_taken_to_verify_less(options: str) -> None:
    for has in (ALL - {Fact.OBJECTS_VERITY}, ALL - {Fact.OVERLAY_VERITY}):
        kernel, overlay, _ = judge(parse(options), Facts(has).look)
        assert kernel.problems
        assert overlay.problems
