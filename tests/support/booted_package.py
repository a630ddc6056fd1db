"""A booted systemd on which the Debian package is installed, started, upgraded, and purged.

Run as :mod:`tests.support.booted` is, with ``FOLDER/package.deb``. Nothing of the checkout runs as
the service: the package brings its units, its settings and its own environment.
"""

from __future__ import annotations

import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

from tests.support.booted import UPSTREAM_PORT, add_driver, main, shown, systemctl
from tests.support.processes import until
from tests.support.registry import running_registry

SETTINGS = Path("/etc/obdelta/tap.conf")
STATE = Path("/var/lib/private/obdelta")
_OPERATORS = "http://127.0.0.1:9100"


def install(root: Path, folder: Path) -> None:
    """The package, and what boots."""
    shutil.copy(folder / "package.deb", root / "package.deb")
    add_driver(root, folder, "tests.support.booted_package")


def drive(folder: Path) -> dict[str, Any]:
    """Does what the package says at its installation, then upgrades, removes and purges it."""
    found: dict[str, Any] = {"installed": _dpkg("--install", "/package.deb")}
    found["at_first"] = shown("ActiveState")
    with running_registry(folder / "registry", port=UPSTREAM_PORT):
        SETTINGS.write_text(
            "[obdelta]\npublic-url = http://127.0.0.1:443\nauth = none\n"
            f"upstream = http://127.0.0.1:{UPSTREAM_PORT}\n"
        )
        systemctl("enable", "--now", "obdelta.socket", "obdelta.service")
        until("it is ready", lambda: _get("/readyz").startswith("ready\n"), 120)
        found["ready"] = _get("/readyz")
        found["user"] = shown("DynamicUser")
        status = Path(f"/proc/{shown('MainPID')}/status").read_text()
        found["uid"] = int(status.partition("\nUid:")[2].split()[0])
        found["status"] = _obdelta("status")
        found["gc"] = _obdelta("gc")
        found["page"] = _get("/")
        before = shown("MainPID")
        _dpkg("--install", "/package.deb")  # an upgrade, to the same version
        until("it is ready again", lambda: _get("/readyz").startswith("ready\n"), 120)
        found["restarted"] = shown("MainPID") != before
        _dpkg("--remove", "obdelta")
        found["removed"] = shown("ActiveState"), SETTINGS.exists(), STATE.is_dir()
        found["purged"] = _dpkg("--purge", "obdelta")
        found["left"] = sorted(
            str(path)
            for path in (Path("/opt/obdelta"), SETTINGS.parent, Path("/usr/bin/obdelta"), STATE)
            if path.exists()
        )
        found["unit"] = shown("LoadState")
    return found


def _dpkg(*arguments: str) -> str:
    return subprocess.run(
        ["dpkg", "--force-unsafe-io", *arguments],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ).stdout


def _obdelta(*arguments: str) -> str:
    return subprocess.run(
        ["/usr/bin/obdelta", *arguments], cwd="/", check=True, capture_output=True, text=True
    ).stdout


def _get(path: str) -> str:
    try:
        with urllib.request.urlopen(_OPERATORS + path, timeout=30) as answer:
            return str(answer.read().decode())
    except OSError as error:
        return f"no answer: {error}"


if __name__ == "__main__":
    main(install, drive)
