"""Imports follow the layers of docs/architecture.md, and that page names every module; what it says
of forms is complete.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tools.architecture_tables import PAGE, ROOT, modules, rewritten

PURE = [
    "obdelta.oci",
    "obdelta.delta",
    "obdelta.settings",
    "obdelta.processes.worker_main",
    "obdelta.device",
    "obdelta.errors",
]
ENTRY_POINTS = ("tap.py", "server_process.py")


class Package(NamedTuple):
    """One section of the page: a package's directory or a module's file, and what it may import."""

    layer: int
    path: Path
    may: frozenset[str]


def packages() -> dict[str, Package]:
    """Returns the sections of the page by their short names (``web``, ``oci``, ``tap``)."""
    found = {}
    section = re.compile(
        r"^### `(obdelta/\w+(?:\.py|/))` · layer (\d)\n(.*?)(?=^### |^## |\Z)", re.M | re.S
    )
    for path, layer, text in section.findall(PAGE.read_text("utf-8")):
        may = re.search(r"^May import: (.*)\.$", text, re.M)
        assert may, f"{path}: no line 'May import: …'"
        names = frozenset(re.findall(r"`(\w+)`", may[1]))
        found[Path(path).stem] = Package(int(layer), ROOT / path, names)
    return found


PACKAGES = packages()


def sources(package: Package) -> list[Path]:
    return sorted(package.path.rglob("*.py")) if package.path.is_dir() else [package.path]


def imported(module: Path) -> Iterator[str]:
    """Yields the full names of what a module imports, wherever in it."""
    for node in ast.walk(ast.parse(module.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_is_in_a_package_of_the_page() -> None:
    known = {module for package in PACKAGES.values() for module in sources(package)}
    known.add(ROOT / "obdelta/__init__.py")
    missing = set((ROOT / "obdelta").rglob("*.py")) - known
    assert not missing, f"not in docs/architecture.md: {missing}"
    assert all(package.path.exists() for package in PACKAGES.values())


def test_every_folder_has_a_table_on_the_page() -> None:
    page = PAGE.read_text("utf-8")
    for folder in sorted({path.parent for path in (ROOT / "obdelta").rglob("*.py")}):
        if modules(folder) and folder != ROOT / "obdelta":
            assert f"`{folder.relative_to(ROOT)}/`" in page, f"no section for {folder}"


def test_tables_are_those_of_the_docstrings() -> None:
    page = PAGE.read_text("utf-8")
    assert page == rewritten(page), "run: python -m tools.architecture_tables"


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_a_package_imports_only_what_its_section_names(name: str) -> None:
    package = PACKAGES[name]
    for other in package.may:
        assert PACKAGES[other].layer <= package.layer, f"{name} may import {other}, which is above"
    allowed = package.may | {name, "errors", "__version__"}
    for module in sources(package):
        for target in imported(module):
            if target.startswith("obdelta."):
                assert target.split(".")[1] in allowed, f"{module.relative_to(ROOT)}: {target}"
            assert not target.startswith(("tests.", "bench.")), f"{module.relative_to(ROOT)}"


def reach(name: str) -> set[str]:
    found: set[str] = set()
    for other in PACKAGES[name].may:
        found |= {other} | reach(other)
    return found


def test_no_two_packages_import_each_other() -> None:
    for name in PACKAGES:
        assert name not in reach(name), f"{name} imports itself through others"


@pytest.mark.parametrize("module", PURE)
def test_pure_packages_import_neither_twisted_nor_sqlite(module: str) -> None:
    code = f"import sys, pkgutil, importlib, {module} as package\n"
    if (ROOT / module.replace(".", "/")).is_dir():
        code += (
            "for found in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
            "    if found.name != 'obdelta.delta.kernel.compile':\n"
            "        importlib.import_module(found.name)\n"
        )
    code += "print(sorted({'twisted', 'sqlite3', 'treq', 'docker'} & sys.modules.keys()))"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.stdout.strip() == "[]", ran.stdout + ran.stderr


def test_only_entry_points_take_the_global_reactor() -> None:
    for module in (ROOT / "obdelta").rglob("*.py"):
        if module.name not in ENTRY_POINTS:
            taken = set(imported(module))
            assert "twisted.internet.reactor" not in taken, f"{module} imports the global reactor"


def test_a_command_line_is_parsed_without_what_is_slow_to_import() -> None:
    code = "import sys\nfrom obdelta.cli.main import make_parser\nmake_parser()\n"
    code += "slow = {'twisted', 'rich', 'http.client', 'obdelta.device', 'obdelta.delta.kernel'}\n"
    code += "print(sorted(slow & sys.modules.keys()))"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.stdout.strip() == "[]", ran.stdout + ran.stderr


OTHER_COMPRESSION = {
    "cli/commands/images/diff_patch.py": "an example for a shell",
    "delta/reports/entry_changes.py": "compressed files inside of layers",
    "oci/manifest.py": "media types of the specifications",
    "web/devices/responses.py": "HTTP's content coding",
}
"""Modules that name a compression, but not as the form of a delta."""


def form_modules() -> set[str]:
    """Returns the modules of the page's rows about a compression of delta layers."""
    page = PAGE.read_text("utf-8")
    rows = re.findall(r"^\| a compression of delta layers: .*\| (.*) \|$", page, re.M)
    return {path for row in rows for path in re.findall(r"`([\w/]+\.\w+)`", row)}


def names_a_form(module: Path) -> bool:
    """Returns whether code names one form, in an attribute or a string; docstrings do not count."""
    tree = ast.parse(module.read_text("utf-8"))
    lone = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("Form.GZIP", "Form.ZSTD"):
            return True
        if isinstance(node, ast.Constant) and id(node) not in lone:
            text = node.value.decode("latin-1") if isinstance(node.value, bytes) else node.value
            if isinstance(text, str) and re.search(r"(?<![a-z])(gzip|zstd)(?![a-z])", text, re.I):
                return True
    return False


def test_only_the_listed_modules_name_a_form_of_deltas() -> None:
    listed = form_modules()
    assert len(listed) > 5 and all((ROOT / "obdelta" / path).is_file() for path in listed)
    naming = {
        path.relative_to(ROOT / "obdelta").as_posix()
        for path in (ROOT / "obdelta").rglob("*.py")
        if names_a_form(path)
    }
    assert naming - listed == set(OTHER_COMPRESSION), "use the properties in oci/form.py instead"
