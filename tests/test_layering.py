"""Imports point one way, and the start of a command imports little."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys

import pytest

from tests.support import HERE

ROOT = os.path.dirname(HERE)
PACKAGE = os.path.join(ROOT, "cfsfuse")

# A module may import what stands above it here, and others of its own line.
LAYERS = [
    {"errors", "verification"},
    {"lru", "atomic", "beneath", "collector", "pace", "fstype", "privilege", "processes"},
    {"tree", "erofs", "verity"},
    {"dump", "dumpparser", "imagefile"},
    {"basedirs", "trees", "objects"},
    {"access", "vfs"},
    {"contract"},
    {"builder"},
    {"fuse"},
    {"mount"},
    {"bench"},
    {"api"},
    {"cli"},
]
FOREIGN_ALLOWED = {
    "trio": {"vfs", "fuse", "mount"},
    "pyfuse3": {"fuse"},
    "rich": {"cli"},
    "argparse": {"cli"},
    "shtab": {"cli"},
    "xxhash": {"erofs"},
    "platformdirs": {"mount", "cli"},
}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Return the syntax tree of every module of the package, by its dotted name below it."""
    found = {}
    for folder, _, names in os.walk(PACKAGE):
        for name in names:
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                dotted = os.path.relpath(path, PACKAGE)[:-3].replace(os.sep, ".").removesuffix(".__init__")
                with open(path, encoding="utf-8") as file:
                    found["" if dotted == "__init__" else dotted] = ast.parse(file.read(), path)
    assert len(found) > 20
    return found


def imports(tree: ast.AST) -> set[str]:
    """Return the dotted names of all modules imported anywhere in `tree`, those for type checkers included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they point"
            module = node.module or ""
            found |= {
                f"{module}.{alias.name}" if module in ("cfsfuse", "cfsfuse.builder", "cfsfuse.erofs") else module
                for alias in node.names
            }
    return found


def at_run_time(tree: ast.Module) -> ast.Module:
    """Return `tree` without the blocks that only type checkers read."""

    class Strip(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | None:
            is_typing = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            return None if is_typing else self.generic_visit(node)

    return Strip().visit(ast.parse(ast.unparse(tree)))  # type: ignore[no-any-return]  # a Module in, a Module out


def layer(component: str) -> int:
    return next(index for index, names in enumerate(LAYERS) if component in names)


def test_every_module_has_a_layer() -> None:
    known = set().union(*LAYERS)
    assert {name.split(".")[0] for name in modules() if name} == known


@pytest.mark.parametrize("name", sorted(name for name in modules() if name))
def test_imports_point_downward(name: str) -> None:
    component = name.split(".", maxsplit=1)[0]
    for imported in imports(at_run_time(modules()[name])):
        if not imported.startswith("cfsfuse.") or imported == "cfsfuse.__version__":
            continue
        target = imported.split(".")[1]
        assert layer(target) <= layer(component), f"{name} imports {imported}"


@pytest.mark.parametrize("foreign", FOREIGN_ALLOWED)
def test_foreign_packages_stay_where_they_belong(foreign: str) -> None:
    users = {
        name.split(".")[0] for name, tree in modules().items() if foreign in {i.split(".")[0] for i in imports(tree)}
    }
    assert users <= FOREIGN_ALLOWED[foreign]


@pytest.mark.parametrize("component", ["erofs", "verity"])
def test_parsers_import_nothing_above_them(component: str) -> None:
    allowed = {"errors", "lru", "tree", "fstype", component}
    for name, tree in modules().items():
        if name.split(".")[0] == component:
            ours = {i.split(".")[1] for i in imports(tree) if i.startswith("cfsfuse.")}
            assert ours <= allowed, name


def test_errors_import_nothing_of_ours() -> None:
    assert not {name for name in imports(modules()["errors"]) if name.startswith("cfsfuse")}


def test_only_the_command_line_prints_and_exits() -> None:
    for name, tree in modules().items():
        if name.split(".")[0] == "cli":
            continue
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call, ast.Name) and call.id in ("print", "exit", "quit")], name
        exits = [call for call in calls if isinstance(call, ast.Attribute) and call.attr == "exit"]
        assert not [call for call in exits if isinstance(call.value, ast.Name) and call.value.id == "sys"], name


@pytest.mark.parametrize(
    "name",
    [
        "cfsfuse.cli.main",
        "cfsfuse.cli.mount",
        "cfsfuse.cli.mount_helper",
        "cfsfuse.cli.mk",
        "cfsfuse.cli.run",
        "cfsfuse.cli.compare",
        "cfsfuse.cli.doctor",
        "cfsfuse.cli.bench",
        "cfsfuse.cli.umount",
        "cfsfuse.mount.ladder",
        "cfsfuse.dump",
        "cfsfuse.api",
    ],
)
def test_start_of_a_command_imports_no_event_loop(name: str) -> None:
    script = f"import sys, {name}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    environment = {**os.environ, "PYTHONPATH": ROOT}
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    loaded = set(done.stdout.split())
    assert "cfsfuse" in loaded
    assert not loaded & {"trio", "pyfuse3", "rich", "shtab", "asyncio", "cryptography", "hypothesis"}


def test_a_kernel_mount_imports_little() -> None:
    """It takes a millisecond; what serves, hashes or looks at objects takes a hundred times as long to import."""
    script = "import sys, cfsfuse.cli.main, cfsfuse.cli.mount; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": ROOT}
    command = [sys.executable, "-S", "-W", "error", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    loaded = set(done.stdout.split())
    assert "cfsfuse.mount.kernel" in loaded
    ours = {"cfsfuse.mount.fuse", "cfsfuse.mount.daemon", "cfsfuse.mount.trial", "cfsfuse.objects", "cfsfuse.processes"}
    assert not loaded & ours
    foreign = {"hashlib", "dataclasses", "inspect", "logging", "json", "socket", "subprocess", "tempfile", "shutil"}
    assert not loaded & foreign


def test_image_bytes_are_sliced_in_one_place() -> None:
    """`Image.slice` and its like are the only ways to the buffer."""
    for name, tree in modules().items():
        if name != "erofs.image":
            touched = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "_buffer"]
            assert not touched, name
