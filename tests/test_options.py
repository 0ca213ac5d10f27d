"""Mount options: text → MountOptions."""

from __future__ import annotations

import pytest

from cfsfuse.errors import UsageError
from cfsfuse.mount.options import AUTO, BACKENDS, SESSIONS, MountOptions, parse, split
from cfsfuse.mount.plan import Backend
from cfsfuse.verification import Verification

DIGEST = "0123456789abcdef" * 4


def test_nothing_said_is_the_default() -> None:
    assert (
        parse("") == parse(",,") == parse("ro,rw,defaults,noauto,nofail,x-systemd.automount,_netdev") == MountOptions()
    )


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("basedir=/a", "basedir", ("/a",)),
        ("basedir=/a:/b", "basedir", ("/a", "/b")),
        ("basedir=/a,basedir=/b", "basedir", ("/a", "/b")),
        (r"basedir=/a\:b:/c", "basedir", ("/a:b", "/c")),
        (r"basedir=/a\,b,ro", "basedir", ("/a,b",)),
        ("basedir=/a=b", "basedir", ("/a=b",)),
        ("basedir=::/a:", "basedir", ("/a",)),
        (f"digest={DIGEST}", "digest", DIGEST),
        (f"digest={DIGEST.upper()}", "digest", DIGEST),
        (f"digest={DIGEST * 2}", "digest", DIGEST * 2),
        ("verity", "verification", Verification.REQUIRED),
        ("noverity", "verification", Verification.OFF),
        ("tryverity", "verification", Verification.RECORDED),
        ("allow_other", "allow_other", True),
        ("noallow_other", "allow_other", False),
        ("uid=0", "uid", 0),
        ("gid=4294967294", "gid", 4294967294),
        ("statfs=image", "statfs", "image"),
        ("poll=0", "poll", 0),
        ("log=/var/log/x", "log", "/var/log/x"),
        ("nosuid,dev", "flags", ("nosuid", "dev")),
        *((f"backend={name}", "backend", name) for name in BACKENDS),
        *((f"session={name}", "session", name) for name in SESSIONS),
    ],
)
def test_options(text: str, field: str, value: object) -> None:
    assert getattr(parse(text), field) == value
    assert getattr(parse(f"ro,{text},noauto"), field) == value


@pytest.mark.parametrize(("text", "field"), [("uid=1,uid=2", "uid"), ("poll=1,poll=2", "poll")])
def test_last_one_counts(text: str, field: str) -> None:
    assert getattr(parse(text), field) == 2


def test_last_backend_counts() -> None:
    assert parse("backend=kernel,backend=fuse").backend == "fuse"
    assert parse("backend=kernel,backend=auto") == parse("")


@pytest.mark.parametrize("value", ["fusefs", "Kernel", "overlayfs", "kernel:fuse", " "])
def test_a_backend_that_does_not_exist_is_told_with_those_that_do(value: str) -> None:
    with pytest.raises(UsageError, match=f"^backend={value}: must be auto, kernel, overlay or fuse$"):
        parse(f"backend={value}")


def test_the_ladder_is_what_can_be_named() -> None:
    assert (AUTO, *(backend.value for backend in Backend)) == BACKENDS


@pytest.mark.parametrize("text", ["noverity,verity", "verity,ro,noverity", "noverity,tryverity", "verity,tryverity"])
def test_contradictions_about_verification_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="contradict each other"):
        parse(text)


def test_the_same_word_twice_is_no_contradiction() -> None:
    assert parse("verity,verity").verification is Verification.REQUIRED


@pytest.mark.parametrize(
    "text",
    [
        "unknown", "unknown=1", "digest", "digest=", "digest=12", "digest=" + "g" * 64, "basedir", "basedir=", "uid=x",
        "uid=-1", "uid=4294967295", "uid=1.0", "uid=٣", "gid=", "statfs=other", "poll=fast", "verity=1", "nosuid=1",
        "Basedir=/a", " ro", "log=", "backend", "backend=", "backend=fast", "upperdir=", "workdir", "idmap=",
        "session", "session=", "session=libfuse",
    ],
)  # fmt: skip
def test_mistakes_name_the_option(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(f"ro,{text}")
    assert text.partition("=")[0].strip() in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_layers_of_overlayfs() -> None:
    options = parse(r"upperdir=/a\,b,workdir=/c,idmap=/proc/1/ns/user")
    assert (options.upperdir, options.workdir, options.idmap) == ("/a,b", "/c", "/proc/1/ns/user")
    assert options.is_writable
    assert not parse("upperdir=/a,workdir=/b,ro").is_writable
    assert parse("ro,upperdir=/a,workdir=/b,rw").is_writable
    assert not parse("rw").is_writable


@pytest.mark.parametrize(("text", "lacking"), [("upperdir=/a", "workdir="), ("workdir=/a", "upperdir=")])
def test_upperdir_and_workdir_come_together(text: str, lacking: str) -> None:
    with pytest.raises(UsageError, match=f"option {lacking} is missing"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", [""]),
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        (r"a\,b,c", ["a,b", "c"]),
        (r"a\b,c", [r"a\b", "c"]),
        (",", ["", ""]),
    ],
)
def test_split(text: str, parts: list[str]) -> None:
    assert split(text, ",") == parts
