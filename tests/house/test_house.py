"""Who may import whom: dependencies point one way, and no room of a memory or an architecture is named outside."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from tcinfer.architectures import ARCHITECTURES
from tcinfer.memory import MODES

PARTS = {"tcinfer": ROOT / "tcinfer", "tcinfer.kernels": ROOT / "kernels", "tcinfer.converters": ROOT / "converters"}
# Lower floors first; a module imports its own floor or lower ones. What is not named here is above the engines.
FLOORS = (
    ("tcinfer.errors", "tcinfer.kernels", "tcinfer.interrupts"),
    ("tcinfer.config", "tcinfer.atomic"),
    ("tcinfer.sampling", "tcinfer.tokenizer", "tcinfer.gguf.reader"),
    ("tcinfer.chat.template",),
    ("tcinfer.constraint",),
    ("tcinfer.net", "tcinfer.memory"),
    ("tcinfer.architectures", "tcinfer.memory_options"),
    ("tcinfer.transformer", "tcinfer.gguf.schema"),
    ("tcinfer.engine",),
    ("tcinfer.loaded",),
    ("tcinfer.sequence",),
    ("tcinfer.generation", "tcinfer.session_file"),
    ("tcinfer.handle", "tcinfer.text", "tcinfer.absorb"),
    ("tcinfer.scheduler",),
    ("tcinfer.api",),
    ("tcinfer.loader",),
)
ABOVE = len(FLOORS)
COMMANDS = ("tcinfer.cli", "tcinfer.__main__")


def modules() -> dict[str, Path]:
    """Every module of the package, by its name."""
    found = {}
    for package, folder in PARTS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """What a file imports wherever it does, but for types alone."""
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module
        nodes += ast.iter_child_nodes(node)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def floor(name: str) -> int:
    return next((i for i, those in enumerate(FLOORS) if any(within(name, one) for one in those)), ABOVE)


@pytest.mark.parametrize("name", [name for name in MODULES if floor(name) < ABOVE])
def test_imports_point_downwards(name: str) -> None:
    for other in imports(MODULES[name]):
        if within(other, "tcinfer"):
            assert floor(other) <= floor(name), other


def private_names(tree: ast.AST) -> tuple[set[str], set[str]]:
    """Private names that a file defines, and those that it asks objects for."""
    defined, asked = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute):
            (defined if isinstance(node.ctx, ast.Store) else asked).add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module and within(node.module, "tcinfer"):
            asked |= {alias.name for alias in node.names}
    return defined, {name for name in asked if name.startswith("_") and not name.endswith("__")}


# What libraries call so, and objects hold for others of their own kind.
THEIRS = {"_cache", "_cache_path", "_cache_file", "_ctx", "_asdict", "_replace", "_fields"}


@pytest.mark.parametrize("name", MODULES)
def test_nobody_asks_for_a_private_name_of_another_module(name: str) -> None:
    defined, asked = private_names(ast.parse(MODULES[name].read_text()))
    assert asked - defined <= THEIRS


def test_kernels_know_nothing_of_the_rest() -> None:
    for name, path in MODULES.items():
        if within(name, "tcinfer.kernels"):
            assert not [o for o in imports(path) if within(o, "tcinfer") and not within(o, "tcinfer.kernels")], name


def test_commands_are_imported_by_commands_alone() -> None:
    for name, path in MODULES.items():
        if not name.startswith(COMMANDS):
            assert not [o for o in imports(path) if o.startswith(COMMANDS)], name


HEAVY = {"numba", "llvmlite", "cupy", "torch"}
MAY = {
    "tcinfer.kernels.cpu": {"numba", "llvmlite"},
    "tcinfer.kernels.cuda": {"cupy"},
    "tcinfer.memory.infini.compiled": {"numba", "llvmlite"},
    "tcinfer.memory.tensor_cache.compiled": {"numba", "llvmlite"},
}


def test_only_a_backend_imports_what_it_runs_on() -> None:
    """So a GPU needs no Numba, a CPU no CuPy, and nothing PyTorch."""
    for name, path in MODULES.items():
        may = set().union(*(those for package, those in MAY.items() if within(name, package)))
        found = {other.split(".")[0] for other in imports(path)} & HEAVY
        if within(name, "tcinfer.measure.machine") or within(name, "tcinfer.measure.speed"):
            continue  # look whether it is there
        assert found <= may, name
        if within(name, "tcinfer.kernels.cuda"):
            assert not [other for other in imports(path) if within(other, "tcinfer.kernels.cpu")], name


# Where the same words name something else: kinds of tokenizers, families of checkpoints, what folders of others say.
OTHER_NAMES = {
    *("tcinfer.tokenizer.huggingface", "tcinfer.tokenizer.kinds", "tcinfer.converters.vocabulary"),
    *("tcinfer.converters", "tcinfer.converters.tcgpt", "tcinfer.converters.huggingface"),
}


def code(path: Path) -> str:
    """A file's text without comments and docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def test_a_room_is_named_in_its_registry_alone() -> None:
    rooms = {row.room for row in MODES.values()} - {"ring"}
    modes = {mode for mode, row in MODES.items() if row.needs_weights}
    texts = "|".join([*rooms, *(f"['\"]{mode}['\"]" for mode in modes), *(f"['\"]{a}['\"]" for a in ARCHITECTURES)])
    found = []
    for name, path in MODULES.items():
        inside = any(within(name, f"tcinfer.memory.{room}") for room in rooms) or within(name, "tcinfer.architectures")
        if inside or name == "tcinfer.memory" or name in OTHER_NAMES:
            continue
        found += [f"{name}: {match[0]}" for match in re.finditer(texts, code(path))]
    assert not found
