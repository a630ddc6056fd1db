"""The package is complete: installed into a clean environment, it runs from any directory."""

from __future__ import annotations

import ast
import configparser
import json
import re
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from obdelta.cli.main import make_parser
from tests.support.booted import booted
from tests.support.newcomer import clean_environment, copy_tracked, tracked
from tests.support.server import running_server
from tools.man_pages import commands

ROOT = Path(__file__).parents[2]
COMMANDS = commands(make_parser())

pytestmark = pytest.mark.timeout(900)  # whichever test comes first waits for the builds


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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_tracked(folder / "source")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source, cwd=folder)
    (built,) = folder.glob("obdelta-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(newcomer: Path) -> Path:
    """Returns the ``bin`` of an environment that contains only obdelta and its requirements."""
    return newcomer / "venv" / "bin"


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


def test_the_wheel_is_installed_and_not_the_checkout(wheel: Path, installed: Path) -> None:
    (record,) = (installed.parent / "lib").glob("python3*/site-packages/obdelta-*.dist-info/RECORD")
    recorded = {line.split(",")[0] for line in record.read_text("utf-8").splitlines()}
    assert set(zipfile.ZipFile(wheel).namelist()) <= recorded


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


def test_a_failed_start_is_reported_in_one_line(installed: Path, tmp_path: Path) -> None:
    ran = subprocess.run(
        [installed / "twistd", "-n", "--pidfile=", "obdelta", "--request-timeout", "soon"],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1].startswith("obdelta: setting ")
    assert not list(tmp_path.iterdir())


def test_it_also_runs_in_a_checkout(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after ``pip install .``, in the same directory: `python -m` would take modules from there,
    and they are not compiled.
    """
    checkout = copy_tracked(tmp_path / "checkout", "obdelta/", "twisted/")
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


# -- the Debian package ------------------------------------------------------------------------

INSTALL = """
set -e
mount -t tmpfs tmpfs {folder}/upper
mkdir {folder}/upper/changed {folder}/upper/work
mount -t overlay overlay {folder}/root \\
    -o lowerdir=/,upperdir={folder}/upper/changed,workdir={folder}/upper/work
mount -t proc proc {folder}/root/proc
mount --bind /dev {folder}/root/dev
cp {package} {folder}/root/package.deb
exec chroot {folder}/root sh -ec '{commands}'
"""
"""Runs commands in a copy-on-write view of this machine, whose changes are lost at the end."""


@pytest.fixture(scope="module")
def package(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the package from the wheel as ``make dist`` does, with its bill of materials."""
    out = tmp_path_factory.mktemp("package")
    run("env", "COMPRESSION=-Zgzip -z1", ROOT / "tools/debian-package", wheel, out, cwd=out)
    (built,) = out.glob("*.deb")
    return built


def on_a_machine(package: Path, folder: Path, commands: str) -> str:
    """Returns what commands print in a view of this machine where root may change anything."""
    for name in ("upper", "root"):
        (folder / name).mkdir()
    script = INSTALL.format(folder=folder, package=package, commands=commands)
    return run("unshare", "--mount", "--pid", "--fork", "sh", "-c", script, cwd=Path("/"))


def test_the_debian_package_is_installed_used_and_removed(package: Path, tmp_path: Path) -> None:
    output = on_a_machine(
        package,
        tmp_path,
        """
        dpkg --install /package.deb
        echo verified: $(dpkg --verify obdelta)
        cd /
        setpriv --reuid=65534 --regid=65534 --clear-groups obdelta --version
        setpriv --reuid=65534 --regid=65534 --clear-groups /opt/obdelta/bin/twistd obdelta --version
        printf aaaabbbb >/old; printf bbbbaaaa >/new
        obdelta diff /old /new -o /delta && obdelta patch /old /delta -o /made && cmp /made /new
        dpkg --listfiles obdelta | grep /usr/share/man/.*gz
        bash -c "source /usr/share/bash-completion/completions/obdelta; complete -p obdelta"
        systemd-analyze verify /usr/lib/systemd/system/obdelta.service && echo units: good
        dpkg --remove obdelta && cat /etc/obdelta/tap.conf | head -n 1
        dpkg --purge obdelta
        ls -d /opt/obdelta /etc/obdelta /usr/bin/obdelta 2>&1 | grep -vc "No such file" || true
        """,
    )
    lines = output.splitlines()
    assert "    systemctl enable --now obdelta.socket obdelta.service" in lines
    assert "verified:" in lines  # no file differs from the package's
    assert len([line for line in lines if re.match(r"obdelta \d", line)]) == 2
    assert any(re.fullmatch(r"complete .*obdelta", line) for line in lines)
    assert "units: good" in lines
    assert (ROOT / "tap.conf").read_text("utf-8").splitlines()[0] in lines
    assert lines[-1] == "0"
    pages = {Path(line).stem for line in lines if line.startswith("/usr/share/man/")}
    assert pages == {"obdelta.1", "tap.conf.5", *(f"obdelta-{name}.1" for name in COMMANDS)}


def test_the_debian_package_runs_under_a_booted_systemd(package: Path, tmp_path: Path) -> None:
    """Installed, started by its own units, upgraded, removed and purged: booted_package.py."""
    shutil.copy(package, tmp_path / "package.deb")
    found = booted("tests.support.booted_package", tmp_path)
    assert "    systemctl enable --now obdelta.socket obdelta.service" in found["installed"]
    assert found["at_first"] == "inactive"  # its settings are not complete yet
    assert {"upstream: ok", "workers: ok", "store: ok"} <= set(found["ready"].splitlines())
    assert found["user"] == "yes" and 61184 <= found["uid"] <= 65519
    assert "ready" in found["status"] and "freed 0 bytes" in found["gc"]
    assert "Running builds" in found["page"]
    assert found["restarted"] is True
    assert found["removed"] == ["inactive", True, True]
    assert "the deltas are left in /var/lib/private/obdelta" in found["purged"]
    assert found["left"] == ["/var/lib/private/obdelta"]
    assert found["unit"] == "not-found"
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_the_bill_of_materials_has_every_locked_package(package: Path) -> None:
    (path,) = package.parent.glob("*.cdx.json")
    found = json.loads(path.read_text())
    assert found["bomFormat"] == "CycloneDX"
    parts = {normal(part["name"]): part["version"] for part in found["components"]}
    assert parts.pop("obdelta").startswith("0.")
    locked = dict(locked_versions())
    assert {name: locked[name] for name in parts} == parts
    assert names(setup_cfg()["options"]["install_requires"]) <= parts.keys()


# -- what is depended on -----------------------------------------------------------------------


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked_versions() -> Iterator[tuple[str, str]]:
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if found := re.match(r"([\w.-]+)==([^ ;\\]+)", line):
            yield normal(found[1]), found[2]


def test_the_lock_has_a_hash_for_each_requirement_and_names_no_index() -> None:
    text = (ROOT / "requirements.lock").read_text()
    packages = re.split(r"\n(?=\w)", text.partition("tools/lock\n")[2])
    assert len(packages) > 30
    assert all("--hash=sha256:" in package for package in packages)
    assert not re.search(r"https?:|file:|--index|--find", text)
    locked = dict(locked_versions())
    for line in run_requirements().split():
        name, _, minimum = re.sub(r"\[\w+\]", "", line).partition(">=")
        version = [int(part) for part in re.findall(r"\d+", locked[name])]
        assert version >= [int(part) for part in minimum.split(".")], line


MODULES = {"OpenSSL": "pyopenssl", "jwt": "pyjwt", "zope": "twisted"}
"""Packages whose import has another name; zope.interface comes with Twisted."""


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def run_requirements() -> str:
    """The image also installs the extra that workers and their frontends need."""
    parser = setup_cfg()
    extra = parser["options.extras_require"]["workers"]
    return f"{parser['options']['install_requires']}\n{extra}"


def names(requirements: str) -> set[str]:
    return {re.split(r"[\[<>=~ ]", line)[0] for line in requirements.split()}


def test_each_imported_package_is_a_requirement() -> None:
    wanted = names(run_requirements())
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
