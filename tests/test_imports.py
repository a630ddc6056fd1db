"""The house's rule: imports run down, as the table in docs/architecture.md says, and pure rooms stay pure."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PURE = ["obdelta.oci", "obdelta.delta", "obdelta.settings", "obdelta.builds.worker", "obdelta.device", "obdelta.errors"]


class Room(NamedTuple):
    """One row of the table: ``path`` is a package's folder or a module's file, ``may`` names rooms."""

    floor: int
    path: Path
    may: frozenset[str]


def rooms() -> dict[str, Room]:
    """The table's rooms by their short names (``web``, ``oci``, ``tap``)."""
    found = {}
    for line in (ROOT / "docs/architecture.md").read_text().splitlines():
        if match := re.match(r"\| (\d) \| `((?:obdelta|twisted)/[a-z_/.]+)` \|.*\| ([^|]*) \|$", line):
            path = ROOT / match[2]
            found[path.stem] = Room(int(match[1]), path, frozenset(match[3].split(", ")))
    return found


ROOMS = rooms()


def reach(name: str) -> set[str]:
    """What a room may import: what its row names, what those may in their turn, and the errors."""
    room = ROOMS[name]
    found = {"errors"}
    if "everything below" in room.may:
        found |= {other for other, its in ROOMS.items() if its.floor < room.floor}
    for other in room.may & ROOMS.keys():
        found |= {other} | reach(other)
    return found


def modules(room: Room) -> list[Path]:
    return sorted(room.path.rglob("*.py")) if room.path.is_dir() else [room.path]


def imported(module: Path) -> Iterator[str]:
    """The full names of what a module imports, wherever in it."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_a_room() -> None:
    housed = {module for room in ROOMS.values() for module in modules(room)}
    housed.add(ROOT / "obdelta/__init__.py")
    homeless = set((ROOT / "obdelta").rglob("*.py")) - housed
    assert not homeless, f"not in the table of docs/architecture.md: {homeless}"
    assert all(room.path.exists() for room in ROOMS.values())


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_imports_run_down(name: str) -> None:
    for other in ROOMS[name].may & ROOMS.keys():
        assert ROOMS[other].floor <= ROOMS[name].floor, f"{name} may import {other}, which is above it"
    allowed = reach(name) | {name, "__version__"}
    for module in modules(ROOMS[name]):
        for target in imported(module):
            if target.startswith("obdelta."):
                assert target.split(".")[1] in allowed, f"{module.relative_to(ROOT)} imports {target}"
            assert not target.startswith(("tests.", "bench.")), f"{module.relative_to(ROOT)} imports {target}"


def test_no_two_rooms_import_each_other() -> None:
    for name in ROOMS:
        for other in reach(name) - {name}:
            assert name not in reach(other), f"{name} and {other} may import each other"


@pytest.mark.parametrize("module", PURE)
def test_pure_rooms_know_neither_twisted_nor_sqlite(module: str) -> None:
    code = f"import sys, pkgutil, importlib, {module} as room\n"
    if (ROOT / module.replace(".", "/")).is_dir():
        code += (
            "for found in pkgutil.iter_modules(room.__path__, room.__name__ + '.'):\n"
            "    if found.name != 'obdelta.delta.kernel_build':\n"
            "        importlib.import_module(found.name)\n"
        )
    code += "print(sorted({'twisted', 'sqlite3', 'treq', 'docker'} & sys.modules.keys()))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "[]", ran.stdout + ran.stderr


def test_only_tap_takes_the_global_reactor() -> None:
    for module in (ROOT / "obdelta").rglob("*.py"):
        if module.name not in ("tap.py", "face.py"):
            assert "twisted.internet.reactor" not in set(imported(module)), f"{module} imports the global reactor"
