"""What is shipped is whole: a wheel, built and installed into a clean environment, runs from any
folder.
"""

from __future__ import annotations

import ast
import configparser
import os
import re
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest

from tests.support.server import running_server

ROOT = Path(__file__).parents[2]


def clean_environment() -> dict[str, str]:
    """Without what would lead a process back to this checkout."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }


def run(*command: object, cwd: Path) -> str:
    ran = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def tracked() -> list[str]:
    """The files of the checkout, without those that were removed and are not committed yet."""
    names = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    return [name for name in names if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy of what is tracked: nothing that lies about in a work tree may be needed, and
    # nothing is left in it.
    source = folder / "source"
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source, cwd=folder)
    (built,) = folder.glob("obdelta-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of a fresh environment with the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    pip = (
        sys.executable,
        "-m",
        "pip",
        "--python",
        folder / "venv/bin/python",
        "--disable-pip-version-check",
    )
    run(*pip, "install", "-q", "--no-compile", wheel, cwd=folder)
    return folder / "venv" / "bin"


def test_the_wheel_has_plugin_schema_and_kernel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "twisted/plugins/obdelta_plugin.py" in names
    assert "twisted/__init__.py" not in names
    assert "twisted/plugins/__init__.py" not in names
    assert "obdelta/py.typed" in names
    assert any(re.fullmatch(r"obdelta/delta/kernel/_kernel_cffi\..*\.?so", name) for name in names)
    for source in tracked():
        if source.startswith("obdelta/") and source.endswith((".py", ".sql")):
            assert source in names
    assert not [name for name in names if name.startswith(("tests/", "bench/", "tools/"))]


def test_twistd_finds_the_plugin(installed: Path, tmp_path: Path) -> None:
    assert re.search(
        r"^\s+obdelta\s+Delta updates for",
        run(installed / "twistd", "--help", cwd=tmp_path),
        re.MULTILINE,
    )
    assert run(installed / "twistd", "obdelta", "--version", cwd=tmp_path).startswith("obdelta 0.")
    usage = run(installed / "twistd", "obdelta", "--help", cwd=tmp_path)
    assert "--upstream=" in usage
    assert "--config=" in usage


def test_the_command_works_with_its_kernel(installed: Path, tmp_path: Path) -> None:
    for name, text in (("old", b"a" * 5000 + b"b" * 5000), ("new", b"b" * 5000 + b"a" * 5000)):
        (tmp_path / name).write_bytes(text)
    run(installed / "obdelta", "diff", "old", "new", "-o", "delta", cwd=tmp_path)
    run(installed / "obdelta", "patch", "old", "delta", "-o", "made", cwd=tmp_path)
    assert (tmp_path / "made").read_bytes() == (tmp_path / "new").read_bytes()


def test_the_catalogue_finds_its_schema(installed: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.resources import files\n"
        "print([each.name for each in (files('obdelta.store.catalogue') / 'schema').iterdir()])"
    )
    shipped = run(installed / "python", "-c", code, cwd=tmp_path)
    for step in (ROOT / "obdelta/store/catalogue/schema").glob("*.sql"):
        assert step.name in shipped


def test_a_start_that_cannot_be_is_one_line(installed: Path, tmp_path: Path) -> None:
    ran = subprocess.run(
        [installed / "twistd", "-n", "--pidfile=", "obdelta", "--hold", "soon"],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith("obdelta: setting ")
    assert not list(tmp_path.iterdir())


def test_it_runs_in_a_checkout_too(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after ``pip install .``, in the same folder: `python -m` would take modules from there,
    and they are not compiled.
    """
    checkout = tmp_path / "checkout"
    for name in tracked():
        if name.startswith(("obdelta/", "twisted/")):
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            (checkout / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(checkout)

    def command(*options: str) -> list[str]:
        return [str(installed / "twistd"), "-n", "--pidfile=", "obdelta", *options]

    with (
        running_server(
            tmp_path / "state",
            upstream=f"oci:{tmp_path / 'images'}",
            run=command,
            environment={"PYTHONPATH": ""},
            processes="2",
        ) as server,
        urllib.request.urlopen(f"{server.operator_url}/readyz", timeout=30) as answer,
    ):
        assert b"workers: ok" in answer.read()


# -- what is depended on -----------------------------------------------------------------------

MODULES = {"OpenSSL": "pyopenssl", "jwt": "pyjwt", "zope": "twisted"}
"""Packages that are imported by another name than their own; zope.interface comes with Twisted."""


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def names(requirements: str) -> set[str]:
    return {re.split(r"[\[<>=~ ]", line)[0] for line in requirements.split()}


def test_what_is_imported_is_asked_for() -> None:
    wanted = names(setup_cfg()["options"]["install_requires"])
    for source in (ROOT / "obdelta").rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            found = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for top in (name.split(".")[0] for name in found):
                if top not in sys.stdlib_module_names | {"obdelta"}:
                    assert MODULES.get(top, top.replace("_", "-")) in wanted, (
                        f"{source} imports {top}"
                    )


def test_every_dependency_has_its_reason() -> None:
    parser = setup_cfg()
    documented = set(re.findall(r"[\w-]+", (ROOT / "docs/dependencies.md").read_text()))
    extras = "\n".join(parser["options.extras_require"].values())
    assert names(parser["options"]["install_requires"]) | names(extras) <= documented


def test_every_package_ships() -> None:
    listed = set(setup_cfg()["options"]["packages"].split())
    there = {
        str(path.parent.relative_to(ROOT)).replace("/", ".")
        for path in (ROOT / "obdelta").rglob("__init__.py")
    }
    assert listed == there | {"twisted.plugins"}
